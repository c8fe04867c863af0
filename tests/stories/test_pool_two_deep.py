"""
Two jobs at a machine: one computes, the next one waits in the server's queue already, so that the machine is never idle
between them; and it is taken back when its place in the line has become a bad one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.config import load_settings
from runcomfy.application.placing import Placer
from runcomfy.application.pool_station import PoolStation
from runcomfy.application.pooled import PooledMachine
from runcomfy.domain.exceptions import CredentialsMissing, JobBusy
from runcomfy.domain.job import JobRequest, PromptId
from runcomfy.domain.queued import EventKind, NewJob, Outcome, QueuedJob, QueueStatus
from runcomfy.domain.settings import CloudSettings, PoolSettings, Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Programs, settings_for
from runcomfy.testing.rented_pools import running_pool
from runcomfy.testing.standing_pool import StandingPool
from runcomfy.testing.worker_stories import picture
from runcomfy.testing.workers import Worker, Workers, queue_settings_for


def job(seconds: float, name: object, *, workflow: str = "w", **options: Any) -> NewJob:
    timeout = options.pop("timeout", None)
    return NewJob(JobRequest(picture(seconds, name=name), timeout=timeout), workflow, **options)


class Farm:
    """Emulated machines, the pool they are in, and an executor over it."""

    def __init__(self, stack: AsyncExitStack, workers: Workers, settings: Settings, clock: LoopClock) -> None:
        self._stack, self._workers, self._settings, self._clock = stack, workers, settings, clock
        self.pool = StandingPool(clock)
        self.comfyuis: list[ComfyUIEmulator] = []
        self.worker: Worker

    async def machine(self, *, boots: float = 0.0, server_type: str = "medium") -> PooledMachine:
        """Put one more machine in."""
        comfyui = await self._stack.enter_async_context(ComfyUIEmulator(now=lambda: self._clock.now().timestamp()))
        client = ComfyUIWorkflowClient(comfyui.url, self._settings.comfy, clock=self._clock)
        self._stack.push_async_callback(client.close)
        self.comfyuis.append(comfyui)
        return self.pool.add(client, boots=boots, server_type=server_type)

    async def work(self, machines: int = 1, **changes: Any) -> Worker:
        """Put machines in and start an executor."""
        for _ in range(machines):
            await self.machine()
        station = PoolStation(self.pool, replace(PoolSettings(), **changes), clock=self._clock)

        async def no_cloud() -> Any:
            raise CredentialsMissing("there is no cloud here")

        placer = Placer(lambda _: self.pool.machines[0].server, lambda _: None, no_cloud, tell=print)  # type: ignore[arg-type, return-value]
        self.station = station
        self.worker = await self._stack.enter_async_context(self._workers.start(at=(placer, station)))
        return self.worker

    def ran(self, number: int = 0) -> list[str]:
        """Return the names of what a machine has begun, in order."""
        return [str(run.graph["2"]["inputs"]["filename_prefix"]) for run in self.comfyuis[number].run_log]

    def outcomes(self, number: int = 0) -> list[str]:
        """Return how those ended."""
        return [run.outcome for run in self.comfyuis[number].run_log]

    def waiting(self, number: int = 0) -> list[str]:
        """Return the names of what waits in a server's queue."""
        waiting = self.comfyuis[number].process.queue.waiting
        return [str(item[2]["2"]["inputs"]["filename_prefix"]) for item in waiting]


@pytest_asyncio.fixture
async def farm(tmp_path: Path, clock: LoopClock) -> AsyncIterator[Farm]:
    settings = load_settings(overrides={})
    settings = replace(
        settings,
        files=replace(settings.files, durable=False),
        comfy=replace(settings.comfy, stall_timeout=timedelta(seconds=60)),
    )
    queue = queue_settings_for("http://127.0.0.1:1", tmp_path, job_timeout=timedelta(hours=1))
    workers = Workers(settings, queue, clock)
    async with AsyncExitStack() as stack:
        yield Farm(stack, workers, settings, clock)


async def when(condition: Callable[[], Any], what: str, *, within: float = 600, every: float = 0.1) -> None:
    """Wait until the condition holds."""
    for _ in range(int(within / every)):
        if condition():
            return
        await asyncio.sleep(every)
    pytest.fail(f"did not happen: {what}")


def pictures(worker: Worker) -> list[Path]:
    return list(Path(worker.executor.settings.jobs_finished).rglob("*.png"))


async def outcomes(worker: Worker, job: QueuedJob) -> list[Outcome | None]:
    return [attempt.outcome for attempt in (await worker.queue.show(job)).attempts]


