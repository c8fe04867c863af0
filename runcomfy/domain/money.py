"""
What a machine costs: rates, metering an interval, ledger entries.

Amounts are Decimal US dollars. An amount is computed from an interval and a dated rate and rounded once, to a
millionth of a dollar; sums are never stored, so they cannot drift from what they are sums of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Final

from runcomfy.domain.machine import Machine, MachineId

MICRODOLLAR: Final = Decimal("0.000001")
_HOUR_IN_MICROSECONDS: Final = Decimal(3_600_000_000)


def seconds_between(start: datetime, end: datetime) -> Decimal:
    """Return the seconds from `start` to `end`, never less than zero (clocks may jump back)."""
    return max(Decimal(0), Decimal((end - start) // timedelta(microseconds=1)) / 1_000_000)


def meter(start: datetime, end: datetime, usd_per_hour: Decimal) -> Decimal:
    """Return what the interval costs in USD, per second as RunComfy bills (machine seconds x hourly rate / 3600)."""
    micros = max(0, (end - start) // timedelta(microseconds=1))
    return (usd_per_hour * micros / _HOUR_IN_MICROSECONDS).quantize(MICRODOLLAR, ROUND_HALF_UP)


def show_usd(amount: Decimal) -> str:
    """Return an amount for people: cents, or more digits where cents would show nothing."""
    digits = Decimal("0.01") if amount >= 1 or amount == 0 else Decimal("0.0001")
    return f"${amount.quantize(digits, ROUND_HALF_UP)}"


def show_signed_usd(amount: Decimal) -> str:
    """Return an amount that may be negative for people."""
    return show_usd(amount) if amount >= 0 else f"-{show_usd(-amount)}"


@dataclass(frozen=True, slots=True)
class Rate:
    """The price of one machine type under one plan."""

    server_type: str
    usd_per_hour: Decimal
    plan: str
    source: str
    """Where and when the number was read, for the ledger."""
    tested: bool = True
    """Whether the provider is documented to accept this type name."""
    gpu: str = ""
    vram_gb: int = 0


@dataclass(frozen=True, slots=True)
class RateTable:
    """Dated prices. The provider's API returns none, so they are data that users may edit."""

    as_of: date
    plan: str
    rates: Mapping[str, Rate]

    def find(self, server_type: str) -> Rate | None:
        """Return the rate of a machine type, or None if the table does not have it."""
        return self.rates.get(server_type)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """An interval of one machine that was, or may be, billed. Entries are only ever added."""

    machine_id: MachineId
    started_at: datetime
    ended_at: datetime
    usd_per_hour: Decimal
    amount_usd: Decimal
    recorded_at: datetime
    job_id: str | None = None
    note: str = ""


def billed_interval(machine: Machine, *, now: datetime) -> tuple[datetime, datetime] | None:
    """Return from when to when the machine costs money as known at `now`, or None if it never became ready.

    RunComfy bills from Ready until the call to stop is answered with yes; a machine that went away without our
    asking is billed until it was seen gone.
    """
    if machine.ready_at is None:
        return None
    end = machine.stop_accepted_at or machine.gone_at or now
    return machine.ready_at, max(end, machine.ready_at)


def cost_of(machine: Machine, *, now: datetime) -> Decimal:
    """Return what the machine has cost so far, in USD."""
    interval = billed_interval(machine, now=now)
    return Decimal(0) if interval is None else meter(*interval, machine.usd_per_hour)


def total(entries: Iterable[LedgerEntry]) -> Decimal:
    """Return the sum of the entries, in USD."""
    return sum((entry.amount_usd for entry in entries), Decimal(0))
