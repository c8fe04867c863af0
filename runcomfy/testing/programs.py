"""
Programs of this product against an emulated cloud, several in one test: each with its own connection to the store.

A program can die like a process that was killed: nothing of it runs on and nobody signs off; `EmulatedProcesses` tells
the others. Times come from the clock that is passed in, so that it works under virtual time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.dev_server_file import PublishedDevServer
from runcomfy.adapters.dev_server_state import DevServerStateManager
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.books import Books
from runcomfy.application.dev_server import DevServer
from runcomfy.application.limiter import StoreLimiter
from runcomfy.application.machines import Machines
from runcomfy.application.owner import OwnerSession
from runcomfy.application.placing import Placer
from runcomfy.application.reaper import Reaper
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import Machine, MachineReport, OwnerId, Purpose
from runcomfy.domain.money import total
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator


class EmulatedProcesses:
    """Keeps `runcomfy.ports.processes.Processes`: a process table of programs that are all in this process."""

    def __init__(self) -> None:
        self.dead: set[OwnerId] = set()

    def me(self, *, now: datetime) -> Owner:
        """Return a new owner with a number of its own."""
        owner = Owner(
            id=OwnerId(str(uuid4())),
            host="emulated",
            pid=1000 + len(self.dead),
            process_started=0.0,
            command="test",
            started_at=now,
            heartbeat_at=now,
        )
        return owner

    def lives(self, owner: Owner, *, now: datetime) -> bool:
        """Return whether the owner neither signed off nor died."""
        return owner.ended_at is None and owner.id not in self.dead


class Program:
    """One running program: what it can do, what it said."""

    def __init__(
        self, machines: Machines, dev: DevServer, placer: Placer, processes: EmulatedProcesses, said: list[str]
    ) -> None:
        self.machines, self.dev, self.placer = machines, dev, placer
        self.books, self.store = machines.books, machines.store
        self.reaper = Reaper(machines)
        self.said = said
        """Every sentence for the user, in order."""
        self._processes = processes

    @property
    def owner(self) -> Owner:
        """The program as the store knows it."""
        return self.books.owner

    def die(self) -> None:
        """Be dead for everybody else. The test ends what it runs in this program's name."""
        self._processes.dead.add(self.owner.id)

    def intent(
        self,
        *,
        server_type: str = "medium",
        duration: timedelta = timedelta(minutes=10),
        purpose: Purpose = Purpose.RUN,
    ) -> Machine:
        """Return a machine to be rented."""
        return self.books.intent(purpose=purpose, server_type=server_type, duration=duration, reason="a test")

    async def launch(self, intent: Machine | None = None) -> Machine:
        """Rent a machine."""
        async with self.machines.launch_lock():
            return await self.machines.launch(intent or self.intent())

    async def ready(self, intent: Machine | None = None) -> tuple[Machine, MachineReport]:
        """Rent a machine and wait until it is ready."""
        return await self.machines.wait_ready(await self.launch(intent))

    async def billed(self) -> Decimal:
        """Return the sum of the ledger."""
        return total(await self.store.ledger())


def settings_for(cloud: CloudSettings, folder: Path) -> Settings:
    """Return the defaults with another account and state folder, read from nothing outside."""
    settings = load_settings(overrides={})
    return replace(settings, cloud=cloud, files=replace(settings.files, state_dir=str(folder), durable=False))


class Programs:
    """Starts programs that share one state folder and one account."""

    def __init__(self, cloud: RunComfyEmulator, settings: Settings, clock: Clock) -> None:
        self.cloud, self.settings, self.clock = cloud, settings, clock
        self.processes = EmulatedProcesses()
        self.folder = Path(settings.files.state_dir)

    @property
    def database(self) -> Path:
        """The file that the programs share."""
        return self.folder / "runcomfy.sqlite3"

    @asynccontextmanager
    async def start(
        self, *, busy_timeout: timedelta = timedelta(seconds=5), in_memory: bool = False, **changes: Any
    ) -> AsyncIterator[Program]:
        """Run a program for the block; `changes` are laid over its cloud settings."""
        settings = replace(self.settings, cloud=replace(self.settings.cloud, **changes))
        said: list[str] = []
        async with AsyncExitStack() as stack:
            path = Path(":memory:") if in_memory else self.database
            store = SqlStore(path, clock=self.clock, durable=False, busy_timeout=busy_timeout)
            await stack.enter_async_context(store)
            account = RunComfyAPIClient(settings.cloud, clock=self.clock).account
            limiter = StoreLimiter(store, account, settings.cloud, self.clock)
            provider = RunComfyAPIClient(settings.cloud, clock=self.clock, limiter=limiter)
            await stack.enter_async_context(provider)
            session = await stack.enter_async_context(OwnerSession(store, self.processes, self.clock))
            books = Books(
                store,
                self.clock,
                settings,
                session.owner,
                provider=provider.name,
                account=provider.account,
                tell=said.append,
            )
            machines = Machines(provider, self.processes, books)

            def comfyui(url: SecretUrl) -> ComfyUI:
                return ComfyUIWorkflowClient(url, settings.comfy, clock=self.clock, durable=False)

            manager = DevServerStateManager(self.folder / "dev_server_state.json")
            dev = DevServer(machines, PublishedDevServer(manager), comfyui)

            async def both() -> tuple[Machines, DevServer]:
                return machines, dev

            placer = Placer(comfyui, lambda url: comfyui(SecretUrl(url)), both, tell=said.append)
            yield Program(machines, dev, placer, self.processes, said)
