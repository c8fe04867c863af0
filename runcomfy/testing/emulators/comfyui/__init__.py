"""The emulated ComfyUI server: queue, graph execution, files, sockets, and every fault on request."""
