"""CONJURE's endpoints in mode serverless: its callers' requests, an emulated deployment behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator

FLUX = Path("data/generated_images/flux/flux.png")
MESH = Path("data/generated_models/partpacker_results/partpacker_result_0.glb")
STATE = Path("data/input/state.json")
DEPTH = {
    "control_image_path": "data/generated_images/gestureCamera/render.png",
    "prompt": "a bronze statue",
    "seed": 7,
    "randomize_seed": False,
    "width": 1024,
    "height": 1024,
    "guidance_scale": 10,
    "num_inference_steps": 28,
}
"""What CONJURE's launcher sends."""


@pytest_asyncio.fixture
async def deployment(
    clock: LoopClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ServerlessEmulator]:
    async with ServerlessEmulator(
        now=clock.now, folder=tmp_path / "cloud", cold_start=20, comfyui_speed=10
    ) as emulator:
        for name, value in emulator.environment().items():
            monkeypatch.setenv(name, value)
        yield emulator


@pytest_asyncio.fixture
async def api(deployment: ServerlessEmulator, conjure_project: Path, serve: Callable[..., Any]) -> AsyncIterator[Any]:
    set_state(conjure_project, generation_mode="serverless")
    async with serve(where="server", api_base_url="http://127.0.0.1:9") as client:
        yield client


def set_state(root: Path, **state: Any) -> None:
    (root / STATE).write_text(json.dumps(state), encoding="utf-8")


def state_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / STATE).read_bytes())
    return found


def content(path: Path) -> bytes:
    return path.read_bytes()


async def test_the_unified_call_brings_both_files_and_has_blender_import_the_mesh(
    api: Any, deployment: ServerlessEmulator, conjure_project: Path
) -> None:
    assert (await api.get("/mode"))["serverless_available"] is True
    made = await api.post("/serverless/flux_mesh_unified")
    assert made["success"] is True
    assert made["data"]["request_id"] in deployment.requests
    assert (made["data"]["flux_image_path"], made["data"]["mesh_model_path"]) == (str(FLUX), str(MESH))
    assert made["data"]["generation_mode"] == "serverless"
    assert made["data"]["cost_estimate"]["estimate"] is True
    assert content(conjure_project / MESH)[:4] == b"glTF"
    told = {"command": "import_and_process_mesh", "mesh_path": str(MESH), "min_volume_threshold": 0.001}
    assert told.items() <= state_of(conjure_project).items()


async def test_the_debug_modes_three_calls_are_one_request(
    api: Any, deployment: ServerlessEmulator, conjure_project: Path
) -> None:
    picture = (await api.post("/flux/depth", DEPTH))["data"]
    assert (picture["image_path"], picture["seed_used"], picture["generation_mode"]) == (str(FLUX), 7, "serverless")
    asked = {"image_path": str(FLUX), "num_steps": 50, "cfg_scale": 7, "grid_res": 384, "seed": picture["seed_used"]}
    asked |= {"simplify_mesh": False, "target_num_faces": 100_000}
    mesh = (await api.post("/partpacker/generate_3d", asked))["data"]
    assert (mesh["model_path"], mesh["seed_used"]) == (str(MESH), 7)
    assert len(deployment.requests) == 1


async def test_a_caller_that_gives_up_loses_nothing(
    api: Any, deployment: ServerlessEmulator, conjure_project: Path
) -> None:
    patience = aiohttp.ClientTimeout(total=10)
    with pytest.raises(TimeoutError):
        async with api.http.post(f"{api.base}/serverless/flux_mesh_unified", timeout=patience):
            pytest.fail("a cold start takes longer")
    (request_id,) = deployment.requests
    going = (await api.get(f"/workflow/progress/{request_id}"))["data"]
    assert going["status"] in ("pending", "running")
    await asyncio.sleep(90)
    assert deployment.requests[request_id].state == "succeeded"
    assert content(conjure_project / MESH)[:4] == b"glTF"
    over = (await api.get(f"/workflow/progress/{request_id}"))["data"]
    assert (over["status"], over["overall_progress"]) == ("completed", 100.0)


async def test_what_runcomfy_refuses_is_told_in_its_words(api: Any, deployment: ServerlessEmulator) -> None:
    deployment.gate = 10001
    status, found, _ = await api.send("POST", "/serverless/flux_mesh_unified")
    assert status >= 500
    assert "10001" in found["detail"]
    assert "billing page" in found["detail"] + json.dumps(found["error"])


async def test_a_server_that_ends_cancels_what_it_submitted(
    deployment: ServerlessEmulator, conjure_project: Path, serve: Callable[..., Any]
) -> None:
    set_state(conjure_project, generation_mode="serverless")
    async with serve(where="server", api_base_url="http://127.0.0.1:9") as client:
        call = asyncio.create_task(client.send("POST", "/serverless/flux_mesh_unified"))
        await asyncio.sleep(10)
        assert len(deployment.going_on) == 1
    await asyncio.gather(call, return_exceptions=True)
    assert not deployment.going_on
