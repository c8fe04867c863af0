"""What handlers find in their application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.emulators.comfyui.process import ServerProcess

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PROCESS = web.AppKey("process", ServerProcess)

FAULT = "runcomfy.fault"
"""Request key of the fault this call was given."""


class OutsideFolder(Exception):
    """A path leaves the folder it belongs to: 403, empty."""


def process_of(request: web.Request) -> ServerProcess:
    """The server process that answers."""
    return request.app[PROCESS]


def fault_of(request: web.Request) -> Fault:
    """The fault of this call, one without effect if there is none."""
    fault: Fault = request.get(FAULT) or Fault()
    return fault
