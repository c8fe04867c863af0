"""An account's share of requests. Providers count all of an account's processes together."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol


class Limiter(Protocol):
    """Who may send a request when."""

    async def wait_turn(self, *, urgent: bool) -> None:
        """Return when the next request may be sent; each return is good for one request.

        `urgent` marks calls on the way to stopping a machine: a part of the burst is theirs alone, and they do not
        queue behind others. May raise a `LocalError`, but never for an urgent call.
        """
        ...

    async def hold(self, wait: timedelta) -> None:
        """Let nobody send before `wait` has passed: the provider asked for it (Retry-After)."""
        ...
