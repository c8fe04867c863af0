"""
What a worker that died leaves in the books of machines and in the queue, cleared up by whoever can read both.

    jobs     a job whose prompt was on a machine that is gone by our books waits for nobody: it is proven that nothing
             of it runs (I12), so any worker may take it at once
    works    time on a machine that a dead worker began and never ended (`Work`) ends with the worker's last sign of
             life, and with the machine at the latest: what came after is not known to have been work
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Final

from runcomfy.domain.machine import Machine, MachineId, MachineState, OwnerId
from runcomfy.domain.money import billed_interval
from runcomfy.domain.place_key import machine_key
from runcomfy.domain.queued import Outcome, QueuedJob
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.queue")

MACHINE: Final = machine_key("")
GONE: Final = (MachineState.STOPPED, MachineState.NEVER)
LOOKS_BACK: Final = timedelta(days=1)
MOST_WORKS: Final = 10_000
"""Newest ones that are looked through."""
DEAD: Final = (Outcome.LOST, Outcome.QUARANTINED)
"""How attempts end whose worker is gone."""


class Aftermath:
    """`await clear(back)` after each look for dead workers."""

    def __init__(
        self,
        jobs: JobStore,
        books: Callable[[], Awaitable[Store]],
        prompt_places: Callable[[], Awaitable[Collection[str] | None]],
        *,
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        """`books` opens the machines' books; `prompt_places` returns where prompts of queued jobs may still run."""
        self._jobs, self._books, self._prompt_places = jobs, books, prompt_places
        self._clock, self._tell = clock, tell
        self._looked = False
        """Whether works were looked through since this process began."""

    async def clear(self, back: Sequence[QueuedJob]) -> None:
        """Free the jobs of machines that are gone, and end the works of dead workers; `back` were just taken back.

        Raises LocalError; then the next call does it.
        """
        self._looked = self._looked and not back
        await self._free_jobs()
        if not self._looked:
            await self._end_works()
            self._looked = True

    async def _free_jobs(self) -> None:
        places = sorted(place for place in await self._prompt_places() or () if place.startswith(MACHINE))
        gone = []
        for place in places:
            machine = await (await self._books()).machine(MachineId(place.removeprefix(MACHINE)))
            if machine is not None and machine.state in GONE:
                gone.append(place)
        freed = await self._jobs.free_places(gone) if gone else 0
        if freed:
            log.info("jobs_freed", extra={"fields": {"jobs": freed, "places": gone[:20]}})
            several = f"the machines of {freed} jobs are gone: they start anew"
            self._tell("the machine of 1 job is gone: it starts anew" if freed == 1 else several)

    async def _end_works(self) -> None:
        books = await self._books()
        works = await books.works(since=self._clock.now() - LOOKS_BACK, limit=MOST_WORKS)
        for work in works:
            if work.ended_at is None and work.attempt:
                ended = await self._ended(work, await books.machine(work.machine_id))
                if ended is not None:
                    log.info("work_ended", extra={"fields": {"job": work.job_id, "machine": work.machine_id}})
                    await books.put_work(ended)

    async def _ended(self, work: Work, machine: Machine | None) -> Work | None:
        """Return how a row is closed; None if its worker may live."""
        job = await self._jobs.job(work.job_id)
        if job is None:
            return None
        attempt = next((a for a in await self._jobs.attempts(job.id) if a.token == work.attempt), None)
        if attempt is None or attempt.ended_at is None or attempt.outcome not in DEAD:
            return None
        owner_id = OwnerId(attempt.worker_id)
        owner = (await self._jobs.owners([owner_id])).get(owner_id)
        known = [attempt.ended_at]
        if owner is not None:
            known.append(owner.heartbeat_at)
        if machine is not None and (billed := billed_interval(machine, now=self._clock.now())) is not None:
            known.append(billed[1])
        least = max(at for at in (work.began_at, work.computing_at, work.computed_at) if at is not None)
        return replace(work, ended_at=max(least, min(known)), outcome=str(Outcome.LOST))
