"""
An event loop for long stories: what is computed takes its time, and idle time is skipped.

Its time is what the process has computed, plus what was skipped. So a loop that is held up misses what it would miss in
life, whatever else the computer does meanwhile; only when nothing is to be done before the next timer (nothing to read,
nothing under way in a thread) the time jumps there.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable
from typing import Any, Final

POLLS: Final = 8
"""Looks at the sockets before time is skipped: what was written to the loopback arrives at once, or nearly so."""
HOLD_MS: Final = 50.0
"""Holds of the loop longer than this are counted apart."""


class _Selector(selectors.DefaultSelector):
    """Skips time instead of waiting."""

    busy: Callable[[], bool]
    skip: Callable[[float], None]
    woke: Callable[[], None]
    sleeps: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.sleeps()
        ready = self._ready(timeout)
        self.woke()
        return ready

    def _ready(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if timeout is None or self.busy():
            return super().select(timeout)
        for _ in range(POLLS):
            if ready := super().select(0):
                return ready
        self.skip(timeout)
        return []


class SkippingLoop(asyncio.SelectorEventLoop):
    """See the module. `holds` says how long the loop was held by its callbacks, turn by turn."""

    def __init__(self) -> None:
        selector = _Selector()
        self.skipped = 0.0
        """Seconds that were not waited for."""
        self.not_counted = 0.0
        """Seconds of this turn that are to be left out of `holds`."""
        self.holds: list[float] = []
        """Milliseconds that the callbacks of one turn computed, and so held the loop; short ones are left out."""
        self.turns = 0
        self._under_way = 0
        self._woke_at = time.thread_time()
        self._now = time.process_time()
        selector.busy, selector.skip = lambda: self._under_way > 0, self._skip
        selector.sleeps, selector.woke = self._sleeps, self._wakes
        super().__init__(selector)

    def time(self) -> float:
        return self._now  # the same for a whole turn: asking the computer costs more than most callbacks

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = super().run_in_executor(executor, func, *args)
        self._under_way += 1
        future.add_done_callback(self._over)
        return future

    def _over(self, _: object) -> None:
        self._under_way -= 1

    def _skip(self, seconds: float) -> None:
        self.skipped += seconds

    def _sleeps(self) -> None:
        held = (time.thread_time() - self._woke_at - self.not_counted) * 1e3
        self.turns += 1
        if held > 1.0:
            self.holds.append(held)

    def _wakes(self) -> None:
        self._woke_at, self.not_counted = time.thread_time(), 0.0
        self._now = time.process_time() + self.skipped
