"""
The heartbeat of a worker: its leases are renewed while its process lives, whatever its event loop is doing.

`Heart` beats in a thread of its own, over a connection of its own: a loop that is blocked for half a minute by a big
picture, or by somebody's plugin, loses no lease. `LoopHeart` beats in the loop, for tests under virtual time.

What a beat finds lost is only told; whether a job is really somebody else's is asked of the store, and decided by its
fence.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Final, Protocol

from runcomfy.domain.queued import RowId

log = logging.getLogger("runcomfy.heart")

Held = Mapping[RowId, int]
"""Job -> token of what the worker holds."""
OnBeat = Callable[[Held], None]

HURRY: Final = 0.2
"""After a beat that failed the next one comes after this share of the period."""
JOIN_WITHIN: Final = timedelta(seconds=10)
"""How long the end of a beat under way is waited for; a database that is locked answers by then."""


class Pulse(Protocol):
    """A heart, as its executor sees it."""

    def start(self, on_beat: OnBeat) -> None:
        """Beat from now on. `on_beat` is called in the running loop with what is held, after each good beat."""
        ...

    def hurry(self) -> None:
        """Beat at once: the computer may have slept."""
        ...

    @property
    def fresh(self) -> bool:
        """Whether the leases still hold for sure, judged by the last good beat."""
        ...

    async def stop(self) -> None:
        """Beat no more. Harmless when repeated."""
        ...


class Heart:
    """Keeps `Pulse` with a thread. `renew` renews every lease of the worker and blocks; it is called in that thread."""

    def __init__(
        self,
        renew: Callable[[], Held],
        *,
        every: timedelta,
        lease: timedelta,
        close: Callable[[], None] | None = None,
    ) -> None:
        """`close` lets go of what `renew` needs; called in the thread when it ends."""
        self._renew, self._close = renew, close
        self._every, self._lease = every.total_seconds(), lease.total_seconds()
        self._wake = threading.Event()
        self._over = False
        self._thread: threading.Thread | None = None
        self._good = time.monotonic()

    def start(self, on_beat: OnBeat) -> None:
        """Start the thread."""
        self._good, self._over = time.monotonic(), False
        self._wake.clear()
        arguments = (asyncio.get_running_loop(), on_beat)
        # A daemon: a process that is told to leave at once does not wait for a database that hangs.
        self._thread = threading.Thread(target=self._beat, args=arguments, name="heart", daemon=True)
        self._thread.start()

    def hurry(self) -> None:
        """Wake the thread."""
        self._wake.set()

    @property
    def fresh(self) -> bool:
        """Whether less than a lease has passed since the last good beat began."""
        return time.monotonic() - self._good < self._lease

    async def stop(self) -> None:
        """End the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._over = True
        self._wake.set()
        await asyncio.get_running_loop().run_in_executor(None, thread.join, JOIN_WITHIN.total_seconds())

    def _beat(self, loop: asyncio.AbstractEventLoop, on_beat: OnBeat) -> None:
        wait = self._every
        try:
            while True:
                self._wake.wait(wait)
                self._wake.clear()
                if self._over:
                    return
                wait = self._every if self._beat_once(loop, on_beat) else self._every * HURRY
        finally:
            if self._close is not None:
                self._close()

    def _beat_once(self, loop: asyncio.AbstractEventLoop, on_beat: OnBeat) -> bool:
        began = time.monotonic()
        try:
            held = self._renew()
        except Exception as error:  # noqa: BLE001 - whatever it was, the next beat is what helps
            _log_missed(error)
            return False
        self._good = began
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(on_beat, held)
        return True


class LoopHeart:
    """Keeps `Pulse` with a task of the loop, on the loop's time. It stands still when the loop does."""

    def __init__(self, renew: Callable[[], Awaitable[Held]], *, every: timedelta, lease: timedelta) -> None:
        """`renew` renews every lease of the worker."""
        self._renew = renew
        self._every, self._lease = every.total_seconds(), lease.total_seconds()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._good = float("-inf")

    def start(self, on_beat: OnBeat) -> None:
        """Start the task."""
        self._good = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._beat(on_beat), name="heart")

    def hurry(self) -> None:
        """Wake the task."""
        self._wake.set()

    @property
    def fresh(self) -> bool:
        """Whether less than a lease has passed since the last good beat began."""
        return asyncio.get_running_loop().time() - self._good < self._lease

    async def stop(self) -> None:
        """End the task."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _beat(self, on_beat: OnBeat) -> None:
        wait = self._every
        loop = asyncio.get_running_loop()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            self._wake.clear()
            began = loop.time()
            try:
                held = await self._renew()
            except Exception as error:  # noqa: BLE001 - whatever it was, the next beat is what helps
                _log_missed(error)
                wait = self._every * HURRY
                continue
            self._good, wait = began, self._every
            on_beat(held)


def _log_missed(error: Exception) -> None:
    log.warning("heartbeat_missed", extra={"fields": {"error": repr(error)}})
