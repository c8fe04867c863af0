"""Threat S6: files made to exhaust memory or time cost neither, whether they are refused or turn out to be whole."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runcomfy.testing import samples

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name == "nt", reason="memory and processor time are measured as on POSIX"),
]

MEGA = 1 << 20
MOST_MEMORY_MB = 512
MOST_SECONDS = 10
"""Processor time for one file, children included: what it costs does not depend on who else uses the computer."""


def zeros(count: int) -> bytes:
    """Compress many zeros without ever holding them, nor going through them: one megabyte of them, again and again."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    whole = packer.compress(bytes(MEGA)) + packer.flush(zlib.Z_FULL_FLUSH)  # ends at a byte, refers to nothing before
    rest = packer.compress(bytes(count % MEGA)) + packer.flush()
    return b"\x78\xda" + whole * (count // MEGA) + rest + struct.pack(">HH", count % 65_521, 1)  # the sum of Adler-32


def glb_with(**changes: Any) -> bytes:
    document, binary = samples.gltf()
    return samples.glb(document | changes, binary)


def glb_json(text: bytes) -> bytes:
    text += b" " * (-len(text) % 4)
    return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text), len(text), 0x4E4F534A) + text


def overused_glb() -> bytes:
    """A thousand meshes that all name the same large buffer, each through an accessor of its own."""
    count = MEGA // 2
    points = {"componentType": 5126, "count": count, "type": "VEC3", "bufferView": 0}
    document = {
        "asset": {"version": "2.0"},
        "buffers": [{"byteLength": count * 12}],
        "bufferViews": [{"buffer": 0, "byteLength": count * 12}],
        "accessors": [points] * 1000,
        "meshes": [{"primitives": [{"attributes": {"POSITION": n}}]} for n in range(1000)],
    }
    return samples.glb(document, bytes(count * 12))


