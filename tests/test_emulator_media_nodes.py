"""The emulated ComfyUI's text, video, sound and mesh nodes: they show what was recorded, and their files are whole."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runcomfy.adapters.media import inspect
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.nodes import media, mesh_nodes, text
from runcomfy.testing.emulators.comfyui.nodes.values import EMULATION_NOTE, Audio

RECORDING = Path(__file__).parent / "recordings" / "13-output-kinds.jsonl"
LIMIT = 1_000_000
Graph = dict[str, Any]


def recorded() -> list[tuple[str, Graph, dict[str, Any]]]:
    """(what is shown, graph, ui by node) for every prompt of the recording that ended well with something to show."""
    cases: list[tuple[str, Graph, dict[str, Any]]] = []
    note, graph = "", {}
    for line in RECORDING.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["dir"] == "note":
            note = event["text"]
        elif event["dir"] == "http-req" and event["path"] == "/prompt":
            graph = event["json"]["prompt"]
        elif event["dir"] == "http-res" and isinstance(event.get("json"), dict):
            entries = [one for one in event["json"].values() if isinstance(one, dict) and "prompt" in one]
            cases += [(note, graph, one["outputs"]) for one in entries if one.get("outputs")]
    return cases


CASES = recorded()


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def pictures(count: int = 3) -> Graph:
    return node("EmptyImage", width=48, height=32, batch_size=count, color=0x3366CC)


SOUND = node("EmptyAudio", duration=1.5, sample_rate=44100, channels=2)
BALL = {"1": node("ProbeVoxel", resolution=12), "2": node("VoxelToMesh", voxel=["1", 0], algorithm="basic")}
BALL["2"]["inputs"]["threshold"] = 0.6


class Client:
    """Runs graphs on the emulator and fetches what came out."""

    def __init__(self, http: aiohttp.ClientSession, folder: Path) -> None:
        self._http = http
        self._folder = folder

    async def run(self, graph: Graph, **extra_data: Any) -> dict[str, Any]:
        """Run to the end; return the history entry."""
        body = {"prompt": graph, "extra_data": extra_data, "client_id": "me"}
        async with self._http.ws_connect("/ws", params={"clientId": "me"}) as socket:
            async with self._http.post("/prompt", json=body) as response:
                assert response.status == 200, await response.text()
                prompt_id = (await response.json())["prompt_id"]
            self.frames: list[bytes] = []
            while True:
                message = await socket.receive(timeout=60)
                if message.type is aiohttp.WSMsgType.BINARY:
                    self.frames.append(message.data)
                elif json.loads(message.data) == {
                    "type": "executing",
                    "data": {"node": None, "prompt_id": prompt_id},
                }:
                    break
        async with self._http.get(f"/history/{prompt_id}") as response:
            entry: dict[str, Any] = (await response.json())[prompt_id]
            return entry

    async def outputs(self, graph: Graph, **extra_data: Any) -> dict[str, Any]:
        """Run a graph that succeeds; return its outputs by node."""
        entry = await self.run(graph, **extra_data)
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        outputs: dict[str, Any] = entry["outputs"]
        return outputs

    async def fetch(self, reference: dict[str, str]) -> bytes:
        async with self._http.get("/view", params=reference) as response:
            assert response.status == 200
            return await response.read()

    async def inspected(self, reference: dict[str, str], expected: OutputKind) -> Media:
        data = await self.fetch(reference)
        path = self._folder / reference["filename"]
        path.write_bytes(data)
        return inspect(path, max_pixels=LIMIT, expected=expected)


@pytest.fixture
async def client(comfyui: ComfyUIEmulator, tmp_path: Path) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(comfyui.url) as http:
        yield Client(http, tmp_path)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Media]:
    """Inspect some bytes as a result."""

    def run(data: bytes, expected: OutputKind) -> Media:
        path = tmp_path_factory.mktemp("made") / "file"
        path.write_bytes(data)
        return inspect(path, max_pixels=LIMIT, expected=expected)

    return run


def shape(value: Any) -> Any:
    """A ui value without what differs from run to run: counters, made-up letters and digits."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    if isinstance(value, str):
        value = re.sub(r"_temp_[a-z]{5}_", "_temp_?_", value)
        value = re.sub(r"_\d{5}(?=[_.])", "_#", value)
        return re.sub(r"[0-9a-f]{32}", "?", value)
    return value


