"""Client sockets: registration with its traps, one publishing loop for everybody, and frames that misbehave on request.

All messages go through one queue and one loop that waits for each send. A reader that does not read therefore stops
everyone, as on the real server.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMessage, WSMsgType, web

from runcomfy.testing.emulators.comfyui.faults import SocketFault


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame on its way: `raw` goes out untouched, with `text` as its opcode if it is bytes."""

    sid: Any
    event: str = ""
    data: Any = None
    raw: str | bytes | None = None
    text: bool = False


@dataclass(eq=False, slots=True)
class ClientSocket:
    """One open socket."""

    sid: str
    ws: web.WebSocketResponse
    request: web.Request
    fault: SocketFault
    sent: int = 0
    held: Frame | None = None
    features: dict[str, Any] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
        """Whether the server has given up on it without saying so."""
        return self.fault.silent_after is not None and self.sent >= self.fault.silent_after

    def abort(self) -> None:
        """End the connection without a close frame (1006 at the other side)."""
        if self.request.transport is not None:
            self.request.transport.abort()


class SocketHub:
    """The sockets of one server process."""

    def __init__(
        self,
        *,
        greeting: Callable[[], dict[str, Any]],
        current_node: Callable[[str], str | None],
        features: Callable[[], dict[str, Any]] | None,
        awake: Callable[[], Awaitable[object]],
        over: asyncio.Event,
        latency: float = 0.0,
    ) -> None:
        self.sockets: dict[str, ClientSocket] = {}
        """By client id: the socket that gets its messages, which is not every socket that is open."""
        self.open: set[ClientSocket] = set()
        self._greeting = greeting
        self._current_node = current_node
        self._features = features
        self._awake = awake
        self._over = over
        self._latency = latency
        self._frames: asyncio.Queue[tuple[float, Frame]] = asyncio.Queue()
        """Frames, and when (loop) they arrive."""

    def send(self, event: str, data: Any, sid: Any) -> None:
        """Queue a message for a client id, or for everybody if it is None."""
        if self.sockets or not isinstance(sid, str | None):
            self.inject(Frame(sid, event, data))

    def send_bytes(self, data: bytes, sid: Any) -> None:
        """Queue a binary frame."""
        if self.sockets:
            self.inject(Frame(sid, raw=data))

    def inject(self, frame: Frame) -> None:
        """Queue a frame, also one the server itself would never send."""
        self._frames.put_nowait((asyncio.get_running_loop().time() + self._latency, frame))

    def declared(self, sid: Any, feature: str) -> bool:
        """Whether the client said that it supports something."""
        return isinstance(sid, str) and sid in self.sockets and bool(self.sockets[sid].features.get(feature))

    async def publish(self) -> None:
        """Send what is queued, for ever. Raises TypeError for a client id that cannot be a key."""
        while True:
            arrives, frame = await self._frames.get()
            if self._latency:
                await asyncio.sleep(max(0.0, arrives - asyncio.get_running_loop().time()))
            await self._awake()
            if frame.sid is None:
                for socket in list(self.sockets.values()):
                    await self._deliver(socket, frame)
            elif frame.sid in self.sockets:
                await self._deliver(self.sockets[frame.sid], frame)

    async def _deliver(self, socket: ClientSocket, frame: Frame) -> None:
        for one in socket.fault.frames(socket, frame):
            if socket.silent:
                continue
            if socket.fault.abort_after is not None and socket.sent >= socket.fault.abort_after:
                socket.abort()
                return
            socket.sent += 1
            await self._write(socket, one)

    @staticmethod
    async def _write(socket: ClientSocket, frame: Frame) -> None:
        try:
            if frame.raw is None:
                await socket.ws.send_str(json.dumps({"type": frame.event, "data": frame.data}))
            elif isinstance(frame.raw, str):
                await socket.ws.send_str(frame.raw)
            elif frame.text:
                await socket.ws.send_frame(frame.raw, WSMsgType.TEXT)
            else:
                await socket.ws.send_bytes(frame.raw)
        except ConnectionError:
            pass

    async def serve(self, request: web.Request, fault: SocketFault) -> web.StreamResponse:
        """Handle `/ws` until the client leaves."""
        if fault.refuse is not None:
            return web.Response(status=fault.refuse)
        # Pings and closes are answered by hand: a server that hangs must not answer them.
        ws = web.WebSocketResponse(autoping=False, autoclose=False)
        await ws.prepare(request)
        sid = request.query.get("clientId", "")
        if sid:
            self.sockets.pop(sid, None)
        else:
            sid = uuid.uuid4().hex
        socket = ClientSocket(sid, ws, request, fault)
        self.sockets[sid] = socket
        self.open.add(socket)
        try:
            await self._deliver(socket, Frame(sid, "status", {"status": self._greeting(), "sid": sid}))
            if (node := self._current_node(sid)) is not None:
                await self._deliver(socket, Frame(sid, "executing", {"node": node}))
            await self._listen(socket)
        finally:
            self.open.discard(socket)
            # By id, not by socket: a second socket under the same id goes deaf when the first one ends.
            self.sockets.pop(sid, None)
        return ws

    async def _listen(self, socket: ClientSocket) -> None:
        first = True
        while True:
            message = await socket.ws.receive()
            await self._awake()
            if message.type in (WSMsgType.CLOSED, WSMsgType.ERROR):
                return
            if socket.silent:
                if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING):
                    await self._over.wait()
                    return
                continue
            if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING):
                await socket.ws.close()
                return
            if message.type is WSMsgType.PING:
                await socket.ws.pong(message.data)
            elif message.type is WSMsgType.TEXT:
                first = await self._hear(socket, message, first)

    async def _hear(self, socket: ClientSocket, message: WSMessage, first: bool) -> bool:
        try:
            said = json.loads(message.data)
        except ValueError:
            return first
        if not isinstance(said, dict):
            return first
        if first and said.get("type") == "feature_flags" and self._features is not None:
            flags = said.get("data", {})
            socket.features = dict(flags) if isinstance(flags, dict) else {}
            await self._deliver(socket, Frame(socket.sid, "feature_flags", self._features()))
        return False
