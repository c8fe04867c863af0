"""
Telling those who wait that the database changed.

A file says nothing by itself: while somebody waits, it is asked every few milliseconds whether another process wrote
(`Polling`). Asking takes a turn of the database's thread, so a file that nobody has written to, by its own time, is
asked more rarely. A server calls (`Listener`, made by its kind); until it does, or where it cannot (a pooler in
between), those who wait look again every `UNHEARD`. Writes of this process ring the bell themselves.

Marks count the rings, so that a change between two waits is not missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final, Protocol

UNHEARD: Final = timedelta(seconds=0.5)
"""How long nobody may be waiting for a server that does not call."""

EAGER: Final = timedelta(seconds=2)
"""So long after a wait began, or a change was found, a file is looked at at the given interval; then a little more
rarely. A wait that follows upon another one goes on with it."""

LATER: Final = 5 / 3
"""How much more rarely: 5 ms instead of 3 saves a third of the work, and the slowest pickup stays below 10 ms."""

DOUBT: Final = 0.1
"""A file that was written long ago is asked whenever this share of that time has passed: between the writing and the
commit lies a flush of the disk, which takes as long as it takes."""

DOUBT_MOST: Final = 0.5
"""Seconds until a file is asked in any case."""


class Listener(Protocol):
    """Somebody who hears of changes by himself, in a thread of his own."""

    @property
    def hears(self) -> bool:
        """Whether a change would be heard now."""
        ...

    def stop(self) -> None:
        """End the thread; blocks until it has ended. Harmless when repeated."""
        ...


class _Ring:
    """What those who wait now wait for."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.error: Exception | None = None


class Bell:
    """Rung in the event loop; wakes everybody who waits there."""

    def __init__(self) -> None:
        self.mark = 0
        """How often it was rung."""
        self._next = _Ring()

    def ring(self, error: Exception | None = None) -> None:
        """Wake everybody; with an error, have them raise it."""
        self.mark += 1
        ring, self._next = self._next, _Ring()
        ring.error = error
        ring.event.set()

    async def heard(self, *, timeout: timedelta) -> None:
        """Return when it was rung, or when the timeout is over. Raises the error it was rung with."""
        ring = self._next
        try:
            async with asyncio.timeout(max(0.0, timeout.total_seconds())):
                await ring.event.wait()
        except TimeoutError:
            return
        if ring.error is not None:
            raise ring.error


class Polling:
    """Asks for a number that changes with the database, as long as somebody waits."""

    def __init__(
        self,
        bell: Bell,
        ask: Callable[[], Awaitable[int]],
        written_ago: Callable[[], float | None],
        *,
        every: timedelta,
    ) -> None:
        """`written_ago`: see `DatabaseKind`."""
        self._bell = bell
        self._ask = ask
        self._written_ago = written_ago
        self._every = every.total_seconds()
        self._found: int | None = None
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._eager_until = float("-inf")
        self._ended_at = float("-inf")

    def found(self, number: int | None) -> None:
        """Say which number counts as seen; None: none, so that whatever is found next rings the bell."""
        self._found = number

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Ask as long as anybody is in this block."""
        self._waiting += 1
        if self._task is None:
            loop = asyncio.get_running_loop()
            if loop.time() - self._ended_at > EAGER.total_seconds():
                self._eager_until = loop.time() + EAGER.total_seconds()
            self._task = loop.create_task(self._run(), name="database changes")
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                task, self._task = self._task, None
                task.cancel()
                self._ended_at = asyncio.get_running_loop().time()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        asked_at = float("-inf")
        while True:
            ago = self._written_ago()
            if ago is None or loop.time() - asked_at >= min(ago * DOUBT, DOUBT_MOST):
                asked_at = loop.time()
                await self._look()
            await asyncio.sleep(self._every * (1 if loop.time() < self._eager_until else LATER))

    async def _look(self) -> None:
        try:
            number = await self._ask()
        except Exception as error:  # noqa: BLE001 - those who wait raise it
            self._bell.ring(error)
        else:
            if number != self._found:
                self._found = number
                self._eager_until = asyncio.get_running_loop().time() + EAGER.total_seconds()
                self._bell.ring()
