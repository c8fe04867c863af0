"""What the tests of requests to a serverless deployment are told with: an order for a picture and its mesh."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.config import load_settings
from runcomfy.application.serverless_run import ServerlessDone, ServerlessOrder, ServerlessRuns
from runcomfy.domain.job import JobId, OutputKind
from runcomfy.domain.serverless import Wanted
from runcomfy.domain.settings import Settings
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.samples import png

WANTED: Final = (
    Wanted("flux", "24", OutputKind.IMAGE, ("images",), "flux.png"),
    Wanted("mesh", "33", OutputKind.MESH, ("3d", "files"), "mesh.glb"),
)


def settings_at(deployment: ServerlessEmulator, folder: Path) -> Settings:
    """Return settings that point at a deployment; state and results go below the folder."""
    env = {**deployment.environment(), "RUNCOMFY_STATE_DIR": str(folder / "state")}
    loaded = load_settings(env=env, cwd=folder)
    return replace(loaded, files=replace(loaded.files, output_dir=str(folder / "out"), durable=False))


def data_uri() -> str:
    """Return a picture as it is sent within a request."""
    return "data:image/png;base64," + base64.b64encode(png()).decode()


def order(seed: int = 7, **options: Any) -> ServerlessOrder:
    """Return an order for a picture and its mesh."""
    overrides = {
        "16": {"inputs": {"image": data_uri()}},
        "40": {"inputs": {"value": ""}},
        "41": {"inputs": {"value": "a bronze statue"}},
        "42": {"inputs": {"value": seed}},
    }
    return ServerlessOrder(**{"wanted": WANTED, "overrides": overrides, **options})


async def run(runs: ServerlessRuns, **options: Any) -> ServerlessDone:
    """Order them, and wait for the end."""
    return await runs.run(order(**options), job_id=JobId("j-1"))


def content(path: str | Path) -> bytes:
    """Return what a file holds."""
    return Path(path).read_bytes()


def left(folder: Path) -> list[str]:
    """Return the name of every file below a folder."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
