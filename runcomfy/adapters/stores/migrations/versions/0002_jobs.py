"""The queue: jobs with the published columns, attempts, the event log, pauses and roles."""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

import sqlalchemy as sa
from alembic import op

from runcomfy.adapters.stores.migrations import postgres_rules

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.Text().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.REAL().with_variant(sa.Double, "postgresql")

NEW_UID = {
    "sqlite": (
        "(lower(hex(randomblob(4))) || '-' || lower(hex(randomblob(2))) "
        "|| '-4' || substr(lower(hex(randomblob(2))), 2) "
        "|| '-' || substr('89ab', 1 + (random() & 3), 1) || substr(lower(hex(randomblob(2))), 2) "
        "|| '-' || lower(hex(randomblob(6))))"
    ),
    # PostgreSQL 12 has no gen_random_uuid() of its own.
    "postgresql": "(md5(random()::text || clock_timestamp()::text)::uuid)::text",
}

PENDING = sa.text("status = 'pending'")
PROCESSING = sa.text("status = 'processing'")
HAS_PROMPT = sa.text("phase <> ''")


def upgrade() -> None:
    _jobs()
    _job_indexes()
    _stories()
    _pauses_and_roles()
    if op.get_context().dialect.name == "postgresql":
        _rules_on_postgres()
    else:
        _rules_on_sqlite()


