"""`/presence`: saying ahead that somebody is there, or that work comes; a machine is warm by then."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from launcher.backend import Backend, backend_of
from launcher.plain_json import PlainJson
from launcher.schemas import PresenceOrder, SignalList, SignalSaid, answers
from launcher.views import iso
from runcomfy.application.presence import INTENT_FOR, LONGEST
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.signal import PRESENCE_FOR, Signal, SignalKind

router = APIRouter(prefix="/presence", tags=["presence"])

Serves = Annotated[Backend, Depends(backend_of)]
NO_STORE = {"Cache-Control": "no-store"}


@router.post("", response_model=None, responses=answers(200, SignalSaid))
async def say(backend: Serves, order: PresenceOrder) -> PlainJson:
    """Say it. `seconds`: how long it holds (a batch: how long its work takes, in all)."""
    said = backend.app.presence()
    span = timedelta(seconds=order.seconds) if order.seconds is not None else None
    user = order.user or None
    match order.event:
        case "opened":
            signal = await said.opened(order.source, lasts=span or PRESENCE_FOR, user=user)
        case "left":
            signal = await said.left(order.source, user=user)
        case "intent":
            signal = await said.intent(order.source, lasts=span or INTENT_FOR, user=user)
        case _:
            if order.jobs is None:
                raise ValueInvalid("a batch says how many jobs come", hint='send {"event": "batch", "jobs": 20}')
            signal = await said.batch(order.jobs, order.source, work=span or timedelta(0), user=user)
    return PlainJson({"signal": _view(signal)}, headers=NO_STORE)


@router.get("", response_model=None, responses=answers(200, SignalList))
async def heard(backend: Serves) -> PlainJson:
    """List what was said and still holds: the newest of each source and kind, nothing of a source that has left."""
    now = backend.app.clock.now()
    store = await backend.app.books()
    newest: dict[tuple[str, SignalKind], Signal] = {}
    for signal in await store.signals(since=now - LONGEST):
        if signal.kind is SignalKind.LEFT:
            newest = {key: one for key, one in newest.items() if key[0] != signal.source}
        newest[signal.source, signal.kind] = signal
    holding = [one for one in newest.values() if _holds(one, now)]
    holding.sort(key=lambda one: one.at)
    return PlainJson({"signals": [_view(one) for one in holding]}, headers=NO_STORE)


def _holds(signal: Signal, now: Any) -> bool:
    if signal.kind is SignalKind.LEFT:
        return False
    ends = signal.until or signal.expected_at
    return ends is None or ends >= now


def _view(signal: Signal) -> dict[str, Any]:
    return {
        "kind": str(signal.kind),
        "source": signal.source,
        "user": signal.user,
        "at": iso(signal.at),
        "until": iso(signal.until),
        "jobs": signal.jobs,
        "work_s": signal.work.total_seconds(),
        "expected_at": iso(signal.expected_at),
    }
