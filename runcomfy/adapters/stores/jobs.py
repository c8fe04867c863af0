"""
The queue's database: `runcomfy.ports.jobs.JobStore` on SQLite and PostgreSQL, one code path.

Here is only what belongs together in one transaction, and at what time. What happens inside is written beside: taking
in (`jobs_intake`), claiming (`jobs_claim`), steps and orders (`jobs_steps`), ends (`jobs_finish`), leases
(`jobs_reap`), roles (`roles`), reading (`jobs_look`). Threads and commits are the business of `database.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from runcomfy.adapters.stores import (
    jobs_claim,
    jobs_finish,
    jobs_intake,
    jobs_look,
    jobs_reap,
    jobs_steps,
    roles,
    tables,
)
from runcomfy.adapters.stores.database import Database, SyncDatabase
from runcomfy.adapters.stores.jobs_finish import Finish
from runcomfy.adapters.stores.jobs_reap import Reap, renew_in
from runcomfy.adapters.stores.jobs_rows import safe, told_text
from runcomfy.adapters.stores.jobs_sql import RowLocked, Sql, hold, tell
from runcomfy.adapters.stores.jobs_together import Together, Waits
from runcomfy.adapters.stores.roles import read_owners
from runcomfy.domain.exceptions import JobNotFound, LocalError, foreign_text
from runcomfy.domain.job import PromptId
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
from runcomfy.ports.jobs import JobKey

T = TypeVar("T")

NO_LIMITS: Final = ClaimLimits()

RACES: Final = 5
"""How often taking in is tried again after another process took the same name or key in the same moment."""

NOTES_LOOKED_AT: Final = 1_000
"""How many of the newest events that belong to no job a note is compared with, so that it is not written twice."""

_owners, _pauses = tables.owners, tables.queue_pauses

_WAKE: Final = Sql("SELECT 1", postgres="SELECT pg_notify('runcomfy_jobs', '')")
# The number of a transaction is given out with its first row; readers of the log must know it before the event's.
_BE_SOMEBODY: Final = Sql("SELECT 1", postgres="SELECT txid_current()")
_NOTED: Final = Sql(
    "SELECT 1 FROM (SELECT kind, worker_id, data FROM job_events WHERE job_id IS NULL ORDER BY number DESC "
    "LIMIT :count) AS newest WHERE kind = :kind AND worker_id = :by AND data = :data"
)
_LAST_OF_JOB: Final = Sql(
    "SELECT kind, worker_id, data FROM job_events WHERE job_id = :job_id ORDER BY number DESC LIMIT 1"
)
_REPORT: Final = Sql(
    "UPDATE jobs SET progress = :progress, message = :message "
    "WHERE id = :id AND worker_id = :worker AND status = 'processing'"
)


class _NotPublished(Exception):
    """The results could not be given their names: nothing is committed, and this says why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class Renewer:
    """Renews a worker's leases from a thread of the caller's own, over a connection of its own. Blocks."""

    def __init__(self, database: SyncDatabase, now: Callable[[], datetime], worker: WorkerId, lease: timedelta) -> None:
        self._database, self._now = database, now
        self._worker, self._lease = worker, lease

    def __call__(self) -> Mapping[RowId, int]:
        """Renew, and say that the worker lives; return job -> token of what it still holds."""
        now = self._now()
        return self._database.write(lambda connection: renew_in(connection, self._worker, now=now, lease=self._lease))

    def close(self) -> None:
        """Let go of the connection; in the thread that renewed."""
        self._database.close()


