"""
Programs that stand still for minutes and wake up when others have gone on: nothing of theirs counts any more.

A frozen program is not dead: its process is in the table, it finds its variables as they were, and the next thing it
does is what it was about to do.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import text

from runcomfy.application.planner import PLANNER
from runcomfy.domain.queued import EventKind, Outcome, QueuedJob, QueueStatus, WorkerId
from runcomfy.testing.queue_programs import Program, QueuePrograms

LONG = 180.0
"""Seconds for which somebody stands still: three leases."""


async def stands_still_at(programs: QueuePrograms, point: str) -> Program:
    program = await programs.start(works=False)
    reached = program.fate.stop_at(point)
    program.begin()
    async with asyncio.timeout(60):
        await reached.wait()
    return program


def mark_of(programs: QueuePrograms) -> tuple[int, int, bytes]:
    found = programs.target().stat()
    return found.st_ino, found.st_mtime_ns, programs.target().read_bytes()


async def outcomes(programs: QueuePrograms, job: QueuedJob) -> list[Outcome | None]:
    return [attempt.outcome for attempt in (await programs.queue.show(job)).attempts]


# -- a stale worker ------------------------------------------------------------------------------------------


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    "point",
    [
        "after store.claim",
        "before store.write_ahead",
        "before comfyui.submit",
        "after comfyui.submit",
        "before comfyui.history",
        "before comfyui.fetch",
        "before store.finish",
    ],
)
@pytest.mark.invariant("I11")
async def test_a_worker_that_wakes_after_somebody_else_finished_its_job_changes_nothing(
    programs: QueuePrograms, point: str
) -> None:
    """I11: nothing is published, its attempt says discarded, and it tells."""
    job = await programs.put(seconds=5)
    stale = await stands_still_at(programs, point)
    await programs.start()
    job = await programs.queue.wait(job)
    assert job.status is QueueStatus.DONE
    await asyncio.sleep(LONG)
    before = mark_of(programs)

    stale.wake()
    await asyncio.sleep(30)

    assert mark_of(programs) == before
    now = await programs.queue.job(job)
    assert (now.status, now.token, now.result, now.end_time) == (job.status, job.token, job.result, job.end_time)
    assert any("taken it over" in said or "discarded" in said for said in stale.said), stale.said
    assert (await outcomes(programs, job))[-1] is Outcome.DONE
    assert (await outcomes(programs, job)).count(Outcome.DONE) == 1
    # What was sent once more under the same id was known to the server already.
    assert [record.nodes for record in programs.comfyui.run_log if record.nodes] == [["1", "2"]]
    if point != "before comfyui.submit":
        assert await programs.complaints() == []


@pytest.mark.fault(64)
@pytest.mark.invariant("I11")
async def test_a_late_result_is_discarded_and_told(programs: QueuePrograms) -> None:
    """I11: the commit itself is refused; the attempt's row and the event log say what became of it."""
    job = await programs.put(seconds=5)
    stale = await stands_still_at(programs, "before store.finish")
    await programs.start()
    job = await programs.queue.wait(job)
    stale.wake()
    await programs.when(lambda: stale.said, "the stale one says what became of its result")
    assert await outcomes(programs, job) == [Outcome.DISCARDED, Outcome.DONE]
    assert EventKind.DISCARDED in await programs.kinds(job)
    assert "discarded" in stale.said[-1]
    assert [path.name for path in programs.target().parent.iterdir()] == ["1.png"]
    assert await programs.complaints() == []


@pytest.mark.fault(64)
async def test_a_worker_that_stood_still_and_was_not_missed_goes_on(programs: QueuePrograms) -> None:
    """I11: nobody took its job, so its result counts."""
    job = await programs.put(seconds=5)
    sleeper = await stands_still_at(programs, "before store.finish")
    await asyncio.sleep(LONG)
    sleeper.wake()
    job = await programs.queue.wait(job)
    assert (job.status, job.run_count) == (QueueStatus.DONE, 1)
    assert await outcomes(programs, job) == [Outcome.DONE]
    assert await programs.complaints() == []


