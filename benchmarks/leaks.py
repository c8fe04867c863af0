"""
What is billed after everything of ours has died, at every point of a machine's life, with virtual time.

`python -m benchmarks leaks` prints one line for each story and manner of the provider, with the worst that was seen:
where the provider keeps its word nothing of ours lives on, and the bar is price x lease; where it ignores leases only
the guard lives on, and the bar is price x (lease + the guard's period).
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Coroutine
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import looptime

from benchmarks.common import Findings, report
from benchmarks.results import Result
from runcomfy.testing.leaks import GUARD_PERIOD, STORIES, Death, allowed, kill_points, leak_of

T = TypeVar("T")


def _told(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` with virtual time, which begins anew."""
    loop = looptime.new_event_loop(start=0, idle_step=None)
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def main() -> Result:
    """Print the worst leak of each story, for a provider that keeps its word and for one that does not."""
    logging.getLogger("runcomfy").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tasks of the dead that nobody asks how they ended
    found = Findings(
        "leaks", "Everything of ours dies at each durable write and remote call; then the cloud's bill is read."
    )
    with tempfile.TemporaryDirectory(prefix="leaks-") as name:
        for story in STORIES:
            deaths: list[Death] = _told(kill_points(story, Path(name) / "points"))
            for keeps_word in (True, False):
                _sweep(found, story, deaths, Path(name), keeps_word=keeps_word)
    return found.result()


def _sweep(found: Findings, story: str, deaths: list[Death], folder: Path, *, keeps_word: bool) -> None:
    began, leaks = time.monotonic(), []
    for number, death in enumerate(deaths):  # a loop of its own for each: what the dead leave behind ends with it
        leaks.append(_told(leak_of(story, death, folder / f"death-{number}", keeps_word=keeps_word)))
    worst = max(leaks, key=lambda leak: leak.seconds)
    limit = allowed(story, keeps_word=keeps_word)
    over = [str(leak.death) for leak in leaks if leak.seconds > limit.total_seconds() or leak.still_bills]
    odd = [str(leak.death) for leak in leaks if leak.ledger_usd is not None and leak.ledger_usd != leak.bill_usd]
    report(
        "leaks",
        story=story,
        provider="keeps its word, all of ours is dead" if keeps_word else "ignores the lease, only the guard lives",
        kill_points=len(leaks),
        reached=sum(leak.died for leak in leaks),
        worst_seconds=float(worst.seconds),
        worst_usd=float(round(worst.usd, 6)),
        worst_at=str(worst.death),
        allowed_seconds=limit.total_seconds(),
        allowed_usd=float(round(worst.usd_per_hour * Decimal(limit.total_seconds()) / 3600, 6)),
        guard_period_s=None if keeps_word else GUARD_PERIOD.total_seconds(),
        over_the_bar=over,
        ledger_is_not_the_bill=odd,
        met=not over,
        took_s=round(time.monotonic() - began, 1),
    )
    who = "the provider keeps its word" if keeps_word else "only the guard lives"
    found.at_most(f"{story}, {who}: billed after a death, at worst", float(worst.seconds), limit.total_seconds(), "s")
    found.told(f"{story}, {who}: deaths after which the ledger is not the bill", len(odd))
    found.told(f"{story}, {who}: deaths", len(leaks))
