"""How soon a service works again whose predecessor was killed while its machine lives: it waits for nothing (I20)."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Final

import pytest

from runcomfy.domain.queued import EventKind
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.serving import Served, Services

pytestmark = pytest.mark.cloud(boot_time=30)

WITHIN: Final = timedelta(seconds=2)
"""Until a restarted service takes up its first job, without what the processor needs; a list is answered at
once here."""


async def claims(services: Services) -> list[datetime]:
    """Return when jobs were taken up, in order."""
    store = await services._onlooker.job_store()
    return [each.at for each in await store.events(limit=10_000) if each.kind is EventKind.CLAIMED]


def dying(services: Services, served: Served, at: str) -> asyncio.Event:
    """Let a service be dead from its next visit of a place on, after any number of others."""
    died = asyncio.Event()

    def visit(place: str) -> None:
        if place == at:
            services.processes.dead |= served.app.own.ids
            served.app.killed.set()
            died.set()

    served.app.visit = visit
    return died


@pytest.mark.parametrize(
    "place",
    ["after jobs.claim", "after store.add_machine", "after provider.launch_machine"],
    ids=["at work", "holding the lock of launches", "with a launch that nobody has heard of"],
)
async def test_a_restarted_service_waits_for_nothing_before_it_takes_up_a_job(
    services: Services, cloud: RunComfyEmulator, place: str
) -> None:
    """Wherever its predecessor has died: what the processor needs costs no time here, and every wait does."""
    await services.put(0, seconds=60)
    async with services.start(max_machines=2) as first:
        await services.when(lambda: bool(services.ran()), "the machine works")
        died = dying(services, first, place)
        for number in range(1, 40):
            await services.put(number, seconds=20)
        async with asyncio.timeout(300):
            await died.wait()
        await first.kill()
    assert cloud.billing, "its machine lives"
    before, began = len(await claims(services)), services.clock.now()
    async with services.start(max_machines=2):

        async def works() -> bool:
            return len(await claims(services)) > before

        await services.when(works, "a job is taken up", within=120)
        assert (await claims(services))[before] - began <= WITHIN
