"""Seats at machines of a pool: taken, lined up at, lost, given back; and what a station says of its machines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.application.placing import JobFacts, Place, owed
from runcomfy.application.pool_seat import LINE_UP_S, PRESUMED_S, PoolSeat
from runcomfy.application.pool_station import LATE_S, PoolStation
from runcomfy.application.pooled import MachineLease, PooledMachine
from runcomfy.domain.exceptions import BudgetExceeded, MachineFailed, MachineLost, NodeFailed, ServerUnreachable
from runcomfy.domain.job import JobId, PromptId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.placement import BackWhy, Spot
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.progress import QueueView
from runcomfy.domain.queued import Phase, QueuedJob, QueueStatus, RowId
from runcomfy.domain.settings import ComfySettings, PoolSettings
from runcomfy.domain.work import Work
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.standing_pool import StandingPool

FACTS = JobFacts("portrait", 1, "ann", "film")


@pytest_asyncio.fixture
async def client(clock: LoopClock) -> AsyncIterator[ComfyUIWorkflowClient]:
    async with ComfyUIEmulator() as comfyui, ComfyUIWorkflowClient(comfyui.url, ComfySettings(), clock=clock) as client:
        yield client


@pytest.fixture
def pool(clock: LoopClock) -> StandingPool:
    return StandingPool(clock)


def station_of(pool: StandingPool, clock: LoopClock, **changes: Any) -> PoolStation:
    return PoolStation(pool, replace(PoolSettings(), **changes), clock=clock)


def row(number: int, workflow: str = "portrait", **changes: Any) -> QueuedJob:
    """Return a pending row as the store would."""
    fields: dict[str, Any] = dict.fromkeys(QueuedJob.__dataclass_fields__)
    fields |= {
        "id": RowId(number),
        "uid": JobId(f"job-{number}"),
        "workflow_id": workflow,
        "job_type": "JOB",
        "priority": 50,
        "status": QueueStatus.PENDING,
        "phase": Phase.NONE,
        "token": 1,
        "user": "ann",
        "project": "film",
    }
    return QueuedJob(**{**fields, **changes})


class Stay:
    """One job at the station, for as long as the test wants."""

    def __init__(
        self, station: PoolStation, name: str = "job", *, facts: JobFacts | None = FACTS, **options: Any
    ) -> None:
        self.bills: list[Any] = []
        self.place: Place | None = None
        self._leave: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._there = asyncio.Event()
        self.task = asyncio.create_task(self._stay(station, JobId(name), facts, options))

    async def _stay(self, station: PoolStation, job_id: JobId, facts: JobFacts | None, options: dict[str, Any]) -> None:
        nothing: Callable[[Any], None] = lambda _: None  # noqa: E731 - a name for its type
        async with station.at(
            job_id=job_id, show=nothing, step=nothing, on_bill=self.bills.append, facts=facts, **options
        ) as self.place:
            self._there.set()
            await self._leave

    async def there(self) -> Place:
        entered = asyncio.create_task(self._there.wait())
        await asyncio.wait({self.task, entered}, return_when=asyncio.FIRST_COMPLETED)
        entered.cancel()
        if self.place is None:
            self.task.result()
        assert self.place is not None
        return self.place

    async def seat(self) -> PoolSeat:
        seat = (await self.there()).seat
        assert isinstance(seat, PoolSeat)
        return seat

    async def leave(self, error: Exception | None = None) -> None:
        if error is None:
            self._leave.set_result(None)
        else:
            self._leave.set_exception(error)
        await self.task


# -- being there -----------------------------------------------------------------------------------------------


async def test_a_job_has_a_seat_while_it_is_there_and_pays_its_share(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    assert (station.room(), set(station.places())) == (2, {machine.key})
    stay = Stay(station)
    place = await stay.there()
    assert (place.kind, place.key, place.alone, place.machine) == ("pool machine", machine.key, False, machine.machine)
    [lease] = machine.leases
    assert (lease.workflow, lease.user, lease.project, lease.attempt) == ("portrait", "ann", "film", 1)
    assert lease.expected_s == PRESUMED_S
    assert station.room() == 1
    await asyncio.sleep(36)
    [line] = owed(place, now=clock.now())
    assert line.amount_usd == pool.cost_share(lease)
    assert 36 <= line.seconds < 37
    await stay.leave()
    assert machine.leases == []
    assert [(outcome, error) for _, outcome, error in pool.ended] == [("done", None)]
    assert stay.bills == [place.bill]
    assert place.cost_usd == line.amount_usd


async def test_a_failure_is_told_to_the_pool(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    pool.add(client)
    stay = Stay(station_of(pool, clock))
    await stay.there()
    error = NodeFailed("it burst")
    with pytest.raises(NodeFailed):
        await stay.leave(error)
    assert [(outcome, told) for _, outcome, told in pool.ended] == [("failed", error)]


async def test_a_server_that_falls_silent_makes_the_machine_fail_not_the_computer(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    pool.add(client)
    stay = Stay(station_of(pool, clock))
    await stay.there()
    with pytest.raises(MachineFailed, match="does not answer"):
        await stay.leave(ServerUnreachable("no answer"))
    [(_, outcome, error)] = pool.ended
    assert outcome == "failed"
    assert isinstance(error, MachineFailed)


async def test_cancelled_it_leaves_without_a_word_about_the_machine(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine = pool.add(client)
    stay = Stay(station_of(pool, clock))
    await stay.there()
    stay.task.cancel()
    with suppress(asyncio.CancelledError):
        await stay.task
    assert stay.task.cancelled()
    assert machine.leases == []
    assert [(outcome, error) for _, outcome, error in pool.ended] == [("cancelled", None)]


@pytest.mark.parametrize("how", ["lost", "flapped"])
async def test_a_lost_seat_ends_what_the_job_does(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock, how: str
) -> None:
    machine = pool.add(client)
    stay = Stay(station_of(pool, clock))
    await stay.there()
    if how == "lost":
        pool.lose(machine)
    else:
        pool.ready(machine, client)
    with pytest.raises(MachineLost):
        await asyncio.wait_for(stay.task, 1)
    assert machine.leases == []


async def test_a_lost_seat_says_what_became_of_the_machine(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    seat = await Stay(station).seat()
    there = {"machine": machine.id, "server_id": "standing-1"}
    machine.epoch += 1  # it has answered again since
    assert "it was not Ready for a while" in seat.lost().message
    machine.outran = True
    assert "it was ended at the end of its lease" in seat.lost().message
    machine.outran, machine.gone = False, True
    lost = seat.lost()
    assert isinstance(lost, MachineLost)
    assert lost.message.endswith("was lost during the job: it went away")
    assert lost.details == there
    machine.unpaid = "the day's budget is used up"
    broke = seat.lost()
    assert isinstance(broke, BudgetExceeded)
    assert "the day's budget is used up" in broke.message
    assert broke.details == there


async def test_a_seat_that_was_lost_before_the_job_came_to_it_is_no_place(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    assert station.seat(row(1), machine.key)
    pool.ready(machine, client)
    with pytest.raises(MachineLost):
        await Stay(station, "job-1").there()
    assert machine.leases == []


async def test_who_only_looks_in_takes_no_seat(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    stay = Stay(station, facts=None, prefer=machine.key)
    place = await stay.there()
    assert (place.server, place.kind, place.key, place.machine) == (
        client,
        "pool machine",
        machine.key,
        machine.machine,
    )
    assert not place.alone
    assert machine.leases == []
    await stay.leave()
    with pytest.raises(ServerUnreachable):
        await Stay(station, facts=None, prefer="machine:gone").there()


async def test_a_seat_is_kept_for_a_claimed_job_until_it_comes_or_is_given_up(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    assert station.seat(row(1), machine.key)
    assert station.seat(row(2))
    assert not station.seat(row(3))
    assert station.room() == 0
    stay = Stay(station, "job-1")
    assert (await stay.seat()).lease.job_id == "job-1"
    station.release(JobId("job-2"), 1)
    station.release(JobId("job-2"), 1)
    assert station.room() == 1
    await stay.leave()
    assert [outcome for _, outcome, _ in pool.ended] == ["put-back", "done"]


async def test_without_a_seat_it_finds_one_or_says_that_there_is_none(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    pool.add(client)
    second, station = pool.add(client), station_of(pool, clock)
    there = Stay(station, "a", prefer=second.key)
    assert (await there.there()).key == second.key
    stays = [Stay(station, name) for name in "bcd"]
    for stay in stays:
        await stay.there()
    with pytest.raises(MachineLost, match="seat"):
        await Stay(station, "e").there()
    for stay in [there, *stays]:
        await stay.leave()


async def test_what_goes_on_with_a_prompt_is_let_in_where_nobody_else_is(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    keeps = Stay(station, "keeps")
    await keeps.there()
    pool.drain(machine.id, why="not needed")
    assert (station.room(), set(station.places())) == (0, {machine.key})
    again = row(1, phase=Phase.SUBMITTED, place=machine.key)
    assert [(choice.job, choice.place) for choice in station.choose([row(2), again])] == [(again, machine.key)]
    assert station.seat(again, machine.key)
    assert not station.seat(row(2), machine.key)
    station.release(again.uid, again.token)
    await keeps.leave()
    assert pool.machines == ()


# -- in line ---------------------------------------------------------------------------------------------------


async def test_an_older_run_of_a_job_that_ends_late_leaves_the_seat_of_the_newer_one_alone(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    """It was claimed again, here, while the run whose claim was lost was still ending."""
    station = station_of(pool, clock)
    machine = pool.add(client)
    assert station.seat(row(1, token=1))
    older = Stay(station, "job-1", facts=JobFacts("portrait", 1))
    await older.there()
    assert station.seat(row(1, token=2))
    newer = Stay(station, "job-1", facts=JobFacts("portrait", 2))
    seat = await newer.seat()
    await older.leave()
    station.release(JobId("job-1"), 1)
    assert machine.leases == [seat.lease]
    assert seat.lease.attempt == 2
    assert not seat.void
    assert station.seat(row(1, token=3))
    assert station.seat(row(1, token=3)) is False  # one seat is the newer run's
    station.release(JobId("job-1"), 3)
    await newer.leave()
    assert machine.leases == []
    assert station.room() == 2


async def test_prompts_are_sent_in_the_order_of_the_seats(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock, looptime: float
) -> None:
    pool.add(client)
    station = station_of(pool, clock)
    first, second = await Stay(station, "a").seat(), await Stay(station, "b").seat()
    assert (first.behind, second.behind) == (False, True)
    line = asyncio.create_task(second.line_up())
    await asyncio.sleep(1)
    assert not line.done()
    first.submitted(PromptId("p1"))
    await asyncio.wait_for(line, 0.1)
    await first.line_up()


async def test_a_machine_with_nothing_to_compute_does_not_wait_for_long_uploads(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    pool.add(client)
    station = station_of(pool, clock)
    await Stay(station, "uploads").seat()
    second = await Stay(station, "b").seat()
    loop = asyncio.get_running_loop()
    began = loop.time()
    await second.line_up()
    assert LINE_UP_S <= loop.time() - began < LINE_UP_S + 0.5


async def test_a_turn_comes_when_nobody_is_ahead(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    came: list[str] = []
    stays = [Stay(station, name) for name in "ab"]
    first, second = [await stay.seat() for stay in stays]
    first.at_turn(lambda: came.append("a"))
    second.at_turn(lambda: came.append("b"))
    first.computing()
    await asyncio.sleep(1)
    assert came == ["a"]
    first.computed()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert came == ["a", "b"]
    assert station.room() == 1
    assert len(machine.leases) == 2


async def test_who_waits_behind_a_users_own_prompt_goes_to_an_idle_machine(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    pool.add(client)
    station = station_of(pool, clock)
    seat = await Stay(station, "a").seat()
    seat.submitted(PromptId("ours"))
    assert station.reconsider({JobId("a"): 50}, []) == {}
    seat.saw(QueueView(running=("by hand",), pending=("ours",)))
    assert station.reconsider({JobId("a"): 50}, []) == {}
    pool.add(client)
    assert station.reconsider({JobId("a"): 50}, []) == {"a": BackWhy.IDLE}
    seat.computing()
    assert station.reconsider({JobId("a"): 50}, []) == {}


async def test_who_waits_behind_another_job_goes_to_a_machine_that_begins_it_earlier_or_gives_way_to_a_more_urgent_one(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    first, second = [await Stay(station, name).seat() for name in "ab"]
    urgent, both = row(3, priority=10), {JobId("a"): 50, JobId("b"): 50}
    assert station.reconsider(both, [row(3)]) == {}
    assert station.reconsider(both, [urgent]) == {"b": BackWhy.URGENT}
    assert station.reconsider({JobId("b"): 10}, [urgent]) == {}
    pool.add(client)
    assert station.reconsider({JobId("b"): 50}, [urgent]) == {"b": BackWhy.IDLE}
    for ago_s, back in ((0.0, True), (PRESUMED_S - 5, True), (PRESUMED_S - 1, False)):
        pool.computing(first.lease, ago_s=ago_s)
        assert station.reconsider(both, []) == ({"b": BackWhy.IDLE} if back else {})  # a second is not worth it
    pool.computing(first.lease, ago_s=PRESUMED_S + 20)  # as late as it is, it may take as long again
    assert station.reconsider(both, []) == {"b": BackWhy.IDLE}
    pool.computing(first.lease, ago_s=PRESUMED_S - 1)
    pool.drain(machine.id, why="not needed")
    assert station.reconsider(both, []) == {"b": BackWhy.DRAINS}
    pool.computing(second.lease)
    assert station.reconsider(both, []) == {}  # it has begun


# -- choosing --------------------------------------------------------------------------------------------------


async def test_a_machine_that_is_suspected_gets_nothing_new(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client), station_of(pool, clock)
    machine.suspect = "it does not answer"
    assert station.room() == 0
    assert station.choose([row(1)]) == []


async def test_nobody_is_passed_over_for_longer_than_the_setting_allows(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine = pool.add(client)
    station = station_of(pool, clock, depth=1, affinity_wait=timedelta(seconds=60))
    machine.warm.add("video")
    jobs = [row(1, "portrait"), row(2, "video")]
    assert [choice.job.id for choice in station.choose(jobs)] == [2]
    await asyncio.sleep(59)
    assert [choice.job.id for choice in station.choose(jobs)] == [2]
    await asyncio.sleep(1)
    assert [choice.job.id for choice in station.choose(jobs)] == [1]


async def test_run_times_are_learnt(pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock) -> None:
    pool.add(client)
    station = station_of(pool, clock)
    for seconds in (40, 10, 10):
        stay = Stay(station)
        seat = await stay.seat()
        seat.computing()
        await asyncio.sleep(seconds)
        seat.computed()
        await stay.leave()
    assert station.experience.run_s("portrait", "medium") == pytest.approx(10)
    assert station.experience.load_s("portrait", "medium") == pytest.approx(30)
    assert station.experience.load_s("other", "medium") == pytest.approx(30)


async def test_a_prompt_whose_beginning_nobody_heard_counts_with_the_servers_own_word(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine: PooledMachine = pool.add(client)
    station = station_of(pool, clock)
    seat = await Stay(station).seat()
    await asyncio.sleep(30)
    seat.computed(12.0)
    assert machine.seated == 0
    assert station.experience.run_s("portrait", "medium") == pytest.approx(12)


async def test_a_machine_is_free_when_all_that_waits_and_computes_there_is_done(
    pool: StandingPool, client: ComfyUIWorkflowClient
) -> None:
    machine = pool.add(client)
    now = asyncio.get_running_loop().time()
    assert (machine.predicted_free_at(now), machine.seated) == (now, 0)

    def lease(number: int, expected_s: float) -> MachineLease:
        return pool.lease(machine, job_id=JobId(f"job-{number}"), attempt=1, workflow="a", expected_s=expected_s)

    first, second = lease(1, 30.0), lease(2, 20.0)
    assert machine.predicted_free_at(now) == now + 50
    pool.computing(first, ago_s=10.0)
    assert machine.predicted_free_at(now) == now + 40
    pool.computing(first, ago_s=29.75)
    assert machine.predicted_free_at(now) == now + 20.25
    pool.computing(first, ago_s=90.0)  # it is late: done at any moment
    assert (machine.predicted_free_at(now), machine.seated) == (now + 20, 2)
    pool.computed(first)
    pool.computing(second)
    assert (machine.predicted_free_at(now), machine.seated) == (now + 20, 1)


# -- what it says of itself --------------------------------------------------------------------------------------


async def test_placement_sees_a_machine_as_it_stands(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine, station = pool.add(client, server_type="large"), station_of(pool, clock)
    now = asyncio.get_running_loop().time()
    idle = Spot(machine.key, "large", 1.75, seats=2)
    assert station._spot(machine, now) == idle
    machine.warm = {"mesh"}
    machine.draining = "the plan says so"
    assert station._spot(machine, now) == replace(idle, seats=0, usable=False, warm=frozenset({"mesh"}))
    machine.draining, machine.stage = "", Stage.DRAINING
    assert not station._spot(machine, now).usable
    machine.stage, machine.warm = Stage.BOOTING, set()
    for expected_in, ready_s in ((40.0, 40.0), (0.0, LATE_S), (-LATE_S - 5, LATE_S + 5)):  # as late as it is again
        machine.expected_ready_at = now + expected_in
        assert station._spot(machine, now) == replace(idle, ready_s=ready_s)
    machine.stage = Stage.READY

    seats = [await Stay(station, name).seat() for name in "ab"]
    pool.computing(seats[0].lease, ago_s=10.0)
    now = asyncio.get_running_loop().time()
    busy = station._spot(machine, now)
    assert (busy.seats, busy.taken, busy.warm) == (0, 2, frozenset({"portrait"}))
    assert busy.free_s == pytest.approx(2 * PRESUMED_S - 10, abs=0.5)
    for seat, prompt_id in zip(seats, "pq", strict=True):
        seat.submitted(PromptId(prompt_id))
    seats[1].saw(QueueView(running=(PromptId("p"),), pending=(PromptId("somebody"), PromptId("q"))))
    busy = station._spot(machine, now)
    assert busy.taken == 3
    assert busy.free_s == pytest.approx(3 * PRESUMED_S - 10, abs=0.5)
    pool.computed(seats[0].lease)
    busy = station._spot(machine, now)
    assert (busy.seats, busy.taken) == (1, 2)
    assert busy.free_s == pytest.approx(2 * PRESUMED_S, abs=0.5)


async def test_a_seat_is_taken_with_what_is_known_of_the_job_and_what_it_took_is_learnt(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    at = clock.now()

    def ran(number: int, seconds: float, *, cold: bool) -> Work:
        until = at + timedelta(seconds=seconds)
        job = JobId(str(number))
        return Work(MachineId("m"), job, 1, "portrait", "medium", at, computing_at=at, computed_at=until, cold=cold)

    known = [ran(1, 40, cold=True), ran(2, 10, cold=False), ran(3, 10, cold=False)]
    station = PoolStation(pool, replace(PoolSettings(), depth=1), clock=clock, works=known, outlives=lambda: True)
    machine = pool.add(client)
    stay = Stay(station, facts=JobFacts("portrait", 4, "ann", "film"))
    place = await stay.there()
    assert (place.alone, place.outlives, place.attempt) == (True, True, 4)
    [lease] = machine.leases
    assert (lease.attempt, lease.user, lease.project) == (4, "ann", "film")
    assert lease.expected_s == pytest.approx(40)  # nothing is loaded there yet
    seat = await stay.seat()
    await asyncio.sleep(5)
    seat.computing()
    await asyncio.sleep(25)
    seat.computed()
    learnt = station.experience._works[-1]
    assert learnt.computing_at is not None
    assert learnt.computed_at is not None
    assert (learnt.computed_at - learnt.computing_at).total_seconds() == pytest.approx(25)
    assert (learnt.machine_id, learnt.job_id, learnt.attempt, learnt.workflow) == (machine.id, "job", 4, "portrait")
    assert (learnt.server_type, learnt.cold, learnt.began_at) == ("medium", True, lease.began_at)
    await stay.leave()
    warm = Stay(station)
    await warm.there()
    [lease] = machine.leases
    assert lease.expected_s == pytest.approx(station.experience.run_s("portrait", "medium"))
    await warm.leave()


async def test_who_waits_for_a_machines_end_hears_of_machines_that_are_gone_and_of_no_other_change(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    station = station_of(pool, clock)
    heard: list[str] = []
    station.on_change(lambda: heard.append("change"))
    station.on_gone(lambda: heard.append("gone"))
    machine, other = pool.add(client), pool.add(client)

    async def said() -> set[str]:
        await asyncio.sleep(0.01)
        told, heard[:] = set(heard), []
        return told

    assert await said() == {"change"}
    pool.drain(machine.id, why="not needed")  # it is out of the list, and proven to be gone by nobody
    stay = Stay(station)
    await stay.there()
    assert await said() == {"change"}
    pool.lose(other)
    assert await said() == {"gone", "change"}
    with pytest.raises(MachineLost):
        await stay.task


async def test_a_job_that_is_no_longer_waiting_is_remembered_for_twice_the_patience_it_has(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    station = station_of(pool, clock, affinity_wait=timedelta(seconds=10))
    station._delayed = {RowId(1): 0.0, RowId(2): 0.0}
    station._forget({RowId(2)}, 20.0)
    assert set(station._delayed) == {1, 2}
    assert [station._pending(row(number), 15.0).delayed_s for number in (1, 2, 3)] == [15.0, 15.0, 0.0]
    station._forget({RowId(2)}, 20.5)
    assert set(station._delayed) == {2}  # it waits still
