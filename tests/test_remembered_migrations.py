"""Databases made from remembered statements are the ones that Alembic makes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier, Semaphore
from time import sleep
from typing import Any

import pytest
from alembic import command
from sqlalchemy import MetaData, create_engine, select
from sqlalchemy.exc import OperationalError

from runcomfy.adapters.stores import migrate
from runcomfy.testing.remembered import Remembered

AT = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Remembered:
    """One that has nothing to remember yet."""
    session: Any = command.upgrade
    fresh = Remembered(session.__self__.really)
    monkeypatch.setattr(command, "upgrade", fresh.upgrade)
    return fresh


@contextmanager
def database(path: Path) -> Iterator[Any]:
    engine = create_engine(f"sqlite:///{path}")
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def made(path: Path) -> tuple[list[Any], dict[str, list[Any]]]:
    """Make one, and return how it is built and what is in it."""
    with database(path) as connection:
        migrate.upgrade(connection, str(path), at=AT)
    with database(path) as connection:
        built = [tuple(row) for row in connection.exec_driver_sql("SELECT type, name, sql FROM sqlite_master")]
        tables = MetaData()
        tables.reflect(connection)
        return built, {
            name: [tuple(row) for row in connection.execute(select(table))] for name, table in tables.tables.items()
        }


@pytest.mark.usefixtures("remembered")
def test_the_second_is_as_the_first(tmp_path: Path) -> None:
    (built, first), (again, second) = made(tmp_path / "1.sqlite3"), made(tmp_path / "2.sqlite3")
    assert again == built
    [[name, *rest]], [[other, *others]] = first.pop("webhook_cursor"), second.pop("webhook_cursor")
    assert rest == others
    assert name != other, "two databases are two queues"
    assert second == first


def test_one_that_failed_in_the_middle_is_not_remembered(remembered: Remembered, tmp_path: Path) -> None:
    really = remembered.really

    def on_a_full_disk(config: Any, revision: str) -> None:
        config.attributes["connection"].exec_driver_sql("PRAGMA max_page_count = 20")
        really(config, revision)

    remembered.really = on_a_full_disk
    with pytest.raises(OperationalError):
        made(tmp_path / "full.sqlite3")
    remembered.really = really
    first = made(tmp_path / "1.sqlite3")
    assert {"jobs", "machines"} <= set(first[1])
    assert made(tmp_path / "2.sqlite3")[0] == first[0]


def test_two_databases_of_one_process_are_brought_up_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alembic works in the globals of its module: the queue's database and the machines' books may be new together."""
    session: Any = command.upgrade
    at_work = Semaphore(1)
    both = Barrier(2, timeout=60)

    def upgrade(config: Any, revision: str) -> None:
        assert at_work.acquire(blocking=False), "two upgrades at the same time"
        try:
            sleep(0.01)  # a thread of the other database comes in, unless it is kept out
            session.__self__.really(config, revision)
        finally:
            at_work.release()

    def make(name: str) -> None:
        both.wait()
        made(tmp_path / name)

    monkeypatch.setattr(command, "upgrade", upgrade)
    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(make, name) for name in ("queue.sqlite3", "books.sqlite3")]:
            done.result()
