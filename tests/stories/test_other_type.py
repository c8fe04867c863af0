"""A cloud that gives a dearer machine than was asked for: it is said, booked at its real price, and not kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from runcomfy.domain.exceptions import MachineFailed
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, settings_for
from runcomfy.testing.rented_pools import running_pool, until


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    return Programs(cloud, settings_for(cloud_settings, tmp_path / "state"), clock)


def says(server_type: str) -> Callable[[Any], Any]:
    """Change every machine of an answer to a type."""

    def change(body: Any) -> Any:
        if isinstance(body, list):
            return [change(item) for item in body]
        if not isinstance(body, dict):
            return body
        changed = {name: change(value) if isinstance(value, (list, dict)) else value for name, value in body.items()}
        return {**changed, "server_type": server_type} if "server_id" in changed else changed

    return change


async def prices(program: Program) -> list[tuple[str, Decimal]]:
    return [(row.server_type, row.usd_per_hour) for row in await program.books.rows(open_only=False)]


@pytest.mark.fault(28)
@pytest.mark.cloud(comfyui=False)
@pytest.mark.parametrize("call", ["POST servers", "GET servers/*"])
async def test_a_machine_of_a_dearer_type_is_booked_at_its_price_and_ended(
    cloud: RunComfyEmulator, programs: Programs, call: str
) -> None:
    async with programs.start() as program:
        top = program.books.settings.rates.find("2xl-turbo")
        assert top is not None
        cloud.next_call(call, change=says("2xl-turbo"), times=None)
        intent = program.intent()
        with pytest.raises(MachineFailed, match=r"2xl-turbo .* asked for was a medium"):
            await program.ready(intent)
        cloud.behave()
        await program.machines.settle(intent, reason="the test is over")
        assert await prices(program) == [("2xl-turbo", top.usd_per_hour)]
        assert any("2xl-turbo in place of medium" in line for line in program.said)
        assert cloud.alive == []


@pytest.mark.fault(28)
@pytest.mark.cloud(comfyui=False)
async def test_a_name_that_has_no_price_is_told_once_and_ends_nothing(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """A provider that renames its types must not make every machine look wrong."""
    async with programs.start() as program:
        asked = program.books.settings.rates.find("medium")
        assert asked is not None
        cloud.next_call("POST servers", change=says("9xl-galaxy"))
        cloud.next_call("GET servers/*", change=says("9xl-galaxy"), times=None)
        intent = program.intent()
        await program.ready(intent)
        assert await prices(program) == [("medium", asked.usd_per_hour)]
        assert len([line for line in program.said if "no price is known" in line]) == 1
        cloud.behave()
        await program.machines.settle(intent, reason="the test is over")
        assert cloud.alive == []


@pytest.mark.cloud(comfyui=False)
async def test_another_spelling_is_no_other_type_and_a_cheaper_machine_is_kept(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program:
        cloud.next_call("POST servers", change=says("Medium"))
        cloud.next_call("GET servers/*", change=says("MEDIUM"), times=1)
        machine, _ = await program.ready()
        assert machine.server_type == "medium"
        assert not any("WARNING" in line for line in program.said)
        await program.machines.stop(machine, reason="the test is over")

        intent = program.intent(server_type="large")
        cloud.next_call("GET servers/*", change=says("medium"), times=None)
        async with program.machines.launch_lock():
            cheaper, _ = await program.machines.wait_ready(await program.machines.launch(intent))
        assert cheaper.server_type == "medium"
        assert cheaper.usd_per_hour == machine.usd_per_hour
        await program.machines.stop(cheaper, reason="the test is over")
        assert cloud.alive == []


@pytest.mark.fault(28)
@pytest.mark.parametrize("after", [0, 400], ids=["while it starts", "while it works"])
async def test_a_pool_ends_a_machine_that_turns_out_dearer_and_counts_a_failed_start(
    cloud: RunComfyEmulator, programs: Programs, after: float
) -> None:
    async with programs.start() as program:
        async with running_pool(program) as pool:
            before = pool.pool.room("medium")
            await pool.launch()
            await asyncio.sleep(after)
            cloud.next_call("GET servers*", change=says("2xl-turbo"), times=None)
            await until(lambda: not pool.machines, within=120, what="the machine to be ended")
            cloud.behave()
            assert pool.pool.room("medium") == 0, "a failed start: the type pauses"
            await asyncio.sleep(20)
            assert pool.pool.room("medium") == before
            assert any("2xl-turbo in place of medium" in line for line in program.said)
        [(kind, _)] = await prices(program)
        assert kind == "2xl-turbo"
        assert len(cloud.launched) == 1
        assert cloud.alive == []
        if after:
            [entry] = await program.store.ledger()
            top = program.books.settings.rates.find("2xl-turbo")
            assert top is not None
            assert entry.usd_per_hour == top.usd_per_hour
