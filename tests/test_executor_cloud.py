"""Workers of the queue in the cloud: machines are rented for jobs, shared, ended; what is missing pauses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from runcomfy.application.station import CloudStation
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, Outcome, Phase, QueuedJob, QueueStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs
from runcomfy.testing.worker_stories import picture
from runcomfy.testing.workers import Worker, Workers, queue_settings_for

pytestmark = pytest.mark.cloud(boot_time=180)
IDLE = timedelta(minutes=2)


@pytest.fixture
def workers(programs: Programs, tmp_path: Path, clock: LoopClock) -> Workers:
    queue = replace(queue_settings_for("http://127.0.0.1:1", tmp_path), poll_interval=timedelta(seconds=5))
    found = Workers(programs.settings, queue, clock, wake_interval=timedelta(seconds=5))
    found.processes = programs.processes
    return found


@asynccontextmanager
async def working(
    programs: Programs, workers: Workers, *, slots: int = 1, **changes: Any
) -> AsyncIterator[tuple[Worker, Program]]:
    """Run a program that works on the queue in the cloud; `changes` are laid over its cloud settings."""
    async with programs.start(**changes) as program:
        station = CloudStation(program.placer, server_type=None, idle_after=IDLE)
        async with workers.start(at=(program.placer, station), slots=slots, job_timeout=timedelta(hours=1)) as worker:
            yield worker, program


async def when(condition: Callable[[], Any], what: str, *, within: float = 3_600, every: float = 2) -> None:
    for _ in range(int(within / every)):
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        await asyncio.sleep(every)
    pytest.fail(f"did not happen: {what}")


def manifest_of(path: str) -> dict[str, Any]:
    found = json.loads((Path(path).parent / "manifest.json").read_text())
    assert isinstance(found, dict)
    return found


def comfyui_of(cloud: RunComfyEmulator, number: int = -1) -> ComfyUIEmulator:
    server = list(cloud.machines.values())[number].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


def ran(cloud: RunComfyEmulator) -> list[str]:
    servers = [m.comfyui for m in cloud.machines.values() if isinstance(m.comfyui, ComfyUIEmulator)]
    return [run.outcome for server in servers for run in server.run_log]


async def submitted(worker: Worker, job: QueuedJob) -> bool:
    return (await worker.queue.job(job)).phase is Phase.SUBMITTED


async def test_jobs_share_one_machine_that_is_ended_when_there_is_nothing_to_do(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator
) -> None:
    async with working(programs, workers, slots=2) as (worker, _):
        jobs = await worker.queue.enqueue_many([JobRequest(picture(30, name=n)) for n in range(4)])
        done = [await worker.queue.wait(job) for job in jobs]
        assert {job.status for job in done} == {QueueStatus.DONE}
        assert {job.result["where"] for job in done} == {"own machine"}
        assert all(Decimal(job.result["cost_usd"]) > 0 for job in done)
        assert cloud.billing == cloud.launched
        await when(lambda: not cloud.alive, "the machine is ended", within=600)
    assert len(cloud.launched) == 1


async def test_a_worker_that_is_stopped_ends_its_machine_and_puts_its_job_back(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator
) -> None:
    async with working(programs, workers) as (worker, _):
        job = await worker.queue.enqueue(JobRequest(picture(1_200)))
        await when(lambda: submitted(worker, job), "the prompt is on the machine")
        await worker.end()
        left = await worker.queue.job(job)
        assert (left.status, left.phase, left.place, left.retries_attempted) == (
            QueueStatus.PENDING, Phase.NONE, None, 0,
        )  # fmt: skip
        assert cloud.alive == []
    async with working(programs, workers) as (worker, _):
        done = await worker.queue.wait(job)
        assert (done.status, done.run_count, done.retries_attempted) == (QueueStatus.DONE, 2, 0)
    assert len(cloud.launched) == 2


@pytest.mark.fault(22)
async def test_a_machine_that_goes_away_under_a_job_is_replaced_and_two_of_them_quarantine_it(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator
) -> None:
    cloud.next_machine(vanishes_after=timedelta(minutes=10))
    async with working(programs, workers) as (worker, _):
        job = await worker.queue.enqueue(JobRequest(picture(900)))
        done = await worker.queue.wait(job)
        attempts = (await worker.queue.show(job)).attempts
        assert (done.status, done.run_count, done.retries_attempted) == (QueueStatus.DONE, 2, 1)
        assert [attempt.error_code for attempt in attempts] == ["machine-lost", ""]

        await when(lambda: not cloud.alive, "the machine is ended", within=600)
        for _ in range(2):
            cloud.next_machine(vanishes_after=timedelta(minutes=10))
        killer = await worker.queue.wait(await worker.queue.enqueue(JobRequest(picture(900))))
        assert (killer.status, killer.reason, killer.kill_count) == (QueueStatus.FAILED, "quarantined", 2)
    assert cloud.alive == []


async def test_a_killed_workers_machine_is_taken_over_with_the_prompt_on_it(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    """Invariants I11, I12, I20: the prompt that a dead worker sent is gone on with, on the same machine.

    What the job cost is its time there in both processes.
    """
    async with working(programs, workers) as (first, program):
        job = await first.queue.enqueue(JobRequest(picture(400)))
        await when(lambda: submitted(first, job), "the prompt is on the machine")
        began = clock.now()
        await asyncio.sleep(60)
        await program.kill()
        await first.kill(workers.processes)
    async with working(programs, workers) as (second, program):
        done = await second.queue.wait(job, timeout=timedelta(minutes=10))
        assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
        took = (clock.now() - began).total_seconds()
        [before, now] = done.result["bill"]
        assert before["what"] == "medium (earlier attempts of this job)"
        assert float(before["seconds"]) >= 60
        assert took - 10 <= float(before["seconds"]) + float(now["seconds"]) <= took + 10
        assert Decimal(done.result["cost_usd"]) == Decimal(before["amount_usd"]) + Decimal(now["amount_usd"])
        [output] = done.result["outputs"]
        await when(lambda: manifest_of(output["path"])["cost_usd"] is not None, "the manifest has the cost", within=60)
        assert Decimal(manifest_of(output["path"])["cost_usd"]) >= Decimal(done.result["cost_usd"])
        kinds = [event.kind for event in (await second.queue.show(job)).events]
        assert EventKind.ATTACHED in kinds
        assert ran(cloud) == ["success"]
    assert len(cloud.launched) == 1
    assert cloud.alive == []


async def test_a_refused_budget_pauses_the_queue_until_somebody_resumes_it(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator
) -> None:
    async with working(programs, workers, max_usd_per_hour=Decimal("0.01")) as (worker, _):
        job = await worker.queue.enqueue(JobRequest(picture()))
        await when(worker.queue.pauses, "the queue is paused")
        [pause] = await worker.queue.pauses()
        assert (pause.scope, pause.reason, pause.until) == ("queue", "budget-exceeded", None)
        await asyncio.sleep(1_200)
        waiting = await worker.queue.job(job)
        assert (waiting.status, waiting.retries_attempted, waiting.run_count) == (QueueStatus.PENDING, 0, 0)
        assert len((await worker.queue.show(job)).attempts) == 1
        assert cloud.launched == []
    async with working(programs, workers) as (worker, _):
        await asyncio.sleep(600)
        assert cloud.launched == []
        await worker.queue.resume()
        assert (await worker.queue.wait(job)).status is QueueStatus.DONE


@pytest.mark.fault(26)
async def test_a_revoked_token_pauses_this_computer_and_the_job_waits_unharmed(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator
) -> None:
    async with working(programs, workers) as (worker, _):
        cloud.revoke()
        job = await worker.queue.enqueue(JobRequest(picture()))
        await when(worker.queue.pauses, "it is paused")
        [pause] = await worker.queue.pauses()
        assert (pause.scope, pause.reason) == ("host:emulated", "provider-auth-rejected")
        await asyncio.sleep(600)
        assert (await worker.queue.job(job)).retries_attempted == 0
        cloud.behave()
        done = await worker.queue.wait(job, timeout=timedelta(minutes=15))
        assert (done.status, done.run_count) == (QueueStatus.DONE, 1)


async def test_cancelling_while_the_machine_boots_leaves_nothing_that_bills(
    programs: Programs, workers: Workers, cloud: RunComfyEmulator
) -> None:
    async with working(programs, workers) as (worker, _):
        job = await worker.queue.enqueue(JobRequest(picture(600)))
        await when(lambda: cloud.launched, "a machine is launched")
        await worker.queue.cancel(job)
        await when(lambda: not worker.executor._runs, "the run is over", within=120)
        await when(lambda: not cloud.alive, "nothing is left", within=600)
        attempt = (await worker.queue.show(job)).attempts[0]
        assert attempt.outcome is Outcome.CANCELLED
    with suppress(IndexError):
        assert ran(cloud) == []
