"""An emulator with an event loop of its own, for tests and programs that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Generic, TypeVar

E = TypeVar("E")
T = TypeVar("T")


class InThread(Generic[E]):
    """A running emulator and the way to talk to it from outside its loop."""

    def __init__(self, emulator: E, loop: asyncio.AbstractEventLoop) -> None:
        self.emulator = emulator
        self._loop = loop

    def call(self, work: Callable[[E], T]) -> T:
        """Run a function in the emulator's loop and return its result."""

        async def run() -> T:
            return work(self.emulator)

        return self.wait(run())

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the emulator's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)


@contextmanager
def served(make: Callable[[], AbstractAsyncContextManager[E]]) -> Iterator[InThread[E]]:
    """Run the emulator that `make` returns for the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="emulator", daemon=True)
    thread.start()

    async def enter() -> tuple[AbstractAsyncContextManager[E], E]:
        manager = make()
        return manager, await manager.__aenter__()

    try:
        manager, emulator = asyncio.run_coroutine_threadsafe(enter(), loop).result(timeout=60)
        try:
            yield InThread(emulator, loop)
        finally:
            asyncio.run_coroutine_threadsafe(manager.__aexit__(None, None, None), loop).result(timeout=60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
