"""
The one socket a client keeps to its server, shared by everyone who listens.

It is opened before the first prompt is submitted, kept between jobs, read all the time (a socket that is not read
stalls the messages of every client of that server) and re-made when it breaks. The server sends a prompt's messages
to the last socket opened under the prompt's client id and forgets the id when an older one closes; so the old
connection is closed whole before a new one is opened, and when it could not be (the line went dead) and nobody waits
for messages under the id, a fresh id is taken.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException

from runcomfy.adapters.comfyui.exchange import Address
from runcomfy.adapters.comfyui.wire import Frame, read_frame
from runcomfy.domain.progress import NodeText, Preview, Said, ServerEvent, SocketDown, SocketUp
from runcomfy.domain.settings import ComfySettings

OPEN_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 5.0
FIRST_DELAY_SECONDS: Final = 0.1
DELAY_CAP_SECONDS: Final = 10.0
RENEW_GAP_SECONDS: Final = 30.0
"""The least time between two connections that were opened only because the older one seemed forgotten."""
QUEUE_EVENTS: Final = 512
"""Events kept for one listener that does not read; progress is thinned out first."""
EARLY_PROMPTS: Final = 64
EARLY_EVENTS: Final = 64
EARLY_BYTES: Final = 4 << 20
"""Of all of them together."""
EARLY_SECONDS: Final = 10.0
"""For how long messages about a prompt nobody listens to yet are kept."""

_log = logging.getLogger(__name__)


class _Connect(connect):
    """A connection attempt that follows no redirect: another host must not get to drive us."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Subscription:
    """What the socket says about one prompt, in order. Cancelling a wait loses nothing."""

    def __init__(self) -> None:
        self.prompt_ids: list[str] = []
        """The ids it is registered under."""
        self.dropped = 0
        self._events: deque[ServerEvent] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> ServerEvent:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def put(self, event: ServerEvent) -> None:
        """Add an event. Of pictures and texts that wait only the newest is kept."""
        events = self._events
        if events and isinstance(event, Preview | NodeText) and type(events[-1]) is type(event):
            events[-1] = event
        else:
            events.append(event)
            if len(events) > QUEUE_EVENTS:
                self._thin()
        self._notify()

    def close(self) -> None:
        """End the iteration."""
        self._closed = True
        self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _thin(self) -> None:
        """Make room: pictures, texts and all progress but the newest go first, for what they said is outdated."""
        kept: deque[ServerEvent] = deque()
        newest: set[str] = set()
        for event in reversed(self._events):
            if isinstance(event, Preview | NodeText):
                continue
            if isinstance(event, Said) and event.type in ("progress", "progress_state"):
                if event.type in newest:
                    continue
                newest.add(event.type)
            kept.appendleft(event)
        while len(kept) > QUEUE_EVENTS:
            kept.popleft()
            self.dropped += 1
        self._events = kept


@dataclass(slots=True)
class _Early:
    """Messages about a prompt that nobody listens to yet."""

    since: float
    size_bytes: int = 0
    events: deque[ServerEvent] = field(default_factory=lambda: deque(maxlen=EARLY_EVENTS))


