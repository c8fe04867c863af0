"""
Meshes: GLB and glTF down to the last vertex; STL, PLY and OBJ by their own counts.

glTF (Khronos glTF 2.0 specification) is a tree of indices: accessors lie in buffer views, buffer views in buffers. All
of them are checked to lie where they must, every position to be a finite number and every index to name a vertex that
exists. Nothing is ever fetched: a buffer or picture outside the file is refused. Geometry packed by Draco or meshopt is
checked to be there, not unpacked, and the details say so.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from runcomfy.adapters.media_source import CHUNK, Corrupt, Source

GLB_MAGIC: Final = b"glTF"
_JSON_CHUNK: Final = 0x4E4F534A
_BIN_CHUNK: Final = 0x004E4942

JSON_LIMIT: Final = 16 << 20
"""Bytes of the JSON part that are read: it describes the geometry and does not hold it."""
JSON_VALUES: Final = 2_000_000
"""Three bytes of JSON can become 70 in memory."""
EMBEDDED_LIMIT: Final = 64 << 20
"""Bytes of a .gltf file that carries its buffers inside itself, as base64."""

# Component type -> (bytes, array type code). 5126 is the only one with fractions.
_COMPONENTS: Final = {5120: (1, "b"), 5121: (1, "B"), 5122: (2, "h"), 5123: (2, "H"), 5125: (4, "I"), 5126: (4, "f")}
_FLOAT: Final = 5126
_INDEX_TYPES: Final = frozenset({5121, 5123, 5125})
_WIDTHS: Final = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_PACKINGS: Final = {
    "KHR_draco_mesh_compression": "draco",
    "EXT_meshopt_compression": "meshopt",
    "KHR_meshopt_compression": "meshopt",
}

Read = Callable[[int, int], bytes]
"""Offset and length within a buffer -> its bytes."""


def check_glb(source: Source) -> Mapping[str, Any]:
    """Check a binary glTF file; return vertices, triangles, meshes and what it is packed with. Raises Corrupt."""
    version, length = struct.unpack("<II", source.at(4, 8))
    if version != 2:
        raise Corrupt(f"its glTF version is {version}, not 2")
    if length != source.size:
        raise Corrupt(f"its header says {length} bytes and the file has {source.size}")
    document: Any = None
    binary: tuple[int, int] | None = None
    offset, number = 12, 0
    while offset < length:
        size, kind = struct.unpack("<II", source.at(offset, 8))
        offset += 8
        if size % 4 or offset + size > length:
            raise Corrupt("one of its parts is longer than the file")
        if number == 0:
            if kind != _JSON_CHUNK:
                raise Corrupt("its first part is not JSON")
            document = _load(source.at(offset, size) if size <= JSON_LIMIT else b"")
        elif number == 1 and kind == _BIN_CHUNK:
            binary = (offset, size)
        elif number > 64:
            raise Corrupt("it has an absurd number of parts")
        offset += size
        number += 1
    return _Document(document, source, binary).check()


def check_gltf(source: Source) -> Mapping[str, Any]:
    """Check a glTF file in JSON, which must carry all its buffers inside itself. Raises Corrupt."""
    if source.size > EMBEDDED_LIMIT:
        raise Corrupt(f"a glTF file in JSON of more than {EMBEDDED_LIMIT >> 20} MB is not read")
    return _Document(_load(source.at(0, source.size)), source, None).check()


def _load(raw: bytes) -> Any:
    if not raw:
        raise Corrupt("its JSON part is empty or absurdly long")
    if sum(map(raw.count, (b",", b"[", b"{"))) > JSON_VALUES:
        raise Corrupt("its JSON part holds an absurd number of values")
    try:
        return json.loads(raw.rstrip(b" \0"))
    except (ValueError, RecursionError) as error:
        raise Corrupt("its JSON part cannot be read") from error


class _Document:
    """One glTF document and the buffers that belong to it."""

    def __init__(self, document: Any, source: Source, binary: tuple[int, int] | None) -> None:
        if not isinstance(document, dict):
            raise Corrupt("its JSON part is not an object")
        self._root = document
        self._source = source
        self._binary = binary
        self._packed: set[str] = set()
        self._floats_checked: set[int] = set()
        self._highest_index: dict[int, int] = {}
        # A file may name the same bytes a thousand times; honest ones read each of them once.
        self._budget = 8 * source.size + (64 << 20)

    def check(self) -> Mapping[str, Any]:
        asset = self._root.get("asset")
        if not isinstance(asset, dict) or not str(asset.get("version", "")).startswith("2"):
            raise Corrupt("it does not say that it is glTF 2")
        self._buffers = [self._buffer(n, entry) for n, entry in enumerate(self._list("buffers"))]
        self._views = [self._view(entry) for entry in self._list("bufferViews")]
        self._accessors = self._list("accessors")
        for number in range(len(self._accessors)):
            self._extent(number)
        self._check_images()
        vertices = triangles = primitives = 0
        for mesh in self._list("meshes"):
            for primitive in self._list("primitives", mesh):
                points, faces = self._primitive(primitive)
                vertices, triangles, primitives = vertices + points, triangles + faces, primitives + 1
        if not vertices:
            raise Corrupt("it holds no vertices")
        details: dict[str, Any] = {
            "vertices": vertices,
            "triangles": triangles,
            "meshes": len(self._list("meshes")),
            "primitives": primitives,
            "materials": len(self._list("materials")),
        }
        return details | ({"packed": sorted(self._packed)} if self._packed else {})

    # --- the tree ---

    def _list(self, key: str, of: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        found = (self._root if of is None else of).get(key, [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise Corrupt(f"its list of {key} is malformed")
        return found

    @staticmethod
    def _number(entry: Mapping[str, Any], key: str, default: int | None = None) -> int:
        value = entry.get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Corrupt(f"its {key} is {str(value)[:40]!r}")
        return value

    def _extensions(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        found = entry.get("extensions", {})
        return found if isinstance(found, dict) else {}

    def _buffer(self, number: int, entry: Mapping[str, Any]) -> tuple[Read | None, int]:
        """Return how to read a buffer, and its length."""
        length = self._number(entry, "byteLength")
        uri = entry.get("uri")
        if isinstance(uri, str):
            data = _data_uri(uri)
            if len(data) < length:
                raise Corrupt("one of its buffers is shorter than it says")
            return (lambda offset, count: data[offset : offset + count]), length
        if number == 0 and self._binary is not None:
            start, size = self._binary
            if size < length:
                raise Corrupt(f"its binary part has {size} bytes where {length} are promised")
            return (lambda offset, count: self._source.at(start + offset, count)), length
        if any(name in _PACKINGS for name in self._extensions(entry)):
            return None, length  # meshopt's stand-in for the unpacked bytes, which exist nowhere
        raise Corrupt("one of its buffers has no data")

    def _view(self, entry: Mapping[str, Any]) -> tuple[int, int, int, int, bool]:
        """Return buffer, offset, length, stride and whether the bytes are packed."""
        packed = False
        for name, extension in self._extensions(entry).items():
            if name in _PACKINGS and isinstance(extension, dict):
                self._packed.add(_PACKINGS[name])
                self._view(extension)
                packed = True
        buffer, offset = self._number(entry, "buffer"), self._number(entry, "byteOffset", 0)
        length, stride = self._number(entry, "byteLength"), self._number(entry, "byteStride", 0)
        if buffer >= len(self._buffers) or offset + length > self._buffers[buffer][1]:
            raise Corrupt("one of its buffer views lies outside its buffer")
        return buffer, offset, length, stride, packed or self._buffers[buffer][0] is None

    def _extent(self, number: int) -> tuple[int, int, int, int]:
        """Return component type, width, count and bytes from one element to the next; check that all fit their view."""
        if not 0 <= number < len(self._accessors):
            raise Corrupt("it names an accessor that it does not have")
        entry = self._accessors[number]
        kind = self._number(entry, "componentType")
        width = _WIDTHS.get(str(entry.get("type")))
        if kind not in _COMPONENTS or width is None:
            raise Corrupt("one of its accessors has a type that glTF does not have")
        count = self._number(entry, "count")
        size = _COMPONENTS[kind][0] * width
        stride = size
        if entry.get("bufferView") is not None:
            view = self._number(entry, "bufferView")
            if view >= len(self._views):
                raise Corrupt("it names a buffer view that it does not have")
            _, _, length, declared, packed = self._views[view]
            stride = declared or size
            needed = self._number(entry, "byteOffset", 0) + (stride * (count - 1) + size if count else 0)
            if (needed > length and not packed) or stride < size:
                raise Corrupt("one of its accessors lies outside its buffer view")
        return kind, width, count, stride

    def _check_images(self) -> None:
        for image in self._list("images"):
            uri = image.get("uri")
            if isinstance(uri, str):
                _data_uri(uri)
            elif self._number(image, "bufferView") >= len(self._views):
                raise Corrupt("one of its textures has no data")

    # --- the geometry ---

    def _primitive(self, primitive: Mapping[str, Any]) -> tuple[int, int]:
        """Check one primitive; return its vertices and triangles."""
        attributes = primitive.get("attributes")
        if not isinstance(attributes, dict) or "POSITION" not in attributes:
            raise Corrupt("a part of its mesh has no vertex positions")
        position = self._number(attributes, "POSITION")
        kind, width, vertices, _ = self._extent(position)
        if width != 3:
            raise Corrupt("its vertex positions are not points in space")
        draco = self._extensions(primitive).get("KHR_draco_mesh_compression")
        if isinstance(draco, dict):
            self._packed.add("draco")
            if self._number(draco, "bufferView") >= len(self._views):
                raise Corrupt("its packed geometry is missing")
        elif self._accessors[position].get("bufferView") is None and "sparse" not in self._accessors[position]:
            raise Corrupt("its vertex positions have no data")
        elif kind == _FLOAT:
            self._check_finite(position)
        count = vertices
        if primitive.get("indices") is not None:
            indices = self._number(primitive, "indices")
            index_kind, index_width, count, _ = self._extent(indices)
            if index_kind not in _INDEX_TYPES or index_width != 1:
                raise Corrupt("its indices are not whole numbers")
            if not isinstance(draco, dict) and self._highest(indices) >= max(1, vertices):
                raise Corrupt(f"it names vertex {self._highest(indices)} and has only {vertices}")
        return vertices, _triangles(self._number(primitive, "mode", 4), count)

    def _check_finite(self, number: int) -> None:
        if number in self._floats_checked:
            return
        self._floats_checked.add(number)
        for values in self._values(number):
            # A sum of 32-bit floats cannot overflow 64 bits, so it is finite exactly if every one of them is.
            if not math.isfinite(sum(values)):
                raise Corrupt("a vertex position is not a finite number")

    def _highest(self, number: int) -> int:
        if number not in self._highest_index:
            self._highest_index[number] = max((max(values) for values in self._values(number) if values), default=0)
        return self._highest_index[number]

    def _values(self, number: int) -> Iterator[array[Any]]:
        """Yield an accessor's numbers in pieces; nothing for packed ones. Sparse replacements come last."""
        entry = self._accessors[number]
        kind, width, count, stride = self._extent(number)
        if entry.get("bufferView") is not None:
            view = self._number(entry, "bufferView")
            yield from self._pieces(view, self._number(entry, "byteOffset", 0), kind, width, count, stride)
        sparse = entry.get("sparse")
        if isinstance(sparse, dict):
            replaced = self._number(sparse, "count")
            where = sparse.get("values")
            if not isinstance(where, dict) or replaced > count:
                raise Corrupt("one of its sparse accessors is malformed")
            view, offset = self._number(where, "bufferView"), self._number(where, "byteOffset", 0)
            size = _COMPONENTS[kind][0] * width
            if view >= len(self._views) or offset + replaced * size > self._views[view][2]:
                raise Corrupt("one of its sparse accessors lies outside its buffer view")
            yield from self._pieces(view, offset, kind, width, replaced, size)

    def _pieces(self, view: int, offset: int, kind: int, width: int, count: int, stride: int) -> Iterator[array[Any]]:
        buffer, start, _, _, packed = self._views[view]
        read = self._buffers[buffer][0]
        if packed or read is None or not count:
            return
        component, code = _COMPONENTS[kind]
        size = component * width
        per_piece = max(1, CHUNK // stride)
        at = start + offset
        for first in range(0, count, per_piece):
            elements = min(per_piece, count - first)
            self._budget -= elements * stride
            if self._budget < 0:
                raise Corrupt("it uses the same data over and over")
            raw = read(at + first * stride, (elements - 1) * stride + size)
            if stride != size:
                raw = _gather(raw, size, stride, elements)
            values = array(code, raw)
            if sys.byteorder == "big":
                values.byteswap()
            yield values


def _triangles(mode: int, corners: int) -> int:
    """Return how many triangles a primitive draws: a list (4), a strip (5) or a fan (6)."""
    if mode == 4:
        return corners // 3
    return max(0, corners - 2) if mode in {5, 6} else 0


def _gather(raw: bytes, size: int, stride: int, elements: int) -> bytes:
    """Return the elements of interleaved data side by side."""
    padded = raw + bytes(elements * stride - len(raw))
    packed = bytearray(elements * size)
    for byte in range(size):
        packed[byte::size] = padded[byte::stride]
    return bytes(packed)


def _data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not header.startswith("data:") or not comma:
        raise Corrupt("it refers to a file outside itself, which is never fetched")
    if not header.endswith(";base64"):
        raise Corrupt("it carries data in a form that is not read")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Corrupt("data that it carries cannot be read") from error


# --- STL ---------------------------------------------------------------------------------------------------

_STL_HEADER: Final = 84
_STL_FACE: Final = 50


def is_binary_stl(source: Source) -> bool:
    """Whether the file's length is exactly that of the number of faces it says it has; STL has no other mark."""
    if source.size < _STL_HEADER + _STL_FACE:
        return False
    (faces,) = struct.unpack("<I", source.at(80, 4))
    return source.size == _STL_HEADER + _STL_FACE * int(faces)


def check_binary_stl(source: Source) -> Mapping[str, Any]:
    """Check that every coordinate of a binary STL file is finite. Raises Corrupt."""
    faces = (source.size - _STL_HEADER) // _STL_FACE
    per_piece = CHUNK // _STL_FACE
    for first in range(0, faces, per_piece):
        count = min(per_piece, faces - first)
        # Normals come first; writers leave nonsense there for faces without area, and readers compute their own.
        raw = source.at(_STL_HEADER + first * _STL_FACE, count * _STL_FACE)[12:]
        values = array("f", _gather(raw, 36, _STL_FACE, count))
        if sys.byteorder == "big":
            values.byteswap()
        if not math.isfinite(sum(values)):
            raise Corrupt("a coordinate is not a finite number")
    return {"triangles": faces}


# --- PLY ---------------------------------------------------------------------------------------------------

_PLY_HEADER_LIMIT: Final = 64 << 10
_PLY_SIZES: Final = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), 1),
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "uint", "float", "int32", "uint32", "float32"), 4),
    **dict.fromkeys(("double", "float64"), 8),
}


