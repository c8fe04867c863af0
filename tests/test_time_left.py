"""How long jobs still take, as the product tells it: learned from the queue's own results, read now and then."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from PIL import Image

from runcomfy.application.time_left import READ_EVERY, TimeLeftBook, let_go_of_old
from runcomfy.domain.exceptions import StoreUnavailable
from runcomfy.domain.job import JobId, JobRequest
from runcomfy.domain.machine import MachineId
from runcomfy.domain.past_runs import NodePast, RunPast
from runcomfy.domain.queued import PastResult, RowId
from runcomfy.domain.time_left import NEWEST, Asked, Experience
from runcomfy.domain.work import Work
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.timed_runs import Look, TimedRuns, timed_runs


class Counted:
    """The queue's database, and how often its history was read."""

    def __init__(self, store: JobStore) -> None:
        self._store, self.readings = store, list[tuple[str | None, int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def past_results(self, *, workflow: str | None = None, **more: Any) -> Sequence[PastResult]:
        found = await self._store.past_results(workflow=workflow, **more)
        self.readings.append((workflow, len(found)))
        return found


@pytest.mark.parametrize("seed", [1, 7])
async def test_after_ten_runs_the_time_left_is_told_within_a_quarter_of_the_truth(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock, seed: int
) -> None:
    """The nodes of the workflow vary by 20 %; looks all through the eleventh run and two more, in virtual seconds."""
    async with timed_runs(comfyui, tmp_path, clock, noise=0.2, seed=seed) as runs:
        first = await runs.once(every=20)
        second = await runs.once(every=20)
        for _ in range(8):
            await runs.once(every=60)
        looks = [look for _ in range(3) for look in await runs.once()]

    assert all(look.told is None for look in first)  # nothing was ever run: no number is made up
    told = [look.told for look in second if look.told is not None]
    assert told
    assert not any(one.sure for one in told)  # one run is no ground for a number, only for a range
    assert len(looks) > 80
    assert median(look.error for look in looks) <= 0.25
    assert sum(_in_range(look) for look in looks) > 0.6 * len(looks)
    assert sum(look.told is not None and look.told.sure for look in looks) > 0.6 * len(looks)
    for run in (11, 12, 13):
        expected = [look.told.expected_s for look in looks if look.run == run and look.told is not None]
        assert expected[0] > 100
        assert expected[-1] < 20


def _in_range(look: Look) -> bool:
    return look.told is not None and look.told.low_s <= look.true_s <= look.told.high_s


async def _ran(runs: TimedRuns, count: int) -> None:
    for _ in range(count):
        await runs.once(every=100)


async def test_it_goes_down_between_two_messages_and_is_nothing_for_jobs_that_are_over(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock
) -> None:
    async with timed_runs(comfyui, tmp_path, clock) as runs:
        await _ran(runs, 2)
        job, book = await runs.add(), runs.app.time_left()
        await asyncio.sleep(2)  # its second node takes some seconds and says nothing meanwhile
        row, live = await runs.queue.job(job), runs.app.live.job(job.uid)
        earlier = await book.of(row, live)
        await asyncio.sleep(0.5)
        later = await book.of(row, live)
        assert earlier is not None
        assert later is not None
        assert 0.3 < earlier.expected_s - later.expected_s <= 0.55
        done = await runs.queue.wait(job)
        assert await book.of(done, None) is None


async def test_a_waiting_job_is_told_its_own_run_and_one_elsewhere_counts_down(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock
) -> None:
    async with timed_runs(comfyui, tmp_path, clock, noise=0.0) as runs:
        await _ran(runs, 3)
        running, waiting = await runs.add(), await runs.add()
        await asyncio.sleep(60)
        book = runs.app.time_left()
        waits = await book.of(await runs.queue.job(waiting), None)
        elsewhere = await book.of(await runs.queue.job(running), None)  # as another process would be told
        assert waits is not None
        assert elsewhere is not None
        assert waits.expected_s == pytest.approx(129, rel=0.15)
        assert elsewhere.expected_s == pytest.approx(70, rel=0.15)
        assert not waits.sure
        await runs.queue.wait(running)
        await runs.queue.wait(waiting)


async def test_history_is_read_at_most_every_half_minute_and_only_what_is_new_of_it(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock
) -> None:
    async with timed_runs(comfyui, tmp_path, clock) as runs:
        await _ran(runs, 2)
        store = Counted(await runs.app.job_store())

        async def jobs() -> JobStore:
            return store

        book = TimeLeftBook(jobs, runs.app.books, clock, has_books=lambda: False)
        job = await runs.add()
        row = await runs.queue.job(job)
        assert all(one is not None for one in await asyncio.gather(*(book.of(row, None) for _ in range(50))))
        assert store.readings == [(None, 2)]
        await asyncio.sleep(READ_EVERY - 1)
        await book.of(row, None)
        assert len(store.readings) == 1
        await runs.queue.wait(job)
        await asyncio.sleep(1)
        told = await book.of(row, None)
        assert store.readings[1:] == [(None, 1)]
        assert told is not None
        assert told.runs == 3


async def test_a_workflow_that_is_rare_among_thousands_of_jobs_is_found_all_the_same(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runcomfy.application.time_left.OF_ALL", 3)
    async with timed_runs(comfyui, tmp_path, clock) as runs:
        await _ran(runs, 2)
        for _ in range(4):
            await runs.queue.wait(await runs.queue.enqueue(JobRequest("image_invert", image=str(_picture(tmp_path)))))
        store = Counted(await runs.app.job_store())

        async def jobs() -> JobStore:
            return store

        book = TimeLeftBook(jobs, runs.app.books, clock, has_books=lambda: False)
        job = await runs.add()
        told = await book.of(await runs.queue.job(job), None)
        assert store.readings == [(None, 3), ("timed", 2)]
        assert told is not None
        assert told.runs == 2
        await runs.queue.wait(job)


def test_of_many_runs_the_newest_are_kept_and_the_first_at_each_place() -> None:
    """A process that serves for months has no more to remember than one that serves for a day, and tells the same."""

    def run(number: int, workflow: str, place: str) -> RunPast:
        nodes = {"7": NodePast("KSampler", 10.0 + number % 7, 10.0)}
        return RunPast(
            workflow, "medium", place, START + timedelta(minutes=number), nodes, computing_s=10.0 + number % 7
        )

    runs: dict[tuple[RowId, datetime], RunPast | None] = {}
    for number in range(NEWEST + 100):
        for workflow, place in (("a", "x" if number % 2 else "y"), ("b", "z")):
            one = run(number, workflow, place)
            runs[RowId(len(runs)), one.ended_at] = one
    before = dict(runs)
    let_go_of_old(runs)
    assert list(runs) == list(before)  # still known, so that they are not read again
    kept = [one for one in runs.values() if one is not None]
    assert Counter(one.workflow for one in kept) == {"a": NEWEST + 2, "b": NEWEST + 1}
    assert {one.place for one in kept if one.ended_at <= START + timedelta(minutes=1)} == {"x", "y", "z"}
    asked = [Asked(workflow, "medium", place=place) for workflow, place in ("ax", "ay", "bz", "bw")]
    everything = Experience(one for one in before.values() if one is not None)
    assert [Experience(kept).left(one) for one in asked] == [everything.left(one) for one in asked]


def _picture(folder: Path) -> Path:
    path = folder / "picture.png"
    Image.new("RGB", (16, 16), "red").save(path)
    return path


async def test_a_database_that_refuses_leaves_what_is_known(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock
) -> None:
    async with timed_runs(comfyui, tmp_path, clock) as runs:
        await _ran(runs, 2)
        works = True

        async def jobs() -> JobStore:
            if not works:
                raise StoreUnavailable("the database does not answer", hint="wait")
            return await runs.app.job_store()

        book = TimeLeftBook(jobs, runs.app.books, clock, has_books=lambda: False)
        job = await runs.add()
        row = await runs.queue.job(job)
        assert await book.of(row, None) is not None
        works = False
        await asyncio.sleep(READ_EVERY + 1)
        assert await book.of(row, None) is not None
        fresh = TimeLeftBook(jobs, runs.app.books, clock)
        assert await fresh.of(row, None) is None
        await runs.queue.wait(job)


async def test_the_books_of_machines_tell_where_no_timeline_is_known(
    comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock
) -> None:
    """Jobs that were run before timelines were kept, or without the queue."""
    async with timed_runs(comfyui, tmp_path, clock) as runs:
        books = await runs.app.books()
        for number in range(6):
            began = clock.now() - timedelta(hours=number + 1)
            await books.put_work(
                Work(
                    MachineId("m"), JobId(str(number)), 1, "timed", "large", began,
                    computing_at=began, computed_at=began + timedelta(seconds=140), outcome="done",
                )
            )  # fmt: skip
        job = await runs.add()
        told = await runs.app.time_left().of(await runs.queue.job(job), None)
        assert told is not None
        assert told.expected_s == pytest.approx(140, rel=0.05)
        assert not told.sure
        await runs.queue.wait(job)
