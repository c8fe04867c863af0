"""Public door: generation on the user's own ComfyUI. It lives in `launcher.conjure.services`."""

from launcher.conjure.services import LocalComfyUIService

__all__ = ["LocalComfyUIService"]
