"""Owners, machines and their stories, uses, the ledger, and what the processes of an account share."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.Text().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
EXACT = sa.Text().with_variant(sa.Numeric(), "postgresql")


def upgrade() -> None:
    _owners_and_machines()
    _stories_and_uses()
    _money()
    _shared_by_processes()


def _owners_and_machines() -> None:
    op.create_table(
        "owners",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("process_started", sa.Double, nullable=False),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("heartbeat_at", TIME, nullable=False),
        sa.Column("ended_at", TIME),
    )
    op.create_index("ix_owners_ended_at", "owners", ["ended_at"])
    op.create_table(
        "machines",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("provider", sa.Text, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("server_type", sa.Text, nullable=False),
        sa.Column("duration", sa.BigInteger, nullable=False),
        sa.Column("usd_per_hour", EXACT, nullable=False),
        sa.Column("rate_source", sa.Text, nullable=False),
        sa.Column("requested_at", TIME, nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("workflow_version_id", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("owner_id", sa.Text),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("before_ids", sa.JSON, nullable=False),
        sa.Column("server_id", sa.Text),
        sa.Column("ready_at", TIME),
        sa.Column("planned_stop_at", TIME),
        sa.Column("kept_until", TIME),
        sa.Column("stop_asked_at", TIME),
        sa.Column("stop_reason", sa.Text, nullable=False),
        sa.Column("stop_accepted_at", TIME),
        sa.Column("gone_at", TIME),
        sa.Column("last_used_at", TIME),
    )
    op.create_index("ix_machines_account", "machines", ["provider", "account", "state"])
    op.create_index("ix_machines_boots", "machines", ["provider", "server_type", "ready_at"])


def _stories_and_uses() -> None:
    op.create_table(
        "machine_transitions",
        sa.Column("machine_id", sa.Text, sa.ForeignKey("machines.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("changes", sa.JSON, nullable=False),
    )
    _append_only("machine_transitions")
    op.create_table(
        "machine_uses",
        sa.Column("machine_id", sa.Text, sa.ForeignKey("machines.id"), primary_key=True),
        sa.Column("owner_id", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("ended_at", TIME),
    )
    op.create_index("ix_machine_uses_ended_at", "machine_uses", ["ended_at"])


def _money() -> None:
    op.create_table(
        "ledger",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("machine_id", sa.Text, sa.ForeignKey("machines.id"), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, nullable=False),
        sa.Column("usd_per_hour", EXACT, nullable=False),
        sa.Column("amount_usd", EXACT, nullable=False),
        sa.Column("recorded_at", TIME, nullable=False),
        sa.Column("job_id", sa.Text),
        sa.Column("note", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_ledger_machine_id", "ledger", ["machine_id"])
    _append_only("ledger")


def _shared_by_processes() -> None:
    op.create_table(
        "accounts",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("seen_at", TIME),
        sa.Column("line_until", TIME),
        sa.Column("urgent_until", sa.JSON, nullable=False),
        sa.Column("hold_until", TIME),
        sa.Column("launch_lock_owner", sa.Text),
        sa.Column("launch_lock_at", TIME),
    )
    op.create_table(
        "upgrades",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("revision", sa.Text, nullable=False),
        sa.Column("program_version", sa.Text, nullable=False),
        sa.Column("at", TIME, nullable=False),
    )


def _append_only(table: str) -> None:
    """What was written stays written, also for somebody with a database shell and a moment of haste."""
    if op.get_context().dialect.name != "sqlite":
        return
    for verb in ("update", "delete"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb.upper()} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table} is only ever added to'); END"
        )
