"""
How long a job that has not run yet will take, from what one's own machines have done.

Only own history counts, never a list of specifications. What is told says what it rests on, best first: runs of the
workflow on the type; runs of it on other types, scaled by what other workflows took on both; the same unscaled, where
nothing links the types; runs of other workflows. Without any runs there is no prediction: `predict` returns None rather
than a number that somebody made up.

Few runs give a wide range: up to `_ENOUGH` of them, the spread is taken together with that of two imagined runs that
differ as runs usually do. A range is to hold for four of five runs to come. What a machine costs before and between the
runs is not told here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean, median
from typing import Final

from runcomfy.domain.work import Work

_NEWEST: Final = 100
"""Runs of one kind that are looked at: what was changed since (models, sizes of pictures) soon counts no more."""
_ENOUGH: Final = 10
"""From so many runs on their own quantiles are told as they are."""
_PRIOR_RUNS: Final = 2
_PRIOR_SPREAD: Final = 0.5
"""Standard deviation of the logarithm of run times that is presumed before any are seen: two runs of three differ by
less than 1.6 times. Only ranges depend on it."""
_UNLINKED: Final = 3.0
"""By how much a range is widened, up and down, if it comes from another machine type and nothing says how they compare.
A choice of ours, wider than what lies between neighbours in a list of types."""
_SHORTEST: Final = 0.001
_NORMAL_90: Final = 1.2815515655446004
_WIDEST: Final = 12.0
"""Logarithm of the widest factor of a range: beyond it a few odd runs say nothing at all."""


class Basis(StrEnum):
    """What a prediction rests on."""

    SAME = "same"
    """Runs of this workflow on this type."""
    SCALED = "scaled"
    """Runs of this workflow on other types, scaled."""
    UNSCALED = "unscaled"
    """Runs of this workflow on other types; how they compare is not known."""
    OTHERS = "others"
    """Runs of other workflows."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """How long one run will compute, in seconds."""

    p50_s: float
    p90_s: float
    mean_s: float
    cv2: float
    """Squared coefficient of variation."""
    runs: int
    """On how many runs it rests; at least one."""
    p10_s: float = 0.0
    basis: Basis = Basis.SAME
    cold: bool = False
    """Whether it rests on runs for which models had to be loaded, too."""

    @property
    def words(self) -> str:
        """What it rests on, for people."""
        runs = "1 run" if self.runs == 1 else f"{self.runs} runs"
        match self.basis:
            case Basis.SAME:
                return f"{runs} of it on this type"
            case Basis.SCALED:
                return f"{runs} of it on other types, scaled by what both types were seen to take"
            case Basis.UNSCALED:
                return f"{runs} of it on other types; how they compare is not known"
            case Basis.OTHERS:
                return f"{runs} of other workflows: it has not been run yet"


class History:
    """Run times, sorted for questions. Made once from `store.works`, asked as often as wanted."""

    def __init__(self, works: Iterable[Work]) -> None:
        """Take runs that were computed to their end; failed, interrupted and unfinished ones say nothing."""
        self._runs: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
        counted = [(work, seconds) for work in works if (seconds := run_seconds(work)) is not None]
        for work, seconds in sorted(counted, key=lambda item: (item[0].began_at, item[0].job_id)):
            warm, cold = self._runs.setdefault((work.workflow, work.server_type), ([], []))
            (cold if work.cold else warm).append(seconds)
        self._ratios: dict[tuple[str, str], float | None] = {}

    def predict(self, workflow: str, server_type: str, *, cold: bool = False) -> Prediction | None:
        """Return how long a run will compute, on a machine that has its models loaded unless `cold`; None: unknown.

        Where only cold runs are known, they answer for warm ones, and the other way round (`Prediction.cold` says so).
        """
        same = self._pick(self._runs.get((workflow, server_type)), cold=cold)
        if same is not None:
            return _prediction(same[0], Basis.SAME, cold=same[1])
        elsewhere = {of: runs for (name, of), runs in self._runs.items() if name == workflow}
        scaled: list[float] = []
        unscaled: list[float] = []
        any_cold = False
        for of, runs in elsewhere.items():
            picked = self._pick(runs, cold=cold)
            if picked is None:
                continue
            ratio = self.speed(server_type, than=of)
            any_cold |= picked[1]
            (unscaled if ratio is None else scaled).extend(seconds * (ratio or 1.0) for seconds in picked[0])
        if scaled:
            return _prediction(scaled, Basis.SCALED, cold=any_cold)
        if unscaled:
            return _widened(_prediction(unscaled, Basis.UNSCALED, cold=any_cold), _UNLINKED)
        others = [self._pick(runs, cold=cold) for (_, of), runs in self._runs.items() if of == server_type]
        others = others or [self._pick(runs, cold=cold) for runs in self._runs.values()]
        seconds_of_all = [seconds for picked in others if picked is not None for seconds in picked[0]]
        if not seconds_of_all:
            return None
        return _whole_range(_prediction(seconds_of_all, Basis.OTHERS, cold=cold), seconds_of_all)

    def speed(self, server_type: str, *, than: str) -> float | None:
        """Return how long runs take on a type, relative to those on another; None: nothing was run on both.

        Types that share no workflow may be linked by a third one that shares some with each.
        """
        if server_type == than:
            return 1.0
        direct = self._ratio(server_type, than)
        if direct is not None:
            return direct
        between = sorted({of for _, of in self._runs} - {server_type, than})
        links = [(self._ratio(server_type, of), self._ratio(of, than)) for of in between]
        found = [first * second for first, second in links if first is not None and second is not None]
        return _middle(found) if found else None

    def cold_extra_s(self, server_type: str, workflow: str | None = None) -> float | None:
        """Return how many seconds longer a run takes while models are loaded, median over workflows; None: unknown."""
        extras = [
            max(0.0, median(cold[-_NEWEST:]) - median(warm[-_NEWEST:]))
            for (name, of), (warm, cold) in self._runs.items()
            if of == server_type and workflow in (None, name) and warm and cold
        ]
        return median(extras) if extras else None

    @property
    def runs(self) -> int:
        """How many runs are known."""
        return sum(len(warm) + len(cold) for warm, cold in self._runs.values())

    @staticmethod
    def _pick(runs: tuple[list[float], list[float]] | None, *, cold: bool) -> tuple[list[float], bool] | None:
        """Return the newest runs of the kind wanted, or of the other kind, and whether they are cold ones."""
        if runs is None:
            return None
        warm_runs, cold_runs = runs
        wanted, other = (cold_runs, warm_runs) if cold else (warm_runs, cold_runs)
        return (wanted[-_NEWEST:], cold) if wanted else (other[-_NEWEST:], not cold)

    def _ratio(self, server_type: str, than: str) -> float | None:
        """Return the middle of the ratios of medians, over workflows run on both types, cold and warm apart."""
        key = (server_type, than)
        if key not in self._ratios:
            ratios: list[float] = []
            for (name, of), runs in self._runs.items():
                there = self._runs.get((name, than)) if of == server_type else None
                if there is None:
                    continue
                ratios.extend(
                    median(here[-_NEWEST:]) / median(other[-_NEWEST:])
                    for here, other in zip(runs, there, strict=True)
                    if here and other
                )
            self._ratios[key] = _middle(ratios) if ratios else None
        return self._ratios[key]


def predict(works: Iterable[Work], workflow: str, server_type: str, *, cold: bool = False) -> Prediction | None:
    """Return how long a run of a workflow will compute on a type, from own history; None: nothing was run yet.

    Who asks more than once makes a `History` and asks that.
    """
    return History(works).predict(workflow, server_type, cold=cold)


def run_seconds(work: Work) -> float | None:
    """Return how long a finished run computed; None for one that was not seen to its end, or failed."""
    if work.computing_at is None or work.computed_at is None or work.outcome not in ("", "done"):
        return None
    return max(_SHORTEST, (work.computed_at - work.computing_at).total_seconds())


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value below which `part` (0 to 1) of the values lie, between neighbours in a straight line.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _prediction(runs: Sequence[float], basis: Basis, *, cold: bool) -> Prediction:
    mean, p50, count = fmean(runs), quantile(runs, 0.5), len(runs)
    p10, p90 = _expected_quantile(runs, 0.1), _expected_quantile(runs, 0.9)
    cv2 = fmean((value - mean) ** 2 for value in runs) / mean**2
    if count < _ENOUGH:
        logs = [math.log(value) for value in runs]
        middle = fmean(logs)
        seen = sum((value - middle) ** 2 for value in logs)
        known = _PRIOR_RUNS + count - 1
        spread2 = (_PRIOR_RUNS * _PRIOR_SPREAD**2 + seen) / known
        factor = math.exp(min(_student_90(known) * math.sqrt(spread2 * (1 + 1 / count)), _WIDEST))
        p10, p90 = min(p10, p50 / factor), max(p90, p50 * factor)
        cv2 = max(cv2, math.expm1(min(spread2, 10.0)))
    return Prediction(p50, p90, mean, cv2, count, p10, basis, cold)


def _expected_quantile(runs: Sequence[float], part: float) -> float:
    """Return what the next run stays below with that probability: of n runs the k-th lies at k/(n + 1) on average."""
    place = part * (len(runs) + 1) - 1
    return quantile(runs, min(1.0, max(0.0, place / max(1, len(runs) - 1))))


def _student_90(freedom: int) -> float:
    """Return the 90 % quantile of Student's t distribution (Abramowitz and Stegun 26.7.5)."""
    z = _NORMAL_90
    first = (z**3 + z) / (4 * freedom)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _widened(prediction: Prediction, factor: float) -> Prediction:
    return replace(
        prediction,
        p10_s=prediction.p10_s / factor,
        p90_s=prediction.p90_s * factor,
        cv2=(1 + prediction.cv2) * factor**0.5 - 1,
    )


def _whole_range(prediction: Prediction, seconds: Sequence[float]) -> Prediction:
    """Return it with all that was seen as its range: of a workflow that was never run nothing narrower is known."""
    return replace(
        prediction,
        p10_s=min(prediction.p10_s, *seconds),
        p90_s=max(prediction.p90_s, *seconds),
        cv2=max(1.0, prediction.cv2),
    )


def _middle(ratios: Sequence[float]) -> float:
    """Return the median of ratios, in logarithms: twice as fast and twice as slow cancel out."""
    return math.exp(median(math.log(ratio) for ratio in ratios))
