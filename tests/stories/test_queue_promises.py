"""
What the queue promises whoever puts a job in: accepted is durable, one end, whole results, bounded tries, one key.

Each story is told on both kinds of database; the emulated server's run log and the files on the disk are the oracles.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from PIL import Image

from runcomfy.application.job_queue import JobQueue
from runcomfy.domain.exceptions import IdempotencyConflict
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, NewJob, Outcome, Phase, QueuedJob, QueueStatus
from runcomfy.testing.emulators.comfyui import Fault, PromptFault, SocketFault, corruption
from runcomfy.testing.queue_programs import QueuePrograms, failing

FOR_EVER = float("inf")


async def outcomes(programs: QueuePrograms, job: QueuedJob) -> list[Outcome | None]:
    return [attempt.outcome for attempt in (await programs.queue.show(job)).attempts]


# -- accepted is durable, and has one end (I10) ----------------------------------------------------------------


@pytest.mark.invariant("I10")
async def test_whatever_is_accepted_ends_as_done_failed_or_cancelled_and_stays_so(programs: QueuePrograms) -> None:
    """I10: one last word each, whatever the job is like."""
    good = await programs.put(1, seconds=2)
    bad = await programs.queue.enqueue(JobRequest("no_such_workflow"))
    bursting = await programs.queue.enqueue(JobRequest(failing()), retry_limit=1)
    unwanted = await programs.put(2, seconds=300)
    worker = await programs.start(slots=4)
    await programs.when(lambda: _phase(programs, unwanted, Phase.SUBMITTED), "all of them run")
    await programs.queue.cancel(unwanted)
    ends = [await programs.queue.wait(job) for job in (good, bad, bursting, unwanted)]
    assert [(job.status, job.reason) for job in ends] == [
        (QueueStatus.DONE, ""),
        (QueueStatus.FAILED, "workflow-not-found"),
        (QueueStatus.FAILED, "node-failed"),
        (QueueStatus.FAILED, "cancelled"),
    ]
    await worker.end()
    await programs.start()
    await asyncio.sleep(120)
    again = [await programs.queue.job(job) for job in ends]
    assert [(job.status, job.token, job.run_count) for job in again] == [
        (job.status, job.token, job.run_count) for job in ends
    ]
    assert await programs.complaints() == []


async def _phase(programs: QueuePrograms, job: QueuedJob, phase: Phase) -> bool:
    return (await programs.queue.job(job)).phase is phase


# -- bounded tries (I14) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own_limit", "runs"), [(None, 3), (0, 1), (4, 5)], ids=["global", "none", "four"])
@pytest.mark.invariant("I14")
async def test_a_failure_that_may_pass_is_tried_as_often_as_the_limit_says(
    programs: QueuePrograms, own_limit: int | None, runs: int
) -> None:
    """I14: limit 2 means three runs; a job's own limit wins; every attempt has its own error."""
    await programs.start()
    job = await programs.queue.enqueue(JobRequest(failing()), retry_limit=own_limit)
    job = await programs.queue.wait(job)
    assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.FAILED, runs, runs - 1)
    assert await programs.runs(job) == ["error"] * runs
    story = await programs.queue.show(job)
    assert [attempt.outcome for attempt in story.attempts] == [Outcome.REQUEUED] * (runs - 1) + [Outcome.FAILED]
    assert [attempt.run for attempt in story.attempts] == list(range(1, runs + 1))
    assert len({attempt.prompt_id for attempt in story.attempts}) == runs
    assert all("it burst" in attempt.error_trace for attempt in story.attempts)
    assert await programs.complaints() == []


@pytest.mark.fault(36)
@pytest.mark.invariant("I14")
async def test_what_could_never_run_is_not_tried_again(programs: QueuePrograms) -> None:
    """I14: validation fails at once, and costs no run."""
    await programs.start()
    unknown = {"1": {"class_type": "NoSuchNode", "inputs": {}}}
    programs.comfyui.faults.add("POST", "/prompt", Fault.error(400, body=b'{"error": {"message": "no"}}'))
    refused = await programs.put(1)
    jobs = [refused, await programs.queue.enqueue(JobRequest(unknown))]
    ends = [await programs.queue.wait(job) for job in jobs]
    assert [job.reason for job in ends] == ["prompt-rejected", "preflight-failed"]
    assert [job.retries_attempted for job in ends] == [0, 0]
    assert [len((await programs.queue.show(job)).attempts) for job in ends] == [1, 1]
    assert programs.comfyui.run_log == []


