"""The emulated ComfyUI's nodes through the server: what a workflow draws, builds and saves, and how it fails."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

from runcomfy.testing.drawn import Gltf, ball, pixels, ramp
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.nodes import NODE_CLASSES
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec
from runcomfy.testing.emulators.comfyui.nodes.values import EMULATION_NOTE, Images, Masks

ROOT = Path(__file__).parents[1]
GRAPH: dict[str, Any] = json.loads((ROOT / "workflows" / "generate_flux_mesh.json").read_text(encoding="utf-8"))


# --- values as text ---------------------------------------------------------------------------------------


def test_pictures_in_error_messages_read_like_tensors() -> None:
    small = str(Images((Image.new("RGB", (2, 1), (0, 0, 3)),)))
    assert small == "tensor([[[[0.0000, 0.0000, 0.0118],\n          [0.0000, 0.0000, 0.0118]]]])"
    large = str(Images((Image.new("RGB", (64, 64), (11, 191, 119)),) * 6))
    rows = large.splitlines()
    assert rows[0] == "tensor([[[[0.0431, 0.7490, 0.4667],"
    assert rows[3] == "          ...,"
    assert len(large) < 20_000
    assert str(Masks((Image.new("L", (2, 2), 255),))) == "tensor([[[1., 1.],\n         [1., 1.]]])"


# --- the class list ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NODE_CLASSES))
def test_every_class_declares_inputs_that_its_own_defaults_satisfy(name: str, tmp_path: Path) -> None:
    node = NODE_CLASSES[name]
    spec = node.inputs if isinstance(node.inputs, InputSpec) else None
    json.dumps([node.outputs, node.output_names, dict(node.extra_info)])
    assert not node.output_names or len(node.output_names) == len(node.outputs)
    for declared in ({} if spec is None else {**spec.required, **spec.optional}).values():
        json.dumps(list(declared))
        options: Mapping[str, Any] = declared[1] if len(declared) > 1 else {}
        default = options.get("default")
        if default is not None and "min" in options:
            assert options["min"] <= default <= options["max"]
        if default is not None and isinstance(declared[0], list | tuple):
            assert default in declared[0]


# --- through the server -----------------------------------------------------------------------------------


class Session:
    """One prompt on the emulated server, watched to its end."""

    def __init__(self, server: ComfyUIEmulator, http: aiohttp.ClientSession) -> None:
        self._server, self._http = server, http
        self.messages: list[dict[str, Any]] = []
        self.previews: list[bytes] = []

    async def run(self, graph: Mapping[str, Any]) -> dict[str, Any]:
        """Return the prompt's history entry."""
        prompt_id = str(uuid.uuid4())
        async with self._http.ws_connect(f"{self._server.url}/ws?clientId=c", max_msg_size=0) as socket:
            body = {"prompt": graph, "client_id": "c", "prompt_id": prompt_id}
            async with self._http.post(f"{self._server.url}/prompt", json=body) as answer:
                assert answer.status == 200, await answer.text()
                assert (await answer.json())["node_errors"] == {}
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    self.previews.append(message.data)
                    continue
                self.messages.append(json.loads(message.data))
                data = self.messages[-1]["data"]
                if self.messages[-1]["type"] == "executing" and data["node"] is None:
                    break
        async with self._http.get(f"{self._server.url}/history/{prompt_id}") as answer:
            entry: dict[str, Any] = (await answer.json())[prompt_id]
        return entry

    async def file(self, reference: Mapping[str, str]) -> bytes:
        async with self._http.get(f"{self._server.url}/view", params=dict(reference)) as answer:
            assert answer.status == 200
            return await answer.read()

    async def upload(self, name: str, data: bytes) -> None:
        form = aiohttp.FormData()
        form.add_field("image", data, filename=name)
        async with self._http.post(f"{self._server.url}/upload/image", data=form) as answer:
            assert (await answer.json())["name"] == name


