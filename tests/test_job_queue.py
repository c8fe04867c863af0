"""The queue as programs use it: jobs in, answers out, the same job for the same key, a log that can be followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.job_queue import EXECUTOR, INLINE, JobQueue, absolute, host_scope
from runcomfy.application.working_off import SURE, failed_here, left_behind, looks_done
from runcomfy.domain.exceptions import (
    IdempotencyConflict,
    JobBusy,
    JobNotFound,
    NameTaken,
    OutOfCredit,
    ValueInvalid,
    WorkflowFailed,
    WorkflowNotFound,
)
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import (
    DEFAULT_JOB_TYPE,
    QUEUE_SCOPE,
    Ending,
    EventKind,
    NewJob,
    Outcome,
    QueuedJob,
    QueueStatus,
    RowId,
    WorkerId,
)
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.programs import EmulatedProcesses

LEASE = timedelta(seconds=60)
WORKER = WorkerId("worker-1")


@pytest.fixture
def settings(tmp_path: Path) -> QueueSettings:
    return QueueSettings(
        root=str(tmp_path),
        jobs_processing=str(tmp_path / "jobs" / "processing"),
        jobs_finished=str(tmp_path / "jobs" / "finished"),
        database=Secret(str(tmp_path / "queue.sqlite3")),
    )


def open_store(settings: QueueSettings, clock: LoopClock) -> SqlJobs:
    wake = timedelta(seconds=1)  # under virtual time nothing else passes between two looks
    return SqlJobs(store_from(settings.database, clock=clock, durable=False, wake_interval=wake))


@pytest_asyncio.fixture
async def store(settings: QueueSettings, clock: LoopClock) -> AsyncIterator[SqlJobs]:
    async with open_store(settings, clock) as store:
        yield store


@pytest.fixture
def queue(store: SqlJobs, settings: QueueSettings) -> JobQueue:
    return JobQueue(store, settings, processes=EmulatedProcesses())


async def take(store: SqlJobs, count: int = 1) -> list[QueuedJob]:
    return list(await store.claim(WORKER, count=count, lease=LEASE))


async def run(store: SqlJobs, outcome: Outcome = Outcome.DONE, *, after: float = 0) -> QueuedJob:
    """Do what a worker does, without doing anything."""
    [job] = await take(store)
    await asyncio.sleep(after)
    return await store.finish(
        job.id, job.token, Ending(outcome, reason="" if outcome is Outcome.DONE else "node-failed")
    )


# -- putting in --------------------------------------------------------------------------------------------


@pytest.mark.fault(57)
@pytest.mark.invariant("I10")
async def test_a_job_that_was_accepted_is_there_after_a_restart(
    store: SqlJobs, queue: JobQueue, settings: QueueSettings, clock: LoopClock
) -> None:
    job = await queue.enqueue(
        JobRequest("image_invert", image="/pictures/cat.png"),
        priority=20,
        job_type="T2I",
        metadata={"creator": "cli"},
        user="ada",
        project="cats",
        retry_limit=0,
        config_name="T2I_1_cat.yaml",
    )
    assert (job.status, job.priority, job.workflow_id) == (QueueStatus.PENDING, 20, "image_invert")
    await store.close()
    async with open_store(settings, clock) as again:
        found = await JobQueue(again, settings).job("T2I_1_cat.yaml")
        assert found == job
        assert (found.job_type, found.user, found.project, found.retry_limit) == ("T2I", "ada", "cats", 0)
        assert found.metadata == {"creator": "cli"}
        assert found.request == JobRequest("image_invert", image="/pictures/cat.png")


async def test_the_same_key_is_the_same_job_also_after_a_restart_and_after_its_end(
    store: SqlJobs, queue: JobQueue, settings: QueueSettings, clock: LoopClock
) -> None:
    request = JobRequest("image_invert", image="cat.png")
    first = await queue.enqueue(request, idempotency_key="order-17")
    assert (await queue.enqueue(request, idempotency_key="order-17")).uid == first.uid
    await run(store)
    await store.close()
    async with open_store(settings, clock) as again:
        queue = JobQueue(again, settings)
        repeated = await queue.enqueue(request, idempotency_key="order-17")
        assert (repeated.uid, repeated.status) == (first.uid, QueueStatus.DONE)
        with pytest.raises(IdempotencyConflict):
            await queue.enqueue(replace(request, prompt="another"), idempotency_key="order-17")
        assert sum((await queue.counts()).values()) == 1


async def test_what_could_never_run_is_not_accepted(store: SqlJobs, settings: QueueSettings) -> None:
    async def check(request: JobRequest) -> None:
        if request.workflow == "nowhere":
            raise WorkflowNotFound("there is no workflow nowhere")

    queue = JobQueue(store, settings, check=check)
    with pytest.raises(WorkflowNotFound):
        await queue.enqueue(JobRequest("nowhere"))
    with pytest.raises(WorkflowNotFound):
        await queue.enqueue_many([JobRequest("image_invert"), JobRequest("nowhere"), JobRequest("image_invert")])
    with pytest.raises(WorkflowNotFound):
        await queue.enqueue_many([JobRequest("image_invert"), JobRequest("nowhere")])
    for priority in (0, -3, 1000):
        with pytest.raises(ValueInvalid):
            await queue.enqueue(JobRequest("image_invert"), priority=priority)
    with pytest.raises(ValueInvalid):
        await queue.enqueue(JobRequest("image_invert"), retry_limit=-1)
    with pytest.raises(ValueInvalid):
        await queue.enqueue(JobRequest("image_invert"), idempotency_key="")
    assert await queue.list() == []


async def test_two_jobs_cannot_have_one_name(queue: JobQueue) -> None:
    await queue.enqueue(JobRequest("image_invert"), config_name="one.yaml")
    with pytest.raises(NameTaken):
        await queue.enqueue(JobRequest("image_invert"), config_name="one.yaml")


async def test_many_jobs_go_in_at_once_and_wait_by_priority_then_age(queue: JobQueue) -> None:
    graph = {"1": {"class_type": "EmptyImage", "inputs": {}}}
    jobs = await queue.enqueue_many(
        [
            JobRequest("image_invert"),
            NewJob(JobRequest(graph), "by-hand", priority=7),
            JobRequest(graph),
            NewJob(JobRequest("folder/own.json"), "own", priority=7),
        ]
    )
    assert [job.workflow_id for job in jobs] == ["image_invert", "by-hand", INLINE, "own"]
    assert len({job.config_name for job in jobs}) == 4
    waiting = await queue.list(status=QueueStatus.PENDING)
    assert [job.id for job in waiting] == [jobs[1].id, jobs[3].id, jobs[0].id, jobs[2].id]


def test_files_are_written_down_by_their_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "m.png").write_bytes(b"a mask")
    request = absolute(
        JobRequest(
            "flows/own.json",
            image="cat.png",
            sets={"1.image": "@dog.png", "1.text": "@@home", "1.steps": 4, "2.text": "@"},
            inputs={"mask": "@masks/m.png", "prompt": "a cat"},
            out_dir="out",
            out_file="out/cat.png",
        )
    )
    assert request == JobRequest(
        str(tmp_path / "flows" / "own.json"),
        image=str(tmp_path / "cat.png"),
        sets={"1.image": f"@{tmp_path / 'dog.png'}", "1.text": "@@home", "1.steps": 4, "2.text": "@"},
        inputs={"mask": f"@{tmp_path / 'masks' / 'm.png'}", "prompt": "a cat"},
        out_dir=str(tmp_path / "out"),
        out_file=str(tmp_path / "out" / "cat.png"),
    )
    assert absolute(JobRequest("image_invert")) == JobRequest("image_invert")


# -- waiting -----------------------------------------------------------------------------------------------


async def test_waiting_ends_when_the_job_has_ended(store: SqlJobs, queue: JobQueue, looptime: float) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    waiter = asyncio.create_task(queue.wait(job))
    await asyncio.sleep(5)
    assert not waiter.done()
    done = await run(store, after=300)
    waited = await waiter
    assert (waited.id, waited.status, waited.token) == (done.id, QueueStatus.DONE, done.token)
    assert looptime < 310
    assert await queue.wait(job.uid) == waited
    with pytest.raises(JobNotFound):
        await queue.wait("nobody.yaml")


async def test_waiting_has_a_limit_and_the_job_goes_on(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    with pytest.raises(TimeoutError):
        await queue.wait(job, timeout=timedelta(minutes=5))
    assert (await run(store)).status is QueueStatus.DONE


async def test_events_tell_a_jobs_life_and_end_with_its_last_word(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    other = await queue.enqueue(JobRequest("image_invert"), priority=900)

    async def listen() -> list[EventKind]:
        return [event.kind async for event in queue.events(job)]

    listener = asyncio.create_task(listen())
    await run(store, after=100)
    assert await listener == [EventKind.ENQUEUED, EventKind.CLAIMED, EventKind.DONE]
    assert await listen() == [EventKind.ENQUEUED, EventKind.CLAIMED, EventKind.DONE]
    assert (await queue.job(other)).status is QueueStatus.PENDING


async def test_events_of_a_job_that_is_retried_go_on(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    await run(store, Outcome.FAILED)
    await queue.retry(job)
    kinds: list[EventKind] = []

    async def listen() -> None:
        async for event in queue.events(job):
            kinds.append(event.kind)  # noqa: PERF401 - what was heard until now is looked at

    listener = asyncio.create_task(listen())
    await asyncio.sleep(30)
    assert kinds[-1] is EventKind.RETRIED
    assert EventKind.FAILED in kinds
    assert not listener.done()
    await run(store)
    await listener
    assert kinds[-2:] == [EventKind.CLAIMED, EventKind.DONE]


async def test_all_events_can_be_followed_from_any_number_on(store: SqlJobs, queue: JobQueue) -> None:
    for _ in range(3):
        await queue.enqueue(JobRequest("image_invert"))
    everything = []
    async with aclosing(queue.events()) as events:
        async for event in events:
            everything.append(event)
            if len(everything) == 3:
                break
    assert [event.number for event in everything] == sorted(event.number for event in everything)

    async def next_one() -> EventKind:
        async with aclosing(queue.events(after=everything[-1].number)) as events:
            async for event in events:
                return event.kind
        raise AssertionError

    listener = asyncio.create_task(next_one())
    await asyncio.sleep(10)
    assert not listener.done()
    await take(store)
    assert await listener is EventKind.CLAIMED


async def test_a_job_is_followed_by_its_progress(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    seen: list[tuple[QueueStatus, float, str]] = []

    async def follow() -> None:
        async for now in queue.follow(job):
            seen.append((now.status, now.progress, now.message))  # noqa: PERF401

    follower = asyncio.create_task(follow())
    await asyncio.sleep(5)
    [claimed] = await take(store)
    for percent in (25.0, 75.0):
        await asyncio.sleep(5)
        await store.report(WORKER, {claimed.id: (percent, "sampling")})
    await asyncio.sleep(5)
    await store.finish(claimed.id, claimed.token, Ending(Outcome.DONE))
    await follower
    assert seen[0][0] is QueueStatus.PENDING
    assert (QueueStatus.PROCESSING, 25.0, "sampling") in seen
    assert (QueueStatus.PROCESSING, 75.0, "sampling") in seen
    assert seen[-1][0] is QueueStatus.DONE
    assert len(seen) == len(set(seen))


# -- asking ------------------------------------------------------------------------------------------------


async def test_priorities_are_clamped_and_god_mode_goes_first(store: SqlJobs, queue: JobQueue) -> None:
    first, second, third = await queue.enqueue_many([JobRequest("image_invert")] * 3)
    assert (await queue.set_priority(first, 5_000)).priority == 999
    assert (await queue.god_mode(third)).priority == 1
    assert [job.id for job in await take(store, 3)] == [third.id, second.id, first.id]


async def test_a_cancelled_job_is_failed_and_only_a_retry_starts_it_again(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    cancelled = await queue.cancel(job, by="ada")
    assert (cancelled.status, cancelled.reason, cancelled.cancelled) == (QueueStatus.FAILED, "cancelled", True)
    assert await take(store) == []
    assert (await queue.wait(job)).cancelled
    assert (await queue.retry(job)).status is QueueStatus.PENDING
    assert [found.id for found in await take(store)] == [job.id]


async def test_who_changed_a_job_by_hand_is_in_its_story(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    assert job.job_type == DEFAULT_JOB_TYPE
    typed = await queue.enqueue_many([NewJob(JobRequest("image_invert"), "w", job_type=kind) for kind in ("T2I", "")])
    assert [one.job_type for one in typed] == ["T2I", DEFAULT_JOB_TYPE]
    assert (await queue.set_priority(job, 7, by="ada")).priority == 7
    await queue.cancel(job, by="ben")
    await queue.retry(job, by="eve")
    events = (await queue.show(job)).events
    assert [event.data.get("by") for event in events] == [None, "ada", "ben", "eve"]


async def test_the_queue_is_paused_and_resumed(queue: JobQueue) -> None:
    pause = await queue.pause("the night is short", by="ada")
    assert (pause.scope, pause.reason, pause.message, pause.until) == (QUEUE_SCOPE, "asked", "the night is short", None)
    assert await queue.pauses() == [pause]
    assert await queue.resume() == [pause]
    assert await queue.pauses() == []


async def test_a_jobs_story_has_everything(store: SqlJobs, queue: JobQueue) -> None:
    job = await queue.enqueue(JobRequest("image_invert"))
    await run(store, Outcome.REQUEUED)
    done = await run(store)
    story = await queue.show(job.uid)
    assert story.job == done
    assert [attempt.outcome for attempt in story.attempts] == [Outcome.REQUEUED, Outcome.DONE]
    assert [event.kind for event in story.events][-1] is EventKind.DONE
    with pytest.raises(JobNotFound):
        await queue.show(RowId(4711))


@pytest.mark.parametrize("page", [1, 2, 4, 5])
async def test_a_long_story_is_told_whole_in_its_order(
    store: SqlJobs, queue: JobQueue, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    """Other jobs' events lie between its own; a page may be full with the last of them."""
    job, other = await queue.enqueue_many([JobRequest("image_invert"), JobRequest("image_invert")])
    for priority in (60, 70, 80):
        await queue.set_priority(job, priority)
        await queue.set_priority(other, priority)
    every = list(await store.events(job_id=job.id))
    assert len(every) == 4
    monkeypatch.setattr("runcomfy.application.job_queue.EVENTS_AT_ONCE", page)
    assert (await queue.show(job)).events == every