async def all_done(worker: Worker, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    ended = [await worker.queue.wait(job) for job in jobs]
    assert [job.status for job in ended] == [QueueStatus.DONE] * len(ended), [job.error_trace for job in ended]
    return ended


# -- the line at a machine ---------------------------------------------------------------------------------


async def test_a_machine_with_work_is_never_idle_between_jobs(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(10, n) for n in range(6)])
    await all_done(worker, jobs)
    runs = farm.comfyuis[0].run_log
    gaps = [after.started - before.ended for before, after in pairwise(runs) if before.ended]
    assert len(gaps) == 5
    assert max(gaps) < 0.2
    assert farm.ran() == list("012345")
    await when(lambda: [outcome for _, outcome, _ in farm.pool.ended] == ["done"] * 6, "all have left")


async def test_one_deep_the_next_one_is_sent_when_the_last_has_ended(farm: Farm) -> None:
    worker = await farm.work(depth=1)
    farm.pool._depth = 1
    jobs = await worker.queue.enqueue_many([job(10, n) for n in range(3)])
    await when(lambda: farm.ran() == ["0"], "the first computes")
    await asyncio.sleep(5)
    assert farm.waiting() == []
    await all_done(worker, jobs)
    assert farm.ran() == list("012")


async def test_jobs_go_to_idle_machines_before_any_waits_behind_another(farm: Farm) -> None:
    worker = await farm.work(3)
    jobs = await worker.queue.enqueue_many([job(30, n) for n in range(4)])
    await when(lambda: sum(len(farm.ran(n)) for n in range(3)) == 3, "three compute")
    await asyncio.sleep(2)
    assert [len(farm.ran(n)) for n in range(3)] == [1, 1, 1]
    assert sum(len(farm.waiting(n)) for n in range(3)) == 1
    await all_done(worker, jobs)


async def test_results_are_fetched_while_the_next_one_computes(farm: Farm) -> None:
    worker = await farm.work()
    farm.comfyuis[0].faults.add("GET", "/view", Fault.late(25), times=1)
    jobs = await worker.queue.enqueue_many([job(10, n) for n in range(4)])
    await all_done(worker, jobs)
    runs = farm.comfyuis[0].run_log
    assert runs[-1].ended is not None
    assert runs[-1].ended - runs[0].started < 41


# -- taking back -------------------------------------------------------------------------------------------


