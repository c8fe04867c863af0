"""What the tests of stores speak of: moments, owners, machines, entries of the ledger, work."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

from runcomfy.domain.job import JobId
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, OwnerId, Purpose, ServerId
from runcomfy.domain.money import LedgerEntry
from runcomfy.domain.work import Work
from runcomfy.ports.store import Store

NOW = datetime(2026, 3, 29, 0, 59, 59, 123456, tzinfo=UTC)
ALICE, BOB = OwnerId("alice"), OwnerId("bob")


def after(seconds: float) -> datetime:
    """Return the moment so many seconds after the tests' now."""
    return NOW + timedelta(seconds=seconds)


def a_machine(**fields: Any) -> Machine:
    """Return an intent of a machine that no other test knows."""
    words: dict[str, Any] = {
        "id": MachineId(str(uuid4())),
        "provider": "runcomfy",
        "account": f"account-{uuid4()}",
        "purpose": Purpose.RUN,
        "server_type": "medium",
        "duration": timedelta(minutes=10),
        "usd_per_hour": Decimal("0.99"),
        "rate_source": "payg, table of 2026-01-01",
        "requested_at": NOW,
        "since": NOW,
        "owner_id": ALICE,
    }
    return Machine(**{**words, **fields})


def an_owner(**fields: Any) -> Owner:
    """Return an owner that no other test knows."""
    words: dict[str, Any] = {
        "id": OwnerId(str(uuid4())),
        "host": "here",
        "pid": 4711,
        "process_started": 1234.56,
        "command": "comfyctl run",
        "started_at": NOW,
        "heartbeat_at": NOW,
    }
    return Owner(**{**words, **fields})


def an_entry(machine: Machine, **fields: Any) -> LedgerEntry:
    """Return a minute on the bill of a machine."""
    words: dict[str, Any] = {
        "machine_id": machine.id,
        "started_at": NOW,
        "ended_at": after(60),
        "usd_per_hour": Decimal("0.99"),
        "amount_usd": Decimal("0.016500"),
        "recorded_at": after(61),
    }
    return LedgerEntry(**{**words, **fields})


async def ready(store: Store, **fields: Any) -> Machine:
    """Write down a machine that became ready."""
    machine = a_machine(**fields)
    await store.add_machine(machine, at=NOW)
    await store.record(machine.id, MachineEvent.LISTED, at=NOW, by=ALICE, changes={"server_id": ServerId("srv-1")})
    return await store.record(
        machine.id, MachineEvent.ANSWERED, at=after(40), by=ALICE, changes={"ready_at": after(40)}
    )


def a_work(machine: Machine, job: str = "job", **fields: Any) -> Work:
    """Return a job's time on a machine, of which ten seconds were computing."""
    words: dict[str, Any] = {
        "machine_id": machine.id,
        "job_id": JobId(job),
        "attempt": 1,
        "workflow": "image_invert",
        "server_type": machine.server_type,
        "began_at": NOW,
        "computing_at": after(5),
        "computed_at": after(15),
        "ended_at": after(20),
        "outcome": "done",
    }
    return Work(**{**words, **fields})
