"""
Four machines, 100 jobs of 1 s, every request 150 ms away: the share of machine time that computes.

Two deep the next prompt waits in the server's queue when the last one ends; one deep it is sent only then; "one at a
time" is a worker per machine that fetches and writes down one job's results before it claims the next one. Computing
time is what the servers themselves say; it counts from the first prompt's start to the last one's end. Bars: two deep
at least 0.95, against about 0.68 one at a time.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Findings, report
from benchmarks.results import Result
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.config import load_settings
from runcomfy.application.placing import Placer
from runcomfy.application.pool_station import PoolStation
from runcomfy.domain.exceptions import CredentialsMissing
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob
from runcomfy.domain.settings import PoolSettings, Settings
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.standing_pool import StandingPool
from runcomfy.testing.workers import Worker, Workers, queue_settings_for

MACHINES = 4
JOBS = 100
SECONDS = 1.0
ROUND_TRIP = 0.15
BAR = 0.95


def graph(number: int) -> dict[str, Any]:
    """Return a graph that takes its second and saves a picture of its own."""
    return {
        "1": {
            "class_type": "EmulatorDelay",
            "inputs": {"seconds": SECONDS, "steps": 4, "previews": False, "seed": number},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "bench"}},
    }


def share(machines: Sequence[ComfyUIEmulator]) -> dict[str, float]:
    """Return how much of the machines' time was spent computing, and the longest gap between two prompts."""
    runs = [[(run.started, run.ended or run.started) for run in machine.run_log] for machine in machines]
    begun, ended = min(one[0][0] for one in runs), max(one[-1][1] for one in runs)
    computing = sum(end - start for one in runs for start, end in one)
    gaps = [after[0] - before[1] for one in runs for before, after in pairwise(one)]
    return {
        "share": round(computing / (len(machines) * (ended - begun)), 4),
        "wall_s": round(ended - begun, 2),
        "longest_gap_s": round(max(gaps), 3),
        "mean_gap_s": round(sum(gaps) / len(gaps), 4),
    }


@asynccontextmanager
async def machines() -> AsyncIterator[list[ComfyUIEmulator]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ComfyUIEmulator(round_trip=ROUND_TRIP)) for _ in range(MACHINES)]


async def pooled(settings: Settings, folder: Path, depth: int) -> dict[str, float]:
    """Work the jobs off over a pool."""
    clock = SystemClock()
    async with machines() as servers, AsyncExitStack() as stack:
        pool = StandingPool(clock, depth=depth)
        for server in servers:
            client = ComfyUIWorkflowClient(server.url, settings.comfy, clock=clock)
            stack.push_async_callback(client.close)
            pool.add(client)
        station = PoolStation(pool, replace(PoolSettings(), depth=depth), clock=clock)

        async def no_cloud() -> Any:
            raise CredentialsMissing("no cloud is needed here")

        def nowhere(_: object) -> Any:
            raise CredentialsMissing("jobs run on the pool's machines")

        placer = Placer(nowhere, nowhere, no_cloud, tell=lambda _: None)
        workers = Workers(settings, queue_settings_for("http://127.0.0.1:1", folder), clock)
        async with workers.start(at=(placer, station)) as worker:
            await work_off(worker)
        return share(servers)


async def one_at_a_time(settings: Settings, folder: Path) -> dict[str, float]:
    """Work the jobs off with a worker for each machine that has one job at once."""
    async with machines() as servers, AsyncExitStack() as stack:
        workers = Workers(settings, queue_settings_for("http://127.0.0.1:1", folder), SystemClock())
        started = [await stack.enter_async_context(workers.start(api_base_url=server.url)) for server in servers]
        await work_off(started[0])
        return share(servers)


async def work_off(worker: Worker) -> None:
    jobs = await worker.queue.enqueue_many([NewJob(JobRequest(graph(number)), "bench") for number in range(JOBS)])
    for job in jobs:
        ended = await worker.queue.wait(job)
        if ended.reason:
            raise RuntimeError(f"job {ended.id} failed: {ended.error_trace}")


async def run() -> Result:
    found = Findings(
        "two_deep", "Four machines, 100 jobs of 1 s, every request 150 ms away; computing time is what the servers say."
    )
    settings = load_settings(overrides={})
    settings = replace(settings, files=replace(settings.files, durable=False))
    for name, depth in (("two deep", 2), ("one deep", 1), ("one at a time", 0)):
        gc.collect()
        with TemporaryDirectory(prefix="comfyctl-bench-") as folder:
            work = pooled(settings, Path(folder), depth) if depth else one_at_a_time(settings, Path(folder))
            figures = await work
        report("two_deep", way=name, machines=MACHINES, jobs=JOBS, job_s=SECONDS, round_trip_s=ROUND_TRIP, **figures)
        if depth == 2:
            found.at_least("share of machine time that computes, two deep", figures["share"], BAR)
        else:
            found.told(f"share of machine time that computes, {name}", figures["share"])
        found.told(f"longest gap between two prompts, {name}", 1000 * figures["longest_gap_s"], "ms")
    return found.result()


def main() -> Result:
    return asyncio.run(run())
