"""Workers of the queue on an emulated ComfyUI: order, retries, pauses, cancellation, draining, and many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.adapters.config import load_settings
from runcomfy.application.job_run import EXCUSED_DELAY, EXCUSES, FLAPS_EXCUSED, JobRun, Why
from runcomfy.application.journal import EarlierPrompt
from runcomfy.application.placing import OWN_MACHINE, POOL_MACHINE, Place
from runcomfy.application.seat import Seat
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    JobBusy,
    JobFileInvalid,
    JobNotFound,
    LeaseLost,
    LocalError,
    MachineLost,
    NodeFailed,
    PromptRemoved,
    ServerRestarted,
    ServerUnreachable,
    StoreUnavailable,
    WorkerDead,
)
from runcomfy.domain.job import JobRequest, PromptId
from runcomfy.domain.queued import Ending, EventKind, NewJob, Outcome, Phase, QueuedJob, QueueStatus, Reason, RowId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.jobs_words import a_job, put, take
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.workers import Worker, Workers, queue_settings_for


def picture(seconds: float = 0.05, *, name: object = "out") -> dict[str, Any]:
    """A graph that takes its time and then saves a picture."""
    inputs = {"seconds": seconds, "steps": max(1, int(seconds)), "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": str(name)}},
    }


def failing(kind: str = "error") -> dict[str, Any]:
    inputs = {"kind": kind, "message": "it burst", "steps": 2, "at_step": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "EmulatorFail", "inputs": {"image": ["1", 0], **inputs}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "never"}},
    }


@pytest_asyncio.fixture
async def comfyui() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as emulator:
        yield emulator


@pytest.fixture
def workers(comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock) -> Workers:
    settings = load_settings(overrides={})
    settings = replace(settings, files=replace(settings.files, durable=False))
    return Workers(settings, queue_settings_for(comfyui.url, tmp_path), clock)


@pytest_asyncio.fixture
async def worker(workers: Workers) -> AsyncIterator[Worker]:
    async with workers.start() as worker:
        yield worker


async def when(condition: Callable[[], Any], what: str, *, within: float = 3_600, every: float = 0.25) -> None:
    """Wait until the condition holds; it may be asynchronous."""
    for _ in range(int(within / every)):
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        await asyncio.sleep(every)
    pytest.fail(f"did not happen: {what}")


def results(worker: Worker) -> list[Path]:
    return sorted(Path(worker.executor.settings.jobs_finished).rglob("*.png"))


async def kinds(worker: Worker, job: QueuedJob) -> list[EventKind]:
    return [event.kind for event in (await worker.queue.show(job)).events]


def ran(comfyui: ComfyUIEmulator) -> list[str]:
    return [run.outcome for run in comfyui.run_log]


# -- the way of a job --------------------------------------------------------------------------------------


async def test_a_job_becomes_a_verified_file(worker: Worker, comfyui: ComfyUIEmulator, tmp_path: Path) -> None:
    target = tmp_path / "jobs" / "finished" / "image" / "knight.png"
    job = await worker.queue.enqueue(JobRequest(picture(3), out_file=str(target)), config_name="T2I_1_knight.yaml")

    done = await worker.queue.wait(job)

    assert (done.status, done.run_count, done.retries_attempted, done.error_trace) == (QueueStatus.DONE, 1, 0, None)
    with Image.open(target) as image:
        image.load()
    [output] = done.result["outputs"]
    assert output["path"] == str(target)
    assert done.result["seeds"] == {"1.seed": comfyui.run_log[0].graph["1"]["inputs"]["seed"]}
    assert done.duration is not None
    assert 3 <= done.duration < 6
    assert (done.phase, done.prompt_id, done.worker_id, done.lease_expires_at) == (Phase.NONE, None, None, None)
    story = await worker.queue.show(job)
    assert [event.kind for event in story.events] == [
        EventKind.ENQUEUED, EventKind.CLAIMED, EventKind.SUBMITTING, EventKind.SUBMITTED, EventKind.DONE,
    ]  # fmt: skip
    [attempt] = story.attempts
    assert (attempt.outcome, attempt.worker_id, attempt.run) == (Outcome.DONE, worker.id, 1)
    assert attempt.prompt_id == comfyui.run_log[0].prompt_id
    await when(lambda: any("T2I_1_knight.yaml: done in" in said for said in worker.said), "the user is told")


async def test_what_machines_did_to_a_job_is_forgotten_when_it_is_done(worker: Worker) -> None:
    excused = worker.executor._bench.excused
    job = await worker.queue.enqueue(JobRequest(picture(5)))
    excused[job.id], excused[RowId(4711)] = 2, 1
    assert (await worker.queue.wait(job)).status is QueueStatus.DONE
    await when(lambda: not worker.executor._runs, "its run is over")
    assert excused == {4711: 1}


async def test_a_job_without_a_place_for_its_files_gets_a_folder_of_its_own(worker: Worker, tmp_path: Path) -> None:
    done = await worker.queue.wait(await worker.queue.enqueue(JobRequest(picture())))
    path = Path(done.result["outputs"][0]["path"])
    assert path.parent == tmp_path / "jobs" / "finished" / done.uid


async def test_jobs_run_by_priority_then_age_and_a_changed_priority_counts_at_the_next_claim(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start() as worker:
        first = await worker.queue.enqueue(JobRequest(picture(30, name=1)))
        await when(lambda: comfyui.run_log, "the first job runs")
        late, low, high, god = await worker.queue.enqueue_many(
            [
                NewJob(JobRequest(picture(name=2)), "w"),
                NewJob(JobRequest(picture(name=3)), "w", priority=90),
                NewJob(JobRequest(picture(name=4)), "w", priority=10),
                NewJob(JobRequest(picture(name=5)), "w", priority=99),
            ]
        )
        await worker.queue.god_mode(god)
        for job in (first, late, low, high, god):
            await worker.queue.wait(job)
    assert [run.graph["2"]["inputs"]["filename_prefix"] for run in comfyui.run_log] == list("15423")


async def test_an_idle_worker_begins_at_once(worker: Worker, looptime: float) -> None:
    await asyncio.sleep(100.1)
    began = float(looptime)
    job = await worker.queue.enqueue(JobRequest(picture(5)))
    await when(lambda: worker.executor._runs, "the job is begun", every=0.01)
    assert looptime - began < 0.5
    await worker.queue.wait(job)


async def test_slots_run_jobs_side_by_side_and_limits_hold(workers: Workers, comfyui: ComfyUIEmulator) -> None:
    most: dict[str, int] = {}

    async with workers.start(slots=4, limit_workflow={"heavy": 1}) as worker:
        jobs = await worker.queue.enqueue_many(
            [NewJob(JobRequest(picture(5, name=n)), "heavy" if n % 2 else "light") for n in range(8)]
        )
        while not all([(await worker.queue.job(job)).ended for job in jobs]):
            for workflow in ("heavy", "light"):
                busy = await worker.queue.list(status=QueueStatus.PROCESSING)
                most[workflow] = max(most.get(workflow, 0), sum(job.workflow_id == workflow for job in busy))
            await asyncio.sleep(0.5)
    assert most == {"heavy": 1, "light": 3}
    assert ran(comfyui) == ["success"] * 8


async def test_progress_is_reported_now_and_then(worker: Worker) -> None:
    job = await worker.queue.enqueue(JobRequest(picture(30)))
    seen = [(now.status, now.progress) async for now in worker.queue.follow(job)]
    percents = [percent for status, percent in seen if status is QueueStatus.PROCESSING]
    assert percents == sorted(percents)
    assert 5 <= len(percents) <= 25
    assert seen[-1] == (QueueStatus.DONE, 100.0)


async def test_once_works_off_what_is_there_and_leaves(workers: Workers) -> None:
    async with workers.start(works=False) as worker:
        jobs = await worker.queue.enqueue_many([JobRequest(picture(name=n)) for n in range(3)])
        await worker.begin(once=True)
        assert [(await worker.queue.job(job)).status for job in jobs] == [QueueStatus.DONE] * 3
        assert await worker.queue.workers() == []


async def test_a_row_that_says_nothing_of_what_to_run_fails_with_a_clear_word(worker: Worker) -> None:
    def by_hand(connection: Any) -> None:
        connection.exec_driver_sql(
            "INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('hand.yaml', 'T2I', 'w', 'pending')"
        )

    await worker.store.run(by_hand)
    failed = await worker.queue.wait("hand.yaml")
    assert (failed.status, failed.reason) == (QueueStatus.FAILED, "job-file-invalid")
    assert "says nothing of what to run" in (failed.error_trace or "")


async def test_a_users_sql_ends_a_running_job(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    job = await worker.queue.enqueue(JobRequest(picture(600)), config_name="mine.yaml")
    await when(lambda: comfyui.run_log, "the job runs")
    await worker.store.run(
        lambda connection: connection.exec_driver_sql("UPDATE jobs SET status='failed' WHERE config_name='mine.yaml'")
    )
    await when(lambda: ran(comfyui) == ["interrupted"], "the prompt is interrupted", within=30)
    assert (await worker.queue.job(job)).status is QueueStatus.FAILED


async def test_run_job_does_one_job_for_another_engine(workers: Workers) -> None:
    async with workers.start(works=False) as worker:
        first, second = await worker.queue.enqueue_many([JobRequest(picture(name=n)) for n in (1, 2)])
        async with worker.executor:
            done = await worker.executor.run_job(second.uid)
            assert (done.id, done.status) == (second.id, QueueStatus.DONE)
            assert (await worker.executor.run_job(second.id)).token == done.token
            with pytest.raises(JobNotFound):
                await worker.executor.run_job("nobody")
            await worker.queue.pause()
            with pytest.raises(JobBusy):
                await worker.executor.run_job(first.id)
            await worker.queue.resume()
            [taken] = await worker.store.claim(worker.id, count=1, lease=timedelta(seconds=60))
            assert taken.id == first.id
            with pytest.raises(JobBusy):
                await worker.executor.run_job(first.id)


async def test_other_engines_may_ask_for_many_jobs_at_once(workers: Workers, comfyui: ComfyUIEmulator) -> None:
    async with workers.start(works=False) as worker:
        jobs = await worker.queue.enqueue_many([JobRequest(picture(3, name=n)) for n in range(4)])
        done = await asyncio.gather(*(worker.executor.run_job(job.id) for job in jobs[:3]))
        assert {job.status for job in done} == {QueueStatus.DONE}
        assert await worker.queue.workers() == []
        assert (await worker.executor.run_job(jobs[3].id)).status is QueueStatus.DONE
    assert ran(comfyui) == ["success"] * 4


# -- failures ----------------------------------------------------------------------------------------------


async def test_a_failure_is_tried_again_up_to_the_limit_and_every_attempt_has_its_error(
    worker: Worker, comfyui: ComfyUIEmulator
) -> None:
    job = await worker.queue.wait(await worker.queue.enqueue(JobRequest(failing())))
    assert (job.status, job.reason) == (QueueStatus.FAILED, "node-failed")
    assert (job.run_count, job.retries_attempted) == (3, 2)
    assert "it burst" in (job.error_trace or "")
    assert ran(comfyui) == ["error"] * 3
    assert len({run.prompt_id for run in comfyui.run_log}) == 3
    attempts = (await worker.queue.show(job)).attempts
    assert [attempt.outcome for attempt in attempts] == [Outcome.REQUEUED, Outcome.REQUEUED, Outcome.FAILED]
    assert all("it burst" in attempt.error_trace and attempt.error_code == "node-failed" for attempt in attempts)


async def test_a_jobs_own_limit_counts(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    none, four = await worker.queue.enqueue_many(
        [NewJob(JobRequest(failing()), "w", retry_limit=0), NewJob(JobRequest(failing("oom")), "w", retry_limit=4)]
    )
    assert (await worker.queue.wait(none)).run_count == 1
    failed = await worker.queue.wait(four)
    assert (failed.run_count, failed.retries_attempted, failed.reason) == (5, 4, "gpu-out-of-memory")


@pytest.mark.fault(36)
async def test_what_is_wrong_is_not_tried_again(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    unknown = {"9": {"class_type": "NoSuchNode", "inputs": {}}, **picture()}
    jobs = await worker.queue.enqueue_many(
        [JobRequest(unknown), JobRequest("no_such_workflow"), JobRequest("image_invert", image="/nowhere.png")]
    )
    found = [await worker.queue.wait(job) for job in jobs]
    assert [job.reason for job in found] == ["preflight-failed", "workflow-not-found", "input-file-missing"]
    assert all(job.retries_attempted == 0 for job in found)
    assert comfyui.run_log == []


async def test_a_flaky_server_costs_one_retry(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("GET", "/view", Fault.page(), times=8)
    job = await worker.queue.wait(await worker.queue.enqueue(JobRequest(picture())))
    assert job.status is QueueStatus.DONE
    assert job.retries_attempted >= 1
    assert (await worker.queue.show(job)).attempts[0].error_code in ("output-corrupt", "download-failed")


@pytest.mark.fault(39)
async def test_a_job_that_takes_too_long_is_seen_ended_before_it_is_tried_again(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start(job_timeout=timedelta(seconds=20), retry_limit=1) as worker:
        job = await worker.queue.wait(await worker.queue.enqueue(JobRequest(picture(600))))
        assert (job.status, job.reason, job.run_count) == (QueueStatus.FAILED, "job-timeout", 2)
        await when(lambda: ran(comfyui) == ["interrupted"] * 2, "both prompts ended")
        await when(lambda: _phase_is(worker, job, Phase.NONE), "nothing is left to be ended")
    first, second = comfyui.run_log
    assert first.ended is not None
    assert first.ended <= second.started


async def _phase_is(worker: Worker, job: QueuedJob, phase: Phase) -> bool:
    return (await worker.queue.job(job)).phase is phase


@pytest.mark.fault(38)
async def test_a_job_under_which_two_servers_die_is_quarantined(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    job = await worker.queue.enqueue(JobRequest(picture(600)))
    for number in (1, 2):
        await when(lambda: len(comfyui.run_log) == number, f"run {number} begins")  # noqa: B023 - asked at once
        await asyncio.sleep(5)
        await comfyui.restart()
    job = await worker.queue.wait(job)
    assert (job.status, job.reason, job.kill_count) == (QueueStatus.FAILED, "quarantined", 2)
    assert len(comfyui.run_log) == 2
    assert EventKind.QUARANTINED in await kinds(worker, job)


async def test_somebody_who_presses_stop_on_the_server_is_obeyed(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    job = await worker.queue.enqueue(JobRequest(picture(600)))
    await when(lambda: comfyui.run_log, "the prompt runs")
    comfyui.process.interrupt()
    job = await worker.queue.wait(job)
    assert (job.status, job.reason, job.run_count) == (QueueStatus.FAILED, "prompt-interrupted", 1)


# -- pauses ------------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_pauses_and_costs_no_retries(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    await comfyui.kill()
    jobs = await worker.queue.enqueue_many([JobRequest(picture(name=n)) for n in range(3)])
    await asyncio.sleep(1_800)
    [pause] = await worker.queue.pauses()
    assert pause.scope.startswith("host:")
    assert pause.reason == "comfyui-unreachable"
    assert pause.until is not None
    waiting = [await worker.queue.job(job) for job in jobs]
    assert {job.status for job in waiting} == {QueueStatus.PENDING}
    assert {(job.run_count, job.retries_attempted) for job in waiting} == {(0, 0)}
    tries = sum([len((await worker.queue.show(job)).attempts) for job in jobs])
    assert tries == 1  # from then on the server is asked, and no job tried
    told = [event.kind for event in await worker.store.events()]
    assert told.count(EventKind.PAUSED) == 1
    assert any(sentence.startswith("paused: ") for sentence in worker.said)

    await comfyui.restart()
    done = [await worker.queue.wait(job, timeout=timedelta(minutes=8)) for job in jobs]
    assert {job.status for job in done} == {QueueStatus.DONE}
    assert {(job.run_count, job.retries_attempted) for job in done} == {(1, 0)}
    assert await worker.queue.pauses() == []


async def test_a_paused_queue_begins_nothing_until_it_is_resumed(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    running = await worker.queue.enqueue(JobRequest(picture(30)))
    await when(lambda: comfyui.run_log, "the first job runs")
    await worker.queue.pause("lunch")
    waiting = await worker.queue.enqueue(JobRequest(picture(name=2)))
    assert (await worker.queue.wait(running)).status is QueueStatus.DONE
    await asyncio.sleep(600)
    assert len(comfyui.run_log) == 1
    await worker.queue.resume()
    assert (await worker.queue.wait(waiting, timeout=timedelta(seconds=10))).status is QueueStatus.DONE


@pytest.mark.fault(72)
async def test_a_server_that_goes_away_under_a_job_and_comes_back_with_it_finished_is_asked_for_the_result(
    worker: Worker, comfyui: ComfyUIEmulator
) -> None:
    """Invariant I12: the result is taken, not made again."""
    job = await worker.queue.enqueue(JobRequest(picture(30)))
    await when(lambda: comfyui.run_log, "the prompt runs")
    for method in ("GET", "POST"):
        comfyui.faults.add(method, "/*", Fault.lost(work=False), times=10_000)
    comfyui.cut_sockets()
    await when(lambda: _paused(worker), "the worker pauses")
    assert (await worker.queue.job(job)).status is QueueStatus.PENDING
    comfyui.faults.clear()
    done = await worker.queue.wait(job)
    assert (done.status, done.run_count, done.retries_attempted) == (QueueStatus.DONE, 1, 0)
    assert ran(comfyui) == ["success"]
    assert EventKind.ATTACHED in await kinds(worker, job)


async def _paused(worker: Worker) -> bool:
    return bool(await worker.queue.pauses())


# -- cancelling --------------------------------------------------------------------------------------------


async def test_a_waiting_job_is_cancelled_for_good(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    running, waiting = await worker.queue.enqueue_many([JobRequest(picture(30, name=n)) for n in (1, 2)])
    await when(lambda: comfyui.run_log, "the first runs")
    await worker.queue.cancel(waiting)
    assert (await worker.queue.wait(running)).status is QueueStatus.DONE
    await asyncio.sleep(300)
    assert len(comfyui.run_log) == 1
    assert (await worker.queue.job(waiting)).cancelled


async def test_cancelling_a_running_job_interrupts_its_prompt_and_no_other(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start(slots=2) as worker:
        kept, ended = await worker.queue.enqueue_many([JobRequest(picture(60, name=n)) for n in (1, 2)])
        await when(lambda: _accepted(worker, [kept, ended]), "both prompts are on the server")
        await worker.queue.cancel(ended, by="ada")
        cancelled = await worker.queue.wait(ended)
        assert cancelled.cancelled
        assert (await worker.queue.wait(kept)).status is QueueStatus.DONE
        await when(lambda: _phase_is(worker, ended, Phase.NONE), "the prompt was seen ended", within=60)
        assert (await kinds(worker, ended))[-1] is EventKind.PROMPT_ENDED
    prompt_of_kept = (await _attempts(workers, kept))[0].prompt_id
    assert [run.prompt_id for run in comfyui.run_log if run.outcome == "success"] == [prompt_of_kept]
    assert any("cancelled" in sentence for sentence in worker.said)


async def _accepted(worker: Worker, jobs: list[QueuedJob]) -> bool:
    return all([(await worker.queue.job(job)).phase is Phase.SUBMITTED for job in jobs])


async def _attempts(workers: Workers, job: QueuedJob) -> Any:
    async with workers.open() as store:
        return await store.attempts(job.id)


async def test_a_job_that_runs_is_interrupted_within_seconds_of_its_cancellation(
    worker: Worker, comfyui: ComfyUIEmulator, looptime: float
) -> None:
    job = await worker.queue.enqueue(JobRequest(picture(90)))
    await when(lambda: comfyui.run_log, "the prompt runs")
    before = float(looptime)
    await worker.queue.cancel(job)
    await when(lambda: ran(comfyui) == ["interrupted"], "it is interrupted", within=30)
    assert looptime - before < 10
    assert results(worker) == []


async def test_the_prompt_of_a_cancelled_job_whose_worker_died_is_ended_by_the_next(
    workers: Workers, comfyui: ComfyUIEmulator
) -> None:
    async with workers.start() as first:
        job = await first.queue.enqueue(JobRequest(picture(3_600)))
        await when(lambda: comfyui.run_log, "the prompt runs")
        await first.kill(workers.processes)
    async with workers.open() as store:
        cancelled = await store.cancel(job.id)
        assert cancelled.phase is Phase.ENDING
    assert ran(comfyui) == ["lost"]
    async with workers.start() as second:
        await when(lambda: ran(comfyui) == ["interrupted"], "the prompt is ended", within=60)
        await when(lambda: _phase_is(second, job, Phase.NONE), "it is written down", within=60)
        assert (await second.queue.job(job)).cancelled
    assert len(comfyui.run_log) == 1


# -- draining ----------------------------------------------------------------------------------------------


@pytest.mark.fault(61)
async def test_a_stopped_worker_lets_its_job_end_and_begins_nothing(
    workers: Workers, comfyui: ComfyUIEmulator, looptime: float
) -> None:
    async with workers.start() as worker:
        running, waiting = await worker.queue.enqueue_many([JobRequest(picture(20, name=n)) for n in (1, 2)])
        await when(lambda: comfyui.run_log, "the first runs")
        await worker.end()
        assert (await worker.queue.job(running)).status is QueueStatus.DONE
        assert (await worker.queue.job(waiting)).status is QueueStatus.PENDING
        assert looptime < 30
        assert await worker.queue.workers() == []


@pytest.mark.fault(61)
@pytest.mark.parametrize("at_once", [False, True], ids=["drained", "left at once"])
async def test_a_job_that_does_not_end_in_time_is_left_running_for_the_next_worker(
    workers: Workers, comfyui: ComfyUIEmulator, looptime: float, at_once: bool
) -> None:
    async with workers.start() as first:
        job = await first.queue.enqueue(JobRequest(picture(120)))
        await when(lambda: comfyui.run_log, "the prompt runs")
        if at_once:
            first.leave.set()
        began = float(looptime)
        await first.end()
        assert looptime - began < (3 if at_once else 40)
        left = await first.queue.job(job)
        assert (left.status, left.phase, left.retries_attempted) == (QueueStatus.PENDING, Phase.SUBMITTED, 0)
        assert ran(comfyui) == ["lost"]
        assert any("its prompt runs on" in sentence for sentence in first.said)
    async with workers.start() as second:
        done = await second.queue.wait(job)
        assert (done.status, done.run_count) == (QueueStatus.DONE, 1)
    assert ran(comfyui) == ["success"]


# -- one run by itself ---------------------------------------------------------------------------------------


class Told(Seat):
    """A seat that says what the test wants."""

    void = server_gone = flapped = waited = unpaid = outran = False
    server_stays = True

    def __init__(self, **says: bool) -> None:
        self.__dict__.update(says)


async def a_run(worker: Worker, **fields: Any) -> JobRun:
    await put(worker.store, a_job(**fields))
    return JobRun(worker.executor._bench, await take(worker.store, worker.id))


def at(run: JobRun, kind: str = POOL_MACHINE, *, outlives: bool = True, **says: bool) -> JobRun:
    nowhere: Any = None
    run._place = Place(nowhere, kind, alone=True, key="machine:1", seat=Told(**says), outlives=outlives)
    return run


async def test_a_run_is_cut_for_the_first_reason_unless_its_claim_or_its_user_is_gone(worker: Worker) -> None:
    row = (await a_run(worker)).row
    for reasons, counts, word in (
        ([Why.DRAIN], Why.DRAIN, "put-back"),
        ([Why.TAKEN_BACK, Why.DRAIN], Why.TAKEN_BACK, "put-back"),
        ([Why.DRAIN, Why.CANCELLED], Why.CANCELLED, "cancelled"),
        ([Why.CANCELLED, Why.DRAIN], Why.CANCELLED, "cancelled"),
        ([Why.CANCELLED, Why.LOST], Why.LOST, "discarded"),
    ):
        run = JobRun(worker.executor._bench, row)
        assert (run.cancel.is_set(), run._left_as()) == (False, "")
        for why in reasons:
            run.cut(why)
        assert (run.why, run.cancel.is_set(), run._left_as()) == (counts, True, word)
        run.journal.done = run.row
        assert run._left_as() == "done"  # the result stands


async def test_a_run_can_go_back_while_nothing_of_it_is_on_its_way(worker: Worker) -> None:
    run = await a_run(worker)

    def goes_back() -> bool:
        return run.can_go_back

    assert goes_back()
    run.journal.touched = True
    assert not goes_back()  # it is being sent
    run.journal.sent = PromptId("p")
    assert goes_back()
    run.ending = True
    assert not goes_back()
    run.ending, run._asked_back = False, True
    assert not goes_back()
    assert not await run.take_back()
    run._asked_back = False
    run.cut(Why.DRAIN)
    assert not goes_back()
    fresh = await a_run(worker)
    assert await fresh.take_back()
    assert (fresh.why, await fresh.take_back()) == (Why.TAKEN_BACK, False)


async def test_a_server_stays_where_its_keeper_says_so_and_what_is_never_reached_is_not_ours_to_end(
    worker: Worker,
) -> None:
    run = await a_run(worker)
    assert run._server_stays
    assert at(run, "server")._server_stays
    assert at(run)._server_stays
    assert not at(run, server_stays=False)._server_stays
    assert at(run, outlives=False)._server_stays
    run.cut(Why.DRAIN)
    assert not at(run, outlives=False)._server_stays
    assert at(run)._server_stays
    assert not at(run, OWN_MACHINE)._server_stays  # it ends with this process
    assert at(run, "server")._server_stays


async def test_a_prompt_may_run_on_where_it_was_sent_to_a_machine_that_is_not_seen_gone(worker: Worker) -> None:
    run = at(await a_run(worker))
    assert not at(run)._may_run_on
    run.journal.touched = True
    assert at(run)._may_run_on
    assert not at(run, server_gone=True)._may_run_on
    assert not at(run, "server")._may_run_on
    assert at(run, void=True)._leaves(ServerUnreachable("silent"))
    assert at(run, void=True)._keeps(ServerUnreachable("silent"))
    assert not at(run)._leaves(NodeFailed("it burst"))
    run._withdrawn = True
    assert at(run)._leaves(NodeFailed("it burst"))  # it is nowhere
    assert not run._keeps(ServerUnreachable("silent"))


async def test_machines_that_fail_a_job_before_it_has_sent_anything_cost_it_nothing_three_times(worker: Worker) -> None:
    lost = MachineLost("it is gone")
    run = at(await a_run(worker))
    for number in range(1, EXCUSES + 1):
        excused = run._excused(lost)
        assert excused is not None
        assert (excused.outcome, excused.delay, excused.keeps_prompt) == (Outcome.PUT_BACK, EXCUSED_DELAY, False)
        assert excused.error == lost.as_dict()
        assert run._bench.excused[run.row.id] == number
    assert run._excused(lost) is None
    assert run.row.id not in run._bench.excused
    assert run._excused(lost) is not None
    assert run._excused(NodeFailed("it burst")) is None  # no fault of the machine
    assert run.row.id not in run._bench.excused
    assert at(run, "server")._excused(lost) is None
    run._place = None
    assert run._excused(lost) is None
    run = at(run)
    run.journal.touched = True
    assert run._excused(lost) is None  # it may have died of the job


async def test_machines_that_flap_under_a_job_cost_it_nothing_six_times(worker: Worker) -> None:
    lost = MachineLost("it was not Ready")
    run = at(await a_run(worker), flapped=True)
    run.journal.touched = True
    for _ in range(FLAPS_EXCUSED):
        excused = run._excused(lost)
        assert excused == Ending(Outcome.PUT_BACK, error=lost.as_dict(), delay=EXCUSED_DELAY, keeps_prompt=True)
    assert run._excused(lost) is None


async def test_a_job_that_waited_its_turn_or_whose_machine_nobody_pays_goes_back_at_no_cost(worker: Worker) -> None:
    run = at(await a_run(worker), waited=True)
    run.journal.touched, run.journal.sent = True, PromptId("p")
    lost = MachineLost("it is gone")
    for _ in range(9):
        excused = run._excused(lost)
        assert excused == Ending(Outcome.PUT_BACK, error=lost.as_dict(), keeps_prompt=True)
        assert run._bench.excused[run.row.id] == 1
    restarted = run._excused(ServerRestarted("it forgot"))
    assert restarted is not None
    assert not restarted.keeps_prompt
    broke = BudgetExceeded("no more today", hint="wait")
    assert at(run)._excused(broke) is None
    unpaid = at(run, unpaid=True)._excused(broke)
    assert unpaid == Ending(Outcome.PUT_BACK, error=broke.as_dict(), keeps_prompt=True)


async def test_what_a_request_leaves_open_the_row_and_the_settings_say(worker: Worker) -> None:
    run = await a_run(worker, user="ann", project="film")
    asked, settings = await run._request(), worker.executor.settings
    assert (asked.job_id, asked.user, asked.project) == (run.row.uid, "ann", "film")
    assert (asked.timeout, asked.out_dir) == (settings.job_timeout, settings.jobs_finished)
    assert asked.earlier_outputs == {}
    own = JobRequest("image_invert", user="ben", project="book", timeout=timedelta(seconds=7), out_dir="/out")
    run.row = replace(run.row, request=own, user="", project="")
    asked = await run._request()
    assert (asked.user, asked.project, asked.out_dir) == ("ben", "book", "/out")
    assert asked.timeout == timedelta(seconds=7)
    run.row = replace(run.row, request=None)
    with pytest.raises(JobFileInvalid, match="nothing of what to run"):
        await run._request()


async def test_a_machine_that_was_ended_with_its_lease_did_not_die_of_the_job(worker: Worker) -> None:
    """And one that did is counted, whether the job is tried again or has failed."""
    row = (await a_run(worker)).row
    for limit, outcome in ((None, Outcome.REQUEUED), (0, Outcome.FAILED)):
        for outran in (False, True):
            run = at(JobRun(worker.executor._bench, replace(row, retry_limit=limit)), outran=outran)
            run.journal.touched = True
            ending = await run._ending(MachineLost("it is gone"))
            assert (ending.outcome, ending.killed_machine) == (outcome, not outran)
            assert ending.end_prompt == (outcome is Outcome.REQUEUED)  # it may run on there until that is seen gone


EARLIER = EarlierPrompt(PromptId("p"), "machine:1", accepted=True)


async def test_a_job_under_which_machines_die_is_taken_out_with_the_reason_and_what_may_still_run_is_ended(
    worker: Worker,
) -> None:
    row = replace((await a_run(worker)).row, kill_count=worker.executor.settings.kill_limit - 1)
    lost, dead = MachineLost("it is gone"), WorkerDead("its worker is dead")
    for error, stays, end_prompt in ((lost, True, False), (dead, True, True), (dead, False, False)):
        run = at(JobRun(worker.executor._bench, row), server_stays=stays)
        run.journal.touched = True
        assert await run._ending(error) == Ending(
            Outcome.QUARANTINED,
            error=error.as_dict(),
            reason=Reason.QUARANTINED,
            killed_machine=True,
            end_prompt=end_prompt,
        )
    run = at(JobRun(worker.executor._bench, row), outran=True)
    run.journal.touched = True
    assert (await run._ending(lost)).outcome is Outcome.REQUEUED  # it was ended at the end of its lease
    # The second death counts also if the first is only known of by what the server has forgotten.
    run = at(JobRun(worker.executor._bench, replace(row, kill_count=0)))
    run.journal.touched = run.journal.killed = True
    assert (await run._ending(lost)).outcome is Outcome.QUARANTINED


async def test_what_is_tried_again_waits_as_long_as_was_drawn_and_says_why(worker: Worker) -> None:
    bench = replace(worker.executor._bench, draw=lambda low, high: high)
    row = (await a_run(worker)).row
    burst = NodeFailed("it burst")
    for tried, times in ((0, 1), (1, 2)):
        run = at(JobRun(bench, replace(row, retries_attempted=tried)))
        run.journal.touched = True
        assert await run._ending(burst) == Ending(
            Outcome.REQUEUED, error=burst.as_dict(), delay=bench.policy.first * times
        )
    run = at(JobRun(bench, replace(row, retry_limit=0)))
    run.journal.touched = True
    assert await run._ending(burst) == Ending(Outcome.FAILED, error=burst.as_dict())
    # The server died under an earlier prompt, and this attempt fails by itself: that death counts all the same.
    for limit, outcome in ((None, Outcome.REQUEUED), (0, Outcome.FAILED)):
        run = at(JobRun(bench, replace(row, retry_limit=limit)))
        run.journal.killed = True
        ending = await run._ending(burst)
        assert (ending.outcome, ending.killed_machine, ending.end_prompt) == (outcome, True, False)


async def test_the_prompt_of_an_earlier_attempt_is_not_forgotten_by_a_run_that_never_got_to_it(worker: Worker) -> None:
    row = (await a_run(worker)).row
    burst = NodeFailed("it burst")
    for limit in (None, 0):
        for earlier, gone, touched in (
            (EARLIER, False, False),
            (EARLIER, True, False),
            (EARLIER, False, True),
            (None, False, False),
        ):
            run = at(JobRun(worker.executor._bench, replace(row, retry_limit=limit)), server_gone=gone)
            run.journal._earlier, run.journal.touched = earlier, touched
            assert (await run._ending(burst)).end_prompt == (earlier is not None and not gone and not touched)


async def test_a_run_that_this_computer_or_the_database_ends_is_put_back_at_no_cost(worker: Worker) -> None:
    row, queue = (await a_run(worker)).row, worker.queue
    silent, refused = ServerUnreachable("silent"), StoreUnavailable("locked")
    for error, pauses in ((refused, []), (silent, [silent.code])):
        run = at(JobRun(worker.executor._bench, row), "server")
        run.journal.touched = run.journal.killed = True
        assert await run._ending(error) == Ending(
            Outcome.PUT_BACK, error=error.as_dict(), keeps_prompt=True, killed_machine=error is silent
        )
        assert [pause.reason for pause in await queue.pauses()] == pauses
    run = at(JobRun(worker.executor._bench, row), "server")
    run._asked_back = run.journal.touched = True
    assert await run._ending(PromptRemoved("it is not there")) == Ending(Outcome.PUT_BACK)  # taken back by ourselves
    assert not run._keeps(silent)
    run = at(JobRun(worker.executor._bench, row), "server")
    run.journal.touched = True
    assert (await run._ending(PromptRemoved("it is not there"))).error is not None  # somebody else did


async def test_only_a_run_with_which_its_job_has_ended_for_good_counts_as_failed(worker: Worker) -> None:
    run = await a_run(worker)
    burst = NodeFailed("it burst")
    for outcome, failed in (
        (Outcome.FAILED, True),
        (Outcome.REQUEUED, False),
        (Outcome.QUARANTINED, True),
        (Outcome.PUT_BACK, False),
    ):
        run._tell_ending(Ending(outcome), burst, None)
        assert run.failed == failed


@pytest.mark.fault(55)
async def test_a_run_that_does_not_count_is_over_also_if_the_database_cannot_say_whose_the_job_is(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal says nothing against the claim: only what is read does."""
    run = await a_run(worker)
    troubles: list[LocalError | None] = []
    run._bench = replace(run._bench, trouble=troubles.append)

    async def refused(_: Any) -> None:
        raise StoreUnavailable("locked")

    await run._insist_on_claim()
    with monkeypatch.context() as locked:
        locked.setattr(run._bench.store, "job", refused, raising=False)
        await run._insist_on_claim()
        await run._discard()
    assert [type(trouble) for trouble in troubles] == [StoreUnavailable] * 2
    assert "another worker has taken it over" in worker.said[-1]
    await worker.queue.cancel(run.row.id)
    with pytest.raises(LeaseLost):
        await run._insist_on_claim()
    await run._discard()
    assert worker.said[-1].endswith(": cancelled")


@pytest.mark.fault(55)
async def test_an_end_that_cannot_be_written_down_leaves_the_claim_open_for_the_next_worker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        fresh = False

    async def refused(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("locked")

    run = await a_run(worker)
    assert (run.unwritten, run.failed) == (False, False)
    monkeypatch.setattr(run.journal, "_pulse", Stopped())
    with monkeypatch.context() as locked:
        locked.setattr(run._bench.store, "finish", refused, raising=False)
        await run._conclude(NodeFailed("it burst"))
    assert (run.unwritten, run.failed) == (True, False)
    assert "could not be written down" in worker.said[-1]
    assert (await worker.queue.job(run.row.id)).status is QueueStatus.PROCESSING
    again = JobRun(worker.executor._bench, replace(run.row, retry_limit=0))
    await again._conclude(NodeFailed("it burst"))
    assert (again.unwritten, again.failed) == (False, True)
