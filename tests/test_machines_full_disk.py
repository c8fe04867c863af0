"""Machines on a computer that fails: its disk is full, its database locked, its clock jumps; the books catch up."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.application.reaper import Reaper
from runcomfy.domain.exceptions import DiskFull, LocalError
from runcomfy.domain.machine import MachineEvent, MachineState, ServerId
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, assert_bill_and_ledger_agree, end, settings_for, states
from runcomfy.testing.rented_pools import until

pytestmark = pytest.mark.cloud(comfyui=False)


def stops(cloud: RunComfyEmulator) -> list[Any]:
    return [call for call in cloud.calls if call.method == "DELETE"]


class FullAfterLaunch:
    """Nothing can be written of machines from the first answer to a launch on, until it is mended."""

    def __init__(self) -> None:
        self.full = self.mended = False

    def visit(self, place: str) -> None:
        self.full = not self.mended and (self.full or place == "after provider.launch_machine")
        if self.full and place in ("before store.record", "before store.change", "before store.close_bill"):
            raise DiskFull("no space left on device")


class FullDisk:
    """Every write of a program's store fails as a full disk does; reading works."""

    def __init__(self, program: Program) -> None:
        self._connection = program.store

    async def fill(self) -> None:
        await self._pragma("PRAGMA query_only=ON")

    async def free(self) -> None:
        await self._pragma("PRAGMA query_only=OFF")

    async def _pragma(self, text: str) -> None:
        def run(connection: Any) -> None:
            connection.exec_driver_sql(text)

        await self._connection._read(run)  # type: ignore[attr-defined]


@pytest.mark.fault(54)
async def test_on_a_full_disk_nothing_is_launched(cloud: RunComfyEmulator, program: Program) -> None:
    await FullDisk(program).fill()
    with pytest.raises(LocalError) as caught:
        await program.launch()
    assert caught.value.exit_code == 9
    assert not [call for call in cloud.calls if call.method == "POST"]
    assert program.books.held == {}


