"""The fleet by itself: when it launches and ends machines, what stands above its plan, what it says and writes down.

The pool is a small one whose machines cost nothing; queue and books are real databases.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.fleet import FAILED_FIRST, FAILED_MOST, GIVEN_UP_AFTER, _worth_s
from runcomfy.application.fleet_demand import BATCH_LATE
from runcomfy.application.fleet_offers import UNKNOWN_RUN, FleetOffers, wait_usd_per_hour
from runcomfy.application.job_queue import host_scope
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import (
    AuthRejected,
    BudgetExceeded,
    LaunchRefused,
    NoCapacity,
    RunComfyError,
    StoreUnavailable,
    ValueInvalid,
)
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, Purpose, ServerId
from runcomfy.domain.plan_view import DemandView, Extend, OfferView, Plan, PlanView, Stage
from runcomfy.domain.queued import FLEET_SCOPE, QUEUE_SCOPE, EventKind
from runcomfy.testing.clock import START, SettableClock
from runcomfy.testing.contracts.jobs_words import a_job, put
from runcomfy.testing.fleet_office import ACCOUNT, Office, Ordered, now, stop_all, ten_more
from runcomfy.testing.programs import settings_for

MINUTES: Final = 60.0
HOURS: Final = 3_600.0


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest_asyncio.fixture
async def office(clock: SettableClock, tmp_path: Path) -> AsyncIterator[Office]:
    queue = store_from(tmp_path / "queue.sqlite3", clock=clock, durable=False, wake_interval=timedelta(seconds=10))
    async with SqlStore(tmp_path / "books.sqlite3", clock=clock, durable=False) as books, SqlJobs(queue) as jobs:
        yield Office(books, jobs, clock, tmp_path / "state")


def gaps(asked: Sequence[tuple[float, str]]) -> list[float]:
    return [round(later - earlier) for (earlier, _), (later, _) in itertools.pairwise(asked)]


# -- launches that fail --------------------------------------------------------------------------------------


@pytest.mark.fault(27)
async def test_what_cannot_be_launched_is_asked_for_less_and_less_often(office: Office) -> None:
    office.pool.fails["medium"] = NoCapacity("no medium machine is to be had")
    await put(office.jobs)
    async with office.running():
        await asyncio.sleep(1 * HOURS)
        waits = gaps(office.pool.asked)
        doubled = [FAILED_FIRST * 2**n for n in range(5)]
        assert all(wanted <= waited <= wanted + 25 for wanted, waited in zip(doubled, waits[:5], strict=True))
        assert all(FAILED_MOST <= waited <= FAILED_MOST + 25 for waited in waits[5:])
        assert len([s for s in office.said if "could not be launched" in s]) == 1
        assert [one.why for one in await office.decisions("refused")] == [
            "provider-no-capacity: no medium machine is to be had"
        ]
        [pause] = await office.jobs.pauses()
        assert (pause.scope, pause.message) == (FLEET_SCOPE, "no medium machine is to be had")

        office.pool.fails.clear()
        await asyncio.sleep(FAILED_MOST + 200)
        assert len(office.pool.machines) == 1
        assert await office.jobs.pauses() == []
        asked = len(office.pool.asked)
        office.pool.fails["medium"] = NoCapacity("none again")
        office.pool.lose(office.pool.machines[0])
        await asyncio.sleep(60)
        assert gaps(office.pool.asked[asked:])[0] <= FAILED_FIRST + 25  # what worked in between counts


@pytest.mark.fault(27)
async def test_another_type_is_taken_where_one_is_sold_out(office: Office) -> None:
    office.pool.fails["medium"] = NoCapacity("none left")
    await put(office.jobs)
    async with office.running(types=("medium", "large")):
        await asyncio.sleep(60)
        assert [machine.machine.server_type for machine in office.pool.machines] == ["large"]


async def test_a_machine_is_waited_for_while_any_type_may_still_be_had(office: Office) -> None:
    """`serve --once` ends by that."""
    office.pool.fails |= {"medium": NoCapacity("none left"), "large": LaunchRefused("no")}
    async with office.running(types=("medium", "large")) as fleet:
        await asyncio.sleep(5)
        assert (office.pool.asked, fleet.stuck()) == ([], None)
        await put(office.jobs)
        await asyncio.sleep(FAILED_FIRST)
        assert {name for _, name in office.pool.asked} == {"medium", "large"}
        assert fleet.stuck() is None  # one of them has failed for good, the other one a few times only
        await asyncio.sleep(60)
        assert isinstance(fleet.stuck(), NoCapacity)
        office.pool.fails.clear()
        await asyncio.sleep(FAILED_MOST)
        assert fleet.stuck() is None
    assert len(office.pool.machines) == 1


@pytest.mark.parametrize(
    ("error", "launches"),
    [(NoCapacity("none left"), GIVEN_UP_AFTER), (AuthRejected("no"), 1), (LaunchRefused("no"), 1)],
)
async def test_how_often_a_launch_fails_before_it_is_given_up(
    office: Office, error: RunComfyError, launches: int
) -> None:
    office.pool.fails["medium"] = error
    await put(office.jobs)
    async with office.running() as fleet:
        for _ in range(100):
            await asyncio.sleep(1)
            if fleet.stuck() is not None:
                break
        assert (fleet.stuck(), len(office.pool.asked)) == (error, launches)
    [said] = [line for line in office.said if "could not be launched" in line]
    assert said.endswith("; it is tried again") == (launches > 1)  # `serve --once` leaves where it is given up


async def test_machines_that_never_become_usable_are_not_waited_for_either(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their launches are answered; the pool says when it has had enough of them."""
    monkeypatch.setattr(office.pool, "why_no_room", lambda name: f"{name} is not launched: it did not start")
    await put(office.jobs)
    async with office.running() as fleet:
        await asyncio.sleep(5)
        [machine] = office.pool.machines
        monkeypatch.setattr(office.pool, "room", lambda _: 0)
        assert fleet.stuck() is None
        office.pool.lose(machine)
        await asyncio.sleep(5)
        stuck = fleet.stuck()
        assert isinstance(stuck, NoCapacity)
        assert stuck.message == "medium is not launched: it did not start"
        monkeypatch.setattr(office.pool, "pausing", lambda _: True)
        assert fleet.stuck() is None  # the pool takes breath only


