"""Moments as people write them: so long ago (`7d`), a day (`2026-05-01`), or a time (`2026-05-01T12:00`)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from runcomfy.domain.durations import parse_duration
from runcomfy.domain.exceptions import ValueInvalid, foreign_text

FARTHEST: Final = timedelta(days=36_525)
"""A hundred years: far from the ends of the calendar, where times cannot be reckoned with."""


def moment(text: str, *, now: datetime, whole_days: bool = False) -> datetime:
    """Return the time that `text` names: so long ago (`7d`), a day, or a time (UTC if it names no zone).

    `whole_days`: days ago count from the midnight before. Raises ValueInvalid.
    """
    try:
        at = _read(text.strip(), now, whole_days=whole_days)
    except (ValueInvalid, OverflowError):
        raise ValueInvalid(
            f"{foreign_text(text, 40)!r} is no time",
            hint="write how long ago (7d, 12h, 90m), a day (2026-05-01), or a time (2026-05-01T12:00)",
        ) from None
    if abs(at - now) > FARTHEST:
        raise ValueInvalid(
            f"{foreign_text(text, 40)!r} is farther away than anything of ours", hint="name a time nearer to now"
        )
    return at


def _read(words: str, now: datetime, *, whole_days: bool) -> datetime:
    try:
        at = datetime.fromisoformat(words)
    except ValueError:
        ago = parse_duration(words)
        whole = whole_days and ago >= timedelta(days=1)
        return (now - ago).replace(hour=0, minute=0, second=0, microsecond=0) if whole else now - ago
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
