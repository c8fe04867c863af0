"""Large pictures are decoded in a process of their own, which is granted little and knows nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runcomfy.adapters import media, media_child
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media
from runcomfy.testing import samples

IMAGE = OutputKind.IMAGE
LIMIT = 250_000_000

Inspect = Callable[..., Media]
Refusal = Callable[..., str]


@pytest.mark.processes
@pytest.mark.threat("S6")
def test_large_pictures_are_decoded_in_a_process_of_their_own(
    inspect: Inspect, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "INLINE_PIXELS", 1000)
    monkeypatch.setattr(media, "INLINE_ANIMATION_PIXELS", 1000)
    assert inspect(samples.picture("JPEG"), IMAGE).details["frames_decoded"] == 1
    assert inspect(samples.picture("WEBP", frames=3), IMAGE).details["frames_decoded"] == 3
    broken = samples.picture("WEBP", lossless=True)
    assert "cannot be decoded" in refusal(broken[:25] + b"\xff" * (len(broken) - 25), IMAGE)
    # A PNG is proven row by row and needs no decoder.
    assert "frames_decoded" not in inspect(samples.png(), IMAGE).details


@pytest.mark.processes
@pytest.mark.parametrize("to", ["jpg", "webp", "png"])
def test_large_pictures_are_converted_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr(media, "INLINE_PIXELS", 1000)
    monkeypatch.setattr(media, "INLINE_ANIMATION_PIXELS", 1000)
    (tmp_path / "a").write_bytes(samples.picture("GIF"))
    found = media.convert(str(tmp_path / "a"), str(tmp_path / "b"), to, max_pixels=LIMIT)
    assert (found.extension, found.details["width"]) == (f".{to}", 64)
    with pytest.raises(FileExistsError):
        media.convert(str(tmp_path / "a"), str(tmp_path / "b"), to, max_pixels=LIMIT)


@pytest.mark.processes
@pytest.mark.threat("S6")
def test_a_decoder_that_does_not_end_or_does_not_answer_is_the_picture_s_fault(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "INLINE_PIXELS", 1000)
    monkeypatch.setattr(media_child, "cpu_seconds", lambda _: 0)
    monkeypatch.setattr(media_child, "START_SECONDS", 0.001)
    assert "not decoded within" in refusal(samples.picture("JPEG"), IMAGE)
    if os.name != "nt":
        monkeypatch.setattr(media_child, "START_SECONDS", 30)
        monkeypatch.setattr("sys.executable", "/bin/false")
        assert "ended without an answer" in refusal(samples.picture("JPEG"), IMAGE)


@pytest.mark.processes
def test_a_decoder_that_cannot_be_started_is_not_the_picture_s_fault(
    inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "INLINE_PIXELS", 1000)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(LocalError, match="no process could be started"):
        inspect(samples.picture("JPEG"), IMAGE)


def test_what_the_process_answers(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(samples.picture("JPEG"))
    (tmp_path / "cut").write_bytes(samples.picture("JPEG")[:300])
    header = {"format": "JPEG", "width": 64, "height": 48}
    request = {"path": str(tmp_path / "a"), "header": header}
    assert media_child.answer(request) == {"mode": "RGB", "frames_decoded": 1}
    assert "contradicts" in media_child.answer(request | {"header": header | {"width": 5}})["error"]
    assert "decoded" in media_child.answer(request | {"path": str(tmp_path / "cut")})["error"]
    assert media_child.answer(request | {"path": str(tmp_path / "gone")}) == {"errno": errno.ENOENT}
    assert media_child.answer(request | {"to": "png", "target": str(tmp_path / "b")}) == {}
    assert media_child.answer(request | {"to": "png", "target": str(tmp_path / "b")}) == {"errno": errno.EEXIST}


def test_memory_and_time_are_granted_by_the_bytes_that_came() -> None:
    assert media_child.memory_bytes(1000) < 350 << 20
    assert media_child.memory_bytes(50 << 20) > 1 << 30
    assert media_child.memory_bytes(8 << 30) == media_child.MEMORY_MOST_BYTES
    assert media_child.cpu_seconds(1000) == 8
    assert media_child.cpu_seconds(100 << 20) == 58


@pytest.mark.threat("S3")
def test_the_process_that_decodes_sees_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threat S3: a decoder that is taken over by a picture finds no token in its environment."""
    monkeypatch.setenv("RUNCOMFY_API_TOKEN", "canary-token")
    assert not any("canary-token" in value for value in media_child.child_environment().values())
