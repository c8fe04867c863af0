"""
Presence: saying that somebody is there, or that work is about to come, before it comes.

A machine's start takes minutes. A program that knows its user is there says so, and the machine is warm when the first
job arrives. What is said is a hint: each source is scored by how often work followed (`signals`), and one that does not
pay is not listened to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Final

from runcomfy.application.finish import finish
from runcomfy.domain.exceptions import LocalError, ValueInvalid, foreign_text
from runcomfy.domain.signal import PRESENCE_FOR, Signal, SignalKind
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.presence")

INTENT_FOR: Final = timedelta(minutes=5)
"""How long work is expected after an intent that does not say it."""
LONGEST: Final = timedelta(days=1)
"""Nobody is there for longer without saying it again."""
DEFAULT_SOURCE: Final = "here"
_MOST_JOBS: Final = 1_000_000
_LONGEST_NAME: Final = 200


class Presence:
    """Writes signals where a fleet of the same books hears them."""

    def __init__(self, store: Callable[[], Awaitable[Store]], clock: Clock, *, user: str = "") -> None:
        """`store` opens the machines' books; `user` is whom this speaks for where nobody else is named."""
        self._store, self._clock, self._user = store, clock, user

    async def opened(
        self, source: str = DEFAULT_SOURCE, *, lasts: timedelta = PRESENCE_FOR, user: str | None = None
    ) -> Signal:
        """Say that somebody is there; it holds for `lasts` unless it is said again. Raises ValueInvalid, LocalError."""
        now = self._clock.now()
        return await self._say(SignalKind.OPENED, source, user, now, until=now + _span(lasts))

    async def left(self, source: str = DEFAULT_SOURCE, *, user: str | None = None) -> Signal:
        """Say that nobody of this source is there any more. Raises ValueInvalid, LocalError."""
        return await self._say(SignalKind.LEFT, source, user, self._clock.now())

    async def intent(
        self, source: str = DEFAULT_SOURCE, *, lasts: timedelta = INTENT_FOR, user: str | None = None
    ) -> Signal:
        """Say that a job is about to come, within `lasts`. Raises ValueInvalid, LocalError."""
        now = self._clock.now()
        return await self._say(SignalKind.INTENT, source, user, now, until=now + _span(lasts))

    async def batch(
        self,
        jobs: int,
        source: str = DEFAULT_SOURCE,
        *,
        work: timedelta = timedelta(0),
        at: datetime | None = None,
        user: str | None = None,
    ) -> Signal:
        """Say that so many jobs will come, at `at` (aware; left out: now), with so much work in all, if that is known.

        Raises ValueInvalid, LocalError.
        """
        if not 1 <= jobs <= _MOST_JOBS:
            raise ValueInvalid(f"a batch of {jobs} jobs is none", hint=f"give 1 to {_MOST_JOBS} jobs")
        if work < timedelta(0):
            raise ValueInvalid("work cannot take less than no time", hint="give its running time, for example 20m")
        if at is not None and at.tzinfo is None:
            raise ValueInvalid("the time has no time zone", hint="give an aware datetime, for example in UTC")
        now = self._clock.now()
        return await self._say(SignalKind.BATCH, source, user, now, jobs=jobs, work=work, expected_at=at or now)

    @asynccontextmanager
    async def here(
        self, source: str = DEFAULT_SOURCE, *, lasts: timedelta = PRESENCE_FOR, user: str | None = None
    ) -> AsyncIterator[None]:
        """Be there for the block: it is said again before it runs out, and that somebody left when the block is left.

        A database that cannot be written keeps nobody from working: it is tried again.
        """
        await self.opened(source, lasts=lasts, user=user)
        repeating = asyncio.create_task(self._repeat(source, lasts, user), name=f"presence {source}")
        try:
            yield
        finally:
            repeating.cancel()
            await asyncio.wait({repeating})
            await finish(self._leave(source, user))

    async def _repeat(self, source: str, lasts: timedelta, user: str | None) -> None:
        while True:
            await asyncio.sleep(lasts.total_seconds() / 3)
            try:
                await self.opened(source, lasts=lasts, user=user)
            except LocalError as error:
                log.warning("presence_not_said", extra={"fields": {"source": source, "error": error.code}})

    async def _leave(self, source: str, user: str | None) -> None:
        try:
            await self.left(source, user=user)
        except LocalError as error:  # it runs out by itself
            log.warning("presence_not_said", extra={"fields": {"source": source, "error": error.code}})

    async def _say(
        self,
        kind: SignalKind,
        source: str,
        user: str | None,
        at: datetime,
        *,
        until: datetime | None = None,
        jobs: int = 0,
        work: timedelta = timedelta(0),
        expected_at: datetime | None = None,
    ) -> Signal:
        if len(source) > _LONGEST_NAME:
            raise ValueInvalid(
                f"the source of a signal is {len(source)} characters long", hint=f"name it in at most {_LONGEST_NAME}"
            )
        name = foreign_text(source, _LONGEST_NAME).strip()
        if not name:
            raise ValueInvalid("a signal needs a source", hint="name who says it, for example --source conjure")
        whose = foreign_text(self._user if user is None else user, 100)
        signal = Signal(kind, name, at, until, jobs, work, expected_at, whose)
        await (await self._store()).signal(signal)
        log.info("presence_said", extra={"fields": {"kind": str(kind), "source": name, "jobs": jobs}})
        return signal


def _span(lasts: timedelta) -> timedelta:
    if not timedelta(seconds=1) <= lasts <= LONGEST:
        raise ValueInvalid(
            f"a signal cannot hold for {lasts}", hint="give between one second and a day, for example 15m"
        )
    return lasts
