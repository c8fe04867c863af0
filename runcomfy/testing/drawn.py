"""What tests look at drawn things with: pictures to draw from, and a reader of GLB files after the specification."""

# ruff: noqa: S101 - asserts show what is shown

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from typing import Any, Final

from PIL import Image, ImageDraw

_COMPONENTS: Final = {5121: ("B", 1), 5123: ("H", 2), 5125: ("I", 4), 5126: ("f", 4)}
_PARTS: Final = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def ramp(size: int = 128, *, rising: bool = True) -> Image.Image:
    """Return a picture that is dark on the left and bright on the right, or the other way round."""
    picture = Image.linear_gradient("L").resize((size, size)).rotate(90 if rising else -90)
    return picture.convert("RGB")


def ball(size: int = 256) -> Image.Image:
    """Return a picture of a ball that shines in the middle, before black."""
    picture = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(picture)
    for step in range(40):
        edge = size // 8 + step * size // 120
        draw.ellipse((edge, edge, size - edge, size - edge), fill=(60 + 4 * step,) * 3)
    return picture


def pixels(picture: Image.Image) -> str:
    """Return a digest of the mode, the size and every pixel."""
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()


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
        form, width = _COMPONENTS[accessor["componentType"]]
        parts = _PARTS[accessor["type"]]
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
        """Where its points are."""
        return self.attributes["POSITION"]

    def faces(self) -> list[tuple[int, int, int]]:
        """Return its triangles, as three indices each."""
        return [(a, b, c) for a, b, c in _chunks(tuple(self.indices), 3)]

    def check(self) -> None:
        """Check everything a viewer relies on. Raises AssertionError."""
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
        """Return how often each edge is walked in each direction, corners of equal place taken as one."""
        points = self.positions
        walked: Counter[tuple[tuple[float, ...], tuple[float, ...]]] = Counter()
        for face in self.faces():
            for a, b in zip(face, (*face[1:], face[0]), strict=True):
                walked[points[a], points[b]] += 1
        return walked


def _chunks(flat: tuple[Any, ...], size: int) -> list[tuple[Any, ...]]:
    return [flat[i : i + size] for i in range(0, len(flat), size)]
