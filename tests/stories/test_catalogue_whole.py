"""Faults of the catalogue seen from end to end: a service, its machines, and what becomes of the jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.application import prompting
from runcomfy.domain.money import seconds_between
from runcomfy.domain.queued import QueueStatus
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=30)
LOOK = 22
"""Seconds between two looks at the machines, as these services look, and what one takes."""


def comfyui_of(cloud: RunComfyEmulator, number: int = 0) -> ComfyUIEmulator:
    server = cloud.machines[cloud.launched[number]].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


# -- 39, 40: a prompt that stands still and cannot be interrupted -----------------------------------------------


@pytest.mark.fault(39)
@pytest.mark.fault(40)
async def test_a_machine_whose_prompt_neither_moves_nor_obeys_is_ended_and_the_job_done_by_another(
    services: Services, cloud: RunComfyEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I12: no second run beside the first, whose end nobody can prove before its machine is gone."""
    monkeypatch.setattr(prompting, "OBEYS_WITHIN", timedelta(seconds=60))  # five minutes are only more of the same
    async with services.start(max_machines=1, keep_alive=timedelta(minutes=2)) as served:
        await services.put(1, seconds=60)
        await services.when(lambda: len(services.ran()) == 1, "the prompt computes")
        first = comfyui_of(cloud)
        first.faults.ignore_interrupts = True
        first.stall_node("1", at=0.5)
        await services.all_ended(within=1_800)
        [job] = await services.queue.list()
        assert job.status is QueueStatus.DONE
        assert len(cloud.launched) == 2
        stuck, done = services.ran()
        gone = cloud.books[cloud.launched[0]].ended_at
        assert gone is not None
        assert gone.timestamp() <= done.started
        assert stuck.prompt_id != done.prompt_id
        assert any("has not ended within 60 s" in sentence for sentence in served.said)
    assert await services.complaints() == []


# -- 70: a provider whose clock differs --------------------------------------------------------------------------


@pytest_asyncio.fixture(
    params=[pytest.param(-5, id="behind"), pytest.param(5, id="ahead", marks=pytest.mark.campaign)],
)
async def off(
    request: pytest.FixtureRequest, clock: LoopClock, cloud_settings: CloudSettings, tmp_path: Path
) -> AsyncIterator[tuple[RunComfyEmulator, Services]]:
    """A cloud whose clock is five minutes off, and services that rent there."""
    minutes = timedelta(minutes=request.param)
    async with RunComfyEmulator(now=lambda: clock.now() + minutes, boot_time=180) as cloud:
        settings = replace(cloud_settings, base_url=cloud.url)
        async with Services(cloud, settings, clock, tmp_path) as services:
            yield cloud, services
        assert cloud.billing == []


@pytest.mark.fault(70)
async def test_a_provider_whose_clock_is_minutes_off_changes_nothing_but_the_stamps(
    off: tuple[RunComfyEmulator, Services],
) -> None:
    """I9, I21: ages are measured here: no machine is ended early or late, and the books are a look late at most."""
    cloud, services = off
    keep = timedelta(minutes=2)
    async with services.start(max_machines=1, keep_alive=keep):
        for number in range(2):
            await services.put(number, seconds=400)  # beyond the first lease, so that it is prolonged
        began = asyncio.get_running_loop().time()
        await services.all_ended(within=180 + 2 * 400 + 120)
        await services.when(lambda: not cloud.billing, "the machine is gone", within=keep.total_seconds() + 90)
        took = asyncio.get_running_loop().time() - began
    assert {job.status for job in await services.queue.list()} == {QueueStatus.DONE}
    assert len(cloud.launched) == 1
    assert len(services.ran()) == 2
    bill = cloud.books[cloud.launched[0]]
    assert 800 <= bill.seconds <= took
    ours = sum((seconds_between(e.started_at, e.ended_at) for e in await services.books.ledger()), Decimal(0))
    assert abs(ours - bill.seconds) <= LOOK


# -- 73: a GPU that slows down -----------------------------------------------------------------------------------


@pytest.mark.fault(73)
async def test_a_job_on_a_machine_that_has_become_five_times_slower_is_waited_for(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """I8: it moves, so it is not ended, interrupted or run again, though its like took a fifth of the time."""
    async with services.start(max_machines=1, keep_alive=timedelta(minutes=5)) as served:
        for number in range(4):
            await services.put(number, seconds=60)
        await services.all_ended(within=1_200)
        [machine] = cloud.alive
        await services.put(7, seconds=300)
        await services.all_ended(within=600)
        assert cloud.alive == [machine]
        assert [run.outcome for run in services.ran()] == ["success"] * 5
        jobs = await services.queue.list()
        assert {(job.status, job.run_count, job.retries_attempted) for job in jobs} == {(QueueStatus.DONE, 1, 0)}
        assert not any("slow" in sentence for sentence in served.said)
    assert await services.complaints() == []


# -- 74: a portal that says 200 to everything --------------------------------------------------------------------

PORTAL = "<html><title>Welcome to the hotel</title></html>"


@pytest.mark.fault(74)
@pytest.mark.parametrize(
    "body",
    [PORTAL, *(pytest.param(body, marks=pytest.mark.campaign) for body in ({}, {"servers": None}, {"status": "ok"}))],
    ids=["page", "{}", "null", "ok"],
)
async def test_while_a_portal_answers_in_the_clouds_place_nothing_is_decided(
    services: Services, cloud: RunComfyEmulator, body: Any
) -> None:
    """I4, I7: no machine is taken for gone, none is launched twice, no stop is believed; then it goes on as before."""
    async with services.start(max_machines=2, keep_alive=timedelta(minutes=2)):
        await services.put(1, seconds=200)
        await services.when(lambda: len(services.ran()) == 1, "the prompt computes")
        [machine] = cloud.alive
        cloud.next_call("*", status=200, body=body, works=False, times=None, lasts=150)
        await asyncio.sleep(150)
        known = await services.machines(open_only=True)
        assert [row.server_id for row in known] == [machine]
        assert cloud.alive == [machine]
        await services.all_ended(within=600)
        [job] = await services.queue.list()
        assert (job.status, job.run_count) == (QueueStatus.DONE, 1)
        assert cloud.launched == [machine]
    assert cloud.alive == []
    assert await services.complaints() == []
