"""
Executors that die at any step: whoever comes next goes on, and nothing runs twice.

The server's own run log is the oracle. A program dies at a call of one of its ports, before the call leaves or after
it had its effect; one that dies inside the commit has given the results their names and written nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.queued import EventKind, Outcome, Phase, QueueStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.queue_programs import PUBLISHED, Program, QueuePrograms

LEASE, HEARTBEAT, REAP = timedelta(seconds=20), timedelta(seconds=5), timedelta(seconds=5)
SHORT: dict[str, Any] = {"lease": LEASE, "heartbeat": HEARTBEAT, "reap_every": REAP}
FIRST, LAST = "before store.claim", "after results.commit"

POINTS = (
    "after store.claim",
    "before store.write_ahead",
    "after store.write_ahead",
    "before comfyui.submit",
    "after comfyui.submit",
    "after store.accepted",
    "before comfyui.fetch",
    "after comfyui.fetch",
    "before store.finish",
    PUBLISHED,
    "after store.finish",
)
"""The steps that a journal is about."""
SENT = POINTS.index("after comfyui.submit")


async def points_of_a_run(programs: QueuePrograms) -> list[str]:
    """Return every point that a program passes between its claim and its job's end, once each."""
    program = await programs.start()
    job = await programs.queue.wait(await programs.put(0, seconds=2))
    assert job.status is QueueStatus.DONE
    await program.end()
    passed = list(dict.fromkeys(program.fate.passed))
    return [*passed[passed.index(FIRST) : passed.index(LAST) + 1], PUBLISHED]


async def dies_at(programs: QueuePrograms, point: str, *, noticed: bool = True, **changes: Any) -> Program:
    program = await programs.start(works=False, **changes)
    reached = program.fate.stop_at(point)
    program.begin()
    async with asyncio.timeout(60):
        await reached.wait()
    await program.kill(noticed=noticed)
    return program


# -- at every step -------------------------------------------------------------------------------------------


@pytest.mark.invariant("I13")
async def test_whoever_dies_at_any_call_is_followed_by_one_who_goes_on_with_the_same_prompt(
    programs: QueuePrograms,
) -> None:
    """I12, I13, I20: one execution, one result, whatever the call that was never heard of again."""
    points: Sequence[str] = await points_of_a_run(programs)
    assert set(POINTS) <= set(points)
    if programs.store.dialect == "postgresql":
        points = POINTS  # what a program does in between does not depend on the database
    for number, point in enumerate(points, start=1):
        job = await programs.put(number, seconds=2)
        await dies_at(programs, point)
        heir = await programs.start()
        job = await programs.queue.wait(job, timeout=timedelta(seconds=30))
        await heir.end()
        assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0), point
        assert await programs.runs(job) == ["success"], point
        assert len(await programs.prompts(job)) == 1, point
    assert await programs.complaints() == []
    assert programs.litter() == []


async def test_a_death_that_nobody_sees_is_over_with_its_lease(programs: QueuePrograms, looptime: float) -> None:
    """I12, I20: another computer's worker is dead when its lease is over; a prompt it sent is gone on with."""
    for number, point in enumerate(POINTS):
        job = await programs.put(number, seconds=5)
        await dies_at(programs, point, noticed=False, **SHORT)
        died = float(looptime)
        heir = await programs.start(**SHORT)
        job = await programs.queue.wait(job)
        over_at_once = point == "after store.finish"
        assert looptime - died < (1 if over_at_once else (LEASE + REAP).total_seconds() + 10), point
        assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0), point
        assert await programs.runs(job) == ["success"], point
        kinds = await programs.kinds(job)
        assert (EventKind.ATTACHED in kinds) == (point in POINTS[SENT:-1]), point
        assert kinds.count(EventKind.LOST) == (not over_at_once), point
        outcomes = [attempt.outcome for attempt in (await programs.queue.show(job)).attempts]
        assert outcomes == ([Outcome.DONE] if over_at_once else [Outcome.LOST, Outcome.DONE]), point
        await heir.end()
    assert await programs.complaints() == []


# -- the server does strange things meanwhile ----------------------------------------------------------------


@pytest.mark.fault(34)
@pytest.mark.parametrize("dies", [False, True], ids=["worker lives", "worker dies"])
@pytest.mark.invariant("I13")
async def test_a_submission_without_an_answer_that_was_queued_is_found(programs: QueuePrograms, dies: bool) -> None:
    """I13: looked for by its id, never sent again."""
    programs.comfyui.faults.add("POST", "/prompt", Fault.never())
    job = await programs.put(seconds=40)
    first = await programs.start()
    await programs.began()
    if dies:
        await first.kill()
        await programs.start()
    job = await programs.queue.wait(job)
    assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0)
    assert await programs.runs(job) == ["success"]
    assert programs.comfyui.count("POST", "/prompt") == 1
    assert await programs.complaints() == []