def nested_boxes(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = samples.box(b"mdia", inner)
    return samples.box(b"ftyp", b"isom\0\0\2\0") + samples.box(b"moov", samples.box(b"trak", inner))


def canvas_gif() -> bytes:
    """A canvas of 250 megapixels with one pixel in it, 300 times."""
    frame = b",\0\0\0\0\1\0\1\0\0" + b"\2\2L\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", 15_800, 15_800, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * 300 + b";"


def progressive_jpeg() -> bytes:
    """A progressive picture whose header is rewritten to 65,500 x 3,800 pixels, with filler behind it."""
    whole = bytearray(samples.picture("JPEG", progressive=True))
    at = whole.index(b"\xff\xc2")
    whole[at + 5 : at + 9] = struct.pack(">HH", 3_800, 65_500)
    return bytes(whole[:-2]) + b"\0" * MEGA + b"\xff\xd9"


def swollen(start: bytes, part: bytes, size: int = 16 * MEGA, end: bytes = b"") -> bytes:
    """A file of countless tiny parts."""
    return start + part * (size // len(part)) + end


PIXELS = samples.png_chunk(b"IDAT", zlib.compress(bytes(64 * 3 * 48 + 48)))
TEXT_BOMB = samples.png_chunk(b"zTXt", b"x\0\0" + zeros(300 * MEGA))

CORPUS: dict[str, Callable[[], bytes]] = {
    "png: header of 4 gigapixels": lambda: samples.png_from(samples.png_header(65_535, 65_535), PIXELS),
    "png: 2^31 x 2^31": lambda: samples.png_from(samples.png_header(2**31 - 1, 2**31 - 1), PIXELS),
    "png: 249 megapixels of nothing, whole": lambda: samples.png_from(
        samples.png_header(15_780, 15_780, color=6), samples.png_chunk(b"IDAT", zeros(15_780 * (15_780 * 4 + 1)))
    ),
    "png: more pixels than promised": lambda: samples.png_from(
        samples.png_header(64, 48), samples.png_chunk(b"IDAT", zeros(400 * MEGA))
    ),
    "png: text of 300 MB": lambda: samples.png(64, 48, (1, 2, 3), TEXT_BOMB),
    "png: text of 300 MB ten times": lambda: samples.png(64, 48, (1, 2, 3), *[TEXT_BOMB] * 10),
    "png: international text of 300 MB": lambda: samples.png(
        64, 48, (1, 2, 3), samples.png_chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(300 * MEGA))
    ),
    "png: colour profile of 300 MB": lambda: samples.png(
        64, 48, (1, 2, 3), samples.png_chunk(b"iCCP", b"x\0\0" + zeros(300 * MEGA))
    ),
    "png: a million empty parts": lambda: swollen(
        b"\x89PNG\r\n\x1a\n" + samples.png_header(64, 48), samples.png_chunk(b"tIME", b"")
    ),
    "webp: 144 megapixels in 46 bytes": lambda: bytes.fromhex(WEBP_BOMB),
    "jpeg: 249 megapixels in some bytes": progressive_jpeg,
    "jpeg: countless markers": lambda: swollen(b"\xff\xd8\xff\xe0\0\2", b"\xff\xe0\0\2"),
    "gif: a huge canvas": canvas_gif,
    "gif: blocks of one byte": lambda: swollen(b"GIF89a\x08\0\x08\0\0\0\0,\0\0\0\0\x08\0\x08\0\0\x02", b"\1\0"),
    "gif: countless parts": lambda: swollen(b"GIF89a\x08\0\x08\0\0\0\0", b"!\xf9\1\0\0"),
    "glb: nested JSON": lambda: glb_json(b'{"asset":' + b"[" * 10 * MEGA),
    "glb: countless values": lambda: glb_json(b'{"asset":{"version":"2.0"},"x":[' + b"[]," * (5 * MEGA) + b"0]}"),
    "glb: countless accessors": lambda: glb_with(
        accessors=[{"componentType": 5126, "count": 1, "type": "VEC3"}] * 300_000
    ),
    "glb: 2^31 vertices without data": lambda: glb_with(
        accessors=[{"componentType": 5126, "count": 2**31, "type": "VEC3"}] * 2
    ),
    "glb: the same data a thousand times": overused_glb,
    "gltf: nested JSON": lambda: b'{"asset":' + b'{"a":' * (4 * MEGA),
    "mp4: 2^31 samples": lambda: samples.mp4().replace(
        struct.pack(">III", 0, 0, 3), struct.pack(">III", 0, 0, 2**31 - 1)
    ),
    "mp4: 20,000 boxes deep": lambda: nested_boxes(20_000),
    "mp4: countless boxes": lambda: swollen(samples.box(b"ftyp", b"isom\0\0\2\0"), samples.box(b"free")),
    "webm: countless blocks": lambda: swollen(samples.webm(live=True), b"\xa3\x80"),
    "flac: countless false frames": lambda: swollen(samples.flac(), b"\xff\xf8"),
    "ogg: countless empty pages": lambda: swollen(b"", samples.ogg_page(b"", number=0, granule=0, flags=0)),
    "mp3: countless short frames": lambda: swollen(b"", b"\xff\xe3\x18\xc4" + bytes(68)),
    "mp3: a tag of zeros": lambda: samples.mp3(frames=0) + bytes(64 * MEGA),
    "wav: countless parts": lambda: swollen(b"RIFF" + struct.pack("<I", 16 * MEGA) + b"WAVE", b"junk\0\0\0\0"),
    "obj: one endless line": lambda: b"v 0 0 0\nf 1 1 1\n" + b"v 1 1 1 " * (4 * MEGA),
    "obj: countless vertices": lambda: swollen(b"", b"v 0 0 0\n", 8 * MEGA),
    "zip: 400 MB of zeros": lambda: b"PK\x03\x04" + bytes(26) + zeros(400 * MEGA),
    "text: 64 MB": lambda: b"a" * (64 * MEGA),
}
WEBP_BOMB = "5249464626000000574542505650384c1a0000002fdfeeb70b074020698bb7fd0a01044041d382fec74744f43f00"

SCRIPT = textwrap.dedent(
    """
    import json, resource, sys
    from runcomfy.adapters import media
    from runcomfy.domain.exceptions import OutputCorrupt

    try:
        outcome = media.inspect(sys.argv[1], max_pixels=250_000_000).extension
    except OutputCorrupt as error:
        outcome = error.message
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peaks = [usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10) for usage in used]
    if sys.platform == "linux":
        # A process begins with the peak of the one that started it; this line has its own.
        lines = open("/proc/self/status").read().splitlines()
        peaks[0] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    print(json.dumps({
        "outcome": outcome,
        "memory": sum(peaks),
        "seconds": sum(usage.ru_utime + usage.ru_stime for usage in used),
    }))
    """
)

WHOLE = {
    "png: 249 megapixels of nothing, whole": ".png",
    "png: more pixels than promised": ".png",
    "gif: a huge canvas": ".gif",
    "zip: 400 MB of zeros": ".zip",
    "text: 64 MB": ".txt",
    "obj: countless vertices": ".obj",
    "mp3: countless short frames": ".mp3",
}
"""Large, and nothing is wrong with them."""


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.threat("S6")
@pytest.mark.fault(59)
def test_bombs_cost_neither_memory_nor_time(tmp_path: Path, name: str) -> None:
    (tmp_path / "bomb").write_bytes(CORPUS[name]())
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "bomb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if name in WHOLE:
        assert found["outcome"] == WHOLE[name]
    else:
        assert found["outcome"].startswith("a result is not usable: ")
    assert found["memory"] < MOST_MEMORY_MB
    assert found["seconds"] < MOST_SECONDS
