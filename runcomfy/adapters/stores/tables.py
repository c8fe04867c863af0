"""
The tables, named after what they hold.

The column names of a table are the field names of the domain's class, in the same order, so that a row is read with
`Machine(*row)` and nothing has to be said twice. What the tables looked like in earlier versions is written in
`migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import Any, Final

from sqlalchemy import JSON, BigInteger, Column, Double, ForeignKey, Index, Integer, MetaData, Row, Table

from runcomfy.adapters.stores.columns import Exact, Microseconds, SafeText, ServerIds, Times, UtcTime, Word, time_text
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import Machine, MachineState, Purpose, Transition
from runcomfy.domain.money import LedgerEntry

metadata = MetaData()

owners: Final = Table(
    "owners",
    metadata,
    Column("id", SafeText, primary_key=True),
    Column("host", SafeText, nullable=False),
    Column("pid", BigInteger, nullable=False),
    Column("process_started", Double, nullable=False),
    Column("command", SafeText, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("heartbeat_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
)
Index("ix_owners_ended_at", owners.c.ended_at)

machines: Final = Table(
    "machines",
    metadata,
    Column("id", SafeText, primary_key=True),
    Column("provider", SafeText, nullable=False),
    Column("account", SafeText, nullable=False),
    Column("purpose", Word(Purpose), nullable=False),
    Column("server_type", SafeText, nullable=False),
    Column("duration", Microseconds, nullable=False),
    Column("usd_per_hour", Exact, nullable=False),
    Column("rate_source", SafeText, nullable=False),
    Column("requested_at", UtcTime, nullable=False),
    Column("since", UtcTime, nullable=False),
    Column("state", Word(MachineState), nullable=False),
    Column("workflow_version_id", SafeText, nullable=False),
    Column("reason", SafeText, nullable=False),
    # Not a foreign key: what an owner rented must be writable and endable whatever became of the owner's row.
    Column("owner_id", SafeText),
    Column("epoch", Integer, nullable=False),
    Column("before_ids", ServerIds, nullable=False),
    Column("server_id", SafeText),
    Column("ready_at", UtcTime),
    Column("planned_stop_at", UtcTime),
    Column("kept_until", UtcTime),
    Column("stop_asked_at", UtcTime),
    Column("stop_reason", SafeText, nullable=False),
    Column("stop_accepted_at", UtcTime),
    Column("gone_at", UtcTime),
    Column("last_used_at", UtcTime),
)
Index("ix_machines_account", machines.c.provider, machines.c.account, machines.c.state)
Index("ix_machines_boots", machines.c.provider, machines.c.server_type, machines.c.ready_at)

machine_transitions: Final = Table(
    "machine_transitions",
    metadata,
    Column("machine_id", SafeText, ForeignKey("machines.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcTime, nullable=False),
    Column("event", SafeText, nullable=False),
    Column("state", SafeText, nullable=False),
    Column("by", SafeText, nullable=False),
    Column("note", SafeText, nullable=False),
    # What else changed with it, by field name, as text: enough to answer later who moved a planned stop to when.
    Column("changes", JSON(none_as_null=True), nullable=False),
)

machine_uses: Final = Table(
    "machine_uses",
    metadata,
    Column("machine_id", SafeText, ForeignKey("machines.id"), primary_key=True),
    Column("owner_id", SafeText, nullable=False),
    Column("job_id", SafeText, primary_key=True),
    Column("started_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
)
Index("ix_machine_uses_ended_at", machine_uses.c.ended_at)

ledger: Final = Table(
    "ledger",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("machine_id", SafeText, ForeignKey("machines.id"), nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime, nullable=False),
    Column("usd_per_hour", Exact, nullable=False),
    Column("amount_usd", Exact, nullable=False),
    Column("recorded_at", UtcTime, nullable=False),
    Column("job_id", SafeText),
    Column("note", SafeText, nullable=False),
    # Numbers are never given out twice, so the order of the ledger is the order of writing for ever.
    sqlite_autoincrement=True,
)
Index("ix_ledger_machine_id", ledger.c.machine_id)

accounts: Final = Table(
    "accounts",
    metadata,
    Column("account", SafeText, primary_key=True),
    Column("seen_at", UtcTime),
    Column("line_until", UtcTime),
    Column("urgent_until", Times, nullable=False),
    Column("hold_until", UtcTime),
    Column("launch_lock_owner", SafeText),
    Column("launch_lock_at", UtcTime),
)

upgrades: Final = Table(
    "upgrades",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("revision", SafeText, nullable=False),
    Column("program_version", SafeText, nullable=False),
    Column("at", UtcTime, nullable=False),
)

MACHINE_FIELDS: Final = tuple(field.name for field in fields(Machine))
OWNER_FIELDS: Final = tuple(field.name for field in fields(Owner))
USE_FIELDS: Final = tuple(field.name for field in fields(Use))
ENTRY_FIELDS: Final = tuple(field.name for field in fields(LedgerEntry))
TRANSITION_FIELDS: Final = tuple(field.name for field in fields(Transition))


def machine_of(row: Row[*tuple[Any, ...]]) -> Machine:
    """Return the machine a whole row says."""
    return Machine(*row)


def values_of(thing: Machine | Owner | Use | LedgerEntry) -> dict[str, Any]:
    """Return the columns and values of a domain object."""
    return {field.name: getattr(thing, field.name) for field in fields(thing)}


def as_text(value: object) -> str | None:
    """Return a field's value as a transition tells it."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return time_text(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)
