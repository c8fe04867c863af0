"""`/machines`: what the account runs, and stopping it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path

from launcher.backend import Backend, backend_of
from launcher.errors import Conflict
from launcher.plain_json import PlainJson
from launcher.schemas import MachineList, MachineShown, StopOrder, answers
from launcher.teller import teller_of

router = APIRouter(prefix="/machines", tags=["machines"])

Serves = Annotated[Backend, Depends(backend_of)]
NO_STORE = {"Cache-Control": "no-store"}


@router.get("", response_model=None, responses=answers(200, MachineList))
async def list_machines(backend: Serves) -> PlainJson:
    """List every machine of the account. `listed` false: they cannot be looked at now, `why` says why."""
    return PlainJson(dict(await teller_of(backend.app).machines()), headers=NO_STORE)


@router.post("/{machine_id}/stop", response_model=None, responses=answers(200, MachineShown, 404, 409, 502))
async def stop_machine(
    backend: Serves, machine_id: Annotated[str, Path(min_length=1, max_length=200)], order: StopOrder | None = None
) -> PlainJson:
    """Stop a machine, by our id or the provider's, whoever started it; its jobs go back to the queue."""
    if order is None or not order.confirm:
        raise Conflict("stopping a machine must be confirmed", hint='send {"confirm": true}')
    return PlainJson(await teller_of(backend.app).glances.stop(machine_id), headers=NO_STORE)
