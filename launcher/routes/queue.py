"""`/queue`: how it stands, and pausing it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from launcher.backend import Backend, backend_of
from launcher.plain_json import PlainJson
from launcher.schemas import PauseOrder, QueueShown, answers
from launcher.views import pause_view
from runcomfy.domain.queued import QueueStatus

router = APIRouter(prefix="/queue", tags=["queue"])

Serves = Annotated[Backend, Depends(backend_of)]
NO_STORE = {"Cache-Control": "no-store"}


@router.get("", response_model=None, responses=answers(200, QueueShown))
async def show_queue(backend: Serves) -> PlainJson:
    """Say how many jobs there are, what is paused and why, and how many workers live."""
    queue = backend.queue
    counts = await queue.counts()
    shown = {
        "counts": {str(one): counts.get(one, 0) for one in QueueStatus},
        "paused": [pause_view(pause) for pause in await queue.pauses()],
        "workers": len(await queue.workers()),
    }
    return PlainJson(shown, headers=NO_STORE)


@router.post("/pause", response_model=None, responses=answers(200, QueueShown))
async def pause(request: Request, backend: Serves, order: PauseOrder | None = None) -> PlainJson:
    """Let no job be started until `resume`; running ones go on."""
    by = f"http {backend.guard.principal_of(request).kind}"
    await backend.queue.pause(order.message if order is not None else "", by=by)
    return await show_queue(backend)


@router.post("/resume", response_model=None, responses=answers(200, QueueShown))
async def resume(request: Request, backend: Serves) -> PlainJson:
    """End every pause."""
    await backend.queue.resume(by=f"http {backend.guard.principal_of(request).kind}")
    return await show_queue(backend)