def png(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()


def flux_graph(seed: int = 1, mesh_seed: int = 1, **prompt: str) -> dict[str, Any]:
    graph: dict[str, Any] = json.loads(json.dumps(GRAPH))
    graph["3"]["inputs"]["noise_seed"] = seed
    graph["32"]["inputs"]["seed"] = mesh_seed
    graph["34"]["inputs"] |= prompt
    return graph


async def flux_results(picture: Image.Image, graph: dict[str, Any]) -> tuple[bytes, bytes, Session]:
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        session = Session(server, http)
        await session.upload("render.png", png(picture))
        entry = await session.run(graph)
        assert entry["status"]["status_str"] == "success"
        image = await session.file(entry["outputs"]["24"]["images"][0])
        mesh = await session.file(entry["outputs"]["33"]["3d"][0])
        return image, mesh, session


async def test_generate_flux_mesh_delivers_a_cut_out_picture_and_a_mesh_with_progress(looptime: Any) -> None:
    image, mesh, session = await flux_results(ball(), flux_graph())

    with Image.open(io.BytesIO(image)) as picture:
        assert (picture.size, picture.mode) == ((512, 512), "RGBA")
        picture.load()
        assert picture.info["emulator"] == EMULATION_NOTE
        assert json.loads(picture.info["prompt"])["24"]["class_type"] == "SaveImage"
        assert picture.getchannel("A").getextrema() == (0, 255)
    read = Gltf(mesh)
    read.check()
    assert "no GPU model ran" in read.document["asset"]["generator"]
    assert read.document["asset"]["extras"]["emulator"] == EMULATION_NOTE
    steps = Counter(m["data"]["node"] for m in session.messages if m["type"] == "progress")
    assert steps["3"] == 20
    assert 2 <= steps["32"] <= 50
    assert len(session.previews) == 20
    assert 3 < looptime < 8


async def test_the_same_seeds_give_the_same_bytes_on_another_server() -> None:
    first = await flux_results(ball(), flux_graph(seed=2**64 - 1, mesh_seed=2**31 - 1))
    second = await flux_results(ball(), flux_graph(seed=2**64 - 1, mesh_seed=2**31 - 1))
    with Image.open(io.BytesIO(first[0])) as one, Image.open(io.BytesIO(second[0])) as other:
        assert pixels(one) == pixels(other)
    assert first[1] == second[1]


async def test_another_picture_prompt_or_seed_gives_another_picture_and_mesh() -> None:
    cases = [
        (ball(), flux_graph()),
        (ramp(), flux_graph()),
        (ball(), flux_graph(seed=2)),
        (ball(), flux_graph(clip_l="a porcelain cat", t5xxl="a porcelain cat")),
    ]
    results = [await flux_results(*case) for case in cases]
    binaries = {hashlib.sha256(mesh[20 + struct.unpack_from("<I", mesh, 12)[0] :]).digest() for _, mesh, _ in results}
    assert len(binaries) == len(cases)
    shown = set()
    for image, _, _ in results:
        with Image.open(io.BytesIO(image)) as picture:
            shown.add(pixels(picture))
    assert len(shown) == len(cases)


async def test_a_model_that_the_machine_lacks_is_refused() -> None:
    graph = flux_graph()
    graph["10"]["inputs"]["unet_name"] = "flux2-dev.safetensors"
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        await Session(server, http).upload("render.png", png(ball()))
        async with http.post(f"{server.url}/prompt", json={"prompt": graph}) as answer:
            assert answer.status == 400
            errors = (await answer.json())["node_errors"]["10"]["errors"]
    assert [error["type"] for error in errors] == ["value_not_in_list"]
    assert "flux1-dev-fp8.safetensors" in errors[0]["details"]


TEXT_TO_IMAGE: dict[str, Any] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}},
    "2": {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["1", 0],
            "clip": ["1", 1],
            "lora_name": "lcm_lora_sdxl.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
        },
    },
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a golden lantern", "clip": ["2", 1]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["2", 1]}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 384, "height": 256, "batch_size": 2}},
    "6": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["2", 0],
            "seed": 5,
            "steps": 4,
            "cfg": 1.8,
            "sampler_name": "lcm",
            "scheduler": "sgm_uniform",
            "positive": ["3", 0],
            "negative": ["4", 0],
            "latent_image": ["5", 0],
            "denoise": 1.0,
        },
    },
    "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
    "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "lantern"}},
}


