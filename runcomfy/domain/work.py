"""
A job's time on a machine: what it cost is told from this.

A row is written when a job takes a seat at a machine, and completed when it leaves. `computing_at` to `computed_at` is
when the server worked on its prompt; the rest of its time there went into uploads, waiting its turn, and downloads.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId


@dataclass(frozen=True, slots=True)
class Work:
    """One job's time on one machine. Times are aware UTC."""

    machine_id: MachineId
    job_id: JobId
    attempt: int
    """The token of the queue's claim; 0 for a job that was run without the queue."""
    workflow: str
    server_type: str
    began_at: datetime
    """When it took its seat."""
    user: str = ""
    project: str = ""
    computing_at: datetime | None = None
    computed_at: datetime | None = None
    ended_at: datetime | None = None
    outcome: str = ""
    """`done`, `failed`, `put-back`, …; empty while it is there, and for ever if its process died."""
    cold: bool = False
    """Whether the machine had not run this workflow since it became ready."""

    def busy(self, now: datetime | None) -> timedelta:
        """Return how long the server has worked on it, as known at `now`; never less than zero.

        `now` is None if nothing can be running there any more: of a row that was never ended nothing is known then.
        """
        end = self.computed_at or self.ended_at or now
        if self.computing_at is None or end is None:
            return timedelta(0)
        return max(timedelta(0), end - self.computing_at)
