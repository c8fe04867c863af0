"""
Does our ledger say what the provider would say? (I9)

Compared are our books and one full list of the account, which is not enough to end or close anything (that is the
reaper's work, after two lists) and enough to say what does not fit. A finding that costs or hides money is a gap; the
rest are notes. The provider tells no bills, so its ready times, stop times and the balance stand in for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from runcomfy.application.ledger import MachineBill
from runcomfy.domain.balance import BalanceCheck
from runcomfy.domain.machine import Machine, MachineReport, MachineState, Phase, ServerId
from runcomfy.domain.money import billed_interval, meter, show_usd

TOLERANCE: Final = Decimal("0.01")
SLACK: Final = timedelta(seconds=60)
"""A bill may differ by a hundredth or a minute (I9), whichever is more."""
UNWRITTEN: Final = timedelta(seconds=1)
"""A bill that was closed is in the ledger to its end: what is missing was refused when it was to be written."""
_STOP_SLACK: Final = timedelta(seconds=60)
_RUNS: Final = frozenset({Phase.READY, Phase.STARTING, Phase.UNKNOWN})


class Kind(StrEnum):
    """What does not fit."""

    BACK = "gone-but-listed"
    """Our books have ended it, and the provider lists it as running."""
    MISSING = "missing"
    """Our books count on, and the provider lists it no more."""
    FOREIGN = "not-ours"
    READY_TIME = "ready-time"
    STOP_TIME = "stop-time"
    LEDGER = "ledger"
    """The ledger does not cover what was billed."""
    PRICE = "price"
    """An entry's amount is not its time at its rate."""
    BALANCE = "balance"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not fit."""

    kind: Kind
    gap: bool
    """Whether money is at stake; else it is a note."""
    what: str
    """The machine's id at the provider, or ours; `account` if it is none's."""
    words: str
    usd: Decimal | None = None
    """How much, where that can be told."""

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as it appears in `--json`."""
        return {
            "kind": str(self.kind),
            "gap": self.gap,
            "what": self.what,
            "words": self.words,
            "usd": None if self.usd is None else format(self.usd, "f"),
        }


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has found."""

    machines: int
    """Machines of ours that were looked at."""
    findings: tuple[Finding, ...]
    balance: BalanceCheck | None = None
    """None: the provider does not tell a balance, or has told only one so far."""

    @property
    def gaps(self) -> tuple[Finding, ...]:
        """What is more than a note."""
        return tuple(finding for finding in self.findings if finding.gap)


def examine(
    bills: Sequence[MachineBill], reports: Sequence[MachineReport], *, known: set[ServerId], now: datetime
) -> Iterator[Finding]:
    """Yield what does not fit between our books and the provider's list.

    `known` are the ids of every machine our books ever had, so that one that ended long ago is not a stranger.
    """
    listed = {report.server_id: report for report in reports}
    for bill in bills:
        report = listed.get(bill.machine.server_id) if bill.machine.server_id is not None else None
        yield from _life(bill.machine, report)
        if report is not None and bill.machine.is_open:
            yield from _times(bill.machine, report, now=now)
        yield from _ledger(bill, now=now)
    looked_at = {bill.machine.server_id for bill in bills}
    for report in reports:
        if report.server_id in known and report.server_id not in looked_at and report.phase in _RUNS:
            yield _back(report.server_id, report)
        elif report.server_id not in known and report.phase is not Phase.GONE:
            words = (
                f"{report.server_type or 'a machine'} ({report.status}) is not in our books: not counted, left alone"
            )
            yield Finding(Kind.FOREIGN, False, report.server_id, words)


def _life(machine: Machine, report: MachineReport | None) -> Iterator[Finding]:
    if machine.server_id is None:
        return
    if report is not None and not machine.is_open and report.phase in _RUNS:
        yield _back(machine.server_id, report)
    elif report is None and machine.state in (MachineState.READY, MachineState.LOST):
        words = "our books count on and the provider does not list it; `comfyctl machines reap` finds out and closes it"
        yield Finding(Kind.MISSING, True, machine.server_id, words)


def _back(server_id: ServerId, report: MachineReport) -> Finding:
    words = f"our books have ended it and the provider lists it as {report.status}; `comfyctl machines reap` ends it"
    return Finding(Kind.BACK, True, server_id, words)


def _times(machine: Machine, report: MachineReport, *, now: datetime) -> Iterator[Finding]:
    """Compare when it became ready and when it will stop. The provider's clock may differ from ours."""
    what = machine.server_id or machine.id
    if report.ready_at is not None and machine.ready_at is not None:
        apart = abs(report.ready_at - machine.ready_at)
        if apart > _allowed(now - machine.ready_at):
            words = (
                f"ready at {_at(machine.ready_at)} in our books, at {_at(report.ready_at)} by the provider's clock, "
                f"which may differ from this computer's"
            )
            yield Finding(Kind.READY_TIME, True, what, words, meter(now - apart, now, machine.usd_per_hour))
    ours, theirs = machine.planned_stop_at, report.stopping_at
    if ours is not None and theirs is not None and abs(theirs - ours) > _STOP_SLACK:
        words = (
            f"stops at {_at(ours)} in our books, at {_at(theirs)} by the provider; somebody else changed its duration"
        )
        later = meter(ours, theirs, machine.usd_per_hour) if theirs > ours else None
        yield Finding(Kind.STOP_TIME, theirs > ours, what, words, later)


