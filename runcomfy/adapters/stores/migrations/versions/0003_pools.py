"""Pools and budgets: whose a machine is, jobs' time on machines, signals, decisions, alerts that were given."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIME = sa.Text().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
EXACT = sa.Text().with_variant(sa.Numeric(), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
NO_TEXT = sa.text("''")


def upgrade() -> None:
    _machines()
    _work()
    _told_and_decided()


def _machines() -> None:
    # Each with a default: machines that a program of an earlier version writes while it is still running stay whole.
    for name in ("run_id", "for_project", "for_user"):
        op.add_column("machines", sa.Column(name, sa.Text, nullable=False, server_default=NO_TEXT))
    op.add_column("machines", sa.Column("asked_duration", sa.BigInteger))
    op.add_column("machines", sa.Column("draining", sa.Text, nullable=False, server_default=NO_TEXT))
    op.create_index("ix_machines_since", "machines", ["state", "since"])
    known = sa.text("run_id <> ''")
    op.create_index("ix_machines_run", "machines", ["run_id"], sqlite_where=known, postgresql_where=known)
    op.create_index("ix_ledger_ended_at", "ledger", ["ended_at"])


def _work() -> None:
    op.create_table(
        "machine_work",
        # No foreign keys: what a job did is told whatever becomes of the rows of its machine and of itself.
        sa.Column("machine_id", sa.Text, primary_key=True),
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("attempt", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("workflow", sa.Text, nullable=False),
        sa.Column("server_type", sa.Text, nullable=False),
        sa.Column("began_at", TIME, nullable=False),
        sa.Column("user", sa.Text, nullable=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("computing_at", TIME),
        sa.Column("computed_at", TIME),
        sa.Column("ended_at", TIME),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("cold", sa.Boolean, nullable=False),
    )
    op.create_index("ix_machine_work_began_at", "machine_work", ["began_at"])


def _told_and_decided() -> None:
    op.create_table(
        "signals",
        sa.Column("number", NUMBER, sa.Identity(always=False), primary_key=True, autoincrement=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("until", TIME),
        sa.Column("jobs", NUMBER, nullable=False),
        sa.Column("work", sa.BigInteger, nullable=False),
        sa.Column("expected_at", TIME),
        sa.Column("user", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_signals_at", "signals", ["at"])
    op.create_table(
        "decisions",
        sa.Column("number", NUMBER, sa.Identity(always=False), primary_key=True, autoincrement=True),
        sa.Column("at", TIME, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("what", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("expected_usd", EXACT),
        sa.Column("by", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_decisions_at", "decisions", ["at"])
    op.create_table(
        "budget_alerts",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("at", TIME, nullable=False),
    )
