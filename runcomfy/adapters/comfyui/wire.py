"""
ComfyUI's JSON and binary frames, read into our own values.

Nothing here raises for what a server sent, except `read_json` and the `Unreadable` it is there for: a frame that
makes no sense is None, and the caller counts it. Types are checked here once, so that the fold can trust names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import HistoryEntry, NodeText, Preview, QueueView, Said, ServerEvent

Version = tuple[int, int, int]

_VERSION: Final = re.compile(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})(?!\d)")
_MANY_BYTES: Final = 1 << 20
MAX_VALUES: Final = 2_000_000
"""In one answer: three bytes of JSON can become 70 in memory. A list of all nodes has a tenth of it."""
MAX_TEXT_BYTES: Final = 8 << 20
"""Of a text frame. The largest real ones, the progress of thousands of nodes, have less than one."""
MAX_NODES: Final = 20_000
"""In one message."""
MAX_NODE_ID: Final = 1_000
_PREVIEW: Final = 1
_TEXT: Final = 3
_PREVIEW_WITH_METADATA: Final = 4
_IMAGE_FORMATS: Final = {1: "image/jpeg", 2: "image/png"}


class Unreadable(Exception):
    """Something was sent that is not the JSON it should be."""


class EntryUnreadable(Unreadable):
    """A history has the prompt, and what it says about it makes no sense."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Made once: a decoder with a rule of its own for constants is not cached by the json module.
_STRICT: Final = json.JSONDecoder(parse_constant=_refuse_constant)
_LENIENT: Final = json.JSONDecoder(parse_constant=lambda _: None)


