"""
One database, one thread, one connection: where every statement of a store runs.

The event loop never waits for a disk or a server, and a writer never meets itself. Writes that wait for the thread at
the same time share one transaction (group commit): what costs is the flush to the disk, and one is enough for all of
them. Each has a savepoint of its own, so one that fails takes nothing else with it. A call that is cancelled may or
may not have been written; ask the store.

What kind of database it is (a file, a server) is the business of a `DatabaseKind`; how those who wait for changes are
woken is told in `waking.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Final, Generic, NoReturn, Protocol, Self, TypeVar

from sqlalchemy import Connection, Engine

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores import migrate
from runcomfy.adapters.stores.errors import is_callers_fault
from runcomfy.adapters.stores.server_time import ServerTime
from runcomfy.adapters.stores.waking import UNHEARD, Bell, Listener, Polling
from runcomfy.domain.exceptions import RunComfyError, StoreUnavailable
from runcomfy.ports.clock import Clock

T = TypeVar("T")
Work = Callable[[Connection], T]

WRITES: Final = "runcomfy_writes"
"""Execution option of connections whose transactions take the write lock at once."""

MOST_IN_ONE_COMMIT: Final = 256
"""Writes that share a transaction at most: the last of them waits for all."""

TRIES: Final = 4
"""How often a write is tried that the server gave up for another process's sake (a deadlock)."""


class DatabaseKind(Protocol):
    """What differs between a file and a server. Every method blocks and belongs into the thread that uses it."""

    @property
    def where(self) -> str:
        """What the database is called in messages; without secrets."""
        ...

    @property
    def changes_seen_by_polling(self) -> timedelta | None:
        """How often a waiting reader looks for changes of other processes; None: it is told (`listen`)."""
        ...

    def written_ago(self) -> float | None:
        """Return for how many seconds nobody has written, as far as that can be told at once; None: it cannot.

        Called in the event loop. What is being written may not be told yet.
        """
        ...

    @property
    def shareable(self) -> bool:
        """Whether a second connection reaches the same data."""
        ...

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the database raises, by SQLAlchemy and by the driver itself; `error` says what it means."""
        ...

    def opening(self) -> AbstractContextManager[None]:
        """Be the only one, of all processes, who makes the place the tables lie in."""
        ...

    def upgrading(self, connection: Connection) -> None:
        """Be the only one, of all processes, who upgrades, until the transaction of `connection` ends."""
        ...

    def engine(self) -> Engine:
        """Return an engine with one connection, in which transactions begin as WRITES says."""
        ...

    def reading(self, engine: Engine) -> Engine:
        """Return the engine by which is read; on a server each statement may stand for itself."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Be the only one of this process who writes, where the database lets one write at a time anyhow."""
        ...

    def check(self, connection: Connection) -> None:
        """Raise StoreCorrupt if the database contradicts itself, StoreUnavailable if it cannot be used."""
        ...

    def error(self, error: Exception) -> RunComfyError:
        """Return the error of ours that says what `error` means."""
        ...

    def try_again(self, error: Exception) -> bool:
        """Whether the same work may succeed at once, because only a collision with others ended it."""
        ...

    def time(self, connection: Connection) -> datetime | None:
        """Return the time of the server's clock; None: there is no clock but this computer's."""
        ...

    def version(self, connection: Connection) -> Callable[[], int]:
        """Return what tells a number that changes when others commit (only asked if changes are seen by polling).

        It goes by the driver, in the same thread, as long as the connection lives: called hundreds of times a second.
        """
        ...

    def changes(self, connection: Connection) -> int | None:
        """Return how many rows this connection ever changed; None: who waits hears of changes from the server."""
        ...

    def listen(self, changed: Callable[[], None]) -> Listener:
        """Begin to call `changed`, from another thread, when others change something (only without polling)."""
        ...


class _Item(Generic[T]):
    """A write that waits for the thread, and what became of it."""

    __slots__ = ("error", "result", "tries", "wakes", "work")

    def __init__(self, work: Work[T], *, wakes: bool | None) -> None:
        self.work = work
        self.wakes = wakes
        self.tries = 0
        self.result: T | None = None
        self.error: Exception | None = None


