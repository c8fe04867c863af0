"""Where readings of the account's balance are kept, so that what happened between two of them can be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runcomfy.domain.balance import Balance


class Balances(Protocol):
    """The last readings of each account."""

    async def add(self, account: str, balance: Balance) -> None:
        """Keep a reading. Raises LocalError."""
        ...

    async def readings(self, account: str) -> Sequence[Balance]:
        """Return what is kept of an account, oldest first; nothing where the place cannot be read."""
        ...
