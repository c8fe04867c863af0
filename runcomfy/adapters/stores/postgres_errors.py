"""
What an error of PostgreSQL, or of the way to it, means in our words. The driver need not be installed to read this.

Only the first line of the server's message is shown: its details quote values, and the statement is never shown.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy.exc import StatementError

from runcomfy.adapters.stores.errors import STILL_STOPS
from runcomfy.domain.exceptions import (
    DiskFull,
    LocalError,
    RunComfyError,
    StoreCorrupt,
    StoreUnavailable,
    foreign_text,
)

COLLISIONS: Final = frozenset({"40001", "40P01"})
"""Serialization failure, deadlock: the server ended one of several so that the others could go on."""

_WHO: Final = "`comfyctl doctor` names who holds it; end that program, or its transaction, and try again"

_UNAVAILABLE: Final = {
    "28P01": ("does not accept this user and password", "correct the database's address in the settings"),
    "28000": (
        "does not let this user in",
        "correct the database's address in the settings, or the server's pg_hba.conf",
    ),
    "3D000": ("does not exist", "make it with `createdb`, or correct the database's address in the settings"),
    "3F000": ("has no such schema", "make the schema, or correct `search_path` in the database's address"),
    "42501": ("does not allow it to this user", "give the user the right to make and use tables in its schema (GRANT)"),
    "25006": ("can only be read: it is a copy of another server", "name the server that is written to"),
    "53300": ("has no connection left", "raise max_connections, or put a pooler in front of it"),
    "55P03": ("is locked by another program", _WHO),
    "57014": ("took too long for one statement, and it was ended", _WHO),
    "40001": ("had too many who wrote the same at once", "try again"),
    "40P01": ("had too many who wrote the same at once", "try again"),
    "25P03": ("ended a transaction in which nothing happened for long", "try again"),
    "57P01": ("is being shut down", "try again when the server runs"),
    "57P02": ("was restarted after a crash", "try again when the server runs"),
    "57P03": ("is starting up or shutting down", "try again in a moment"),
}
"""By SQLSTATE (PostgreSQL manual, appendix A): what is said of the database, and what helps."""

_DAMAGED: Final = frozenset({"XX001", "XX002"})
_MISSING: Final = frozenset({"42P01", "42703", "42883"})
_REFUSED: Final = ("22", "23", "44", "P0")
"""Classes: a value, a constraint, a view's check, a trigger of ours."""


def code_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error, also of one that SQLAlchemy wrapped; None if the server did not say it."""
    orig = error.orig if isinstance(error, StatementError) else error
    code = getattr(orig, "sqlstate", None)
    return code if isinstance(code, str) else None


def server_error(error: Exception, where: str, *, secrets: Collection[str] = ()) -> RunComfyError:
    """Return the error of ours that says what `error` means; none of the secrets is in it."""
    if isinstance(error, RunComfyError):
        return error
    orig: BaseException = error
    if isinstance(error, StatementError) and error.orig is not None:
        orig = error.orig
    if isinstance(orig, RunComfyError):
        return orig
    words = _words(orig)
    code = code_of(orig) or _code_in(words)  # a refused connection has its code in the text only
    text = _without(words, secrets)
    if code == "53100":
        return DiskFull(
            f"the disk of the database's server is full: nothing could be written to {where}",
            hint=f"free some space there; {STILL_STOPS}",
        )
    if code in _DAMAGED:
        return StoreCorrupt(f"the database {where} is damaged: {text}", hint=f"restore it from a backup; {STILL_STOPS}")
    if code in _MISSING:
        return StoreCorrupt(
            f"the database {where} lacks what this program made in it: {text}",
            hint=f"restore it from a backup, or name an empty database; {STILL_STOPS}",
        )
    if code in _UNAVAILABLE:
        what, hint = _UNAVAILABLE[code]
        return StoreUnavailable(f"the database {where} {what}: {text}", hint=f"{hint}; {STILL_STOPS}")
    if code is not None and code.startswith(_REFUSED):
        return LocalError(f"the database refused it: {text}")
    if code is None or code.startswith("08"):
        return StoreUnavailable(
            f"the database {where} does not answer: {text}",
            hint=f"see whether the server runs and its address in the settings is right; {STILL_STOPS}",
        )
    return StoreUnavailable(f"the database {where} failed ({code}): {text}", hint=STILL_STOPS)


def _words(error: BaseException) -> str:
    primary = getattr(getattr(error, "diag", None), "message_primary", None)
    return str(primary) if primary else str(error)


def _without(text: str, secrets: Collection[str]) -> str:
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return foreign_text(text)


_TEXTS: Final = {
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    "no pg_hba.conf entry": "28000",
    "the database system is starting up": "57P03",
    "the database system is shutting down": "57P03",
    "too many clients already": "53300",
    "remaining connection slots are reserved": "53300",
}


def _code_in(text: str) -> str | None:
    for words, code in _TEXTS.items():
        if words in text:
            return code
    return "3D000" if 'database "' in text and "does not exist" in text else None
