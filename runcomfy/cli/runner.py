"""
Running a command's coroutine with Ctrl+C done right.

Once: the command is asked to end in good order (interrupt the prompt, end what was rented). Twice: the process leaves
at once and says exactly what still bills and how to stop it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from runcomfy.cli.output import tell


class Interrupts:
    """What the user pressed. The first Ctrl+C (or SIGTERM) ends the command in good order, the second leaves."""

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self._task = task
        self.event = asyncio.Event()
        self.listens = False
        """Whether the command waits for `event` itself; if not, its task is cancelled."""
        self.last_words: Callable[[], list[str]] = list
        """Returns what is to be said when the process must leave at once."""
        self._pressed = 0

    def again(self) -> None:
        """Let the next Ctrl+C count as the first one."""
        self._pressed = 0
        self.event.clear()

    def press(self) -> None:
        """Take one signal."""
        self._pressed += 1
        if self._pressed == 1:
            tell("interrupted: ending in good order (Ctrl+C again leaves at once)")
            self.event.set()
            if not self.listens and self._task is not None:
                self._task.cancel()
            return
        for line in self.last_words():
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
        os._exit(130)


def run_async(work: Callable[[Interrupts], Coroutine[Any, Any, int]]) -> int:
    """Run `work` and return its exit code."""

    async def main() -> int:
        interrupts = Interrupts(asyncio.current_task())
        loop = asyncio.get_running_loop()
        before: list[tuple[int, Any]] = []
        numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            try:
                loop.add_signal_handler(number, interrupts.press)
            except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
                with suppress(ValueError):
                    handler = signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupts.press))
                    before.append((number, handler))
        try:
            return await work(interrupts)
        except asyncio.CancelledError:
            if not interrupts.event.is_set():
                raise
            return 130
        finally:
            for changed, handler in before:
                signal.signal(changed, handler)

    return asyncio.run(main())
