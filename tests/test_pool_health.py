"""Machines that are ill are replaced, healthy ones are not: what the pool concludes from how jobs end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.machine_pool import MachinePool
from runcomfy.application.pool_health import HISTORY_EVERY, PoolHealth
from runcomfy.domain.exceptions import (
    AuthRejected,
    BootTimeout,
    GpuOutOfMemory,
    LaunchRefused,
    LeaseLost,
    MachineFailed,
    MachineLost,
    NoCapacity,
    NodeFailed,
    OutOfCredit,
    ProviderBusy,
    RunComfyError,
    ServerRestarted,
    ServerUnreachable,
    WorkerDead,
)
from runcomfy.domain.health import ENOUGH_RUNS
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.settings import CloudSettings, PoolSettings
from runcomfy.domain.work import Work
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, settings_for
from runcomfy.testing.rented_pools import RunningPool, gaps, story, until


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    settings = settings_for(cloud_settings, tmp_path / "state")
    return Programs(cloud, replace(settings, pool=PoolSettings(max_machines=8)), clock)


def comfyui_of(cloud: RunComfyEmulator, number: int = -1) -> ComfyUIEmulator:
    server: Any = cloud.machines[cloud.launched[number]].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


async def ended(cloud: RunComfyEmulator, program: Program, pool: RunningPool) -> None:
    """End the pool; nothing runs then, and the ledger is the bill."""
    await pool.close()
    assert cloud.alive == []
    assert await gaps(cloud, program) == {}


async def works_of(program: Program, seconds: float, *, runs: int, workflow: str = "mesh", cold: bool = False) -> None:
    """Put runs of earlier days into the books."""
    now = program.machines.clock.now()
    for number in range(runs):
        began = now - timedelta(days=1, minutes=number)
        await program.store.put_work(
            Work(
                MachineId("an-older-machine"),
                JobId(f"older-{workflow}-{seconds}-{number}"),
                1,
                workflow,
                "medium",
                began,
                computing_at=began,
                computed_at=began + timedelta(seconds=seconds),
                ended_at=began + timedelta(seconds=seconds),
                outcome="done",
                cold=cold,
            )
        )


# -- what makes a machine ill ------------------------------------------------------------------------------


async def test_a_worker_that_is_dead_ends_its_machine_at_once(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    lease, other = pool.lease(machine), pool.lease(machine, compute=False)
    pool.failed(lease, WorkerDead("ComfyUI answers but runs nothing"))
    assert other.void
    pool.failed(other, MachineLost("it is replaced"))
    await pool.empty(within=60)
    assert "ill: ComfyUI answers but runs nothing" in "\n".join(await story(program, machine.id))
    [decision] = [each for each in await program.store.decisions() if each.action == "replace"]
    assert (decision.what, decision.why) == (machine.id, "ComfyUI answers but runs nothing")
    await ended(cloud, program, pool)


@pytest.mark.parametrize("error", [ServerUnreachable("silence"), MachineFailed("its ComfyUI does not answer")])
async def test_a_server_that_a_job_gave_up_on_gets_nothing_more_and_is_replaced_when_it_stays_silent(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool, error: RunComfyError
) -> None:
    machine = await pool.usable()
    lease = pool.lease(machine)
    await comfyui_of(cloud).kill()
    pool.failed(lease, error)
    assert machine.suspect
    with pytest.raises(MachineLost):
        pool.lease(machine)
    await pool.empty(within=60)
    assert "Ready but its ComfyUI is not" in "\n".join(await story(program, machine.id))
    await ended(cloud, program, pool)


async def test_a_server_that_answers_again_is_trusted_again(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    lease = pool.lease(machine)
    pool.failed(lease, ServerUnreachable("a hiccup"))
    assert not machine.takes_jobs
    await until(lambda: machine.takes_jobs, within=30, what="it to be trusted again")
    assert len(cloud.launched) == 1
    await ended(cloud, program, pool)


async def test_an_idle_machine_whose_comfyui_dies_is_found_out_before_a_job_comes(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    await pool.run(machine, 5)
    await comfyui_of(cloud).kill()
    await until(lambda: not machine.takes_jobs, within=100, what="that to be noticed")
    await pool.empty(within=300)
    await ended(cloud, program, pool)


async def test_a_comfyui_that_restarts_between_jobs_keeps_its_machine(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    server = comfyui_of(cloud)
    await server.kill()
    await asyncio.sleep(90)
    await server.start(port=server.port)
    await until(lambda: machine.takes_jobs, within=60, what="it to be trusted again")
    await pool.run(machine, 5)
    assert len(cloud.launched) == 1
    await ended(cloud, program, pool)


async def test_two_jobs_killed_on_it_make_a_machine_ill_but_what_runs_there_may_finish(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    pool.failed(pool.lease(machine), ServerRestarted())
    pool.failed(pool.lease(machine), ServerRestarted())  # of the same crash
    assert machine.takes_jobs
    await asyncio.sleep(60)
    last, running = pool.lease(machine), pool.lease(machine)
    pool.failed(last, ServerRestarted())
    assert machine.draining == "ill: jobs died on it 2 times"
    assert not running.void
    await asyncio.sleep(500)
    assert cloud.billing == cloud.launched
    pool.done(running)
    await pool.empty(within=60)
    await ended(cloud, program, pool)


async def test_two_failures_of_the_gpu_in_a_row_make_a_machine_ill(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    pool.failed(pool.lease(machine), GpuOutOfMemory())
    await pool.run(machine, 5)
    pool.failed(pool.lease(machine), GpuOutOfMemory())
    assert machine.takes_jobs
    pool.failed(pool.lease(machine), GpuOutOfMemory())
    assert "GPU failed 2 times" in machine.draining
    await pool.empty(within=60)
    await ended(cloud, program, pool)


async def test_what_jobs_do_wrong_themselves_is_never_held_against_a_machine(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    for _ in range(10):
        pool.failed(pool.lease(machine), NodeFailed("a node of the workflow"))
        pool.pool.give_back(pool.lease(machine), outcome="put-back")
    assert machine.takes_jobs
    await ended(cloud, program, pool)


# -- speed -------------------------------------------------------------------------------------------------


@pytest.mark.fault(73)
async def test_a_machine_that_is_five_times_slower_than_usual_twice_in_a_row_is_replaced(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    await works_of(program, 20.0, runs=8)
    await works_of(program, 300.0, runs=20, cold=True)  # what loads models is another matter
    machine = await pool.usable()
    await pool.run(machine, 300, workflow="mesh")  # cold
    await pool.run(machine, 110, workflow="mesh")
    assert machine.takes_jobs
    await pool.run(machine, 110, workflow="mesh")
    assert machine.draining == "ill: it was too slow 2 times in a row (mesh took 110 s, usually 20 s)"
    await pool.empty(within=60)
    await ended(cloud, program, pool)


async def test_jobs_that_have_become_longer_everywhere_are_not_held_against_the_machines(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    await works_of(program, 20.0, runs=8)
    first, second = await pool.usable(), await pool.usable()
    for machine in (first, second) * 4:
        await pool.run(machine, 130, workflow="mesh")
    assert first.takes_jobs
    assert second.takes_jobs
    await ended(cloud, program, pool)


async def test_a_workflow_that_nobody_has_run_often_is_not_judged(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    await works_of(program, 20.0, runs=3)
    machine = await pool.usable()
    await pool.run(machine, 10, workflow="mesh")
    await pool.run(machine, 500, workflow="mesh")
    assert machine.takes_jobs
    await ended(cloud, program, pool)


# -- types -------------------------------------------------------------------------------------------------


async def test_a_type_whose_machines_fall_ill_one_after_the_other_rests_and_is_tried_again(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    for _ in range(3):
        machine = await pool.usable()
        pool.failed(pool.lease(machine), WorkerDead("nothing runs"))
        assert pool.pool.room("medium") == 0
        await asyncio.sleep(30)  # the pause after the second one
        await pool.empty(within=60)
    assert pool.pool.room("medium") == 0
    assert pool.pool.room("large") == 8
    assert "nothing runs; possible again in" in pool.pool.why_no_room("medium")
    breakers = [each for each in await program.store.decisions() if each.action == "breaker"]
    assert sorted(each.why.partition(":")[0] for each in breakers) == [
        f"nothing is launched for {seconds} s" for seconds in (15, 30, 600)
    ]
    await asyncio.sleep(571)
    assert pool.pool.room("medium") == 1
    machine = await pool.usable()
    pool.failed(pool.lease(machine), WorkerDead("nothing runs"))
    assert pool.pool.room("medium") == 0
    await asyncio.sleep(1000)
    assert pool.pool.room("medium") == 0  # twice as long
    await asyncio.sleep(250)
    machine = await pool.usable()
    await pool.run(machine, 10)
    assert pool.pool.room("medium") == 7
    await ended(cloud, program, pool)


async def test_jobs_that_go_well_in_between_make_failures_count_anew(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    for _ in range(4):
        machine = await pool.usable()
        await pool.run(machine, 5)
        pool.failed(pool.lease(machine), WorkerDead("nothing runs"))
        await pool.empty(within=60)
        await asyncio.sleep(15)
    assert pool.pool.room("medium") == 8
    await ended(cloud, program, pool)


async def test_a_database_that_refuses_keeps_no_machine_from_being_ended(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program:
        pool = RunningPool(program, MachinePool(program.machines, program.placer.comfyui))
        machine = await pool.usable()
        pool.lease(machine)
        database = program.store._port  # type: ignore[attr-defined]  # what the program's death is played on
        await database.close()
        pool.pool.drain(machine.id, why="nothing is to do")
        await pool.close()
        assert cloud.alive == []


# -- the memory by itself ------------------------------------------------------------------------------------


class Memory:
    """A pool's memory over books of its own; what it decided is kept."""

    def __init__(self, store: SqlStore, clock: LoopClock) -> None:
        self.decided: list[tuple[str, str, str]] = []
        settings = PoolSettings(breaker_failures=2, breaker_rest=timedelta(seconds=400))
        self.health = PoolHealth(store, clock, settings, said=lambda *told: self.decided.append(told))

    def rooms(self) -> tuple[int | None, int | None]:
        return self.health.room("medium"), self.health.room("large")