async def test_workers_are_the_executors_that_live(store: SqlJobs, settings: QueueSettings, clock: LoopClock) -> None:
    processes = EmulatedProcesses()
    queue = JobQueue(store, settings, processes=processes)
    owners = [replace(processes.me(now=clock.now()), command=f"comfyctl {EXECUTOR}") for _ in range(3)]
    for owner in (*owners, processes.me(now=clock.now())):
        await store.register_owner(owner)
    await store.sign_off(owners[0].id)
    processes.dead.add(owners[1].id)
    assert [owner.id for owner in await queue.workers()] == [owners[2].id]
    assert host_scope(replace(owners[0], host="studio/boot-1/ns")) == "host:studio"


async def test_what_was_accepted_under_its_key_stays_accepted_when_its_files_are_gone(
    store: SqlJobs, settings: QueueSettings, tmp_path: Path
) -> None:
    """I16: the client repeats its call after a lost answer; the picture was a temporary file."""
    picture = tmp_path / "render.png"
    picture.write_bytes(b"a picture")

    async def check(request: JobRequest) -> None:
        if not await asyncio.to_thread(picture.is_file):
            raise WorkflowNotFound(f"{request.image} is gone")

    queue = JobQueue(store, settings, check=check)
    request = JobRequest("image_invert", image=str(picture))
    first = await queue.enqueue(request, idempotency_key="order-18")
    picture.unlink()
    assert (await queue.enqueue(request, idempotency_key="order-18")).uid == first.uid
    with pytest.raises(WorkflowNotFound):
        await queue.enqueue(request, idempotency_key="order-19")


