"""What the tests of the monitor are told with: a project folder with job files in it, its database, what was said."""

# ruff: noqa: S101 - asserts show what is shown

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Final

import workflows
from runcomfy.adapters.job_files import YamlJobFiles
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.application.monitor import Check, Monitor, ScanReport
from runcomfy.domain.exceptions import JobFileInvalid
from runcomfy.domain.queued import Ending, Outcome, QueuedJob, WorkerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.job_files import FoundFile

NAME: Final = "T2I_20250809123001_1_knight.yaml"
WORKER: Final = WorkerId("worker")
LEASE: Final = timedelta(seconds=60)


def job_text(name: str = "knight", *, prompt: str = "a knight in rain", priority: int = 20, more: str = "") -> str:
    """Return what stands in a job file; `more` are further lines of its inputs."""
    return (
        f'job_type: T2I\nworkflow_id: wf_realistic_portrait\npriority: {priority}\ninputs:\n  prompt: "{prompt}"\n'
        f'  seed: 123456\n  steps: 30\n{more}outputs:\n  file_path: "jobs/finished/image/{name}.png"\n'
    )


class Counting(YamlJobFiles):
    """The folder's files, and which of them were opened."""

    opened: ClassVar[list[str]] = []

    def read(self, found: FoundFile) -> bytes | JobFileInvalid | None:
        """Read a file, and count it."""
        self.opened.append(found.name)
        return super().read(found)


class Project:
    """A project folder, its database, and a monitor that writes down what it tells."""

    def __init__(self, root: Path, store: SqlJobs, clock: Clock) -> None:
        self.root, self.store, self.clock = root, store, clock
        self.settings = settings_of(root)
        self.said: list[str] = []
        self.reports: list[ScanReport] = []

    def monitor(self, *, check: Check | None = None, store: Any = None, **changes: Any) -> Monitor:
        """Return a monitor of the folder; `changes` are laid over its settings."""
        settings = replace(self.settings, **changes)
        files = self.files(settings)
        return Monitor(
            store or self.store,
            files,
            settings,
            check=check,
            tell=self.said.append,
            clock=self.clock,
            on_scan=self.reports.append,
        )

    def files(self, settings: QueueSettings) -> Counting:
        """Return the folder's files as a monitor with these settings reads them."""
        registry = WorkflowRegistry(
            root=str(self.root), workflows_file=settings.workflows_file, shipped=workflows.names
        )
        return Counting(settings, registry=registry)

    def path(self, name: str = NAME, folder: str = "image") -> Path:
        """Where a job file lies."""
        return self.root / "jobs" / "processing" / folder / name

    def drop(self, text: str | None = None, name: str = NAME, folder: str = "image") -> Path:
        """Drop a job file into the folder, or change it."""
        path = self.path(name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job_text(name.removesuffix(".yaml")) if text is None else text, encoding="utf-8")
        return path

    async def job(self, name: str = NAME) -> QueuedJob:
        """Return the job of a file, which there must be."""
        found = await self.store.job(name)
        assert found is not None
        return found

    async def claim(self) -> QueuedJob:
        """Take the next job, as a worker does."""
        (job,) = await self.store.claim(WORKER, count=1, lease=LEASE)
        return job

    async def end(self, outcome: Outcome) -> None:
        """Take the next job and let it end so."""
        job = await self.claim()
        await self.store.finish(job.id, job.token, Ending(outcome, error={"code": "x", "message": "x"}))


def settings_of(root: Path) -> QueueSettings:
    """Return the queue's defaults in a folder of the test's."""
    return QueueSettings(
        root=str(root),
        jobs_processing=str(root / "jobs" / "processing"),
        jobs_finished=str(root / "jobs" / "finished"),
        database=Secret(str(root / "queue.sqlite3")),
    )


@asynccontextmanager
async def a_project(folder: Path, clock: Clock) -> AsyncIterator[Project]:
    """Open a project with an empty database, in a new folder below."""
    root = folder / "project"
    root.mkdir()
    wake = timedelta(seconds=1)  # under virtual time nothing else passes between two looks
    database = store_from(settings_of(root).database, clock=clock, durable=False, wake_interval=wake)
    async with SqlJobs(database) as store:
        yield Project(root, store, clock)


async def settle(monitor: Monitor) -> ScanReport:
    """Let the monitor see what is there, and see it again once it has settled."""
    first = await monitor.scan()
    await asyncio.sleep(0.3)
    return first.then(await monitor.scan())


class Watching:
    """A monitor that runs while the block does."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._stop = monitor, asyncio.Event()

    async def __aenter__(self) -> None:
        """Begin to run."""
        self._task = asyncio.ensure_future(self._monitor.run(self._stop))
        await asyncio.sleep(0.01)

    async def __aexit__(self, *_: object) -> None:
        """Stop, and wait for the end."""
        self._stop.set()
        await self._task
