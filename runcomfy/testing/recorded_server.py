"""Plays the server's side of a recording: what a real ComfyUI answered and sent goes to the client under test.

One recorded prompt is played at a time, with the recorded pauses. Nothing is made up but the queue, which recordings
seldom hold and which follows from what is played: the prompt waits, then runs, then is gone. A recorded crash cuts
the socket and closes the port until the recorded restart.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import WSCloseCode, web

from runcomfy.testing.recordings import Event, Recording

LINGER_SECONDS: Final = 1.0
"""A prompt that sent no end marker counts as ended this long after its last recorded event."""

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_LEFT_OUT: Final = frozenset({"content-length", "content-encoding", "transfer-encoding", "connection", "content-type"})


class RecordedServer:
    """Answers with what was recorded. Use as an async context manager; `url` is where it listens.

    `prompt` is the number of the recorded `POST /prompt` to play; None plays HTTP answers only. `sockets` are the
    labels of the recorded connections that stand for the client's, in order. `queues` are numbers of recorded
    `GET /queue` answers to give one after the other (the last one stays) instead of the derived ones. The recordings
    `also` answer what this one does not hold.
    """

    def __init__(
        self,
        recording: Recording,
        prompt: int | None = None,
        *,
        sockets: Sequence[str] = (),
        queues: Sequence[int] = (),
        also: Sequence[Recording] = (),
    ) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        """Method, path with query, and body of every request, handshakes left out."""
        self._recording = recording
        self._answers = recording.answers()
        self._others = [pair for other in also for pair in other.answers().values()]
        self._sockets = list(sockets)
        self._queues = list(queues)
        self._prompt = prompt
        self._submitted = asyncio.Event()
        self._began = 0.0
        self._connections = 0
        self._stage = "unknown"
        self._open: set[web.WebSocketResponse] = set()
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._crash: asyncio.Task[None] | None = None
        self.crashed = False
        self._base = 0.0
        self.prompt_id = ""
        """The id the recorded server gave to the prompt; empty if it refused it."""
        self.graph: Any = None
        """The recorded workflow."""
        if prompt is not None:
            request, answer = self._answers[prompt]
            self._base = request["t"]
            said = answer.get("json")
            self.prompt_id = (said.get("prompt_id") or "") if isinstance(said, dict) else ""
            self.graph = (request.get("json") or {}).get("prompt")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._crash is not None:
            self._crash.cancel()
            await asyncio.wait({self._crash})
        await self._end()

    async def _listen(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/ws", self._socket)
        app.router.add_route("*", "/{path:.*}", self._http)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _end(self) -> None:
        for socket in list(self._open):
            await socket.close(code=WSCloseCode.GOING_AWAY)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # --- HTTP ---------------------------------------------------------------------------------------------

    async def _http(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.method, request.path_qs, body))
        event = self._choose(request)
        if event is None:
            return self._derived(request)
        if request.method == "POST" and request.path == "/prompt" and event["status"] == 200:
            self._begin()
        return _response(event, head=request.method == "HEAD")

    def _choose(self, request: web.Request) -> Event | None:
        if request.method == "POST" and request.path == "/prompt" and self._prompt is not None:
            return self._answers[self._prompt][1]
        if request.path == "/queue" and request.method == "GET" and self._queues:
            number = self._queues.pop(0) if len(self._queues) > 1 else self._queues[0]
            return self._answers[number][1]
        if request.path.startswith("/history/"):
            return self._history(request.path)
        if request.path == "/queue" and request.method == "GET":
            return None
        return self._recorded(request.method, request.path_qs)

    def _recorded(self, method: str, path: str) -> Event | None:
        """The first recorded answer to the same request; ids count as equal where nothing else fits."""
        known = [*self._answers.values(), *self._others]
        answered = [(asked, told) for asked, told in known if "error" not in told]
        for asked, told in answered:
            if asked["method"] == method and asked["path"] == path:
                return told
        if method == "HEAD":
            return self._recorded("GET", path)
        for asked, told in answered:
            if asked["method"] == method and _UUID.sub("*", asked["path"]) == _UUID.sub("*", path):
                return told
        return None

    def _history(self, path: str) -> Event | None:
        """What was recorded of this history once the prompt has ended; the empty answer before."""
        if self._stage != "ended":
            return None
        told = [told for asked, told in self._answers.values() if asked["path"] == path and "json" in told]
        return next((one for one in reversed(told) if one["json"]), told[-1] if told else None)

    def _derived(self, request: web.Request) -> web.Response:
        if request.path.startswith("/history/"):
            return web.json_response({})
        if request.path == "/queue" and request.method == "GET":
            item: list[Any] = [0, self.prompt_id, {}, {}, []]
            running = [item] if self._stage == "running" else []
            pending = [item] if self._stage == "pending" else []
            return web.json_response({"queue_running": running, "queue_pending": pending})
        if request.path in ("/queue", "/interrupt"):
            return web.Response()
        if request.path == "/prompt" and request.method == "GET":
            return web.json_response({"exec_info": {"queue_remaining": 0}})
        return web.Response(status=404)

    # --- the prompt ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        self._began = loop.time()
        self._stage = "pending"
        self._submitted.set()
        ours = [e for e in self._recording.events if e["t"] >= self._base and _about(e, self.prompt_id)]
        ended = any(_is_end(e, self.prompt_id) for e in ours)
        crash = self._crash_event()
        if crash is not None:
            self._crash = asyncio.create_task(self._crash_and_restart(crash))
        elif not ended:
            # Its messages went to nobody, or to a socket that is not played; HTTP tells when it was over.
            last = max((e["t"] for e in ours), default=self._base)
            loop.call_later(last - self._base + LINGER_SECONDS, setattr, self, "_stage", "ended")

    def _crash_event(self) -> Event | None:
        """The recorded end of our first socket without a close frame, if it came before the prompt's end."""
        for event in self._recording.events:
            if event["t"] < self._base:
                continue
            if _is_end(event, self.prompt_id):
                return None
            if event["dir"] == "ws-close" and event.get("code") == 1006 and event["sock"] in self._sockets[:1]:
                return event
        return None

    async def _crash_and_restart(self, crash: Event) -> None:
        await self._until(crash["t"])
        self.crashed = True
        for socket in list(self._open):
            transport = socket._req.transport if socket._req is not None else None
            if transport is not None:
                transport.abort()
        self._open.clear()
        self._stage = "unknown"
        await self._end()
        reopened = next(
            (e["t"] for e in self._recording.events if e["dir"] == "ws-open" and e["t"] > crash["t"]), crash["t"] + 8
        )
        await self._until(reopened)
        self._stage = "ended"
        await self._listen()

    async def _until(self, moment: float) -> None:
        """Wait for a moment of the recording."""
        delay = moment - self._base - (asyncio.get_running_loop().time() - self._began)
        if delay > 0:
            await asyncio.sleep(delay)

    # --- the socket ---------------------------------------------------------------------------------------

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        label = self._sockets[self._connections] if self._connections < len(self._sockets) else None
        self._connections += 1
        self._open.add(socket)
        player = asyncio.create_task(self._play(socket, label))
        try:
            async for _ in socket:
                pass
        finally:
            player.cancel()
            self._open.discard(socket)
        return socket

    async def _play(self, socket: web.WebSocketResponse, label: str | None) -> None:
        if label is None:
            return
        frames = [e for e in self._recording.events if e.get("sock") == label]
        first = next((e for e in frames if e["dir"] == "ws-text"), None)
        if first is not None:
            await _send(socket, first)
        await self._submitted.wait()
        for event in frames:
            if event is first or event["t"] < self._base:
                continue
            if event["dir"] == "ws-close":
                if event.get("code") != 1006 and self._connections < len(self._sockets):
                    await self._until(event["t"])
                    await socket.close()
                return
            if event["dir"] not in ("ws-text", "ws-binary"):
                continue
            await self._until(event["t"])
            if _about(event, self.prompt_id):
                self._stage = "ended" if _is_end(event, self.prompt_id) else "running"
            await _send(socket, event)
            if self._stage == "ended":
                return


