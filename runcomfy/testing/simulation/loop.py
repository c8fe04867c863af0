"""
An event loop without selector, sockets or threads: time is virtual, TCP goes through memory, executors work inline.

Clients and servers of aiohttp and websockets work over it unchanged; a request costs 0.1 ms. When nothing is left to be
done at a moment, the next timer's moment comes. What would wait for the outside (a pipe, a signal, a child process) is
not there. Tasks and futures are told apart by their number, so that sets of them have the same order in every run.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
from asyncio import base_events, events, transports
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, Final

FIRST_PORT: Final = 20_000
Address = tuple[str, int]


class NothingWillHappen(RuntimeError):
    """Everything waits and no timer is set: in life it would hang for ever."""


def _numbered(self: Any) -> int:
    try:
        number: int = self.number
    except AttributeError:
        number = self.number = self.get_loop().next_number()
    return number


class _Task(asyncio.Task[Any]):
    """A task that hashes to its number, which it is given when it is first asked for it."""

    __slots__ = ("number",)
    __hash__ = _numbered


class _Future(asyncio.Future[Any]):
    """A future that hashes to its number, which it is given when it is first asked for it."""

    __slots__ = ("number",)
    __hash__ = _numbered


class _Handle(asyncio.Handle):
    """What is to be called, without what only debugging needs."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, loop: asyncio.AbstractEventLoop, context: Any) -> None:
        self._context = copy_context() if context is None else context
        self._loop, self._callback, self._args = loop, callback, args
        self._cancelled, self._repr, self._source_traceback = False, None, None


class _TimerHandle(asyncio.TimerHandle):
    """What is to be called at a time, without what only debugging needs."""

    __slots__ = ()

    def __init__(self, when: float, callback: Any, args: Any, loop: asyncio.AbstractEventLoop, context: Any) -> None:
        self._context = copy_context() if context is None else context
        self._loop, self._callback, self._args = loop, callback, args
        self._cancelled, self._repr, self._source_traceback = False, None, None
        self._when, self._scheduled = when, True


class MemoryTransport(transports.Transport):
    """One end of a connection; what is written arrives at the other end in the next turn of the loop."""

    def __init__(self, loop: MemoryLoop, protocol: Any, own: Address, peer: Address) -> None:
        super().__init__({"sockname": own, "peername": peer})
        self.other: MemoryTransport | None = None
        self._loop, self._protocol = loop, protocol
        self._closing = self._ended = self._lost = self._paused = self._scheduled = False
        self._pending: deque[bytes | None] = deque()
        """What arrived and is not delivered yet; None: the end."""
        self.number = loop.next_number()

    def __hash__(self) -> int:
        return self.number

    def get_protocol(self) -> Any:
        """Return who is told of what arrives."""
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        """Tell somebody else from now on."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Return whether it is closed, or about to be."""
        return self._closing

    def is_reading(self) -> bool:
        """Return whether what arrives is delivered."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """Keep what arrives."""
        self._paused = True

    def resume_reading(self) -> None:
        """Deliver what was kept."""
        self._paused = False
        self._wake()

    def get_write_buffer_size(self) -> int:
        """Return 0: what is written is gone."""
        return 0

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return limits that are never reached."""
        return 0, 65_536

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: there is no buffer."""

    def can_write_eof(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> None:
        """Send bytes; into a connection that is no more they vanish."""
        if not data or self._closing or self._ended:
            return
        other = self.other
        if other is not None and not other._lost:
            other._pending.append(bytes(data))
            other._wake()

    def writelines(self, list_of_data: Any) -> None:
        """Send bytes."""
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        """Say that nothing more will come."""
        if not self._ended:
            self._ended = True
            if self.other is not None and not self.other._lost:
                self.other._pending.append(None)
                self.other._wake()

    def close(self) -> None:
        """Close; the other end hears of it after everything that was sent."""
        if not self._closing:
            self.write_eof()
            self._closing = True
            self._loop.call_soon(self._gone, None)

    def abort(self) -> None:
        """Close hard: the other end gets a reset."""
        if self._lost:
            return
        self._closing = True
        self._loop.call_soon(self._gone, None)
        if self.other is not None:
            self._loop.call_soon(self.other._reset)

    def _wake(self) -> None:
        if not (self._scheduled or self._paused or self._lost):
            self._scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        pending = self._pending
        while pending and not self._paused and not self._lost:
            data = pending.popleft()
            if data is None:
                if not self._protocol.eof_received():
                    self.close()
            elif isinstance(self._protocol, asyncio.BufferedProtocol):
                _into_buffer(self._protocol, data)
            else:
                self._protocol.data_received(data)

    def _reset(self) -> None:
        if not self._lost:
            self._closing = True
            self._gone(ConnectionResetError("the connection was reset"))

    def _gone(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._pending.clear()
            self._protocol.connection_lost(error)


def _into_buffer(protocol: asyncio.BufferedProtocol, data: bytes) -> None:
    while data:
        room = memoryview(protocol.get_buffer(len(data)))
        taken = min(len(room), len(data))
        room[:taken] = data[:taken]
        protocol.buffer_updated(taken)
        data = data[taken:]


class _Place:
    """Stands where a listening socket is looked at for its address."""

    family = socket.AF_INET

    def __init__(self, address: Address) -> None:
        self._address = address

    def getsockname(self) -> Address:
        return self._address


class MemoryServer(events.AbstractServer):
    """Listens at an address of the loop."""

    def __init__(self, loop: MemoryLoop, factory: Callable[[], Any], address: Address) -> None:
        self.factory = factory
        self._loop, self._address = loop, address
        self.sockets = (_Place(address),)

    def close(self) -> None:
        """Listen no longer; connections stay."""
        self._loop.listeners.pop(self._address, None)

    def is_serving(self) -> bool:
        """Return whether it listens."""
        return self._loop.listeners.get(self._address) is self

    async def wait_closed(self) -> None:
        """Return at once."""

    async def start_serving(self) -> None:
        """Do nothing: it listens from the beginning."""

    async def serve_forever(self) -> None:
        """Wait for ever: it listens anyhow."""
        await asyncio.Event().wait()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop."""
        return self._loop