@pytest.mark.fault(26)
async def test_a_token_that_is_refused_is_refused_for_every_type(office: Office) -> None:
    office.pool.fails |= dict.fromkeys(("medium", "large"), AuthRejected("the token is not accepted"))
    await put(office.jobs)
    async with office.running(types=("medium", "large")):
        await asyncio.sleep(FAILED_FIRST - 2)
        assert len(office.pool.asked) == 1
        await asyncio.sleep(10 * MINUTES)
        assert len(office.pool.asked) < 8
        assert len([s for s in office.said if "could not be launched" in s]) == 1


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


# -- budgets -------------------------------------------------------------------------------------------------


async def test_a_budget_that_allows_nothing_is_said_once_and_can_be_seen(office: Office) -> None:
    budget = Budget(Period.DAY, hard=Decimal("0.05"))
    await put(office.jobs, a_job(), a_job())
    async with office.running(budgets=[budget]) as fleet:
        await asyncio.sleep(2 * HOURS)
        assert office.pool.asked == []
        [sentence] = [s for s in office.said if "no machine is launched" in s]
        assert "the budget per day is $0.0500" in sentence
        assert "waiting until it resets does not help" in sentence  # it is smaller than a lease
        [refused] = await office.decisions("refused")
        assert (refused.what, refused.expected_usd) == ("medium", Decimal(0))
        assert "the budget per day" in refused.why
        [pause] = await office.jobs.pauses()
        assert (pause.scope, pause.reason) == (FLEET_SCOPE, "no-machine")
        assert "the budget per day" in pause.message
        stuck = fleet.stuck()
        assert isinstance(stuck, BudgetExceeded)
        assert await fleet.left() == 2
    assert await office.jobs.pauses() == []  # nobody plans any more


async def test_whose_budget_is_used_up_is_told_so_and_no_machine_is_launched_for_them(office: Office) -> None:
    nothing = Budget(Period.DAY, hard=Decimal(0), user="ann")
    await put(office.jobs, a_job(user="ann"))
    async with office.running(budgets=[nothing]) as fleet:
        await asyncio.sleep(30)
        stuck = fleet.stuck()
        assert isinstance(stuck, BudgetExceeded)
        assert stuck.details["budget"] == "day of user ann"
        assert fleet.barred().users == {"ann"}
        assert office.pool.asked == []
        await put(office.jobs, a_job(user="ben"))
        await asyncio.sleep(30)
        assert fleet.stuck() is None
        assert set(office.pool.whose) == {("ben", "")}


