"""What the tests of workers are told with: jobs that take their time, and what came of them on one ComfyUI."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from runcomfy.adapters.config import load_settings
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.heartbeat import OnBeat, Pulse
from runcomfy.domain.queued import EventKind, Phase, QueuedJob, WorkerId
from runcomfy.ports.clock import Clock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.workers import Worker, Workers, queue_settings_for


def workers_at(comfyui: ComfyUIEmulator, folder: Path, clock: Clock) -> Workers:
    """Return what starts workers on a server of their own, with a queue in a folder of the test's."""
    settings = load_settings(overrides={})
    settings = replace(settings, files=replace(settings.files, durable=False))
    return Workers(settings, queue_settings_for(comfyui.url, folder), clock)


def picture(seconds: float = 0.05, *, name: object = "out") -> dict[str, Any]:
    """Return a workflow that takes its time and then saves a picture."""
    inputs = {"seconds": seconds, "steps": max(1, int(seconds)), "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": str(name)}},
    }


async def when(condition: Callable[[], Any], what: str, *, within: float = 3_600, every: float = 0.25) -> None:
    """Wait until the condition, which may be asynchronous, holds; fail with the words if it never does."""
    for _ in range(int(within / every)):
        found = condition()
        if await found if inspect.isawaitable(found) else found:
            return
        await asyncio.sleep(every)
    raise AssertionError(f"did not happen: {what}")


def ran(comfyui: ComfyUIEmulator) -> list[str]:
    """Return how each prompt ended on the server."""
    return [run.outcome for run in comfyui.run_log]


def pictures(folder: Path) -> list[str]:
    """Return the names of the results that are in place."""
    return sorted(path.name for path in (folder / "jobs" / "finished").rglob("*.png"))


async def kinds(worker: Worker, job: QueuedJob) -> list[EventKind]:
    """Return the events of a job, in order."""
    return [event.kind for event in (await worker.queue.show(job)).events]


async def is_in(worker: Worker, job: QueuedJob, phase: Phase) -> bool:
    """Return whether a job's prompt has got so far."""
    return (await worker.queue.job(job)).phase is phase


class NoPulse:
    """A heart that has stopped."""

    fresh = True

    def start(self, on_beat: OnBeat) -> None:
        """Do nothing."""

    def hurry(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""


def no_pulse(store: SqlJobs, worker: WorkerId) -> Pulse:
    """Give a worker a heart that has stopped."""
    return NoPulse()
