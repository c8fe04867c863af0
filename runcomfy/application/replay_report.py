"""
Policies beside each other over one stream, and the settings that would have been better.

What is recommended comes from replaying the past: only what would have been better by a margin, since the next days are
not the last ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from runcomfy.application.replay import Arrival, Outcome, World, replay
from runcomfy.domain.baselines import BASELINES
from runcomfy.domain.clairvoyant import Bracket, Span, bracket
from runcomfy.domain.exceptions import ValueInvalid, foreign_text
from runcomfy.domain.plan_view import Policy
from runcomfy.domain.scaling import CostPlan

PLAN: Final = "plan"
MARGIN: Final = 0.03
"""A setting is recommended if it would have been better by more than this share."""
LATENCY_SHARE: Final = 0.95
"""A latency target is meant for so many of the jobs."""
KEEP_ALIVES_S: Final = (60.0, 300.0, 600.0, 1200.0, 2400.0)
"""Fixed keep-alives that are tried beside the learned one."""
WAIT_PRICES_TRIED: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
"""Prices of waiting that are tried for a latency target, as times the machine's price; batch to very impatient."""
_HALVINGS: Final = 4


def policies(names: Iterable[str] = ()) -> dict[str, Callable[[], Policy]]:
    """Return what makes these policies, all of them without names. Raises ValueInvalid."""
    known: dict[str, Callable[[], Policy]] = {PLAN: CostPlan, **BASELINES}
    chosen = list(names) or list(known)
    for name in chosen:
        if name not in known:
            raise ValueInvalid(f"there is no policy {foreign_text(name, 40)!r}", hint=f"one of {', '.join(known)}")
    return {name: known[name] for name in chosen}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What policies did over one stream, and between what the best schedule lies."""

    jobs: int
    world: World
    outcomes: Mapping[str, Outcome]
    best: Bracket

    def ratio(self, name: str) -> float | None:
        """Return how many times the bound a policy cost; None if there is no bound (machines that cost nothing)."""
        return self.outcomes[name].cost / self.best.bound_usd if self.best.bound_usd else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, for programs."""
        return {
            "jobs": self.jobs,
            "wait_usd_per_hour": self.world.wait_usd_per_hour,
            "bound_usd": round(self.best.bound_usd, 4),
            "best_schedule_found_usd": round(self.best.schedule_usd, 4),
            "zero_wait_optimum_usd": round(self.best.zero_wait_usd, 4),
            "policies": {name: self._row(name, outcome) for name, outcome in self.outcomes.items()},
        }

    def _row(self, name: str, outcome: Outcome) -> dict[str, Any]:
        ratio = self.ratio(name)
        return {
            "usd": round(outcome.usd, 4),
            "usd_per_1000_jobs": round(outcome.usd_per_1000, 2),
            "wait_p50_s": round(outcome.wait(0.5), 1),
            "wait_p95_s": round(outcome.wait(0.95), 1),
            "waited_s": round(outcome.waited_s, 1),
            "cold_share": round(outcome.cold_share, 4),
            "launches": outcome.launches,
            "most_machines": outcome.most_machines,
            "j_usd": round(outcome.cost, 4),
            "ratio_to_bound": None if ratio is None else round(ratio, 3),
        }


def compare(stream: Sequence[Arrival], world: World, chosen: Mapping[str, Callable[[], Policy]]) -> Comparison:
    """Replay a stream, in order of time, with each policy."""
    outcomes = {name: replay(policy(), stream, world) for name, policy in chosen.items()}
    return Comparison(len(stream), world, outcomes, best_of(stream, world))


def best_of(stream: Sequence[Arrival], world: World) -> Bracket:
    """Return between what the best schedule lies."""
    spans = [Span(job.at, job.service_s) for job in stream]
    return bracket(spans, world.offers, wait_usd_per_hour=world.wait_usd_per_hour)


@dataclass(frozen=True, slots=True)
class WaitPrice:
    """The price of waiting that keeps a latency target, as far as the past says."""

    usd_per_hour: float
    outcome: Outcome
    met: bool
    """False: even the highest price tried did not keep it; `outcome` is the one that came closest."""


def solve_wait_price(history: Sequence[Arrival], latency_target_s: float, world: World | None = None) -> WaitPrice:
    """Return the lowest price of waiting with which 95 of 100 jobs would have waited at most so long.

    `history` is in order of time. Without jobs nothing can be said, and the world's own price is returned as not met.
    """
    world = world or World()
    unit = world.offers[0].usd_per_hour

    def at(times: float) -> Outcome:
        return replay(CostPlan(), history, world.at_wait_price(times))

    if not history or unit <= 0:
        return WaitPrice(world.wait_usd_per_hour, replay(CostPlan(), history, world), met=False)
    too_low = 0.0
    closest: tuple[float, Outcome] | None = None
    for times in WAIT_PRICES_TRIED:
        outcome = at(times)
        if outcome.wait(LATENCY_SHARE) <= latency_target_s:
            return _lowest(at, too_low, times, outcome, latency_target_s, unit)
        if closest is None or outcome.wait(LATENCY_SHARE) < closest[1].wait(LATENCY_SHARE):
            closest = times, outcome
        too_low = times
    if closest is None:
        raise AssertionError("no price was tried")
    return WaitPrice(closest[0] * unit, closest[1], met=False)


