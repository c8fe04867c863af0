"""
Runs of one workflow whose nodes take about the same time each, and how well the time left was told during them.

The node times are drawn: usual time, times a noise that is the node's own in each run. Everything else is the
product's: queue, executor, orchestrator and books, on an emulated ComfyUI. Times come from the clock that is passed in,
so that it works under virtual time.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.config import load_settings
from runcomfy.application.executor import Executor
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.job_queue import JobQueue
from runcomfy.bootstrap import App
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import QueuedJob
from runcomfy.domain.time_left import TimeLeft
from runcomfy.ports.clock import Clock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.workers import queue_settings_for

NODES: Final[Mapping[str, tuple[str, float, int]]] = {
    "1": ("Load the models", 25.0, 1),
    "2": ("Read the prompt", 4.0, 1),
    "3": ("Sample", 60.0, 20),
    "4": ("Decode", 8.0, 1),
    "5": ("Cut out", 12.0, 1),
    "6": ("Make the mesh", 45.0, 10),
}
"""Node -> its title, usual seconds, and in how many steps it reports its progress. The first is cached from then on."""
LOADER: Final = "1"
WAKE: Final = timedelta(seconds=2)
"""How often who waits for the database looks: in a story of an hour, real work each time."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was told at one moment of a run, and what was true."""

    run: int
    """Which one, from 1."""
    told: TimeLeft | None
    true_s: float

    @property
    def error(self) -> float:
        """How far off it was, against the truth; infinite if nothing was told."""
        return abs(self.told.expected_s - self.true_s) / self.true_s if self.told is not None else float("inf")


class _InLoop(App):
    """The product's wiring; leases are renewed in the event loop, whose time is the story's."""

    def _heart(self, *_: Any) -> Pulse | None:
        return None


def graph() -> dict[str, Any]:
    """Return the workflow: one node after the other, then a picture is saved."""
    nodes: dict[str, Any] = {}
    before: str | None = None
    for node, (title, seconds, steps) in NODES.items():
        inputs: dict[str, Any] = {"seconds": seconds, "steps": steps, "previews": False, "seed": 1}
        if before is not None:
            inputs["image"] = [before, 0]
        nodes[node] = {"class_type": "EmulatorDelay", "inputs": inputs, "_meta": {"title": title}}
        before = node
    inputs = {"images": [before, 0], "filename_prefix": "timed"}
    return nodes | {"9": {"class_type": "SaveImage", "inputs": inputs}}


class TimedRuns:
    """`async with timed_runs(...) as runs:` — `await runs.once()`, as often as wanted."""

    def __init__(self, app: App, queue: JobQueue, workflow: Path, *, noise: float, seed: int) -> None:
        self.app, self.queue = app, queue
        self._workflow, self._noise, self._random = workflow, noise, random.Random(seed)
        self.runs = 0

    def drawn(self) -> dict[str, Any]:
        """Return what each node but the loader is to take this time; the loader stays as it is, and so is cached."""
        return {f"{LOADER}.seed": 1} | {
            f"{node}.seconds": round(seconds * max(0.1, self._random.gauss(1.0, self._noise)), 2)
            for node, (_, seconds, _) in NODES.items()
            if node != LOADER
        }

    async def add(self) -> QueuedJob:
        """Put a run into the queue."""
        return await self.queue.enqueue(JobRequest(str(self._workflow), sets=self.drawn()))

    async def once(self, *, every: float = 3.0) -> list[Look]:
        """Have it run once, and ask every so many seconds how long it still takes."""
        self.runs += 1
        loop, book, asked = asyncio.get_running_loop(), self.app.time_left(), list[tuple[float, TimeLeft | None]]()
        over_at: list[float] = []
        leave = self.app.live.subscribe(lambda job: over_at.append(loop.time()) if job.over else None)
        job = await self.add()
        while not over_at:
            live = self.app.live.job(job.uid)
            if live is not None:
                asked.append((loop.time(), await book.of(await self.queue.job(job.uid), live)))
            await asyncio.sleep(every)
        leave()
        await self.queue.wait(job)
        return [Look(self.runs, told, over_at[0] - at) for at, told in asked if over_at[0] > at]


@asynccontextmanager
async def timed_runs(
    comfyui: ComfyUIEmulator, folder: Path, clock: Clock, *, noise: float = 0.2, seed: int = 1
) -> AsyncIterator[TimedRuns]:
    """Keep a queue and a worker for the block."""
    workflow = folder / "timed.json"
    await asyncio.to_thread(workflow.write_text, json.dumps(graph()), encoding="utf-8")
    settings = load_settings(overrides={})
    files = replace(settings.files, durable=False, state_dir=str(folder / "state"))
    async with _InLoop(replace(settings, files=files), clock=clock) as app:
        app._queue_settings = queue_settings_for(comfyui.url, folder, wake_interval=WAKE)
        executor: Executor = await app.executor()
        stop = asyncio.Event()
        working = asyncio.create_task(executor.run(stop, asyncio.Event()), name="worker")
        try:
            yield TimedRuns(app, await app.job_queue(), workflow, noise=noise, seed=seed)
        finally:
            stop.set()
            await working
