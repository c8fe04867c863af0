"""Every store, held to the same promises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import RacesContract, StoreContract
from runcomfy.testing.postgres import PostgresForTests


class TestSqliteFile(StoreContract, RacesContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[SqlStore]:
        async with SqlStore(tmp_path / "state" / "store.sqlite3", clock=LoopClock(), durable=False) as store:
            yield store

    @pytest.fixture
    async def rival(self, store: SqlStore, tmp_path: Path) -> AsyncIterator[SqlStore]:
        async with SqlStore(tmp_path / "state" / "store.sqlite3", clock=LoopClock(), durable=False) as rival:
            yield rival


class TestSqliteInMemory(StoreContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[SqlStore]:
        async with SqlStore(Path(":memory:"), clock=LoopClock()) as store:
            yield store


@pytest.fixture(scope="module")
def dsn(postgres_server: PostgresForTests) -> Iterator[str]:
    """One database for all: each test of the contract looks only at its own rows."""
    dsn = postgres_server.database()
    yield dsn
    postgres_server.drop(dsn)


class TestPostgres(StoreContract, RacesContract):
    @pytest.fixture
    async def store(self, dsn: str) -> AsyncIterator[SqlStore]:
        async with SqlStore.over(store_from(dsn, clock=LoopClock())) as store:
            yield store

    @pytest.fixture
    async def rival(self, store: SqlStore, dsn: str) -> AsyncIterator[SqlStore]:
        async with SqlStore.over(store_from(dsn, clock=LoopClock())) as rival:
            yield rival
