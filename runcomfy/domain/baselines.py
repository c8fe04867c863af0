"""
Policies that the product's plan is compared with: what people do, and what other autoscalers do by default.

They are handed the same values as the plan, so a replay runs them the same way. All of them launch the reference type
only and listen to no signals; nothing in the product rents machines by them. Those of Kubernetes average over what they
saw before, so every run needs one of its own: `BASELINES` makes them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from runcomfy.domain.plan_view import Action, Launch, MachineView, Plan, PlanView, Policy, Stage, Stop


def jobs_there(view: PlanView) -> int:
    """Return how many jobs wait or run."""
    return sum(kind.count for kind in view.backlog) + sum(machine.jobs for machine in view.machines)


def alive(view: PlanView) -> list[MachineView]:
    """Return the machines that take jobs or will."""
    return [machine for machine in view.machines if machine.stage is not Stage.DRAINING]


def launch_up_to(view: PlanView, wanted: int, why: str) -> list[Action]:
    """Return the launch that makes it `wanted` machines, as far as the limits let it."""
    there = len(alive(view))
    count = min(wanted, view.limits.max_machines, there + view.offers[0].room) - there
    return [Launch(view.offers[0].name, count, why, 0.0)] if count > 0 and not view.limits.why_not else []


def idle_longest_first(view: PlanView) -> list[MachineView]:
    """Return the machines that have nothing to do, the one that was used longest ago first."""
    return sorted((m for m in alive(view) if m.idle_since is not None), key=lambda m: m.idle_since or 0.0)


def _expire(view: PlanView, idle_s: float, why: str) -> tuple[list[Action], float | None]:
    """End what was idle for `idle_s`; return that, and when the next one will have been."""
    stops: list[Action] = []
    look_at: float | None = None
    spare = len(alive(view)) - view.limits.min_machines
    for machine in idle_longest_first(view):
        due = max((machine.idle_since or 0.0) + idle_s, machine.hold_until)
        if due > view.now:
            look_at = due if look_at is None else min(look_at, due)
        elif spare > 0:
            spare -= 1
            stops.append(Stop(machine.id, why))
    return stops, look_at


def _start_overhead_s(view: PlanView) -> float:
    return view.offers[0].boot_s + view.offers[0].load_s


@dataclass(frozen=True, slots=True)
class ScaleToZero:
    """A machine for every job that waits, ended when it has nothing to do."""

    name: str = "scale-to-zero"

    def plan(self, view: PlanView) -> Plan:
        """Return what to do."""
        starts = launch_up_to(view, jobs_there(view), "a job waits")
        stops, look_at = _expire(view, 0.0, "nothing to do")
        return Plan((*starts, *([] if view.backlog else stops)), look_at)


@dataclass(frozen=True, slots=True)
class FixedTimeout:
    """One machine while there is work and `idle_s` longer; more when what waits would not be done within a start.

    Five minutes is the usual default of tools that end idle machines.
    """

    idle_s: float = 300.0
    name: str = "fixed-5-min"

    def plan(self, view: PlanView) -> Plan:
        """Return what to do."""
        starts = launch_up_to(view, _reactive(view), "what waits would take longer than a start")
        stops, look_at = _expire(view, self.idle_s, f"idle for {self.idle_s:.0f} s")
        return Plan((*starts, *stops), look_at)


def _reactive(view: PlanView) -> int:
    """Return how many machines it takes to be through with what waits within the time that a start takes."""
    waiting_s = sum(kind.count * kind.service_s for kind in view.backlog)
    if not waiting_s:
        return 0
    running_s = sum(max(0.0, m.free_at - view.now) for m in alive(view) if m.jobs)
    return max(1, -int(-(waiting_s + running_s) // _start_overhead_s(view)))


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Ski rental: a machine is kept for as long as its start would have cost, in billed load and in waiting.

    R = W + (wait price / machine price) x (D + W). By levels: the machine that would be used next is kept for R, the
    k-th one only for what it spares, since without it a job waits for a running one to end and not for a start.
    """

    name: str = "break-even"

    def plan(self, view: PlanView) -> Plan:
        """Return what to do."""
        offer = view.offers[0]
        times = view.wait_usd_per_hour / offer.usd_per_hour if offer.usd_per_hour else 0.0
        starts = launch_up_to(view, _reactive(view), "what waits would take longer than a start")
        stops: list[Action] = []
        look_at: float | None = None
        spare = len(alive(view)) - view.limits.min_machines
        level = len(alive(view))
        for machine in idle_longest_first(view):
            start_s = offer.boot_s + offer.load_s
            spared_s = start_s if level <= 1 else min(start_s, view.demand.service_s / (level - 1))
            due = max((machine.idle_since or 0.0) + offer.load_s + times * spared_s, machine.hold_until)
            if due > view.now:
                look_at = due if look_at is None else min(look_at, due)
            elif spare > 0:
                spare -= 1
                stops.append(Stop(machine.id, "idle for as long as a start costs"))
                level -= 1
        return Plan((*starts, *stops), look_at)


