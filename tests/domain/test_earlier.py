"""What earlier attempts of a job cost, by the rows of machine time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.earlier import earlier_bill
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId, MachineState, Purpose
from runcomfy.domain.work import Work

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ONE, TWO = MachineId("one"), MachineId("two")
JOB, OTHER = JobId("job"), JobId("other")


def after(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds)


def machine(machine_id: MachineId = ONE, *, ready: float = 0, gone: float | None = None) -> Machine:
    """A dollar per second, so that seconds and dollars are the same number."""
    return Machine(
        id=machine_id,
        provider="emulated",
        account="a",
        purpose=Purpose.POOL,
        server_type="medium",
        duration=timedelta(minutes=10),
        usd_per_hour=Decimal(3600),
        rate_source="",
        requested_at=NOON,
        since=NOON,
        state=MachineState.READY if gone is None else MachineState.STOPPED,
        ready_at=after(ready),
        gone_at=None if gone is None else after(gone),
    )


def work(
    job: JobId, attempt: int, began: float, ended: float | None = None, *, at: MachineId = ONE, outcome: str = ""
) -> Work:
    end = None if ended is None else after(ended)
    return Work(at, job, attempt, "portrait", "medium", after(began), ended_at=end, outcome=outcome)


def bill(*works: Work, machines: tuple[Machine, ...] = (machine(),), attempt: int = 2, now: float = 1_000) -> list[int]:
    lines = earlier_bill(JOB, attempt, works, {one.id: one for one in machines}, now=after(now))
    assert all(line.seconds == line.amount_usd for line in lines)
    return [int(line.amount_usd) for line in lines]


def test_the_attempt_that_runs_now_is_counted_by_its_place() -> None:
    assert bill(work(JOB, 2, 500)) == []
    assert bill(work(JOB, 1, 100, 160, outcome="failed"), work(JOB, 2, 500)) == [60]


def test_an_attempt_whose_process_died_lasts_until_the_next_one_begins() -> None:
    """Its prompt went on where the next one goes on with it; elsewhere nobody knows better."""
    assert bill(work(JOB, 1, 100), work(JOB, 2, 500)) == [400]
    assert bill(work(JOB, 1, 100, 150, outcome="lost"), work(JOB, 2, 500)) == [400]
    elsewhere = work(JOB, 2, 500, at=TWO)
    assert bill(work(JOB, 1, 100), elsewhere, machines=(machine(gone=300), machine(TWO, ready=450))) == [200]
    assert bill(work(JOB, 1, 100, 150, outcome="lost"), elsewhere, machines=(machine(), machine(TWO))) == [50]
    assert bill(work(JOB, 1, 100), now=700) == [600]  # the row of the one that runs is not written yet


def test_what_several_jobs_were_there_for_is_shared_like_the_running_attempts_time() -> None:
    assert bill(work(JOB, 1, 100, 200), work(OTHER, 7, 150, 400), work(JOB, 2, 500)) == [75]
    dead = (work(OTHER, 7, 100), work(OTHER, 8, 150, at=TWO))  # it went elsewhere when its process had died
    assert bill(work(JOB, 1, 100, 200), *dead, work(JOB, 2, 500), machines=(machine(), machine(TWO))) == [75]


def test_only_billed_time_counts_and_each_machine_has_its_line() -> None:
    assert bill(work(JOB, 1, 100, 200), work(JOB, 2, 500), machines=(machine(ready=150, gone=180),)) == [30]
    works = work(JOB, 1, 100, 110), work(JOB, 2, 200, 230, at=TWO), work(JOB, 3, 300, 305), work(JOB, 4, 400)
    assert bill(*works, machines=(machine(), machine(TWO)), attempt=4) == [15, 30]
    assert bill(*works, machines=(), attempt=4) == []


@pytest.mark.timeout(20)
def test_a_machine_that_has_had_very_many_jobs_is_soon_looked_through() -> None:
    """It is done in the loop in which everything else runs; comparing each with each takes minutes."""
    others = [work(JobId(str(n)), 1, n * 10, n * 10 + 15) for n in range(20_000)]
    assert bill(work(JOB, 1, 100, 160), work(JOB, 2, 500), *others, now=300_000) == [25]


stays = st.tuples(st.integers(0, 900), st.integers(1, 90))


@given(st.lists(stays, max_size=5), st.lists(stays, max_size=5))
def test_two_jobs_never_pay_more_than_the_time_somebody_was_there(
    mine: list[tuple[int, int]], others: list[tuple[int, int]]
) -> None:
    rows = [work(JOB, n + 1, at_s, at_s + long) for n, (at_s, long) in enumerate(sorted(mine))]
    theirs = [work(OTHER, n + 1, at_s, at_s + long) for n, (at_s, long) in enumerate(sorted(others))]
    known = {ONE: machine()}
    lines = [line for job in (JOB, OTHER) for line in earlier_bill(job, 99, [*rows, *theirs], known, now=after(1_000))]
    paid = sum((line.seconds for line in lines), Decimal(0))
    seconds = {s for at_s, long in (*mine, *others) for s in range(at_s, at_s + long)}
    assert abs(paid - len(seconds)) <= Decimal("0.000002")
