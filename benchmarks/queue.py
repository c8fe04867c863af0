"""
How much queue the queue is: the same figures on SQLite and on PostgreSQL, beside two ready queues on the same server.

Bars, all within one run: claim and complete with event log and attempt rows, batch claim, 16 workers: at least 4,000
a second on SQLite, on PostgreSQL at least 3 times procrastinate and half of pgqueuer; with a backlog of 100,000 within
20 % of that; enqueue to handler start, idle, p99 under 10 ms; 10,000 leases renewed in under 200 ms; 1,000,000 rows of
history slow the claim by less than 20 %.

Commits are flushed to the disk everywhere (`synchronous=FULL`, `fsync=on`). The handler does nothing, so what is
measured is the queue alone.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import psycopg
from sqlalchemy import Connection, text

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from benchmarks.rivals import pgqueuer_rate, procrastinate_rate
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.processes import ProcessTable
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import Ending, NewJob, Outcome, QueuedJob, WorkerId
from runcomfy.testing.postgres import PostgresForTests

WORKERS = 16
JOBS = 6_000
BACKLOG = 100_000
HISTORY = 1_000_000
HISTORY_PART = 50_000
LEASES = 10_000
PICKUPS = 400
LEASE = timedelta(seconds=60)
BAR_RATE = 4_000
BAR_BACKLOG = 0.8
BAR_PICKUP_MS = 10.0
BAR_RENEWAL_MS = 200.0
BAR_HISTORY_PERCENT = 20.0
BAR_PROCRASTINATE = 3.0
BAR_PGQUEUER = 0.5

Open = Callable[[], SqlJobs]


def new_jobs(count: int) -> list[NewJob]:
    return [NewJob(JobRequest(workflow="image_invert"), "image_invert") for _ in range(count)]


async def fill(store: SqlJobs, count: int) -> float:
    """Put jobs in, a thousand at a time; return how many a second."""
    began = time.perf_counter()
    for start in range(0, count, 1_000):
        await store.add(new_jobs(min(1_000, count - start)))
    return count / (time.perf_counter() - began)


async def worker_of(store: SqlJobs) -> WorkerId:
    owner = ProcessTable().me(now=store.now())
    await store.register_owner(owner)
    return WorkerId(owner.id)


async def work_off(store: SqlJobs, count: int, *, workers: int = WORKERS) -> float:
    """Claim and complete `count` jobs as an executor does: one claim for all free slots. Return jobs a second."""
    me = await worker_of(store)
    done = Ending(Outcome.DONE, result={"outputs": []})
    ended: asyncio.Event = asyncio.Event()
    running: set[asyncio.Task[None]] = set()
    finished = 0

    async def handle(job: QueuedJob) -> None:
        nonlocal finished
        await store.finish(job.id, job.token, done)
        finished += 1

    def over(task: asyncio.Task[None]) -> None:
        running.discard(task)
        ended.set()
        task.result()

    began = time.perf_counter()
    claimed = 0
    while claimed < count:
        free = min(workers - len(running), count - claimed)
        if free:
            for job in await store.claim(me, count=free, lease=LEASE):
                claimed += 1
                task = asyncio.create_task(handle(job))
                running.add(task)
                task.add_done_callback(over)
        else:
            ended.clear()
            await ended.wait()
    while running:
        await asyncio.wait(set(running))
    assert finished == count
    return count / (time.perf_counter() - began)


async def claim_time(store: SqlJobs, *, rounds: int = 60) -> float:
    """Return the median seconds of a claim of one job that is completed afterwards."""
    me = await worker_of(store)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        (job,) = await store.claim(me, count=1, lease=LEASE)
        seconds.append(time.perf_counter() - began)
        await store.finish(job.id, job.token, Ending(Outcome.DONE))
    return middle(seconds)


async def pickups(waiting: SqlJobs, giving: SqlJobs) -> list[float]:
    """Return the seconds from enqueue, through one connection, to the start of the handler behind another, idle one."""
    me = await worker_of(waiting)
    started: dict[int, float] = {}
    picked = asyncio.Event()

    async def executor() -> None:
        mark = 0
        while True:
            mark = await waiting.changed(timeout=timedelta(seconds=1), seen=mark)
            for job in await waiting.claim(me, count=1, lease=LEASE):
                started[job.id] = time.perf_counter()
                picked.set()
                await waiting.finish(job.id, job.token, Ending(Outcome.DONE))

    task = asyncio.create_task(executor())
    seconds = []
    try:
        for _ in range(PICKUPS):
            await asyncio.sleep(0.01 + random.random() / 50)
            picked.clear()
            began = time.perf_counter()
            (job,) = await giving.add(new_jobs(1))
            while job.id not in started:
                await picked.wait()
                picked.clear()
            seconds.append(started[job.id] - began)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return seconds[20:]


async def renewals(store: SqlJobs) -> float:
    """Return the median seconds of renewing 10,000 leases."""
    me = await worker_of(store)
    await fill(store, LEASES)
    while len(await store.holds(me)) < LEASES:
        await store.claim(me, count=1_000, lease=LEASE)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        held = await store.renew(me, lease=LEASE)
        seconds.append(time.perf_counter() - began)
        assert len(held) == LEASES
    return middle(seconds)


async def write_history(store: SqlJobs, count: int) -> None:
    """Write a past into the table, as the database itself writes it quickest; in parts, for a statement has a limit."""
    for first in range(1, count, HISTORY_PART):
        last = first + HISTORY_PART - 1
        numbers = (
            f"WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT i FROM n"  # noqa: S608
            if store.dialect == "sqlite"
            else f"SELECT generate_series({first}, {last}) AS i"
        )
        past = (
            "INSERT INTO jobs (config_name, job_type, workflow_id, priority, status, run_count, start_time, end_time, "  # noqa: S608
            "duration, metadata) SELECT 'past_' || i, 'T2I', 'image_invert', 50, 'done', 1, CURRENT_TIMESTAMP, "
            f"CURRENT_TIMESTAMP, 1.5, '{{}}' FROM ({numbers}) AS numbers"
        )
        await store.run(partial(_write, past))
    if store.dialect == "postgresql":
        await store.run(partial(_write, "ANALYZE jobs"))


def _write(statement: str, connection: Connection) -> None:
    connection.execute(text(statement))


@asynccontextmanager
async def opened(open_one: Open) -> AsyncIterator[SqlJobs]:
    store = open_one()
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def measure(
    found: Findings, name: str, fresh: Callable[[], Open], settle: Callable[[], None] = lambda: None
) -> float:
    """Measure everything on one kind of database; return claims and completes a second.

    `settle` has the database finish what it does in the background after very many rows were written.
    """
    async with opened(fresh()) as store:
        put_in = await fill(store, JOBS * 3)
        await work_off(store, 1_000)
        rates = [await work_off(store, JOBS) for _ in range(2)]
        rate = max(rates)
    report(
        "queue-throughput", database=name, workers=WORKERS, per_second=round(rate), enqueued_per_second=round(put_in)
    )
    claims = f"{name}: claim and complete, 16 workers"
    if name == "sqlite":
        found.at_least(claims, rate, BAR_RATE, "/s")
    else:
        found.told(claims, rate, "/s")  # what a server does depends on it; its bars are the rivals beside us
    async with opened(fresh()) as store:
        await fill(store, BACKLOG)
        await work_off(store, 1_000)
        behind = max([await work_off(store, JOBS) for _ in range(2)])
    report("queue-backlog", database=name, backlog=BACKLOG, per_second=round(behind), share=round(behind / rate, 2))
    found.at_least(f"{name}: the same with 100,000 waiting, share of it", behind / rate, BAR_BACKLOG)
    one = fresh()
    async with opened(one) as waiting, opened(one) as giving:
        seconds = await pickups(waiting, giving)
    report(
        "queue-pickup",
        database=name,
        p50_ms=round(1000 * middle(seconds), 2),
        p99_ms=round(1000 * high(seconds, 0.99), 2),
    )
    found.told(f"{name}: enqueue to handler start, idle, median", 1000 * middle(seconds), "ms")
    found.at_most(f"{name}: enqueue to handler start, idle, p99", 1000 * high(seconds, 0.99), BAR_PICKUP_MS, "ms")
    async with opened(fresh()) as store:
        renewed = await renewals(store)
    report("queue-renewal", database=name, leases=LEASES, ms=round(1000 * renewed, 1))
    found.at_most(f"{name}: 10,000 leases renewed", 1000 * renewed, BAR_RENEWAL_MS, "ms")
    rates_without, rates_with, alone_without, alone_with = [], [], [], []
    async with opened(fresh()) as without, opened(fresh()) as past:
        for store in (without, past):
            await fill(store, 22_000)
            await work_off(store, 1_000)
        await write_history(past, HISTORY)
        await asyncio.to_thread(settle)
        await claim_time(past)
        for _ in range(5):  # in turns: what else the computer does slows both
            rates_without.append(await work_off(without, 3_000))
            rates_with.append(await work_off(past, 3_000))
            alone_without.append(await claim_time(without))
            alone_with.append(await claim_time(past))
    rate_before, rate_after = max(rates_without), max(rates_with)
    before, after = min(alone_without), min(alone_with)
    report(
        "queue-history",
        database=name,
        rows=HISTORY,
        per_second_before=round(rate_before),
        per_second_after=round(rate_after),
        batches_slower_percent=round(100 * (rate_before / rate_after - 1), 1),
        before_ms=round(1000 * before, 3),
        after_ms=round(1000 * after, 3),
        one_by_one_slower_percent=round(100 * (after / before - 1), 1),
    )
    slower, alone = 100 * (rate_before / rate_after - 1), 100 * (after / before - 1)
    found.at_most(f"{name}: slower with 1,000,000 rows of history", slower, BAR_HISTORY_PERCENT, "%")
    found.told(f"{name}: the same, a single claim with a commit of its own", alone, "%")
    return rate


def sqlite_files(folder: Path) -> Callable[[], Open]:
    numbers = iter(range(1_000))

    def fresh() -> Open:
        path = folder / f"queue-{next(numbers)}.sqlite3"
        return lambda: SqlJobs(store_from(str(path), clock=SystemClock()))

    return fresh


def postgres_databases(server: PostgresForTests, made: list[str]) -> Callable[[], Open]:
    def fresh() -> Open:
        dsn = server.database()
        made.append(dsn)
        return lambda: SqlJobs(store_from(dsn, clock=SystemClock()))

    return fresh


async def run(which: Sequence[str] = ("sqlite", "postgresql")) -> Result:
    found = Findings("queue", "Every commit is flushed to the disk; the handler does nothing.")
    folder = Path(mkdtemp(prefix="comfyctl-bench-"))
    try:
        if "sqlite" in which:
            await measure(found, "sqlite", sqlite_files(folder))
        if "postgresql" in which:
            await _postgres(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found.result()


async def _postgres(found: Findings) -> None:
    with PostgresForTests() as server:
        made: list[str] = []

        def settle() -> None:
            with psycopg.connect(made[-1], autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE jobs")  # else the server does it meanwhile
                connection.execute("CHECKPOINT")

        ours = await measure(found, "postgresql", postgres_databases(server, made), settle)
        procrastinate = await procrastinate_rate(server.database(), jobs=2_000, workers=WORKERS)
        # Sixteen handlers as we have them, and twice as many, which suits it better.
        same = await pgqueuer_rate(server.database(), jobs=JOBS, batch=WORKERS // 2, at_once=WORKERS)
        twice = await pgqueuer_rate(server.database(), jobs=JOBS, batch=WORKERS, at_once=2 * WORKERS)
    report(
        "queue-rivals",
        database="postgresql",
        ours_per_second=round(ours),
        procrastinate_per_second=round(procrastinate),
        pgqueuer_per_second=round(same),
        pgqueuer_32_handlers_per_second=round(twice),
        times_procrastinate=round(ours / procrastinate, 2),
        share_of_pgqueuer=round(ours / same, 2),
        share_of_pgqueuer_32=round(ours / twice, 2),
    )
    found.at_least("postgresql: claim and complete, times procrastinate", ours / procrastinate, BAR_PROCRASTINATE)
    found.at_least("postgresql: claim and complete, share of pgqueuer", ours / same, BAR_PGQUEUER)
    found.told("postgresql: share of pgqueuer with 32 handlers", ours / twice)


def main() -> Result:
    return asyncio.run(run())