class MemoryLoop(base_events.BaseEventLoop):
    """The loop. Its time begins with 0."""

    listeners: dict[Address, MemoryServer]

    def __init__(self) -> None:
        super().__init__()
        self.listeners = {}
        self.steps = 0
        """How many turns it has made."""
        self._seconds = 0.0
        self._clock_resolution = 1e-9
        self._ports, self._numbers = itertools.count(FIRST_PORT), itertools.count(1)
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._orders = itertools.count()
        self._connected: dict[int, Address] = {}
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def next_number(self) -> int:
        """Return a number that was not given before."""
        return next(self._numbers)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._seconds

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any) -> _Task:
        return _Task(work, loop=loop, **options)

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future of this loop."""
        return _Future(loop=self)

    # -- turns ---------------------------------------------------------------------------------------------

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Call in the next turn."""
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call after so many seconds."""
        return self.call_at(self._seconds + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call at a time of this loop; of two with the same, the one that was asked for first is called first."""
        if self._closed:  # type: ignore[attr-defined]
            self._check_closed()  # type: ignore[attr-defined]
        handle = _TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._orders), handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Forget it when its time comes."""

    def _run_once(self) -> None:
        self.steps += 1
        timers, ready = self._timers, self._ready  # type: ignore[attr-defined]
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not ready:
            if self._stopping:  # type: ignore[attr-defined]
                return
            if not timers:
                raise NothingWillHappen("everything waits, and no timer is set")
            self._seconds = max(self._seconds, timers[0][0])
        end = self._seconds + self._clock_resolution
        while timers and timers[0][0] < end:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - the loop goes on, as any does
                words = f"Exception in callback {handle!r}"
                self.call_exception_handler({"message": words, "exception": error, "handle": handle})

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Call in the next turn: there are no threads."""
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Call now."""
        future = self.create_future()
        try:
            result = func(*args)
        except StopIteration as error:
            future.set_exception(RuntimeError(f"StopIteration from {func!r}: {error}"))
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            future.set_exception(error)
        else:
            future.set_result(result)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Do nothing: there is none."""

    async def sendfile(self, *arguments: Any, **options: Any) -> int:
        """Raise NotImplementedError: whoever sends a file reads and writes it."""
        raise NotImplementedError("there is no socket to send a file by")

    # -- the network ---------------------------------------------------------------------------------------

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> list[Any]:
        """Return the address as it is: names are not looked up."""
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port or 0))]

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Note where a socket, which is never used, would be connected to. Raises ConnectionRefusedError."""
        place: Address = tuple(address[:2])
        self._listener(place)
        self._connected[sock.fileno()] = place

    def _listener(self, address: Address) -> MemoryServer:
        server = self.listeners.get(address)
        if server is None:
            raise ConnectionRefusedError(111, f"nobody listens at {address[0]}:{address[1]}")
        return server

    async def create_server(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, **options: Any
    ) -> MemoryServer:
        """Listen in memory; port 0 is the next one that was never used. Raises OSError if somebody listens there."""
        address = (str(host), int(port or next(self._ports)))
        if address in self.listeners:
            raise OSError(98, f"address in use: {address[0]}:{address[1]}")
        server = self.listeners[address] = MemoryServer(self, protocol_factory, address)
        return server

    async def create_connection(
        self, protocol_factory: Callable[[], Any], host: Any = None, port: Any = None, *, sock: Any = None,
        **options: Any,
    ) -> tuple[MemoryTransport, Any]:  # fmt: skip
        """Connect to somebody who listens in this loop. Raises ConnectionRefusedError."""
        if sock is not None:
            place = self._connected.pop(sock.fileno())
            sock.close()
        else:
            place = (str(host), int(port or 0))
        server = self._listener(place)
        ours, theirs = protocol_factory(), server.factory()
        own = ("127.0.0.1", next(self._ports))
        near, far = MemoryTransport(self, ours, own, place), MemoryTransport(self, theirs, place, own)
        near.other, far.other = far, near
        theirs.connection_made(far)
        ours.connection_made(near)
        return near, ours
