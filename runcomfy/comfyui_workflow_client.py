"""Public door: the client of one ComfyUI server. It lives in `runcomfy.adapters.comfyui.client`."""

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient

__all__ = ["ComfyUIWorkflowClient"]
