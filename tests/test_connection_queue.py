"""`runcomfy.connect().queue`: jobs put into the queue from programs, followed and changed, async and sync."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runcomfy
from runcomfy.connection import Connection, Connector
from runcomfy.domain.exceptions import IdempotencyConflict, JobNotFound, NameTaken, WorkflowNotFound
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, QueueStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.in_thread import served


def connected(folder: Path, url: str) -> Connector:
    return runcomfy.connect(
        COMFYUI_AGENT_DATABASE=str(folder / "queue.db"),
        COMFYUI_AGENT_API_BASE_URL=url,
        COMFYUI_AGENT_JOBS_FINISHED=str(folder / "finished"),
        COMFYUI_AGENT_WAKE_INTERVAL_MS="500",
    )


@pytest.fixture
async def server() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as running:
        yield running


@pytest.fixture
async def comfy(server: ComfyUIEmulator, tmp_path: Path) -> AsyncIterator[Connection]:
    async with connected(tmp_path, server.url) as connection:
        yield connection


@asynccontextmanager
async def executor(comfy: Connection) -> AsyncIterator[None]:
    """Have the connection's own process work on the queue for the block."""
    stop = asyncio.Event()
    working = asyncio.create_task((await comfy.app.executor()).run(stop))
    try:
        yield
    finally:
        stop.set()
        await working


async def test_a_job_is_put_in_followed_and_its_files_are_where_it_said(
    comfy: Connection, picture: Path, tmp_path: Path
) -> None:
    async with executor(comfy):
        job = await comfy.queue.enqueue("image_invert", image=picture, out_file=tmp_path / "made.png", priority=7)
        assert (job.status, job.priority, job.workflow_id) == (QueueStatus.PENDING, 7, "image_invert")
        kinds = [event.kind async for event in comfy.queue.events(job)]
        done = await comfy.queue.wait(job, timeout=timedelta(minutes=1))
    assert kinds[0] is EventKind.ENQUEUED
    assert kinds[-1] is EventKind.DONE
    assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
    with Image.open(tmp_path / "made.png") as made:
        assert made.getpixel((0, 0)) == (55, 155, 205)
    assert [step.status async for step in comfy.queue.follow(job)] == [QueueStatus.DONE]
    assert len((await comfy.queue.show(job)).attempts) == 1


async def test_the_same_key_finds_the_same_job_and_another_body_is_an_error(comfy: Connection, picture: Path) -> None:
    job = await comfy.queue.enqueue("image_invert", image=picture, idempotency_key="order-17")
    again = await comfy.queue.enqueue("image_invert", image=picture, idempotency_key="order-17")
    assert again == job
    with pytest.raises(IdempotencyConflict):
        await comfy.queue.enqueue("image_invert", image=picture, seed=2, idempotency_key="order-17")
    assert (await comfy.queue.counts())[QueueStatus.PENDING] == 1


async def test_a_request_may_be_given_whole(comfy: Connection, picture: Path) -> None:
    job = await comfy.queue.enqueue(JobRequest("image_invert", image=str(picture), seed=3), priority=9)
    assert (job.status, job.priority, job.workflow_id) == (QueueStatus.PENDING, 9, "image_invert")
    assert job.request is not None
    assert job.request.seed == 3


async def test_what_could_never_run_is_not_accepted(comfy: Connection, picture: Path) -> None:
    with pytest.raises(WorkflowNotFound):
        await comfy.queue.enqueue("no-such-workflow", image=picture)
    await comfy.queue.enqueue("image_invert", image=picture, config_name="mine")
    with pytest.raises(NameTaken):
        await comfy.queue.enqueue("image_invert", image=picture, config_name="mine")
    for option in ("server_url", "server_type", "colour"):
        unknown: dict[str, Any] = {option: "x"}
        with pytest.raises(TypeError, match=option):
            await comfy.queue.enqueue("image_invert", image=picture, **unknown)
    with pytest.raises(TypeError, match="in the request"):
        await comfy.queue.enqueue(JobRequest("image_invert", image=str(picture)), seed=3)
    assert [job.config_name for job in await comfy.queue.list()] == ["mine"]


async def test_its_fate_can_be_changed(comfy: Connection, picture: Path) -> None:
    job = await comfy.queue.enqueue("image_invert", image=picture)
    assert (await comfy.queue.set_priority(job, 3)).priority == 3
    assert (await comfy.queue.cancel(job.config_name)).cancelled
    assert (await comfy.queue.wait(job)).cancelled
    assert (await comfy.queue.retry(job.uid)).status is QueueStatus.PENDING
    assert (await comfy.queue.pause("moving house")).message == "moving house"
    assert [pause.message for pause in await comfy.queue.resume()] == ["moving house"]
    with pytest.raises(TimeoutError):
        await comfy.queue.wait(job, timeout=timedelta(seconds=5))
    with pytest.raises(JobNotFound):
        await comfy.queue.job("nobody")


def test_the_sync_form_does_the_same(tmp_path: Path, picture: Path) -> None:
    with served(ComfyUIEmulator) as server, connected(tmp_path, server.emulator.url) as comfy:
        job = comfy.queue.enqueue("image_invert", image=picture)
        assert comfy.queue.enqueue("image_invert", image=picture, config_name="other").id == job.id + 1
        assert comfy.queue.set_priority(job, 3).priority == 3
        assert [each.id for each in comfy.queue.list()] == [job.id, job.id + 1]
        comfy.queue.cancel("other")
        assert [event.kind for event in comfy.queue.events("other")][-1] is EventKind.CANCELLED
        assert comfy.queue.wait("other").cancelled
        assert comfy.queue.retry("other").status is QueueStatus.PENDING
        assert comfy.queue.job(job.uid).priority == 3
