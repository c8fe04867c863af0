"""
Who caused which part of a machine's bill.

The rule, in the order in which it is applied to one machine:

1. What is billed are the ledger's intervals and, while the machine runs, the one from the ledger's end to now. Money
   lies evenly in each of them.
2. A job is at the machine from when it takes its seat until it leaves it; it is busy there while the server computes
   its prompt. A row that was never completed (its process died) lasts until the same job began there again, or else to
   the end of the bill; how long it was computed is not known, so none of it counts as busy unless the machine runs and
   it may be there still.
3. Jobs that follow each other with gaps of at most `silence` are an episode. To an episode belong its gaps, the time
   before its first job (up to `silence`; after another episode none), and the time after its last job (up to
   `silence`). The rest belongs to nobody, and so does everything at a machine without jobs.
4. Time in which jobs compute is theirs: where several compute at once, in equal parts. That is busy money.
5. All other time of an episode is shared over its jobs in proportion to their busy seconds as counted in 4; if nobody
   computed, to the seconds at the machine, counted likewise; if there are none either, in equal parts. That is idle
   money.
6. Everything is counted exactly and rounded once, to millionths of a dollar, by largest remainders: the parts of a
   machine add up to its ledger, whatever they are grouped by.

Reports that need parts by day say where days begin (`cuts`); what is rounded are the parts between cuts, so tables by
day, by job and by user are sums over the same numbers and agree with each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Final

from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId
from runcomfy.domain.money import LedgerEntry, billed_interval, meter
from runcomfy.domain.work import Work

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TICK: Final = timedelta(microseconds=1)
_DIGITS: Final = 6
"""Parts are whole millionths of a dollar, or finer where the sum is."""

Stretch = tuple[int, int]
"""From and to, in microseconds since 1970."""

Cover = tuple[int, ...]
"""Which billed intervals an instant lies in: one, unless the ledger has something twice."""


@dataclass(frozen=True, slots=True)
class Billed:
    """An interval of a machine that costs money. Times are aware UTC."""

    start: datetime
    end: datetime
    usd: Decimal
    so_far: bool = False
    """Whether it is not in the ledger yet: the machine runs."""


@dataclass(frozen=True, slots=True)
class Share:
    """A job's part of a machine's bill in one slot of time, or what belongs to nobody."""

    machine_id: MachineId
    job_id: JobId | None
    """None: nobody's."""
    slot: int
    """0 before the first cut, 1 from the first cut on, and so on."""
    busy_usd: Decimal
    """For the time in which the server computed the job's prompt."""
    idle_usd: Decimal
    """For its part of loading, waiting and being kept."""
    busy: timedelta
    """Computing time, overlaps in equal parts."""
    there: bool
    """Whether the job was at the machine in this slot: what it pays here may be for keeping the machine only."""

    @property
    def usd(self) -> Decimal:
        """Busy and idle money together."""
        return self.busy_usd + self.idle_usd


def billed(machine: Machine, entries: Iterable[LedgerEntry], *, now: datetime) -> list[Billed]:
    """Return what the machine's ledger has, and what has run up since (up to now, or to the end of its bill)."""
    found = [Billed(entry.started_at, entry.ended_at, entry.amount_usd) for entry in entries]
    interval = billed_interval(machine, now=now)
    if interval is not None:
        start = max([interval[0], *(piece.end for piece in found)])
        if interval[1] > start:
            found.append(Billed(start, interval[1], meter(start, interval[1], machine.usd_per_hour), so_far=True))
    return found


