"""Renting machines, waiting for them, prolonging them, on a cloud that misbehaves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from runcomfy.application.machines import Boot
from runcomfy.domain.exceptions import (
    BootTimeout,
    BudgetExceeded,
    MachineFailed,
    MachineLost,
    NoCapacity,
    OutOfCredit,
    ProviderError,
    RunComfyError,
    ValueInvalid,
)
from runcomfy.domain.machine import MachineState, ServerId
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, assert_bill_and_ledger_agree, end, states

pytestmark = pytest.mark.cloud(comfyui=False)


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


@pytest.mark.fault(13)
@pytest.mark.invariant("I9")
async def test_the_ready_time_told_with_an_unknown_word_is_billed_from_though_its_starter_is_killed(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(status="Provisioning", boot_time=60)
    async with programs.start() as first:
        waiting = asyncio.create_task(first.machines.wait_ready(await first.launch()))
        await asyncio.wait({waiting}, timeout=80)
        await first.kill(waiting)
    (machine,) = cloud.machines.values()
    machine.traits.status = "Starting"  # turned back: whoever looks now is told no times
    await asyncio.sleep(150)
    async with programs.start() as later:
        await later.reaper.reap()
        assert cloud.alive == []
        await assert_bill_and_ledger_agree(cloud, later)


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
