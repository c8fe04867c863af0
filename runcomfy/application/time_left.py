"""
How long jobs will still take, from own history: reads it now and then, and asks `domain.time_left`.

History are the results of jobs that are done (their node timelines); for workflows without one, the books of rented
machines. It is read at most every half minute and only what is new of it, by whoever asks first after that; the others
are answered meanwhile from what is known. A database that refuses leaves what is known as it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final

from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.past_runs import RunPast, past_of
from runcomfy.domain.progress import Step
from runcomfy.domain.queued import PastResult, QueuedJob, QueueStatus, RowId
from runcomfy.domain.time_left import NEWEST, Asked, Experience, TimeLeft
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

if TYPE_CHECKING:
    from runcomfy.application.live import LiveJob

log = logging.getLogger("runcomfy.time_left")

READ_EVERY: Final = 30.0
"""Seconds between two readings of the same history."""
OF_A_WORKFLOW: Final = 200
"""Newest runs of a workflow that are read."""
OF_ALL: Final = 500
"""Newest runs of any workflow that are read, for workflows that were never run."""
WORKS: Final = 2_000
"""Newest entries of the machines' books that are read."""
MOST_RUNS: Final = 2_000
"""Runs that are known of; beyond, those read longest ago are forgotten. What they took is kept, some 3 KB each, of the
newest that teach something (`NEWEST`), and of the first at each place."""


@dataclass(slots=True)
class _Known:
    """What was read until now."""

    runs: dict[tuple[RowId, datetime], RunPast | None] = field(default_factory=dict)
    """None: there was nothing to learn from, or newer ones teach the same."""
    works: tuple[Work, ...] = ()
    read_at: dict[str | None, float] = field(default_factory=dict)
    """Workflow -> when its runs were read, on the clock of the loop; None: those of all."""
    works_at: float | None = None
    taught: Experience = field(default_factory=lambda: Experience(()))


class TimeLeftBook:
    """Answers for one process and one event loop. Made by `App.time_left`."""

    def __init__(
        self,
        jobs: Callable[[], Awaitable[JobStore]],
        books: Callable[[], Awaitable[Store]],
        clock: Clock,
        *,
        has_books: Callable[[], bool] = lambda: True,
    ) -> None:
        """Nothing is read yet. `has_books`: whether there are books of machines that may be looked into."""
        self._jobs, self._books, self._clock, self._has_books = jobs, books, clock, has_books
        self._known = _Known()
        self._reading = asyncio.Lock()

    async def of(self, job: QueuedJob, live: LiveJob | None) -> TimeLeft | None:
        """Return how long a job will still take until its results are there; None: nothing is known, or it is over.

        `live`: what it does, where it runs in this process. Of one that waits its own run is told, not its waiting.
        """
        if job.ended:
            return None
        await self._learn(job.workflow_id)
        return self._known.taught.left(self._asked(job, live))

    def _asked(self, job: QueuedJob, live: LiveJob | None) -> Asked:
        given = job.request.server_type if job.request is not None else None
        if live is None or live.over:
            began = job.start_time if job.status is QueueStatus.PROCESSING else None
            elapsed = max(0.0, (self._clock.now() - began).total_seconds()) if began is not None else None
            return Asked(job.workflow_id, given, place=job.place or "", unheard_s=elapsed)
        progress = live.progress
        boots = progress.step in (Step.LAUNCHING, Step.BOOTING) and progress.expected is not None
        arrived = live.server_type or progress.step in (Step.UPLOADING, Step.QUEUED, Step.RUNNING, Step.FETCHING)
        return Asked(
            workflow=job.workflow_id,
            server_type=live.server_type if arrived else given,
            place=job.place or "",
            timeline=live.timeline,
            labels=progress.labels,
            now_s=max(live.timeline.at_s, asyncio.get_running_loop().time() - live.began_s),
            heard_s=live.timeline.at_s,
            queue_position=progress.queue_position,
            boot_s=progress.expected.total_seconds() if boots and progress.expected is not None else None,
        )

    # -- learning ------------------------------------------------------------------------------------------

    async def _learn(self, workflow: str) -> None:
        """Read what is due; who finds somebody reading goes by what is known, if that is anything."""
        if not self._due(workflow) or (self._reading.locked() and workflow in self._known.read_at):
            return
        async with self._reading:
            if not self._due(workflow):
                return
            try:
                await self._read(workflow)
            except RunComfyError as error:
                log.warning("history_not_read", extra={"fields": {"error": error.code}})
            finally:  # also if it failed: who cannot be read is not asked at every look
                self._known.read_at[workflow] = asyncio.get_running_loop().time()

    def _due(self, workflow: str) -> bool:
        read_at = self._known.read_at.get(workflow)
        return read_at is None or asyncio.get_running_loop().time() - read_at >= READ_EVERY

    async def _read(self, workflow: str) -> None:
        known, now = self._known, asyncio.get_running_loop().time()
        jobs, fresh = await self._jobs(), list[PastResult]()
        if now - known.read_at.get(None, -READ_EVERY) >= READ_EVERY:
            fresh += await jobs.past_results(limit=OF_ALL, known=known.runs.keys())
            known.read_at[None] = now
        seen = known.runs.keys() | {(result.id, result.ended_at) for result in fresh}
        if len(seen) >= OF_ALL:  # else those are all that there are
            fresh += await jobs.past_results(workflow=workflow, limit=OF_A_WORKFLOW, known=seen)
        works = await self._read_works(workflow, fresh)
        if fresh or works is not None:
            known.works = works if works is not None else known.works
            known.taught = await asyncio.to_thread(_taught, known.runs, fresh, known.works)
            while len(known.runs) > MOST_RUNS:
                del known.runs[next(iter(known.runs))]

    async def _read_works(self, workflow: str, fresh: Iterable[PastResult]) -> tuple[Work, ...] | None:
        """Return the books' newest entries, if they are needed and due."""
        known, now = self._known, asyncio.get_running_loop().time()
        if workflow in known.taught.workflows or any(result.workflow_id == workflow for result in fresh):
            return None
        if not self._has_books() or (known.works_at is not None and now - known.works_at < READ_EVERY):
            return None
        known.works_at = now
        books = await self._books()
        return tuple(await books.works(limit=WORKS))


def _taught(
    runs: dict[tuple[RowId, datetime], RunPast | None], fresh: Iterable[PastResult], works: tuple[Work, ...]
) -> Experience:
    for result in fresh:
        runs[result.id, result.ended_at] = past_of(result.workflow_id, result.ended_at, result.result)
    let_go_of_old(runs)
    return Experience((run for run in runs.values() if run is not None), works)


def let_go_of_old(runs: dict[tuple[RowId, datetime], RunPast | None]) -> None:
    """Forget what older runs took of which there are enough newer ones; the first at a place says that it was cold."""
    kept = sorted(((run, key) for key, run in runs.items() if run is not None), key=lambda each: each[0].ended_at)
    firsts: dict[tuple[str, str], tuple[RowId, datetime]] = {}
    for run, key in kept:
        firsts.setdefault((run.workflow, run.place), key)
    alike = Counter[tuple[str, str]]()
    for run, key in reversed(kept):
        alike[run.workflow, run.server_type] += 1
        if alike[run.workflow, run.server_type] > NEWEST and not (run.place and firsts[run.workflow, run.place] == key):
            runs[key] = None
