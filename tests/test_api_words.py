"""Over HTTP errors speak of the fields and keys that the client sent, and not of a command line or of our books."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.api_words import api_words
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Answer, serving_web

NO_PICTURE: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a"}},
}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("flux needs --image and --prompt", "flux needs image and prompt"),
        ("name the input: --set 4.image=@path/to/file", 'name the input: "sets": {"4.image": upload:ID}'),
        ("overwrite the link: --set 6.text=…", 'overwrite the link: "sets": {"6.text": …}'),
        ("add it: --set +4.steps=… (a number)", 'add it: "sets": {"+4.steps": …} (a number)'),
        ("choose at least 1: --set 3.steps=1", 'choose at least 1: "sets": {"3.steps": 1}'),
        ("the links of --set", "the links of sets"),
        ("give it longer with --timeout, e.g. --timeout 30m", "give it longer with timeout_s, e.g. timeout_s 1800"),
        ("run without --convert", "run without convert"),
        ("--image-size is not ours", "--image-size is not ours"),
        ("a -- dash", "a -- dash"),
    ],
)  # fmt: skip
def test_options_are_fields(said: str, told: str) -> None:
    assert api_words(said) == told


def no_command_line(answer: Answer, status: int) -> Any:
    assert answer.status == status, answer
    assert b"--" not in answer.body
    return answer.json["error"]


async def test_what_is_missing_or_has_nowhere_to_go_is_named_as_a_field(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        missing = no_command_line(await api.post("/jobs", {"workflow": "image_invert"}), 422)
        assert missing["message"].endswith("needs image")
        assert missing["hint"].startswith("image: ")
        dry = no_command_line(await api.post("/jobs", {"workflow": "image_invert", "dry_run": True}), 422)
        assert dry == missing
        pixel = {"image": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}
        for more in (pixel, {"prompt": "a cat"}):
            lost = no_command_line(await api.post("/jobs", {"workflow": NO_PICTURE, **more}), 422)
            [field] = more
            assert f"so {field} has nowhere to go" in lost["message"]
            assert '"sets": {"NODEID.input": ' in lost["hint"]
        assert (await api.get("/jobs")).json["jobs"] == []


async def test_a_conflict_names_the_key_as_the_client_sent_it(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        key = {"Idempotency-Key": "order 17/token"}
        first = await api.post("/jobs", {"workflow": NO_PICTURE}, headers=key)
        other = await api.post("/jobs", {"workflow": NO_PICTURE, "priority": 7}, headers=key)
        error = no_command_line(other, 409)
        assert error["code"] == "idempotency-conflict"
        assert error["message"].startswith("the idempotency key order 17/token belongs to job ")
        assert error["details"] == {"job": first.json["id"]}