def test_the_recording_has_every_kind_of_output() -> None:
    keys = {key for _, _, outputs in CASES for ui in outputs.values() for key in ui}
    assert {"images", "animated", "audio", "3d", "result", "text", "files", "latents"} <= keys


@pytest.mark.parametrize(("graph", "want"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
async def test_what_a_node_shows_is_shaped_as_recorded(client: Client, graph: Graph, want: dict[str, Any]) -> None:
    assert shape(await client.outputs(graph)) == shape(want)


VIDEO, AUDIO, MESH, TEXT = OutputKind.VIDEO, OutputKind.AUDIO, OutputKind.MESH, OutputKind.TEXT


@pytest.mark.parametrize(
    ("kind", "inputs", "source", "key", "expected", "mime"),
    [
        ("SaveWEBM", {"codec": "vp9", "fps": 24.0, "crf": 32.0}, "images", "images", VIDEO, "video/webm"),
        ("SaveAudio", {}, "audio", "audio", AUDIO, "audio/flac"),
        ("SaveAudioMP3", {"quality": "V0"}, "audio", "audio", AUDIO, "audio/mpeg"),
        ("SaveAudioOpus", {"quality": "128k"}, "audio", "audio", AUDIO, "audio/ogg"),
        ("SaveText", {"format": "md"}, "text", "files", TEXT, "text/plain"),
        ("SaveGLB", {}, "mesh", "3d", MESH, "model/gltf-binary"),
    ],
)
async def test_a_saved_file_is_whole(
    client: Client, kind: str, inputs: Graph, source: str, key: str, expected: OutputKind, mime: str
) -> None:
    makers = {
        "images": pictures(),
        "audio": SOUND,
        "text": node("PrimitiveString", value="so be it"),
        "mesh": BALL["2"],
    }
    graph = {**BALL, "2": makers[source], "9": node(kind, filename_prefix="a/file", **{source: ["2", 0]}, **inputs)}
    outputs = await client.outputs(graph)
    (reference,) = outputs["9"][key]
    assert reference["subfolder"] == "a"
    assert (await client.inspected(reference, expected)).mime == mime


async def test_a_preview_of_sound_lies_in_the_temp_folder(client: Client) -> None:
    outputs = await client.outputs({"1": SOUND, "2": node("PreviewAudio", audio=["1", 0])})
    (reference,) = outputs["2"]["audio"]
    assert reference["type"] == "temp"
    found = await client.inspected(reference, AUDIO)
    assert found.details == {"channels": 2, "sample_rate": 44100, "seconds": 1.5}


@pytest.mark.parametrize("nested", [{}, {"format.codec": "h264", "format.codec.encoding": "auto"}, {"codec": "h264"}])
async def test_a_video_has_the_pictures_at_their_rate(client: Client, nested: Graph) -> None:
    graph = {
        "1": pictures(12),
        "2": node("CreateVideo", images=["1", 0], fps=24.0),
        "9": node("SaveVideo", video=["2", 0], filename_prefix="v", format="mp4", **nested),
    }
    outputs = await client.outputs(graph)
    assert outputs["9"]["animated"] == [True]
    found = await client.inspected(outputs["9"]["images"][0], VIDEO)
    assert found.mime == "video/mp4"
    assert found.details == {"seconds": 0.5, "width": 48, "height": 32, "samples": 12}


async def test_a_video_carries_its_sound(client: Client) -> None:
    graph = {
        "1": pictures(6),
        "2": SOUND,
        "3": node("CreateVideo", images=["1", 0], audio=["2", 0], fps=24.0),
        "9": node("SaveVideo", video=["3", 0], filename_prefix="v", format="mp4"),
    }
    reference = (await client.outputs(graph))["9"]["images"][0]
    found = await client.inspected(reference, VIDEO)
    assert found.details["seconds"] >= 1.5  # the sound is longer than the six pictures
    data = await client.fetch(reference)
    assert data.count(b"trak") == 2
    assert b"soun" in data


SAVERS: dict[str, Graph] = {
    "mp4": {
        "1": pictures(),
        "2": node("CreateVideo", images=["1", 0], fps=24.0),
        "9": node("SaveVideo", video=["2", 0], filename_prefix="v", format="auto"),
    },
    "webm": {
        "1": pictures(),
        "9": node("SaveWEBM", images=["1", 0], filename_prefix="v", codec="av1", fps=8.0, crf=1.0),
    },
    "flac": {"1": SOUND, "9": node("SaveAudio", audio=["1", 0], filename_prefix="s")},
    "mp3": {"1": SOUND, "9": node("SaveAudioMP3", audio=["1", 0], filename_prefix="s", quality="320k")},
    "opus": {"1": SOUND, "9": node("SaveAudioOpus", audio=["1", 0], filename_prefix="s", quality="64k")},
}


@pytest.mark.parametrize("extension", SAVERS)
async def test_the_graph_is_written_into_the_file(client: Client, extension: str) -> None:
    outputs = await client.outputs(SAVERS[extension], extra_pnginfo={"workflow": {"id": "drawn by hand"}})
    ((reference,), *_) = outputs["9"].values()
    data = await client.fetch(reference)
    assert reference["filename"].endswith(f".{extension}")
    for words in (json.dumps(SAVERS[extension]), '{"id": "drawn by hand"}', EMULATION_NOTE):
        assert words.encode() in data


@pytest.mark.parametrize("extension", SAVERS)
async def test_no_graph_is_written_when_metadata_are_off(extension: str, tmp_path: Path) -> None:
    async with (
        ComfyUIEmulator(save_metadata=False) as comfyui,
        aiohttp.ClientSession(comfyui.url) as http,
    ):
        client = Client(http, tmp_path)
        outputs = await client.outputs(SAVERS[extension], extra_pnginfo={"workflow": {"id": "drawn by hand"}})
        ((reference,), *_) = outputs["9"].values()
        data = await client.fetch(reference)
    assert b"class_type" not in data
    assert b"drawn by hand" not in data
    assert EMULATION_NOTE.encode() in data


# Meshes


async def test_meshes_shown_by_path_are_there(client: Client) -> None:
    graph = {
        **BALL,
        "3": node("MeshToFile3D", mesh=["2", 0]),
        "8": node("Preview3D", model_file=["3", 0], camera_info=None),
        "9": node(
            "Save3DAdvanced",
            model_3d=["3", 0],
            filename_prefix="mesh/adv",
            viewport_state={"camera_info": {"zoom": 2}},
            width=64,
            height=64,
        ),
    }
    outputs = await client.outputs(graph)
    preview, camera, _ = outputs["8"]["result"]
    assert camera is None
    assert outputs["9"]["result"] == ["mesh/adv_00001.glb", {"zoom": 2}, []]
    for name in (preview, outputs["9"]["result"][0]):
        folder, _, name = name.rpartition("/")
        found = await client.inspected({"filename": name, "subfolder": folder, "type": "output"}, MESH)
        assert found.mime == "model/gltf-binary"


async def test_a_preview_keeps_its_camera_and_background(client: Client, comfyui: ComfyUIEmulator) -> None:
    graph = {"1": pictures(1), "9": node("Preview3D", model_file="m.glb", camera_info={"zoom": 3}, bg_image=["1", 0])}
    name, camera, background = (await client.outputs(graph))["9"]["result"]
    assert (name, camera) == ("m.glb", {"zoom": 3})
    folder, _, file = background.partition("/")
    assert folder == "temp"
    assert (comfyui.folders.temp / file).is_file()


async def test_a_mesh_file_holds_the_graph(client: Client) -> None:
    graph = {**BALL, "9": node("SaveGLB", mesh=["2", 0], filename_prefix="m")}
    outputs = await client.outputs(graph, extra_pnginfo={"workflow": {"id": "drawn by hand"}})
    data = await client.fetch(outputs["9"]["3d"][0])
    extras = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])["asset"]["extras"]
    assert json.loads(extras["prompt"]) == graph
    assert json.loads(extras["workflow"]) == {"id": "drawn by hand"}