@pytest.mark.fault(38)
@pytest.mark.invariant("I14")
async def test_a_job_under_which_the_server_dies_twice_is_taken_out(programs: QueuePrograms) -> None:
    """I14: quarantined, with its reason; the other jobs go on."""
    await programs.start()
    killer = await programs.put(1, seconds=300)
    for number in (1, 2):
        await programs.began(number)
        await asyncio.sleep(5)
        await programs.comfyui.restart()
    killer = await programs.queue.wait(killer)
    assert (killer.status, killer.reason, killer.run_count) == (QueueStatus.FAILED, "quarantined", 2)
    harmless = await programs.queue.wait(await programs.put(2))
    assert harmless.status is QueueStatus.DONE
    assert await programs.runs(killer) == ["lost", "lost"]
    assert await programs.complaints() == []


async def test_a_job_whose_workers_die_three_times_is_taken_out_and_its_prompt_ended(programs: QueuePrograms) -> None:
    """I14: three leases lost in a row; its one prompt does not go on running for nobody."""
    job = await programs.put(seconds=250)
    for number in range(3):
        worker = await programs.start()
        await programs.when(lambda: _is(programs, job, QueueStatus.PROCESSING), "somebody works on it")
        await programs.began()
        await asyncio.sleep(3)
        assert (await programs.queue.job(job)).lost_count == number
        await worker.kill()
    await programs.start()
    job = await programs.queue.wait(job)
    assert (job.reason, job.lost_count, job.run_count) == ("quarantined", 3, 1)
    assert await outcomes(programs, job) == [Outcome.LOST, Outcome.LOST, Outcome.QUARANTINED]
    await programs.when(lambda: _phase(programs, job, Phase.NONE), "its prompt was seen ended", within=60)
    assert await programs.runs(job) == ["interrupted"]
    assert await programs.complaints() == []


async def _is(programs: QueuePrograms, job: QueuedJob, status: QueueStatus) -> bool:
    return (await programs.queue.job(job)).status is status


# -- whole results (I15) -----------------------------------------------------------------------------------------


@pytest.mark.fault(51)
@pytest.mark.parametrize("how", [corruption.bad_crc, corruption.cut_idat, corruption.empty])
async def test_a_result_that_arrives_broken_is_not_done_but_fetched_by_another_run(
    programs: QueuePrograms, how: Any
) -> None:
    """I15: what does not decode is no result; the next run's is whole."""
    programs.comfyui.faults.add("GET", "/view", Fault.corrupted(how), times=FOR_EVER)
    await programs.start()
    job = await programs.put()
    await programs.when(lambda: _retried(programs, job), "the first run fails")
    assert not programs.target().exists()
    programs.comfyui.faults.clear()
    job = await programs.queue.wait(job)
    assert job.status is QueueStatus.DONE
    assert job.retries_attempted >= 1
    attempts = (await programs.queue.show(job)).attempts
    assert attempts[0].error_code in ("output-corrupt", "download-failed")
    assert [attempt.outcome for attempt in attempts] == [Outcome.REQUEUED] * job.retries_attempted + [Outcome.DONE]
    assert await programs.complaints() == []


async def _retried(programs: QueuePrograms, job: QueuedJob) -> bool:
    return (await programs.queue.job(job)).retries_attempted > 0


@pytest.mark.fault(50)
@pytest.mark.invariant("I15")
async def test_a_result_that_never_arrives_whole_fails_and_leaves_nothing_at_its_path(programs: QueuePrograms) -> None:
    """I15: no file where a result would be."""
    programs.comfyui.faults.add("GET", "/view", Fault.page(), times=FOR_EVER)
    await programs.start()
    job = await programs.queue.wait(await programs.put())
    assert (job.status, job.run_count) == (QueueStatus.FAILED, 3)
    assert job.reason in ("output-corrupt", "download-failed")
    assert not programs.target().exists()


@pytest.mark.fault(42)
async def test_a_success_without_outputs_is_not_done(programs: QueuePrograms) -> None:
    """I15: there is nothing to show for it, so it is run again."""
    programs.comfyui.faults.add_prompt(PromptFault(no_outputs=True))
    await programs.start()
    job = await programs.queue.wait(await programs.put())
    assert job.status is QueueStatus.DONE
    assert await outcomes(programs, job) == [Outcome.REQUEUED, Outcome.DONE]
    assert await programs.complaints() == []