@pytest.fixture
async def memory(clock: LoopClock) -> AsyncIterator[Memory]:
    async with SqlStore(Path(":memory:"), clock=clock, durable=False) as store:
        yield Memory(store, clock)


async def test_a_type_pauses_after_a_failure_and_rests_after_several_and_the_others_do_not(memory: Memory) -> None:
    health = memory.health
    assert (memory.rooms(), health.why_not("medium"), health.waits_s("medium")) == ((None, None), "", 0.0)
    health.start_failed("medium", "it did not start")
    pause = health.breaker_rules.pause_s(1)
    assert (memory.rooms(), health.pausing("medium"), health.pausing("large")) == ((0, None), True, False)
    assert health.waits_s("medium") == pytest.approx(pause)
    said = f"nothing is launched for {pause:.0f} s: it did not start"
    assert memory.decided == [("breaker", "medium", said)]
    await asyncio.sleep(pause)
    assert (memory.rooms(), health.pausing("medium"), health.waits_s("medium")) == ((None, None), False, 0.0)
    health.start_failed("medium", "again")
    assert (memory.rooms(), health.pausing("medium")) == ((0, None), False)  # it rests: that is no mere pause
    assert health.why_not("medium") == "medium is not launched: again; possible again in 400 s"
    assert memory.decided[1:] == [("breaker", "medium", "nothing is launched for 400 s: again")]
    await asyncio.sleep(400)
    assert memory.rooms() == (1, None)
    health.launch_began("medium")
    assert memory.rooms() == (0, None)  # the one that is to find out
    health.start_unclear("medium")
    assert memory.rooms() == (1, None)
    health.launch_began("medium")
    health.usable("medium")
    assert memory.rooms() == (None, None)
    health.start_failed("medium", "once more")
    assert memory.rooms() == (0, None)  # nothing has worked there yet
    assert health.waits_s("medium") == pytest.approx(800)


