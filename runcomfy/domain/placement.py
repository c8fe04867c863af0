"""
Which job that waits goes to which machine, and which one that waits its turn at a machine is better taken back.

Rule 1: priority first. While a job could be placed, or is held for something better, none of lower priority is.
Rule 2: an idle machine before a seat behind somebody, unless loading the models there takes longer than the wait here.
Rule 3: among idle machines those that have computed the workflow come first; then the earliest expected end counts
        (free + load if cold + run), then the price.
Rule 4: a seat behind another job is given only if no machine, idle or starting, is expected to begin the job earlier:
        until then the order may still change.
Rule 5: a job may be passed over by a later one of the same priority for which the machine is warm, or be held for a
        machine that starts; both together for no longer than `patience_s` from the first time. Then it goes first.
Rule 6: what has a prompt on a machine already goes there, and nowhere else.

Times are seconds from now. Where nothing is known of a workflow, whoever asks puts in what he presumes; loading that
nobody has measured is to count as nothing, or no machine but the first one would ever be tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from heapq import heappop, heappush
from itertools import groupby
from typing import Protocol

from runcomfy.domain.queued import RowId


class Foresight(Protocol):
    """What is expected of a workflow on a machine type, in seconds."""

    def run_s(self, workflow: str, server_type: str) -> float:
        """Return how long it computes once its models are loaded."""
        ...

    def load_s(self, workflow: str, server_type: str) -> float:
        """Return how much longer it takes where they are not; 0 if nobody knows."""
        ...


@dataclass(frozen=True, slots=True)
class Pending:
    """A job that could be placed."""

    id: RowId
    priority: int
    """The lower, the more urgent."""
    workflow: str
    bound: str | None = None
    """The machine where its prompt is."""
    delayed_s: float = 0.0
    """How long ago it was first passed over or held; 0 if it never was."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A machine, as far as placement cares."""

    id: str
    server_type: str
    usd_per_hour: float
    seats: int
    """How many more jobs it may have."""
    taken: int = 0
    """How many compute there or wait their turn."""
    free_s: float = 0.0
    """When all of those are expected to be done."""
    ready_s: float = 0.0
    """When it is expected to be usable; more than 0: it starts, and nothing can be placed there yet."""
    warm: frozenset[str] = frozenset()
    """Workflows it has computed, or will have when its turn comes."""
    usable: bool = True
    """Whether it takes jobs; False: only those that are bound to it."""

    @property
    def open(self) -> bool:
        """Whether a job can be placed there now."""
        return self.usable and self.seats > 0 and self.ready_s <= 0

    def with_job(self, job: Pending, foresight: Foresight) -> Spot:
        """Return the machine with one more job."""
        return replace(
            self,
            seats=self.seats - 1,
            taken=self.taken + 1,
            free_s=_begins(job, self, foresight) + foresight.run_s(job.workflow, self.server_type),
            warm=self.warm | {job.workflow},
        )


@dataclass(frozen=True, slots=True)
class Placement:
    """A job and where it goes."""

    job: RowId
    machine: str


@dataclass(frozen=True, slots=True)
class Placed:
    """What was decided for the jobs that were looked at."""

    placements: tuple[Placement, ...] = ()
    delayed: frozenset[RowId] = frozenset()
    """Those that others passed, or that are held for a machine that starts."""


def place(jobs: Sequence[Pending], machines: Iterable[Spot], foresight: Foresight, *, patience_s: float) -> Placed:
    """Return what goes where now. `jobs` are in the order of the queue: priority, then age."""
    round_ = _Round(_Machines(machines), foresight, patience_s)
    for job in jobs:
        if job.bound is not None:
            round_.put(job, job.bound)
    free = sorted((job for job in jobs if job.bound is None), key=lambda job: job.priority)
    for _, equals in groupby(free, key=lambda job: job.priority):
        if not round_.place(list(equals)):
            break
    placed = {placement.job for placement in round_.placements}
    return Placed(tuple(round_.placements), frozenset(round_.delayed - placed))


class _Machines:
    """Machines of one round. Those that differ only in when they are free are asked as one: there may be thousands."""

    def __init__(self, spots: Iterable[Spot]) -> None:
        self._spots: dict[str, Spot] = {}
        self._alike: dict[tuple[object, ...], list[tuple[float, str, int, Spot]]] = {}
        self._count = 0
        for spot in spots:
            self.put(spot)

    def get(self, name: str) -> Spot | None:
        """Return a machine as it is now."""
        return self._spots.get(name)

    def put(self, spot: Spot) -> None:
        """Take a machine in, or what became of it."""
        self._spots[spot.id] = spot
        if spot.usable and spot.seats > 0:
            kind = (spot.ready_s > 0, spot.taken > 0, spot.server_type, spot.usd_per_hour, spot.warm)
            self._count += 1  # two that are equal are not to be compared any further
            free_s = max(spot.ready_s, spot.free_s)
            heappush(self._alike.setdefault(kind, []), (free_s, spot.id, self._count, spot))

    def firsts(self) -> Iterator[Spot]:
        """Give the machine that is free first of each kind, of those that have a seat or will have one."""
        for kind in list(self._alike):
            alike = self._alike[kind]
            while alike and self._spots[alike[0][1]] is not alike[0][-1]:
                heappop(alike)
            if alike:
                yield alike[0][-1]
            else:
                del self._alike[kind]


