"""Time for stamps. Waiting uses the event loop's time, so that tests can move both together."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol


class Clock(Protocol):
    """A source of wall-clock stamps."""

    def now(self) -> datetime:
        """Return the current time, aware, in UTC."""
        ...
