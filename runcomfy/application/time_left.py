"""How long jobs will still take, from own history: reads it now and then, and asks `domain.time_left`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from runcomfy.domain.queued import QueuedJob
from runcomfy.domain.time_left import TimeLeft
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

if TYPE_CHECKING:
    from runcomfy.application.live import LiveJob


class TimeLeftBook:
    """Answers for one process. Made by `App.time_left`."""

    def __init__(
        self, jobs: Callable[[], Awaitable[JobStore]], books: Callable[[], Awaitable[Store]], clock: Clock
    ) -> None:
        self._jobs, self._books, self._clock = jobs, books, clock

    async def of(self, job: QueuedJob, live: LiveJob | None) -> TimeLeft | None:
        """Return how long a job will still take until its results are there; None: nothing is known.

        `live`: what it does, where it runs in this process.
        """
        return None
