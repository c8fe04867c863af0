"""
What clients tell before they send work: somebody is there, something is about to come, a batch of so many jobs.

A machine's start takes minutes; who says so ahead spares the wait. Signals are hints: each source is scored by how
often work came after it, and one that does not pay is ignored (`demand`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

PRESENCE_FOR: Final = timedelta(minutes=15)
"""How long somebody counts as present who does not say it again: programs die without saying goodbye."""


class SignalKind(StrEnum):
    """What a signal says."""

    OPENED = "opened"
    """Somebody is there (the application was opened, or is still open)."""
    LEFT = "left"
    """Nobody of this source is there any more."""
    INTENT = "intent"
    """A job is about to come (a workflow was loaded, an upload has begun)."""
    BATCH = "batch"
    """So many jobs will come at `at`."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal. Times are aware UTC."""

    kind: SignalKind
    source: str
    """Who says it, for example `conjure` or `conjure:ann`; each source is scored by itself."""
    at: datetime
    """When it was said."""
    until: datetime | None = None
    """OPENED: how long it holds without being said again. INTENT: until when work is expected."""
    jobs: int = 0
    """BATCH: how many."""
    work: timedelta = timedelta(0)
    """BATCH: how long all of them take together; nothing if unknown."""
    expected_at: datetime | None = None
    """BATCH: when they come."""
    user: str = ""
