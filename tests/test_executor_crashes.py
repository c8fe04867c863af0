"""Workers that die, freeze and wake, fall out with their database: nothing is lost and nothing counts twice."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.heartbeat import Heart, OnBeat, Pulse
from runcomfy.application.planner import PLANNER, Planner
from runcomfy.application.store_journal import StoreJournal
from runcomfy.domain.exceptions import DiskFull, LocalError, ServerRestarted, StoreUnavailable
from runcomfy.domain.job import JobRequest, Output, OutputKind, PromptId
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import EventKind, NewJob, Outcome, Phase, QueuedJob, QueueStatus, WorkerId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.jobs_words import HERE, a_job, an_owner, put, seen, submit, take
from runcomfy.testing.contracts.jobs_words import kinds as kinds_of
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.workers import Worker, Workers, queue_settings_for

PATIENCE = timedelta(milliseconds=20)
"""How long a statement waits for a lock, in real time."""


def picture(seconds: float = 0.05, *, name: object = "out") -> dict[str, Any]:
    inputs = {"seconds": seconds, "steps": max(1, int(seconds)), "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": str(name)}},
    }


@pytest_asyncio.fixture
async def comfyui() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as emulator:
        yield emulator


@pytest.fixture
def workers(comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock) -> Workers:
    settings = load_settings(overrides={})
    settings = replace(settings, files=replace(settings.files, durable=False))
    return Workers(settings, queue_settings_for(comfyui.url, tmp_path), clock)


async def when(condition: Callable[[], Any], what: str, *, within: float = 3_600, every: float = 0.25) -> None:
    for _ in range(int(within / every)):
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        await asyncio.sleep(every)
    pytest.fail(f"did not happen: {what}")


def ran(comfyui: ComfyUIEmulator) -> list[str]:
    return [run.outcome for run in comfyui.run_log]


def pictures(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "jobs" / "finished").rglob("*.png"))


async def kinds(worker: Worker, job: QueuedJob) -> list[EventKind]:
    return [event.kind for event in (await worker.queue.show(job)).events]


def has_begun(comfyui: ComfyUIEmulator, number: int) -> bool:
    return len(comfyui.run_log) == number


async def is_in(worker: Worker, job: QueuedJob, phase: Phase) -> bool:
    return (await worker.queue.job(job)).phase is phase


class NoPulse:
    """A heart that has stopped."""

    def start(self, on_beat: OnBeat) -> None:
        """Do nothing."""

    def hurry(self) -> None:
        """Do nothing."""

    fresh = True

    async def stop(self) -> None:
        """Do nothing."""


def no_pulse(store: SqlJobs, worker: WorkerId) -> Pulse:
    return NoPulse()


# -- dying -------------------------------------------------------------------------------------------------


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


# -- a database that refuses -------------------------------------------------------------------------------


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


# -- the planner and the journal by themselves -------------------------------------------------------------


class Planning:
    """A planner of one process, and what was heard of it."""

    def __init__(self, workers: Workers, store: Any, name: str, **changes: Any) -> None:
        self.said: list[str] = []
        self.troubles: list[LocalError | None] = []
        self.back: list[list[QueuedJob]] = []
        settings = replace(workers.queue_settings, **changes)
        self.planner = Planner(
            store,
            settings,
            an_owner(name),
            workers.processes,
            tell=self.said.append,
            trouble=self.troubles.append,
            after=self._after,
        )

    async def _after(self, back: Any) -> None:
        self.back.append(list(back))


class Refusing:
    """A database that refuses some calls a number of times; a refused `finish` may have been kept all the same."""

    def __init__(self, store: SqlJobs, *, kept: bool = True, error: type[LocalError] = StoreUnavailable, **times: int):
        self._store, self._kept, self._error = store, kept, error
        self.left = times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in self.left:
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.left[name] <= 0:
                return await found(*args, **kwargs)
            self.left[name] -= 1
            if self._kept and name == "finish":
                await found(*args, **kwargs)
            raise self._error("locked")

        return call


async def test_a_planner_takes_the_role_and_the_jobs_of_the_dead_and_counts_each_that_is_set_aside(
    workers: Workers,
) -> None:
    async with workers.open() as store:
        for name in ("gone", "old", "new"):
            await store.register_owner(an_owner(name))
        old, new = (Planning(workers, store, name, lost_limit=2) for name in ("old", "new"))
        assert (old.planner.epoch, new.planner.epoch) == (None, None)
        assert await old.planner.round() == []
        await new.planner.round()
        assert (old.planner.epoch, new.planner.epoch) == (1, None)
        jobs = await put(store, *(a_job(config_name=f"{number}.yaml") for number in range(2)))
        for lost in (1, 2):
            for _ in jobs:
                await take(store, WorkerId("gone"))
            workers.processes.dead |= {OwnerId("gone"), OwnerId("old")}
            back = await new.planner.round()
            assert new.planner.epoch == 2  # the dead one's role, at once
            assert [job.lost_count for job in back] == [lost, lost]
            assert new.back[-1] == list(back)
            assert new.planner.set_aside == (0 if lost == 1 else 2)
        assert {(await seen(store, job)).reason for job in jobs} == {"quarantined"}
        assert [sentence.partition(":")[0] for sentence in new.said] == ["0.yaml", "1.yaml"] * 2
        assert "its worker is gone" in new.said[0]
        assert "vanished 2 times" in new.said[-1]
        assert (old.said, new.troubles) == ([], [None, None])
        await new.planner.stop()
        assert new.planner.epoch is None
        third = await store.take_role(PLANNER, OwnerId("gone"), lease=workers.queue_settings.lease)
        assert third == 3  # it was given up, and need not run out


async def test_a_planner_without_its_database_tells_and_goes_on_with_its_role(workers: Workers) -> None:
    async with workers.open() as store:
        await store.register_owner(an_owner("me"))
        refusing = Refusing(store, reap=1)
        mine = Planning(workers, refusing, "me")
        assert await mine.planner.round() == []
        assert await mine.planner.round() == []
        assert [type(trouble) for trouble in mine.troubles] == [StoreUnavailable, type(None)]
        assert mine.back == [[], []]
        assert mine.planner.epoch == 1


PICTURE = Output("2", OutputKind.IMAGE, "/out/knight.png", 7, "5e", name="knight")


def journal_of(store: Any, row: QueuedJob, pulse: Pulse, **told: Any) -> StoreJournal:
    usual: dict[str, Any] = {
        "leaves": lambda _: True,
        "here": lambda: HERE,
        "reached": lambda: None,
        "trouble": lambda _: None,
        "leaving": lambda: False,
        "kill_limit": 2,
    }
    return StoreJournal(store, row, pulse, **{**usual, **told})


async def committing(store: Any, row: QueuedJob, *, leaving: bool = False, stale: bool = False) -> Any:
    """Commit a result; return the journal, what was published, and what was told of the database."""
    pulse = NoPulse()
    pulse.fresh = not stale
    told: list[LocalError | None] = []
    published: list[str] = []
    journal = journal_of(store, row, pulse, trouble=told.append, leaving=lambda: leaving)
    error: LocalError | None = None
    try:
        await journal.commit(lambda: published.append("named"), (PICTURE,), {"seeds": {"1": 2}})
    except LocalError as refused:
        error = refused
    return journal, published, told, error


@pytest.mark.fault(55)
async def test_whether_an_unheard_commit_counts_is_asked_until_it_is_known(workers: Workers, looptime: float) -> None:
    async with workers.open() as store:
        row = await submit(store, await put_and_take(store))
        began = float(looptime)
        journal, published, told, error = await committing(Refusing(store, finish=1, attempts=7), row, stale=True)
        assert error is None
        assert looptime - began == pytest.approx(0.25 + 0.5 + 1 + 2 + 4 + 5 + 5, abs=0.2)
        assert (journal.done.status, journal.done.id, published) == (QueueStatus.DONE, row.id, ["named"])
        assert journal.done.result == {"seeds": {"1": 2}, "outputs": [{**PICTURE.as_dict(), "name": "knight"}]}
        assert [type(trouble) for trouble in told] == [StoreUnavailable] * 8
        # Whoever must leave before it is known lets the names stand.
        row = await submit(store, await put_and_take(store))
        journal, published, told, error = await committing(Refusing(store, finish=1, attempts=9), row, leaving=True)
        assert (journal.done, published, error, len(told)) == (None, ["named"], None, 2)


@pytest.mark.fault(55)
async def test_a_commit_that_does_not_count_is_tried_again_while_the_lease_holds_and_then_refused(
    workers: Workers, looptime: float
) -> None:
    async with workers.open() as store:
        row = await submit(store, await put_and_take(store))
        for error in (StoreUnavailable, DiskFull):
            refusing = Refusing(store, finish=1, kept=False, error=error)
            journal, published, told, refused = await committing(refusing, row, stale=True)
            assert (type(refused), journal.done, published) == (error, None, [])
            assert (await seen(store, row)).status is QueueStatus.PROCESSING
        began = float(looptime)
        journal, published, told, refused = await committing(Refusing(store, finish=2, kept=False), row)
        assert (refused, journal.done.status, published) == (None, QueueStatus.DONE, ["named"])
        assert looptime - began == pytest.approx(0.75, abs=0.2)
        assert [type(trouble) for trouble in told] == [StoreUnavailable, StoreUnavailable, type(None)]


async def put_and_take(store: SqlJobs) -> QueuedJob:
    await put(store, a_job())
    return await take(store)


async def test_a_run_that_goes_on_with_a_prompt_has_it_on_the_server_and_counts_no_second_run(workers: Workers) -> None:
    async with workers.open() as store:
        row = await submit(store, await put_and_take(store))
        reached: list[str] = []
        journal = journal_of(store, row, NoPulse(), reached=lambda: reached.append("reached"))
        assert (journal.touched, journal.sent, journal.prompt_id) == (False, None, row.prompt_id)
        await journal.attached()
        assert (journal.touched, journal.sent, reached) == (True, row.prompt_id, ["reached"])
        assert (await kinds_of(store, row))[-1] is EventKind.ATTACHED
        assert (await seen(store, row)).run_count == 1


@pytest.mark.parametrize(
    ("accepted", "lost", "here", "excused", "kill_limit", "renamed", "killed"),
    [
        pytest.param(True, True, HERE, False, 2, True, True, id="died under it"),
        pytest.param(True, True, HERE, False, 1, True, True, id="and once too often"),
        pytest.param(True, True, HERE, True, 2, True, False, id="not Ready for a while"),
        pytest.param(True, True, "server:there:8188", False, 2, True, False, id="elsewhere"),
        pytest.param(True, False, HERE, False, 2, True, False, id="ended"),
        pytest.param(False, True, HERE, False, 2, True, True, id="perhaps sent"),
        pytest.param(False, False, HERE, False, 2, False, False, id="never sent"),
    ],
)
async def test_a_prompt_that_is_on_no_server_is_sent_again_under_its_name_only_if_it_never_was_there(
    workers: Workers, accepted: bool, lost: bool, here: str, excused: bool, kill_limit: int, renamed: bool, killed: bool
) -> None:
    async with workers.open() as store:
        row = await put_and_take(store)
        if accepted:
            row = await submit(store, row)
        else:
            row = await store.write_ahead(
                row.id,
                row.token,
                place=HERE,
                prompt_id=PromptId("00000000-0000-4000-8000-00000000cafe"),
                counts_as_run=True,
            )
        journal = journal_of(store, row, NoPulse(), here=lambda: here, excused=lambda: excused, kill_limit=kill_limit)
        assert journal.earlier is not None
        raised = False
        try:
            await journal.gone(lost=lost)
        except ServerRestarted as error:
            raised = error.details == {"prompt_id": row.prompt_id}
        assert raised == (kill_limit == 1)
        assert (journal.prompt_id != row.prompt_id, journal.killed) == (renamed, killed)
        known: object = journal.earlier
        assert known is None
        left = await seen(store, row)
        assert (left.phase, left.prompt_id) == (Phase.NONE, None)
