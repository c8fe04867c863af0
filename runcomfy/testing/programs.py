"""
Programs of this product against an emulated cloud, several in one test: each with its own connection to the store.

A program can die like a process that was killed: nothing of it runs on and nobody signs off; `EmulatedProcesses` tells
the others. Times come from the clock that is passed in, so that it works under virtual time.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
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
from runcomfy.ports.provider import Provider
from runcomfy.ports.store import Store
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator


class EmulatedProcesses:
    """Keeps `runcomfy.ports.processes.Processes`: a process table of programs that are all in this process."""

    def __init__(self) -> None:
        self.dead: set[OwnerId] = set()

    def me(self, *, now: datetime) -> Owner:
        """Return a new owner with a number of its own."""
        return Owner(
            id=OwnerId(str(uuid4())),
            host="emulated",
            pid=1000 + len(self.dead),
            process_started=0.0,
            command="test",
            started_at=now,
            heartbeat_at=now,
        )

    def lives(self, owner: Owner, *, now: datetime) -> bool:
        """Return whether the owner neither signed off nor died."""
        return owner.ended_at is None and owner.id not in self.dead


class Killed(BaseException):
    """Raised in a program that was killed when it tries to have an effect; nothing of the product catches it."""


Visit = Callable[[str], None]
"""Told of a place in a program: `before store.add_machine`, `after provider.launch_machine`."""


def _nothing(_: str) -> None:
    pass


class Mortal:
    """Lets a program have no effect any more, through the port behind this, once it was killed.

    A call that is under way then has left already: what it asked for may be done, and nobody hears the answer.
    """

    def __init__(self, port: Any, killed: asyncio.Event, visit: Visit = _nothing, name: str = "") -> None:
        """`visit` is told before and after every call, and may have the program killed there."""
        self._port, self._killed = port, killed
        self._visit, self._name = visit, name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if name == "close" or not inspect.iscoroutinefunction(found):
            return found  # connections of a dead process are closed, too

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._visit(f"before {self._name}{name}")
            if self._killed.is_set():
                raise Killed
            work, end = asyncio.ensure_future(found(*args, **kwargs)), asyncio.ensure_future(self._killed.wait())
            try:
                await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise Killed
                answer = work.result()
                self._visit(f"after {self._name}{name}")
                if self._killed.is_set():
                    raise Killed
                return answer
            finally:
                for task in (work, end):
                    task.cancel()
                await asyncio.wait({work, end})
                if not work.cancelled():
                    work.exception()

        return call


class Program:
    """One running program: what it can do, what it said."""

    def __init__(
        self,
        machines: Machines,
        dev: DevServer,
        placer: Placer,
        processes: EmulatedProcesses,
        said: list[str],
        killed: asyncio.Event,
    ) -> None:
        self.machines, self.dev, self.placer = machines, dev, placer
        self.books, self.store = machines.books, machines.store
        self.reaper = Reaper(machines)
        self.said = said
        """Every sentence for the user, in order."""
        self._processes = processes
        self._killed = killed

    @property
    def owner(self) -> Owner:
        """The program as the store knows it."""
        return self.books.owner

    def die(self) -> None:
        """Be dead for everybody else, though not silent: for tests that look at what the others do."""
        self._processes.dead.add(self.owner.id)

    def drop_dead(self) -> None:
        """Die here and now, as by `kill -9`: nothing that runs in its name has an effect any more."""
        self.die()
        self._killed.set()

    async def kill(self, *tasks: asyncio.Task[Any]) -> None:
        """Die as by `kill -9`: whatever runs in its name, `tasks` among it, has no effect any more."""
        self.die()
        self._killed.set()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()

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


async def discrepancies(cloud: RunComfyEmulator, program: Program) -> list[str]:
    """Return where our ledger and the cloud's own books differ by more than 1 % and 60 s of a machine (I9)."""
    rows = await program.books.rows(open_only=False)
    entries = await program.store.ledger()
    found = []
    for server_id, bill in cloud.books.items():
        if bill.foreign:
            continue
        ids = {row.id for row in rows if row.server_id == server_id}
        ours = total(entry for entry in entries if entry.machine_id in ids)
        allowed = max(bill.usd / 100, cloud.machines[server_id].usd_per_hour * 60 / 3600)
        if abs(ours - bill.usd) > allowed:
            found.append(f"{server_id}: our ledger has ${ours}, the cloud bills ${bill.usd}")
    return found


