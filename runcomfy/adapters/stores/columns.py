"""
How the domain's values lie in a column.

Times are text in UTC with microseconds (`YYYY-MM-DD HH:MM:SS.ffffff`, which sorts and can be read), money is text
with all its digits, a timedelta is whole microseconds. PostgreSQL has types of its own for the first two. What lies
there and cannot be read raises StoreCorrupt.
"""

# ruff: noqa: D102 - the methods are SQLAlchemy's, and described there

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import JSON, TIMESTAMP, BigInteger, Dialect, Numeric, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

from runcomfy.domain.exceptions import StoreCorrupt, foreign_text
from runcomfy.domain.machine import ServerId

_MICROSECOND: Final = timedelta(microseconds=1)
_MOST_DIGITS: Final = 100
_WRITTEN: Final = len("YYYY-MM-DD HH:MM:SS.ffffff")


def time_text(at: datetime) -> str:
    """Return a time as it lies in the database; raise ValueError if nobody knows which time zone it is in."""
    if at.tzinfo is None:
        raise ValueError(f"a time without a time zone cannot be stored: {at.isoformat()}")
    # Not by strftime, which writes the year 999 with three digits on some systems: such texts do not sort.
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


def time_of(text: str) -> datetime:
    """Return the time that a text from the database says; raise ValueError if it says none."""
    if len(text) == _WRITTEN:  # as `time_text` writes it; putting a zone on afterwards takes four times as long
        return datetime.fromisoformat(text + "+00:00")
    at = datetime.fromisoformat(text)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _unreadable(value: object, what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"the database holds {foreign_text(repr(value), 80)} where {what} belongs",
        hint="something else wrote into the database; restore it from a backup",
    )


def read_time(value: Any) -> datetime:
    """Return the time that the driver read; raise StoreCorrupt if it is none."""
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    try:
        return time_of(value)
    except (TypeError, ValueError, OverflowError):
        raise _unreadable(value, "a time") from None


def read_amount(value: Any) -> Decimal:
    """Return the number that the driver read, with every digit; raise StoreCorrupt if it is none."""
    try:
        amount = Decimal(value)
    except (InvalidOperation, TypeError, ValueError):
        raise _unreadable(value, "an amount of money") from None
    # Written out, "1e999999999" has a billion digits.
    if not amount.is_finite() or abs(amount.adjusted()) > _MOST_DIGITS:
        raise _unreadable(value, "an amount of money")
    return amount


class SafeText(TypeDecorator[str]):
    """Text that any database takes: what is no Unicode (file names, a hostile server's words) is written escaped."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if not isinstance(value, str):
            raise TypeError(f"not a text: {value!r}")
        return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


class UtcTime(TypeDecorator[datetime]):
    """An aware time; given back in UTC."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(TIMESTAMP(timezone=True) if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        text = time_text(value)
        return value.astimezone(UTC) if dialect.name == "postgresql" else text

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else read_time(value)


class Exact(TypeDecorator[Decimal]):
    """A number that keeps every digit."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Numeric() if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        if value is None:
            return None
        if not isinstance(value, Decimal) or not value.is_finite():
            raise ValueError(f"not an amount of money: {value!r}")
        return value if dialect.name == "postgresql" else format(value, "f")

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        if value is None:
            return None
        return read_amount(value)


class Microseconds(TypeDecorator[timedelta]):
    """A length of time as a whole number of microseconds."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: timedelta | None, dialect: Dialect) -> int | None:
        return None if value is None else value // _MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> timedelta | None:
        if value is None:
            return None
        try:
            return timedelta(microseconds=value)
        except (OverflowError, TypeError):
            raise _unreadable(value, "a length of time") from None


class Word(TypeDecorator[StrEnum]):
    """One word of a list."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:
        return None if value is None else self.words(value).value

    def process_result_value(self, value: Any, dialect: Dialect) -> StrEnum | None:
        if value is None:
            return None
        try:
            return self.words(value)
        except ValueError:
            raise _unreadable(value, f"a {self.words.__name__}") from None


class ServerIds(TypeDecorator[tuple[ServerId, ...]]):
    """The provider's ids of machines, as a JSON list."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Iterable[ServerId] | None, dialect: Dialect) -> list[str] | None:
        return None if value is None else [str(item) for item in value]

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[ServerId, ...]:
        if not isinstance(value, list):
            raise _unreadable(value, "a list of server ids")
        return tuple(ServerId(str(item)) for item in value)


class Times(TypeDecorator[tuple[datetime, ...]]):
    """A few times, as a JSON list."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Iterable[datetime] | None, dialect: Dialect) -> list[str] | None:
        return None if value is None else [time_text(at) for at in value]

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[datetime, ...]:
        try:
            return tuple(time_of(text) for text in value)
        except (TypeError, ValueError):
            raise _unreadable(value, "a list of times") from None