async def test_an_ordinary_text_to_image_workflow_runs() -> None:
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        session = Session(server, http)
        entry = await session.run(TEXT_TO_IMAGE)
        files = [await session.file(one) for one in entry["outputs"]["8"]["images"]]
    seen = set()
    for data in files:
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (384, 256)
            seen.add(pixels(picture))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("kind", "type_name", "words"),
    [
        ("error", "RuntimeError", "broken on purpose"),
        ("oom", "torch.OutOfMemoryError", "CUDA out of memory"),
        ("cuda", "torch.AcceleratorError", "CUDA error"),
    ],
)
async def test_failures_carry_the_names_that_real_ones_have(kind: str, type_name: str, words: str) -> None:
    inputs = {"message": "broken on purpose", "kind": kind, "steps": 4, "at_step": 2}
    graph = {
        "1": {"class_type": "EmulatorFail", "inputs": inputs},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        session = Session(server, http)
        entry = await session.run(graph)
    assert entry["status"]["status_str"] == "error"
    (error,) = [message["data"] for message in session.messages if message["type"] == "execution_error"]
    assert error["exception_type"] == type_name
    assert words in error["exception_message"]
    steps = [m["data"]["value"] for m in session.messages if m["type"] == "progress"]
    assert steps[-1] == 2


async def test_a_delay_takes_its_time_in_its_steps(looptime: Any) -> None:
    inputs = {"seconds": 600.0, "steps": 10, "previews": True, "seed": 1}
    graph = {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "late"}},
    }
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        session = Session(server, http)
        entry = await session.run(graph)
    assert entry["status"]["completed"]
    assert len(session.previews) == 10
    assert 600 <= looptime < 610


async def test_what_is_no_picture_fails_where_it_is_loaded() -> None:
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "notes.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        session = Session(server, http)
        await session.upload("notes.png", b"not a picture")
        await session.run(graph)
    (error,) = [message["data"] for message in session.messages if message["type"] == "execution_error"]
    assert error["node_type"] == "LoadImage"
    assert "Invalid data" in error["exception_message"]


def saved_with(depth: str, space: str) -> dict[str, Any]:
    """An orange picture through SaveImageAdvanced."""
    save = {"images": ["1", 0], "filename_prefix": "deep", "format": "png"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 5, "height": 3, "batch_size": 1, "color": 0xFF8000}},
        "2": {
            "class_type": "SaveImageAdvanced",
            "inputs": save | {"format.bit_depth": depth, "format.input_color_space": space},
        },
    }


@pytest.mark.parametrize(("space", "green"), [("sRGB", 128 * 257), ("linear", round(65535 * 0.7366))])
async def test_pictures_are_saved_in_the_depth_and_colour_space_that_were_asked_for(space: str, green: int) -> None:
    async with ComfyUIEmulator() as server, aiohttp.ClientSession() as http:
        session = Session(server, http)
        files = {}
        for depth in ("8-bit", "16-bit"):
            entry = await session.run(saved_with(depth, space))
            files[depth] = await session.file(entry["outputs"]["2"]["images"][0])
    for data in files.values():
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            red, seen, blue = picture.convert("RGB").getpixel((2, 1))  # type: ignore[misc]
            assert (red, blue) == (255, 0)
            assert seen == pytest.approx(green / 257, abs=1)
            assert picture.info["emulator"] == EMULATION_NOTE
            assert json.loads(picture.info["prompt"])["2"]["class_type"] == "SaveImageAdvanced"
    assert [files[depth][24] for depth in ("8-bit", "16-bit")] == [8, 16]
    deep = files["16-bit"]
    start = deep.index(b"IDAT")
    lines = zlib.decompress(deep[start + 4 : start + 4 + struct.unpack_from(">I", deep, start - 4)[0]])
    assert len(lines) == 3 * (1 + 5 * 6)
    assert struct.unpack_from(">3H", lines, 1) == pytest.approx((65535, green, 0), abs=8)


# --- the example picture ----------------------------------------------------------------------------------


def test_the_example_picture_ships_with_the_package() -> None:
    shipped = ROOT / "runcomfy" / "data" / "render.png"
    assert shipped.read_bytes() == (ROOT / "examples" / "render.png").read_bytes()


def test_the_example_picture_is_a_picture_worth_sending() -> None:
    path = ROOT / "examples" / "render.png"
    assert path.stat().st_size < 500_000
    with Image.open(path) as picture:
        assert (picture.size, picture.mode) == ((1024, 1024), "RGBA")
        alpha = picture.getchannel("A").histogram()
        assert 0.2 < alpha[255] / 1024**2 < 0.8
        assert picture.getpixel((0, 0)) == (0, 0, 0, 0)
