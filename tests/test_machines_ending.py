"""Ending machines: whatever the cloud, the user or other processes do; the cloud's own books tell."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.application.ending import SAY_AGAIN, Said, believable, ready_since
from runcomfy.application.finish import finish
from runcomfy.domain.exceptions import AuthRejected, LaunchUnclear, ProviderError, StopUnconfirmed
from runcomfy.domain.machine import Machine, MachineReport, MachineState, Phase, ServerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.contracts.store_words import a_machine
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, assert_bill_and_ledger_agree, end, settings_for, states

pytestmark = pytest.mark.cloud(comfyui=False)


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
@pytest.mark.fault(25)
@pytest.mark.invariant("I9")
async def test_a_stop_that_was_turned_away_is_booked_from_the_try_that_nobody_answered(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(delete_takes=1)
    machine, _ = await program.ready()
    cloud.next_call("DELETE *", status=503, headers={"Retry-After": "60"}, times=2)
    cloud.next_call("DELETE *", status=429, headers={"Retry-After": "60"})
    cloud.next_call("DELETE *", reply="never", works=True)
    await end(program, machine)
    [entry], [bill] = await program.store.ledger(), cloud.books.values()
    assert bill.seconds >= 180
    assert abs((entry.ended_at - entry.started_at).total_seconds() - float(bill.seconds)) < 1


@pytest.mark.fault(18)
@pytest.mark.invariant("I9")
async def test_a_stop_that_worked_and_was_answered_with_an_error_is_booked_from_then_and_not_from_a_later_no(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(delete_takes=1)
    machine, _ = await program.ready()
    await asyncio.sleep(100)
    cloud.next_call("DELETE *", status=503, headers={"Retry-After": "60"}, works=True)
    await end(program, machine)
    [entry], [bill] = await program.store.ledger(), cloud.books.values()
    assert bill.seconds < 110
    assert sum(call.method == "DELETE" for call in cloud.calls) == 2
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
