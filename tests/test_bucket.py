"""The account's rate limit: never too fast, urgent calls first, and clocks that jump."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.stores.bucket import Bucket, hold, take

START: Final = datetime(2026, 3, 29, 0, 59, 59, tzinfo=UTC)
SECOND: Final = timedelta(seconds=1)

gaps = st.one_of(st.just(0.0), st.floats(0, 0.5), st.floats(0, 30))
limits = st.tuples(st.sampled_from([0.3, 1.0, 3.0, 7.0]), st.integers(1, 8), st.integers(0, 8))


def slot_of(per_second: float) -> timedelta:
    return timedelta(seconds=1 / per_second)


@given(limits, st.lists(st.tuples(gaps, st.booleans(), st.none() | st.floats(0, 20)), max_size=60))
def test_no_stretch_of_time_sees_more_than_the_burst_and_the_rate(
    limit: tuple[float, int, int], calls: list[tuple[float, bool, float | None]]
) -> None:
    per_second, burst, reserve = limit
    bucket, now, starts = Bucket(), START, []
    for gap, urgent, held in calls:
        now += timedelta(seconds=gap)
        if held is not None:
            bucket = hold(bucket, now=now, wait=timedelta(seconds=held))
        bucket, wait = take(bucket, now=now, per_second=per_second, burst=burst, reserve=reserve, urgent=urgent)
        assert wait >= timedelta(0)
        starts.append(now + wait)
    starts.sort()
    for first, start in enumerate(starts):
        for last in range(first + burst, len(starts)):
            # That many starts beyond the burst need that many slots, whatever lies between.
            assert starts[last] - start >= (last - first + 1 - burst) * slot_of(per_second) - timedelta(microseconds=1)


@given(limits, st.integers(0, 40), st.floats(0, 60))
def test_urgent_calls_find_their_reserve_however_many_wait(
    limit: tuple[float, int, int], waiting: int, later: float
) -> None:
    per_second, burst, reserve = limit
    bucket = Bucket()
    for _ in range(waiting):
        bucket, _ = take(bucket, now=START, per_second=per_second, burst=burst, reserve=reserve, urgent=False)
    now = START + timedelta(seconds=later)
    for _ in range(min(reserve, burst - 1)):
        bucket, wait = take(bucket, now=now, per_second=per_second, burst=burst, reserve=reserve, urgent=True)
        assert wait == timedelta(0)


@given(limits, st.lists(gaps, max_size=40))
def test_ordinary_calls_are_served_in_their_order(limit: tuple[float, int, int], calls: list[float]) -> None:
    per_second, burst, reserve = limit
    bucket, now, last = Bucket(), START, START
    for gap in calls:
        now += timedelta(seconds=gap)
        bucket, wait = take(bucket, now=now, per_second=per_second, burst=burst, reserve=reserve, urgent=False)
        assert now + wait >= last
        last = now + wait


@given(
    limits,
    st.lists(st.tuples(gaps, st.booleans(), st.sampled_from([0, 0, 86_400, -86_400, 3600, -3600])), max_size=60),
)
def test_a_jumping_clock_never_makes_anybody_wait_for_more_than_a_full_bucket(
    limit: tuple[float, int, int], calls: list[tuple[float, bool, int]]
) -> None:
    """One caller that waits its turns, so that nobody else's requests are in the line."""
    per_second, burst, reserve = limit
    bucket, now = Bucket(), START
    for gap, urgent, jump in calls:
        now += timedelta(seconds=gap + jump)
        bucket, wait = take(bucket, now=now, per_second=per_second, burst=burst, reserve=reserve, urgent=urgent)
        assert timedelta(0) <= wait <= 2 * burst * slot_of(per_second) + timedelta(microseconds=100)
        now += wait


@given(st.floats(0, 100), st.sampled_from([1, -1, 86_400, -86_400, 3, -3]), st.booleans())
def test_a_jumping_clock_never_lengthens_a_hold_by_more_than_a_full_bucket(
    asked: float, jump: int, urgent: bool
) -> None:
    bucket = hold(Bucket(), now=START, wait=timedelta(seconds=asked))
    now = START + timedelta(seconds=jump)
    _, wait = take(bucket, now=now, per_second=1, burst=5, reserve=2, urgent=urgent)
    assert wait <= timedelta(seconds=asked + 10)


def test_processes_whose_clocks_were_read_in_another_order_gain_nothing() -> None:
    bucket = Bucket()
    waits = []
    for early in (0.0, 0.3, 0.2, 0.4, 0.1, 0.5):
        now = START - timedelta(seconds=early)
        bucket, wait = take(bucket, now=now, per_second=1, burst=1, reserve=0, urgent=False)
        waits.append((now + wait - START).total_seconds())
    assert waits == [0, 1, 2, 3, 4, 5]


def test_after_a_hold_one_starts_and_the_reserve_and_then_one_per_slot() -> None:
    bucket = hold(Bucket(), now=START, wait=10 * SECOND)
    waits = []
    for urgent in (False, False, False, True, True):
        bucket, wait = take(bucket, now=START, per_second=1, burst=5, reserve=2, urgent=urgent)
        waits.append(wait.total_seconds())
    assert waits == [10, 11, 12, 10, 10]


@pytest.mark.parametrize("per_second", [0, -1, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(per_second: float) -> None:
    with pytest.raises(ValueError, match="above zero"):
        take(Bucket(), now=START, per_second=per_second, burst=5, reserve=2, urgent=False)
