"""Small pictures for the page: of what can be shown, and a plain word about what cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from runcomfy.adapters.media_source import SMALL_READ, Corrupt, Source
from runcomfy.adapters.media_thumbnail import SIDE, thumbnail
from runcomfy.domain.exceptions import LocalError, OutputCorrupt
from runcomfy.testing import samples


def test_a_picture_becomes_one_of_few_pixels_a_side(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(samples.png(800, 400))
    thumbnail(tmp_path / "large.png", tmp_path / "small.webp")
    with Image.open(tmp_path / "small.webp") as small:
        assert (small.format, small.size) == ("WEBP", (SIDE, SIDE // 2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"solid words\n", "not a picture"),
        (samples.png(64, 48)[:60], "cannot be decoded"),
    ],
    ids=["text", "cut"],
)
def test_what_is_no_whole_picture_has_no_small_one(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "picture").write_bytes(content)
    with pytest.raises(OutputCorrupt, match=words):
        thumbnail(tmp_path / "picture", tmp_path / "small.webp")
    assert not (tmp_path / "small.webp").exists()


def test_a_computer_without_memory_is_not_called_a_broken_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picture.png").write_bytes(samples.png())

    def full(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image.Image, "thumbnail", full)
    with pytest.raises(LocalError):
        thumbnail(tmp_path / "picture.png", tmp_path / "small.webp")


def test_a_file_that_shrinks_while_it_is_read_ends_too_early_and_no_part_of_it_is_read_whole_if_absurd(
    tmp_path: Path,
) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"x" * (SMALL_READ + 10))
    with path.open("rb") as file:
        source = Source(file)
        with pytest.raises(Corrupt, match="more than is sensible"):
            source.at(0, SMALL_READ + 1)
        path.write_bytes(b"x" * 5_000)
        with pytest.raises(Corrupt, match="ends too early"):
            source.at(4_990, 100)
