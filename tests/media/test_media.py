"""A result is what its bytes say, whole to the last pixel, box or page; anything else is refused."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runcomfy.adapters import media
from runcomfy.domain.exceptions import LocalError, OutputCorrupt
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media
from runcomfy.testing import samples

IMAGE, MESH, VIDEO = OutputKind.IMAGE, OutputKind.MESH, OutputKind.VIDEO
AUDIO, TEXT, FILE = OutputKind.AUDIO, OutputKind.TEXT, OutputKind.FILE
LIMIT = 250_000_000

Inspect = Callable[..., Media]
Refusal = Callable[..., str]


# --- what whole files are found to be ---

WHOLE: dict[str, tuple[bytes, OutputKind, str, dict[str, Any]]] = {
    "png": (samples.png(), IMAGE, ".png", {"width": 64, "height": 48, "frames": 1, "mode": "RGB"}),
    "jpeg": (samples.picture("JPEG"), IMAGE, ".jpg", {"width": 64, "height": 48}),
    "progressive jpeg": (samples.picture("JPEG", progressive=True), IMAGE, ".jpg", {"width": 64}),
    "gif": (samples.picture("GIF"), IMAGE, ".gif", {"frames": 1}),
    "animated gif": (samples.picture("GIF", frames=3), IMAGE, ".gif", {"frames": 3, "frames_decoded": 3}),
    "webp": (samples.picture("WEBP"), IMAGE, ".webp", {"width": 64, "height": 48}),
    "lossless webp": (samples.picture("WEBP", lossless=True), IMAGE, ".webp", {"width": 64, "height": 48}),
    "animated webp": (samples.picture("WEBP", frames=3), IMAGE, ".webp", {"frames": 3, "frames_decoded": 3}),
    "animated png": (samples.picture("PNG", frames=3), IMAGE, ".png", {"frames": 3, "frames_decoded": 3}),
    "glb": (samples.glb(), MESH, ".glb", {"vertices": 4, "triangles": 4, "meshes": 1}),
    "obj": (samples.obj(), MESH, ".obj", {"vertices": 4, "triangles": 4}),
    "stl": (samples.stl(), MESH, ".stl", {"triangles": 4}),
    "ply": (samples.ply(), MESH, ".ply", {"vertices": 4, "triangles": 4}),
    "mp4": (samples.mp4(), VIDEO, ".mp4", {"seconds": 1.5, "width": 64, "height": 48, "samples": 3}),
    "mov": (samples.mp4(brand=b"qt  "), VIDEO, ".mov", {"seconds": 1.5}),
    "m4a": (samples.mp4(handler=b"soun"), AUDIO, ".m4a", {"seconds": 1.5}),
    "webm": (samples.webm(), VIDEO, ".webm", {"seconds": 1.5, "width": 64, "height": 48, "blocks": 3}),
    "live webm": (samples.webm(live=True), VIDEO, ".webm", {"blocks": 3}),
    "webm sound": (samples.webm(track=2), AUDIO, ".webm", {"blocks": 3}),
    "wav": (samples.wav(), AUDIO, ".wav", {"seconds": 0.1, "channels": 1, "sample_rate": 8000}),
    "flac": (samples.flac(), AUDIO, ".flac", {"seconds": 0.372, "sample_rate": 44_100}),
    "opus": (samples.ogg(), AUDIO, ".opus", {"seconds": 0.06, "codecs": ["opus"]}),
    "mp3": (samples.mp3(), AUDIO, ".mp3", {"seconds": 0.104, "sample_rate": 44_100}),
    "mp3 without tag": (samples.mp3(tag=False), AUDIO, ".mp3", {"seconds": 0.104}),
    "text": ("größer als ☃".encode(), TEXT, ".txt", {"characters": 12}),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("expect", [True, False])
def test_whole_files_are_told_by_their_content(inspect: Inspect, name: str, expect: bool) -> None:
    content, kind, extension, details = WHOLE[name]
    found = inspect(content, kind if expect else None)
    assert (found.kind, found.extension) == (kind, extension)
    assert details.items() <= found.details.items()


@pytest.mark.parametrize(
    ("content", "extension"),
    [
        (b"\0\1\2\3" * 30, ".bin"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ".pdf"),
        (b"II*\0" + bytes(60), ".tif"),
        (b"PK\x03\x04" + bytes(60), ".zip"),
        (b"Kaydara FBX Binary  \0" + bytes(60), ".fbx"),
        (b"; FBX 7.4.0 project file\n", ".fbx"),
        (b'<?xml version="1.0"?>\n<COLLADA xmlns="x">', ".dae"),
        (b'<!-- made by <b>x</b> --><svg xmlns="x"/>', ".svg"),
        (b"\xff\xf1\x50\x80" + bytes(60), ".aac"),
        (b"RIFF\x40\0\0\0AVI LIST" + bytes(60), ".avi"),
        (struct.pack(">I", 28) + b"ftypavif" + bytes(60), ".avif"),
        (b"readable lines\n" * 400 + b"\0\0\0", ".bin"),
    ],
)
def test_other_formats_are_kept_as_files(inspect: Inspect, content: bytes, extension: str) -> None:
    for expected in (None, FILE):
        assert (inspect(content, expected).kind, inspect(content, expected).extension) == (FILE, extension)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"II*\0" + bytes(60), IMAGE),
        (b"<svg/>", IMAGE),
        (b"PK\x03\x04" + bytes(60), MESH),
        (b"RIFF\x40\0\0\0AVI LIST", VIDEO),
        (b"\xff\xf1\x50\x80" + bytes(60), AUDIO),
    ],
)
def test_formats_known_by_their_signature_alone_may_stand_for_their_kind(
    inspect: Inspect, refusal: Refusal, content: bytes, expected: OutputKind
) -> None:
    assert inspect(content, expected).kind is FILE
    for other in {IMAGE, MESH, VIDEO, AUDIO} - {expected}:
        refusal(content, other)


# What real servers sent: tests/recordings.
RECORDED = {
    f"{path.stem}:{line['n']}": (base64.b64decode(line["base64"]), line["headers"]["Content-Type"])
    for path in sorted((Path(__file__).parents[1] / "recordings").glob("*.jsonl"))
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    if line.get("base64") and line.get("status") == 200 and not line.get("truncated") and line["length"] > 50
}


@pytest.mark.parametrize("name", RECORDED)
def test_files_that_real_servers_made_are_whole(inspect: Inspect, name: str) -> None:
    content, content_type = RECORDED[name]
    kind = {"image": IMAGE, "video": VIDEO, "audio": AUDIO, "model": MESH}.get(content_type.split("/")[0], FILE)
    assert inspect(content, kind).kind is kind


def test_the_recordings_hold_every_kind_of_media() -> None:
    types = {content_type.split("/")[0] for _, content_type in RECORDED.values()}
    assert {"image", "video", "audio", "model"} <= types


@pytest.mark.fault(50)
@pytest.mark.parametrize("expected", [None, *OutputKind])
def test_a_web_page_is_never_a_result(refusal: Refusal, expected: OutputKind | None) -> None:
    for page in (samples.HTML, b"\xef\xbb\xbf  <!-- x --><HTML>", b'<?xml version="1.0"?><html xmlns="x">'):
        assert "web page" in refusal(page, expected)


@pytest.mark.fault(50)
@pytest.mark.parametrize("expected", [IMAGE, MESH, VIDEO, AUDIO])
def test_an_error_in_json_is_not_media(refusal: Refusal, expected: OutputKind) -> None:
    refusal(b'{"error": {"type": "not_found", "message": "no such file"}}', expected)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_of_another_kind_are_refused(refusal: Refusal, name: str) -> None:
    content, kind, _, details = WHOLE[name]
    animated = details.get("frames", 1) > 1
    for expected in {IMAGE, MESH, VIDEO, AUDIO} - {kind} - ({VIDEO} if animated else set()):
        refusal(content, expected)


def test_an_animation_may_stand_for_a_video_and_a_still_may_not(inspect: Inspect, refusal: Refusal) -> None:
    assert inspect(samples.picture("WEBP", frames=2), VIDEO).kind is IMAGE
    assert "no moving pictures" in refusal(samples.picture("WEBP"), VIDEO)


def test_nothing_is_not_a_result_unless_it_came_as_text(inspect: Inspect, refusal: Refusal) -> None:
    assert "0 bytes" in refusal(b"")
    assert inspect(b"", plain_text=True).kind is TEXT
    assert inspect(samples.HTML, plain_text=True).kind is TEXT


@pytest.mark.skipif(os.name == "nt", reason="links as on POSIX")
@pytest.mark.threat("S1")
@pytest.mark.threat("S16")
def test_a_link_is_not_a_result(tmp_path: Path) -> None:
    """Threats S1 and S16."""
    (tmp_path / "real").write_bytes(samples.png())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(LocalError):
        media.inspect(tmp_path / "link", max_pixels=LIMIT)


# --- PNG ---


@pytest.mark.fault(51)
def test_every_changed_byte_of_a_png_is_seen(refusal: Refusal) -> None:
    whole = samples.png(8, 8)
    for position in range(8, len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 0x10
        refusal(bytes(broken), IMAGE)


@pytest.mark.fault(51)
@pytest.mark.parametrize("name", ["png", "jpeg", "progressive jpeg", "gif", "animated gif", "webp", "animated png"])
def test_every_cut_of_a_picture_is_seen(refusal: Refusal, name: str) -> None:
    whole = WHOLE[name][0]
    for length in (1, 4, 8, 20, *range(30, len(whole), 37), len(whole) - 1):
        refusal(whole[:length], IMAGE)


@pytest.mark.fault(51)
def test_a_png_whose_checksums_fit_but_whose_rows_are_missing(refusal: Refusal) -> None:
    """Decoders show the missing half as black and say nothing."""
    rows = b"".join(b"\0" + bytes(range(30)) for _ in range(5))
    cut = samples.png_from(samples.png_header(10, 10), samples.png_chunk(b"IDAT", zlib.compress(rows)))
    with Image.open(io.BytesIO(cut)) as picture:
        picture.load()
    assert "155 bytes of rows are missing" in refusal(cut, IMAGE)


@pytest.mark.fault(51)
def test_a_png_whose_compressed_rows_break_off(refusal: Refusal) -> None:
    packed = zlib.compress(os.urandom(31 * 10))
    refusal(samples.png_from(samples.png_header(10, 10), samples.png_chunk(b"IDAT", packed[:150])), IMAGE)


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ((samples.png_header(10, 10),), "no pixel data"),
        ((samples.png_header(0, 10),), "0 x 10"),
        ((samples.png_header(10, 10, color=5),), "values that PNG does not have"),
        ((samples.png_header(10, 10, depth=3),), "values that PNG does not have"),
        ((samples.png_chunk(b"IDAT", b""),), "header is missing"),
        (
            (samples.png_header(4, 4, color=3), samples.png_chunk(b"IDAT", zlib.compress(bytes(20)))),
            "palette is missing",
        ),
        (
            (samples.png_header(4, 4), samples.png_chunk(b"IDAT", zlib.compress(b"\x09" * 52))),
            "unknown filter",
        ),
    ],
)
def test_png_files_that_contradict_themselves(refusal: Refusal, chunks: tuple[bytes, ...], reason: str) -> None:
    assert reason in refusal(samples.png_from(*chunks), IMAGE)


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    form=st.sampled_from([(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (4, 8), (6, 8), (6, 16)]),
    pieces=st.integers(1, 400),
)
def test_any_shape_of_png_is_counted_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, form: tuple[int, int], pieces: int
) -> None:
    color, depth = form
    bits = depth * {0: 1, 2: 3, 4: 2, 6: 4}[color]
    rows = random.Random(width).randbytes(((width * bits + 7) // 8 + 1) * height)
    stride = len(rows) // height
    rows = bytes(b % 5 if n % stride == 0 else b for n, b in enumerate(rows))
    packed = zlib.compress(rows, 1)
    chunks = [samples.png_chunk(b"IDAT", packed[n : n + pieces]) for n in range(0, len(packed), pieces)]
    path = tmp_path_factory.mktemp("png") / "x"
    path.write_bytes(samples.png_from(samples.png_header(width, height, color=color, depth=depth), *chunks))
    found = media.inspect(path, max_pixels=LIMIT, expected=IMAGE)
    assert (found.details["width"], found.details["height"]) == (width, height)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (64, 64)])
def test_interlaced_png(inspect: Inspect, refusal: Refusal, size: tuple[int, int]) -> None:
    width, height = size
    # The seven passes as the specification numbers them: first column and row, then the steps.
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b""
    for x, y, dx, dy in passes:
        columns = len(range(x, width, dx))
        rows += (b"\0" + bytes(columns * 3)) * len(range(y, height, dy)) if columns else b""
    header = samples.png_header(width, height, interlace=1)
    whole = samples.png_from(header, samples.png_chunk(b"IDAT", zlib.compress(rows)))
    assert inspect(whole, IMAGE).details["width"] == width
    assert "missing" in refusal(samples.png_from(header, samples.png_chunk(b"IDAT", zlib.compress(rows[:-1]))), IMAGE)


def test_a_picture_over_the_limit_is_refused_by_its_header(refusal: Refusal) -> None:
    header_only = samples.png_from(samples.png_header(20_000, 20_000))
    assert "400 megapixels; 250 megapixels are allowed" in refusal(header_only, IMAGE)


def test_a_jpeg_without_its_last_two_bytes(refusal: Refusal) -> None:
    assert "end marker" in refusal(samples.picture("JPEG")[:-2], IMAGE)


def test_bytes_after_a_picture_do_no_harm(inspect: Inspect) -> None:
    """Phones append films to photographs, and some nodes append their own data."""
    assert inspect(samples.picture("JPEG") + b"more", IMAGE).extension == ".jpg"
    assert inspect(samples.png() + b"more", IMAGE).extension == ".png"


# --- video and sound ---


@pytest.mark.fault(51)
def test_an_mp4_without_its_description(refusal: Refusal) -> None:
    whole = samples.mp4()
    assert "moov" in refusal(whole[: whole.index(b"moov") - 4], VIDEO)


@pytest.mark.fault(51)
@pytest.mark.parametrize("name", ["mp4", "webm", "wav", "flac", "opus", "stl", "mp3"])
def test_every_cut_of_a_container_is_seen(refusal: Refusal, name: str) -> None:
    content, kind, _, _ = WHOLE[name]
    # MP3 has neither a count nor an end: without a first frame that counts, a cut between frames is a shorter song.
    seams = {20 + 417 * n for n in (2, 3)} if name == "mp3" else set()
    for length in set(range(1, len(content), 1 if len(content) < 900 else 13)) - seams:
        refusal(content[:length], kind)


@pytest.mark.fault(51)
@pytest.mark.parametrize("name", ["flac", "opus"])
def test_every_changed_byte_of_checksummed_sound_is_seen(refusal: Refusal, name: str) -> None:
    content, kind, _, _ = WHOLE[name]
    first = content.index(b"\xff\xf8") if name == "flac" else 0
    for position in range(first, len(content)):
        broken = bytearray(content)
        broken[position] ^= 0x10
        refusal(bytes(broken), kind)


def test_flac_with_many_frames_and_a_short_last_one(inspect: Inspect, refusal: Refusal) -> None:
    whole = samples.flac(frames=300, last=700)
    assert inspect(whole, AUDIO).details["seconds"] == round((299 * 4096 + 700) / 44_100, 3)
    half = len(samples.flac(frames=150))
    assert "samples are promised" in refusal(whole[:half], AUDIO)


def test_a_song_that_counts_its_frames_is_seen_to_be_cut(inspect: Inspect, refusal: Refusal) -> None:
    count = b"\xff\xfb\x90\xc0" + b"\0" * 17 + b"Xing" + struct.pack(">III", 3, 8, 417 * 9)
    whole = count.ljust(417, b"\0") + samples.mp3(frames=8, tag=False)
    assert inspect(whole, AUDIO).extension == ".mp3"
    assert "8 frames are promised, 7 are there" in refusal(whole[: 417 * 7], AUDIO)


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (samples.mp4(samples=()), VIDEO, "no media data"),
        (samples.mp4().replace(b"trak", b"free"), VIDEO, "moov"),
        (samples.mp4().replace(struct.pack(">III", 0, 0, 3), struct.pack(">III", 0, 0, 2**31)), VIDEO, "longer"),
        (samples.mp4().replace(struct.pack(">III", 0, 0, 3), struct.pack(">III", 0, 10**6, 3)), VIDEO, "cut off"),
        (
            samples.mp4(brand=b"isom").replace(struct.pack(">III", 0, 1, 36), struct.pack(">III", 0, 1, 9999)),
            VIDEO,
            "behind",
        ),
        (samples.webm(blocks=0), VIDEO, "no media data"),
        (samples.webm().replace(b"webm", b"webx"), VIDEO, "neither"),
        (samples.webm().replace(b"\x16\x54\xae\x6b", b"\x1c\x53\xbb\x6b"), VIDEO, "tracks is missing"),
        (samples.wav(samples=0), AUDIO, "no sound data"),
        (samples.wav().replace(b"fmt ", b"fmtx"), AUDIO, "format description"),
        (samples.flac(frames=0), AUDIO, "no sound data"),
        (samples.ogg()[:-31], AUDIO, "last page"),
        (samples.mp3(frames=1), AUDIO, "no sound data"),
    ],
)
def test_containers_that_contradict_themselves(refusal: Refusal, content: bytes, kind: OutputKind, reason: str) -> None:
    assert reason in refusal(content, kind)


def test_an_ogg_page_that_is_missing_in_the_middle(refusal: Refusal) -> None:
    whole = samples.ogg(pages=4)
    third = [n for n in range(len(whole)) if whole.startswith(b"OggS", n)][3]
    fourth = whole.index(b"OggS", third + 1)
    assert "order" in refusal(whole[:third] + whole[fourth:], AUDIO)


# --- anything at all ---

ANY_KIND = st.sampled_from([None, *OutputKind])


@given(data=st.data(), name=st.sampled_from(sorted(WHOLE)), expected=ANY_KIND)
def test_damage_is_refused_or_harmless_and_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, expected: OutputKind | None
) -> None:
    content = bytearray(WHOLE[name][0])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        found = media.inspect(path, max_pixels=1_000_000, expected=expected)
    except OutputCorrupt as error:
        assert error.message  # noqa: PT017 - both ends are allowed; nothing else is
    else:
        assert found.extension.startswith(".")


STARTS = [
    b"", b"\x89PNG\r\n\x1a\n", samples.png()[:33], b"\xff\xd8\xff", b"GIF89a", b"RIFF\x30\0\0\0WEBP",
    b"RIFF\x30\0\0\0WAVE", b"glTF\2\0\0\0", b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3", b"fLaC", b"OggS", b"ID3",
    b"\xff\xfb\x90\xc0", b"ply\n", b"solid x\nfacet", b"v 1 2 3\n", b'{"asset":', b"<",
]  # fmt: skip


@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=400), expected=ANY_KIND)
def test_any_bytes_are_refused_or_named_and_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, rest: bytes, expected: OutputKind | None
) -> None:
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(start + rest)
    try:
        assert media.inspect(path, max_pixels=1_000_000, expected=expected).mime
    except OutputCorrupt as error:
        assert error.message  # noqa: PT017
