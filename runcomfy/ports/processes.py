"""Which processes live. Asked before anything of another process is ended."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from runcomfy.domain.lease import Owner


class Processes(Protocol):
    """The process table of this computer."""

    def me(self, *, now: datetime) -> Owner:
        """Return a new owner for this process."""
        ...

    def lives(self, owner: Owner, *, now: datetime) -> bool:
        """Return whether the owner's process still runs.

        In the same process table: whether that pid runs and started at that time. In another one: whether its
        heartbeat is younger than `OWNER_SILENT_AFTER`. An owner that signed off is dead.
        """
        ...
