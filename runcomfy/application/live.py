"""
What the jobs of this process are doing right now: the newest progress, preview picture and timeline of each.

Whoever runs jobs runs them through `Live.observing`; whoever shows them asks `job`, or subscribes. A job that runs in
another process is not here: of it the queue's row tells the percent and a few words.

Looking never disturbs a run: a subscriber that fails is told of in the log, once, and the job goes on. What is kept is
one snapshot per running job, and nothing of one that is over.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING
from uuid import uuid4

from runcomfy.application.job_queue import workflow_id_of
from runcomfy.domain.altered import replace
from runcomfy.domain.job import JobId, JobRequest, JobResult
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.timeline import Timeline
from runcomfy.ports.clock import Clock

if TYPE_CHECKING:
    from runcomfy.application.job_run import RunsJobs
    from runcomfy.application.journal import Journal
    from runcomfy.application.placing import PlaceFactory

log = logging.getLogger("runcomfy.live")


@dataclass(frozen=True, slots=True)
class LiveJob:
    """A running job, as it was when it was asked about."""

    uid: JobId
    workflow_id: str
    """What the workflow is called, as far as the request tells; the queue's own row may know better."""
    progress: Progress
    preview: bytes | None
    """The newest preview picture, JPEG or PNG."""
    preview_number: int
    """Goes up with each picture; 0: there was none yet."""
    timeline: Timeline
    server_type: str
    """Of the rented machine; empty on a server that was given, and before there is one."""
    since: datetime
    """When this run of it began."""
    began_s: float = 0.0
    """The same on the clock of the event loop, in seconds."""
    over: bool = False


Heard = Callable[[LiveJob], None]


@dataclass(slots=True, eq=False)
class _Subscriber:
    heard: Heard
    failed: bool = field(default=False)


class Live:
    """The running jobs of one process. Belongs to one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._jobs: dict[JobId, LiveJob] = {}
        self._subscribers: list[_Subscriber] = []

    def job(self, uid: JobId) -> LiveJob | None:
        """Return what a job is doing; None if it does not run in this process."""
        return self._jobs.get(uid)

    def jobs(self) -> Mapping[JobId, LiveJob]:
        """Return every job that runs in this process."""
        return MappingProxyType(dict(self._jobs))

    def subscribe(self, heard: Heard) -> Callable[[], None]:
        """Have `heard` called with every snapshot, at once and in the event loop; return what ends that.

        The last snapshot of a run says `over`; one snapshot with no progress yet says that it has begun.
        """
        subscriber = _Subscriber(heard)
        self._subscribers.append(subscriber)

        def leave() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return leave

    def observing(self, runs: RunsJobs) -> RunsJobs:
        """Return what runs jobs as `runs` does, and is looked at meanwhile."""
        return _Observed(runs, self)

    # -- called by the run ---------------------------------------------------------------------------------

    def begin(self, uid: JobId, workflow_id: str) -> Watching:
        """Take up a run; `Watching` is told how it gets on."""
        return Watching(
            self,
            LiveJob(
                uid=uid,
                workflow_id=workflow_id,
                progress=Progress(Step.PLACING),
                preview=None,
                preview_number=0,
                timeline=Timeline(),
                server_type="",
                since=self._clock.now(),
                began_s=asyncio.get_running_loop().time(),
            ),
        )

    def _put(self, before: LiveJob | None, after: LiveJob) -> None:
        """Keep a snapshot, unless a newer run of the same job has taken its place."""
        known = self._jobs.get(after.uid)
        if before is None or known is before:
            self._jobs[after.uid] = after
        if after.over and self._jobs.get(after.uid) is after:
            del self._jobs[after.uid]
        if before is None or known is before:
            self._tell(after)

    def _tell(self, job: LiveJob) -> None:
        for subscriber in tuple(self._subscribers):
            try:
                subscriber.heard(job)
            except Exception:
                if not subscriber.failed:
                    subscriber.failed = True
                    log.exception("live_subscriber_failed", extra={"fields": {"job": job.uid}})


class Watching:
    """One run being looked at."""

    def __init__(self, live: Live, first: LiveJob) -> None:
        self._live, self._job = live, first
        live._put(None, first)

    def progress(self, progress: Progress) -> None:
        """Take a snapshot."""
        job = self._job
        at_s = asyncio.get_running_loop().time() - job.began_s
        pictured = progress.preview is not None
        self._next(
            replace(
                job,
                progress=replace(progress, preview=None) if pictured else progress,
                preview=progress.preview if pictured else job.preview,
                preview_number=job.preview_number + pictured,
                timeline=job.timeline.seen(progress, at_s),
                server_type=progress.server_type or job.server_type,
            )
        )

    def over(self) -> None:
        """Say that the run has ended, however it did."""
        self._next(replace(self._job, over=True))

    def _next(self, job: LiveJob) -> None:
        before, self._job = self._job, job
        self._live._put(before, job)


class _Observed:
    """Runs jobs as another does, and lets them be looked at."""

    def __init__(self, runs: RunsJobs, live: Live) -> None:
        self._runs, self._live = runs, live

    async def run(
        self,
        request: JobRequest,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancel: asyncio.Event | None = None,
        journal: Journal | None = None,
        at: PlaceFactory | None = None,
    ) -> JobResult:
        """Do the job; what goes wrong with it is in the result."""
        uid = request.job_id or JobId(str(uuid4()))
        watching = self._live.begin(uid, workflow_id_of(request))

        def told(progress: Progress) -> None:
            watching.progress(progress)
            if on_progress is not None:
                on_progress(progress)

        try:
            return await self._runs.run(
                replace(request, job_id=uid), on_progress=told, cancel=cancel, journal=journal, at=at
            )
        finally:
            watching.over()