class SqlJobs:
    """Keeps `JobStore` in a database. `async with SqlJobs(...)`, or `open` and `close`."""

    def __init__(self, database: Database) -> None:
        """Nothing is touched before `open`. The database is opened and closed with the store."""
        self._database = database
        self._read, self._write = database.read, database.write
        self._together = Together(database, self.now)
        self._log = jobs_look.EventLog()

    # -- coming and going ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open or make the database and bring it to the current version; harmless when repeated."""
        await self._database.open()

    async def close(self) -> None:
        """Write what was asked for and let go of the database. Harmless when repeated."""
        await self._together.settle()
        await self._database.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return "sqlite" if self._database.kind.changes_seen_by_polling is not None else "postgresql"

    def now(self) -> datetime:
        """Return the time that everybody who uses this database goes by."""
        return self._database.now()

    async def changed(self, *, timeout: timedelta, seen: int = 0) -> int:
        """Return soon after the database changed, at the latest after `timeout`; the mark returned is the next `seen`.

        On a server what jobs report and how they end is heard of at once in the process that wrote it, by others only
        when a job becomes claimable.
        """
        return await self._database.changed(timeout=timeout, seen=seen)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Run work of the caller's own in a transaction."""
        return await self._write(work)

    async def look(self, work: Callable[[Connection], T]) -> T:
        """Run work of the caller's own that writes nothing."""
        return await self._read(work)

    def renewer(self, worker: WorkerId, *, lease: timedelta) -> Renewer:
        """Return what renews the worker's leases in another thread, whatever the event loop is doing."""
        return Renewer(self._database.sibling(), self.now, worker, lease)

    # -- owners --------------------------------------------------------------------------------------------

    async def register_owner(self, owner: Owner) -> None:
        """Write down a process that may hold jobs; said again, the newer words count."""
        values = tables.values_of(owner)

        def work(connection: Connection) -> None:
            if connection.execute(update(_owners).where(_owners.c.id == owner.id).values(values)).rowcount == 0:
                connection.execute(insert(_owners), values)

        await self._write(work, wakes=False)

    async def sign_off(self, owner_id: OwnerId) -> None:
        """Say that the process ended in good order."""
        ended = update(_owners).where(_owners.c.id == owner_id).values(ended_at=self.now())
        await self._write(lambda connection: connection.execute(ended), wakes=False)

    async def owners(
        self, ids: Collection[OwnerId] | None = None, *, but: Collection[OwnerId] = ()
    ) -> Mapping[OwnerId, Owner]:
        """Return the owners with these ids, or all that have not signed off, `but` those."""
        return await self._read(lambda connection: read_owners(connection, ids, but))

    # -- putting in ----------------------------------------------------------------------------------------

    async def add(self, jobs: Sequence[NewJob], *, default_priority: int = 50) -> Sequence[QueuedJob]:
        """Put jobs in, all or none; those whose idempotency key is known come back as they are."""
        if not jobs:
            return []
        return await self._taking_in(
            lambda connection, now: jobs_intake.add(connection, now, jobs, default_priority=default_priority)
        )

    async def ingest(self, job: NewJob, *, default_priority: int = 50) -> tuple[Ingested, QueuedJob]:
        """Take up a job file, known by its name and content."""
        return await self._taking_in(
            lambda connection, now: jobs_intake.ingest(connection, now, job, default_priority=default_priority)
        )

    async def _taking_in(self, work: Callable[[Connection, datetime], T]) -> T:
        now = self.now()

        def guarded(connection: Connection) -> T:
            try:
                return work(connection, now)
            except IntegrityError as error:
                raise jobs_intake.Raced from error

        for _ in range(RACES):
            with suppress(jobs_intake.Raced):
                return await self._patiently(guarded)
        raise LocalError("other processes took the same names again and again", hint="try again")

    # -- looking -------------------------------------------------------------------------------------------

    async def job(self, key: JobKey) -> QueuedJob | None:
        """Return one job by its number, uid or config name."""
        return await self._read(lambda connection: jobs_look.find(connection, key))

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

        `source_dir`: only those whose job file lies below it. `barred`: whose are left out.
        """
        return await self._read(
            lambda connection: jobs_look.jobs(
                connection, status=status, source_dir=source_dir, limit=limit, newest_first=newest_first, barred=barred
            )
        )

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
        return await self._read(
            lambda connection: jobs_look.newest(
                connection, before=before, status=status, workflow_id=workflow_id, user=user, limit=limit
            )
        )

    async def jobs_with(self, ids: Collection[RowId]) -> Mapping[RowId, QueuedJob]:
        """Return jobs by their numbers; those that there are."""
        return await self._read(lambda connection: jobs_look.these(connection, ids))

    async def past_results(
        self, *, workflow: str | None = None, limit: int = 200, known: Collection[tuple[RowId, datetime]] = ()
    ) -> Sequence[PastResult]:
        """Return what came of the newest `limit` jobs that are done (of one workflow), but for those `known`."""
        return await self._read(
            lambda connection: jobs_look.past_results(connection, workflow=workflow, limit=limit, known=known)
        )

    async def counts(self) -> Mapping[QueueStatus, int]:
        """Return how many jobs there are of each status."""
        return await self._read(jobs_look.counts)

    async def backlog(self, *, places: Collection[str] = ()) -> Sequence[Waiting]:
        """Return what could be claimed now by a worker that serves `places`, counted by workflow, user and project."""
        now = self.now()
        return await self._read(lambda connection: jobs_look.backlog(connection, now, places))

    async def arrivals(self, *, after: int = 0, limit: int = 1_000) -> Sequence[Arrival]:
        """Return the newest `limit` jobs with a number above `after`, oldest first."""
        return await self._read(lambda connection: jobs_look.arrivals(connection, after=after, limit=limit))

    async def known_files(self, names: Collection[str]) -> Mapping[str, tuple[str, str, QueueStatus, str]]:
        """Return, by config name: (content sha256, held sha256, status, source path)."""
        return await self._read(lambda connection: jobs_look.known_files(connection, names))

    async def known_keys(self, keys: Collection[str]) -> Collection[str]:
        """Return those idempotency keys that a job has."""
        if not keys:
            return ()
        return await self._database.read(lambda connection: jobs_look.known_keys(connection, keys))

    async def attempts(self, job_id: RowId) -> Sequence[Attempt]:
        """Return every attempt of a job, in order."""
        return await self._read(lambda connection: jobs_look.attempts(connection, job_id))

    async def events(self, *, after: int = 0, job_id: RowId | None = None, limit: int = 1_000) -> Sequence[JobEvent]:
        """Return events with a number above `after`, in order."""
        now = self.now()
        return await self._read(
            lambda connection: self._log.read(connection, now, after=after, job_id=job_id, limit=limit)
        )

    async def told(self, *, after: int, limit: int) -> tuple[Sequence[JobEvent], Mapping[RowId, QueuedJob]]:
        """Return events with a number above `after`, in order, and their jobs as they are by then."""
        now = self.now()

        def work(connection: Connection) -> tuple[Sequence[JobEvent], Mapping[RowId, QueuedJob]]:
            events = self._log.read(connection, now, after=after, job_id=None, limit=limit)
            ids = {event.job_id for event in events if event.job_id is not None}
            return events, jobs_look.these(connection, ids) if ids else {}

        return await self._read(work)

    async def story(
        self, key: JobKey, *, limit: int = 1_000
    ) -> tuple[QueuedJob, Sequence[Attempt], Sequence[JobEvent]] | None:
        """Return a job with its attempts and its first events; None: there is no such job."""
        now = self.now()

        def work(connection: Connection) -> tuple[QueuedJob, Sequence[Attempt], Sequence[JobEvent]] | None:
            job = jobs_look.find(connection, key)
            if job is None:
                return None
            events = self._log.read(connection, now, after=0, job_id=job.id, limit=limit)
            return job, jobs_look.attempts(connection, job.id), events

        return await self._read(work)

    async def settled(self) -> int:
        """Return an event's number such that whatever is written from now on has a higher one; 0 if there is none."""
        now = self.now()
        return await self._read(lambda connection: jobs_look.settled(connection, now))

    async def note(
        self, kind: EventKind, *, job_id: RowId | None = None, data: Mapping[str, Any] | None = None, by: str = ""
    ) -> None:
        """Write an event that changes nothing; one that was just written is not written again."""
        now, said = self.now(), dict(data or {})

        def work(connection: Connection) -> None:
            if job_id is None:
                _BE_SOMEBODY.run(connection)
                same = {"kind": kind.value, "by": safe(by), "data": told_text(said), "count": NOTES_LOOKED_AT}
                known = _NOTED.run(connection, same).first() is not None
            else:
                # Held, so that numbers of a job's events are in the order of the commits.
                hold(connection, [job_id])
                last = _LAST_OF_JOB.run(connection, {"job_id": job_id}).first()
                known = last is not None and tuple(last) == (kind.value, safe(by), told_text(said))
            if not known:
                tell(connection, now, [(kind, job_id, 0, WorkerId(safe(by)), said)])

        await self._patiently(work)

    # -- what users ask for --------------------------------------------------------------------------------

    async def set_priority(self, key: JobKey, priority: int, *, by: str = "") -> QueuedJob:
        """Change the priority (clamped to 1..999). Raises JobNotFound."""

        def work(connection: Connection, now: datetime, job_id: RowId) -> QueuedJob:
            job = hold(connection, [job_id])[job_id].job
            jobs_intake.set_priority(connection, now, job, priority, by=by)
            return hold(connection, [job_id])[job_id].job

        return await self._on_one(key, work)

    async def cancel(self, key: JobKey, *, by: str = "") -> QueuedJob:
        """End a job for good (I17). Raises JobNotFound."""

        def work(connection: Connection, now: datetime, job_id: RowId) -> QueuedJob:
            job = jobs_steps.cancel(connection, now, job_id, by=by)
            _WAKE.run(connection)  # its worker asks what it still holds
            return job

        return await self._on_one(key, work)

    async def retry(self, key: JobKey, *, by: str = "") -> QueuedJob:
        """Let an ended job run again from the start. Raises JobNotFound, JobBusy."""

        def work(connection: Connection, now: datetime, job_id: RowId) -> QueuedJob:
            job = jobs_steps.retry(connection, now, job_id, by=by)
            _WAKE.run(connection)
            return job

        return await self._on_one(key, work)

    async def _patiently(self, work: Callable[[Connection], T], *, wakes: bool | None = None, alone: bool = False) -> T:
        """Write; while somebody has the row in an open transaction try again, for a while."""
        write = self._database.write_alone if alone else self._database.write
        waits = Waits()
        while True:
            try:
                return await write(work, wakes=wakes)
            except RowLocked:
                await waits.sleep()

    async def _on_one(self, key: JobKey, work: Callable[[Connection, datetime, RowId], QueuedJob]) -> QueuedJob:
        now = self.now()

        def found(connection: Connection) -> QueuedJob:
            job = jobs_look.find(connection, key)
            if job is None:
                raise JobNotFound(
                    f"the queue has no job {foreign_text(key, 80)!r}", hint="`comfyctl queue ls` lists them"
                )
            try:
                return work(connection, now, job.id)
            except KeyError:  # a user deleted it in this moment
                raise JobNotFound(f"job {foreign_text(key, 80)!r} was deleted") from None

        return await self._patiently(found, wakes=True)

    async def pause(
        self, *, scope: str, reason: str, message: str, retry_in: timedelta | None = None, by: str = ""
    ) -> Pause:
        """Let nothing be claimed in the scope; paused again, the newer words count, and the older beginning."""
        now = self.now()

        def work(connection: Connection) -> Pause:
            before = connection.execute(select(_pauses).where(_pauses.c.scope == scope).with_for_update()).one_or_none()
            since = now if before is None else min(before.since, now)
            pause = Pause(scope, reason, message, since, None if retry_in is None else now + retry_in, by)
            values = {name: getattr(pause, name) for name in ("scope", "reason", "message", "since", "until", "by")}
            if before is None:
                connection.execute(insert(_pauses), values)
            else:
                connection.execute(update(_pauses).where(_pauses.c.scope == scope).values(values))
            if before is None or (before.reason, before.message) != (reason, message):
                data = {"scope": scope, "reason": reason, "message": message, **({"by": by} if by else {})}
                tell(connection, now, [(EventKind.PAUSED, None, 0, None, data)])
            return pause

        return await self._taking_in(lambda connection, _: work(connection))

    async def resume(self, *, scope: str | None = None, by: str = "") -> Sequence[Pause]:
        """End the pauses of a scope (None: all) and return them."""
        now = self.now()

        def work(connection: Connection) -> Sequence[Pause]:
            query = select(_pauses) if scope is None else select(_pauses).where(_pauses.c.scope == scope)
            ended = [Pause(*row) for row in connection.execute(query.order_by(_pauses.c.since).with_for_update())]
            for pause in ended:
                connection.execute(delete(_pauses).where(_pauses.c.scope == pause.scope))
                data = {"scope": pause.scope, "reason": pause.reason, **({"by": by} if by else {})}
                tell(connection, now, [(EventKind.RESUMED, None, 0, None, data)])
            _WAKE.run(connection)
            return ended

        return await self._write(work, wakes=True)

    async def pauses(self) -> Sequence[Pause]:
        """Return what is paused now, oldest first; one whose time is over is still there until somebody resumes."""
        return await self._read(lambda connection: [Pause(*row) for row in connection.execute(jobs_look.PAUSES)])

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
        """Take up to `count` pending jobs by priority, then age; each gets a new token, an attempt row and an event."""
        now = self.now()
        order = jobs_claim.Claim(worker, count, lease, [safe(place) for place in places], limits or NO_LIMITS, only)

        def work(connection: Connection) -> Sequence[QueuedJob]:
            return [entry.job for entry in jobs_claim.take(connection, now, order)]

        return await self._write(work)

    async def write_ahead(
        self, job_id: RowId, token: int, *, place: str, prompt_id: PromptId, counts_as_run: bool
    ) -> QueuedJob:
        """Write down the prompt's id and place before it is sent (I13). Raises LeaseLost."""
        what = jobs_steps.writing_ahead(place, prompt_id, counts_as_run=counts_as_run)
        return await self._step(job_id, token, what)

    async def accepted(self, job_id: RowId, token: int, *, prompt_id: PromptId) -> None:
        """Say that the server has the prompt (under `prompt_id`, should it have chosen another). Raises LeaseLost."""
        await self._step(job_id, token, jobs_steps.accepting(prompt_id))

    async def attached(self, job_id: RowId, token: int) -> None:
        """Say that this worker goes on with the prompt of an earlier one. Raises LeaseLost."""
        await self._step(job_id, token, jobs_steps.attaching)

    async def prompt_gone(self, job_id: RowId, token: int, *, lost: bool) -> None:
        """Say that the job's prompt is proven to be on no server: phase NONE. Raises LeaseLost."""
        await self._step(job_id, token, jobs_steps.losing_prompt(lost=lost))

    async def _step(self, job_id: RowId, token: int, what: jobs_steps.Step) -> QueuedJob:
        now = self.now()
        return await self._patiently(
            lambda connection: jobs_steps.step(connection, now, job_id, token, what), wakes=True
        )

    async def finish(
        self, job_id: RowId, token: int, ending: Ending, *, publish: Callable[[], None] | None = None
    ) -> QueuedJob:
        """End the attempt, in one transaction that checks the fence (I11); said again, the same answer is given.

        Raises LeaseLost, and what `publish` raised.
        """
        finish = Finish(job_id, token, ending)
        if publish is None:
            return await self._together.finish(finish)
        now, published = self.now(), False

        def work(connection: Connection) -> None:
            nonlocal published
            jobs_finish.write(connection, now, [finish])
            if finish.locked:
                raise RowLocked
            if finish.error is not None or finish.repeated or published:
                return
            try:
                publish()
            except Exception as error:
                raise _NotPublished(error) from error
            published = True

        try:
            # In a transaction of its own: what has names is never taken back because of another's trouble.
            await self._patiently(work, wakes=True, alone=True)
        except _NotPublished as error:
            raise error.cause from None
        return finish.outcome()

    async def renew(self, worker: WorkerId, *, lease: timedelta) -> Mapping[RowId, int]:
        """Renew every lease of the worker in one statement; return job -> token of what it still holds."""
        now = self.now()
        return await self._write(lambda connection: renew_in(connection, worker, now=now, lease=lease), wakes=False)

    async def holds(self, worker: WorkerId) -> Mapping[RowId, int]:
        """Return job -> token of what the worker holds, without renewing."""
        return await self._read(lambda connection: jobs_reap.held_by(connection, worker))

    async def report(self, worker: WorkerId, progress: Mapping[RowId, tuple[float, str]]) -> None:
        """Write down progress (percent, words) of jobs the worker holds. No event, no wake-up."""
        rows = [
            {"id": job_id, "worker": worker, "progress": min(100.0, max(0.0, percent)), "message": safe(words)}
            for job_id, (percent, words) in sorted(progress.items())
        ]
        if rows:
            await self._write(lambda connection: _REPORT.run(connection, rows), wakes=False)

    async def reap(
        self, *, lease: timedelta, dead: Collection[WorkerId] = (), lost_limit: int = 3, grace: timedelta, epoch: int
    ) -> Sequence[QueuedJob]:
        """Return jobs of dead workers, and those whose lease ran out, to pending; prompt and place are kept.

        Raises LeaseLost if the caller is not the planner any more.
        """
        now, order = self.now(), Reap(lease, set(dead), lost_limit, grace, epoch)
        return await self._write(lambda connection: jobs_reap.reap(connection, now, order))

    async def free_places(self, places: Collection[str]) -> int:
        """Let any worker take the pending jobs whose prompt is at one of these places; return how many."""
        now = self.now()
        return await self._write(lambda connection: jobs_reap.free_places(connection, now, places))

    async def to_end(self, places: Collection[str]) -> Sequence[QueuedJob]:
        """Return ended jobs whose prompt must still be ended at one of these places."""
        return await self._read(lambda connection: jobs_steps.to_end(connection, places))

    async def prompt_ended(self, job_id: RowId, prompt_id: PromptId) -> None:
        """Say that the prompt of a job that has ended was seen ended; harmless if the job has another one by now."""
        now = self.now()
        await self._patiently(lambda connection: jobs_steps.prompt_ended(connection, now, job_id, prompt_id))

    async def take_role(self, role: str, owner_id: OwnerId, *, lease: timedelta) -> int | None:
        """Take or keep a role that one process of the database has at a time; return its epoch, None if held."""
        return await self._write(
            lambda connection: roles.take_role(connection, self.now, role, owner_id, lease=lease), wakes=False
        )

    async def drop_role(self, role: str, owner_id: OwnerId) -> None:
        """Give the role up, if this owner holds it."""
        await self._write(lambda connection: roles.drop_role(connection, role, owner_id), wakes=False)

    async def role_holder(self, role: str) -> OwnerId | None:
        """Return who holds a role now, if anybody does."""
        now = self.now()
        return await self._read(lambda connection: roles.role_holder(connection, now, role))
