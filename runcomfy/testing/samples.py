"""
Small whole files of every format that results come in, made by hand from the formats' specifications.

For tests: cut them, flip a bit, put one in another's place. They are made independently of the code that checks them;
checksums are computed bit by bit, as the specifications write them down.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

HTML = b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n"
"""What a gateway answers in a file's place."""


# --- pictures ---


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_from(*chunks: bytes) -> bytes:
    """Return a PNG file with these chunks between its signature and its end."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_header(width: int, height: int, *, color: int = 2, depth: int = 8, interlace: int = 0) -> bytes:
    """Return a PNG header chunk; colour type 2 is RGB."""
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))


def png(width: int = 64, height: int = 48, rgb: tuple[int, int, int] = (200, 30, 90), *extra: bytes) -> bytes:
    """Return a PNG picture with a gradient; `extra` chunks stand before the pixels."""
    rows = b"".join(b"\0" + bytes(c * (y + 1) // height for c in rgb) * width for y in range(height))
    return png_from(png_header(width, height), *extra, png_chunk(b"IDAT", zlib.compress(rows)))


def one_color(color: str = "red", side: int = 16, form: str = "PNG") -> bytes:
    """Return a square picture of one colour, in a format of Pillow's."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), color).save(out, form)
    return out.getvalue()


def picture(form: str, *, width: int = 64, height: int = 48, frames: int = 1, **options: Any) -> bytes:
    """Return a picture in a format of Pillow's (`JPEG`, `WEBP`, `GIF`, `PNG`), animated if there are several frames."""
    stills = [Image.linear_gradient("L").resize((width, height)).rotate(90 * n).convert("RGB") for n in range(frames)]
    if frames > 1:
        options |= {"save_all": True, "append_images": stills[1:], "duration": 40}
    out = io.BytesIO()
    stills[0].save(out, form, **options)
    return out.getvalue()


# --- meshes ---

TETRAHEDRON = ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
FACES = ((0, 2, 1), (0, 1, 3), (1, 2, 3), (2, 0, 3))


def gltf(
    vertices: Sequence[tuple[float, float, float]] = TETRAHEDRON, faces: Sequence[tuple[int, int, int]] = FACES
) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of a glTF mesh and its buffer: positions as floats, then indices of 16 bits."""
    points = b"".join(struct.pack("<3f", *vertex) for vertex in vertices)
    corners = b"".join(struct.pack("<3H", *face) for face in faces)
    document = {
        "asset": {"version": "2.0", "generator": "hand-made sample"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(points) + len(corners)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(points)},
            {"buffer": 0, "byteOffset": len(points), "byteLength": len(corners)},
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(vertices),
                "type": "VEC3",
                "min": [min(axis) for axis in zip(*vertices, strict=True)],
                "max": [max(axis) for axis in zip(*vertices, strict=True)],
            },
            {"bufferView": 1, "componentType": 5123, "count": len(faces) * 3, "type": "SCALAR"},
        ],
    }
    return document, points + corners


def glb(document: dict[str, Any] | None = None, binary: bytes | None = None) -> bytes:
    """Return a binary glTF file; without arguments a tetrahedron."""
    made, data = gltf()
    text = json.dumps(made if document is None else document).encode()
    data = data if binary is None else binary
    text += b" " * (-len(text) % 4)
    data += b"\0" * (-len(data) % 4)
    body = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(data), 0x004E4942) + data
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def obj() -> bytes:
    """Return a tetrahedron as Wavefront OBJ."""
    lines = [f"v {x} {y} {z}" for x, y, z in TETRAHEDRON] + [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in FACES]
    return ("# sample\n" + "\n".join(lines) + "\n").encode()


def stl() -> bytes:
    """Return a tetrahedron as binary STL."""
    body = b"".join(struct.pack("<12fH", 0, 0, 0, *(x for n in face for x in TETRAHEDRON[n]), 0) for face in FACES)
    return b"sample".ljust(80, b"\0") + struct.pack("<I", len(FACES)) + body


def ply() -> bytes:
    """Return a tetrahedron as binary PLY."""
    head = (
        "ply\nformat binary_little_endian 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 4\nproperty list uchar int vertex_indices\nend_header\n"
    )
    body = b"".join(struct.pack("<3f", *vertex) for vertex in TETRAHEDRON)
    return head.encode() + body + b"".join(struct.pack("<B3i", 3, *face) for face in FACES)


# --- video ---


def box(kind: bytes, *content: bytes) -> bytes:
    """Return one box of an MP4 file."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def mp4(*, samples: Sequence[int] = (40, 30, 30), handler: bytes = b"vide", brand: bytes = b"isom") -> bytes:
    """Return an MP4 file of one track; its samples are filler."""
    start = box(b"ftyp", brand, b"\0\0\2\0", b"isomiso2mp41")
    media = box(b"mdat", b"\x55" * sum(samples))
    sizes = box(b"stsz", struct.pack(">III", 0, 0, len(samples)), struct.pack(f">{len(samples)}I", *samples))
    offsets = box(b"stco", struct.pack(">III", 0, 1, len(start) + 8))
    tables = box(b"minf", box(b"stbl", sizes, offsets))
    about = box(b"hdlr", b"\0" * 8, handler, b"\0" * 13)
    header = box(b"tkhd", b"\0" * 76, struct.pack(">II", 64 << 16, 48 << 16))
    movie = box(b"mvhd", struct.pack(">IIIII", 0, 0, 0, 1000, 1500), b"\0" * 80)
    return start + media + box(b"moov", movie, box(b"trak", header, box(b"mdia", about, tables)))


