"""The computer's own clock."""

from __future__ import annotations

from datetime import UTC, datetime


class SystemClock:
    """Keeps `runcomfy.ports.clock.Clock`."""

    def now(self) -> datetime:
        """Return the current time, aware, in UTC."""
        return datetime.now(UTC)
