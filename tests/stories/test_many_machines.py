"""A dozen machines, each with ten jobs, in one controller: the small sister of `python -m benchmarks fleet`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, QueueStatus
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.light_comfyui import LightClient, LightComfyUIs, graph
from runcomfy.testing.serving import Services

MACHINES, JOBS, WORKFLOWS = 12, 120, 5
LEASE = timedelta(minutes=4)


@pytest.fixture
def servers(clock: LoopClock) -> LightComfyUIs:
    return LightComfyUIs(clock)


@pytest_asyncio.fixture
async def crowd(servers: LightComfyUIs, clock: LoopClock) -> AsyncIterator[RunComfyEmulator]:
    """A cloud whose machines have servers that cost nearly nothing."""
    async with RunComfyEmulator(
        now=clock.now, boot_time=60, comfyui_factory=servers.factory, balance_usd=None
    ) as cloud:
        yield cloud
        assert cloud.billing == []


@pytest_asyncio.fixture
async def services(
    crowd: RunComfyEmulator, servers: LightComfyUIs, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    account = CloudSettings(
        base_url=crowd.url,
        user_id=crowd.user_id,
        tokens=(Secret(crowd.token),),
        workflow_version_id=str(crowd.workflows[0]["version_id"]),
        run_lease=LEASE,
    )
    async with Services(crowd, account, clock, tmp_path) as services:
        services.make_client = lambda url: LightClient(servers, url.reveal())
        yield services


async def test_everything_is_computed_once_and_no_machine_runs_out_of_time(
    services: Services, servers: LightComfyUIs, crowd: RunComfyEmulator
) -> None:
    """Invariants I1, I5, I9, I11: paid ahead in time, lease after lease; gone at the end; the bill is what we say."""
    new = [NewJob(JobRequest(graph(60.0, n)), f"workflow-{n % WORKFLOWS}", user=f"user-{n % 3}") for n in range(JOBS)]
    async with services.start(max_machines=MACHINES, min_machines=MACHINES) as served:
        await services.queue.enqueue_many(new)
        await services.all_ended()
        assert len(crowd.alive) == MACHINES
        await served.end()
    assert crowd.alive == []
    machines = crowd.machines.values()
    assert len(machines) == MACHINES
    for machine in machines:
        assert machine.billed_until is not None
        assert machine.stops_at is not None
        assert machine.ready_at is not None
        assert machine.billed_until < machine.stops_at  # we ended it; it did not run out of time
        assert machine.billed_until - machine.ready_at > 2 * LEASE
    assert (await services.queue.counts())[QueueStatus.DONE] == JOBS
    assert sorted(servers.ran.values()) == [1] * JOBS
    assert await services.complaints() == []
    works = [work for work in await services.books.works() if work.outcome == "done"]
    assert len({work.job_id for work in works}) == len(works) == JOBS
    assert {work.machine_id for work in works} == {machine.id for machine in await services.machines()}
