"""
An HTTP server inside the event loop of the product: it takes no signals, prints nothing, and ends when it is told to.

uvicorn speaks HTTP, always with the same parser (h11), whatever else is installed. What it has to say goes into the
product's log; it writes no access log, for addresses may hold codes that log somebody in.

Connections that ask for nothing may not take the files that the rest of the process needs, to end machines for
example: their number is limited, and who asks for nothing for a while is let go.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runcomfy.domain.exceptions import AddressInUse, SettingInvalid, foreign_text
from runcomfy.domain.settings import HttpSettings

log = logging.getLogger("runcomfy.http")

BACKLOG: Final = 512
ACCEPTED_AT_ONCE: Final = 4
"""Connections that are accepted before anything else is done, closing some included."""
KEEP_ALIVE: Final = 75
"""Seconds a silent connection is kept; longer than proxies and browsers keep theirs, so that none is closed under a
request."""
LEAVE_WITHIN: Final = 3
"""Seconds that requests under way have at the end."""
DATE_EVERY: Final = 1.0
PATIENCE: Final = HttpSettings().stalled
HEAD_WITHIN: Final = 20.0
"""Seconds that a new connection, or a request that has begun, may take until its head is there."""
CONNECTIONS_MOST: Final = 4_096
LINE: Final = "runcomfy.line"
"""Among the extensions of a request: its connection."""
_PORT_TAKEN: Final = frozenset({errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)})
_NOT_HERE: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""An address that a name has and this computer has not: `localhost` names ::1 also where IPv6 is switched off."""


class Server(uvicorn.Server):
    """uvicorn without its own ideas of signals and time."""

    def __init__(self, config: uvicorn.Config, patience: timedelta) -> None:
        super().__init__(config)
        self._patience = patience.total_seconds()
        self.told = asyncio.Event()
        self.answers = asyncio.Event()

    async def main_loop(self) -> None:
        """Answer until told to stop."""
        self.answers.set()
        while not self.told.is_set():
            await self.on_tick(0)  # the header with the date
            self._give_up()
            try:
                async with asyncio.timeout(DATE_EVERY):
                    await self.told.wait()
            except TimeoutError:
                continue

    def _give_up(self) -> None:
        """Let those go who take nothing of what they asked for: each holds a connection, and maybe a file."""
        now = asyncio.get_running_loop().time()
        for each in list(self.server_state.connections):
            if isinstance(each, Connection) and each.stuck_for(now) >= self._patience:
                log.info("client_given_up", extra={"fields": {"seconds": self._patience}})
                each.transport.abort()


class Connection(H11Protocol):
    """uvicorn's, which waits for a request for ever, and accepts until there is no file left."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; if there are too many by now, one that asks for nothing goes, else this one."""
        self._head_by: asyncio.TimerHandle | None = None
        self._left = 0
        self._taken = True
        self.since = self._moved_at = self.loop.time()
        super().connection_made(transport)
        if len(self.connections) > connections_most():
            self._make_room()
        self._hurry()

    def _make_room(self) -> None:
        there = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        if len(there) > connections_most():
            idle = [each for each in there if each.idle and each is not self]
            min(idle, key=_worth, default=self).transport.close()

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        super().data_received(data)
        if self.idle:
            self._hurry()
        else:
            self._let_be()

    def handle_events(self) -> None:
        """Answer what has come; requests know their connection."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # its task has not begun yet
            self.scope["extensions"] = {**self.scope.get("extensions", {}), LINE: {"transport": self.transport}}

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._let_be()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        cycle: Any = self.cycle  # None before the first request
        return cycle is None or bool(cycle.response_complete)

    def resume_writing(self) -> None:
        """Go on: the client has taken most of what it was sent."""
        self._taken = True
        super().resume_writing()

    def stuck_for(self, now: float) -> float:
        """Return for how many seconds the client has taken nothing of what waits for it, as far as looks here tell."""
        left = self.transport.get_write_buffer_size()
        if left:
            left += _sent_and_not_taken(self.transport)
        if not left or left != self._left or self._taken:
            self._left, self._taken, self._moved_at = left, False, now
        return now - self._moved_at

    def _hurry(self) -> None:
        if self._head_by is None:
            self._head_by = self.loop.call_later(HEAD_WITHIN, self._too_slow)

    def _let_be(self) -> None:
        if self._head_by is not None:
            self._head_by.cancel()
            self._head_by = None

    def _too_slow(self) -> None:
        self._head_by = None
        if self.idle and self.timeout_keep_alive_task is None:  # else it waits between two requests, as it may
            self.transport.close()


def _sent_and_not_taken(transport: asyncio.Transport) -> int:
    """Return how many bytes the system holds for a client; 0 where it does not say.

    They are megabytes, of which it says nothing else before a third is gone: minutes of a slow line.
    """
    if sys.platform != "linux":
        return 0
    import fcntl
    import termios

    try:
        said = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):  # it was closed meanwhile
        return 0
    return int.from_bytes(said, sys.byteorder)


def _worth(connection: Connection) -> tuple[bool, float]:
    """Return what puts those first who never asked for anything, then the oldest."""
    cycle: Any = connection.cycle
    return cycle is not None, connection.since


def connections_most() -> int:
    """Return how many connections there may be at once: under half of the files that this process may open."""
    if sys.platform == "win32":
        return CONNECTIONS_MOST
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CONNECTIONS_MOST if files == resource.RLIM_INFINITY else max(8, min(CONNECTIONS_MOST, files // 2 - 16))


class Line:
    """The connection of an answer whose length nobody knows, past the layers that each part of an answer goes through.

    Usable once the answer has begun; its last part goes the usual way. What is written here and there keeps its order.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    @property
    def free(self) -> bool:
        """Whether the client is there and has taken everything it got before."""
        return not self._transport.get_write_buffer_size() and not self._transport.is_closing()

    def write(self, chunk: bytes) -> None:
        """Send a part of the body without waiting; an empty one would end it, and is not sent."""
        if chunk:
            self._transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))


