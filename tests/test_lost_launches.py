"""Launches whose answer is lost: what they started is found and is one machine, and nobody else's is taken for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.application.by_order import stop_whosever
from runcomfy.application.launching import _is_as_good, _of_its_kind, _Try
from runcomfy.domain.exceptions import LaunchAmbiguous, LaunchUnclear, MachineLost, MachineNotFound
from runcomfy.domain.machine import MachineReport, MachineState, Phase, Purpose, ServerId
from runcomfy.testing.contracts.store import a_machine
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, assert_bill_and_ledger_agree, end, states

pytestmark = pytest.mark.cloud(comfyui=False)


@pytest.mark.fault(4)
@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "fault",
    [
        {"reply": "never"},
        {"delay": 90},
        {"status": 500, "works": True},
        {"status": 502, "works": True, "reply": "html"},
        {"reply": "lost"},
        {"reply": "reset"},
        {"reply": "empty"},
        {"reply": "truncated"},
        {"reply": "html"},
        {"reply": "drip"},
        {"status": 302, "works": True, "headers": {"Location": "https://elsewhere.invalid/"}},
        {"body": {"server_id": 17}},
    ],
    ids=lambda fault: "-".join(f"{k}={v}" for k, v in fault.items() if not isinstance(v, dict)) or "wrong-fields",
)
async def test_a_launch_that_worked_and_was_not_answered_is_found_and_is_one(
    cloud: RunComfyEmulator, program: Program, fault: dict[str, Any]
) -> None:
    cloud.next_call("POST servers", **fault)
    machine, _ = await program.ready()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)
    assert len(cloud.launched) == 1
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(4)
@pytest.mark.parametrize("fault", [{"status": 500, "works": False}, {"reply": "lost", "works": False}])
async def test_a_launch_that_started_nothing_is_repeated_only_after_the_visibility_window(
    cloud: RunComfyEmulator, program: Program, fault: dict[str, Any], looptime: float
) -> None:
    cloud.next_call("POST servers", **fault)
    machine = await program.launch()
    assert cloud.launched == [machine.server_id]
    posts = [call.at for call in cloud.calls if call.method == "POST"]
    assert len(posts) == 2
    assert posts[1] - posts[0] >= timedelta(seconds=120)
    assert sorted(await states(program)) == ["booting", "never"]
    await end(program, machine)


@pytest.mark.fault(4)
async def test_launches_that_are_never_answered_are_given_up_and_nothing_runs(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", status=500, works=False, times=None)
    with pytest.raises(LaunchUnclear, match="none of them started a machine"):
        await program.launch()
    assert await states(program) == ["never"] * 3
    assert cloud.launched == []


async def test_an_intention_whose_request_never_left_is_closed_without_asking_anybody(
    cloud: RunComfyEmulator, program: Program
) -> None:
    launching, intent = program.machines._launching, program.intent()
    await program.books.add_intent(intent)
    launching._tries[intent.id] = [_Try(intent)]
    assert launching.is_under_way(intent.id)
    asked = len(cloud.calls)
    assert await launching.settle(intent, reason="it was broken off") is None
    assert len(cloud.calls) == asked
    assert await states(program) == ["never"]
    assert [step.note for step in await program.store.story(intent.id)][-1] == "broken off, never sent"
    assert not launching.is_under_way(intent.id)
    assert await launching.settle(intent, reason="once more") is None


async def test_who_launches_beside_another_process_says_once_that_it_waits(programs: Programs, looptime: float) -> None:
    async with programs.start() as one, programs.start() as two:
        async with one.machines.launch_lock():
            waiting = asyncio.create_task(two.machines._launching._take_lock())
            await asyncio.sleep(10)
            assert not waiting.done()
            assert two.said == [f"another process (pid {one.owner.pid}) is launching a machine; waiting for it"]
        began = float(looptime)
        await waiting
        assert looptime - began <= 1.5
        programs.processes.dead.add(two.owner.id)
        async with asyncio.timeout(1), one.machines.launch_lock():  # the dead hold nobody up
            assert one.said == []


def test_only_a_machine_that_is_the_same_in_all_that_was_asked_for_stands_for_another() -> None:
    intent = a_machine()
    for purpose in Purpose:
        asked = replace(intent, purpose=purpose)
        assert _is_as_good(asked, asked) == (purpose in (Purpose.DEV, Purpose.POOL))
    pooled = replace(intent, purpose=Purpose.POOL)
    for other in (
        {"purpose": Purpose.DEV},
        {"server_type": "large"},
        {"workflow_version_id": "another"},
        {"duration": pooled.duration + timedelta(seconds=1)},
    ):
        assert not _is_as_good(replace(pooled, **other), pooled)


def test_what_a_list_has_told_of_a_machines_kind_is_kept_and_what_it_left_open_is_taken() -> None:
    def seen(**fields: Any) -> MachineReport:
        return MachineReport(ServerId("s"), Phase.READY, "Ready", **fields)

    told = seen(server_type="large", duration=timedelta(hours=1), workflow_version_id="v1")
    odd = seen(server_type="gpu-x", duration=timedelta(hours=9), workflow_version_id="v9")
    assert _of_its_kind(odd, told) == told
    assert _of_its_kind(odd, seen()) == odd
    assert _of_its_kind(odd, None) is odd
    starting = replace(odd, phase=Phase.STARTING, status="Starting")
    assert _of_its_kind(starting, told) == replace(told, phase=Phase.STARTING, status="Starting")


@pytest.mark.fault(9)
@pytest.mark.parametrize("hidden", [30, 90, 118])
async def test_a_lost_launch_that_appears_late_is_not_taken_for_absent(
    cloud: RunComfyEmulator, program: Program, hidden: float
) -> None:
    cloud.next_machine(unlisted_for=hidden, hidden_for=hidden)
    cloud.next_call("POST servers", reply="lost")
    machine, _ = await program.ready()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)
    assert "the launch was not answered; looking for what it started (this may take 2m 0s)" in program.said


@pytest.mark.fault(9)
@pytest.mark.fault(11)
async def test_lists_that_came_too_early_do_not_vouch_for_one_that_is_empty_by_mistake(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(unlisted_for=118, hidden_for=118)
    cloud.next_call("POST servers", reply="lost")
    asyncio.get_running_loop().call_later(118, lambda: cloud.next_call("GET servers", body=[]))
    machine, _ = await program.ready()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)


@pytest.mark.fault(4)
@pytest.mark.fault(11)
async def test_a_machine_that_a_list_has_shown_is_not_forgotten_when_the_last_lists_are_empty_by_mistake(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(boot_time=200)
    cloud.next_call("POST servers", reply="lost")
    asyncio.get_running_loop().call_later(118, lambda: cloud.next_call("GET servers", body=[], times=3))
    machine, _ = await program.ready()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)


@pytest.mark.fault(4)
@pytest.mark.fault(13)
async def test_a_machine_that_a_list_has_shown_to_fit_is_it_though_its_type_is_told_in_words_nobody_knows_later(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(boot_time=100)
    cloud.next_call("POST servers", reply="lost")

    def muddle() -> None:
        [machine] = cloud.machines.values()
        machine.traits.fields = {"server_type": "?"}
        asyncio.get_running_loop().call_later(100, lambda: setattr(machine.traits, "fields", {}))

    asyncio.get_running_loop().call_later(60, muddle)
    machine, _ = await program.ready()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)


@pytest.mark.fault(4)
async def test_a_machine_that_was_shown_and_is_gone_is_not_waited_for(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(boot_time=200)
    cloud.next_call("POST servers", reply="lost")
    asyncio.get_running_loop().call_later(60, lambda: cloud.lose(next(iter(cloud.machines.values()))))
    machine, _ = await program.ready()
    assert cloud.launched[1:] == [machine.server_id]
    await end(program, machine)


@pytest.mark.fault(9)
@pytest.mark.parametrize("hidden", [30, 90, 118])
async def test_an_answered_launch_that_appears_late_is_waited_for(
    cloud: RunComfyEmulator, program: Program, hidden: float
) -> None:
    cloud.next_machine(unlisted_for=hidden, hidden_for=hidden)
    machine, _ = await program.ready()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)


@pytest.mark.fault(9)
@pytest.mark.fault(17)
async def test_a_machine_that_is_not_visible_yet_is_not_gone_when_it_is_stopped(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(unlisted_for=100, hidden_for=100, boot_time=30)
    machine = await program.launch()
    await asyncio.sleep(5)
    ended = await end(program, machine)
    assert ended.state is MachineState.STOPPED
    assert cloud.alive == []
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(25)
async def test_the_window_counts_from_when_the_request_left_not_from_the_intention(
    cloud: RunComfyEmulator, program: Program
) -> None:
    # Two refusals with a long Retry-After each: the request leaves two minutes after the intention was written.
    cloud.next_call("POST servers", status=429, headers={"Retry-After": "60"}, times=2)
    cloud.next_call("POST servers", reply="lost")
    cloud.next_machine(unlisted_for=100, hidden_for=100)
    machine = await program.launch()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)


@pytest.mark.fault(12)
async def test_two_machines_that_fit_one_lost_launch_are_reported_and_left_alone(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", reply="lost", delay=3)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(2)
    stranger = cloud.foreign("medium", duration=600)
    with pytest.raises(LaunchAmbiguous) as caught:
        await launch
    assert set(caught.value.details["server_ids"]) == {stranger.server_id, cloud.launched[0]}
    assert "none was touched" in caught.value.message
    assert caught.value.exit_code == 4
    assert [call for call in cloud.calls if call.method == "DELETE"] == []
    assert await states(program) == ["never"]
    await program.machines.provider.stop_machine(ServerId(cloud.launched[0]))  # the user's part
    assert stranger.bills


@pytest.mark.fault(12)
async def test_a_strangers_machine_that_starts_while_ours_is_not_visible_is_not_taken_for_ours(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(unlisted_for=60, hidden_for=60)
    cloud.next_call("POST servers", reply="lost", delay=3)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(2)
    stranger = cloud.foreign("medium", duration=600, status="Starting")
    with pytest.raises(LaunchAmbiguous):
        await launch
    assert stranger.bills
    await program.machines.provider.stop_machine(ServerId(cloud.launched[0]))


@pytest.mark.fault(12)
async def test_a_new_machine_of_the_type_with_another_duration_forbids_to_launch_again(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", reply="lost", works=False, delay=3)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(2)
    stranger = cloud.foreign("medium", duration=7200)
    with pytest.raises(LaunchAmbiguous):
        await launch
    assert cloud.launched == []
    assert stranger.bills


@pytest.mark.fault(12)
async def test_a_strangers_machine_of_another_type_does_not_disturb_a_lost_launch(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", reply="lost", delay=3)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(2)
    stranger = cloud.foreign("large", duration=600)
    machine = await launch
    assert machine.server_id == cloud.launched[0]
    await end(program, machine)
    assert stranger.bills


@pytest.mark.fault(13)
@pytest.mark.invariant("I2")
@pytest.mark.invariant("I3")
@pytest.mark.parametrize("told", ["?", "Medium", "gpu-48gb"])
async def test_a_machine_whose_type_is_told_in_a_word_nobody_knows_is_what_a_lost_launch_started(
    cloud: RunComfyEmulator, program: Program, told: str
) -> None:
    cloud.next_machine(fields={"server_type": told})
    cloud.next_call("POST servers", reply="lost")
    machine = await program.launch()
    assert cloud.launched == [machine.server_id]
    assert machine.server_type == "medium"
    await end(program, machine)
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(13)
async def test_a_machine_with_an_id_that_cannot_be_used_disturbs_nobody_elses_launch_and_end(
    cloud: RunComfyEmulator, program: Program
) -> None:
    evil = {"server_id": "../../evil", "server_type": "medium", "current_status": "Ready", "estimated_duration": 600}
    cloud.next_call("GET servers", change=lambda entries: [*entries, evil], times=None)
    cloud.next_call("POST servers", reply="lost")
    machine = await program.launch()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)
    await assert_bill_and_ledger_agree(cloud, program)
    [foreign] = (await program.reaper.reap()).foreign
    assert not foreign.addressable
    with pytest.raises(MachineNotFound, match="under an id that cannot be used"):
        await stop_whosever(program.machines, foreign.server_id, note="by hand")


@pytest.mark.fault(13)
async def test_a_launch_whose_machine_has_an_id_that_cannot_be_used_is_reported_and_not_thought_to_have_failed(
    cloud: RunComfyEmulator, program: Program, looptime: float
) -> None:
    cloud.next_machine(fields={"server_id": "../../evil"})
    with pytest.raises(LaunchAmbiguous, match="unusable-id-"):
        await program.launch()
    assert 115 <= looptime <= 200
    assert len(cloud.launched) == 1
    assert await states(program) == ["never"]
    await program.machines.provider.stop_machine(ServerId(cloud.launched[0]))  # the user's part, on RunComfy's page


@pytest.mark.fault(7)
async def test_two_launches_answered_with_one_id_are_two_machines_and_both_are_ended(
    cloud: RunComfyEmulator, program: Program
) -> None:
    first = await program.launch()
    cloud.next_machine(answers_as=first.server_id)
    second = await program.launch()
    assert first.server_id != second.server_id
    assert cloud.launched == [first.server_id, second.server_id]
    await asyncio.gather(end(program, first), end(program, second))
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(8)
async def test_a_launch_answered_with_an_id_that_never_shows_expires(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_call("POST servers", works=False)
    machine = await program.launch()
    with pytest.raises(MachineLost):
        await program.machines.wait_ready(machine)
    assert (await end(program, machine)).state is MachineState.STOPPED
    assert await program.billed() == 0


@pytest.mark.fault(8)
async def test_a_machine_that_runs_under_another_id_than_was_answered_is_found(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(answers_as="00000000-dead-beef-0000-000000000000", boot_time=200)
    machine, _ = await program.ready()
    assert machine.server_id == cloud.launched[0]
    await end(program, machine)
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(8)
async def test_a_machine_that_runs_under_another_id_is_ended_also_if_nobody_waited_for_it(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(answers_as="00000000-dead-beef-0000-000000000000", boot_time=20)
    machine = await program.launch()
    await end(program, machine)
    assert cloud.alive == []
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(10)
async def test_a_list_of_which_a_page_fails_decides_nothing(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.page_size = 1
    for _ in range(2):
        cloud.foreign("large")
    cloud.next_call("POST servers", reply="lost")
    cloud.next_call("GET servers?page=3", status=500, lasts=150, times=None, skip=1)
    machine = await program.launch()
    assert cloud.launched == [machine.server_id]
    await end(program, machine)
