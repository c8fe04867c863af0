"""A clock that runs with the event loop, so that a test that moves the loop's time moves the stamps with it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Final

START: Final = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
"""When the stories of tests begin: any fixed moment would do."""


class LoopClock:
    """Keeps `runcomfy.ports.clock.Clock`: a fixed start plus the running loop's time."""

    def __init__(self, start: datetime = START) -> None:
        """`start`: the moment at which the loop's time is zero, as it is when a test under virtual time begins."""
        self._start = start
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def following_the_wall(cls) -> LoopClock:
        """Return a clock that shows the real time now and goes on by the running loop's time."""
        return cls(datetime.now(UTC) - timedelta(seconds=asyncio.get_running_loop().time()))

    def now(self) -> datetime:
        """Return the time, aware, in UTC. In a thread without a loop: that of the loop in which it was asked last."""
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            if self._loop is None:
                raise
        return self._start + timedelta(seconds=self._loop.time())


class SettableClock(LoopClock):
    """The loop's time, until somebody sets the clock: `off` is added from then on."""

    def __init__(self, start: datetime = START) -> None:
        """It is right until `off` is changed."""
        super().__init__(start)
        self.off = timedelta(0)

    def now(self) -> datetime:
        """Return what the clock on the wall shows."""
        return super().now() + self.off