def read_json(raw: bytes, *, lenient: bool = False) -> Any:
    """Return the JSON in `raw`.

    `lenient` reads NaN and the infinities as None: Python servers write them into answers that are sound otherwise.
    Raises Unreadable for anything else that is wrong, absurd nesting included.
    """
    if len(raw) > _MANY_BYTES and sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Unreadable("it holds an absurd number of values")
    try:
        return (_LENIENT if lenient else _STRICT).decode(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8") from None
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except (ValueError, MemoryError):
        raise Unreadable("it is not JSON") from None


# --- frames of the socket ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `prompt_id` None: it names no prompt."""

    event: ServerEvent
    prompt_id: str | None = None
    size_bytes: int = field(default=0, compare=False)
    """Of a text frame."""


def read_frame(raw: bytes) -> Frame | None:
    """Return what a frame says, None if it makes no sense.

    Text and binary frames are told apart by their first byte: binary ones begin with a small 4-byte event number, so
    with a zero byte, which no JSON text can.
    """
    return _read_binary(raw) if raw[:1] == b"\0" else _read_text(raw)


def _read_text(raw: bytes) -> Frame | None:
    if len(raw) > MAX_TEXT_BYTES:
        return None
    try:
        message = read_json(raw)
    except Unreadable:
        return None
    if not isinstance(message, dict):
        return None
    kind, data = message.get("type"), message.get("data")
    if not isinstance(kind, str) or not isinstance(data, dict):
        return None
    prompt_id = data.get("prompt_id")
    if prompt_id is not None and not isinstance(prompt_id, str):
        return None
    check = _CHECKS.get(kind)
    if check is not None and not check(data):
        return None
    return Frame(Said(kind, data), prompt_id, len(raw))


def _read_binary(raw: bytes) -> Frame | None:
    if len(raw) < 8:
        return None
    event, head = int.from_bytes(raw[:4], "big"), int.from_bytes(raw[4:8], "big")
    if event == _PREVIEW:
        mime = _IMAGE_FORMATS.get(head)
        return Frame(Preview(raw[8:], mime)) if mime is not None and len(raw) > 8 else None
    if event == _TEXT:
        return _read_node_text(raw[8 : 8 + head], raw[8 + head :]) if len(raw) >= 8 + head else None
    if event == _PREVIEW_WITH_METADATA and len(raw) > 8 + head:
        return _read_preview(raw[8 : 8 + head], raw[8 + head :])
    return None


def _read_node_text(node: bytes, text: bytes) -> Frame | None:
    try:
        return Frame(NodeText(node.decode("utf-8"), foreign_text(text.decode("utf-8"))))
    except UnicodeDecodeError:
        return None


def _read_preview(metadata: bytes, image: bytes) -> Frame | None:
    try:
        about = read_json(metadata)
    except Unreadable:
        return None
    if not isinstance(about, dict):
        return None
    mime, prompt_id = about.get("image_type"), about.get("prompt_id")
    node = about.get("display_node_id") or about.get("node_id")
    if not isinstance(mime, str) or mime not in _IMAGE_FORMATS.values() or not isinstance(prompt_id, str):
        return None
    return Frame(Preview(image, mime, node if isinstance(node, str) else None), prompt_id)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_progress_state(data: Mapping[str, Any]) -> bool:
    nodes = data.get("nodes")
    return (
        isinstance(nodes, dict)
        and len(nodes) <= MAX_NODES
        and all(
            len(name) <= MAX_NODE_ID
            and isinstance(entry, dict)
            and _is_number(entry.get("value", 0))
            and _is_number(entry.get("max", 0))
            for name, entry in nodes.items()
        )
    )


def _has_node(data: Mapping[str, Any]) -> bool:
    return "node" in data and (data["node"] is None or _is_node(data["node"]))


def _is_node(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NODE_ID


def _is_cached(data: Mapping[str, Any]) -> bool:
    nodes = data.get("nodes")
    return isinstance(nodes, list) and len(nodes) <= MAX_NODES and all(map(_is_node, nodes))


def _is_executed(data: Mapping[str, Any]) -> bool:
    return _is_node(data.get("node")) and isinstance(data.get("output"), dict | None)


_CHECKS: Final[Mapping[str, Callable[[Mapping[str, Any]], bool]]] = {
    "executing": _has_node,
    "progress": lambda data: _is_number(data.get("value")) and _is_number(data.get("max")),
    "progress_state": _is_progress_state,
    "execution_cached": _is_cached,
    "executed": _is_executed,
    "execution_start": lambda data: isinstance(data.get("prompt_id"), str),
    "execution_success": lambda data: isinstance(data.get("prompt_id"), str),
    "execution_error": lambda data: isinstance(data.get("prompt_id"), str),
    "execution_interrupted": lambda data: isinstance(data.get("prompt_id"), str),
}


# --- answers over HTTP ------------------------------------------------------------------------------------


def read_queue(answer: Any) -> QueueView:
    """Return the ids in a `/queue` answer, the waiting ones by priority: the server sends them in heap order.

    Raises Unreadable.
    """
    if not isinstance(answer, dict):
        raise Unreadable("it is not a queue")
    running, pending = answer.get("queue_running"), answer.get("queue_pending")
    if not isinstance(running, list) or not isinstance(pending, list):
        raise Unreadable("it is not a queue")
    return QueueView(
        tuple(prompt_id for _, prompt_id in map(_queue_item, running)),
        tuple(prompt_id for _, prompt_id in sorted(map(_queue_item, pending))),
    )


def _queue_item(item: Any) -> tuple[float, str]:
    if not isinstance(item, list) or len(item) < 2 or not isinstance(item[1], str):
        raise Unreadable("it holds a queue item that is none")
    # A number the server cannot have sorted by (NaN reads as None) goes last.
    return (float(item[0]) if _is_number(item[0]) else math.inf, item[1])


def read_history(answer: Any, prompt_id: str) -> HistoryEntry | None:
    """Return the entry of a `/history/{id}` answer, None if it has none. Raises Unreadable, EntryUnreadable."""
    if not isinstance(answer, dict):
        raise Unreadable("it is not a history")
    entry = answer.get(prompt_id)
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise EntryUnreadable("its history entry is none")
    outputs, status = entry.get("outputs"), entry.get("status")
    if outputs is not None and not isinstance(outputs, dict):
        raise EntryUnreadable("its outputs are not a table")
    status = status if isinstance(status, dict) else {}
    said = status.get("status_str")
    messages = status.get("messages")
    return HistoryEntry(
        prompt_id=PromptId(prompt_id),
        outputs=outputs or {},
        status=said if isinstance(said, str) else "",
        messages=tuple(
            (message[0], message[1])
            for message in (messages if isinstance(messages, list) else [])
            if isinstance(message, list)
            and len(message) == 2
            and isinstance(message[0], str)
            and isinstance(message[1], dict)
        ),
    )


def read_version(answer: Any) -> str:
    """Return the version in a `/system_stats` answer, empty if it says none. Raises Unreadable."""
    system = answer.get("system") if isinstance(answer, dict) else None
    if not isinstance(system, dict):
        raise Unreadable("it is not the state of a ComfyUI system")
    version = system.get("comfyui_version")
    return foreign_text(version, 60) if isinstance(version, str) else ""


def parse_version(version: str) -> Version | None:
    """Return the three numbers of a version, None if it does not begin with three (`0.3.45`, `v0.3.45-dev`)."""
    found = _VERSION.match(version.strip())
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def read_devices(answer: Any) -> dict[str, Any]:
    """Return the GPU's name and memory from a `/system_stats` answer, as far as it tells."""
    devices = answer.get("devices") if isinstance(answer, dict) else None
    first = devices[0] if isinstance(devices, list) and devices else None
    if not isinstance(first, dict):
        return {}
    facts: dict[str, Any] = {}
    if isinstance(first.get("name"), str):
        facts["gpu"] = foreign_text(first["name"], 120)
    for key in ("vram_total", "vram_free"):
        if _is_number(first.get(key)):
            facts[f"{key}_bytes"] = int(first[key])
    return facts


def read_upload_limit(answer: Any) -> int | None:
    """Return the upload limit in bytes from a `/features` answer; the server may write it as a float."""
    limit = answer.get("max_upload_size") if isinstance(answer, dict) else None
    return int(limit) if isinstance(limit, int | float) and _is_number(limit) and limit > 0 else None
