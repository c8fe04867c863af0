"""Workers under whom the database or the disk refuses: nothing is sent unwritten, and no result is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.domain.exceptions import DiskFull
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import Phase, QueueStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.worker_stories import is_in, picture, pictures, ran, when
from runcomfy.testing.workers import Worker, Workers

PATIENCE = timedelta(milliseconds=20)
"""How long a statement waits for a lock, in real time."""


@contextmanager
def locked(workers: Workers) -> Iterator[None]:
    """Hold the database's write lock, as another program may."""
    with closing(sqlite3.connect(workers.queue_settings.database.reveal(), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.fault(55)
async def test_a_database_that_is_locked_for_a_while_delays_the_commit_and_nothing_else(
    workers: Workers, comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    """Invariant I23."""
    async with workers.start(busy_timeout=PATIENCE) as worker:
        job, next_one = await worker.queue.enqueue_many([JobRequest(picture(10, name=n)) for n in (1, 2)])
        await when(lambda: is_in(worker, job, Phase.SUBMITTED), "the prompt is on the server")
        with locked(workers):
            await asyncio.sleep(45)
            assert ran(comfyui) == ["success"]
            assert pictures(tmp_path) == []
        assert (await worker.queue.wait(job, timeout=timedelta(seconds=30))).run_count == 1
        assert (await worker.queue.wait(next_one)).status is QueueStatus.DONE
        refusals = [sentence for sentence in worker.said if "nothing new is begun" in sentence]
        assert len(refusals) == 1
        assert "the database works again" in worker.said
    assert ran(comfyui) == ["success"] * 2
    assert len(pictures(tmp_path)) == 2


@pytest.mark.fault(55)
async def test_a_result_that_could_not_be_committed_within_the_lease_is_fetched_by_the_next_owner(
    workers: Workers, comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    async with workers.start(busy_timeout=PATIENCE) as worker:
        job = await worker.queue.enqueue(JobRequest(picture(10)))
        await when(lambda: is_in(worker, job, Phase.SUBMITTED), "the prompt is on the server")
        with locked(workers):
            await asyncio.sleep(300)
            assert not worker.executor._runs
            assert pictures(tmp_path) == []
        async with workers.start() as other:
            done = await other.queue.wait(job)
            assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
    assert ran(comfyui) == ["success"]
    assert len(pictures(tmp_path)) == 1


@pytest.mark.fault(55)
async def test_nothing_is_sent_before_its_id_could_be_written_down(workers: Workers, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("GET", "/object_info/*", Fault.late(3), times=2)
    async with workers.start(busy_timeout=PATIENCE) as worker:
        job = await worker.queue.enqueue(JobRequest(picture(1)))
        await when(lambda: comfyui.count("GET", "/object_info/SaveImage"), "the job is claimed, and being checked")
        with locked(workers):
            await asyncio.sleep(30)
            assert comfyui.count("POST", "/prompt") == 0
        assert (await worker.queue.wait(job)).run_count == 1


@pytest.mark.fault(54)
async def test_a_full_disk_under_the_database_accepts_no_job_and_what_runs_goes_on(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    """Invariant I23: accept no job, say so."""
    async with workers.start() as worker:
        job = await worker.queue.enqueue(JobRequest(picture(60)))
        await when(lambda: is_in(worker, job, Phase.SUBMITTED), "the prompt is on the server")

        def pages(limit: str) -> Callable[[Any], Any]:
            return lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count = {limit}").scalar()

        await worker.store.run(pages("1"))  # not one page more than there are
        big = JobRequest(picture(), sets={"1.seed": 1}, prompt="x" * 200_000)
        with pytest.raises(DiskFull):
            await worker.queue.enqueue(big)
        await asyncio.sleep(90)
        await worker.store.run(pages("1073741823"))
        done = await worker.queue.wait(job, timeout=timedelta(minutes=3))
        assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
    assert ran(comfyui) == ["success"]


@pytest.mark.fault(54)
async def test_results_that_cannot_be_written_pause_this_computer_and_are_fetched_later(
    workers: Workers, tmp_path: Path
) -> None:
    folder = tmp_path / "jobs" / "finished"
    folder.parent.mkdir()
    folder.write_text("a file where a folder should be")
    async with workers.start() as worker:
        await _paused_by_a_bad_folder(worker, folder)


async def _paused_by_a_bad_folder(worker: Worker, folder: Path) -> None:
    job = await worker.queue.enqueue(JobRequest(picture()))
    await when(worker.queue.pauses, "the worker pauses")
    [pause] = await worker.queue.pauses()
    assert pause.scope == "host:emulated"
    waiting = await worker.queue.job(job)
    assert (waiting.status, waiting.retries_attempted, waiting.run_count) == (QueueStatus.PENDING, 0, 0)
    await asyncio.to_thread(folder.unlink)
    done = await worker.queue.wait(job, timeout=timedelta(minutes=2))
    assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