@pytest.mark.fault(37)
async def test_a_prompt_that_vanishes_is_run_again_after_proof(programs: QueuePrograms) -> None:
    """I12: missed in queue and history more than once, on a server that did not restart."""
    programs.comfyui.faults.add_prompt(PromptFault(vanish="end"))
    await programs.start()
    job = await programs.queue.wait(await programs.put(seconds=3))
    assert (job.status, job.run_count) == (QueueStatus.DONE, 2)
    with Image.open(programs.target()) as picture:
        picture.load()
    assert await programs.complaints() == []


# -- one key, one job (I16) --------------------------------------------------------------------------------------


@pytest.mark.invariant("I16")
async def test_a_key_is_the_same_job_for_ever_and_never_another(programs: QueuePrograms) -> None:
    """I16: before, while and after it runs, over restarts, from any program; another body is an error."""
    request = programs.request(1, seconds=5)
    first = await programs.queue.enqueue(request, idempotency_key="order-17")
    worker = await programs.start()
    await programs.began()
    assert (await programs.queue.enqueue(request, idempotency_key="order-17")).uid == first.uid
    done = await programs.queue.wait(first)
    await worker.end()
    async with programs.open() as store:
        queue = JobQueue(store, programs.queue_settings)
        again = await queue.enqueue(request, idempotency_key="order-17")
        assert (again.uid, again.status, again.result) == (first.uid, QueueStatus.DONE, done.result)
        for other in (replace(request, seed=5), programs.request(2)):
            with pytest.raises(IdempotencyConflict):
                await queue.enqueue(other, idempotency_key="order-17")
        with pytest.raises(IdempotencyConflict):
            await queue.enqueue(request, idempotency_key="order-17", priority=3)
    assert len(await programs.queue.list()) == 1
    assert len(programs.comfyui.run_log) == 1


@pytest.mark.invariant("I16")
async def test_two_programs_that_use_one_key_in_the_same_moment_have_one_job(programs: QueuePrograms) -> None:
    """I16: a race has one winner, and the other gets the winner's job."""
    async with programs.open() as one, programs.open() as two:
        for number in range(10):
            key = f"order-{number}"
            jobs = await asyncio.gather(
                *(
                    JobQueue(store, programs.queue_settings).enqueue(programs.request(number), idempotency_key=key)
                    for store in (one, two, one, two)
                )
            )
            assert len({job.uid for job in jobs}) == 1
    everything = await programs.queue.list()
    assert len(everything) == 10
    events = await programs.store.events()
    assert [event.kind for event in events] == [EventKind.ENQUEUED] * 10


@pytest.mark.invariant("I16")
async def test_two_bodies_under_one_key_in_the_same_moment_are_one_job_and_one_error(programs: QueuePrograms) -> None:
    """I16: whoever was second is told, and nothing of his is accepted."""
    async with programs.open() as one, programs.open() as two:
        results = await asyncio.gather(
            JobQueue(one, programs.queue_settings).enqueue(programs.request(1), idempotency_key="k"),
            JobQueue(two, programs.queue_settings).enqueue_many(
                [NewJob(programs.request(3), "w"), NewJob(programs.request(2), "w", idempotency_key="k")]
            ),
            return_exceptions=True,
        )
    assert sum(isinstance(result, IdempotencyConflict) for result in results) == 1
    assert len(await programs.queue.list()) in (1, 2)
    keyed = [job for job in await programs.queue.list() if job.idempotency_key == "k"]
    assert len(keyed) == 1
    if isinstance(results[1], IdempotencyConflict):
        assert len(await programs.queue.list()) == 1  # all or none


# -- truth is polled (I18) ---------------------------------------------------------------------------------------


SOCKETS = {
    "heard": SocketFault(),
    "refused": SocketFault(refuse=403),
    "half-open": SocketFault(silent_after=0),
    "cut": SocketFault(abort_after=1),
}


@pytest.mark.invariant("I18")
async def test_losing_every_frame_changes_nothing_but_a_poll_periods_delay(programs: QueuePrograms) -> None:
    """I18: outcome, runs and files are the same; it takes at most one poll period longer."""
    await programs.start()
    took: dict[str, float] = {}
    for number, (name, fault) in enumerate(SOCKETS.items()):
        programs.comfyui.faults.clear()
        programs.comfyui.cut_sockets()
        await asyncio.sleep(30)
        programs.comfyui.faults.add_socket(fault, times=FOR_EVER)
        job = await programs.queue.wait(await programs.put(number, seconds=20))
        assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0), name
        assert await programs.runs(job) == ["success"], name
        assert job.duration is not None
        took[name] = job.duration
    poll = programs.settings.comfy.poll_interval / timedelta(seconds=1)
    assert max(took.values()) <= took["heard"] + poll + 1
    assert await programs.complaints() == []
