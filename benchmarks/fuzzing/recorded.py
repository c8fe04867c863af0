"""Seeds out of the recorded traffic of real ComfyUI servers."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

from runcomfy.testing.recordings import Event, Recording

RECORDINGS: Final = Path(__file__).resolve().parents[2] / "tests" / "recordings"
PROMPT: Final = "11111111-1111-4111-8111-111111111111"
"""Stands for the recorded prompt's id."""
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@cache
def recordings() -> tuple[Recording, ...]:
    """Return all of them."""
    return tuple(Recording.load(path) for path in sorted(RECORDINGS.glob("*.jsonl")))


def as_json(value: Any) -> bytes:
    """Write a value the short way."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def ours(data: bytes) -> bytes:
    """Put our prompt's id in the place of the first id that is recorded there."""
    found = _UUID.search(data.decode("utf-8", "replace"))
    return data if found is None else data.replace(found[0].encode(), PROMPT.encode())


def answers(method: str, path: str, *, most: int = 1_000) -> Iterator[tuple[str, int, bytes]]:
    """Yield (name, status, body) of recorded answers to a path, each kind of body once."""
    seen: set[str] = set()
    for recording in recordings():
        for number, (request, answer) in sorted(recording.answers().items()):
            if request["method"] != method or not request["path"].startswith(path) or "json" not in answer:
                continue
            body = as_json(answer["json"])
            shape = f"{answer['status']} {_shape(answer['json'])}"
            if shape in seen or len(body) > 8_000:
                continue
            seen.add(shape)
            yield f"{recording.name[:2]}-{number}", answer["status"], ours(body)
            if len(seen) >= most:
                return


def _shape(value: Any, depth: int = 0) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k if depth else ''}{_shape(v, depth + 1)}" for k, v in list(value.items())[:12]) + "}"
    return "[" + "".join(_shape(v, depth + 1) for v in value[:2]) + "]" if isinstance(value, list) else ""


def _frame(event: Event) -> bytes:
    return as_json(event["json"]) if event["dir"] == "ws-text" else base64.b64decode(event["base64"])[:300]


def talks(*, most: int = 40) -> Iterator[tuple[str, list[bytes]]]:
    """Yield (name, frames) of one recorded prompt each, from its first message to its end."""
    for recording in recordings():
        for sock in recording.sockets():
            mine: dict[str, list[bytes]] = {}
            last = ""
            for event in recording.messages(sock):
                named = event["json"].get("data", {}).get("prompt_id") if event["dir"] == "ws-text" else None
                last = named or last
                if last:
                    mine.setdefault(last, []).append(_frame(event).replace(last.encode(), PROMPT.encode()))
            for number, (_, frames) in enumerate(list(mine.items())[:4]):
                yield f"{recording.name[:2]}-{sock}-{number}", frames[:most]
