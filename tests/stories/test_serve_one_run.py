"""
A job whose machine turns doubtful under it: what computes there is gone on with, or seen ended, before it runs again.

The machines' own run logs are the oracle: no two runs of a job overlap, whatever the cloud says of its machines (I12).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from runcomfy.domain.queued import QueuedJob, QueueStatus
from runcomfy.testing.emulators.comfyui.process import RunRecord
from runcomfy.testing.emulators.runcomfy import EmulatedMachine, RunComfyEmulator
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=30)


def runs(services: Services, number: int) -> list[RunRecord]:
    """How often, and when, the cloud's machines have computed the job of this number."""
    found = [record for record in services.ran() if f"job-{number}" in str(record.graph)]
    return sorted(found, key=lambda record: record.started)


def overlap(found: list[RunRecord]) -> bool:
    """Whether two of these runs went on at the same time."""
    return any(first.ended is None or second.started < first.ended for first, second in pairwise(found))


def is_called(machine: EmulatedMachine, word: str | None) -> None:
    """Let the cloud have another word for a machine's state."""
    machine.traits = replace(machine.traits, status=word)


async def computing(services: Services, cloud: RunComfyEmulator) -> tuple[QueuedJob, EmulatedMachine]:
    """Put a job in and return it with the one machine that computes it."""
    job = await services.put(0, seconds=1_200)
    await services.when(lambda: bool(runs(services, 0)), "its machine computes")
    return job, cloud.machines[cloud.launched[0]]


async def status(services: Services) -> QueueStatus:
    """Return where the job stands."""
    (job,) = await services.queue.list()
    return job.status


@pytest.mark.fault(16)
@pytest.mark.invariant("I12")
async def test_a_prompt_that_outlived_a_moment_of_starting_is_gone_on_with(
    services: Services, cloud: RunComfyEmulator
) -> None:
    async with services.start(max_machines=2):
        _, machine = await computing(services, cloud)
        is_called(machine, "Starting")

        async def put_back() -> bool:
            return await status(services) is QueueStatus.PENDING

        await services.when(put_back, "the job is put back", within=60)
        await services.put(1, seconds=10)  # so that there is another machine it might begin on
        await services.when(lambda: bool(runs(services, 1)), "the other machine works", within=300)
        is_called(machine, None)
        await services.all_ended(within=3_600)
    assert {job.status for job in await services.queue.list()} == {QueueStatus.DONE}
    assert len(runs(services, 0)) == 1


@pytest.mark.fault(16)
@pytest.mark.invariant("I12")
async def test_a_job_waits_until_the_machine_is_seen_gone_that_was_given_up(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """The cloud calls it broken and takes a while to end it; its ComfyUI computes all along."""
    async with services.start(max_machines=2):
        _, machine = await computing(services, cloud)
        machine.traits = replace(machine.traits, status="Error", ignores_delete=True)
        await services.when(lambda: any(call.method == "DELETE" for call in cloud.calls), "it is to be ended")
        await services.put(1, seconds=10)
        await services.when(lambda: bool(runs(services, 1)), "another machine works", within=250)
        assert len(runs(services, 0)) == 1
        machine.traits = replace(machine.traits, ignores_delete=False)
        await services.all_ended(within=3_600)
    assert {job.status for job in await services.queue.list()} == {QueueStatus.DONE}
    assert len(runs(services, 0)) == 2
    assert not overlap(runs(services, 0))
