"""
The time on the database's server, told without asking it each time.

It is measured now and then against this computer's steady clock, which no setting of the wall clock moves. So the
clocks of all who share a database differ by no more than half the time a question takes, whatever their own ones say.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

MEASURED_EVERY: Final = timedelta(minutes=1)
"""Quartz drifts by less than 0.1 ms in that time; a server whose own clock was set is believed after it."""


_QUICK: Final = timedelta(seconds=1)
_TRIES: Final = 3

_COUNTS_SLEEP: Final[int | None] = getattr(
    time, {"linux": "CLOCK_BOOTTIME", "darwin": "CLOCK_MONOTONIC"}.get(sys.platform, ""), None
)
"""The clock that goes on while the computer sleeps; Windows' only steady clock does so anyway."""


def steady() -> float:
    """Return seconds that go on while this computer sleeps, where the system tells them."""
    return time.monotonic() if _COUNTS_SLEEP is None else time.clock_gettime(_COUNTS_SLEEP)


class ServerTime:
    """May be measured in one thread and asked in any."""

    def __init__(self, *, steady: Callable[[], float] = steady) -> None:
        self._steady = steady
        self._measured: tuple[datetime, float] | None = None
        self._asked_at: float | None = None

    @property
    def due(self) -> bool:
        """Whether it should be measured (again)."""
        return self._asked_at is None or self._steady() - self._asked_at > MEASURED_EVERY.total_seconds()

    def measure(self, ask: Callable[[], datetime]) -> None:
        """Ask the server; its answer counts for the middle of the time the question took.

        An answer that took long (a stalled line, a process that was stopped meanwhile) may be off by half of that: it
        is asked again, and if that is no better, what was known before is kept.
        """
        best: tuple[float, datetime, float] | None = None
        for _ in range(_TRIES):
            before = self._steady()
            answer = ask().astimezone(UTC)
            self._asked_at = self._steady()
            took = self._asked_at - before
            if best is None or took < best[0]:
                best = took, answer, before + took / 2
            if took <= _QUICK.total_seconds():
                break
        if best is not None and (self._measured is None or best[0] <= _QUICK.total_seconds()):
            self._measured = best[1:]

    def now(self) -> datetime | None:
        """Return the server's time in UTC; None before it was ever measured."""
        if self._measured is None:
            return None
        answer, at = self._measured
        return answer + timedelta(seconds=self._steady() - at)
