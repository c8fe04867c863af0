"""Every store, held to the same promises."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import StoreContract


class TestSqliteFile(StoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[SqlStore]:
        async with SqlStore(tmp_path / "state" / "store.sqlite3", clock=LoopClock(), durable=False) as store:
            yield store


class TestSqliteInMemory(StoreContract):
    @pytest.fixture
    async def store(self) -> AsyncIterator[SqlStore]:
        async with SqlStore(Path(":memory:"), clock=LoopClock()) as store:
            yield store