async def test_a_path_is_previewed_as_it_is(client: Client) -> None:
    outputs = await client.outputs({"1": node("Preview3D", model_file="mesh\\old.glb")})
    assert outputs["1"]["result"] == ["mesh/old.glb", None, None]


async def test_mesh_info_is_shown_sent_and_passed_on(client: Client) -> None:
    graph = {**BALL, "3": node("GetMeshInfo", mesh=["2", 0]), "9": node("PreviewAny", source=["3", 1])}
    outputs = await client.outputs(graph)
    (info,) = outputs["9"]["text"]
    assert outputs["3"]["text"] == [info]
    assert re.fullmatch(r"Vertices:   [\d,]+\nFaces:      [\d,]+\nAttributes: none", info)
    assert struct.pack(">II", 3, 1) + b"3" + info.encode() in client.frames


@pytest.mark.parametrize(
    ("count", "shown"),
    [(7, "7"), (2354, "2,354"), (9999, "9,999"), (10000, "10,000 (10.0K)"), (1234567, "1,234,567 (1.23M)")],
)
def test_counts_are_shown_for_people(count: int, shown: str) -> None:
    assert mesh_nodes.count_text(count) == shown


# Text and values


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        ("PrimitiveString", "a\nb", "a\nb"),
        ("PrimitiveStringMultiline", "", ""),
        ("PrimitiveInt", -(2**63) + 1, "-9223372036854775807"),
        ("PrimitiveFloat", 2.5, "2.5"),
        ("PrimitiveBoolean", True, "True"),
    ],
)
async def test_plain_values_arrive_as_they_are(client: Client, kind: str, value: Any, shown: str) -> None:
    outputs = await client.outputs({"1": node(kind, value=value), "2": node("PreviewAny", source=["1", 0])})
    assert outputs["2"]["text"] == [shown]


