"""Jobs on the machines of a pool, at moments that hardly ever come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.application.placing import JobFacts, Place
from runcomfy.application.pool_station import PoolStation
from runcomfy.domain.exceptions import MachineLost, ServerUnreachable
from runcomfy.domain.job import JobId
from runcomfy.domain.settings import ComfySettings, PoolSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.standing_pool import StandingPool

FACTS = JobFacts("portrait", 1)


@pytest_asyncio.fixture
async def client(clock: LoopClock) -> AsyncIterator[ComfyUIWorkflowClient]:
    async with ComfyUIEmulator() as comfyui, ComfyUIWorkflowClient(comfyui.url, ComfySettings(), clock=clock) as client:
        yield client


@pytest.fixture
def pool(clock: LoopClock) -> StandingPool:
    return StandingPool(clock)


def station_of(pool: StandingPool, clock: LoopClock) -> PoolStation:
    return PoolStation(pool, PoolSettings(), clock=clock)


def at(station: PoolStation, job: str = "job-1") -> AbstractAsyncContextManager[Place]:
    def nothing(_: Any) -> None: ...

    return station.at(job_id=JobId(job), show=nothing, step=nothing, on_bill=nothing, facts=FACTS)


async def test_a_server_that_fell_silent_on_a_machine_that_was_lost_is_told_as_a_lost_machine(
    pool: StandingPool, client: ComfyUIWorkflowClient, clock: LoopClock
) -> None:
    machine = pool.add(client)

    async def job() -> None:
        async with at(station_of(pool, clock)):
            machine.epoch += 1  # it answers again, and knows nothing of the job
            raise ServerUnreachable("no answer")

    with pytest.raises(MachineLost, match="it was not Ready for a while"):
        await job()
    [(_, outcome, error)] = pool.ended
    assert (outcome, type(error)) == ("failed", MachineLost)
