"""
Meshes without a model: reliefs from pictures, balls from voxels, cubes, and binary glTF 2.0.

A relief is a closed plate: its front carries the heights, its sides and back close it, so that it can be printed or
cut. It stands upright (glTF: y up, z towards the viewer), so a viewer's first look shows the picture. Everything is
computed with plain float arithmetic, which IEEE 754 makes the same everywhere, and packed little-endian: equal inputs
give equal bytes.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageChops, ImageFilter

GENERATOR = "runcomfy-testing emulator (no GPU model ran)"

GLB_MAGIC = 0x46546C67
GLB_JSON = 0x4E4F534A
GLB_BIN = 0x004E4942
ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963
UNSIGNED_SHORT, UNSIGNED_INT, FLOAT = 5123, 5125, 5126
TRIANGLES = 4

RELIEF_HEIGHT = 0.36
PLATE_THICKNESS = 0.05
"""Parts of the longer side, which is 2 long: flat pictures still give a solid plate."""
FINE_SHARE = 0.3
"""How much of a height is the picture's own detail; the rest is its broad shape, or every glint would be a needle."""
RIPPLE = 0.006
"""How far a seed moves the surface: enough that two seeds give two meshes, too little to be seen as noise."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Triangles. `positions` and `normals` are flat lists x, y, z; `colors` are r, g, b, a as 16-bit linear light."""

    positions: array[float]
    indices: array[int]
    normals: array[float] = field(default_factory=lambda: array("f"))
    colors: array[int] = field(default_factory=lambda: array("H"))

    @property
    def vertices(self) -> int:
        """How many."""
        return len(self.positions) // 3

    @property
    def faces(self) -> int:
        """How many triangles."""
        return len(self.indices) // 3

    def __str__(self) -> str:
        return f"<MESH of {self.vertices} vertices and {self.faces} faces>"


# --- reliefs ----------------------------------------------------------------------------------------------


