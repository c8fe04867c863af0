"""What time on a machine costs."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.machine import MachineId
from runcomfy.domain.money import (
    MICRODOLLAR,
    LedgerEntry,
    Rate,
    RateTable,
    meter,
    seconds_between,
    show_usd,
    total,
)

NOW = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)

rates = st.decimals(0, 100, places=2)
durations = st.timedeltas(timedelta(0), timedelta(days=30))


@pytest.mark.parametrize(
    ("usd_per_hour", "usd_per_second"),
    [
        ("0.99", "0.000275"),
        ("1.75", "0.000486"),
        ("2.50", "0.000694"),
        ("2.99", "0.000831"),
        ("4.99", "0.001386"),
        ("7.49", "0.002081"),
        ("8.75", "0.002431"),
    ],
)
def test_a_second_costs_what_the_price_list_says(usd_per_hour: str, usd_per_second: str) -> None:
    assert meter(NOW, NOW + timedelta(seconds=1), Decimal(usd_per_hour)) == Decimal(usd_per_second)
    assert meter(NOW, NOW + timedelta(hours=1), Decimal(usd_per_hour)) == Decimal(usd_per_hour)


@given(rates, durations)
def test_an_amount_is_an_exact_number_of_millionths(usd_per_hour: Decimal, duration: timedelta) -> None:
    amount = meter(NOW, NOW + duration, usd_per_hour)
    assert type(amount) is Decimal
    assert amount == amount.quantize(MICRODOLLAR)
    exact = usd_per_hour * (duration // timedelta(microseconds=1)) / Decimal(3_600_000_000)
    assert abs(amount - exact) <= MICRODOLLAR / 2


@given(rates, st.lists(durations, min_size=1, max_size=10))
def test_parts_of_an_interval_add_up_but_for_rounding(usd_per_hour: Decimal, parts: list[timedelta]) -> None:
    marks = [NOW]
    for part in parts:
        marks.append(marks[-1] + part)
    added = sum((meter(start, end, usd_per_hour) for start, end in pairwise(marks)), Decimal(0))
    assert abs(added - meter(marks[0], marks[-1], usd_per_hour)) <= MICRODOLLAR / 2 * (len(parts) + 1)


@given(rates, durations, durations)
def test_longer_never_costs_less(usd_per_hour: Decimal, one: timedelta, other: timedelta) -> None:
    short, long = sorted([one, other])
    assert meter(NOW, NOW + short, usd_per_hour) <= meter(NOW, NOW + long, usd_per_hour)


@given(rates, durations)
def test_a_clock_that_jumps_back_costs_nothing(usd_per_hour: Decimal, back: timedelta) -> None:
    assert meter(NOW, NOW - back, usd_per_hour) == 0
    assert seconds_between(NOW, NOW - back) == 0


def test_seconds_keep_their_microseconds() -> None:
    assert seconds_between(NOW, NOW + timedelta(days=1, microseconds=1)) == Decimal("86400.000001")


@given(st.lists(st.decimals(0, 1000, places=6), max_size=20))
def test_a_total_is_the_exact_sum(amounts: list[Decimal]) -> None:
    entries = [LedgerEntry(MachineId("m"), NOW, NOW, Decimal(1), amount, NOW) for amount in amounts]
    result = total(entries)
    assert type(result) is Decimal
    assert result == sum(amounts, Decimal(0))


@pytest.mark.parametrize(
    ("amount", "shown"),
    [("0", "$0.00"), ("0.000275", "$0.0003"), ("0.0165", "$0.0165"), ("1", "$1.00"), ("12.345", "$12.35")],
)
def test_small_amounts_are_shown_with_the_digits_they_need(amount: str, shown: str) -> None:
    assert show_usd(Decimal(amount)) == shown


def test_a_type_without_a_price_is_not_given_one() -> None:
    rate = Rate("medium", Decimal("0.99"), "payg", "price list")
    table = RateTable(date(2026, 1, 1), "payg", {"medium": rate})
    assert table.find("medium") is rate
    assert table.find("enormous") is None
