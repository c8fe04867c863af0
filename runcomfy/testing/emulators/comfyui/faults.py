"""Everything the emulated server can be told to do wrong, one call at a time.

`FaultPlan` holds what is switched on: faults of HTTP calls (by method and path), of sockets (by connection) and of
prompts (by submission or run). A server without faults behaves as recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from runcomfy.testing.emulators.comfyui.sockets import ClientSocket, Frame

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class SocketFault:
    """How one socket misbehaves; the default does not.

    Attributes:
        refuse: answer the handshake with this status.
        silent_after: half-open: after that many frames no more, and no pong, no close either.
        abort_after: end the connection without a close frame after that many frames.
        duplicate: every frame twice.
        reorder: frames swap places in pairs.
        foreign: before every frame, one about somebody else's prompt and one of an unknown type.
        flood: that many preview pictures before every frame.
    """

    refuse: int | None = None
    silent_after: int | None = None
    abort_after: int | None = None
    duplicate: bool = False
    reorder: bool = False
    foreign: bool = False
    flood: int = 0

    def frames(self, socket: ClientSocket, frame: Frame) -> Iterator[Frame]:
        """What is sent instead of this frame."""
        if self.reorder:
            if socket.held is None and frame.event not in ("status", "feature_flags"):
                socket.held = frame
                return
            held, socket.held = socket.held, None
            yield frame
            if held is None:
                return
            frame = held
        for _ in range(self.flood):
            yield dataclasses.replace(frame, raw=FLOOD_PREVIEW, event="", data=None)
        if self.foreign:
            for event, data in FOREIGN_MESSAGES:
                yield dataclasses.replace(frame, event=event, data=data, raw=None)
        yield frame
        if self.duplicate:
            yield frame


FOREIGN_PROMPT = "00000000-0000-4000-8000-00000000beef"

FOREIGN_MESSAGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("execution_error", {"prompt_id": FOREIGN_PROMPT, "node_id": "1", "exception_message": "not yours\n"}),
    ("executing", {"node": None, "prompt_id": FOREIGN_PROMPT}),
    ("some_node_pack.news", {"anything": [1, None, "x"]}),
)

FLOOD_PREVIEW = b"\x00\x00\x00\x01\x00\x00\x00\x01" + b"\xff\xd8\xff\xe0" + bytes(60_000) + b"\xff\xd9"
"""Looks like a preview of about 60 kB; not a picture anybody can decode."""


@dataclass(frozen=True, slots=True)
class PromptFault:
    """How one prompt's run misbehaves.

    Attributes:
        vanish: "start": taken from the queue and gone, never run; "end": run, then gone without history or messages.
        no_outputs: a success whose history names no outputs.
        fails: its first node raises "oom" (a full GPU) or "cuda" (a broken one).
    """

    vanish: str | None = None
    no_outputs: bool = False
    fails: str | None = None


PROXY_PAGE = (
    b"<!doctype html><html><head><title>502 Bad Gateway</title></head>"
    b"<body><h1>502 Bad Gateway</h1><p>nginx</p></body></html>"
)

MALFORMED_JSON = b'{"queue_running": [[0, "half'
INVALID_UTF8 = b'{"error": "\xff\xfe\xc3\x28"}'
NOT_A_NUMBER = b'{"value": NaN, "max": Infinity}'
DEEP_NESTING = b"[" * 5_000_000 + b"]" * 5_000_000
"""10 MB that a recursive parser does not survive."""

Corruption = Callable[[bytes, int], bytes]
"""Changes a body; the second argument counts the reads of that path through this fault, from 1."""


@dataclass(frozen=True, slots=True)
class Fault:
    """How one HTTP call misbehaves. Combine freely; the named constructors are the usual combinations.

    Attributes:
        work: whether the server does what was asked before it misbehaves.
        status: answer with this status.
        body: answer with this body instead of the real one.
        content_type: of `body`.
        headers: added to the answer.
        reply: "sent"; "lost": the connection is reset instead of an answer; "never": no answer, no end.
        delay: seconds before the answer.
        corrupt: changes the real body.
        truncate: send only that many bytes under the full Content-Length, then reset.
        claim: a Content-Length that is not true.
        rate: bytes per second of the body.
        endless: the body never ends (chunked, `body` or zeros again and again).
        redirect: Location of a 302; "self" loops.
        twice: POST /prompt only: queue it twice.
        keep: uploads only: store that many bytes of the file.
    """

    work: bool = True
    status: int | None = None
    body: bytes | None = None
    content_type: str = "text/html; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)
    reply: str = "sent"
    delay: float = 0.0
    corrupt: Corruption | None = None
    truncate: int | None = None
    claim: int | None = None
    rate: float | None = None
    endless: bool = False
    redirect: str | None = None
    twice: bool = False
    keep: int | None = None

    @property
    def answers_well(self) -> bool:
        """Whether the answer is a good one, if late."""
        return replace(self, delay=0.0, twice=False, keep=None) == Fault()

    @classmethod
    def page(cls, status: int = 200) -> Fault:
        """A proxy's page in HTML instead of the answer; nothing is done."""
        return cls(work=False, status=status, body=PROXY_PAGE)

    @classmethod
    def error(cls, status: int, *, work: bool = False, body: bytes = b"") -> Fault:
        """An error status; with `work` although the server did what was asked."""
        return cls(work=work, status=status, body=body, content_type="text/plain; charset=utf-8")

    @classmethod
    def lost(cls, *, work: bool = True) -> Fault:
        """The connection is reset instead of an answer."""
        return cls(work=work, reply="lost")

    @classmethod
    def never(cls, *, work: bool = True) -> Fault:
        """No answer, and no end."""
        return cls(work=work, reply="never")

    @classmethod
    def late(cls, seconds: float) -> Fault:
        """A good answer, later."""
        return cls(delay=seconds)

    @classmethod
    def cut(cls, after: int) -> Fault:
        """The body ends after that many bytes, and the connection with it."""
        return cls(truncate=after)

    @classmethod
    def lying(cls, length: int) -> Fault:
        """A Content-Length that is not the body's; shorter cuts it off, longer ends before it is reached."""
        return cls(claim=length)

    @classmethod
    def slow(cls, bytes_per_second: float) -> Fault:
        """A body in drops."""
        return cls(rate=bytes_per_second)

    @classmethod
    def flood(cls) -> Fault:
        """A body that never ends."""
        return cls(work=False, endless=True)

    @classmethod
    def corrupted(cls, how: Corruption) -> Fault:
        """The body, changed; see `corruption`."""
        return cls(corrupt=how)

    @classmethod
    def redirected(cls, location: str = "self") -> Fault:
        """A redirect to elsewhere, or in a loop."""
        return cls(work=False, redirect=location)

    @classmethod
    def saying(cls, body: bytes, content_type: str = "application/json; charset=utf-8", *, work: bool = True) -> Fault:
        """Any body instead of the real one, as if it were good."""
        return cls(work=work, body=body, content_type=content_type)


