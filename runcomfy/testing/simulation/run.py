"""One simulated day, from its first job to its verdict."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass, field
from datetime import timedelta

from runcomfy.testing.clock import START
from runcomfy.testing.simulation.loop import MemoryLoop
from runcomfy.testing.simulation.pace import slower
from runcomfy.testing.simulation.seeded import seeded
from runcomfy.testing.simulation.world import DAY, World


async def _feed(world):
    draw = world.stream("load")
    n = 0
    while world.seconds < world.calm_at:
        await asyncio.sleep(draw.expovariate(60 / 86400))
        n += 1
        job = await world.services.put(n, seconds=draw.uniform(20, 200))
        world.acknowledged[job.config_name] = job
        world.trace.tell("client", "puts in a job", job=job.config_name)


async def day(seed, loop, length=DAY):
    async with World(seed, loop, length=length) as world:
        await world.start_service()
        await world.start_guard()
        await _feed(world)
        await asyncio.sleep(max(0, world.length.total_seconds() - world.seconds))
        complaints = await world.services.complaints()
        return world, complaints


def simulate(seed, hours=24):
    loop = MemoryLoop()
    asyncio.set_event_loop(loop)
    try:
        with seeded(seed, now=loop.time, began=START.timestamp()), slower():
            return loop.run_until_complete(day(seed, loop, timedelta(hours=hours)))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


if __name__ == "__main__":
    import sys, cProfile, pstats
    p = cProfile.Profile(time.thread_time) if "-p" in sys.argv else None
    t = time.process_time()
    if p: p.enable()
    world, complaints = simulate(int(sys.argv[1]), float(sys.argv[2]))
    if p:
        p.disable(); p.dump_stats("/tmp/sim.prof")
    print(complaints)
    print("cpu", time.process_time() - t, "steps", world.loop.steps, "jobs", len(world.acknowledged), "machines", len(world.cloud.launched), "calls", len(world.cloud.calls), world.trace.digest)
    if "-t" in sys.argv: print("\n".join(world.trace.text()))