@pytest.mark.fault(54)
async def test_on_a_full_disk_a_machine_is_still_stopped(cloud: RunComfyEmulator, program: Program) -> None:
    machine, _ = await program.ready()
    disk = FullDisk(program)
    await disk.fill()
    ended = await program.machines.stop(machine, reason="the test is over")
    assert ended.state is MachineState.STOPPED
    assert cloud.alive == []
    await disk.free()
    reaped = await program.reaper.reap()  # by us, who still live: the books catch up
    assert reaped.ended == []
    assert await states(program) == ["stopped"]
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(54)
async def test_what_was_stopped_on_a_full_disk_by_a_process_that_died_is_ended_in_the_books_by_another(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    machine, _ = await program.ready()
    disk = FullDisk(program)
    await disk.fill()
    await program.machines.stop(machine, reason="the test is over")
    await disk.free()
    program.die()
    async with programs.start() as other:
        assert [m.server_id for m in (await other.reaper.reap()).ended] == cloud.launched
        assert await states(other) == ["stopped"]


@pytest.mark.fault(54)
@pytest.mark.fault(64)
async def test_on_a_full_disk_a_machine_is_not_stopped_that_somebody_else_has_taken_over(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    machine, _ = await program.ready()
    async with programs.start() as other:
        theirs = await other.books.take_over(machine, note="its process seemed gone")
        await FullDisk(program).fill()
        await program.machines.stop(machine, reason="woken up late")
        assert cloud.billing
        assert not stops(cloud)
        await end(other, theirs)


@pytest.mark.fault(18)
@pytest.mark.fault(54)
@pytest.mark.fault(64)
async def test_a_stop_that_could_not_be_written_down_ends_when_somebody_else_has_taken_the_machine_over(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    machine, _ = await program.ready()
    disk = FullDisk(program)
    async with programs.start() as other:
        await disk.fill()
        cloud.next_call("DELETE *", status=500, works=False, times=12)
        stop = asyncio.create_task(program.machines.stop(machine, reason="the test is over"))
        await until(lambda: stops(cloud), within=60, what="the first stop", every=0.05)
        theirs = await other.books.take_over(machine, note="its process seemed gone")
        await disk.free()
        await stop
        assert cloud.billing
        await end(other, theirs)


@pytest.mark.fault(54)
async def test_a_disk_that_fills_while_the_launch_is_under_way_does_not_lose_the_machine(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", delay=5)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(3)
    disk = FullDisk(program)
    await disk.fill()
    with pytest.raises(LocalError):
        await launch
    assert len(cloud.launched) == 1
    assert cloud.alive == []


@pytest.mark.fault(54)
@pytest.mark.fault(4)
async def test_a_full_disk_and_a_lost_answer_together_leave_nothing_running(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", delay=5, reply="lost")
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(3)
    await FullDisk(program).fill()
    with pytest.raises(LocalError):
        await launch
    assert len(cloud.launched) == 1
    assert cloud.alive == []


@pytest.mark.fault(55)
async def test_while_the_database_is_locked_nothing_is_launched_and_machines_are_stopped(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start(busy_timeout=timedelta(seconds=0.05)) as program:
        machine, _ = await program.ready()
        with closing(sqlite3.connect(programs.database, isolation_level=None)) as somebody:
            somebody.execute("BEGIN IMMEDIATE")
            with pytest.raises(LocalError):
                await program.launch()
            ended = await program.machines.stop(machine, reason="the test is over")
            assert ended.state is MachineState.STOPPED
            somebody.execute("ROLLBACK")
    assert len(cloud.launched) == 1


@pytest.mark.fault(60)
@pytest.mark.parametrize("days", [1, -1])
async def test_a_clock_that_jumps_while_a_lost_launch_is_looked_for_decides_nothing(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, tmp_path: Path, days: int
) -> None:
    class Jumping(LoopClock):
        offset = timedelta(0)

        def now(self) -> datetime:
            return super().now().astimezone(UTC) + self.offset

    clock = Jumping()
    cloud.next_machine(unlisted_for=90, hidden_for=90)
    cloud.next_call("POST servers", reply="lost")
    async with Programs(cloud, settings_for(cloud_settings, tmp_path / "state"), clock).start() as program:
        launch = asyncio.create_task(program.launch())
        await asyncio.sleep(20)
        clock.offset = timedelta(days=days)
        machine = await launch
        assert cloud.launched == [machine.server_id]
        await end(program, machine)


@pytest.mark.fault(54)
@pytest.mark.invariant("I2")
async def test_what_a_full_disk_kept_from_the_books_is_written_with_the_next_that_can_be(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """The answer to a launch and the ready time come while nothing can be written; the machine ignores its stop."""
    disk = FullAfterLaunch()
    cloud.next_machine(boot_time=1, ignores_delete=True)
    async with programs.start(visit=disk.visit) as program:
        intent = program.intent()
        launching = asyncio.create_task(program.launch(intent))
        await asyncio.sleep(30)
        assert cloud.billing
        disk.mended = True
        await asyncio.sleep(30)
        row = await program.store.machine(intent.id)
        assert row is not None
        assert row.server_id in cloud.launched
        assert row.ready_at is not None
        cloud.machines[cloud.launched[0]].traits.ignores_delete = False
        with pytest.raises(LocalError):
            await launching
        ended = await program.store.machine(intent.id)
        assert ended is not None
        assert ended.state is MachineState.STOPPED
        await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(54)
async def test_an_answer_that_could_not_be_written_is_written_before_any_other_change_of_its_machine(
    programs: Programs, program: Program
) -> None:
    """I2: who reads the row afterwards finds a machine, and not a launch that nobody has answered."""
    intent = program.intent()
    await program.books.add_intent(intent)
    disk = FullDisk(program)
    await disk.fill()
    answered = await program.books.record_softly(
        intent, MachineEvent.LISTED, note="answered", changes={"server_id": ServerId("srv-1")}
    )
    await disk.free()
    left = await program.books.hand_over(answered, kept_until=START + timedelta(hours=1), note="left on")
    assert (left.state, left.server_id) == (MachineState.BOOTING, "srv-1")
    async with programs.start() as other:
        gone = await other.books.record(await other.books.take_over(left, note="?"), MachineEvent.GONE, note="gone")
    assert gone.state is MachineState.STOPPED


@pytest.mark.fault(54)
async def test_an_end_that_the_books_do_not_allow_is_not_tried_again_each_round(program: Program) -> None:
    odd, plain = program.intent(), program.intent()
    for machine in (odd, plain):
        await program.books.add_intent(machine)
    answered = await program.books.record(
        plain, MachineEvent.LISTED, note="answered", changes={"server_id": ServerId("srv-1")}
    )
    for machine in (odd, answered):
        program.books.owe(machine, gone_at=START)
    assert await program.books.close_bills() == []
    assert sorted(await states(program)) == ["requested", "stopped"], "a launch without an answer has no end"
    assert not await program.books.write_end(odd)


@pytest.mark.fault(54)
async def test_a_machine_that_came_and_went_while_nothing_could_be_written_is_closed_and_stands_for_no_other(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """I9: its row knew of a launch without an answer, and would take the next machine that fits for its own."""
    disk = FullAfterLaunch()
    async with programs.start(visit=disk.visit) as program:
        intent = program.intent()
        with pytest.raises(LocalError):
            await program.launch(intent)
        assert cloud.alive == []
        disk.mended = True
        await asyncio.sleep(600)
        row = await program.store.machine(intent.id)
        assert row is not None
        assert row.state is MachineState.REQUESTED
        await Reaper(program.machines).reap()
        ended = await program.store.machine(intent.id)
        assert ended is not None
        assert (ended.state, ended.server_id) == (MachineState.STOPPED, cloud.launched[0])
        assert ended.stop_accepted_at is not None
        other = await program.launch()
        assert other.server_id == cloud.launched[1]
        await program.machines.stop(other, reason="the story ends")
        await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(54)
async def test_a_machine_that_is_ours_and_could_not_be_written_down_is_what_no_other_launch_started(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """I3: one machine, one row, also while only this process knows whose it is."""
    disk = FullAfterLaunch()
    cloud.next_machine(boot_time=1, ignores_delete=True)
    async with programs.start(visit=disk.visit) as program:
        other = program.intent()
        launching = asyncio.create_task(program.launch(program.intent()))
        await asyncio.sleep(30)
        [report] = await program.machines.provider.list_machines()
        assert await program.machines.books.fitting(other, [report]) == ([], [])
        disk.mended = True
        await asyncio.sleep(60)
        cloud.machines[cloud.launched[0]].traits.ignores_delete = False
        with pytest.raises(LocalError):
            await launching


@pytest.mark.fault(54)
async def test_a_launch_lock_that_could_not_be_freed_is_freed_as_soon_as_it_can_be(programs: Programs) -> None:
    """I25: the process lives on and may never launch again; all others would wait for it."""
    full = True

    def visit(place: str) -> None:
        if full and place == "before store.break_launch_lock":
            raise DiskFull("no space left on device")

    async with programs.start(visit=visit) as one, programs.start() as two:
        async with one.machines.launch_lock():
            pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100), two.machines.launch_lock():
                pass
        full = False
        async with asyncio.timeout(40), two.machines.launch_lock():
            assert any("is launching a machine" in sentence for sentence in two.said)


async def test_who_is_let_go_of_tries_no_longer_to_free_the_launch_lock(programs: Programs) -> None:
    """A program that goes on without its connection would knock at closed books for ever; others see that it left."""
    tries = 0

    def visit(place: str) -> None:
        nonlocal tries
        if place == "before store.break_launch_lock":
            tries += 1
            raise DiskFull("no space left on device")

    async with programs.start(visit=visit) as one:
        async with one.machines.launch_lock():
            pass
        await asyncio.sleep(10)
        before = tries
        await one.machines.close()
        await asyncio.sleep(100)
    assert before > 1
    assert tries == before
