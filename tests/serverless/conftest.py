"""What the tests of requests to a serverless deployment need: one that is emulated, and what sends requests to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.adapters.results import DiskResults
from runcomfy.application.serverless_run import ServerlessRuns
from runcomfy.domain.settings import Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.serverless_requests import settings_at


@pytest_asyncio.fixture
async def deployment(clock: LoopClock, tmp_path: Path) -> AsyncIterator[ServerlessEmulator]:
    async with ServerlessEmulator(now=clock.now, folder=tmp_path / "cloud") as emulator:
        yield emulator


@pytest.fixture
def settings(deployment: ServerlessEmulator, tmp_path: Path) -> Settings:
    return settings_at(deployment, tmp_path)


@pytest_asyncio.fixture
async def api(settings: Settings, clock: LoopClock) -> AsyncIterator[RunComfyServerless]:
    async with RunComfyServerless(settings.serverless, settings.cloud, clock=clock, files=settings.comfy) as client:
        yield client


@pytest.fixture
def runs(api: RunComfyServerless, settings: Settings, clock: LoopClock) -> ServerlessRuns:
    return ServerlessRuns(api, DiskResults(settings.files), settings, clock)
