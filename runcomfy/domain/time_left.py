"""
How long a job will still take, from what its workflow's nodes took before.

    what is left  =  the rest of what runs  +  the nodes after it  +  fetching

Rule 1: like is compared with like: runs on the same type of machine, in which the same nodes were cached, first ones of
        a machine (which load models) with first ones, as far as there are such runs and as far as it makes a
        difference. Runs on other types count scaled by what both types were seen to take.
Rule 2: the nodes after the current one are taken together, run by run, so that what goes together is known to.
        Where earlier runs that began slowly went on slowly, this one is expected to, too.
Rule 3: a node that reports its own progress is believed the more the farther it is.
Rule 4: a workflow that was never run is told by the classes of its nodes; if those are unknown as well, by nothing:
        there is no answer then.
Rule 5: what is told goes down as time passes, also while nothing is heard, and never below zero. A node that takes
        longer than ever is always expected to end soon.

Only values here: no clock, no waiting, no database.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Final

from runcomfy.domain.estimate import History, quantile
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.past_runs import RunPast, in_order
from runcomfy.domain.progress import NodeLabel, Step
from runcomfy.domain.timeline import NodeTime, Timeline
from runcomfy.domain.work import Work

NEWEST: Final = 200
"""Runs of a workflow that are looked at: what was changed since soon counts no more."""
ENOUGH: Final = 5
"""From so many runs on one number may be told."""
ALIKE: Final = 1.25
"""First runs on a machine that take no more than so many times the others are no runs of their own kind."""
_PRIOR_RUNS: Final = 2
_PRIOR_SPREAD: Final = 0.5
"""Standard deviation of the logarithm of run times presumed before any are seen (as in `domain.estimate`)."""
_NORMAL_90: Final = 1.2815515655446004
_UNLINKED: Final = 2.0
"""By how much a range is widened for runs on a machine type that nothing links to this one."""
_BY_CLASS: Final = 1.5
"""By how much a range is widened that only the classes of the nodes tell."""
_OWN_PACE: Final = 0.15
"""How far a node must be for its own pace to count as much as earlier runs do."""
_TOO_SMALL: Final = 1e-4
"""Progress below this says nothing yet."""
_NARROW: Final = 0.6
"""How wide a range may be, against what is expected, for one number to be told. A choice of ours."""
_NARROW_OF_ALL: Final = 0.1
"""The same against the whole run: towards the end nobody minds."""
_NARROW_S: Final = 3.0
_IN_MINUTES_S: Final = 100.0
_IN_HOURS_S: Final = 100 * 60.0
_LEARNING: Final = 8
"""Runs after which half of what earlier runs say about slow beginnings is believed."""
_REMEMBERED: Final = 2_000
_EPOCH: Final = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """Seconds until the results are there; never negative."""

    low_s: float
    """Nine times of ten it takes longer than this."""
    expected_s: float
    high_s: float
    """Nine times of ten it takes less than this."""
    sure: bool
    """Whether enough runs stand behind it and the range is narrow: one number may be told instead of the range."""
    runs: int
    """On how many runs it rests."""

    @property
    def words(self) -> str:
        """One number where that is sure, else the range: `about 2 min left`, `1 to 3 min left`."""
        if self.sure:
            number, unit = _rounded(self.expected_s, self.expected_s)
            return f"about {number} {unit} left"
        low, _ = _rounded(self.low_s, self.high_s)
        high, unit = _rounded(self.high_s, self.high_s)
        return f"{low} to {high} {unit} left" if low != high else f"about {high} {unit} left"


def _rounded(seconds: float, most: float) -> tuple[str, str]:
    """Return seconds in the unit that suits `most`, as exactly as people care for."""
    if most < _IN_MINUTES_S:
        step = 1 if most < 20 else 5
        return str(max(1, round(seconds / step) * step)), "s"
    if most < _IN_HOURS_S:
        return str(max(1, round(seconds / 60))), "min"
    return f"{seconds / 3_600:.1f}", "h"


@dataclass(frozen=True, slots=True)
class Asked:
    """A job, as far as it matters for how long it still takes."""

    workflow: str
    server_type: str | None = None
    """None: not known yet; then the type that the workflow ran on last."""
    place: str = ""
    timeline: Timeline | None = None
    """None: it waits, or runs where its nodes cannot be heard."""
    labels: Mapping[str, NodeLabel] = field(default_factory=dict)
    now_s: float = 0.0
    """Seconds since the run began."""
    heard_s: float = 0.0
    """When the newest snapshot came, on the same scale."""
    queue_position: int | None = None
    unheard_s: float | None = None
    """Seconds since it was begun by another process, whose nodes cannot be heard here."""
    boot_s: float | None = None
    """How long the machine usually takes to start, while it starts."""


@dataclass(frozen=True, slots=True)
class Span:
    """A range of seconds: nine times of ten more than `low`, nine times of ten less than `high`."""

    low: float
    mid: float
    high: float

    def plus(self, other: Span) -> Span:
        """Add what does not depend on this."""
        mid = self.mid + other.mid
        low = mid - math.hypot(self.mid - self.low, other.mid - other.low)
        return Span(max(0.0, low), mid, mid + math.hypot(self.high - self.mid, other.high - other.mid))

    def times(self, factor: float) -> Span:
        """Return the same so many times over."""
        return Span(self.low * factor, self.mid * factor, self.high * factor)

    def widened(self, factor: float) -> Span:
        """Return it with wider bounds."""
        return Span(self.low / factor, self.mid, self.high * factor)


NOTHING: Final = Span(0.0, 0.0, 0.0)
_NodesLeft = Callable[[Timeline], Span]


class _Alike:
    """The runs that a job is compared with, and what was found out about them: asked again and again while it runs."""

    def __init__(self, runs: Sequence[RunPast], scale: float, widened: float) -> None:
        """`scale`: what their times are multiplied by. `widened`: by how much less is known than they tell."""
        self.runs, self.scale, self.widened = tuple(runs), scale, widened
        self.whole = _span([run.computing_s for run in runs if run.computing_s is not None]).times(scale)
        self.before, self.after = _span([run.before_s for run in runs]), _span([run.after_s for run in runs])
        self.computed = frozenset(node for run in runs for node in run.nodes)
        self.heard_of = self.computed.union(*(run.cached for run in runs))
        self.rests: dict[tuple[frozenset[str], frozenset[str]], tuple[Span, float, float]] = {}
        self._spans: dict[tuple[str, str], Span | None] = {}
        self._took: dict[str, tuple[float, ...]] = {}

    def span_of(self, node_id: str, class_type: str) -> Span | None:
        """Return what a node takes from its beginning to its end; None: not known."""
        key = (node_id, class_type)
        if key not in self._spans:
            times = _spans_of(self.runs, node_id, class_type)
            self._spans[key] = _span(times).times(self.scale) if times else None
        return self._spans[key]

    def took(self, node_id: str) -> tuple[float, ...]:
        """Return what a node took in each run: nothing where it was cached or not needed."""
        found = self._took.get(node_id)
        if found is None:
            nodes = [run.nodes.get(node_id) for run in self.runs]
            times = [node.seconds for node in nodes if node is not None and node.seconds is not None]
            usual = median(times) if times else 0.0
            found = tuple(0.0 if n is None else usual if n.seconds is None else n.seconds for n in nodes)
            self._took[node_id] = found
        return found


class Experience:
    """What earlier runs teach. Made once from them, asked as often as wanted."""

    def __init__(self, runs: Iterable[RunPast], works: Iterable[Work] = ()) -> None:
        """`works`: the books of rented machines, for workflows of which no timeline is known."""
        self._runs: dict[tuple[str, str], deque[RunPast]] = {}
        self._places: set[tuple[str, str]] = set()
        self._last_type: dict[str, str] = {}
        classes: dict[tuple[str, str], deque[float]] = {}
        computed: list[Work] = []
        for number, run in enumerate(in_order(runs)):
            self._runs.setdefault((run.workflow, run.server_type), deque(maxlen=NEWEST)).append(run)
            self._last_type[run.workflow] = run.server_type
            self._places.add((run.workflow, run.place))
            for node in run.nodes.values():
                if node.seconds is not None and node.class_type:
                    times = classes.setdefault((node.class_type, run.server_type), deque(maxlen=NEWEST))
                    times.append(node.seconds)
            if run.computing_s is not None:
                computed.append(_as_work(run, number))
        self._classes = {key: tuple(times) for key, times in classes.items()}
        self._history = History(computed)  # how types compare
        booked = list(works)
        self._books = History(booked)
        for work in reversed(booked):
            self._last_type.setdefault(work.workflow, work.server_type)
        self._likes: dict[tuple[object, ...], _Alike | None] = {}

    @property
    def workflows(self) -> frozenset[str]:
        """The workflows that timelines are known of."""
        return frozenset(name for name, _ in self._runs)

    def left(self, asked: Asked) -> TimeLeft | None:
        """Return how long it still takes; None: nothing is known."""
        server_type = asked.server_type
        if server_type is None:
            server_type = self._last_type.get(asked.workflow, "")
        alike = self._alike(asked, server_type)
        if alike is None:
            return self._without_runs(asked, server_type)
        whole, before, after = alike.whole, alike.before, alike.after
        left = self._now(asked, whole, before, after, lambda line: self._nodes_left(asked, line, alike))
        if alike.widened > 1:
            left = left.widened(alike.widened)
        sure = alike.scale == 1.0 and alike.widened == 1.0 and len(alike.runs) >= ENOUGH and asked.timeline is not None
        return _told(left, whole.mid + after.mid, len(alike.runs), sure=sure)

    # -- which runs ----------------------------------------------------------------------------------------

    def _alike(self, asked: Asked, server_type: str) -> _Alike | None:
        """Return the runs to compare with; which ones follows from few things, so they are not looked for each time."""
        line = asked.timeline
        cached: frozenset[str] | None = None
        if line is not None and line.by_id:
            cached = frozenset(node.node_id for node in line.by_id.values() if node.cached)
        cold = (asked.workflow, asked.place) not in self._places if asked.place else None
        key = (asked.workflow, server_type, cached, cold)
        if key not in self._likes:
            if len(self._likes) >= _REMEMBERED:
                self._likes.clear()
            self._likes[key] = self._alike_anew(asked.workflow, server_type, cached, cold)
        return self._likes[key]

    def _alike_anew(
        self, workflow: str, server_type: str, cached: frozenset[str] | None, cold: bool | None
    ) -> _Alike | None:
        here = self._runs.get((workflow, server_type))
        if here:
            return _Alike(_like(here, cached, cold), 1.0, 1.0)
        others = {of: runs for (name, of), runs in self._runs.items() if name == workflow}
        if not others:
            return None
        ratios = {of: self._history.speed(server_type, than=of) for of in others}
        linked = {of: ratio for of, ratio in ratios.items() if ratio is not None}
        best = max(linked or ratios, key=lambda of: len(others[of]))
        ratio = ratios[best]
        return _Alike(_like(others[best], cached, cold), ratio or 1.0, 1.0 if ratio is not None else _UNLINKED)

    # -- parts ---------------------------------------------------------------------------------------------

    def _now(self, asked: Asked, whole: Span, before: Span, after: Span, nodes: _NodesLeft) -> Span:
        """Return what is left at the step the job is at."""
        line = asked.timeline
        step = line.step if line is not None else None
        in_step = max(0.0, asked.now_s - line.step_since_s) if line is not None else 0.0
        match step:
            case None if asked.unheard_s is not None:
                return _passing(whole.plus(before).plus(after), asked.unheard_s)
            case None | Step.PLACING | Step.LAUNCHING | Step.BOOTING:
                left = whole.plus(before).plus(after)
                if asked.boot_s is not None:
                    left = left.plus(_passing(_around_one(asked.boot_s), in_step))
                return left
            case Step.CHECKING | Step.UPLOADING:
                return _passing(before, in_step).plus(whole).plus(after)
            case Step.QUEUED:
                left = whole.plus(after)
                if asked.queue_position is not None:
                    # The one that is computed now is half done, as far as anybody knows.
                    ahead = whole.times(asked.queue_position + 0.5)
                    left = left.plus(_passing(ahead, max(0.0, asked.now_s - asked.heard_s)))
                return left
            case Step.RUNNING if line is not None:
                if not line.by_id and not asked.labels:
                    return _passing(whole, in_step).plus(after)
                return nodes(line).plus(after)
            case Step.FETCHING:
                return _passing(after, in_step)
        return NOTHING

    def _nodes_left(self, asked: Asked, line: Timeline, alike: _Alike) -> Span:
        if not alike.computed:  # their times are known as a whole only
            return _passing(alike.whole, max(0.0, asked.now_s - line.step_since_s))
        todo = (frozenset(asked.labels) or alike.computed) - line.done - line.running
        times = {id_: node.seconds for id_, node in line.by_id.items() if node.seconds and id_ in line.done}
        ended = frozenset(times)
        found = alike.rests.get((todo, ended))
        if found is None:
            if len(alike.rests) >= _REMEMBERED:
                alike.rests.clear()
            found = alike.rests[todo, ended] = self._rest(asked, alike, todo, ended)
        rest, ended_before, follows = found
        if follows and ended_before > 0:
            rest = rest.times((sum(times.values()) / ended_before) ** follows)
        return rest.plus(
            self._running(
                asked, line, lambda n: alike.span_of(n.node_id, n.class_type) or self._by_class(n.class_type, asked)
            )
        )

    @staticmethod
    def _running(asked: Asked, line: Timeline, usual: Callable[[NodeTime], Span]) -> Span:
        """Return what is left of the nodes that run: beside each other, as far as there are several."""
        nodes = [line.by_id[node] for node in line.running if node in line.by_id]
        rests = [_rest_of_node(node, line, usual(node), asked.now_s) for node in nodes]
        return (
            Span(*(max(part) for part in zip(*((r.low, r.mid, r.high) for r in rests), strict=True)))
            if rests
            else NOTHING
        )

    def _rest(
        self, asked: Asked, alike: _Alike, todo: frozenset[str], ended: frozenset[str]
    ) -> tuple[Span, float, float]:
        """Return what the nodes to come take, what those that have ended usually took, and how the two go together."""
        unheard = NOTHING
        if todo - alike.heard_of and _changed(asked, alike):  # else they are nodes that no result needs
            for label in (asked.labels[node] for node in todo - alike.heard_of if node in asked.labels):
                unheard = unheard.plus(self._by_class(label.class_type, asked))
        rests = _sums(alike, todo & alike.heard_of)
        pasts = _sums(alike, ended & alike.heard_of)
        ended_before = median(pasts) * alike.scale
        return _span(rests).times(alike.scale).plus(unheard), ended_before, _follows(pasts, rests)

    # -- workflows without runs ----------------------------------------------------------------------------

    def _by_class(self, class_type: str, asked: Asked) -> Span:
        """Return what nodes of a class took in any workflow; nothing, where it is not known."""
        times = self._classes.get((class_type, asked.server_type or ""))
        if times:
            return _span(times).widened(_BY_CLASS)
        elsewhere = [seconds for (name, _), times in self._classes.items() if name == class_type for seconds in times]
        return _span(elsewhere).widened(_BY_CLASS * _UNLINKED) if elsewhere else NOTHING

    def _without_runs(self, asked: Asked, server_type: str) -> TimeLeft | None:
        """Tell by the books of rented machines, else by the classes of the graph's nodes."""
        line, booked = asked.timeline, self._books.predict(asked.workflow, server_type)
        if booked is not None and str(booked.basis) != "others":
            whole = Span(booked.p10_s, booked.p50_s, booked.p90_s)

            def as_one(line: Timeline) -> Span:
                return _passing(whole, max(0.0, asked.now_s - line.step_since_s))

            left = self._now(asked, whole, NOTHING, NOTHING, as_one)
            return _told(left, whole.mid, booked.runs, sure=False)
        classes = {name for name, _ in self._classes}
        known = [node for node, label in asked.labels.items() if label.class_type in classes]
        if line is None or not known:
            return None
        whole = NOTHING
        for node in known:
            if node not in line.done and node not in line.running:
                whole = whole.plus(self._by_class(asked.labels[node].class_type, asked))

        def by_class(line: Timeline) -> Span:
            return whole.plus(self._running(asked, line, lambda node: self._by_class(node.class_type, asked)))

        left = self._now(asked, whole, NOTHING, NOTHING, by_class)
        return _told(left.widened(len(asked.labels) / len(known)), left.mid, 0, sure=False)


