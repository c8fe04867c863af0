"""
Durations as people write them: `90`, `1.5`, `90s`, `10m`, `1h30m`.

One parser for settings and for the command line, so that both accept the same words and refuse the same mistakes.
Which durations make sense for a given setting is left to whoever asks.
"""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final

from runcomfy.domain.exceptions import ValueInvalid, foreign_text

_NUMBER: Final = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"
_SECONDS: Final = re.compile(_NUMBER)
_PARTS: Final = re.compile(
    rf"(?:({_NUMBER})\s*d)?\s*(?:({_NUMBER})\s*h)?\s*(?:({_NUMBER})\s*m)?\s*(?:({_NUMBER})\s*s)?\s*(?:({_NUMBER})\s*ms)?"
)
_MICROSECONDS: Final = (86_400_000_000, 3_600_000_000, 60_000_000, 1_000_000, 1_000)
_LONGEST: Final = timedelta(days=36_500)
"""A hundred years. Longer ones are typing errors, and sums with dates would overflow."""

HINT: Final = "write seconds (90, 1.5) or a number with a unit (90s, 10m, 1h30m, 2d)"


def parse_duration(text: str) -> timedelta:
    """Return the duration that `text` names: bare seconds, or numbers with the units d, h, m, s, ms in that order.

    Raises:
        ValueInvalid: if it is not a duration, is negative, or longer than a hundred years.
    """
    words = text.strip().lower() if len(text) <= 100 else ""
    if _SECONDS.fullmatch(words):
        micros = Decimal(words) * 1_000_000
    elif words and (match := _PARTS.fullmatch(words)):
        micros = sum(
            (Decimal(part) * unit for part, unit in zip(match.groups(), _MICROSECONDS, strict=True) if part),
            Decimal(0),
        )
    else:
        raise ValueInvalid(f"{foreign_text(text, 40)!r} is not a duration", hint=HINT)
    whole = int(micros.to_integral_value(ROUND_HALF_EVEN))
    if whole > _LONGEST // timedelta(microseconds=1):
        raise ValueInvalid(f"{foreign_text(text, 40)!r} is longer than a hundred years", hint=HINT)
    return timedelta(microseconds=whole)


def show_duration(duration: timedelta) -> str:
    """Return a duration in the form `parse_duration` reads back unchanged: `1h30m`, `45s`, `0.5s`, `-10s`."""
    micros = duration // timedelta(microseconds=1)
    sign, micros = ("-", -micros) if micros < 0 else ("", micros)
    parts = []
    for unit, size in (("d", _MICROSECONDS[0]), ("h", _MICROSECONDS[1]), ("m", _MICROSECONDS[2])):
        count, micros = divmod(micros, size)
        if count:
            parts.append(f"{count}{unit}")
    if micros or not parts:
        seconds, rest = divmod(micros, 1_000_000)
        fraction = f".{rest:06d}".rstrip("0") if rest else ""
        parts.append(f"{seconds}{fraction}s")
    return sign + "".join(parts)


def show_span(span: timedelta) -> str:
    """Return a duration for people, to the second: `1h 5m`, `3m 20s`, `8s`."""
    seconds = max(0, int(span.total_seconds()))
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60}m"
    return f"{seconds // 60}m {seconds % 60}s" if seconds >= 60 else f"{seconds}s"
