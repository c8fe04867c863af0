"""
A queue whose disk is full, whose database is locked, whose clock is set: no ack is lost, nothing runs twice, nothing is
stuck when the trouble is over (I23, I21).
"""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta

import pytest

from runcomfy.adapters.files import Disk
from runcomfy.adapters.results import DiskResults
from runcomfy.adapters.stores.choose import is_server
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.exceptions import DiskFull, StoreUnavailable
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, NewJob, Outcome, QueuedJob, QueueStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.queue_programs import Program, QueuePrograms, failing

IMPATIENT = timedelta(milliseconds=20)
"""How long a program waits for a lock: real time, while the story stands still."""


@contextmanager
def locked(database: str) -> Iterator[None]:
    """Another program holds the database so that nobody can write; everybody can read."""
    if is_server(database):
        import psycopg

        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE jobs, job_attempts, job_events, owners, roles IN EXCLUSIVE MODE")
            yield
            other.rollback()
        return
    with closing(sqlite3.connect(database, isolation_level=None)) as file:
        file.execute("BEGIN IMMEDIATE")
        yield
        file.execute("ROLLBACK")


async def done_once(programs: QueuePrograms, job: QueuedJob, *, within: float) -> QueuedJob:
    job = await programs.queue.wait(job, timeout=timedelta(seconds=within))
    assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0)
    assert await programs.runs(job) == ["success"]
    assert await programs.complaints() == []
    return job


# -- locked ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(55)
@pytest.mark.parametrize("after", [0.2, 3.0, 10.0], ids=["being checked", "running", "about to end"])
async def test_a_minutes_lock_delays_what_is_written_and_loses_nothing(
    programs: QueuePrograms, queue_database: str, after: float
) -> None:
    """I23: the job that runs is committed afterwards, by whoever holds it then."""
    job = await programs.put(seconds=12)
    worker = await programs.start(busy_timeout=IMPATIENT)
    await asyncio.sleep(after)
    with locked(queue_database):
        await asyncio.sleep(60)
    await done_once(programs, job, within=120)
    assert any("nothing new is begun" in said for said in worker.said)
    assert "the database works again" in worker.said


@pytest.mark.fault(55)
@pytest.mark.parametrize("seconds", [70, 200])
async def test_a_lock_that_outlasts_the_lease_leaves_no_job_stuck(
    programs: QueuePrograms, queue_database: str, seconds: int
) -> None:
    """I23, I20: a result that could not be written in time is fetched again, also by a worker that is alone."""
    job = await programs.put(seconds=5)
    await programs.start(busy_timeout=IMPATIENT)
    await programs.began()
    with locked(queue_database):
        await asyncio.sleep(seconds)
    await done_once(programs, job, within=60 + 15 + 60)


@pytest.mark.fault(55)
async def test_an_idle_worker_says_that_the_database_is_locked_and_goes_on_by_itself(
    programs: QueuePrograms, queue_database: str
) -> None:
    """I23: said once, and once that it is over."""
    worker = await programs.start(busy_timeout=IMPATIENT)
    await asyncio.sleep(20)
    with locked(queue_database):
        await asyncio.sleep(60)
        assert len([said for said in worker.said if "nothing new is begun" in said]) == 1
    job = await programs.put()
    await done_once(programs, job, within=60)
    assert worker.said.count("the database works again") == 1


@pytest.mark.fault(55)
async def test_what_cannot_be_written_is_not_accepted(programs: QueuePrograms, queue_database: str) -> None:
    """I10, I23: no ack without a row; the same key finds nothing half done later."""
    async with programs.open(busy_timeout=IMPATIENT) as store:
        with locked(queue_database), pytest.raises(StoreUnavailable):
            await store.add([_new(programs)])
        assert await programs.queue.list() == []
        [job] = await store.add([_new(programs)])
    assert [found.uid for found in await programs.queue.list()] == [job.uid]


def _new(programs: QueuePrograms) -> NewJob:
    return NewJob(programs.request(1), "w", idempotency_key="order-1")


@pytest.mark.parametrize(
    "call", ["claim", "write_ahead", "accepted", "finish", "attached", "renew", "take_role", "reap", "attempts"]
)
async def test_a_write_whose_answer_is_lost_counts_once(programs: QueuePrograms, call: str) -> None:
    """I11, I20: the connection broke after the commit; what was written stands, and is not undone or done again."""
    job = await programs.put(seconds=20)
    if call == "attached":
        first = await programs.start()
        await programs.began()
        await first.kill()
    worker = await programs.start(works=False)
    worker.fate.lose_answer(f"store.{call}", StoreUnavailable("the server hung up"))
    worker.begin()
    await done_once(programs, job, within=60)
    assert f"after store.{call}" in worker.fate.passed


