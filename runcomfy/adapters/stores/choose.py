"""Which database is meant: a file's path, or the address of a server."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Final

from runcomfy.adapters.stores.database import Database, DatabaseKind
from runcomfy.adapters.stores.sqlite import SqliteFile
from runcomfy.domain.exceptions import SettingInvalid, foreign_text
from runcomfy.domain.secret import Secret
from runcomfy.ports.clock import Clock

SERVER_SCHEMES: Final = ("postgresql://", "postgres://", "postgresql+psycopg://")

WAIT: Final = timedelta(seconds=10)
WAKE_INTERVAL: Final = timedelta(milliseconds=3)


def is_server(text: str | Path | Secret) -> bool:
    """Whether a database is on a server; else it is a file of this computer."""
    return isinstance(text, str | Secret) and _revealed(text).lower().startswith(SERVER_SCHEMES)


def store_from(
    text: str | Path | Secret,
    *,
    clock: Clock,
    durable: bool = True,
    busy_timeout: timedelta = WAIT,
    wake_interval: timedelta = WAKE_INTERVAL,
    server_time: bool | None = None,
) -> Database:
    """Return the database that a path (`:memory:` too) or a `postgresql://…` address names; nothing is touched yet.

    `durable`: whether a commit in a file is on the disk before it counts; a server decides that by itself.
    `busy_timeout`: how long to wait for another program's lock. `wake_interval`: how often a file is asked for
    changes while somebody waits for one; under virtual time, seconds. `server_time`: see `Database`.

    Raises SettingInvalid: an address that cannot be read, or no driver for it.
    """
    kind: DatabaseKind
    if is_server(text):
        kind = _server(Secret(_revealed(text)), lock_timeout=busy_timeout)
    else:
        kind = SqliteFile(_path(text), durable=durable, busy_timeout=busy_timeout, wake_interval=wake_interval)
    return Database(kind, clock=clock, server_time=server_time)


def _server(dsn: Secret, *, lock_timeout: timedelta) -> DatabaseKind:
    try:
        from runcomfy.adapters.stores.postgres import PostgresServer
    except ImportError as error:
        raise SettingInvalid(
            f"the database is on a PostgreSQL server, and its driver is not installed: {foreign_text(error)}",
            hint="pip install 'runcomfy-orchestrator[postgres]'",
        ) from error
    return PostgresServer(dsn, lock_timeout=lock_timeout)


def _path(text: str | Path | Secret) -> Path:
    if isinstance(text, Path):
        return text
    scheme, mark, _ = _revealed(text).partition("://")
    if mark:
        raise SettingInvalid(
            f"no database of that kind is known: {foreign_text(scheme, 40)}://…",
            hint="write the path of a SQLite file, or postgresql://USER:PASSWORD@HOST:5432/DATABASE",
        )
    return Path(_revealed(text)).expanduser()


def _revealed(text: str | Path | Secret) -> str:
    return (text.reveal() if isinstance(text, Secret) else str(text)).strip()
