"""Serving a queue without a pool, on one ComfyUI; and what a folder of job files has to do with either."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.application.service import ServeOptions
from runcomfy.domain.exceptions import FolderWatched, JobBusy, WorkflowFailed
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import QueueStatus
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.queue_programs import failing
from runcomfy.testing.serving import Services

pytestmark = [pytest.mark.cloud(boot_time=30), pytest.mark.usefixtures("picture")]
ONCE = ServeOptions(pool=False, guard=False, once=True)


@pytest_asyncio.fixture
async def services(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, comfyui: ComfyUIEmulator, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    async with Services(cloud, cloud_settings, clock, tmp_path, where="server", api_base_url=comfyui.url) as services:
        yield services


@pytest_asyncio.fixture
async def rented(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    async with Services(cloud, cloud_settings, clock, tmp_path) as services:
        yield services


def drop(services: Services) -> None:
    """Drop a job file into the folder that is watched."""
    folder = Path(services.queue_settings.jobs_processing) / "image"
    folder.mkdir(parents=True, exist_ok=True)
    text = "job_type: T2I\nworkflow_id: image_invert\ninputs: {image: picture.png}\n"
    text += "outputs: {file_path: jobs/finished/image/inverted.png}\n"
    (folder / "T2I_1_1_invert.yaml").write_text(text, encoding="utf-8")


async def count(services: Services, status: QueueStatus) -> int:
    return (await services.queue.counts())[status]


async def any_is(services: Services, status: QueueStatus) -> bool:
    return await count(services, status) > 0


# -- on one ComfyUI ------------------------------------------------------------------------------------------


async def test_once_works_off_the_folder_and_the_queue_and_leaves(services: Services, cloud: RunComfyEmulator) -> None:
    drop(services)
    await services.put(1)
    async with services.start(works=False) as served:
        assert await served.begin(ServeOptions(pool=False, guard=False, once=True, monitor=True))
        assert await count(services, QueueStatus.DONE) == 2
    assert cloud.calls == []


async def test_once_without_the_folder_leaves_its_files_alone(services: Services) -> None:
    drop(services)
    await services.put(1)
    async with services.start(works=False) as served:
        assert await served.begin(ONCE)
    assert await services.queue.counts() == {**dict.fromkeys(QueueStatus, 0), QueueStatus.DONE: 1}


async def test_once_that_is_told_to_stop_does_not_call_the_rest_left_behind(services: Services) -> None:
    await services.queue.enqueue(JobRequest(failing()), retry_limit=0)
    for number in range(9):
        await services.put(number, seconds=60)
    async with services.start(works=False) as served:
        task = served.begin(ONCE)
        await services.when(lambda: any_is(services, QueueStatus.FAILED), "one has failed")
        await served.end()
        assert task.result()
    assert await any_is(services, QueueStatus.PENDING)


async def test_once_says_once_that_jobs_failed(services: Services) -> None:
    await services.queue.enqueue(JobRequest(failing()), retry_limit=0)
    async with services.start(works=False) as served:
        task, served.task = served.begin(ONCE), None
        with pytest.raises(WorkflowFailed, match="1 job failed in this run"):
            await task
        assert "1 job failed in this run" not in served.said  # the error says it


async def test_once_tells_of_failures_too_where_it_ends_for_another_reason(services: Services) -> None:
    await services.queue.enqueue(JobRequest(failing()), retry_limit=0)
    await services.put(1, seconds=60)
    async with services.start(works=False) as served:
        task, served.task = served.begin(ONCE), None
        await services.when(lambda: any_is(services, QueueStatus.FAILED), "one has failed")
        await services.put(2)
        await services.queue.pause("lunch")
        with pytest.raises(JobBusy, match="left undone, paused: lunch"):
            await task
        assert "1 job failed in this run" in served.said


async def test_files_that_are_dropped_while_it_serves_are_worked_off_until_it_is_told_to_stop(
    services: Services,
) -> None:
    async with services.start(works=False) as served:
        task = served.begin(ServeOptions(pool=False, guard=False, monitor=True))
        await asyncio.sleep(60)
        drop(services)
        await services.when(lambda: any_is(services, QueueStatus.DONE), "the file's job is done", within=300)
        assert not task.done()


async def test_a_folder_that_another_process_watches_is_said_before_anything_is_begun(services: Services) -> None:
    watching = ServeOptions(pool=False, guard=False, monitor=True)
    await services.put(1, seconds=300)
    await services.queue.pause("not yet")
    async with services.start(works=False) as first, services.start(works=False) as second:
        first.begin(watching)
        await asyncio.sleep(5)
        task, second.task = second.begin(watching), None
        with pytest.raises(FolderWatched):
            await task
        assert len(await services.queue.workers()) == 1


# -- over a pool -------------------------------------------------------------------------------------------------


async def test_once_over_a_pool_takes_the_folder_up_first(rented: Services, cloud: RunComfyEmulator) -> None:
    drop(rented)
    async with rented.start(works=False) as served:
        assert await served.begin(ServeOptions(guard=False, once=True, monitor=True))
        assert await count(rented, QueueStatus.DONE) == 1
    assert cloud.alive == []


async def test_files_that_are_dropped_while_a_pool_serves_are_taken_up(
    rented: Services, cloud: RunComfyEmulator
) -> None:
    async with rented.start(works=False) as served:
        served.begin(ServeOptions(guard=False, monitor=True))
        await asyncio.sleep(30)
        drop(rented)
        await rented.when(lambda: any_is(rented, QueueStatus.DONE), "the file's job is done", within=900)
    assert cloud.alive == []


async def test_once_over_a_pool_tells_of_failures_too_where_it_ends_for_another_reason(
    rented: Services, cloud: RunComfyEmulator
) -> None:
    await rented.queue.enqueue(JobRequest(failing()), retry_limit=0)
    async with rented.start(once=True) as served:
        task, served.task = served.task, None
        assert task is not None
        await rented.put(1, seconds=60)
        await rented.when(lambda: any_is(rented, QueueStatus.FAILED), "one has failed")
        await rented.put(2)
        await rented.queue.pause("lunch")
        with pytest.raises(JobBusy, match="left undone, paused: lunch"):
            await task
        assert "1 job failed in this run" in served.said
    assert cloud.alive == []
