"""
What must hold in a simulated day, asked of those who know: the cloud's bill and call log, the servers' run logs, the
files on the disk, and what clients were told. Our own records are what is judged.

`watch` looks on while the day goes by; `judge` says at its end what did not hold. Judged elsewhere:

    I21     that clocks which jump change no decision: the stories of faults 60 and 70, on clocks that can be set
    part of I10 and I15, what a power loss leaves: needs a disk (`make killpoints`)
    part of I24, crash dumps and argv: needs processes (`tests/security`)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from runcomfy.testing.simulation.oracles_cloud import CloudOracle
from runcomfy.testing.simulation.oracles_jobs import JobsOracle
from runcomfy.testing.simulation.violations import Found, Violation

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

__all__ = ["Violation", "judge", "watch"]

EVERY: Final = 60.0
"""Seconds between two looks."""


class Oracles:
    """Everybody who is asked about one world."""

    def __init__(self, world: World) -> None:
        self.found = Found()
        self.cloud, self.jobs = CloudOracle(world, self.found), JobsOracle(world, self.found)


async def watch(world: World) -> None:
    """Look on until cancelled; to be begun before anything happens."""
    oracles = world.own(Oracles)
    while True:
        await asyncio.sleep(EVERY)
        await oracles.cloud.look(EVERY)
        if oracles.cloud.healthy(world.seconds):
            await oracles.jobs.look(EVERY)


async def judge(world: World) -> list[Violation]:
    """Return what did not hold, in the order in which it was seen."""
    oracles = world.own(Oracles)
    await oracles.cloud.judge()
    await oracles.jobs.judge()
    oracles.jobs.judge_lateness({job.config_name: job for job in await world.services.queue.list()})
    return list(oracles.found.all)