def line_of(scope: MutableMapping[str, Any]) -> Line | None:
    """Return the connection of a request, if what is written to it can be framed here; None: by another server."""
    transport = scope.get("extensions", {}).get(LINE, {}).get("transport")
    chunked = scope["method"] == "GET" and scope.get("http_version") == "1.1"
    return Line(transport) if isinstance(transport, asyncio.Transport) and chunked else None


def is_watched(scope: MutableMapping[str, Any]) -> bool:
    """Return whether a client that takes nothing of the answer is given up by the server itself."""
    return LINE in scope.get("extensions", {})


class _Forwarded(logging.Handler):
    """Hands records on to the product's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        logger = logging.getLogger("runcomfy.http")
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def _log_here() -> None:
    for name, level in (
        ("uvicorn", logging.WARNING),
        ("launcher", logging.INFO),
        # What is wrong with a form is told to whoever sent it; without a handler it would go to the terminal.
        ("python_multipart", logging.CRITICAL),
    ):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Forwarded) for handler in logger.handlers):
            logger.addHandler(_Forwarded())
            logger.setLevel(level)
            logger.propagate = False


async def bound(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen at every address of a host that is here; port 0 is any free one.

    Raises AddressInUse, SettingInvalid.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise SettingInvalid(
            f"{foreign_text(host, 80)!r} is no address of this computer: {foreign_text(error)}",
            hint="give --host 127.0.0.1, or set RUNCOMFY_HTTP_HOST",
            details={"setting": "RUNCOMFY_HTTP_HOST"},
        ) from error
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, _, proto, _, address in dict.fromkeys(found):
            at = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
            try:
                sockets.append(_bind(family, proto, at))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
        if missing is not None and not sockets:
            raise missing
    except OSError as error:
        for each in sockets:
            each.close()
        if error.errno in _PORT_TAKEN:
            raise AddressInUse(
                f"port {port} at {foreign_text(host, 80)} is in use, or not ours to use",
                hint="is `comfyctl serve` running already? else give --port (0: any free one), or --no-http",
                details={"host": host, "port": port},
            ) from error
        raise SettingInvalid(
            f"cannot listen at {foreign_text(host, 80)}: {foreign_text(error.strerror or error)}",
            hint="give --host 127.0.0.1, or set RUNCOMFY_HTTP_HOST",
            details={"setting": "RUNCOMFY_HTTP_HOST"},
        ) from error
    return sockets


def _bind(family: int, proto: int, address: Any) -> socket.socket:
    # With the protocol named, the event loop knows TCP when it sees it, and lets no small answer wait (TCP_NODELAY).
    listening = socket.socket(family, socket.SOCK_STREAM, proto)
    try:
        if sys.platform == "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


@asynccontextmanager
async def answering(
    web: Any, sockets: Sequence[socket.socket], *, patience: timedelta = PATIENCE
) -> AsyncIterator[None]:
    """Answer requests at bound sockets, which are closed at the end, for the block.

    `patience`: how long a client may take nothing of an answer before its connection is ended. If the server dies, the
    block is cancelled and the error raised.
    """
    _log_here()
    config = uvicorn.Config(
        web,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http=Connection,
        proxy_headers=False,
        backlog=ACCEPTED_AT_ONCE,  # asyncio's word for it
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LEAVE_WITHIN,
    )
    server = Server(config, patience)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(server._serve(list(sockets)), name="http")
            try:
                await server.answers.wait()
                for each in sockets:
                    each.listen(BACKLOG)  # which is how many may wait, all the same
                yield
            finally:
                server.told.set()
    finally:
        for each in sockets:
            each.close()
