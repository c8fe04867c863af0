"""Publishing the dev server through its state file: snapshots become the file's fields."""

from __future__ import annotations

import asyncio
from datetime import datetime
from decimal import Decimal

from runcomfy.adapters.dev_server_state import DevServerState, DevServerStateManager
from runcomfy.domain.dev_server import DevServerSnapshot
from runcomfy.domain.machine import ServerId


class PublishedDevServer:
    """Keeps `runcomfy.ports.dev_state.DevServerFile` over the manager, whose methods block."""

    def __init__(self, manager: DevServerStateManager) -> None:
        self._manager = manager

    async def publish(self, snapshot: DevServerSnapshot) -> None:
        """Write the snapshot and its copies."""
        await asyncio.to_thread(self._manager.save_server_state, _state(snapshot))

    async def hint(self) -> ServerId | None:
        """Return the server the file names as running."""
        state = await asyncio.to_thread(self._manager.load_server_state)
        if state is None or state.status.lower() not in ("running", "ready") or not state.server_id:
            return None
        return ServerId(state.server_id)

    async def clear(self) -> None:
        """Remove the file and its copies."""
        await asyncio.to_thread(self._manager.clear_server_state)


def _state(snapshot: DevServerSnapshot) -> DevServerState:
    return DevServerState(
        server_id=snapshot.server_id,
        user_id=snapshot.user_id,
        base_url=snapshot.base_url.reveal(),
        status=snapshot.status,
        launch_time=snapshot.launch_time.isoformat(),
        workflow_version=snapshot.workflow_version,
        server_type=snapshot.server_type,
        total_cost=_dollars(snapshot.cost_usd),
        session_cost=_dollars(snapshot.cost_usd),
        last_health_check=_stamp(snapshot.last_health_check),
        health_status=snapshot.health_status,
        machine_id=snapshot.machine_id,
        ready_time=_stamp(snapshot.ready_at),
        planned_stop_time=_stamp(snapshot.planned_stop_at),
        estimated_duration=int(snapshot.duration.total_seconds()),
        last_used=_stamp(snapshot.last_used_at),
        usd_per_hour=str(snapshot.usd_per_hour),
        plan=snapshot.plan,
        rate_source=snapshot.rate_source,
        updated_time=_stamp(snapshot.written_at),
    )


def _stamp(at: datetime | None) -> str | None:
    return at.isoformat() if at is not None else None


def _dollars(amount: Decimal) -> float:
    # The file's format is older than us and holds JSON numbers; nothing reads them back.
    return float(round(amount, 6))
