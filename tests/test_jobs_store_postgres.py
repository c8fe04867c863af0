"""The queue's database as a server: who is woken by what, rows that others lock, numbers that are given out early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.jobs_look import SURELY_OVER
from runcomfy.domain.exceptions import LeaseLost, StoreUnavailable
from runcomfy.domain.queued import EventKind, QueueStatus, WorkerId
from runcomfy.testing.contracts.jobs_words import (
    ALICE,
    BOB,
    DONE,
    LEASE,
    StoryClock,
    a_job,
    a_prompt,
    plan,
    put,
    take,
    take_all,
)

LISTENED_SECONDS = 0.2


@pytest.fixture
def clock() -> StoryClock:
    return StoryClock()


@pytest.fixture
async def jobs(postgres_dsn: str, clock: StoryClock) -> AsyncIterator[SqlJobs]:
    async with SqlJobs(store_from(postgres_dsn, clock=clock)) as jobs:
        yield jobs


@contextmanager
def somebody_else(dsn: str, *, autocommit: bool = True) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(dsn, autocommit=autocommit) as connection:
        yield connection


class Ear:
    """Hears what the server calls out."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        connection.execute("LISTEN runcomfy_jobs")

    async def calls(self) -> int:
        """Return how many calls came since the last time."""

        def listen() -> int:
            self._connection.execute("SELECT 1")  # whatever was called before this is here after it
            return len(list(self._connection.notifies(timeout=0)))

        return await asyncio.to_thread(listen)


async def test_who_waits_for_work_is_called_when_there_is_some_and_for_nothing_else(
    jobs: SqlJobs, postgres_dsn: str
) -> None:
    with somebody_else(postgres_dsn) as connection, somebody_else(postgres_dsn) as hand:
        ear = Ear(connection)
        await jobs.add([a_job() for _ in range(10)])
        assert await ear.calls() == 1  # once for the statement, not for each row
        hand.execute("INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('h', 'x', 'x', 'pending')")
        assert await ear.calls() == 1
        one, two, three = await jobs.claim(ALICE, count=3, lease=LEASE)
        await jobs.renew(ALICE, lease=LEASE)
        await jobs.report(ALICE, {one.id: (50, "half")})
        await jobs.finish(one.id, one.token, DONE)
        await jobs.set_priority(two.id, 3)
        assert await ear.calls() == 0
        hand.execute("UPDATE jobs SET status = 'pending', worker_id = NULL WHERE id = %s", (two.id,))
        assert await ear.calls() == 1
        await jobs.retry(one.id)
        assert await ear.calls() == 1
        await plan(jobs, dead=[ALICE])
        assert await ear.calls() == 1
        await jobs.cancel(three.id)
        assert await ear.calls() == 1  # its worker is to stop
        await jobs.pause(scope="queue", reason="asked", message="")
        await jobs.resume()
        assert await ear.calls() == 1


async def test_a_row_that_somebody_holds_is_passed_over_by_claims(jobs: SqlJobs, postgres_dsn: str) -> None:
    first, second = await put(jobs, a_job(), a_job())
    with somebody_else(postgres_dsn, autocommit=False) as hand:
        hand.execute("SELECT * FROM jobs WHERE id = %s FOR UPDATE", (first.id,))
        assert [job.id for job in await take_all(jobs)] == [second.id]
        hand.rollback()
    assert [job.id for job in await take_all(jobs)] == [first.id]


async def test_a_reader_of_the_log_waits_at_a_number_that_may_still_be_filled(jobs: SqlJobs, postgres_dsn: str) -> None:
    await put(jobs)
    ((_, last),) = [(event.kind, event.number) for event in await jobs.events()]
    told = "INSERT INTO job_events (at, kind) VALUES (now(), 'note')"
    with somebody_else(postgres_dsn, autocommit=False) as hand:
        for ends in (hand.commit, hand.rollback):
            hand.execute(told)
            await put(jobs)
            assert await jobs.events(after=last) == []
            assert await jobs.events(after=last) == []
            ends()
            found = await jobs.events(after=last)
            expected = [EventKind.NOTE, EventKind.ENQUEUED] if ends == hand.commit else [EventKind.ENQUEUED]
            assert [event.kind for event in found] == expected
            last = found[-1].number


async def test_an_old_gap_in_the_log_stops_nobody_while_a_transaction_is_open(
    jobs: SqlJobs, postgres_dsn: str, clock: StoryClock
) -> None:
    with somebody_else(postgres_dsn, autocommit=False) as hand:
        hand.execute("INSERT INTO job_events (at, kind) VALUES (now(), 'note')")
        hand.rollback()
        hand.execute("SELECT txid_current()")  # somebody forgot to commit
        await put(jobs)
        assert await jobs.events() == []
        clock.jump(SURELY_OVER + timedelta(seconds=1))
        assert [event.kind for event in await jobs.events()] == [EventKind.ENQUEUED]