def _lowest(
    at: Callable[[float], Outcome], low: float, high: float, outcome: Outcome, target_s: float, unit: float
) -> WaitPrice:
    """Halve the range in which the lowest price lies."""
    for _ in range(_HALVINGS if low else 0):
        middle = (low * high) ** 0.5
        tried = at(middle)
        if tried.wait(LATENCY_SHARE) <= target_s:
            high, outcome = middle, tried
        else:
            low = middle
    return WaitPrice(high * unit, outcome, met=True)


@dataclass(frozen=True, slots=True)
class Recommended:
    """A setting that would have been better."""

    setting: str
    """As the settings call it: `keep_alive`, `max_machines`, `wait_price`."""
    now: str
    better: str
    saves_share: float
    """Of J; 0 for a price of waiting, which says what is wanted and not how to get it."""
    why: str


@dataclass(frozen=True, slots=True)
class Tuned:
    """What replaying the past says of the settings."""

    comparison: Comparison
    tried: Mapping[str, Outcome]
    """By what was different from the settings as they are."""
    recommended: Sequence[Recommended]
    wait_price: WaitPrice | None
    """None: no latency target."""


def tune(stream: Sequence[Arrival], world: World, *, latency_target_s: float | None = None) -> Tuned:
    """Replay the past with the settings as they are and with others.

    With a latency target the price of waiting is solved for first, and the other settings are judged by that price.
    """
    recommended: list[Recommended] = []
    wait_price = None
    if latency_target_s is not None:
        wait_price = solve_wait_price(stream, latency_target_s, world)
        if wait_price.met and abs(wait_price.usd_per_hour - world.wait_usd_per_hour) > MARGIN * world.wait_usd_per_hour:
            recommended.append(_about_price(wait_price, world, latency_target_s))
        world = replace(world, wait_usd_per_hour=wait_price.usd_per_hour)
    comparison = compare(stream, world, policies())
    now = comparison.outcomes[PLAN]
    tried: dict[str, Outcome] = {}
    keep_alives = {None, *KEEP_ALIVES_S} - {world.keep_alive_s}
    best_keep = _try(
        {
            f"keep_alive {_span(seconds)}": replace(world, keep_alive_s=seconds)
            for seconds in sorted(keep_alives, key=_key)
        },
        stream,
        tried,
    )
    if (saved := 1 - tried[best_keep].cost / now.cost) > MARGIN:
        recommended.append(_better("keep_alive", _span(world.keep_alive_s), best_keep, saved, now, tried[best_keep]))
    most = sorted({max(1, world.max_machines // 2), world.max_machines * 2, max(1, now.most_machines)})
    counts = {
        f"max_machines {count}": replace(world, max_machines=count) for count in most if count != world.max_machines
    }
    best_count = _try(counts, stream, tried)
    if (saved := 1 - tried[best_count].cost / now.cost) > MARGIN:
        recommended.append(_better("max_machines", str(world.max_machines), best_count, saved, now, tried[best_count]))
    return Tuned(comparison, tried, recommended, wait_price)


def _key(seconds: float | None) -> float:
    return -1.0 if seconds is None else seconds


def _try(worlds: Mapping[str, World], stream: Sequence[Arrival], tried: dict[str, Outcome]) -> str:
    """Replay the plan in each world; return the name of the cheapest."""
    tried |= {name: replay(CostPlan(), stream, world) for name, world in worlds.items()}
    return min(worlds, key=lambda name: tried[name].cost)


def _span(seconds: float | None) -> str:
    return "learned" if seconds is None else f"{seconds:.0f}s"


def _better(setting: str, now: str, name: str, saved: float, before: Outcome, after: Outcome) -> Recommended:
    why = (
        f"${before.usd:.2f} and {before.wait(LATENCY_SHARE):.0f} s (p95) would have been "
        f"${after.usd:.2f} and {after.wait(LATENCY_SHARE):.0f} s"
    )
    return Recommended(setting, now, name.removeprefix(f"{setting} "), saved, why)


def _about_price(found: WaitPrice, world: World, target_s: float) -> Recommended:
    why = (
        f"95 of 100 jobs would have waited at most {found.outcome.wait(LATENCY_SHARE):.0f} s "
        f"(asked for: {target_s:.0f} s) for ${found.outcome.usd:.2f}"
    )
    return Recommended("wait_price", f"{world.wait_usd_per_hour:.2f}", f"{found.usd_per_hour:.2f}", 0.0, why)
