"""What a program that works on the queue says: a line with the time for each thing that happened, and what runs now."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import click

from runcomfy.cli.progress_display import describe
from runcomfy.domain.exceptions import LocalError, foreign_text
from runcomfy.domain.job import JobRequest, JobResult
from runcomfy.domain.progress import Progress, Step

if TYPE_CHECKING:
    import asyncio

    from runcomfy.application.job_run import RunsJobs
    from runcomfy.application.journal import Journal
    from runcomfy.application.placing import PlaceFactory
    from runcomfy.domain.queued import QueuedJob
    from runcomfy.ports.jobs import JobStore

PROGRESS_EVERY: Final = 10.0
"""Seconds between two lines about one job's progress, where there is no terminal to show it live."""


class Voice:
    """`with Voice(...) as say:` — `say(sentence)`. In a terminal what runs is shown below the lines."""

    def __init__(self, *, as_json: bool, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._as_json = as_json
        self._now = now
        self._live: Any = None
        self._running: dict[str, Progress | None] = {}
        self._said_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        if not self._as_json and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(), refresh_per_second=4, get_renderable=self._below, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()

    @property
    def running(self) -> list[str]:
        """The names of the jobs that run in this process."""
        return list(self._running)

    def __call__(self, sentence: str, **facts: Any) -> None:
        """Say a sentence, now."""
        text = foreign_text(sentence, 600)
        if self._as_json:
            self._print(json.dumps({"at": self._now().isoformat(), "message": text, **facts}, ensure_ascii=False))
            return
        self._print(f"{self._now().astimezone():%H:%M:%S} {text}")

    def _print(self, line: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads it, or its disk is full: the jobs matter more
            if self._live is not None:
                self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                click.echo(line)
                sys.stdout.flush()  # whoever reads a pipe or a file wants to see it now

    # -- what runs -----------------------------------------------------------------------------------------

    def begun(self, job: QueuedJob) -> None:
        """A job was taken up."""
        self._running[job.config_name] = None
        self._said_at[job.config_name] = time.monotonic()
        again = f", run {job.run_count + 1}" if job.run_count else ""
        user = f", for {job.user}" if job.user else ""
        self(
            f"{job.config_name}: taken up ({job.job_type}, {job.workflow_id}, priority {job.priority}{again}{user})",
            job=job.config_name,
        )

    def progress(self, job: QueuedJob, progress: Progress) -> None:
        """A job got on."""
        name = job.config_name
        self._running[name] = progress
        now = time.monotonic()
        if self._live is None and now - self._said_at.setdefault(name, now) >= PROGRESS_EVERY:
            self._said_at[name] = now
            self(f"{name}: {shown(progress)}", job=name, percent=round(progress.percent, 1), step=str(progress.step))

    def over(self, job: QueuedJob) -> None:
        """A job runs no more; the executor says how it ended."""
        self._running.pop(job.config_name, None)
        self._said_at.pop(job.config_name, None)

    def _below(self) -> Any:
        from rich.text import Text

        lines = [f"  {name}: {shown(progress) if progress else 'begins'}" for name, progress in self._running.items()]
        return Text("\n".join(foreign_text(line, 200) for line in lines))


def shown(progress: Progress) -> str:
    """Return where a job is, in a few words."""
    percent = f"{progress.percent:.0f}% " if progress.step in (Step.RUNNING, Step.FETCHING) else ""
    return f"{percent}{describe(progress)}"


class Narrated:
    """An orchestrator whose jobs are told about as they begin and get on."""

    def __init__(self, orchestrator: RunsJobs, store: JobStore, voice: Voice) -> None:
        self._orchestrator, self._store, self._voice = orchestrator, store, voice

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
        job: QueuedJob | None = None
        with suppress(LocalError):  # the run itself finds out what the database refuses
            job = await self._store.job(request.job_id) if request.job_id is not None else None
        if job is None:
            return await self._orchestrator.run(request, on_progress=on_progress, cancel=cancel, journal=journal, at=at)

        def told(progress: Progress) -> None:
            if on_progress is not None:
                on_progress(progress)
            self._voice.progress(job, progress)

        self._voice.begun(job)
        try:
            return await self._orchestrator.run(request, on_progress=told, cancel=cancel, journal=journal, at=at)
        finally:
            self._voice.over(job)
