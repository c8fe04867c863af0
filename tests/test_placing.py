"""Where jobs run: on the dev server, or on a machine of their own that is gone when they leave it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from runcomfy.application.placing import Place
from runcomfy.domain.exceptions import MachineLost, StoreUnavailable
from runcomfy.domain.job import JobId
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies
from runcomfy.testing.programs import start_dev as start


def at(program: Program, *, server_type: str | None = None, job: str = "job-1") -> Any:
    steps: list[str] = []
    return program.placer.at(
        server_url=None, server_type=server_type, job_id=JobId(job), show=lambda _: None, step=steps.append
    )


async def test_a_job_uses_the_dev_server_and_leaves_it_running(cloud: RunComfyEmulator, program: Program) -> None:
    machine, _, _ = await start(program)
    async with at(program) as place:
        assert place.kind == "dev server"
        assert [use.job_id for use in await program.store.uses([machine.id])] == ["job-1"]
        await asyncio.sleep(120)
    assert place.bill[0].seconds >= 120
    assert await program.store.uses([machine.id]) == []
    assert cloud.billing == [machine.server_id]
    await program.dev.shutdown()


def frugal(programs: Programs) -> Programs:
    """Programs of somebody who has CONJURE_AUTO_SHUTDOWN on, on the same computer."""
    app = replace(programs.settings.app, auto_shutdown=True)
    saving = Programs(programs.cloud, replace(programs.settings, app=app), programs.clock)
    saving.processes = programs.processes
    return saving


async def test_the_last_job_on_a_dev_server_stops_it_if_that_is_wished(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    await start(program)
    async with frugal(programs).start() as saving:
        async with at(program):
            async with at(saving, job="job-2") as place:
                assert place.kind == "dev server"
            assert "CONJURE_AUTO_SHUTDOWN is on: another job uses it" in saving.said[-1]
            assert cloud.billing == cloud.launched
        assert cloud.billing == cloud.launched
        async with at(saving):
            pass
        assert cloud.alive == []
        assert await discrepancies(cloud, saving) == []


async def test_a_dev_server_is_not_stopped_while_the_books_cannot_say_who_else_uses_it(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    locked = False

    def visit(place: str) -> None:
        if locked and place == "before store.uses":
            raise StoreUnavailable("the database is locked")

    await start(program)
    async with frugal(programs).start(visit=visit) as saving:
        async with at(saving):
            locked = True
        assert "another job uses it" in saving.said[-1]
    assert cloud.billing == cloud.launched
    await program.dev.shutdown()


async def test_a_job_without_a_dev_server_gets_a_machine_of_its_own_that_is_gone_when_it_leaves(
    cloud: RunComfyEmulator, program: Program
) -> None:
    async with at(program, server_type="large") as place:
        assert place.kind == "own machine"
        assert cloud.billing == cloud.launched
    assert cloud.alive == []
    assert await discrepancies(cloud, program) == []
    assert abs(place.cost_usd - cloud.total_usd) < Decimal("0.01")


async def test_the_lease_of_a_long_job_is_renewed_and_never_far_ahead(
    cloud: RunComfyEmulator, program: Program
) -> None:
    """I5: whenever the program dies, its machine is paid at most one lease ahead."""
    async with at(program):
        for _ in range(60):
            await asyncio.sleep(60)
            machine = cloud.machines[cloud.launched[0]]
            assert machine.bills
            assert machine.stops_at is not None
            assert timedelta(0) < machine.stops_at - cloud.now() <= timedelta(minutes=10, seconds=1)
    assert cloud.alive == []
    assert await discrepancies(cloud, program) == []


@pytest.mark.fault(24)
async def test_a_lease_whose_renewal_fails_for_a_while_is_renewed_in_time(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_call("POST servers/*/update-estimated-duration", status=500, times=4)
    cloud.next_call("POST servers/*/update-estimated-duration", works=False)
    async with at(program):
        await asyncio.sleep(1500)
        assert cloud.billing
    assert cloud.alive == []


@pytest.mark.fault(23)
async def test_the_machine_of_a_program_that_is_gone_for_ever_stops_within_its_lease(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program:
        entered = asyncio.Event()

        async def job() -> None:
            async with at(program):
                entered.set()
                await asyncio.sleep(36_000)

        task = asyncio.create_task(job())
        await entered.wait()
        await asyncio.sleep(1234)
        await program.kill(task)
    assert cloud.billing
    await asyncio.sleep(601)
    assert cloud.billing == []


@pytest.mark.fault(13)
async def test_a_lease_is_renewed_also_if_the_cloud_does_not_say_when_a_machine_stops(
    cloud: RunComfyEmulator, program: Program
) -> None:
    async with at(program):
        machine = cloud.machines[cloud.launched[0]]
        machine.traits.fields = {"estimated_stopping_at": None}
        await asyncio.sleep(1500)
        assert machine.bills
        machine.traits.fields = {}


async def test_a_job_that_fails_or_cannot_even_say_that_it_ends_leaves_no_machine(
    cloud: RunComfyEmulator, program: Program
) -> None:
    def broken(_: object) -> None:
        if cloud.billing:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        async with program.placer.at(
            server_url=None, server_type=None, job_id=JobId("job-1"), show=broken, step=lambda _: None
        ):
            pass
    assert cloud.alive == []


@pytest.mark.parametrize("after", [0, 0.01, 1.5, 3, 30, 179, 181, 185.02, 186, 250, 800])
async def test_a_job_that_is_cancelled_at_any_moment_leaves_no_machine(
    cloud: RunComfyEmulator, program: Program, after: float
) -> None:
    async def job() -> None:
        async with at(program) as place:
            assert isinstance(place, Place)
            await asyncio.sleep(600)

    task = asyncio.create_task(job())
    await asyncio.wait({task}, timeout=after)
    task.cancel()
    await asyncio.wait({task})
    assert cloud.alive == []
    assert await program.books.rows() == []
    assert program.books.held == {}
    assert await discrepancies(cloud, program) == []


async def test_a_machine_of_a_jobs_own_that_vanishes_is_a_lost_machine(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(vanishes_after=60)

    async def job() -> None:
        async with at(program) as place:
            await asyncio.sleep(90)
            await place.server.probe(fresh=True)

    with pytest.raises(MachineLost):
        await job()
    assert cloud.alive == []


@pytest.mark.parametrize(("word", "why"), [("Error", "RunComfy says 'Error' of it"), ("Deleting", "stopping it")])
async def test_a_job_whose_machine_is_said_to_fail_or_to_stop_is_broken_off_and_the_machine_ended(
    cloud: RunComfyEmulator, program: Program, word: str, why: str
) -> None:
    async def job() -> None:
        async with at(program):
            cloud.machines[cloud.launched[0]].traits.status = word
            await asyncio.sleep(600)

    task = asyncio.create_task(job())
    await asyncio.sleep(300)
    cloud.machines[cloud.launched[0]].traits.status = None
    with pytest.raises(MachineLost, match=why):
        await task
    assert cloud.alive == []
    assert await discrepancies(cloud, program) == []


async def test_a_job_runs_on_while_nobody_can_be_asked_whether_its_machine_is_there(
    cloud: RunComfyEmulator, program: Program
) -> None:
    async with at(program):
        cloud.next_call("GET servers/*", status=500, times=None, lasts=timedelta(minutes=2))
        await asyncio.sleep(180)
        assert cloud.billing == cloud.launched
    assert any(call.status == 500 for call in cloud.calls)
    assert cloud.alive == []
    assert await discrepancies(cloud, program) == []