# -- full ------------------------------------------------------------------------------------------------------


class Volume(Disk):
    """The disk where results go."""

    full = False

    def rename(self, source: str, target: str) -> None:
        """Give a name, if there is room for it."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device", target)
        super().rename(source, target)


@pytest.mark.fault(54)
async def test_a_result_that_does_not_fit_pauses_this_computer_until_there_is_room(programs: QueuePrograms) -> None:
    """I23: no retry is burnt; its prompt's result is fetched again, and the queue goes on by itself."""
    volume = Volume()
    volume.full = True
    worker = await programs.start(results=DiskResults(programs.settings.files, disk=volume))
    job = await programs.put(1, seconds=5)
    other = await programs.put(2, seconds=5)
    await programs.when(programs.queue.pauses, "the computer pauses")
    [pause] = await programs.queue.pauses()
    assert (pause.scope, pause.reason) == ("host:emulated", "disk-full")
    await asyncio.sleep(300)
    waiting = [await programs.queue.job(each) for each in (job, other)]
    assert not any(each.ended for each in waiting)
    assert [each.retries_attempted for each in waiting] == [0, 0]
    assert any(said.startswith("paused: ") for said in worker.said)
    assert list(programs.target().parent.glob("*.png")) == []
    volume.full = False
    for each in (job, other):
        ended = await programs.queue.wait(each, timeout=timedelta(minutes=8))
        assert (ended.status, ended.run_count, ended.retries_attempted) == (QueueStatus.DONE, 1, 0)
        assert await programs.runs(each) == ["success"]
    assert await programs.queue.pauses() == []
    assert await programs.complaints() == []
    assert programs.litter() == []


FULL = "PRAGMA max_page_count = 1"
ROOM = "PRAGMA max_page_count = 1073741823"
REFUSE = """
CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$
"""


async def say(store: SqlJobs, statement: str) -> None:
    await store.run(lambda connection: connection.exec_driver_sql(statement))


async def fill(programs: QueuePrograms, worker: Program) -> None:
    """Let the database take nothing more: the file no more pages, the server no more rows."""
    if programs.store.dialect == "sqlite":
        for store in (worker.store, programs.store):
            await say(store, FULL)
        return
    await say(programs.store, REFUSE)
    for table in ("jobs", "job_events", "job_attempts"):
        what = f"CREATE TRIGGER full_{table} BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION no_room()"
        await say(programs.store, what)


async def make_room(programs: QueuePrograms, worker: Program) -> None:
    if programs.store.dialect == "sqlite":
        for store in (worker.store, programs.store):
            await say(store, ROOM)
    else:
        await say(programs.store, "DROP FUNCTION no_room() CASCADE")


@pytest.mark.fault(54)
async def test_a_full_disk_under_the_database_accepts_nothing_and_what_runs_is_committed_later(
    programs: QueuePrograms,
) -> None:
    """I23, I10."""
    worker = await programs.start()
    job = await programs.put(1, seconds=20)
    await programs.began()
    await fill(programs, worker)
    long = JobRequest(failing(), prompt="x" * 300_000)
    with pytest.raises(DiskFull):
        await programs.queue.enqueue(long)
    await asyncio.sleep(100)
    await make_room(programs, worker)
    assert [found.id for found in await programs.queue.list()] == [job.id]
    await done_once(programs, job, within=180)
    second = await programs.queue.wait(await programs.put(2), timeout=timedelta(seconds=60))
    assert second.status is QueueStatus.DONE


# -- the clock ---------------------------------------------------------------------------------------------------


class SetClock(LoopClock):
    """A clock that somebody sets."""

    offset = timedelta(0)

    def now(self) -> datetime:
        """Return the time it shows."""
        return super().now() + self.offset


@pytest.fixture
def clock() -> SetClock:
    """The clock of everybody in the story: a database has one."""
    return SetClock()


DAY = timedelta(days=1)
JUMPS = pytest.mark.parametrize("jump", [DAY, -DAY], ids=["a day ahead", "a day back"])


