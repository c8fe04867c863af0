"""Whatever workers, planner and users do, in whatever order: no job is lost, none is held twice, the log tells all."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.exceptions import JobBusy, LeaseLost
from runcomfy.domain.job import PromptId
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import Ending, EventKind, Outcome, Phase, QueuedJob, QueueStatus, RowId, WorkerId
from runcomfy.testing.contracts.jobs_words import GRACE, HERE, LEASE, PLANNER, StoryClock, a_job, a_prompt, failing

WORKERS: Final = [WorkerId(name) for name in ("alice", "bob", "carol")]

AFTER: Final[Mapping[EventKind, QueueStatus]] = {
    EventKind.ENQUEUED: QueueStatus.PENDING,
    EventKind.CLAIMED: QueueStatus.PROCESSING,
    EventKind.DONE: QueueStatus.DONE,
    EventKind.FAILED: QueueStatus.FAILED,
    EventKind.CANCELLED: QueueStatus.FAILED,
    EventKind.QUARANTINED: QueueStatus.FAILED,
    EventKind.REQUEUED: QueueStatus.PENDING,
    EventKind.PUT_BACK: QueueStatus.PENDING,
    EventKind.LOST: QueueStatus.PENDING,
    EventKind.RETRIED: QueueStatus.PENDING,
}
ENDED: Final = {QueueStatus.DONE, QueueStatus.FAILED}


class World:
    """A queue, three workers that remember what they claimed, and what must hold after every step."""

    def __init__(self, store: SqlJobs, draw: random.Random) -> None:
        self.store = store
        self.draw = draw
        self.claims: list[QueuedJob] = []
        self.given_out: Counter[tuple[RowId, int]] = Counter()
        self.published: Counter[tuple[RowId, int]] = Counter()

    # -- what may happen -----------------------------------------------------------------------------------

    async def add(self) -> None:
        await self.store.add([a_job(priority=self.draw.choice([1, 50, 99]))])

    async def claim(self) -> None:
        worker = self.draw.choice(WORKERS)
        for job in await self.store.claim(worker, count=2, lease=LEASE, places=[HERE]):
            self.claims.append(job)
            self.given_out[job.id, job.token] += 1

    async def step(self) -> None:
        if not self.claims:
            return
        job = self.draw.choice(self.claims)
        call = self.draw.choice(["ahead", "accepted", "gone", "lost", "attached"])
        now = await self.store.job(job.id)
        if now is not None and now.phase is Phase.NONE:
            call = "ahead"  # nothing can be said of a prompt that there is not
        try:
            match call:
                case "ahead":
                    await self.store.write_ahead(
                        job.id, job.token, place=HERE, prompt_id=a_prompt(), counts_as_run=True
                    )
                case "accepted":
                    await self.store.accepted(job.id, job.token, prompt_id=PromptId("p"))
                case "attached":
                    await self.store.attached(job.id, job.token)
                case _:
                    await self.store.prompt_gone(job.id, job.token, lost=call == "lost")
        except LeaseLost:
            assert not await self.holds(job)
        else:
            assert await self.holds(job)

    async def finish(self) -> None:
        if not self.claims:
            return
        job = self.draw.choice(self.claims)
        outcomes = (Outcome.DONE, Outcome.FAILED, Outcome.REQUEUED, Outcome.PUT_BACK, Outcome.QUARANTINED)
        outcome = self.draw.choice(outcomes)
        ending = Ending(outcome) if outcome in (Outcome.DONE, Outcome.PUT_BACK) else failing(outcome)
        if outcome is Outcome.REQUEUED:
            ending = failing(outcome, delay=timedelta(seconds=self.draw.choice([0, 5])), end_prompt=True)
        held = await self.holds(job)

        def publish() -> None:
            self.published[job.id, job.token] += 1

        try:
            await self.store.finish(job.id, job.token, ending, publish=publish if outcome is Outcome.DONE else None)
        except LeaseLost:
            assert not held

    async def renew(self) -> None:
        worker = self.draw.choice(WORKERS)
        held = await self.store.renew(worker, lease=LEASE)
        assert all(self.given_out[job_id, token] == 1 for job_id, token in held.items())

    async def time(self) -> None:
        await asyncio.sleep(self.draw.choice([1, 10, 31, 61]))

    async def reap(self) -> None:
        epoch = await self.store.take_role("planner", OwnerId(PLANNER), lease=LEASE)
        assert epoch is not None
        dead = [self.draw.choice(WORKERS)] if self.draw.random() < 0.5 else []
        await self.store.reap(lease=LEASE, grace=GRACE, dead=dead, epoch=epoch)

    async def cancel(self) -> None:
        if jobs := await self.store.jobs():
            assert (await self.store.cancel(self.draw.choice(jobs).id)).ended

    async def retry(self) -> None:
        if jobs := await self.store.jobs():
            job = self.draw.choice(jobs)
            try:
                assert (await self.store.retry(job.id)).status is QueueStatus.PENDING
            except JobBusy:
                assert job.status is QueueStatus.PROCESSING

    # -- what must hold ------------------------------------------------------------------------------------

    async def holds(self, job: QueuedJob) -> bool:
        now = await self.store.job(job.id)
        return now is not None and now.status is QueueStatus.PROCESSING and now.token == job.token

    async def check(self) -> None:
        assert all(count == 1 for count in self.given_out.values()), "a token was given out twice"
        assert all(count == 1 for count in self.published.values()), "results were named twice"
        for job in await self.store.jobs():
            await self.check_job(job)

    async def check_job(self, job: QueuedJob) -> None:
        attempts = await self.store.attempts(job.id)
        events = await self.store.events(job_id=job.id)
        running = job.status is QueueStatus.PROCESSING
        assert running == (job.worker_id is not None) == (job.lease_expires_at is not None)
        assert [a.token for a in attempts if a.ended_at is None] == ([job.token] if running else [])
        assert all((a.ended_at is None) == (a.outcome is None) for a in attempts)
        assert (job.phase is Phase.NONE) == (job.prompt_id is None) == (job.place is None)
        assert (job.reason == "") == (job.status is not QueueStatus.FAILED)
        assert (job.end_time is not None) == job.ended
        # The log, read from its beginning, ends where the row is.
        status = None
        for event in events:
            if event.kind in AFTER:
                allowed = {EventKind.RETRIED} if status in ENDED else set(AFTER)
                assert event.kind in allowed, f"{event.kind} after the end"
                status = AFTER[event.kind]
        assert status is job.status
        told = Counter(event.kind for event in events)
        assert told[EventKind.CLAIMED] == len(attempts)
        assert told[EventKind.DONE] == sum(a.outcome is Outcome.DONE for a in attempts)
        assert job.retries_attempted <= told[EventKind.REQUEUED]
        assert job.run_count <= len(attempts) + told[EventKind.SUBMITTING]
        tokens = [event.token for event in events if event.kind is not EventKind.DISCARDED]
        assert tokens == sorted(tokens)


STEPS: Final = ("add", "claim", "claim", "step", "finish", "finish", "renew", "time", "reap", "cancel", "retry")


@given(st.lists(st.sampled_from(STEPS), min_size=15, max_size=50), st.integers(0, 2**32))
@settings(
    max_examples=settings().max_examples * 2 // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_history_loses_a_job_or_gives_it_to_two(tmp_path: Path, steps: list[str], seed: int) -> None:
    empty, path = tmp_path / "empty.sqlite3", tmp_path / "queue.sqlite3"
    clock = StoryClock()
    if not empty.exists():
        async with store_from(empty, clock=clock, durable=False):
            pass
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    shutil.copyfile(empty, path)
    async with SqlJobs(store_from(path, clock=clock, durable=False)) as store:
        world = World(store, random.Random(seed))
        await world.add()
        for name in steps:
            await getattr(world, name)()
            await world.check()