@pytest.mark.looptime(False)  # who finds a row locked waits, and the heart never rests: virtual time would stand still
async def test_workers_hearts_and_the_planner_do_not_stop_each_other(jobs: SqlJobs, postgres_dsn: str) -> None:
    workers = [WorkerId(f"w{n}") for n in range(3)]
    clock = StoryClock()
    await jobs.add([a_job() for _ in range(150)])
    over = False

    async def work(worker: WorkerId) -> None:
        async with SqlJobs(store_from(postgres_dsn, clock=clock)) as own:
            while found := await own.claim(worker, count=10, lease=LEASE):
                await asyncio.gather(*(own.finish(job.id, job.token, DONE) for job in reversed(found)))

    async def beat() -> None:
        async with SqlJobs(store_from(postgres_dsn, clock=clock)) as own:
            while not over:
                for worker in workers:
                    await own.renew(worker, lease=LEASE)
                await plan(own)

    heart = asyncio.ensure_future(beat())
    await asyncio.gather(*map(work, workers))
    over = True
    await heart
    assert (await jobs.counts())[QueueStatus.DONE] == 150
    told = [event.kind for event in await jobs.events(limit=10_000)]
    assert told.count(EventKind.DONE) == told.count(EventKind.CLAIMED) == 150


async def test_pages_have_room_for_leases_to_be_renewed_in_place(jobs: SqlJobs, postgres_dsn: str) -> None:
    await jobs.add([a_job() for _ in range(500)])
    await jobs.claim(BOB, count=500, lease=LEASE)
    with somebody_else(postgres_dsn) as hand:
        hand.execute("SELECT pg_stat_force_next_flush()") if hand.info.server_version >= 150000 else None
        query = "SELECT coalesce(n_tup_hot_upd, 0) FROM pg_stat_user_tables WHERE relname = 'jobs'"
        for _ in range(6):
            assert len(await jobs.renew(BOB, lease=LEASE)) == 500
        await jobs.run(lambda connection: connection.exec_driver_sql("SELECT pg_stat_force_next_flush()"))
        await jobs.counts()
        hand.execute("SELECT pg_stat_clear_snapshot()")
        (in_place,) = hand.execute(query).fetchone() or (0,)
    assert in_place >= 1_500


async def test_no_index_is_touched_by_a_renewed_lease_or_by_progress(jobs: SqlJobs, postgres_dsn: str) -> None:
    await put(jobs)
    await take(jobs)
    with somebody_else(postgres_dsn) as hand:
        indexes = " ".join(
            text for (text,) in hand.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'jobs'").fetchall()
        )
    for column in ("lease_expires_at", "progress", "message"):
        assert column not in indexes
    for name in ("idx_jobs_status_priority", "idx_jobs_started", "ix_jobs_pending", "ix_jobs_processing"):
        assert name in indexes


# -- somebody's open transaction -------------------------------------------------------------------------------


async def test_a_row_in_somebodys_open_transaction_holds_up_nothing_else(jobs: SqlJobs, postgres_dsn: str) -> None:
    await put(jobs, a_job(), a_job(), a_job())
    one, two, three = await take_all(jobs)
    with somebody_else(postgres_dsn, autocommit=False) as hand:
        hand.execute("UPDATE jobs SET priority = 1 WHERE id = %s", (one.id,))
        stuck = asyncio.ensure_future(jobs.finish(one.id, one.token, DONE))
        named = asyncio.ensure_future(jobs.finish(two.id, two.token, DONE, publish=lambda: None))
        assert (await named).status is QueueStatus.DONE
        assert await jobs.renew(ALICE, lease=LEASE) == {one.id: one.token, three.id: three.token}
        assert [job.id for job in await plan(jobs, dead=[ALICE])] == [three.id]
        assert not stuck.done()
        hand.commit()
        done = await stuck
    assert (done.status, done.priority) == (QueueStatus.DONE, 1)


@pytest.mark.parametrize("call", ["finish", "publish", "write_ahead", "cancel", "set_priority"])
async def test_who_cannot_get_at_a_row_says_so_in_the_end(jobs: SqlJobs, postgres_dsn: str, call: str) -> None:
    await put(jobs)
    job = await take(jobs)
    asked: dict[str, Callable[[], Awaitable[object]]] = {
        "finish": lambda: jobs.finish(job.id, job.token, DONE),
        "publish": lambda: jobs.finish(job.id, job.token, DONE, publish=lambda: pytest.fail("named")),
        "write_ahead": lambda: jobs.write_ahead(job.id, job.token, place="x", prompt_id=a_prompt(), counts_as_run=True),
        "cancel": lambda: jobs.cancel(job.id),
        "set_priority": lambda: jobs.set_priority(job.id, 1),
    }
    with somebody_else(postgres_dsn, autocommit=False) as hand:
        hand.execute("SELECT * FROM jobs FOR UPDATE")
        with pytest.raises(StoreUnavailable, match="locked by another program"):
            await asked[call]()
        hand.rollback()
    assert (await jobs.jobs())[0] == job


async def test_a_row_deleted_under_a_workers_hands_is_lost(jobs: SqlJobs, postgres_dsn: str) -> None:
    await put(jobs)
    job = await take(jobs)
    with somebody_else(postgres_dsn, autocommit=False) as hand:
        hand.execute("DELETE FROM jobs")
        asked = asyncio.ensure_future(jobs.finish(job.id, job.token, DONE))
        await asyncio.sleep(1)
        assert not asked.done()
        hand.commit()
    with pytest.raises(LeaseLost, match="deleted"):
        await asked
