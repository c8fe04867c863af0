"""Serverless requests while everything goes wrong at random: afterwards no request runs that nobody waits for."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.config import load_settings
from runcomfy.adapters.data_uri import png_data_uri
from runcomfy.adapters.files import write_atomically
from runcomfy.adapters.results import DiskResults
from runcomfy.application.serverless_run import ServerlessOrder, ServerlessRuns
from runcomfy.conjure.serverless_runs import IMAGE, MESH, conjure_overrides, serverless_api
from runcomfy.domain.exceptions import RequestUnclear, RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.samples import png

CALLS = ("POST inference", "GET requests/*/status", "GET requests/*/result", "POST requests/*/cancel", "GET deployment")
ANSWERS: tuple[dict[str, Any], ...] = (
    {"status": 500},
    {"status": 502},
    {"status": 503, "headers": {"Retry-After": "3"}},
    {"status": 429},
    {"status": 429, "headers": {"Retry-After": "1e9"}},
    {"reply": "lost"},
    {"reply": "reset"},
    {"reply": "truncated"},
    {"reply": "html"},
    {"reply": "empty"},
    {"reply": "never"},
    {"reply": "lost", "works": False},
    {"body": []},
    {"body": {"request_id": "somebody-elses", "status": "completed"}},
    {"status": 200, "body": {"error_code": 10000, "error_message": "oops"}},
    {"status": 404},
    {"delay": 20.0},
)
TRAITS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {},
    {"fails": 10011, "words": "node 3: no"},
    {"crashes": True},
    {"never_ends": True},
    {"stuck": True},
    {"without_urls": True},
    {"only": ("24",)},
    {"corrupt": "cut"},
    {"hidden": 20.0},
)
FILES = ("lost", "502", "404", "redirect", "truncated", "html")


def provoke(deployment: ServerlessEmulator, dice: random.Random) -> None:
    """Switch some faults on."""
    for _ in range(dice.randrange(6)):
        fault = dict(dice.choice(ANSWERS))
        deployment.next_call(dice.choice(CALLS), skip=dice.randrange(4), times=dice.randrange(1, 6), **fault)
    deployment.next_request(**dice.choice(TRAITS))
    deployment.file_faults = dice.sample(FILES, dice.randrange(3))
    deployment.british, deployment.tells_urls = dice.random() < 0.5, dice.random() < 0.8
    deployment.times = dice.choice(("naive", "offset", "zulu"))


def pictures(folder: Path) -> str:
    write_atomically(folder / "render.png", png(), durable=False)
    return png_data_uri(folder / "render.png", max_pixels=10_000)


def kept(folder: Path) -> set[str]:
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith("rejected-")}


@pytest.mark.parametrize("seed", range(16))
async def test_whatever_happens_a_request_is_sent_once_and_ends(seed: int, clock: LoopClock, tmp_path: Path) -> None:
    dice = random.Random(seed)
    async with ServerlessEmulator(
        now=clock.now, folder=tmp_path / "cloud", cold_start=30, comfyui_speed=10
    ) as deployment:
        env = {**deployment.environment(), "RUNCOMFY_REQUEST_TIMEOUT": "900"}
        loaded = load_settings(env=env, cwd=tmp_path)
        settings = replace(loaded, files=replace(loaded.files, output_dir=str(tmp_path / "out"), durable=False))
        provoke(deployment, dice)
        order = ServerlessOrder((IMAGE, MESH), conjure_overrides("a cat", pictures(tmp_path), seed))
        error: BaseException | None = None
        async with serverless_api(settings, clock) as api:
            runs = ServerlessRuns(api, DiskResults(settings.files), settings, clock)
            task = asyncio.create_task(runs.run(order, job_id=JobId("j-1")))
            if dice.random() < 0.3:
                await asyncio.sleep(dice.uniform(0, 90))
                task.cancel()
            try:
                done = await task
            except (RunComfyError, asyncio.CancelledError) as raised:
                error = raised
            else:
                assert set(done.outputs) == {"flux", "mesh"}
        cancels = [call for call in deployment.calls if call.path.endswith("/cancel")]
        await asyncio.sleep(2)

        assert len(deployment.requests) <= 1
        if error is None:
            assert kept(tmp_path / "out") == {"flux.png", "mesh.glb", "manifest.json"}
        else:
            assert kept(tmp_path / "out") == set()
        # What still runs is either not known to us, or was asked to end while RunComfy heard nothing.
        if deployment.going_on:
            assert isinstance(error, RequestUnclear | asyncio.CancelledError) or cancels, repr(error)