@JUMPS
@pytest.mark.fault(60)
async def test_a_clock_that_jumps_under_a_job_runs_nothing_twice(
    programs: QueuePrograms, clock: SetClock, jump: timedelta
) -> None:
    """I21: leases only get shorter, and the fence makes that harmless."""
    await programs.start()
    await programs.start()
    job = await programs.put(seconds=40)
    await programs.began()
    await asyncio.sleep(5)
    clock.offset = jump
    job = await programs.queue.wait(job, timeout=timedelta(seconds=120))
    assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0)
    assert await programs.runs(job) == ["success"]
    assert job.duration is not None
    assert job.duration >= 0
    assert await programs.complaints() == []


@JUMPS
@pytest.mark.fault(60)
@pytest.mark.parametrize("noticed", [True, False], ids=["same computer", "another computer"])
async def test_a_lease_from_before_the_clock_was_set_holds_nothing_up(
    programs: QueuePrograms, clock: SetClock, jump: timedelta, noticed: bool
) -> None:
    """I21, I20: a dead worker's job and a dead planner's role are free within a lease and a reap period."""
    first = await programs.start()
    job = await programs.put(seconds=20)
    await programs.began()
    await first.kill(noticed=noticed)
    clock.offset = jump
    await programs.start()
    settings = programs.queue_settings
    within = 2 * (settings.lease + settings.reap_every).total_seconds() + 20
    job = await programs.queue.wait(job, timeout=timedelta(seconds=within))
    assert (job.status, job.run_count) == (QueueStatus.DONE, 1)
    assert await programs.runs(job) == ["success"]
    assert await programs.complaints() == []


@JUMPS
@pytest.mark.fault(60)
async def test_a_retry_from_before_the_clock_was_set_does_not_wait_for_a_day(
    programs: QueuePrograms, clock: SetClock, jump: timedelta
) -> None:
    """I21."""
    await programs.start(backoff_first=timedelta(seconds=60))
    job = await programs.queue.enqueue(JobRequest(failing()), retry_limit=1)
    await programs.when(lambda: _retried(programs, job), "it failed once")
    clock.offset = jump
    job = await programs.queue.wait(job, timeout=timedelta(minutes=5))
    assert (job.status, job.run_count) == (QueueStatus.FAILED, 2)


async def _retried(programs: QueuePrograms, job: QueuedJob) -> bool:
    return (await programs.queue.job(job)).retries_attempted > 0


@JUMPS
@pytest.mark.fault(60)
async def test_a_pause_from_before_the_clock_was_set_ends_within_its_own_length(
    programs: QueuePrograms, clock: SetClock, comfyui: ComfyUIEmulator, jump: timedelta
) -> None:
    """I21: a computer that waited for its ComfyUI does not wait for another day."""
    await programs.start()
    await comfyui.kill()
    job = await programs.put()
    await programs.when(programs.queue.pauses, "the computer pauses")
    await comfyui.restart()
    clock.offset = jump
    job = await programs.queue.wait(job, timeout=timedelta(minutes=10))
    assert job.status is QueueStatus.DONE


@pytest.mark.fault(60)
async def test_a_computer_that_sleeps_for_eight_hours_goes_on_with_what_is_still_its_own(
    programs: QueuePrograms, clock: SetClock
) -> None:
    """I21, I11: its ComfyUI is elsewhere and has finished long ago; nobody else was there."""
    worker = await programs.start()
    job = await programs.put(seconds=60)
    await programs.began()
    worker.freeze()
    await asyncio.sleep(30)
    clock.offset = timedelta(hours=8)  # the steady clock of a sleeping computer stands still
    worker.wake()
    await done_once(programs, job, within=120)


@pytest.mark.fault(60)
async def test_a_computer_that_slept_while_another_took_its_jobs_lets_them_be(
    programs: QueuePrograms, clock: SetClock
) -> None:
    """I11, I12."""
    sleeper = await programs.start()
    jobs = [await programs.put(number, seconds=20) for number in range(3)]
    await programs.began()
    sleeper.freeze()
    clock.offset = timedelta(hours=8)
    await programs.start()
    for job in jobs:
        await programs.queue.wait(job, timeout=timedelta(minutes=5))
    sleeper.wake()
    await asyncio.sleep(60)
    for job in jobs:
        now = await programs.queue.job(job)
        assert (now.status, now.run_count) == (QueueStatus.DONE, 1)
        assert (await programs.kinds(job)).count(EventKind.DONE) == 1
    outcomes = [attempt.outcome for attempt in (await programs.queue.show(jobs[0])).attempts]
    assert outcomes[0] in (Outcome.LOST, Outcome.DISCARDED)
    assert await programs.complaints() == []
