"""Recorded traffic of a real ComfyUI server: how to read it, and how to compare another server's answers with it.

A comparison is strict about shape (every field, every JSON type, every order) and about each value that a server does
not make up anew: ids, file numbers and stamps are matched by kind, and the same recorded one must always meet the
same new one. It knows nothing about who gave the other answers; `replay` gets them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Event = dict[str, Any]

MADE_UP: Final = frozenset(
    {
        "timestamp",
        "create_time",
        "execution_start_time",
        "execution_end_time",
        "ram_total",
        "ram_free",
        "vram_total",
        "vram_free",
        "torch_vram_total",
        "torch_vram_free",
    }
)
"""Numbers that differ at every run."""

UNORDERED: Final = frozenset({"executed", "current_outputs"})
"""Lists that the real server makes from sets of text, whose order changes with every process."""

HEADERS: Final = (
    "Content-Type",
    "Content-Disposition",
    "X-Content-Type-Options",
    "ETag",
    "Last-Modified",
    "Accept-Ranges",
    "Content-Range",
    "Content-Encoding",
    "Cache-Control",
    "Connection",
    "Allow",
    "Location",
    "Access-Control-Allow-Origin",
    "Access-Control-Allow-Methods",
    "Access-Control-Allow-Headers",
    "Access-Control-Allow-Credentials",
)
HEADERS_BY_PRESENCE: Final = frozenset({"ETag", "Last-Modified"})

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_HEX = re.compile(r"[0-9a-f]{32,64}")
_COUNTER = re.compile(r"_\d{5}(?=[_.])")
_TEMP = re.compile(r"_temp_[a-z]{5}")
MAGIC: Final = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"glTF", b"fLaC", b"OggS", b"\x1aE\xdf\xa3", b"ID3")
"""How pictures, meshes, audio and video begin."""

SHORT_FILE: Final = 64
"""Bytes; a file of that length was uploaded by the recorder, and comes back as it was."""


@dataclass(frozen=True)
class Recording:
    """One file of recorded traffic, in order of time."""

    name: str
    events: tuple[Event, ...]

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a `.jsonl` file."""
        lines = path.read_text(encoding="utf-8").splitlines()
        return cls(path.stem, tuple(json.loads(line) for line in lines))

    def first(self, lines: int | None) -> Recording:
        """The recording's beginning; all of it for None."""
        return self if lines is None else Recording(self.name, self.events[:lines])

    def answers(self) -> dict[int, tuple[Event, Event]]:
        """Request and answer by their number."""
        requests = {e["n"]: e for e in self.events if e["dir"] == "http-req"}
        return {e["n"]: (requests[e["n"]], e) for e in self.events if e["dir"] == "http-res"}

    def sockets(self) -> list[str]:
        """Labels of the sockets, in order of opening."""
        return [e["sock"] for e in self.events if e["dir"] == "ws-open"]

    def messages(self, sock: str) -> list[Event]:
        """What a socket received."""
        return [e for e in self.events if e["dir"] in ("ws-text", "ws-binary") and e["sock"] == sock]


@dataclass(repr=False)
class Answer:
    """What the other server answered; `error` is set, and nothing else, if no answer came."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str | None = None


@dataclass(repr=False)
class Results:
    """Everything the other server said during a replay."""

    answers: dict[int, Answer] = field(default_factory=dict)
    messages: dict[str, list[str | bytes]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    """Sockets whose handshake was refused, with the status."""
    ended: dict[str, int | None] = field(default_factory=dict)
    """Sockets that the server ended, with the close code (1006: without a close frame)."""
    substitutions: dict[str, str] = field(default_factory=dict)
    """Texts of the other server that stand for recorded ones whatever they look like: host, folders."""

    def __repr__(self) -> str:
        return f"<{len(self.answers)} answers, {sum(map(len, self.messages.values()))} messages>"


class Bindings:
    """Which made-up text of the other server stands for which recorded one."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def learn(self, want: Any, got: Any) -> None:
        """Walk two answers side by side and bind what is of the same kind; ignores differences."""
        if isinstance(want, dict) and isinstance(got, dict):
            for (key, value), (other_key, other) in zip(want.items(), got.items(), strict=False):
                self.bind(key, other_key)
                self.learn(value, got.get(key, other))
        elif isinstance(want, list) and isinstance(got, list):
            for value, other in zip(want, got, strict=False):
                self.learn(value, other)
        elif isinstance(want, str) and isinstance(got, str):
            self.bind(want, got)

    def bind(self, want: str, got: str) -> bool:
        """Bind two texts if they differ only in what servers make up; False if they cannot stand for each other."""
        if want == got:
            return True
        if want in self.known:
            return self.known[want] == got
        if mask(want) != mask(got):
            return False
        self.known[want] = got
        for one, other in zip(_UUID.findall(want), _UUID.findall(got), strict=True):
            self.known.setdefault(one, other)
        return True

    def translate(self, text: str) -> str:
        """A recorded request, with the other server's texts put in."""
        for want in sorted(self.known, key=len, reverse=True):
            text = text.replace(want, self.known[want])
        return text


