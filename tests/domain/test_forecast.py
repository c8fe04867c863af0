"""What the day will have cost: what is spent, what is committed, and what past weeks say comes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.budget import Budget, Period, Window
from runcomfy.domain.forecast import Method, committed_between, forecast, spent_between
from runcomfy.domain.machine import Machine, MachineId, MachineState, Purpose
from runcomfy.domain.shares import Billed

NOW = datetime(2026, 5, 20, 18, tzinfo=UTC)
TODAY = Budget(Period.DAY).window(NOW)
HOUR = timedelta(hours=1)


def piece(start: datetime, hours: float, usd: str) -> Billed:
    return Billed(start, start + hours * HOUR, Decimal(usd))


def usd(*amounts: int) -> list[Decimal]:
    return [Decimal(amount) for amount in amounts]


def machine(state: MachineState, *, ready: datetime | None, lease: timedelta) -> Machine:
    return Machine(
        MachineId("m"), "runcomfy", "account", Purpose.POOL, "medium", lease, Decimal(6), "table", NOW - HOUR,
        NOW - HOUR, state=state, ready_at=ready,
    )  # fmt: skip


def test_what_lies_in_a_time_is_counted_by_its_part() -> None:
    pieces = [piece(NOW - 2 * HOUR, 4, "4"), piece(NOW - 9 * HOUR, 1, "7"), piece(NOW, 0, "0.5")]
    assert spent_between(pieces, NOW - HOUR, NOW + HOUR) == Decimal("2.5")
    assert spent_between(pieces, NOW - 20 * HOUR, NOW) == Decimal(9)


def test_leases_and_launches_are_committed() -> None:
    living = machine(MachineState.READY, ready=NOW - HOUR / 2, lease=HOUR)
    assert committed_between([living], now=NOW, end=NOW + 6 * HOUR) == Decimal(3)
    asked = machine(MachineState.REQUESTED, ready=None, lease=HOUR / 6)
    assert committed_between([asked], now=NOW, end=NOW + 6 * HOUR) == Decimal(1)
    assert committed_between([asked], now=NOW, end=NOW + HOUR / 12) == Decimal("0.5")
    gone = machine(MachineState.STOPPED, ready=NOW - HOUR, lease=9 * HOUR)
    assert committed_between([gone], now=NOW, end=NOW + HOUR) == 0


def test_without_history_only_what_is_committed_is_told() -> None:
    found = forecast("day", TODAY, [], [machine(MachineState.READY, ready=NOW, lease=HOUR)], now=NOW)
    assert found.method is Method.COMMITTED
    assert found.low == found.expected == found.high == Decimal(6)


def test_past_weeks_are_looked_at_for_the_same_hours() -> None:
    # 18:00 to midnight: $2 a week ago, $8 two weeks ago, $5 three weeks ago; noon never counts.
    weeks = [piece(NOW - timedelta(weeks=back) + HOUR, 2, cost) for back, cost in ((1, "2"), (2, "8"), (3, "5"))]
    noons = [piece(NOW - timedelta(weeks=back) - 6 * HOUR, 1, "100") for back in (1, 2, 3)]
    found = forecast("day", TODAY, [*weeks, *noons, piece(NOW - 3 * HOUR, 1, "1")], [], now=NOW)
    assert (found.method, found.samples) == (Method.WEEKS, 3)
    assert [found.spent, found.low, found.expected, found.high] == usd(1, 3, 6, 9)


def test_what_is_committed_is_the_least_that_comes() -> None:
    weeks = [piece(NOW - timedelta(weeks=back) + HOUR, 2, "1") for back in (1, 2, 3)]
    found = forecast("day", TODAY, weeks, [machine(MachineState.READY, ready=NOW, lease=HOUR)], now=NOW)
    assert [found.committed, found.low, found.expected, found.high] == usd(6, 6, 6, 6)


def test_a_young_history_goes_on_by_its_average_up_to_its_busiest_hour() -> None:
    found = forecast("day", TODAY, [piece(NOW - 4 * HOUR, 1, "4"), piece(NOW - HOUR, 1, "2")], [], now=NOW)
    assert (found.method, found.samples) == (Method.AVERAGE, 4)
    assert [found.spent, found.low, found.expected, found.high] == usd(6, 6, 15, 30)


def test_the_month_goes_on_by_days() -> None:
    month = Budget(Period.MONTH).window(NOW)
    pieces = [piece(NOW - timedelta(days=back), 5, cost) for back, cost in ((4, "8"), (3, "0"), (2, "4"), (1, "0"))]
    found = forecast("month", month, pieces, [], now=NOW)
    rest = Decimal("11.25")  # days
    assert found.method is Method.AVERAGE
    assert (found.expected, found.high) == (12 + 3 * rest, 12 + 8 * rest)


def test_a_window_without_an_end_has_no_forecast() -> None:
    with pytest.raises(ValueError, match="without an end"):
        forecast("run", Window(None, None), [], [], now=NOW)


pieces_of_weeks = st.lists(
    st.builds(
        lambda back, hours, cents: piece(NOW - back * HOUR, min(hours, back), str(Decimal(cents) / 100)),
        st.integers(0, 24 * 70),
        st.integers(0, 48),
        st.integers(0, 10_000),
    ),
    max_size=12,
)


@given(pieces_of_weeks, st.sampled_from([Period.HOUR, Period.DAY, Period.MONTH]), st.integers(0, 300))
def test_a_forecast_is_in_order_and_not_less_than_what_is_spent(
    pieces: list[Billed], period: Period, lease: int
) -> None:
    living = machine(MachineState.READY, ready=NOW, lease=timedelta(minutes=lease))
    found = forecast(str(period), Budget(period).window(NOW), pieces, [living], now=NOW)
    assert found.spent + found.committed <= found.low <= found.expected <= found.high
