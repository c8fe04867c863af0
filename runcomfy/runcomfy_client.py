"""Public door: the client of RunComfy's Server API. It lives in `runcomfy.adapters.providers.runcomfy`."""

from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient

__all__ = ["RunComfyAPIClient"]
