"""
What will have been spent by the end of the day or the month.

    forecast = what is spent so far + what comes until the end

What comes is at least what is committed: every living machine until its lease ends, every open launch with its whole
lease. Beyond that it is taken from own history, best first:

* the same hours of past weeks: what was spent in the stretch of the same length and weekdays one week before, two weeks
  before, and so on, up to eight; the mean is expected, the least and the most are the range. It takes two weeks.
* the running average of the last seven days (or as long as there is history, at least an hour); the range is from what
  is committed to the busiest hour (for a rest of more than a day: the busiest day) going on.
* with less history than that, only what is committed is told, and that nothing more is known.

A forecast is a weighing of history; budgets are kept by other means (`budget`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import Final

from runcomfy.domain.budget import Window, charge_of
from runcomfy.domain.machine import Machine
from runcomfy.domain.money import MICRODOLLAR, meter
from runcomfy.domain.shares import Billed

WEEK: Final = timedelta(days=7)
WEEKS: Final = 8
"""How far back history is looked at."""
_HOUR, _DAY = timedelta(hours=1), timedelta(days=1)
_TICK: Final = timedelta(microseconds=1)


class Method(StrEnum):
    """Where a forecast comes from."""

    WEEKS = "same hours of past weeks"
    AVERAGE = "running average"
    COMMITTED = "what is committed only: too little history"
    OVER = "the time is over"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a day or month will have cost at its end, in USD."""

    name: str
    """`day` or `month`."""
    start: datetime
    end: datetime
    spent: Decimal
    committed: Decimal
    """From now to the end, if nobody renews anything."""
    low: Decimal
    expected: Decimal
    high: Decimal
    method: Method
    samples: int = 0
    """Past weeks looked at, or hours of history."""


def spent_between(pieces: Sequence[Billed], start: datetime, end: datetime) -> Decimal:
    """Return what of the bills lies in [`start`, `end`), in USD, to the millionth."""
    total = Fraction(0)
    for piece in pieces:
        length = (piece.end - piece.start) // _TICK
        overlap = (min(piece.end, end) - max(piece.start, start)) // _TICK
        if length > 0 and overlap > 0:
            total += Fraction(piece.usd) * overlap / length
        elif length <= 0 and start <= piece.start < end:
            total += Fraction(piece.usd)
    return _usd(total)


def committed_between(machines: Sequence[Machine], *, now: datetime, end: datetime) -> Decimal:
    """Return what living machines and open launches still cost from now to `end` if nobody renews them, in USD."""
    total = Decimal(0)
    for machine in machines:
        charge = charge_of(machine, now=now) if machine.is_open else None
        if charge is not None:
            total += meter(now, now + charge.within(Window(now, end)), charge.usd_per_hour)
    return total


def forecast(
    name: str, window: Window, pieces: Sequence[Billed], machines: Sequence[Machine], *, now: datetime
) -> Forecast:
    """Return what will have been spent at the end of the window that `now` is in.

    `pieces` are the bills of the last `WEEKS` + 1 weeks at least, with what runs now as far as it has run.
    """
    if window.start is None or window.end is None:
        raise ValueError("a window without an end has no forecast")
    spent = spent_between(pieces, window.start, now)
    committed = committed_between(machines, now=now, end=window.end)
    least, expected, most, method, samples = _coming(pieces, now=now, end=window.end)
    return Forecast(
        name,
        window.start,
        window.end,
        spent,
        committed,
        spent + max(committed, least),
        spent + max(committed, expected),
        spent + max(committed, most),
        method,
        samples,
    )


def _coming(pieces: Sequence[Billed], *, now: datetime, end: datetime) -> tuple[Decimal, Decimal, Decimal, Method, int]:
    """Return what history says of the time from now to `end`: least, expected, most, how, and from how much."""
    rest, nothing = end - now, Decimal(0)
    if rest <= timedelta(0):
        return nothing, nothing, nothing, Method.OVER, 0
    begun = min((piece.start for piece in pieces), default=now)
    past = [week * WEEK for week in range(1, WEEKS + 1)]
    weeks = [
        spent_between(pieces, now - back, end - back) for back in past if end - back <= now and now - back >= begun
    ]
    if len(weeks) >= 2:
        return min(weeks), _usd(Fraction(sum(weeks)) / len(weeks)), max(weeks), Method.WEEKS, len(weeks)
    span = min(now - begun, WEEK)
    if span < _HOUR:
        return nothing, nothing, nothing, Method.COMMITTED, 0
    average = Fraction(spent_between(pieces, now - span, now)) * (rest // _TICK) / (span // _TICK)
    unit = min(span, _DAY if rest > _DAY else _HOUR)
    busiest = max(
        spent_between(pieces, now - (number + 1) * unit, now - number * unit) for number in range(span // unit)
    )
    most = Fraction(busiest) * (rest // _TICK) / (unit // _TICK)
    return nothing, _usd(average), _usd(max(most, average)), Method.AVERAGE, span // _HOUR


def _usd(amount: Fraction) -> Decimal:
    return (Decimal(amount.numerator) / Decimal(amount.denominator)).quantize(MICRODOLLAR)
