"""Finishes that wait for the database at the same time, written together: see `jobs_finish.py`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.jobs_finish import Finish, write
from runcomfy.domain.exceptions import LocalError, StoreUnavailable
from runcomfy.domain.queued import QueuedJob

PATIENCE: Final = timedelta(seconds=10)
"""How long it is tried to change a row that somebody has in an open transaction."""

FIRST_WAIT_SECONDS: Final = 0.005
"""Most often it is another process of ours, or the heart that renews; those are done in milliseconds."""
LONGEST_WAIT_SECONDS: Final = 0.5


class Waits:
    """The pauses between tries to get at a row that somebody else has."""

    def __init__(self) -> None:
        self._next = FIRST_WAIT_SECONDS
        self._until = asyncio.get_running_loop().time() + PATIENCE.total_seconds()

    async def sleep(self) -> None:
        """Wait a little, each time longer. Raises StoreUnavailable when it took too long."""
        if asyncio.get_running_loop().time() > self._until:
            raise StoreUnavailable(
                "the job's row is locked by another program",
                hint="somebody's transaction is open: end it with COMMIT or ROLLBACK; `comfyctl doctor` names it",
            )
        wait, self._next = self._next, min(2 * self._next, LONGEST_WAIT_SECONDS)
        await asyncio.sleep(wait)


_Waiting = tuple[Finish, asyncio.Future[QueuedJob], Waits]


class Together:
    """Takes finishes one by one and writes them many at a time. Whoever gives up waiting leaves the others alone."""

    def __init__(self, database: Database, now: Callable[[], datetime]) -> None:
        self._database, self._now = database, now
        self._waiting: list[_Waiting] = []
        self._called = False
        """Whether somebody is on the way to take what waits."""
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def finish(self, finish: Finish) -> QueuedJob:
        """End an attempt; return when that is committed. Raises LeaseLost."""
        future: asyncio.Future[QueuedJob] = asyncio.get_running_loop().create_future()
        self._put((finish, future, Waits()))
        return await future

    def _put(self, one: _Waiting) -> None:
        with self._lock:
            self._waiting.append(one)
            called, self._called = self._called, True
        if not called:
            self._begin(self._write())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="finishes")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait until everything that was asked for is written, or refused."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _take(self) -> list[_Waiting]:
        with self._lock:
            taken, self._waiting, self._called = self._waiting, [], False
            return taken

    async def _write(self) -> None:
        now = self._now()
        taken: list[_Waiting] = []

        def work(connection: Connection) -> None:
            # Taken as late as can be: what comes while the thread is busy joins in. After a collision with another
            # process the same are written again.
            if not taken:
                taken.extend(self._take())
            write(connection, now, [finish for finish, _, _ in taken])

        try:
            await self._database.write(work, wakes=True)
        except BaseException as error:
            taken = taken or self._take()
            if type(error) in (LocalError, TypeError) and len(taken) > 1:
                # One of them cannot be written; the others can.
                await asyncio.gather(*(self._write_alone(one) for one in taken))
                return
            for _, future, _ in taken:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for one in taken:
            self._tell(one)

    async def _write_alone(self, one: _Waiting) -> None:
        finish, future, _ = one
        now = self._now()
        try:
            await self._database.write(lambda connection: write(connection, now, [finish]), wakes=True)
        except Exception as error:  # noqa: BLE001 - who waits gets it
            if not future.done():
                future.set_exception(error)
        else:
            self._tell(one)

    async def _again(self, one: _Waiting) -> None:
        """Ask once more, a little later."""
        _, future, waits = one
        try:
            await waits.sleep()
        except StoreUnavailable as error:
            if not future.done():
                future.set_exception(error)
        else:
            self._put(one)

    def _tell(self, one: _Waiting) -> None:
        finish, future, _ = one
        if finish.locked:
            self._begin(self._again(one))
        elif future.done():  # who asked was cancelled meanwhile
            return
        elif finish.error is not None:
            future.set_exception(finish.error)
        else:
            future.set_result(finish.outcome())
