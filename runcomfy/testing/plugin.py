"""
Fixtures for tests against the emulators: an emulated cloud that fails a test which leaves a machine on.

Load it with `pytest_plugins = ["runcomfy.testing.plugin"]`. Times are the running loop's, so that the fixtures work
under virtual time (looptime) as well as in real time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.postgres import NoPostgres, PostgresForTests
from runcomfy.testing.standstill import count_anyio_threads, stand_still_for_threads
from runcomfy.testing.web import Serving, Web, serving_web


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker that shapes the `cloud` fixture; make virtual time stand still for threads."""
    count_anyio_threads()
    config.addinivalue_line(
        "markers", "cloud(**options): the arguments of RunComfyEmulator for this test's `cloud` fixture"
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    """Hold the time of each loop that looptime has just patched."""
    result = yield
    if isinstance(result, asyncio.Runner):
        stand_still_for_threads(result.get_loop())
    return result


@pytest.fixture
def clock() -> LoopClock:
    """The time of the test's story: a fixed start plus the loop's time. The emulated cloud has the same."""
    return LoopClock()


@pytest_asyncio.fixture
async def _listening_cloud(request: pytest.FixtureRequest, clock: LoopClock) -> AsyncIterator[RunComfyEmulator]:
    options: dict[str, Any] = {"now": clock.now}
    for marker in reversed(list(request.node.iter_markers("cloud"))):
        options.update(marker.kwargs)
    async with RunComfyEmulator(**options) as cloud:
        yield cloud


@pytest.fixture
def cloud(_listening_cloud: RunComfyEmulator) -> Iterator[RunComfyEmulator]:
    """An emulated cloud with machines that boot in 180 s; at the end nothing may bill.

    `@pytest.mark.cloud(comfyui=False, boot_time=60)` passes arguments to `RunComfyEmulator`.
    """
    yield _listening_cloud
    # Looked at before the loop runs again: under virtual time, anything planned would happen at once then.
    if _listening_cloud.billing:
        pytest.fail(f"machines were left on: {', '.join(_listening_cloud.billing)}")


@pytest.fixture
def cloud_settings(cloud: RunComfyEmulator) -> CloudSettings:
    """Settings that point at the emulated cloud."""
    tokens = [cloud.token] if cloud.second_token is None else [cloud.token, cloud.second_token]
    return CloudSettings(
        base_url=cloud.url,
        user_id=cloud.user_id,
        tokens=tuple(Secret(token) for token in tokens),
        workflow_version_id=str(cloud.workflows[0]["version_id"]),
    )


@pytest_asyncio.fixture
async def cloud_client(cloud_settings: CloudSettings, clock: LoopClock) -> AsyncIterator[RunComfyAPIClient]:
    """A client of the emulated cloud with a rate limiter of its own."""
    async with RunComfyAPIClient(cloud_settings, clock=clock) as client:
        yield client


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresForTests]:
    """A PostgreSQL server of this test run's own (one per worker of xdist); skips, and says why, where there is none.

    It does not wait for the disk: what it must survive is its own end, not the computer's.
    """
    with ExitStack() as stack:
        try:
            server = stack.enter_context(PostgresForTests(fsync=False))
        except NoPostgres as reason:
            pytest.skip(str(reason))
        yield server


@pytest.fixture
def postgres_dsn(postgres_server: PostgresForTests) -> Iterator[str]:
    """The address of a fresh database with our tables in it."""
    dsn = postgres_server.database()
    yield dsn
    postgres_server.drop(dsn)


@pytest_asyncio.fixture
async def comfyui_server() -> AsyncIterator[ComfyUIEmulator]:
    """An emulated ComfyUI."""
    async with ComfyUIEmulator() as emulator:
        yield emulator


@pytest.fixture
def serving_api(comfyui_server: ComfyUIEmulator, tmp_path: Path, clock: LoopClock) -> Serving:
    """What serves the HTTP API over `comfyui_server`; it is entered in the test, with `async with`.

    What is started before the test begins has timers of another time.
    """
    return lambda **options: serving_web(tmp_path, clock, comfyui=comfyui_server.url, **options)


@pytest_asyncio.fixture
async def api(serving_api: Serving) -> AsyncIterator[Web]:
    """The HTTP API for tests in which no time passes: a worker of it would lose its leases (see `serving_api`)."""
    async with serving_api() as web:
        yield web