async def test_a_machine_on_which_a_job_went_well_makes_failures_count_anew(memory: Memory) -> None:
    health = memory.health
    health.start_failed("medium", "it did not start")
    health.worked("medium")
    assert memory.rooms() == (None, None)
    health.start_failed("medium", "it did not start")
    assert health.pausing("medium")


@pytest.mark.parametrize(
    ("error", "rooms", "waits"),
    [
        (NoCapacity("none left"), (0, None), 40.0),
        (LaunchRefused("no such type"), (0, None), 400.0),
        (OutOfCredit("no money"), (0, 0), 400.0),
        (ProviderBusy("too many requests"), (0, 0), 10.0),
        (BootTimeout("it did not start"), (0, None), None),
        (LeaseLost("somebody else has it"), (None, None), 0.0),
        (None, (None, None), 0.0),
    ],
)
async def test_what_a_launch_fails_with_says_what_rests_and_for_how_long(
    memory: Memory, error: RunComfyError | None, rooms: tuple[int | None, int | None], waits: float | None
) -> None:
    health = memory.health
    health.launch_began("medium")
    health.launch_failed("medium", error)
    assert memory.rooms() == rooms
    assert health.waits_s("medium") == pytest.approx(health.breaker_rules.pause_s(1) if waits is None else waits)
    assert health.pausing("medium") == (waits is None)
    what = {(None, None): [], (0, None): ["medium"], (0, 0): ["the account"]}[rooms]
    assert [(action, of) for action, of, _ in memory.decided] == [("breaker", of) for of in what]
    if error is not None and rooms[0] == 0:
        assert memory.decided[0][2].endswith(f" s: {error.message}")
        assert error.message in health.why_not("medium")
    assert (health.why_not("large") != "") == (rooms[1] == 0)