def _jobs() -> None:
    op.create_table(
        "jobs",
        # The published columns, for people and their SQL; never renamed, never reordered.
        sa.Column("id", NUMBER, sa.Identity(always=False), primary_key=True, autoincrement=True),
        sa.Column("config_name", sa.Text, nullable=False, unique=True),
        sa.Column("job_type", sa.Text, nullable=False),
        sa.Column("workflow_id", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, server_default=sa.text("50")),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("retries_attempted", sa.Integer, server_default=sa.text("0")),
        sa.Column("run_count", sa.Integer, server_default=sa.text("0")),
        sa.Column("retry_limit", sa.Integer),
        sa.Column("start_time", TIME),
        sa.Column("end_time", TIME),
        sa.Column("duration", SECONDS),
        sa.Column("error_trace", sa.Text),
        sa.Column("metadata", sa.Text),
        sa.Column("worker_id", sa.Text),
        sa.Column("lease_expires_at", TIME),
        # Ours; each with a default, so that a plain INSERT of the columns above is enough.
        sa.Column("uid", sa.Text, nullable=False, unique=True, server_default=_new_uid()),
        sa.Column("token", NUMBER, nullable=False, server_default=sa.text("0")),
        sa.Column("reason", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("request", sa.Text),
        sa.Column("phase", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("place", sa.Text),
        sa.Column("prompt_id", sa.Text),
        sa.Column("not_before", TIME),
        sa.Column("others_from", TIME),
        sa.Column("created_at", TIME, server_default=sa.text("CURRENT_TIMESTAMP")),
        sa.Column("username", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("project", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("source_path", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("content_sha256", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("held_sha256", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("lost_count", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("kill_count", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("progress", SECONDS, nullable=False, server_default=sa.text("0")),
        sa.Column("message", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("result", sa.Text, nullable=False, server_default=sa.text("'{}'")),
        sa.Column("body_sha256", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("run_began_at", TIME),
        sa.Column("run_counted", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("waits_since", TIME),
        sa.CheckConstraint("status IN ('pending','processing','done','failed')", name="jobs_status"),
        sqlite_autoincrement=True,
    )


def _new_uid() -> sa.TextClause:
    return sa.text(NEW_UID[op.get_context().dialect.name])


def _job_indexes() -> None:
    op.create_index("idx_jobs_status_priority", "jobs", ["status", "priority"])
    op.create_index("idx_jobs_started", "jobs", ["start_time"])
    there = sa.text("idempotency_key IS NOT NULL")
    op.create_index(
        "ux_jobs_idempotency_key", "jobs", ["idempotency_key"], unique=True, sqlite_where=there, postgresql_where=there
    )
    # Limits and a fair order ask for the next job of each workflow, type and user.
    line = ["workflow_id", "job_type", "username", "priority", "id"]
    op.create_index("ix_jobs_lines", "jobs", line, sqlite_where=PENDING, postgresql_where=PENDING)
    op.create_index("ix_jobs_places", "jobs", ["place"], sqlite_where=HAS_PROMPT, postgresql_where=HAS_PROMPT)
    if op.get_context().dialect.name == "postgresql":
        # SQLite finds both in idx_jobs_status_priority, whose entries end with the row's number. Nothing here names
        # lease_expires_at or progress: rows whose indexed columns stay as they are are rewritten at half the price.
        op.create_index("ix_jobs_pending", "jobs", ["priority", "id"], postgresql_where=PENDING)
        op.create_index("ix_jobs_processing", "jobs", ["worker_id"], postgresql_where=PROCESSING)


def _stories() -> None:
    op.create_table(
        "job_attempts",
        # No foreign keys to jobs: what happened stays, whatever a user deletes.
        sa.Column("job_id", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("token", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("run", sa.Integer, nullable=False),
        sa.Column("worker_id", sa.Text, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.Column("outcome", sa.Text),
        sa.Column("place", sa.Text),
        sa.Column("prompt_id", sa.Text),
        sa.Column("error_code", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("error_trace", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("result", sa.Text, nullable=False, server_default=sa.text("'{}'")),
        sa.Column("error", sa.Text),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "job_events",
        sa.Column("number", NUMBER, sa.Identity(always=False), primary_key=True, autoincrement=True),
        sa.Column("at", TIME, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("job_id", NUMBER),
        sa.Column("token", NUMBER, nullable=False, server_default=sa.text("0")),
        sa.Column("worker_id", sa.Text),
        sa.Column("data", sa.Text, nullable=False, server_default=sa.text("'{}'")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_events_job_id", "job_events", ["job_id", "number"])
    losses = sa.text("kind = 'lost'")
    op.create_index("ix_job_events_lost", "job_events", ["at"], sqlite_where=losses, postgresql_where=losses)


def _pauses_and_roles() -> None:
    op.create_table(
        "queue_pauses",
        sa.Column("scope", sa.Text, primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("until", TIME),
        sa.Column("by", sa.Text, nullable=False),
    )
    op.create_table(
        "roles",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner_id", sa.Text),
        sa.Column("epoch", NUMBER, nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
    )


def _rules_on_sqlite() -> None:
    # A priority that somebody set to NULL means the default, not "before everybody else".
    for when in ("INSERT", "UPDATE OF priority"):
        name = "jobs_priority_on_" + when.split()[0].lower()
        op.execute(
            f"CREATE TRIGGER {name} AFTER {when} ON jobs WHEN NEW.priority IS NULL "
            "BEGIN UPDATE jobs SET priority = 50 WHERE id = NEW.id; END"
        )
    for verb in ("update", "delete"):
        op.execute(
            f"CREATE TRIGGER job_events_no_{verb} BEFORE {verb.upper()} ON job_events "
            "BEGIN SELECT RAISE(ABORT, 'job_events is only ever added to'); END"
        )


def _rules_on_postgres() -> None:
    op.execute(
        "CREATE FUNCTION runcomfy_default_priority() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.priority := 50; RETURN NEW; END $$"
    )
    op.execute(
        "CREATE TRIGGER jobs_priority BEFORE INSERT OR UPDATE OF priority ON jobs FOR EACH ROW "
        "WHEN (NEW.priority IS NULL) EXECUTE FUNCTION runcomfy_default_priority()"
    )
    # Room in each page lets a renewed lease stay where it is: 10,000 take 60 ms instead of 260. Rows that come and go
    # are cleared away early, for every claim passes over those that went.
    op.execute(
        "ALTER TABLE jobs SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, "
        "autovacuum_analyze_scale_factor = 0.02)"
    )
    op.execute("ALTER TABLE job_attempts SET (fillfactor = 80)")
    # Whoever waits for work is woken when there is some, also when a user says so in SQL; never for progress.
    op.execute(
        "CREATE FUNCTION runcomfy_wake() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_notify('runcomfy_jobs', ''); RETURN NULL; END $$"
    )
    op.execute("CREATE TRIGGER jobs_new AFTER INSERT ON jobs FOR EACH STATEMENT EXECUTE FUNCTION runcomfy_wake()")
    op.execute(
        "CREATE TRIGGER jobs_pending_again AFTER UPDATE OF status ON jobs FOR EACH ROW "
        "WHEN (NEW.status = 'pending' AND OLD.status <> 'pending') EXECUTE FUNCTION runcomfy_wake()"
    )
    postgres_rules.append_only("job_events")
    postgres_rules.guard_tables_of_0001()