def element(identity: bytes, *content: bytes, open_end: bool = False) -> bytes:
    """Return one EBML element, its length in 8 bytes."""
    body = b"".join(content)
    length = b"\x01" + b"\xff" * 7 if open_end else struct.pack(">Q", 1 << 56 | len(body))
    return identity + length + body


def webm(*, track: int = 1, blocks: int = 3, live: bool = False) -> bytes:
    """Return a WEBM file of one track (1 picture, 2 sound); `live` leaves the lengths of segment and cluster open."""
    head = element(b"\x1a\x45\xdf\xa3", element(b"\x42\x82", b"webm"))
    info = element(
        b"\x15\x49\xa9\x66",
        element(b"\x2a\xd7\xb1", (1_000_000).to_bytes(3, "big")),
        element(b"\x44\x89", struct.pack(">d", 1500.0)),
    )
    shape = element(b"\xe0", element(b"\xb0", b"\x40"), element(b"\xba", b"\x30"))
    codec = element(b"\x86", b"V_VP8" if track == 1 else b"A_OPUS")
    entry = [element(b"\xd7", b"\1"), element(b"\x73\xc5", b"\1"), element(b"\x83", bytes([track])), codec]
    tracks = element(b"\x16\x54\xae\x6b", element(b"\xae", *entry, *([shape] if track == 1 else [])))
    body = [element(b"\xa3", b"\x81\0\0\x80", b"\x55" * 20) for _ in range(blocks)]
    cluster = element(b"\x1f\x43\xb6\x75", element(b"\xe7", b"\0"), *body, open_end=live)
    return head + element(b"\x18\x53\x80\x67", info, tracks, cluster, open_end=live)


# --- sound ---


def wav(*, samples: int = 800) -> bytes:
    """Return a WAV file, mono, 8000 samples per second, 16 bits."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16)
    data = struct.pack("<4sI", b"data", samples * 2) + b"\x10\x20" * samples
    return struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(data), b"WAVE") + form + data


def checksum(data: bytes, polynomial: int, bits: int) -> int:
    """Return a cyclic checksum, highest bit first, starting from zero, bit by bit."""
    value = 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            top = value >> (bits - 1)
            value = value << 1 & (1 << bits) - 1
            value ^= polynomial if top else 0
    return value


def flac(*, frames: int = 4, last: int = 4096) -> bytes:
    """Return a FLAC file, mono, 44100 samples per second, 16 bits: frames of 4096 equal samples, the last of `last`."""
    packed = 44_100 << 44 | 0 << 41 | 15 << 36 | (4096 * (frames - 1) + last if frames else 0)
    info = struct.pack(">HH", 4096, 4096) + b"\0" * 6 + packed.to_bytes(8, "big") + b"\0" * 16
    made = b"fLaC" + b"\x80\0\0\x22" + info
    for number in range(frames):
        # 44100 per second (9), one channel, 16 bits (4); the frame's number is coded as UTF-8 codes characters.
        if number == frames - 1 and last != 4096:
            head = b"\xff\xf8\x79\x08" + chr(number).encode() + struct.pack(">H", last - 1)
        else:
            head = b"\xff\xf8\xc9\x08" + chr(number).encode()
        frame = head + bytes([checksum(head, 0x07, 8)]) + b"\0" + struct.pack(">h", number % 300 * 100)
        made += frame + checksum(frame, 0x8005, 16).to_bytes(2, "big")
    return made


def ogg_page(body: bytes, *, number: int, granule: int, flags: int, serial: int = 7) -> bytes:
    """Return one page of an OGG file that holds one packet of less than 255 bytes."""
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, granule, serial, number, 0) + bytes([1, len(body)])
    page = head + body
    return page[:22] + struct.pack("<I", checksum(page, 0x04C11DB7, 32)) + page[26:]


def ogg(*, pages: int = 3) -> bytes:
    """Return an Opus file in OGG: two header pages, then pages of 20 ms."""
    made = ogg_page(b"OpusHead\x01\x01" + struct.pack("<HIHB", 0, 48_000, 0, 0), number=0, granule=0, flags=2)
    made += ogg_page(b"OpusTags" + struct.pack("<I6sI", 6, b"sample", 0), number=1, granule=0, flags=0)
    for page in range(pages):
        last = 4 if page == pages - 1 else 0
        made += ogg_page(b"\xfc\xff\xfe", number=2 + page, granule=960 * (page + 1), flags=last)
    return made


def mp3(*, frames: int = 4, tag: bool = True) -> bytes:
    """Return an MP3 file of silent frames, 128 kbit/s, 44100 samples per second, 417 bytes each."""
    start = b"ID3\x04\0\0\0\0\0\x0a" + b"\0" * 10 if tag else b""
    return start + (b"\xff\xfb\x90\xc0" + b"\0" * 413) * frames
