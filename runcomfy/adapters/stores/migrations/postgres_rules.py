"""
Rules that PostgreSQL keeps for us, where SQLite's are written differently: called by migrations.

A migration that has shipped is never edited, and so the rules for the tables of 0001 are made by a later one.
"""

from typing import Final

from alembic import op

APPEND_ONLY_OF_0001: Final = ("machine_transitions", "ledger")
"""The tables of 0001 that are only ever added to; on SQLite 0001 itself guards them."""


def append_only(table: str) -> None:
    """Have the server refuse to change or take away rows of a table. On other databases nothing is done.

    What was written stays written, also for somebody with a database shell and a moment of haste.
    """
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION runcomfy_only_added() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is only ever added to', TG_TABLE_NAME; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_no_change BEFORE UPDATE OR DELETE ON {table} "
        "FOR EACH ROW EXECUTE FUNCTION runcomfy_only_added()"
    )
    op.execute(
        f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
        "FOR EACH STATEMENT EXECUTE FUNCTION runcomfy_only_added()"
    )


def guard_tables_of_0001() -> None:
    """Guard what 0001 guards on SQLite only. On other databases nothing is done."""
    for table in APPEND_ONLY_OF_0001:
        append_only(table)