class Socket:
    """Keeps one connection open while it is wanted, and hands its frames to those who listen."""

    def __init__(self, address: Address, settings: ComfySettings) -> None:
        self._address = address
        self._settings = settings
        self.client_id = uuid.uuid4().hex
        self.losses = 0
        """How often an open connection was lost: what is known about the server may be outdated since."""
        self.dropped = 0
        """Frames that made no sense."""
        self.is_open = False
        self._connection: ClientConnection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._attempted = asyncio.Event()
        """Set when the current attempt to connect has ended, well or not."""
        self._wanted = asyncio.Event()
        self._renewal = ""
        self._renewed_at = float("-inf")
        self._closing: asyncio.Task[None] | None = None
        self._reason = "not connected yet"
        self._listeners: dict[str, list[Subscription]] = {}
        self._early: OrderedDict[str, _Early] = OrderedDict()
        self._named: tuple[str, str | None] | None = None
        """Prompt and node named last: an old-style preview and a node's text belong to them."""

    # --- listening ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def listen(self, prompt_id: str) -> AsyncIterator[Subscription]:
        """Subscribe to a prompt; the socket has been tried before the block is entered."""
        await self.ensure_open()
        subscription = Subscription()
        subscription.put(SocketUp() if self.is_open else SocketDown(self._reason))
        self._register(prompt_id, subscription)
        try:
            yield subscription
        finally:
            subscription.close()
            self.dropped += subscription.dropped
            for known in subscription.prompt_ids:
                self._listeners[known].remove(subscription)
                if not self._listeners[known]:
                    del self._listeners[known]

    def also(self, prompt_id: str, other: str) -> None:
        """Deliver messages about `other` to those who listen to `prompt_id`: the server chose another id."""
        for subscription in list(self._listeners.get(prompt_id, ())):
            self._register(other, subscription)

    def listens_to(self, prompt_id: str) -> bool:
        """Whether anybody waits for messages about this prompt."""
        return prompt_id in self._listeners

    def _register(self, prompt_id: str, subscription: Subscription) -> None:
        self._listeners.setdefault(prompt_id, []).append(subscription)
        subscription.prompt_ids.append(prompt_id)
        early = self._early.pop(prompt_id, None)
        for event in early.events if early is not None else ():
            subscription.put(event)

    def _tell_all(self, event: ServerEvent) -> None:
        for listeners in self._listeners.values():
            for subscription in listeners:
                subscription.put(event)

    # --- keeping it open ----------------------------------------------------------------------------------

    async def ensure_open(self) -> None:
        """Return when the socket is open, or when an attempt to open it has just failed."""
        if self.is_open:
            return
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name="comfyui socket")
        self._wanted.set()
        await self._attempted.wait()

    def renew(self, reason: str) -> None:
        """Close and open the connection again, since the server seems to have forgotten it; not too often."""
        now = asyncio.get_running_loop().time()
        connection = self._connection
        if connection is None or not self.is_open or now - self._renewed_at < RENEW_GAP_SECONDS:
            return
        self._renewed_at = now
        self._renewal = reason
        _log.info("socket_renewed", extra={"server": self._address.masked, "reason": reason})
        self._closing = asyncio.create_task(connection.close(), name="close comfyui socket")

    async def close(self) -> None:
        """Close the connection and stop keeping it."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})
        self._attempted.set()

    async def _keep(self) -> None:
        failures = 0
        try:
            while True:
                try:
                    opened = await self._connect_and_read()
                finally:
                    self._attempted.set()
                failures = 0 if opened else failures + 1
                if not self._listeners:
                    # Nobody waits; the next listener opens it again.
                    self._wanted.clear()
                    self._attempted.clear()
                    await self._wanted.wait()
                elif failures:
                    # Whoever comes now is told that the socket is down instead of waiting for the next attempt.
                    await asyncio.sleep(_delay(failures))
                    self._attempted.clear()
                else:
                    self._attempted.clear()
                    await asyncio.sleep(0 if self._renewal else _delay(0))
                self._renewal = ""
        finally:
            self.is_open = False
            self._attempted.set()

    async def _connect_and_read(self) -> bool:
        """Open the connection and read it until it ends; False if it could not be opened."""
        try:
            connection = await self._open()
        except (WebSocketException, OSError, TimeoutError, EOFError, ValueError) as error:
            self._down(_refusal(error), lost=False)
            return False
        self._connection = connection
        try:
            await connection.send(_FEATURES)
            self.is_open, self._reason, self._named = True, "", None
            _log.debug("socket_open", extra={"server": self._address.masked})
            self._tell_all(SocketUp())
            self._attempted.set()
            await self._read(connection)
        except ConnectionClosed as closed:
            self._ended(connection, closed)
        finally:
            self._connection, self.is_open = None, False
            with suppress(Exception):
                await connection.close()
        return True

    async def _open(self) -> ClientConnection:
        ping = self._settings.ping_interval.total_seconds() or None
        headers = {"Authorization": self._address.authorization} if self._address.authorization else None
        return await _Connect(
            self._address.socket(self.client_id),
            compression=None,
            additional_headers=headers,
            user_agent_header=None,
            proxy=None,
            open_timeout=min(OPEN_SECONDS, self._settings.request_timeout.total_seconds()),
            close_timeout=CLOSE_SECONDS,
            ping_interval=ping,
            ping_timeout=ping,
            max_size=self._settings.max_frame_bytes,
        )

    def _ended(self, connection: ClientConnection, closed: ConnectionClosed) -> None:
        renewal = self._renewal
        if closed.rcvd is None and not self._listeners:
            # The server may still hold the old connection and forget the id when it notices; no one needs that id.
            self.client_id = uuid.uuid4().hex
        code = closed.rcvd.code if closed.rcvd is not None else (closed.sent.code if closed.sent is not None else 1006)
        self._down(renewal or f"the connection ended ({code})", lost=not renewal)

    def _down(self, reason: str, *, lost: bool) -> None:
        was_open, self.is_open, self._reason = self.is_open, False, reason
        if lost:
            self.losses += 1
        _log.info("socket_down", extra={"server": self._address.masked, "reason": reason, "lost": lost})
        if was_open or lost or self._listeners:
            self._tell_all(SocketDown(reason, lost=lost))

    # --- reading ------------------------------------------------------------------------------------------

    async def _read(self, connection: ClientConnection) -> None:
        while True:
            raw = await connection.recv(decode=False)
            frame = read_frame(raw)
            if frame is None:
                self.dropped += 1
            else:
                self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        event, prompt_id = frame.event, frame.prompt_id
        if isinstance(event, Said):
            if prompt_id is None:
                # Sent when a socket opens while a prompt of this client runs; which one, the fold must know.
                if event.type == "executing":
                    self._tell_all(event)
                return
            if event.type in ("executing", "progress"):
                node = event.data.get("node")
                self._named = (prompt_id, node) if isinstance(node, str) else None
        elif prompt_id is None:
            if self._named is None:
                return
            prompt_id, node = self._named
            if isinstance(event, Preview):
                event = Preview(event.image, event.mime, node)
        listeners = self._listeners.get(prompt_id)
        if listeners is None:
            if isinstance(event, Said):
                self._keep_early(prompt_id, event, frame.size_bytes)
            return
        for subscription in listeners:
            subscription.put(event)

    def _keep_early(self, prompt_id: str, event: ServerEvent, size_bytes: int) -> None:
        now = asyncio.get_running_loop().time()
        early = self._early.get(prompt_id)
        if early is None:
            while self._early:
                oldest = next(iter(self._early))
                if len(self._early) < EARLY_PROMPTS and now - self._early[oldest].since < EARLY_SECONDS:
                    break
                del self._early[oldest]
            early = self._early[prompt_id] = _Early(now)
        early.events.append(event)
        early.size_bytes += size_bytes
        while self._early and sum(one.size_bytes for one in self._early.values()) > EARLY_BYTES:
            self._early.popitem(last=False)


_FEATURES: Final = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})


def _delay(failures: int) -> float:
    """Seconds until the next attempt: doubled for each failure in a row, with jitter so that clients spread."""
    longest = min(FIRST_DELAY_SECONDS * 2 ** min(failures, 16), DELAY_CAP_SECONDS)
    return random.uniform(longest / 2, longest)  # noqa: S311 - spreads clients, keeps no secret


def _refusal(error: Exception) -> str:
    """Why a connection could not be opened, without the address that the libraries' texts hold."""
    if isinstance(error, InvalidStatus):
        return f"the handshake was refused ({error.response.status_code})"
    if isinstance(error, InvalidHandshake | EOFError):
        return "the handshake failed"
    if isinstance(error, TimeoutError):
        return "no answer to the handshake"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    return f"it could not be opened ({type(error).__name__})"