@given(st.text() | st.lists(st.none() | st.booleans() | st.integers() | st.text()))
def test_text_is_shown_as_it_is_and_lists_as_json(value: Any) -> None:
    shown = text.readable(value)
    assert value == (shown if isinstance(value, str) else json.loads(shown))


def test_what_is_no_json_is_shown_by_its_own_words() -> None:
    assert text.readable(Audio(1, 2, 1)) == "Audio(samples=1, rate=2, channels=1)"
    assert text.readable({1, 2}) == "{1, 2}"


@pytest.mark.parametrize(
    ("form", "value", "content"),
    [
        ("txt", '{"a":1}', '{"a":1}'),
        ("json", '{"a":"ü"}', '{\n  "a": "ü"\n}'),
        ("json", "no json", "no json"),
    ],
)
async def test_a_text_file_holds_the_text(client: Client, form: str, value: str, content: str) -> None:
    graph = {"1": node("PrimitiveString", value=value), "2": node("SaveText", text=["1", 0], filename_prefix="t")}
    graph["2"]["inputs"]["format"] = form
    outputs = await client.outputs(graph)
    assert outputs["2"]["text"] == [value]
    assert (await client.fetch(outputs["2"]["files"][0])).decode() == content


# Sound and video of any length


async def test_sound_beyond_the_memory_fails_like_a_node(client: Client) -> None:
    graph = {"1": node("EmptyAudio", duration=1e12, sample_rate=192000, channels=2)}
    graph["2"] = node("SaveAudio", audio=["1", 0], filename_prefix="s")
    entry = await client.run(graph)
    (error,) = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
    assert error["exception_type"] == "RuntimeError"
    assert "not enough memory" in error["exception_message"]