async def test_an_account_that_worked_again_is_trusted_again(memory: Memory) -> None:
    health = memory.health
    health.launch_failed("medium", OutOfCredit("no money"))
    assert health.why_not("large").startswith("nothing is launched: no money; possible again in 400 s")
    await asyncio.sleep(400)
    assert memory.rooms() == (1, 1)
    health.launch_began("large")
    assert memory.rooms() == (0, 0)
    health.launched()
    assert memory.rooms() == (None, None)
    health.launch_failed("medium", OutOfCredit("no money"))
    assert health.waits_s("large") == pytest.approx(400)  # not twice as long: it had worked


async def test_a_refused_account_launches_nothing_until_it_is_answered(memory: Memory) -> None:
    health = memory.health
    for _ in range(2):
        health.refused(AuthRejected("the token is not accepted"))
    assert (memory.rooms(), health.is_refused, health.pausing("medium")) == ((0, 0), True, False)
    assert health.why_not("medium") == "nothing is launched: the token is not accepted"
    assert memory.decided == [("breaker", "the account", "nothing is launched: the token is not accepted")]
    health.answered()
    assert (memory.rooms(), health.is_refused, health.why_not("medium")) == ((None, None), False, "")


async def test_a_machine_is_slow_by_the_runs_of_others_on_its_type(memory: Memory) -> None:
    health, one, two = memory.health, MachineId("one"), MachineId("two")
    for number in range(ENOUGH_RUNS):
        assert health.usual("mesh", "medium", one) is None  # too few to say anything
        health.observed("mesh", "medium", two, 10.0 + number)
    assert health.usual("mesh", "medium", one) == 12.0
    assert health.usual("mesh", "large", one) is None
    assert health.usual("other", "medium", one) is None
    health.observed("mesh", "medium", one, 12.0 * health.rules.slow_factor)  # not slower than allowed
    assert health.usual("mesh", "medium", two) == 12.5
    health.observed("mesh", "medium", one, 12.6 * health.rules.slow_factor)
    assert health.usual("mesh", "medium", two) is None  # slow on another one as well: jobs have become longer
    assert health.usual("mesh", "medium", one) == 13.0
    health.forget(one)
    assert health.usual("mesh", "medium", two) == 13.0


async def test_run_times_are_read_from_the_books_every_ten_minutes(program: Program) -> None:
    health = PoolHealth(program.store, program.books.clock, PoolSettings(), said=lambda *_: None)
    await health.learn()
    await works_of(program, 20.0, runs=ENOUGH_RUNS)
    await works_of(program, 90.0, runs=ENOUGH_RUNS, cold=True)
    await health.learn()
    assert health.usual("mesh", "medium", MachineId("m")) is None  # read a moment ago
    await asyncio.sleep(HISTORY_EVERY)
    await health.learn()
    assert health.usual("mesh", "medium", MachineId("m")) == 20.0
