"""
`python -m benchmarks simulate --seeds 300 [--first 1] [--processes N] [--record]`: that many simulated days, all green.

Each day is one seed: the production controller, queue, pool, reconciler, service and guard in one thread under virtual
time, random load, a fault each two simulated minutes. The oracles are the cloud's bill and the ComfyUI servers' run
logs. The days are spread over the processors. One that fails is told with its seed, the first broken invariant, the
story of the job or machine it concerns, and the command that replays it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from benchmarks.common import summary
from benchmarks.results import Figure, Result, keep, told_to_keep

LOST: Final = ("I10",)
DOUBLED: Final = ("I11", "I12", "I16")
UNEXPLAINED: Final = ("I2", "I7")
DIFFERING: Final = ("I9",)
TOLD: Final = 3
"""Days that failed whose stories are told; of the others there is the seed."""


@dataclass(frozen=True, slots=True)
class Lived:
    """What of a day is told to the process that counts."""

    seed: int
    jobs: int = 0
    machines: int = 0
    faults: int = 0
    kills: int = 0
    lost: int = 0
    doubled: int = 0
    unexplained: int = 0
    differing: int = 0
    violations: int = 0
    ledger_usd: Decimal = Decimal(0)
    bill_usd: Decimal = Decimal(0)
    seconds: float = 0.0
    digest: str = ""
    report: tuple[str, ...] = ()


def live(seed: int) -> Lived:
    """Live through one day, in a process of its own."""
    from runcomfy.testing.simulation.run import simulate

    try:
        day = simulate(seed)
    except Exception:  # noqa: BLE001 - the other days are lived all the same
        report = (f"seed {seed} could not be lived through", traceback.format_exc())
        return Lived(seed, violations=1, report=report)
    return Lived(
        seed=seed,
        jobs=day.jobs,
        machines=day.machines,
        faults=day.faults,
        kills=day.kills,
        lost=day.count(*LOST),
        doubled=day.count(*DOUBLED),
        unexplained=day.count(*UNEXPLAINED),
        differing=day.count(*DIFFERING),
        violations=len(day.violations),
        ledger_usd=day.ledger_usd,
        bill_usd=day.bill_usd,
        seconds=day.seconds,
        digest=day.digest,
        report=tuple(day.report()) if day.violations else (),
    )


def _days(seeds: Sequence[int], processes: int) -> Iterator[Lived]:
    if processes <= 1:
        yield from map(live, seeds)
        return
    # Spawned, not forked, so that it is the same on every system; a process is replaced now and then.
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=50) as pool:
        yield from pool.imap_unordered(live, seeds)


def main(arguments: Sequence[str]) -> int:
    """Live through the days, print what they came to, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks simulate")
    parser.add_argument("--seeds", type=int, default=300, help="how many days")
    parser.add_argument("--first", type=int, default=1, help="seed of the first")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/simulate.json")
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    days, failed = [], []
    for day in _days(range(asked.first, asked.first + asked.seeds), asked.processes):
        days.append(day)
        if day.violations:
            failed.append(day)
            told = day.report if len(failed) <= TOLD else day.report[:1]
            print(*told, sep="\n", flush=True)
        if len(days) % 25 == 0:
            rate = len(days) / (time.monotonic() - began)
            print(f"{len(days)} of {asked.seeds} seeds, {len(failed)} failed, {rate:.2f} a second", file=sys.stderr)
    took = time.monotonic() - began
    result = Result(
        "simulate",
        f"python -m benchmarks simulate --seeds {asked.seeds} --first {asked.first}",
        tuple(_figures(asked, days, len(failed), took)),
        took_s=round(took, 1),
        notes=("Whole days of everything together, one per seed, in memory under virtual time.",),
    )
    summary(result)
    if told_to_keep(*arguments):
        keep(result)
    return 1 if failed else 0


def _figures(asked: argparse.Namespace, days: Sequence[Lived], failed: int, took: float) -> Iterator[Figure]:
    yield Figure("seeds", f"{len(days)} ({asked.first} to {asked.first + asked.seeds - 1})")
    yield Figure("time", f"{took:.0f} s in {asked.processes} processes")
    yield Figure("rate", f"{len(days) / took:.2f} days a second")
    yield Figure("processor time of a day", f"{sum(day.seconds for day in days) / len(days):.2f} s")
    for name in ("jobs", "machines", "faults", "kills"):
        yield Figure(name, f"{sum(getattr(day, name) for day in days):,}")
    for words, name in (
        ("jobs lost", "lost"),
        ("jobs doubled", "doubled"),
        ("machines unexplained", "unexplained"),
        ("machines whose ledger is not the bill", "differing"),
        ("promises broken, of all kinds", "violations"),
    ):
        count = sum(getattr(day, name) for day in days)
        yield Figure(words, f"{count:,}", "0", count == 0)
    yield Figure("seeds that failed", f"{failed:,}", "0", failed == 0)
    yield Figure("ledger", f"${sum((day.ledger_usd for day in days), Decimal(0)):.2f}")
    yield Figure("bill", f"${sum((day.bill_usd for day in days), Decimal(0)):.2f}")
