"""What the emulated ComfyUI draws and builds: the same for the same inputs, whole, and true to the picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from runcomfy.adapters.media import inspect
from runcomfy.domain.job import OutputKind
from runcomfy.testing.drawn import Gltf, ball, pixels, ramp
from runcomfy.testing.emulators.comfyui.nodes import meshes, pictures
from runcomfy.testing.emulators.comfyui.nodes.flux_mesh import mesh_of

PROMPT = "a helmet of dark-grey metal, bluish"


def correlation(one: list[float], other: list[float]) -> float:
    mean_one, mean_other = math.fsum(one) / len(one), math.fsum(other) / len(other)
    spread = math.fsum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    own = math.fsum((a - mean_one) ** 2 for a in one) * math.fsum((b - mean_other) ** 2 for b in other)
    return spread / math.sqrt(own)


def brightness(picture: Image.Image, size: int = 48) -> list[float]:
    return [float(value) for value in picture.convert("RGB").convert("L").resize((size, size)).tobytes()]


# --- pictures ---------------------------------------------------------------------------------------------


def test_equal_inputs_give_equal_pixels_and_any_other_input_gives_others() -> None:
    depth = pictures.depth_map(ball())
    first = pixels(pictures.render(depth, PROMPT, 7, 20, 256, 256))
    others = [
        pictures.render(depth, PROMPT, 8, 20, 256, 256),
        pictures.render(depth, "a porcelain cat", 7, 20, 256, 256),
        pictures.render(pictures.depth_map(ramp()), PROMPT, 7, 20, 256, 256),
        pictures.render(None, PROMPT, 7, 20, 256, 256),
        pictures.render(depth, PROMPT, 2**64 - 1, 20, 256, 256),
    ]
    assert pixels(pictures.render(pictures.depth_map(ball()), PROMPT, 7, 20, 256, 256)) == first
    assert len({first, *map(pixels, others)}) == len(others) + 1


@pytest.mark.parametrize("source", [ramp(), ramp(rising=False), ball(), ball().transpose(Image.Transpose.ROTATE_90)])
@pytest.mark.parametrize("seed", [0, 370878235997533])
def test_what_is_bright_in_the_input_is_bright_in_the_drawn_picture_and_high_in_the_mesh(
    source: Image.Image, seed: int
) -> None:
    drawn = pictures.render(pictures.depth_map(source), PROMPT, seed, 20, 512, 512, 0.86)
    cut = pictures.without_background(drawn)
    heights = meshes.heights_of(cut, 48, 48)
    assert correlation(brightness(source), brightness(drawn)) > 0.85
    assert correlation(brightness(source), heights) > 0.85


def test_a_colour_that_the_prompt_names_is_the_colour_of_the_picture() -> None:
    def tint(prompt: str) -> tuple[float, float, float]:
        drawn = pictures.render(pictures.depth_map(ball()), prompt, 3, 20, 128, 128)
        red, green, blue = (sum(band.tobytes()) for band in drawn.split())
        return red, green, blue

    red, _, blue = tint("a crimson mask")
    assert red > 1.15 * blue
    red, _, blue = tint("a blue mask")
    assert blue > 1.15 * red


def test_the_background_is_what_the_border_reaches_not_dark_places_inside() -> None:
    picture = Image.new("RGB", (256, 256), (8, 8, 10))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 40, 216, 216), fill=(170, 170, 180))
    draw.ellipse((110, 110, 146, 146), fill=(8, 8, 10))
    alpha = pictures.without_background(picture).getchannel("A")
    assert alpha.getpixel((4, 4)) == 0
    assert alpha.getpixel((70, 128)) == 255
    assert alpha.getpixel((128, 128)) == 255


def test_a_picture_that_is_dark_all_over_keeps_its_subject() -> None:
    cut = pictures.without_background(Image.new("RGB", (64, 64), (5, 5, 5)))
    assert cut.getchannel("A").getextrema() == (255, 255)


def test_previews_come_out_of_the_noise() -> None:
    final = pictures.render(pictures.depth_map(ball()), PROMPT, 7, 20, 512, 512)
    goal = brightness(final)
    near = [correlation(goal, brightness(pictures.preview_frame(final, 7, step, 20))) for step in (1, 10, 20)]
    assert near == sorted(near)
    assert near[0] < 0.9 < 0.97 < near[-1]
    assert max(pictures.preview_frame(final, 7, 1, 20).size) == pictures.PREVIEW_SIZE


@settings(max_examples=15)
@given(width=st.integers(1, 300), height=st.integers(1, 300), mode=st.sampled_from(["RGB", "RGBA", "L", "1", "P"]))
def test_depth_takes_any_picture(width: int, height: int, mode: str) -> None:
    depth = pictures.depth_map(Image.new(mode, (width, height)), 64)
    assert depth.mode == "RGB"
    assert all(side % 64 == 0 for side in depth.size)


# --- meshes -----------------------------------------------------------------------------------------------


def test_a_relief_is_a_closed_solid_that_viewers_can_open() -> None:
    mesh = Gltf(meshes.glb(meshes.relief(ball(), longest=40, noise=bytes(range(64)))))
    mesh.check()
    edges = mesh.edges()
    # Closed and facing outward: every edge is walked once in each direction.
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)
    volume = math.fsum(_signed_volume(*(mesh.positions[i] for i in face)) for face in mesh.faces())
    assert volume > 0.1


def _signed_volume(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> float:
    cross = (b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0])
    return (a[0] * cross[0] + a[1] * cross[1] + a[2] * cross[2]) / 6


@pytest.mark.parametrize("rising", [True, False])
def test_heights_of_the_saved_mesh_follow_the_picture(rising: bool) -> None:
    mesh = Gltf(meshes.glb(mesh_of(ramp(rising=rising), 5, grid_res=384, most_faces=None)))
    front = [point for point, normal in zip(mesh.positions, mesh.attributes["NORMAL"], strict=True) if normal[2] > 0]
    slope = correlation([point[0] for point in front], [point[2] for point in front])
    assert slope > 0.99 if rising else slope < -0.99


def test_two_pictures_or_two_seeds_give_two_meshes_and_equal_ones_equal_bytes() -> None:
    def made(picture: Image.Image, seed: int) -> bytes:
        return meshes.glb(mesh_of(picture, seed, grid_res=256, most_faces=None))

    assert made(ball(), 1) == made(ball(), 1)
    assert len({made(ball(), 1), made(ball(), 2), made(ramp(), 1)}) == 3


def test_many_vertices_take_long_indices_and_few_take_short_ones() -> None:
    large = Gltf(meshes.glb(meshes.relief(ball(512), longest=260)))
    large.check()
    assert large.document["accessors"][-1]["componentType"] == 5125
    assert Gltf(meshes.glb(meshes.cube())).document["accessors"][-1]["componentType"] == 5123


def test_simplified_meshes_stay_below_the_asked_number_of_faces() -> None:
    for most in (1000, 5000, 20000):
        assert mesh_of(ball(), 0, grid_res=384, most_faces=most).faces <= most


def test_colours_of_the_mesh_are_those_of_the_picture_in_linear_light() -> None:
    picture = Image.new("RGB", (32, 32), (255, 128, 0))
    colours = Gltf(meshes.glb(meshes.relief(picture, longest=8))).attributes["COLOR_0"]
    red, green, blue, alpha = colours[0]
    assert (red, blue, alpha) == (65535, 0, 65535)
    assert green / 65535 == pytest.approx(0.2158, abs=0.001)


@settings(max_examples=20)
@given(width=st.integers(1, 90), height=st.integers(1, 90), longest=st.integers(8, 40))
def test_pictures_of_any_shape_become_whole_meshes(width: int, height: int, longest: int) -> None:
    mesh = Gltf(meshes.glb(meshes.relief(Image.new("RGB", (width, height), (90, 90, 90)), longest=longest)))
    mesh.check()
    edges = mesh.edges()
    assert all(edges[b, a] == count for (a, b), count in edges.items())


@pytest.mark.parametrize("mesh", [meshes.cube(2.0), meshes.voxel_ball(12)])
def test_other_shapes_are_closed_and_face_outward(mesh: meshes.Mesh) -> None:
    read = Gltf(meshes.glb(mesh))
    read.check()
    edges = read.edges()
    assert all(edges[b, a] == count for (a, b), count in edges.items())
    assert math.fsum(_signed_volume(*(read.positions[i] for i in face)) for face in read.faces()) > 0


def test_the_mesh_passes_the_check_that_results_go_through(tmp_path: Path) -> None:
    path = tmp_path / "relief.glb"
    mesh = mesh_of(ball(), 5, grid_res=384, most_faces=None)
    path.write_bytes(meshes.glb(mesh))
    found = inspect(path, max_pixels=1, expected=OutputKind.MESH)
    assert found.mime == "model/gltf-binary"
    assert (found.details["vertices"], found.details["triangles"]) == (mesh.vertices, mesh.faces)