def share(
    machine_id: MachineId,
    pieces: Sequence[Billed],
    works: Iterable[Work],
    *,
    silence: timedelta,
    cuts: Sequence[datetime] = (),
) -> list[Share]:
    """Share a machine's bill out; the parts add up to the sum of `pieces` exactly.

    `cuts` are in order. The parts come sorted by slot, then job, nobody's last.
    """
    spans = [(_tick(piece.start), _tick(piece.end), piece.usd) for piece in pieces]
    whole = [span for span in spans if span[1] > span[0]]
    runs = any(piece.so_far for piece in pieces)
    timeline = _Timeline(whole, list(works), silence=silence // _TICK, cuts=[_tick(cut) for cut in cuts], runs=runs)
    timeline.run()
    for start, end, usd in spans:
        if end <= start:  # no time in which anybody could have used it
            timeline.nobody[timeline.slot_of(start)] += Fraction(usd)
    return timeline.rounded(machine_id, sum((piece.usd for piece in pieces), Decimal(0)))


@dataclass(slots=True)
class _Episode:
    start: int
    end: int
    jobs: list[JobId]


@dataclass(slots=True)
class _Tally:
    """Microseconds, by whose they are. Where jobs share an interval, by how many share it."""

    busy: dict[tuple[int, JobId, int, int, Cover], int] = field(default_factory=lambda: defaultdict(int))
    """Episode, job, slot, sharers, cover."""
    seated: dict[int, dict[tuple[JobId, int], int]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(int))
    )
    """Episode; job, sharers."""
    idle: dict[tuple[int, int, Cover], int] = field(default_factory=lambda: defaultdict(int))
    """Episode, slot, cover."""
    nobody: dict[tuple[int, Cover], int] = field(default_factory=lambda: defaultdict(int))
    """Slot, cover."""


