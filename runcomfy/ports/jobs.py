"""
Where the truth about queued jobs is kept.

Every method that changes something is durable when it returns (one transaction with the event that tells it), or
raises a `LocalError` and changed nothing. Any number of processes, on any number of hosts where the database is a
server, use one store at the same time. Users read and change the `jobs` table with SQL meanwhile, and are obeyed.

Rule 1: who works on a job holds a token. Every write of a worker names it; no row changed means that the lease is
        lost: `LeaseLost` is raised, and the worker must stop and discard.
Rule 2: times come from the store's own clock (`now`), never from a worker's.
Rule 3: a lost worker costs the job nothing: prompt and place are kept for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from runcomfy.domain.job import JobId, PromptId
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import (
    Arrival,
    Attempt,
    Barred,
    ClaimLimits,
    Ending,
    EventKind,
    Ingested,
    JobEvent,
    NewJob,
    PastResult,
    Pause,
    QueuedJob,
    QueueStatus,
    RowId,
    Waiting,
    WorkerId,
)

JobKey = RowId | int | JobId | str
"""The row's number, the uid, or the config name. A text of digits counts as a number if nothing has that name."""


class JobStore(Protocol):
    """The queue's database."""

    async def open(self) -> None:
        """Open or make the database and bring it to the current version; several may start at once.

        Raises StoreTooNew, StoreCorrupt, StoreUnavailable, DiskFull.
        """
        ...

    async def close(self) -> None:
        """Let go of the database. Harmless when repeated."""
        ...

    def now(self) -> datetime:
        """Return the time that every process of this store goes by, as near as it can be told without asking."""
        ...

    async def changed(self, *, timeout: timedelta, seen: int = 0) -> int:
        """Return soon after the database changed (a job may be claimable), at the latest after `timeout`.

        Returns a mark; passed as `seen` to the next call, a change that came in between ends that call at once. May
        return without a change.
        """
        ...

    # -- owners: the processes of this store ---------------------------------------------------------------
    async def register_owner(self, owner: Owner) -> None:
        """Write down a process that may hold jobs."""
        ...

    async def sign_off(self, owner_id: OwnerId) -> None:
        """Say that the process ended in good order."""
        ...

    async def owners(
        self, ids: Collection[OwnerId] | None = None, *, but: Collection[OwnerId] = ()
    ) -> Mapping[OwnerId, Owner]:
        """Return the owners with these ids, or all that have not signed off, `but` those."""
        ...

    # -- putting in ----------------------------------------------------------------------------------------
    async def add(self, jobs: Sequence[NewJob], *, default_priority: int = 50) -> Sequence[QueuedJob]:
        """Put jobs into the queue, all or none; accepted once this returns (I10).

        A job whose idempotency key is known comes back as it is now, if its body is the same (I16).
        Raises IdempotencyConflict (same key, other body), NameTaken (config name).
        """
        ...

    async def ingest(self, job: NewJob, *, default_priority: int = 50) -> tuple[Ingested, QueuedJob]:
        """Take up a job file, known by its name and content; what is done is said by `Ingested`."""
        ...

    # -- looking -------------------------------------------------------------------------------------------
    async def job(self, key: JobKey) -> QueuedJob | None:
        """Return one job."""
        ...

    async def jobs(
        self,
        *,
        status: QueueStatus | None = None,
        source_dir: str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        barred: Barred | None = None,
    ) -> Sequence[QueuedJob]:
        """Return jobs: pending ones by priority and age, others by number; `newest_first` turns both round.

        `barred`: whose are left out.
        """
        ...

    async def past_results(
        self, *, workflow: str | None = None, limit: int = 200, known: Collection[tuple[RowId, datetime]] = ()
    ) -> Sequence[PastResult]:
        """Return what came of the newest `limit` jobs that are done (of one workflow; None: of all), in any order.

        `known`: number and end of those that the caller has already; they are left out and not read again.
        """
        ...

    async def counts(self) -> Mapping[QueueStatus, int]:
        """Return how many jobs there are of each status."""
        ...

    async def newest(
        self,
        *,
        before: int | None = None,
        status: QueueStatus | None = None,
        workflow_id: str | None = None,
        user: str | None = None,
        limit: int = 50,
    ) -> Sequence[QueuedJob]:
        """Return a page of jobs, the newest first: those with a number below `before`."""
        ...

    async def jobs_with(self, ids: Collection[RowId]) -> Mapping[RowId, QueuedJob]:
        """Return jobs by their numbers; those that there are."""
        ...

    async def backlog(self, *, places: Collection[str] = ()) -> Sequence[Waiting]:
        """Return what could be claimed now by a worker that serves `places`, counted by workflow, user and project."""
        ...

    async def arrivals(self, *, after: int = 0, limit: int = 1_000) -> Sequence[Arrival]:
        """Return the newest `limit` jobs with a number above `after`, oldest first."""
        ...

    async def known_files(self, names: Collection[str]) -> Mapping[str, tuple[str, str, QueueStatus, str]]:
        """Return, by config name: (content sha256, held sha256, status, source path) of the jobs that have them."""
        ...

    async def known_keys(self, keys: Collection[str]) -> Collection[str]:
        """Return those idempotency keys that a job has."""
        ...

    async def attempts(self, job_id: RowId) -> Sequence[Attempt]:
        """Return every attempt of a job, in order."""
        ...

    async def events(self, *, after: int = 0, job_id: RowId | None = None, limit: int = 1_000) -> Sequence[JobEvent]:
        """Return events with a number above `after`, in order."""
        ...

    async def told(self, *, after: int, limit: int) -> tuple[Sequence[JobEvent], Mapping[RowId, QueuedJob]]:
        """Return events with a number above `after`, in order, and their jobs as they are by then."""
        ...

    async def story(
        self, key: JobKey, *, limit: int = 1_000
    ) -> tuple[QueuedJob, Sequence[Attempt], Sequence[JobEvent]] | None:
        """Return a job with its attempts and its first events; None: there is no such job."""
        ...

    async def settled(self) -> int:
        """Return an event's number such that whatever is written from now on has a higher one; 0 if there is none.

        Events that were written lately may be above it, too.
        """
        ...

    async def note(
        self, kind: EventKind, *, job_id: RowId | None = None, data: Mapping[str, Any] | None = None, by: str = ""
    ) -> None:
        """Write an event that changes nothing (a refused job file, a remark)."""
        ...

    # -- what users ask for --------------------------------------------------------------------------------
    async def set_priority(self, key: JobKey, priority: int, *, by: str = "") -> QueuedJob:
        """Change the priority (clamped to 1..999). Raises JobNotFound."""
        ...

    async def cancel(self, key: JobKey, *, by: str = "") -> QueuedJob:
        """End a job for good: no new attempt starts and no result is committed any more (I17).

        The token goes up, so that whoever works on it loses its lease; a prompt that may run gets phase ENDING.
        A job that has ended stays as it is. Raises JobNotFound.
        """
        ...

    async def retry(self, key: JobKey, *, by: str = "") -> QueuedJob:
        """Let an ended job run again from the start: retries_attempted, lost_count and kill_count begin at 0.

        A pending job loses its waiting time. Raises JobNotFound, JobBusy (it is processing).
        """
        ...

    async def pause(
        self, *, scope: str, reason: str, message: str, retry_in: timedelta | None = None, by: str = ""
    ) -> Pause:
        """Let nothing be claimed in the scope; running jobs go on. Paused again, the newer words count."""
        ...

    async def resume(self, *, scope: str | None = None, by: str = "") -> Sequence[Pause]:
        """End the pauses of a scope (None: all) and return them."""
        ...

    async def pauses(self) -> Sequence[Pause]:
        """Return what is paused now, oldest first; one whose time is over is still there until somebody resumes."""
        ...

    # -- working -------------------------------------------------------------------------------------------
    async def claim(
        self,
        worker: WorkerId,
        *,
        count: int,
        lease: timedelta,
        places: Collection[str] = (),
        limits: ClaimLimits | None = None,
        only: RowId | None = None,
    ) -> Sequence[QueuedJob]:
        """Take up to `count` pending jobs by priority, then age; each gets a new token, an attempt row and an event.

        A job whose prompt is at a place (`place`) goes to workers that serve it, until `others_from`. Nothing is
        given to scopes that are paused: the caller asks `pauses` itself. `only` claims that row or nothing.
        """
        ...

    async def write_ahead(
        self, job_id: RowId, token: int, *, place: str, prompt_id: PromptId, counts_as_run: bool
    ) -> QueuedJob:
        """Write down the prompt's id and place before it is sent (I13); `run_count` goes up with `counts_as_run`.

        Raises LeaseLost.
        """
        ...

    async def accepted(self, job_id: RowId, token: int, *, prompt_id: PromptId) -> None:
        """Say that the server has the prompt (under `prompt_id`, should it have chosen another). Raises LeaseLost."""
        ...

    async def attached(self, job_id: RowId, token: int) -> None:
        """Say that this worker goes on with the prompt of an earlier one. Raises LeaseLost."""
        ...

    async def prompt_gone(self, job_id: RowId, token: int, *, lost: bool) -> None:
        """Say that the job's prompt is proven to be on no server: phase NONE.

        `lost`: the server had accepted it and forgot it (it restarted). Raises LeaseLost.
        """
        ...

    async def finish(
        self, job_id: RowId, token: int, ending: Ending, *, publish: Callable[[], None] | None = None
    ) -> QueuedJob:
        """End the attempt, in one transaction that checks the fence (I11).

        `publish` gives the results their names; it is called inside the transaction after the check, in the store's
        thread, must be quick, and undoes itself if it raises: then nothing is committed. A job whose file was changed
        meanwhile (`held_sha256`) ends like any other; the next scan takes the file up.
        Raises LeaseLost (the attempt's row then says `discarded`).
        """
        ...

    async def renew(self, worker: WorkerId, *, lease: timedelta) -> Mapping[RowId, int]:
        """Renew every lease of the worker in one statement; return job -> token of what it still holds.

        What is missing is lost. Also the worker's own sign of life (`owners.heartbeat_at`).
        """
        ...

    async def holds(self, worker: WorkerId) -> Mapping[RowId, int]:
        """Return job -> token of what the worker holds, without renewing."""
        ...

    async def report(self, worker: WorkerId, progress: Mapping[RowId, tuple[float, str]]) -> None:
        """Write down progress (percent, words) of jobs the worker holds. No event, no wake-up."""
        ...

    async def reap(
        self, *, lease: timedelta, dead: Collection[WorkerId] = (), lost_limit: int = 3, grace: timedelta, epoch: int
    ) -> Sequence[QueuedJob]:
        """Return jobs of dead workers, and those whose lease ran out, to pending; prompt and place are kept.

        A job that lost its lease `lost_limit` times is quarantined (I14). A lease farther ahead than `lease` (a clock
        was set back) is cut to `lease`. `grace`: how long only workers that serve the place may take it. `epoch` is
        the caller's hold on the role `planner` (I19). Raises LeaseLost if it holds the role no more.
        """
        ...

    async def free_places(self, places: Collection[str]) -> int:
        """Let any worker take the pending jobs whose prompt is at one of these places, at once; return how many.

        The caller knows that the places are gone for good: nothing of these jobs runs (I12).
        """
        ...

    async def to_end(self, places: Collection[str]) -> Sequence[QueuedJob]:
        """Return ended jobs whose prompt must still be ended at one of these places (phase ENDING, not pending)."""
        ...

    async def prompt_ended(self, job_id: RowId, prompt_id: PromptId) -> None:
        """Say that the prompt of a cancelled job was seen ended; harmless if the job has another one by now."""
        ...

    async def take_role(self, role: str, owner_id: OwnerId, *, lease: timedelta) -> int | None:
        """Take or keep a role that one process of the database has at a time; return its epoch, None if held.

        A holder that signed off, or whose lease ran out, has lost it; the epoch goes up with each new holder.
        """
        ...

    async def drop_role(self, role: str, owner_id: OwnerId) -> None:
        """Give the role up, if this owner holds it."""
        ...
