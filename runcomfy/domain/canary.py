"""What a canary would cost, and what it has found out: whether the provider ends a machine at its time, by itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Self

from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.money import Rate, meter

LEASE: Final = timedelta(minutes=5)
"""RunComfy's shortest documented running time."""
PATIENCE: Final = timedelta(minutes=5)
"""How long after its time the machine may still run before we end it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a canary would do."""

    rate: Rate
    lease: timedelta = LEASE
    patience: timedelta = PATIENCE

    @property
    def most_usd(self) -> Decimal:
        """What it can cost at most, in USD."""
        start = datetime(2000, 1, 1, tzinfo=UTC)
        return meter(start, start + self.lease + self.patience, self.rate.usd_per_hour)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a canary has found out."""

    at: datetime
    server_type: str
    lease: timedelta
    ended_by_itself: bool
    lag: timedelta
    """How long after its time it was seen to end; if it did not, how long it was left."""
    looked_every: timedelta
    """How exact that is."""
    cost_usd: Decimal

    def as_dict(self) -> dict[str, Any]:
        """Return it as it is kept."""
        return {
            "at": self.at.isoformat(),
            "server_type": self.server_type,
            "lease_seconds": self.lease.total_seconds(),
            "ended_by_itself": self.ended_by_itself,
            "lag_seconds": self.lag.total_seconds(),
            "looked_every_seconds": self.looked_every.total_seconds(),
            "cost_usd": format(self.cost_usd, "f"),
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Self:
        """Return what was kept. Raises KeyError, TypeError, ValueError if it is something else."""
        return cls(
            at=datetime.fromisoformat(facts["at"]),
            server_type=foreign_text(str(facts["server_type"]), 60),
            lease=timedelta(seconds=float(facts["lease_seconds"])),
            ended_by_itself=bool(facts["ended_by_itself"]),
            lag=timedelta(seconds=float(facts["lag_seconds"])),
            looked_every=timedelta(seconds=float(facts["looked_every_seconds"])),
            cost_usd=Decimal(str(facts["cost_usd"])),
        )

    @property
    def sentence(self) -> str:
        """Say it to people."""
        lease, lag = self.lease.total_seconds(), self.lag.total_seconds()
        exact = f"looked at every {self.looked_every.total_seconds():.0f} s"
        if self.ended_by_itself:
            return (
                f"RunComfy ended a {self.server_type} machine by itself {lag:.0f} s after its {lease:.0f} s ({exact})"
            )
        return (
            f"RunComfy did NOT end a {self.server_type} machine by itself: it still ran {lag:.0f} s after its "
            f"{lease:.0f} s, and was ended by us"
        )