@pytest.mark.fault(64)
async def test_two_workers_that_take_turns_in_standing_still_do_the_job_once(programs: QueuePrograms) -> None:
    """I11, I14: each holds the job in turn; one of them commits."""
    job = await programs.put(seconds=5)
    first = await stands_still_at(programs, "before store.finish")
    second = await programs.start(works=False)
    reached = second.fate.stop_at("before store.finish")
    second.begin()
    await reached.wait()
    first.wake()
    await asyncio.sleep(5)
    assert (await programs.queue.job(job)).status is QueueStatus.PROCESSING
    second.wake()
    job = await programs.queue.wait(job)
    assert await outcomes(programs, job) == [Outcome.DISCARDED, Outcome.DONE]
    assert await programs.runs(job) == ["success"]
    assert await programs.complaints() == []


# -- one planner ---------------------------------------------------------------------------------------------


def planners(*programs: Program) -> list[Program]:
    return [program for program in programs if program.executor.planner.epoch is not None]


@pytest.mark.fault(63)
@pytest.mark.invariant("I19")
async def test_of_several_executors_one_plans_and_every_job_runs_once(programs: QueuePrograms) -> None:
    """I19, I11: all of them work, on one database and one server."""
    jobs = [await programs.put(number, seconds=4) for number in range(12)]
    workers = [await programs.start(slots=2) for _ in range(3)]
    for job in jobs:
        assert (await programs.queue.wait(job)).status is QueueStatus.DONE
        assert len(planners(*workers)) == 1
    assert len({(await programs.queue.show(job)).attempts[0].worker_id for job in jobs}) == 3
    assert await programs.complaints() == []
    assert len(programs.comfyui.run_log) == 12


@pytest.mark.fault(63)
@pytest.mark.parametrize("noticed", [True, False], ids=["same computer", "another computer"])
@pytest.mark.invariant("I19")
async def test_when_the_planner_is_killed_another_takes_its_place(programs: QueuePrograms, noticed: bool) -> None:
    """I19: at the next round if its death can be seen, else when the role's lease is over."""
    first = await programs.start()
    await programs.when(lambda: first.executor.planner.epoch, "the first plans")
    second = await programs.start()
    await asyncio.sleep(40)
    assert planners(first, second) == [first]
    await first.kill(noticed=noticed)
    await programs.when(
        lambda: second.executor.planner.epoch, "the second plans", within=16 if noticed else 60 + 15 + 1
    )
    assert second.executor.planner.epoch == (first.executor.planner.epoch or 0) + 1


@pytest.mark.fault(63)
async def test_a_planner_that_ends_in_good_order_gives_its_role_to_the_next(programs: QueuePrograms) -> None:
    """I19: nobody waits for its lease."""
    first = await programs.start()
    await programs.when(lambda: first.executor.planner.epoch, "the first plans")
    second = await programs.start()
    await first.end()
    await programs.when(lambda: second.executor.planner.epoch == 2, "the second plans", within=16)


@pytest.mark.fault(64)
@pytest.mark.invariant("I19")
async def test_a_planner_that_wakes_up_late_writes_nothing(programs: QueuePrograms) -> None:
    """I19: its epoch is over; what it was about to take back stays as it is until the real planner comes."""
    stale = await programs.start(works=False)
    stale.begin()
    await programs.when(lambda: stale.executor.planner.epoch, "the first plans")
    reached = stale.fate.stop_at("before store.reap")
    await reached.wait()
    real = await programs.start()
    await programs.when(lambda: real.executor.planner.epoch, "the second plans")
    await programs.queue.pause("so that the job is nobody's but the ghost's")
    job = await programs.put()
    # Between two rounds of the real planner there is a lease that is over.
    real.freeze()
    ghost = WorkerId("00000000-0000-4000-8000-00000000abcd")
    [held] = await programs.store.claim(ghost, count=1, lease=timedelta(seconds=1))
    await asyncio.sleep(5)
    events = len(await programs.store.events())

    stale.wake()
    await programs.when(lambda: stale.executor.planner.epoch is None, "it sees that it is not the planner", within=1)

    assert (await programs.queue.job(job)).token == held.token
    assert (await programs.queue.job(job)).status is QueueStatus.PROCESSING
    assert len(await programs.store.events()) == events
    real.wake()
    await programs.when(lambda: _is(programs, job, QueueStatus.PENDING), "the real one takes it back", within=20)
    assert real.executor.planner.epoch == await _epoch(programs)


async def _is(programs: QueuePrograms, job: QueuedJob, status: QueueStatus) -> bool:
    return (await programs.queue.job(job)).status is status


async def _epoch(programs: QueuePrograms) -> int:
    query = text("SELECT epoch FROM roles WHERE name = :name")
    return int(await programs.store.run(lambda connection: connection.execute(query, {"name": PLANNER}).scalar_one()))
