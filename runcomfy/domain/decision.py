"""A decision of the plan, as it was written down: what, why, and what it was expected to cost."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the log of decisions."""

    at: datetime
    action: str
    """`launch`, `stop`, `extend`, `refused` (a hard limit said no), `replace`, `drain`, `breaker`."""
    what: str
    """The machine type, or our id of the machine."""
    why: str
    """For people, without secrets."""
    expected_usd: Decimal | None = None
    by: str = ""
    """The owner that decided."""
