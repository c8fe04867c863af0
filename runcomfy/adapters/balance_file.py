"""
`balances.json` in the state directory: the last readings of the account's balance.

Keeps `runcomfy.ports.balances.Balances`. The file is a convenience: without it, or with one that cannot be read, a
balance is compared with nothing until there are two readings again. It holds amounts and the accounts' digests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.files import make_private_dir, open_regular, write_atomically
from runcomfy.domain.balance import Balance

FILE_NAME: Final = "balances.json"
_MAX_BYTES: Final = 1024 * 1024
_MOST_DIGITS: Final = 30
"""Before or after the point: written out, "1e999999999" has a billion digits."""
_KEPT: Final = 200
"""Readings kept of one account; of older ones every second is dropped, so that the first stays and all ages remain."""


class BalanceFile:
    """Readings in a file of this computer's own."""

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """Nothing is read or made yet."""
        self._path = folder / FILE_NAME
        self._durable = durable

    async def add(self, account: str, balance: Balance) -> None:
        """Keep a reading. Raises LocalError, DiskFull."""
        await asyncio.to_thread(self._add, account, balance)

    async def readings(self, account: str) -> Sequence[Balance]:
        """Return what is kept of an account, oldest first."""
        return (await asyncio.to_thread(self._read)).get(account, [])

    def _add(self, account: str, balance: Balance) -> None:
        kept = self._read()
        own = sorted([*kept.get(account, []), balance], key=lambda reading: reading.at)
        if len(own) > _KEPT:
            own = [*own[: _KEPT // 2 : 2], *own[_KEPT // 2 :]]
        kept[account] = own
        shown = {
            name: [{"at": one.at.isoformat(), "usd": format(one.usd, "f")} for one in of] for name, of in kept.items()
        }
        make_private_dir(self._path.parent)
        write_atomically(self._path, json.dumps(shown, indent=1).encode() + b"\n", durable=self._durable)

    def _read(self) -> dict[str, list[Balance]]:
        try:
            with open_regular(self._path) as file:
                told = json.loads(file.read(_MAX_BYTES))
            return {str(name): [_balance(one) for one in of] for name, of in told.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return {}


def _balance(told: Any) -> Balance:
    at, usd = datetime.fromisoformat(told["at"]), Decimal(told["usd"])
    if at.tzinfo is None or not usd.is_finite() or abs(usd.adjusted()) > _MOST_DIGITS or not 2000 <= at.year <= 2200:
        raise ValueError("not a reading")
    return Balance(usd, at)
