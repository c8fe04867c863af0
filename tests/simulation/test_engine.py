"""Simulated days: all of them green, each the same every time."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.testing.simulation import run
from runcomfy.testing.simulation.run import Day, simulate
from runcomfy.testing.simulation.world import World

SEEDS = range(1, 31)
"""Whole days in every check; more of them are lived through at night (`make simulate`)."""


def told(day: Day) -> str:
    """Return what to read if a day is not green."""
    return "\n".join(day.report()) if day.violations else ""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_day_in_which_much_goes_wrong_keeps_every_promise(seed: int) -> None:
    day = simulate(seed)

    assert not told(day)
    assert day.jobs > 20
    assert day.faults > 500  # one in two minutes on average, but for the last three hours


def test_a_seed_is_the_same_day_in_every_process() -> None:
    script = (
        "from datetime import timedelta; from runcomfy.testing.simulation.run import simulate; "
        "print(simulate(1, length=timedelta(hours=3)).digest)"
    )

    def digest(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert digest("1") == digest("2") == simulate(1, length=timedelta(hours=3)).digest


def test_another_seed_is_another_day() -> None:
    short = timedelta(hours=1)

    assert simulate(1, length=short).digest != simulate(2, length=short).digest


def test_a_day_that_is_over_leaves_no_world_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands are lived through in one process: what each of them kept would have to be looked through for ever."""
    worlds: list[weakref.ref[World]] = []

    def noted(*arguments: Any, **options: Any) -> World:
        world = World(*arguments, **options)
        worlds.append(weakref.ref(world))
        return world

    monkeypatch.setattr(run, "World", noted)

    simulate(1, length=timedelta(hours=2))

    gc.collect()
    assert [world() for world in worlds] == [None]
