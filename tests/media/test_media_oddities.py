"""Meshes, sounds, videos and pictures that are odd: what the formats allow is read, and each lie has its own word."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.adapters import media
from runcomfy.domain.exceptions import OutputCorrupt
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media
from runcomfy.testing import samples

LIMIT = 250_000_000
pytestmark = pytest.mark.fault(51)
Inspect = Callable[[bytes], Media]


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    def run(content: bytes) -> Media:
        (tmp_path / "result").write_bytes(content)
        return media.inspect(tmp_path / "result", max_pixels=LIMIT)

    return run


@pytest.fixture
def refusal(inspect: Inspect) -> Callable[[bytes], str]:
    def run(content: bytes) -> str:
        with pytest.raises(OutputCorrupt) as caught:
            inspect(content)
        return caught.value.message

    return run


# --- meshes ---


def document(**changes: Any) -> dict[str, Any]:
    return samples.gltf()[0] | changes


def glb_of(*chunks: tuple[int, bytes], version: int = 2) -> bytes:
    body = b"".join(struct.pack("<II", len(data), kind) + data for kind, data in chunks)
    return struct.pack("<4sII", b"glTF", version, 12 + len(body)) + body


def json_chunk(value: object) -> tuple[int, bytes]:
    text = json.dumps(value).encode()
    return 0x4E4F534A, text + b" " * (-len(text) % 4)


PLY = b"ply\nformat ascii 1.0\n"
MESHES: list[tuple[bytes, str]] = [
    (glb_of(json_chunk({}), version=1), "version is 1"),
    (glb_of((0x004E4942, b"\0" * 8)), "first part is not JSON"),
    (glb_of((0x4E4F534A, b"{} ")), "longer than the file"),
    (glb_of(json_chunk(document()), *[(7, b"")] * 70), "absurd number of parts"),
    (glb_of((0x4E4F534A, b"")), "empty or absurdly long"),
    (glb_of(json_chunk([0] * 3_000_000)), "absurd number of values"),
    (glb_of(json_chunk([])), "not an object"),
    (samples.glb(document(buffers=[{"byteLength": 9, "uri": "data:application/octet-stream;base64,AAAA"}])), "shorter"),
    (samples.glb(document(buffers=[{"byteLength": 72}, {"byteLength": 4}])), "no data"),
    (samples.glb(document(images=[{"bufferView": 9}])), "textures has no data"),
    (samples.glb(document(meshes=[{"primitives": [{"attributes": {"POSITION": 1}}]}])), "not points in space"),
    (PLY + b"element face 1\nproperty list uchar int vertex_indices\nend_header\n3 0 0 0\n", "no vertices"),
    (PLY + b"element vertex 9\nproperty list uchar int vertex_indices\nend_header\n", "cut off"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), MESHES, ids=[reason for _, reason in MESHES])
def test_each_lie_of_a_mesh_has_its_word(refusal: Callable[[bytes], str], content: bytes, reason: str) -> None:
    assert reason in refusal(content)


def sparse(values: object, count: object = 1) -> bytes:
    accessors = samples.gltf()[0]["accessors"]
    accessors[0]["sparse"] = {"count": count, "values": values}
    return samples.glb(document(accessors=accessors))


def test_sparse_positions_are_checked_like_others(inspect: Inspect, refusal: Callable[[bytes], str]) -> None:
    assert inspect(sparse({"bufferView": 0})).details["vertices"] == 4
    assert "malformed" in refusal(sparse(None))
    assert "malformed" in refusal(sparse({"bufferView": 0}, count=99))
    assert "outside its buffer view" in refusal(sparse({"bufferView": 7}))


@pytest.mark.parametrize(("mode", "triangles"), [(4, 4), (5, 10), (6, 10), (0, 0), (1, 0)])
def test_strips_and_fans_and_points(inspect: Inspect, mode: int, triangles: int) -> None:
    primitive = {"attributes": {"POSITION": 0}, "indices": 1, "mode": mode}
    assert inspect(samples.glb(document(meshes=[{"primitives": [primitive]}]))).details["triangles"] == triangles


def test_whole_numbers_may_be_written_as_fractions(inspect: Inspect) -> None:
    primitive = {"attributes": {"POSITION": 0.0}}
    assert inspect(samples.glb(document(meshes=[{"primitives": [primitive]}]))).details["vertices"] == 4


def test_two_parts_of_a_mesh_may_share_their_vertices(inspect: Inspect) -> None:
    primitive = {"attributes": {"POSITION": 0}, "indices": 1}
    assert inspect(samples.glb(document(meshes=[{"primitives": [primitive] * 2}]))).details["triangles"] == 8


# --- sounds ---


def riff(*chunks: tuple[bytes, int, bytes], size: int | None = None) -> bytes:
    body = b"".join(kind + struct.pack("<I", length) + data for kind, length, data in chunks)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(body) if size is None else size, b"WAVE") + body


FORM = struct.pack("<HHIIHH", 1, 1, 8000, 16000, 2, 16)
OPEN = 0xFFFFFFFF


def test_a_sound_from_a_pipe_does_not_know_its_length(inspect: Inspect) -> None:
    found = inspect(riff((b"fmt ", 16, FORM), (b"data", OPEN, b"\1\2" * 800), size=OPEN))
    assert found.details["seconds"] == pytest.approx(0.1)


def vorbis(*, streams: int = 1) -> bytes:
    start = b"\x01vorbis" + struct.pack("<IBI", 0, 1, 44_100) + b"\0" * 14
    heads = b"".join(samples.ogg_page(start, number=0, granule=0, flags=2, serial=n) for n in range(streams))
    ends = (samples.ogg_page(b"x", number=1, granule=44_100, flags=4, serial=n) for n in range(streams))
    return heads + b"".join(ends)


def test_vorbis_says_its_own_rate(inspect: Inspect, refusal: Callable[[bytes], str]) -> None:
    assert inspect(vorbis()).details == {"codecs": ["vorbis"], "seconds": 1.0}
    assert "absurd number of streams" in refusal(vorbis(streams=70))


def test_a_stream_of_an_unknown_kind_is_whole_all_the_same(inspect: Inspect) -> None:
    page = samples.ogg_page(b"???", number=0, granule=5, flags=6)
    assert inspect(page).details == {"codecs": ["unknown"]}


FLAC = samples.flac()
SOUNDS: list[tuple[bytes, str]] = [
    (riff((b"fmt ", 16, FORM), (b"data", 1_600, b"\1\2" * 8)), "longer than the file"),
    (riff((b"data", 4, b"\1\2\3\4")), "format description is missing"),
    (b"fLaC" + b"\x81\0\0\x22" + FLAC[8:], "description is missing"),
    (FLAC[:4] + b"\x00" + FLAC[5:42] + b"\x81\xff\xff\xff", "cut off inside its description"),
    (FLAC[:18] + b"\0\0\0" + FLAC[21:], "description is damaged"),
    (FLAC[:42], "no sound data"),
    (FLAC[:42] + b"\0" * 40, "no frame begins"),
    (FLAC[:42] + b"\xff\xf8\xc9\x08\xff" + b"\0" * 40, "no frame begins"),
    (FLAC[:42] + b"\xff\xf8\xc9\x08\xc2\x02" + b"\0" * 40, "no frame begins"),
    (b"ID3\x04\0\0\0\0\0\x8a" + b"\0" * 500, "tag is damaged"),
    (samples.mp3() + b"garbage behind it", "no frame begins"),
    (samples.mp3() + b"\xff\xeb\x90\xc0" + b"\0" * 413, "no frame begins"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), SOUNDS, ids=range(len(SOUNDS)))
def test_each_lie_of_a_sound_has_its_word(refusal: Callable[[bytes], str], content: bytes, reason: str) -> None:
    assert reason in refusal(content)


def test_tags_before_and_behind_a_sound_are_passed_over(inspect: Inspect) -> None:
    plain = inspect(samples.mp3(frames=6)).details
    tail = b"TAG" + b"\0" * 125
    for content in (samples.mp3(frames=6) + tail, samples.mp3(frames=6) + b"APETAGEX" + b"\0" * 24):
        assert inspect(content).details == plain
    padded = b"ID3\x04\0\0\0\0\0\x0a" + b"\0" * 40 + samples.mp3(frames=6, tag=False)
    assert inspect(padded).details == plain


def test_layer_one_has_frames_of_its_own_length(inspect: Inspect) -> None:
    frame = b"\xff\xff\x40\xc0" + b"\0" * (12_000 * 128 // 44_100 * 4 - 4)
    assert inspect(b"ID3\x04\0\0\0\0\0\0" + frame * 4).details["seconds"] == pytest.approx(4 * 384 / 44_100, abs=0.001)


# --- videos ---


def movie(*, size64: bool = False, scale: int = 1000, inside: bytes = b"") -> bytes:
    plain = samples.mp4()
    if size64:
        start, length = plain.index(b"mdat") - 4, 100
        plain = plain[:start] + struct.pack(">I4sQ", 1, b"mdat", 16 + length) + plain[start + 8 :]
        plain = plain.replace(struct.pack(">I", start + 8), struct.pack(">I", start + 16))
    if scale != 1000:
        plain = plain.replace(struct.pack(">II", 1000, 1500), struct.pack(">II", scale, 1500))
    return plain + inside


def nested(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = samples.box(b"mdia", inner)
    return samples.box(b"ftyp", b"isom\0\0\2\0") + samples.box(b"moov", samples.box(b"trak", inner))


def test_long_sizes_open_ends_and_lists_that_end_in_zeros_are_read(inspect: Inspect) -> None:
    whole = inspect(samples.mp4()).details
    assert inspect(movie(size64=True)).details == whole
    assert inspect(movie(inside=struct.pack(">I4s", 0, b"free") + b"\0" * 30)).details == whole
    assert "seconds" not in inspect(movie(scale=0)).details
    start = samples.box(b"ftyp", b"qt  \0\0\2\0")
    body = samples.mp4()
    track = body[body.index(b"trak") - 4 :]
    quick = samples.box(b"moov", track, b"\0\0\0\0")
    assert inspect(start + samples.box(b"mdat", b"\x55" * 300) + quick).kind is OutputKind.VIDEO


VIDEOS: list[tuple[bytes, str]] = [
    (movie(inside=samples.box(b"\1\2\3\4", b"x")), "no part begins there"),
    (movie(inside=b"\0\0\0"), "cut off inside a header"),
    (nested(30), "nested absurdly deep"),
]  # fmt: skip
EBML, DOC_TYPE, ROOT, CLUSTER, VOID = (
    b"\x1a\x45\xdf\xa3",
    b"\x42\x82",
    b"\x18\x53\x80\x67",
    b"\x1f\x43\xb6\x75",
    b"\xec",
)
element = samples.element
HEAD = element(EBML, element(DOC_TYPE, b"webm"))
SEGMENT = samples.webm()[len(HEAD) :]
OPEN_VOID = element(VOID, b"\0" * 4, open_end=True)
MATROSKA: list[tuple[bytes, str]] = [
    (element(EBML, element(DOC_TYPE, b"webm"), open_end=True) + SEGMENT, "header is damaged"),
    (HEAD + OPEN_VOID, "header is damaged"),
    (element(EBML, element(DOC_TYPE, b"webm", open_end=True)) + SEGMENT, "where that is not allowed"),
    (HEAD + element(ROOT, OPEN_VOID), "where that is not allowed"),
    (HEAD + element(ROOT, element(CLUSTER, element(b"\xa3", b"\0" * 8, open_end=True))), "where that is not allowed"),
    (element(EBML, element(DOC_TYPE, b"other")) + SEGMENT, "neither WEBM nor Matroska"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), [*VIDEOS, *MATROSKA], ids=range(len(VIDEOS) + len(MATROSKA)))
def test_each_lie_of_a_video_has_its_word(refusal: Callable[[bytes], str], content: bytes, reason: str) -> None:
    assert reason in refusal(content)


def test_what_stands_before_the_segment_and_odd_numbers_are_passed_over(inspect: Inspect) -> None:
    details = inspect(samples.webm()).details
    assert inspect(HEAD + samples.element(b"\xec", b"\0" * 9) + SEGMENT).details == details
    endless = samples.webm().replace(struct.pack(">d", 1500.0), struct.pack(">d", float("inf")))
    assert "seconds" not in inspect(endless).details
    live = samples.webm(live=True)
    assert inspect(live + samples.element(b"\x1f\x43\xb6\x75", samples.element(b"\xe7", b"\0"))).details["width"] == 64
    for track, ending, mime in ((1, ".mkv", "video/x-matroska"), (2, ".mka", "audio/x-matroska")):
        web, mkv = (
            samples.element(b"\x1a\x45\xdf\xa3", samples.element(b"\x42\x82", kind)) for kind in (b"webm", b"matroska")
        )
        other = samples.webm(track=track).replace(web, mkv)
        assert (inspect(other).extension, inspect(other).mime) == (ending, mime)
    wide = samples.webm().replace(samples.element(b"\xb0", b"\x40"), samples.element(b"\xb1", b"\x40"))
    assert "width" not in inspect(wide).details


# --- pictures ---


def animated(control: bytes) -> bytes:
    plain = samples.png(8, 8)
    at = plain.index(b"IDAT") - 4
    head = plain[:at] + samples.png_chunk(b"acTL", struct.pack(">II", 2, 0))
    first = samples.png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0))
    end = plain.index(b"IEND") - 4
    return head + first + plain[at:end] + samples.png_chunk(b"fcTL", control) + plain[end:]


JPEG = samples.picture("JPEG")
SECOND = 4 + int.from_bytes(JPEG[4:6], "big")
"""Where its second segment begins."""
GIF = samples.picture("GIF")
WEBP = samples.picture("WEBP")
PICTURES: list[tuple[bytes, str]] = [
    (animated(b"\0" * 7), "animation is damaged"),
    (animated(struct.pack(">IIIIIHHBB", 1, 9, 9, 0, 0, 1, 10, 0, 0)), "frame outside the picture"),
    (animated(struct.pack(">IIIIIHHBB", 1, 0, 8, 0, 0, 1, 10, 0, 0)), "frame outside the picture"),
    (JPEG[:SECOND] + b"\0" + JPEG[SECOND + 1 :], "no segment begins"),
    (b"\xff\xd8\xff\xda\0\4\0\0\0\0\0\0", "header is missing"),
    (GIF[:-1] + b"?" * 20, "no block begins"),
    (GIF[:13] + (b"" if not GIF[10] & 0x80 else GIF[13 : 13 + (3 << (GIF[10] & 7) + 1)]) + b";", "no picture in it"),
    (WEBP[:4] + struct.pack("<I", len(WEBP)) + WEBP[8:] + b"ANMF" + b"\xff\0\0\0", "longer than the file"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), PICTURES, ids=range(len(PICTURES)))
def test_each_lie_of_a_picture_has_its_word(refusal: Callable[[bytes], str], content: bytes, reason: str) -> None:
    assert reason in refusal(content)


def test_filler_between_the_parts_of_a_jpeg_is_passed_over(inspect: Inspect) -> None:
    assert inspect(JPEG[:SECOND] + b"\xff\xff" + JPEG[SECOND:]).details["width"] == 64


def test_a_jpeg_that_promises_more_pixels_than_its_bytes_can_hold(refusal: Callable[[bytes], str]) -> None:
    at = JPEG.index(b"\xff\xc0")
    assert "more pixels than its bytes" in refusal(JPEG[: at + 5] + struct.pack(">HH", 9_000, 9_000) + JPEG[at + 9 :])


@pytest.mark.parametrize("mode", ["CMYK", "L", "I;16", "P", "LA"])
@pytest.mark.parametrize("to", ["png", "jpg"])
def test_pictures_of_every_kind_are_converted(tmp_path: Path, mode: str, to: str) -> None:
    made = io.BytesIO()
    plain = Image.new(mode, (16, 16), 9) if mode == "I;16" else Image.new("L", (16, 16), 9).convert(mode)
    plain.save(made, "JPEG" if mode == "CMYK" else "PNG")
    (tmp_path / "a").write_bytes(made.getvalue())
    found = media.convert(str(tmp_path / "a"), str(tmp_path / "b"), to, max_pixels=LIMIT)
    assert (found.extension, found.details["width"]) == (f".{to}", 16)
