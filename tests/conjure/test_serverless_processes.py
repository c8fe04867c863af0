"""A program that runs a serverless request and is ended: what becomes of the request."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.testing.emulators.serverless import ServerlessEmulator

pytestmark = [
    pytest.mark.processes,
    pytest.mark.looptime(False),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]

PATIENCE = 60
PROGRAM = """
from runcomfy.serverless_service import ServerlessRunComfyService
print(ServerlessRunComfyService().generate_flux_mesh_unified("a cat", "render.png", 5), flush=True)
"""


@pytest_asyncio.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[ServerlessEmulator]:
    async with ServerlessEmulator(cold_start=0.05, comfyui_speed=10_000, folder=tmp_path / "cloud") as emulator:
        yield emulator


@pytest_asyncio.fixture
async def program(deployment: ServerlessEmulator, tmp_path: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that asks for picture and mesh, and prints what it gets."""
    Image.new("RGB", (64, 64), (10, 20, 30)).save(tmp_path / "render.png")
    env = {**os.environ, **deployment.environment(), "RUNCOMFY_POLL_INTERVAL": "0.2s"}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def until(happened: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while not happened():  # noqa: ASYNC110 - another program is waited for
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"did not happen: {what}")


async def test_ctrl_c_cancels_the_request_first(
    deployment: ServerlessEmulator, program: asyncio.subprocess.Process
) -> None:
    deployment.next_request(never_ends=True)
    await until(lambda: [r for r in deployment.requests.values() if r.state == "in_progress"], "the request runs")
    program.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert program.returncode not in (0, None), err.decode()
    assert b"KeyboardInterrupt" in err
    await until(lambda: not deployment.going_on, "the request is cancelled")
    (request,) = deployment.requests.values()
    assert request.state == "canceled"


async def test_a_killed_program_leaves_a_request_that_ends_by_itself_and_no_instance(
    deployment: ServerlessEmulator, program: asyncio.subprocess.Process
) -> None:
    deployment.keep_warm = 0.2
    await until(lambda: deployment.requests, "the request was submitted")
    program.send_signal(signal.SIGKILL)
    await program.communicate()
    await until(lambda: not deployment.going_on, "the request ends")
    (request,) = deployment.requests.values()
    assert request.state == "succeeded"
    await until(lambda: not deployment.billing, "the instance ends")
