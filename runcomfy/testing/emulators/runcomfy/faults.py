"""What the emulated cloud can be told to do wrong with single calls.

A fault says two things apart from each other: whether the call *works* (a machine is launched, a machine is stopped)
and what the caller *hears* about it. `works=True, reply="lost"` is a launch nobody learns of; `works=False` with no
status is a friendly yes to something that was never done. How machines misbehave is in `machines.Traits`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from aiohttp import web

from runcomfy.testing.emulators.runcomfy.machines import Span, in_seconds

SPLASH: Final = (
    "<!doctype html><html><head><title>One moment</title></head><body><h1>502 Bad Gateway</h1></body></html>"
)
"""What proxies, CDNs and captive portals send where JSON was expected."""

REPLIES: Final = frozenset({"lost", "never", "truncated", "html", "empty", "reset", "drip", "endless"})
_CHUNK: Final = b" " * 65536


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the API would answer."""

    status: int
    payload: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The answer's body: JSON, or bytes and text as they are."""
        if isinstance(self.payload, bytes):
            return self.payload
        if isinstance(self.payload, str):
            return self.payload.encode()
        return json.dumps(self.payload).encode()


@dataclass(slots=True)
class CallFault:
    """What goes wrong with the next calls that fit.

    Attributes:
        call: which calls: `METHOD path` below the user's prefix with shell wildcards: `POST servers`, `GET servers`,
            `GET servers/*`, `DELETE servers/*`, `POST servers/*/update-estimated-duration`, `GET servers?page=2`.
        status: the answer's status instead of the real one.
        body: the answer's body instead of the real one: text and bytes as they are, anything else as JSON.
        reply: how the answer gets lost: `lost` (connection closed without one), `reset` (closed hard), `never`,
            `truncated` (half of it), `html`, `empty`, `drip` (a byte a second), `endless`.
        works: whether the call does what it is for. Default: unless the status says that it failed.
        headers: laid over the answer's headers.
        delay: how long after the work the answer comes.
        wrap: the answer is put into an object under this name.
        change: what the answer's JSON is made into (only within this process).
        times: for how many calls; None: until it is cleared.
        skip: how many fitting calls go well before.
        lasts: for how long, counted from the first fitting call.
    """

    call: str = "*"
    status: int | None = None
    body: Any = None
    reply: str | None = None
    works: bool | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: Span = 0.0
    wrap: str | None = None
    change: Callable[[Any], Any] | None = None
    times: int | None = 1
    skip: int = 0
    lasts: Span | None = None
    _until: float | None = None

    def __post_init__(self) -> None:
        if self.reply is not None and self.reply not in REPLIES:
            raise ValueError(f"no reply {self.reply!r}; one of {', '.join(sorted(REPLIES))}")

    @property
    def does_work(self) -> bool:
        """Whether the call has its effect."""
        return (self.status is None or self.status < 400) if self.works is None else self.works

    def answer(self, outcome: Outcome) -> Outcome:
        """Return what the caller would hear if the answer arrived."""
        payload = outcome.payload
        if self.change is not None:
            payload = self.change(payload)
        if self.wrap is not None:
            payload = {self.wrap: payload}
        status = self.status or outcome.status
        if self.body is not None:
            payload = self.body
        elif self.reply == "html":
            payload = SPLASH
        elif self.reply == "empty":
            payload = b""
        elif self.status is not None and (self.status >= 400) != (outcome.status >= 400):
            payload = {"message": "Internal server error"} if self.status >= 500 else {"message": "error"}
        kind = {"Content-Type": "text/html"} if isinstance(payload, str) and payload.lstrip().startswith("<") else {}
        return Outcome(status, payload, {**outcome.headers, **kind, **self.headers})


class CallFaults:
    """The faults that are switched on; the oldest that fits is the one that counts."""

    def __init__(self) -> None:
        self._faults: list[CallFault] = []

    def add(self, fault: CallFault) -> CallFault:
        """Switch a fault on, and return it."""
        self._faults.append(fault)
        return fault

    def remove(self, fault: CallFault) -> bool:
        """Switch a fault off; return whether it was on."""
        left = [each for each in self._faults if each is not fault]
        was, self._faults = len(left) < len(self._faults), left
        return was

    def clear(self) -> None:
        """Switch every fault off."""
        self._faults.clear()

    def take(self, call: str, *, loop_time: float) -> CallFault | None:
        """Return the fault that this call meets, and count it."""
        for fault in list(self._faults):
            if fnmatchcase(call, fault.call):
                if fault.lasts is not None:
                    if fault._until is None:
                        fault._until = loop_time + in_seconds(fault.lasts)
                    if loop_time >= fault._until:
                        self._faults.remove(fault)
                        continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                return fault
        return None


async def send(
    request: web.BaseRequest, outcome: Outcome, *, reply: str | None, closing: asyncio.Event
) -> web.StreamResponse:
    """Send an answer the way the fault wants it."""
    if reply == "never":
        await closing.wait()
    if reply in ("never", "lost", "reset"):
        _hang_up(request, hard=reply == "reset")
        return web.Response(status=500)
    body = outcome.body()
    headers = {"Content-Type": "application/json", **outcome.headers}
    if reply not in ("truncated", "drip", "endless"):
        return web.Response(status=outcome.status, body=body, headers=headers)
    response = web.StreamResponse(status=outcome.status, headers=headers)
    if reply != "endless":
        response.content_length = len(body)
    await response.prepare(request)
    try:
        if reply == "truncated":
            await response.write(body[: len(body) // 2])
            _hang_up(request, hard=False)
        elif reply == "drip":
            for index in range(len(body)):
                await response.write(body[index : index + 1])
                await asyncio.sleep(1)
        else:
            while not closing.is_set():
                await response.write(_CHUNK)
                await asyncio.sleep(0)
    except ConnectionError:
        pass  # the caller had enough
    return response


def _hang_up(request: web.BaseRequest, *, hard: bool) -> None:
    """End the connection; hard: with a reset, as a crashed machine or a firewall does."""
    transport = request.transport
    if transport is None:
        return
    if not hard:
        transport.close()
        return
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is not None:
        linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()
