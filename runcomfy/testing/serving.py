"""
Services (`comfyctl serve`) against an emulated cloud, several in one test: each with its own connections to the books.

They are wired as the product wires them. One can die like a process that was killed: nothing of it has an effect any
more and nobody signs off. It can sleep, as a suspended computer does, and wake. Times come from the clock that is
passed in, so that it works under virtual time.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, cast

from sqlalchemy import Connection

from runcomfy.adapters.stores.database import Database, T, meaning_of, not_open
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.adapters.stores.sqlite import IN_MEMORY, SqliteFile, raw
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.job_queue import JobQueue
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App
from runcomfy.domain.job import JobRequest
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import Machine, OwnerId
from runcomfy.domain.money import seconds_between, total
from runcomfy.domain.queued import QueuedJob, QueueStatus
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import CloudSettings, QueueSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.provider import Provider
from runcomfy.ports.store import Store
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.process import RunRecord
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.lean_sql import LeanConnection
from runcomfy.testing.programs import EmulatedProcesses, Killed, Mortal, Visit, settings_for
from runcomfy.testing.queue_programs import drawing

LOOK_EVERY: Final = 5.0
MakeClient = Callable[[SecretUrl], ComfyUI]
QUIET: Final[dict[str, Any]] = {
    "guard": False,
    "plan_every": timedelta(seconds=20),
    "status_every": timedelta(seconds=20),
}
"""Loops that look less often than usual: what happens wakes them all the same."""


def _pass_by(_: str) -> None:
    pass


class _Sleeper:
    """Holds every call of a program through the port behind this while it sleeps.

    Timers of this process go on meanwhile, those of one that sleeps would not: so a call that was held says the time at
    which its program woke.
    """

    def __init__(self, port: Any, awake: asyncio.Event, clock: Clock) -> None:
        self._port, self._awake, self._clock = port, awake, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            if not self._awake.is_set():
                await self._awake.wait()
                kwargs |= {name: self._clock.now() for name in ("now", "at") if name in kwargs}
            answer = await found(*args, **kwargs)
            await self._awake.wait()
            return answer

        return call


class _Kept(Database):
    """A database in memory that lives on when one of those who use it lets go of it, and works in the loop's thread.

    Its one transaction is never committed; each write has a savepoint. What it is asked is what any SQLite is asked.
    """

    def __init__(self, clock: Clock, pause: Callable[[], Awaitable[None]]) -> None:
        """`pause` is awaited before each call is served: others may come in between."""
        hour = timedelta(hours=1)  # nobody else writes: who waits is woken by the commit itself
        super().__init__(SqliteFile(IN_MEMORY, durable=False, busy_timeout=hour, wake_interval=hour), clock=clock)
        self._pause = pause
        self._connection: Connection | None = None

    async def open(self) -> None:
        """Make it; harmless when repeated."""
        if self._connection is None:
            await super().open()
            self._whole = self._linked().reading.connect()
            self._driver = raw(self._whole)
            self._connection = cast("Connection", LeanConnection(self._whole))

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which writes nothing."""
        await self._pause()
        if self._connection is None:
            raise not_open()
        try:
            return work(self._connection)
        except self.kind.errors as error:
            raise meaning_of(self.kind, error) from error

    async def write(self, work: Callable[[Connection], T], *, wakes: bool | None = None) -> T:
        """Run `work`, all of it or nothing."""
        await self._pause()
        if self._connection is None:
            raise not_open()
        driver = self._driver
        before = driver.total_changes
        driver.execute("SAVEPOINT one")
        try:
            answer = work(self._connection)
        except BaseException as error:
            driver.execute("ROLLBACK TO one")
            driver.execute("RELEASE one")
            if isinstance(error, Exception):
                raise meaning_of(self.kind, error) from error
            raise
        driver.execute("RELEASE one")
        if wakes or (wakes is None and driver.total_changes != before):
            self._ring()
        return answer

    write_alone = write

    async def close(self) -> None:
        """Stay."""

    async def end(self) -> None:
        """Forget everything."""
        if self._connection is not None:
            self._connection = None
            self._whole.close()
        await super().close()


