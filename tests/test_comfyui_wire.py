"""ComfyUI's frames and answers are read without ever failing on what they hold."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runcomfy.adapters.comfyui.wire import (
    Frame,
    Unreadable,
    parse_version,
    read_frame,
    read_history,
    read_json,
    read_queue,
    read_upload_limit,
    read_version,
)
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import NodeText, Preview, QueueView, Said

ANY_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "data", "nodes", "prompt_id", "x"]), inner)
    ),
    max_leaves=10,
)


def text(kind: str, **data: Any) -> bytes:
    return json.dumps({"type": kind, "data": data}).encode()


def binary(event: int, head: int, body: bytes) -> bytes:
    return struct.pack(">II", event, head) + body


def with_metadata(picture: bytes = b"\xff\xd8", **metadata: Any) -> bytes:
    about = json.dumps(
        {"prompt_id": "p", "node_id": "7.0.0.1", "display_node_id": "7", "image_type": "image/jpeg"} | metadata
    )
    return binary(4, len(about.encode()), about.encode() + picture)


def test_text_frames_carry_their_prompt() -> None:
    assert read_frame(text("executing", node=None, prompt_id="p")) == Frame(
        Said("executing", {"node": None, "prompt_id": "p"}), "p"
    )
    assert read_frame(text("status", status={})) == Frame(Said("status", {"status": {}}), None)


def test_both_kinds_of_previews_and_texts_are_read() -> None:
    assert read_frame(binary(1, 1, b"\xff\xd8x")) == Frame(Preview(b"\xff\xd8x", "image/jpeg"))
    assert read_frame(binary(1, 2, b"\x89PNG")) == Frame(Preview(b"\x89PNG", "image/png"))
    assert read_frame(with_metadata()) == Frame(Preview(b"\xff\xd8", "image/jpeg", "7"), "p")
    assert read_frame(binary(3, 2, "12grüße\x1b[31m".encode())) == Frame(NodeText("12", "grüße[31m"))


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"type": "progress", "data": {"value": NaN, "max": 1}}',
        b'{"type": "progress", "data": {"value": Infinity, "max": 1}}',
        b'{"type": "progress", "data": {"value": 1e999, "max": 1}}',
        b'{"type": "executing", "data": {"prompt_id": "p"}}',
        b'{"type": "executing", "data": {"prompt_id": "p", "node": 3}}',
        b'{"type": "executing", "data": {"prompt_id": 3, "node": "3"}}',
        b'{"type": "executing", "data": null}',
        b'{"type": 1, "data": {}}',
        b'{"type": "progress", "data": {"value": "1", "max": 1}}',
        b'{"type": "progress", "data": {"value": true, "max": 1}}',
        b'{"type": "progress_state", "data": {"prompt_id": "p", "nodes": []}}',
        b'{"type": "progress_state", "data": {"prompt_id": "p", "nodes": {"1": 3}}}',
        b'{"type": "execution_cached", "data": {"prompt_id": "p", "nodes": [1]}}',
        b'{"type": "executed", "data": {"prompt_id": "p", "node": "1", "output": 5}}',
        b'{"type": "execution_start", "data": {}}',
        b'{"type": "x", "data": ' + b"[" * 5_000_000,
        b"[" * 5_000_000 + b"]" * 5_000_000,
        b'{"type": "progress", "data": {"value": ' + b"1" * 100_000 + b', "max": 1}}',
        binary(1, 1, b""),
        binary(1, 9, b"x"),
        binary(2, 1, b"x"),
        binary(3, 99, b"short"),
        binary(3, 2, b"\xff\xfftext"),
        binary(4, 4_000_000_000, b"x"),
        binary(4, 2, b"[]picture"),
        with_metadata(image_type="text/html"),
        with_metadata(prompt_id=None),
        with_metadata(b""),
        b"\0\0\0",
    ],
)
def test_frames_that_make_no_sense_are_none(raw: bytes) -> None:
    assert read_frame(raw) is None


@given(st.binary(max_size=200))
@example(b"\0\0\0\4\0\0\0\0")
def test_any_bytes_are_read_without_an_error(raw: bytes) -> None:
    read_frame(raw)
    read_frame(b"\0\0\0" + raw)


@given(ANY_JSON, st.sampled_from(["executing", "progress", "progress_state", "executed", "execution_error", "x"]))
def test_any_json_is_read_without_an_error(value: Any, kind: str) -> None:
    read_frame(json.dumps(value).encode())
    read_frame(json.dumps({"type": kind, "data": value}).encode())


@given(ANY_JSON)
def test_answers_are_read_or_refused(value: Any) -> None:
    for read in (read_queue, lambda v: read_history(v, "x"), read_version, read_upload_limit):
        with contextlib.suppress(Unreadable):
            read(value)


def test_waiting_prompts_are_sorted_as_they_will_run() -> None:
    heap = [-20, -19, -5, 18, -0.5, 17, 21]
    pending = [[number, f"p{number}", {}, {}, []] for number in heap]
    tie = [[17, "a", {}, {}, []]]
    view = read_queue({"queue_running": [[3, "r", {}, {}, []]], "queue_pending": pending + tie})
    assert view == QueueView(("r",), ("p-20", "p-19", "p-5", "p-0.5", "a", "p17", "p18", "p21"))


@pytest.mark.parametrize("answer", [None, [], {}, {"queue_running": [], "queue_pending": [[1]]}, {"queue_running": 1}])
def test_a_queue_that_is_none_is_refused(answer: Any) -> None:
    with pytest.raises(Unreadable):
        read_queue(answer)


def test_a_history_without_the_prompt_is_none() -> None:
    assert read_history({}, "p") is None
    assert read_history({"q": {}}, "p") is None
    bare = read_history({"p": {}}, "p")
    assert bare is not None
    assert (bare.prompt_id, bare.outputs, bare.status, bare.messages) == (PromptId("p"), {}, "", ())


@pytest.mark.parametrize("answer", [[], "x", {"p": 1}, {"p": {"outputs": []}}])
def test_a_history_that_is_none_is_refused(answer: Any) -> None:
    with pytest.raises(Unreadable):
        read_history(answer, "p")


def test_answers_with_nan_are_sound_otherwise() -> None:
    assert read_json(b'{"score": [NaN, -Infinity, 1]}', lenient=True) == {"score": [None, None, 1]}
    with pytest.raises(Unreadable):
        read_json(b'{"score": NaN}')


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.3.64", (0, 3, 64)),
        ("v0.33.0", (0, 33, 0)),
        ("0.3.45-12-gabcdef", (0, 3, 45)),
        ("0.38.1.dev0", (0, 38, 1)),
        ("nightly", None),
        ("0.3", None),
        ("", None),
    ],
)
def test_versions_are_read_or_not(version: str, expected: tuple[int, int, int] | None) -> None:
    assert parse_version(version) == expected


# --- what a hostile server sends to fill the memory -----------------------------------------------------------


def test_an_answer_of_millions_of_empty_lists_is_not_read() -> None:
    """Three bytes each, and seventy in memory."""
    with pytest.raises(Unreadable, match="absurd number"):
        read_json(b"[" + b"[]," * 2_000_001 + b"[]]")


def test_a_text_frame_larger_than_any_real_one_is_dropped() -> None:
    assert read_frame(text("executed", node="1", prompt_id="p", output={"text": ["a" * (8 << 20)]})) is None


@pytest.mark.parametrize("kind", ["executing", "executed", "progress_state", "execution_cached"])
def test_endless_names_of_nodes_are_dropped(kind: str) -> None:
    name = "1" * 1_001
    sent: dict[str, dict[str, Any]] = {
        "executing": {"node": name},
        "executed": {"node": name, "output": {}},
        "progress_state": {"nodes": {name: {"value": 1, "max": 2}}},
        "execution_cached": {"nodes": [name]},
    }
    assert read_frame(text(kind, prompt_id="p", **sent[kind])) is None