class _Link:
    """The connection, as it is used for reading and for writing."""

    def __init__(self, kind: DatabaseKind) -> None:
        self._kind = kind
        self._engine = kind.engine()
        self.reading = kind.reading(self._engine)
        self.writing = self._engine.execution_options(**{WRITES: True})
        self.version: Callable[[], int] | None = None

    def run(self, work: Work[T], *, writes: bool) -> T:
        for _ in range(TRIES - 1):
            try:
                return self._once(work, writes=writes)
            except self._kind.errors as error:
                if not self._kind.try_again(error):
                    raise
        return self._once(work, writes=writes)

    def _once(self, work: Work[T], *, writes: bool) -> T:
        if not writes:
            with self.reading.begin() as connection:
                return work(connection)
        with self._kind.writing(), self.writing.begin() as connection:
            return work(connection)

    def dispose(self) -> None:
        self._engine.dispose()


class SyncDatabase:
    """Blocking reads and writes for one thread of the caller's own, which nothing else in the process delays.

    Made by `Database.sibling`. Use and close it in one thread, never in the event loop's. Over a database that has no
    second connection (SQLite in memory) the calls wait their turn in the database's thread.
    """

    def __init__(self, kind: DatabaseKind, *, shared: Callable[[bool, Work[Any]], Any] | None = None) -> None:
        self._kind = kind
        self._shared = shared
        self._link: _Link | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, work: Work[T]) -> T:
        """Run `work`, which writes nothing."""
        return self._run(work, writes=False)

    def write(self, work: Work[T]) -> T:
        """Run `work` in a transaction of its own, which is committed when this returns."""
        return self._run(work, writes=True)

    def close(self) -> None:
        """Let go of the connection; the next call makes a new one. Harmless when repeated."""
        link, self._link = self._link, None
        if link is not None:
            link.dispose()

    def _run(self, work: Work[T], *, writes: bool) -> T:
        if self._shared is not None:
            result: T = self._shared(writes, work)
            return result
        try:
            if self._link is None:
                self._link = _Link(self._kind)
            return self._link.run(work, writes=writes)
        except self._kind.errors as error:
            _fail(self._kind, error)


