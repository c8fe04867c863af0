"""
The JSON of RunComfy's serverless API, read into our values. Pure: no network, no clock.

Its documents and its real answers differ (two spellings of "cancelled", errors as an object or a list, times with and
without an offset, errors that come with status 200), so reading is tolerant of all of that. It is strict about ids: an
answer about another request, or one without an id where one was asked for, is no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import islice
from typing import Any, Final
from urllib.parse import urlsplit

from runcomfy.adapters.providers.runcomfy_wire import Unreadable, read_id, read_json, read_time, read_url
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.serverless import (
    DeploymentView,
    Fault,
    RemoteFile,
    RequestId,
    RequestReport,
    RequestResult,
    RequestState,
    Submitted,
)

__all__ = ["Unreadable", "read_json"]

STATES: Final[Mapping[str, RequestState]] = {
    "in_queue": RequestState.IN_QUEUE,
    "queued": RequestState.IN_QUEUE,
    "pending": RequestState.IN_QUEUE,
    "in_progress": RequestState.IN_PROGRESS,
    "running": RequestState.IN_PROGRESS,
    "completed": RequestState.COMPLETED,
    "succeeded": RequestState.SUCCEEDED,
    "success": RequestState.SUCCEEDED,
    "failed": RequestState.FAILED,
    "error": RequestState.FAILED,
    # Both spellings are in RunComfy's own documents.
    "canceled": RequestState.CANCELED,
    "cancelled": RequestState.CANCELED,
}

MAX_FILES: Final = 1_000
MAX_FAULTS: Final = 20
_WORDS: Final = ("debugInfo", "details", "detail", "message", "error_message", "error", "type")


def read_submitted(payload: Any) -> Submitted:
    """Read the answer to a submit. Raises Unreadable."""
    body = _object(payload)
    request_id = _request_id(body)
    if request_id is None:
        raise Unreadable("a request without a usable id")
    return Submitted(
        request_id=request_id,
        status_url=_plain(body.get("status_url")),
        result_url=_plain(body.get("result_url")),
        cancel_url=_plain(body.get("cancel_url")),
    )


def read_status(payload: Any, *, expected: RequestId) -> RequestReport:
    """Read the answer to a status call. Raises Unreadable."""
    body = _about(payload, expected)
    word = body.get("status")
    if not isinstance(word, str) or not word.strip():
        raise Unreadable("a status without a word")
    position = body.get("queue_position")
    return RequestReport(
        request_id=expected,
        state=_state(word),
        word=foreign_text(word, 60),
        queue_position=position if isinstance(position, int) and not isinstance(position, bool) else None,
        instance_id=_text(body.get("instance_id")),
    )


def read_result(payload: Any, *, expected: RequestId) -> RequestResult:
    """Read the answer to a result call. Raises Unreadable."""
    body = _about(payload, expected)
    word = body.get("status")
    faults = tuple(read_faults(body))
    state = _state(word) if isinstance(word, str) else RequestState.UNKNOWN
    if state is RequestState.UNKNOWN and not isinstance(word, str) and not faults and "outputs" not in body:
        raise Unreadable("a result without a status")
    outputs = body.get("outputs", body.get("output"))
    return RequestResult(
        request_id=expected,
        state=state,
        files=tuple(read_files(outputs)),
        faults=faults,
        created_at=read_time(body.get("created_at")),
        finished_at=read_time(body.get("finished_at")),
        instance_id=_text(body.get("instance_id")),
        outputs=outputs if isinstance(outputs, dict) else {},
    )


def read_cancelled(payload: Any) -> bool:
    """Read the answer to a cancel: whether the request will end for it. Raises Unreadable.

    Two shapes are documented: `outcome` (cancelled, not_cancellable), and `status` (cancellation_requested,
    not_cancellable).
    """
    body = _object(payload)
    for name in ("outcome", "status"):
        word = body.get(name)
        if isinstance(word, str) and word.strip():
            plain = word.strip().lower()
            if plain.startswith("not_"):
                return False
            if plain.startswith("cancel"):
                return True
    raise Unreadable("an answer to a cancellation that says neither yes nor no")


def read_deployment(payload: Any) -> DeploymentView:
    """Read what is said about a deployment. Raises Unreadable."""
    body = _object(payload)
    hardware = body.get("hardware")
    names = hardware if isinstance(hardware, list) else [hardware]
    enabled, least, warm = body.get("is_enabled"), body.get("min_instances"), body.get("keep_warm_duration_in_seconds")
    return DeploymentView(
        name=_text(body.get("name")),
        hardware=tuple(foreign_text(name, 60) for name in names[:10] if isinstance(name, str) and name),
        enabled=enabled if isinstance(enabled, bool) else None,
        keep_warm=_seconds(warm),
        min_instances=least if isinstance(least, int) and not isinstance(least, bool) else None,
    )


def read_refusal(payload: Any) -> Fault | None:
    """Return the error that an answer is, whatever its status; None if it is none.

    Some errors come with status 200 and an `error_code`, so this is looked at before anything else is believed. A
    result has errors of its own kind, in a list, and is not one.
    """
    if not isinstance(payload, dict):
        return None
    code = _code(payload.get("error_code", payload.get("errorCode")))
    if code is None and isinstance(payload.get("error"), dict):
        code = _code(payload["error"].get("error_code", payload["error"].get("code")))
        if "request_id" in payload:  # a result, or a status, that failed
            return None
    if code is None or (code == 0 and payload.get("error_code") in (0, "0")):
        return None
    if "request_id" in payload and "status" in payload:
        return None
    return Fault(code, _text(payload.get("error")), _words(payload))


def read_faults(body: Mapping[str, Any]) -> Iterator[Fault]:
    """Read the errors of a result: a list of objects in real answers, one object in a document, or a text."""
    raw = body.get("error") or body.get("errors")
    entries = raw if isinstance(raw, list) else [raw]
    found = False
    for entry in entries[:MAX_FAULTS]:
        if isinstance(entry, str) and entry.strip():
            found = True
            yield Fault(None, "", foreign_text(entry))
        elif isinstance(entry, dict):
            code = next(
                (c for n in ("errorCode", "error_code", "code") if (c := _code(entry.get(n))) is not None), None
            )
            found = True
            yield Fault(code, _text(entry.get("error")) or _text(entry.get("type")), _words(entry))
    top = _code(body.get("error_code"))
    if not found and top:
        yield Fault(top, "", _words(body))


# --- files --------------------------------------------------------------------------------------------------


def read_files(outputs: Any) -> Iterator[RemoteFile]:
    """Read the files of a result's outputs, at most `MAX_FILES`; what is none is passed over."""
    return islice(_files(outputs), MAX_FILES)