def _fewer(view: PlanView, wanted: int, why: str) -> list[Action]:
    """End idle machines until `wanted` are left, the one used longest ago first."""
    excess = len(alive(view)) - max(wanted, view.limits.min_machines)
    stops: list[Action] = [Stop(machine.id, why) for machine in idle_longest_first(view)]
    return stops[: max(0, excess)]


class _Average:
    """A quantity that changes in steps, averaged over the last `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window = window_s
        self._since: deque[tuple[float, float]] = deque()

    def note(self, at: float, value: float) -> None:
        self._since.append((at, value))
        while len(self._since) > 1 and self._since[1][0] <= at - self._window:
            self._since.popleft()

    def at(self, now: float) -> float:
        total, end, start = 0.0, now, now - self._window
        for at, value in reversed(self._since):
            total += value * max(0.0, end - max(at, start))
            end = max(at, start)
        return total / self._window

    def steady(self, now: float) -> bool:
        """Whether it did not change within the window."""
        changed = (at for at, value in self._since if value != self._since[0][1])
        return self._since[0][0] <= now - self._window and next(changed, None) is None

    @property
    def silent(self) -> bool:
        return not any(value for _, value in self._since)


class Knative:
    """
    Knative's pod autoscaler as it comes, for machines that do one job at a time.

    Its numbers (Knative documentation, "Additional autoscaling configuration for Knative Pod Autoscaler" and the
    comments of the ConfigMap `config-autoscaler`): concurrency averaged over a stable window of 60 s; panic over 10 %
    of that once twice the capacity is asked for, without scaling down until it is over for a stable window; 70 % of
    `containerConcurrency` as target, here 0.7 of one job; at most half of the pods go at once; to zero when the whole
    stable window was silent, then up to 30 s of grace; one decision every 2 s.
    """

    name = "knative"
    stable_s = 60.0
    panic_s = 6.0
    panic_threshold = 2.0
    target = 0.7
    grace_s = 30.0
    tick_s = 2.0

    def __init__(self) -> None:
        self._stable, self._panic = _Average(self.stable_s), _Average(self.panic_s)
        self._panicked_at: float | None = None
        self._peak = 0
        self._tick_at = -math.inf
        self._silent_at: float | None = None

    def plan(self, view: PlanView) -> Plan:
        """Return what to do."""
        now, jobs = view.now, jobs_there(view)
        for average in (self._stable, self._panic):
            average.note(now, jobs)
        if now < self._tick_at:
            return Plan((), self._tick_at)
        self._tick_at = now + self.tick_s
        if not jobs and self._stable.silent:
            return self._to_zero(view)
        self._silent_at = None
        actions = self._steer(view)
        # Where the whole window was as it is now and nothing is to be done, only something that happens changes that.
        rests = not actions and self._stable.steady(now) and self._panicked_at is None
        return Plan(tuple(actions), None if rests else self._tick_at)

    def _steer(self, view: PlanView) -> list[Action]:
        now = view.now
        have = len(alive(view))
        ready = max(1, sum(machine.stage is Stage.READY for machine in view.machines))
        stable = math.ceil(self._stable.at(now) / self.target)
        panic = math.ceil(self._panic.at(now) / self.target)
        if panic >= self.panic_threshold * ready:
            self._panicked_at = now
        elif self._panicked_at is not None and now - self._panicked_at >= self.stable_s:
            self._panicked_at, self._peak = None, 0
        # A request at zero starts one at once: the activator tells the autoscaler.
        wanted = max(1, stable)
        if self._panicked_at is not None:
            self._peak = wanted = max(self._peak, have, stable, panic)
        if wanted > have:
            return launch_up_to(view, wanted, "concurrency over the target")
        return _fewer(view, max(wanted, ready // 2), "concurrency under the target")

    def _to_zero(self, view: PlanView) -> Plan:
        self._panicked_at, self._peak = None, 0
        if not alive(view):
            self._tick_at = -math.inf
            return Plan()
        if self._silent_at is None:
            self._silent_at = view.now
        due = self._silent_at + self.grace_s
        if view.now < due:
            self._tick_at = -math.inf  # a job that comes is looked at when it comes
            return Plan((), due)
        stops = _fewer(view, 0, "silent for the stable window and the grace period")
        return Plan(tuple(stops), None if len(stops) == len(alive(view)) else view.now + self.tick_s)


class Keda:
    """
    KEDA on a queue's length, as it comes, one job for a machine.

    Its numbers (KEDA documentation, "ScaledObject specification"): the queue is looked at every 30 s, and the last
    machine goes 300 s after the last work was seen. Between one and many it is Kubernetes' HorizontalPodAutoscaler
    (Kubernetes API reference, "HorizontalPodAutoscalerBehavior"): every 15 s, not down before 300 s have all asked for
    less, up by at most 4 or double in 15 s, nothing within 10 %.
    """

    name = "keda"
    polling_s = 30.0
    cooldown_s = 300.0
    sync_s = 15.0
    stabilization_s = 300.0
    tolerance = 0.1

    def __init__(self) -> None:
        self._asked: deque[tuple[float, int]] = deque()
        self._active_at = -math.inf
        self._poll_at = self._sync_at = -math.inf

    def plan(self, view: PlanView) -> Plan:
        """Return what to do."""
        now, jobs, have = view.now, jobs_there(view), len(alive(view))
        actions: list[Action] = []
        if not have:
            if not jobs:
                return Plan()
            # Polls come every 30 s whether or not anything waits: their phase has nothing to do with arrivals.
            if now % self.polling_s and now < (due := (now // self.polling_s + 1) * self.polling_s):
                return Plan((), due)
            self._active_at, self._sync_at = now, now + self.sync_s
            return Plan(tuple(launch_up_to(view, 1, "the queue is not empty")), self._sync_at)
        if now >= self._poll_at:
            self._poll_at = now + self.polling_s
            self._active_at = now if jobs else self._active_at
            if not jobs and now - self._active_at >= self.cooldown_s:
                actions += _fewer(view, 0, "nothing seen for the cooldown period")
                self._asked.clear()
                return Plan(tuple(actions), now + self.polling_s)
        if now >= self._sync_at:
            self._sync_at = now + self.sync_s
            actions += self._autoscale(view, jobs, have)
        return Plan(tuple(actions), min(self._poll_at, self._sync_at))

    def _autoscale(self, view: PlanView, jobs: int, have: int) -> list[Action]:
        wanted = have if abs(jobs / have - 1) <= self.tolerance else max(1, jobs)
        self._asked.append((view.now, wanted))
        while self._asked[0][0] < view.now - self.stabilization_s:
            self._asked.popleft()
        if wanted > have:
            return launch_up_to(view, min(wanted, max(2 * have, have + 4)), "more jobs than machines")
        return _fewer(view, max(asked for _, asked in self._asked), "fewer jobs than machines for 300 s")


BASELINES: Final[Mapping[str, Callable[[], Policy]]] = MappingProxyType(
    {
        "scale-to-zero": ScaleToZero,
        "fixed-5-min": FixedTimeout,
        "break-even": BreakEven,
        "knative": Knative,
        "keda": Keda,
    }
)
"""What the plan is compared with: name -> what makes a fresh one."""
