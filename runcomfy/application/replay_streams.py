"""
Where the streams of a replay come from: a trace as a table, and the kinds of users drawn from it by a seed.

A trace is a CSV with a header: `arrival_s` (seconds from any start), `service_s` (run time in seconds), `user`; other
columns are optional. `workflow` says what kind of job it was; where there is none, `kind` does. Reading the file is the
caller's work.
"""

from __future__ import annotations

import csv
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from runcomfy.application.replay import Arrival
from runcomfy.domain.exceptions import ValueInvalid, foreign_text

STREAMS: Final = ("solo", "heavy", "team", "video")
HEAVY_RANKS: Final = (0, 4)
"""A heavy user is one of the four who sent most."""
SOLO_RANKS: Final = (4, 12)
"""A busy artist: one of the next eight."""
TEAM_SHARE: Final = 10
"""A small team is a random tenth of the users of a service."""
VIDEO_TIMES: Final = 6.0
"""A video takes about six times as long as a picture."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace, in order of time."""

    jobs: tuple[Arrival, ...]
    left_out: int = 0
    """Rows without a run time: requests that never ran."""

    @property
    def users(self) -> list[str]:
        """Return the users, those who sent most first."""
        counts = Counter(job.user for job in self.jobs)
        return sorted(counts, key=lambda user: (-counts[user], user))


MOST_SECONDS: Final[Mapping[str, float]] = {"arrival_s": 10 * 365 * 86_400.0, "service_s": 86_400.0}
"""A trace of more than ten years, or a job of more than a day, is a mistake, and would be replayed for ever."""


def read_trace(lines: Iterable[str], *, service_s: float | None = None) -> Trace:
    """Return the trace in these lines of CSV.

    `service_s` is the run time of every job of a trace that has no such column. Raises ValueInvalid, naming the line.
    """
    rows = csv.DictReader(lines)
    fields = [name.strip() for name in rows.fieldnames or ()]
    if "arrival_s" not in fields:
        raise ValueInvalid(
            "the trace has no column arrival_s",
            hint="its first line must name the columns: arrival_s,service_s,user",
        )
    if "service_s" not in fields and service_s is None:
        raise ValueInvalid(
            "the trace has no column service_s, so nobody knows how long a job ran",
            hint="say it for all of them with --service-s SECONDS",
        )
    kind = "workflow" if "workflow" in fields else "kind"
    jobs: list[Arrival] = []
    left_out = 0
    for row in rows:
        at = _number(row, "arrival_s", rows.line_num)
        seconds = _number(row, "service_s", rows.line_num) if "service_s" in fields else service_s or 0.0
        if seconds <= 0:
            left_out += 1
            continue
        jobs.append(Arrival(at, seconds, row.get("user") or "", row.get(kind) or ""))
    if not jobs:
        raise ValueInvalid("the trace has no job that ran", hint="service_s must be above 0 in some row")
    return Trace(tuple(sorted(jobs, key=lambda job: job.at)), left_out)


def _number(row: Mapping[str, str | None], column: str, line: int) -> float:
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    most = MOST_SECONDS[column]
    if not 0 <= value <= most:
        raise ValueInvalid(
            f"line {line} of the trace: {column} is {foreign_text(repr(text), 40)}",
            hint=f"{column} must be a number of seconds from 0 to {most:.0f}",
        )
    return value


def draw(trace: Trace, stream: str, *, seed: int = 0, count: int = 1) -> list[tuple[Arrival, ...]]:
    """Return `count` streams of that kind, different ones as far as the trace has them; the same for the same seed."""
    if stream not in STREAMS:
        raise ValueInvalid(f"there is no stream {foreign_text(stream, 40)!r}", hint=f"one of {', '.join(STREAMS)}")
    chance = random.Random(f"{seed} {'team' if stream == 'video' else stream}")  # noqa: S311 - a draw, not a secret
    users = trace.users
    if stream in ("team", "video"):
        teams = [set(chance.sample(sorted(users), max(1, len(users) // TEAM_SHARE))) for _ in range(count)]
        times = VIDEO_TIMES if stream == "video" else 1.0
        return [
            tuple(replace(job, service_s=job.service_s * times) for job in trace.jobs if job.user in team)
            for team in teams
        ]
    first, last = HEAVY_RANKS if stream == "heavy" else SOLO_RANKS
    ranked = users[first:last] or users[-1:]
    picked = chance.sample(ranked, min(count, len(ranked)))
    picked += chance.choices(ranked, k=count - len(picked))
    return [of_users(trace.jobs, {user}) for user in picked]


def of_users(jobs: Sequence[Arrival], users: set[str]) -> tuple[Arrival, ...]:
    """Return the jobs of some users."""
    return tuple(job for job in jobs if job.user in users)