# -- arithmetic ------------------------------------------------------------------------------------------------


def _span(values: Sequence[float]) -> Span:
    """Return the range of the next value; few values give a wide one."""
    if not values:
        return NOTHING
    mid, count = median(values), len(values)
    if mid <= 0:
        return Span(0.0, 0.0, quantile(values, 0.9))
    logs = [math.log(max(value, mid * 1e-3)) for value in values]
    middle = math.log(mid)
    seen = sum(min(abs(value - middle), 3.0) ** 2 for value in logs)
    spread2 = (_PRIOR_RUNS * _PRIOR_SPREAD**2 / count + seen) / (_PRIOR_RUNS / count + max(1, count - 1))
    factor = math.exp(min(_NORMAL_90 * math.sqrt(spread2 * (1 + 1 / count)), 3.0))
    return Span(mid / factor, mid, mid * factor)


def _around_one(seconds: float) -> Span:
    return Span(seconds / 1.5, seconds, seconds * 1.5)


def _passing(whole: Span, elapsed: float) -> Span:
    """Return what is left of something that has gone on for a while; it goes down for ever and never ends."""
    if whole.mid <= 0:
        return NOTHING
    spread = max((whole.high - whole.low) / (2 * _NORMAL_90), 0.02 * whole.mid)
    mid = _soft(whole.mid - elapsed, spread)
    return Span(min(mid, max(0.0, whole.low - elapsed)), mid, max(mid, whole.high - elapsed))


