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

from sqlalchemy import (
    JSON,
    REAL,
    TIMESTAMP,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Row,
    Table,
    Text,
    text,
)
from sqlalchemy.types import TypeEngine

from runcomfy.adapters.stores.columns import Exact, Microseconds, SafeText, ServerIds, Times, UtcTime, Word, time_text
from runcomfy.domain.decision import Decision
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import Machine, MachineState, Purpose, Transition
from runcomfy.domain.money import LedgerEntry
from runcomfy.domain.signal import Signal, SignalKind
from runcomfy.domain.webhook import Delivery
from runcomfy.domain.work import Work

metadata = MetaData()

_Number: Final = BigInteger().with_variant(Integer, "sqlite")
_NO_TEXT: Final = text("''")

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
    Column("run_id", SafeText, nullable=False, server_default=_NO_TEXT),
    Column("for_project", SafeText, nullable=False, server_default=_NO_TEXT),
    Column("for_user", SafeText, nullable=False, server_default=_NO_TEXT),
    Column("asked_duration", Microseconds),
    Column("draining", SafeText, nullable=False, server_default=_NO_TEXT),
)
Index("ix_machines_account", machines.c.provider, machines.c.account, machines.c.state)
Index("ix_machines_boots", machines.c.provider, machines.c.server_type, machines.c.ready_at)
Index("ix_machines_since", machines.c.state, machines.c.since)
_known_run = text("run_id <> ''")
Index("ix_machines_run", machines.c.run_id, sqlite_where=_known_run, postgresql_where=_known_run)

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
Index("ix_ledger_ended_at", ledger.c.ended_at)

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

# -- the queue -------------------------------------------------------------------------------------------------

# Users read and write these rows with SQL. So the columns are plain, and reading them is `jobs_rows.py`'s work, which
# forgives what hands write.
_Stamp: Final = Text().with_variant(TIMESTAMP(timezone=True), "postgresql")
_Seconds: Final[TypeEngine[float]] = REAL().with_variant(Double, "postgresql")
_ZERO: Final = text("0")
_EMPTY: Final = text("'{}'")
_NEW_UID: Final = text(
    "(lower(hex(randomblob(4))) || '-' || lower(hex(randomblob(2))) || '-4' || substr(lower(hex(randomblob(2))), 2) "
    "|| '-' || substr('89ab', 1 + (random() & 3), 1) || substr(lower(hex(randomblob(2))), 2) || '-' "
    "|| lower(hex(randomblob(6))))"
)
"""For rows made by hand, on SQLite; PostgreSQL's is in the migration."""

PUBLISHED: Final = (
    "id", "config_name", "job_type", "workflow_id", "priority", "status", "retries_attempted", "run_count",
    "retry_limit", "start_time", "end_time", "duration", "error_trace", "metadata", "worker_id", "lease_expires_at",
)  # fmt: skip
"""The columns of `jobs` that people and their SQL know, in their order."""

