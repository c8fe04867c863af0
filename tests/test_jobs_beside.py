"""What an event stream asks of the queue's store, and reads that wait for no commit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.jobs_beside import JobsBeside
from runcomfy.domain.exceptions import StoreUnavailable
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, RowId, WorkerId
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


async def test_events_come_with_their_jobs_as_they_are(jobs: SqlJobs) -> None:
    first, second = await jobs.add(some(2))
    now = await jobs.cancel(first.id)
    events, found = await jobs.told(after=0, limit=10)
    assert events == await jobs.events()
    assert found == {first.id: now, second.id: second}
    events, found = await jobs.told(after=events[0].number, limit=1)
    assert [event.job_id for event in events] == [second.id]
    assert list(found) == [second.id]
    assert await jobs.told(after=100, limit=10) == ([], {})


async def test_a_jobs_story_is_one_read(jobs: SqlJobs) -> None:
    [job, _] = await jobs.add(some(2))
    [claimed] = await jobs.claim(WorkerId("w"), count=1, lease=timedelta(seconds=60))
    for key in (job.id, job.uid, str(job.id)):
        assert await jobs.story(key) == (claimed, await jobs.attempts(job.id), await jobs.events(job_id=job.id))
    story = await jobs.story(job.id, limit=1)
    assert story is not None
    assert len(story[2]) == 1
    assert await jobs.story("nobody") is None


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