def heights_of(picture: Image.Image, columns: int, rows: int) -> list[float]:
    """Return a height from 0 to 1 for each point of a grid, row by row from the top: the picture's brightness.

    What the picture shows as transparent counts half, so that a cut-out subject stands out of its ground.
    """
    brightness = picture.convert("RGB").convert("L")
    if "A" in picture.getbands():
        alpha = picture.getchannel("A").point([128 + value // 2 for value in range(256)])
        brightness = ImageChops.multiply(brightness, alpha)
    small = brightness.resize((columns, rows), Image.Resampling.BOX)
    broad = small.filter(ImageFilter.BoxBlur(max(columns, rows) // 40)).filter(ImageFilter.BoxBlur(1)).tobytes()
    fine = small.filter(ImageFilter.BoxBlur(1)).tobytes()
    return [((1 - FINE_SHARE) * b + FINE_SHARE * f) / 255 for b, f in zip(broad, fine, strict=True)]


def _ripple(width: int, rows: int, noise: bytes) -> list[float]:
    """Return a smooth field between -1 and 1 from 64 random bytes."""
    rough = Image.frombytes("L", (8, 8), noise[:64]).resize((width, rows), Image.Resampling.BICUBIC)
    return [value / 127.5 - 1.0 for value in rough.tobytes()]


def relief(picture: Image.Image, *, longest: int = 128, noise: bytes = b"") -> Mesh:
    """Return the relief of a picture: `longest` points along its longer side, brighter is higher.

    `noise` is 64 random bytes that move the surface a little, or nothing.
    """
    scale = longest / max(picture.size)
    columns, rows = (max(2, round(side * scale)) for side in picture.size)
    heights = heights_of(picture, columns, rows)
    if noise:
        moves = _ripple(columns, rows, noise)
        heights = [height + RIPPLE * move for height, move in zip(heights, moves, strict=True)]
    step = 2.0 / (max(columns, rows) - 1)
    builder = _Builder(columns, rows, step, heights, picture)
    builder.front()
    builder.sides()
    builder.back()
    return builder.mesh


class _Builder:
    """Puts the faces of one relief together."""

    def __init__(self, columns: int, rows: int, step: float, heights: list[float], picture: Image.Image) -> None:
        self.columns, self.rows, self.step = columns, rows, step
        self.heights = heights
        self.left = -step * (columns - 1) / 2
        self.top = step * (rows - 1) / 2
        self.floor = -2.0 * PLATE_THICKNESS
        linear = [round(65535 * linear_light(value / 255)) for value in range(256)]
        small = picture.convert("RGB").resize((columns, rows), Image.Resampling.BOX).tobytes()
        self.tints = [
            (linear[small[i]], linear[small[i + 1]], linear[small[i + 2]], 65535) for i in range(0, len(small), 3)
        ]
        self.mesh = Mesh(array("f"), array("I"))

    def _add(self, point: Sequence[float], normal: Sequence[float], tint: Sequence[int]) -> int:
        self.mesh.positions.extend(point)
        self.mesh.normals.extend(normal)
        self.mesh.colors.extend(tint)
        return self.mesh.vertices - 1

    def _z(self, column: int, row: int) -> float:
        return 2.0 * RELIEF_HEIGHT * self.heights[row * self.columns + column]

    def _point(self, column: int, row: int) -> tuple[float, float, float]:
        return self.left + column * self.step, self.top - row * self.step, self._z(column, row)

    def front(self) -> None:
        """The surface itself, with smooth normals."""
        for row in range(self.rows):
            above, below = max(row - 1, 0), min(row + 1, self.rows - 1)
            for column in range(self.columns):
                before, after = max(column - 1, 0), min(column + 1, self.columns - 1)
                slope_x = (self._z(after, row) - self._z(before, row)) / ((after - before) * self.step)
                slope_y = (self._z(column, above) - self._z(column, below)) / ((below - above) * self.step)
                length = math.sqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
                normal = (-slope_x / length, -slope_y / length, 1.0 / length)
                self._add(self._point(column, row), normal, self.tints[row * self.columns + column])
        for row in range(self.rows - 1):
            for column in range(self.columns - 1):
                a = row * self.columns + column
                b = a + self.columns
                self.mesh.indices.extend((a, b, a + 1, a + 1, b, b + 1))

    def _border(self) -> list[tuple[int, int, tuple[float, float, float]]]:
        """The border's points, anticlockwise from the left top, and where the side that begins there looks."""
        last_column, last_row = self.columns - 1, self.rows - 1
        return (
            [(0, row, (-1.0, 0.0, 0.0)) for row in range(last_row)]
            + [(column, last_row, (0.0, -1.0, 0.0)) for column in range(last_column)]
            + [(last_column, row, (1.0, 0.0, 0.0)) for row in range(last_row, 0, -1)]
            + [(column, 0, (0.0, 1.0, 0.0)) for column in range(last_column, 0, -1)]
        )

    def sides(self) -> None:
        """Walls from the border down to the floor."""
        border = self._border()
        for number, (column, row, outward) in enumerate(border):
            next_column, next_row, _ = border[(number + 1) % len(border)]
            corners = []
            for c, r in ((column, row), (next_column, next_row)):
                point, tint = self._point(c, r), self.tints[r * self.columns + c]
                corners.append(self._add(point, outward, tint))
                corners.append(self._add((point[0], point[1], self.floor), outward, tint))
            top, bottom, next_top, next_bottom = corners
            self.mesh.indices.extend((top, bottom, next_top, next_top, bottom, next_bottom))

    def back(self) -> None:
        """A fan around the middle that uses the walls' own border points, so that nothing gapes."""
        normal, tint = (0.0, 0.0, -1.0), (9000, 9000, 9500, 65535)
        middle = self._add((0.0, 0.0, self.floor), normal, tint)
        rim = []
        for column, row, _ in self._border():
            x, y, _z = self._point(column, row)
            rim.append(self._add((x, y, self.floor), normal, tint))
        for number, here in enumerate(rim):
            self.mesh.indices.extend((middle, rim[(number + 1) % len(rim)], here))


def linear_light(value: float) -> float:
    """Return the linear light of an sRGB value from 0 to 1; glTF wants vertex colours linear."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


# --- other shapes -----------------------------------------------------------------------------------------


def _quads(corners: Sequence[Sequence[Sequence[float]]], normals: Sequence[Sequence[float]]) -> Mesh:
    mesh = Mesh(array("f"), array("I"))
    for quad, normal in zip(corners, normals, strict=True):
        first = mesh.vertices
        for corner in quad:
            mesh.positions.extend(corner)
            mesh.normals.extend(normal)
        mesh.indices.extend((first, first + 1, first + 2, first, first + 2, first + 3))
    return mesh


def cube(size: float = 1.0) -> Mesh:
    """Return a cube around the origin, with flat sides."""
    corners, normals = [], []
    for axis in range(3):
        for sign in (1.0, -1.0):
            u, v = (axis + 1) % 3, (axis + 2) % 3
            quad = []
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)) if sign > 0 else ((-1, -1), (-1, 1), (1, 1), (1, -1)):
                point = [0.0, 0.0, 0.0]
                point[axis], point[u], point[v] = sign * size / 2, a * size / 2, b * size / 2
                quad.append(point)
            corners.append(quad)
            normals.append([sign if i == axis else 0.0 for i in range(3)])
    return _quads(corners, normals)


BALL_RADIUS = 0.375
"""Of the cube's side. A ball of 30 cells then has as many vertices and faces as the recorded server's."""


def voxel_ball(resolution: int, threshold: float = 0.6) -> Mesh:
    """Return the surface of the cells of a ball: only the sides that look outward, joined at their corners."""
    centre, reach = (resolution - 1) / 2, resolution * BALL_RADIUS
    limit = reach * (1.0 + 0.2 * (0.6 - threshold))

    def solid(cell: tuple[int, int, int]) -> bool:
        return sum((i - centre) ** 2 for i in cell) <= limit * limit

    mesh = Mesh(array("f"), array("I"))
    known: dict[tuple[int, int, int], int] = {}

    def corner(point: tuple[int, int, int]) -> int:
        if point not in known:
            known[point] = mesh.vertices
            mesh.positions.extend(2 * i / resolution - 1.0 for i in point)
        return known[point]

    span = range(resolution)
    for cell in ((x, y, z) for x in span for y in span for z in span if solid((x, y, z))):
        for axis in range(3):
            for side in (0, 1):
                beyond = list(cell)
                beyond[axis] += 2 * side - 1
                if 0 <= beyond[axis] < resolution and solid((beyond[0], beyond[1], beyond[2])):
                    continue
                u, v = (axis + 1) % 3, (axis + 2) % 3
                quad = []
                for a, b in ((0, 0), (1, 0), (1, 1), (0, 1)) if side else ((0, 0), (0, 1), (1, 1), (1, 0)):
                    point = list(cell)
                    point[axis] += side
                    point[u] += a
                    point[v] += b
                    quad.append(corner((point[0], point[1], point[2])))
                mesh.indices.extend((quad[0], quad[1], quad[2], quad[0], quad[2], quad[3]))
    return mesh


# --- binary glTF ------------------------------------------------------------------------------------------


def _little(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values = array(values.typecode, values)
        values.byteswap()
    return values.tobytes()


class _Buffer:
    """The binary chunk, and the views and accessors that describe it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, data: bytes, target: int, **accessor: Any) -> int:
        """Append one accessor's bytes, aligned to 4, and return its number."""
        self.data.extend(bytes(-len(self.data) % 4))
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(data), "target": target}
        self.data.extend(data)
        self.views.append(view)
        self.accessors.append({"bufferView": len(self.views) - 1, **accessor})
        return len(self.accessors) - 1


def glb(mesh: Mesh, *, name: str = "mesh", extras: Mapping[str, Any] | None = None) -> bytes:
    """Return the mesh as binary glTF 2.0. `extras` goes into `asset.extras`, beside the generator's name."""
    count = mesh.vertices
    buffer = _Buffer()
    attributes = _attributes(mesh, buffer)
    # 65535 itself is the primitive restart value, which no index may have.
    short = count <= 65535
    indices = buffer.add(
        _little(array("H", mesh.indices) if short else array("I", mesh.indices)),
        ELEMENT_ARRAY_BUFFER,
        componentType=UNSIGNED_SHORT if short else UNSIGNED_INT,
        count=len(mesh.indices),
        type="SCALAR",
    )
    base = [1.0, 1.0, 1.0, 1.0] if mesh.colors else [0.62, 0.63, 0.66, 1.0]
    document = {
        "asset": {"version": "2.0", "generator": GENERATOR} | ({"extras": dict(extras)} if extras else {}),
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [
            {
                "name": name,
                "primitives": [
                    {"attributes": attributes, "indices": indices, "material": 0, "mode": TRIANGLES},
                ],
            }
        ],
        "materials": [
            {
                "name": "surface",
                "pbrMetallicRoughness": {"baseColorFactor": base, "metallicFactor": 0.1, "roughnessFactor": 0.7},
            }
        ],
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": len(buffer.data)}],
    }
    return packed(document, bytes(buffer.data))


def _attributes(mesh: Mesh, buffer: _Buffer) -> dict[str, int]:
    """Put what each vertex has into the buffer; return the accessor of each attribute."""
    count = mesh.vertices
    axes = [mesh.positions[axis::3] for axis in range(3)]
    attributes = {
        "POSITION": buffer.add(
            _little(mesh.positions),
            ARRAY_BUFFER,
            componentType=FLOAT,
            count=count,
            type="VEC3",
            min=[min(axis) for axis in axes],
            max=[max(axis) for axis in axes],
        )
    }
    if mesh.normals:
        attributes["NORMAL"] = buffer.add(
            _little(mesh.normals), ARRAY_BUFFER, componentType=FLOAT, count=count, type="VEC3"
        )
    if mesh.colors:
        attributes["COLOR_0"] = buffer.add(
            _little(mesh.colors),
            ARRAY_BUFFER,
            componentType=UNSIGNED_SHORT,
            normalized=True,
            count=count,
            type="VEC4",
        )
    return attributes


def packed(document: Mapping[str, Any], data: bytes) -> bytes:
    """Return a GLB file of these two chunks: the JSON padded with spaces, the binary one with zeros."""
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    data += bytes(-len(data) % 4)
    return (
        struct.pack("<III", GLB_MAGIC, 2, 12 + 8 + len(text) + 8 + len(data))
        + struct.pack("<II", len(text), GLB_JSON)
        + text
        + struct.pack("<II", len(data), GLB_BIN)
        + data
    )
