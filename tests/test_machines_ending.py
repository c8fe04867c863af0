"""Ending machines: whatever the cloud, this computer, the user or other processes do; the cloud's own books tell."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.application.ending import SAY_AGAIN, Said, believable, ready_since
from runcomfy.application.finish import finish
from runcomfy.application.reaper import Reaper
from runcomfy.domain.exceptions import (
    AuthRejected,
    DiskFull,
    LaunchUnclear,
    LocalError,
    ProviderError,
    StopUnconfirmed,
)
from runcomfy.domain.machine import Machine, MachineEvent, MachineReport, MachineState, Phase, ServerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.contracts.store_words import a_machine
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


# -- ending ------------------------------------------------------------------------------------------------


@pytest.mark.fault(11)
async def test_an_empty_list_by_mistake_is_not_the_end_of_a_machine(cloud: RunComfyEmulator, program: Program) -> None:
    machine, _ = await program.ready()
    cloud.next_call("GET servers", body=[], times=None)
    assert await program.machines.gone_unasked(machine, note="?") is None
    assert cloud.billing
    await end(program, machine)
    assert cloud.alive == []


@pytest.mark.fault(11)
async def test_a_status_404_by_mistake_is_not_the_end_of_a_machine(cloud: RunComfyEmulator, program: Program) -> None:
    machine, _ = await program.ready()
    cloud.next_call("GET servers/*", status=404, body={"message": "Server not found"}, times=None)
    assert await program.machines.gone_unasked(machine, note="?") is None
    cloud.next_call("DELETE *", status=500, times=8)
    await end(program, machine)
    assert cloud.alive == []


@pytest.mark.fault(17)
async def test_a_machine_that_becomes_ready_after_its_stop_is_stopped_again(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(boot_time=30, ignores_delete=True)
    machine = await program.launch()
    cloud_machine = cloud.machines[cloud.launched[0]]
    stop = asyncio.create_task(end(program, machine))
    await asyncio.sleep(60)
    assert cloud.billing
    cloud_machine.traits.ignores_delete = False
    assert (await stop).state is MachineState.STOPPED
    assert "still runs; asking again" in " ".join(program.said)
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(18)
@pytest.mark.parametrize("fault", [{"status": 500, "works": True}, {"reply": "lost"}, {"reply": "html"}])
async def test_a_stop_that_worked_and_was_not_answered_is_seen(
    cloud: RunComfyEmulator, program: Program, fault: dict[str, Any]
) -> None:
    machine, _ = await program.ready()
    cloud.next_call("DELETE *", times=None, **fault)
    assert (await end(program, machine)).state is MachineState.STOPPED
    assert not [sentence for sentence in program.said if "ALARM" in sentence]
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(18)
async def test_stops_that_get_no_answer_at_all_are_not_billed_in_our_books_for_the_waiting(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    cloud.next_call("DELETE *", times=4, reply="never")  # it works, and four deadlines pass
    assert (await end(program, machine)).state is MachineState.STOPPED
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(29)
async def test_a_machine_that_became_ready_while_nobody_could_look_is_billed_in_our_books(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.delete_takes = 0
    machine = await program.launch(program.intent(duration=timedelta(hours=1)))
    await asyncio.sleep(1500)
    await end(program, machine)
    assert cloud.books[cloud.launched[0]].seconds > 1300
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(19)
async def test_a_machine_that_runs_on_after_a_yes_is_asked_again_until_it_goes_with_an_alarm(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    machine, _ = await program.ready()
    traits = cloud.machines[cloud.launched[0]].traits
    stop = asyncio.create_task(end(program, machine))
    await asyncio.sleep(290)
    assert not any("ALARM" in sentence for sentence in program.said)
    await asyncio.sleep(60)
    assert any("ALARM" in sentence for sentence in program.said)
    traits.ignores_delete = False
    assert (await stop).state is MachineState.STOPPED
    assert len([call for call in cloud.calls if call.method == "DELETE"]) > 5
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(19)
async def test_deleting_for_ever_is_left_to_the_provider_after_the_alarm_time(
    cloud: RunComfyEmulator, program: Program, looptime: float
) -> None:
    cloud.next_machine(delete_takes=3600)
    machine, _ = await program.ready()
    before = asyncio.get_running_loop().time()
    stopped = await end(program, machine)
    assert stopped.state is MachineState.STOPPING
    assert stopped.stop_accepted_at is not None
    assert 300 <= asyncio.get_running_loop().time() - before < 400
    assert cloud.billing == []
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(18)
@pytest.mark.parametrize("failing", [290, 295, 299, 300])
async def test_a_stop_that_is_accepted_when_the_alarm_is_due_is_still_seen_to_its_end(
    cloud: RunComfyEmulator, program: Program, failing: float
) -> None:
    cloud.delete_takes = 60
    machine, _ = await program.ready(program.intent(duration=timedelta(hours=1)))
    cloud.next_call("DELETE *", status=500, lasts=failing, times=None)
    assert (await end(program, machine)).state is MachineState.STOPPED
    assert cloud.alive == []


@pytest.mark.fault(20)
async def test_a_404_to_the_stop_is_not_believed_while_the_machine_is_listed(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    cloud.next_call("DELETE *", status=404, body={"message": "Server not found"}, times=3)
    assert (await end(program, machine)).state is MachineState.STOPPED
    assert cloud.alive == []
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(21)
async def test_a_stop_that_fails_for_six_hours_is_repeated_for_six_hours(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    machine, _ = await program.ready()
    cloud.next_call("DELETE *", status=500, lasts=timedelta(hours=6), times=None)
    before = asyncio.get_running_loop().time()
    assert (await end(program, machine)).state is MachineState.STOPPED
    took = asyncio.get_running_loop().time() - before
    assert timedelta(hours=6) <= timedelta(seconds=took) <= timedelta(hours=6, minutes=3)
    assert len([sentence for sentence in program.said if "ALARM" in sentence]) > 60
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(29)
async def test_a_provider_that_is_down_for_two_hours_does_not_keep_a_stop_from_its_end(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    cloud.next_call(status=503, lasts=timedelta(hours=2), times=None)
    assert (await end(program, machine)).state is MachineState.STOPPED
    await assert_bill_and_ledger_agree(cloud, program)  # it ran until its planned stop


@pytest.mark.fault(25)
async def test_a_stop_that_waited_for_its_turn_is_booked_from_when_it_was_sent(
    cloud: RunComfyEmulator, program: Program
) -> None:
    """I9: until then the machine ran; its answer is late, and the next one says that there is no such machine."""
    cloud.next_machine(delete_takes=1)
    machine, _ = await program.ready()
    cloud.next_call("GET servers", status=429, headers={"Retry-After": "200"})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(program.machines.provider.list_machines(), 5)
    cloud.next_call("DELETE servers/*", delay=40)
    await end(program, machine)
    [entry], [bill] = await program.store.ledger(), cloud.books.values()
    assert bill.seconds >= 60  # a stop obeys Retry-After for a minute
    assert abs((entry.ended_at - entry.started_at).total_seconds() - float(bill.seconds)) < 1


@pytest.mark.fault(18)
@pytest.mark.parametrize("works", [True, False])
async def test_between_a_stop_that_nobody_answered_and_the_planned_one_the_middle_is_booked(
    cloud: RunComfyEmulator, program: Program, works: bool
) -> None:
    """I9: nothing was heard until long after the planned stop, and the machine is gone; wrong by half at most."""
    machine, _ = await program.ready()
    await asyncio.sleep(100)
    asked = program.machines.clock.now()
    cloud.next_call("DELETE servers/*", reply="lost", works=works, times=None, lasts=timedelta(minutes=15))
    cloud.next_call("GET *", reply="lost", times=None, lasts=timedelta(minutes=15))
    await end(program, machine)
    [entry] = await program.store.ledger()
    assert machine.planned_stop_at is not None
    middle = asked + (machine.planned_stop_at - asked) / 2
    assert abs((entry.ended_at - middle).total_seconds()) < 2
    [bill] = cloud.books.values()
    real_end = asked if works else machine.planned_stop_at
    assert bill.ended_at is not None
    assert abs((bill.ended_at - real_end).total_seconds()) < 60


async def test_a_machine_that_ended_by_itself_is_billed_until_its_planned_stop(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    await asyncio.sleep(5000)
    await end(program, machine)
    [entry] = await program.store.ledger()
    assert entry.ended_at - entry.started_at == timedelta(minutes=10)


@pytest.mark.fault(24)
async def test_a_machine_that_was_prolonged_by_a_call_without_an_answer_is_billed_until_then(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    cloud.next_call("POST servers/*/update-estimated-duration", reply="lost", works=True, times=None)
    with pytest.raises(ProviderError):
        await program.machines.ask_longer(machine, total=timedelta(minutes=20))
    await asyncio.sleep(30 * 60)

    await end(program, machine)
    [entry] = await program.store.ledger()
    assert entry.ended_at - entry.started_at == timedelta(minutes=20)
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(26)
async def test_the_second_token_ends_what_the_first_one_started(
    cloud: RunComfyEmulator, clock: LoopClock, tmp_path: Path, cloud_settings: CloudSettings
) -> None:
    cloud.second_token = "emulated-token-2"
    both = replace(cloud_settings, tokens=(Secret(cloud.token), Secret(cloud.second_token)))
    async with Programs(cloud, settings_for(both, tmp_path / "state"), clock).start() as program:
        machine, _ = await program.ready()
        cloud.revoke(1)
        assert (await end(program, machine)).state is MachineState.STOPPED
    assert cloud.calls[-1].token == 2


@pytest.mark.fault(26)
async def test_a_revoked_token_is_said_clearly_and_the_stop_stays_open(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    cloud.revoke(1)
    before = asyncio.get_running_loop().time()
    with pytest.raises(StopUnconfirmed) as caught:
        await end(program, machine)
    assert 60 <= asyncio.get_running_loop().time() - before < 120
    assert "may still bill" in caught.value.message
    assert "RUNCOMFY_API_TOKEN" in caught.value.hint
    assert "machines reap" in caught.value.hint
    assert caught.value.details["server_id"] == machine.server_id
    assert await states(program) == ["stopping"]
    assert list(program.books.held) == [machine.id]  # the last words of the program name it
    cloud.behave()
    await end(program, machine)


@pytest.mark.fault(26)
async def test_a_token_revoked_before_the_launch_starts_nothing(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.revoke(1)
    with pytest.raises(AuthRejected):
        await program.launch()
    assert cloud.launched == []
    assert program.books.held == {}


@pytest.mark.fault(26)
async def test_a_token_revoked_while_a_lost_launch_is_looked_for_is_said_and_left_to_the_reaper(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", reply="lost", delay=3)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(2)
    cloud.revoke(1)
    with pytest.raises(LaunchUnclear, match="may run and bill") as caught:
        await launch
    assert "machines reap" in caught.value.hint
    assert asyncio.get_running_loop().time() < 120
    assert await states(program) == ["requested"]
    cloud.behave()
    program.die()
    reaped = await program.reaper.reap()
    assert [m.server_id for m in reaped.ended] == cloud.launched


@pytest.mark.fault(25)
@pytest.mark.parametrize("value", ["2", "Fri, 20 Nov 2026 10:00:30 GMT", None, "-3", "864000", "soon"])
async def test_too_many_requests_are_waited_out_by_launch_and_stop(
    cloud: RunComfyEmulator, program: Program, value: str | None
) -> None:
    headers = {} if value is None else {"Retry-After": value}
    cloud.next_call("POST servers", status=429, headers=headers, times=2)
    machine, _ = await program.ready()
    cloud.next_call("DELETE *", status=429, headers=headers, times=2)
    await end(program, machine)
    assert len(cloud.launched) == 1
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(25)
async def test_a_stop_that_is_turned_away_for_days_is_sent_again_each_minute_and_its_delay_is_said(
    cloud: RunComfyEmulator, program: Program, looptime: float
) -> None:
    machine, _ = await program.ready()
    began = float(looptime)
    cloud.next_call("DELETE *", status=429, headers={"Retry-After": "86400"}, times=2)
    ended = await end(program, machine)
    assert ended.stop_accepted_at is not None
    assert ended.stop_asked_at is not None
    assert (ended.stop_accepted_at - ended.stop_asked_at).total_seconds() < 125
    assert looptime - began < 200
    [said] = [line for line in program.said if "is delayed" in line]
    assert said == (
        f"the stop of {machine.server_id} is delayed: RunComfy has not accepted it after 5s; it bills until then, and "
        "is asked again"
    )
    await assert_bill_and_ledger_agree(cloud, program)


# -- this computer fails -----------------------------------------------------------------------------------


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


# -- Ctrl+C ------------------------------------------------------------------------------------------------


async def a_job(program: Program, intent: Machine) -> None:
    """Rent, wait, use for a minute, end: as the placing of a job does."""
    try:
        await program.launch(intent)
        await program.machines.wait_ready((await program.books.rows())[-1])
        await asyncio.sleep(60)
    finally:
        await finish(program.machines.settle(intent, reason="the job is over"))


FAULTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "plain": [],
    "slow": [("POST servers", {"delay": 8}), ("DELETE *", {"delay": 8})],
    "lost": [("POST servers", {"reply": "lost", "delay": 4})],
    "never": [("POST servers", {"reply": "never"}), ("DELETE *", {"status": 500, "times": 3})],
}


@pytest.mark.parametrize("faults", FAULTS)
@pytest.mark.parametrize("after", [0, 0.001, 0.5, 1, 2, 3, 4.5, 6, 12, 31, 60, 150, 181, 190, 240, 246])
async def test_a_cancellation_at_any_moment_leaves_nothing_billing(
    cloud: RunComfyEmulator, program: Program, faults: str, after: float
) -> None:
    for call, fault in FAULTS[faults]:
        cloud.next_call(call, **fault)
    job = asyncio.create_task(a_job(program, program.intent()))
    await asyncio.sleep(after)
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    assert cloud.alive == []
    assert program.books.held == {}
    assert await program.books.rows() == []
    await assert_bill_and_ledger_agree(cloud, program)


async def test_a_cancellation_while_the_answer_is_under_way_does_not_lose_the_answer(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", delay=8)
    job = asyncio.create_task(a_job(program, program.intent()))
    await asyncio.sleep(4)
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    assert cloud.alive == []
    assert asyncio.get_running_loop().time() < 30  # it did not have to be looked for


@pytest.mark.parametrize("steps", range(1, 130, 4))
async def test_a_cancellation_at_any_step_of_the_loop_leaves_nothing_billing(
    cloud: RunComfyEmulator, program: Program, steps: int
) -> None:
    cloud.boot_time = 0.0
    job = asyncio.create_task(a_job(program, program.intent()))
    for _ in range(steps):
        await asyncio.sleep(0)
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    assert cloud.alive == []
    assert program.books.held == {}
    assert await program.books.rows() == []
    if not [call for call in cloud.calls if call.method == "POST"]:
        # What was never sent is not waited for.
        assert asyncio.get_running_loop().time() < 5


# -- several at once ---------------------------------------------------------------------------------------


async def test_jobs_of_one_process_launch_one_after_the_other(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_call("POST servers", reply="lost", delay=5, times=2)
    intents = [program.intent() for _ in range(3)]
    machines = await asyncio.gather(*(program.launch(intent) for intent in intents))
    assert sorted(str(m.server_id) for m in machines) == sorted(cloud.launched)
    assert len(cloud.launched) == 3
    await asyncio.gather(*(program.machines.settle(intent, reason="over") for intent in intents))
    assert cloud.alive == []


async def test_processes_of_one_account_launch_one_after_the_other(cloud: RunComfyEmulator, programs: Programs) -> None:
    cloud.next_call("POST servers", reply="lost", delay=5)
    async with programs.start() as one, programs.start() as two:
        first, second = await asyncio.gather(one.launch(), two.launch())
        assert {first.server_id, second.server_id} == set(cloud.launched)
        assert any("is launching a machine" in s for s in one.said + two.said)
        await asyncio.gather(end(one, first), end(two, second))


async def test_a_cancelled_wait_for_the_launch_lock_does_not_keep_it(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one, programs.start() as two:
        for steps in range(12):
            waiting = asyncio.create_task(one.launch())
            for _ in range(steps):
                await asyncio.sleep(0)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
        async with asyncio.timeout(10), two.machines.launch_lock():
            pass
    assert cloud.alive == []


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
    assert await states(program) == ["requested", "stopped"], "a launch without an answer has no end"
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


async def test_a_machine_that_another_process_took_over_is_left_to_it(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one, programs.start() as two:
        intent = one.intent()
        machine, _ = await one.ready(intent)
        taken = await two.books.take_over(machine, note="adopted by the user")
        await one.machines.settle(intent, reason="the job is over")
        left = await one.machines.stop(machine, reason="the job is over")
        assert left.owner_id == two.owner.id
        assert cloud.billing == [machine.server_id]
        assert not [call for call in cloud.calls if call.method == "DELETE"]
        await two.machines.stop(taken, reason="the test is over")


# -- since when it bills, and what is said again ---------------------------------------------------------------


def a_ready_time(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


@pytest.mark.parametrize(
    ("told", "not_before", "believed"),
    [
        (3, None, 3),
        (0, None, 0),  # as soon as it was asked for
        (10, None, 10),
        (3, 5, 3),  # it was seen to start later: it had turned back
        (-1, None, 0),
        (-1, 4, 4),
        (11, None, 10),
        (11, 4, 10),
        (None, None, 10),
        (None, 4, 10),
        (-1, 12, 10),
    ],
)
def test_a_ready_time_lies_between_the_launch_and_now(
    told: float | None, not_before: float | None, believed: float
) -> None:
    machine = replace(a_machine(), requested_at=START)
    found = believable(
        None if told is None else a_ready_time(told),
        machine,
        now=a_ready_time(10),
        not_before=None if not_before is None else a_ready_time(not_before),
    )
    assert found == a_ready_time(believed)


def test_the_first_times_that_the_provider_tells_stand() -> None:
    def report(ready: float | None, stops: float | None) -> MachineReport:
        times = [None if at is None else a_ready_time(at) for at in (ready, stops)]
        return MachineReport(ServerId("s"), Phase.READY, "Ready", ready_at=times[0], stopping_at=times[1])

    def since(machine: Machine, seen: MachineReport) -> datetime:
        return ready_since(seen, machine, now=a_ready_time(10), not_before=None)

    unready = replace(a_machine(), requested_at=START, ready_at=None, planned_stop_at=None)
    assert since(unready, report(3, None)) == a_ready_time(3)
    guessed = replace(unready, ready_at=a_ready_time(2))  # its word came before its times
    assert since(guessed, report(3, None)) == a_ready_time(2)
    assert since(guessed, report(None, 13)) == a_ready_time(2)
    assert since(guessed, report(3, 13)) == a_ready_time(3)
    assert since(guessed, report(11, 21)) == a_ready_time(2)
    assert since(guessed, report(-1, 9)) == a_ready_time(2)
    known = replace(guessed, planned_stop_at=a_ready_time(12))
    assert since(known, report(3, 13)) == a_ready_time(2)


async def test_what_goes_wrong_is_said_when_it_comes_first_and_then_once_an_hour() -> None:
    said = Said()
    assert [said.due("busy"), said.due("busy"), said.due("slow")] == [True, False, True]
    await asyncio.sleep(SAY_AGAIN.total_seconds() - 1)
    assert not said.due("busy")
    await asyncio.sleep(1)
    assert [said.due("busy"), said.due("busy")] == [True, False]
