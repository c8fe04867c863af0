"""What every story of the queue needs: a database of each kind, a ComfyUI, and programs that can be stopped."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.queue_programs import QueuePrograms
from runcomfy.testing.serving import Services


@pytest.fixture(scope="session")
def empty_queue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with our tables in it, made once."""
    path = tmp_path_factory.mktemp("queue") / "empty.sqlite3"

    async def make() -> None:
        async with store_from(path, clock=SystemClock(), durable=False):
            pass

    asyncio.run(make())
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.campaign)])
def queue_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path or address of a fresh database: every story is told on both kinds."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_dsn"))
    path = tmp_path / "queue.sqlite3"
    shutil.copyfile(request.getfixturevalue("empty_queue"), path)
    path.chmod(0o600)
    return str(path)


@pytest_asyncio.fixture
async def comfyui(clock: LoopClock) -> AsyncIterator[ComfyUIEmulator]:
    """A plain ComfyUI server; its clock is the story's."""
    async with ComfyUIEmulator(now=lambda: clock.now().timestamp()) as emulator:
        yield emulator


@pytest_asyncio.fixture
async def programs(
    queue_database: str, comfyui: ComfyUIEmulator, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[QueuePrograms]:
    """Executors over that database and that server."""
    async with QueuePrograms(queue_database, comfyui, clock, tmp_path) as programs:
        yield programs


@pytest_asyncio.fixture
async def services(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    """Services that share an account, books and a queue."""
    async with Services(cloud, cloud_settings, clock, tmp_path) as services:
        yield services
