"""
A whole job on a machine that answers with mutated recordings, and raw bytes where HTTP or a socket is expected.

Everything above the operating system's sockets is real: aiohttp, websockets, the client, the watcher, the download and
the judging of what came. TCP goes through memory.

An input of `session` is parts, each with a line that says for what it stands:

    GET /queue 200 Content-Type: application/json
    {"queue_running": [], "queue_pending": []}
    %%
    frame
    {"type": "executing", "data": {…}}

The answers to one path are given in order, the last one again and again; frames follow the prompt's acceptance.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

from benchmarks.fuzzing import recorded, running
from benchmarks.fuzzing.http import SEPARATOR
from benchmarks.fuzzing.machines import COMFY, GRAPH, LABELS, OURS
from benchmarks.fuzzing.recorded import PROMPT, as_json
from benchmarks.fuzzing.scratch import scratch
from benchmarks.fuzzing.target import TOKEN, USER_ID, Seeds, Target, demand, only_ours, plain
from runcomfy.adapters import media
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.application.watcher import Watcher
from runcomfy.domain.progress import Progress
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings, ComfySettings
from runcomfy.domain.workflow_io import find_outputs
from runcomfy.testing import samples
from runcomfy.testing.clock import LoopClock

HOST: Final = ("127.0.0.1", 8188)
MOST_FETCHED: Final = 3
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
PATIENT: Final = ComfySettings(
    max_retries=1,
    poll_interval=timedelta(seconds=2),
    request_timeout=timedelta(seconds=5),
    execution_timeout=timedelta(seconds=120),
    stall_timeout=timedelta(seconds=60),
    unreachable_timeout=timedelta(seconds=10),
    worker_dead_after=timedelta(seconds=10),
    download_timeout=timedelta(seconds=60),
    ping_interval=timedelta(seconds=0),
    max_output_bytes=COMFY.max_output_bytes,
    max_frame_bytes=COMFY.max_frame_bytes,
)


class _Told:
    """What a machine says, by the path it is asked."""

    def __init__(self, data: bytes) -> None:
        self.answers: dict[str, list[tuple[bytes, bytes]]] = {}
        self.frames: list[bytes] = []
        self.submitted = False
        for part in data.split(SEPARATOR)[:60]:
            head, _, body = part.partition(b"\n")
            words = head.decode("latin-1").split(" ", 3)
            if words[0] == "frame":
                self.frames.append(body)
            elif len(words) >= 3 and words[2].isascii() and words[2].isdigit() and len(words[2]) == 3:
                extra = "".join(f"{line.strip()}\r\n" for line in (words[3:] or [""])[0].split("|") if ":" in line)
                start = f"HTTP/1.1 {words[2]} Said\r\n{extra}".encode("latin-1")
                self.answers.setdefault(f"{words[0]} {words[1]}", []).append((start, body))

    def answer(self, method: str, path: str) -> bytes:
        """Return a whole HTTP answer."""
        plain_path = path.partition("?")[0]
        key = next((key for key in self.answers if f"{method} {plain_path}".startswith(key)), "")
        found = self.answers.get(key)
        if not found:
            return b"HTTP/1.1 404 None\r\nContent-Length: 0\r\n\r\n"
        start, body = found.pop(0) if len(found) > 1 else found[0]
        length = b"" if b"content-length" in start.lower() else b"Content-Length: %d\r\n" % len(body)
        return start + length + b"\r\n" + (b"" if method == "HEAD" else body)


class _Machine(asyncio.Protocol):
    """One connection to the machine."""

    def __init__(self, told: _Told) -> None:
        self._told, self._buffer, self._upgraded = told, b"", False
        self._to: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._to = transport

    def data_received(self, data: bytes) -> None:
        if self._upgraded:
            if data[:1] == b"\x88":  # a farewell is answered in kind
                self._to.write(b"\x88\x02\x03\xe8")
                self._to.close()
            return
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            head, _, rest = self._buffer.partition(b"\r\n\r\n")
            fields = {
                k.lower().strip(): v.strip() for k, _, v in (line.partition(b":") for line in head.split(b"\r\n"))
            }
            if b"chunked" in fields.get(b"transfer-encoding", b""):
                _, end, rest = rest.partition(b"0\r\n\r\n")
                if not end:
                    return
            else:
                length = int(fields.get(b"content-length", b"0"))
                if len(rest) < length:
                    return
                rest = rest[length:]
            self._buffer = rest
            method, path, *_ = head.decode("latin-1").split(" ")
            if b"upgrade" in fields.get(b"connection", b"").lower():
                self._upgrade(fields)
                return
            self._to.write(self._told.answer(method, path))
            if method == "POST" and path == "/prompt":
                self._told.submitted = True

    def _upgrade(self, fields: dict[bytes, bytes]) -> None:
        self._upgraded = True
        accepted = base64.b64encode(hashlib.sha1(fields.get(b"sec-websocket-key", b"") + _GUID).digest())  # noqa: S324
        self._to.write(
            b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
            + accepted
            + b"\r\n\r\n"
        )
        self._say(0)

    def _say(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        if self._to.is_closing():
            return
        if not self._told.submitted:
            loop.call_later(0.05, self._say, number)
        elif number < len(self._told.frames):
            self._to.write(framed(self._told.frames[number]))
            loop.call_later(0.1, self._say, number + 1)
        # What was heard is not said again to a socket that is opened later.
        elif self._told.frames:
            self._told.frames = []


def framed(payload: bytes) -> bytes:
    """Return a frame as a server sends it."""
    kind = b"\x82" if payload[:1] == b"\0" else b"\x81"
    if len(payload) < 126:
        return kind + bytes([len(payload)]) + payload
    return kind + b"\x7e" + len(payload).to_bytes(2, "big") + payload if len(payload) < 65_536 else b""


async def _job(data: bytes) -> None:
    loop = asyncio.get_running_loop()
    told = _Told(data)
    server = await loop.create_server(lambda: _Machine(told), *HOST)
    client = ComfyUIWorkflowClient(f"http://{HOST[0]}:{HOST[1]}", PATIENT, clock=LoopClock())
    try:
        with only_ours():
            await _run(client)
    finally:
        server.close()
        await client.close()
        await asyncio.sleep(1)


async def _run(client: ComfyUIWorkflowClient) -> None:
    percent = 0.0

    def shown(progress: Progress) -> None:
        nonlocal percent
        demand(percent <= progress.percent <= 100, f"{progress.percent} % after {percent} %")
        percent = progress.percent
        plain(progress.message, "what is told of a run", limit=2_000)

    with only_ours():
        await client.probe()
    async with client.listen(OURS) as events:
        submitted = await client.submit(GRAPH, prompt_id=OURS)
        ended = await Watcher(client, PATIENT, clock=LoopClock()).watch(
            submitted.prompt_id, LABELS, events=events, on_progress=shown
        )
    for number, found in enumerate(find_outputs(ended.outputs)[:MOST_FETCHED]):
        if found.file is None:
            continue
        target = scratch() / f"output-{number}"
        target.unlink(missing_ok=True)
        with only_ours():
            await client.fetch(found.file, str(target))
            media.inspect(target, max_pixels=65_536, expected=found.kind)


def session(data: bytes) -> None:
    """A job: submitted, watched, its results fetched and judged."""
    running.run(_job(data))


def _session_seeds() -> Iterator[tuple[str, bytes]]:
    kind = "200 Content-Type: application/json"
    outputs = {"3": {"images": [{"filename": "out_00001_.png", "subfolder": "", "type": "output"}]}}
    status = {"status_str": "success", "completed": True, "messages": [["execution_start", {"timestamp": 1}]]}
    done = {PROMPT: {"outputs": outputs, "status": status, "prompt": [0, PROMPT, {}, {}, []]}}
    failed = {"status_str": "error", "completed": False, "messages": [["execution_error", {"node_id": "2"}]]}
    idle: dict[str, list[Any]] = {"queue_running": [], "queue_pending": []}
    runs = {"queue_running": [[0, PROMPT, {}, {}, []]], "queue_pending": []}
    stats = {"system": {"comfyui_version": "0.3.75"}, "devices": [{"name": "L4"}]}
    picture = samples.png(8, 8)

    def whole(*parts: tuple[str, bytes]) -> bytes:
        return SEPARATOR.join(head.encode() + b"\n" + body for head, body in parts)

    common = [
        (f"GET /system_stats {kind}", as_json(stats)),
        (f"GET /features {kind}", b"{}"),
        (f"POST /prompt {kind}", as_json({"prompt_id": PROMPT, "number": 1, "node_errors": {}})),
        (f"GET /queue {kind}", as_json(runs)),
        (f"GET /queue {kind}", as_json(idle)),
        ("GET /view 200 Content-Type: image/png|ETag: a", picture),
        (f"HEAD /view 200 ETag: a|Content-Length: {len(picture)}", b""),
    ]
    for number, (name, frames) in enumerate(recorded.talks(most=14)):
        if number % 6 == 0:
            said = [("frame", frame) for frame in frames if SEPARATOR not in frame]
            yield name, whole(*common, (f"GET /history {kind}", as_json(done)), *said)
    yield "failed", whole(*common, (f"GET /history {kind}", as_json({PROMPT: {"status": failed}})))
    yield "lost", whole(*common, (f"GET /history {kind}", b"{}"))
    yield (
        "cut",
        whole(*common[:5], ("GET /view 200 Content-Length: 900", picture), (f"GET /history {kind}", as_json(done))),
    )
    yield "refused", whole((f"POST /prompt 400 {kind[4:]}", as_json({"error": {"type": "x"}, "node_errors": {}})))


# --- raw bytes ----------------------------------------------------------------------------------------------


class _Raw(asyncio.Protocol):
    """Says the same bytes to everybody who asks anything, and closes."""

    def __init__(self, said: bytes) -> None:
        self._said, self._heard = said, b""
        self._to: Any = None

    def connection_made(self, transport: Any) -> None:
        self._to = transport

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if self._to is not None and b"\r\n\r\n" in self._heard:
            key = self._heard.lower().partition(b"sec-websocket-key: ")[0]
            start = len(key) + len(b"sec-websocket-key: ")
            found = self._heard[start:].partition(b"\r\n")[0]
            accepted = base64.b64encode(hashlib.sha1(found + _GUID).digest())  # noqa: S324
            self._to.write(self._said.replace(b"ACCEPT", accepted))
            self._to.close()
            self._to = None


_ACCOUNT: Final = CloudSettings(
    base_url=f"http://{HOST[0]}:{HOST[1]}", user_id=USER_ID, tokens=(Secret(TOKEN),), max_retries=1,
    requests_per_second=1_000.0, burst=1_000,
)  # fmt: skip


async def _raw(data: bytes) -> None:
    which, said = data[:1], data[1:]
    server = await asyncio.get_running_loop().create_server(lambda: _Raw(said), *HOST)
    try:
        with only_ours():
            if which < b"a":
                async with RunComfyAPIClient(_ACCOUNT, clock=LoopClock()) as cloud:
                    await cloud.list_machines()
            else:
                address = f"http://{HOST[0]}:{HOST[1]}"
                async with ComfyUIWorkflowClient(address, PATIENT, clock=LoopClock()) as client:
                    if which < b"n":
                        await client.queue()
                    else:
                        await _listen(client)
    finally:
        server.close()
        await asyncio.sleep(1)


async def _listen(client: ComfyUIWorkflowClient) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(2), client.listen(OURS) as events:
            async for event in events:
                demand(event is not None, "nothing was heard")


def raw(data: bytes) -> None:
    """Bytes where HTTP, or a socket, is expected."""
    running.run(_raw(data))


def _raw_seeds() -> Seeds:
    ok = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    yield "provider", b"0" + ok + b"Content-Length: 2\r\n\r\n[]"
    yield "provider-chunked", b"0" + ok + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n\r\n"
    yield "provider-packed", b"0" + ok + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"
    yield "provider-cookie", b"0" + ok + b"Set-Cookie: a=b; Max-Age=-1; Path=x\r\nContent-Length: 2\r\n\r\n[]"
    yield "queue", b"b" + ok + b"Content-Length: 38\r\n\r\n" + b'{"queue_running":[],"queue_pending":[]}'
    yield "queue-cut", b"b" + ok + b"Content-Length: 90\r\n\r\n{"
    yield "redirect", b"b" + b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n"
    yield "early-hints", b"b" + b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + ok + b"\r\n{}"
    switch = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ACCEPT\r\n\r\n"
    text = as_json({"type": "executing", "data": {"prompt_id": PROMPT, "node": "2"}})
    yield "socket", b"z" + switch + framed(text) + framed(b"\0\0\0\1\0\0\0\1jpeg") + b"\x88\x02\x03\xe8"
    yield "socket-in-parts", b"z" + switch + b"\x01\x02{\x22" + b"\x80\x02a\x22" + b"\x89\x00" + b"\x8a\x00"
    yield "socket-large", b"z" + switch + b"\x82\x7f" + (2**40).to_bytes(8, "big") + b"a"
    yield "socket-refused", b"z" + b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"
    yield "nothing", b"z"


TARGETS: Final = (
    Target(
        "session",
        session,
        _session_seeds,
        share=1,
        max_bytes=12_000,
        words=(
            "prompt_id",
            "queue_running",
            "frame\n",
            "GET /history 200 ",
            "GET /queue 200 ",
            "GET /view 206 ",
            "\n%%\n",
        ),
    ),
    Target(
        "raw",
        raw,
        _raw_seeds,
        share=3,
        max_bytes=2_048,
        is_json=False,
        words=(
            "HTTP/1.1 ",
            "Content-Length: ",
            "Transfer-Encoding: chunked",
            "Content-Encoding: ",
            "\r\n\r\n",
            "Upgrade",
        ),
    ),
)
