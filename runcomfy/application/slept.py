"""
Whether the computer has slept, or somebody has set its clock.

The event loop's time stands still while a computer sleeps (on Linux) and never jumps; the wall clock does both. When
the two drift apart, waits that were measured by one of them mean something else by the other.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Final

from runcomfy.ports.clock import Clock

SLEPT: Final = 5.0
"""Seconds by which the clocks may drift apart before it counts: clocks are adjusted by less."""


class Drift:
    """Watches the wall clock against the loop's time."""

    def __init__(self, clock: Clock) -> None:
        """Begins at the clocks of now."""
        self._clock = clock
        self._anchor()

    def _anchor(self) -> None:
        self._wall, self._steady = self._clock.now(), asyncio.get_running_loop().time()

    def steady_now(self) -> datetime:
        """Return what time it would be if the wall clock had gone on evenly since the beginning, or the last anchor."""
        return self._wall + timedelta(seconds=asyncio.get_running_loop().time() - self._steady)

    def apart(self) -> float:
        """Return by how many seconds the wall clock is ahead of where it should be (below zero: behind)."""
        return (self._clock.now() - self.steady_now()).total_seconds()

    def jumped(self) -> float:
        """Return by how many seconds the clocks have moved apart since this was asked last; 0 if they have not."""
        apart = self.apart()
        if abs(apart) < SLEPT:
            return 0.0
        self._anchor()
        return apart
