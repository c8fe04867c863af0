"""
Cancelling is final (I17): nothing starts and nothing is committed any more, and the prompt is ended by its own id.

Strangers use the same server: what they run is theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio

import workflows
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.job_files import YamlJobFiles
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.application.monitor import Monitor
from runcomfy.domain.job import JobRequest, PromptId
from runcomfy.domain.queued import EventKind, Outcome, Phase, QueuedJob, QueueStatus
from runcomfy.domain.secret import SecretUrl
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.queue_programs import Program, QueuePrograms, drawing, failing


@pytest_asyncio.fixture
async def stranger(programs: QueuePrograms, clock: LoopClock) -> AsyncIterator[ComfyUIWorkflowClient]:
    """Somebody who uses the same ComfyUI by hand."""
    client = ComfyUIWorkflowClient(SecretUrl(programs.comfyui.url), programs.settings.comfy, clock=clock)
    yield client
    await client.close()


async def submit(stranger: ComfyUIWorkflowClient, seconds: float) -> PromptId:
    prompt_id = PromptId(str(uuid4()))
    await stranger.submit(drawing(seconds, 999), prompt_id=prompt_id)
    return prompt_id


def outcome_of(programs: QueuePrograms, prompt_id: str) -> str:
    [found] = [record.outcome for record in programs.comfyui.run_log if record.prompt_id == prompt_id]
    return found


async def phase(programs: QueuePrograms, job: QueuedJob) -> Phase:
    return (await programs.queue.job(job)).phase


async def submitted(programs: QueuePrograms, job: QueuedJob) -> bool:
    return await phase(programs, job) is Phase.SUBMITTED


async def nothing_left(programs: QueuePrograms, job: QueuedJob) -> bool:
    return await phase(programs, job) is Phase.NONE


async def at_point(programs: QueuePrograms, point: str) -> Program:
    program = await programs.start(works=False)
    reached = program.fate.stop_at(point)
    program.begin()
    async with asyncio.timeout(60):
        await reached.wait()
    return program


def published(programs: QueuePrograms) -> list[str]:
    folder = Path(programs.queue_settings.jobs_finished)
    return sorted(path.name for path in folder.rglob("*.png") if "discarded" not in path.name)


# -- when ----------------------------------------------------------------------------------------------------


@pytest.mark.invariant("I17")
async def test_a_waiting_job_never_begins(programs: QueuePrograms) -> None:
    """I17."""
    job = await programs.put()
    cancelled = await programs.queue.cancel(job, by="ada")
    assert (cancelled.status, cancelled.reason) == (QueueStatus.FAILED, "cancelled")
    await programs.start()
    await asyncio.sleep(60)
    assert programs.comfyui.run_log == []
    assert await programs.complaints() == []


async def test_a_job_that_waits_for_its_retry_never_begins_again(programs: QueuePrograms) -> None:
    """I17: between two runs nothing is on a server."""
    job = await programs.queue.enqueue(JobRequest(failing()))
    worker = await at_point(programs, "after store.finish")
    assert (await programs.queue.job(job)).not_before is not None
    await programs.queue.cancel(job)
    worker.wake()
    await asyncio.sleep(60)
    assert (await programs.queue.job(job)).cancelled
    assert await programs.runs(job) == ["error"]
    assert await programs.complaints() == []


@pytest.mark.fault(69)
@pytest.mark.parametrize("first", ["ours runs", "theirs runs"])
@pytest.mark.invariant("I17")
async def test_a_job_at_the_server_is_ended_by_its_id_and_a_strangers_prompt_goes_on(
    programs: QueuePrograms, stranger: ComfyUIWorkflowClient, first: str
) -> None:
    """I17: interrupted if it runs, taken out of the queue if it waits; nobody else is hit."""
    theirs = await submit(stranger, 60) if first == "theirs runs" else None
    await programs.start()
    job = await programs.put(seconds=120)
    await programs.when(lambda: submitted(programs, job), "our prompt is at the server")
    if theirs is None:
        await programs.began()
        theirs = await submit(stranger, 60)
    await asyncio.sleep(3)

    await programs.queue.cancel(job)
    await programs.when(lambda: nothing_left(programs, job), "our prompt was seen ended", within=20)

    await programs.when(lambda: outcome_of(programs, str(theirs)) == "success", "theirs ends", within=200)
    assert await programs.runs(job) == (["interrupted"] if first == "ours runs" else [])
    assert (await programs.queue.job(job)).cancelled
    assert published(programs) == []
    assert (await programs.kinds(job))[-1] is EventKind.PROMPT_ENDED


# -- the race with the commit ----------------------------------------------------------------------------------


@pytest.mark.invariant("I17")
async def test_before_the_commit_the_cancellation_wins_and_nothing_is_published(programs: QueuePrograms) -> None:
    """I17, I11: what was fetched is kept under a name that says that it does not count."""
    job = await programs.put()
    worker = await at_point(programs, "before store.finish")
    await programs.queue.cancel(job)
    worker.wake()
    await asyncio.sleep(30)
    assert (await programs.queue.job(job)).cancelled
    assert published(programs) == []
    assert any("discarded" in path.name for path in programs.target().parent.iterdir())
    assert [attempt.outcome for attempt in (await programs.queue.show(job)).attempts][-1] in (
        Outcome.CANCELLED,
        Outcome.DISCARDED,
    )
    assert await programs.complaints() == []


async def test_after_the_commit_the_job_is_done(programs: QueuePrograms) -> None:
    """I17: a cancellation that comes too late says what the job is."""
    job = await programs.put()
    worker = await at_point(programs, "after store.finish")
    late = await programs.queue.cancel(job)
    assert (late.status, late.cancelled) == (QueueStatus.DONE, False)
    worker.wake()
    await asyncio.sleep(30)
    assert published(programs) == ["1.png"]
    assert await programs.complaints() == []


@pytest.mark.invariant("I17")
async def test_a_race_between_both_has_one_winner(programs: QueuePrograms) -> None:
    """I17: cancelled with nothing published, or done with a result; never both, never neither."""
    for number in range(12):
        job = await programs.put(number)
        worker = await at_point(programs, "before store.finish")
        worker.wake()
        for _ in range(number):  # a little later each time
            await asyncio.sleep(0)
        await programs.queue.cancel(job)
        await worker.end()
        job = await programs.queue.job(job)
        assert job.ended
        assert (job.status is QueueStatus.DONE) != job.cancelled
        assert programs.target(number).exists() == (job.status is QueueStatus.DONE)
    assert await programs.complaints() == []


# -- nobody is there to do it ----------------------------------------------------------------------------------


async def test_the_prompt_of_a_dead_worker_is_ended_by_the_next(programs: QueuePrograms) -> None:
    """I17: the row remembers what must still be ended, and where."""
    job = await programs.put(seconds=250)
    worker = await programs.start()
    await programs.began()
    await asyncio.sleep(3)
    await worker.kill()
    cancelled = await programs.queue.cancel(job)
    assert cancelled.phase is Phase.ENDING
    assert await programs.runs(job) == ["lost"]
    await programs.start()
    await programs.when(lambda: nothing_left(programs, job), "the prompt was seen ended", within=30)
    assert await programs.runs(job) == ["interrupted"]
    assert (await programs.queue.job(job)).cancelled
    assert published(programs) == []


async def test_a_worker_that_wakes_up_finds_its_job_cancelled(programs: QueuePrograms) -> None:
    """I17, I11: it stood still meanwhile; the prompt is ended when it wakes, and nothing is published."""
    job = await programs.put(seconds=250)
    worker = await at_point(programs, "after store.accepted")
    await programs.began()
    await programs.queue.cancel(job)
    await asyncio.sleep(20)
    worker.wake()
    await programs.when(lambda: nothing_left(programs, job), "the prompt was seen ended", within=30)
    assert await programs.runs(job) == ["interrupted"]
    assert published(programs) == []


# -- only a user's retry starts it again -----------------------------------------------------------------------


JOB_FILE = """\
job_type: T2I
workflow_id: wf_realistic_portrait
inputs:
  prompt: "{prompt}"
  seed: 1
  steps: 4
