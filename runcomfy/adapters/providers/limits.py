"""Keeping to a provider's rate limit within this process, and reading what a 429 asks for."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

from runcomfy.domain.pacing import TokenBucket

DEFAULT_RETRY_AFTER: Final = timedelta(seconds=5)
"""How long to be silent after a 429 that does not say: clients of RunComfy wait that long."""


class LocalLimiter:
    """Keeps `runcomfy.ports.limiter.Limiter` for one process that has the account to itself."""

    def __init__(self, *, per_second: float, burst: int, reserve: int) -> None:
        self._bucket = TokenBucket(per_second=per_second, burst=burst, reserve=reserve)
        self._queue = asyncio.Lock()

    async def wait_turn(self, *, urgent: bool) -> None:
        """Return when the next request may be sent. First come, first served; urgent calls pass the queue."""
        if urgent:
            await self._wait(urgent=True)
        else:
            async with self._queue:
                await self._wait(urgent=False)

    async def hold(self, wait: timedelta) -> None:
        """Let nobody send before `wait` has passed."""
        self._bucket.hold(asyncio.get_running_loop().time(), wait.total_seconds())

    async def _wait(self, *, urgent: bool) -> None:
        loop = asyncio.get_running_loop()
        wait = self._bucket.take(loop.time(), urgent=urgent)
        while wait > 0:
            await asyncio.sleep(wait)
            wait = self._bucket.take(loop.time(), urgent=urgent)


def retry_after(headers: Mapping[str, str], *, now: datetime, cap: timedelta) -> timedelta | None:
    """Return how long the answer asks us to be silent, at most `cap`; None if it does not say, or nothing sensible.

    `Retry-After` is seconds or an HTTP date (RFC 9110, 10.2.3). A date is taken relative to the answer's own `Date`
    where there is one, since the two clocks may differ.
    """
    text = headers.get("Retry-After", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        until, sent = _http_date(text), _http_date(headers.get("Date", "")) or now
        if until is None or until <= sent:
            return None
        return min(until - sent, cap)
    if not math.isfinite(seconds) or seconds < 0:
        return None
    return timedelta(seconds=min(seconds, cap.total_seconds()))


def _http_date(text: str) -> datetime | None:
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at