async def test_a_pause_that_somebody_else_asked_for_stands_whatever_the_fleet_says(office: Office) -> None:
    elsewhere = "host:another computer"

    async def scopes() -> set[str]:
        return {pause.scope for pause in await office.jobs.pauses()}

    await office.jobs.pause(scope=elsewhere, reason="by-hand", message="at lunch", by="ann")
    office.pool.fails["medium"] = NoCapacity("none left")
    await put(office.jobs)
    async with office.running():
        await asyncio.sleep(30)
        assert await scopes() == {elsewhere, FLEET_SCOPE}
        office.pool.fails.clear()
        await asyncio.sleep(5 * MINUTES)
        assert await scopes() == {elsewhere}
        office.pool.fails["medium"] = NoCapacity("none left")
        office.pool.lose(office.pool.machines[0])
        await asyncio.sleep(30)
        assert await scopes() == {elsewhere, FLEET_SCOPE}
    assert await scopes() == {elsewhere}
    assert office.role is not None
    resumed = [event.data["by"] for event in await office.jobs.events() if event.kind is EventKind.RESUMED]
    assert set(resumed) == {office.role.owner.id}


@pytest.mark.parametrize("whose", ["everybody's", "this computer's"])
async def test_a_paused_queue_gets_no_machine_and_keeps_none(office: Office, whose: str) -> None:
    """Surprise bills: nothing may be begun, so nothing is to be paid for."""
    await put(office.jobs)
    async with office.running() as fleet:
        await asyncio.sleep(30)
        assert len(office.pool.asked) == 1
        assert office.role is not None
        scope = QUEUE_SCOPE if whose == "everybody's" else host_scope(office.role.owner)
        await office.jobs.pause(scope=scope, reason="by-hand", message="at lunch", by="ann")
        await asyncio.sleep(5 * HOURS)
        assert not office.pool.machines
        assert len(office.pool.asked) == 1
        assert await fleet.left() == 1
        await office.jobs.resume(scope=scope, by="ann")
        await asyncio.sleep(30)
        assert len(office.pool.asked) == 2


async def test_machines_are_launched_again_when_a_pause_ends_by_itself(office: Office) -> None:
    await office.jobs.pause(scope=QUEUE_SCOPE, reason="x", message="y", retry_in=timedelta(hours=1), by="ann")
    await put(office.jobs)
    async with office.running():
        await asyncio.sleep(HOURS - 60)
        assert office.pool.asked == []
        await asyncio.sleep(2 * MINUTES)
        assert len(office.pool.asked) == 1


async def test_a_launch_is_for_the_one_user_and_project_that_wait(office: Office) -> None:
    await put(office.jobs, a_job(user="ann", project="film"))
    async with office.running():
        await asyncio.sleep(10)
    assert office.pool.whose == [("ann", "film")]
    await put(office.jobs, a_job(user="ben", project="film"))
    office.pool.lose(office.pool.machines[0])
    async with office.running():
        await asyncio.sleep(10)
    assert set(office.pool.whose[1:]) == {("", "film")}


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


# -- what is remembered --------------------------------------------------------------------------------------


def close(left: float | None, right: float | None, *, within: float) -> bool:
    if left is None or right is None:
        return left is right
    return abs(left - right) <= within + 0.05 * max(abs(left), abs(right))


def alike(before: DemandView, after: DemandView) -> None:
    assert before.seen == after.seen
    assert close(before.rate_fast, after.rate_fast, within=1e-5)
    assert close(before.rate_slow, after.rate_slow, within=1e-5)
    assert close(before.service_s, after.service_s, within=0.1)
    assert close(before.last_arrival, after.last_arrival, within=1)
    assert close(before.silent_since, after.silent_since, within=30)
    assert close(before.waits_per_cold, after.waits_per_cold, within=30)
    assert close(before.group, after.group, within=0.1)
    assert close(before.rate_session, after.rate_session, within=1e-4)
    # How long it had been silent before the very first work nobody knows any more.
    silences = before.silences[len(before.silences) - len(after.silences) :]
    assert len(before.silences) - len(after.silences) in (0, 1)
    assert len(after.silences) >= 4
    assert all(close(one, other, within=40) for one, other in zip(silences, after.silences, strict=True))


