"""What runs and loading have taken, by workflow and type of machine: what a station expects of the next ones."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest

from runcomfy.application.pool_seat import PRESUMED_S, REMEMBERED, Experience
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.work import Work
from runcomfy.testing.clock import LoopClock


async def test_experience_begins_with_what_the_books_say(clock: LoopClock) -> None:
    at = clock.now()
    works = [
        Work(
            MachineId("m"),
            JobId(str(uuid4())),
            1,
            "portrait",
            "medium",
            at,
            computing_at=at,
            computed_at=at + timedelta(seconds=7),
        )
    ]
    known = Experience(works)
    assert known.run_s("portrait", "medium") == pytest.approx(7)
    assert Experience().run_s("portrait", "medium") == PRESUMED_S
    assert Experience().load_s("portrait", "medium") == 0


async def test_what_loading_takes_is_known_by_the_type_of_the_machine(clock: LoopClock) -> None:
    at = clock.now()

    def ran(server_type: str, seconds: float, *, cold: bool, workflow: str = "portrait") -> Work:
        until = at + timedelta(seconds=seconds)
        job = JobId(str(uuid4()))
        return Work(MachineId("m"), job, 1, workflow, server_type, at, computing_at=at, computed_at=until, cold=cold)

    known = Experience([ran("medium", 40, cold=True), ran("medium", 10, cold=False)])
    known.learn(ran("large", 9, cold=True))
    known.learn(ran("large", 4, cold=False))
    assert [known.load_s("portrait", kind) for kind in ("medium", "large", "tiny")] == [30, 5, 0]
    assert known.load_s("other", "large") == 5  # what is not known of a workflow is what others take there
    assert [known.run_s("portrait", kind) for kind in ("medium", "large")] == [10, 4]
    for _ in range(2):
        known.learn(ran("large", 12, cold=False))  # what was said before does not stand for ever
    assert known.run_s("portrait", "large") == 12
    assert known.load_s("portrait", "large") == 0


async def test_experience_forgets_the_oldest_runs(clock: LoopClock) -> None:
    at = clock.now()
    work = Work(MachineId("m"), JobId("j"), 1, "a", "medium", at, computing_at=at, computed_at=at)
    known = Experience([work] * (REMEMBERED + 10))
    known.learn(work)
    assert len(known._works) == REMEMBERED
