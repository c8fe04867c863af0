"""Pauses as executors keep them: which end by themselves, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.gate import BUDGET_AGAIN, Gate
from runcomfy.application.job_queue import JobQueue
from runcomfy.domain.budget import Budget, BudgetState, Period, Window, exceeded
from runcomfy.domain.exceptions import BudgetExceeded, DiskFull, NodeFailed, RunComfyError, ServerUnreachable
from runcomfy.domain.job import JobRequest
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import QUEUE_SCOPE
from runcomfy.domain.retry import Pause, RetryPolicy, Scope
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.programs import EmulatedProcesses

MIDNIGHT = datetime(2026, 11, 21, tzinfo=UTC)
TODAY = BudgetState(Budget(Period.DAY, hard=Decimal(1)), Window(MIDNIGHT - timedelta(days=1), MIDNIGHT), Decimal(1))


@dataclass
class Door:
    gate: Gate
    store: SqlJobs
    asked: int = 0
    """How often it was asked whether jobs could run."""
    wrong: RunComfyError | None = None
    """Why none could."""

    async def refused(self, error: BudgetExceeded) -> None:
        decision = RetryPolicy().decide(
            error,
            submitted=False,
            server_stays=True,
            retries_attempted=0,
            retry_limit=None,
            kill_count=0,
            pauses=0,
            draw=lambda low, _: low,
        )
        assert isinstance(decision, Pause)
        await self.gate.pause(decision, error)


@pytest_asyncio.fixture(name="door")
async def _door(tmp_path: Path, clock: LoopClock) -> AsyncIterator[Door]:
    settings = QueueSettings(
        root=str(tmp_path),
        jobs_processing=str(tmp_path / "processing"),
        jobs_finished=str(tmp_path / "finished"),
        database=Secret(str(tmp_path / "queue.sqlite3")),
    )
    owner = Owner(OwnerId("me"), "host", 1, 0.0, "comfyctl", clock.now(), clock.now())

    async def ready() -> None:
        door.asked += 1
        if door.wrong is not None:
            raise door.wrong

    wake = timedelta(hours=1)  # nobody listens
    async with SqlJobs(store_from(settings.database, clock=clock, durable=False, wake_interval=wake)) as store:
        await JobQueue(store, settings, processes=EmulatedProcesses()).enqueue(JobRequest("text2img", prompt="x"))
        gate = Gate(store, owner, RetryPolicy(), ready, tell=lambda _: None, trouble=lambda _: None)
        door = Door(gate, store)
        yield door


async def test_a_budgets_pause_ends_when_its_window_turns_and_one_job_is_tried_then(
    door: Door, clock: LoopClock
) -> None:
    await door.refused(exceeded(TODAY, wanted=Decimal("0.2"), lease_of="medium"))
    [pause] = await door.store.pauses()
    assert (pause.scope, pause.reason) == (QUEUE_SCOPE, "budget-exceeded")
    assert pause.until is not None
    assert abs(pause.until - MIDNIGHT) < timedelta(seconds=1)
    await asyncio.sleep((MIDNIGHT - clock.now()).total_seconds() - 60)
    assert not await door.gate.opens()
    assert door.asked == 0
    await asyncio.sleep(61)
    assert await door.gate.opens()
    assert (door.gate.on_trial, door.asked, await door.store.pauses()) == (True, 1, [])


async def test_a_budget_that_no_window_allows_is_for_somebody_to_mend(door: Door) -> None:
    await door.refused(exceeded(TODAY, wanted=Decimal(2), lease_of="large"))
    [pause] = await door.store.pauses()
    assert pause.until is None
    await asyncio.sleep(timedelta(days=2).total_seconds())
    assert not await door.gate.opens()


async def test_a_pause_that_somebody_ordered_does_not_end_with_the_day_because_of_ours(
    door: Door, clock: LoopClock
) -> None:
    await door.store.pause(scope=QUEUE_SCOPE, reason="by-hand", message="until Monday", retry_in=None, by="ann")
    await door.refused(exceeded(TODAY, wanted=Decimal("0.2"), lease_of="medium"))
    [pause] = await door.store.pauses()
    assert (pause.reason, pause.message, pause.until) == ("by-hand", "until Monday", None)
    await asyncio.sleep((MIDNIGHT - clock.now()).total_seconds() + 60)
    assert not await door.gate.opens()
    assert door.asked == 0


async def test_where_no_job_waits_a_pause_ends_without_asking_whether_one_could_run(
    door: Door, clock: LoopClock
) -> None:
    [job] = await door.store.jobs(limit=1)
    await door.store.cancel(job.id, by="ann")
    await door.refused(exceeded(TODAY, wanted=Decimal("0.2"), lease_of="medium"))
    await asyncio.sleep((MIDNIGHT - clock.now()).total_seconds() + 60)
    assert await door.gate.opens()
    assert (door.asked, await door.store.pauses()) == (0, [])


async def test_what_is_no_fault_of_the_place_lets_a_job_try(door: Door, clock: LoopClock) -> None:
    await door.refused(exceeded(TODAY, wanted=Decimal("0.2"), lease_of="medium"))
    door.wrong = NodeFailed("a node burst")
    await asyncio.sleep((MIDNIGHT - clock.now()).total_seconds() + 60)
    assert await door.gate.opens()
    assert (door.asked, door.gate.on_trial, await door.store.pauses()) == (1, True, [])


async def test_a_window_that_has_turned_for_the_database_and_not_for_us_is_asked_again_soon_and_not_at_once(
    door: Door, clock: LoopClock
) -> None:
    await asyncio.sleep((MIDNIGHT - clock.now()).total_seconds() + 30)
    await door.refused(exceeded(TODAY, wanted=Decimal("0.2"), lease_of="medium"))
    assert not await door.gate.opens()
    await asyncio.sleep(BUDGET_AGAIN.total_seconds() + 1)
    assert await door.gate.opens()


async def test_a_server_that_is_away_keeps_nobody_from_working_elsewhere(door: Door, clock: LoopClock) -> None:
    owner = Owner(OwnerId("other"), "host", 2, 0.0, "comfyctl", clock.now(), clock.now())

    async def ready() -> None: ...

    def beside(place: str) -> Gate:
        return Gate(door.store, owner, RetryPolicy(), ready, tell=lambda _: None, trouble=lambda _: None, place=place)

    here, same, other, pool = (
        beside(at) for at in ("server:localhost:1@host", "server:localhost:1@host", "server:b:2", "")
    )
    error = ServerUnreachable("http://127.0.0.1:1 refuses connections", hint="start it")
    decided = Pause(retry_in=timedelta(minutes=5), scope=Scope.HOST)
    await here.pause(decided, error)
    [pause] = await door.store.pauses()
    assert pause.scope == "host:host at localhost:1"
    assert [await gate.opens() for gate in (here, same, other, pool)] == [False, False, True, True]
    await here.pause(decided, error)
    await other.pause(decided, DiskFull("no room", hint="make room"))
    assert [await gate.opens() for gate in (same, other, pool)] == [False, False, False], "the disk is everybody's"
