"""Meshes are read to the last vertex and face; what contradicts itself or breaks off is refused."""

from __future__ import annotations

import base64
import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

from runcomfy.adapters.media_mesh import EMBEDDED_LIMIT
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media
from runcomfy.testing import samples

MESH = OutputKind.MESH

Inspect = Callable[..., Media]
Refusal = Callable[..., str]


def change(edit: Callable[[dict[str, Any]], object]) -> bytes:
    document, binary = samples.gltf()
    document = copy.deepcopy(document)
    edit(document)
    return samples.glb(document, binary)


@pytest.mark.fault(51)
def test_every_cut_of_a_glb_is_seen(refusal: Refusal) -> None:
    whole = samples.glb()
    for length in range(1, len(whole)):
        refusal(whole[:length], MESH)
    refusal(whole + b"\0\0\0\0", MESH)


@pytest.mark.fault(51)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_vertex_that_is_not_a_finite_number(refusal: Refusal, value: float) -> None:
    vertices = [*samples.TETRAHEDRON[:3], (0.0, value, 1.0)]
    assert "finite" in refusal(samples.glb(*samples.gltf(vertices)), MESH)


@pytest.mark.fault(51)
def test_a_face_that_names_a_vertex_that_is_not_there(refusal: Refusal) -> None:
    assert "vertex 4 and has only 4" in refusal(samples.glb(*samples.gltf(faces=[(0, 1, 4)])), MESH)


def _set(*keys: str | int, to: object) -> Callable[[dict[str, Any]], object]:
    def edit(document: dict[str, Any]) -> None:
        at: Any = document
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = to

    return edit