def check_ply(source: Source) -> Mapping[str, Any]:
    """Check a PLY file's header, and that its length can hold what the header counts. Raises Corrupt."""
    raw = source.at(0, min(source.size, _PLY_HEADER_LIMIT))
    text, end, _ = raw.partition(b"end_header")
    if not end:
        raise Corrupt("its header has no end")
    counts: dict[str, int] = {}
    least, current = 0, 0
    binary = False
    for line in text.decode("ascii", "replace").splitlines():
        words = line.split()
        if words[:1] == ["format"] and len(words) > 1:
            binary = words[1].startswith("binary")
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal() and len(words[2]) < 12:
            current = int(words[2])
            counts[words[1][:40]] = current
        elif words[:1] == ["property"] and len(words) >= 3:
            least += current * _ply_least(words[1:], binary=binary)
    if not counts.get("vertex"):
        raise Corrupt("it holds no vertices")
    if source.size < len(text) + len(end) + least:
        raise Corrupt("it is cut off: it is shorter than what its header counts")
    return {"vertices": counts["vertex"]} | ({"triangles": counts["face"]} if counts.get("face") else {})


def _ply_least(words: list[str], *, binary: bool) -> int:
    """Return the fewest bytes that one property can take: a number in text is at least a digit and a space."""
    if words[0] != "list":
        return _PLY_SIZES.get(words[0], 1) if binary else 2
    corners = 3 if words[-1] in {"vertex_indices", "vertex_index"} else 0
    if not binary:
        return 2 + 2 * corners
    return _PLY_SIZES.get(words[1], 1) + corners * (_PLY_SIZES.get(words[2], 1) if len(words) > 2 else 1)


