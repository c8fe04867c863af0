"""
Writes down who was on a rented machine and when, which is what costs are told from (`domain.work`).

Softly: a database that refuses is logged and breaks no job. What it refused goes in with the next write of the same
job, for each one says all there is. A job's time on a machine of the pool is written by the pool.

A workflow goes by the name it has in the queue (`QueuedJob.workflow_id`); a job that runs without the queue has the
name that the queue would give it, so that reports find both under one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final, Protocol

from runcomfy.application.seat import Seat
from runcomfy.domain.exceptions import LocalError, RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.work")

LOOKED_AT: Final = 200
"""Jobs of a machine that are looked at for the workflows it has computed."""


class Present(Protocol):
    """A place, as far as the books care."""

    seat: Seat
    outcome: str
    attempt: int

    @property
    def machine(self) -> Machine | None:
        """Return the rented machine, if it is one."""
        ...


@dataclass(frozen=True, slots=True)
class JobFacts:
    """Whose job it is, for places that keep books."""

    workflow: str = ""
    attempt: int = 0
    """The token of the queue's claim; 0 without the queue."""
    user: str = ""
    project: str = ""


class WorkBook:
    """Begins entries; `present` is the usual way. Remembers what each machine has computed: which jobs find it cold."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._warm: dict[MachineId, set[str]] = {}

    @asynccontextmanager
    async def present(self, place: Present, job_id: JobId, facts: JobFacts | None) -> AsyncIterator[None]:
        """Write down that a job is at a place while the block lasts; `place.seat.settled` waits for the last word.

        Nothing is written without `facts`, or where the machine is not known.
        """
        if facts is None or place.machine is None:
            yield
            return
        stay = self.begin(place.machine, job_id, facts)
        place.seat, place.attempt = stay, facts.attempt
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            stay.leave(outcome_of(error, place.outcome))

    def begin(self, machine: Machine, job_id: JobId, facts: JobFacts) -> Stay:
        """Write down that a job has come to a machine. Never waits; the entry ends with `Stay.leave`."""
        now = self._clock.now()
        known = self._warm.setdefault(machine.id, set())
        work = Work(
            machine.id,
            job_id,
            facts.attempt,
            facts.workflow,
            machine.server_type,
            now,
            user=facts.user,
            project=facts.project,
            cold=facts.workflow not in known,
        )
        return Stay(self._store, self._clock, work, known)


class Stay(Seat):
    """One job's time on one machine, on its way into the books."""

    def __init__(self, store: Store, clock: Clock, work: Work, warm: set[str]) -> None:
        self._store, self._clock, self._work, self._warm = store, clock, work, warm
        self._written: Work | None = None
        self._writer: asyncio.Task[None] | None = None
        self._write()

    def computing(self) -> None:
        """See `Seat`."""
        if self._work.computing_at is None:
            self._work = replace(self._work, computing_at=self._clock.now())
            self._write()

    def computed(self, seconds: float | None = None) -> None:
        """See `Seat`."""
        if self._work.computed_at is not None:
            return
        now, began = self._clock.now(), self._work.computing_at
        if began is None and seconds is not None:
            began = max(self._work.began_at, now - timedelta(seconds=seconds))
        self._work = replace(self._work, computing_at=began, computed_at=now if began is not None else None)
        if began is not None:
            self._warm.add(self._work.workflow)
            self._write()

    def leave(self, outcome: str) -> None:
        """Say how it ended."""
        self._work = replace(self._work, ended_at=self._clock.now(), outcome=outcome)
        self._write()

    async def settled(self) -> None:
        """See `Seat`."""
        if self._writer is not None:
            await asyncio.wait({self._writer})

    def _write(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all(), name=f"work {self._work.job_id}")

    async def _write_all(self) -> None:
        if self._written is None and self._work.cold:
            await self._ask_the_books()
        while self._written != self._work:
            work = self._work
            try:
                await self._store.put_work(work)
            except LocalError as error:
                log.warning("work_not_written", extra={"fields": {"job": work.job_id, "error": error.code}})
                return
            self._written = work

    async def _ask_the_books(self) -> None:
        """Find out whether another process has had this workflow computed there."""
        machine, workflow = self._work.machine_id, self._work.workflow
        try:
            before = await self._store.works(machine_ids=[machine], limit=LOOKED_AT)
        except LocalError as error:
            log.warning("works_not_read", extra={"fields": {"job": self._work.job_id, "error": error.code}})
            return
        computed = {work.workflow for work in before if work.computed_at is not None}
        self._warm.update(computed)
        if workflow in computed:  # not in `_warm`: this job itself may have computed before the books have answered
            self._work = replace(self._work, cold=False)


def outcome_of(error: BaseException | None, said: str = "") -> str:
    """Return the word for how a job left a place; `said` is what the queue calls it, if it does."""
    if error is None:
        return "done"
    if said:
        return said
    if isinstance(error, RunComfyError) and error.code not in ("interrupted", "prompt-interrupted"):
        return "failed"
    return "cancelled"