def _files(outputs: Any) -> Iterator[RemoteFile]:
    """Read files, node by node. A document says that outputs are an array; every real answer has an object."""
    if isinstance(outputs, dict):
        for node, channels in outputs.items():
            yield from _of_node(str(node)[:200], channels)
    elif isinstance(outputs, list):
        for entry in outputs:
            if isinstance(entry, dict):
                node = entry.get("node_id", entry.get("node", ""))
                yield from _of_node(str(node)[:200] if isinstance(node, str | int) else "", entry)


def _of_node(node: str, channels: Any) -> Iterator[RemoteFile]:
    if isinstance(channels, list):
        yield from _of_channel(node, "", channels)
    elif isinstance(channels, dict):
        if _is_file(channels):
            yield _file(node, "", channels)
        for channel, entries in channels.items():
            if isinstance(entries, dict):
                entries = [entries]
            if isinstance(entries, list):
                yield from _of_channel(node, foreign_text(channel, 60), entries)


def _of_channel(node: str, channel: str, entries: list[Any]) -> Iterator[RemoteFile]:
    for entry in entries:
        if isinstance(entry, dict) and _is_file(entry):
            yield _file(node, channel, entry)


def _is_file(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("url"), str) or isinstance(entry.get("filename"), str)


def _file(node: str, channel: str, entry: Mapping[str, Any]) -> RemoteFile:
    return RemoteFile(
        node=node,
        channel=channel,
        filename=_plain(entry.get("filename"))[:4096] or _name_in(entry.get("url")),
        subfolder=_plain(entry.get("subfolder"))[:4096],
        type=_text(entry.get("type")) or "output",
        url=read_url(entry.get("url")),
    )


def _name_in(url: Any) -> str:
    try:
        return urlsplit(url).path.rpartition("/")[2] if isinstance(url, str) else ""
    except ValueError:
        return ""


# --- parts --------------------------------------------------------------------------------------------------


def _object(payload: Any) -> Mapping[str, Any]:
    if not isinstance(payload, dict):
        raise Unreadable(f"a {type(payload).__name__} instead of an object")
    for name in ("data", "request", "deployment"):
        inner = payload.get(name)
        if isinstance(inner, dict) and not ({"request_id", "status", "id"} & payload.keys()):
            return inner
    return payload


def _about(payload: Any, expected: RequestId) -> Mapping[str, Any]:
    body = _object(payload)
    named = body.get("request_id")
    if named is not None and _request_id(body) != expected:
        raise Unreadable("an answer about another request")
    return body


def _request_id(body: Mapping[str, Any]) -> RequestId | None:
    named = read_id(body.get("request_id"))
    return RequestId(named) if named is not None else None


def _state(word: str) -> RequestState:
    return STATES.get(word.strip().lower(), RequestState.UNKNOWN)


def _code(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 12:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**12 else None


def _seconds(value: Any) -> timedelta | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        span = timedelta(seconds=value)
    except (ValueError, OverflowError):
        return None
    return span if span >= timedelta(0) else None


def _words(entry: Mapping[str, Any]) -> str:
    for name in _WORDS:
        value = entry.get(name)
        if isinstance(value, str) and value.strip():
            return foreign_text(value)
        if isinstance(value, list):
            texts = [_words(item) if isinstance(item, dict) else foreign_text(item) for item in value[:3]]
            if joined := "; ".join(filter(None, texts)):
                return foreign_text(joined)
        if isinstance(value, dict) and (inner := _words_flat(value)):
            return inner
    return ""


def _words_flat(entry: Mapping[str, Any]) -> str:
    return next((foreign_text(v) for n in _WORDS if isinstance(v := entry.get(n), str) and v.strip()), "")


def _text(value: Any) -> str:
    return foreign_text(value) if isinstance(value, str) else ""


def _plain(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
