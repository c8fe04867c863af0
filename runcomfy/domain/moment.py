"""Moments as people write them: so long ago (`7d`), a day (`2026-05-01`), or a time (`2026-05-01T12:00`)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from runcomfy.domain.durations import parse_duration
from runcomfy.domain.exceptions import ValueInvalid, foreign_text


def moment(text: str, *, now: datetime, whole_days: bool = False) -> datetime:
    """Return the time that `text` names: so long ago (`7d`), a day, or a time (UTC if it names no zone).

    `whole_days`: days ago count from the midnight before. Raises ValueInvalid.
    """
    words = text.strip()
    try:
        at = datetime.fromisoformat(words)
    except ValueError:
        try:
            ago = parse_duration(words)
            at = now - ago
        except (ValueInvalid, OverflowError):
            raise ValueInvalid(
                f"{foreign_text(text, 40)!r} is no time",
                hint="write how long ago (7d, 12h, 90m), a day (2026-05-01), or a time (2026-05-01T12:00)",
            ) from None
        whole = whole_days and ago >= timedelta(days=1)
        return at.replace(hour=0, minute=0, second=0, microsecond=0) if whole else at
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