@pytest.mark.fault(34)
async def test_a_submission_that_never_arrived_is_sent_under_the_same_id_and_is_no_second_run(
    programs: QueuePrograms,
) -> None:
    """I13: nothing was begun, so nothing is counted."""
    programs.comfyui.faults.add("POST", "/prompt", Fault.never(work=False))
    job = await programs.put(seconds=5)
    first = await programs.start()
    await programs.when(lambda: programs.comfyui.count("POST", "/prompt"), "the prompt is sent")
    await first.kill()
    await programs.start()
    job = await programs.queue.wait(job)
    assert (job.status, job.run_count, job.retries_attempted) == (QueueStatus.DONE, 1, 0)
    assert len(await programs.prompts(job)) == 1
    assert await programs.runs(job) == ["success"]
    assert await programs.complaints() == []


@pytest.mark.fault(35)
@pytest.mark.parametrize("dies", [False, True], ids=["worker lives", "worker dies"])
async def test_a_prompt_that_was_queued_twice_has_one_effect(programs: QueuePrograms, dies: bool) -> None:
    """I11: a second copy is taken out of the queue by whoever looks into it, or finds everything done already."""
    programs.comfyui.faults.add("POST", "/prompt", Fault(twice=True))
    job = await programs.put(seconds=30)
    first = await programs.start(works=False)
    reached = first.fate.stop_at("after comfyui.submit")
    first.begin()
    await reached.wait()
    assert programs.comfyui.process.queue.remaining == 2
    if dies:
        await first.kill()
        await programs.start()
    else:
        first.wake()
    job = await programs.queue.wait(job)
    await asyncio.sleep(120)
    assert (job.status, job.run_count) == (QueueStatus.DONE, 1)
    assert programs.comfyui.process.queue.remaining == 0
    assert [record.nodes for record in programs.comfyui.run_log if record.nodes] == [["1", "2"]]
    [attempt] = [attempt for attempt in (await programs.queue.show(job)).attempts if attempt.outcome is Outcome.DONE]
    assert attempt.result["outputs"][0]["path"] == str(programs.target())
    assert sorted(path.name for path in programs.target().parent.iterdir()) == ["1.png"]


@pytest.mark.fault(38)
@pytest.mark.parametrize("dies", [False, True], ids=["worker lives", "worker dies"])
async def test_a_prompt_that_its_server_forgot_is_run_again_and_counted(programs: QueuePrograms, dies: bool) -> None:
    """I12: a new run begins only when the old one is proven lost."""
    job = await programs.put(seconds=60)
    first = await programs.start()
    await programs.began()
    await asyncio.sleep(10)
    if dies:
        await first.kill()
    await programs.comfyui.restart()
    if dies:
        await programs.start()
    job = await programs.queue.wait(job)
    assert (job.status, job.run_count) == (QueueStatus.DONE, 2)
    assert await programs.runs(job) == ["lost", "success"]
    assert len(await programs.prompts(job)) == 2
    assert EventKind.PROMPT_LOST in await programs.kinds(job) or job.retries_attempted == 1
    assert await programs.complaints() == []


@pytest.mark.fault(38)
@pytest.mark.invariant("I12")
async def test_as_long_as_the_server_cannot_be_asked_nothing_is_decided(programs: QueuePrograms) -> None:
    """I12: silence is no proof; the prompt is kept until its server says what became of it."""
    job = await programs.put(seconds=60)
    first = await programs.start()
    await programs.began()
    await first.kill()
    for method in ("GET", "POST"):
        programs.comfyui.faults.add(method, "/*", Fault.never(work=False), times=float("inf"))
    heir = await programs.start()
    for _ in range(3):
        await asyncio.sleep(300)
        now = await programs.queue.job(job)
        assert not now.ended
        assert (now.phase, now.run_count, now.retries_attempted) == (Phase.SUBMITTED, 1, 0)
    assert any(said.startswith("paused: ") for said in heir.said)
    programs.comfyui.faults.clear()
    job = await programs.queue.wait(job, timeout=timedelta(minutes=10))
    assert (job.status, job.run_count) == (QueueStatus.DONE, 1)
    assert await programs.runs(job) == ["success"]
    assert await programs.complaints() == []


async def test_a_worker_that_reaches_only_another_server_lets_the_prompt_be_until_nobody_else_came(
    programs: QueuePrograms, looptime: float
) -> None:
    """I12: it takes the job over when the lease is over and a grace has passed; the late result counts nowhere."""
    job = await programs.put(seconds=20)
    first = await programs.start()
    await programs.began()
    await first.kill()
    died = float(looptime)
    async with ComfyUIEmulator() as elsewhere:
        other = await programs.start(api_base_url=elsewhere.url)
        await programs.when(lambda: elsewhere.run_log, "the job runs elsewhere")
        assert looptime - died >= programs.queue_settings.attach_grace.total_seconds()
        job = await programs.queue.wait(job)
        assert (job.status, job.run_count) == (QueueStatus.DONE, 2)
        [ran] = elsewhere.run_log
        assert job.result["prompt_id"] == ran.prompt_id
        await other.end()
    assert await programs.runs(job) == ["success"]
    attempts = (await programs.queue.show(job)).attempts
    assert [attempt.outcome for attempt in attempts] == [Outcome.LOST, Outcome.DONE]