def test_a_text_that_begins_with_an_at_sign_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "depth.png").write_bytes(b"a picture")
    request = JobRequest("image_invert", inputs={"prompt": "@somebody, in oil", "image": "@depth.png", "steps": 3})
    assert absolute(request).inputs == {
        "prompt": "@somebody, in oil",
        "image": f"@{tmp_path / 'depth.png'}",
        "steps": 3,
    }


# -- working it off ------------------------------------------------------------------------------------------


async def test_a_queue_is_done_when_nothing_waits_or_when_what_waits_may_begin_nowhere(
    store: SqlJobs, queue: JobQueue
) -> None:
    async def look(before: int = 0) -> int:
        return await looks_done(store, [], None, before=before)

    assert await look() == SURE
    await queue.enqueue(JobRequest("image_invert", image="cat.png"))
    assert (await look(), await look(1)) == (1, 2)  # it could be begun, and was not: once may be chance
    pause = await store.pause(scope=QUEUE_SCOPE, reason="asked", message="")
    assert await looks_done(store, [], pause, before=0) == SURE
    await store.resume()
    [job] = await take(store)
    later = Ending(Outcome.REQUEUED, reason="node-failed", delay=timedelta(minutes=5))
    await store.finish(job.id, job.token, later)
    assert await look(1) == 0  # one that waits for its time


