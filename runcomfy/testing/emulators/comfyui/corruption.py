"""Ways to spoil a file on its way, for `Fault.corrupted`."""

from __future__ import annotations

import struct

PNG_HEAD = 8


def _chunk(body: bytes, name: bytes) -> tuple[int, int]:
    """Where a PNG chunk's data begins, and its length. Raises ValueError if there is none."""
    at = PNG_HEAD
    while at + 8 <= len(body):
        length, kind = struct.unpack(">I4s", body[at : at + 8])
        if kind == name:
            return at + 8, length
        at += 12 + length
    raise ValueError(f"no chunk {name!r}")


def bad_crc(body: bytes, _: int) -> bytes:
    """A PNG whose picture data does not match its checksum."""
    start, length = _chunk(body, b"IDAT")
    crc = start + length
    return body[:crc] + bytes(byte ^ 0xFF for byte in body[crc : crc + 4]) + body[crc + 4 :]


def cut_idat(body: bytes, _: int) -> bytes:
    """A PNG that ends in the middle of its picture data, with a Content-Length that agrees."""
    start, length = _chunk(body, b"IDAT")
    return body[: start + length // 2]


def wrong_glb_length(body: bytes, _: int) -> bytes:
    """A GLB whose header promises more than there is."""
    return body[:8] + struct.pack("<I", len(body) + 100) + body[12:]


def without_moov(body: bytes, _: int) -> bytes:
    """An MP4 without its index."""
    return body.replace(b"moov", b"free")


def other_bytes_each_time(body: bytes, count: int) -> bytes:
    """Other content at every read, of the same length."""
    return body[:-1] + bytes([(body[-1] + count) % 256]) if body else body


def empty(_: bytes, __: int) -> bytes:
    """Nothing at all."""
    return b""
