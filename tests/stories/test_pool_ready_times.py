"""What a machine is paid ahead from, and billed from, where the provider's word on it comes early or late."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from runcomfy.domain.settings import CloudSettings, PoolSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Programs, settings_for
from runcomfy.testing.rented_pools import gaps, running_pool, until

STARTS_FOR = 243.0
LEASE = timedelta(minutes=10)


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    settings = settings_for(cloud_settings, tmp_path / "state")
    cloud_settings = replace(settings.cloud, run_lease=LEASE)
    return Programs(cloud, replace(settings, pool=PoolSettings(max_machines=4), cloud=cloud_settings), clock)


@pytest.mark.fault(13)
@pytest.mark.parametrize("later", [None, "Humming"])
async def test_a_machine_called_ready_while_it_starts_is_paid_ahead_and_billed_from_when_it_really_was(
    cloud: RunComfyEmulator, programs: Programs, later: str | None
) -> None:
    cloud.next_machine(status="READY", boot_time=STARTS_FOR)
    async with programs.start() as program, running_pool(program) as pool:
        machine = await pool.launch()
        await asyncio.sleep(200)
        assert machine.machine.ready_at is not None, "the provider's word is believed: it may bill"
        real = cloud.machines[cloud.launched[0]]
        real.traits.status = later
        await until(lambda: real.ready_at is not None, within=60, what="Ready")
        await asyncio.sleep(20)
        assert machine.machine.ready_at == real.ready_at
        assert machine.machine.planned_stop_at == real.stops_at
        real.traits.status = None
        await until(lambda: machine.takes_jobs, within=60, what="usable")
        await asyncio.sleep(1_200)
        assert real.ready_at is not None
        ahead = timedelta(seconds=real.estimated_duration) - (cloud.now() - real.ready_at)
        assert timedelta(0) < ahead <= LEASE
        await pool.pool.close()
        assert all(abs(gap) < 1 for gap in (await gaps(cloud, program)).values())


@pytest.mark.fault(13)
async def test_a_machine_that_is_ended_before_its_ready_time_was_told_is_asked_for_it_and_billed_from_then(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(status="READY", boot_time=STARTS_FOR)
    async with programs.start() as program:
        async with running_pool(program) as pool:
            machine = await pool.launch()
            real = cloud.machines[cloud.launched[0]]
            await until(lambda: real.ready_at is not None, within=300, what="Ready", every=0.01)
            assert machine.machine.planned_stop_at is None
        assert cloud.alive == []
        left = await gaps(cloud, program)
        assert all(abs(gap) < 5 for gap in left.values())  # it went on being called READY for a moment


@pytest.mark.fault(31)
async def test_while_machines_start_a_list_that_fails_is_read_again_soon_however_rarely_lists_are_read(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """It bills as soon as it is Ready: between two looks that are far apart its whole time may pass unseen (I9)."""
    rarely = replace(programs.settings.pool, status_every=timedelta(minutes=10))
    programs.settings = replace(programs.settings, pool=rarely)
    async with programs.start() as program, running_pool(program) as pool:
        machine = await pool.launch()
        await asyncio.sleep(20)
        cloud.next_call("GET servers", status=503, times=8)
        real = cloud.machines[cloud.launched[0]]
        await until(lambda: real.bills, within=300, what="Ready")
        await until(lambda: machine.machine.ready_at == real.ready_at, within=60, what="it to be seen")


@pytest.mark.fault(13)
@pytest.mark.fault(19)
async def test_a_machine_that_ran_on_after_its_stop_bills_while_a_word_that_nobody_knows_is_said_of_it(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    async with programs.start() as program:
        async with running_pool(program) as pool:
            machine = await pool.usable()
            real = cloud.machines[cloud.launched[0]]
            pool.pool.drain(machine.id, why="no job waits any more")
            await until(lambda: any("it still runs" in said for said in program.said), within=60, what="the complaint")
            real.traits.status = "Humming"
            await asyncio.sleep(240)
            cloud.lose(real)
            await pool.empty(within=200)
        assert all(abs(gap) < 60 for gap in (await gaps(cloud, program)).values())


@pytest.mark.fault(18)
@pytest.mark.fault(19)
@pytest.mark.parametrize("ended_by", ["a stop", "itself"])
async def test_a_machine_that_ran_on_and_is_gone_is_billed_until_the_stop_that_may_have_worked_or_until_halfway(
    cloud: RunComfyEmulator, programs: Programs, ended_by: str
) -> None:
    """I9: within 60 s, though it is looked at every two minutes by then."""
    rarely = replace(programs.settings.cloud, poll_interval=timedelta(seconds=20))
    programs.settings = replace(programs.settings, cloud=rarely)
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    async with programs.start() as program:
        async with running_pool(program) as pool:
            machine = await pool.usable()
            real = cloud.machines[cloud.launched[0]]
            cloud.next_call("DELETE servers/*", status=500, works=False, times=None)
            pool.pool.drain(machine.id, why="no job waits any more")
            await asyncio.sleep(600)
            asked = sum(call.method == "DELETE" for call in cloud.calls)
            await until(lambda: sum(c.method == "DELETE" for c in cloud.calls) >= asked + 4, within=300, what="a stop")
            if ended_by == "itself":
                await asyncio.sleep(70)
                cloud.lose(real)
                cloud.behave()
            else:
                cloud.behave()
                real.traits.ignores_delete = False
                cloud.next_call("DELETE servers/*", status=500, works=True, times=4)
            await pool.empty(within=300)
        assert all(abs(gap) < 60 for gap in (await gaps(cloud, program)).values())


@pytest.mark.fault(19)
@pytest.mark.fault(31)
async def test_the_yes_for_a_stop_of_a_machine_that_had_ignored_others_is_not_believed_where_nobody_could_look(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """I9: it went on until its time was up, and that is what it costs."""
    cloud.next_machine(ignores_delete=True)
    async with programs.start() as program:
        async with running_pool(program) as pool:
            machine = await pool.usable()
            real = cloud.machines[cloud.launched[0]]
            pool.pool.drain(machine.id, why="no job waits any more")
            await until(lambda: any("it still runs" in said for said in program.said), within=60, what="the complaint")
            asked = sum(call.method == "DELETE" for call in cloud.calls)
            cloud.next_call("GET *", status=500, times=None)
            await until(lambda: sum(c.method == "DELETE" for c in cloud.calls) > asked, within=60, what="one more yes")
            await until(lambda: not real.bills, within=900, what="the end of its time")
            cloud.behave()
            await pool.empty(within=300)
        assert all(abs(gap) < 60 for gap in (await gaps(cloud, program)).values())


@pytest.mark.fault(31)
async def test_a_machine_that_was_billed_while_nobody_could_look_is_billed_when_it_is_seen_on_its_way_out(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.delete_takes = 120
    async with programs.start() as program:
        async with running_pool(program) as pool:
            await pool.launch()
            real = cloud.machines[cloud.launched[0]]
            cloud.next_call("GET *", body="<html>", times=None)
            await until(lambda: real.bills, within=600, what="Ready")
            await until(lambda: not real.bills, within=900, what="the end of its time")
            cloud.behave()
            await pool.empty(within=300)
        assert all(abs(gap) < 60 for gap in (await gaps(cloud, program)).values())