@pytest.mark.parametrize("at_work", [False, True])
async def test_a_restart_forgets_nothing(office: Office, at_work: bool) -> None:
    async with office.running() as first:
        await office.presence.opened("conjure", lasts=timedelta(hours=1), user="ann")
        await asyncio.sleep(5 * MINUTES)
        for minutes in (3.0, 9.0, 40.0, 4.0, 120.0):
            await put(office.jobs, a_job(user="ann"), a_job(user="ann"))
            await office.work_off(seconds=20.0 + minutes)
            await asyncio.sleep(minutes * MINUTES)
        await office.presence.opened("conjure", lasts=timedelta(hours=1), user="ann")
        if at_work:
            await put(office.jobs, a_job(user="ann"))
        await asyncio.sleep(70)  # until history is read again, too
        before = await first.view()
    second = await office.fleet()
    await second.begin()
    after = await second.view()
    alike(before.demand, after.demand)
    assert before.presence.present == after.presence.present == 1
    assert close(before.presence.since, after.presence.since, within=1)
    assert close(before.presence.lead_s, after.presence.lead_s, within=1)
    assert close(before.presence.recall, after.presence.recall, within=0.01)
    assert before.backlog == after.backlog
    assert before.offers == after.offers


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


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_alive", [None, timedelta(0), timedelta(minutes=2)])
async def test_who_is_there_has_one_machine_and_not_one_after_the_other(
    office: Office, keep_alive: timedelta | None
) -> None:
    """Whoever is there and sends nothing is not worth a machine for ever, nor a new one every few minutes."""
    async with office.running(keep_alive=keep_alive, plan_every=timedelta(minutes=1)):
        async with office.presence.here("conjure", lasts=timedelta(minutes=15)):
            await asyncio.sleep(310)
            assert [machine.stage for machine in office.pool.machines] == [Stage.READY]
            await asyncio.sleep(6 * HOURS)
        assert len(office.pool.asked) == 1
        [(ended_at, why)] = office.pool.drained
        assert 20 * MINUTES <= ended_at - office.pool.asked[0][0] <= 60 * MINUTES
        assert why == "somebody is there, but silent for long"
        await put(office.jobs)
        await asyncio.sleep(10)
        assert len(office.pool.asked) == 2


async def test_work_that_is_about_to_come_has_a_machine_launched_and_held(office: Office) -> None:
    async with office.running():
        await office.presence.intent("conjure", lasts=timedelta(minutes=4))
        await asyncio.sleep(30)
        assert len(office.pool.asked) == 1
        assert office.pool.holds[0] > 0
        await asyncio.sleep(office.pool.boots + office.pool.holds[0] - 60)
        assert [machine.stage for machine in office.pool.machines] == [Stage.READY]
        await asyncio.sleep(2 * HOURS)
        assert (office.pool.machines, len(office.pool.asked)) == ((), 1)


async def test_a_batch_finds_its_machines_there_and_leaves_none(office: Office) -> None:
    began = now()
    async with office.running(plan_every=timedelta(minutes=1)):
        at = office.clock.now() + timedelta(hours=2)
        await office.presence.batch(40, "night", work=timedelta(hours=1), at=at)
        await asyncio.sleep(1.5 * HOURS)
        assert office.pool.asked == []
        await asyncio.sleep(0.5 * HOURS)
        assert len(office.pool.asked) == 4
        first = office.pool.asked[0][0] - began
        assert 2 * HOURS - 400 <= first <= 2 * HOURS - 200
        assert [machine.stage for machine in office.pool.machines] == [Stage.READY] * 4
        await put(office.jobs, *(a_job() for _ in range(40)))
        await asyncio.gather(*(office.work_off(seconds=90) for _ in range(4)), return_exceptions=True)
        await asyncio.sleep(5 * MINUTES)
        assert (office.pool.machines, len(office.pool.asked)) == ((), 4)
    reasons = [one.why for one in await office.decisions("stop")]
    assert all(why == "the batch is done" or "machines are enough" in why for why in reasons)


