"""A team's day with `comfyctl serve`: machines when they pay, none when not, budgets, deaths, two services at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import BudgetExceeded
from runcomfy.domain.machine import Purpose
from runcomfy.domain.queued import FLEET_SCOPE, QueueStatus
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.serving import Served, Services

pytestmark = pytest.mark.cloud(boot_time=120)
USERS = ("ann", "ben", "cat")


@pytest_asyncio.fixture
async def services(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    async with Services(cloud, cloud_settings, clock, tmp_path) as services:
        yield services


async def processing(services: Services) -> int:
    return (await services.queue.counts())[QueueStatus.PROCESSING]


async def done(services: Services) -> int:
    return (await services.queue.counts())[QueueStatus.DONE]


async def most_alive(cloud: RunComfyEmulator, until: asyncio.Task[None]) -> int:
    most = 0
    while not until.done():
        most = max(most, len(cloud.alive))
        await asyncio.sleep(5)
    return most


async def test_thirty_jobs_of_three_users_over_up_to_four_machines(services: Services, cloud: RunComfyEmulator) -> None:
    """Invariants I1, I2, I9, I11, I25: launched when that pays, shared, gone when not; the bill is what we say."""
    async with services.start(max_machines=4) as served:

        async def the_day() -> None:
            for number in range(30):
                await services.put(number, seconds=120, user=USERS[number % 3])
                await asyncio.sleep(20 if number % 10 else 200)
            await services.all_ended()

        ended = asyncio.create_task(the_day())
        watching = asyncio.create_task(most_alive(cloud, ended))
        await ended
        assert 2 <= await watching <= 4
        assert len(cloud.launched) < 12  # thirty jobs shared them
        await services.when(lambda: not cloud.alive, "what is not needed is gone", within=2 * 3_600)
        decisions = await services.books.decisions()
        assert Counter(d.action for d in decisions)["launch"] == len(cloud.launched)
        assert Counter(d.action for d in decisions)["stop"] == len(cloud.launched)
        assert all(d.why and d.by and d.expected_usd is not None for d in decisions)
        assert [d for d in decisions if d.action == "launch"][0].why in " ".join(served.said)
    assert await services.complaints() == []
    assert [record.outcome for record in services.ran()] == ["success"] * 30
    works = await services.books.works()
    assert Counter(work.user for work in works) == {"ann": 10, "ben": 10, "cat": 10}
    assert {work.outcome for work in works} == {"done"}
    assert abs(await services.spent() - cloud.total_usd) < Decimal("0.01")
    assert {machine.purpose for machine in await services.machines()} == {Purpose.POOL}


async def test_stopped_in_good_order_it_ends_its_machines_and_keeps_the_jobs(
    services: Services, cloud: RunComfyEmulator
) -> None:
    async with services.start(max_machines=2) as served:
        for number in range(6):
            await services.put(number, seconds=600)
        await services.when(lambda: _some(processing(services)), "jobs run")
        await served.end()
        assert cloud.alive == []
        counts = await services.queue.counts()
        assert (counts[QueueStatus.PROCESSING], counts[QueueStatus.FAILED]) == (0, 0)
    async with services.start(max_machines=2, once=True) as served:
        assert served.task is not None
        await served.task
        assert cloud.alive == []
    assert await services.complaints() == []


async def _some(count: asyncio.Future[int] | object) -> bool:
    return bool(await count)  # type: ignore[misc]
