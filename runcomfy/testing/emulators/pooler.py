"""
A transaction pooler in front of a PostgreSQL, as far as its clients notice: LISTEN is taken and nothing ever comes.

What PgBouncer and Supavisor do in transaction mode and is done here: the backend number told at the start is the
pooler's own, notifications are not passed on, and nobody encrypts. What is left out: handing out one server
connection to several clients. The line can be cut, which a server that restarts does as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Final, Self

_NOTIFICATION, _KEY, _READY = b"A", b"K", b"Z"
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
_MADE_UP_PID: Final = 4711


class PoolerEmulator:
    """`async with PoolerEmulator(host, port) as pooler:`; in a thread of its own with `runcomfy.testing.in_thread`."""

    def __init__(self, host: str, port: int) -> None:
        """`host` and `port` are the server's."""
        self._upstream = (host, port)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.round_trips = 0
        """How often the server was ready for the next question."""

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        if self._server is None:
            raise RuntimeError("the pooler does not run")
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def cut(self) -> None:
        """End every connection without a word."""
        for writer in self._open:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, EOFError):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _kept(self._open, writer):
            start = await _startup(reader, writer)
            server_reader, server_writer = await asyncio.open_connection(*self._upstream)
            async with _kept(self._open, server_writer):
                server_writer.write(start)
                there = asyncio.create_task(_copy(reader, server_writer))
                back = asyncio.create_task(self._filter(server_reader, writer))
                await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
                for task in (there, back):
                    task.cancel()
                await asyncio.gather(there, back, return_exceptions=True)

    async def _filter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            kind = await reader.readexactly(1)
            size = await reader.readexactly(4)
            body = await reader.readexactly(struct.unpack("!I", size)[0] - 4)
            if kind == _NOTIFICATION:
                continue
            self.round_trips += kind == _READY
            if kind == _KEY:
                body = struct.pack("!I", _MADE_UP_PID) + body[4:]
            writer.write(kind + size + body)
            await writer.drain()


@contextlib.asynccontextmanager
async def _kept(where: set[asyncio.StreamWriter], writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Have a connection in a set until it is closed."""
    where.add(writer)
    try:
        yield
    finally:
        where.discard(writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _startup(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Read a client's first message; who asks for encryption is told that there is none."""
    while True:
        size = await reader.readexactly(4)
        body = await reader.readexactly(struct.unpack("!I", size)[0] - 4)
        if struct.unpack("!I", body[:4])[0] not in (_SSL_REQUEST, _GSS_REQUEST):
            return size + body
        writer.write(b"N")
        await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while some := await reader.read(65536):
        writer.write(some)
        await writer.drain()
