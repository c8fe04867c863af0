"""
How the page logs in: a one-time code, printed once, traded for a session.

Both live in memory only, as hashes: a restart ends them all, and a dump of the process shows none that could be used.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

CODE_LIFE: Final = timedelta(minutes=10)
_MOST_CODES: Final = 32
_MOST_SESSIONS: Final = 256
"""More than one person's browsers; the oldest ones make room."""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


@dataclass(slots=True)
class Passes:
    """Random texts that are good for a while. Each is known by its hash only."""

    most: int
    _until: dict[bytes, datetime] = field(default_factory=dict, repr=False)

    def new(self, *, until: datetime) -> str:
        """Return a new one: 256 random bits."""
        text = secrets.token_urlsafe(32)
        while len(self._until) >= self.most:
            self._until.pop(next(iter(self._until)))
        self._until[_digest(text)] = until
        return text

    def find(self, text: str, *, now: datetime) -> bytes | None:
        """Return the key of one that is good now. Takes as long for a wrong text as for a right one."""
        for key in [key for key, until in self._until.items() if until <= now]:
            del self._until[key]
        wanted, found = _digest(text), None
        for key in self._until:
            if hmac.compare_digest(key, wanted):
                found = key
        return found

    def drop(self, key: bytes) -> None:
        """End one. Harmless when repeated."""
        self._until.pop(key, None)


class Sessions:
    """One-time codes and the sessions they were traded for."""

    def __init__(self, life: timedelta) -> None:
        self.life = life
        self._codes = Passes(_MOST_CODES)
        self._sessions = Passes(_MOST_SESSIONS)

    def new_code(self, *, now: datetime) -> str:
        """Return a code that starts one session within ten minutes."""
        return self._codes.new(until=now + CODE_LIFE)

    def trade(self, code: str, *, now: datetime) -> str | None:
        """Return a new session for a code, which is used up; None if it is wrong, used or too old."""
        key = self._codes.find(code, now=now)
        if key is None:
            return None
        self._codes.drop(key)
        return self._sessions.new(until=now + self.life)

    def is_open(self, session: str, *, now: datetime) -> bool:
        """Whether a session is known and not over."""
        return self._sessions.find(session, now=now) is not None

    def end(self, session: str, *, now: datetime) -> None:
        """Log out."""
        key = self._sessions.find(session, now=now)
        if key is not None:
            self._sessions.drop(key)
