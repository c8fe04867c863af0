"""How long the last machine is kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.keep_alive import HALF_LIFE, LEAST, MOST, keep_alive, worth_of_start

lengths = st.lists(st.floats(0, 1e5), max_size=40).map(tuple)
worths = st.floats(1, 20_000)


def test_a_start_is_worth_its_load_and_the_waiting_it_causes() -> None:
    for times, worth in ((1, 240), (5, 1080), (20, 4230)):
        found = worth_of_start(load_s=30, usd_per_hour=1.75, wait_usd_per_hour=1.75 * times, waits_s=210)
        assert found == pytest.approx(worth)


def test_silences_that_end_soon_are_waited_out() -> None:
    # Whoever comes back after five minutes nearly always is waited for, and not twice as long.
    assert 300 <= keep_alive((300.0,) * 200, 1000) < 600


def test_long_silences_are_not_waited_for() -> None:
    assert keep_alive((50_000.0,) * 200, 1000) == 125


def test_what_was_long_ago_counts_less() -> None:
    long, short = (50_000.0,) * HALF_LIFE, (900.0,) * HALF_LIFE
    assert keep_alive(short + long * 2, 1000) == 125
    assert keep_alive(long + short * 2, 1000) == 900


def test_nothing_is_kept_that_is_worth_nothing() -> None:
    assert keep_alive((1.0, 2.0), 0.0) == 0


@given(lengths, worths)
def test_it_stays_within_a_factor_of_break_even(silences: tuple[float, ...], worth: float) -> None:
    assert LEAST * worth <= keep_alive(silences, worth) <= MOST * worth


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=30).map(tuple), worths)
def test_no_other_time_would_have_cost_less(silences: tuple[float, ...], worth: float) -> None:
    # Repeated so often that the prior silences hardly count.
    repeated = silences * 40
    weights = [math.pow(0.5, (len(repeated) - 1 - index) / HALF_LIFE) for index in range(len(repeated))]

    def cost(until: float) -> float:
        paid = [w * (g if g <= until else until + worth) for g, w in zip(repeated, weights, strict=True)]
        return math.fsum(paid) / math.fsum(weights)

    kept = keep_alive(repeated, worth)
    others = [LEAST * worth, MOST * worth, *(g for g in silences if LEAST * worth <= g <= MOST * worth)]
    # The prior ones cost at most 3 R each.
    assert cost(kept) <= min(cost(other) for other in others) + 15 * 3 * worth / sum(weights)
