"""
How long waiting jobs would wait: each goes to the machine that is free first (list scheduling).

Run times are predicted means, so one number for all jobs is as exact as anything that could be said. Few jobs are
scheduled one by one; many are poured over the machines like water, so that ten thousand jobs on a thousand machines
cost one sort and a few look-ups for each number of further machines that is tried.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

_FEW: Final = 48
"""Jobs that are scheduled one by one."""


class Waiting:
    """What `count` jobs of `service_s` seconds wait, all together, on machines that are free in so many seconds."""

    def __init__(self, free_in_s: Iterable[float], count: int, service_s: float) -> None:
        self._free = sorted(free_in_s)
        self._count, self._service_s = count, max(service_s, 1e-3)
        self._sums = [0.0, *accumulate(self._free)]
        self._squares = [0.0, *accumulate(free * free for free in self._free)] if count > _FEW else []

    def total(self, extra: int = 0, after_s: float = 0.0) -> float:
        """Return the job-seconds of waiting if `extra` further machines are free in `after_s`; infinite without any."""
        if not self._count:
            return 0.0
        if not self._free and extra <= 0:
            return float("inf")
        return self._poured(extra, after_s) if self._count > _FEW else self._one_by_one(extra, after_s)

    def _one_by_one(self, extra: int, after_s: float) -> float:
        free = self._free[: self._count] + [after_s] * min(extra, self._count)
        heapq.heapify(free)
        total = 0.0
        for _ in range(self._count):
            begins = free[0]
            total += begins
            heapq.heapreplace(free, begins + self._service_s)
        return total

    def _poured(self, extra: int, after_s: float) -> float:
        """Every machine is filled up to the same level; its jobs begin one service time apart below that."""
        high = self.level(extra, after_s)
        below = bisect_left(self._free, high)
        # The mean begin of a machine filled from f to L is (f + L - service) / 2, times (L - f) / service of them.
        area = high * high * below - self._squares[below] - self._service_s * (high * below - self._sums[below])
        if high > after_s:
            area += extra * (high - after_s) * (high + after_s - self._service_s)
        return max(0.0, area / (2 * self._service_s))

    def level(self, extra: int = 0, after_s: float = 0.0) -> float:
        """Return in how many seconds the last of the jobs is done, if their work could be cut into any pieces."""
        work = self._count * self._service_s

        def held(level: float) -> float:
            below = bisect_left(self._free, level)
            return level * below - self._sums[below] + extra * max(0.0, level - after_s)

        low, high = 0.0, (self._free[-1] if self._free else 0.0) + after_s + work
        for _ in range(48):
            middle = (low + high) / 2
            if held(middle) < work:
                low = middle
            else:
                high = middle
        return high

    def best_extra(self, most: int, after_s: float, start_cost_s: float) -> int:
        """Return how many further machines are worth it, if each costs as much as `start_cost_s` job-seconds of wait.

        The first machine at all is always worth it.
        """
        most = min(most, self._count)
        low, high = min(most, 1 if not self._free and self._count else 0), max(most, 0)
        while low < high:  # each further machine spares less than the one before
            middle = (low + high) // 2
            if self.total(middle, after_s) - self.total(middle + 1, after_s) > start_cost_s:
                low = middle + 1
            else:
                high = middle
        return low
