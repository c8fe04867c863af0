"""How long a job will still take: the value that people are told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimeLeft:
    """Seconds until the results are there; never negative."""

    low_s: float
    """Nine times of ten it takes longer than this."""
    expected_s: float
    high_s: float
    """Nine times of ten it takes less than this."""
    sure: bool
    """Whether enough runs stand behind it and the range is narrow: one number may be told instead of the range."""
    runs: int
    """On how many runs it rests."""