sounds = st.builds(
    Audio,
    samples=st.integers(1, 400_000),
    rate=st.integers(100, 192_000),
    channels=st.integers(min_value=1, max_value=2),
)


@given(sounds)
def test_flac_of_any_length_is_whole(inspected: Callable[..., Media], audio: Audio) -> None:
    found = inspected(media.flac(audio), AUDIO)
    assert found.details == {
        "channels": audio.channels,
        "sample_rate": audio.rate,
        "seconds": round(audio.samples / audio.rate, 3),
    }


@given(sounds)
def test_mp3_of_any_length_is_whole(inspected: Callable[..., Media], audio: Audio) -> None:
    found = inspected(media.mp3(audio), AUDIO)
    wanted = audio.samples / audio.rate
    # Whole frames, at most two more than needed.
    assert wanted - 0.001 <= found.details["seconds"] <= wanted + 2 * 1152 / found.details["sample_rate"]
    assert found.details["sample_rate"] >= min(audio.rate, 48_000)


@given(sounds, st.text(max_size=100).map(lambda words: words * 900))
def test_opus_of_any_length_and_with_long_tags_is_whole(
    inspected: Callable[..., Media], audio: Audio, words: str
) -> None:
    found = inspected(media.opus(audio, metadata={"prompt": words}), AUDIO)
    assert found.details["codecs"] == ["opus"]
    assert abs(found.details["seconds"] - audio.samples / audio.rate - media.OPUS_PRE_SKIP / 48_000) < 0.001


@given(count=st.integers(1, 9), fps=st.floats(0.01, 1000))
def test_webm_of_any_rate_is_whole(inspected: Callable[..., Media], count: int, fps: float) -> None:
    frames = [Image.new("RGB", (20, 10), (number * 20, 0, 0)) for number in range(count)]
    found = inspected(media.webm(frames, fps), VIDEO)
    assert found.details["blocks"] == count
    assert (found.details["width"], found.details["height"]) == (20, 10)
    assert found.details["seconds"] == round(count / fps, 3)


@given(count=st.integers(1, 9), fps=st.floats(1, 120))
def test_mp4_of_any_rate_is_whole(inspected: Callable[..., Media], count: int, fps: float) -> None:
    frames = [Image.new("RGBA", (20, 10), (number * 20, 0, 0, 99)) for number in range(count)]
    found = inspected(media.mp4(frames, fps), VIDEO)
    assert found.details["samples"] == count
    assert abs(found.details["seconds"] - count / fps) < 0.002


def test_equal_arguments_give_equal_files() -> None:
    frames = [Image.new("RGB", (20, 10), (9, 9, 9))] * 3
    audio = Audio(70_036, 48_000, 2)
    assert media.mp4(frames, 24, audio=audio) == media.mp4(frames, 24, audio=audio)
    assert media.webm(frames, 24) == media.webm(frames, 24)
    for write in (media.flac, media.mp3, media.opus):
        assert write(audio, metadata={"prompt": "p"}) == write(audio, metadata={"prompt": "p"})


def test_what_is_counted_and_hashed_in_a_flac_file_is_as_recorded() -> None:
    """The same silence as in the recording: same block size, same frame sizes, same hash of the sound."""
    answers = (json.loads(line) for line in RECORDING.read_text(encoding="utf-8").splitlines())
    files = [base64.b64decode(answer["base64"]) for answer in answers if answer.get("base64", "").startswith("ZkxhQ")]
    assert files
    made = media.flac(Audio(70_036, 48_000, 2))
    assert all(file[8:42] == made[8:42] for file in files)
