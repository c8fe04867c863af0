"""
Which pending jobs are claimed, for a station that has seats of its own: exactly those that it chose, for those seats.

    look      the head of the queue, as far as this worker could claim it
    choose    the station's choice (`domain.placement`); a job whose claim is refused (a limit, somebody else) is left
              out and the choice made again
    begin     a claimed job takes its seat at once; one that finds it gone goes back as it came
    rethink   jobs that wait their turn at a machine are taken back when that has become senseless

Where the queue's order is more than priority and age (`fair_users`), or the head of the queue is full of jobs that
cannot be claimed, the store chooses the jobs as for any other worker, and the station only finds them seats.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol, runtime_checkable

from runcomfy.application.job_run import JobRun
from runcomfy.domain.exceptions import LeaseLost
from runcomfy.domain.job import JobId
from runcomfy.domain.placement import BackWhy
from runcomfy.domain.queued import Barred, Ending, Outcome, Phase, QueuedJob, QueueStatus, RowId
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.queue")

WINDOW: Final = 64
"""Jobs at the head of the queue among which the station chooses."""
GLANCE: Final = 8
"""The same, when no seat is free and only the most urgent ones matter."""
GLANCE_GAP: Final = 0.25
"""Seconds between two looks when no seat is free: a busy database changes a hundred times a second."""
SEATLESS_DELAY: Final = timedelta(seconds=1)
"""How long a job that was claimed and found its seat gone is left alone: whoever was quicker is still busy there."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A job to begin, and the key of the place where."""

    job: QueuedJob
    place: str


