"""The queue's database as a file: its published shape, its versions, and what a disk or another program does to it."""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from runcomfy.adapters.stores import migrate
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.jobs_sql import Sql
from runcomfy.domain.exceptions import DiskFull, StoreUnavailable
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import EventKind, Outcome, QueuedJob, QueueStatus, RowId
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.jobs_words import (
    ALICE,
    DONE,
    GRACE,
    LEASE,
    a_file,
    a_job,
    a_prompt,
    an_owner,
    failing,
    put,
    seen,
    take,
    take_all,
)

IMPATIENT: Final = timedelta(milliseconds=50)

GUIDE: Final = """
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    config_name TEXT NOT NULL UNIQUE,
    job_type TEXT NOT NULL,
    workflow_id TEXT NOT NULL,
    priority INTEGER DEFAULT 50,
    status TEXT CHECK(status IN ('pending','processing','done','failed')) NOT NULL,
    retries_attempted INTEGER DEFAULT 0,   -- number of retries used
    run_count INTEGER DEFAULT 0,           -- total executions (initial + retries)
    retry_limit INTEGER,                   -- optional per-job override; NULL -> use global
    start_time TEXT,
    end_time TEXT,
    duration REAL,
    error_trace TEXT,
    metadata TEXT,
    worker_id TEXT,
    lease_expires_at TEXT
);

CREATE INDEX IF NOT EXISTS idx_jobs_status_priority ON jobs(status, priority);
CREATE INDEX IF NOT EXISTS idx_jobs_started ON jobs(start_time);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "database" / "comfyui_agent.db"


def a_queue(path: Path, *, durable: bool = False) -> SqlJobs:
    return SqlJobs(store_from(path, clock=LoopClock(), durable=durable, busy_timeout=IMPATIENT))


@pytest.fixture
async def jobs(path: Path) -> AsyncIterator[SqlJobs]:
    async with a_queue(path) as jobs:
        yield jobs


@contextmanager
def somebody_else(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


# -- its shape -------------------------------------------------------------------------------------------------


def shape(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Name, type, default and key of each column."""
    return [
        (name, kind, default, bool(key))
        for _, name, kind, _, default, key in connection.execute("PRAGMA table_info(jobs)")
    ]


@pytest.mark.usefixtures("jobs")
async def test_the_table_begins_with_the_published_one(path: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as published, somebody_else(path) as ours:
        published.executescript(GUIDE)
        assert shape(ours)[:16] == shape(published)
        names = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND name LIKE 'idx%' ORDER BY name"
        squeezed = [
            [(name, sql.replace(" ", "")) for name, sql in connection.execute(names)]
            for connection in (ours, published)
        ]
        assert squeezed[0] == squeezed[1]


async def test_the_guides_own_statements_are_harmless_on_it(jobs: SqlJobs, path: Path) -> None:
    (job,) = await put(jobs)
    with somebody_else(path) as connection:
        connection.executescript(GUIDE)
    assert await seen(jobs, job) == job


async def test_times_are_texts_that_compare_with_the_databases_own(jobs: SqlJobs, path: Path) -> None:
    await put(jobs)
    job = await take(jobs)
    await jobs.finish(job.id, job.token, DONE)
    with somebody_else(path) as connection:
        row = connection.execute("SELECT start_time, end_time FROM jobs").fetchone()
        ((now,),) = connection.execute("SELECT CURRENT_TIMESTAMP")
    assert all(len(value) == len(now) and value[10] == " " for value in row)


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("query", "index"),
    [
        ("SELECT id FROM jobs WHERE status = 'pending' ORDER BY priority, id LIMIT 1", "idx_jobs_status_priority"),
        ("SELECT id FROM jobs WHERE status = 'processing' AND worker_id = 'a'", "idx_jobs_status_priority"),
        (
            "SELECT 1 FROM jobs WHERE status='pending' AND workflow_id='w' AND job_type='t' AND username>'u'",
            "ix_jobs_lines",
        ),
        ("SELECT id FROM jobs WHERE idempotency_key = 'x'", "ux_jobs_idempotency_key"),
    ],
)
async def test_no_question_of_every_day_reads_the_history(path: Path, query: str, index: str) -> None:
    with somebody_else(path) as connection:
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))
    assert index in plan
    assert "SCAN jobs" not in plan
    assert "TEMP B-TREE" not in plan


