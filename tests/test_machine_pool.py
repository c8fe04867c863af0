"""The machine pool on an emulated cloud: what is launched, shared, renewed, drained, taken over and ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from runcomfy.application.machine_pool import MachinePool, takes_over
from runcomfy.application.pool_works import AGAIN_AFTER, Works
from runcomfy.application.pooled import Pool
from runcomfy.application.reaper import Reaper
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    LeaseLost,
    MachineLost,
    NoCapacity,
    StoreUnavailable,
    ValueInvalid,
)
from runcomfy.domain.health import ENOUGH_RUNS
from runcomfy.domain.job import JobId, PromptId
from runcomfy.domain.machine import Machine, MachineId, MachineState, OwnerId, Purpose, ServerId
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.settings import CloudSettings, PoolSettings
from runcomfy.domain.work import Work
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, settings_for
from runcomfy.testing.rented_pools import RunningPool, gaps, running_pool, story, until

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    settings = settings_for(cloud_settings, tmp_path / "state")
    return Programs(cloud, replace(settings, pool=PoolSettings(max_machines=4)), clock)


@pytest.fixture
async def program(programs: Programs) -> AsyncIterator[Program]:
    async with programs.start() as program:
        yield program


@pytest.fixture
async def pool(program: Program) -> AsyncIterator[RunningPool]:
    async with running_pool(program) as pool:
        yield pool


# -- the plain story ---------------------------------------------------------------------------------------


async def test_a_machine_is_rented_shared_drained_and_gone_and_the_ledger_is_the_bill(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    for _ in range(3):
        await pool.run(machine, 30)
    pool.pool.drain(machine.id, why="nothing is to do")
    await pool.empty()

    assert cloud.alive == []
    assert await gaps(cloud, program) == {}
    words = await story(program, machine.id)
    assert [word.partition(":")[0] for word in words] == [
        "added",
        "listed",
        "answered",
        "changed",
        "changed",
        "stop-asked",
        "changed",
        "gone",
    ]
    assert words[0] == "added: jobs wait"
    assert words[3].startswith("changed: usable: ComfyUI ")
    assert words[4] == "changed: drained: nothing is to do"
    row = await program.store.machine(machine.id)
    assert row is not None
    assert (row.purpose, row.draining, row.run_id) == (Purpose.POOL, "nothing is to do", program.owner.id)
    await pool.close()


async def test_it_keeps_the_port(program: Program) -> None:
    pool: Pool = MachinePool(program.machines, program.placer.comfyui)
    assert list(pool.machines) == []


async def test_several_machines_boot_at_the_same_time_one_launch_after_the_other(
    cloud: RunComfyEmulator, pool: RunningPool, looptime: float
) -> None:
    await asyncio.gather(*(pool.launch() for _ in range(4)))
    assert [machine.stage for machine in pool.machines] == [Stage.BOOTING] * 4
    assert pool.pool.room("medium") == 0
    assert "at most 4" in pool.pool.why_no_room("medium")
    with pytest.raises(NoCapacity, match="at most 4"):
        await pool.launch()
    await until(lambda: all(m.takes_jobs for m in pool.machines), within=300, what="four machines")
    assert len(cloud.launched) == 4
    posts = [call for call in cloud.calls if call.method == "POST"]
    assert len({call.at for call in posts}) == 4
    # asked for together: one list for all, not a question for each
    asked = [call.path for call in cloud.calls if call.method == "GET" and call.path.startswith("servers/")]
    assert asked == []
    await pool.close()


async def test_a_launch_that_is_under_way_is_a_machine_of_the_pool_already(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    cloud.next_call("POST servers", delay=20)
    launch = asyncio.create_task(pool.launch())
    await asyncio.sleep(5)
    [machine] = pool.machines
    assert [(m.stage, m.machine.server_id) for m in pool.machines] == [(Stage.BOOTING, None)]
    assert pool.pool.room("medium") == 3
    with pytest.raises(MachineLost):
        pool.lease(machine)
    assert (await launch).id == machine.id
    await pool.close()


async def test_a_launch_that_nobody_waits_for_any_more_is_broken_off(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    cloud.next_call("POST servers", delay=20)
    launch = asyncio.create_task(pool.launch())
    await asyncio.sleep(5)
    launch.cancel()
    await asyncio.wait({launch})
    assert launch.cancelled()
    assert list(pool.machines) == []
    assert cloud.alive == []
    assert await gaps(cloud, program) == {}
    await pool.close()


async def test_a_launch_that_is_broken_off_while_its_lock_is_freed_leaves_no_machine(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch has worked by then, and would end nothing itself any more."""
    real, freeing, go_on = program.store.break_launch_lock, asyncio.Event(), asyncio.Event()

    async def break_launch_lock(account: str, *, holder: OwnerId) -> None:
        freeing.set()
        await go_on.wait()
        await real(account, holder=holder)

    monkeypatch.setattr(program.store, "break_launch_lock", break_launch_lock)
    launch = asyncio.create_task(pool.launch())
    await freeing.wait()
    assert len(cloud.alive) == 1
    launch.cancel()
    await asyncio.sleep(1)
    go_on.set()
    await asyncio.wait({launch})
    assert launch.cancelled()
    await pool.empty()
    assert cloud.alive == []
    await pool.close()