@runtime_checkable
class Chooser(Protocol):
    """A station with seats: `PoolStation`. None of its methods waits."""

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` soon after anything changed that could give a job another place."""
        ...

    def on_gone(self, listener: Callable[[], None]) -> None:
        """Call `listener` soon after a place was seen to exist no more: nothing of the jobs runs that were there."""
        ...

    def places(self) -> Collection[str]:
        """Return the keys of the places that jobs can go on at here."""
        ...

    def room(self) -> int | None:
        """Return how many more jobs could take a seat now."""
        ...

    def choose(self, waiting: Sequence[QueuedJob]) -> Sequence[Choice]:
        """Return which of these jobs, given in the order of the queue, to begin now, and where."""
        ...

    def seat(self, job: QueuedJob, place: str | None = None) -> bool:
        """Keep a seat for a job that was claimed, at that place or at the best one; False if there is none."""
        ...

    def release(self, job_id: JobId, attempt: int) -> None:
        """Give up the seat of a claim that never came to it. Harmless if it has none."""
        ...

    def reconsider(self, priorities: Mapping[JobId, int], unplaced: Sequence[QueuedJob]) -> Mapping[JobId, BackWhy]:
        """Return which of the jobs that run here (with their priorities) are better taken back from their seats."""
        ...


class Claims(Protocol):
    """Claims for this worker, as `JobStore.claim` does."""

    def __call__(self, count: int, *, only: RowId | None = None) -> Awaitable[Sequence[QueuedJob]]:
        """Return what was claimed."""
        ...


class Dispatch:
    """The claiming of one executor over a station with seats."""

    def __init__(
        self,
        store: JobStore,
        settings: QueueSettings,
        station: Chooser,
        *,
        claim: Claims,
        begin: Callable[[QueuedJob], JobRun],
        runs: Callable[[], Collection[JobRun]],
        owes: Callable[[], None],
        barred: Callable[[], Barred] = Barred,
    ) -> None:
        """`begin` runs what was claimed, `runs` are those that run. `owes` hears of claims that could not be undone."""
        self._store, self._settings, self._station = store, settings, station
        self._claim, self._begin, self._runs, self._owes, self._barred = claim, begin, runs, owes, barred
        self._look_at = float("-inf")
        self._backs: set[asyncio.Task[bool]] = set()
        self.waiting = False
        """Whether anything could be claimed that found no seat, when it was last looked."""

    async def turn(self, most: int | None = None) -> int:
        """Begin what there are seats for, at most so many; return how many jobs were begun. Raises LocalError."""
        room = self._station.room() or 0
        limit = room if most is None else min(room, most)
        now = asyncio.get_running_loop().time()
        if limit <= 0 and now < self._look_at:
            return 0
        self._look_at = now + GLANCE_GAP
        size = WINDOW if limit > 0 else GLANCE
        rows = await self._store.jobs(status=QueueStatus.PENDING, limit=size, barred=self._barred())
        at, places = self._store.now(), self._station.places()
        waiting = [row for row in rows if may_start(row, at, places)]
        begun, left = 0, waiting
        if limit > 0 and self._settings.fair_users:
            begun, left = await self._any(limit), []
        elif limit > 0:
            begun, left = await self._chosen(waiting, limit)
            if not begun and not left and len(rows) == size:
                begun = await self._any(limit)
        self.waiting = bool(left)
        if most is None or most > 0:
            self._rethink(left)
        return begun

    async def _chosen(self, waiting: Sequence[QueuedJob], limit: int) -> tuple[int, list[QueuedJob]]:
        """Claim what the station chooses; return how many were begun, and what is left that might have been."""
        left, begun = list(waiting), 0
        while left and begun < limit:
            choices = self._station.choose(left)[: limit - begun]
            refused: set[tuple[str, str, str]] = set()
            gone: set[RowId] = set()
            for choice in choices:
                if _line(choice.job) in refused:
                    continue
                gone.add(choice.job.id)
                claimed = await self._claim(1, only=choice.job.id)
                if claimed:
                    begun += await self._seated(claimed[0], choice.place)
                else:
                    # Taken by somebody, or a limit is reached: that holds for all of its kind.
                    refused.add(_line(choice.job))
            left = [row for row in left if row.id not in gone and _line(row) not in refused]
            if not refused:
                break
        return begun, left

    async def _any(self, limit: int) -> int:
        """Claim as any worker does, and find what was claimed its seats."""
        begun = 0
        for row in await self._claim(limit):
            begun += await self._seated(row, None)
        return begun

    async def _seated(self, row: QueuedJob, place: str | None) -> bool:
        if self.seat(row, place):
            self._begin(row)
            return True
        await self.put_back(row)
        return False

    def seat(self, row: QueuedJob, place: str | None = None) -> bool:
        """Keep a seat for a claimed job; one that is gone meanwhile may have left another."""
        return self._station.seat(row, place) or (place is not None and self._station.seat(row))

    async def put_back(self, row: QueuedJob) -> None:
        """Give up a claim of which nothing was begun."""
        try:
            with suppress(LeaseLost):
                ending = Ending(Outcome.PUT_BACK, keeps_prompt=True, delay=SEATLESS_DELAY)
                await self._store.finish(row.id, row.token, ending)
        except BaseException:
            self._owes()
            raise

    # -- second thoughts -----------------------------------------------------------------------------------

    def _rethink(self, unplaced: Sequence[QueuedJob]) -> None:
        runs = {run.row.uid: run for run in self._runs()}
        priorities = {job_id: run.row.priority for job_id, run in runs.items() if run.can_go_back}
        if not priorities:
            return
        for job_id, why in self._station.reconsider(priorities, unplaced).items():
            run = runs[job_id]
            log.info("job_taken_back", extra={"fields": {"job": job_id, "row": run.row.id, "why": str(why)}})
            task = asyncio.create_task(run.take_back(), name=f"take back {run.row.id}")
            self._backs.add(task)
            task.add_done_callback(self._backs.discard)

    async def close(self) -> None:
        """Break off what is being taken back: it goes on as it is."""
        tasks = list(self._backs)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def may_start(row: QueuedJob, now: datetime, places: Collection[str]) -> bool:
    """Return whether a pending job could be claimed by a worker that serves these places, limits aside."""
    if row.not_before is not None and row.not_before > now:
        return False
    if row.phase is Phase.NONE or row.place is None or row.place in places:
        return True
    return row.others_from is not None and row.others_from <= now


def _line(row: QueuedJob) -> tuple[str, str, str]:
    """What limits go by."""
    return row.workflow_id, row.job_type, row.user
