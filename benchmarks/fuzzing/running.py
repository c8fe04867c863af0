"""Runs a coroutine to its end on a loop of virtual time; leftovers of one input never reach the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

from benchmarks.fuzzing.target import Broken, demand
from runcomfy.testing.simulation.loop import MemoryLoop, NothingWillHappen

T = TypeVar("T")

MOST_TURNS: Final = 50_000
LINGERING_SECONDS: Final = 60.0
MOST_SECONDS: Final = 7 * 86_400.0
"""Of virtual time: whoever waits longer for one call waits for ever."""


class _Loop(MemoryLoop):
    limit = 0

    def _run_once(self) -> None:
        demand(self.steps < self.limit, f"more than {MOST_TURNS} turns of the event loop")
        super()._run_once()


_loop: _Loop | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run it and return what it returns; nothing of it may still be running afterwards."""
    global _loop, _noticed  # noqa: PLW0603 - a loop for each input would double the time
    if _loop is None:
        _loop = _Loop()
        _noticed = []
        _loop.set_exception_handler(_noted(_noticed))
    loop = _loop
    loop.limit = loop.steps + MOST_TURNS
    began = loop.time()
    try:
        result = loop.run_until_complete(work)
        demand(loop.time() - began < MOST_SECONDS, "more than a week of waiting")
        left = _left(loop)
        if left:  # what was begun together with what failed may end by itself, but not much later
            loop.run_until_complete(asyncio.wait(left, timeout=LINGERING_SECONDS))
            left = _left(loop)
        demand(not left, f"left running: {[task.get_name() for task in left]}")
        demand(not _noticed, f"an error nobody took: {_noticed[:1]}")
        return result
    except NothingWillHappen:
        _forget()
        raise Broken("everything waits, and nothing will ever happen") from None
    except BaseException:
        _forget()
        raise


def _left(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks(loop) if not task.done()]


_noticed: list[str] = []


def _noted(told: list[str]) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    return lambda loop, context: told.append(f"{context.get('message')}: {context.get('exception')!r}")


def _forget() -> None:
    """Throw the loop away with everything that runs in it."""
    global _loop
    loop, _loop = _loop, None
    if loop is None:
        return
    loop.limit = loop.steps + MOST_TURNS
    with suppress(Exception):  # it is thrown away
        for _ in range(20):
            for task in _left(loop):
                task.cancel()
            loop.call_soon(lambda: None)
            loop._run_once()
    loop.close()


def close() -> None:
    """Close the loop, so that nobody is warned of it."""
    global _loop
    loop, _loop = _loop, None
    if loop is not None:
        loop.close()
