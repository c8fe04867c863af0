"""
A latency target in place of a price of waiting: the price that would have kept it over one's own last days.

The plan knows one knob, what an hour of waiting is worth. Replaying what came (`replay`) with the production plan finds
the lowest price with which 95 of 100 jobs would have waited no longer than the target.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from runcomfy.application.axis import Axis
from runcomfy.application.fleet_offers import LOOK_BACK, FleetOffers
from runcomfy.application.replay import Arrival, World
from runcomfy.application.replay_report import WaitPrice, solve_wait_price
from runcomfy.domain.settings import PoolSettings
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.fleet")

MOST_JOBS: Final = 2_000
"""Jobs that are replayed: each price that is tried replays all of them."""
FEWEST_JOBS: Final = 20
"""With fewer, the slowest twentieth of them is less than one job."""


async def price_for(
    target: timedelta, jobs: JobStore, offers: FleetOffers, settings: PoolSettings, *, axis: Axis
) -> WaitPrice | None:
    """Return the price of waiting that keeps the target; None with too few jobs to tell. Raises LocalError."""
    since = asyncio.get_running_loop().time() - LOOK_BACK.total_seconds()
    told = await jobs.arrivals(limit=MOST_JOBS)
    came = [
        Arrival(at, offers.run_s(each.workflow_id), each.user, each.workflow_id)
        for each in told
        if each.at is not None and (at := axis.of(each.at)) >= since
    ]
    if len(came) < FEWEST_JOBS:
        return None
    keep = settings.keep_alive
    world = World(
        offers=offers.views(lambda _: settings.max_machines),
        max_machines=settings.max_machines,
        min_machines=settings.min_machines,
        keep_alive_s=None if keep is None else keep.total_seconds(),
    )
    found = await asyncio.to_thread(_solved, sorted(came, key=lambda job: job.at), target, world)
    fields = {"usd_per_hour": found.usd_per_hour, "met": found.met, "jobs": len(came)}
    log.info("wait_price_solved", extra={"fields": fields})
    return found


def _solved(came: Sequence[Arrival], target: timedelta, world: World) -> WaitPrice:
    first = came[0].at
    moved = [Arrival(job.at - first, job.service_s, job.user, job.workflow) for job in came]
    return solve_wait_price(moved, target.total_seconds(), world)
