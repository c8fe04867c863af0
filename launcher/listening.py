"""
An HTTP server inside the event loop of the product: it takes no signals, prints nothing, and ends when it is told to.

uvicorn speaks HTTP. What it has to say goes into the product's log; it writes no access log, for addresses may hold
codes that log somebody in.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import uvicorn

from runcomfy.domain.exceptions import AddressInUse, SettingInvalid, foreign_text

BACKLOG: Final = 512
KEEP_ALIVE: Final = 75
"""Seconds a silent connection is kept; longer than proxies and browsers keep theirs, so that none is closed under a
request."""
LEAVE_WITHIN: Final = 3
"""Seconds that requests under way have at the end."""
DATE_EVERY: Final = 1.0
_PORT_TAKEN: Final = frozenset({errno.EADDRINUSE, errno.EACCES, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)})


class Server(uvicorn.Server):
    """uvicorn without its own ideas of signals and time."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told = asyncio.Event()
        self.answers = asyncio.Event()

    async def main_loop(self) -> None:
        """Answer until told to stop."""
        self.answers.set()
        while not self.told.is_set():
            await self.on_tick(0)  # the header with the date
            try:
                async with asyncio.timeout(DATE_EVERY):
                    await self.told.wait()
            except TimeoutError:
                continue


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
    """Return sockets that listen at every address of a host; port 0 is any free one.

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
    try:
        for family, _, proto, _, address in dict.fromkeys(found):
            at = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
            sockets.append(_bind(family, proto, at))
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
async def answering(web: Any, sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Answer requests at bound sockets, which are closed at the end, for the block.

    If the server dies, the block is cancelled and the error raised.
    """
    _log_here()
    config = uvicorn.Config(
        web,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="auto",
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LEAVE_WITHIN,
    )
    server = Server(config)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(server._serve(list(sockets)), name="http")
            try:
                await server.answers.wait()
                yield
            finally:
                server.told.set()
    finally:
        for each in sockets:
            each.close()