# -- its versions ----------------------------------------------------------------------------------------------


async def test_another_agents_database_is_refused_and_is_to_be_moved_aside(path: Path) -> None:
    path.parent.mkdir()
    with somebody_else(path) as connection:
        connection.executescript(GUIDE)
        connection.execute(
            "INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('a', 'T2I', 'w', 'pending')"
        )
    with pytest.raises(StoreUnavailable, match="another program") as caught:
        await a_queue(path).open()
    assert "move the file aside" in caught.value.hint
    with somebody_else(path) as connection:
        assert connection.execute("SELECT config_name, status FROM jobs").fetchall() == [("a", "pending")]
        assert connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'alembic%'").fetchall() == []


async def test_a_table_made_with_the_guides_own_statements_is_taken_over_with_what_ended_in_it(path: Path) -> None:
    path.parent.mkdir()
    with somebody_else(path) as connection:
        connection.executescript(GUIDE)
        connection.execute(
            "INSERT INTO jobs (id, config_name, job_type, workflow_id, status) VALUES (7, 'a', 'T2I', 'w', 'done')"
        )
    async with a_queue(path) as jobs:
        (old,) = await jobs.jobs()
        assert (old.id, old.config_name, old.status, old.priority) == (7, "a", QueueStatus.DONE, 50)
        (new,) = await put(jobs)
        assert new.id == 8
        assert (await take(jobs)).id == new.id
    with somebody_else(path) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        assert "jobs_by_hand" not in names


@pytest.mark.fault(65)
async def test_a_database_of_the_version_before_is_brought_up(path: Path) -> None:
    path.parent.mkdir()
    from alembic import command
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(
            "INSERT INTO owners VALUES ('old', 'h', 1, 1.0, 'c', '2026-01-01 00:00:00.000000', "
            "'2026-01-01 00:00:00.000000', NULL)"
        )
    engine.dispose()
    async with a_queue(path) as jobs:
        assert set(await jobs.owners()) == {"old"}
        await put(jobs)
        assert (await take(jobs)).status is QueueStatus.PROCESSING


