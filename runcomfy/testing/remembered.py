"""
Empty SQLite databases made with the statements that Alembic ran for the first one.

To work them out takes 35 ms, in thousands of tests. Older databases and servers are brought up by Alembic each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

from alembic.config import Config
from sqlalchemy import Connection, event, inspect

Upgrade = Callable[[Config, str], None]


class Remembered:
    """Stands in for `alembic.command.upgrade`, in any number of threads."""

    def __init__(self, really: Upgrade) -> None:
        self.really = really
        self._written: list[tuple[str, Any]] = []

    def upgrade(self, config: Config, revision: str) -> None:
        """Bring a database up to a revision."""
        connection: Connection = config.attributes["connection"]
        on_server = connection.dialect.name != "sqlite"
        if on_server or revision != "head" or inspect(connection).get_table_names():
            self.really(config, revision)
        elif not self._written:
            self._written = self._noted(connection, config, revision)
        else:
            for statement, parameters in self._written:
                fresh = (uuid4().hex[:12], 0) if "INSERT INTO webhook_cursor" in statement else parameters
                connection.exec_driver_sql(statement, fresh)

    def _noted(self, connection: Connection, config: Config, revision: str) -> list[tuple[str, Any]]:
        """Return what Alembic writes: all of it, for a migration that fails in the middle is not to be repeated."""
        written: list[tuple[str, Any]] = []

        def note(*told: Any) -> None:
            statement, parameters, many = told[2], told[3], told[5]
            if not statement.startswith(("SELECT", "PRAGMA")):
                assert not many  # noqa: S101 - tools for tests
                written.append((statement, parameters))

        event.listen(connection, "before_cursor_execute", note)
        try:
            self.really(config, revision)
        finally:
            event.remove(connection, "before_cursor_execute", note)
        return written
