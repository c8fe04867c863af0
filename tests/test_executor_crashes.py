"""Workers that die, freeze and wake, alone or many: nothing is lost and nothing counts twice."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.heartbeat import Heart, Pulse
from runcomfy.domain.exceptions import DiskFull
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, NewJob, Outcome, Phase, QueuedJob, QueueStatus, WorkerId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.worker_stories import is_in, kinds, no_pulse, picture, pictures, ran, when
from runcomfy.testing.workers import Worker, Workers, queue_settings_for

# -- dying -------------------------------------------------------------------------------------------------


def has_begun(comfyui: ComfyUIEmulator, number: int) -> bool:
    return len(comfyui.run_log) == number


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.05, 0.15, 0.3, 1, 3, 12, 29.5, 30.05, 30.3, 30.6])
async def test_a_worker_killed_at_any_moment_costs_the_job_nothing(
    workers: Workers, comfyui: ComfyUIEmulator, tmp_path: Path, looptime: float, moment: float
) -> None:
    """Invariants I11, I12, I13, I20: the next worker goes on at once, one prompt runs, one result counts."""
    async with workers.start() as first:
        job = await first.queue.enqueue(JobRequest(picture(30)))
        await asyncio.sleep(moment)
        await first.kill(workers.processes)
    began = float(looptime)
    async with workers.start() as second:
        done = await second.queue.wait(job, timeout=timedelta(minutes=2))
        attempts = (await second.queue.show(job)).attempts
    assert (done.status, done.run_count, done.retries_attempted) == (QueueStatus.DONE, 1, 0)
    assert ran(comfyui) == ["success"]
    assert looptime - began < 36
    assert [attempt.outcome for attempt in attempts].count(Outcome.DONE) == 1
    assert len(pictures(tmp_path)) == 1
    assert comfyui.count("POST", "/prompt") <= 2


async def test_jobs_in_flight_go_on_at_once_after_a_restart_on_the_same_computer(
    workers: Workers, comfyui: ComfyUIEmulator, looptime: float
) -> None:
    async with workers.start(slots=3) as first:
        jobs = await first.queue.enqueue_many([JobRequest(picture(60, name=n)) for n in range(3)])
        for job in jobs:
            await when(partial(is_in, first, job, Phase.SUBMITTED), "its prompt is on the server")
        await first.kill(workers.processes)
    async with workers.start(slots=3) as second:
        began = float(looptime)
        await when(lambda: _all_held(second, jobs), "the jobs are held again", every=0.02)
        assert looptime - began < 0.5
        for job in jobs:
            assert (await second.queue.wait(job)).run_count == 1
            assert EventKind.ATTACHED in await kinds(second, job)
    assert ran(comfyui) == ["success"] * 3


async def _all_held(worker: Worker, jobs: Any) -> bool:
    return len(await worker.store.holds(worker.id)) == len(jobs)


async def test_a_result_that_was_finished_while_nobody_watched_is_fetched_and_not_made_again(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start() as first:
        job = await first.queue.enqueue(JobRequest(picture(30)))
        await when(lambda: is_in(first, job, Phase.SUBMITTED), "the prompt is on the server")
        await first.kill(workers.processes)
    await asyncio.sleep(600)
    async with workers.start() as second:
        done = await second.queue.wait(job, timeout=timedelta(seconds=20))
    assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
    assert ran(comfyui) == ["success"]


@pytest.mark.fault(38)
async def test_a_server_that_restarted_meanwhile_has_lost_the_prompt_and_it_runs_again_and_is_counted(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start() as first:
        job = await first.queue.enqueue(JobRequest(picture(30)))
        await when(lambda: is_in(first, job, Phase.SUBMITTED), "the prompt is on the server")
        await first.kill(workers.processes)
    await comfyui.restart()
    async with workers.start() as second:
        done = await second.queue.wait(job)
        told = await kinds(second, job)
    assert (done.status, done.run_count, done.retries_attempted) == (QueueStatus.DONE, 2, 0)
    assert ran(comfyui) == ["lost", "success"]
    assert EventKind.PROMPT_LOST in told
    first_run, second_run = comfyui.run_log
    assert first_run.prompt_id != second_run.prompt_id


async def test_a_job_that_takes_the_server_down_for_long_is_quarantined_at_the_second_time(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start() as worker:
        job = await worker.queue.enqueue(JobRequest(picture(600)))
        for number in (1, 2):
            await when(partial(has_begun, comfyui, number), f"run {number} begins")
            await asyncio.sleep(5)
            await comfyui.kill()
            await when(worker.queue.pauses, "the worker pauses")
            assert (await worker.queue.job(job)).status is QueueStatus.PENDING
            await comfyui.restart()
        job = await worker.queue.wait(job)
        assert (job.status, job.reason) == (QueueStatus.FAILED, "quarantined")
        assert len(comfyui.run_log) == 2


async def test_a_job_that_kills_its_workers_is_quarantined(workers: Workers, comfyui: ComfyUIEmulator) -> None:
    """Invariant I14."""
    async with workers.open() as store:
        [job] = await store.add([NewJob(JobRequest(picture(600)), "w")])
    for _ in range(3):
        async with workers.start() as worker:
            await asyncio.sleep(5)
            assert (await worker.queue.job(job)).status is QueueStatus.PROCESSING
            await worker.kill(workers.processes)
    async with workers.start() as last:
        await when(lambda: _has_ended(last, job), "the job is taken out", within=30)
        quarantined = await last.queue.job(job)
        assert (quarantined.reason, quarantined.lost_count, quarantined.run_count) == ("quarantined", 3, 1)
        assert any("vanished 3 times" in sentence for sentence in last.said)
        await when(lambda: ran(comfyui) == ["interrupted"], "its prompt is ended")


async def _has_ended(worker: Worker, job: QueuedJob) -> bool:
    return (await worker.queue.job(job)).ended


# -- many --------------------------------------------------------------------------------------------------


@pytest.mark.fault(63)
async def test_two_workers_on_one_database_run_every_job_once(workers: Workers, comfyui: ComfyUIEmulator) -> None:
    async with workers.start(slots=3) as one, workers.start(slots=3) as two:
        jobs = await one.queue.enqueue_many([JobRequest(picture(name=n)) for n in range(40)])
        done = [await one.queue.wait(job) for job in jobs]
        shares = Counter([(await one.queue.show(job)).attempts[0].worker_id for job in jobs])
        assert len(await one.queue.workers()) == 2
        assert (one.executor.planner.epoch is None) != (two.executor.planner.epoch is None)
    assert {(job.status, job.run_count, job.token) for job in done} == {(QueueStatus.DONE, 1, 1)}
    assert ran(comfyui) == ["success"] * 40
    assert len(shares) == 2


async def test_workers_that_come_and_go_lose_nothing(workers: Workers, comfyui: ComfyUIEmulator) -> None:
    async with workers.open() as store:
        jobs = await store.add([NewJob(JobRequest(picture(2, name=n)), "w") for n in range(12)])
        for _ in range(8):
            async with workers.start(slots=2) as worker:
                await asyncio.sleep(5)
                await worker.kill(workers.processes)
        async with workers.start(slots=2) as last:
            done = [await last.queue.wait(job) for job in jobs]
    assert {(job.status, job.run_count, job.reason) for job in done} == {(QueueStatus.DONE, 1, "")}
    assert ran(comfyui) == ["success"] * 12


# -- freezing ----------------------------------------------------------------------------------------------


@pytest.mark.fault(64)
async def test_a_worker_that_slept_through_its_lease_discards_its_result_and_says_so(
    workers: Workers, comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    async with workers.start() as sleeper, workers.start() as other:
        other.executor.settings = replace(other.executor.settings, slots=0)
        job = await sleeper.queue.enqueue(JobRequest(picture(30), out_file=str(tmp_path / "jobs/finished/image/a.png")))
        await when(lambda: is_in(sleeper, job, Phase.SUBMITTED), "the prompt is on the server")
        sleeper.freeze()
        other.executor.settings = replace(other.executor.settings, slots=1)
        done = await other.queue.wait(job)
        assert done.status is QueueStatus.DONE
        content = (tmp_path / "jobs/finished/image/a.png").read_bytes()

        await asyncio.sleep(600)
        sleeper.thaw()
        await when(lambda: not sleeper.executor._runs, "the sleeper gives up", within=60)

        assert any("discarded" in sentence for sentence in sleeper.said)
        attempts = (await other.queue.show(job)).attempts
        assert [attempt.worker_id for attempt in attempts] == [sleeper.id, other.id]
        assert attempts[0].outcome in (Outcome.LOST, Outcome.DISCARDED)
        assert attempts[1].outcome is Outcome.DONE
        assert (await other.queue.job(job)).token == done.token
    assert ran(comfyui) == ["success"]
    assert (tmp_path / "jobs/finished/image/a.png").read_bytes() == content


@pytest.mark.fault(64)
async def test_what_a_late_worker_cannot_write_pauses_nobody(workers: Workers, tmp_path: Path) -> None:
    """Its successor took the folder of unfinished files away; that says nothing about the disk."""
    async with workers.start() as late:
        job = await late.queue.enqueue(JobRequest(picture(30)))
        await when(lambda: is_in(late, job, Phase.SUBMITTED), "the prompt is on the server")
        ((run, _),) = late.executor._runs.values()
        with closing(sqlite3.connect(tmp_path / "queue.sqlite3")) as database:
            database.execute("UPDATE jobs SET token = token + 1")
            database.commit()

        await run._conclude(DiskFull("could not write .partial-1: No such file or directory"))

        assert any("discarded" in sentence for sentence in late.said)
        assert not await late.queue.pauses()
        assert (await late.queue.job(job)).status is QueueStatus.PROCESSING


@pytest.mark.fault(62)
@pytest.mark.fault(64)
async def test_a_worker_whose_heart_stopped_stops_working_on_what_it_lost(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start(heart=no_pulse) as fading:
        job = await fading.queue.enqueue(JobRequest(picture(300)))
        await when(lambda: is_in(fading, job, Phase.SUBMITTED), "the prompt is on the server")
        fading.executor.settings = replace(fading.executor.settings, slots=0)  # or it might claim the job again itself
        async with workers.start() as other:
            done = await other.queue.wait(job)
            assert done.status is QueueStatus.DONE
            assert (await other.queue.show(job)).attempts[-1].worker_id == other.id
        assert any("discarded" in sentence for sentence in fading.said)
    assert ran(comfyui) == ["success"]


@pytest.mark.fault(63)
@pytest.mark.fault(64)
async def test_the_planner_that_slept_finds_another_in_its_place_and_takes_nothing_back(workers: Workers) -> None:
    """Invariant I19: the stale planner is stopped by its epoch."""
    async with workers.start() as first, workers.start() as second:
        roles = first.executor.planner, second.executor.planner
        await when(lambda: [role.epoch for role in roles] in ([1, None], [None, 1]), "one of them plans")
        sleeper, other = (first, second) if roles[0].epoch else (second, first)
        sleeper.freeze()
        await when(lambda: other.executor.planner.epoch == 2, "the other plans", within=120)
        sleeper.thaw()
        await when(lambda: sleeper.executor.planner.epoch is None, "the sleeper has noticed", within=60)
        assert other.executor.planner.epoch == 2
        await other.end()
        await when(lambda: sleeper.executor.planner.epoch == 3, "the role goes back", within=60)


@pytest.mark.fault(62)
@pytest.mark.processes
@pytest.mark.looptime(False)
async def test_an_event_loop_that_is_blocked_for_longer_than_a_lease_loses_nothing(tmp_path: Path) -> None:
    settings = load_settings(overrides={})
    lease, beat = timedelta(seconds=5), timedelta(milliseconds=200)
    leases: list[str] = []
    over = threading.Event()

    def look() -> None:
        with closing(sqlite3.connect(tmp_path / "queue.sqlite3")) as database:
            while not over.wait(0.25):
                query = "SELECT lease_expires_at < CURRENT_TIMESTAMP FROM jobs WHERE status = 'processing'"
                leases.extend(str(row) for row in database.execute(query))

    def real_heart(store: SqlJobs, worker: WorkerId) -> Pulse:
        renew = store.renewer(worker, lease=lease)
        return Heart(renew, every=beat, lease=lease, close=renew.close)

    async with ComfyUIEmulator() as comfyui:
        workers = Workers(settings, queue_settings_for(comfyui.url, tmp_path, lease=lease), SystemClock())
        async with workers.start(heart=real_heart) as worker:
            job = await worker.queue.enqueue(JobRequest(picture(1)))
            await when(lambda: is_in(worker, job, Phase.SUBMITTED), "the prompt is on the server", every=0.02)
            witness = threading.Thread(target=look)
            witness.start()
            over.wait(7)  # nothing else runs in this thread meanwhile
            over.set()
            witness.join()
            done = await worker.queue.wait(job, timeout=timedelta(seconds=60))
    assert len(leases) >= 5
    assert set(leases) == {"(0,)"}  # never overdue
    assert (done.status, done.token, done.run_count) == (QueueStatus.DONE, 1, 1)


class JumpingClock(LoopClock):
    """The loop's time, until somebody sets it."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.offset