@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (_set("asset", to={"version": "1.0"}), "glTF 2"),
        (_set("meshes", to=[]), "no vertices"),
        (_set("meshes", to="x"), "malformed"),
        (_set("meshes", 0, "primitives", to=[]), "no vertices"),
        (_set("meshes", 0, "primitives", 0, "attributes", to={}), "no vertex positions"),
        (_set("meshes", 0, "primitives", 0, "attributes", "POSITION", to=9), "does not have"),
        (_set("meshes", 0, "primitives", 0, "attributes", "POSITION", to=-1), "POSITION"),
        (_set("meshes", 0, "primitives", 0, "indices", to=0), "not whole numbers"),
        (_set("accessors", 0, "count", to=5), "outside its buffer view"),
        (_set("accessors", 0, "count", to=2**31), "outside its buffer view"),
        (_set("accessors", 0, "count", to=float("nan")), "count"),
        (_set("accessors", 0, "type", to="VEC9"), "type"),
        (_set("accessors", 0, "byteOffset", to=10**30), "outside its buffer view"),
        (_set("accessors", 0, "bufferView", to=7), "does not have"),
        (_set("bufferViews", 0, "byteLength", to=10**6), "outside its buffer"),
        (_set("bufferViews", 0, "buffer", to=1), "outside its buffer"),
        (_set("bufferViews", 0, "byteStride", to=4), "outside its buffer view"),
        (_set("buffers", 0, "byteLength", to=10**9), "promised"),
        (_set("buffers", 0, "uri", to="mesh.bin"), "outside itself"),
        (_set("buffers", 0, "uri", to="http://169.254.169.254/latest"), "outside itself"),
        (_set("buffers", 0, "uri", to="data:application/octet-stream;base64,!!"), "cannot be read"),
        (_set("images", to=[{"uri": "file:///etc/passwd"}]), "outside itself"),
        (_set("accessors", 0, to={"componentType": 5126, "count": 4, "type": "VEC3"}), "no data"),
    ],
)
@pytest.mark.threat("S6")
def test_glb_files_that_contradict_themselves(
    refusal: Refusal, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    assert reason in refusal(change(edit), MESH)


def test_glb_with_interleaved_vertices(inspect: Inspect, refusal: Refusal) -> None:
    document, _ = samples.gltf()
    for middle, fine in ((0.5, True), (float("nan"), False)):
        # Position and normal side by side; the normal holds a NaN, which is nobody's business.
        points = b"".join(struct.pack("<6f", x, y, z * middle, float("nan"), 0, 0) for x, y, z in samples.TETRAHEDRON)
        corners = b"".join(struct.pack("<3H", *face) for face in samples.FACES)
        document["buffers"] = [{"byteLength": len(points) + len(corners)}]
        document["bufferViews"] = [
            {"buffer": 0, "byteLength": len(points), "byteStride": 24},
            {"buffer": 0, "byteOffset": len(points), "byteLength": len(corners)},
        ]
        if fine:
            assert inspect(samples.glb(document, points + corners), MESH).details["vertices"] == 4
        else:
            assert "finite" in refusal(samples.glb(document, points + corners), MESH)


def test_glb_with_sparse_vertices(inspect: Inspect, refusal: Refusal) -> None:
    document, binary = samples.gltf()
    start = len(binary)
    document["bufferViews"] += [
        {"buffer": 0, "byteOffset": start, "byteLength": 4},
        {"buffer": 0, "byteOffset": start + 4, "byteLength": 12},
    ]
    document["buffers"][0]["byteLength"] = start + 16
    document["accessors"][0]["sparse"] = {
        "count": 1,
        "indices": {"bufferView": 2, "componentType": 5123},
        "values": {"bufferView": 3},
    }
    extra = struct.pack("<HH", 2, 0)
    assert inspect(samples.glb(document, binary + extra + struct.pack("<3f", 1, 2, 3)), MESH).kind is MESH
    assert "finite" in refusal(samples.glb(document, binary + extra + struct.pack("<3f", 1, float("inf"), 3)), MESH)
    document["accessors"][0]["sparse"]["count"] = 2
    assert "sparse" in refusal(samples.glb(document, binary + extra + struct.pack("<3f", 1, 2, 3)), MESH)


def test_packed_geometry_is_accepted_and_named(inspect: Inspect, refusal: Refusal) -> None:
    draco, binary = samples.gltf()
    primitive = draco["meshes"][0]["primitives"][0]
    primitive["extensions"] = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    for accessor in draco["accessors"]:
        del accessor["bufferView"]
    assert inspect(samples.glb(draco, binary), MESH).details["packed"] == ["draco"]
    primitive["extensions"]["KHR_draco_mesh_compression"]["bufferView"] = 5
    assert "missing" in refusal(samples.glb(draco, binary), MESH)

    meshopt, binary = samples.gltf()
    meshopt["buffers"].append({"byteLength": 10**6, "extensions": {"EXT_meshopt_compression": {"fallback": True}}})
    packed = {"buffer": 0, "byteOffset": 0, "byteLength": 20, "count": 4, "byteStride": 12, "mode": "ATTRIBUTES"}
    meshopt["bufferViews"][0] = {
        "buffer": 1,
        "byteLength": 48,
        "byteStride": 12,
        "extensions": {"EXT_meshopt_compression": packed},
    }
    assert inspect(samples.glb(meshopt, binary), MESH).details["packed"] == ["meshopt"]
    packed["byteLength"] = 10**5
    assert "outside its buffer" in refusal(samples.glb(meshopt, binary), MESH)


def test_gltf_in_json_must_carry_its_buffers(inspect: Inspect, refusal: Refusal) -> None:
    document, binary = samples.gltf()
    document["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(binary).decode()
    found = inspect(json.dumps(document).encode(), MESH)
    assert (found.extension, found.details["vertices"]) == (".gltf", 4)
    document["buffers"][0]["uri"] = "mesh.bin"
    assert "never fetched" in refusal(json.dumps(document).encode(), MESH)
    document["buffers"][0]["uri"] = "data:application/octet-stream," + "A" * len(binary)
    assert "in a form that is not read" in refusal(json.dumps(document).encode(), MESH)


def test_gltf_in_json_is_read_up_to_a_size(refusal: Refusal) -> None:
    whole = json.dumps(samples.gltf()[0]).encode()
    assert "more than 64 MB is not read" in refusal(whole + b" " * EMBEDDED_LIMIT, MESH)


def test_a_texture_may_lie_in_the_file_itself(inspect: Inspect, refusal: Refusal) -> None:
    document, binary = samples.gltf()
    document["images"] = [{"bufferView": 0}, {"bufferView": 1}, {"uri": "data:image/png;base64,iVBORw0K"}]
    assert inspect(samples.glb(document, binary), MESH).details["vertices"] == 4
    document["images"][1] = {"bufferView": len(document["bufferViews"])}
    assert "textures has no data" in refusal(samples.glb(document, binary), MESH)


def test_positions_may_be_whole_numbers(inspect: Inspect) -> None:
    document, _ = samples.gltf()  # as KHR_mesh_quantization has them
    points = struct.pack("<12H", *[0xFFFF] * 12)
    document["bufferViews"][0] |= {"byteLength": len(points)}
    document["accessors"][0] |= {"componentType": 5123}
    faces = struct.pack("<12H", *[number for face in samples.FACES for number in face])
    document["bufferViews"][1] |= {"byteOffset": len(points), "byteLength": len(faces)}
    document["buffers"][0]["byteLength"] = len(points + faces)
    assert inspect(samples.glb(document, points + faces), MESH).details["vertices"] == 4


def test_positions_that_are_all_replaced_need_no_data_of_their_own(inspect: Inspect, refusal: Refusal) -> None:
    document, binary = samples.gltf()
    accessor = document["accessors"][0]
    accessor["sparse"] = {"count": 4, "indices": {"bufferView": 1, "componentType": 5123}, "values": {"bufferView": 0}}
    del accessor["bufferView"]
    assert inspect(samples.glb(document, binary), MESH).details["vertices"] == 4
    del accessor["sparse"]
    assert "have no data" in refusal(samples.glb(document, binary), MESH)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n", "finite"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1\nf 1 2 3\n", "finite"),
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "not there"),
        (b"v 0 0 0\nv x 0 0\n", "not a number"),
        (samples.ply().replace(b"vertex 4", b"vertex 400000"), "cut off"),
        (samples.ply().replace(b"end_header", b"xxx_header"), "no end"),
        (samples.ply()[:-20], "cut off"),
        (b"solid x\nfacet normal 0 0 1\nouter loop\nendloop\nendfacet\n", "last line"),
        (samples.stl()[:96] + struct.pack("<f", float("nan")) + samples.stl()[100:], "finite"),
    ],
)
def test_other_meshes_that_are_broken(refusal: Refusal, content: bytes, reason: str) -> None:
    assert reason in refusal(content, MESH)


def test_stl_in_text(inspect: Inspect) -> None:
    facet = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
    assert inspect(f"solid x\n{facet * 3}endsolid x\n".encode()).details == {"triangles": 3}