async def test_a_source_that_never_brings_work_is_not_heeded_and_that_is_said_once(office: Office) -> None:
    async with office.running(plan_every=timedelta(minutes=1)):
        launched = []
        for _ in range(8):
            await office.presence.opened("cron", lasts=timedelta(minutes=30))
            await asyncio.sleep(1 * HOURS)
            launched.append(len(office.pool.asked))
        assert launched[0] == 1
        assert launched[-1] == launched[-3] < 8
        [sentence] = [s for s in office.said if "not heeded" in s]
        assert sentence.startswith("signals of cron are not heeded for now")
        await office.presence.opened("conjure")
        await asyncio.sleep(5 * MINUTES)
        assert len(office.pool.asked) == launched[-1] + 1  # another source is believed


async def test_signals_are_scored_by_the_work_that_follows(office: Office) -> None:
    async with office.running(plan_every=timedelta(minutes=1)) as fleet:
        for _ in range(6):
            await office.presence.opened("conjure", lasts=timedelta(minutes=30))
            await asyncio.sleep(5 * MINUTES)
            await put(office.jobs)
            await office.work_off()
            await office.presence.left("conjure")
            await asyncio.sleep(1 * HOURS)
        view = await fleet.view()
        assert view.presence.recall > 0.9
        assert view.presence.lead_s == pytest.approx(5 * MINUTES, abs=30)
        assert len(office.pool.asked) == 6
        assert not [s for s in office.said if "not heeded" in s]


async def test_what_a_machine_costs_that_is_kept_is_written_down_with_it(office: Office) -> None:
    [resting] = office.pool.stand(1)

    def keep(view: PlanView) -> list[Any]:
        return [Extend(resting.id, now() + 1_800.0, "more will come")]

    async with office.running(Ordered(keep)):
        await asyncio.sleep(5)
    [said] = await office.decisions("extend")
    assert said.expected_usd == pytest.approx(Decimal("0.495"))  # half an hour of a medium one at $0.99
    assert resting.wanted_until == pytest.approx(now() + 1_800, abs=25)


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


async def test_a_spared_cold_start_is_worth_its_load_and_the_waiting_at_the_machines_price(office: Office) -> None:
    offer = OfferView("medium", 2.0, boot_s=100.0, load_s=20.0)
    assert _worth_s(offer, 4.0, None) == 20 + 2 * 120
    assert _worth_s(offer, 4.0, 50.0) == 20 + 2 * 50
    assert _worth_s(replace(offer, usd_per_hour=0.0), 0.0, 50.0) == 20


async def test_what_is_announced_holds_until_its_time_is_over_or_it_is_taken_back(office: Office) -> None:
    signals = (await office.fleet())._with.signals
    began = now()

    def seen() -> tuple[int, float | None, float | None, float | None]:
        view = signals.view(now(), worth_s=1e9)
        times = (None if at is None else round(at - began) for at in (view.since, view.left_at, view.expected_until))
        return (view.present, *times)  # type: ignore[return-value]

    def next_change() -> float | None:
        at = signals.next_change(now())
        return None if at is None else round(at - began)

    assert (await signals.hear(), seen(), next_change()) == (0, (0, None, None, None), None)
    assert signals.view(now(), worth_s=1e9).recall == 1.0
    await office.presence.opened("conjure:ann", lasts=timedelta(seconds=600), user="ann")
    await asyncio.sleep(60)
    await office.presence.opened("conjure:ben", lasts=timedelta(seconds=120), user="ben")
    assert [await signals.hear(), await signals.hear()] == [2, 0]
    assert (seen(), next_change()) == ((2, 0, None, None), 180)
    await asyncio.sleep(121)
    assert (seen(), next_change()) == ((1, 0, None, None), 600)
    await office.presence.opened("conjure:ben", lasts=timedelta(seconds=100), user="ben")  # back again: counted anew
    await office.presence.opened("conjure:ann", lasts=timedelta(seconds=100), user="ann")  # still there
    await signals.hear()
    assert (seen(), next_change()) == ((2, 0, None, None), 281)
    await office.presence.left("conjure:ann")
    await signals.hear()
    assert (seen(), next_change()) == ((1, 181, None, None), 281)
    await asyncio.sleep(110)
    assert (seen(), next_change()) == ((0, None, 281, None), None)
    await office.presence.intent("conjure:ann", lasts=timedelta(seconds=240))
    await signals.hear()
    assert (seen(), next_change()) == ((0, None, 281, 531), 531)
    await office.presence.left("conjure:ann")
    await signals.hear()
    assert (seen(), next_change()) == ((0, None, 291, None), None)


