"""
Stamps of the wall clock on the loop's axis of time, which never jumps (I21).

A plan counts in seconds of the event loop. What it is made from carries stamps: when a job came, when a machine became
ready. Somebody who sets the clock, or a computer that slept, moves later stamps against earlier ones; here it is
remembered when that happened, so that each stamp is read by the clock that it was made with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Final

JUMP: Final = 5.0
"""Seconds by which the two clocks may drift apart before somebody has set one of them."""
_MOST_JUMPS: Final = 64


class Axis:
    """Translates stamps of one wall clock. Make it inside the running loop."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        """`now` is the clock that the stamps come from."""
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._eras: list[tuple[float, float]] = []
        """Since when (loop), and what is added to the loop's time to get the wall's."""
        self.look()

    def look(self) -> bool:
        """Compare the clocks; return whether one of them jumped since the last look."""
        at = self._loop.time()
        offset = self._now().timestamp() - at
        if not self._eras:
            self._eras.append((float("-inf"), offset))
            return False
        if abs(offset - self._eras[-1][1]) <= JUMP:
            return False
        self._eras = [*self._eras[-_MOST_JUMPS:], (at, offset)]
        return True

    def of(self, stamp: datetime) -> float:
        """Return when, by the loop's clock, the stamp was made: never later than now."""
        self.look()
        now, wall = self._loop.time(), stamp.timestamp()
        for since, offset in reversed(self._eras):
            at = wall - offset
            if since - JUMP <= at <= now + JUMP:
                return min(at, now)
        return min(wall - self._eras[0][1], now)

    def ahead(self, stamp: datetime) -> float:
        """Return when, by the loop's clock, a stamp that may lie in the future will be reached."""
        self.look()
        now = self._loop.time()
        at = stamp.timestamp() - self._eras[-1][1]
        return at if at > now else self.of(stamp)
