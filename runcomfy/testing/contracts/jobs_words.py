"""What the tests of a queue's database are told with: a clock that jumps, jobs, workers, the ends they come to."""

# ruff: noqa: S101 - asserts show what is shown

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from runcomfy.domain.exceptions import NodeFailed
from runcomfy.domain.job import JobRequest, PromptId
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import (
    Ending,
    EventKind,
    NewJob,
    Outcome,
    QueuedJob,
    RowId,
    WorkerId,
)
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.clock import LoopClock

ALICE, BOB, CAROL = WorkerId("alice"), WorkerId("bob"), WorkerId("carol")
PLANNER: Final = OwnerId("the planner")
LEASE: Final = timedelta(seconds=60)
GRACE: Final = timedelta(minutes=5)
DAY: Final = timedelta(days=1)
HERE, THERE = "server:here:8188", "server:there:8188"

DONE: Final = Ending(Outcome.DONE, result={"outputs": [{"path": "/a.png"}], "seeds": {"3.seed": 7}})

Opened = Callable[[], AbstractAsyncContextManager[JobStore]]
"""Opens the same database once more, as another process would."""
RunSql = Callable[[str], Sequence[tuple[Any, ...]]]
"""Runs a statement through a plain driver, as a user does; returns the rows, if it gives any."""

_numbers = itertools.count(1)


class StoryClock(LoopClock):
    """The time of the story; it jumps when told to."""

    def __init__(self) -> None:
        super().__init__()
        self._offset = timedelta(0)

    def now(self) -> datetime:
        """Return the time, as somebody set it."""
        return super().now() + self._offset

    def jump(self, by: timedelta) -> None:
        """Set the clock forward or back."""
        self._offset += by

    def follow_the_wall(self) -> None:
        """Show the real time, for stories in which the database looks at its own clock."""
        self._offset += datetime.now(UTC) - self.now()


def a_job(**fields: Any) -> NewJob:
    """Return a job for the queue. `out_file` and other fields of the request go there."""
    asked = {name: fields.pop(name) for name in ("out_file", "inputs", "timeout", "sets") if name in fields}
    return NewJob(**{"request": JobRequest("image_invert", **asked), "workflow_id": "image_invert", **fields})


def a_file(name: str = "cat.yaml", content: str = "1", **fields: Any) -> NewJob:
    """Return the job that a job file says; `content` stands for its hash."""
    words = {"config_name": name, "source_path": f"/jobs/processing/image/{name}", "content_sha256": content}
    return a_job(**{**words, **fields})


def a_prompt() -> PromptId:
    """Return a prompt's id that no other prompt has."""
    return PromptId(f"00000000-0000-4000-8000-{next(_numbers):012}")


def failing(outcome: Outcome, **fields: Any) -> Ending:
    """Return how an attempt ends that met an error."""
    error = NodeFailed(
        "node 7 broke", hint="look at node 7", details={"node": "7", "traceback": ["line 1\n", "line 2\n"]}
    )
    return Ending(outcome, error=error.as_dict(), **fields)


async def put(store: JobStore, *jobs: NewJob) -> list[QueuedJob]:
    """Put jobs in, one `a_job()` if none is given."""
    return list(await store.add(jobs or [a_job()]))


async def take(store: JobStore, worker: WorkerId = ALICE, **options: Any) -> QueuedJob:
    """Claim one job, which there must be."""
    jobs = await store.claim(worker, **{"count": 1, "lease": LEASE, **options})
    assert len(jobs) == 1, "there was nothing to claim"
    return jobs[0]


async def take_all(store: JobStore, worker: WorkerId = ALICE, **options: Any) -> list[QueuedJob]:
    """Claim whatever there is."""
    return list(await store.claim(worker, **{"count": 100, "lease": LEASE, **options}))


async def submit(store: JobStore, job: QueuedJob, place: str = HERE) -> QueuedJob:
    """Send the job's prompt: written ahead, and accepted."""
    ahead = await store.write_ahead(job.id, job.token, place=place, prompt_id=a_prompt(), counts_as_run=True)
    assert ahead.prompt_id is not None
    await store.accepted(job.id, job.token, prompt_id=ahead.prompt_id)
    return await seen(store, job)


async def seen(store: JobStore, job: QueuedJob | RowId) -> QueuedJob:
    """Return the job as it is now."""
    found = await store.job(job.id if isinstance(job, QueuedJob) else job)
    assert found is not None
    return found


async def kinds(store: JobStore, job: QueuedJob) -> list[EventKind]:
    """Return what the log tells of a job, as words."""
    return [event.kind for event in await store.events(job_id=job.id)]


async def plan(store: JobStore, **options: Any) -> list[QueuedJob]:
    """Reap, as the planner."""
    epoch = await store.take_role("planner", PLANNER, lease=LEASE)
    assert epoch is not None
    return list(await store.reap(**{"lease": LEASE, "grace": GRACE, "epoch": epoch, **options}))


def an_owner(owner_id: str = "alice", **fields: Any) -> Owner:
    """Return a process."""
    at = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
    words: dict[str, Any] = {
        "id": OwnerId(owner_id),
        "host": "here",
        "pid": 4711,
        "process_started": 1234.56,
        "command": "comfyctl agent",
        "started_at": at,
        "heartbeat_at": at,
    }
    return Owner(**{**words, **fields})
