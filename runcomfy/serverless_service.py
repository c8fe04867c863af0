"""Public door: CONJURE's serverless service. It lives in `launcher.conjure.serverless`."""

from launcher.conjure.serverless import ServerlessRunComfyService

__all__ = ["ServerlessRunComfyService"]
