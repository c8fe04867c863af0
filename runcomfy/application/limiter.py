"""One rate limit for all processes of an account, kept in the store they share."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.pacing import TokenBucket
from runcomfy.domain.settings import CloudSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

_log = logging.getLogger("runcomfy.limiter")


class StoreLimiter:
    """Keeps `runcomfy.ports.limiter.Limiter` over `Store.reserve_request`.

    A store that fails (full disk, locked database) stops ordinary calls with its `LocalError`. Urgent ones go on with
    a bucket in this process: a broken disk never prevents a stop (I23).
    """

    def __init__(self, store: Store, account: str, settings: CloudSettings, clock: Clock) -> None:
        self._store, self._account, self._settings, self._clock = store, account, settings, clock
        self._bucket = TokenBucket(
            per_second=settings.requests_per_second, burst=max(1, settings.stop_reserve), reserve=0
        )

    async def wait_turn(self, *, urgent: bool) -> None:
        """Return when the account's next request may be sent."""
        settings = self._settings
        try:
            wait = await self._store.reserve_request(
                self._account,
                now=self._clock.now(),
                per_second=settings.requests_per_second,
                burst=settings.burst,
                reserve=settings.stop_reserve,
                urgent=urgent,
            )
        except LocalError as error:
            if not urgent:
                raise
            _log.warning("limiter_store_failed", extra={"fields": {"error": error.code}})
            await self._wait_alone()
        else:
            await asyncio.sleep(wait.total_seconds())

    async def hold(self, wait: timedelta) -> None:
        """Let no process of the account send before `wait` has passed."""
        self._bucket.hold(asyncio.get_running_loop().time(), wait.total_seconds())
        try:
            await self._store.hold_requests(self._account, now=self._clock.now(), wait=wait)
        except LocalError as error:
            # This process still holds back; the others meet the provider's own refusal.
            _log.warning("limiter_store_failed", extra={"fields": {"error": error.code}})

    async def _wait_alone(self) -> None:
        loop = asyncio.get_running_loop()
        wait = self._bucket.take(loop.time(), urgent=True)
        while wait > 0:
            await asyncio.sleep(wait)
            wait = self._bucket.take(loop.time(), urgent=True)
