"""CONJURE's serverless mode: its client and its service, on an emulated deployment of its workflow."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from launcher.conjure.engine import DirectEngine, close_engines
from launcher.conjure.serverless import ServerlessGenerationService
from launcher.generation_services import get_generation_service
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import (
    DeploymentUnusable,
    GpuOutOfMemory,
    InputFileInvalid,
    JobTimeout,
    OutputMissing,
    RequestNotFound,
)
from runcomfy.serverless_client import RequestStatus, ServerlessRequest, ServerlessRunComfyClient
from runcomfy.serverless_service import ServerlessRunComfyService
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.in_thread import InThread, served

FLUX = Path("data/generated_images/flux/flux.png")
MESH = Path("data/generated_models/partpacker_results/partpacker_result_0.glb")
RENDER = Path("data/generated_images/gestureCamera/render.png")
PROMPT = Path("data/generated_text/userPrompt.txt")
UNIFIED_KEYS = {
    "success",
    "request_id",
    "flux_image_path",
    "mesh_model_path",
    "seed_used",
    "steps_flux",
    "steps_partpacker",
    "generation_mode",
}


def content(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest_asyncio.fixture
async def deployment(
    clock: LoopClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ServerlessEmulator]:
    async with ServerlessEmulator(now=clock.now, folder=tmp_path / "cloud") as emulator:
        for name, value in emulator.environment().items():
            monkeypatch.setenv(name, value)
        yield emulator


@pytest_asyncio.fixture
async def service(
    deployment: ServerlessEmulator, clock: LoopClock, project: Path
) -> AsyncIterator[ServerlessGenerationService]:
    async with App(clock=clock) as app:
        yield ServerlessGenerationService(DirectEngine(app))


# --- the service ------------------------------------------------------------------------------------------------


async def test_picture_and_mesh_in_one_request_from_the_users_own_files(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    render, prompt = content(RENDER), content(PROMPT)

    made = await service.a_generate_flux_mesh_unified(seed=11)

    assert made["success"] is True
    assert made.keys() >= UNIFIED_KEYS
    assert (made["flux_image_path"], made["mesh_model_path"]) == (str(FLUX), str(MESH))
    assert (made["seed_used"], made["steps_flux"], made["steps_partpacker"]) == (11, 20, 50)
    assert made["generation_mode"] == "serverless"
    assert made["request_id"] in deployment.requests
    assert content(MESH)[:4] == b"glTF"
    with Image.open(FLUX) as picture:
        assert picture.format == "PNG"
    (ran,) = deployment.run_log
    assert set(ran.overrides) == {"16", "40", "41", "42"}
    values = {node: change["inputs"].get("value") for node, change in ran.overrides.items()}
    assert values == {"16": None, "40": "", "41": "a bronze statue", "42": 11}
    assert ran.overrides["16"]["inputs"]["image"].startswith("data:image/png;base64,")
    assert (content(RENDER), content(PROMPT)) == (render, prompt)


async def test_the_cost_is_told_as_an_estimate_that_the_bill_lies_within(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    made = await service.a_generate_flux_mesh_unified()
    await asyncio.sleep(120)  # the instance is kept warm for a minute
    assert not deployment.billing
    estimate = made["cost_estimate"]
    assert estimate["estimate"] is True
    assert made["cost"] == float(estimate["usd"])
    low, high = float(estimate["low_usd"]), float(estimate["high_usd"])
    assert 0 < low < made["cost"] < high
    assert low < float(deployment.total_usd) <= high * 1.02  # what the fetching of results took comes on top


async def test_a_picture_over_a_depth_keeps_its_mesh_for_the_next_call(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    picture = await service.a_generate_flux_depth_image(
        str(RENDER),
        "a cat",
        7,
        randomize_seed=False,
        width=1024,
        height=1024,
        guidance_scale=10,
        num_inference_steps=28,
    )
    mesh = await service.a_generate_3d_model(picture["image_path"], 7, num_steps=50, cfg_scale=7, grid_res=384)
    assert (picture["image_path"], picture["seed_used"]) == (str(FLUX), 7)
    assert (mesh["model_path"], mesh["seed_used"], mesh["cost"], mesh["reused"]) == (str(MESH), 7, 0.0, True)
    (ran,) = deployment.run_log
    assert ran.graph["44"]["inputs"]["value"] == 28
    assert ran.graph["6"]["inputs"] == {"width": 1024, "height": 1024, "batch_size": 1}
    assert ran.graph["34"]["inputs"]["guidance"] == 10
    assert ran.graph["3"]["inputs"]["steps"] == ["44", 0]


async def test_a_mesh_of_a_picture_that_no_run_has_made_is_made_from_that_picture_alone(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    made = await service.a_generate_3d_model(str(RENDER), 5)
    assert (made["model_path"], made["seed_used"], made["reused"]) == (str(MESH), 5, False)
    (ran,) = deployment.run_log
    assert ran.graph["32"]["inputs"]["seed"] == 5
    assert "3" not in ran.graph
    assert content(PROMPT) == b"a bronze statue\n"


async def test_a_picture_from_words_needs_no_render(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    made = await service.a_generate_flux_image("a cat", 3, randomize_seed=False, num_inference_steps=4)
    assert (made["image_path"], made["seed_used"], made["generation_mode"]) == (str(FLUX), 3, "serverless")
    (ran,) = deployment.run_log
    assert ran.graph["34"]["inputs"]["t5xxl"] == "a cat"
    assert ran.graph["3"]["inputs"]["noise_seed"] == 3
    assert "16" not in ran.graph


async def test_steps_are_sent_where_they_are_not_the_workflows_own(
    deployment: ServerlessEmulator, clock: LoopClock, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNCOMFY_DEFAULT_STEPS_PARTPACKER", "30")
    async with App(clock=clock) as app:
        made = await ServerlessGenerationService(DirectEngine(app)).a_generate_flux_mesh_unified(steps_flux=8)
    assert (made["steps_flux"], made["steps_partpacker"]) == (8, 30)
    (ran,) = deployment.run_log
    assert (ran.graph["44"]["inputs"]["value"], ran.graph["43"]["inputs"]["value"]) == (8, 30)


async def test_a_failed_request_says_why_and_which_one(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    write(FLUX, b"of an earlier run")
    deployment.next_request(fails=10011, words="node 3: CUDA out of memory")
    made = await service.a_generate_flux_mesh_unified()
    assert made["success"] is False
    assert "CUDA out of memory" in made["error"]
    assert "10011" in made["error"]
    assert made["generation_mode"] == "serverless"
    assert made["request_id"] == deployment.run_log[0].request_id
    assert content(FLUX) == b"of an earlier run"
    deployment.next_request(fails=10011, words="node 3: CUDA out of memory")
    with pytest.raises(GpuOutOfMemory):
        await service.a_generate_flux_depth_image(str(RENDER), "a cat", 7)


async def test_the_same_call_twice_at_once_is_one_request(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    first, second = await asyncio.gather(
        service.a_generate_flux_mesh_unified(seed=1), service.a_generate_flux_mesh_unified(seed=1)
    )
    assert first == second
    assert len(deployment.requests) == 1


async def test_a_caller_that_stops_cancels_its_request(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    call = asyncio.create_task(service.a_generate_flux_mesh_unified())
    await asyncio.sleep(30)
    assert len(deployment.going_on) == 1
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    assert not deployment.going_on


async def test_a_request_that_takes_too_long_is_cancelled(
    deployment: ServerlessEmulator, clock: LoopClock, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNCOMFY_REQUEST_TIMEOUT", "600")
    deployment.next_request(never_ends=True)
    async with App(clock=clock) as app:
        made = await ServerlessGenerationService(DirectEngine(app)).a_generate_flux_mesh_unified()
    await asyncio.sleep(2)
    assert made["success"] is False
    assert made["error_code"] == JobTimeout.code
    assert made["status"] == "in_progress"
    assert not deployment.going_on


@pytest.mark.parametrize(
    ("missing", "word"),
    [("RUNCOMFY_DEPLOYMENT_ID", "RUNCOMFY_DEPLOYMENT_ID"), ("RUNCOMFY_API_TOKEN", "RUNCOMFY_API_TOKEN")],
)
async def test_it_says_why_it_is_not_available(
    deployment: ServerlessEmulator,
    clock: LoopClock,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    word: str,
) -> None:
    monkeypatch.delenv(missing)
    async with App(clock=clock) as app:
        service = ServerlessGenerationService(DirectEngine(app))
        able, why = service.availability()
        assert (able, service.is_available()) == (False, False)
        assert word in why
        made = await service.a_generate_flux_mesh_unified()
    assert made["success"] is False
    assert word in made["error"]
    assert not deployment.calls


async def test_it_is_available_with_a_deployment_and_a_token(service: ServerlessGenerationService) -> None:
    assert service.availability() == (True, "")


def test_the_factory_and_the_door_name_the_service(project: Path) -> None:
    assert type(get_generation_service("serverless")) is ServerlessGenerationService
    assert issubclass(ServerlessRunComfyService, ServerlessGenerationService)


@pytest.fixture
def running(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InThread[ServerlessEmulator]]:
    """A quick deployment with a loop of its own, in the variables of this process."""

    def make() -> ServerlessEmulator:
        return ServerlessEmulator(cold_start=0.05, comfyui_speed=10_000, folder=tmp_path / "cloud")

    with served(make) as emulator:
        for name, value in emulator.emulator.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RUNCOMFY_POLL_INTERVAL", "0.1s")
        monkeypatch.setenv("RUNCOMFY_REQUESTS_PER_SECOND", "1000")
        monkeypatch.setenv("RUNCOMFY_BURST", "1000")
        try:
            yield emulator
        finally:
            close_engines()


def test_a_synchronous_call_without_a_running_loop(running: InThread[ServerlessEmulator]) -> None:
    made = ServerlessRunComfyService().generate_flux_mesh_unified("a cat", str(RENDER), 5)
    assert made["success"] is True, made
    assert made["seed_used"] == 5
    assert content(MESH)[:4] == b"glTF"


def test_a_synchronous_call_from_a_thread_whose_loop_runs(running: InThread[ServerlessEmulator]) -> None:
    found: list[dict[str, Any]] = []

    def caller() -> None:
        async def handler() -> None:
            found.append(ServerlessRunComfyService().generate_flux_depth_image(str(RENDER), "a cat", 5))

        asyncio.run(handler())

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join(60)
    assert found
    assert found[0]["success"] is True
    assert FLUX.exists()


# --- the client ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(deployment: ServerlessEmulator, clock: LoopClock, project: Path) -> ServerlessRunComfyClient:
    return ServerlessRunComfyClient(clock=clock)


def test_the_names_and_fields_that_conjure_reads() -> None:
    assert {status.name: status.value for status in RequestStatus} == {
        "IN_QUEUE": "in_queue",
        "IN_PROGRESS": "in_progress",
        "COMPLETED": "completed",
        "SUCCEEDED": "succeeded",
        "FAILED": "failed",
        "CANCELED": "canceled",
    }
    assert [field.name for field in fields(ServerlessRequest)] == [
        "request_id",
        "deployment_id",
        "status",
        "queue_position",
        "outputs",
        "error_message",
        "created_at",
        "finished_at",
        "cost_estimate",
    ]


async def test_submit_wait_and_download_as_conjure_does(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator, tmp_path: Path
) -> None:
    request = await client.submit_request("a cat", str(RENDER), seed=9)
    assert (request.status, request.deployment_id) == (RequestStatus.IN_QUEUE, deployment.deployment_id)
    seen = await client.get_request_status(request.request_id)
    assert (seen.status, seen.queue_position) == (RequestStatus.IN_QUEUE, 0)

    done = await client.wait_for_completion(request.request_id)
    assert done.status is RequestStatus.SUCCEEDED
    assert done.outputs is not None
    assert set(done.outputs) == {"24", "33"}
    assert done.cost_estimate is not None
    assert done.cost_estimate > 0
    assert done.error_message is None
    assert done.finished_at is not None
    assert done.created_at is not None
    assert done.finished_at > done.created_at

    files = await client.download_outputs(done, tmp_path / "results")
    assert set(files) == {"flux_image", "mesh_model"}
    assert content(files["mesh_model"])[:4] == b"glTF"
    assert sorted(entry.name for entry in (tmp_path / "results").iterdir()) == ["flux.png", "partpacker_result_0.glb"]
    again = await client.get_request_result(request.request_id)
    assert (again.status, again.outputs) == (RequestStatus.SUCCEEDED, done.outputs)


@pytest.mark.parametrize("channel", ["3d", "files", "mesh", "result_files"])
async def test_a_mesh_is_found_under_whatever_list_it_stands(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator, tmp_path: Path, channel: str
) -> None:
    deployment.next_request(channel=channel)
    request = await client.submit_request("a cat", RENDER)
    done = await client.wait_for_completion(request.request_id)
    assert "mesh_model" in await client.download_outputs(done, tmp_path / "results")


async def test_a_result_that_is_missing_is_left_out(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator, tmp_path: Path
) -> None:
    deployment.next_request(only=("24",))
    request = await client.submit_request("a cat", RENDER)
    done = await client.wait_for_completion(request.request_id)
    assert set(await client.download_outputs(done, tmp_path / "results")) == {"flux_image"}


async def test_a_wait_that_is_too_short_is_a_timeout_and_ends_the_request(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator
) -> None:
    request = await client.submit_request("a cat", RENDER)
    with pytest.raises(TimeoutError) as caught:
        await client.wait_for_completion(request.request_id, timeout=20)
    assert isinstance(caught.value, JobTimeout)
    assert not deployment.going_on


async def test_what_is_written_into_the_clients_attributes_counts_from_the_next_call_on(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator
) -> None:
    token, client.api_token = client.api_token, "00000000-1111-4222-8333-444444444444"
    assert client.headers["Authorization"].endswith(client.api_token)
    with pytest.raises(RuntimeError):
        await client.submit_request("a cat", str(RENDER), 5)
    client.api_token = token
    deployment.next_request(never_ends=True)
    asked = await client.submit_request("a cat", str(RENDER), 5)
    client.request_timeout, client.poll_interval = 30, 5
    began = asyncio.get_running_loop().time()
    with pytest.raises(TimeoutError):
        await client.wait_for_completion(asked.request_id)
    assert 30 <= asyncio.get_running_loop().time() - began < 90
    client.poll_interval = float("inf")
    assert client.is_available(), "how patient it is does not count"
    client.deployment_id = ""
    assert not client.is_available()


async def test_a_cancelled_request_says_so(client: ServerlessRunComfyClient, deployment: ServerlessEmulator) -> None:
    request = await client.submit_request("a cat", RENDER)
    assert await client.cancel_request(request.request_id) is True
    assert await client.cancel_request(request.request_id) is False
    done = await client.wait_for_completion(request.request_id)
    assert done.status is RequestStatus.CANCELED
    assert done.error_message is not None
    assert "cancelled" in done.error_message
    assert await client.cancel_request("no-such-request") is False


async def test_a_failed_request_is_returned_with_its_error(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator
) -> None:
    deployment.next_request(fails=10012)
    request = await client.submit_request("a cat", RENDER)
    done = await client.wait_for_completion(request.request_id)
    assert done.status is RequestStatus.FAILED
    assert done.error_message is not None
    assert "10012" in done.error_message


async def test_a_disabled_deployment_is_a_runtime_error_with_a_hint(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator
) -> None:
    deployment.gate = 10002
    with pytest.raises(RuntimeError) as caught:
        await client.submit_request("a cat", RENDER)
    assert isinstance(caught.value, DeploymentUnusable)
    assert "enable it" in caught.value.hint


def test_overrides_name_steps_only_where_they_differ(project: Path) -> None:
    client = ServerlessRunComfyClient()
    plain = client.build_conjure_overrides("a cat", str(RENDER))
    assert set(plain) == {"16", "40", "41", "42"}
    assert 1 <= plain["42"]["inputs"]["value"] <= 10**9
    other = client.build_conjure_overrides("a cat", str(RENDER), 5, steps_flux=30, steps_partpacker=60)
    assert other["43"] == {"inputs": {"value": 60}}
    assert other["44"] == {"inputs": {"value": 30}}


@pytest.mark.parametrize(
    ("prompt", "seed"), [(None, 5), (b"a cat", 5), ("a cat", True), ("a cat", -1), ("a cat", 2**80), ("a cat", "7")]
)
def test_what_no_request_can_hold_is_a_value_error(project: Path, prompt: Any, seed: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt is not a text|is not a whole number from 0 to"):
        ServerlessRunComfyClient().build_conjure_overrides(prompt, str(RENDER), seed)


@pytest.mark.parametrize("name", ["", "../../servers", "a b", "x" * 500])
async def test_what_cannot_be_the_id_of_a_request_is_not_asked_for(
    client: ServerlessRunComfyClient, deployment: ServerlessEmulator, name: str
) -> None:
    with pytest.raises(RequestNotFound, match="cannot be the id of a request"):
        await client.get_request_status(name)
    assert deployment.calls == []


def test_a_client_without_settings_is_there_but_not_available(project: Path) -> None:
    assert ServerlessRunComfyClient().is_available() is False


# --- the picture ----------------------------------------------------------------------------------------------------


def decoded(uri: str) -> Image.Image:
    kind, _, body = uri.partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_a_png_is_sent_as_it_is(project: Path) -> None:
    uri = ServerlessRunComfyClient().encode_image_to_base64(str(RENDER))
    assert base64.b64decode(uri.partition(",")[2]) == RENDER.read_bytes()


def test_a_large_png_is_packed_and_keeps_its_pixels(project: Path) -> None:
    picture = Image.radial_gradient("L").resize((900, 900)).convert("RGBA")
    picture.save(RENDER, compress_level=0)
    assert RENDER.stat().st_size > 256 * 1024
    uri = ServerlessRunComfyClient().encode_image_to_base64(RENDER)
    assert len(uri) < RENDER.stat().st_size / 4
    assert decoded(uri).tobytes() == picture.tobytes()


def test_another_format_becomes_png(project: Path) -> None:
    Image.new("RGB", (40, 30), (9, 8, 7)).save("photo.jpg")
    assert decoded(ServerlessRunComfyClient().encode_image_to_base64("photo.jpg")).size == (40, 30)


def test_a_picture_that_no_request_can_hold_is_refused_with_a_hint(project: Path) -> None:
    noise = Image.frombytes("RGB", (1800, 1500), random.Random(1).randbytes(1800 * 1500 * 3))
    noise.save(RENDER)
    with pytest.raises(InputFileInvalid) as caught:
        ServerlessRunComfyClient().encode_image_to_base64(RENDER)
    assert "256 KB" in caught.value.hint


def test_a_picture_that_is_missing_is_a_missing_file(project: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ServerlessRunComfyClient().encode_image_to_base64("nowhere.png")


async def test_the_same_request_again_brings_no_new_file_and_says_so(
    service: ServerlessGenerationService, deployment: ServerlessEmulator, project: Path
) -> None:
    await service.a_generate_flux_mesh_unified(seed=1)
    made = await service.a_generate_flux_mesh_unified(seed=1)
    assert made["success"] is False
    assert made["error_code"] == OutputMissing.code
    assert "another seed" in made["error"]
    assert len(deployment.run_log) == 2
