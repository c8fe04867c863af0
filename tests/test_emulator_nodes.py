"""What the emulated ComfyUI's nodes draw and build: the same for the same inputs, whole, and telling what it is."""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from runcomfy.adapters.media import inspect
from runcomfy.domain.job import OutputKind
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.nodes import NODE_CLASSES, meshes, pictures
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec
from runcomfy.testing.emulators.comfyui.nodes.flux_mesh import mesh_of
from runcomfy.testing.emulators.comfyui.nodes.values import EMULATION_NOTE, Images, Masks

ROOT = Path(__file__).parents[1]
PROMPT = "a helmet of dark-grey metal, bluish"
GRAPH: dict[str, Any] = json.loads((ROOT / "workflows" / "generate_flux_mesh.json").read_text(encoding="utf-8"))


# --- what the tests measure with --------------------------------------------------------------------------


def ramp(size: int = 128, *, rising: bool = True) -> Image.Image:
    """Dark on the left and bright on the right, or the other way round."""
    picture = Image.linear_gradient("L").resize((size, size)).rotate(90 if rising else -90)
    return picture.convert("RGB")


def ball(size: int = 256) -> Image.Image:
    picture = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(picture)
    for step in range(40):
        edge = size // 8 + step * size // 120
        draw.ellipse((edge, edge, size - edge, size - edge), fill=(60 + 4 * step,) * 3)
    return picture


def correlation(one: list[float], other: list[float]) -> float:
    mean_one, mean_other = math.fsum(one) / len(one), math.fsum(other) / len(other)
    spread = math.fsum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    own = math.fsum((a - mean_one) ** 2 for a in one) * math.fsum((b - mean_other) ** 2 for b in other)
    return spread / math.sqrt(own)


def brightness(picture: Image.Image, size: int = 48) -> list[float]:
    return [float(value) for value in picture.convert("RGB").convert("L").resize((size, size)).tobytes()]