jobs: Final = Table(
    "jobs",
    metadata,
    Column("id", _Number, Identity(always=False), primary_key=True, autoincrement=True),
    Column("config_name", Text, nullable=False, unique=True),
    Column("job_type", Text, nullable=False),
    Column("workflow_id", Text, nullable=False),
    Column("priority", Integer, server_default=text("50")),
    Column("status", Text, nullable=False),
    Column("retries_attempted", Integer, server_default=_ZERO),
    Column("run_count", Integer, server_default=_ZERO),
    Column("retry_limit", Integer),
    Column("start_time", _Stamp),
    Column("end_time", _Stamp),
    Column("duration", _Seconds),
    Column("error_trace", Text),
    Column("metadata", Text),
    Column("worker_id", Text),
    Column("lease_expires_at", _Stamp),
    # Beyond the published columns.
    Column("uid", Text, nullable=False, unique=True, server_default=_NEW_UID),
    Column("token", _Number, nullable=False, server_default=_ZERO),
    Column("reason", Text, nullable=False, server_default=_NO_TEXT),
    Column("request", Text),
    Column("phase", Text, nullable=False, server_default=_NO_TEXT),
    Column("place", Text),
    Column("prompt_id", Text),
    Column("not_before", _Stamp),
    Column("others_from", _Stamp),
    Column("created_at", _Stamp, server_default=text("CURRENT_TIMESTAMP")),
    Column("username", Text, nullable=False, server_default=_NO_TEXT),
    Column("project", Text, nullable=False, server_default=_NO_TEXT),
    Column("idempotency_key", Text),
    Column("source_path", Text, nullable=False, server_default=_NO_TEXT),
    Column("content_sha256", Text, nullable=False, server_default=_NO_TEXT),
    Column("held_sha256", Text, nullable=False, server_default=_NO_TEXT),
    Column("lost_count", Integer, nullable=False, server_default=_ZERO),
    Column("kill_count", Integer, nullable=False, server_default=_ZERO),
    Column("progress", _Seconds, nullable=False, server_default=_ZERO),
    Column("message", Text, nullable=False, server_default=_NO_TEXT),
    Column("result", Text, nullable=False, server_default=_EMPTY),
    # What the domain's class does not show.
    Column("body_sha256", Text, nullable=False, server_default=_NO_TEXT),
    # When the run began, to the microsecond: start_time tells seconds.
    Column("run_began_at", _Stamp),
    # Whether run_count has the run that is going on.
    Column("run_counted", Integer, nullable=False, server_default=_ZERO),
    # When not_before was written: a clock that is behind this was set back, and the wait means nothing.
    Column("waits_since", _Stamp),
    CheckConstraint("status IN ('pending','processing','done','failed')", name="jobs_status"),
    sqlite_autoincrement=True,
)
_pending, _has_prompt = text("status = 'pending'"), text("phase <> ''")
Index("idx_jobs_status_priority", jobs.c.status, jobs.c.priority)
Index("idx_jobs_started", jobs.c.start_time)
_there = text("idempotency_key IS NOT NULL")
Index("ux_jobs_idempotency_key", jobs.c.idempotency_key, unique=True, sqlite_where=_there, postgresql_where=_there)
Index(
    "ix_jobs_lines",
    *(jobs.c.workflow_id, jobs.c.job_type, jobs.c.username, jobs.c.priority, jobs.c.id),
    sqlite_where=_pending,
    postgresql_where=_pending,
)
Index("ix_jobs_places", jobs.c.place, sqlite_where=_has_prompt, postgresql_where=_has_prompt)

job_attempts: Final = Table(
    "job_attempts",
    metadata,
    Column("job_id", _Number, primary_key=True, autoincrement=False),
    Column("token", _Number, primary_key=True, autoincrement=False),
    Column("run", Integer, nullable=False),
    Column("worker_id", Text, nullable=False),
    Column("started_at", _Stamp, nullable=False),
    Column("ended_at", _Stamp),
    Column("outcome", Text),
    Column("place", Text),
    Column("prompt_id", Text),
    Column("error_code", Text, nullable=False, server_default=_NO_TEXT),
    Column("error_trace", Text, nullable=False, server_default=_NO_TEXT),
    Column("result", Text, nullable=False, server_default=_EMPTY),
    Column("error", Text),
    sqlite_with_rowid=False,
)

job_events: Final = Table(
    "job_events",
    metadata,
    Column("number", _Number, Identity(always=False), primary_key=True, autoincrement=True),
    Column("at", _Stamp, nullable=False),
    Column("kind", Text, nullable=False),
    Column("job_id", _Number),
    Column("token", _Number, nullable=False, server_default=_ZERO),
    Column("worker_id", Text),
    Column("data", Text, nullable=False, server_default=_EMPTY),
    sqlite_autoincrement=True,
)
Index("ix_job_events_job_id", job_events.c.job_id, job_events.c.number)
_losses = text("kind = 'lost'")
Index("ix_job_events_lost", job_events.c.at, sqlite_where=_losses, postgresql_where=_losses)

queue_pauses: Final = Table(
    "queue_pauses",
    metadata,
    Column("scope", SafeText, primary_key=True),
    Column("reason", SafeText, nullable=False),
    Column("message", SafeText, nullable=False),
    Column("since", UtcTime, nullable=False),
    Column("until", UtcTime),
    Column("by", SafeText, nullable=False),
)