def _soft(left: float, spread: float) -> float:
    """Return about `left` while that is more than `spread`, and ever less of it afterwards, above zero."""
    x = left / spread
    return left if x > 30 else spread * math.log1p(math.exp(x)) if x > -30 else 0.0


def _rest_of_node(node: NodeTime, line: Timeline, usual: Span, now_s: float) -> Span:
    """Return what is left of a node that runs."""
    elapsed = max(0.0, now_s - node.started_s)
    pace = line.pace
    if pace is None or pace.node_id != node.node_id or pace.value <= 0 or pace.at_s <= node.started_s:
        return _passing(usual, elapsed)
    part = min(1.0, pace.value / pace.maximum)
    if part < _TOO_SMALL:
        return _passing(usual, elapsed)
    own = (pace.at_s - node.started_s) / part
    weight = 1.0 if usual.mid <= 0 else part / (part + _OWN_PACE)
    mid = weight * own + (1 - weight) * usual.mid
    doubt = 1.0 + (1 - part) * (max(0.1, usual.high / usual.mid - 1) if usual.mid > 0 else 0.5)
    return _passing(Span(mid / doubt, mid, mid * doubt), elapsed)


def _spans_of(runs: Sequence[RunPast], node_id: str, class_type: str) -> list[float]:
    """Return what a node took where it ran; one of another class by now is another node."""
    found = [run.nodes[node_id] for run in runs if node_id in run.nodes]
    return [
        node.span_s
        for node in found
        if node.span_s is not None and (not class_type or not node.class_type or node.class_type == class_type)
    ]


