"""
What jobs that have not run yet will take and cost, from own history.

Added up are the parts that history knows: the start of a machine (not billed at RunComfy), the time from ready to the
first prompt, one run that loads models and the others that do not, and what bringing and fetching takes around a run.
A part that history does not know is left out and named; nothing is made up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

from runcomfy.application.ledger import MachineBill
from runcomfy.domain.estimate import Basis, History, Prediction, quantile
from runcomfy.domain.machine import Purpose
from runcomfy.domain.money import MICRODOLLAR
from runcomfy.domain.work import Work

_NORMAL_90: Final = 1.2815515655446004
_NEWEST: Final = 50
"""Machines, and runs, whose times around the computing are looked at."""


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds: from nine times of ten more than `low` to nine times of ten less than `high`."""

    low: float
    expected: float
    high: float

    def __add__(self, other: Span) -> Span:
        """Add ranges; wider than need be, since not everything goes badly at once."""
        return Span(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def times(self, factor: float) -> Span:
        """Return the same so many times over."""
        return Span(self.low * factor, self.expected * factor, self.high * factor)

    def as_dict(self) -> dict[str, float]:
        """Return the range as it appears in `--json`."""
        return {"low": round(self.low, 3), "expected": round(self.expected, 3), "high": round(self.high, 3)}


NOTHING: Final = Span(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Money:
    """USD."""

    low: Decimal
    expected: Decimal
    high: Decimal


@dataclass(frozen=True, slots=True)
class Past:
    """What own history says of machines of one type."""

    boots: tuple[float, ...] = ()
    """Seconds from request to ready."""
    starts: tuple[float, ...] = ()
    """Seconds from ready until the first prompt computed, of machines rented for a job or a pool."""
    around: tuple[float, ...] = ()
    """Seconds of a job at the machine beside its computing and its waiting for others."""


@dataclass(frozen=True, slots=True)
class JobEstimate:
    """What `count` runs of a workflow on one machine type will take and cost."""

    workflow: str
    server_type: str
    count: int
    machines: int
    usd_per_hour: Decimal
    run: Prediction | None
    """One run on a warm machine; None: nothing was ever run, so nothing can be told."""
    first: Prediction | None = None
    """One run that loads models."""
    boot: Span | None = None
    busy: Span | None = None
    """Computing, all runs together."""
    seconds: Span | None = None
    """From asking to the last result; `low` is with machines that are there already."""
    usd: Money | None = None
    usd_each: Decimal | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as it appears in `--json`."""
        known = self.run
        return {
            "workflow": self.workflow,
            "server_type": self.server_type,
            "count": self.count,
            "machines": self.machines,
            "usd_per_hour": str(self.usd_per_hour),
            "known": known is not None,
            "runs": known.runs if known else 0,
            "basis": str(known.basis) if known else None,
            "run_seconds": {"p10": known.p10_s, "p50": known.p50_s, "p90": known.p90_s} if known else None,
            "boot_seconds": self.boot.as_dict() if self.boot else None,
            "busy_seconds": self.busy.as_dict() if self.busy else None,
            "seconds": self.seconds.as_dict() if self.seconds else None,
            "usd": {name: format(getattr(self.usd, name), "f") for name in ("low", "expected", "high")}
            if self.usd
            else None,
            "usd_each": format(self.usd_each, "f") if self.usd_each is not None else None,
            "notes": list(self.notes),
        }


def past_of(bills: Sequence[MachineBill], boots: Sequence[timedelta], server_type: str) -> Past:
    """Return what history says of a type; `boots` as `Store.boot_times` tells them."""
    of_type = [bill for bill in bills if bill.machine.server_type == server_type]
    starts: list[float] = []
    around: list[float] = []
    for bill in of_type[-_NEWEST:]:
        computing = [work.computing_at for work in bill.works if work.computing_at is not None]
        ready = bill.machine.ready_at
        if bill.machine.purpose in (Purpose.RUN, Purpose.POOL) and computing and ready is not None:
            starts.append(max(0.0, (min(computing) - ready).total_seconds()))
        around.extend(found for work in bill.works if (found := _around(work, bill)) is not None)
    return Past(tuple(span.total_seconds() for span in boots), tuple(starts), tuple(around[-_NEWEST:]))


def _around(work: Work, bill: MachineBill) -> float | None:
    """Return the seconds a job took after its computing: before it, it may have waited for others or for the start."""
    if work.computed_at is None or work.ended_at is None or work.outcome != "done" or bill.machine.ready_at is None:
        return None
    return max(0.0, (work.ended_at - work.computed_at).total_seconds())


def estimate(
    history: History,
    past: Past,
    workflow: str,
    server_type: str,
    usd_per_hour: Decimal,
    *,
    count: int = 1,
    machines: int = 1,
) -> JobEstimate:
    """Return what the jobs will take and cost on machines that are started for them and ended after them."""
    machines = max(1, min(machines, count))
    warm = history.predict(workflow, server_type)
    cold = history.predict(workflow, server_type, cold=True)
    if warm is None or cold is None:
        notes = ("no run of anything is known yet: run it once and ask again",)
        return JobEstimate(workflow, server_type, count, machines, usd_per_hour, None, notes=notes)
    notes_found = [f"computing time rests on {warm.words}"]
    if not cold.cold:
        notes_found.append("no run that had to load models is known: the first run counts as the others do")
    boot, start, fetch = _span(past.boots), _span(past.starts), _span(past.around)
    for part, what in ((boot, "a machine's start"), (start, "from ready to the first prompt"), (fetch, "fetching")):
        if part is None:
            notes_found.append(f"how long {what} takes is not known yet: not counted")
    busy = together(cold, machines) + together(warm, count - machines)
    billed = busy + (start or NOTHING).times(machines) + _once_or_each(fetch or NOTHING, count, machines)
    alone = together(cold, 1) + together(warm, math.ceil(count / machines) - 1)
    seconds = alone + (start or NOTHING) + _once_or_each(fetch or NOTHING, math.ceil(count / machines), 1)
    if boot is not None:
        seconds = Span(seconds.low, seconds.expected + boot.expected, seconds.high + boot.high)
    usd = Money(*(_usd(part, usd_per_hour) for part in (billed.low, billed.expected, billed.high)))
    each = (usd.expected / count).quantize(MICRODOLLAR)
    return JobEstimate(
        workflow, server_type, count, machines, usd_per_hour, warm, cold, boot, busy, seconds, usd, each,
        tuple(notes_found),
    )  # fmt: skip


def together(prediction: Prediction, count: int) -> Span:
    """Return how long so many runs take one after the other.

    Runs of a workflow that was seen on the type differ by chance, so that many are surer than one; what is not known
    of how well its mean is known stays. Where the prediction comes from elsewhere, all may be off by the same factor.
    """
    if count <= 0:
        return NOTHING
    mean = prediction.mean_s * count
    low, high = prediction.p10_s * count, prediction.p90_s * count
    if prediction.basis is Basis.SAME and count > 1:
        variance = prediction.cv2 * prediction.mean_s**2
        spread = _NORMAL_90 * math.sqrt(variance * (count + count**2 / prediction.runs))
        low, high = max(low, mean - spread), min(high, mean + spread)
    return Span(min(low, mean), mean, max(high, mean))


def _once_or_each(fetch: Span, count: int, machines: int) -> Span:
    """Return what fetching adds: the next run computes meanwhile, or it does not."""
    return Span(fetch.low * machines, fetch.expected * machines, fetch.high * count)


def _span(seconds: Sequence[float]) -> Span | None:
    if not seconds:
        return None
    return Span(quantile(seconds, 0.1), quantile(seconds, 0.5), quantile(seconds, 0.9))


def _usd(seconds: float, usd_per_hour: Decimal) -> Decimal:
    return (Decimal(repr(seconds)) * usd_per_hour / 3600).quantize(MICRODOLLAR)
