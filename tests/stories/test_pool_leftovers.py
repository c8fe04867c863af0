"""What a pool may leave behind while its process lives on: launches nobody looks for, stops nobody sees through.

A dead process's leftovers are taken care of by the next one; those of a living one are nobody else's business. Each
story makes a machine that ignores its lease, so that what is forgotten bills for ever.
"""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from runcomfy.domain.exceptions import LaunchUnclear, StopUnconfirmed
from runcomfy.domain.job import PromptId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.pool_keepers import kept
from runcomfy.testing.programs import Programs
from runcomfy.testing.rented_pools import until
from runcomfy.testing.serving import Services
from runcomfy.testing.worker_stories import picture

pytestmark = pytest.mark.cloud(boot_time=30)


@pytest.mark.fault(26)
@pytest.mark.fault(4)
async def test_a_lost_launch_that_could_not_be_looked_for_is_looked_for_when_that_works_again(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I3: the answer was lost, then the token was revoked for minutes; the process lives on and finds its machine."""
    cloud.next_machine(ignores_stop_time=True)
    async with kept(cloud, keepers) as pool:
        cloud.next_call("POST servers", reply="lost", works=True)
        launching = asyncio.create_task(pool.launch())
        await until(lambda: cloud.launched, within=60, what="the launch", every=0.1)
        cloud.revoke(1)
        with pytest.raises(LaunchUnclear):
            await launching
        cloud.behave()
        await until(lambda: not cloud.billing, within=120, what="the end of a machine that nobody asked for any more")
        await asyncio.sleep(60)
        assert await pool.program.books.rows() == []
        assert len(cloud.launched) == 1


async def test_the_next_launch_first_finds_out_what_an_earlier_one_of_the_same_process_started(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I3: one launch in flight at a time, or nobody could tell two machines apart."""
    async with keepers.start() as program:
        cloud.next_call("POST servers", reply="lost", works=True)
        launching = asyncio.create_task(program.launch())
        await until(lambda: cloud.launched, within=60, what="the launch", every=0.1)
        cloud.revoke(1)
        with pytest.raises(LaunchUnclear):
            await launching
        cloud.behave()
        machine = await program.launch()
        assert cloud.launched[1:] == [machine.server_id]
        assert cloud.alive == [machine.server_id]
        await program.machines.stop(machine, reason="the story ends")


@pytest.mark.fault(26)
async def test_a_machine_of_a_launch_that_was_broken_off_is_ended_when_stops_are_allowed_again(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: it counts as a machine of the pool until it is gone."""
    cloud.next_machine(ignores_stop_time=True)
    async with kept(cloud, keepers) as pool:
        cloud.next_call("POST servers", delay=20)
        launching = asyncio.create_task(pool.launch())
        await until(lambda: cloud.launched, within=60, what="the launch", every=0.1)
        cloud.next_call("DELETE servers/*", status=401, times=None)
        launching.cancel()
        with pytest.raises((StopUnconfirmed, asyncio.CancelledError)):
            await launching
        assert len(pool.machines) == 1
        cloud.behave()
        await pool.empty(within=180)
        assert cloud.billing == []


@pytest.mark.fault(19)
async def test_a_machine_that_is_deleting_for_long_and_then_runs_again_was_never_let_go_of(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: done only when it is seen gone, however long the provider says that it is at it."""
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        [rented] = cloud.machines.values()
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(3)
        rented.traits.status = "Deleting"
        await asyncio.sleep(1_000)
        assert [each.id for each in pool.machines] == [machine.id]
        rented.traits.status = None
        await asyncio.sleep(120)
        rented.traits.ignores_delete = False
        await pool.empty(within=120)


@pytest.mark.fault(21)
async def test_an_hour_of_refused_stops_is_no_hour_of_talk(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """What goes wrong is said when it begins; alarms have their own time."""
    cloud.next_machine(ignores_stop_time=True)
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=500, times=None)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(3_500)
        said = pool.program.said
        assert len([sentence for sentence in said if "failed for now" in sentence]) == 1
        assert len([sentence for sentence in said if "ALARM" in sentence]) > 5
        cloud.behave()
        await pool.empty(within=300)


@pytest.mark.fault(21)
async def test_a_machine_that_cannot_be_stopped_holds_up_no_other(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """The reconciler's rounds go on while one of them waits for a stop to work."""
    cloud.next_machine(ignores_stop_time=True)
    cloud.next_machine(ignores_stop_time=True)
    async with kept(cloud, keepers):
        async with keepers.start() as program:
            await program.ready()
            await program.kill()
        cloud.next_call(f"DELETE servers/{cloud.launched[0]}", status=500, times=None)
        await asyncio.sleep(100)
        async with keepers.start() as program:
            await program.ready()
            await program.kill()
        await until(lambda: cloud.billing == cloud.launched[:1], within=120, what="the end of the second one")
        cloud.behave()
        await until(lambda: not cloud.billing, within=120, what="the end of the first one")


@pytest.mark.fault(21)
async def test_a_service_that_ends_while_something_cannot_be_stopped_ends_its_own_machines_at_once(
    cloud: RunComfyEmulator, services: Services, clock: LoopClock
) -> None:
    """It ends its machines, and leaves when the other one is gone, too."""
    cloud.next_machine(ignores_stop_time=True)
    programs = Programs(cloud, services.settings, clock)
    programs.processes = services.processes
    async with programs.start() as program:
        await program.ready()
        await program.kill()
    cloud.next_call(f"DELETE servers/{cloud.launched[0]}", status=500, times=None)
    async with services.start(max_machines=2, min_machines=1) as served:
        await services.when(lambda: len(cloud.billing) == 2, "one is kept", within=200)
        await asyncio.sleep(120)
        served.stop.set()
        await services.when(lambda: cloud.billing == cloud.launched[:1], "its machine is gone", within=60)
        assert served.task is not None
        assert not served.task.done()
        cloud.behave()
        await services.when(served.task.done, "it leaves", within=120)
        assert cloud.billing == []


@pytest.mark.fault(69)
async def test_a_machine_that_is_not_needed_is_not_ended_under_a_prompt_that_somebody_sent_by_hand(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I8: it is paid on and takes no job, and goes when that prompt is done; a prompt of a job of ours is none."""
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        assert machine.server is not None
        lease = pool.lease(machine)
        lease.prompt_id = PromptId(str(uuid4()))
        await machine.server.submit(picture(700, name="ours"), prompt_id=lease.prompt_id)
        pool.done(lease)
        idle = await pool.usable()
        assert idle.server is not None
        await idle.server.submit(picture(900, name="by hand"), prompt_id=PromptId(str(uuid4())))
        pool.pool.drain(machine.id, why="no job waits any more")
        pool.pool.drain(idle.id, why="no job waits any more")
        await asyncio.sleep(850)
        assert [each.id for each in pool.machines] == [idle.id]
        assert not idle.takes_jobs
        assert len([said for said in pool.program.said if "by hand" in said]) == 1
        comfyui = cloud.machines[cloud.launched[1]].comfyui
        await pool.empty(within=120)
        assert isinstance(comfyui, ComfyUIEmulator)
        assert [run.outcome for run in comfyui.run_log] == ["success"]
