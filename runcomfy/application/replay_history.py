"""
One's own last days as a stream that can be replayed: when jobs came, from the queue, and how long they ran, from the
books. A job that never computed, or still does, is left out: nobody knows how long it would have run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runcomfy.application.replay import Arrival
from runcomfy.domain.work import Work
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

MOST_JOBS: Final = 20_000
"""Of a history; a replay of more takes minutes."""


@dataclass(frozen=True, slots=True)
class OwnHistory:
    """What came in the days looked back at. Times are seconds of the wall clock's epoch."""

    jobs: tuple[Arrival, ...]
    left_out: int
    """Jobs that came and did not compute."""


async def own_history(
    jobs: JobStore, store: Store, *, since: datetime, on_reference: Callable[[float, str], float]
) -> OwnHistory:
    """Return the jobs that came since then, in order of time. Raises LocalError.

    `on_reference` says what a run of so many seconds on a machine type would have taken on the reference type
    (`FleetOffers.on_reference`).
    """
    came = await jobs.arrivals(limit=MOST_JOBS)
    ran = await store.works(since=since)
    seconds = _run_times(ran, on_reference)
    stream = [
        Arrival(arrival.at.timestamp(), seconds[arrival.uid], arrival.user, arrival.workflow_id)
        for arrival in came
        if arrival.at is not None and arrival.at >= since and arrival.uid in seconds
    ]
    total = sum(arrival.at is not None and arrival.at >= since for arrival in came)
    return OwnHistory(tuple(sorted(stream, key=lambda job: job.at)), total - len(stream))


def _run_times(ran: Sequence[Work], on_reference: Callable[[float, str], float]) -> dict[str, float]:
    """Return, by job, how long its last finished run computed; runs that were broken off say nothing."""
    latest: dict[str, Work] = {}
    for work in ran:
        if work.computing_at is not None and work.computed_at is not None and work.outcome == "done":
            latest[str(work.job_id)] = work
    seconds = {
        job: on_reference((work.computed_at - work.computing_at).total_seconds(), work.server_type)
        for job, work in latest.items()
        if work.computing_at is not None and work.computed_at is not None
    }
    return {job: run for job, run in seconds.items() if run > 0}
