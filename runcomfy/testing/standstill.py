"""
Virtual time that stands still while a thread works for the loop.

looptime lets time pass as fast as the real one while a call of `run_in_executor` is under way, and does not know the
threads of anyio (files that Starlette sends) at all. So a computer that is busy makes a story longer, and time limits
in it run out that have nothing to do with what it tells. Here no time passes for as long as a thread can be expected to
need; a thread that waits for the story itself is then found out, and time goes on as it did. Nor does what the fixtures
take count: a story begins at zero.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from anyio._backends._asyncio import AsyncIOBackend

PATIENCE: Final = 5.0
"""Real seconds of one call in a thread in which no virtual time passes."""


class Standstill:
    """Holds the time of one loop whose time is virtual."""

    def __init__(self, loop: Any) -> None:
        """`loop` is an event loop that looptime has patched."""
        self._stood: dict[asyncio.Future[Any], float] = {}
        self._loop = loop
        selector = loop._selector
        self._really_select: Callable[[float | None], list[Any]] = functools.partial(type(selector).select, selector)
        self._select: Callable[[float | None], list[Any]] = selector.select
        self._run: Callable[..., asyncio.Future[Any]] = loop.run_in_executor
        selector.select = self._patient_select
        loop.run_in_executor = self._counted_run
        loop.standstill = self

    def wait_for(self, future: asyncio.Future[Any]) -> None:
        """Let no time pass until `future` is done, for `PATIENCE` at most."""
        self._stood[future] = 0.0
        future.add_done_callback(lambda done: self._stood.pop(done, None))

    def _counted_run(self, executor: Any, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = self._run(executor, work, *args)
        self.wait_for(future)
        return future

    def _patient_select(self, timeout: float | None) -> list[Any]:
        if not self._loop.looptime_on:
            return self._really_select(timeout)
        found = self._really_select(0)
        if found or timeout == 0:
            return found
        # Again when one of them is found to wait for the story: the others are still expected to end.
        while waited_for := [each for each, stood in self._stood.items() if stood < PATIENCE and not each.done()]:
            began = time.monotonic()
            found = self._really_select(PATIENCE - max(self._stood[future] for future in waited_for))
            for future in waited_for:
                self._stood[future] += time.monotonic() - began
            if found:
                return found
        return self._select_until_time_moves(timeout)

    def _select_until_time_moves(self, timeout: float | None) -> list[Any]:
        """Have looptime look as often as it is told to before time moves, without a turn of the loop for each look."""
        now = self._loop.time()
        found = self._select(timeout)
        while not found and timeout is not None and self._loop.time() == now:
            found = self._select(timeout)
        return found


def stand_still_for_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Hold the time of a loop if looptime has patched it, which need not be installed; harmless when repeated."""
    if hasattr(loop, "looptime_on") and not hasattr(loop, "standstill"):
        Standstill(loop)


def count_anyio_threads() -> None:
    """Let the threads of anyio count as those of `run_in_executor` do; once for the process."""
    run: Callable[..., Awaitable[Any]] = AsyncIOBackend.run_sync_in_worker_thread

    async def counted(*args: Any, **options: Any) -> Any:
        loop = asyncio.get_running_loop()
        standstill: Standstill | None = getattr(loop, "standstill", None)
        if standstill is None:
            return await run(*args, **options)
        under_way = loop.create_future()
        standstill.wait_for(under_way)
        try:
            return await run(*args, **options)
        finally:
            under_way.set_result(None)

    AsyncIOBackend.run_sync_in_worker_thread = staticmethod(counted)  # type: ignore[method-assign]
