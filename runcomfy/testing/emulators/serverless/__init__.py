"""RunComfy's serverless API, emulated; `ServerlessEmulator` is where to begin."""

from runcomfy.testing.emulators.serverless.requests import EmulatedInstance, EmulatedRequest, RequestTraits
from runcomfy.testing.emulators.serverless.server import ServerlessEmulator

__all__ = ["EmulatedInstance", "EmulatedRequest", "RequestTraits", "ServerlessEmulator"]