async def test_a_more_urgent_job_takes_the_seat_of_one_that_waits(farm: Farm) -> None:
    worker = await farm.work()
    computes, waits = await worker.queue.enqueue_many([job(60, "computes"), job(10, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    [urgent] = await worker.queue.enqueue_many([job(10, "urgent", priority=1)])
    await when(lambda: farm.waiting() == ["urgent"], "the urgent one has its seat", within=30)
    assert (await worker.queue.job(waits)).status is QueueStatus.PENDING
    await all_done(worker, [computes, waits, urgent])
    assert farm.ran() == ["computes", "urgent", "waits"]
    assert farm.outcomes() == ["success"] * 3
    assert await outcomes(worker, waits) == [Outcome.PUT_BACK, Outcome.DONE]
    ended = await worker.queue.job(waits)
    assert (ended.retries_attempted, ended.kill_count) == (0, 0)


async def test_equally_urgent_jobs_wait_for_their_turn(farm: Farm) -> None:
    worker = await farm.work()
    first = await worker.queue.enqueue_many([job(60, "computes"), job(10, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    later = await worker.queue.enqueue_many([job(10, "later")])
    await all_done(worker, [*first, *later])
    assert farm.ran() == ["computes", "waits", "later"]
    assert all(outcome == "done" for _, outcome, _ in farm.pool.ended)


async def test_one_that_waits_moves_to_a_machine_that_has_nothing_to_do(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(120, "computes"), job(10, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    await farm.machine()
    await when(lambda: farm.ran(1) == ["waits"], "it runs on the new machine", within=10)
    assert farm.waiting() == []
    await all_done(worker, jobs)
    assert farm.ran() == ["computes"]
    assert await outcomes(worker, jobs[1]) == [Outcome.PUT_BACK, Outcome.DONE]


async def test_a_seat_behind_others_is_not_given_while_a_machine_starts_that_begins_earlier(farm: Farm) -> None:
    worker = await farm.work()
    [first] = await worker.queue.enqueue_many([job(100, "computes")])
    await when(lambda: farm.ran() == ["computes"], "the first computes")
    await farm.machine(boots=20)
    [second] = await worker.queue.enqueue_many([job(10, "second")])
    await asyncio.sleep(15)
    assert farm.waiting() == []
    await when(lambda: farm.ran(1) == ["second"], "it runs on the new machine", within=10)
    await all_done(worker, [first, second])
    assert await outcomes(worker, second) == [Outcome.DONE]


async def test_a_machine_that_drains_gives_back_what_waits_there_and_finishes_what_computes(farm: Farm) -> None:
    worker = await farm.work(2)
    jobs = await worker.queue.enqueue_many([job(60, n) for n in range(4)])
    await when(lambda: farm.waiting(0) and farm.waiting(1), "both machines have one waiting")
    machine = farm.pool.machines[0]
    farm.pool.drain(machine.id, why="it is not needed")
    await when(lambda: farm.waiting(0) == [], "what waited there is taken back", within=10)
    await all_done(worker, jobs)
    assert farm.outcomes(0) == ["success"]
    assert len(farm.ran(1)) == 3
    assert machine not in farm.pool.machines


async def test_one_that_has_begun_meanwhile_is_left_alone(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(10, "computes"), job(30, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    run = next(run for run, _ in worker.executor._runs.values() if run.row.id == jobs[1].id)
    await when(lambda: farm.ran() == ["computes", "waits"], "it begins")
    assert not await run.take_back()
    await all_done(worker, jobs)
    assert farm.outcomes() == ["success"] * 2
    assert await outcomes(worker, jobs[1]) == [Outcome.DONE]


# -- machines that go away ---------------------------------------------------------------------------------


@pytest.mark.fault(22)
async def test_a_machine_dies_with_one_computing_and_one_waiting(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(60, "computes"), job(60, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    await farm.comfyuis[0].kill()
    farm.pool.lose(farm.pool.machines[0])
    await farm.machine()
    computed, waited = await all_done(worker, jobs)
    assert sorted(farm.ran(1)) == ["computes", "waits"]
    assert farm.outcomes(1) == ["success"] * 2
    assert await outcomes(worker, computed) == [Outcome.REQUEUED, Outcome.DONE]
    assert await outcomes(worker, waited) == [Outcome.PUT_BACK, Outcome.DONE]
    assert waited.retries_attempted == 0
    kills = [[e.data.get("code") for e in (await worker.queue.show(job)).events if e.data] for job in jobs]
    assert "machine-lost" in kills[0]
    assert len(pictures(worker)) == 2


@pytest.mark.fault(16)
async def test_a_machine_that_was_not_ready_in_between_is_not_relied_on(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(60, "computes"), job(60, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    machine = farm.pool.machines[0]
    assert machine.server is not None
    farm.pool.ready(machine, machine.server)
    await when(lambda: farm.outcomes()[0] == "interrupted", "what computed is ended", within=60)
    await all_done(worker, jobs)
    assert sorted(farm.outcomes()) == ["interrupted", "success", "success"]
    assert await outcomes(worker, jobs[0]) == [Outcome.REQUEUED, Outcome.DONE]
    assert await outcomes(worker, jobs[1]) == [Outcome.PUT_BACK, Outcome.DONE]


async def test_a_comfyui_that_restarts_costs_only_the_one_that_computed(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(60, "computes"), job(60, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    await farm.comfyuis[0].restart()
    computed, waited = await all_done(worker, jobs)
    assert (computed.retries_attempted, waited.retries_attempted) == (1, 0)


# -- time --------------------------------------------------------------------------------------------------


async def test_the_timeout_of_one_that_waits_begins_with_its_turn(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(80, "computes"), job(20, "waits", timeout=timedelta(seconds=40))])
    ended = await all_done(worker, jobs)
    assert [job.retries_attempted for job in ended] == [0, 0]


async def test_its_timeout_counts_from_then_on(farm: Farm) -> None:
    worker = await farm.work()
    first, second = await worker.queue.enqueue_many(
        [job(60, "computes"), job(80, "waits", timeout=timedelta(seconds=30), retry_limit=0)]
    )
    failed = await worker.queue.wait(second)
    assert failed.reason == "job-timeout"
    runs = farm.comfyuis[0].run_log
    assert [run.outcome for run in runs] == ["success", "interrupted"]
    assert runs[1].ended is not None
    assert 29 < runs[1].ended - runs[1].started < 35
    await all_done(worker, [first])


async def test_waiting_behind_a_long_one_is_not_taken_for_stuck(farm: Farm) -> None:
    worker = await farm.work()
    jobs = await worker.queue.enqueue_many([job(200, "computes"), job(10, "waits")])
    await all_done(worker, jobs)
    assert farm.outcomes() == ["success"] * 2
    assert await outcomes(worker, jobs[1]) == [Outcome.DONE]


# -- others on the machine ---------------------------------------------------------------------------------


@pytest.mark.fault(69)
async def test_a_prompt_that_somebody_started_by_hand_is_waited_for_and_never_touched(farm: Farm) -> None:
    worker = await farm.work()
    client = farm.pool.machines[0].server
    assert client is not None
    await client.submit(picture(120, name="by hand"), prompt_id=PromptId(str(uuid4())))
    jobs = await worker.queue.enqueue_many([job(10, n) for n in range(2)])
    await asyncio.sleep(30)
    assert sorted(farm.waiting()) == ["0", "1"]
    await farm.machine()
    await when(lambda: sorted(farm.ran(1)) == ["0", "1"], "both are moved to a machine that is free", within=60)
    await all_done(worker, jobs)
    await when(lambda: farm.outcomes(0) == ["success"], "the user's prompt ends well")


async def test_cancelling_one_that_waits_leaves_the_other_alone(farm: Farm) -> None:
    worker = await farm.work()
    first, second = await worker.queue.enqueue_many([job(60, "computes"), job(10, "waits")])
    await when(lambda: farm.waiting() == ["waits"], "the second waits its turn")
    await worker.queue.cancel(second)
    await when(lambda: farm.waiting() == [], "its prompt is gone", within=30)
    await all_done(worker, [first])
    assert farm.ran() == ["computes"]
    assert [event.kind for event in (await worker.queue.show(second)).events][-1] in (
        EventKind.CANCELLED,
        EventKind.PROMPT_ENDED,
        EventKind.DISCARDED,
    )


async def test_limits_hold_and_what_they_hold_back_keeps_nobody_else_waiting(farm: Farm, tmp_path: Path) -> None:
    farm._workers.queue_settings = replace(farm._workers.queue_settings, limit_workflow={"heavy": 1})
    worker = await farm.work(2)
    jobs = await worker.queue.enqueue_many(
        [*(job(20, f"heavy{n}", workflow="heavy") for n in range(70)), job(10, "light", workflow="light")]
    )
    await when(
        lambda: "light" in (*farm.ran(0), *farm.ran(1)), "the light one runs beside the first heavy one", within=10
    )
    assert sorted([*farm.ran(0), *farm.ran(1)]) == ["heavy0", "light"]
    for one in jobs[1:70]:
        await worker.queue.cancel(one)
    await all_done(worker, [jobs[0], jobs[70]])


async def test_a_fair_order_is_the_stores_business(farm: Farm) -> None:
    farm._workers.queue_settings = replace(farm._workers.queue_settings, fair_users=True)
    worker = await farm.work(2, depth=1)
    farm.pool._depth = 1
    await worker.queue.pause()
    many = [job(20, f"ann{n}", user="ann") for n in range(3)]
    jobs = await worker.queue.enqueue_many([*many, job(20, "bob", user="bob")])
    await worker.queue.resume()
    await when(lambda: sorted([*farm.ran(0), *farm.ran(1)]) == ["ann0", "bob"], "each has one", within=30)
    await all_done(worker, jobs)
    assert len(farm.ran(0)) == len(farm.ran(1)) == 2


async def test_asked_for_one_job_it_needs_a_seat(farm: Farm) -> None:
    worker = await farm.work(0)
    await worker.end()
    [one] = await worker.queue.enqueue_many([job(5, "one")])
    with pytest.raises(JobBusy, match="seat"):
        await worker.executor.run_job(one.id)
    assert (await worker.queue.job(one)).status is QueueStatus.PENDING
    await farm.machine()
    await asyncio.sleep(2)
    assert (await worker.executor.run_job(one.id)).status is QueueStatus.DONE


# -- on machines that are really rented --------------------------------------------------------------------


@pytest.mark.fault(22)
@pytest.mark.fault(68)
async def test_on_a_rented_pool_a_machine_vanishes_under_its_jobs_and_the_other_one_does_them(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> None:
    programs = Programs(cloud, settings_for(cloud_settings, tmp_path / "state"), clock)
    programs.settings = replace(programs.settings, pool=PoolSettings(max_machines=2))
    queue = queue_settings_for("http://127.0.0.1:1", tmp_path, job_timeout=timedelta(hours=1))
    workers = Workers(programs.settings, queue, clock)
    workers.processes = programs.processes
    async with programs.start() as program, running_pool(program) as running:
        machines = [await running.usable() for _ in range(2)]
        station = PoolStation(running.pool, programs.settings.pool, clock=clock)
        async with workers.start(at=(program.placer, station)) as worker:
            jobs = await worker.queue.enqueue_many([job(60, n) for n in range(4)])
            await when(lambda: [machine.seated for machine in machines] == [2, 2], "both have two")
            await when(lambda: all(machine.leases[0].computing_at for machine in machines), "the first ones compute")
            doomed = machines[0]
            cloud._end(cloud.machines[str(doomed.machine.server_id)])
            await all_done(worker, jobs)
            assert len(pictures(worker)) == 4
        works = await program.store.works()
        assert sorted((work.machine_id == doomed.id, work.outcome) for work in works) == [
            *[(False, "done")] * 4,
            (True, "failed"),
            (True, "put-back"),
        ]
        done = [work for work in works if work.outcome == "done"]
        assert all(59 < work.busy(clock.now()).total_seconds() < 62 for work in done)
        await running.close()
    assert cloud.alive == []