def mask(text: str) -> str:
    """A text without what servers make up: ids, counters, random letters."""
    text = _UUID.sub("<uuid>", text)
    text = _HEX.sub("<hex>", text)
    text = _COUNTER.sub("_#####", text)
    return _TEMP.sub("_temp_?????", text)


class Comparison:
    """Collects the differences between a recording and another server's results."""

    def __init__(
        self, recording: Recording, results: Results, *, ignored: Sequence[str] = (), tails: Sequence[str] = ()
    ) -> None:
        """Compare all but what is named.

        `ignored` are paths (`12.json.system.ram_total`, `A.messages`) below which nothing is compared. `tails` are
        sockets that were closed in the middle of things: where their messages end is left open.
        """
        self.differences: list[str] = []
        self._recording = recording
        self._results = results
        self._ignored = tuple(ignored)
        self._tails = frozenset(tails)
        self._bindings = Bindings()
        self._base: int | None = None

    def run(self, *, strict_status: bool = False) -> list[str]:
        """Compare everything; an empty list means that the servers agree.

        `strict_status` also compares where `status` messages stand among the others, which only holds for stories
        with a single client that waits for each of its prompts.
        """
        for number, (request, answer) in sorted(self._recording.answers().items()):
            where = str(number)
            if not self._skips(where):
                self._answer(where, request, answer, self._results.answers.get(number))
        for sock in self._recording.sockets():
            if not self._skips(sock):
                self._socket(sock, strict_status)
        return self.differences

    def _skips(self, where: str) -> bool:
        return any(where == path or where.startswith(f"{path}.") for path in self._ignored)

    def _differ(self, where: str, want: object, got: object) -> None:
        if not self._skips(where):
            self.differences.append(f"{self._recording.name}: {where}: recorded {_short(want)}, got {_short(got)}")

    # HTTP

    def _answer(self, where: str, request: Event, want: Event, got: Answer | None) -> None:
        where = f"{where}"
        if got is None:
            self._differ(where, want.get("status"), "no answer at all")
            return
        if "error" in want or got.error is not None:
            if ("error" in want) != (got.error is not None):
                self._differ(f"{where}.error", want.get("error"), got.error or got.status)
            return
        if want["status"] != got.status:
            self._differ(f"{where}.status", want["status"], (got.status, got.body[:300]))
            return
        self._headers(f"{where}.headers", want.get("headers", {}), got.headers)
        if request["method"] != "HEAD":
            self._body(where, want, got)

    def _headers(self, where: str, want: Mapping[str, str], got: Mapping[str, str]) -> None:
        recorded = {name.lower(): value for name, value in want.items()}
        answered = {name.lower(): value for name, value in got.items()}
        for name in HEADERS:
            one, other = recorded.get(name.lower()), answered.get(name.lower())
            if one == other or (name in HEADERS_BY_PRESENCE and one and other):
                continue
            if one and other and self._text_equal(one, other):
                continue
            self._differ(f"{where}.{name}", one, other)

    def _body(self, where: str, want: Event, got: Answer) -> None:
        if "json" in want:
            try:
                parsed = json.loads(got.body)
            except ValueError:
                self._differ(f"{where}.json", want["json"], got.body[:200])
                return
            self.json(f"{where}.json", want["json"], parsed)
        elif "base64" in want:
            self._bytes(f"{where}.body", want, got.body)
        elif "text" in want:
            if want["text"] != got.body.decode(errors="replace"):
                self._differ(f"{where}.text", want["text"], got.body[:200])
        elif bool(want.get("length")) != bool(got.body) and "json_head" not in want:
            self._differ(f"{where}.length", want.get("length"), len(got.body))

    def _bytes(self, where: str, want: Event, got: bytes) -> None:
        recorded = base64.b64decode(want["base64"])
        if recorded[4:8] == b"ftyp":
            recorded, got = recorded[4:], got[4:]
        magic = next((one for one in (*MAGIC, b"ftyp") if recorded.startswith(one)), None)
        if magic is not None and len(recorded) > SHORT_FILE:
            if not got.startswith(magic):
                self._differ(where, magic, got[:8])
        elif want.get("truncated"):
            if got[: len(recorded)] != recorded:
                self._differ(where, recorded[:40], got[:40])
        elif recorded != got:
            self._differ(where, recorded[:40], got[:40])

    # JSON

    def json(self, where: str, want: Any, got: Any) -> None:
        """Compare two JSON values, recursively."""
        key = where.rpartition(".")[2]
        if self._skips(where):
            return
        if type(want) is not type(got):
            self._differ(where, want, got)
        elif isinstance(want, dict):
            self._objects(where, want, got)
        elif isinstance(want, list):
            self._lists(where, key, want, got)
        elif isinstance(want, str):
            if not self._text_equal(want, got) and not (want.startswith("tensor(") and ".current_inputs" in where):
                self._differ(where, want, got)
        elif key in MADE_UP:
            return
        elif key in ("number", "priority") and isinstance(want, int) and not isinstance(want, bool):
            self._counter(where, want, got)
        elif want != got:
            self._differ(where, want, got)

    def _text_equal(self, want: str, got: str) -> bool:
        for theirs, recorded in self._results.substitutions.items():
            got = got.replace(theirs, recorded)
        return self._bindings.bind(want, got)

    def _counter(self, where: str, want: int, got: int) -> None:
        """The recorded server had counted before: the distance is the same for all, whatever the sign."""
        distance = abs(want) - abs(got)
        if self._base is None:
            self._base = distance
        if distance != self._base or (want < 0) != (got < 0):
            self._differ(where, want, got)

    def _objects(self, where: str, want: dict[str, Any], got: dict[str, Any]) -> None:
        left = dict(got)
        for key, value in want.items():
            twin = key if key in left else next((k for k in left if mask(k) == mask(key) != key), None)
            if twin is None or not self._bindings.bind(key, twin):
                self._differ(f"{where}.{key}", value, "absent")
                continue
            self.json(f"{where}.{key}", value, left.pop(twin))
        for key, value in left.items():
            self._differ(f"{where}.{key}", "absent", value)

    def _lists(self, where: str, key: str, want: list[Any], got: list[Any]) -> None:
        if key == "traceback":
            # Whose code raised, and in which line, is nobody's contract.
            if bool(want) != bool(got) or not all(isinstance(line, str) for line in got):
                self._differ(where, want, got)
            return
        if len(want) != len(got):
            self._differ(where, want, got)
            return
        if key in UNORDERED or (want and all(isinstance(one, str) for one in want) and where.endswith(".prompt.4")):
            want, got = sorted(want), sorted(got)
        is_queue_item = key == "prompt" or (key.isdigit() and ".queue_" in where)
        for index, (one, other) in enumerate(zip(want, got, strict=True)):
            if index == 0 and is_queue_item and isinstance(one, int):
                if type(one) is not type(other):
                    self._differ(f"{where}.0", one, other)
                else:
                    self._counter(f"{where}.0", one, other)
                continue
            self.json(f"{where}.{index}", one, other)

    # Sockets

    def _socket(self, sock: str, strict_status: bool) -> None:
        closed = [e for e in self._recording.events if e["dir"] == "ws-close" and e["sock"] == sock]
        refused = next((e["code"] for e in closed if e["kind"] == "HANDSHAKE"), None)
        if refused != self._results.refused.get(sock):
            self._differ(f"{sock}.handshake", refused, self._results.refused.get(sock))
        lost = any(e.get("code") == 1006 for e in closed)
        if lost and self._results.ended.get(sock) != 1006:
            self._differ(f"{sock}.close", 1006, self._results.ended.get(sock))
        want = [_message(event) for event in self._recording.messages(sock)]
        got = [_parsed(message) for message in self._results.messages.get(sock, [])]
        if not strict_status:
            self._runs(f"{sock}.status", _only_status(want), _only_status(got))
            want, got = _without_status(want), _without_status(got)
        self._runs(f"{sock}.messages", want, got)

    def _runs(self, where: str, want: list[Any], got: list[Any]) -> None:
        """Compare two message lists in which runs of progress reports may differ in length."""
        ours, theirs = list(_folded(want)), list(_folded(got))
        if where.partition(".")[0] in self._tails:
            shorter = min(len(ours), len(theirs))
            ours, theirs = ours[:shorter], theirs[:shorter]
        labels, others = [_label(run[0]) for run in ours], [_label(run[0]) for run in theirs]
        same = next((i for i, (a, b) in enumerate(zip(labels, others, strict=False)) if a != b), None)
        if same is None and len(labels) != len(others):
            same = min(len(labels), len(others))
        for index, (run, other) in enumerate(zip(ours[:same], theirs[:same], strict=True)):
            self.json(f"{where}[{index}]", run[0], other[0])
            self.json(f"{where}[{index}]", run[-1], other[-1])
        if same is not None:
            self._differ(f"{where}[{same}]", labels[same : same + 3], others[same : same + 3])


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 300 else text[:300] + "…"


