"""`GET /events`, `GET /jobs/{id}/events`: what happens, as Server-Sent Events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from launcher.backend import Backend, backend_of
from launcher.hub import Listener
from launcher.listening import line_of
from launcher.schemas import problems
from runcomfy.domain.queued import QueuedJob

router = APIRouter(tags=["events"])

log = logging.getLogger("runcomfy.http")

STUCK: Final = 60.0
"""Seconds after which a client that takes no bytes is given up."""
RETRY_MS: Final = 2_000
"""What clients are told to wait before they come back."""
HEADERS: Final[Mapping[str, str]] = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
MOST: Final = 2**63 - 1


class EventStream(Response):
    """A response that never ends by itself, made of what a listener hears."""

    media_type = "text/event-stream"

    def __init__(self, backend: Backend, job: QueuedJob | None, after: int | None) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]  # nobody knows
        self._backend, self._job, self._after = backend, job, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what is heard until the client goes, is too slow, or everybody has to leave."""
        async with self._backend.hub.listen(self._job, self._after) as listener:
            leaves = asyncio.create_task(_gone(receive, listener), name="listener-leaves")
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await _send(send, f"retry: {RETRY_MS}\n\n".encode())
                listener.line = line_of(scope)
                async for chunk in listener.chunks():
                    await _send(send, chunk)
            except TimeoutError:  # a computer that sleeps, say: no defect, and nothing can be said to it any more
                log.info("listener_given_up", extra={"fields": {"seconds": STUCK}})
                return
            finally:
                leaves.cancel()
            with suppress(OSError):
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, chunk: bytes) -> None:
    async with asyncio.timeout(STUCK):
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def _gone(receive: Receive, listener: Listener) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    listener.leave()


After = Annotated[int | None, Query(ge=0, le=MOST, description="The number of the last event that was seen.")]
Seen = Annotated[str | None, Header(alias="Last-Event-ID", description="The same, as browsers say it; it wins.")]
STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "Server-Sent Events, until the client leaves.", "content": {"text/event-stream": {}}}
}


@router.get("/events", response_class=Response, responses={**STREAM, **problems()})
async def events(
    backend: Annotated[Backend, Depends(backend_of)], after: After = None, last_event_id: Seen = None
) -> Response:
    """Everything that happens: events of the log (`job`, numbered), `progress`, `machines`, `money`.

    With a number: what came since, then what comes. Without: what comes.
    """
    return EventStream(backend, None, _number(last_event_id, after))


@router.get("/jobs/{job_id}/events", response_class=Response, responses={**STREAM, **problems(404)})
async def job_events(
    job_id: str, backend: Annotated[Backend, Depends(backend_of)], after: After = None, last_event_id: Seen = None
) -> Response:
    """What happens to one job, from its beginning or from a number on; `end` follows its last word."""
    return EventStream(backend, await backend.queue.job(job_id), _number(last_event_id, after))


def _number(said: str | None, after: int | None) -> int | None:
    """Return where a client was. A header that is none of our numbers is passed over: no client makes one up."""
    if said is not None and said.isascii() and said.isdigit() and len(said) < 20 and int(said) <= MOST:
        return int(said)
    return after
