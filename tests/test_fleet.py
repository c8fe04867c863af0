"""The fleet by itself: how many machines it keeps, what stands above its plan, what it says and writes down.

The pool is a small one whose machines cost nothing; queue and books are real databases.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.exceptions import BudgetExceeded, StoreUnavailable
from runcomfy.domain.plan_view import Extend, Plan, PlanView, Stage
from runcomfy.testing.clock import START, SettableClock
from runcomfy.testing.contracts.jobs_words import a_job, put
from runcomfy.testing.fleet_office import HOURS, MINUTES, Office, Ordered, an_office, now, stop_all, ten_more


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest_asyncio.fixture
async def office(clock: SettableClock, tmp_path: Path) -> AsyncIterator[Office]:
    async with an_office(clock, tmp_path) as office:
        yield office


# -- how many ------------------------------------------------------------------------------------------------


async def test_the_least_number_is_made_and_kept_whatever_the_plan_says(office: Office) -> None:
    async with office.running(min_machines=2, plan_every=timedelta(minutes=1)):
        await asyncio.sleep(3 * HOURS)
        assert len(office.pool.asked) == 2
        assert [machine.stage for machine in office.pool.machines] == [Stage.READY] * 2
    async with office.running(Ordered(stop_all), min_machines=2):
        office.pool.stand(1)
        await asyncio.sleep(10 * MINUTES)
        assert [machine.draining for machine in office.pool.machines] == ["", ""]
    assert [why for _, why in office.pool.drained] == ["because"]


async def test_the_least_number_is_asked_for_with_patience_where_a_budget_refuses(office: Office) -> None:
    refused = BudgetExceeded("the budget per day is $1", hint="it resets tomorrow", details={"budget": "day"})
    office.pool.fails["medium"] = refused
    async with office.running(min_machines=2):
        [kept] = office.pool.stand()
        await asyncio.sleep(1 * HOURS)
        assert 50 <= len(office.pool.asked) <= 61  # once a minute
        assert len([s for s in office.said if "no machine is launched" in s]) == 1
        assert len(await office.decisions("refused")) == 1
        assert office.pool.machines == (kept,)
        office.pool.fails.clear()
        await asyncio.sleep(2 * MINUTES)
        assert len(office.pool.machines) == 2


async def test_no_more_are_rented_than_allowed_those_that_start_or_stop_counted(office: Office) -> None:
    office.pool.answers_after, office.pool.goes_after = 40.0, 300.0

    def restless(view: PlanView) -> list[Any]:
        return [*ten_more(view), *stop_all(view)]

    async with office.running(Ordered(restless), max_machines=3):
        await asyncio.sleep(2 * HOURS)
    assert office.pool.most == 3
    assert len(office.pool.asked) > 10  # it was tried all the time


async def test_what_is_above_a_lowered_limit_goes_as_soon_as_it_is_idle(office: Office) -> None:
    machines = office.pool.stand(4)
    jobs = await put(office.jobs, a_job(), a_job())
    leases = [office.pool.use(machine, job) for machine, job in zip(machines[:2], jobs, strict=True)]
    async with office.running(Ordered(lambda _: ()), max_machines=1):
        await asyncio.sleep(30)
        assert office.pool.machines == tuple(machines[:2])  # never a busy one
        office.pool.leave(leases[1])
        await asyncio.sleep(30)
        assert office.pool.machines == (machines[0],)
        office.pool.leave(leases[0])
        await asyncio.sleep(30)
    assert office.pool.machines == (machines[0],)
    assert {one.why for one in await office.decisions("stop")} == {"no more than 1 machines are allowed"}


async def test_a_busy_machine_is_never_ended_by_a_plan(office: Office) -> None:
    """Invariant I8."""
    [machine] = office.pool.stand()
    [job] = await put(office.jobs)
    lease = office.pool.use(machine, job)
    async with office.running(Ordered(stop_all)):
        await asyncio.sleep(60)
        assert office.pool.drained == []
        office.pool.leave(lease)
        await asyncio.sleep(30)
        assert len(office.pool.drained) == 1


async def test_machines_go_only_down_to_what_is_to_be_kept_and_each_only_once(office: Office) -> None:
    machines = office.pool.stand(3)
    office.pool.drain(machines[0].id, why="somebody said so")
    async with office.running(Ordered(stop_all), min_machines=1):
        await asyncio.sleep(60)
        assert [machine.id for machine in office.pool.machines] == [machines[2].id]
    stopped = await office.decisions("stop")
    assert [(one.what, one.why, one.expected_usd) for one in stopped] == [(str(machines[1].id), "because", Decimal(0))]
    assert sum(line.startswith("ending medium machine ") and line.endswith(": because") for line in office.said) == 1


async def test_a_launch_that_is_wanted_more_often_than_there_is_room_costs_its_share(office: Office) -> None:
    office.pool.answers_after = 1_000.0
    async with office.running(Ordered(ten_more), max_machines=3):
        await asyncio.sleep(60)
        found = await office.decisions("launch")
        assert [(one.what, one.why, one.expected_usd) for one in found] == [("medium", "because", Decimal("0.1"))] * 3
        assert office.said.count("launching a medium machine ($0.99/h): because") == 3


# -- machines that a plan wants to stay ------------------------------------------------------------------------


async def test_what_a_machine_costs_that_is_kept_is_written_down_with_it(office: Office) -> None:
    [resting] = office.pool.stand(1)

    def keep(view: PlanView) -> list[Any]:
        return [Extend(resting.id, now() + 1_800.0, "more will come")]

    async with office.running(Ordered(keep)):
        await asyncio.sleep(5)
    [said] = await office.decisions("extend")
    assert said.expected_usd == pytest.approx(Decimal("0.495"))  # half an hour of a medium one at $0.99
    assert resting.wanted_until == pytest.approx(now() + 1_800, abs=25)


async def test_a_machine_that_the_plan_wants_longer_is_kept_and_that_is_said_once_per_rest(office: Office) -> None:
    """Only for one that rests: a job keeps its machine by itself, and a machine that leaves is not called back."""
    resting, working, leaving = office.pool.stand(3)
    [job] = await put(office.jobs)
    office.pool.use(working, job)
    office.pool.drain(leaving.id, why="somebody said so")

    def keep(view: PlanView) -> list[Any]:
        wanted = [Extend(machine, now() + 600.0, "more will come") for machine in (resting.id, working.id, leaving.id)]
        return [*wanted, Extend("nobody", now() + 600.0, "gone by now")]

    async with office.running(Ordered(keep), max_machines=3):
        await asyncio.sleep(120)
        said = await office.decisions("extend")
        assert [(one.what, one.why) for one in said] == [(resting.id, "more will come")]


# -- the role ------------------------------------------------------------------------------------------------


async def test_without_the_role_nothing_is_planned(office: Office) -> None:
    """Invariant I19."""
    policy = Ordered(ten_more)
    fleet = await office.fleet(policy, holds=False)
    assert await fleet.tick() == Plan()
    assert (policy.views, office.pool.asked, await office.decisions()) == ([], [], [])


@pytest.mark.fault(64)
async def test_a_role_that_runs_out_while_a_plan_is_made_ends_nothing_and_launches_nothing(office: Office) -> None:
    """Invariant I19: between the look and the deed this process may have slept."""
    office.pool.stand()

    def slept(view: PlanView) -> list[Any]:
        assert office.role is not None
        office.role.epoch = None
        return [*ten_more(view), *stop_all(view)]

    fleet = await office.fleet(Ordered(slept))
    await put(office.jobs)
    await fleet.tick()
    await asyncio.sleep(5)
    assert (office.pool.asked, office.pool.drained, await office.decisions()) == ([], [], [])


async def test_a_role_that_is_not_renewed_is_not_planned_with(office: Office) -> None:
    policy = Ordered(lambda _: ())
    fleet = await office.fleet(policy, lease=timedelta(seconds=60))
    await fleet.tick()
    await asyncio.sleep(61)
    await fleet.tick()
    assert len(policy.views) == 1


async def test_a_database_that_refuses_is_said_once_and_asked_again(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant I23: nothing is launched by what cannot be read or written down."""
    real, broken = office.jobs.backlog, [True]

    async def backlog(**given: Any) -> Any:
        if broken[0]:
            raise StoreUnavailable("the disk is away")
        return await real(**given)

    fleet = await office.fleet()
    monkeypatch.setattr(office.jobs, "backlog", backlog)
    await put(office.jobs)
    running = asyncio.create_task(fleet.run())
    await asyncio.sleep(5 * MINUTES)
    assert office.pool.asked == []
    assert office.said == ["the disk is away; nothing is planned until that works again"]
    broken[0] = False
    await asyncio.sleep(25)
    assert len(office.pool.asked) == 1
    assert office.said.count("the database works again: planning goes on") == 1
    assert len(office.said) == 3
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


