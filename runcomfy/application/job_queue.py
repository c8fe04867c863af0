"""
The queue as programs use it: put jobs in, look at them, wait for them, change their fate.

    queue = JobQueue(store, settings)
    job = await queue.enqueue(JobRequest("image_invert", image="cat.png"), idempotency_key="order-17")
    async for event in queue.events(job):
        print(event.kind)
    done = await queue.wait(job)

Nothing here runs a job: that is the executor's work, in this process or in any other of the same database.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from runcomfy.domain.exceptions import JobNotFound, ValueInvalid, foreign_text
from runcomfy.domain.job import JobRequest
from runcomfy.domain.lease import Owner
from runcomfy.domain.queued import (
    DEFAULT_JOB_TYPE,
    FIRST_PRIORITY,
    LAST_PRIORITY,
    QUEUE_SCOPE,
    Attempt,
    JobEvent,
    NewJob,
    Pause,
    QueuedJob,
    QueueStatus,
)
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.jobs import JobKey, JobStore
from runcomfy.ports.processes import Processes

Check = Callable[[JobRequest], Awaitable[object]]
"""Raises BadInput if the request could never be run; sends and writes nothing."""

EXECUTOR: Final = "executor"
"""Last word of `Owner.command` of a process that works on jobs."""

INLINE: Final = "inline"
"""`workflow_id` of a job that brings its graph with it."""

EVENTS_AT_ONCE: Final = 500
CHECKS_AT_ONCE: Final = 8

Which = QueuedJob | JobKey
"""A job, or its number, uid or config name."""


@dataclass(frozen=True, slots=True)
class JobStory:
    """Everything that is known of one job."""

    job: QueuedJob
    attempts: Sequence[Attempt]
    events: Sequence[JobEvent]


class JobQueue:
    """A database of jobs, seen by a program. Holds nothing open but what the store does; made for many callers."""

    def __init__(
        self,
        store: JobStore,
        settings: QueueSettings,
        *,
        check: Check | None = None,
        processes: Processes | None = None,
    ) -> None:
        """`store` is open and stays the caller's. Without `check`, what cannot be run is found out by its worker."""
        self.store = store
        self.settings = settings
        self._check = check
        self._processes = processes

    # -- putting in ----------------------------------------------------------------------------------------

    async def enqueue(
        self,
        what: JobRequest | NewJob,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        job_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        user: str | None = None,
        project: str | None = None,
        retry_limit: int | None = None,
        config_name: str | None = None,
    ) -> QueuedJob:
        """Put a job in; accepted once this returns: committed and flushed (I10).

        The same key with the same body returns the same job, as it is now, for as long as the job is kept (I16).
        Files are named from the current folder, and written down by their absolute paths.

        Raises BadInput: what could never be run, ValueInvalid (priority, retry limit), NameTaken,
        IdempotencyConflict; LocalError: nothing was accepted.
        """
        given: dict[str, Any] = {
            "idempotency_key": idempotency_key,
            "priority": priority,
            "job_type": job_type,
            "metadata": metadata,
            "user": user,
            "project": project,
            "retry_limit": retry_limit,
            "config_name": config_name,
        }
        new = what if isinstance(what, NewJob) else NewJob(what, workflow_id_of(what))
        return (await self.enqueue_many([replace(new, **{k: v for k, v in given.items() if v is not None})]))[0]

    async def enqueue_many(self, jobs: Sequence[JobRequest | NewJob]) -> Sequence[QueuedJob]:
        """Put jobs in, all or none, in this order. Raises as `enqueue` does."""
        ready = [_complete(job if isinstance(job, NewJob) else NewJob(job, workflow_id_of(job))) for job in jobs]
        if self._check is not None:
            # What was accepted under its key stays accepted, though its files may be gone by now (I16).
            known = await self.store.known_keys([job.idempotency_key for job in ready if job.idempotency_key])
            await self._check_all(self._check, [job for job in ready if job.idempotency_key not in known])
        return await self.store.add(ready, default_priority=self.settings.default_priority)

    @staticmethod
    async def _check_all(check: Check, jobs: Sequence[NewJob]) -> None:
        gate = asyncio.Semaphore(CHECKS_AT_ONCE)

        async def one(job: NewJob) -> None:
            async with gate:
                await check(job.request)

        if len(jobs) == 1:
            await one(jobs[0])
            return
        tasks = [asyncio.ensure_future(one(job)) for job in jobs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- looking -------------------------------------------------------------------------------------------

    async def job(self, which: Which) -> QueuedJob:
        """Return a job as it is now. Raises JobNotFound."""
        found = await self.store.job(_key(which))
        if found is None:
            raise JobNotFound(
                f"the queue has no job {foreign_text(_key(which), 80)!r}", hint="`comfyctl queue ls` lists them"
            )
        return found

    async def show(self, which: Which) -> JobStory:
        """Return a job with every attempt and every event. Raises JobNotFound."""
        job = await self.job(which)
        # Asked for together: nearly every story is one page.
        attempts, page = await asyncio.gather(
            self.store.attempts(job.id), self.store.events(job_id=job.id, limit=EVENTS_AT_ONCE)
        )
        events = list(page)
        while len(page) == EVENTS_AT_ONCE:
            page = await self.store.events(after=events[-1].number, job_id=job.id, limit=EVENTS_AT_ONCE)
            events += page
        return JobStory(job, attempts, events)

    async def list(
        self, *, status: QueueStatus | None = None, limit: int | None = None, newest_first: bool = False
    ) -> Sequence[QueuedJob]:
        """Return jobs: pending ones in the order in which they will run, others by number."""
        return await self.store.jobs(status=status, limit=limit, newest_first=newest_first)

    async def counts(self) -> Mapping[QueueStatus, int]:
        """Return how many jobs there are of each status."""
        return await self.store.counts()

    async def pauses(self) -> Sequence[Pause]:
        """Return what is paused now, and why."""
        return await self.store.pauses()

    async def workers(self) -> Sequence[Owner]:
        """Return the executors that live, as far as can be seen from here."""
        owners = (await self.store.owners()).values()
        now = self.store.now()
        return [
            owner
            for owner in owners
            if is_executor(owner) and (self._processes is None or self._processes.lives(owner, now=now))
        ]

    # -- waiting -------------------------------------------------------------------------------------------

    async def wait(self, which: Which, *, timeout: timedelta | None = None) -> QueuedJob:
        """Return the job when it has ended: done, failed, cancelled or quarantined.

        Raises JobNotFound, and TimeoutError if it has not ended after `timeout`; the job goes on then.
        """
        job = await self.job(which)
        async with asyncio.timeout(timeout.total_seconds() if timeout is not None else None):
            mark = 0
            while not job.ended:
                mark = await self.store.changed(timeout=self.settings.poll_interval, seen=mark)
                job = await self.job(job.id)
        return job

    async def events(self, which: Which | None = None, *, after: int = 0) -> AsyncGenerator[JobEvent, None]:
        """Replay the event log from the number after `after`, and follow it; what is told is durable.

        Of one job: until it has ended and everything was told; a job that was retried since is followed on. Without
        a job: everything that happens, for ever. `after` is the number of the last event seen, to go on after a
        break. Raises JobNotFound.
        """
        job = await self.job(which) if which is not None else None
        mark = 0
        while True:
            # Looked at before the page is read: if it has ended by then, the page has its last word.
            ended = job is not None and (await self.job(job.id)).ended
            page = await self.store.events(after=after, job_id=job.id if job else None, limit=EVENTS_AT_ONCE)
            for event in page:
                after = event.number
                yield event
            if page:
                continue
            if ended:
                return
            mark = await self.store.changed(timeout=self.settings.poll_interval, seen=mark)

    async def follow(self, which: Which) -> AsyncGenerator[QueuedJob, None]:
        """Yield the job as it is, and again whenever its status or progress changes, until it has ended."""
        job = await self.job(which)
        mark = 0
        yield job
        while not job.ended:
            mark = await self.store.changed(timeout=self.settings.poll_interval, seen=mark)
            now = await self.job(job.id)
            if _shown(now) != _shown(job):
                yield now
            job = now

    # -- what users ask for --------------------------------------------------------------------------------

    async def cancel(self, which: Which, *, by: str = "") -> QueuedJob:
        """End a job for good (I17); its prompt is interrupted by id. Raises JobNotFound."""
        return await self.store.cancel(_key(which), by=by)

    async def retry(self, which: Which, *, by: str = "") -> QueuedJob:
        """Let an ended job run again from the start. Raises JobNotFound, JobBusy (it is being processed)."""
        return await self.store.retry(_key(which), by=by)

    async def set_priority(self, which: Which, priority: int, *, by: str = "") -> QueuedJob:
        """Change the priority, clamped to 1 … 999; lower runs first. Raises JobNotFound."""
        return await self.store.set_priority(_key(which), priority, by=by)

    async def god_mode(self, which: Which, *, by: str = "") -> QueuedJob:
        """Let a job run before all others: priority 1. Raises JobNotFound."""
        return await self.set_priority(which, FIRST_PRIORITY, by=by)

    async def pause(self, message: str = "", *, scope: str = QUEUE_SCOPE, by: str = "") -> Pause:
        """Let no job be started until `resume`; running ones go on."""
        return await self.store.pause(scope=scope, reason="asked", message=message or "somebody asked for it", by=by)

    async def resume(self, *, scope: str | None = None, by: str = "") -> Sequence[Pause]:
        """End the pauses of a scope, or all of them, and return them."""
        return await self.store.resume(scope=scope, by=by)


def is_executor(owner: Owner) -> bool:
    """Return whether the process works on jobs."""
    return owner.command.split(" ")[-1] == EXECUTOR


def host_scope(owner: Owner) -> str:
    """Return the scope of pauses that hold for the executors of the owner's computer."""
    return f"host:{owner.host.split('/')[0]}"


def workflow_id_of(request: JobRequest) -> str:
    """Return what the workflow is called in the queue: its name, its file's name, or `inline`."""
    if not isinstance(request.workflow, str):
        return INLINE
    return Path(request.workflow).stem if _is_path(request.workflow) else request.workflow


def absolute(request: JobRequest) -> JobRequest:
    """Return the request with every file it names by its absolute path: its worker may run in another folder."""
    workflow = request.workflow
    if isinstance(workflow, str) and _is_path(workflow):
        workflow = _absolute(workflow)
    return replace(
        request,
        workflow=workflow,
        image=_absolute(request.image) if request.image else request.image,
        sets={target: _absolute_upload(value) for target, value in request.sets.items()},
        inputs={name: _absolute_input(value) for name, value in request.inputs.items()},
        out_dir=_absolute(request.out_dir) if request.out_dir else request.out_dir,
        out_file=_absolute(request.out_file) if request.out_file else request.out_file,
    )


def _is_path(workflow: str) -> bool:
    """Whether a workflow's name is a path, judged as its loader does: shipped ones have neither folder nor ending."""
    return workflow.endswith(".json") or "/" in workflow or "\\" in workflow


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueInvalid(f"{foreign_text(path)!r} is no path that can be used: {foreign_text(error)}") from error


def _absolute_upload(value: Any) -> Any:
    is_upload = isinstance(value, str) and value.startswith("@") and not value.startswith("@@")
    return f"@{_absolute(value[1:])}" if is_upload and len(value) > 1 else value


def _absolute_input(value: Any) -> Any:
    """As `_absolute_upload`, where the value may be a text that happens to begin with an @: files are there."""
    if not isinstance(value, str):
        return value
    named = _absolute_upload(value)
    try:
        return named if named == value or Path(named[1:]).is_file() else value
    except (OSError, ValueError):
        return value


def _complete(new: NewJob) -> NewJob:
    """Return a job fit to be written down. Raises ValueInvalid."""
    if new.priority is not None and not FIRST_PRIORITY <= new.priority <= LAST_PRIORITY:
        raise ValueInvalid(
            f"priority {new.priority} is outside {FIRST_PRIORITY} … {LAST_PRIORITY}",
            hint="lower runs first; usual is 50",
        )
    if new.retry_limit is not None and new.retry_limit < 0:
        raise ValueInvalid(f"a retry limit of {new.retry_limit} makes no sense", hint="0 means: one run and no more")
    if new.idempotency_key == "":
        raise ValueInvalid("the idempotency key is empty", hint="leave it out, or use one that names the job")
    request = absolute(new.request)
    return replace(new, request=replace(request, job_id=None), job_type=new.job_type or DEFAULT_JOB_TYPE)


def _key(which: Which) -> JobKey:
    return which.id if isinstance(which, QueuedJob) else which


def _shown(job: QueuedJob) -> tuple[object, ...]:
    return job.status, job.priority, job.progress, job.message, job.token, job.phase, job.not_before
