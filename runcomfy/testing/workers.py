"""
Workers of a queue, several in one test: each with its own connection to the database and its own clients of the server.

A worker can die like a process that was killed: nothing of it has an effect any more and nobody signs off;
`EmulatedProcesses` tells the others. It can freeze, as a suspended computer does, and wake. Times come from the clock
that is passed in, so that it works under virtual time.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import workflows
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.results import DiskResults
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.application.executor import Executor
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.job_queue import JobQueue
from runcomfy.application.orchestrator import RunComfyOrchestrator
from runcomfy.application.placing import Placer
from runcomfy.application.station import GivenStation, Station
from runcomfy.domain.exceptions import CredentialsMissing
from runcomfy.domain.lease import Owner
from runcomfy.domain.queued import WorkerId
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.settings import QueueSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.testing.programs import EmulatedProcesses, Killed, Mortal

HOST = "test-host"


class _Sleeper:
    """Holds every call of a program through the port behind this while it is frozen."""

    def __init__(self, port: Any, awake: asyncio.Event) -> None:
        self._port, self._awake = port, awake

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._awake.wait()
            answer = await found(*args, **kwargs)
            await self._awake.wait()
            return answer

        return call


class Worker:
    """One running worker: what it does, what it said."""

    def __init__(
        self, executor: Executor, store: SqlJobs, queue: JobQueue, killed: asyncio.Event, awake: asyncio.Event
    ) -> None:
        """`store` and `queue` are the test's own way in: they work when the worker is dead or frozen, too."""
        self.executor, self.store, self.queue = executor, store, queue
        self._awake = awake
        self.said: list[str] = []
        """Every sentence for the user, in order."""
        self.stop, self.leave = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._killed = killed

    @property
    def id(self) -> WorkerId:
        """What the rows call it."""
        return self.executor.worker

    def begin(self, *, once: bool = False) -> asyncio.Task[None]:
        """Work, in a task of its own."""
        self.task = asyncio.create_task(self.executor.run(self.stop, self.leave, once=once), name="worker")
        return self.task

    async def end(self) -> None:
        """Stop as by one Ctrl+C, and wait for the end."""
        self.stop.set()
        if self.task is not None:
            task, self.task = self.task, None
            await task

    def freeze(self) -> None:
        """Stand still as by SIGSTOP: no call leaves and no answer is heard until `thaw`."""
        self._awake.clear()

    def thaw(self) -> None:
        """Go on."""
        self._awake.set()

    async def kill(self, processes: EmulatedProcesses) -> None:
        """Die as by `kill -9`: what runs has no effect any more."""
        processes.dead.add(self.executor.owner.id)
        self._killed.set()
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()


class Workers:
    """Starts workers that share one database and one server."""

    def __init__(
        self,
        settings: Settings,
        queue: QueueSettings,
        clock: Clock,
        *,
        wake_interval: timedelta = timedelta(seconds=1),
    ) -> None:
        """`queue.api_base_url` is where the jobs run.

        `wake_interval`: how often those who wait ask the file; each time is real work, in a story of hours too much.
        """
        self.settings, self.queue_settings, self.clock = settings, queue, clock
        self._wake_interval = wake_interval
        self.processes = EmulatedProcesses()

    def open(self, *, busy_timeout: timedelta = timedelta(seconds=30)) -> SqlJobs:
        """Return a connection of its own, not opened yet."""
        database = store_from(
            self.queue_settings.database,
            clock=self.clock,
            durable=False,
            busy_timeout=busy_timeout,
            wake_interval=self._wake_interval,
        )
        return SqlJobs(database)

    @asynccontextmanager
    async def start(
        self,
        *,
        works: bool = True,
        once: bool = False,
        heart: Callable[[SqlJobs, WorkerId], Pulse] | None = None,
        busy_timeout: timedelta = timedelta(seconds=30),
        at: tuple[Placer, Station] | None = None,
        tell: Callable[[str], None] | None = None,
        **changes: Any,
    ) -> AsyncIterator[Worker]:
        """Run a worker for the block; `changes` are laid over the queue's settings. `works=False`: only make it.

        `at`: where it works, if that is not the server of the settings. `tell`: hears what it says, in place of `said`.
        """
        settings = replace(self.queue_settings, **changes)
        with suppress(Killed):
            async with AsyncExitStack() as stack:
                store = await stack.enter_async_context(self.open(busy_timeout=busy_timeout))
                worker = self._worker(stack, store, settings, heart, at, tell)
                if works:
                    worker.begin(once=once)
                try:
                    yield worker
                finally:
                    await worker.end()

    def _worker(
        self,
        stack: AsyncExitStack,
        disk: SqlJobs,
        settings: QueueSettings,
        heart: Callable[[SqlJobs, WorkerId], Pulse] | None,
        at: tuple[Placer, Station] | None,
        tell: Callable[[str], None] | None,
    ) -> Worker:
        said: list[str] = []
        killed, awake = asyncio.Event(), asyncio.Event()
        awake.set()

        def fragile(port: Any) -> Any:
            return _Sleeper(Mortal(port, killed), awake)

        store = fragile(disk)
        clients: dict[str, Any] = {}

        def comfyui(url: str) -> Any:
            if url not in clients:
                client = ComfyUIWorkflowClient(SecretUrl(url), self.settings.comfy, clock=self.clock)
                stack.push_async_callback(client.close)
                clients[url] = fragile(client)
            return clients[url]

        async def no_cloud() -> Any:
            raise CredentialsMissing("this worker has no cloud")

        here = Placer(lambda url: comfyui(url.reveal()), comfyui, no_cloud, tell=said.append, host=HOST)
        placer, station = at or (here, GivenStation(here, settings.api_base_url))
        orchestrator = RunComfyOrchestrator(
            settings=self.settings,
            clock=self.clock,
            results=DiskResults(self.settings.files),
            placer=placer,
            load_workflow=WorkflowFiles(workflows.names, workflows.load),
            random_int=random.SystemRandom().randint,
        )
        owner: Owner = self.processes.me(now=self.clock.now())
        executor = Executor(
            store,
            settings,
            station,
            orchestrator,
            owner,
            clock=self.clock,
            processes=self.processes,
            heart=heart(disk, WorkerId(owner.id)) if heart is not None else None,
            tell=tell or said.append,
        )
        worker = Worker(executor, disk, JobQueue(disk, settings, processes=self.processes), killed, awake)
        worker.said = said
        return worker


def queue_settings_for(url: str, folder: Path, **changes: Any) -> QueueSettings:
    """Return the queue's defaults in a folder of the test's."""
    return replace(
        QueueSettings(
            root=str(folder),
            jobs_processing=str(folder / "jobs" / "processing"),
            jobs_finished=str(folder / "jobs" / "finished"),
            database=Secret(str(folder / "queue.sqlite3")),
            api_base_url=url,
        ),
        **changes,
    )
