"""
How cheap a stream of jobs could have been at best: a lower bound that no schedule can beat, not even one that knows the
future. What a policy cost is told as a ratio to it.

The schedule that is bounded
    It knows every job, so it launches early enough never to wait for a boot, which bills nothing; a start then costs
    the load alone, W billed seconds. A machine bills from its load to its end. Machines are as many as one likes. A job
    may wait for a running machine if that is cheaper. In units of machine-seconds, with rho = price of waiting / price
    of the machine, J = work + W per start + idle time + rho x waiting.

What it looks like, for rho >= 1
    1. A machine that idles for W or longer may as well be ended and started again: so idle times are below W, and a
       machine is a chain of jobs. Job j comes after i with the gap g = arrival(j) - arrival(i) - run time(i).
    2. Nothing is delayed for its own sake: a delay of d costs rho d and saves at most d of idle time behind it. So
       wait(j) = max(0, wait(i) - g), and 0 at the head of a chain.
    3. No wait is longer than `longest_wait`. Cut the chain before j: that costs W, saves rho wait(j), and makes the
       idle time behind j longer by at most min(wait(j), W). In an optimum this gains nothing: rho w <= W + min(w, W).
    4. If i and j are both there when the first of them begins, one right after the other, the shorter one goes first
       (swapping them changes nothing else); of equals, the one that is first in the list.

The bound
    Every job has one predecessor or a start, and at most one successor. The cost of an edge depends on the wait w with
    which its chain arrives at i: idle = max(0, g - w) and w' = max(0, w - g) at j. Give each job a charge p(w) with
    p(0) = 0, ask it for leaving the job with the wait w, and pay it back for arriving with it. Over a whole chain that
    adds up to nothing: every job is left with the wait with which it was arrived at. So J is at least the cheapest
    assignment of predecessors where every edge, each taken for itself, has the w it likes best,

        cost(i, j) = min over 0 <= w <= cap(i) of  max(0, g - w) + rho w' + p_i(w) - p_j(w'),

    a start costs W, and the end of a chain min over w of p_i(w). An assignment may contain circles, which no schedule
    can; that makes it cheaper, never dearer. This holds for all charges. As a minimum of functions that are linear in
    them the bound is concave, and a subgradient ascent makes it as good as it gets. p(w) = w alone would say that a gap
    costs g and an overlap o costs (rho - 1) o. Charges are piecewise linear between a few knots, and so is the cost of
    an edge, so that its minimum is at a knot of i, at g, at g plus a knot of j, or at an end of the range. `cap` is the
    longest wait that a job can have, from the jobs that can come before it.

    Parts of the stream between which nothing can interact are bounded one by one, and the bounds add up.

For rho < 1, J = rho J_1 + (1 - rho) x (billed time), where J_1 has rho = 1: both parts have bounds.

The other end of the bracket is `zero_wait`: the cheapest schedule in which no job waits, exactly. Where one machine
ends and another job comes, taking the machine that became idle last is optimal: the price of a gap, min(g, W), is
concave, so nested pairs are never dearer than crossing ones.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runcomfy.domain.plan_view import OfferView

ROUNDS: Final = 200
"""Steps of the ascent for one part of a stream, at most; it stops before where the bracket has closed."""
EFFORT: Final = 400_000
"""Edges times steps that a large part may take, so that a day without a pause does not take minutes."""
CLOSED: Final = 0.0005
"""How narrow a part's bracket must be, as a share of it, to be left alone."""
AIM: Final = 0.05
"""Each step is as long as it would take to raise the best bound by so much (Polyak's rule with a guessed optimum; the
upper end of the bracket is too far away to aim at)."""
PATIENCE: Final = 5
"""Steps without a better bound before they get shorter."""
KNOTS: Final = 2
"""Knots of a charge between no wait and the longest; four were better by less than 0.1 %."""
DENSE: Final = 3000
"""From so many edges on a part does with charges that are straight lines."""


@dataclass(frozen=True, slots=True)
class Span:
    """A job: when it came and how long it runs, in seconds."""

    at: float
    service_s: float


@dataclass(frozen=True, slots=True)
class Bracket:
    """What the best schedule costs lies between these, in USD of J."""

    bound_usd: float
    """No schedule is cheaper."""
    schedule_usd: float
    """The best schedule that was found on the way; it may let jobs wait."""
    zero_wait_usd: float
    """The cheapest schedule in which no job ever waits."""

    @property
    def gap(self) -> float:
        """How far apart the ends are, as a share of the bound."""
        return self.schedule_usd / self.bound_usd - 1 if self.bound_usd else 0.0