class _Timeline:
    """One machine's time, walked through once."""

    def __init__(
        self, spans: list[tuple[int, int, Decimal]], works: list[Work], *, silence: int, cuts: list[int], runs: bool
    ) -> None:
        self._spans = spans
        self._runs = runs
        """Whether the bill still grows."""
        self._cuts = cuts
        self._silence = max(0, silence)
        self.busy: dict[tuple[JobId, int], Fraction] = defaultdict(Fraction)
        self.idle: dict[tuple[JobId, int], Fraction] = defaultdict(Fraction)
        self.nobody: dict[int, Fraction] = defaultdict(Fraction)
        self.computed: dict[tuple[JobId, int], Fraction] = defaultdict(Fraction)
        """Microseconds."""
        self._rates: dict[Cover, Fraction] = {}
        self._there: set[tuple[JobId, int]] = set()
        self._seats: dict[JobId, list[Stretch]] = {}
        self._computing: dict[JobId, list[Stretch]] = {}
        if spans:
            self._place(works, min(span[0] for span in spans), max(span[1] for span in spans))

    def slot_of(self, tick: int) -> int:
        """Return in which slot a moment is."""
        return bisect_right(self._cuts, tick)

    def _place(self, works: list[Work], start: int, end: int) -> None:
        """Put every job's stretches, cut to the time from the first to the last billed moment."""
        by_job: dict[JobId, list[Work]] = defaultdict(list)
        for work in works:
            by_job[work.job_id].append(work)
        for job in sorted(by_job):
            rows = sorted(by_job[job], key=_order)
            begins = [_tick(row.began_at) for row in rows[1:]]
            for row, following in zip(rows, [*begins, end], strict=True):
                left_at = row.ended_at or row.computed_at
                began, left = _tick(row.began_at), following if left_at is None else _tick(left_at)
                if began > end or max(left, began) < start:
                    continue  # not within what is billed: nothing to pay
                seat = _clip(began, left, start, end)
                self._seats.setdefault(job, []).append(seat)
                self._there.add((job, self.slot_of(seat[0])))
                until = row.computed_at or row.ended_at
                there_yet = self._runs and row is rows[-1]
                if row.computing_at is not None and (until is not None or there_yet):
                    stretch = _clip(_tick(row.computing_at), _tick(until) if until else following, start, end)
                    self._computing.setdefault(job, []).append(stretch)

    def _episodes(self) -> list[_Episode]:
        """Return the episodes in order, without overlaps. A job that comes back after a silence is in both."""
        seats = sorted((start, end, job) for job, stretches in self._seats.items() for start, end in stretches)
        found: list[_Episode] = []
        for start, end, job in seats:
            if found and start - found[-1].end <= self._silence:
                found[-1].end = max(found[-1].end, end)
                found[-1].jobs.append(job)
            else:
                found.append(_Episode(start, end, [job]))
        for number, episode in enumerate(found):
            episode.end += self._silence  # the gap to the next one is longer than that
            if number == 0:
                episode.start -= self._silence
            episode.jobs = sorted(set(episode.jobs))
        return found

    def run(self) -> None:
        """Put all money where it belongs."""
        episodes = self._episodes()
        tally = self._tally(episodes)
        weights: dict[int, dict[JobId, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        for (number, job, slot, sharers, cover), ticks in tally.busy.items():
            own = Fraction(ticks, sharers)
            self.computed[job, slot] += own
            self.busy[job, slot] += own * self._rate(cover)
            weights[number][job] += own
        idle: dict[tuple[int, int], Fraction] = defaultdict(Fraction)
        for (number, slot, cover), ticks in tally.idle.items():
            idle[number, slot] += ticks * self._rate(cover)
        for (slot, cover), ticks in tally.nobody.items():
            self.nobody[slot] += ticks * self._rate(cover)
        parts: dict[int, dict[JobId, Fraction]] = {}
        for number in {number for number, _ in idle}:
            own_ticks = weights[number] or _seated(tally.seated[number])
            parts[number] = _parts({job: own_ticks.get(job, Fraction(0)) for job in episodes[number].jobs})
        for (number, slot), usd in idle.items():
            for job, part in parts[number].items():
                self.idle[job, slot] += usd * part

    def _tally(self, episodes: Sequence[_Episode]) -> _Tally:
        """Count microseconds by whose they are. Money and parts of them come after, where they are far fewer."""
        tally = _Tally()
        seats, computing = _Walk(self._seats), _Walk(self._computing)
        at, last = 0, len(episodes)
        for start, end in pairwise(self._edges(episodes)):
            cover = tuple(index for index, span in enumerate(self._spans) if span[0] <= start and end <= span[1])
            if not cover:
                seats.during(start, end)
                computing.during(start, end)
                continue
            while at < last and episodes[at].end <= start:
                at += 1
            slot, length = self.slot_of(start), end - start
            here, busy = seats.during(start, end), computing.during(start, end)
            self._there.update((job, slot) for job in here)
            if at == last or episodes[at].start > start:
                tally.nobody[slot, cover] += length
                continue
            for job in here:
                tally.seated[at][job, len(here)] += length
            for job in busy:
                tally.busy[at, job, slot, len(busy), cover] += length
            if not busy:
                tally.idle[at, slot, cover] += length
        return tally

    def _rate(self, cover: Cover) -> Fraction:
        """Return USD per microsecond while these spans are billed."""
        if cover not in self._rates:
            found = [self._spans[index] for index in cover]
            self._rates[cover] = sum((Fraction(usd) / (end - start) for start, end, usd in found), Fraction(0))
        return self._rates[cover]

    def _edges(self, episodes: Sequence[_Episode]) -> list[int]:
        """Return every moment at which anything changes, in order."""
        edges = {tick for start, end, _ in self._spans for tick in (start, end)} | set(self._cuts)
        edges |= {tick for episode in episodes for tick in (episode.start, episode.end)}
        for stretches in (*self._seats.values(), *self._computing.values()):
            edges.update(tick for stretch in stretches for tick in stretch)
        return sorted(edges)

    def rounded(self, machine_id: MachineId, total: Decimal) -> list[Share]:
        """Return the parts in whole units of money; what rounding down leaves goes to the largest remainders."""
        exponent = min(-_DIGITS, int(total.as_tuple().exponent))
        parts: list[tuple[int, str, str, Fraction]] = [
            *((slot, job, "busy", usd) for (job, slot), usd in self.busy.items()),
            *((slot, job, "idle", usd) for (job, slot), usd in self.idle.items()),
            *((slot, "", "nobody", usd) for slot, usd in self.nobody.items()),
        ]
        parts.sort(key=lambda part: part[:3])
        amounts = apportion([part[3] for part in parts], total, exponent=exponent)
        given = {part[:3]: amount for part, amount in zip(parts, amounts, strict=True)}
        zero = Decimal(0)
        shares = [
            Share(
                machine_id,
                job,
                slot,
                given.get((slot, job, "busy"), zero),
                given.get((slot, job, "idle"), zero),
                timedelta(microseconds=round(self.computed.get((job, slot), 0))),
                (job, slot) in self._there,
            )
            for job, slot in {*self.busy, *self.idle, *self._there}
        ]
        shares.sort(key=lambda one: (one.slot, one.job_id or ""))
        nobodys = [
            Share(machine_id, None, slot, zero, given[slot, "", "nobody"], timedelta(0), there=False)
            for slot in sorted(self.nobody)
        ]
        return sorted([*shares, *nobodys], key=lambda one: (one.slot, one.job_id is None))


class _Walk:
    """Which jobs have a stretch that covers an interval, for intervals that come in order and divide no stretch."""

    def __init__(self, stretches: Mapping[JobId, Sequence[Stretch]]) -> None:
        every = [(start, end, job) for job, own in stretches.items() for start, end in own if end > start]
        self._coming = sorted(every, reverse=True)
        self._open: list[tuple[int, JobId]] = []

    def during(self, start: int, end: int) -> list[JobId]:
        """Return the jobs, each once, in order."""
        self._open = [(until, job) for until, job in self._open if until >= end]
        while self._coming and self._coming[-1][0] <= start:
            _, until, job = self._coming.pop()
            if until >= end:
                self._open.append((until, job))
        return sorted({job for _, job in self._open})


def apportion(parts: Sequence[Fraction], total: Decimal, *, exponent: int = -_DIGITS) -> list[Decimal]:
    """Round `parts`, whose sum is `total`, to multiples of 10^`exponent` that add up to `total` exactly.

    Each is rounded down; the units left over go one by one to those that lost most, earlier ones first.
    """
    scale = 10**-exponent
    units, lost = [], []
    for part in parts:
        whole, rest = divmod(part.numerator * scale, part.denominator)
        units.append(whole)
        lost.append(rest / part.denominator)
    left = int(Fraction(total) * scale) - sum(units)
    for index in sorted(range(len(parts)), key=lambda index: (-lost[index], index))[:left]:
        units[index] += 1
    return [Decimal(count).scaleb(exponent) for count in units]


def _seated(ticks: Mapping[tuple[JobId, int], int]) -> dict[JobId, Fraction]:
    """Return each job's time at the machine, where several were there in equal parts."""
    found: dict[JobId, Fraction] = defaultdict(Fraction)
    for (job, sharers), length in ticks.items():
        found[job] += Fraction(length, sharers)
    return found


def _parts(weights: Mapping[JobId, Fraction]) -> dict[JobId, Fraction]:
    """Return which part of the whole is whose; equal parts if nobody has any weight. Those without are left out."""
    whole = sum(weights.values())
    if not whole:
        return dict.fromkeys(weights, Fraction(1, len(weights)))
    return {job: own / whole for job, own in weights.items() if own}


def _clip(start: int, end: int, first: int, last: int) -> Stretch:
    start = min(max(start, first), last)
    return start, min(max(end, start), last)


def _order(work: Work) -> tuple[int, ...]:
    """Return what sorts a job's rows, the same in whatever order they were read; open ends come last."""
    ends = (work.ended_at, work.computed_at, work.computing_at)
    known = (part for at in ends for part in ((1, 0) if at is None else (0, _tick(at))))
    return _tick(work.began_at), work.attempt, *known


def _tick(at: datetime) -> int:
    return (at - _EPOCH) // _TICK
