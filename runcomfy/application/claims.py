"""
The claims of one worker: they are made here, and seen to be held as long as their jobs run.

What is no longer held is cut: cancelled jobs have their prompt interrupted, lost ones leave it to whoever holds the job
now. What is held and runs nowhere here, since an answer was lost on the way, is given back: the heart would renew its
lease for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final

from runcomfy.application.heartbeat import Held, Pulse
from runcomfy.application.job_run import JobRun, Why
from runcomfy.domain.exceptions import LeaseLost, LocalError
from runcomfy.domain.queued import ClaimLimits, Ending, Outcome, QueuedJob, QueueStatus, RowId, WorkerId
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.queue")

WATCH_EVERY: Final = 1.0
WATCH_GAP: Final = 0.2
"""Seconds between two looks at what is held: a busy database changes a thousand times a second."""
SLEPT: Final = 5.0
"""Seconds by which the wall clock and the loop's may drift apart before we have slept, or somebody set the clock."""


class Claims:
    """`watch` for as long as the executor works."""

    def __init__(
        self,
        store: JobStore,
        settings: QueueSettings,
        worker: WorkerId,
        heart: Pulse,
        *,
        clock: Clock,
        places: Callable[[], Collection[str]],
        limits: Callable[[], ClaimLimits],
        runs: Callable[[], Collection[JobRun]],
        trouble: Callable[[LocalError | None], None],
        works: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        """`places` and `limits`: of what may be claimed. `runs`: what runs here.

        `trouble` hears what the store refuses, and None when it works; `works` says whether it did so last.
        """
        self._store, self._settings, self._worker, self._heart = store, settings, worker, heart
        self._clock, self._places, self._limits, self._runs = clock, places, limits, runs
        self._trouble, self._works, self._tell = trouble, works, tell
        self._nudge = asyncio.Event()
        self._changing = asyncio.Lock()
        """Held while what is claimed and what runs may differ."""
        self.owes = False
        """Whether a claim may be left open that runs nowhere: its end, or its answer, was lost on the way."""

    async def claim(self, count: int, *, only: RowId | None = None) -> Sequence[QueuedJob]:
        """Claim up to `count` jobs. Raises LocalError."""
        async with self._changing:
            try:
                return await self._store.claim(
                    self._worker,
                    count=count,
                    lease=self._settings.lease,
                    places=self._places(),
                    limits=self._limits(),
                    only=only,
                )
            except BaseException:
                self.owes = True  # it may have been written all the same
                raise

    def owe(self) -> None:
        """Hear that a claim may be left open."""
        self.owes = True

    def look(self) -> None:
        """See soon what is held: something has changed."""
        self._nudge.set()

    def beaten(self, held: Held) -> None:
        """Hear from the heart what is held; what is missing is looked up, for it may have ended in good order."""
        self._trouble(None)
        if any(held.get(run.row.id) != run.row.token for run in self._runs()):
            self._nudge.set()

    async def watch(self) -> None:
        """Look every second, and after every change, what is still held."""
        loop = asyncio.get_running_loop()
        last = loop.time(), self._clock.now()
        warned = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_EVERY):
                    await self._nudge.wait()
            self._nudge.clear()
            last = self._slept(*last)
            if self._runs() and not self._heart.fresh and not warned:
                warned = True
                self._tell("no lease could be renewed for a whole lease: others may take over what runs here")
            warned = warned and not self._heart.fresh
            await self._look_at_held()
            if self.owes and self._works():
                await self._give_back()
            await asyncio.sleep(WATCH_GAP)

    def _slept(self, at: float, wall: datetime) -> tuple[float, datetime]:
        """After the computer slept (or the clock was set), the first thing is to see what is still held."""
        now, now_wall = asyncio.get_running_loop().time(), self._clock.now()
        drift = (now_wall - wall).total_seconds() - (now - at)
        if abs(drift) > SLEPT or now - at > self._settings.lease.total_seconds():
            log.warning(
                "clock_jumped", extra={"fields": {"loop_s": now - at, "wall_s": (now_wall - wall).total_seconds()}}
            )
            self._heart.hurry()
        return now, now_wall

    async def _look_at_held(self) -> None:
        """Cut every run whose claim is gone."""
        watched = [run for run in self._runs() if not run.ending and run.why in (None, Why.DRAIN)]
        if not watched:
            return
        try:
            held = await self._store.holds(self._worker)
            for run in watched:
                if held.get(run.row.id) != run.row.token and not run.ending:
                    row = await self._store.job(run.row.id)
                    wanted = row is not None and row.status in (QueueStatus.PENDING, QueueStatus.PROCESSING)
                    if run.journal.done is not None:
                        continue  # its own result has ended the claim, just now
                    if not run.ending:
                        run.cut(Why.LOST if wanted else Why.CANCELLED)
        except LocalError as error:
            self._trouble(error)

    async def _give_back(self) -> None:
        """Put back what is held in our name and runs nowhere here."""
        async with self._changing:
            runs = {run.key for run in self._runs()}
            try:
                held = await self._store.holds(self._worker)
                for job_id, token in held.items() - runs:
                    with suppress(LeaseLost):
                        await self._store.finish(job_id, token, Ending(Outcome.PUT_BACK, keeps_prompt=True))
            except LocalError as error:
                self._trouble(error)
            else:
                self.owes = False
