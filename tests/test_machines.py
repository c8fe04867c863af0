"""Renting machines, waiting for them, prolonging them, on a cloud that misbehaves; its own books tell what ran."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from runcomfy.application.books import Books, dearer
from runcomfy.application.by_order import stop_whosever
from runcomfy.application.launching import _is_as_good, _of_its_kind, _Try
from runcomfy.application.machines import Boot
from runcomfy.domain.budget import Budget, BudgetState, Period
from runcomfy.domain.exceptions import (
    BootTimeout,
    BudgetExceeded,
    LaunchAmbiguous,
    LaunchUnclear,
    LeaseLost,
    MachineFailed,
    MachineLost,
    MachineNotFound,
    NoCapacity,
    OutOfCredit,
    ProviderError,
    RunComfyError,
    ValueInvalid,
)
from runcomfy.domain.machine import Machine, MachineReport, MachineState, OwnerId, Phase, Purpose, ServerId
from runcomfy.domain.money import show_usd
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import a_machine
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.past import Past
from runcomfy.testing.programs import Program, Programs, discrepancies, settings_for

pytestmark = pytest.mark.cloud(comfyui=False)


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    return Programs(cloud, settings_for(cloud_settings, tmp_path / "state"), clock)


@pytest.fixture
async def program(programs: Programs) -> AsyncIterator[Program]:
    async with programs.start() as program:
        yield program


async def end(program: Program, machine: Machine) -> Machine:
    """Stop a machine as its owner does at the end."""
    current = await program.books.latest(machine.id)
    assert current is not None
    return await program.machines.stop(current, reason="the test is over")


async def states(program: Program) -> list[str]:
    return [str(row.state) for row in await program.books.rows(open_only=False)]


async def assert_bill_and_ledger_agree(cloud: RunComfyEmulator, program: Program) -> None:
    assert await discrepancies(cloud, program) == []


# -- the plain story ---------------------------------------------------------------------------------------


async def test_a_machine_is_rented_waited_for_and_ended_and_the_ledger_is_the_bill(
    cloud: RunComfyEmulator, program: Program, looptime: float
) -> None:
    machine, report = await program.ready()
    assert 180 <= looptime <= 190
    assert report.usable
    assert machine.state is MachineState.READY
    await asyncio.sleep(300)
    ended = await end(program, machine)

    assert ended.state is MachineState.STOPPED
    assert cloud.launched == [ended.server_id]
    assert cloud.billing == []
    [entry] = await program.store.ledger()
    bill = cloud.books[cloud.launched[0]]
    assert abs(entry.amount_usd - bill.usd) < Decimal("0.001")
    assert [t.event for t in await program.store.story(machine.id)] == [
        "added",
        "listed",
        "answered",
        "stop-asked",
        "changed",
        "gone",
    ]
    assert program.books.held == {}


async def test_the_intention_is_on_disk_before_the_request_leaves(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    cloud.next_call("POST servers", delay=20)
    launch = asyncio.create_task(program.launch())
    await asyncio.sleep(10)
    async with programs.start() as other:
        [row] = await other.books.rows()
    assert row.state is MachineState.REQUESTED
    await end(program, await launch)


async def test_what_a_start_takes_is_learnt(program: Program) -> None:
    assert await program.machines.expected_boot("medium") is None
    machine, _ = await program.ready()
    expected = await program.machines.expected_boot("medium")
    assert expected is not None
    assert timedelta(seconds=180) <= expected <= timedelta(seconds=190)
    assert await program.machines.expected_boot("large") is None
    await end(program, machine)


async def test_who_waits_for_a_machine_is_told_how_its_start_stands_in_the_providers_words(
    cloud: RunComfyEmulator, program: Program
) -> None:
    first, _ = await program.ready()
    expected = await program.machines.expected_boot("medium")
    cloud.next_machine(hidden_for=20, unlisted_for=20)
    machine = await program.launch()
    boots: list[Boot] = []
    waiting = asyncio.create_task(program.machines.wait_ready(machine, on_boot=boots.append))
    await asyncio.sleep(60)
    cloud.next_call("GET servers/*", status=503, body={"message": "busy"}, times=None)
    await asyncio.sleep(30)
    cloud.behave()
    ready, report = await waiting
    words = list(dict.fromkeys(boot.status for boot in boots))
    assert words[0] == "not visible yet"
    assert [word for word in words if "cannot be asked" in word]
    assert "Starting" in words
    assert {boot.expected for boot in boots} == {expected}
    assert boots[0].elapsed < timedelta(seconds=5)
    assert [boot.elapsed for boot in boots] == sorted(boot.elapsed for boot in boots)
    steps = len(await program.store.story(ready.id))
    assert await program.machines.ready(ready, report) == ready  # said once more, it is no news
    assert len(await program.store.story(ready.id)) == steps
    later = ready.planned_stop_at + timedelta(minutes=5) if ready.planned_stop_at else None
    moved = await program.machines.ready(ready, replace(report, stopping_at=later))
    assert (moved.planned_stop_at, moved.ready_at) == (later, ready.ready_at)
    assert (await program.store.story(ready.id))[-1].note == "planned stop"
    for each in (first, moved):
        await end(program, each)


# -- launches whose answer is lost -------------------------------------------------------------------------


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


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (402, {"message": "Payment required"}, OutOfCredit),
        (400, {"error": "Insufficient balance"}, OutOfCredit),
        (503, {"message": "no machines available"}, NoCapacity),
        (409, {"message": "Out of stock"}, NoCapacity),
        (400, {"message": "server_type is not valid"}, ProviderError),
    ],
)
async def test_a_refused_launch_says_why_and_leaves_no_doubt(
    cloud: RunComfyEmulator, program: Program, status: int, body: dict[str, str], error: type[RunComfyError]
) -> None:
    cloud.next_call("POST servers", status=status, body=body, works=False)
    with pytest.raises(error) as caught:
        await program.launch()
    assert caught.value.exit_code == 4
    assert cloud.launched == []
    assert await states(program) == ["never"]
    assert program.books.held == {}


async def test_a_price_above_the_limit_is_refused_before_anything_is_sent(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start(max_usd_per_hour=Decimal("1.00")) as program:
        with pytest.raises(BudgetExceeded) as caught:
            program.intent(server_type="large")
        assert caught.value.exit_code == 8
        with pytest.raises(BudgetExceeded):
            await program.dev.start(server_type="large", duration=timedelta(hours=1))
    assert cloud.calls == []


@pytest.mark.parametrize(("kind", "seconds"), [("no-such-type", 600), ("medium", 0), ("medium", -5)])
async def test_what_cannot_be_priced_or_has_no_time_is_refused_before_anything_is_sent(
    cloud: RunComfyEmulator, program: Program, kind: str, seconds: int
) -> None:
    with pytest.raises(ValueInvalid):
        program.intent(server_type=kind, duration=timedelta(seconds=seconds))
    assert cloud.calls == []


# -- waiting -----------------------------------------------------------------------------------------------


@pytest.mark.fault(13)
@pytest.mark.parametrize("word", ["Provisioning", "", "ready-ish", None, 42])
async def test_an_unknown_word_is_waited_out_and_the_machine_is_stopped_at_the_limit(
    cloud: RunComfyEmulator, programs: Programs, word: Any
) -> None:
    cloud.next_machine(fields={"current_status": word})
    async with programs.start(boot_timeout=timedelta(minutes=10)) as program:
        machine = await program.launch()
        with pytest.raises(BootTimeout):
            await program.machines.wait_ready(machine)
        await end(program, machine)
        await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(14)
async def test_starting_for_ever_ends_at_the_boot_limit(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_machine(stuck=True)
    machine = await program.launch()
    with pytest.raises(BootTimeout) as caught:
        await program.machines.wait_ready(machine)
    assert caught.value.exit_code == 6
    assert caught.value.details == {"server_id": machine.server_id, "status": "Starting"}
    await end(program, machine)
    assert cloud.alive == []
    assert await program.billed() == 0


async def test_a_machine_that_fails_is_said_so_at_once(
    cloud: RunComfyEmulator, program: Program, looptime: float
) -> None:
    cloud.next_machine(fails=True)
    machine = await program.launch()
    with pytest.raises(MachineFailed) as failed:
        await program.machines.wait_ready(machine)
    assert failed.value.details == {"server_id": machine.server_id}
    assert looptime < 200
    await end(program, machine)
    assert cloud.alive == []


@pytest.mark.fault(16)
async def test_a_machine_that_flaps_is_ready_once_and_billed_once(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_machine(flaps=7)
    machine, _ = await program.ready()
    await asyncio.sleep(60)
    await end(program, machine)
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(22)
async def test_a_machine_that_goes_away_while_it_starts_is_lost(cloud: RunComfyEmulator, program: Program) -> None:
    machine = await program.launch()
    await asyncio.sleep(30)
    await program.machines.provider.stop_machine(ServerId(cloud.launched[0]))  # somebody, on RunComfy's page
    with pytest.raises(MachineLost) as lost:
        await program.machines.wait_ready(machine)
    assert lost.value.details == {"server_id": machine.server_id}
    await end(program, machine)
    assert await program.billed() == 0


@pytest.mark.fault(29)
async def test_a_provider_that_is_down_for_a_while_delays_a_start_and_no_more(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine = await program.launch()
    cloud.next_call(status=503, lasts=400, times=None)
    machine, _ = await program.machines.wait_ready(machine)
    await end(program, machine)
    assert len(cloud.launched) == 1
    await assert_bill_and_ledger_agree(cloud, program)


@pytest.mark.fault(13)
async def test_ready_without_an_address_is_not_usable_and_billed_all_the_same(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(fields={"main_service_url": None})
    async with programs.start(boot_timeout=timedelta(minutes=8)) as program:
        machine = await program.launch()
        with pytest.raises(BootTimeout):
            await program.machines.wait_ready(machine)
        await end(program, machine)
        await assert_bill_and_ledger_agree(cloud, program)


# -- prolonging --------------------------------------------------------------------------------------------


async def test_a_machine_is_prolonged_by_its_total_and_read_back(cloud: RunComfyEmulator, program: Program) -> None:
    machine, report = await program.ready()
    longer = await program.machines.extend(machine, total=timedelta(minutes=20))
    assert longer.duration == timedelta(minutes=20)
    assert longer.planned_stop_at is not None
    assert report.ready_at is not None
    assert longer.planned_stop_at == report.ready_at + timedelta(minutes=20)
    await asyncio.sleep(700)
    assert cloud.billing  # ten minutes would have been over
    await end(program, machine)


@pytest.mark.fault(24)
async def test_a_prolongation_that_only_seemed_to_work_is_not_believed(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()

    def lie(answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "estimated_duration": 1200, "estimated_stopping_at": "2026-11-20T11:00:00.000000Z"}

    cloud.next_call("POST servers/*/update-estimated-duration", works=False, change=lie)
    with pytest.raises(ProviderError, match="did not move as asked"):
        await program.machines.extend(machine, total=timedelta(minutes=20))
    after = await program.books.latest(machine.id)
    assert after is not None
    assert after.duration == timedelta(minutes=10)
    assert after.planned_stop_at == machine.planned_stop_at
    await end(program, machine)


@pytest.mark.fault(24)
async def test_a_prolongation_that_cannot_be_read_back_is_not_assumed(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start(max_retries=0) as program:
        machine, _ = await program.ready()
        cloud.next_call("GET servers/*", status=500)
        with pytest.raises(ProviderError):
            await program.machines.extend(machine, total=timedelta(minutes=20))
        after = await program.books.latest(machine.id)
        assert after is not None
        assert after.planned_stop_at == machine.planned_stop_at
        await end(program, machine)


# -- the books -----------------------------------------------------------------------------------------------


@pytest.fixture
async def books(programs: Programs) -> AsyncIterator[Books]:
    async with programs.start(in_memory=True) as program:
        yield program.books


def told(books: Books) -> list[str]:
    said: list[str] = []
    books.tell = said.append
    return said


async def test_what_is_to_be_rented_is_written_as_it_was_wanted(books: Books, clock: LoopClock) -> None:
    rate = books.price("large")
    wanted: dict[str, Any] = {
        "purpose": Purpose.POOL,
        "server_type": "large",
        "duration": timedelta(minutes=10),
        "reason": "jobs wait",
        "for_user": "ann",
        "for_project": "film",
    }
    machine = books.intent(**wanted)
    assert {name: getattr(machine, name) for name in wanted} == wanted
    assert (machine.provider, machine.account) == (books.provider, books.account)
    assert (machine.usd_per_hour, machine.rate_source) == (rate.usd_per_hour, f"{rate.plan}, {rate.source}")
    assert machine.requested_at == machine.since == clock.now()
    assert machine.owner_id == machine.run_id == books.owner.id
    assert machine.workflow_version_id == books.settings.cloud.workflow_version_id
    another = books.intent(**wanted, version_id="v-2")
    assert (another.workflow_version_id, another.id != machine.id) == ("v-2", True)
    for duration in (timedelta(0), timedelta(seconds=-1)):
        with pytest.raises(ValueInvalid, match="longer than nothing"):
            books.intent(**{**wanted, "duration": duration})
    await books.add_intent(machine)
    assert await books.store.machine(machine.id) == machine
    [added] = await books.store.story(machine.id)
    assert (added.event, added.note, added.at) == ("added", "jobs wait", clock.now())


async def test_a_type_may_cost_as_much_as_the_limit_and_one_that_nobody_knows_is_said_to_be_that(
    books: Books,
) -> None:
    said = told(books)
    usd = books.price("large").usd_per_hour
    table = books.settings.rates
    rates = {**table.rates, "new-one": replace(table.rates["large"], server_type="new-one")}
    books.settings = replace(
        books.settings,
        cloud=replace(books.settings.cloud, max_usd_per_hour=usd),
        rates=replace(table, rates=rates),
    )
    assert books.price("large").usd_per_hour == usd
    assert said == []
    assert books.price("new-one").server_type == "new-one"
    assert said == ["note: RunComfy does not document the machine type new-one; it may be refused"]
    with pytest.raises(BudgetExceeded) as dear:
        books.price("2xl-turbo")
    dearest = table.rates["2xl-turbo"].usd_per_hour
    assert dear.value.details == {"usd_per_hour": str(dearest), "cap_usd_per_hour": str(usd)}
    with pytest.raises(ValueInvalid, match="no price is known"):
        books.price("none")


async def test_a_launch_must_show_when_the_window_since_it_left_is_over(books: Books, clock: LoopClock) -> None:
    window = books.settings.cloud.visibility_window.total_seconds()
    intent = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    await asyncio.sleep(window - 1)
    assert not books.must_be_visible(intent)
    await asyncio.sleep(1)
    assert books.must_be_visible(intent)  # of one of which nothing is known but when it was wanted
    owner = replace(books.owner, heartbeat_at=clock.now() - timedelta(seconds=10))
    books.presume_asked(intent, None)
    assert books.must_be_visible(intent)
    books.presume_asked(intent, owner)  # it may have left as late as its owner's last sign of life
    await asyncio.sleep(window - 11)
    assert not books.must_be_visible(intent)
    await asyncio.sleep(1)
    assert books.must_be_visible(intent)
    books.presume_asked(intent, replace(owner, heartbeat_at=clock.now() + timedelta(hours=1)))
    await asyncio.sleep(window)
    assert books.must_be_visible(intent)  # a clock that runs ahead makes nobody wait longer
    books.asked(intent)
    assert not books.must_be_visible(intent)
    await asyncio.sleep(window)
    assert books.must_be_visible(intent)
    books.asked(intent)
    books.forget(intent)
    assert books.must_be_visible(intent)


async def test_a_machine_of_the_provider_is_the_open_one_of_our_rows_or_the_newest(
    books: Books, clock: LoopClock
) -> None:
    server_id = ServerId("srv-1")
    assert await books.row_of(server_id) is None
    past = Past(books)
    older = await past.machine(clock.now() - timedelta(hours=5), timedelta(minutes=5))
    newer = await past.machine(clock.now() - timedelta(hours=3), timedelta(minutes=5))
    assert await books.row_of(ServerId(str(older.server_id))) == older
    assert await books.row_of(ServerId(str(newer.server_id))) == newer


async def test_a_machine_of_nobody_lives_until_its_planned_stop(books: Books, clock: LoopClock) -> None:
    hour = timedelta(hours=1)
    now = clock.now()
    intent = books.intent(purpose=Purpose.DEV, server_type="medium", duration=hour, reason="a test")
    machine = replace(intent, ready_at=now - timedelta(minutes=5))
    report = MachineReport(ServerId("s"), Phase.READY, "Ready")
    assert books.kept_until(machine, report) == now + timedelta(minutes=55)
    assert books.kept_until(replace(machine, ready_at=None), report) == now + hour
    default = books.settings.cloud.duration
    assert books.kept_until(replace(machine, duration=timedelta(0)), report) == now - timedelta(minutes=5) + default
    planned = replace(machine, planned_stop_at=now + 2 * hour)
    assert books.kept_until(planned, report) == now + 2 * hour
    assert books.kept_until(planned, replace(report, stopping_at=now + 3 * hour)) == now + 3 * hour


async def test_what_is_held_is_open_and_ours(books: Books) -> None:
    machine = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    books.hold(machine)
    assert books.held == {machine.id: machine}
    books.hold(replace(machine, state=MachineState.STOPPED))
    assert books.held == {}
    books.hold(replace(machine, owner_id=OwnerId("somebody")))
    assert books.held == {}
    books.hold(machine)
    books.forget(machine)
    assert books.held == {}
    assert await books.latest(machine.id) is None
    books.hold(machine)
    assert await books.latest(machine.id) == machine  # the store does not know it yet
    await books.add_intent(machine)
    answered = replace(machine, server_id=ServerId("s-1"))
    books.hold(answered)
    assert await books.latest(machine.id) == answered  # its answer could not be written down
    books.hold(replace(answered, epoch=answered.epoch + 1))
    assert await books.latest(machine.id) == machine


@pytest.mark.parametrize(("real", "taken"), [("Medium", False), ("med ium", False), ("", False), ("large", True)])
async def test_the_type_that_a_machine_really_has_is_booked_with_its_price(
    books: Books, real: str, taken: bool
) -> None:
    said = told(books)
    machine = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    await books.add_intent(machine)
    after = await books.note_type(machine, MachineReport(ServerId("s"), Phase.READY, "Ready", server_type=real))
    if not taken:
        assert (after, said) == (machine, [])
        assert dearer(machine, after) is None
        return
    rate = books.price("large")
    assert (after.server_type, after.usd_per_hour) == ("large", rate.usd_per_hour)
    assert after.rate_source == f"{rate.plan}, {rate.source}"
    assert await books.store.machine(machine.id) == after
    assert sum("is a large in place of medium, booked at $" in line for line in said) == 1
    failed = dearer(machine, replace(after, server_id=ServerId("s")))
    assert failed is not None
    assert failed.details == {"server_id": "s", "asked": "medium", "got": "large"}
    assert dearer(after, machine) is None


async def test_a_type_without_a_price_is_said_once_and_proves_nothing(books: Books) -> None:
    said = told(books)
    machine = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    report = MachineReport(ServerId("s"), Phase.READY, "Ready", server_type="medium-v2")
    assert [await books.note_type(machine, report) for _ in range(2)] == [machine, machine]
    assert len(said) == 1
    assert "a medium-v2, of which no price is known" in said[0]


async def test_a_budget_that_is_nearly_used_up_is_told_once_per_window(books: Books, clock: LoopClock) -> None:
    said = told(books)
    now = clock.now()

    def state(budget: Budget, committed: str) -> BudgetState:
        return BudgetState(budget, budget.window(now), Decimal(committed))

    day = Budget(Period.DAY, hard=Decimal(10))
    assert day.alerts_at is not None
    await books.alert([state(day, str(day.alerts_at - Decimal("0.01"))), state(Budget(Period.DAY), "99")])
    assert said == []
    for _ in range(2):
        await books.alert([state(day, str(day.alerts_at))])
    [sentence] = said
    assert sentence.startswith(f"BUDGET: {show_usd(day.alerts_at)} of $10.00 per day is spent or committed")
    assert "; resets 2026-" in sentence
    run = Budget(Period.RUN, soft=Decimal(1))
    for run_id in ("a", "a", "b"):
        await books.alert([state(run, "2")], run_id=run_id)
    assert said[1:] == ["BUDGET: $2.00 per run is spent or committed (alert at $1.00)"] * 2


async def test_who_was_quicker_keeps_the_machine(programs: Programs) -> None:
    async with programs.start() as one, programs.start() as two:
        intent = one.intent()
        await one.books.add_intent(intent)
        taken = await two.books.try_take_over(intent, note="mine now")
        assert taken is not None
        assert (taken.owner_id, two.books.held) == (two.owner.id, {intent.id: taken})
        assert await one.books.try_take_over(intent, note="mine") is None
        with pytest.raises(LeaseLost):
            await one.books.change(intent, note="too late", kept_until=None)
        left = await two.books.hand_over(taken, kept_until=two.books.clock.now(), note="nobody's")
        assert (left.owner_id, left.kept_until, two.books.held) == (None, two.books.clock.now(), {})
        mine = await one.books.take_over(left, note="mine again")
        assert (mine.owner_id, one.books.held) == (one.owner.id, {intent.id: mine})
        notes = [step.note for step in await one.store.story(intent.id)]
        assert notes == ["a test", "mine now", "nobody's", "nobody's", "mine again"]
