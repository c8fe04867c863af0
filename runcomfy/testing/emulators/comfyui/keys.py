"""What handlers find in their application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from aiohttp import web

from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.emulators.comfyui.process import ServerProcess, SubmitRecord

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PROCESS = web.AppKey("process", ServerProcess)

submitted: ContextVar[SubmitRecord | None] = ContextVar("submitted", default=None)
"""What this call has queued."""

NO_FAULT = Fault()

_fault: ContextVar[Fault] = ContextVar("fault_of_this_call", default=NO_FAULT)


@contextmanager
def struck_by(fault: Fault) -> Iterator[None]:
    """Let `fault_of_this_call` be that fault while this call is handled."""
    token = _fault.set(fault)
    try:
        yield
    finally:
        _fault.reset(token)


class OutsideFolder(Exception):
    """A path leaves the folder it belongs to: 403, empty."""


def process_of(request: web.Request) -> ServerProcess:
    """The server process that answers."""
    return request.app[PROCESS]


def fault_of_this_call() -> Fault:
    """The fault of this call, one without effect if there is none."""
    return _fault.get()