def pixels(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()


COMPONENTS = {5121: ("B", 1), 5123: ("H", 2), 5125: ("I", 4), 5126: ("f", 4)}
PARTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


class Gltf:
    """A GLB file, read after the specification and checked as far as it goes."""

    def __init__(self, data: bytes) -> None:
        magic, version, length = struct.unpack_from("<4sII", data)
        assert (magic, version, length) == (b"glTF", 2, len(data))
        text_length, text_kind = struct.unpack_from("<I4s", data, 12)
        assert text_kind == b"JSON"
        assert text_length % 4 == 0
        self.document: dict[str, Any] = json.loads(data[20 : 20 + text_length])
        start = 20 + text_length
        length, kind = struct.unpack_from("<I4s", data, start)
        assert kind == b"BIN\0"
        assert length % 4 == 0
        assert start + 8 + length == len(data)
        self._binary = data[start + 8 :]
        (buffer,) = self.document["buffers"]
        assert 0 <= length - buffer["byteLength"] < 4
        assert self.document["asset"]["version"] == "2.0"
        (primitive,) = self.document["meshes"][0]["primitives"]
        assert primitive["mode"] == 4
        self.attributes: dict[str, list[tuple[float, ...]]] = {
            name: self._values(number, 34962) for name, number in primitive["attributes"].items()
        }
        accessor = self.document["accessors"][primitive["indices"]]
        assert accessor["componentType"] in (5123, 5125)
        assert accessor["type"] == "SCALAR"
        self.indices = [int(value[0]) for value in self._values(primitive["indices"], 34963)]

    def _values(self, number: int, target: int) -> list[tuple[float, ...]]:
        accessor = self.document["accessors"][number]
        view = self.document["bufferViews"][accessor["bufferView"]]
        form, width = COMPONENTS[accessor["componentType"]]
        parts = PARTS[accessor["type"]]
        assert view["target"] == target
        assert view["byteOffset"] % 4 == 0
        assert view["byteOffset"] + view["byteLength"] <= len(self._binary)
        assert view["byteLength"] == accessor["count"] * parts * width
        flat = struct.unpack_from(f"<{accessor['count'] * parts}{form}", self._binary, view["byteOffset"])
        values = _chunks(flat, parts)
        for name, pick in (("min", min), ("max", max)):
            if name in accessor:
                assert accessor[name] == [pick(value[axis] for value in values) for axis in range(parts)]
        return values

    @property
    def positions(self) -> list[tuple[float, ...]]:
        return self.attributes["POSITION"]

    def faces(self) -> list[tuple[int, int, int]]:
        return [(a, b, c) for a, b, c in _chunks(tuple(self.indices), 3)]

    def check(self) -> None:
        """Everything a viewer relies on."""
        accessor = self.document["accessors"][self.document["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
        assert "min" in accessor
        assert "max" in accessor
        count = len(self.positions)
        assert {len(values) for values in self.attributes.values()} == {count}
        assert len(self.indices) % 3 == 0
        assert max(self.indices) < count
        assert all(math.isfinite(value) for point in self.positions for value in point)
        for normal in self.attributes.get("NORMAL", []):
            assert math.isclose(math.hypot(*normal), 1.0, abs_tol=1e-4)

    def edges(self) -> Counter[tuple[tuple[float, ...], tuple[float, ...]]]:
        """How often each edge is walked in each direction, corners of equal place taken as one."""
        points = self.positions
        walked: Counter[tuple[tuple[float, ...], tuple[float, ...]]] = Counter()
        for face in self.faces():
            for a, b in zip(face, (*face[1:], face[0]), strict=True):
                walked[points[a], points[b]] += 1
        return walked


def _chunks(flat: tuple[Any, ...], size: int) -> list[tuple[Any, ...]]:
    return [flat[i : i + size] for i in range(0, len(flat), size)]


# --- pictures ---------------------------------------------------------------------------------------------


def test_equal_inputs_give_equal_pixels_and_any_other_input_gives_others() -> None:
    depth = pictures.depth_map(ball())
    first = pixels(pictures.render(depth, PROMPT, 7, 20, 256, 256))
    others = [
        pictures.render(depth, PROMPT, 8, 20, 256, 256),
        pictures.render(depth, "a porcelain cat", 7, 20, 256, 256),
        pictures.render(pictures.depth_map(ramp()), PROMPT, 7, 20, 256, 256),
        pictures.render(None, PROMPT, 7, 20, 256, 256),
        pictures.render(depth, PROMPT, 2**64 - 1, 20, 256, 256),
    ]
    assert pixels(pictures.render(pictures.depth_map(ball()), PROMPT, 7, 20, 256, 256)) == first
    assert len({first, *map(pixels, others)}) == len(others) + 1


@pytest.mark.parametrize("source", [ramp(), ramp(rising=False), ball(), ball().transpose(Image.Transpose.ROTATE_90)])
@pytest.mark.parametrize("seed", [0, 370878235997533])
def test_what_is_bright_in_the_input_is_bright_in_the_drawn_picture_and_high_in_the_mesh(
    source: Image.Image, seed: int
) -> None:
    drawn = pictures.render(pictures.depth_map(source), PROMPT, seed, 20, 512, 512, 0.86)
    cut = pictures.without_background(drawn)
    heights = meshes.heights_of(cut, 48, 48)
    assert correlation(brightness(source), brightness(drawn)) > 0.85
    assert correlation(brightness(source), heights) > 0.85


def test_a_colour_that_the_prompt_names_is_the_colour_of_the_picture() -> None:
    def tint(prompt: str) -> tuple[float, float, float]:
        drawn = pictures.render(pictures.depth_map(ball()), prompt, 3, 20, 128, 128)
        red, green, blue = (sum(band.tobytes()) for band in drawn.split())
        return red, green, blue

    red, _, blue = tint("a crimson mask")
    assert red > 1.15 * blue
    red, _, blue = tint("a blue mask")
    assert blue > 1.15 * red


def test_the_background_is_what_the_border_reaches_not_dark_places_inside() -> None:
    picture = Image.new("RGB", (256, 256), (8, 8, 10))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 40, 216, 216), fill=(170, 170, 180))
    draw.ellipse((110, 110, 146, 146), fill=(8, 8, 10))
    alpha = pictures.without_background(picture).getchannel("A")
    assert alpha.getpixel((4, 4)) == 0
    assert alpha.getpixel((70, 128)) == 255
    assert alpha.getpixel((128, 128)) == 255


def test_a_picture_that_is_dark_all_over_keeps_its_subject() -> None:
    cut = pictures.without_background(Image.new("RGB", (64, 64), (5, 5, 5)))
    assert cut.getchannel("A").getextrema() == (255, 255)


def test_previews_come_out_of_the_noise() -> None:
    final = pictures.render(pictures.depth_map(ball()), PROMPT, 7, 20, 512, 512)
    goal = brightness(final)
    near = [correlation(goal, brightness(pictures.preview_frame(final, 7, step, 20))) for step in (1, 10, 20)]
    assert near == sorted(near)
    assert near[0] < 0.9 < 0.97 < near[-1]
    assert max(pictures.preview_frame(final, 7, 1, 20).size) == pictures.PREVIEW_SIZE


@settings(max_examples=15)
@given(width=st.integers(1, 300), height=st.integers(1, 300), mode=st.sampled_from(["RGB", "RGBA", "L", "1", "P"]))
def test_depth_takes_any_picture(width: int, height: int, mode: str) -> None:
    depth = pictures.depth_map(Image.new(mode, (width, height)), 64)
    assert depth.mode == "RGB"
    assert all(side % 64 == 0 for side in depth.size)


# --- meshes -----------------------------------------------------------------------------------------------


def test_a_relief_is_a_closed_solid_that_viewers_can_open() -> None:
    mesh = Gltf(meshes.glb(meshes.relief(ball(), longest=40, noise=bytes(range(64)))))
    mesh.check()
    edges = mesh.edges()
    # Closed and facing outward: every edge is walked once in each direction.
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)
    volume = math.fsum(_signed_volume(*(mesh.positions[i] for i in face)) for face in mesh.faces())
    assert volume > 0.1


