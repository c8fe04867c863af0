"""
Event streams over a server, whose numbers are given out before they are committed: a listener that comes back while a
number is missing, at this process or at another one, hears every event once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from launcher.hub import Hub
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.job_queue import JobQueue
from runcomfy.application.live import LiveJob
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import JobEvent, QueuedJob
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings
from runcomfy.testing.clock import LoopClock

NOTED = "INSERT INTO job_events (at, kind) VALUES (now(), 'note')"


class Words:
    """Says the least there is to say."""

    async def job(self, job: QueuedJob) -> dict[str, Any]:
        return {"id": job.uid}

    async def event(self, event: JobEvent, job: dict[str, Any] | None) -> Mapping[str, Any]:
        return {"kind": str(event.kind)}

    async def progress(self, job: QueuedJob, live: LiveJob | None) -> Mapping[str, Any]:
        return {}

    async def machines(self) -> Mapping[str, Any]:
        return {}

    async def money(self) -> Mapping[str, Any]:
        return {}


class Process:
    """A process of its own, with its own view of what is committed."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue, self.hub = queue, Hub(queue, None, Words())

    async def put(self) -> int:
        """Put a job in, and return the number of its event."""
        job = await self.queue.enqueue(JobRequest({"1": {"class_type": "A", "inputs": {}}}))
        [event] = await self.queue.store.events(job_id=job.id)
        return event.number

    async def hears(self, after: int | None, seconds: float = 5.0) -> tuple[list[int], int | None]:
        """Listen for a while; return the numbers of the events that came, and the last number that was named."""
        heard: list[int] = []
        last = after
        async with self.hub.listen(None, after) as listener, aclosing(listener.chunks()) as chunks:  # type: ignore[type-var]
            try:
                async with asyncio.timeout(seconds):
                    async for chunk in chunks:
                        for block in chunk.decode().split("\n\n"):
                            lines = block.splitlines()
                            if lines and lines[0].startswith("id: "):
                                last = int(lines[0][4:])
                                heard += [last] if "event: job" in lines else []
            except TimeoutError:
                return heard, last
        raise AssertionError("it was let go")


@asynccontextmanager
async def process(dsn: str, clock: LoopClock) -> AsyncIterator[Process]:
    where = QueueSettings(root=".", jobs_processing="p", jobs_finished="f", database=Secret(dsn))
    async with SqlJobs(store_from(dsn, clock=clock, wake_interval=timedelta(seconds=1))) as store:
        running = Process(JobQueue(store, where))
        try:
            yield running
        finally:
            await running.hub.close()


@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_who_comes_back_while_a_number_is_missing_hears_everything_once(
    ends: str, postgres_dsn: str, clock: LoopClock
) -> None:
    async with process(postgres_dsn, clock) as here, process(postgres_dsn, clock) as there:
        first = await here.put()
        with psycopg.connect(postgres_dsn) as hand:
            hand.execute(NOTED)  # its number is taken, and nobody sees it yet
            second = await here.put()
            assert second == first + 2
            for one in (here, there, here):
                assert await one.hears(first) == ([], first), "what came after it has to wait"
            assert await there.hears(None) == ([], first)
            getattr(hand, ends)()
        expected = [first + 1, second] if ends == "commit" else [second]
        assert await here.hears(first) == (expected, second)
        with psycopg.connect(postgres_dsn) as hand:
            hand.execute("SELECT txid_current()")  # for all that others know, this one may still fill it
            async with process(postgres_dsn, clock) as fresh:
                for one in (fresh, there, here):
                    assert await one.hears(second) == ([], second), "it has heard that"
                hearing = [asyncio.create_task(one.hears(second, 20)) for one in (fresh, there, here)]
                await asyncio.sleep(2)
                third = await there.put()
                hand.rollback()
                assert await asyncio.gather(*hearing) == [([third], third)] * 3
                assert (await fresh.hears(0))[0] == [first, *expected, third]