def _about(event: Event, prompt_id: str) -> bool:
    data = (event.get("json") or {}).get("data") if event["dir"] == "ws-text" else None
    return isinstance(data, Mapping) and data.get("prompt_id") == prompt_id


def _is_end(event: Event, prompt_id: str) -> bool:
    if not _about(event, prompt_id):
        return False
    message = event["json"]
    return message["type"] == "executing" and message["data"].get("node") is None


async def _send(socket: web.WebSocketResponse, event: Event) -> None:
    if event["dir"] == "ws-text":
        await socket.send_str(json.dumps(event["json"]))
    else:
        await socket.send_bytes(base64.b64decode(event["base64"]))


def _response(event: Event, *, head: bool) -> web.Response:
    headers = {name: value for name, value in event.get("headers", {}).items() if name.lower() not in _LEFT_OUT}
    kind = next((value for name, value in event.get("headers", {}).items() if name.lower() == "content-type"), None)
    if kind is not None:
        headers["Content-Type"] = kind
    if head:
        # Only the length matters; a body is not sent.
        length = int(event.get("headers", {}).get("Content-Length", 0))
        return web.Response(status=event["status"], headers=headers, body=bytes(length))
    if "json" in event:
        body = json.dumps(event["json"]).encode()
    elif "base64" in event:
        body = base64.b64decode(event["base64"])
    else:
        body = str(event.get("text", "")).encode()
    return web.Response(status=event["status"], reason=event.get("reason"), headers=headers, body=body)
