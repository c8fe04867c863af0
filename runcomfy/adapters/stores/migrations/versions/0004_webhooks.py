"""Webhooks: messages that wait, and how far the event log was read for them."""

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.Text().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("event", NUMBER, primary_key=True, autoincrement=False),
        sa.Column("url", sa.Text, primary_key=True),
        sa.Column("job_id", NUMBER, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("due_at", TIME, nullable=False),
        sa.Column("tries", NUMBER, nullable=False),
        sa.Column("last", sa.Text, nullable=False),
    )
    op.create_index("ix_webhooks_url", "webhooks", ["url", "event"])
    op.create_index("ix_webhooks_due_at", "webhooks", ["due_at"])
    cursor = op.create_table(
        "webhook_cursor",
        sa.Column("queue", sa.Text, primary_key=True),
        sa.Column("read_to", NUMBER, nullable=False),
    )
    # What ended before there were webhooks is not told.
    newest = op.get_bind().execute(sa.text("SELECT max(number) FROM job_events")).scalar()
    op.bulk_insert(cursor, [{"queue": uuid4().hex[:12], "read_to": newest or 0}])
