"""One rate limit for all processes of an account, kept in the store they share."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Final

from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.pacing import SLACK, TokenBucket
from runcomfy.domain.settings import CloudSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

_log = logging.getLogger("runcomfy.limiter")

ASKED_AFTER_S: Final = 0.5
"""Who has waited so long for a turn asks whether another process was told to wait meanwhile."""


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
        self._held_until = float("-inf")
        """Until when the provider wants to hear nothing of us, by the loop's clock."""

    async def wait_turn(self, *, urgent: bool) -> None:
        """Return when the account's next request may be sent."""
        loop = asyncio.get_running_loop()
        while True:
            wait = await self._next_turn(urgent=urgent)
            wait = max(wait, self._held_until - loop.time())
            await asyncio.sleep(wait)
            if loop.time() >= self._held_until - SLACK and not await self._held_meanwhile(wait):
                return  # else the provider said meanwhile that it is too much: the turn is asked for anew

    async def _next_turn(self, *, urgent: bool) -> float:
        """Take the account's next free moment; return in how many seconds that is."""
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
            return 0.0
        return wait.total_seconds()

    async def _held_meanwhile(self, waited: float) -> bool:
        """Whether another process was told to wait (Retry-After) while this one waited for its turn (I22)."""
        if waited < ASKED_AFTER_S:
            return False
        try:
            held = await self._store.requests_held(self._account, now=self._clock.now())
        except LocalError as error:  # the turn was given; the provider's own refusal is met, if it comes to that
            _log.warning("limiter_store_failed", extra={"fields": {"error": error.code}})
            return False
        return held.total_seconds() > SLACK

    async def hold(self, wait: timedelta) -> None:
        """Let no process of the account send before `wait` has passed, also not who waits for a turn in this one."""
        now = asyncio.get_running_loop().time()
        self._bucket.hold(now, wait.total_seconds())
        self._held_until = max(self._held_until, now + wait.total_seconds())
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
