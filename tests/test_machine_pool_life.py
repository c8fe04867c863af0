"""How long machines of a pool live: leases of the provider, and how a pool takes machines over and ends them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from runcomfy.application.machine_pool import MachinePool, takes_over
from runcomfy.application.reaper import Reaper
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import BudgetExceeded, LeaseLost, MachineLost, NoCapacity
from runcomfy.domain.health import ENOUGH_RUNS
from runcomfy.domain.machine import Machine, MachineId, MachineState, Purpose, ServerId
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs
from runcomfy.testing.rented_pools import RunningPool, gaps, running_pool, story, until

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def programs(keepers: Programs) -> Programs:
    return keepers


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


@pytest.mark.fault(9)
@pytest.mark.parametrize("second", ["has it", "cannot be read"])
async def test_a_machine_that_one_list_and_one_answer_deny_is_kept_unless_a_second_list_denies_it_too(
    cloud: RunComfyEmulator, pool: RunningPool, second: str
) -> None:
    machine = await pool.usable()
    lease = pool.lease(machine)
    cloud.next_call("GET servers", body=[])
    cloud.next_call("GET servers/*", status=404)
    if second == "cannot be read":
        cloud.next_call("GET servers", status=500, times=None, lasts=timedelta(seconds=15))
    await until(lambda: any(call.path == f"servers/{cloud.launched[0]}" for call in cloud.calls), within=60, what="it")
    await asyncio.sleep(20)
    assert (lease.void, machine.gone, machine.draining, machine.suspect) == (False, False, "", "")
    pool.done(lease)
    await pool.close()


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