# -- trouble ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(55)
async def test_while_another_program_holds_the_lock_nothing_is_accepted_and_nothing_lost(
    jobs: SqlJobs, path: Path
) -> None:
    await put(jobs, a_job(), a_job())
    job = await take(jobs)
    named: list[str] = []
    with somebody_else(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for refused in (
            lambda: put(jobs),
            lambda: take_all(jobs),
            lambda: jobs.finish(job.id, job.token, DONE),
            lambda: jobs.finish(job.id, job.token, DONE, publish=lambda: named.append("x")),
            lambda: jobs.write_ahead(job.id, job.token, place="x", prompt_id=a_prompt(), counts_as_run=True),
        ):
            with pytest.raises(StoreUnavailable, match="locked"):
                await refused()
        assert len(await jobs.jobs()) == 2
        connection.execute("ROLLBACK")
    assert named == []
    assert await seen(jobs, job) == job
    assert (await jobs.finish(job.id, job.token, DONE)).status is QueueStatus.DONE


@pytest.mark.fault(54)
async def test_on_a_full_disk_nothing_is_accepted_and_what_was_stays(jobs: SqlJobs) -> None:
    await put(jobs)
    job = await take(jobs)

    async def pages(count: int | None) -> None:
        def limit(connection: Any) -> None:
            now = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {now + 1 if count is None else count}")

        await jobs._database.read(limit)

    await pages(None)
    with pytest.raises(DiskFull):
        await jobs.add([a_job(metadata={"long": "x" * 10_000}) for _ in range(50)])
    named: list[str] = []
    ending = failing(Outcome.FAILED, result={"long": "x" * 100_000})
    with pytest.raises(DiskFull):
        await jobs.finish(job.id, job.token, ending, publish=lambda: named.append("x"))
    assert named == []
    assert (await jobs.counts())[QueueStatus.PENDING] == 0
    assert await seen(jobs, job) == job
    await pages(1_000_000)
    assert (await jobs.finish(job.id, job.token, DONE)).status is QueueStatus.DONE


async def test_one_that_cannot_be_written_spoils_no_other(jobs: SqlJobs) -> None:
    await put(jobs, a_job(), a_job())
    one, two = await take_all(jobs)
    nonsense: Any = object()
    answers = await asyncio.gather(
        jobs.finish(one.id, one.token, DONE),
        jobs.finish(nonsense, 1, DONE),
        jobs.finish(two.id, two.token, DONE),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [QueuedJob, TypeError, QueuedJob]


async def test_what_was_asked_for_is_written_before_it_closes(path: Path) -> None:
    async with a_queue(path) as jobs:
        await put(jobs)
        job = await take(jobs)
        asked = asyncio.ensure_future(jobs.finish(job.id, job.token, DONE))
        await asyncio.sleep(0)
    assert (await asked).status is QueueStatus.DONE
    async with a_queue(path) as jobs:
        assert (await seen(jobs, job)).status is QueueStatus.DONE


async def test_results_with_names_are_committed_whatever_happens_to_others(jobs: SqlJobs) -> None:
    await put(jobs, a_job(), a_job())
    one, two = await take_all(jobs)
    named: list[str] = []

    def fail() -> None:
        raise OSError("no")

    good, bad, late = await asyncio.gather(
        jobs.finish(one.id, one.token, DONE, publish=lambda: named.append("one")),
        jobs.finish(two.id, two.token, DONE, publish=fail),
        jobs.finish(two.id, two.token + 1, DONE, publish=lambda: named.append("late")),
        return_exceptions=True,
    )
    assert isinstance(good, QueuedJob)
    assert isinstance(bad, OSError)
    assert type(late).__name__ == "LeaseLost"
    assert named == ["one"]
    assert await seen(jobs, two) == two


async def test_a_waiting_process_hears_of_a_row_written_by_hand(path: Path) -> None:
    async with a_queue(path) as jobs:
        mark = await jobs.changed(timeout=timedelta(0))
        waiting = asyncio.ensure_future(jobs.changed(timeout=timedelta(days=1), seen=mark))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        with somebody_else(path) as connection:
            connection.execute(
                "INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('h', 'T2I', 'w', 'pending')"
            )
        assert await waiting != mark
        assert (await take(jobs)).config_name == "h"


CHILD: Final = """
import asyncio, os, signal, sys
from pathlib import Path
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.testing.contracts.jobs_words import *

async def main():
    async with SqlJobs(store_from(Path(sys.argv[1]), clock=SystemClock())) as jobs:
        await put(jobs, *(a_job() for _ in range(3)))
        one, two = (await jobs.claim(ALICE, count=2, lease=LEASE))
        await jobs.write_ahead(one.id, one.token, place=HERE, prompt_id="p-1", counts_as_run=True)
        await jobs.finish(two.id, two.token, DONE)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.processes
@pytest.mark.fault(57)
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL there")
async def test_what_was_acknowledged_outlives_the_process_that_is_killed_right_after(path: Path) -> None:
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == -9, process.stderr
    async with a_queue(path) as jobs:
        ahead, done, waiting = await jobs.jobs()
        assert (ahead.status, ahead.prompt_id, ahead.run_count) == (QueueStatus.PROCESSING, "p-1", 1)
        assert (done.status, waiting.status) == (QueueStatus.DONE, QueueStatus.PENDING)
        assert [event.kind for event in await jobs.events()][-1] is EventKind.DONE


# -- everything it can be asked --------------------------------------------------------------------------------

ONE: Final = RowId(1)
ANYTHING: Final[dict[str, Callable[[SqlJobs], Awaitable[object]]]] = {
    "changed": lambda jobs: jobs.changed(timeout=timedelta(0)),
    "register_owner": lambda jobs: jobs.register_owner(an_owner()),
    "sign_off": lambda jobs: jobs.sign_off(OwnerId("alice")),
    "owners": lambda jobs: jobs.owners(),
    "add": lambda jobs: jobs.add([a_job()]),
    "ingest": lambda jobs: jobs.ingest(a_file()),
    "job": lambda jobs: jobs.job("x"),
    "jobs": lambda jobs: jobs.jobs(),
    "jobs_with": lambda jobs: jobs.jobs_with([ONE]),
    "newest": lambda jobs: jobs.newest(),
    "past_results": lambda jobs: jobs.past_results(),
    "settled": lambda jobs: jobs.settled(),
    "story": lambda jobs: jobs.story(1),
    "told": lambda jobs: jobs.told(after=0, limit=1),
    "counts": lambda jobs: jobs.counts(),
    "backlog": lambda jobs: jobs.backlog(),
    "arrivals": lambda jobs: jobs.arrivals(),
    "known_keys": lambda jobs: jobs.known_keys(["x"]),
    "known_files": lambda jobs: jobs.known_files(["x"]),
    "attempts": lambda jobs: jobs.attempts(ONE),
    "events": lambda jobs: jobs.events(),
    "note": lambda jobs: jobs.note(EventKind.NOTE),
    "set_priority": lambda jobs: jobs.set_priority(1, 1),
    "cancel": lambda jobs: jobs.cancel(1),
    "retry": lambda jobs: jobs.retry(1),
    "pause": lambda jobs: jobs.pause(scope="queue", reason="x", message=""),
    "resume": lambda jobs: jobs.resume(),
    "pauses": lambda jobs: jobs.pauses(),
    "claim": lambda jobs: jobs.claim(ALICE, count=1, lease=LEASE),
    "write_ahead": lambda jobs: jobs.write_ahead(ONE, 1, place="", prompt_id=a_prompt(), counts_as_run=True),
    "accepted": lambda jobs: jobs.accepted(ONE, 1, prompt_id=a_prompt()),
    "attached": lambda jobs: jobs.attached(ONE, 1),
    "prompt_gone": lambda jobs: jobs.prompt_gone(ONE, 1, lost=True),
    "finish": lambda jobs: jobs.finish(ONE, 1, DONE),
    "renew": lambda jobs: jobs.renew(ALICE, lease=LEASE),
    "holds": lambda jobs: jobs.holds(ALICE),
    "report": lambda jobs: jobs.report(ALICE, {ONE: (1, "")}),
    "reap": lambda jobs: jobs.reap(lease=LEASE, grace=GRACE, epoch=1),
    "free_places": lambda jobs: jobs.free_places(["x"]),
    "to_end": lambda jobs: jobs.to_end(["x"]),
    "prompt_ended": lambda jobs: jobs.prompt_ended(ONE, a_prompt()),
    "take_role": lambda jobs: jobs.take_role("planner", OwnerId("a"), lease=LEASE),
    "drop_role": lambda jobs: jobs.drop_role("planner", OwnerId("a")),
}


def test_the_list_of_calls_is_whole_and_the_port_is_kept() -> None:
    port = {name for name, _ in inspect.getmembers(JobStore, inspect.isfunction) if not name.startswith("_")}
    assert set(ANYTHING) == port - {"open", "close", "now"}
    kept: Callable[[SqlJobs], JobStore] = lambda jobs: jobs  # noqa: E731 - the type checker reads it
    assert callable(kept)


@pytest.mark.parametrize("call", ANYTHING)
async def test_a_closed_queue_says_so(jobs: SqlJobs, call: str) -> None:
    await jobs.close()
    await jobs.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await ANYTHING[call](jobs)


async def test_a_closed_queue_can_be_opened_again(jobs: SqlJobs) -> None:
    (job,) = await put(jobs)
    await jobs.close()
    await jobs.open()
    await jobs.open()
    assert await seen(jobs, job) == job


@pytest.mark.usefixtures("jobs")
async def test_no_statement_of_the_queue_reads_the_history(path: Path) -> None:
    gc.unfreeze()  # what was there before the first test is not among the objects otherwise
    statements = [thing for thing in gc.get_objects() if type(thing) is Sql]  # dead references raise
    gc.freeze()
    assert len(statements) > 30
    with somebody_else(path) as connection:
        for statement in statements:
            text = statement.text("sqlite")
            names = dict.fromkeys(re.findall(r":([a-z_][a-z0-9_]*)", text))
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", names)]
            if "GROUP BY status" in text:  # counts: the index is read through
                continue
            wanted = "status IN ('done', 'failed')" in text
            # An index of some rows only may be read from its beginning: it has nothing of what has ended.
            assert not any(step.startswith("SCAN jobs") and " ix_jobs_" not in step for step in plan), (text, plan)
            assert not any(step.startswith("SCAN job_") for step in plan), (text, plan)
            assert not wanted or any("ix_jobs_places" in step for step in plan), (text, plan)
