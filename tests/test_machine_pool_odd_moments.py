"""A pool of rented machines that ends, or takes machines over, while something else is under way."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from runcomfy.application.machine_pool import MachinePool
from runcomfy.application.station import CloudStation
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs
from runcomfy.testing.rented_pools import RunningPool, gaps, running_pool, until


@pytest.fixture
def programs(keepers: Programs) -> Programs:
    return keepers


async def test_a_pool_that_ends_says_so_and_launches_nothing_more(
    cloud: RunComfyEmulator, program: Program, pool: RunningPool
) -> None:
    await pool.usable()
    assert pool.pool.room("medium") > 0
    ending = asyncio.create_task(pool.close())
    await asyncio.sleep(0.1)
    assert pool.pool.room("medium") == 0
    assert pool.pool.why_no_room("medium") == "the pool is being closed"
    assert not pool.pool.pausing("medium")
    with pytest.raises(RunComfyError):
        await pool.launch()
    await ending
    assert len(cloud.launched) == 1
    assert await gaps(cloud, program) == {}


async def test_a_prompt_that_begins_is_told_once_and_not_after_its_seat_was_given_back(
    program: Program, pool: RunningPool
) -> None:
    machine = await pool.usable()
    lease = pool.lease(machine)
    began = lease.computing_at
    await asyncio.sleep(20)
    pool.pool.computing(lease)
    assert lease.computing_at == began
    pool.done(lease)
    late = pool.lease(machine, compute=False)
    pool.pool.give_back(late, outcome="cancelled")
    pool.pool.computing(late)
    assert late.computing_at is None
    await pool.close()
    works = {work.job_id: work for work in await program.store.works()}
    assert works[late.job_id].computing_at is None
    assert works[lease.job_id].computing_at is not None


async def test_the_machine_of_an_executor_that_lives_is_not_the_pools_and_one_that_is_gone_is(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as keeps, programs.start() as gone:
        stations = [CloudStation(one.placer, server_type=None, idle_after=timedelta(hours=1)) for one in (keeps, gone)]
        keys = []
        for station in stations:
            async with station.at(
                job_id=JobId("job"), show=lambda _: None, step=lambda _: None, on_bill=lambda _: None
            ) as place:
                assert place.machine is not None
                keys.append(place.machine.id)
        gone.die()
        async with programs.start() as heir, running_pool(heir) as pool:
            assert await pool.pool.adopt() == keys[1:]
            assert len(cloud.billing) == 2
            await pool.close()
            assert cloud.billing == cloud.launched[:1]
        for station in stations:
            await station.close()
        assert cloud.alive == []
        assert await gaps(cloud, keeps) == {}


async def test_two_who_take_the_machines_of_a_dead_one_over_at_once_share_none(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as dead:
        theirs = RunningPool(dead, MachinePool(dead.machines, dead.placer.comfyui))
        orphan = await theirs.usable()
        await dead.kill(theirs.task)
        async with programs.start() as one, programs.start() as two, running_pool(one) as a, running_pool(two) as b:
            adopted = await asyncio.gather(a.pool.adopt(), b.pool.adopt())
            assert sorted(map(len, adopted)) in ([0, 1], [1, 1])
            await asyncio.sleep(60)
            owners = [len(pool.machines) for pool in (a, b)]
            assert sum(owners) == 1
            row = await one.books.latest(orphan.id)
            assert row is not None
            assert row.owner_id == (one, two)[owners.index(1)].owner.id
            assert len(cloud.billing) == 1
            await a.close()
            await b.close()
            assert cloud.alive == []
            assert await gaps(cloud, two) == {}


async def test_machines_that_are_kept_when_the_pool_ends_do_not_include_one_that_is_being_ended(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as first:
        async with running_pool(first) as pool:
            cloud.next_machine(delete_takes=60)
            drained = await pool.usable()
            kept = await pool.usable()
            pool.pool.drain(drained.id, why="nothing is to do")
            await asyncio.sleep(10)
            assert len(cloud.alive) == 2
            await pool.close(keep=True)
        assert cloud.alive == cloud.billing == [kept.machine.server_id]
        assert [row.id for row in await first.books.rows()] == [kept.id]
    async with programs.start() as second, running_pool(second) as pool:
        await pool.pool.adopt()
        await until(lambda: [m.id for m in pool.machines] == [kept.id], within=120, what="only the kept one to be left")
        await pool.close()
        assert cloud.alive == []
        assert await gaps(cloud, second) == {}
