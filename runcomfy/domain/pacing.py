"""
How fast requests may follow each other: a token bucket without a clock.

Times are seconds of any clock that does not jump; callers pass them in. The bucket tells how long to wait and never
waits itself.
"""

from __future__ import annotations

from typing import Final

SLACK: Final = 2e-6
"""Seconds that are taken for nothing: times added up as floats do not meet a mark exactly, and a caller that slept
until just before it must not be told to sleep for less than its clock can show."""


class TokenBucket:
    """`burst` requests at once, then `per_second`; the last `reserve` of the burst are for urgent calls."""

    def __init__(self, *, per_second: float, burst: int, reserve: int) -> None:
        """`per_second` is greater than zero. A bucket of `burst` less than one holds one; others always get one."""
        self._per_second = per_second
        self._burst = max(1, burst)
        self._reserve = max(0, min(reserve, self._burst - 1))
        self._level = float(self._burst)
        self._at: float | None = None
        self._held_until = float("-inf")

    def take(self, now: float, *, urgent: bool) -> float:
        """Take a token and return 0, or take none and return after how many seconds to ask again."""
        self._refill(now)
        if now < self._held_until - SLACK:
            return self._held_until - now
        needed = 1 if urgent else 1 + self._reserve
        if self._level >= needed - SLACK * self._per_second:
            self._level -= 1
            return 0.0
        return (needed - self._level) / self._per_second

    def hold(self, now: float, wait: float) -> None:
        """Let nobody take a token for `wait` seconds. The bucket is empty then: the other side counted differently."""
        self._refill(now)
        self._level = 0.0
        self._held_until = max(self._held_until, now + wait)

    def _refill(self, now: float) -> None:
        passed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._level = min(float(self._burst), self._level + passed * self._per_second)
