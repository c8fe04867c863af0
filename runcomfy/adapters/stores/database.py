"""
One database, one thread, one connection: where every statement of a store runs.

The event loop never waits for a disk or a server, and a writer never meets itself. Writes that wait for the thread at
the same time share one transaction (group commit): what costs is the flush to the disk, and one is enough for all of
them. Each has a savepoint of its own, so one that fails takes nothing else with it. A call that is cancelled may or
may not have been written; ask the store.

What kind of database it is (a file, a server) is the business of a `DatabaseKind`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from sqlite3 import Error as SqliteError
from typing import Any, Final, Generic, NoReturn, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from runcomfy.adapters.stores import migrate
from runcomfy.adapters.stores.errors import is_callers_fault
from runcomfy.domain.exceptions import RunComfyError, StoreUnavailable
from runcomfy.ports.clock import Clock

T = TypeVar("T")
Work = Callable[[Connection], T]

WRITES: Final = "runcomfy_writes"
"""Execution option of connections whose transactions take the write lock at once."""

DATABASE_ERRORS: Final = (SQLAlchemyError, SqliteError, OSError, UnicodeDecodeError)

MOST_IN_ONE_COMMIT: Final = 256
"""Writes that share a transaction at most: the last of them waits for all."""


class DatabaseKind(Protocol):
    """What differs between a file and a server. Every method blocks and belongs into the database's thread."""

    @property
    def where(self) -> str:
        """What the database is called in messages; without secrets."""
        ...

    @property
    def changes_seen_by_polling(self) -> timedelta | None:
        """How often a waiting reader looks for changes of other processes; None: it is told (`waker`)."""
        ...

    def opening(self) -> AbstractContextManager[None]:
        """Be the only one, of all processes, who makes or upgrades the database."""
        ...

    def engine(self) -> Engine:
        """Return an engine with one connection, in which transactions begin as WRITES says."""
        ...

    def check(self, connection: Connection) -> None:
        """Raise StoreCorrupt if the database contradicts itself."""
        ...

    def error(self, error: Exception) -> RunComfyError:
        """Return the error of ours that says what `error` means."""
        ...


class _Item(Generic[T]):
    """A write that waits for the thread, and what became of it."""

    __slots__ = ("done", "error", "result", "work")

    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self.done = False
        self.result: T | None = None
        self.error: Exception | None = None


class Database:
    """Reads and writes of one process. `async with Database(...)`, or `open` and `close`."""

    def __init__(self, kind: DatabaseKind, *, clock: Clock) -> None:
        """Nothing is touched before `open`."""
        self.kind = kind
        self.clock = clock
        self._thread: ThreadPoolExecutor | None = None
        self._engine: Engine | None = None
        self._writing: Engine | None = None
        self._waiting: deque[_Item[Any]] = deque()

    @property
    def where(self) -> str:
        """What the database is called in messages."""
        return self.kind.where

    async def open(self) -> None:
        """Open or make the database and bring it to the current version; harmless when repeated."""
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
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._dispose)
        finally:
            thread.shutdown(wait=False)

    def _open(self, at: datetime) -> None:
        if self._engine is not None:
            return
        try:
            with self.kind.opening():
                engine = self.kind.engine()
                try:
                    self._bring_up(engine, at)
                except BaseException:
                    engine.dispose()
                    raise
        except DATABASE_ERRORS as error:
            self._fail(error)
        self._writing = engine.execution_options(**{WRITES: True})
        self._engine = engine

    def _bring_up(self, engine: Engine, at: datetime) -> None:
        with engine.connect() as connection:
            self.kind.check(connection)
            found = migrate.revision_of(connection, self.where)
        if found != migrate.HEAD:
            with engine.execution_options(**{WRITES: True}).begin() as connection:
                migrate.upgrade(connection, self.where, at=at)

    def _dispose(self) -> None:
        engine, self._engine, self._writing = self._engine, None, None
        if engine is not None:
            engine.dispose()

    # -- work ----------------------------------------------------------------------------------------------

    async def read(self, work: Work[T]) -> T:
        """Run `work` in a transaction of its own that writes nothing."""
        return await self.in_thread(lambda: self._read(work))

    async def write(self, work: Work[T]) -> T:
        """Run `work`; when this returns, what it wrote is committed. It may share its transaction with others.

        `work` must not touch anything but its connection before it is sure to succeed: on an error it is rolled back.
        """
        item = _Item(work)
        self._waiting.append(item)
        await self.in_thread(self._drain)
        if item.error is not None:
            raise item.error
        return item.result  # type: ignore[return-value]  # set, unless there was an error

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` in the database's thread."""
        if self._thread is None:
            raise not_open()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _read(self, work: Work[T]) -> T:
        if self._engine is None:
            raise not_open()
        try:
            with self._engine.begin() as connection:
                return work(connection)
        except DATABASE_ERRORS as error:
            self._fail(error)

    def _drain(self) -> None:
        """Do every write that waits; the callers after the first find theirs done."""
        items: list[_Item[Any]] = []
        while self._waiting and len(items) < MOST_IN_ONE_COMMIT:
            items.append(self._waiting.popleft())
        if not items:
            return
        try:
            if self._writing is None:
                raise not_open()
            with self._writing.begin() as connection:
                if len(items) == 1:
                    items[0].result = items[0].work(connection)
                else:
                    for item in items:
                        self._in_savepoint(connection, item)
        except Exception as error:  # noqa: BLE001 - every caller gets it
            # The transaction is gone, with what the others wrote in it.
            for item in items:
                item.result, item.error = None, item.error or self._meaning(error)
        if self._waiting:
            self._drain()

    def _in_savepoint(self, connection: Connection, item: _Item[Any]) -> None:
        connection.exec_driver_sql("SAVEPOINT one")
        try:
            item.result = item.work(connection)
        except Exception as error:  # noqa: BLE001 - its caller gets it
            item.error = self._meaning(error)
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT one")
        connection.exec_driver_sql("RELEASE SAVEPOINT one")

    def _fail(self, error: Exception) -> NoReturn:
        meaning = self._meaning(error)
        if meaning is error:
            raise meaning
        raise meaning from error

    def _meaning(self, error: Exception) -> Exception:
        if is_callers_fault(error):
            return TypeError(f"a value that cannot be stored: {error.args[0]}")
        if isinstance(error, DATABASE_ERRORS):
            meaning = self.kind.error(error)
            meaning.__cause__ = error
            return meaning
        return error


def not_open() -> StoreUnavailable:
    """Return the error of a store that was not opened."""
    return StoreUnavailable("the store is not open", hint="call open() first, or use `async with`")
