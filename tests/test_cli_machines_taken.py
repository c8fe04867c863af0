"""`comfyctl machines adopt` and `reap`: machines of ours that others hold, have left, or that cannot be ended."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from runcomfy.application.reaper import Reaper
from runcomfy.cli import machines
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.machine import MachineState, Purpose
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, end

pytestmark = pytest.mark.cloud(comfyui=False)


async def test_what_a_living_process_holds_is_not_adopted_and_what_a_dead_one_left_is(
    programs: Programs, program: Program
) -> None:
    async with programs.start() as other:
        machine, report = await other.ready()
        assert machine.server_id is not None
        with pytest.raises(ValueInvalid, match=f"is ours already, and process {other.owner.pid} holds it"):
            await machines._adopted(program.machines, machine.server_id)
        row = await program.books.latest(machine.id)
        assert row is not None
        assert (row.owner_id, row.purpose) == (other.owner.id, Purpose.RUN)
        other.drop_dead()
    adopted = await machines._adopted(program.machines, machine.server_id)
    assert (adopted.id, adopted.purpose, adopted.owner_id) == (machine.id, Purpose.TAKEN, None)
    assert adopted.kept_until == report.stopping_at
    assert (await Reaper(program.machines).reap()).ended == []
    await end(program, adopted)


async def test_what_a_dead_process_was_stopping_is_not_adopted(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    async with programs.start() as other:
        machine, _ = await other.ready()
        cloud.next_call("DELETE servers/*", reply="never", works=False)
        stopping = asyncio.create_task(end(other, machine))
        await asyncio.sleep(5)
        await other.kill(stopping)
    assert machine.server_id is not None
    with pytest.raises(ValueInvalid, match="is ours already, and it is being stopped"):
        await machines._adopted(program.machines, machine.server_id)
    row = await program.books.latest(machine.id)
    assert row is not None
    assert (row.state, row.purpose) == (MachineState.STOPPING, Purpose.RUN)
    assert [m.id for m in (await Reaper(program.machines).reap()).ended] == [machine.id]


@pytest.mark.parametrize("known", [True, False], ids=["planned", "not planned"])
async def test_a_machine_that_the_account_does_not_show_just_now_is_kept_as_long_as_planned(
    cloud: RunComfyEmulator, programs: Programs, program: Program, known: bool
) -> None:
    async with programs.start() as other:
        machine = (await other.ready())[0] if known else await other.launch()
        other.drop_dead()
    assert machine.server_id is not None
    fault = cloud.next_call("GET servers/*", status=404, body={"message": "Server not found"}, times=None)
    adopted = await machines._adopted(program.machines, machine.server_id)
    now = program.machines.clock.now()
    planned = machine.planned_stop_at if known else now + program.machines.settings.cloud.duration
    assert adopted.kept_until == planned
    cloud.forget_call(fault)
    await end(program, adopted)


async def test_a_reap_tells_what_was_gone_already_and_of_which_launch_nothing_is_known_yet(
    cloud: RunComfyEmulator, programs: Programs, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    async with programs.start() as other:
        stranger = cloud.foreign("large")
        machine = await machines._adopted(other.machines, stranger.server_id)
        cloud.end_by_hand(stranger)
        cloud.next_call("POST servers", reply="never", works=False)
        lost = asyncio.create_task(other.launch())
        await asyncio.sleep(5)
        await other.kill(lost)
    done = await Reaper(program.machines).reap(wait=False)
    machines._say_reaped(done, program.machines)
    said = capsys.readouterr().out.splitlines()
    assert f"{machine.server_id}: closed, nothing runs" in said
    [unknown] = [line for line in said if line.startswith("launch of ")]
    assert unknown.endswith("not known yet whether it started a machine; reap again")
    assert "nothing to end" not in said
    await asyncio.sleep(timedelta(minutes=10).total_seconds())
    machines._say_reaped(await Reaper(program.machines).reap(), program.machines)
    assert capsys.readouterr().out.splitlines() == ["a launch that was never answered: closed, nothing runs"]
    machines._say_reaped(await Reaper(program.machines).reap(), program.machines)
    assert capsys.readouterr().out.splitlines() == ["nothing to end"]


async def test_a_reap_tells_what_could_not_be_ended(
    cloud: RunComfyEmulator, programs: Programs, program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    async with programs.start() as other:
        machine, _ = await other.ready()
        other.drop_dead()
    fault = cloud.next_call("DELETE servers/*", status=403, body={"message": "no"}, works=False, times=None)
    done = await Reaper(program.machines).reap()
    machines._say_reaped(done, program.machines)
    shown = capsys.readouterr()
    assert [m.id for m, _ in done.failed] == [machine.id]
    assert f"[{done.failed[0][1].code}]" in shown.err
    assert "nothing to end" not in shown.out
    assert machines._reaped(done)["failed"][0]["server_id"] == machine.server_id
    program.die()
    cloud.forget_call(fault)
    async with programs.start() as later:
        machines._say_reaped(await Reaper(later.machines).reap(), later.machines)
    assert f"medium machine {machine.server_id}: stopped; it cost $" in capsys.readouterr().out