outputs:
  file_path: jobs/finished/image/knight.png
"""


async def test_a_cancelled_job_stays_so_however_often_its_file_is_looked_at(programs: QueuePrograms) -> None:
    """I17: the same file, a touched one, a changed one, a new monitor: only `retry` starts it again."""
    file = Path(programs.queue_settings.jobs_processing) / "image" / "T2I_20250809123001_1_knight.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(JOB_FILE.format(prompt="a knight"), encoding="utf-8")
    await _scan(programs)
    job = await programs.queue.cancel(file.name)
    await programs.start()
    for prompt in ("a knight", "a dragon"):
        file.write_text(JOB_FILE.format(prompt=prompt), encoding="utf-8")
        await _scan(programs)
        await asyncio.sleep(30)
        now = await programs.queue.job(job)
        assert (now.cancelled, now.token) == (True, job.token)
    assert programs.comfyui.run_log == []
    await programs.queue.retry(job)
    await _scan(programs)
    done = await programs.queue.wait(job)
    assert done.status is QueueStatus.DONE
    assert len(programs.comfyui.run_log) == 1


async def _scan(programs: QueuePrograms) -> None:
    settings = programs.queue_settings
    registry = WorkflowRegistry(root=settings.root, workflows_file=None, shipped=workflows.names)
    files = YamlJobFiles(settings, registry=registry)
    await Monitor(programs.store, files, settings, clock=programs.clock).once()


@pytest.mark.parametrize("there", ["worker lives", "worker died"])
@pytest.mark.invariant("I12")
async def test_a_retried_job_begins_when_its_old_prompt_was_seen_ended(programs: QueuePrograms, there: str) -> None:
    """I12, I17: never two prompts of one job at the same time."""
    job = await programs.put(seconds=100)
    worker = await programs.start()
    await programs.began()
    await asyncio.sleep(5)
    if there == "worker died":
        await worker.kill()
    await programs.queue.cancel(job)
    again = await programs.queue.retry(job)
    assert again.phase is Phase.ENDING
    if there == "worker died":
        await programs.start()
    job = await programs.queue.wait(job)
    assert job.status is QueueStatus.DONE
    assert await programs.runs(job) == ["interrupted", "success"]
    first, second = programs.comfyui.run_log
    assert first.ended is not None
    assert first.ended <= second.started
    assert await programs.complaints() == []
