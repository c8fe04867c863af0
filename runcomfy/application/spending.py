"""
The money at a glance: today, this month, the last hours and days, and how the budgets stand.

From our own books alone; nobody is asked. Days and hours are those of UTC.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from runcomfy.application.cost_optimizer import CostOptimizer
from runcomfy.application.costs import Slot, Slots
from runcomfy.application.ledger import MachineBill
from runcomfy.domain.budget import Budget, BudgetState, Period
from runcomfy.domain.forecast import Forecast, spent_between
from runcomfy.domain.shares import Billed

HOURS: Final = 48
DAYS: Final = 31
AT_ONCE: Final = 8
"""Machines whose jobs are in memory at a time."""


@dataclass(frozen=True, slots=True)
class BudgetNow:
    """How a budget stands."""

    state: BudgetState
    spent: Decimal | None
    """In its window, in USD; None where only part of the account's money counts."""


@dataclass(frozen=True, slots=True)
class Spending:
    """The money now. USD."""

    today: Slot
    month: Slot
    committed: Decimal
    """Of today: spent so far, and every living lease to its end."""
    budgets: Sequence[BudgetNow]
    hours: Sequence[Slot]
    """The last 48, oldest first; the last is not over."""
    days: Sequence[Slot]
    """The last 31, oldest first; the last is not over."""
    month_forecast: Forecast


async def spending(money: CostOptimizer, *, now: datetime, silence: timedelta) -> Spending:
    """Return the money now; `silence` as in the settings of the pool. Raises LocalError."""
    day, month = Budget(Period.DAY).window(now).start or now, Budget(Period.MONTH).window(now).start or now
    hour = Budget(Period.HOUR).window(now).start or now
    days = [day - timedelta(days=back) for back in range(DAYS - 1, -1, -1)]
    hours = [hour - timedelta(hours=back) for back in range(HOURS - 1, -1, -1)]
    bills = await money.bills(since=min(days[0], month), works=False)
    _, forecast = await money.forecast()
    end = now + timedelta(microseconds=1)

    sums = [Slots([*cuts, end], silence=silence) for cuts in ([day], [month], hours, days)]

    def add_up(some: Sequence[MachineBill]) -> None:
        for one in sums:
            one.add(some)

    for start in range(0, len(bills), AT_ONCE):
        some = await money.with_works(bills[start : start + AT_ONCE])
        await asyncio.to_thread(add_up, some)  # many jobs take a while, and this may be a program that renews leases
    [today], [whole], by_hour, by_day = (one.found for one in sums)
    pieces = [piece for bill in bills for piece in bill.pieces]
    states = await money.budgets()
    committed = (await money.standing([Budget(Period.DAY)]))[0].committed
    return Spending(
        today,
        whole,
        committed,
        [BudgetNow(state, _spent(state, pieces, now)) for state in states],
        by_hour,
        by_day,
        forecast,
    )


def _spent(state: BudgetState, pieces: Sequence[Billed], now: datetime) -> Decimal | None:
    budget, window = state.budget, state.window
    if budget.user is not None or budget.project is not None or window.start is None:
        return None
    return spent_between(pieces, window.start, now)