def bracket(jobs: Sequence[Span], offers: Sequence[OfferView], *, wait_usd_per_hour: float) -> Bracket:
    """Return the bracket for these jobs. With several offers, each figure is that of the offer where it is lowest.

    A machine of one's own costs nothing, and so the bound is 0 with one.
    """
    rate = min(0.0 if offer.own else offer.usd_per_hour for offer in offers) / 3600
    if not jobs or rate <= 0:
        return Bracket(0.0, 0.0, 0.0)
    starts = [
        (offer.load_s + (offer.boot_s if offer.boot_billed else 0.0)) * offer.usd_per_hour / 3600 for offer in offers
    ]
    speed = min(offer.speed for offer in offers)
    spans = sorted((Span(job.at, job.service_s * speed) for job in jobs), key=lambda job: job.at)
    low, found, waitless = bracket_s(spans, start_s=min(starts) / rate, rho=wait_usd_per_hour / 3600 / rate)
    return Bracket(low * rate, found * rate, waitless * rate)


def bracket_s(jobs: Sequence[Span], *, start_s: float, rho: float) -> tuple[float, float, float]:
    """Return bound, best schedule found and zero-wait optimum in machine-seconds; `jobs` in order of arrival."""
    work = sum(job.service_s for job in jobs)
    if rho < 1:
        low, found, waitless = bracket_s(jobs, start_s=start_s, rho=1.0)
        # Each end by itself: what was found at rho = 1 waits no cheaper than rho, so it stays an upper end.
        return rho * low + (1 - rho) * (work + (start_s if jobs else 0.0)), found, waitless
    low = found = waitless = 0.0
    for part in _parts(jobs, start_s, longest_wait(start_s, rho)):
        without = zero_wait(part, start_s)
        waitless += without
        if len(part) == 1:
            low, found = low + start_s, found + start_s
            continue
        lower, upper = _Part(part, start_s, rho).ascend(without)
        low, found = low + lower, found + upper
    return work + low, work + found, work + waitless


def longest_wait(start_s: float, rho: float) -> float:
    """Return how long a job waits at most in an optimal schedule, in seconds; for rho >= 1."""
    return start_s / (rho - 1) if rho >= 2 else 2 * start_s / rho


def zero_wait(jobs: Sequence[Span], start_s: float) -> float:
    """Return starts and idle time of the cheapest schedule in which no job waits, in machine-seconds."""
    running: list[float] = []
    idle: list[float] = []
    cost = 0.0
    for job in jobs:
        while running and running[0] <= job.at:
            idle.append(heapq.heappop(running))
        if idle and job.at - idle[-1] < start_s:
            cost += job.at - idle.pop()
        else:
            cost += start_s
            idle.clear()  # whatever became idle before is older still
        heapq.heappush(running, job.at + job.service_s)
    return cost


def _parts(jobs: Sequence[Span], start_s: float, wait_s: float) -> list[list[Span]]:
    """Split the stream where nothing before can matter to what comes after."""
    parts: list[list[Span]] = []
    over = -math.inf
    for job in jobs:
        if job.at > over + start_s + wait_s:
            parts.append([])
            over = -math.inf
        parts[-1].append(job)
        over = max(over, job.at + job.service_s)
    return parts


_Terms = tuple[tuple[int, float], ...]
"""Which charges at knots a price depends on, and how: number of the knot, factor."""


