"""
The requests of CONJURE's own programs, byte for byte as their HTTP libraries send them, and what they read of answers.

`launcher/main.py` and the agents use httpx and requests, the Blender add-on urllib, the UI overlay requests.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

RENDER = "data/generated_images/gestureCamera/render.png"
FLUX = Path("data", "generated_images", "flux", "flux.png")
MESH = "data/generated_models/partpacker_results/partpacker_result_0.glb"

HTTPX = "Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nUser-Agent: python-httpx/0.27.0\r\n"
REQUESTS = (
    "User-Agent: python-requests/2.32.3\r\nAccept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\n"
)
URLLIB = "Accept-Encoding: identity\r\nUser-Agent: Python-urllib/3.11\r\nConnection: close\r\n"


async def sent(api: Any, request: str, headers: str, body: str | None = None) -> tuple[int, Any]:
    """Send the bytes of a request and return status and JSON of the answer."""
    host, port = api.base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = (body or "").encode()
    kind = "Content-Type: application/json\r\n" if body is not None else ""
    length = f"Content-Length: {len(raw)}\r\n" if request.startswith("POST") else ""
    writer.write(f"{request} HTTP/1.1\r\nHost: {host}:{port}\r\n{headers}{length}{kind}\r\n".encode() + raw)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    found = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
    answer = json.loads(await reader.readexactly(int(found["content-length"])))
    writer.close()
    await writer.wait_closed()
    return int(head.split(" ")[1]), answer


async def test_the_launchers_three_calls_in_local_and_cloud_mode(api: Any, own_comfyui: ComfyUIEmulator) -> None:
    depth = {
        "control_image_path": RENDER,
        "prompt": "ein Löwe aus Bronze",
        "seed": 1337,
        "randomize_seed": False,
        "width": 1024,
        "height": 1024,
        "guidance_scale": 10,
        "num_inference_steps": 28,
    }
    status, picture = await sent(api, "POST /flux/depth", HTTPX, json.dumps(depth))
    assert status == 200
    assert picture["success"] is True
    assert picture["data"]["seed_used"] == 1337
    assert FLUX.exists()  # noqa: ASYNC240 - the launcher reads the fixed path, not the answer
    mesh = {
        "image_path": "data/generated_images/flux/flux.png",
        "num_steps": 50,
        "cfg_scale": 7.0,
        "grid_res": 384,
        "seed": picture["data"]["seed_used"],
        "simplify_mesh": False,
        "target_num_faces": 100000,
    }
    status, model = await sent(api, "POST /partpacker/generate_3d", HTTPX, json.dumps(mesh))
    assert status == 200
    told = {"mesh_path": model["data"]["model_path"], "min_volume_threshold": 0.001}
    status, imported = await sent(api, "POST /blender/import_mesh", HTTPX, json.dumps(told))
    assert (status, imported["success"], imported["data"]) == (200, True, told)
    assert len(own_comfyui.run_log) == 1
    graph = own_comfyui.run_log[0].graph
    assert graph["34"]["inputs"]["clip_l"] == "ein Löwe aus Bronze"
    assert graph["6"]["inputs"] == {"width": 1024, "height": 1024, "batch_size": 1}


@pytest.mark.parametrize("headers", [HTTPX, REQUESTS])
async def test_the_unified_calls_have_no_body(api: Any, headers: str) -> None:
    status, made = await sent(api, "POST /local_comfyui/flux_mesh_unified", headers)
    assert (status, made["success"]) == (200, True)
    status, refused = await sent(api, "POST /serverless/flux_mesh_unified", headers)
    assert status == 503
    assert "serverless" in refused["detail"]


@pytest.mark.parametrize("headers", [HTTPX, URLLIB])
async def test_the_add_ons_button_imports_the_last_mesh(api: Any, conjure_project: Path, headers: str) -> None:
    target = conjure_project / MESH
    target.parent.mkdir(parents=True)
    target.write_bytes(b"glTF" + bytes(20))
    body = json.dumps({"mesh_path": MESH, "min_volume_threshold": 0.01})
    status, answer = await sent(api, "POST /blender/import_mesh", headers, body)
    assert (status, answer["success"], answer.get("error")) == (200, True, None)
    target.unlink()
    status, answer = await sent(api, "POST /blender/import_mesh", headers, body)
    assert status == 422
    assert isinstance(answer["detail"], str)


async def test_the_agents_fall_back_by_the_status(api: Any) -> None:
    instruction = json.dumps(
        {"instruction": {"tool_name": "spawn_primitive", "parameters": {"primitive_type": "Cube"}}}
    )
    status, _ = await sent(api, "POST /execute_instruction", HTTPX, instruction)
    assert status == 501  # the agent then calls its own InstructionManager
    said = json.dumps({"conversation_history": "User: a cube\nAgent: fine", "include_image": True})
    status, _ = await sent(api, "POST /process_conversation", REQUESTS, said)
    assert status == 501


async def test_the_overlay_shuts_everything_down(api: Any, conjure_project: Path) -> None:
    status, answer = await sent(api, "POST /shutdown", REQUESTS)
    assert (status, answer["status"]) == (200, "success")
    for _ in range(100):
        await asyncio.sleep(0.1)
    assert api.shut == [True]


async def test_what_conjures_own_tests_get(api: Any) -> None:
    status, health = await sent(api, "GET /health", REQUESTS)
    assert (status, health) == (200, {"status": "healthy", "service": "CONJURE API Server"})
    status, mode = await sent(api, "GET /mode", REQUESTS)
    assert status == 200
    assert {"generation_mode", "available_modes", "local_available", "cloud_available", "services"} <= set(mode)
    for service in mode["services"].values():
        assert {"available", "name", "description", "requirements"} <= set(service)
    status, state = await sent(api, "GET /state", HTTPX)
    assert (status, state["success"]) == (200, True)
    assert state["data"]["generation_mode"] == "local_comfyui"