def _signed_volume(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> float:
    cross = (b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0])
    return (a[0] * cross[0] + a[1] * cross[1] + a[2] * cross[2]) / 6


@pytest.mark.parametrize("rising", [True, False])
def test_heights_of_the_saved_mesh_follow_the_picture(rising: bool) -> None:
    mesh = Gltf(meshes.glb(mesh_of(ramp(rising=rising), 5, grid_res=384, most_faces=None)))
    front = [point for point, normal in zip(mesh.positions, mesh.attributes["NORMAL"], strict=True) if normal[2] > 0]
    slope = correlation([point[0] for point in front], [point[2] for point in front])
    assert slope > 0.99 if rising else slope < -0.99


def test_two_pictures_or_two_seeds_give_two_meshes_and_equal_ones_equal_bytes() -> None:
    def made(picture: Image.Image, seed: int) -> bytes:
        return meshes.glb(mesh_of(picture, seed, grid_res=256, most_faces=None))

    assert made(ball(), 1) == made(ball(), 1)
    assert len({made(ball(), 1), made(ball(), 2), made(ramp(), 1)}) == 3


def test_many_vertices_take_long_indices_and_few_take_short_ones() -> None:
    large = Gltf(meshes.glb(meshes.relief(ball(512), longest=260)))
    large.check()
    assert large.document["accessors"][-1]["componentType"] == 5125
    assert Gltf(meshes.glb(meshes.cube())).document["accessors"][-1]["componentType"] == 5123


def test_simplified_meshes_stay_below_the_asked_number_of_faces() -> None:
    for most in (1000, 5000, 20000):
        assert mesh_of(ball(), 0, grid_res=384, most_faces=most).faces <= most


def test_colours_of_the_mesh_are_those_of_the_picture_in_linear_light() -> None:
    picture = Image.new("RGB", (32, 32), (255, 128, 0))
    colours = Gltf(meshes.glb(meshes.relief(picture, longest=8))).attributes["COLOR_0"]
    red, green, blue, alpha = colours[0]
    assert (red, blue, alpha) == (65535, 0, 65535)
    assert green / 65535 == pytest.approx(0.2158, abs=0.001)


@settings(max_examples=20)
@given(width=st.integers(1, 90), height=st.integers(1, 90), longest=st.integers(8, 40))
def test_pictures_of_any_shape_become_whole_meshes(width: int, height: int, longest: int) -> None:
    mesh = Gltf(meshes.glb(meshes.relief(Image.new("RGB", (width, height), (90, 90, 90)), longest=longest)))
    mesh.check()
    edges = mesh.edges()
    assert all(edges[b, a] == count for (a, b), count in edges.items())


@pytest.mark.parametrize("mesh", [meshes.cube(2.0), meshes.voxel_ball(12)])
def test_other_shapes_are_closed_and_face_outward(mesh: meshes.Mesh) -> None:
    read = Gltf(meshes.glb(mesh))
    read.check()
    edges = read.edges()
    assert all(edges[b, a] == count for (a, b), count in edges.items())
    assert math.fsum(_signed_volume(*(read.positions[i] for i in face)) for face in read.faces()) > 0


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


def test_the_mesh_passes_the_check_that_results_go_through(tmp_path: Path) -> None:
    path = tmp_path / "relief.glb"
    mesh = mesh_of(ball(), 5, grid_res=384, most_faces=None)
    path.write_bytes(meshes.glb(mesh))
    found = inspect(path, max_pixels=1, expected=OutputKind.MESH)
    assert found.mime == "model/gltf-binary"
    assert (found.details["vertices"], found.details["triangles"]) == (mesh.vertices, mesh.faces)


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
