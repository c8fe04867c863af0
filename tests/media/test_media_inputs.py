"""What the user gives is looked at before anything is paid."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from runcomfy.adapters.media import check_input_file, check_input_image
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing
from runcomfy.testing import samples

BMP = samples.picture("BMP")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_that_comfyui_can_load_are_accepted(tmp_path: Path, form: str) -> None:
    (tmp_path / "input").write_bytes(samples.picture(form))
    check_input_image(tmp_path / "input", 64_000_000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"just text", "looks like text"),
        (samples.HTML, "looks like a web page"),
        (samples.glb(), "looks like a GLB mesh"),
        (samples.mp4(), "looks like an MP4 video"),
        (b"\0\1\2\3" * 8, "unknown format"),
        (samples.png()[:-30], "damaged"),
        (samples.picture("JPEG")[:300], "damaged"),
        (samples.picture("BMP")[:500], "damaged"),
        (samples.png_from(samples.png_header(10_000, 10_000)), "100 megapixels; 64 megapixels are allowed"),
        (BMP[:18] + struct.pack("<ii", 10_000, 10_000) + BMP[26:], "100 megapixels; 64 megapixels are allowed"),
        (BMP[:18] + struct.pack("<ii", 20_000, 20_000) + BMP[26:], "400 megapixels; 64 megapixels are allowed"),
        (struct.pack("<6sHHB", b"GIF89a", 10_000, 10_000, 0) + b"\0\0;", "100 megapixels"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused_in_two_lines(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "input.png").write_bytes(content)
    with pytest.raises(InputFileInvalid) as caught:
        check_input_image(tmp_path / "input.png", 64_000_000)
    assert words in caught.value.message
    assert "input.png" in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.exit_code == 2


def test_a_picture_of_100_megapixels_is_refused_by_its_header(tmp_path: Path) -> None:
    """Its pixels would not even decode: they are not looked at."""
    broken = samples.png_from(samples.png_header(10_000, 10_000), samples.png_chunk(b"IDAT", b"not pixels"))
    (tmp_path / "huge.png").write_bytes(broken)
    with pytest.raises(InputFileInvalid) as caught:
        check_input_image(tmp_path / "huge.png", 64_000_000)
    assert caught.value.details == {"width": 10_000, "height": 10_000, "max_pixels": 64_000_000}
    assert "RUNCOMFY_MAX_INPUT_PIXELS" in caught.value.hint


def test_inputs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputFileMissing, match=r"no file .*gone\.png"):
        check_input_image(tmp_path / "gone.png", 1)
    with pytest.raises(InputFileInvalid, match="folder"):
        check_input_image(tmp_path, 1)
    with pytest.raises(InputFileMissing):
        check_input_file("a\0b")
    if os.name != "nt":
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputFileMissing, match="ordinary"):
            check_input_file(tmp_path / "pipe")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_input_without_permission(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(samples.png())
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(InputFileMissing, match="permission"):
        check_input_image(tmp_path / "secret.png", 64_000_000)


@pytest.mark.skipif(os.name == "nt", reason="links as on POSIX")
def test_the_user_s_own_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(samples.png())
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    check_input_image(tmp_path / "link.png", 64_000_000)
    assert check_input_file(tmp_path / "link.png") == len(samples.png())
