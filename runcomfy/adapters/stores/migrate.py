"""
Bringing a database to the version this program knows: forward only, in one transaction, never past what it knows.

Alembic is imported only when there is something to do; a database that is up to date costs one query.
"""

from __future__ import annotations

import threading
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, insert, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from runcomfy.adapters.stores.tables import PUBLISHED, metadata, upgrades
from runcomfy.domain.exceptions import StoreTooNew, StoreUnavailable, foreign_text

if TYPE_CHECKING:
    from alembic.config import Config

_ALEMBIC: Final = threading.Lock()
"""What it works on it keeps in the globals of its module: two databases of one process are brought up in turn."""
HEAD: Final = "0004"
"""The newest revision in `migrations/versions`."""

_MOVE_ASIDE: Final = (
    "if it is another agent's queue, move the file aside (or name another database): a new one is made at the next "
    "start, and the job files in jobs/processing are taken up again"
)

_OWN_FOLDER: Final = "set RUNCOMFY_STATE_DIR to a folder of its own"
_OWN_SCHEMA: Final = (
    "name another database, or make a schema of its own in this one (CREATE SCHEMA runcomfy) and end the address with "
    "?options=-csearch_path%3Druncomfy"
)

_VERSIONS: Final = "alembic_version"
_JOBS: Final = "jobs"
_PUT_ASIDE: Final = (
    "DROP INDEX IF EXISTS idx_jobs_status_priority",
    "DROP INDEX IF EXISTS idx_jobs_started",
    "ALTER TABLE jobs RENAME TO jobs_by_hand",
)
_TAKE_OVER: Final = (
    f"INSERT INTO jobs ({', '.join(PUBLISHED)}) SELECT {', '.join(PUBLISHED)} FROM jobs_by_hand",  # noqa: S608
    "DROP TABLE jobs_by_hand",
)
_REVISION: Final = text("SELECT version_num FROM alembic_version")


def revision_of(connection: Connection, where: str) -> str | None:
    """Return the database's revision, None for an empty one; raise StoreUnavailable if it is not ours."""
    tables = set(inspect(connection).get_table_names())
    on_server = connection.dialect.name == "postgresql"
    ours = tables & set(metadata.tables)
    if _VERSIONS in tables and (ours or not on_server):
        found = connection.execute(_REVISION).scalar()
        return None if found is None else str(found)
    # A server's database may be shared with other programs, as long as they use other names.
    if tables == {_JOBS} and not on_server and _is_made_by_hand(connection):
        return None
    if strange := (tables & {*ours, _VERSIONS} if on_server else tables):
        names = foreign_text(", ".join(sorted(strange)), 80)
        raise StoreUnavailable(
            f"{where} is the database of another program (it has tables {names})",
            hint=_OWN_SCHEMA if on_server else _MOVE_ASIDE if "jobs" in tables else _OWN_FOLDER,
        )
    return None


def upgrade(connection: Connection, where: str, *, at: datetime) -> None:
    """Bring the database to HEAD, inside the transaction that `connection` is in.

    Raises StoreTooNew if a newer program wrote it, StoreUnavailable if it belongs to another program.
    """
    found = revision_of(connection, where)
    if found == HEAD:
        return
    from alembic import command

    config = _config()
    if found is not None and found not in _known(config):
        raise _too_new(connection, where, found)
    config.attributes["connection"] = connection
    by_hand = found is None and connection.dialect.name == "sqlite" and _JOBS in inspect(connection).get_table_names()
    if by_hand:
        for statement in _PUT_ASIDE:
            connection.exec_driver_sql(statement)
    with _ALEMBIC:
        command.upgrade(config, "head")
    if by_hand:
        for statement in _TAKE_OVER:
            connection.exec_driver_sql(statement)
    connection.execute(insert(upgrades).values(revision=HEAD, program_version=_program_version(), at=at))


def _is_made_by_hand(connection: Connection) -> bool:
    """Whether the file has just the published table, made with the guide's own CREATE TABLE, and nothing waits in it.

    What waits there has no inputs: its worker could not run it, so such a file is some other agent's.
    """
    if {column["name"] for column in inspect(connection).get_columns(_JOBS)} != set(PUBLISHED):
        return False
    waiting = "SELECT count(*) FROM jobs WHERE status IN ('pending', 'processing')"
    return connection.exec_driver_sql(waiting).scalar() == 0


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    folder = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _known(config: Config) -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}


def _too_new(connection: Connection, where: str, found: str) -> StoreTooNew:
    try:
        newest = select(upgrades.c.program_version).order_by(upgrades.c.number.desc()).limit(1)
        writer = connection.execute(newest).scalar()
    except SQLAlchemyError:  # a newer program may keep this elsewhere
        writer = None
    by = f"version {foreign_text(writer, 40)}" if writer else "a newer version"
    return StoreTooNew(
        f"the database {where} was written by {by} of this program (revision {foreign_text(found, 40)}; "
        f"this one is {_program_version()} and knows up to {HEAD})",
        hint="upgrade: pip install --upgrade runcomfy-orchestrator; or name another "
        + ("database" if connection.dialect.name == "postgresql" else "folder with RUNCOMFY_STATE_DIR"),
    )


def _program_version() -> str:
    try:
        return version("runcomfy-orchestrator")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"
