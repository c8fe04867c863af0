"""
What goes wrong in a soak, and when: a function of the seed and the minutes alone.

Whom it happens to is a number between 0 and 1 here: it picks among those who are there when its time has come. So the
same seed makes the same plan, and not the same story: that depends on real processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

KILL_EVERY: Final = 2.7
STOP_EVERY: Final = 12.0
TOXIC_EVERY: Final = 1.6
CLOUD_EVERY: Final = 7.0
LONG_FROM_MINUTES: Final = 5.0
"""A soak at least so long has processes that sleep through everything that they hold."""

KILLED: Final[Mapping[str, float]] = {"service": 0.42, "executor": 0.18, "guard": 0.08, "comfyui": 0.24, "client": 0.08}
STOPPED: Final[Mapping[str, float]] = {"service": 0.55, "executor": 0.15, "guard": 0.1, "comfyui": 0.2}
SPOILED: Final[Mapping[str, float]] = {"api": 0.22, "machine": 0.34, "own": 0.16, "http": 0.28}


@dataclass(frozen=True, slots=True)
class Deed:
    """One thing that is done to somebody."""

    at: float
    """Seconds from the beginning."""
    kind: str
    """`kill`, `stop` (SIGSTOP, and SIGCONT after `seconds`), `toxic`, `refuse`, `reset`, `call`, `machine`."""
    target: str = ""
    pick: float = 0.0
    seconds: float = 0.0
    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    directions: tuple[str, ...] = ()

    @property
    def counted_as(self) -> str:
        """What the report calls it."""
        return f"{self.target}: {self.name}" if self.name else f"{self.target}: {self.kind}"


def plan(seed: int, minutes: float, *, database: bool = False) -> list[Deed]:
    """Return everything that will be done, by time. `database`: also to the way to the database."""
    seconds = minutes * 60
    draw = random.Random(f"soak-{seed}")
    deeds = [
        *_every(draw, KILL_EVERY, seconds, lambda at: Deed(at, "kill", _one_of(draw, KILLED), draw.random())),
        *_every(draw, STOP_EVERY, seconds, lambda at: _stop(draw, at, minutes)),
        *_every(draw, TOXIC_EVERY, seconds, lambda at: _spoil(draw, at, database=database)),
        *_every(draw, CLOUD_EVERY, seconds, lambda at: _cloud(draw, at)),
    ]
    return sorted(deeds, key=lambda deed: deed.at)


def _every(draw: random.Random, mean: float, seconds: float, make: Any) -> Iterator[Deed]:
    at = draw.expovariate(1 / mean)
    while at < seconds:
        yield make(at)
        at += draw.expovariate(1 / mean)


def _one_of(draw: random.Random, weights: Mapping[str, float]) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]


def _stop(draw: random.Random, at: float, minutes: float) -> Deed:
    share = draw.random()
    seconds = draw.uniform(0.3, 4)
    if share > 0.75:
        seconds = draw.uniform(7, 14)  # longer than a job's lease
    if share > 0.95 and minutes >= LONG_FROM_MINUTES:
        seconds = draw.uniform(62, 75)  # longer than the role's
    return Deed(at, "stop", _one_of(draw, STOPPED), draw.random(), seconds)


def _spoil(draw: random.Random, at: float, *, database: bool) -> Deed:
    weights = {**SPOILED, "database": 0.15} if database else SPOILED
    target, pick, seconds = _one_of(draw, weights), draw.random(), draw.uniform(0.5, 6)
    share = draw.random()
    if share < 0.08:
        return Deed(at, "reset", target, pick, name="reset now")
    if share < 0.13:
        return Deed(at, "refuse", target, pick, seconds / 2, name="refused")
    name, values = _toxic(draw)
    ways: tuple[tuple[str, ...], ...] = ((), ("up",), ("down",))
    return Deed(at, "toxic", target, pick, seconds, name, values, draw.choice(ways))


def _toxic(draw: random.Random) -> tuple[str, dict[str, float]]:
    made: dict[str, dict[str, float]] = {
        "latency": {"seconds": draw.uniform(0.01, 0.8), "jitter": draw.uniform(0, 0.3)},
        "bandwidth": {"bytes_per_second": draw.uniform(300, 20_000)},
        "slow_close": {"seconds": draw.uniform(0.2, 3)},
        "timeout": {"seconds": draw.choice([0.0, draw.uniform(0.1, 4)])},
        "reset_peer": {"seconds": draw.uniform(0, 1.5), "toxicity": draw.uniform(0.3, 1)},
        "slicer": {"average_bytes": draw.randint(1, 120), "variation_bytes": 20, "seconds": draw.uniform(0, 0.02)},
        "limit_data": {"size_bytes": draw.randint(0, 3_000), "toxicity": draw.uniform(0.3, 1)},
        "half_close": {"size_bytes": draw.randint(0, 2_000), "toxicity": draw.uniform(0.3, 1)},
    }
    name = draw.choice(list(made))
    return name, made[name]


_LIST, _LAUNCH, _STOP = "GET servers", "POST servers", "DELETE servers/*"
_CALLS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("launched, answer lost", {"call": _LAUNCH, "reply": "lost", "works": True}),
    ("launched, answer 500", {"call": _LAUNCH, "status": 500, "works": True}),
    ("launched, answer cut", {"call": _LAUNCH, "reply": "truncated"}),
    ("launched, a page of HTML", {"call": _LAUNCH, "reply": "html"}),
    ("launched, never answered", {"call": _LAUNCH, "reply": "never", "works": True}),
    ("not launched, answer 500", {"call": _LAUNCH, "status": 500, "works": False}),
    ("no stock", {"call": _LAUNCH, "status": 503, "works": False}),
    ("429 with Retry-After", {"status": 429, "headers": {"Retry-After": "2"}, "times": 3}),
    ("list 500", {"call": _LIST, "status": 500, "times": 3}),
    ("list empty by mistake", {"call": _LIST, "body": []}),
    ("list cut", {"call": _LIST, "reply": "truncated"}),
    ("list slow", {"call": _LIST, "delay": 3.0}),
    ("stop 500, stopped", {"call": _STOP, "status": 500, "works": True}),
    ("stop 500, not stopped", {"call": _STOP, "status": 500, "works": False, "times": 2}),
    ("stop 200, not stopped", {"call": _STOP, "works": False}),
    ("stop 404, not stopped", {"call": _STOP, "status": 404, "works": False}),
    ("stopped, answer lost", {"call": _STOP, "reply": "lost", "works": True}),
    ("renewal 500", {"call": "POST servers/*/update-estimated-duration", "status": 500, "works": False}),
    ("renewed, answer lost", {"call": "POST servers/*/update-estimated-duration", "reply": "lost", "works": True}),
    ("status 502, HTML", {"call": "GET servers/*", "status": 502, "reply": "html", "times": 2}),
)
_MACHINES: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("starts for ever", {"stuck": True}),
    ("start fails", {"fails": True}),
    ("hidden at first", {"hidden_for": 1.0, "unlisted_for": 1.5}),
    ("ready, and refuses", {"comfyui": "refused", "comfyui_for": 3.0}),
    ("ready, and answers 502", {"comfyui": "502", "comfyui_for": 3.0}),
    ("ready, and a splash page", {"comfyui": "html", "comfyui_for": 3.0}),
    ("vanishes", {"vanishes_after": 15.0}),
    ("ignores its lease", {"ignores_stop_time": True}),
    ("listed when gone", {"listed_after": 4.0}),
    ("slow to be gone", {"delete_takes": 5.0}),
    ("flaps", {"flaps": 4.0}),
)


def _cloud(draw: random.Random, at: float) -> Deed:
    if draw.random() < 0.65:
        name, values = draw.choice(_CALLS)
        return Deed(at, "call", "cloud", draw.random(), name=name, values=values)
    name, values = draw.choice(_MACHINES)
    return Deed(at, "machine", "cloud", draw.random(), name=name, values=values)
