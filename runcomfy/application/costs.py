"""
Reports of money: the shares of every machine's bill, grouped by whatever is asked for.

All tables are sums over the same numbers (machine x job x UTC day, see `shares`), so a table by day and one by job show
the same total, to the millionth of a dollar, and both show that of the ledger. A table by hour is cut finer, its total
is that of the ledger, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from itertools import pairwise
from typing import Any

from runcomfy.application.ledger import MachineBill
from runcomfy.domain.forecast import Forecast
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine
from runcomfy.domain.money import MICRODOLLAR
from runcomfy.domain.shares import Share, share
from runcomfy.domain.work import Work


class By(StrEnum):
    """What a report is grouped by."""

    DAY = "day"
    HOUR = "hour"
    MACHINE = "machine"
    TYPE = "type"
    JOB = "job"
    WORKFLOW = "workflow"
    USER = "user"
    PROJECT = "project"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a report. Money is USD."""

    key: str | None
    """The day (YYYY-MM-DD, UTC) or hour (YYYY-MM-DDTHH:00Z), the provider's id of the machine (ours, if it has none),
    its type, the job's id, the workflow, user or project; None: what belongs to nobody."""
    busy_usd: Decimal
    idle_usd: Decimal
    nobody_usd: Decimal
    """The part of `idle_usd` that no job caused."""
    jobs: int
    """Different jobs that were at a machine there."""
    busy: timedelta
    about: str = ""
    """Of a machine its type, of a job its workflow."""
    so_far: bool = False
    """Whether a machine of it still runs."""

    @property
    def usd(self) -> Decimal:
        """All of it."""
        return self.busy_usd + self.idle_usd

    @property
    def usd_per_job(self) -> Decimal | None:
        """What one job cost, idle money included; None without jobs."""
        return (self.usd / self.jobs).quantize(MICRODOLLAR) if self.jobs else None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it appears in `--json`; money as text with all its digits."""
        each = self.usd_per_job
        return {
            "key": self.key,
            "about": self.about,
            "spent_usd": format(self.usd, "f"),
            "busy_usd": format(self.busy_usd, "f"),
            "idle_usd": format(self.idle_usd, "f"),
            "nobody_usd": format(self.nobody_usd, "f"),
            "jobs": self.jobs,
            "busy_seconds": self.busy.total_seconds(),
            "usd_per_job": None if each is None else format(each, "f"),
            "so_far": self.so_far,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What was spent in [`since`, `until`), and what will have been by the end of the day and the month."""

    since: datetime
    until: datetime
    by: By
    rows: tuple[Row, ...]
    total: Row
    forecasts: tuple[Forecast, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the report as it appears in `--json`."""
        return {
            "since": self.since.isoformat(),
            "until": self.until.isoformat(),
            "by": str(self.by),
            "rows": [row.as_dict() for row in self.rows],
            "total": self.total.as_dict(),
            "forecasts": [forecast_dict(one) for one in self.forecasts],
        }


def forecast_dict(one: Forecast) -> dict[str, Any]:
    """Return a forecast as it appears in `--json`."""
    return {
        "of": one.name,
        "ends_at": one.end.isoformat(),
        "spent_usd": format(one.spent, "f"),
        "committed_usd": format(one.committed, "f"),
        "low_usd": format(one.low, "f"),
        "expected_usd": format(one.expected, "f"),
        "high_usd": format(one.high, "f"),
        "from": str(one.method),
        "samples": one.samples,
    }


def days_between(since: datetime, until: datetime) -> list[datetime]:
    """Return every midnight (UTC) between two moments, both left out."""
    return _between(since.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0), until, timedelta(days=1))


def hours_between(since: datetime, until: datetime) -> list[datetime]:
    """Return every full hour (UTC) between two moments, both left out."""
    return _between(since.astimezone(UTC).replace(minute=0, second=0, microsecond=0), until, timedelta(hours=1))


def _between(begin: datetime, until: datetime, step: timedelta) -> list[datetime]:
    found = []
    at = begin + step
    while at < until:
        found.append(at)
        at += step
    return found


def grouped(
    bills: Sequence[MachineBill], *, since: datetime, until: datetime, by: By, silence: timedelta
) -> tuple[tuple[Row, ...], Row]:
    """Return the rows of a report and its total.

    Days come in their order, everything else by what it cost, what is nobody's last. A day on which nothing was spent
    has no row.
    """
    sums: dict[str | None, _Sum] = {}
    total = _Sum()
    between = hours_between if by is By.HOUR else days_between
    for cell in _cells(bills, [since, *between(since, until), until], silence=silence):
        key, about = _key(by, cell)
        for one in (sums.setdefault(key, _Sum(about=about)), total):
            one.add(cell)
    rows = [found.row(key) for key, found in sums.items() if found.counts]
    if by in (By.DAY, By.HOUR):
        rows.sort(key=lambda row: row.key or "")
    else:
        rows.sort(key=lambda row: (row.key is None, -row.usd, row.key or ""))
    return tuple(rows), total.row(None)


@dataclass(frozen=True, slots=True)
class Slot:
    """The money and the work of a stretch of time."""

    start: datetime
    end: datetime
    usd: Decimal
    busy: timedelta
    """Computing time of all machines together."""
    idle: timedelta
    """Billed time in which nothing was computed."""
    jobs: int
    """Different jobs that were at a machine in it."""


class Slots:
    """Adds up what was spent between each two cuts, some machines at a time: a month has more jobs than memory."""

    def __init__(self, cuts: Sequence[datetime], *, silence: timedelta) -> None:
        """`cuts` are in order. Nothing is spent yet."""
        self._cuts, self._silence = cuts, silence
        self._sums = {start: _Sum() for start in cuts[:-1]}
        self._billed = dict.fromkeys(cuts[:-1], timedelta(0))

    def add(self, bills: Sequence[MachineBill]) -> None:
        """Add the bills of machines, with their works; each machine once. Blocks for many jobs."""
        for cell in _cells(bills, self._cuts, silence=self._silence):
            self._sums[cell.day].add(cell)
        pieces = [(piece.start, piece.end) for bill in bills for piece in bill.pieces]
        for start, end in pairwise(self._cuts):
            self._billed[start] += sum(
                (max(timedelta(0), min(e, end) - max(s, start)) for s, e in pieces), timedelta(0)
            )

    @property
    def found(self) -> list[Slot]:
        """All slots in their order, also those without money."""
        found = []
        for start, end in pairwise(self._cuts):
            one = self._sums[start]
            idle = max(timedelta(0), self._billed[start] - one.busy)
            found.append(Slot(start, end, one.busy_usd + one.idle_usd, one.busy, idle, len(one.jobs)))
        return found


@dataclass(frozen=True, slots=True)
class _Cell:
    """A share with all it can be grouped by."""

    part: Share
    machine: Machine
    work: Work | None
    day: datetime
    """Since when: the cut before it."""
    grows: bool
    """Whether the machine still runs in it."""


def _cells(bills: Sequence[MachineBill], cuts: Sequence[datetime], *, silence: timedelta) -> Iterator[_Cell]:
    """Yield the shares between the first cut and the last."""
    since = cuts[0]
    for bill in bills:
        works = {work.job_id: work for work in bill.works}
        grows_at = max((piece.end for piece in bill.pieces), default=since) if bill.machine.bills else None
        for part in share(bill.machine.id, bill.pieces, bill.works, silence=silence, cuts=cuts):
            if 1 <= part.slot < len(cuts):
                work = works.get(part.job_id) if part.job_id is not None else None
                day, ends = cuts[part.slot - 1], cuts[part.slot]
                yield _Cell(part, bill.machine, work, day, grows_at is not None and grows_at <= ends)


def _key(by: By, cell: _Cell) -> tuple[str | None, str]:
    work = cell.work
    match by:
        case By.DAY:
            return cell.day.astimezone(UTC).date().isoformat(), ""
        case By.HOUR:
            return f"{cell.day.astimezone(UTC):%Y-%m-%dT%H:00Z}", ""
        case By.TYPE:
            return cell.machine.server_type, ""
        case By.MACHINE:
            return cell.machine.server_id or cell.machine.id, cell.machine.server_type
        case By.JOB:
            return cell.part.job_id, work.workflow if work is not None else ""
    if work is None:
        return None, ""
    return {By.WORKFLOW: work.workflow, By.USER: work.user, By.PROJECT: work.project}[by], ""


@dataclass(slots=True)
class _Sum:
    """A row while it is added up."""

    about: str = ""
    busy_usd: Decimal = Decimal(0)
    idle_usd: Decimal = Decimal(0)
    nobody_usd: Decimal = Decimal(0)
    busy: timedelta = timedelta(0)
    jobs: set[JobId] = field(default_factory=set)
    so_far: bool = False

    def add(self, cell: _Cell) -> None:
        part = cell.part
        self.busy_usd += part.busy_usd
        self.idle_usd += part.idle_usd
        self.busy += part.busy
        self.so_far |= cell.grows
        if part.job_id is None:
            self.nobody_usd += part.usd
        elif part.there:
            self.jobs.add(part.job_id)

    @property
    def counts(self) -> bool:
        return bool(self.jobs or self.busy_usd or self.idle_usd)

    def row(self, key: str | None) -> Row:
        return Row(
            key, self.busy_usd, self.idle_usd, self.nobody_usd, len(self.jobs), self.busy, self.about, self.so_far
        )
