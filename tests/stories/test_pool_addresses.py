"""A machine of the pool that reboots and comes back under the same id at another address (fault 71)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from runcomfy.domain.exceptions import MachineLost
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import EmulatedMachine, RunComfyEmulator
from runcomfy.testing.emulators.runcomfy.comfyui_host import take_down
from runcomfy.testing.programs import Programs
from runcomfy.testing.rented_pools import gaps, running_pool, story, until

pytestmark = pytest.mark.cloud(boot_time=30)


async def reboot(machine: EmulatedMachine) -> ComfyUIEmulator:
    """Let nothing answer at its address any more, and a new ComfyUI at another one."""
    await take_down(machine)
    machine.comfyui = server = ComfyUIEmulator()
    machine.url = await server.start()
    return server


@pytest.mark.fault(71)
@pytest.mark.parametrize("seen_starting", [True, False], ids=["seen rebooting", "back before anybody looked"])
async def test_a_machine_that_comes_back_with_another_address_is_looked_at_again_before_it_gets_a_job(
    cloud: RunComfyEmulator, keepers: Programs, seen_starting: bool
) -> None:
    """What ran there is lost and said so at once; nothing is sent to the old address; the bill goes on as it was."""
    async with keepers.start() as program:
        async with running_pool(program) as pool:
            machine = await pool.usable()
            lease, epoch, rented = pool.lease(machine), machine.epoch, cloud.machines[cloud.launched[0]]
            old = rented.comfyui
            assert isinstance(old, ComfyUIEmulator)
            if seen_starting:
                rented.traits = replace(rented.traits, status="Starting")
                await until(lambda: lease.void, within=15, what="the reboot to be seen")
            server = await reboot(rented)
            rented.traits = replace(rented.traits, status=None)
            await until(lambda: lease.void, within=15, what="the other address to be seen")
            asked = len(old.requests)
            pool.failed(lease, MachineLost("it was rebooted"))
            await until(lambda: machine.takes_jobs, within=60, what="it to be usable again")
            assert machine.epoch > epoch
            assert server.count("GET", "/system_stats") >= 1  # its health was looked at before anything was sent
            await pool.run(machine, 20)
            await asyncio.sleep(120)
            assert len(old.requests) == asked
            assert cloud.launched == [machine.machine.server_id]
            assert "another address" in "\n".join(await story(program, machine.id)) or seen_starting
        assert await gaps(cloud, program) == {}