# --- text: OBJ and STL -------------------------------------------------------------------------------------

_OBJ_WORDS: Final = frozenset(
    {"v", "vt", "vn", "vp", "f", "l", "p", "o", "g", "s", "usemtl", "mtllib", "call", "cstype", "deg", "end"}
)


def is_text_mesh(head: bytes) -> str:
    """Return `obj` or `stl` if the first lines of a text read like one, otherwise an empty text."""
    lines = head.decode("utf-8", "replace").splitlines()[:60]
    if lines and lines[0].lstrip().startswith("solid") and any("facet" in line for line in lines[1:4]):
        return "stl"
    words = [line.split()[0] for line in lines[:-1] if line.strip() and not line.lstrip().startswith("#")]
    return "obj" if "v" in words and set(words) <= _OBJ_WORDS else ""


def check_text_stl(source: Source) -> Mapping[str, Any]:
    """Check that an STL file in text has facets and its last line. Raises Corrupt."""
    facets, tail = 0, b""
    for piece in source.pieces(0, source.size):
        # A word that lies across two pieces is found with the end of the piece before.
        facets += (tail[-len(b"endface") :] + piece).count(b"endfacet")
        tail = piece
    if not facets:
        raise Corrupt("it holds no facets")
    if b"endsolid" not in source.at(max(0, source.size - 512), min(512, source.size)):
        raise Corrupt("it is cut off: its last line is missing")
    return {"triangles": facets}


