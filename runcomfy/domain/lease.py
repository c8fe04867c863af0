"""
Who holds a machine, and how it is known whether the holder lives.

An owner is one process. A process id alone proves nothing, because the system hands it out again: the time at which
the process started belongs to it. `host` names the process table the id is valid in (computer, boot, namespace).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from runcomfy.domain.machine import MachineId, OwnerId

HEARTBEAT_EVERY: Final = timedelta(seconds=15)
OWNER_SILENT_AFTER: Final = timedelta(seconds=90)
"""An owner whose process table we cannot see is taken for dead after six heartbeats missed."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that may hold machines."""

    id: OwnerId
    host: str
    pid: int
    process_started: float
    """When the process with that pid started, in seconds as its process table counts them (since the boot on Linux,
    else since the epoch): a mark to compare with, not a time to show."""
    command: str
    started_at: datetime
    heartbeat_at: datetime
    ended_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """A living job on a machine: while its owner lives, the machine is not ended by anybody else."""

    machine_id: MachineId
    owner_id: OwnerId
    job_id: str
    started_at: datetime
    ended_at: datetime | None = None


def is_held_under(epoch: int, expected: int) -> bool:
    """Whether a machine is still held by who held it under an epoch: every change of owner makes a new one."""
    return epoch == expected


def role_is_held(*, expires_at: datetime, now: datetime, signed_off: bool) -> bool:
    """Whether somebody's hold on a role counts for another who wants it (I19)."""
    return now < expires_at and not signed_off
