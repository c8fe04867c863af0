"""Workers of the queue on an emulated ComfyUI: order, retries, pauses, cancellation, draining, and many at once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.domain.exceptions import JobBusy, JobNotFound
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, NewJob, Outcome, Phase, QueuedJob, QueueStatus, RowId
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.worker_stories import is_in as _phase_is
from runcomfy.testing.worker_stories import kinds, picture, ran, when
from runcomfy.testing.workers import Worker, Workers

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


def failing(kind: str = "error") -> dict[str, Any]:
    inputs = {"kind": kind, "message": "it burst", "steps": 2, "at_step": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "EmulatorFail", "inputs": {"image": ["1", 0], **inputs}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "never"}},
    }


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


async def test_a_flaky_server_costs_two_retries(worker: Worker, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("GET", "/view", Fault.page(), times=8)
    job = await worker.queue.wait(await worker.queue.enqueue(JobRequest(picture())))
    assert job.status is QueueStatus.DONE
    assert job.retries_attempted == 2
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


def results(worker: Worker) -> list[Path]:
    return sorted(Path(worker.executor.settings.jobs_finished).rglob("*.png"))


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
