"""
How much the plan costs beside the best that is possible, over streams drawn from a trace by a seed.

`python -m benchmarks.replay --trace PATH [--seed N] [--draws 3]`: three draws each of a busy user, a very busy one, a
small team and that team making videos, each at a price of waiting of 1, 5 and 20 times the machine's. A ratio is J
(what was paid plus the price of what was waited) over a lower bound that no schedule can beat, one that knows the
future included; figures are geometric means over all of it.

Bars: at most 6.1 without signals; at most 2.9 when clients say 300 s before that somebody comes, and when they leave;
at most 2.7 if there is also an offer that starts in 30 s at 1.5 times the price. Never more than 10 % worse than
break-even on any stream.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.common import report
from runcomfy.application.replay import BRIDGE, STANDARD, Arrival, Outcome, Presence, World, replay
from runcomfy.application.replay_streams import STREAMS, Trace, draw, read_trace
from runcomfy.domain.baselines import BASELINES
from runcomfy.domain.clairvoyant import Bracket, Span, bracket
from runcomfy.domain.scaling import CostPlan

WAIT_PRICES = (1.0, 5.0, 20.0)
BARS = {"no-signals": 6.1, "presence": 2.9, "presence+bridge": 2.7}
WORST_TO_BREAK_EVEN = 1.10
CELLS = {
    "no-signals": World(),
    "presence": World(presence=Presence()),
    "presence+bridge": World(offers=(STANDARD, BRIDGE), presence=Presence()),
}


@dataclass(frozen=True)
class Task:
    """One draw of one stream at one price of waiting."""

    stream: str
    number: int
    wait_price: float
    jobs: tuple[Arrival, ...] = field(repr=False)
    gap_s: float


@dataclass(frozen=True)
class Done:
    """What came of it: by policy, or by cell for the plan."""

    task: Task
    bracket: Bracket
    outcomes: dict[str, Outcome]
    seconds: float

    def ratio(self, name: str) -> float:
        return self.outcomes[name].cost / self.bracket.bound_usd


def work(task: Task) -> Done:
    began = time.perf_counter()
    told = Presence(gap_s=task.gap_s)
    outcomes = {
        name: replay(
            CostPlan(), task.jobs, replace(world, presence=world.presence and told).at_wait_price(task.wait_price)
        )
        for name, world in CELLS.items()
    }
    for name, policy in BASELINES.items():
        outcomes[name] = replay(policy(), task.jobs, World().at_wait_price(task.wait_price))
    seconds = time.perf_counter() - began
    limits = bracket(
        [Span(job.at, job.service_s) for job in task.jobs],
        [STANDARD, BRIDGE],
        wait_usd_per_hour=task.wait_price * STANDARD.usd_per_hour,
    )
    return Done(task, limits, outcomes, seconds)


def tasks(trace: Trace, *, seed: int, draws: int, gap_s: float) -> list[Task]:
    return [
        Task(stream, number, price, jobs, gap_s)
        for stream in reversed(STREAMS)  # the long ones first, so that no core waits at the end
        for number, jobs in enumerate(draw(trace, stream, seed=seed, count=draws))
        for price in WAIT_PRICES
    ]


def geometric(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def say(done: Done) -> None:
    names = (*CELLS, *BASELINES)
    report(
        "replay stream",
        stream=done.task.stream,
        draw=done.task.number,
        wait_price=done.task.wait_price,
        jobs=len(done.task.jobs),
        bound_usd=round(done.bracket.bound_usd, 3),
        best_schedule_found=round(1 + done.bracket.gap, 4),
        zero_wait_optimum=round(done.bracket.zero_wait_usd / done.bracket.bound_usd, 4),
        ratio={name: round(done.ratio(name), 3) for name in names},
        to_break_even=round(done.ratio("no-signals") / done.ratio("break-even"), 3),
        usd_per_1000_jobs={name: round(done.outcomes[name].usd_per_1000, 1) for name in names},
        p95_wait_s={name: round(done.outcomes[name].wait(0.95)) for name in names},
        seconds=round(done.seconds, 1),
    )


def summary(everything: Sequence[Done], *, seed: int) -> bool:
    """Report the figures that bars are about; return whether all are kept."""
    means = {name: geometric(done.ratio(name) for done in everything) for name in (*CELLS, *BASELINES)}
    worst = max(everything, key=lambda done: done.ratio("no-signals") / done.ratio("break-even"))
    to_break_even = worst.ratio("no-signals") / worst.ratio("break-even")
    kept = all(means[name] <= bar for name, bar in BARS.items()) and to_break_even <= WORST_TO_BREAK_EVEN
    report(
        "replay",
        seed=seed,
        streams=len(everything),
        geometric_mean={name: round(mean, 3) for name, mean in means.items()},
        by_stream={
            stream: {
                name: round(geometric(d.ratio(name) for d in everything if d.task.stream == stream), 3)
                for name in CELLS
            }
            for stream in STREAMS
        },
        by_wait_price={
            f"{price:g}": {
                name: round(geometric(d.ratio(name) for d in everything if d.task.wait_price == price), 3)
                for name in CELLS
            }
            for price in WAIT_PRICES
        },
        bars=BARS,
        below_the_bar={name: f"{1 - means[name] / bar:.1%}" for name, bar in BARS.items()},
        worst_to_break_even=round(to_break_even, 3),
        worst_on=f"{worst.task.stream} {worst.task.number} at {worst.task.wait_price:g}",
        bar_to_break_even=WORST_TO_BREAK_EVEN,
        widest_bracket=round(max(done.bracket.gap for done in everything), 4),
        kept=kept,
    )
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument(
        "--presence-gap", type=float, default=Presence().gap_s, help="seconds; who is silent longer left"
    )
    parser.add_argument("--brief", action="store_true", help="only the summary")
    chosen = parser.parse_args(arguments)
    with chosen.trace.open(newline="", encoding="utf-8") as lines:
        trace = read_trace(lines)
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 8)) as pool:
        everything: list[Done] = []
        for done in pool.imap(work, tasks(trace, seed=chosen.seed, draws=chosen.draws, gap_s=chosen.presence_gap)):
            everything.append(done)
            if not chosen.brief:
                say(done)
    return 0 if summary(everything, seed=chosen.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
