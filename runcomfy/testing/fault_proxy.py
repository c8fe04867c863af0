"""
A TCP proxy that spoils connections: the toxics of Toxiproxy, and half-close.

One proxy stands before one upstream. Toxics are switched on and off while connections are open, several at once, each
for one direction (`up`: from the client to the upstream; `down`: back) or for both. A toxic holds for all connections
from the moment it is added; what it counts (bytes, seconds) it counts from then, for each connection alone. Data that a
toxic holds back arrive later or never, and never with a hole in them: TCP has none.

All waiting is done on the event loop's clock.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self, TypeVar, cast

CHUNK_BYTES: Final = 65_536
HELD_BYTES: Final = 1 << 20
"""What a slow direction keeps before it stops reading, as the buffers of a network path do."""
CONNECT_SECONDS: Final = 10.0
SMOOTH_SECONDS: Final = 0.1
"""What goes through in one piece where bandwidth is short."""


class Direction(StrEnum):
    """Which way bytes go."""

    UP = "up"
    DOWN = "down"


BOTH: Final = frozenset(Direction)


@dataclass(frozen=True, kw_only=True, eq=False)
class Toxic:
    """One thing that is wrong with a direction, or with both. Bytes and seconds are counted per connection."""

    toxicity: float = 1.0
    """The share of connections that it is for."""

    @property
    def name(self) -> str:
        """Its kind, as counted: `latency`."""
        return _NAMES[type(self)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Latency(Toxic):
    """Everything arrives later by so much, give or take the jitter; the order stays."""

    seconds: float
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Bandwidth(Toxic):
    """No more than so many bytes a second."""

    bytes_per_second: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SlowClose(Toxic):
    """The end of a direction is told so much later."""

    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Timeout(Toxic):
    """Nothing passes; after so long the connection is closed. 0: it stays open, half-open, until the toxic is removed.

    Toxiproxy throws away what comes meanwhile. Here it is kept and sent on after the removal, as TCP would.
    """

    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ResetPeer(Toxic):
    """The connection is reset (RST), to both sides, after so long."""

    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Slicer(Toxic):
    """Data arrive in small pieces of about this size, with a pause after each."""

    average_bytes: int
    variation_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LimitData(Toxic):
    """After so many bytes the connection is closed."""

    size_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class HalfClose(Toxic):
    """After so many bytes this direction says that it has ended; the other one goes on."""

    size_bytes: int = 0


T = TypeVar("T", bound=Toxic)
_NAMES: Final[dict[type[Toxic], str]] = {
    Latency: "latency",
    Bandwidth: "bandwidth",
    SlowClose: "slow_close",
    Timeout: "timeout",
    ResetPeer: "reset_peer",
    Slicer: "slicer",
    LimitData: "limit_data",
    HalfClose: "half_close",
}
KINDS: Final[dict[str, type[Toxic]]] = {name: kind for kind, name in _NAMES.items()}
"""The toxics by name."""


def toxic(name: str, **values: float) -> Toxic:
    """Make a toxic by its name: `toxic("latency", seconds=0.2)`. Raises KeyError for a name that is none."""
    return KINDS[name](**values)


@dataclass(eq=False)
class Switched:
    """A toxic that is on."""

    toxic: Toxic
    directions: frozenset[Direction]
    since: float
    met: int = 0
    """How many connections it did something to."""


class FaultProxy:
    """`async with FaultProxy(host, port) as proxy:` listens at `proxy.host`, `proxy.port`."""

    def __init__(
        self, upstream_host: str, upstream_port: int, *, host: str = "127.0.0.1", port: int = 0, seed: int = 0
    ) -> None:
        """Nothing listens before `start`. Port 0 is any that is free. `seed` decides jitter, slices and toxicity."""
        self.upstream = (upstream_host, upstream_port)
        """Where new connections lead; may be changed at any time."""
        self.host, self.port = host, port
        self.met: Counter[str] = Counter()
        """By name: how many connections a toxic did something to."""
        self.accepted = 0
        """How many connections there were."""
        self.passed_bytes: Counter[Direction] = Counter()
        self.switched: list[Switched] = []
        self.draw = random.Random(seed)
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Listen, and return `host:port`. Harmless when repeated. Raises OSError if the port is taken."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, self.host, self.port, limit=CHUNK_BYTES)
            self.port = int(self._server.sockets[0].getsockname()[1])
        return f"{self.host}:{self.port}"

    async def refuse(self) -> None:
        """Listen no longer: new connections are refused, open ones go on. `start` listens again at the same port."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def stop(self) -> None:
        """Listen no longer and end every connection. Harmless when repeated."""
        await self.refuse()
        for link in list(self._links):
            link.cut()
        while self._links:
            await asyncio.wait([link.task for link in self._links])

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    # -- toxics ----------------------------------------------------------------------------------------------------

    def add(self, toxic: Toxic, *directions: Direction) -> Switched:
        """Switch a toxic on, for these directions or for both. Give what is returned to `remove`."""
        switched = Switched(toxic, frozenset(directions) or BOTH, asyncio.get_running_loop().time())
        self.switched.append(switched)
        self._wake()
        return switched

    def remove(self, switched: Switched) -> None:
        """Switch a toxic off. Harmless when repeated."""
        if switched in self.switched:
            self.switched.remove(switched)
            self._wake()

    def clear(self) -> None:
        """Switch all of them off."""
        self.switched.clear()
        self._wake()

    @contextmanager
    def spoiled(self, toxic: Toxic, *directions: Direction) -> Iterator[Switched]:
        """Have a toxic on for the block."""
        switched = self.add(toxic, *directions)
        try:
            yield switched
        finally:
            self.remove(switched)

    def reset_all(self) -> int:
        """Reset every open connection now; return how many."""
        count = len(self._links)
        for link in list(self._links):
            link.cut(hard=True)
        return count

    # -- within ----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until_changed(self, timeout: float | None) -> None:
        """Wait until a toxic is switched, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._changed.wait()

    def note(self, switched: Switched) -> None:
        """Count a connection that a toxic did something to."""
        switched.met += 1
        self.met[switched.toxic.name] += 1

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self, reader, writer)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)


@dataclass(eq=False)
class _Way:
    """One direction of a connection."""

    direction: Direction
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    """What was read and when; empty bytes are the end."""
    held: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    counted: dict[Switched, int] = field(default_factory=dict)
    """Bytes that went by since a toxic was switched on."""


class _Link:
    """One connection."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy, self._reader, self._writer = proxy, reader, writer
        self._upstream: asyncio.StreamWriter | None = None
        self._opened = asyncio.get_running_loop().time()
        self._spared: dict[Switched, bool] = {}
        self._noted: set[Switched] = set()
        self.task = cast("asyncio.Task[None]", asyncio.current_task())
        """The server runs each connection in a task of its own."""
        self._work: list[asyncio.Task[None]] = []
        self._cut = asyncio.Event()
        self._hard = False

    def cut(self, *, hard: bool = False) -> None:
        """End the connection to both sides; hard: with a reset."""
        self._hard = self._hard or hard
        self._cut.set()

    async def run(self) -> None:
        """Pass on what comes until both directions have ended, or the connection is cut."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, self._upstream = await asyncio.open_connection(*self._proxy.upstream, limit=CHUNK_BYTES)
        except (OSError, TimeoutError):
            self._end(hard=True)  # as if nobody listened
            return
        up = _Way(Direction.UP, self._reader, self._upstream)
        down = _Way(Direction.DOWN, reader, self._writer)
        start = asyncio.create_task
        ways = [start(self._pass_on(way), name=f"proxy {way.direction}") for way in (up, down)]
        self._work = [*ways, *(start(self._read(way)) for way in (up, down)), start(self._watch())]
        ended, cut = start(_all_ended(ways)), start(self._cut.wait())
        self._work += [ended]
        try:
            await asyncio.wait((ended, cut), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*self._work, cut):
                task.cancel()
            await asyncio.wait((*self._work, cut))
            for task in self._work:
                if not task.cancelled():
                    task.exception()
            self._end(hard=self._hard)

    def _end(self, *, hard: bool) -> None:
        for writer in (self._writer, self._upstream):
            if writer is None:
                continue
            if not hard:
                writer.close()
                continue
            sock: socket.socket | None = writer.get_extra_info("socket")
            if sock is not None:
                linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

    # -- toxics ----------------------------------------------------------------------------------------------------

    def _on(self, kind: type[T], direction: Direction | None = None) -> Iterator[tuple[Switched, T]]:
        for switched in self._proxy.switched:
            spoils = switched.toxic
            if isinstance(spoils, kind) and (direction is None or direction in switched.directions):
                if switched not in self._spared:
                    self._spared[switched] = self._proxy.draw.random() >= spoils.toxicity
                if not self._spared[switched]:
                    yield switched, spoils

    def _note(self, switched: Switched) -> None:
        if switched not in self._noted:
            self._noted.add(switched)
            self._proxy.note(switched)

    async def _watch(self) -> None:
        """Cut the connection when a toxic that goes by time alone says so."""
        loop = asyncio.get_running_loop()
        while True:
            nearest: float | None = None
            by_time: list[tuple[Switched, ResetPeer | Timeout]] = [*self._on(ResetPeer), *self._on(Timeout)]
            for switched, spoils in by_time:
                resets = isinstance(spoils, ResetPeer)
                if not resets and not spoils.seconds:
                    continue
                due = max(switched.since, self._opened) + spoils.seconds
                if due <= loop.time():
                    self._note(switched)
                    self.cut(hard=resets)
                    return
                nearest = due if nearest is None else min(nearest, due)
            await self._proxy.until_changed(None if nearest is None else nearest - loop.time())

    # -- one direction ---------------------------------------------------------------------------------------------

    async def _read(self, way: _Way) -> None:
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            while way.held >= HELD_BYTES:
                way.room.clear()
                await way.room.wait()
            try:
                data = await way.reader.read(CHUNK_BYTES)
            except OSError:
                self.cut(hard=True)  # one side was reset: so is the other
                return
            way.held += len(data)
            way.waiting.append((loop.time(), data))
            way.more.set()

    async def _pass_on(self, way: _Way) -> None:
        while True:
            while not way.waiting:
                way.more.clear()
                await way.more.wait()
            came_at, data = way.waiting.popleft()
            way.held -= len(data)
            way.room.set()
            await self._delay(way, came_at)
            await self._while_held_up(way)
            try:
                if not data:
                    await self._close(way)
                    return
                if not await self._send(way, data):
                    return
            except OSError:
                self.cut(hard=True)
                return

    async def _delay(self, way: _Way, came_at: float) -> None:
        loop = asyncio.get_running_loop()
        late = 0.0
        for switched, spoils in self._on(Latency, way.direction):
            self._note(switched)
            late += max(0.0, spoils.seconds + self._proxy.draw.uniform(-spoils.jitter, spoils.jitter))
        if late and came_at + late > loop.time():
            await asyncio.sleep(came_at + late - loop.time())

    async def _while_held_up(self, way: _Way) -> None:
        while found := list(self._on(Timeout, way.direction)):
            for switched, _ in found:
                self._note(switched)
            await self._proxy.until_changed(None)  # `_watch` cuts it when its time has come

    async def _close(self, way: _Way) -> None:
        slow = 0.0
        for switched, spoils in self._on(SlowClose, way.direction):
            self._note(switched)
            slow += spoils.seconds
        if slow:
            await asyncio.sleep(slow)
        self._say_end(way)

    @staticmethod
    def _say_end(way: _Way) -> None:
        if way.writer.can_write_eof():
            with suppress(OSError):
                way.writer.write_eof()

    async def _send(self, way: _Way, data: bytes) -> bool:
        """Send a chunk as the toxics let it; return whether the direction goes on."""
        allowed, ends = self._allowed(way, len(data))
        for piece in self._pieces(way, data[:allowed]):
            await self._while_held_up(way)
            await self._pace(way, len(piece))
            way.writer.write(piece)
            self._proxy.passed_bytes[way.direction] += len(piece)
            await way.writer.drain()
        if ends is None:
            return True
        self._note(ends)
        if isinstance(ends.toxic, LimitData):
            self.cut()
        else:
            self._say_end(way)
        return False

    def _allowed(self, way: _Way, size: int) -> tuple[int, Switched | None]:
        """Return how much of so many bytes may pass, and what ends the direction after it."""
        ends: Switched | None = None
        allowed = size
        limits: list[tuple[Switched, LimitData | HalfClose]] = []
        limits += [*self._on(LimitData, way.direction), *self._on(HalfClose, way.direction)]
        for switched, spoils in limits:
            left = spoils.size_bytes - way.counted.get(switched, 0)
            if left <= allowed:
                allowed, ends = max(0, left), switched
        for switched, _ in limits:
            way.counted[switched] = way.counted.get(switched, 0) + allowed
        return allowed, ends

    def _pieces(self, way: _Way, data: bytes) -> Iterator[bytes]:
        """Cut a chunk up where something slices it, or is so slow that it would arrive in jerks."""
        slow = (spoils.bytes_per_second for _, spoils in self._on(Bandwidth, way.direction))
        narrow = min((max(1, int(rate * SMOOTH_SECONDS)) for rate in slow), default=CHUNK_BYTES)
        slicer = next(self._on(Slicer, way.direction), None)
        if slicer is not None:
            self._note(slicer[0])
        at = 0
        while at < len(data):
            size = narrow
            if slicer is not None:
                _, spoils = slicer
                spread = self._proxy.draw.randint(-spoils.variation_bytes, spoils.variation_bytes)
                size = min(narrow, max(1, spoils.average_bytes + spread))
            yield data[at : at + size]
            at += size

    async def _pace(self, way: _Way, size: int) -> None:
        seconds = 0.0
        for switched, slow in self._on(Bandwidth, way.direction):
            self._note(switched)
            seconds = max(seconds, size / slow.bytes_per_second)
        sliced = next(self._on(Slicer, way.direction), None)
        if sliced is not None:
            seconds += sliced[1].seconds
        if seconds:
            await asyncio.sleep(seconds)


async def _all_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)
