"""Results and inputs as files: pictures, meshes, videos, sound, and what claims to be one of them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final

from benchmarks.fuzzing.scratch import scratch, written
from benchmarks.fuzzing.target import Seeds, Target, demand, only_ours, plain
from runcomfy.adapters import media, media_child
from runcomfy.adapters.data_uri import png_data_uri
from runcomfy.adapters.media_thumbnail import thumbnail
from runcomfy.domain.exceptions import OutputCorrupt
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media
from runcomfy.testing import samples

MAX_PIXELS: Final = 65_536
"""So few that every decoder runs in this process."""
_EXTENSIONS: Final = 8


def _nobody(*_: Any, **__: Any) -> Any:
    raise AssertionError("a process was started for a small picture")


def _facts(value: Any, depth: int = 0) -> None:
    demand(depth < 4, "details without end")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            plain(key, "a detail's name", limit=60)
            _facts(inner, depth + 1)
    elif isinstance(value, str):
        plain(value, "a detail", limit=256)
    elif isinstance(value, float):
        demand(math.isfinite(value), f"a detail is {value}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _facts(inner, depth + 1)


def _inspected(data: bytes, *expected: OutputKind | None) -> None:
    path = written("result", data)
    for kind in expected:
        with only_ours():
            found: Media = media.inspect(path, max_pixels=MAX_PIXELS, expected=kind)
            demand(isinstance(found.kind, OutputKind), "a kind that is none")
            demand(found.extension.startswith(".") and len(found.extension) <= _EXTENSIONS, repr(found.extension))
            plain(found.mime, "a type", limit=80)
            _facts(found.details)
    demand(media.likely_extension(path).startswith("."), "no ending")


def picture(data: bytes) -> None:
    """PNG, JPEG, GIF, WEBP: as a result, as an input, made small, put into a request."""
    started = media_child._exchange
    media_child._exchange = _nobody
    try:
        _inspected(data, OutputKind.IMAGE)
        path = scratch() / "result"
        with only_ours():
            media.check_input_image(path, MAX_PIXELS)
            with only_ours():
                thumbnail(path, scratch() / "small.webp", max_pixels=MAX_PIXELS)
            demand(png_data_uri(path, max_pixels=MAX_PIXELS).startswith("data:image/png;base64,"), "no data URI")
            for form in ("png", "jpg", "webp"):
                target = scratch() / f"converted.{form}"
                target.unlink(missing_ok=True)
                with only_ours(OSError):
                    media.convert(str(path), str(target), form, max_pixels=MAX_PIXELS)
    finally:
        media_child._exchange = started


def _picture_seeds() -> Seeds:
    for form in ("PNG", "JPEG", "GIF", "WEBP"):
        yield form.lower(), samples.picture(form, width=16, height=12)
        if form != "JPEG":
            yield f"{form.lower()}-moving", samples.picture(form, width=12, height=8, frames=3)
    yield "png-text", samples.png(8, 8, (1, 2, 3), samples.png_chunk(b"tEXt", b"prompt\0{}"))
    yield "png-cut", samples.png(8, 8)[:-20]
    yield "png-large", samples.png_from(samples.png_header(70_000, 70_000), samples.png_chunk(b"IDAT", b""))
    control = struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 10, 0, 0)
    yield (
        "apng",
        samples.png(
            8, 8, (1, 2, 3), samples.png_chunk(b"acTL", struct.pack(">II", 1, 0)), samples.png_chunk(b"fcTL", control)
        ),
    )
    yield "page", samples.HTML


def mesh(data: bytes) -> None:
    """GLB, glTF, OBJ, STL, PLY."""
    _inspected(data, OutputKind.MESH, None)


def _mesh_seeds() -> Seeds:
    document, _ = samples.gltf()
    for name, make in {"glb": samples.glb, "obj": samples.obj, "stl": samples.stl, "ply": samples.ply}.items():
        yield name, make()
    yield "gltf", json.dumps(document).encode()
    yield "obj-two-minuses", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf --1 2 3\n"
    yield "text-stl", b"solid a\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nendloop\nendfacet\nendsolid a\n"
    nested = b'{"extensions":{"EXT_meshopt_compression":' * 320 + b"{}" + b"}}" * 320
    yield "gltf-nested", b'{"asset":{"version":"2.0"},"bufferViews":[' + nested + b"]}"
    yield "gltf-deep", b'{"asset":{"version":' + b"[" * 960 + b"]" * 960 + b"}}"


def video(data: bytes) -> None:
    """MP4, MOV, WEBM, Matroska."""
    _inspected(data, OutputKind.VIDEO)


def _video_seeds() -> Seeds:
    yield "mp4", samples.mp4()
    yield "mov", samples.mp4(brand=b"qt  ")
    yield "m4a", samples.mp4(handler=b"soun")
    yield "webm", samples.webm()
    yield "webm-live", samples.webm(live=True)
    yield "ogg", samples.ogg()


def audio(data: bytes) -> None:
    """WAV, FLAC, OGG, MP3."""
    _inspected(data, OutputKind.AUDIO)


def _audio_seeds() -> Seeds:
    yield "wav", samples.wav(samples=40)
    yield "flac", samples.flac(frames=2)
    yield "ogg", samples.ogg()
    yield "mp3", samples.mp3(frames=3)
    yield "mp3-plain", samples.mp3(frames=3, tag=False)
    yield "webm", samples.webm(track=2)


def anything(data: bytes) -> None:
    """A file whose kind nobody knows, or that should be text."""
    _inspected(data, None, OutputKind.FILE, OutputKind.TEXT)
    path = scratch() / "result"
    with only_ours():
        media.inspect(path, max_pixels=MAX_PIXELS, plain_text=True)
    try:
        media.check_input_file(path)
    except Exception as error:
        if not data and not isinstance(error, OutputCorrupt):
            return
        raise


def _anything_seeds() -> Seeds:
    yield from {
        "text": b"a line\nand more",
        "html": samples.HTML,
        "svg": b"<?xml version='1.0'?><!-- a --><svg></svg>",
        "zip": b"PK\x03\x04",
        "fbx": b"; FBX 7.3",
        "bom": b"\xef\xbb\xbf{}",
        "half": b"\xe2\x82",
        "dae": b"<COLLADA/>",
        "empty": b"",
        "tiff": b"II*\0",
        "avif": b"\0\0\0\x1cftypavif\0\0\0\0",
    }.items()


TARGETS: Final = (
    Target(
        "picture",
        picture,
        _picture_seeds,
        share=8,
        max_bytes=4_096,
        is_json=False,
        words=("IHDR", "IDAT", "IEND", "fcTL", "fdAT", "PLTE", "ANMF", "VP8X", "VP8L", "ALPH", "\xff\xd9"),
    ),
    Target(
        "mesh",
        mesh,
        _mesh_seeds,
        share=35,
        words=(
            "bufferViews",
            "accessors",
            "componentType",
            "byteStride",
            "byteOffset",
            "byteLength",
            "POSITION",
            "sparse",
            "EXT_meshopt_compression",
            "KHR_draco_mesh_compression",
            "VEC3",
            "SCALAR",
            "end_header",
            "property list",
            "element vertex ",
        ),
    ),
    Target(
        "video",
        video,
        _video_seeds,
        share=30,
        is_json=False,
        words=(
            "moov",
            "trak",
            "mdia",
            "minf",
            "stbl",
            "stsz",
            "stco",
            "co64",
            "mvhd",
            "tkhd",
            "hdlr",
            "moof",
            "mdat",
            "webm",
            "\x1f\x43\xb6\x75",
        ),
    ),
    Target(
        "audio",
        audio,
        _audio_seeds,
        share=30,
        is_json=False,
        words=("fmt ", "data", "OggS", "OpusHead", "Xing", "Info", "TAG", "ID3", "fLaC", "RF64"),
    ),
    Target("anything", anything, _anything_seeds, share=10, is_json=False),
)
