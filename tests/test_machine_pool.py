"""The machine pool on an emulated cloud: what is launched, shared and drained."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from runcomfy.application.machine_pool import MachinePool
from runcomfy.application.pool_works import AGAIN_AFTER, Works
from runcomfy.application.pooled import Pool
from runcomfy.domain.exceptions import BudgetExceeded, MachineLost, NoCapacity, StoreUnavailable, ValueInvalid
from runcomfy.domain.job import JobId, PromptId
from runcomfy.domain.machine import MachineId, OwnerId, Purpose
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.work import Work
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs
from runcomfy.testing.rented_pools import RunningPool, gaps, running_pool, story, until

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def programs(keepers: Programs) -> Programs:
    return keepers


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
    cold = {work.job_id: work.cold for work in await program.store.works()}
    assert cold == {first.job_id: True, second.job_id: False}
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
