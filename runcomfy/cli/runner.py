"""
Running a command's coroutine with Ctrl+C done right.

Once: the command is asked to end in good order (interrupt the prompt, end what was rented). Twice: the process leaves
at once and says exactly what still bills and how to stop it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from runcomfy.cli.output import tell

STARTING_SECONDS: Final = 1.0
"""After so long a command has imported what it needs, and garbage is collected as usual."""


class Interrupts:
    """What the user pressed. The first Ctrl+C (or SIGTERM, or a closed terminal) ends the command in good order.

    The second one leaves.
    """

    def __init__(self, task: asyncio.Task[Any] | None) -> None:
        self._task = task
        self.event = asyncio.Event()
        self.listens = False
        """Whether the command waits for `event` itself; if not, its task is cancelled."""
        self.last_words: Callable[[], list[str]] = list
        """Returns what is to be said when the process must leave at once."""
        self.good_end: Callable[[], list[str]] = list
        """Returns what is to be said when a cancelled command has ended in good order."""
        self.say: Callable[[str], None] = tell
        """How the first signal is answered; a command with a live display writes above it."""
        self.clear: Callable[[], None] = lambda: None
        """Gives the terminal back before the process leaves at once: a live display hides the cursor."""
        self.answer = "interrupted: ending in good order (Ctrl+C again leaves at once)"
        """What the first signal is answered with; empty where the command has a word of its own."""
        self._pressed = 0

    def again(self) -> None:
        """Let the next Ctrl+C count as the first one."""
        self._pressed = 0
        self.event.clear()

    def press(self) -> None:
        """Take one signal."""
        self._pressed += 1
        if self._pressed == 1:
            self.event.set()
            if not self.listens and self._task is not None:
                self._task.cancel()
            with suppress(OSError, ValueError):  # the terminal may be what went away
                if self.answer:
                    self.say(self.answer)
            return
        try:
            self.clear()
            for line in self.last_words():
                sys.stderr.write(line + "\n")
            sys.stderr.flush()
        finally:
            os._exit(130)


def _signals() -> list[int]:
    """Return what asks a process to end. A terminal that is closed (SIGHUP) must not leave a machine behind."""
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGBREAK"):  # one on Unix, the other on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it on purpose
            numbers.append(number)
    return numbers


def run_async(work: Callable[[Interrupts], Coroutine[Any, Any, int]], *, stays: bool = False) -> int:
    """Run `work` and return its exit code. What `stays` for days gets by with little memory."""
    tidy: Callable[[], Coroutine[Any, Any, None]] | None = None
    if stays:
        from runcomfy.adapters.allocator import keep_giving_back, share_arenas

        tidy = keep_giving_back if share_arenas() else None

    async def main() -> int:
        interrupts = Interrupts(asyncio.current_task())
        loop = asyncio.get_running_loop()
        loop.call_later(STARTING_SECONDS, gc.enable)
        tidying = asyncio.create_task(tidy()) if tidy is not None else None
        before: list[tuple[int, Any]] = []
        for number in _signals():
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
            for line in interrupts.good_end():
                tell(line)
            return 130
        finally:
            if tidying is not None:
                tidying.cancel()
            for changed, handler in before:
                signal.signal(changed, handler)

    return asyncio.run(main())