class Database:
    """Reads and writes of one process. `async with Database(...)`, or `open` and `close`."""

    def __init__(self, kind: DatabaseKind, *, clock: Clock, server_time: bool | None = None) -> None:
        """Nothing is touched before `open`.

        `server_time`: whether `now` is the clock of the database's server, where it has one, instead of `clock`.
        None: it is if `clock` is this computer's own (`SystemClock`); any other clock is a story's, and counts.
        """
        self.kind = kind
        self.clock = clock
        by_server = isinstance(clock, SystemClock) if server_time is None else server_time
        self._server_time = ServerTime() if by_server else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._link: _Link | None = None
        self._waiting: deque[_Item[Any]] = deque()
        self._bell = Bell()
        self._listener: Listener | None = None
        every = kind.changes_seen_by_polling
        self._polling = None if every is None else Polling(self._bell, self._version, kind.written_ago, every=every)

    @property
    def where(self) -> str:
        """What the database is called in messages."""
        return self.kind.where

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Open or make the database and bring it to the current version; harmless when repeated."""
        self._loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        try:
            at = self.clock.now()  # a clock may need the event loop, so it is not asked from the thread
            await self.in_thread(lambda: self._open(at))
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish what was begun and let go of the database. Harmless when repeated."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._bell.ring()
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._dispose)
        finally:
            thread.shutdown(wait=False)

    def _open(self, at: datetime) -> None:
        if self._link is not None:
            return
        try:
            with self.kind.opening():
                link = _Link(self.kind)
                try:
                    self._bring_up(link, at)
                except BaseException:
                    link.dispose()
                    raise
        except self.kind.errors as error:
            _fail(self.kind, error)
        self._link = link

    def _bring_up(self, link: _Link, at: datetime) -> None:
        with link.reading.connect() as connection:
            self.kind.check(connection)
            found = migrate.revision_of(connection, self.where)
            self._measure(connection)
            if self._polling is not None:
                link.version = self.kind.version(connection)
                self._polling.found(link.version())
        if found != migrate.HEAD:
            if self._server_time is not None:
                at = self._server_time.now() or at
            with link.writing.begin() as connection:
                self.kind.upgrading(connection)
                migrate.upgrade(connection, self.where, at=at)

    def _dispose(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.stop()
        link, self._link = self._link, None
        if link is not None:
            link.dispose()

    # -- time ----------------------------------------------------------------------------------------------

    def now(self) -> datetime:
        """Return the time that everybody who uses this database goes by; never blocks, may be called in any thread.

        A server's clock is measured at `open` and about once a minute by whatever is read or written then.
        """
        if self._server_time is not None and (now := self._server_time.now()) is not None:
            return now
        return self.clock.now()

    def _measure(self, connection: Connection) -> None:
        if self._server_time is None or not self._server_time.due:
            return
        if (first := self.kind.time(connection)) is None:
            self._server_time = None
            return
        # The first question of a connection takes longer than those that follow.
        self._server_time.measure(lambda: self.kind.time(connection) or first)

    # -- waiting -------------------------------------------------------------------------------------------

    @property
    def wakes_at_once(self) -> bool:
        """Whether changes by others end a wait within milliseconds; else it ends after `waking.UNHEARD`.

        A server must first have been waited for and have shown that it calls.
        """
        return self._polling is not None or (self._listener is not None and self._listener.hears)

    async def changed(self, *, timeout: timedelta, seen: int = 0) -> int:
        """Return soon after the database changed, at the latest after `timeout`; the mark returned is the next `seen`.

        Changes made by this process count from their commit, others when they are heard of. May return without a
        change. Raises StoreUnavailable if the database cannot be asked.
        """
        if self._thread is None:
            raise not_open()
        if self._bell.mark == seen:
            async with self._hearing() as longest:
                await self._bell.heard(timeout=timeout if longest is None else min(timeout, longest))
        return self._bell.mark

    @asynccontextmanager
    async def _hearing(self) -> AsyncIterator[timedelta | None]:
        """Have the bell rung by what others change; gives how long nobody should rely on that."""
        if self._polling is not None:
            async with self._polling.going_on():
                yield None
            return
        if self._listener is None:
            try:
                self._listener = self.kind.listen(self._ring)
            except self.kind.errors as error:  # no more open files, or threads
                _fail(self.kind, error)
        yield None if self._listener.hears else UNHEARD

    def _ring(self) -> None:
        """Wake those who wait; from any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                self._loop.call_soon_threadsafe(self._bell.ring)

    async def _version(self) -> int:
        return await self.in_thread(self._ask_version)

    def _ask_version(self) -> int:
        link = self._link
        if link is None:
            raise not_open()
        try:
            if link.version is None:
                with link.reading.connect() as connection:
                    link.version = self.kind.version(connection)
            return link.version()
        except self.kind.errors as error:
            link.version = None  # it went by a connection that may be no more, and each counts for itself
            if self._polling is not None:
                self._polling.found(None)
            _fail(self.kind, error)

    # -- work ----------------------------------------------------------------------------------------------

    async def read(self, work: Work[T]) -> T:
        """Run `work`, which writes nothing.

        On a server each of its statements may see the database as it is at that moment; what must fit together is
        asked in one statement, or with `write`.
        """
        return await self.in_thread(lambda: self._run(work, writes=False))

    async def write(self, work: Work[T], *, wakes: bool | None = None) -> T:
        """Run `work`; when this returns, what it wrote is committed. It may share its transaction with others.

        `work` must not touch anything but its connection before it is sure to succeed: on an error it is rolled back,
        and after a collision with another process (deadlock) it is run again.
        `wakes`: whether those who wait in `changed` are woken by it. None: by a file if rows changed, by a server if
        it sends word of it.
        """
        item = _Item(work, wakes=wakes)
        self._waiting.append(item)
        await self.in_thread(self._drain)
        if item.error is not None:
            raise item.error
        return item.result  # type: ignore[return-value]  # set, unless there was an error

    async def write_alone(self, work: Work[T], *, wakes: bool | None = None) -> T:
        """Run `work` as `write` does, in a transaction that it shares with nobody.

        For work that does something outside the database as its last step: what others write cannot undo it.
        """
        item = _Item(work, wakes=wakes)

        def commit() -> None:
            items: list[_Item[Any]] = [item]
            while items:
                items = self._commit(items)

        await self.in_thread(commit)
        if item.error is not None:
            raise item.error
        return item.result  # type: ignore[return-value]  # set, unless there was an error

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the database's thread."""
        if self._thread is None:
            raise not_open()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def sibling(self) -> SyncDatabase:
        """Return the same database for one other thread, with a connection of its own where there can be one."""
        if self.kind.shareable:
            return SyncDatabase(self.kind)
        return SyncDatabase(self.kind, shared=self._from_other_thread)

    def _from_other_thread(self, writes: bool, work: Work[T]) -> T:
        thread = self._thread
        if thread is None:
            raise not_open()
        return thread.submit(self._run, work, writes=writes).result()

    def _run(self, work: Work[T], *, writes: bool) -> T:
        try:
            return self._linked().run(work, writes=writes)
        except self.kind.errors as error:
            _fail(self.kind, error)

    def _linked(self) -> _Link:
        """Return the connection; also has the server's clock measured when it is time."""
        if self._link is None:
            raise not_open()
        if self._server_time is not None and self._server_time.due:
            with self._link.reading.connect() as connection:
                self._measure(connection)
        return self._link

    def _drain(self) -> None:
        """Do every write that waits; the callers after the first find theirs done."""
        while self._waiting:
            items: list[_Item[Any]] = []
            while self._waiting and len(items) < MOST_IN_ONE_COMMIT:
                items.append(self._waiting.popleft())
            while items:
                items = self._commit(items)

    def _commit(self, items: list[_Item[Any]]) -> list[_Item[Any]]:
        """Do these writes in one transaction; return those that are to be tried again."""
        again: list[_Item[Any]] = []
        wakes = False
        try:
            link = self._linked()
            with self.kind.writing(), link.writing.begin() as connection:
                for number, item in enumerate(items):
                    item.tries += 1
                    before = self.kind.changes(connection) if item.wakes is None else None
                    if len(items) == 1:
                        item.result = item.work(connection)
                    else:
                        _in_savepoint(connection, item, first=number == 0)
                    if item.error is None:
                        wakes |= bool(item.wakes) or (before is not None and self.kind.changes(connection) != before)
        except Exception as error:  # noqa: BLE001 - every caller gets it
            # The transaction is gone, with what the others wrote in it.
            for item in items:
                item.result, item.error = None, item.error or error
            wakes = False
        for item in items:
            if item.error is None:
                continue
            if item.tries < TRIES and self.kind.try_again(item.error):
                item.error = None
                again.append(item)
            else:
                item.error = meaning_of(self.kind, item.error)
        if wakes:
            self._ring()
        return again


