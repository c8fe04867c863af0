"""What is published about the dev server, for people and for programs that read its state file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from runcomfy.domain.machine import MachineId, ServerId
from runcomfy.domain.secret import SecretUrl


@dataclass(frozen=True, slots=True)
class DevServerSnapshot:
    """One warm machine, as known at `written_at`. Costs are computed from the ledger then, never read back."""

    server_id: ServerId
    machine_id: MachineId | None
    user_id: str
    base_url: SecretUrl
    status: str
    launch_time: datetime
    workflow_version: str
    server_type: str
    duration: timedelta
    usd_per_hour: Decimal
    plan: str
    rate_source: str
    """Where the price comes from, with its date."""
    cost_usd: Decimal
    """What this machine has cost so far."""
    written_at: datetime
    ready_at: datetime | None = None
    planned_stop_at: datetime | None = None
    last_used_at: datetime | None = None
    last_health_check: datetime | None = None
    health_status: str = "unknown"
    """unknown, healthy, unhealthy or unreachable."""