class _Part:
    """A part of the stream: its edges, and the ascent."""

    def __init__(self, jobs: Sequence[Span], start_s: float, rho: float) -> None:
        self._jobs, self._start, self._rho = jobs, start_s, rho
        self._longest = longest_wait(start_s, rho)
        self._near = self._neighbours()
        self._cap = self._caps()
        self._count = sum(len(near) for near in self._near)
        self._first: list[float] = []
        """The charges that the ascent begins with, by number of the knot."""
        self._knots = [self._knots_of(j) for j in range(len(jobs))]
        self._edges = [
            [(i, self._choices(i, j, gap)) for i, gap in near if self._cap[i] + self._start > gap]
            for j, near in enumerate(self._near)
        ]

    def _neighbours(self) -> list[list[tuple[int, float]]]:
        """Return for every job those that may come right before it, with the gap."""
        jobs, reach = self._jobs, self._start + self._longest
        near: list[list[tuple[int, float]]] = [[] for _ in jobs]
        ends = sorted((job.at + job.service_s, i) for i, job in enumerate(jobs))
        for j, later in enumerate(jobs):
            first = bisect.bisect_right(ends, (later.at - reach, len(jobs)))
            last = bisect.bisect_right(ends, (later.at + self._longest, len(jobs)))
            for _, i in ends[first:last]:
                earlier = jobs[i]
                # Both are there when the first begins: then the shorter one is it.
                swapped = earlier.at >= later.at and (earlier.service_s, i) > (later.service_s, j)
                if i != j and not swapped:
                    near[j].append((i, later.at - earlier.at - earlier.service_s))
        return near

    def _caps(self) -> list[float]:
        """Return the longest wait that each job can have: as long as what may come before it makes it."""
        caps = [0.0] * len(self._jobs)
        changed = True
        rounds = 0
        while changed and rounds < len(caps):
            changed = False
            rounds += 1
            for j, near in enumerate(self._near):
                cap = max((min(self._longest, caps[i] - gap) for i, gap in near), default=0.0)
                if cap > caps[j] + 1e-9:
                    caps[j], changed = cap, True
        # Where this has not come to rest, waits may still grow: then only the general limit is sure.
        return [self._longest if cap else 0.0 for cap in caps] if changed else caps

    def _knots_of(self, j: int) -> list[tuple[float, int]]:
        """Return the waits between which the charge of a job is a straight line, and their numbers; 0 has none."""
        cap = self._cap[j]
        if cap <= 0:
            return [(0.0, -1)]
        # The wait behind a single job that did not wait itself is the one that occurs most.
        usual = sorted({-gap for _, gap in self._near[j] if 0 < -gap < cap - 1e-6})
        count = min(len(usual), KNOTS if self._count <= DENSE else 0)
        waits = [*(usual[(2 * k + 1) * len(usual) // (2 * count)] for k in range(count)), cap]
        knots = [(0.0, -1)]
        for wait in waits:
            knots.append((wait, len(self._first)))
            self._first.append((1 - 1 / self._rho) * wait)
        return knots

    def _charge(self, j: int, wait: float) -> _Terms:
        """Return the charge of a job for a wait, as a mean of those at the knots beside it."""
        knots = self._knots[j]
        if wait <= 0 or len(knots) == 1:
            return ()
        after = min(bisect.bisect_left(knots, (wait, -1)), len(knots) - 1)
        (low, below), (high, above) = knots[after - 1], knots[after]
        share = min(1.0, (wait - low) / (high - low))
        return tuple((knot, factor) for knot, factor in ((below, 1 - share), (above, share)) if knot >= 0 and factor)

    def _choices(self, i: int, j: int, gap: float) -> list[tuple[float, _Terms]]:
        """Return what an edge costs with each wait that can be the best one: a sum without charges, and the charges."""
        most = min(self._cap[i], gap + self._longest)
        waits = {0.0, most, gap, *(w for w, _ in self._knots[i]), *(gap + w for w, _ in self._knots[j])}
        choices = []
        for wait in waits:
            if not 0 <= wait <= most:
                continue
            then = max(0.0, wait - gap)
            charges = (*self._charge(i, wait), *((knot, -factor) for knot, factor in self._charge(j, then)))
            choices.append((max(0.0, gap - wait) + self._rho * then, charges))
        return choices

    def ascend(self, upper: float) -> tuple[float, float]:
        """Return the best bound and the best schedule found, in machine-seconds without the work."""
        charges = self._first
        best, step, stuck = 0.0, 1.0, 0
        for _ in range(max(8, min(ROUNDS, EFFORT // max(1, self._count)))):
            value, slope, before = self._relaxed(charges)
            upper = min(upper, self._schedule(before))
            if value > best + 1e-9:
                best, stuck = value, 0
            else:
                stuck += 1
                if stuck > PATIENCE:
                    step, stuck = step * 0.7, 0
            length = sum(part * part for part in slope)
            if length <= 1e-12 or upper - best <= CLOSED * upper:
                break
            pace = step * max(best * (1 + AIM) - value, 1e-3) / length
            charges = [charge + pace * part for charge, part in zip(charges, slope, strict=True)]
        return min(best, upper), upper

    def _relaxed(self, charges: Sequence[float]) -> tuple[float, list[float], list[int]]:
        """Return the bound for these charges, its slope, and for each job its predecessor (-1: a start)."""
        ends = [
            min((charges[knot], knot) for _, knot in knots[1:]) if knots[1:] else (0.0, -1) for knots in self._knots
        ]
        ends = [end if end[0] < 0 else (0.0, -1) for end in ends]
        rows: list[list[tuple[float, int]]] = []
        chosen: dict[tuple[int, int], tuple[float, _Terms]] = {}
        for j, edges in enumerate(self._edges):
            row: list[tuple[float, int]] = []
            for i, choices in edges:
                cost = math.inf
                how: _Terms = ()
                for price, terms in choices:
                    for knot, factor in terms:
                        price += factor * charges[knot]
                    if price < cost:
                        cost, how = price, terms
                cost -= ends[i][0]
                if cost < self._start:
                    row.append((cost, i))
                    chosen[i, j] = cost, how
            rows.append(row)
        before = cheapest_predecessors(rows, self._start)
        value = sum(end for end, _ in ends)
        slope = [0.0] * len(charges)
        for j, i in enumerate(before):
            if i < 0:
                value += self._start
                continue
            cost, how = chosen[i, j]
            value += cost
            for knot, factor in how:
                slope[knot] += factor
        followed = set(before)
        for i, (_, knot) in enumerate(ends):
            if knot >= 0 and i not in followed:
                slope[knot] += 1
        return value, slope, before

    def _schedule(self, before: Sequence[int]) -> float:
        """Return what these chains cost as a schedule, circles cut open where they begin."""
        waits: dict[int, float] = {}
        cost = 0.0
        for head in range(len(before)):
            trail: list[int] = []
            job = head
            while job not in waits and job not in trail:
                trail.append(job)
                if before[job] < 0:
                    break
                job = before[job]
            circle = before[trail[-1]] >= 0 and before[trail[-1]] in trail if trail else False
            for job in reversed(trail):
                i = before[job]
                gap = self._jobs[job].at - self._jobs[i].at - self._jobs[i].service_s if i >= 0 else 0.0
                if i < 0 or circle:
                    waits[job], circle = 0.0, False
                    cost += self._start
                    continue
                waits[job] = max(0.0, waits[i] - gap)
                cost += min(self._start, max(0.0, gap - waits[i])) + self._rho * waits[job]
        return cost


def cheapest_predecessors(edges: Sequence[Sequence[tuple[float, int]]], start_s: float) -> list[int]:
    """Return for each job the predecessor of the cheapest assignment, -1 for a start that costs `start_s`.

    `edges[j]` are (cost, predecessor); nobody is a predecessor twice. Jobs are put in one by one, each along the
    shortest augmenting path (Jonker and Volgenant 1987), which ends at a free predecessor or at somebody's start.
    """
    count = len(edges)
    before, after = [-1] * count, [-1] * count
    price_j, price_i = [0.0] * count, [0.0] * count
    for new in range(count):
        if not edges[new]:
            continue
        price_j[new] = min(0.0, *(cost - price_i[i] for cost, i in edges[new]))
        known: dict[int, float] = {}
        via: dict[int, int] = {}
        done: list[int] = []
        closed: set[int] = set()
        heap: list[tuple[float, int]] = []
        row, base = new, 0.0
        best, best_row, end = math.inf, new, -1
        while True:
            here = base - price_j[row]
            if here + start_s < best:
                best, best_row = here + start_s, row
            for cost, i in edges[row]:
                far = here + cost - price_i[i]
                if i not in closed and far < best and far < known.get(i, math.inf):
                    known[i], via[i] = far, row
                    heapq.heappush(heap, (far, i))
            while heap and (heap[0][1] in closed or heap[0][0] > known[heap[0][1]]):
                heapq.heappop(heap)
            if not heap or heap[0][0] >= best:
                break
            base, nearest = heapq.heappop(heap)
            if after[nearest] < 0:
                best, end = base, nearest
                break
            closed.add(nearest)
            done.append(nearest)
            row = after[nearest]
        price_j[new] += best
        for i in done:
            price_j[after[i]] += best - known[i]
            price_i[i] -= best - known[i]
        _augment(new, best_row, end, via, before, after)
    return before


def _augment(new: int, row: int, end: int, via: dict[int, int], before: list[int], after: list[int]) -> None:
    """Move every job on the path to its next predecessor: from the end of the path back to `new`."""
    if end < 0:  # `row` gives up its predecessor and starts afresh
        end, before[row] = before[row], -1
        if row == new:
            return
    while True:
        row = via[end]
        free, before[row], after[end] = before[row], end, row
        if row == new:
            return
        end = free