# -- what is said --------------------------------------------------------------------------------------------


async def test_each_decision_says_what_why_what_it_costs_and_who_took_it(office: Office) -> None:
    async with office.running(keep_alive=timedelta(minutes=5)) as fleet:
        await put(office.jobs)
        await asyncio.sleep(5 * MINUTES)
        await office.work_off()
        await asyncio.sleep(20 * MINUTES)
        assert office.pool.machines == ()
        found = await office.decisions()
        assert Counter(one.action for one in found) == {"launch": 1, "stop": 1}
        launch, stop = found
        assert launch.what == "medium"
        assert launch.why == "1 job waits, and no machine that fits is there or on its way"
        assert stop.what not in ("", "medium")
        assert "300 s" in stop.why
        assert office.role is not None
        for one in found:
            assert one.by == office.role.owner.id
            assert one.expected_usd is not None
            assert START <= one.at <= office.clock.now()
        assert f"launching a medium machine ($0.99/h): {launch.why}" in office.said
        assert await fleet.left() == 0


async def test_what_comes_of_a_latency_target_is_said(office: Office) -> None:
    async with office.running(latency_target=timedelta(minutes=1)):
        pass
    [few] = office.said
    assert few.startswith("too few jobs came yet to say what it takes that 95 of 100 jobs wait no longer than 1m")
    for _ in range(24):
        await put(office.jobs)
        await asyncio.sleep(15 * MINUTES)
    prices = []
    for target in (timedelta(seconds=20), timedelta(minutes=10)):
        office.said.clear()
        fleet = await office.fleet(latency_target=target)
        await fleet.begin()
        [sentence] = office.said
        assert "by the jobs of the last days, that 95 of 100 jobs wait no longer than" in sentence
        prices.append(fleet._with.wait_usd_per_hour)
        assert f"${prices[-1]:.2f} per job and hour" in sentence
    assert prices[0] > prices[1]  # whoever is to wait less pays for more idle machines