def _message(event: Event) -> Any:
    if event["dir"] == "ws-text":
        return event["json"]
    return _binary(base64.b64decode(event["base64"]))


def _parsed(message: str | bytes) -> Any:
    try:
        return json.loads(message) if isinstance(message, str) else _binary(message)
    except ValueError:
        return {"type": "unreadable", "data": {}}


def _type(message: Any) -> Any:
    return message.get("type") if isinstance(message, dict) else None


def _binary(data: bytes) -> dict[str, Any]:
    """A binary frame as an object that can be compared: its event, and what can be read of it."""
    event = int.from_bytes(data[:4], "big")
    frame: dict[str, Any] = {"type": f"binary {event}", "data": {}}
    if event == 1:
        frame["data"] = {"format": int.from_bytes(data[4:8], "big"), "magic": data[8:11].hex()}
    elif event == 3:
        size = int.from_bytes(data[4:8], "big")
        frame["data"] = {"node": data[8 : 8 + size].decode(), "text": data[8 + size :].decode()}
    elif event == 4:
        size = int.from_bytes(data[4:8], "big")
        frame["data"] = {"metadata": json.loads(data[8 : 8 + size]), "magic": data[8 + size : 11 + size].hex()}
    return frame


def _only_status(messages: Sequence[Any]) -> list[Any]:
    """The status messages, equal neighbours once: how often a count is repeated depends on the company."""
    found: list[Any] = []
    for message in messages:
        if _type(message) == "status" and (not found or found[-1] != message):
            found.append(message)
    return found


def _without_status(messages: Sequence[Any]) -> list[Any]:
    return [message for message in messages if _type(message) != "status"]


def _label(message: Any) -> tuple[Any, ...]:
    """What a message is, as far as its place among the others matters."""
    data = message.get("data") if isinstance(message, dict) else None
    if not isinstance(data, dict):
        return (_type(message),)
    nodes = data.get("nodes")
    if _type(message) == "progress_state" and isinstance(nodes, dict):
        states = (state.get("state") if isinstance(state, dict) else None for state in nodes.values())
        return "progress_state", tuple(zip(nodes, states, strict=True))
    return _type(message), data.get("node", "")


def _folded(messages: Sequence[Any]) -> Iterator[list[Any]]:
    """Runs of reports of the same nodes: (progress_state, progress, preview) again and again counts once."""
    open_runs: dict[tuple[Any, ...], list[Any]] = {}
    for message in messages:
        label = _label(message)
        repeatable = _type(message) in ("progress_state", "progress", "binary 1", "binary 4")
        if repeatable and label in open_runs:
            open_runs[label].append(message)
            continue
        if not repeatable or _type(message) == "progress_state":
            open_runs = {}
        run = [message]
        if repeatable:
            open_runs[label] = run
        yield run