roles: Final = Table(
    "roles",
    metadata,
    Column("name", SafeText, primary_key=True),
    Column("owner_id", SafeText),
    Column("epoch", _Number, nullable=False),
    Column("since", UtcTime, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
)

# -- pools and budgets -----------------------------------------------------------------------------------------

machine_work: Final = Table(
    "machine_work",
    metadata,
    # No foreign keys: what a job did is told whatever becomes of the rows of its machine and of itself.
    Column("machine_id", SafeText, primary_key=True),
    Column("job_id", SafeText, primary_key=True),
    Column("attempt", _Number, primary_key=True, autoincrement=False),
    Column("workflow", SafeText, nullable=False),
    Column("server_type", SafeText, nullable=False),
    Column("began_at", UtcTime, nullable=False),
    Column("user", SafeText, nullable=False),
    Column("project", SafeText, nullable=False),
    Column("computing_at", UtcTime),
    Column("computed_at", UtcTime),
    Column("ended_at", UtcTime),
    Column("outcome", SafeText, nullable=False),
    Column("cold", Boolean, nullable=False),
)
Index("ix_machine_work_began_at", machine_work.c.began_at)

signals: Final = Table(
    "signals",
    metadata,
    Column("number", _Number, Identity(always=False), primary_key=True, autoincrement=True),
    Column("kind", Word(SignalKind), nullable=False),
    Column("source", SafeText, nullable=False),
    Column("at", UtcTime, nullable=False),
    Column("until", UtcTime),
    Column("jobs", _Number, nullable=False),
    Column("work", Microseconds, nullable=False),
    Column("expected_at", UtcTime),
    Column("user", SafeText, nullable=False),
    sqlite_autoincrement=True,
)
Index("ix_signals_at", signals.c.at)

decisions: Final = Table(
    "decisions",
    metadata,
    Column("number", _Number, Identity(always=False), primary_key=True, autoincrement=True),
    Column("at", UtcTime, nullable=False),
    Column("action", SafeText, nullable=False),
    Column("what", SafeText, nullable=False),
    Column("why", SafeText, nullable=False),
    Column("expected_usd", Exact),
    Column("by", SafeText, nullable=False),
    sqlite_autoincrement=True,
)
Index("ix_decisions_at", decisions.c.at)

budget_alerts: Final = Table(
    "budget_alerts",
    metadata,
    Column("key", SafeText, primary_key=True),
    Column("at", UtcTime, nullable=False),
)

# -- webhooks --------------------------------------------------------------------------------------------------

webhooks: Final = Table(
    "webhooks",
    metadata,
    Column("event", _Number, primary_key=True, autoincrement=False),
    Column("url", SafeText, primary_key=True),
    Column("job_id", _Number, nullable=False),
    Column("body", SafeText, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("due_at", UtcTime, nullable=False),
    Column("tries", _Number, nullable=False),
    Column("last", SafeText, nullable=False),
)
Index("ix_webhooks_url", webhooks.c.url, webhooks.c.event)
Index("ix_webhooks_due_at", webhooks.c.due_at)

webhook_cursor: Final = Table(
    "webhook_cursor",
    metadata,
    Column("queue", SafeText, primary_key=True),
    Column("read_to", _Number, nullable=False),
)

MACHINE_FIELDS: Final = tuple(field.name for field in fields(Machine))
OWNER_FIELDS: Final = tuple(field.name for field in fields(Owner))
USE_FIELDS: Final = tuple(field.name for field in fields(Use))
ENTRY_FIELDS: Final = tuple(field.name for field in fields(LedgerEntry))
TRANSITION_FIELDS: Final = tuple(field.name for field in fields(Transition))
SIGNAL_FIELDS: Final = tuple(field.name for field in fields(Signal))
DECISION_FIELDS: Final = tuple(field.name for field in fields(Decision))


def machine_of(row: Row[*tuple[Any, ...]]) -> Machine:
    """Return the machine a whole row says."""
    return Machine(*row)


def values_of(thing: Machine | Owner | Use | LedgerEntry | Work | Signal | Decision | Delivery) -> dict[str, Any]:
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
