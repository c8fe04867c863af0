"""Our client keeps the contract of ComfyUI clients on every emulated version."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from runcomfy.testing.contracts.comfyui import ComfyUIContract
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator


@pytest.mark.parametrize("version", ["0.3.64", "0.10.0", "0.33.0", "0.38.0"], indirect=True)
class TestEmulator(ComfyUIContract):
    @pytest.fixture
    def version(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest_asyncio.fixture
    async def server_url(self, version: str) -> AsyncIterator[str]:
        async with ComfyUIEmulator(version=version) as emulator:
            yield emulator.url