class Memory:
    """Databases in memory, in the place of the files they are named after."""

    def __init__(self, clock: Clock, pause: Callable[[], Awaitable[None]]) -> None:
        """`pause` is awaited before each call is served: others may come in between."""
        self._clock, self._pause = clock, pause
        self._kept: dict[str, _Kept] = {}

    def database(self, name: str) -> Database:
        """Return the database of that name, the same to everybody."""
        if name not in self._kept:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()  # whether there is a queue is seen by its file
            self._kept[name] = _Kept(self._clock, self._pause)
        return self._kept[name]

    async def end(self) -> None:
        """Forget everything."""
        for database in self._kept.values():
            await database.end()


class _AtOnce:
    """What `_Sleeper` and `Mortal` are, for a store whose answers are there at once: without a task for each call."""

    def __init__(self, port: Any, slowly: Any, app: _ServedApp, name: str) -> None:
        self._port, self._slowly, self._app, self._name = port, slowly, app, name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found):
            return found
        # Only `changed` waits for anything.
        call = getattr(self._slowly, name) if name in ("changed", "close") else self._called(found, self._name + name)
        self.__dict__[name] = call  # asked for once
        return call

    def _called(self, found: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
        app = self._app
        killed, awake = app.killed, app.awake
        before, after = f"before {name}", f"after {name}"

        async def call(*args: Any, **kwargs: Any) -> Any:
            if not awake.is_set():
                await awake.wait()
                kwargs |= {name: app.clock.now() for name in ("now", "at") if name in kwargs}
            app.visit(before)
            if killed.is_set():
                raise Killed
            answer = await found(*args, **kwargs)
            app.visit(after)
            if killed.is_set():
                raise Killed
            if not awake.is_set():
                await awake.wait()
            return answer

        return call


class _Own:
    """The process table, as one program asks it; remembers as whom the program has signed in."""

    def __init__(self, processes: EmulatedProcesses) -> None:
        self._processes = processes
        self.ids: set[OwnerId] = set()

    def me(self, *, now: datetime) -> Owner:
        owner = self._processes.me(now=now)
        self.ids.add(owner.id)
        return owner

    def lives(self, owner: Owner, *, now: datetime) -> bool:
        return self._processes.lives(owner, now=now)


class _ServedApp(App):
    """The product's wiring, with ports that have no effect once the program was killed, and wait while it sleeps."""

    def __init__(self, settings: Settings, queue: QueueSettings, processes: EmulatedProcesses, clock: Clock) -> None:
        self.own = _Own(processes)
        super().__init__(settings, clock=clock, tell=self._hear, processes=self.own)
        self._queue_settings = queue
        self.said: list[str] = []
        self.make_client: MakeClient | None = None
        self.memory: Memory | None = None
        self.killed, self.awake = asyncio.Event(), asyncio.Event()
        self.awake.set()
        self.observers: list[Callable[[_ServedApp, str], None]] = []
        """Told of the calls of every program, before `visit`; not of those of stores in memory."""
        self.visit: Visit = _pass_by
        """Told of each call of a port before and after it (`before store.add_machine`); what it raises, the call
        raises."""
        self._books_held: Any = None
        self._jobs_held: Any = None

    def _hear(self, sentence: str) -> None:
        if not self.killed.is_set():
            self.said.append(sentence)

    def _visited(self, place: str) -> None:
        for look in self.observers:
            look(self, place)
        self.visit(place)

    def _held(self, port: Any, name: str) -> Any:
        slowly = _Sleeper(Mortal(port, self.killed, self._visited, name), self.awake, self.clock)
        if self.memory is None or name not in ("store.", "jobs."):
            return slowly
        return _AtOnce(port, slowly, self, name)

    def _database(self, name: str, **options: Any) -> Database:
        return super()._database(name, **options) if self.memory is None else self.memory.database(name)

    async def _open_books(self) -> Any:
        if self._books_held is None:
            self._books_held = self._held(await super()._open_books(), "store.")
        return self._books_held

    async def _provider(self, store: Store, settings: Settings) -> Provider:
        provider: Provider = self._held(await super()._provider(store, settings), "provider.")
        return provider

    async def job_store(self) -> Any:
        if self._jobs_held is None:
            self._jobs_held = self._held(await super().job_store(), "jobs.")
        return self._jobs_held

    def _client(self, url: SecretUrl) -> ComfyUI:
        real = super()._client(url) if self.make_client is None else self.make_client(url)
        self._stack.push_async_callback(real.close)  # a dead program closes nothing
        client: ComfyUI = self._held(real, "comfyui.")
        return client

    def _heart(self, store: SqlJobs, owner: Owner, settings: QueueSettings) -> Pulse | None:
        return None  # beats in the loop, whose time is the story's


class Served:
    """One running service: what it said, and its fate."""

    def __init__(self, app: _ServedApp, processes: EmulatedProcesses) -> None:
        self.app = app
        self._processes = processes
        self.stop, self.leave = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[bool] | None = None

    @property
    def said(self) -> list[str]:
        """Every sentence for the user, in order."""
        return self.app.said

    def begin(self, options: ServeOptions) -> asyncio.Task[bool]:
        """Serve, in a task of its own."""
        self.task = asyncio.create_task(self.app.serve(options, self.stop, self.leave), name="serve")
        return self.task

    async def end(self) -> None:
        """Stop in good order, as by one SIGTERM, and wait for the end."""
        self.stop.set()
        task, self.task = self.task, None
        if task is not None:
            await task

    async def kill(self) -> None:
        """Die as by `kill -9`: whatever runs in its name has no effect any more."""
        self._processes.dead |= self.app.own.ids
        self.app.killed.set()
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()

    def sleep(self) -> None:
        """Be as a process that was sent SIGSTOP, or whose computer sleeps."""
        self.app.awake.clear()

    def wake(self) -> None:
        """Go on where it stood."""
        self.app.awake.set()


class Services:
    """Starts services that share an account, books and a queue. `async with Services(...) as services:`"""

    def __init__(
        self,
        cloud: RunComfyEmulator,
        account: CloudSettings,
        clock: Clock,
        folder: Path,
        *,
        in_memory: Callable[[], Awaitable[None]] | None = None,
        **queue: Any,
    ) -> None:
        """`queue` is laid over the queue's settings.

        `in_memory`: all services share databases without files; it is awaited before each of their calls.
        """
        self.cloud, self.clock, self.folder = cloud, clock, folder
        self.settings = settings_for(account, folder / "state")
        self.queue_settings = replace(
            QueueSettings(
                root=str(folder),
                jobs_processing=str(folder / "jobs" / "processing"),
                jobs_finished=str(folder / "jobs" / "finished"),
                database=self._database(folder),
                where="pool",
                # Each look into the file is real work, in a story of hours too much.
                wake_interval=timedelta(seconds=2),
                poll_interval=timedelta(seconds=15),
                job_timeout=timedelta(hours=1),
            ),
            **queue,
        )
        self.processes = EmulatedProcesses()
        self._stack = AsyncExitStack()
        self._memory = Memory(clock, in_memory) if in_memory is not None else None
        self.observers: list[Callable[[_ServedApp, str], None]] = []
        """Told of the calls of any program here, before and after: `before provider.launch_machine`; not of those of
        stores in memory."""
        self._onlooker = self.app(self.settings)
        self._running: list[Served] = []
        self.make_client: MakeClient | None = None
        """What services begun from now on reach ComfyUI servers with; None: over HTTP."""

    def app(self, settings: Settings) -> _ServedApp:
        """Return a program of its own on the same account, books and queue."""
        app = _ServedApp(settings, self.queue_settings, self.processes, self.clock)
        app.memory, app.observers = self._memory, self.observers
        return app

    @staticmethod
    def _database(folder: Path) -> Any:
        from runcomfy.domain.secret import Secret

        return Secret(str(folder / "queue.sqlite3"))

    async def __aenter__(self) -> Services:
        await self._stack.enter_async_context(self._onlooker)
        self.queue: JobQueue = await self._onlooker.job_queue()
        self.books: SqlStore = await self._onlooker.books()  # type: ignore[assignment]
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for served in self._running:
                served.wake()
                with suppress(Killed, asyncio.CancelledError):
                    await served.end()
        finally:
            await self._stack.aclose()
            if self._memory is not None:
                await self._memory.end()

    def settings_of(self, *, budgets: Any = (), cloud: dict[str, Any] | None = None, **pool: Any) -> Settings:
        """Return the settings of one program; `pool` is laid over those of the pool."""
        return replace(
            self.settings,
            budgets=tuple(budgets),
            cloud=replace(self.settings.cloud, **(cloud or {})),
            pool=replace(self.settings.pool, **{**QUIET, **pool}),
        )

    @asynccontextmanager
    async def start(
        self,
        *,
        once: bool = False,
        budgets: Any = (),
        cloud: dict[str, Any] | None = None,
        works: bool = True,
        **pool: Any,
    ) -> AsyncIterator[Served]:
        """Run a service for the block; it is stopped in good order at its end. `pool` is laid over its settings."""
        served = Served(self.app(self.settings_of(budgets=budgets, cloud=cloud, **pool)), self.processes)
        served.app.make_client = self.make_client
        self._running.append(served)
        failure: BaseException | None = None
        try:
            async with served.app:
                if works:
                    served.begin(ServeOptions(once=once, guard=False))
                try:
                    yield served
                except BaseException as error:
                    failure = error
                    raise
                await served.end()
        except Killed:
            if failure is not None and not isinstance(failure, Killed):
                raise failure from None  # what went wrong in the block is not hidden by the death of the program
        finally:
            self.processes.dead |= served.app.own.ids  # its number is nobody's any more, also if it could not sign off
        self._running.remove(served)

    # -- jobs ----------------------------------------------------------------------------------------------

    async def put(self, number: int, *, seconds: float = 30.0, **given: Any) -> QueuedJob:
        """Put in a job for a picture of its own that takes so long, at a path of its own."""
        path = Path(self.queue_settings.jobs_finished) / f"{number}.png"
        return await self.queue.enqueue(JobRequest(drawing(seconds, number), out_file=str(path)), **given)

    async def when(self, condition: Callable[[], bool | Awaitable[bool]], what: str, *, within: float = 3_600) -> None:
        """Wait until the condition holds; fail with the words if it never does."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            if loop.time() >= until:
                raise AssertionError(f"did not happen within {within:.0f} s: {what}")
            await asyncio.sleep(LOOK_EVERY)

    async def all_ended(self, *, within: float = 12 * 3_600) -> None:
        """Wait until no job waits or runs."""

        async def ended() -> bool:
            counts = await self.queue.counts()
            return not counts[QueueStatus.PENDING] and not counts[QueueStatus.PROCESSING]

        await self.when(ended, "every job has ended", within=within)

    # -- oracles -------------------------------------------------------------------------------------------

    def ran(self) -> list[RunRecord]:
        """Return every execution on every machine there ever was, by the servers' own logs."""
        servers = [machine.comfyui or machine.comfyui_was for machine in self.cloud.machines.values()]
        return [record for server in servers if isinstance(server, ComfyUIEmulator) for record in server.run_log]

    async def complaints(self) -> list[str]:
        """Return everything in which jobs, files, servers and bills contradict what is promised (I9, I11, I15)."""
        found = []
        runs = Counter(record.prompt_id for record in self.ran())
        for job in await self.queue.list():
            if job.status is not QueueStatus.DONE:
                found.append(f"{job.config_name} is {job.status}: {job.error_trace or job.message}")
                continue
            outputs = job.result.get("outputs", ())
            if not outputs:
                found.append(f"{job.config_name} has no result")
            for output in outputs:
                data = await asyncio.to_thread(Path(output["path"]).read_bytes)
                if hashlib.sha256(data).hexdigest() != output["sha256"]:
                    found.append(f"{output['path']} is not what was recorded")
        found += [f"prompt {prompt} ran {count} times" for prompt, count in runs.items() if count > 1]
        return [*found, *await self.differences()]

    async def differences(self) -> list[str]:
        """Return where our ledger and the cloud's bill differ, to the second."""
        rows = {row.server_id: row for row in await self.machines()}
        found = []
        for server_id, bill in self.cloud.books.items():
            if bill.foreign:
                continue
            row = next((row for known, row in rows.items() if known == server_id), None)
            entries = await self.books.ledger(machine_id=row.id) if row is not None else ()
            ours = sum((seconds_between(e.started_at, e.ended_at) for e in entries), Decimal(0))
            if abs(ours - bill.seconds) > 1:
                found.append(f"{server_id}: our ledger has {ours} s, the cloud bills {bill.seconds} s")
        return found

    async def machines(self, *, open_only: bool = False) -> list[Machine]:
        """Return the account's machines by our books."""
        machines, _ = await self._onlooker.cloud()
        return list(await machines.books.rows(open_only=open_only))

    async def spent(self) -> Decimal:
        """Return the sum of the ledger in USD."""
        return total(await self.books.ledger())
