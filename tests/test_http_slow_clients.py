"""Clients that stop in the middle of what they asked for, or never end what they send: nobody is waited for always."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.requests import Request

from launcher.files import ROOM_TAKES, Wanted, send_file
from launcher.guarding.guard import Guard
from launcher.guarding.middleware import GuardMiddleware
from launcher.listening import answering, bound
from runcomfy.domain.settings import HttpSettings
from runcomfy.testing.clock import LoopClock

SIZE = 12 * 1024**2
"""More than the system keeps for a connection."""
PATIENCE = timedelta(seconds=60)


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    data = os.urandom(1024) * (SIZE // 1024)
    path = tmp_path / "result.png"
    path.write_bytes(data)
    return Wanted(str(path), "result.png", "image/png", SIZE, hashlib.sha256(data).hexdigest())


def is_open(wanted: Wanted) -> bool:
    return wanted.path in {each.path for each in psutil.Process().open_files()}


@asynccontextmanager
async def sends(wanted: Wanted) -> AsyncIterator[tuple[str, int]]:
    """Serve a file and nothing else."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await send_file(Request(scope, receive), wanted, patience=PATIENCE))(scope, receive, send)

    [listening] = await bound("127.0.0.1", 0)
    async with answering(app, [listening], patience=PATIENCE):
        yield listening.getsockname()


@asynccontextmanager
async def asking(address: tuple[str, int]) -> AsyncIterator[tuple[socket.socket, Callable[[], Awaitable[bytes]]]]:
    """Ask for the file with a connection that holds little; gives what reads its next bytes."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        client.setblocking(False)
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        yield client, lambda: loop.sock_recv(client, 256 * 1024)


async def gone(happened: Callable[[], bool]) -> None:
    """Wait until it has happened; threads read and the system acknowledges in their own time, the loop's is quicker."""
    async with asyncio.timeout(PATIENCE.total_seconds() * 100):
        while not happened():  # noqa: ASYNC110 - nobody says so
            await asyncio.sleep(5)


async def test_a_client_that_takes_nothing_of_a_file_is_given_up(
    wanted: Wanted, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "runcomfy.http")
    async with sends(wanted) as address, asking(address) as (_, read):
        assert (await read()).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(PATIENCE.total_seconds() / 2)
        assert is_open(wanted), "it may still go on"
        await gone(lambda: not is_open(wanted))
        got = 0
        with suppress(ConnectionResetError):  # first comes what was on its way
            while piece := await read():
                got += len(piece)
        assert got < SIZE, "it got the file, though it had taken nothing for so long"
        assert "client_given_up" in caplog.messages


async def test_what_waits_for_a_client_when_all_is_said_holds_no_connection_either(wanted: Wanted) -> None:
    """The file is read and closed by then, and closing a connection waits for what is still to be sent."""
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": bytes(SIZE)})
        ended.set()

    [listening] = await bound("127.0.0.1", 0)
    address = listening.getsockname()

    def ours() -> list[str]:
        there = [each for each in psutil.Process().net_connections("tcp") if each.laddr[:2] == address]
        return [each.status for each in there if each.status != psutil.CONN_LISTEN]

    async with answering(app, [listening], patience=PATIENCE), asking(address):
        await ended.wait()
        await asyncio.sleep(PATIENCE.total_seconds() / 2)
        assert ours() == [psutil.CONN_ESTABLISHED]
        await gone(lambda: not ours())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux says what a client has taken")
async def test_a_client_that_is_slow_gets_everything(wanted: Wanted) -> None:
    """The system shows room for more only when a third of what it holds is gone."""
    async with sends(wanted) as address, asking(address) as (_, read):
        got = 0
        while got < SIZE:
            piece = await read()
            assert piece, f"given up after {got} bytes"
            got += len(piece)
            if got < SIZE // 3:
                await asyncio.sleep(PATIENCE.total_seconds() / 3)


async def test_under_another_server_the_file_is_closed_too(wanted: Wanted) -> None:
    loop = asyncio.get_running_loop()
    never = asyncio.Event()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if len(sent) > 3:
            await never.wait()

    async def receive() -> Any:
        await never.wait()

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "GET", "path": "/", "headers": []}
    answer = await send_file(Request(scope, receive), wanted, patience=PATIENCE)
    assert is_open(wanted)
    await answer(scope, receive, send)
    assert not is_open(wanted)
    assert loop.time() == pytest.approx(PATIENCE.total_seconds() * ROOM_TAKES, abs=1)


# -- bodies that are too large -----------------------------------------------------------------------------


@asynccontextmanager
async def guarded(folder: Path, monkeypatch: pytest.MonkeyPatch, **limits: float) -> AsyncIterator[tuple[str, int]]:
    """An application that reads no body, behind a guard that allows a kilobyte."""
    for name, value in limits.items():
        monkeypatch.setattr(f"launcher.guarding.middleware.{name}", value)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        raise AssertionError("it was let through")

    guard = Guard.open(folder, HttpSettings(max_body_bytes=1_000), bound_host="127.0.0.1", clock=LoopClock())
    [listening] = await bound("127.0.0.1", 0)
    async with answering(GuardMiddleware(app, guard), [listening]):
        yield listening.getsockname()


def head(address: tuple[str, int], *lines: str) -> bytes:
    first = ("POST /flux/generate HTTP/1.1", f"Host: 127.0.0.1:{address[1]}", "Content-Type: application/json")
    return "\r\n".join((*first, *lines, "", "")).encode()


@pytest.mark.parametrize("says", [True, False], ids=["it says how long", "it does not say"])
async def test_who_sends_too_much_is_told_so_when_it_has_sent_it(
    says: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed at once, the connection would break under the client, which would never read the answer."""
    size = 8 * 1024**2
    async with guarded(tmp_path, monkeypatch) as address:
        reader, writer = await asyncio.open_connection(*address)
        if says:
            writer.write(head(address, f"Content-Length: {size}") + b" " * 1024)
        else:
            writer.write(head(address, "Transfer-Encoding: chunked") + b"%x\r\n" % size + b" " * 1024)
        await writer.drain()
        await asyncio.sleep(1)  # it is refused by now
        for _ in range(size // 1024 - 1):
            writer.write(b" " * 1024)
            await writer.drain()
        writer.write(b"" if says else b"\r\n0\r\n\r\n")
        told = await reader.read()
        writer.close()
    assert told.startswith(b"HTTP/1.1 413")
    assert b"body-too-large" in told
    assert b"connection: close" in told.lower()


async def test_who_never_ends_is_not_listened_to_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded(tmp_path, monkeypatch, DRAINED_MOST=1024**2) as address:
        _, writer = await asyncio.open_connection(*address)
        writer.write(head(address, f"Content-Length: {10**12}"))
        with pytest.raises(ConnectionError):  # noqa: PT012 - nobody knows which of them breaks
            for _ in range(10_000):
                writer.write(bytes(64 * 1024))
                await writer.drain()
        writer.close()


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [(["Content-Length: 5000"], 2), (["Content-Length: 5000", "Expect: 100-continue"], 0)],
    ids=["it says no more", "it waits for a word"],
)
async def test_who_sends_nothing_more_is_not_waited_for(
    lines: list[str], seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    async with guarded(tmp_path, monkeypatch) as address:
        reader, writer = await asyncio.open_connection(*address)
        began = loop.time()
        writer.write(head(address, *lines))
        told = await reader.read()
        writer.close()
        assert told.startswith(b"HTTP/1.1 413")
        assert loop.time() - began == pytest.approx(seconds, abs=0.5)