def _ledger(bill: MachineBill, *, now: datetime) -> Iterator[Finding]:
    """Compare the ledger of a machine whose bill is closed with its billed time, and each amount with its rate."""
    machine, interval = bill.machine, billed_interval(bill.machine, now=now)
    what = machine.server_id or machine.id
    for entry in bill.entries:
        right = meter(entry.started_at, entry.ended_at, entry.usd_per_hour)
        if right != entry.amount_usd:
            words = f"an entry of {show_usd(entry.amount_usd)} for time that costs {show_usd(right)}"
            yield Finding(Kind.PRICE, True, what, words, abs(right - entry.amount_usd))
    if interval is None or (machine.is_open and machine.stop_accepted_at is None):
        return
    posted = sum((entry.ended_at - entry.started_at for entry in bill.entries), timedelta(0))
    covered = _union([(entry.started_at, entry.ended_at) for entry in bill.entries])
    whole = interval[1] - interval[0]
    if posted > covered + SLACK:
        twice = meter(now - (posted - covered), now, machine.usd_per_hour)
        yield Finding(Kind.LEDGER, True, what, f"{_span(posted - covered)} are in the ledger twice", twice)
    if abs(whole - covered) > _allowed(whole):
        words = f"billed for {_span(whole)} by its times, {_span(covered)} are in the ledger"
        yield Finding(Kind.LEDGER, True, what, words, meter(now - abs(whole - covered), now, machine.usd_per_hour))
    elif whole - covered > UNWRITTEN:
        words = f"the last {_span(whole - covered)} of its bill are not in the ledger; `comfyctl machines reap` adds it"
        yield Finding(Kind.LEDGER, True, what, words, meter(now - (whole - covered), now, machine.usd_per_hour))


def _union(stretches: Sequence[tuple[datetime, datetime]]) -> timedelta:
    """Return how much time the stretches cover together."""
    covered, reached = timedelta(0), None
    for start, end in sorted(stretches):
        begins = start if reached is None else max(start, reached)
        if end > begins:
            covered += end - begins
            reached = end
    return covered


def _allowed(billed: timedelta) -> timedelta:
    return max(SLACK, billed * float(TOLERANCE))


def _at(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _span(span: timedelta) -> str:
    return f"{span.total_seconds():.0f} s"


def balance_finding(check: BalanceCheck) -> Finding:
    """Return what balance and ledger say, as a note: other products are paid from the same money."""
    return Finding(Kind.BALANCE, False, "account", check.words, None if check.agrees else check.elsewhere)
