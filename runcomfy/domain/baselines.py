"""
Policies that the product's plan is compared with: what people do, and what other autoscalers do by default.

They are pure like the plan itself and are handed the same values, so a replay runs them the same way. All of them
launch the reference type only and listen to no signals; nothing in the product uses them to rent machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runcomfy.domain.plan_view import Action, Launch, MachineView, Plan, PlanView, Stage, Stop


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


def all_of() -> Sequence[FixedTimeout | ScaleToZero | BreakEven]:
    """Return every baseline with its defaults."""
    return (ScaleToZero(), FixedTimeout(), BreakEven())
