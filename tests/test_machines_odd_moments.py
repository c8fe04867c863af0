"""Machines of one program or several, at moments that hardly ever come: what the books and the bill say then."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from runcomfy.application.doctor import examine_cloud
from runcomfy.application.ending import server_id_of
from runcomfy.application.fleet_offers import FleetOffers
from runcomfy.application.machine_rows import machine_rows
from runcomfy.domain.exceptions import ProviderBusy, RunComfyError, StopUnconfirmed, ValueInvalid
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineState, Purpose
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, assert_bill_and_ledger_agree, end, start_dev, states

no_comfyui = pytest.mark.cloud(comfyui=False)

# -- launching ---------------------------------------------------------------------------------------------


@no_comfyui
async def test_a_launch_that_a_living_process_could_not_bring_to_an_end_is_left_to_it(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    async with programs.start() as other:
        theirs = other.intent()
        await other.books.add_intent(theirs)
        machine = await program.launch()
        row = await program.books.latest(theirs.id)
        assert row is not None
        assert (row.state, row.owner_id) == (MachineState.REQUESTED, other.owner.id)
        assert not any("was never answered" in sentence for sentence in program.said)
        assert cloud.launched == [machine.server_id]
        await end(program, machine)


@no_comfyui
async def test_a_machine_that_was_left_to_itself_meanwhile_is_taken_back_to_be_ended(
    cloud: RunComfyEmulator, program: Program
) -> None:
    intent = program.intent(purpose=Purpose.DEV)
    machine, _ = await program.ready(intent)
    until = program.books.clock.now() + timedelta(hours=1)
    await program.books.hand_over(machine, kept_until=until, note="it is up")
    ended = await program.machines.settle(intent, reason="its start was broken off after all")
    assert ended is not None
    assert ended.state is MachineState.STOPPED
    assert cloud.alive == []
    await assert_bill_and_ledger_agree(cloud, program)


@no_comfyui
async def test_a_launch_that_is_broken_off_and_started_nothing_leaves_nothing_to_end(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers", reply="lost", works=False)
    intent = program.intent()
    task = asyncio.create_task(program.launch(intent))
    await asyncio.sleep(5)
    task.cancel()
    await asyncio.wait({task})
    assert await program.machines.settle(intent, reason="it was broken off") is None
    assert await states(program) == ["never"]
    assert cloud.launched == []


# -- ending ------------------------------------------------------------------------------------------------


@no_comfyui
async def test_a_machine_without_an_id_cannot_be_asked_for_at_the_provider(
    cloud: RunComfyEmulator, program: Program
) -> None:
    with pytest.raises(RunComfyError, match="was never answered and has no id"):
        server_id_of(program.intent())
    assert cloud.calls == []


@no_comfyui
async def test_a_stop_that_never_left_is_sent_again_and_billed_to_the_one_that_did(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    refusals = 2

    def visit(place: str) -> None:
        nonlocal refusals
        if place == "before provider.stop_machine" and refusals:
            refusals -= 1
            raise ProviderBusy("no turn is free")

    async with programs.start(visit=visit) as program:
        machine, _ = await program.ready()
        await asyncio.sleep(60)
        ended = await end(program, machine)
        assert refusals == 0
        assert ended.state is MachineState.STOPPED
        assert any("failed for now (provider-busy)" in sentence for sentence in program.said)
        await assert_bill_and_ledger_agree(cloud, program)


@no_comfyui
async def test_a_stop_that_was_accepted_before_the_token_was_revoked_is_told_as_accepted(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(delete_takes=600)
    machine, _ = await program.ready()
    cloud.next_call("DELETE servers/*", status=401, works=False, skip=1, times=None)
    cloud.next_call("GET servers*", status=401, skip=0, times=None)
    with pytest.raises(StopUnconfirmed, match="RunComfy had accepted its stop, but whether it is gone cannot be seen"):
        await end(program, machine)
    cloud.behave()
    row = await program.books.latest(machine.id)
    assert row is not None
    assert row.stop_accepted_at is not None
    await asyncio.sleep(700)
    await end(program, row)
    await assert_bill_and_ledger_agree(cloud, program)


@no_comfyui
async def test_two_who_see_that_the_provider_stops_a_machine_write_its_end_once(
    cloud: RunComfyEmulator, program: Program
) -> None:
    intent = program.intent()
    booting = await program.launch(intent)
    assert await program.machines.stops_unasked(booting) == booting  # nothing bills yet
    assert await program.store.ledger() == []
    machine, _ = await program.machines.wait_ready(booting)
    await asyncio.sleep(120)
    cloud.end_by_hand(cloud.machines[str(machine.server_id)])
    seen = await program.machines.stops_unasked(machine)
    assert seen.stop_accepted_at is not None
    await asyncio.sleep(30)
    assert await program.machines.stops_unasked(seen) == seen
    assert len(await program.store.ledger()) == 1
    await end(program, seen)
    await assert_bill_and_ledger_agree(cloud, program)


# -- what people are shown ---------------------------------------------------------------------------------


@no_comfyui
async def test_people_see_which_jobs_are_at_a_machine_and_why_one_takes_no_more(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _ = await program.ready()
    await program.books.change(machine, note="drained", draining="nothing is to do")
    [row] = await machine_rows(program.machines, await program.machines.provider.list_machines())
    assert (row.shown, row.jobs) == ("draining: nothing is to do", {})
    await end(program, machine)


async def test_a_job_on_the_dev_server_is_shown_at_it_and_who_only_looks_is_no_job(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _, _ = await start_dev(program)
    async with program.placer.at(
        server_url=None, server_type=None, job_id=JobId("job-1"), show=lambda _: None, step=lambda _: None
    ):
        [row] = await machine_rows(program.machines, await program.machines.provider.list_machines())
        assert (row.shown, dict(row.jobs), row.busy.monitored) == ("busy", {"job-1": ""}, False)
    async with program.dev.monitored(machine):
        [row] = await machine_rows(program.machines, await program.machines.provider.list_machines())
        assert (dict(row.jobs), row.busy.monitored) == ({}, True)
        assert row.shown.startswith("idle")
        assert row.shown.endswith(", monitored")
    await program.dev.shutdown()


@no_comfyui
async def test_a_type_without_a_price_is_nothing_the_fleet_may_choose(program: Program) -> None:
    machines = program.machines
    with pytest.raises(ValueInvalid, match="no price is known for the machine type 'huge'") as caught:
        FleetOffers(
            machines.store, machines.settings, machines.clock, provider=machines.provider.name, types=("medium", "huge")
        )
    assert "medium" in str(caught.value.hint)


# -- the doctor --------------------------------------------------------------------------------------------


async def answers() -> None:
    """The host answers."""


@no_comfyui
async def test_the_doctor_blames_the_address_when_the_account_is_elsewhere(
    cloud: RunComfyEmulator, program: Program
) -> None:
    elsewhere = {"Location": "https://elsewhere.invalid/"}
    cloud.next_call("GET workflows*", times=None, status=302, headers=elsewhere)
    found = await examine_cloud(program.machines.settings, program.machines.provider, answers)
    assert [(one.layer, one.ok, one.skipped) for one in found] == [
        ("host and path", True, False),
        ("host and path", False, False),
        ("workflow version", False, True),
    ]
    assert "elsewhere.invalid" in found[1].detail
