"""
How well the time left is told: after ten runs of a workflow whose nodes vary by 20 %, over looks during five more.

Product and emulator are real, their waiting is skipped (virtual time), so the figure depends on the seeds only.
Bar: median error within 25 % of the truth.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import looptime

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.timed_runs import Look, timed_runs

LEARNED_FROM = 10
LOOKED_AT = 5
SEEDS = (1, 2, 3)
NOISE = 0.2
BAR_PERCENT = 25.0


async def looks(seed: int) -> list[Look]:
    with TemporaryDirectory(prefix="comfyctl-bench-") as folder:
        async with (
            ComfyUIEmulator() as comfyui,
            timed_runs(comfyui, Path(folder), LoopClock(), noise=NOISE, seed=seed) as runs,
        ):
            for _ in range(LEARNED_FROM):
                await runs.once(every=60)
            return [look for _ in range(LOOKED_AT) for look in await runs.once()]


def main() -> Result:
    findings = Findings(
        "time_left", "Ten runs learned from, five looked at all through, three seeds; node times vary by 20 %."
    )
    found: list[Look] = []
    for seed in SEEDS:
        loop = looptime.new_event_loop(start=0, idle_step=None)
        try:
            found += loop.run_until_complete(looks(seed))
        finally:
            loop.close()
    errors = [look.error for look in found]
    inside = sum(look.told is not None and look.told.low_s <= look.true_s <= look.told.high_s for look in found)
    report(
        "time_left",
        learned_from=LEARNED_FROM,
        noise=NOISE,
        looks=len(found),
        median_error=round(middle(errors), 3),
        p90_error=round(high(errors, 0.9), 3),
        in_range=round(inside / len(found), 3),
        sure=round(sum(look.told is not None and look.told.sure for look in found) / len(found), 3),
    )
    findings.at_most("error of the time left, median", 100 * middle(errors), BAR_PERCENT, "%")
    findings.told("error of the time left, p90", 100 * high(errors, 0.9), "%")
    findings.told("looks at which the truth was in the range told", 100 * inside / len(found), "%")
    return findings.result()
