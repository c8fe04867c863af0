"""
One's own last days as a stream that can be replayed: when jobs came, from the queue, how long they ran, from the books,
and what clients told before. A job that was run without the queue came when it took its seat at a machine. A job that
never computed, or still does, is left out: nobody knows how long it would have run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from runcomfy.application.fleet_offers import FleetOffers, wait_usd_per_hour
from runcomfy.application.replay import Arrival, Told, World
from runcomfy.domain.settings import PoolSettings
from runcomfy.domain.signal import PRESENCE_FOR, Signal, SignalKind
from runcomfy.domain.work import Work
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

MOST_JOBS: Final = 20_000
"""Of a history; a replay of more takes minutes."""


@dataclass(frozen=True, slots=True)
class OwnHistory:
    """What came in the days looked back at. Times are seconds of the wall clock's epoch."""

    jobs: tuple[Arrival, ...]
    told: tuple[Told, ...]
    """Who was there, and when."""
    left_out: int
    """Jobs that came and did not compute."""


async def own_history(
    jobs: JobStore, store: Store, *, since: datetime, on_reference: Callable[[float, str], float]
) -> OwnHistory:
    """Return what came since then, in order of time. Raises LocalError.

    `on_reference` says what a run of so many seconds on a machine type would have taken on the reference type
    (`FleetOffers.on_reference`).
    """
    known = await jobs.arrivals(limit=MOST_JOBS)
    came = [job for job in known if job.at is not None and job.at >= since]
    ran = await store.works(since=since)
    seconds = _run_times(ran, on_reference)
    queued = {job.uid for job in known}
    stream = [
        Arrival(job.at.timestamp(), seconds[job.uid], job.user, job.workflow_id)
        for job in came
        if job.at is not None and job.uid in seconds
    ]
    left_out = len(came) - len(stream)
    alone = {str(work.job_id): work for work in reversed(ran) if work.job_id not in queued}
    stream += [
        Arrival(work.began_at.timestamp(), seconds[job], work.user, work.workflow)
        for job, work in alone.items()
        if job in seconds
    ]
    told = [one for signal in await store.signals(since=since) if (one := _told(signal)) is not None]
    return OwnHistory(tuple(sorted(stream, key=lambda job: job.at)), tuple(told), left_out)


def own_world(offers: FleetOffers, pool: PoolSettings, history: OwnHistory, *, wait_price: str = "") -> World:
    """Return one's own settings, machine types and signals as the world of a replay; `offers` were refreshed.

    `wait_price` wins over the one of the settings. Raises ValueInvalid if it is none.
    """
    return World(
        offers=offers.views(lambda _: pool.max_machines),
        wait_usd_per_hour=wait_usd_per_hour(wait_price or pool.wait_price, offers.price(offers.reference)),
        max_machines=pool.max_machines,
        min_machines=min(pool.min_machines, pool.max_machines),
        keep_alive_s=pool.keep_alive.total_seconds() if pool.keep_alive is not None else None,
        told=history.told,
    )


def _told(signal: Signal) -> Told | None:
    at = signal.at.timestamp()
    match signal.kind:
        case SignalKind.OPENED:
            until = signal.until.timestamp() if signal.until is not None else at + PRESENCE_FOR.total_seconds()
            return Told(at, signal.source, max(at, until))
        case SignalKind.LEFT:
            return Told(at, signal.source, at)
        case _:  # an intent or a batch is about single jobs, which the stream has anyway
            return None


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