async def assert_bill_and_ledger_agree(cloud: RunComfyEmulator, program: Program) -> None:
    """Raise AssertionError where our ledger and the cloud's own books differ."""
    if found := await discrepancies(cloud, program):
        raise AssertionError("; ".join(found))


async def states(program: Program) -> list[str]:
    """Return the state of every machine in the books, also of those that have ended."""
    return [str(row.state) for row in await program.books.rows(open_only=False)]


async def end(program: Program, machine: Machine) -> Machine:
    """Stop a machine as its owner does at the end."""
    current = await program.books.latest(machine.id)
    if current is None:
        raise AssertionError(f"the books know no machine {machine.id}")
    return await program.machines.stop(current, reason="the test is over")


async def start_dev(program: Program, **options: Any) -> tuple[Machine, MachineReport, bool]:
    """Start a development server for an hour."""
    return await program.dev.start(server_type="medium", duration=timedelta(hours=1), **options)


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
        self,
        *,
        busy_timeout: timedelta = timedelta(seconds=30),
        in_memory: bool = False,
        visit: Visit = _nothing,
        **changes: Any,
    ) -> AsyncIterator[Program]:
        """Run a program for the block; `changes` are laid over its cloud settings.

        `visit` is told of every call of the store and the provider, before and after.
        """
        settings = replace(self.settings, cloud=replace(self.settings.cloud, **changes))
        path = Path(":memory:") if in_memory else self.database
        killed = asyncio.Event()
        failure: BaseException | None = None
        try:
            async with AsyncExitStack() as stack:
                disk = SqlStore(path, clock=self.clock, durable=False, busy_timeout=busy_timeout)
                store: Any = Mortal(await stack.enter_async_context(disk), killed, visit, "store.")
                account = RunComfyAPIClient(settings.cloud, clock=self.clock).account
                limiter = StoreLimiter(store, account, settings.cloud, self.clock)
                client = RunComfyAPIClient(settings.cloud, clock=self.clock, limiter=limiter)
                provider: Any = Mortal(await stack.enter_async_context(client), killed, visit, "provider.")
                session = await stack.enter_async_context(OwnerSession(store, self.processes, self.clock))
                try:
                    yield self._program(stack, settings, store, provider, session.owner, killed)
                except BaseException as error:
                    failure = error
                    raise
        except Killed:  # what it would do at its end, it does not do any more
            if failure is not None and not isinstance(failure, Killed):
                raise failure from None

    def _program(
        self,
        stack: AsyncExitStack,
        settings: Settings,
        store: Store,
        provider: Provider,
        owner: Owner,
        killed: asyncio.Event,
    ) -> Program:
        said: list[str] = []
        books = Books(
            store, self.clock, settings, owner, provider=provider.name, account=provider.account, tell=said.append
        )
        machines = Machines(provider, self.processes, books)

        def comfyui(url: SecretUrl) -> Any:
            client = ComfyUIWorkflowClient(url, settings.comfy, clock=self.clock)
            stack.push_async_callback(client.close)  # a dead program closes nothing
            return Mortal(client, killed)

        manager = DevServerStateManager(self.folder / "dev_server_state.json")
        dev = DevServer(machines, PublishedDevServer(manager), comfyui)

        async def both() -> tuple[Machines, DevServer]:
            return machines, dev

        placer = Placer(comfyui, lambda url: comfyui(SecretUrl(url)), both, tell=said.append)
        return Program(machines, dev, placer, self.processes, said, killed)
