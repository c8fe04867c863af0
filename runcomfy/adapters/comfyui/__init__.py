"""The ComfyUI server on a machine, over HTTP and WebSocket."""
