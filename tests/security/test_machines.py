"""Threats S3 and S11: a rented machine, on which other people's nodes run, is never sent a key of the account."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.bootstrap import App
from runcomfy.domain.job import JobRequest, JobStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

HEARD: list[bytes] = []
"""Every byte that reached a machine in this test, in pieces."""


class Overheard:
    """A ComfyUI behind a line on which every byte that comes in is noted."""

    def __init__(self, _: object) -> None:
        self.inner = ComfyUIEmulator(speed=100)
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        await self.inner.start(host)
        self._server = await asyncio.start_server(self._line, host, port)
        return f"http://{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)
        await self.inner.stop()

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(self.inner.host, self.inner.port)
        both = [asyncio.create_task(carry(reader, ours, HEARD)), asyncio.create_task(carry(theirs, writer, []))]
        self._lines |= {*both}


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, heard: list[bytes]) -> None:
    try:
        while piece := await reader.read(65_536):
            heard.append(piece)
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest_asyncio.fixture
async def app(
    cloud: RunComfyEmulator, clock: LoopClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[App]:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "outputs"))
    HEARD.clear()
    async with App(clock=clock, tell=lambda _: None) as app:
        yield app


@pytest.mark.threat("S3")
@pytest.mark.threat("S11")
@pytest.mark.cloud(
    boot_time=30,
    comfyui_factory=Overheard,
    token="canary-token-one",
    second_token="canary-token-two",
    user_id="canary-user",
)
async def test_no_key_of_the_account_is_ever_sent_to_a_machine(
    app: App, cloud: RunComfyEmulator, tmp_path: Path
) -> None:
    """Boot, health, node list, upload, submission, socket, history and download: what a stolen machine has seen."""
    picture = tmp_path / "canary-folder" / "picture.png"
    picture.parent.mkdir()
    Image.linear_gradient("L").resize((96, 64)).save(picture)
    result = await app.orchestrator().run(JobRequest("image_invert", image=str(picture)))
    assert result.status is JobStatus.DONE, result.error
    everything = b"".join(HEARD)
    for shown in (b"/upload/image", b"POST /prompt", b"/ws?", b"/history", b"/view", b"/object_info"):
        assert shown in everything, shown
    for secret in ("canary-token-one", "canary-token-two", "canary-user", "canary-folder", cloud.url.split("//")[1]):
        assert secret.encode() not in everything
    lowered = everything.lower()
    assert b"authorization:" not in lowered
    assert b"cookie:" not in lowered