async def test_a_batch_is_waited_for_job_by_job_and_for_ten_minutes_after_its_time(office: Office) -> None:
    signals = (await office.fleet())._with.signals
    began, at = now(), office.clock.now() + timedelta(seconds=100)
    await office.presence.batch(3, "night", work=timedelta(seconds=90), at=at, user="ann")
    await signals.hear()

    def batches() -> list[tuple[int, float, float]]:
        return [(b.count, b.work_s, round(b.at - began)) for b in signals.view(now(), worth_s=1e9).batches]

    assert batches() == [(3, 90.0, 100)]
    assert signals.next_change(now()) == pytest.approx(began + 100)
    assert not signals.batched(now())
    assert not signals.work_came(now(), "ben", after_silence=True)  # not announced by him
    assert signals.work_came(now(), "ann", after_silence=False)
    assert (batches(), signals.batched(now())) == ([(2, 60.0, 100)], True)
    await asyncio.sleep(BATCH_LATE + 99)
    assert (batches(), signals.batched(now() - 99), signals.batched(now())) == ([(2, 60.0, 100)], True, False)
    assert signals.work_came(now(), "ann", after_silence=True)
    await asyncio.sleep(2)
    assert batches() == []
    await office.presence.batch(1, "night", work=timedelta(0), at=office.clock.now(), user="ann")
    await signals.hear()
    assert signals.work_came(now(), "ann", after_silence=True)
    assert batches() == []  # all of it came
    assert not signals.work_came(now(), "ann", after_silence=True)
    assert not signals.batched(now())


# -- machines that a plan wants to stay ------------------------------------------------------------------------


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


# -- what machines cost and take -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "usd"),
    [("batch", 2.0), (" Person-Waiting ", 40.0), ("person_waiting", 40.0), ("8.75", 8.75), (" $3 ", 3.0), ("0", 0.0)],
)
def test_waiting_has_a_price_in_words_or_usd(words: str, usd: float) -> None:
    assert wait_usd_per_hour(words, 2.0) == usd


@pytest.mark.parametrize("words", ["much", "-1", "nan", "1e6", ""])
def test_what_is_no_price_of_waiting_is_refused(words: str) -> None:
    with pytest.raises(ValueInvalid, match="is no price of waiting"):
        wait_usd_per_hour(words, 2.0)


async def test_how_long_starts_take_is_learned_from_three_of_ones_own(office: Office, tmp_path: Path) -> None:
    programs = settings_for(ACCOUNT, tmp_path)
    offers = FleetOffers(office.books, programs, office.clock, provider="runcomfy", types=("medium", "large", "medium"))
    assert (offers.types, offers.reference) == (("medium", "large"), "medium")
    usual = offers.boot_s("medium")
    owner = (await office.a_role(timedelta(days=1))).owner
    for number, seconds in enumerate((50, 60, 100)):
        assert await offers.refresh(at_once=True)
        assert (offers.boot_s("medium"), offers.own_starts) == (usual, {})
        at = office.clock.now() - timedelta(hours=1)
        row = Machine(
            id=MachineId(f"machine-{number}"),
            provider="runcomfy",
            account="test",
            purpose=Purpose.POOL,
            server_type="medium",
            duration=timedelta(hours=1),
            usd_per_hour=Decimal(1),
            rate_source="test",
            requested_at=at,
            since=at,
            owner_id=owner.id,
        )
        await office.books.add_machine(row, at=at)
        listed, changes = {"server_id": ServerId(f"s-{number}")}, {"ready_at": at + timedelta(seconds=seconds)}
        await office.books.record(row.id, MachineEvent.LISTED, at=at, by=owner.id, changes=listed)
        await office.books.record(row.id, MachineEvent.ANSWERED, at=at, by=owner.id, changes=changes)
    assert not await offers.refresh()  # what was read a moment ago is believed
    assert await offers.refresh(at_once=True)
    assert (offers.boot_s("medium"), offers.boot_s("large"), offers.own_starts) == (60, usual, {"medium": 3})
    [medium, large] = offers.views(lambda name: {"medium": 2, "large": -1}[name])
    assert (medium.name, medium.room, medium.boot_s) == ("medium", 2, 60.0)
    assert medium.boot_p90_s == pytest.approx(92)
    assert (large.name, large.room) == ("large", 0)
    assert (offers.boot_s("unheard-of"), offers.run_s("flux"), offers.load_s("flux", "medium")) == (60, UNKNOWN_RUN, 0)