def _in_savepoint(connection: Connection, item: _Item[Any], *, first: bool) -> None:
    """Do one of several; the next one ends its savepoint, the last one's ends with the transaction."""
    if first or connection.dialect.name != "postgresql":
        if not first:
            connection.exec_driver_sql("RELEASE SAVEPOINT one")
        connection.exec_driver_sql("SAVEPOINT one")
    else:
        connection.exec_driver_sql("RELEASE SAVEPOINT one; SAVEPOINT one")  # one way there and back, not two
    try:
        item.result = item.work(connection)
    except Exception as error:  # noqa: BLE001 - its caller gets it
        item.error = error
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT one")


def _fail(kind: DatabaseKind, error: Exception) -> NoReturn:
    meaning = meaning_of(kind, error)
    if meaning is error:
        raise meaning
    raise meaning from error


def meaning_of(kind: DatabaseKind, error: Exception) -> Exception:
    """Return the error of ours that says what `error` means; one of ours means itself."""
    if is_callers_fault(error):
        return TypeError(f"a value that cannot be stored: {error.args[0]}")
    if isinstance(error, kind.errors):
        meaning = kind.error(error)
        meaning.__cause__ = error
        return meaning
    return error


def not_open() -> StoreUnavailable:
    """Return the error of a store that was not opened."""
    return StoreUnavailable("the store is not open", hint="call open() first, or use `async with`")
