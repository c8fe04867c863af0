"""Public door: RunComfy's serverless API by CONJURE's names. They live in `runcomfy.conjure.serverless_client`."""

from runcomfy.conjure.serverless_client import RequestStatus, ServerlessRequest, ServerlessRunComfyClient

__all__ = ["RequestStatus", "ServerlessRequest", "ServerlessRunComfyClient"]