def _sums(alike: _Alike, nodes: frozenset[str]) -> list[float]:
    """Return what nodes took together, run by run."""
    if not nodes:
        return [0.0] * len(alike.runs)
    return [sum(times) for times in zip(*(alike.took(node) for node in nodes), strict=True)]


def _follows(pasts: Sequence[float], rests: Sequence[float]) -> float:
    """Return how much of a slow beginning is found again in the rest, 0 to 1: the slope of the logarithms."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(pasts, rests, strict=True) if x > 0 and y > 0]
    if len(pairs) < ENOUGH:
        return 0.0
    x_mid, y_mid = median(x for x, _ in pairs), median(y for _, y in pairs)
    xx = sum((x - x_mid) ** 2 for x, _ in pairs)
    if xx < 1e-6 * len(pairs):
        return 0.0
    slope = sum((x - x_mid) * (y - y_mid) for x, y in pairs) / xx
    return max(0.0, min(1.0, slope)) * len(pairs) / (len(pairs) + _LEARNING)


def _like(runs: Iterable[RunPast], cached: frozenset[str] | None, cold: bool | None) -> Sequence[RunPast]:
    """Choose the runs in which the same had to be computed, and loaded."""
    chosen = tuple(runs)
    if cached is not None:
        same = tuple(run for run in chosen if run.cached == cached)
        chosen = same if len(same) >= 2 else chosen
    if cold is not None:
        kin = tuple(run for run in chosen if run.cold == cold)
        chosen = kin if kin and _differ(kin, chosen) else chosen
    return chosen


def _differ(kin: Sequence[RunPast], runs: Sequence[RunPast]) -> bool:
    """Whether runs of one kind take so much more or less than all together that they are to be taken alone."""
    ours = [run.computing_s for run in kin if run.computing_s]
    others = [run.computing_s for run in runs if run.computing_s and run.cold != kin[0].cold]
    if not ours or not others:
        return False
    return abs(math.log(median(ours) / median(others))) > math.log(ALIKE)


def _changed(asked: Asked, alike: _Alike) -> bool:
    """Whether the graph has been changed since the runs: the newest knows none, or other, of its nodes."""
    newest = alike.runs[-1]
    return any(
        node not in asked.labels or (kind.class_type and kind.class_type != asked.labels[node].class_type)
        for node, kind in newest.nodes.items()
    )


def _told(left: Span, whole_s: float, runs: int, *, sure: bool) -> TimeLeft:
    low, mid, high = (max(0.0, value) for value in (left.low, left.mid, left.high))
    low, high = min(low, mid), max(high, mid)
    narrow = high - low <= max(_NARROW * mid, _NARROW_OF_ALL * whole_s, _NARROW_S)
    return TimeLeft(low, mid, high, sure and narrow, runs)


def _as_work(run: RunPast, number: int) -> Work:
    """Return a run in the words of `domain.estimate`, which knows how types compare."""
    seconds = timedelta(seconds=run.computing_s or 0.0)
    return Work(
        machine_id=MachineId(run.place),
        job_id=JobId(str(number)),
        attempt=0,
        workflow=run.workflow,
        server_type=run.server_type,
        began_at=run.ended_at,
        computing_at=_EPOCH,
        computed_at=_EPOCH + seconds,
        outcome="done",
        cold=run.cold,
    )
