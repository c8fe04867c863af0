"""Requests to a serverless deployment: from submit to verified files, and everything that goes wrong in between."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.config import load_settings
from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.adapters.results import DiskResults
from runcomfy.application.serverless_run import ServerlessDone, ServerlessOrder, ServerlessRuns
from runcomfy.domain import exceptions as errors
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId, OutputKind
from runcomfy.domain.serverless import CODES, RequestReport, RequestState, Submitted, Wanted
from runcomfy.domain.settings import Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.samples import png

WANTED = (
    Wanted("flux", "24", OutputKind.IMAGE, ("images",), "flux.png"),
    Wanted("mesh", "33", OutputKind.MESH, ("3d", "files"), "mesh.glb"),
)


def data_uri() -> str:
    return "data:image/png;base64," + base64.b64encode(png()).decode()


def order(seed: int = 7, **options: Any) -> ServerlessOrder:
    overrides = {
        "16": {"inputs": {"image": data_uri()}},
        "40": {"inputs": {"value": ""}},
        "41": {"inputs": {"value": "a bronze statue"}},
        "42": {"inputs": {"value": seed}},
    }
    return ServerlessOrder(**{"wanted": WANTED, "overrides": overrides, **options})


@pytest_asyncio.fixture
async def deployment(clock: LoopClock, tmp_path: Path) -> AsyncIterator[ServerlessEmulator]:
    async with ServerlessEmulator(now=clock.now, folder=tmp_path / "cloud") as emulator:
        yield emulator


@pytest.fixture
def settings(deployment: ServerlessEmulator, tmp_path: Path) -> Settings:
    env = {**deployment.environment(), "RUNCOMFY_STATE_DIR": str(tmp_path / "state")}
    loaded = load_settings(env=env, cwd=tmp_path)
    return replace(loaded, files=replace(loaded.files, output_dir=str(tmp_path / "out"), durable=False))


@pytest_asyncio.fixture
async def api(settings: Settings, clock: LoopClock) -> AsyncIterator[RunComfyServerless]:
    async with RunComfyServerless(settings.serverless, settings.cloud, clock=clock, files=settings.comfy) as client:
        yield client


@pytest.fixture
def runs(api: RunComfyServerless, settings: Settings, clock: LoopClock) -> ServerlessRuns:
    return ServerlessRuns(api, DiskResults(settings.files), settings, clock)


async def test_a_request_brings_picture_and_mesh_verified(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path
) -> None:
    heard: list[RequestReport] = []
    done = await runs.run(order(), job_id=JobId("j-1"), heard=heard.append)
    assert set(done.outputs) == {"flux", "mesh"}
    assert Path(done.outputs["flux"].path) == tmp_path / "out" / "j-1" / "flux.png"
    assert Path(done.outputs["mesh"].path).read_bytes()[:4] == b"glTF"
    (ran,) = deployment.run_log
    assert ran.graph["42"]["inputs"]["value"] == 7
    assert ran.graph["41"]["inputs"]["value"] == "a bronze statue"
    assert [report.state for report in heard][0] is RequestState.IN_QUEUE
    assert heard[0].queue_position == 0
    assert RequestState.IN_PROGRESS in {report.state for report in heard}
    manifest = json.loads((tmp_path / "out" / "j-1" / "manifest.json").read_text())
    assert manifest["request_id"] == done.request.request_id
    assert {entry["name"] for entry in manifest["outputs"]} == {"flux", "mesh"}
