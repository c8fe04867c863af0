"""What the routes of the HTTP API work with: one product (`App`) and what serves its clients, made once per process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request

if TYPE_CHECKING:
    from launcher.guarding.guard import Guard
    from launcher.hub import Hub
    from runcomfy.application.job_queue import JobQueue
    from runcomfy.bootstrap import App


@dataclass(slots=True)
class Backend:
    """Everything a route may use."""

    app: App
    queue: JobQueue
    hub: Hub
    """The one reader of the durable log, for any number of listeners."""
    guard: Guard
    """Token, sessions, limits."""
    shut_down: Callable[[], None]
    """Ends the whole service in good order."""
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when listeners must leave."""
    parts: frozenset[str] = frozenset({"http", "queue", "pool"})
    """What of `comfyctl serve` is switched on in this process."""
    queue_name: str = ""
    """What the queue's database calls itself: several queues may share a state folder."""


async def backend_of(request: Request) -> Backend:
    """Return the backend of the app that got the request; for `Depends`.

    A coroutine because FastAPI would run a plain function in a thread, which takes longer than the whole request.
    """
    backend: Backend = request.app.state.backend
    return backend