# -- clocks --------------------------------------------------------------------------------------------------


async def a_morning(office: Office, jump: timedelta) -> tuple[list[tuple[int, str]], list[int]]:
    """Tell of people and jobs; in the middle somebody sets the clock. Return launches and ends, by the loop's time."""
    began = now()
    async with office.running():
        await office.presence.opened("conjure", lasts=timedelta(minutes=20))
        await asyncio.sleep(10 * MINUTES)
        await put(office.jobs, a_job(), a_job(), a_job())
        office.clock.off = jump
        await office.work_off(seconds=90)
        await asyncio.sleep(30 * MINUTES)
        await office.presence.batch(30, "night", work=timedelta(hours=1), at=office.clock.now() + timedelta(minutes=30))
        await asyncio.sleep(1 * MINUTES)
        office.clock.off = timedelta(0)
        await put(office.jobs)
        await office.work_off()
        await asyncio.sleep(2 * HOURS)
    assert office.pool.machines == ()
    launches = [(round(at - began), kind) for at, kind in office.pool.asked]
    return launches, [round(at - began) for at, _ in office.pool.drained]


@pytest.mark.fault(60)
async def test_a_clock_that_is_set_changes_no_decision(
    clock: SettableClock, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Invariant I21."""
    told = []
    for days in (0, 1, -1):
        folder = tmp_path / str(days)
        folder.mkdir()
        clock.off = timedelta(0)
        queue = store_from(folder / "queue.sqlite3", clock=clock, durable=False, wake_interval=timedelta(seconds=10))
        async with SqlStore(folder / "books.sqlite3", clock=clock, durable=False) as books, SqlJobs(queue) as jobs:
            told.append(await a_morning(Office(books, jobs, clock, folder), timedelta(days=days)))
    (launches, ends), *others = told
    assert len(launches) >= 2
    assert len(ends) == len(launches)
    for other, ended in others:
        assert [kind for _, kind in other] == [kind for _, kind in launches]
        assert all(abs(one - another) <= 25 for (one, _), (another, _) in zip(launches, other, strict=True))
        assert all(abs(one - another) <= 25 for one, another in zip(ends, ended, strict=True))
