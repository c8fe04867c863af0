"""
The account's money at the provider, and what it says beside our ledger.

One wallet pays for more than machines of ours: other products of the provider, machines started by hand. So a balance
that falls faster than our ledger grows is worth a sentence, and never an alarm by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from runcomfy.domain.money import show_signed_usd, show_usd

TOLERANCE: Final = Decimal("0.01")
"""Part of the ledger's amount within which balance and ledger agree."""
_BILLING_LAG: Final = timedelta(seconds=60)
"""How much later than we the provider may take what runs off the balance."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What the account had at a moment."""

    usd: Decimal
    at: datetime
    """By our clock, aware, UTC: when the answer came."""


@dataclass(frozen=True, slots=True)
class BalanceCheck:
    """Two readings and what the ledger says about the time between them. Amounts are USD."""

    before: Balance
    after: Balance
    ledger: Decimal
    """What our machines cost between the readings."""
    slack: Decimal
    """By how much the two may differ without meaning anything."""

    @property
    def fell(self) -> Decimal:
        """By how much the balance fell; negative if it rose."""
        return self.before.usd - self.after.usd

    @property
    def elsewhere(self) -> Decimal:
        """What was spent that our ledger does not have; negative: money came in, or is taken off later."""
        return self.fell - self.ledger

    @property
    def agrees(self) -> bool:
        """Whether balance and ledger tell the same."""
        return abs(self.elsewhere) <= self.slack

    @property
    def words(self) -> str:
        """What it means, for people."""
        span = f"since {self.before.at:%Y-%m-%d %H:%M} UTC"
        both = f"{span} the balance fell by {show_signed_usd(self.fell)} and our machines cost {show_usd(self.ledger)}"
        if self.agrees:
            return f"{both}: they agree"
        if self.elsewhere > 0:
            return (
                f"{both}: {show_usd(self.elsewhere)} went to other products, or to machines that are not in our books"
            )
        return f"{both}: {show_usd(-self.elsewhere)} came in (a payment), or is taken off the balance later"


def compare(readings: Sequence[Balance], ledger: Decimal, *, usd_per_hour: Decimal) -> BalanceCheck | None:
    """Return what the first and the last reading (in order of time) say; None with fewer than two.

    `ledger` is what machines cost between the two, `usd_per_hour` the price of those that ran at either of them.
    """
    if len(readings) < 2:
        return None
    lag = usd_per_hour * Decimal(_BILLING_LAG // timedelta(seconds=1)) / 3600
    slack = max(ledger * TOLERANCE, lag, Decimal("0.01"))  # a balance is told in cents at best
    return BalanceCheck(readings[0], readings[-1], ledger, slack)
