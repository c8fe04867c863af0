"""Finishes that wait for the database at the same time, written together: see `jobs_finish.py`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import datetime

from sqlalchemy import Connection

from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.jobs_finish import Finish, write
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.queued import QueuedJob

_Waiting = tuple[Finish, asyncio.Future[QueuedJob]]


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
        with self._lock:
            self._waiting.append((finish, future))
            called, self._called = self._called, True
        if not called:
            task = asyncio.create_task(self._write(), name="finishes")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

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
            write(connection, now, [finish for finish, _ in taken])

        try:
            await self._database.write(work, wakes=True)
        except BaseException as error:
            taken = taken or self._take()
            if type(error) in (LocalError, TypeError) and len(taken) > 1:
                # One of them cannot be written; the others can.
                await asyncio.gather(*(self._write_alone(one) for one in taken))
                return
            for _, future in taken:
                if not future.done():
                    future.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for finish, future in taken:
            _tell(finish, future)

    async def _write_alone(self, one: _Waiting) -> None:
        finish, future = one
        now = self._now()
        try:
            await self._database.write(lambda connection: write(connection, now, [finish]), wakes=True)
        except Exception as error:  # noqa: BLE001 - who waits gets it
            if not future.done():
                future.set_exception(error)
        else:
            _tell(finish, future)


def _tell(finish: Finish, future: asyncio.Future[QueuedJob]) -> None:
    if future.done():  # who asked was cancelled meanwhile
        return
    if finish.error is not None:
        future.set_exception(finish.error)
    else:
        future.set_result(finish.outcome())