async def test_what_is_drained_while_it_is_launched_is_ended_when_it_is_answered(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    cloud.next_call("POST servers", delay=20)
    launch = asyncio.create_task(pool.launch())
    await asyncio.sleep(5)
    pool.pool.drain(pool.machines[0].id, why="no job waits any more")
    await launch
    await pool.empty()
    assert cloud.alive == []
    await pool.close()


@pytest.mark.cloud(boot_time=60)
async def test_what_it_expects_of_a_start_is_learnt(pool: RunningPool) -> None:
    first = await pool.launch()
    assert first.expected_ready_at - first.launched_at == pytest.approx(180)
    await until(lambda: first.takes_jobs, within=300, what="the machine")
    second = await pool.launch()
    assert second.expected_ready_at - second.launched_at == pytest.approx(60, abs=6)
    await pool.close()


@pytest.mark.fault(28)
async def test_what_has_no_price_or_is_too_dear_is_never_launched(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start(max_usd_per_hour=Decimal(1)) as program, running_pool(program) as pool:
        with pytest.raises(BudgetExceeded, match="more than the limit"):
            await pool.launch("large")
        with pytest.raises(ValueInvalid):
            await pool.launch("no-such-type")
        assert pool.pool.room("large") == 0
        assert "limit of $1" in pool.pool.why_no_room("large")
        assert pool.pool.room("medium") == 4
    assert cloud.launched == []


# -- leases ------------------------------------------------------------------------------------------------


async def test_a_machine_has_as_many_seats_as_it_is_deep_and_fetching_needs_none(pool: RunningPool) -> None:
    machine = await pool.usable()
    first, second = pool.lease(machine), pool.lease(machine, compute=False)
    assert machine.seated == 2
    with pytest.raises(MachineLost, match="no seat"):
        pool.lease(machine)
    pool.pool.computed(first)
    third = pool.lease(machine, compute=False)
    assert (machine.seated, len(machine.leases)) == (2, 3)
    assert [row.idle_s for row in pool.pool.rows()] == [None]
    for lease in (first, second, third):
        pool.done(lease)
        pool.done(lease)  # harmless
    assert machine.leases == []
    assert machine.idle_since is not None
    await pool.close()


async def test_jobs_pay_for_their_share_of_the_machine_and_nobody_here_for_its_idle_time(
    program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    await asyncio.sleep(600)
    alone = await pool.run(machine, 36)
    assert pool.pool.cost_share(alone) == Decimal("0.0099")
    first = pool.lease(machine)
    await asyncio.sleep(20)
    second = pool.lease(machine)
    await asyncio.sleep(100)
    assert pool.pool.cost_share(second) == Decimal("0.01375")
    pool.done(second)
    await asyncio.sleep(10)
    pool.done(first)
    await asyncio.sleep(500)
    seconds = [pool.pool.cost_share(lease) * 3600 / Decimal("0.99") for lease in (first, second)]
    assert [round(s) for s in seconds] == [80, 50]
    await pool.close()


async def test_each_job_is_written_down_as_work(program: Program, pool: RunningPool) -> None:
    machine = await pool.usable()
    lease = pool.pool.lease(
        machine, job_id=pool.lease(machine).job_id, attempt=3, workflow="mesh", user="ann", project="p"
    )
    await asyncio.sleep(5)
    [_, work] = await program.store.works()
    assert (work.attempt, work.computing_at, work.ended_at, work.cold) == (3, None, None, True)
    pool.pool.computing(lease)
    await asyncio.sleep(40)
    pool.pool.computed(lease)
    await asyncio.sleep(5)
    pool.pool.give_back(lease, outcome="done")
    again = await pool.run(machine, 10, workflow="mesh")
    await asyncio.sleep(1)
    works = {(w.job_id, w.attempt): w for w in await program.store.works()}
    work = works[lease.job_id, 3]
    assert work.computing_at is not None
    assert work.computed_at is not None
    assert work.ended_at is not None
    assert work.computed_at - work.computing_at == timedelta(seconds=40)
    assert work.ended_at - work.computed_at == timedelta(seconds=5)
    assert (work.user, work.project, work.outcome, work.server_type) == ("ann", "p", "done", "medium")
    assert works[again.job_id, 1].cold is False
    await pool.close()


class Books:
    """A database that takes no word of certain jobs, or none at all; each word takes it a second."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.asked: list[str] = []
        self.rows: dict[str, Work] = {}

    async def put_work(self, work: Work) -> None:
        self.asked.append(work.job_id)
        await asyncio.sleep(1)
        if self.refused & {work.job_id, "all"}:
            raise StoreUnavailable("locked")
        self.rows[work.job_id] = work


def a_work(job: str, **fields: Any) -> Work:
    return Work(MachineId("m"), JobId(job), 1, "portrait", "medium", NOON, **fields)


async def test_what_a_database_refuses_of_a_jobs_time_is_written_later_and_holds_nobody_up() -> None:
    books = Books()
    works = Works(books)  # type: ignore[arg-type]
    books.refused = {"a", "b"}
    for job in "abc":
        works.put(a_work(job))
    await asyncio.sleep(2 * AGAIN_AFTER + 4)
    assert (list(books.rows), books.asked[:3]) == (["c"], ["a", "b", "c"])  # the refused go to the end
    books.refused = set()
    works.put(a_work("a", outcome="done"))  # there is a newer word by now
    await asyncio.sleep(2 * AGAIN_AFTER + 4)
    assert {job: work.outcome for job, work in books.rows.items()} == {"a": "done", "b": "", "c": ""}
    asked = len(books.asked)
    await asyncio.sleep(60)
    assert len(books.asked) == asked  # what is written is not written again
    works.put(a_work("d"))
    await asyncio.sleep(0.5)
    works.put(a_work("d", outcome="failed"))  # while the first word is on its way
    await asyncio.sleep(3)
    assert (books.rows["d"].outcome, books.asked[asked:]) == ("failed", ["d", "d"])
    await works.close()


async def test_what_is_left_of_jobs_time_is_written_at_the_end_once_or_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    works = Works(books)  # type: ignore[arg-type]
    books.refused = {"all"}
    for job in "abc":
        works.put(a_work(job))
    await asyncio.sleep(2)
    books.refused, books.asked = set(), []
    await works.close()
    assert (books.asked, list(books.rows)) == (["a", "b", "c"], ["a", "b", "c"])
    await works.close()
    assert len(books.asked) == 3

    books.refused, books.asked = {"all"}, []
    for job in "de":
        works.put(a_work(job))
    await works.close()
    assert books.asked == ["d"]  # it refuses: nobody waits for the others
    await works.close()
    assert books.asked == ["d"]

    monkeypatch.setattr("runcomfy.application.pool_works.MOST_UNWRITTEN", 2)
    books.refused, books.asked = set(), []
    for job in "fgh":
        works.put(a_work(job))
    works.put(a_work("g", outcome="done"))
    await works.close()
    assert books.asked == ["h", "g"]  # the oldest is let go, and a newer word makes a row young again


async def test_a_job_that_waits_behind_one_of_its_workflow_finds_the_machine_warm(
    program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    first, second = pool.lease(machine), pool.lease(machine, compute=False)
    assert (first.cold, second.cold) == (True, True)
    await asyncio.sleep(30)
    pool.pool.computed(first)
    assert machine.warm == {"portrait"}
    pool.pool.computing(second)
    pool.done(first)
    pool.done(second)
    await asyncio.sleep(1)
    assert [work.cold for work in await program.store.works()] == [True, False]
    await pool.close()


async def test_a_draining_machine_takes_no_job_lets_those_there_finish_and_goes(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    machine = await pool.usable()
    lease = pool.lease(machine)
    pool.pool.drain(machine.id, why="the plan says so")
    pool.pool.drain(machine.id, why="and says so again")
    assert (machine.stage, machine.draining) == (Stage.DRAINING, "the plan says so")
    with pytest.raises(MachineLost, match="the plan says so"):
        pool.lease(machine)
    attached = pool.pool.lease(machine, job_id=lease.job_id, attempt=2, workflow="portrait", attach=True)
    await asyncio.sleep(1200)  # two leases' time: it is paid for while somebody is there
    assert cloud.billing
    pool.done(lease)
    await asyncio.sleep(30)
    assert cloud.billing
    pool.done(attached)
    await pool.empty()
    assert cloud.alive == []
    await pool.close()


@pytest.mark.fault(69)
async def test_a_draining_machine_is_not_ended_under_a_prompt_that_somebody_sent_by_hand(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    machine = await pool.usable()
    assert machine.server is not None
    delay = {"class_type": "EmulatorDelay", "inputs": {"seconds": 60, "steps": 1, "previews": False, "seed": 1}}
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "by hand"}}
    await machine.server.submit({"1": delay, "2": save}, prompt_id=PromptId(str(uuid4())))
    pool.pool.drain(machine.id, why="nothing is to do")
    [member] = pool.pool._members
    asking = member.asking
    assert asking is not None
    pool.pool._members.end_if_unused(member)
    assert member.asking is asking  # it is asked already
    await asyncio.sleep(50)
    assert cloud.billing == [machine.machine.server_id]
    assert member.by_hand
    await pool.empty(within=60)
    assert cloud.alive == []
    assert len([said for said in pool.program.said if "by hand" in said]) == 1
    await pool.close()


@pytest.mark.fault(39)
@pytest.mark.fault(69)
async def test_a_draining_machine_is_ended_when_what_was_sent_by_hand_waits_and_nothing_runs(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    """A prompt runs and is waited for; the worker dies after it, and the one behind it never will run."""
    machine = await pool.usable()
    assert machine.server is not None
    comfyui = cloud.machines[cloud.launched[0]].comfyui
    assert isinstance(comfyui, ComfyUIEmulator)
    for seconds in (100, 5):
        delay = {
            "class_type": "EmulatorDelay",
            "inputs": {"seconds": seconds, "steps": 1, "previews": False, "seed": 1},
        }
        save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "by hand"}}
        await machine.server.submit({"1": delay, "2": save}, prompt_id=PromptId(str(uuid4())))
    pool.pool.drain(machine.id, why="nothing is to do")
    await asyncio.sleep(10)
    comfyui.kill_worker()
    await asyncio.sleep(130)
    assert [run.outcome for run in comfyui.run_log] == ["success"]
    assert cloud.billing == [machine.machine.server_id]
    await pool.empty(within=60)
    assert cloud.alive == []
    await pool.close()


async def test_listeners_are_told_once_for_what_happens_together(pool: RunningPool) -> None:
    machine = await pool.usable()
    told: list[int] = []
    pool.pool.on_change(lambda: told.append(len(machine.leases)))
    first, second = pool.lease(machine), pool.lease(machine)
    assert told == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == [2]
    pool.done(first)
    pool.done(second)
    await pool.close()


async def test_people_see_what_each_machine_does_costs_and_why_it_is_there(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    machine = await pool.launch(why="three jobs of portrait wait")
    assert pool.pool.rows()[0].doing == "starting"
    await until(lambda: machine.takes_jobs, within=300, what="the machine")
    lease = pool.lease(machine)
    await asyncio.sleep(36)
    [row] = pool.pool.rows()
    assert (row.doing, row.jobs, row.why) == ("computing", (lease.job_id,), "three jobs of portrait wait")
    assert row.spent_usd == pytest.approx(Decimal("0.0099"), abs=Decimal("0.002"))
    stops_at = cloud.machines[cloud.launched[0]].stops_at
    assert row.stops_at is not None
    assert stops_at is not None
    assert abs(row.stops_at - stops_at) < timedelta(seconds=1)
    pool.done(lease)
    await asyncio.sleep(20)
    [row] = pool.pool.rows()
    assert (row.doing, row.idle_s, row.warm) == ("idle", 20.0, ("portrait",))
    assert (row.id, row.server_id, row.server_type, row.jobs) == (machine.id, cloud.launched[0], "medium", ())
    assert (row.stage, row.draining, row.suspect) == (Stage.READY, "", "")
    assert (row.usd_per_hour, row.ready_at) == (machine.machine.usd_per_hour, machine.machine.ready_at)
    pool.pool.want(machine.id, until=4_711.0)
    assert machine.wanted_until == 4_711.0
    lease = pool.lease(machine)
    machine.suspect = "it says nothing"
    assert pool.pool.rows()[0].doing == "doubted"
    pool.pool.drain(machine.id, why="enough")
    assert pool.pool.rows()[0].doing == "draining"
    pool.done(lease)
    await asyncio.sleep(0.1)
    assert pool.pool.rows()[0].doing == "ending"
    pool.pool.want(MachineId("gone"), until=1.0)  # known to nobody any more: nothing to do
    pool.pool.drain(MachineId("gone"), why="enough")
    await pool.close()


# -- leases of the provider --------------------------------------------------------------------------------


async def test_every_machine_is_paid_ahead_by_no_more_than_a_lease_for_as_long_as_it_is_kept(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machines = [await pool.usable() for _ in range(3)]
    busy = pool.lease(machines[0])
    for _ in range(60):
        await asyncio.sleep(30)
        for server_id in cloud.launched:
            emulated = cloud.machines[server_id]
            assert emulated.bills
            assert emulated.stops_at is not None
            left = emulated.stops_at - cloud.now()
            assert timedelta(minutes=3) < left <= timedelta(minutes=10, seconds=1)
    pool.done(busy)
    await pool.close()
    assert cloud.alive == []
    assert await gaps(cloud, program) == {}


async def test_of_several_machines_that_whose_time_is_over_first_is_prolonged_first(
    cloud: RunComfyEmulator, pool: RunningPool
) -> None:
    for seconds in (30.0, 25.0, 20.0):
        cloud.next_machine(boot_time=seconds)
    for _ in range(3):
        await pool.launch()
    await until(lambda: all(m.takes_jobs for m in pool.machines), within=300, what="three machines")
    await asyncio.sleep(450)
    asked = [call for call in cloud.calls if call.path.endswith("update-estimated-duration")]
    server_ids = [call.path.split("/")[-2] for call in asked]
    assert server_ids[:3] == list(reversed(cloud.launched))
    await pool.close()


async def test_one_list_reads_back_many_renewals(cloud: RunComfyEmulator, pool: RunningPool) -> None:
    for _ in range(4):
        await pool.usable()
    await asyncio.sleep(1000)
    asked = [call.path for call in cloud.calls if call.method == "GET" and call.path.startswith("servers/")]
    renewals = [call for call in cloud.calls if call.path.endswith("update-estimated-duration")]
    assert asked == []
    assert 4 * 3 <= len(renewals) <= 4 * 5
    await pool.close()


async def test_what_no_budget_pays_longer_takes_no_more_jobs_and_ends_with_what_is_paid(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    # ten minutes of medium cost 16.5 cents: two leases are more than the day's 20 cents
    programs.settings = replace(programs.settings, budgets=(Budget(Period.DAY, hard=Decimal("0.20")),))
    async with programs.start() as program, running_pool(program) as pool:
        machine = await pool.launch()
        await until(lambda: bool(machine.draining), within=1000, what="the budget to refuse")
        assert "budget" in machine.draining
        await pool.empty(within=1000)
        assert sum(bill.usd for bill in cloud.books.values()) <= Decimal("0.20")
        with pytest.raises(BudgetExceeded, match="budget per day"):
            await pool.launch()
        assert list(pool.machines) == []
        assert await gaps(cloud, program) == {}


async def test_a_busy_machine_that_no_budget_pays_longer_ends_just_before_the_end_of_what_is_paid(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    programs.settings = replace(programs.settings, budgets=(Budget(Period.DAY, hard=Decimal("0.20")),))
    async with programs.start() as program, running_pool(program) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        await until(lambda: lease.void, within=1000, what="the lease to be void")
        pool.failed(lease, MachineLost("it went away"))
        await pool.empty()
        [bill] = cloud.books.values()
        assert 560 <= bill.seconds <= 600
        assert await gaps(cloud, program) == {}
        assert any("is not prolonged" in sentence for sentence in program.said)


async def test_who_is_not_in_charge_launches_nothing_and_pays_for_nothing(
    cloud: RunComfyEmulator, program: Program
) -> None:
    held = True
    async with running_pool(program, in_charge=lambda: held) as pool:
        await pool.usable()
        held = False
        with pytest.raises(LeaseLost):
            await pool.launch()
        await asyncio.sleep(700)
        assert cloud.billing == []
        [bill] = cloud.books.values()
        assert bill.seconds == 600
        await pool.empty(within=60)
        assert await gaps(cloud, program) == {}


# -- beginning and end -------------------------------------------------------------------------------------


async def test_closing_ends_every_machine_whatever_it_does(cloud: RunComfyEmulator, program: Program) -> None:
    async with running_pool(program) as pool:
        busy = await pool.usable()
        pool.lease(busy)
        await pool.usable("large")
        await pool.launch()
        cloud.next_call("POST servers", delay=20)
        launch = asyncio.create_task(pool.launch())
        await asyncio.sleep(10)
    with pytest.raises(NoCapacity, match="being closed"):
        await launch
    assert cloud.alive == []
    assert await gaps(cloud, program) == {}
    assert program.books.held == {}


async def test_machines_that_are_kept_are_taken_over_by_the_next_with_what_runs_there(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as first:
        pool = RunningPool(first, MachinePool(first.machines, first.placer.comfyui))
        machine, draining = await pool.usable(), await pool.usable("large")
        pool.lease(machine)
        pool.lease(draining)
        pool.pool.drain(draining.id, why="the plan says so")
        await asyncio.sleep(1)
        await pool.close(keep=True)
        assert first.books.held == {}
    assert len(cloud.billing) == 2
    async with programs.start() as second, running_pool(second) as pool:
        adopted = await pool.pool.adopt()
        assert set(adopted) == {machine.id, draining.id}
        reaped = await Reaper(second.machines).reap()
        assert reaped.ended == []
        await until(lambda: all(m.server for m in pool.machines), within=60, what="both to answer")
        [one, other] = [pool.machine(machine.id), pool.machine(draining.id)]
        assert (one.takes_jobs, other.takes_jobs) == (True, False)
        assert other.draining == "the plan says so"
        going_on = pool.pool.lease(other, job_id=pool.lease(one).job_id, attempt=2, workflow="portrait", attach=True)
        await asyncio.sleep(400)
        assert len(cloud.billing) == 2  # paid for by the new one
        pool.done(going_on)
        await until(lambda: len(pool.machines) == 1, within=60, what="the draining one to go")
        await pool.close()
        assert cloud.alive == []
        assert await gaps(cloud, second) == {}


async def test_machines_of_a_killed_process_are_taken_over_and_those_of_others_are_not(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    foreign = cloud.foreign()
    async with programs.start() as dead, programs.start() as single:
        own, _ = await single.ready()  # of a single command, which lives
        theirs = RunningPool(dead, MachinePool(dead.machines, dead.placer.comfyui))
        orphan = await theirs.usable()
        booting = await theirs.launch("large")
        await dead.kill(theirs.task)
        async with programs.start() as heir, running_pool(heir) as pool:
            adopted = await pool.pool.adopt()
            assert set(adopted) == {orphan.id, booting.id}
            assert await pool.pool.adopt() == []
            await until(lambda: all(m.takes_jobs for m in pool.machines), within=300, what="both")
            pool.done(pool.lease(pool.machine(orphan.id)))
            words = await story(heir, orphan.id)
            assert any(word.endswith("taken over: its process is gone") for word in words)
        assert cloud.billing == [own.server_id]
        await single.machines.stop(own, reason="its job is done")
        assert foreign.bills
        assert await gaps(cloud, single) == {}
        cloud._end(foreign)  # the user ends it on the website


async def test_who_keeps_the_pool_now_has_its_machines_also_those_of_one_that_slept(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    keeper = "first"
    async with programs.start() as first, programs.start() as second:
        async with running_pool(first, in_charge=lambda: keeper == "first") as slept:
            machine = await slept.usable()
            lease = slept.lease(machine)
            keeper = "second"
            async with running_pool(second, in_charge=lambda: keeper == "second") as pool:
                assert await pool.pool.adopt() == [machine.id]
                await until(lambda: pool.machines[0].takes_jobs, within=60, what="the machine")
                with pytest.raises(LeaseLost):
                    await slept.pool.adopt()
                # The one that slept has no word any more, and ends nothing.
                await asyncio.sleep(400)
                slept.done(lease)
                slept.pool.drain(machine.id, why="nothing is to do")
                await slept.empty(within=30)
                assert lease.void
                assert cloud.billing == [machine.machine.server_id]
                assert pool.machines[0].takes_jobs
        assert await gaps(cloud, second) == {}


async def test_a_machine_that_is_not_there_any_more_takes_no_job_and_says_why(pool: RunningPool) -> None:
    for drained, why in (("", "it is not there any more"), ("nothing is to do", "nothing is to do")):
        machine = await pool.usable()
        lease = pool.lease(machine)
        if drained:
            pool.pool.drain(machine.id, why=drained)
        member = pool.pool._members.get(machine.id)
        assert member is not None
        pool.pool._members.vanished(member, "in no list")
        assert (machine.gone, machine.draining, machine.takes_jobs, lease.void) == (True, why, False, True)
        pool.pool._members.vanished(member, "in no list")  # harmless
        pool.done(lease)
        await pool.empty(within=10)
        words = await story(pool.program, machine.id)
        assert len([word for word in words if word.endswith("in no list")]) == 1
    await pool.close()


@pytest.mark.invariant("I7")
async def test_a_machine_that_another_process_took_over_is_left_to_it_at_the_first_word_that_is_refused(
    cloud: RunComfyEmulator, programs: Programs, program: Program, pool: RunningPool
) -> None:
    machine, members = await pool.usable(), pool.pool._members
    lease, [member] = pool.lease(machine), members
    row = await program.store.machine(machine.id)
    assert row is not None
    async with programs.start() as other:
        theirs = await other.books.take_over(row, note="it is mine by now")
        assert not await members.write(member, "still ours?")
        assert (pool.machines, lease.void) == ((), True)
        assert "is looked after by another process now; left to it" in program.said[-1]
        assert cloud.billing == [theirs.server_id]
        await other.machines.stop(theirs, reason="the test is over")


@pytest.mark.fault(16)
async def test_a_machine_that_answers_again_knows_nothing_of_before_and_is_idle_only_without_jobs(
    pool: RunningPool,
) -> None:
    machine, members = await pool.usable(), pool.pool._members
    [member] = members
    client = machine.server
    assert client is not None
    await pool.run(machine, 5)
    for busy in (True, False):
        lease = pool.lease(machine)
        machine.warm.add("portrait")
        before = machine.epoch
        members.void(member, "it is not Ready")
        assert (machine.void, machine.idle_since, machine.warm, lease.void) == (True, None, set(), True)
        if not busy:
            pool.done(lease)
        members.usable(member, client)
        now = asyncio.get_running_loop().time()
        assert machine.idle_since == (None if busy else now)
        assert (machine.void, machine.epoch > before, machine.expected_ready_at) == (False, True, now)
        assert (machine.warm, lease.void, machine.takes_jobs) == (set(), True, True)
        if busy:
            pool.done(lease)
    await pool.close()


async def test_a_slow_machine_that_is_gone_excuses_no_other_one(pool: RunningPool) -> None:
    machine, health = await pool.usable(), pool.pool._members.health
    for _ in range(ENOUGH_RUNS):
        health.observed("mesh", "medium", machine.id, 20.0)
    health.observed("mesh", "medium", machine.id, 20.0 * health.rules.slow_factor + 10)
    assert health.usual("mesh", "medium", MachineId("another")) is None  # slow there, too: the jobs may be longer
    pool.pool.drain(machine.id, why="nothing is to do")
    await pool.empty()
    assert health.usual("mesh", "medium", MachineId("another")) == 20.0
    await pool.close()


@pytest.mark.invariant("I7")
async def test_what_was_to_be_ended_is_left_to_who_has_it_in_the_books_by_now(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """Also if the pool that had taken it over has not heard of that yet."""
    async with programs.start() as first:
        pool = RunningPool(first, MachinePool(first.machines, first.placer.comfyui))
        machine = await pool.usable()
        await pool.close(keep=True)
    async with programs.start() as second, programs.start() as third:
        async with running_pool(second) as pool:
            assert await pool.pool.adopt() == [machine.id]
            members = pool.pool._members
            [member] = members  # it may be let go of as soon as somebody else has it
            row = await third.store.machine(machine.id)
            assert row is not None
            theirs = await third.books.take_over(row, note="it is mine by now")
            members.end(member, "it is ill")
            await pool.empty(within=60)
            await asyncio.sleep(60)
            assert cloud.billing == [theirs.server_id]
            words = await story(third, machine.id)
            assert words[-1].endswith("it is mine by now")
        ended = await third.machines.stop(theirs, reason="the test is over")
        assert ended.state is MachineState.STOPPED
        assert await gaps(cloud, third) == {}


def test_what_is_taken_over_and_what_is_not() -> None:
    def row(**changes: Any) -> Machine:
        machine = Machine(
            id=MachineId("m"),
            provider="runcomfy",
            account="a",
            purpose=Purpose.POOL,
            server_type="medium",
            duration=timedelta(minutes=10),
            usd_per_hour=Decimal("0.99"),
            rate_source="",
            requested_at=NOON,
            since=NOON,
            state=MachineState.READY,
            server_id=ServerId("s"),
        )
        return replace(machine, **changes)

    assert takes_over(row())
    assert takes_over(row(purpose=Purpose.RUN, reason="executor: jobs of the queue"))
    assert not takes_over(row(purpose=Purpose.RUN, reason="job 7"))
    assert not takes_over(row(purpose=Purpose.DEV))
    assert not takes_over(row(state=MachineState.STOPPING))
    assert not takes_over(row(server_id=None, state=MachineState.REQUESTED))


async def test_an_idle_machine_costs_no_task_and_no_connection(cloud: RunComfyEmulator, pool: RunningPool) -> None:
    machines = [await pool.usable() for _ in range(4)]
    for machine in machines:
        await pool.run(machine, 5)
    await asyncio.sleep(180)
    before = {task.get_name() for task in asyncio.all_tasks()}
    assert not {name for name in before if any(m.id in name for m in machines)}
    assert [machine.takes_jobs for machine in machines] == [True] * 4
    await pool.close()
