"""What an event stream asks of the queue's store, and reads that wait for no commit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.jobs_beside import JobsBeside
from runcomfy.domain.exceptions import StoreUnavailable
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, RowId
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import LoopClock


@pytest_asyncio.fixture(params=["file", "postgres", "memory"])
async def jobs(request: pytest.FixtureRequest, tmp_path: Path, clock: LoopClock) -> AsyncIterator[SqlJobs]:
    name = {"file": str(tmp_path / "queue.sqlite3"), "memory": ":memory:"}.get(request.param)
    where = name or request.getfixturevalue("postgres_dsn")
    async with SqlJobs(store_from(Secret(where), clock=clock, durable=False)) as jobs:
        yield jobs


def some(count: int) -> list[NewJob]:
    return [NewJob(JobRequest({"1": {"class_type": "A", "inputs": {}}}), "w") for _ in range(count)]


async def test_jobs_by_their_numbers(jobs: SqlJobs) -> None:
    first, _, third = await jobs.add(some(3))
    found = await jobs.jobs_with([first.id, third.id, RowId(4_711)])
    assert found == {first.id: first, third.id: third}
    assert await jobs.jobs_with([]) == {}


async def test_everything_to_come_is_above_what_is_settled(jobs: SqlJobs) -> None:
    assert await jobs.settled() == 0
    await jobs.add(some(3))
    await asyncio.sleep(3_600)
    settled = await jobs.settled()
    assert settled == (await jobs.events())[-1].number
    await jobs.add(some(1))
    assert [event.number > settled for event in await jobs.events(after=settled)] == [True]


async def test_reads_beside_see_what_was_written_just_now(jobs: SqlJobs) -> None:
    async with JobsBeside(jobs) as beside:
        [job] = await jobs.add(some(1))
        for number in range(2, 6):
            [job] = await (jobs if number % 2 else beside).add(some(1))
            assert await beside.job(job.uid) == job
            assert len(await beside.events()) == number
        await beside.cancel(job.id)
        seen = await beside.job(job.id)
        assert seen is not None
        assert seen.cancelled
    with pytest.raises(StoreUnavailable):
        await beside.job(job.id)
    assert await jobs.job(job.id) == seen, "the store itself stays open"


async def test_reads_beside_wait_for_no_writer(jobs: SqlJobs, request: pytest.FixtureRequest) -> None:
    if "memory" in request.node.callspec.id:
        pytest.skip("a database in memory has one connection")
    [job] = await jobs.add(some(1))
    goes_on, begun = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(_: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        assert goes_on.wait(60)

    async with JobsBeside(jobs) as beside:
        writing = asyncio.create_task(jobs.run(slow))
        try:
            await begun.wait()
            assert await beside.job(job.id) == job, "while the transaction is open"
            assert not writing.done()
        finally:
            goes_on.set()
            await writing