@dataclass(slots=True)
class _Round:
    """One look at the queue."""

    machines: _Machines
    foresight: Foresight
    patience_s: float
    placements: list[Placement] = field(default_factory=list)
    delayed: set[RowId] = field(default_factory=set)

    def place(self, equals: list[Pending]) -> bool:
        """Place jobs of one priority; False if one of them is left over."""
        late = [job for job in equals if job.delayed_s >= self.patience_s]
        waiting = late + [job for job in equals if job.delayed_s < self.patience_s]
        left_over = False
        while waiting:
            job = waiting[0]
            best = self._best(job)
            if best is None:
                return False
            if job.delayed_s < self.patience_s:
                if (starting := self._earlier(job, best)) is not None:
                    # Whoever comes next is to find it taken, or all would wait for the same one.
                    self.machines.put(starting.with_job(job, self.foresight))
                    self.delayed.add(job.id)
                    left_over = True
                    waiting.pop(0)
                    continue
                if (other := self._warmer(best, waiting)) is not None:
                    self.delayed.update(passed.id for passed in waiting[: waiting.index(other)])
                    waiting.remove(other)
                    self.put(other, best.id)
                    continue
            waiting.pop(0)
            self.put(job, best.id)
        return not left_over

    def put(self, job: Pending, machine: str) -> None:
        """Place a job."""
        if (spot := self.machines.get(machine)) is not None:
            self.machines.put(spot.with_job(job, self.foresight))
            self.placements.append(Placement(job.id, machine))

    def _best(self, job: Pending) -> Spot | None:
        """Return where a job goes if it goes anywhere now."""
        opened = [spot for spot in self.machines.firsts() if spot.open]
        idle = [spot for spot in opened if spot.taken == 0]
        behind = [spot for spot in opened if spot.taken > 0]

        def end(spot: Spot) -> tuple[float, float, str]:
            ends = _begins(job, spot, self.foresight) + self.foresight.run_s(job.workflow, spot.server_type)
            return ends, spot.usd_per_hour, spot.id

        first = min(idle, key=lambda spot: (job.workflow not in spot.warm, *end(spot)), default=None)
        second = min(behind, key=end, default=None)
        if first is None or second is None:
            return first or second
        return second if end(second)[0] < end(first)[0] else first

    def _earlier(self, job: Pending, best: Spot) -> Spot | None:
        """Return the machine that starts and will begin the job before a seat behind others comes to it."""
        if best.taken == 0:
            return None
        begins = _begins(job, best, self.foresight)
        starting = [spot for spot in self.machines.firsts() if spot.ready_s > 0]
        soonest = min(starting, key=lambda spot: _begins(job, spot, self.foresight), default=None)
        return soonest if soonest is not None and _begins(job, soonest, self.foresight) < begins else None

    def _warmer(self, spot: Spot, waiting: Sequence[Pending]) -> Pending | None:
        """Return the job that may pass the first one: the machine is warm for it, and it finds no better one."""
        if waiting[0].workflow in spot.warm:
            return None
        for job in waiting[1:]:
            if job.workflow in spot.warm and (own := self._best(job)) is not None and own.id == spot.id:
                return job
        return None


def _begins(job: Pending, spot: Spot, foresight: Foresight) -> float:
    """Return when a job is expected to compute there, models loaded."""
    load = 0.0 if job.workflow in spot.warm else foresight.load_s(job.workflow, spot.server_type)
    return max(spot.ready_s, spot.free_s) + load


# -- second thoughts -----------------------------------------------------------------------------------------------


class BackWhy(StrEnum):
    """Why a job that waits its turn is taken back."""

    DRAINS = "its machine takes no further jobs"
    URGENT = "a more urgent job came"
    IDLE = "another machine could begin it at once"


@dataclass(frozen=True, slots=True)
class Second:
    """A job whose prompt waits its turn at a machine, or is being prepared for that."""

    id: RowId
    priority: int
    workflow: str
    machine: str
    begins_s: float
    """When its turn is expected."""


def take_back(
    seconds: Collection[Second],
    unplaced: Sequence[Pending],
    machines: Iterable[Spot],
    foresight: Foresight,
    *,
    gain_s: float,
) -> dict[RowId, BackWhy]:
    """Return who goes back to the queue, and why. `unplaced`: what is left after `place`; `machines` after it, too.

    `gain_s`: so much earlier an idle machine must begin a job to be worth the trouble of moving it.
    """
    spots = {spot.id: spot for spot in machines}
    back: dict[RowId, BackWhy] = {}
    staying: list[Second] = []
    for second in seconds:
        spot = spots.get(second.machine)
        if spot is None or not spot.usable:
            back[second.id] = BackWhy.DRAINS
        else:
            staying.append(second)
    if not any(spot.open for spot in spots.values()):
        for job in sorted((job for job in unplaced if job.bound is None), key=lambda job: job.priority):
            yielding = [second for second in staying if second.priority > job.priority]
            if not yielding:
                break
            # Of the least urgent ones the seat whose turn comes first is worth most.
            least = min(yielding, key=lambda second: (-second.priority, second.begins_s))
            staying.remove(least)
            back[least.id] = BackWhy.URGENT
        return back
    for spot in [spot for spot in spots.values() if spot.open and spot.taken == 0]:
        gains = [(second.begins_s - _load(second, spot, foresight), second) for second in staying]
        worth = [gain for gain in gains if gain[0] >= gain_s]
        best = max(worth, key=lambda gain: (-gain[1].priority, gain[0]), default=None)
        if best is not None:
            staying.remove(best[1])
            back[best[1].id] = BackWhy.IDLE
    return back


def _load(second: Second, spot: Spot, foresight: Foresight) -> float:
    return 0.0 if second.workflow in spot.warm else foresight.load_s(second.workflow, spot.server_type)
