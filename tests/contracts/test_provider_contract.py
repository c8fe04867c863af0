"""Every provider, held to the same promises."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.provider import ProviderContract


@pytest.mark.cloud(comfyui=False)
class TestRunComfy(ProviderContract):
    @pytest.fixture
    async def provider(self, cloud_settings: CloudSettings, clock: LoopClock) -> AsyncIterator[RunComfyAPIClient]:
        async with RunComfyAPIClient(cloud_settings, clock=clock) as provider:
            yield provider
