"""The emulated ComfyUI server: queue, graph execution, files, sockets, and every fault on request."""

from runcomfy.testing.emulators.comfyui import corruption
from runcomfy.testing.emulators.comfyui.faults import Fault, PromptFault, SocketFault
from runcomfy.testing.emulators.comfyui.server import ComfyUIEmulator

__all__ = ["ComfyUIEmulator", "Fault", "PromptFault", "SocketFault", "corruption"]
