"""Types of machines that could not be launched: for how long they are left alone, and when they are given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.health import Blame, blame_of

FAILED_FIRST: Final = 10.0
FAILED_MOST: Final = 300.0
"""Seconds until a type is tried again that could not be launched; doubled each time."""
GIVEN_UP_AFTER: Final = 3
"""Launches of a type in a row that failed after which somebody who waits for it is told that it will not come."""


@dataclass(slots=True)
class Failing:
    """A type that could not be launched."""

    wait: float = FAILED_FIRST
    until: float = float("-inf")
    why: str = ""
    error: RunComfyError | None = None
    """What the last launch failed with."""
    times: int = 0
    """How many launches in a row did."""

    def failed(self, error: RunComfyError, *, now: float) -> None:
        """Count a launch that failed now; the next one waits twice as long."""
        self.until, self.wait = now + self.wait, min(self.wait * 2, FAILED_MOST)
        self.why, self.error, self.times = error.message, error, self.times + 1

    @property
    def given_up(self) -> RunComfyError | None:
        """Return the error if trying on is not worth waiting for: it has failed often, or somebody has to mend it."""
        hopeless = self.error is not None and blame_of(self.error) in (Blame.ACCOUNT, Blame.REFUSED)
        return self.error if hopeless or self.times >= GIVEN_UP_AFTER else None


__all__ = ["FAILED_FIRST", "FAILED_MOST", "GIVEN_UP_AFTER", "Failing"]
