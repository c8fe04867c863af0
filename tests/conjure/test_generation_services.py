"""Generations as CONJURE asks for them: on an emulated cloud and an emulated ComfyUI, with the graphs that ship."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from launcher.conjure.engine import DirectEngine
from launcher.generation_services import CloudGenerationService
from runcomfy.bootstrap import App
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

FLUX = Path("data/generated_images/flux/flux.png")
MESH = Path("data/generated_models/partpacker_results/partpacker_result_0.glb")
RENDER = Path("data/generated_images/gestureCamera/render.png")
PROMPT = Path("data/generated_text/userPrompt.txt")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CONJURE's folder with the user's prompt and render in it."""
    root = tmp_path / "CONJURE"
    (root / RENDER).parent.mkdir(parents=True)
    picture = Image.radial_gradient("L").resize((128, 128)).convert("RGBA")
    picture.save(root / RENDER)
    (root / PROMPT).parent.mkdir(parents=True)
    (root / PROMPT).write_text("a bronze statue\n", encoding="utf-8")
    monkeypatch.chdir(root)
    return root


def content(path: Path) -> bytes:
    return path.read_bytes()


def prompts_of(cloud: RunComfyEmulator) -> list[Any]:
    servers = [machine.comfyui or machine.comfyui_was for machine in cloud.machines.values()]
    return [record for server in servers if isinstance(server, ComfyUIEmulator) for record in server.run_log]


@pytest_asyncio.fixture
async def cloud_engine(
    cloud: RunComfyEmulator, clock: LoopClock, project: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DirectEngine]:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    async with App(clock=clock) as app:
        yield DirectEngine(app)


async def test_a_picture_and_then_its_mesh_are_one_run_of_the_workflow(
    cloud_engine: DirectEngine, cloud: RunComfyEmulator, project: Path
) -> None:
    render = content(RENDER)
    service = CloudGenerationService(cloud_engine)

    picture = await service.a_generate_flux_depth_image(str(RENDER), "a bronze statue", 7)
    mesh = await service.a_generate_3d_model(picture["image_path"], picture["seed_used"])

    assert picture["success"] is True
    assert mesh["success"] is True
    assert (picture["image_path"], picture["seed_used"]) == (str(FLUX), 7)
    assert (mesh["model_path"], mesh["seed_used"]) == (str(MESH), 7)
    assert isinstance(picture["cost"], float)
    assert picture["cost"] > 0
    assert mesh["cost"] == 0.0
    assert len(prompts_of(cloud)) == 1
    assert content(MESH)[:4] == b"glTF"
    with Image.open(FLUX) as made:
        assert made.mode == "RGBA"
    assert content(RENDER) == render
    assert content(PROMPT) == b"a bronze statue\n"
