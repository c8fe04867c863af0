"""
Telling another program of a job's end: what is told, when it is tried again, when it is given up.

The times and the meaning of answers are those of the Standard Webhooks specification (operational considerations:
retry schedule, status codes). Signing and sending are left to the outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from runcomfy.domain.queued import EventKind, RowId

WAITS: Final = (
    timedelta(seconds=5),
    timedelta(minutes=5),
    timedelta(minutes=30),
    timedelta(hours=2),
    timedelta(hours=5),
    timedelta(hours=10),
    timedelta(hours=14),
    timedelta(hours=20),
    timedelta(hours=24),
)
"""Before the second try, the third, and so on: ten tries within 76 hours."""
LONGEST_WAIT: Final = timedelta(hours=24)
"""A Retry-After beyond this is not obeyed to the letter."""
JITTER: Final = 0.1
"""A wait is longer by up to this part of itself, so that many deliveries do not come at once."""
_SOON: Final = frozenset({429, 503})

TYPES: Final[Mapping[EventKind, str]] = {
    EventKind.DONE: "job.done",
    EventKind.FAILED: "job.failed",
    EventKind.CANCELLED: "job.cancelled",
    EventKind.QUARANTINED: "job.quarantined",
}
"""What is told of, and its name in the message."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message for one address, until it has arrived or was given up."""

    event: int
    """Number of the job's last word in the event log."""
    url: str
    job_id: RowId
    body: str
    """The message, the same at every try."""
    created_at: datetime
    due_at: datetime
    tries: int = 0
    """How often it was sent so far."""
    last: str = ""
    """What came of the last try."""

    def message_id(self, queue: str) -> str:
        """Return the id by which the receiver knows it again: the same at every try. `queue`: the database's name."""
        return f"msg_{queue}_{self.event}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one try."""

    status: int | None
    """None: there was no answer; `words` says why."""
    words: str
    retry_after: timedelta | None = None

    @property
    def arrived(self) -> bool:
        """Whether the receiver has it."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def unwanted(self) -> bool:
        """Whether the receiver wants nothing at this address any more."""
        return self.status == 410


def next_wait(tries: int, answer: Answer, *, chance: float) -> timedelta | None:
    """Return how long to wait after so many tries; None: give up. `chance` is between 0 and 1."""
    if tries > len(WAITS):
        return None
    wait = WAITS[tries - 1] * (1 + JITTER * chance)
    if answer.retry_after is not None and answer.status in _SOON:
        return max(wait, min(answer.retry_after, LONGEST_WAIT))
    return wait
