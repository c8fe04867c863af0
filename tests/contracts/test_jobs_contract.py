"""Every database of a queue, held to the same promises."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.testing.contracts.jobs import JobStoreContract
from runcomfy.testing.contracts.jobs_words import Opened, RunSql, StoryClock

WAKE = timedelta(seconds=1)


@pytest.fixture
def clock() -> StoryClock:
    return StoryClock()


def a_queue(where: str | Path, clock: StoryClock) -> SqlJobs:
    return SqlJobs(store_from(where, clock=clock, durable=False, wake_interval=WAKE))


class TestSqliteFile(JobStoreContract):
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "database" / "comfyui_agent.db"

    @pytest.fixture
    async def jobs(self, path: Path, clock: StoryClock) -> AsyncIterator[SqlJobs]:
        async with a_queue(path, clock) as jobs:
            yield jobs

    @pytest.fixture
    def again(self, path: Path, clock: StoryClock) -> Opened:
        return lambda: a_queue(path, clock)

    @pytest.fixture
    def sql(self, jobs: SqlJobs, path: Path) -> RunSql:
        def run(statement: str) -> Sequence[tuple[Any, ...]]:
            with closing(sqlite3.connect(path)) as connection, connection:
                return connection.execute(statement).fetchall()

        return run


class TestSqliteInMemory(JobStoreContract):
    @pytest.fixture
    async def jobs(self, clock: StoryClock) -> AsyncIterator[SqlJobs]:
        async with a_queue(":memory:", clock) as jobs:
            yield jobs

    @pytest.fixture
    def again(self) -> Opened:
        pytest.skip("a database in memory has one process")

    @pytest.fixture
    def sql(self) -> RunSql:
        pytest.skip("a database in memory has one program")


class TestPostgres(JobStoreContract):
    @pytest.fixture
    async def jobs(self, postgres_dsn: str, clock: StoryClock) -> AsyncIterator[SqlJobs]:
        async with a_queue(postgres_dsn, clock) as jobs:
            yield jobs

    @pytest.fixture
    def again(self, postgres_dsn: str, clock: StoryClock) -> Opened:
        return lambda: a_queue(postgres_dsn, clock)

    @pytest.fixture
    def sql(self, postgres_dsn: str) -> RunSql:
        def run(statement: str) -> Sequence[tuple[Any, ...]]:
            with psycopg.connect(postgres_dsn) as connection:
                cursor = connection.execute(statement.encode())
                return cursor.fetchall() if cursor.description else []

        return run