def check_obj(source: Source) -> Mapping[str, Any]:
    """Check an OBJ file: coordinates are finite numbers, faces name vertices that exist. Raises Corrupt."""
    vertices = faces = 0
    rest = b""
    for piece in source.pieces(0, source.size):
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        if len(rest) > CHUNK:
            raise Corrupt("it has an absurdly long line")
        for line in lines:
            vertices, faces = _obj_line(line, vertices, faces)
    vertices, faces = _obj_line(rest, vertices, faces)
    if not vertices:
        raise Corrupt("it holds no vertices")
    return {"vertices": vertices, "triangles": faces}


def _obj_line(line: bytes, vertices: int, faces: int) -> tuple[int, int]:
    if line.startswith(b"v "):
        try:
            finite = math.isfinite(sum(map(float, line.split()[1:4])))
        except ValueError as error:
            raise Corrupt("a vertex position is not a number") from error
        if not finite or len(line.split()) < 4:
            raise Corrupt("a vertex position is not a finite point")
        return vertices + 1, faces
    if line.startswith(b"f "):
        corners = line.split()[1:]
        for corner in corners:
            number = corner.partition(b"/")[0]
            if not number.removeprefix(b"-").isdigit() or len(number) > 12 or abs(int(number)) > vertices:
                raise Corrupt("a face names a vertex that is not there")
        return vertices, faces + max(0, len(corners) - 2)
    return vertices, faces
