"""
How long one plan takes: a thousand machines and ten thousand waiting jobs, and the small case of every day.

`python -m benchmarks planning` prints one line for each case: median and 99th percentile in milliseconds. The views
change from plan to plan as they do in life, so that nothing is answered from a cache that would not be.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from runcomfy.domain.plan_view import (
    Backlog,
    DemandView,
    Limits,
    MachineView,
    OfferView,
    PlanView,
    PresenceView,
    Stage,
)
from runcomfy.domain.scaling import CostPlan

PLANS = 300
BAR_MS = 5.0
OFFERS = (
    OfferView("24gb", 1.75, room=2000),
    OfferView("48gb", 2.99, speed=0.6, room=2000),
    OfferView("bridge", 2.63, boot_s=30.0, boot_p90_s=30.0, load_s=0.0, boot_billed=True, room=2000),
)


@dataclass(frozen=True)
class Case:
    """How much there is to plan for."""

    machines: int
    busy: float
    """Share of the machines that have work."""
    jobs: int
    workflows: int


CASES = {
    "one machine, idle": Case(1, 0.0, 0, 0),
    "one machine, ten jobs": Case(1, 1.0, 10, 1),
    "1000 machines, 10000 jobs": Case(1000, 1.0, 10_000, 40),
    "1000 machines, half idle": Case(1000, 0.5, 0, 0),
}


def view(case: Case, now: float, chance: random.Random) -> PlanView:
    """Return a view as the fleet makes it, different each time."""
    machines = []
    for number in range(case.machines):
        busy = chance.random() < case.busy
        booting = case.machines > 1 and chance.random() < 0.05
        offer = OFFERS[number % 2]
        machines.append(
            MachineView(
                id=f"m{number}",
                offer=offer.name,
                stage=Stage.BOOTING if booting else Stage.READY,
                launched_at=now - 900,
                ready_at=now + chance.uniform(0, 180) if booting else now - 600,
                free_at=now + chance.uniform(0, 60) if busy else now,
                jobs=int(busy and not booting),
                idle_since=None if busy or booting else now - chance.uniform(0, 300),
                last_used=now - chance.uniform(0, 300),
                billed_since=None if booting else now - 600,
            )
        )
    groups = tuple(
        Backlog(
            workflow=f"w{number}",
            count=case.jobs // case.workflows,
            oldest_at=now - chance.uniform(0, 600),
            service_s=chance.uniform(5, 60),
            offers=() if number % 4 else ("48gb",),
        )
        for number in range(case.workflows)
    )
    rate = case.machines * 0.7 / 30 * chance.uniform(0.8, 1.2)
    demand = DemandView(
        seen=5000 + chance.randrange(5000),
        rate_fast=rate,
        rate_slow=rate,
        service_s=chance.uniform(25, 35),
        silences=tuple(chance.expovariate(1 / 900) for _ in range(600)),
        waits_per_cold=400.0,
        last_arrival=now,
        group=2.0,
    )
    return PlanView(
        now=now,
        offers=OFFERS,
        machines=tuple(machines),
        backlog=groups,
        demand=demand,
        presence=PresenceView(),
        limits=Limits(max_machines=case.machines + 200),
        wait_usd_per_hour=8.75,
    )


def measure(case: Case, *, plans: int = PLANS, seed: int = 0) -> list[float]:
    """Return how long each plan took, in milliseconds of this process's own time."""
    chance, policy, took = random.Random(seed), CostPlan(), []
    for number in range(plans):
        seen = view(case, 10_000.0 + 5 * number, chance)
        began = time.process_time_ns()
        policy.plan(replace(seen, now=seen.now + 0.001))
        took.append((time.process_time_ns() - began) / 1e6)
    return took


def main() -> Result:
    found = Findings("planning", "Processor time of the plan alone; the views differ from plan to plan.")
    for name, case in CASES.items():
        took = measure(case)
        report(
            "planning",
            case=name,
            machines=case.machines,
            jobs=case.jobs,
            plans=len(took),
            median_ms=round(middle(took), 3),
            p99_ms=round(high(took, 0.99), 3),
            bar_ms=BAR_MS,
            kept=middle(took) < BAR_MS,
        )
        found.at_most(f"{name}, median", middle(took), BAR_MS, "ms")
        found.told(f"{name}, p99", high(took, 0.99), "ms")
    return found.result()


if __name__ == "__main__":
    main()
