"""The dev server when two ask at once, the cloud answers oddly, or the state file cannot be written."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.application.machines import Boot
from runcomfy.domain.exceptions import BootTimeout, MachineLost, ProviderError
from runcomfy.domain.machine import MachineState
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies
from runcomfy.testing.programs import start_dev as start

STATE_FILE = "dev_server_state.json"


async def killed_start(programs: Programs, after: float = 60) -> None:
    """Leave a machine on its way up whose starter was killed."""
    async with programs.start() as victim:
        task = asyncio.create_task(start(victim))
        await asyncio.sleep(after)
        await victim.kill(task)


# -- looking -----------------------------------------------------------------------------------------------


async def test_a_launch_that_has_no_answer_yet_is_no_dev_server_and_is_left_alone(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_call("POST servers", delay=60)
    async with programs.start() as one, programs.start() as two:
        task = asyncio.create_task(start(one))
        await asyncio.sleep(30)
        assert await two.dev.find() is None
        assert await two.dev.status() is None
        machine, _, reused = await task
        assert not reused
        assert cloud.billing == [machine.server_id]
        await two.dev.shutdown()
        assert await discrepancies(cloud, two) == []


@pytest.mark.fault(68)
async def test_two_who_see_at_once_that_it_was_stopped_on_the_website_bill_it_once(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    machine, _, _ = await start(program)
    await asyncio.sleep(600)
    (rented,) = cloud.machines.values()
    cloud.end_by_hand(rented)
    await asyncio.sleep(30)
    async with programs.start() as other:
        seen = await asyncio.gather(program.dev.find(), other.dev.find())
        assert list(seen) == [None, None]
        assert await other.books.rows() == []
        [entry] = await other.store.ledger()
        assert entry.machine_id == machine.id
        assert await discrepancies(cloud, other) == []


async def test_a_dev_server_that_one_answer_denies_is_kept_as_long_as_before(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _, _ = await start(program)
    cloud.next_call("GET servers/*", status=404)
    assert await program.dev.find() is None
    row = await program.books.latest(machine.id)
    assert row is not None
    assert (row.state, row.owner_id, row.kept_until) == (MachineState.READY, None, machine.kept_until)
    assert cloud.billing == [machine.server_id]
    found = await program.dev.find()
    assert found is not None
    assert found[0].id == machine.id
    await program.dev.shutdown()
    assert await discrepancies(cloud, program) == []


async def test_a_machine_of_the_state_file_is_taken_up_when_it_is_ready_and_not_before(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    cloud.next_machine(flaps=40)
    machine, _, _ = await start(program)
    await asyncio.sleep(45)  # it says Starting once more
    async with programs.start(in_memory=True) as without_books:
        assert await without_books.dev.find() is None
        assert await without_books.books.rows() == []
        await asyncio.sleep(60)
        found = await without_books.dev.find()
        assert found is not None
        assert found[0].server_id == machine.server_id
    await program.dev.shutdown()


# -- starting ----------------------------------------------------------------------------------------------


async def test_waiting_for_the_start_of_another_process_has_an_end_and_says_whose_it_is(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(stuck=True)
    boots: list[Boot] = []
    short = timedelta(minutes=3)
    async with programs.start() as one, programs.start(boot_timeout=short, comfyui_timeout=short) as two:
        first = asyncio.create_task(start(one))
        await asyncio.sleep(30)
        with pytest.raises(BootTimeout, match=f"the process {one.owner.pid} has not brought its dev server up"):
            await start(two, on_boot=boots.append)
        assert boots
        assert {boot.status for boot in boots} == {"starting (another process)"}
        assert cloud.alive == cloud.launched  # it is the other's to end
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
    assert cloud.alive == []


async def test_of_two_who_find_a_killed_start_one_takes_it_over_and_the_other_waits(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    await killed_start(programs)
    async with programs.start() as one, programs.start() as two:
        first, second = await asyncio.gather(start(one), start(two))
        assert first[0].server_id == second[0].server_id == cloud.launched[0]
        assert len(cloud.launched) == 1
        await two.dev.shutdown()
        assert await discrepancies(cloud, two) == []


@pytest.mark.parametrize("after", [0, 30, 100])
async def test_a_shutdown_ends_a_start_that_went_on_with_the_machine_of_a_killed_one_and_that_one_gives_up(
    cloud: RunComfyEmulator, programs: Programs, after: float
) -> None:
    await killed_start(programs)
    async with programs.start() as one, programs.start() as two:
        task = asyncio.create_task(start(one))
        await asyncio.sleep(5 + after)
        assert [row.owner_id for row in await two.dev.rows()] == [one.books.owner.id]
        await two.dev.shutdown()
        with pytest.raises(MachineLost, match="was shut down while it was starting"):
            await task
        assert cloud.alive == []
        assert len(cloud.launched) == 1
        assert await discrepancies(cloud, two) == []


async def test_who_waits_for_the_start_of_another_process_gives_up_when_that_is_shut_down(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one, programs.start() as waiting, programs.start() as two:
        starts = [asyncio.create_task(start(one))]
        await asyncio.sleep(30)
        starts.append(asyncio.create_task(start(waiting)))
        await asyncio.sleep(30)
        await two.dev.shutdown()
        done = await asyncio.gather(*starts, return_exceptions=True)
        assert [type(outcome) for outcome in done] == [MachineLost, MachineLost]
        assert cloud.alive == []
        assert len(cloud.launched) == 1


async def test_who_waits_for_the_start_of_another_process_launches_when_that_one_fails_or_is_killed(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one, programs.start() as two:
        first = asyncio.create_task(start(one))
        await asyncio.sleep(30)
        second = asyncio.create_task(start(two))
        await asyncio.sleep(30)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        await second
        assert len(cloud.launched) == 2
        assert len(cloud.alive) == 1
        await two.dev.shutdown()
        assert await discrepancies(cloud, two) == []


@pytest.mark.parametrize("lag", [0.0, 0.5, 3.0, 20.0])
async def test_two_shutdowns_at_once_both_end_well_and_each_sees_the_machine_gone(
    cloud: RunComfyEmulator, programs: Programs, lag: float
) -> None:
    cloud.next_machine(delete_takes=60)
    async with programs.start() as program:
        await start(program)
    async with programs.start() as one, programs.start() as two:
        first = asyncio.create_task(one.dev.shutdown())
        await asyncio.sleep(lag)
        second = asyncio.create_task(two.dev.shutdown())
        ended = [*await first, *await second]
        assert [machine.state for machine in ended] == [MachineState.STOPPED, MachineState.STOPPED]
        assert cloud.alive == []
        assert await two.books.rows() == []
        assert await discrepancies(cloud, two) == []


async def test_a_shutdown_goes_on_with_what_another_one_was_stopping_that_was_killed(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(delete_takes=150)
    async with programs.start() as program:
        await start(program)
    async with programs.start() as one, programs.start() as two:
        first = asyncio.create_task(one.dev.shutdown())
        await asyncio.sleep(10)
        second = asyncio.create_task(two.dev.shutdown())
        await asyncio.sleep(10)
        await two.kill(second)
        assert [machine.state for machine in await first] == [MachineState.STOPPED]
        assert await discrepancies(cloud, one) == []


async def test_breaking_off_the_wait_for_a_killed_start_ends_its_machine(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    await killed_start(programs)
    async with programs.start() as program:
        task = asyncio.create_task(start(program))
        await asyncio.sleep(30)
        assert cloud.alive == cloud.launched
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert cloud.alive == []
        assert await program.books.rows() == []
        assert await discrepancies(cloud, program) == []


async def test_breaking_off_a_start_in_the_moment_it_left_the_machine_to_itself_ends_the_machine(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    await killed_start(programs)
    task: asyncio.Task[Any] | None = None

    def visit(place: str) -> None:
        if task is not None and place == "after store.take_over" and (programs.folder / STATE_FILE).exists():
            task.cancel()

    async with programs.start(visit=visit) as program:
        task = asyncio.create_task(start(program))
        with pytest.raises(asyncio.CancelledError):
            await task
        task = None
        assert cloud.alive == []
        [row] = await program.books.rows(open_only=False)
        assert row.owner_id == program.owner.id, "nobody else was to take it up while it was ended"
        assert not (programs.folder / STATE_FILE).exists()
        assert await discrepancies(cloud, program) == []


async def test_breaking_off_the_wait_for_a_machine_that_was_just_shut_down_elsewhere_stops_it_no_second_time(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    await killed_start(programs)
    async with programs.start(poll_interval=timedelta(minutes=5)) as one, programs.start() as two:
        task = asyncio.create_task(start(one))
        await asyncio.sleep(30)
        await two.dev.shutdown()
        told = len(one.said)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len([call for call in cloud.calls if call.method == "DELETE"]) == 1
        assert one.said[told:] == []
        assert await discrepancies(cloud, two) == []


async def test_who_waits_for_the_start_of_a_process_that_was_killed_and_cleared_away_launches_anew(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    slowly = timedelta(minutes=1)
    async with programs.start() as one, programs.start(poll_interval=slowly) as two, programs.start() as third:
        first = asyncio.create_task(start(one))
        await asyncio.sleep(30)
        second = asyncio.create_task(start(two))
        await asyncio.sleep(30)
        await one.kill(first)
        await third.reaper.reap()
        machine, _, reused = await second
        assert (reused, machine.server_id) == (False, cloud.launched[-1])
        assert cloud.alive == [machine.server_id]
        await two.dev.shutdown()
        assert await discrepancies(cloud, two) == []


def in_the_way(programs: Programs) -> None:
    """Put a folder where the state file belongs, which nobody can read or replace."""
    file = programs.folder / STATE_FILE
    file.unlink(missing_ok=True)
    file.mkdir()
    (file / "somebody's").touch()


# -- what is written and said ------------------------------------------------------------------------------


async def test_a_state_file_that_cannot_be_written_is_said_and_the_dev_server_is_used_all_the_same(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    task = asyncio.create_task(start(program))
    await asyncio.sleep(60)
    in_the_way(programs)
    machine, _, _ = await task
    assert any("the dev server state file could not be written" in said for said in program.said)
    again, _, reused = await start(program)
    assert (again.id, reused) == (machine.id, True)
    await program.dev.shutdown()


async def test_a_state_file_that_cannot_be_read_keeps_no_dev_server_from_being_stopped(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    await start(program)
    in_the_way(programs)
    assert [ended.server_id for ended in await program.dev.shutdown()] == cloud.launched
    assert cloud.alive == []
    assert any("the dev server state file could not be read" in said for said in program.said)
    assert await discrepancies(cloud, program) == []


async def test_prolonging_where_the_cloud_does_not_say_when_it_stops_is_not_taken_for_done(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _, _ = await start(program)
    (rented,) = cloud.machines.values()
    before = rented.stops_at
    assert before is not None
    rented.traits.fields = {"estimated_stopping_at": None}
    with pytest.raises(ProviderError, match="runs longer now cannot be read back"):
        await program.dev.extend(by=timedelta(minutes=30))
    assert rented.stops_at == before + timedelta(minutes=30)  # as asked for, though nobody can know
    row = await program.books.latest(machine.id)
    assert row is not None
    assert row.planned_stop_at == before
    rented.traits.fields = {}
    await program.dev.shutdown()
    assert await discrepancies(cloud, program) == []


async def test_when_it_stops_is_known_from_our_books_without_a_question(
    cloud: RunComfyEmulator, program: Program
) -> None:
    assert await program.dev.planned_stop() is None
    machine, _, _ = await start(program)
    asked = len(cloud.calls)
    assert await program.dev.planned_stop() == cloud.machines[str(machine.server_id)].stops_at
    assert len(cloud.calls) == asked
    await program.dev.shutdown()


# -- two who find it on its way up -------------------------------------------------------------------------


async def test_two_who_go_on_with_a_start_whose_process_was_killed_get_one_dev_server(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    await killed_start(programs)
    async with programs.start() as one, programs.start() as two:
        found = await asyncio.gather(start(one), start(two))
        assert {machine.server_id for machine, _, _ in found} == set(cloud.launched)
        assert len(cloud.launched) == 1
        await one.dev.shutdown()
        assert cloud.alive == []
        assert await discrepancies(cloud, two) == []
