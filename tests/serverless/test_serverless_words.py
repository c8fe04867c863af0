"""What RunComfy's serverless API says in its rarer forms, and pictures as they are written into a request."""

from __future__ import annotations

import base64
import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.adapters import data_uri
from runcomfy.adapters.providers import runcomfy_serverless_wire as wire
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing
from runcomfy.testing import samples


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ({"outcome": "cancelled"}, True),
        ({"status": "cancellation_requested"}, True),
        ({"outcome": " Not_Cancellable "}, False),
        ({"outcome": "maybe", "status": "cancelled"}, True),
    ],
)
def test_a_cancellation_says_yes_or_no(said: dict[str, Any], ends: bool) -> None:
    assert wire.read_cancelled(said) is ends


@pytest.mark.parametrize("said", [{}, {"outcome": "maybe"}, {"status": 7}, {"outcome": ""}])
def test_a_cancellation_that_says_neither_is_not_guessed_at(said: dict[str, Any]) -> None:
    with pytest.raises(wire.Unreadable):
        wire.read_cancelled(said)


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ({"error_code": 10002, "message": "off"}, 10002, "off"),
        ({"errorCode": "10002", "details": {"message": "inner"}}, 10002, "inner"),
        ({"error": {"error_code": 7, "message": "deep"}}, 7, ""),
        ({"error": {"code": "7"}, "message": "above"}, 7, "above"),
        ({"error_code": 9, "detail": ["one", {"message": "two"}, 3]}, 9, "one; two; 3"),
        ({"error_code": 9, "details": [], "error": {"x": 1}}, 9, ""),
    ],
)
def test_refusals_in_every_form(said: dict[str, Any], code: int, words: str) -> None:
    fault = wire.read_refusal(said)
    assert fault is not None
    assert fault.code == code
    assert words in fault.words


@pytest.mark.parametrize(
    "said",
    [
        [],
        {},
        {"error_code": 0},
        {"error_code": True},
        {"error_code": "x" * 3},
        {"error": {"code": 7}, "request_id": "r"},
        {"error_code": 7, "request_id": "r", "status": "failed"},
    ],
)
def test_what_is_no_refusal_is_not_taken_for_one(said: Any) -> None:
    assert wire.read_refusal(said) is None


def test_a_failed_results_errors_are_read_in_every_form() -> None:
    def codes(body: dict[str, Any]) -> list[int | None]:
        return [fault.code for fault in wire.read_faults(body)]

    assert codes({"error": "burst"}) == [None]
    assert codes({"errors": [{"errorCode": 1}, {"error_code": "2"}, {"code": 3}, "x", "", 9]}) == [1, 2, 3, None]
    assert codes({"error_code": 4, "message": "only above"}) == [4]
    assert codes({}) == []


def test_files_lie_in_every_form_of_answer() -> None:
    url = "https://serverless-api-storage.runcomfy.net/x/a.png?sign=1"
    direct = {"24": {"url": url}}
    channel = {"24": {"images": {"url": url, "filename": "b.png"}}}
    plain_list = {"24": [{"url": "https://[broken", "filename": 7}]}
    by_node = [{"node_id": 24, "images": [{"filename": "c.png"}, {"else": 1}, 5]}, "x"]
    assert [file.filename for file in wire.read_files(direct)] == ["a.png"]
    assert [(file.channel, file.filename) for file in wire.read_files(channel)] == [("images", "b.png")]
    assert [file.filename for file in wire.read_files(plain_list)] == [""]
    assert [(file.node, file.filename) for file in wire.read_files(by_node)] == [("24", "c.png")]


@pytest.mark.parametrize(
    ("said", "seconds"), [(60, 60.0), (1.5, 1.5), (True, None), ("60", None), (-1, None), (1e300, None)]
)
def test_how_long_a_deployment_is_kept_warm(said: object, seconds: float | None) -> None:
    view = wire.read_deployment({"keep_warm_duration_in_seconds": said, "hardware": "AMPERE_24", "min_instances": True})
    assert (view.keep_warm.total_seconds() if view.keep_warm else None) == seconds
    assert (view.hardware, view.min_instances) == (("AMPERE_24",), None)


# --- pictures -------------------------------------------------------------------------------------------------


def content(uri: str) -> bytes:
    head, _, text = uri.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(text)


def test_a_small_png_is_sent_as_it_is_and_others_become_one(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(samples.png())
    assert content(data_uri.png_data_uri(tmp_path / "a.png", max_pixels=10**6)) == samples.png()
    made = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(made, "JPEG")
    (tmp_path / "b.jpg").write_bytes(made.getvalue())
    with Image.open(io.BytesIO(content(data_uri.png_data_uri(tmp_path / "b.jpg", max_pixels=10**6)))) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (8, 8))


def test_a_large_picture_is_said_to_be_large_and_a_huge_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.frombytes("RGB", (400, 400), os.urandom(480_000))
    noise.save(tmp_path / "noise.png")
    with caplog.at_level(logging.INFO, logger="runcomfy.serverless"):
        data_uri.png_data_uri(tmp_path / "noise.png", max_pixels=10**6)
    assert [record.getMessage() for record in caplog.records] == ["picture_larger_than_advised"]
    monkeypatch.setattr(data_uri, "MAX_BYTES", 100_000)
    with pytest.raises(InputFileInvalid, match="a serverless request takes"):
        data_uri.png_data_uri(tmp_path / "noise.png", max_pixels=10**6)


def test_a_picture_that_is_just_being_written_is_waited_for_and_one_that_is_none_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, looks = tmp_path / "render.png", []
    path.write_bytes(samples.png()[:40])

    def pause(_: float) -> None:
        looks.append(1)
        if len(looks) == 2:
            path.write_bytes(samples.png())

    monkeypatch.setattr("time.sleep", pause)
    assert content(data_uri.png_data_uri(path, max_pixels=10**6)) == samples.png()
    assert len(looks) == 2
    path.write_bytes(b"no picture")
    with pytest.raises(InputFileInvalid):
        data_uri.png_data_uri(path, max_pixels=10**6)
    with pytest.raises(InputFileMissing):
        data_uri.png_data_uri(tmp_path / "nowhere.png", max_pixels=10**6)
    assert len(looks) == 2