@dataclass(slots=True)
class _Armed:
    method: str
    path: str
    fault: Fault
    left: float
    skip: int
    seen: int = 0


class FaultPlan:
    """What goes wrong from now on."""

    def __init__(self) -> None:
        self.ignore_interrupts = False
        self.history_delay = 0.0
        """Seconds between `execution_success` and the history entry."""
        self._http: list[_Armed] = []
        self._sockets: list[tuple[SocketFault, float]] = []
        self._prompts: list[tuple[PromptFault, float]] = []

    def add(self, method: str, path: str, fault: Fault, *, times: float = 1, skip: int = 0) -> None:
        """Let the next `times` matching calls go wrong, after `skip` good ones.

        `method` may be `*`; `path` is without query and `/api` prefix and may hold wildcards (`/history/*`).
        """
        self._http.append(_Armed(method.upper(), path, fault, times, skip))

    def add_socket(self, fault: SocketFault, *, times: float = 1) -> None:
        """Let the next `times` sockets go wrong."""
        self._sockets.append((fault, times))

    def add_prompt(self, fault: PromptFault, *, times: float = 1) -> None:
        """Let the next `times` prompts that the worker takes go wrong."""
        self._prompts.append((fault, times))

    def clear(self) -> None:
        """Behave again."""
        self.__init__()  # type: ignore[misc]

    def next_http(self, method: str, path: str) -> tuple[Fault, int] | None:
        """The fault for this call and the how-manieth call it is, or None."""
        path = path.removeprefix("/api") if not path.startswith("/api/jobs") else path
        for armed in self._http:
            if armed.method not in ("*", method) or not fnmatchcase(path, armed.path) or armed.left <= 0:
                continue
            if armed.skip > 0:
                armed.skip -= 1
                continue
            armed.left -= 1
            armed.seen += 1
            return armed.fault, armed.seen
        return None

    def next_socket(self) -> SocketFault:
        """How the socket that opens now behaves."""
        return _take(self._sockets, SocketFault())

    def next_prompt(self) -> PromptFault:
        """How the prompt that starts now behaves."""
        return _take(self._prompts, PromptFault())


def _take(armed: list[tuple[F, float]], default: F) -> F:
    if not armed:
        return default
    fault, left = armed.pop(0)
    if left > 1:
        armed.insert(0, (fault, left - 1))
    return fault