async def test_what_is_left_in_a_queue_is_an_error_of_what_keeps_it_there(store: SqlJobs, queue: JobQueue) -> None:
    assert await left_behind(store, None) is None
    await queue.enqueue(JobRequest("image_invert", image="cat.png"))
    busy = await left_behind(store, None)
    assert isinstance(busy, JobBusy)
    assert busy.message.startswith("1 job is left undone: another worker")
    await queue.enqueue(JobRequest("image_invert", image="dog.png"))
    pause = await store.pause(scope=QUEUE_SCOPE, reason=OutOfCredit.code, message="no money")
    poor = await left_behind(store, pause)
    assert type(poor) is OutOfCredit
    assert (poor.message, poor.details) == ("2 jobs are left undone, paused: no money", {"jobs_left": 2})
    asked = await left_behind(store, replace(pause, reason="asked", message=""))
    assert isinstance(asked, JobBusy)
    assert asked.message == "2 jobs are left undone, paused: asked"


def test_jobs_that_failed_here_are_an_error_that_counts_them() -> None:
    assert failed_here(0) is None
    for count, words in ((1, "1 job failed in this run"), (3, "3 jobs failed in this run")):
        error = failed_here(count)
        assert isinstance(error, WorkflowFailed)
        assert (error.message, error.details) == (words, {"jobs_failed": count})
