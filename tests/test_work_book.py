"""Who was on a rented machine and when, as it is written down for jobs that run without a pool."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.application.placing import JobFacts
from runcomfy.application.station import CloudStation
from runcomfy.application.work_book import WorkBook, outcome_of
from runcomfy.domain.exceptions import Interrupted, NodeFailed, PromptInterrupted, StoreUnavailable
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId
from runcomfy.domain.work import Work
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.programs import Program, Programs

FACTS = JobFacts("portrait", 3, "ann", "film")


def at(program: Program, **options: Any) -> Any:
    return program.placer.at(
        server_url=None,
        server_type="medium",
        show=lambda _: None,
        step=lambda _: None,
        **{"facts": FACTS, "job_id": JobId("job-1"), **options},
    )


async def compute(place: Any, seconds: float = 10) -> None:
    await asyncio.sleep(5)
    place.seat.computing()
    await asyncio.sleep(seconds)
    place.seat.computed()
    await asyncio.sleep(5)


async def test_a_machine_of_ones_own(program: Program) -> None:
    async with at(program) as place:
        await compute(place)
    [work] = await program.store.works()
    assert (work.workflow, work.attempt, work.user, work.project) == ("portrait", 3, "ann", "film")
    assert (work.job_id, work.server_type, work.outcome, work.cold) == ("job-1", "medium", "done", True)
    assert work.computing_at is not None
    assert work.computed_at is not None
    assert work.ended_at is not None
    assert work.computed_at - work.computing_at == timedelta(seconds=10)
    assert 5 <= (work.computing_at - work.began_at).total_seconds() < 6
    assert 5 <= (work.ended_at - work.computed_at).total_seconds() < 6


async def test_what_is_told_of_a_prompt_twice_counts_once_and_one_that_nobody_heard_begin_has_not_computed(
    program: Program,
) -> None:
    async with at(program) as place:
        await compute(place)
        place.seat.computing()
        place.seat.computed()
    async with at(program, job_id=JobId("job-2")) as place:
        await asyncio.sleep(30)
        place.seat.computed()
    works = {work.job_id: work for work in await program.store.works()}
    told, unheard = works[JobId("job-1")], works[JobId("job-2")]
    assert told.computing_at is not None
    assert told.computed_at is not None
    assert told.computed_at - told.computing_at == timedelta(seconds=10)
    assert (unheard.computing_at, unheard.computed_at, unheard.outcome) == (None, None, "done")


async def test_an_attempt_that_was_lost_counts_until_the_next_one_comes_whose_row_is_still_on_its_way(
    program: Program,
) -> None:
    """Its prompt went on there; and a row is written while the job begins already."""
    async with at(program) as place:
        await place.seat.settled()
        [lost] = await program.store.works()
        await asyncio.sleep(100)
        ended = lost.began_at + timedelta(seconds=10)
        await program.store.put_work(replace(lost, ended_at=ended, outcome="lost"))
        [line] = await program.placer.earlier(replace(place, attempt=lost.attempt + 1), lost.job_id)
    assert 100 <= line.seconds < 101


async def test_the_dev_server_is_warm_for_what_another_process_has_computed(
    program: Program, programs: Programs
) -> None:
    await program.dev.start(server_type="medium", duration=timedelta(hours=1))
    async with at(program) as place:
        await compute(place)
    async with programs.start() as another:
        for workflow in ("portrait", "video"):
            async with at(another, facts=JobFacts(workflow), job_id=JobId(f"a {workflow}")) as place:
                await compute(place)
    works = await program.store.works()
    assert [(work.workflow, work.cold) for work in works] == [("portrait", True), ("portrait", False), ("video", True)]
    await program.dev.shutdown()


async def test_what_a_machine_has_computed_is_known_without_the_books_once_it_was_seen(
    program: Program, clock: LoopClock
) -> None:
    """And what another machine, or nobody there to the end, has computed makes none warm."""

    class Closed:
        asked = 0

        async def works(self, **which: Any) -> Any:
            Closed.asked += 1
            return await program.store.works(**which)

        async def put_work(self, work: Work) -> None:
            await program.store.put_work(work)

    machine, elsewhere = program.intent(), replace(program.intent(), id=MachineId("another"))
    book = WorkBook(Closed(), clock)  # type: ignore[arg-type]

    async def was_cold(at: Machine, job: str, workflow: str = "portrait", *, ends: bool = True) -> bool:
        stay = book.begin(at, JobId(job), JobFacts(workflow))
        stay.computing()
        if ends:
            stay.computed()
        stay.leave("done")
        await stay.settled()
        [work] = [work for work in await program.store.works() if work.job_id == job]
        return work.cold

    assert await was_cold(machine, "first", ends=False)
    assert await was_cold(machine, "second")
    asked = Closed.asked
    assert not await was_cold(machine, "third")
    assert Closed.asked == asked == 2
    assert await was_cold(elsewhere, "fourth")
    assert await was_cold(machine, "fifth", "video")


async def test_the_machine_of_an_executor(program: Program) -> None:
    station = CloudStation(program.placer, server_type=None, idle_after=timedelta(minutes=2))

    async def burst(facts: JobFacts | None) -> None:
        async with station.at(
            job_id=JobId("job-1"),
            show=lambda _: None,
            step=lambda _: None,
            on_bill=lambda _: None,
            facts=facts,
        ) as place:
            await compute(place)
            raise NodeFailed("it burst")

    for facts in (FACTS, None):
        with pytest.raises(NodeFailed):
            await burst(facts)
    await station.close()
    assert [(work.outcome, work.cold) for work in await program.store.works()] == [("failed", True)]


async def test_a_database_that_refuses_breaks_no_job(program: Program, clock: LoopClock) -> None:
    class Refusing:
        written: list[Work] = []
        refuses = True

        async def works(self, **_: Any) -> list[Work]:
            raise StoreUnavailable("locked")

        async def put_work(self, work: Work) -> None:
            if self.refuses:
                raise StoreUnavailable("locked")
            self.written.append(work)

    store = Refusing()
    machine = program.intent()
    stay = WorkBook(store, clock).begin(machine, JobId("job-1"), FACTS)  # type: ignore[arg-type]
    stay.computing()
    await asyncio.sleep(1)
    store.refuses = False
    stay.computed()
    stay.leave("done")
    await stay.settled()
    assert store.written[-1].outcome == "done"
    assert store.written[-1].busy(clock.now()) == timedelta(seconds=1)


async def test_a_prompt_that_nobody_heard_begin_began_when_the_server_says(program: Program, clock: LoopClock) -> None:
    stay = WorkBook(program.store, clock).begin(program.intent(), JobId("job-1"), FACTS)
    await asyncio.sleep(30)
    stay.computed(12.0)
    stay.leave("done")
    await stay.settled()
    [work] = await program.store.works()
    assert work.busy(clock.now()) == timedelta(seconds=12)


def test_the_word_for_how_a_job_leaves() -> None:
    assert outcome_of(None) == "done"
    assert outcome_of(None, "put-back") == "done"
    assert outcome_of(NodeFailed("it burst")) == "failed"
    assert outcome_of(Interrupted("stopped")) == outcome_of(PromptInterrupted("stopped")) == "cancelled"
    assert outcome_of(asyncio.CancelledError()) == "cancelled"
    assert outcome_of(asyncio.CancelledError(), "put-back") == "put-back"
