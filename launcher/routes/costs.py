"""`/costs`: what was spent, how it stands now, what jobs will cost. From our own books."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from launcher.backend import Backend, backend_of
from launcher.errors import NotFound
from launcher.intake import registry_of
from launcher.plain_json import PlainJson
from launcher.schemas import EstimateOrder, MoneyShown, answers, problems
from launcher.teller import teller_of
from runcomfy.application.costs import By
from runcomfy.domain.exceptions import ValueInvalid, WorkflowNotFound
from runcomfy.domain.moment import moment

router = APIRouter(prefix="/costs", tags=["costs"])

Serves = Annotated[Backend, Depends(backend_of)]
NO_STORE = {"Cache-Control": "no-store"}
_OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}}, "description": "Successful Response"}
}
HOURS_MOST = 31 * 24


@router.get("", response_model=None, responses={**_OBJECT, **problems()})
async def report(
    backend: Serves,
    since: Annotated[str, Query(max_length=60, description="7d, 12h, 2026-05-01, 2026-05-01T12:00")] = "7d",
    until: Annotated[str | None, Query(max_length=60)] = None,
    by: By = By.DAY,
) -> PlainJson:
    """Report what was spent, as `comfyctl costs --json` does."""
    now = backend.app.clock.now()
    begin = moment(since, now=now, whole_days=True)
    end = moment(until, now=now) if until else now
    if by is By.HOUR and (end - begin).total_seconds() > HOURS_MOST * 3600:
        raise ValueInvalid(f"a report by hour covers at most {HOURS_MOST // 24} days", hint="ask by=day")
    money = await teller_of(backend.app).glances.office()
    found = await money.report(begin, end, by)
    advice = [one.as_dict() for one in await money.advice()]
    return PlainJson({**found.as_dict(), "advice": advice}, headers=NO_STORE)


@router.get("/now", response_model=None, responses=answers(200, MoneyShown))
async def money_now(backend: Serves) -> PlainJson:
    """Say how the money stands: today, this month, budgets, the last hours and days."""
    return PlainJson(dict(await teller_of(backend.app).money()), headers=NO_STORE)


@router.post("/estimate", response_model=None, responses={**_OBJECT, **problems(404)})
async def estimate(backend: Serves, order: EstimateOrder) -> PlainJson:
    """Say what jobs that have not run yet will take and cost, from own history."""
    return await _estimate(backend, order.workflow, order.server_type, order.count)


@router.get("/estimate", response_model=None, responses={**_OBJECT, **problems(404)})
async def get_estimate(
    backend: Serves,
    workflow: Annotated[str, Query(min_length=1, max_length=200)],
    server_type: Annotated[str | None, Query(max_length=200)] = None,
    count: Annotated[int, Query(ge=1, le=1_000_000)] = 1,
) -> PlainJson:
    """Say the same, asked for in the address."""
    return await _estimate(backend, workflow, server_type, count)


async def _estimate(backend: Backend, workflow: str, server_type: str | None, count: int) -> PlainJson:
    found = await teller_of(backend.app).glances.estimate(workflow, server_type=server_type, count=count)
    if not found.get("known"):
        try:
            registry_of(backend.app).resolve(workflow)  # it may be misspelt
        except WorkflowNotFound as error:
            raise NotFound(error.message, hint=error.hint) from error
    return PlainJson(dict(found), headers=NO_STORE)