@pytest.mark.fault(60)
@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)], ids=["forward", "back"])
async def test_a_clock_that_jumps_by_a_day_changes_nothing(
    workers: Workers, comfyui: ComfyUIEmulator, jump: timedelta
) -> None:
    """Invariant I21."""
    workers.clock = clock = JumpingClock()
    async with workers.start() as one, workers.start():
        jobs = await one.queue.enqueue_many([JobRequest(picture(40, name=n)) for n in range(3)])
        await when(lambda: is_in(one, jobs[0], Phase.SUBMITTED), "a prompt is on the server")
        clock.offset = jump
        done = [await one.queue.wait(job, timeout=timedelta(minutes=10)) for job in jobs]
    assert {(job.status, job.run_count, job.reason) for job in done} == {(QueueStatus.DONE, 1, "")}
    assert ran(comfyui) == ["success"] * 3


async def test_a_job_that_is_set_back_in_sql_while_it_runs_goes_on_with_its_prompt(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start() as worker:
        job = await worker.queue.enqueue(JobRequest(picture(60)))
        await when(lambda: is_in(worker, job, Phase.SUBMITTED), "the prompt is on the server")
        statement = "UPDATE jobs SET status='pending', worker_id=NULL, lease_expires_at=NULL WHERE status='processing'"
        await worker.store.run(lambda connection: connection.exec_driver_sql(statement))
        done = await worker.queue.wait(job)
        assert (done.status, done.run_count, done.token) == (QueueStatus.DONE, 1, 2)
    assert ran(comfyui) == ["success"]


async def test_a_defect_ends_the_worker_loudly_and_costs_the_job_nothing(workers: Workers) -> None:
    def tell(sentence: str) -> None:
        if "done" in sentence:
            raise ZeroDivisionError("whoever listens has a defect")

    async with workers.start(works=False, tell=tell) as worker:
        job = await worker.queue.enqueue(JobRequest(picture(20)))
        task = worker.begin()
        worker.task = None
        with pytest.raises(ZeroDivisionError):
            await task
        assert (await worker.queue.job(job)).status is QueueStatus.DONE
    async with workers.start() as other:
        again = await other.queue.wait(await other.queue.enqueue(JobRequest(picture())))
        assert again.status is QueueStatus.DONE
