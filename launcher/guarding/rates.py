"""How much one client may ask for in a minute: a bucket per client that fills again evenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_MINUTE_S = 60.0
_MOST_CLIENTS = 1024


@dataclass(slots=True)
class _Bucket:
    left: float
    at_s: float


class PerMinute:
    """Lets `most` pass per minute and client; `time` counts seconds and never goes back."""

    def __init__(self, most: int, time: Callable[[], float]) -> None:
        self._most = most
        self._time = time
        self._buckets: dict[str, _Bucket] = {}

    def take(self, client: str, count: int = 1) -> float:
        """Take so many at once, or nothing; return 0, or after how many seconds so many will be there.

        More than a whole minute's worth at once never fits: it counts as a minute's worth to wait for.
        """
        now = self._time()
        if len(self._buckets) >= _MOST_CLIENTS and client not in self._buckets:
            self._buckets.pop(next(iter(self._buckets)))
        bucket = self._buckets.setdefault(client, _Bucket(self._most, now))
        bucket.left = min(self._most, bucket.left + max(0.0, now - bucket.at_s) * self._most / _MINUTE_S)
        bucket.at_s = now
        if count <= bucket.left:
            bucket.left -= count
            return 0.0
        return (min(count, self._most) - bucket.left) * _MINUTE_S / self._most or _MINUTE_S
