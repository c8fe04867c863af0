"""
Two ready queues on the same PostgreSQL, each used as its own documentation says, with a handler that does nothing.

They need the dependency group `bench`; `make bench` installs it.
"""

from __future__ import annotations

import asyncio
import time

import psycopg


async def procrastinate_rate(dsn: str, *, jobs: int, workers: int) -> float:
    """Return how many jobs a second one procrastinate worker of that concurrency works off."""
    import procrastinate

    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn, min_size=4, max_size=workers + 4))

    async def handler() -> None:
        return

    nothing = app.task(handler, name="nothing")

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for start in range(0, jobs, 500):
            await nothing.batch_defer_async(*[{} for _ in range(min(500, jobs - start))])
        began = time.perf_counter()
        await app.run_worker_async(concurrency=workers, wait=False, install_signal_handlers=False)
        seconds = time.perf_counter() - began
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        cursor = await connection.execute("SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'")
        row = await cursor.fetchone()
    assert row == (jobs,), row
    return jobs / seconds


async def pgqueuer_rate(dsn: str, *, jobs: int, batch: int, at_once: int) -> float:
    """Return how many jobs a second pgqueuer works off, claiming `batch` at a time with `at_once` handlers."""
    import asyncpg
    from pgqueuer import AsyncpgPoolDriver, PgQueuer
    from pgqueuer.domain.types import QueueExecutionMode

    async with asyncpg.create_pool(dsn, min_size=4, max_size=20) as pool:
        queuer = PgQueuer(AsyncpgPoolDriver(pool))
        await queuer.qm.queries.install()
        done = 0

        async def handler(_job: object) -> None:
            nonlocal done
            done += 1

        queuer.entrypoint("nothing")(handler)

        for start in range(0, jobs, 1_000):
            count = min(1_000, jobs - start)
            await queuer.qm.queries.enqueue(["nothing"] * count, [None] * count, [0] * count)
        began = time.perf_counter()
        await asyncio.wait_for(
            queuer.qm.run(batch_size=batch, mode=QueueExecutionMode.drain, max_concurrent_tasks=at_once), 300
        )
        seconds = time.perf_counter() - began
    assert done == jobs, done
    return jobs / seconds
