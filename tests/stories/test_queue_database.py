"""
What the queue's database promises by itself: an ack outlives the power, upgrades lose nothing, ten thousand jobs fit.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from alembic import command

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores import migrate
from runcomfy.adapters.stores.choose import is_server, store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.heartbeat import Heart, Pulse
from runcomfy.application.planner import PLANNER
from runcomfy.domain.exceptions import StoreTooNew
from runcomfy.domain.job import JobRequest
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import NewJob, QueueStatus, WorkerId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.postgres import PostgresForTests
from runcomfy.testing.queue_programs import QueuePrograms

# -- the power fails -------------------------------------------------------------------------------------------


def new(number: int) -> NewJob:
    return NewJob(JobRequest("image_invert", prompt="x" * (number % 7) * 400), "w")


@pytest.mark.fault(57)
async def test_every_connection_that_writes_waits_for_the_disk(queue_database: str) -> None:
    """I10: also the one whose leases are renewed in a thread of its own."""
    async with SqlJobs(store_from(queue_database, clock=SystemClock())) as store:
        question = "PRAGMA synchronous" if store.dialect == "sqlite" else "SHOW synchronous_commit"
        safe = (2, "on")  # FULL, as SQLite counts

        def ask(connection: Any) -> Any:
            return connection.exec_driver_sql(question).scalar()

        assert await store.run(ask) in safe
        renewer = store.renewer(WorkerId("w"), lease=timedelta(seconds=60))
        beats = threading.Thread(target=lambda: answers.append(renewer._database.write(ask)))
        answers: list[Any] = []
        beats.start()
        beats.join()
        assert answers[0] in safe
        renewer.close()


@pytest.mark.fault(57)
async def test_whatever_is_cut_off_after_an_ack_the_job_is_there(tmp_path: Path) -> None:
    """I10: the file and its log as they were when the ack was given, and of what was written later any beginning."""
    draw, folder = Random(57), tmp_path / "lost"
    folder.mkdir()
    database = tmp_path / "queue.sqlite3"
    acks: list[tuple[bytes, bytes, list[str]]] = []
    uids: list[str] = []
    async with SqlJobs(store_from(database, clock=SystemClock())) as store:
        for number in range(24):
            uids += [job.uid for job in await store.add([new(number) for _ in range(draw.choice((1, 1, 5)))])]
            acks.append((*_bytes_of(database), list(uids)))
        later = _bytes_of(database)
    for file, log, acknowledged in acks:
        # The log only grows here; what was added after the ack reached the disk in part, and torn.
        grown = later[1][len(log) :] if later[1].startswith(log) else b""
        for kept in {0, draw.randrange(len(grown) + 1), len(grown)}:
            torn = bytearray(log + grown[:kept])
            if kept:
                torn[len(log) + draw.randrange(kept)] ^= 0xFF
            assert set(acknowledged) <= _found(folder, file, bytes(torn))


def _bytes_of(database: Path) -> tuple[bytes, bytes]:
    log = database.with_name(database.name + "-wal")
    return database.read_bytes(), log.read_bytes() if log.exists() else b""


def _found(folder: Path, file: bytes, log: bytes) -> set[str]:
    copy = folder / "queue.sqlite3"
    for path in folder.iterdir():
        path.unlink()
    copy.write_bytes(file)
    copy.with_name(copy.name + "-wal").write_bytes(log)
    with closing(sqlite3.connect(copy)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {uid for (uid,) in database.execute("SELECT uid FROM jobs")}


@pytest.mark.fault(57)
async def test_a_server_that_ends_without_a_word_has_every_job_it_acknowledged(
    postgres_server: PostgresForTests, postgres_dsn: str
) -> None:
    """I10: a PostgreSQL that is ended at once while jobs are put in, and started again."""
    if not postgres_server.own:
        pytest.skip("a server that is not ours is not ended")
    async with SqlJobs(store_from(postgres_dsn, clock=SystemClock())) as store:
        heard = [job.uid for _ in range(20) for job in await store.add([new(1), new(2)])]
        await asyncio.to_thread(postgres_server.restart)
        assert set(heard) <= {job.uid for job in await store.jobs()}
        heard += [job.uid for job in await store.add([new(3)])]
        assert set(heard) <= {job.uid for job in await store.jobs()}


# -- another version of the program -------------------------------------------------------------------------------


@contextmanager
def connected(database: str) -> Iterator[Any]:
    """A connection of an older program, which knows only the tables of its day."""
    if is_server(database):
        import psycopg

        with psycopg.connect(database) as connection:
            yield connection
        return
    with closing(sqlite3.connect(database, isolation_level=None)) as file:
        yield file


OWNER = (
    "INSERT INTO owners (id, host, pid, process_started, command, started_at, heartbeat_at) "
    "VALUES ('{}', 'h', 1, 0.0, 'comfyctl', '2026-01-01 00:00:00', '2026-01-01 00:00:00')"
)


def to_first_revision(database: str) -> None:
    """Make a database as the first release left it, with rows."""

    def make(connection: Any) -> None:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(OWNER.format("old-one"))

    engine = store_from(database, clock=SystemClock()).kind.engine()
    try:
        with engine.begin() as connection:
            make(connection)
    finally:
        engine.dispose()


@pytest.fixture
def fresh_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield str(tmp_path / "old.sqlite3")
        return
    server = request.getfixturevalue("postgres_server")
    dsn = server.database(empty=True)
    yield dsn
    server.drop(dsn)


ON_BOTH = pytest.mark.parametrize(
    "fresh_database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.campaign)], indirect=True
)


@ON_BOTH
@pytest.mark.fault(65)
async def test_a_database_of_the_first_release_is_upgraded_once_while_an_old_program_is_at_work(
    fresh_database: str,
) -> None:
    """I23, I2: three new programs start at once; no row is lost, and the old one can still write its own."""
    to_first_revision(fresh_database)
    with connected(fresh_database) as old:
        assert old.execute("SELECT count(*) FROM owners").fetchone()[0] == 1
        if is_server(fresh_database):
            old.commit()
        stores = [SqlJobs(store_from(fresh_database, clock=SystemClock())) for _ in range(3)]
        await asyncio.gather(*(store.open() for store in stores))
        try:
            old.execute(OWNER.format("old-two"))
            if is_server(fresh_database):
                old.commit()
            [job] = await stores[0].add([new(1)])
            for store in stores:
                assert set(await store.owners()) == {OwnerId("old-one"), OwnerId("old-two")}
                found = await store.job(job.id)
                assert found is not None
                assert found.uid == job.uid
            upgrades = f"SELECT count(*) FROM upgrades WHERE revision = '{migrate.HEAD}'"  # noqa: S608 - a word of ours
            assert old.execute(upgrades).fetchone()[0] == 1
        finally:
            for store in stores:
                await store.close()


@pytest.mark.fault(65)
async def test_a_database_of_a_newer_program_is_left_as_it_is(queue_database: str) -> None:
    """I23: refused with what to do, also by a program that was at work when it was upgraded."""
    async with SqlJobs(store_from(queue_database, clock=SystemClock())) as store:
        [job] = await store.add([new(1)])
        with connected(queue_database) as newer:
            newer.execute("UPDATE alembic_version SET version_num = '0999'")
            if is_server(queue_database):
                newer.commit()
        late = SqlJobs(store_from(queue_database, clock=SystemClock()))
        with pytest.raises(StoreTooNew) as refused:
            await late.open()
        assert "0999" in refused.value.message
        assert refused.value.hint
        found = await store.job(job.id)
        assert found is not None


# -- very many, very large ----------------------------------------------------------------------------------------

MEGABYTE = 1024 * 1024


@pytest.mark.fault(66)
async def test_ten_thousand_jobs_at_once_fit_and_are_worked_off_one_by_one(
    queue_database: str, comfyui: ComfyUIEmulator, clock: LoopClock, tmp_path: Path
) -> None:
    """I22: an executor holds what it works on, not the line that waits for it."""
    count = 10_000
    async with QueuePrograms(queue_database, comfyui, clock, tmp_path) as programs:
        process = psutil.Process()
        resident = process.memory_info().rss
        jobs = await programs.queue.enqueue_many([programs.request(number, seconds=0.1) for number in range(count)])
        taking_in = process.memory_info().rss - resident
        assert len({job.id for job in jobs}) == count
        first, last = jobs[0], jobs[-1]
        del jobs
        tracemalloc.start()
        await programs.start(slots=4)
        await programs.queue.wait(first)
        await programs.began(30)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        counts = await programs.queue.counts()
        print(f"taking {count} jobs in: {taking_in / MEGABYTE:.0f} MB; working: {peak / MEGABYTE:.1f} MB")
        assert taking_in / count < 30_000
        assert peak < 30 * MEGABYTE
        assert counts[QueueStatus.PENDING] + counts[QueueStatus.PROCESSING] + counts[QueueStatus.DONE] == count
        assert (await programs.queue.job(last)).status is QueueStatus.PENDING


@pytest.mark.fault(66)
async def test_a_large_result_passes_through_in_pieces(
    queue_database: str, comfyui: ComfyUIEmulator, clock: LoopClock, tmp_path: Path
) -> None:
    """I22: what is fetched, compared and hashed is never in memory as a whole."""
    async with QueuePrograms(queue_database, comfyui, clock, tmp_path) as programs:
        program = await programs.start(works=False)
        fetching = program.fate.stop_at("before comfyui.fetch")
        job = await programs.put()
        program.begin()
        await fetching.wait()
        [made] = list((comfyui.folders.output).glob("job-1_*.png"))
        size = await asyncio.to_thread(_grow, made)
        tracemalloc.start()
        program.wake()
        job = await programs.queue.wait(job)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"a result of {size / MEGABYTE:.0f} MB: at most {peak / MEGABYTE:.1f} MB of Python's memory")
        assert job.status is QueueStatus.DONE
        assert job.result["outputs"][0]["size_bytes"] == size
        assert peak < size / 4
        assert await programs.complaints() == []


def _grow(path: Path) -> int:
    """Write a picture without compression in place of a small one."""
    from PIL import Image

    with Image.effect_noise((4096, 4096), 90) as noise:
        Image.merge("RGB", [noise] * 3).save(path, "PNG", compress_level=0)
    return path.stat().st_size


# -- the loop stands still ------------------------------------------------------------------------------------------


@pytest.mark.fault(62)
@pytest.mark.processes
@pytest.mark.looptime(False)
async def test_a_loop_that_stands_still_for_longer_than_a_lease_loses_nothing_to_a_planner_that_watches(
    queue_database: str, tmp_path: Path
) -> None:
    """I11, I20: leases are renewed by a thread; somebody else takes back whatever is over, and nothing is."""
    lease = timedelta(seconds=5)  # a busy computer may hold up a heart, too, for seconds
    planning, over, rounds = threading.Event(), threading.Event(), list[int]()

    def heart(store: SqlJobs, worker: WorkerId) -> Pulse:
        renew = store.renewer(worker, lease=lease)
        return Heart(renew, every=timedelta(milliseconds=200), lease=lease, close=renew.close)

    async def watch() -> None:
        async with SqlJobs(store_from(queue_database, clock=SystemClock(), durable=False)) as store:
            epoch = await store.take_role(PLANNER, OwnerId("watcher"), lease=timedelta(minutes=5))
            assert epoch is not None
            planning.set()
            while not over.is_set():
                taken = await store.reap(lease=lease, grace=timedelta(minutes=5), epoch=epoch)
                rounds.append(len(taken))
                await asyncio.sleep(0.1)

    async with (
        ComfyUIEmulator() as comfyui,
        QueuePrograms(queue_database, comfyui, SystemClock(), tmp_path, lease=lease) as programs,
    ):
        watcher = threading.Thread(target=lambda: asyncio.run(watch()))
        watcher.start()
        try:
            assert await asyncio.to_thread(planning.wait, 30)
            await programs.start(heart=heart)
            job = await programs.put(seconds=1)
            await programs.began()
            over.wait(1.5 * lease.total_seconds())  # a big picture, a plugin: nothing else runs here
            job = await programs.queue.wait(job)
        finally:
            over.set()
            watcher.join()
    assert len(rounds) > 5
    assert sum(rounds) == 0
    assert (job.status, job.token, job.lost_count) == (QueueStatus.DONE, 1, 0)
