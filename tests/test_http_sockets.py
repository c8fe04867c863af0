"""What HTTP listens at, whom it lets in, and whom it lets go before there is no file left to open."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from launcher.listening import answering, bound
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import AddressInUse, SettingInvalid
from runcomfy.testing.clock import LoopClock


async def test_a_port_that_is_taken_is_said_and_nothing_is_half_started(tmp_path: Path, clock: LoopClock) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        extra = {"http": {"enabled": True, "host": "127.0.0.1", "port": port}}
        async with App(clock=clock, queue={"root": str(tmp_path)}) as app:
            with pytest.raises(AddressInUse) as raised:
                await app.serve(ServeOptions(pool=False, extra=extra), asyncio.Event())
            assert str(port) in raised.value.message
            assert "--port" in raised.value.hint
            assert await (await app.job_queue()).workers() == [], "no executor was begun"


@pytest.mark.parametrize("host", ["no such host.invalid", "203.0.113.7"])
async def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(SettingInvalid):
        await bound(host, 0)


async def test_of_a_names_addresses_those_that_are_here_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without IPv6 `localhost` is ::1 all the same."""

    async def both(host: str, port: int, **how: Any) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, ("203.0.113.7", port)), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
    [listening] = await bound("localhost", 0)
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"


async def test_small_answers_are_not_held_back() -> None:
    """Without TCP_NODELAY every answer waits for an acknowledgement, 40 ms on Linux."""

    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    [listening] = await bound("127.0.0.1", 0)
    assert listening.proto == socket.IPPROTO_TCP, "the event loop switches it on where it sees TCP"
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    async with answering(hello, [listening]), aiohttp.ClientSession() as client, client.get(address) as answer:
        assert await answer.text() == "hello"
        assert "server" not in answer.headers
    assert listening.fileno() == -1


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def _asks(address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
    return reader, writer


@pytest.mark.fault(59)
async def test_who_asks_for_nothing_is_let_go(clock: LoopClock) -> None:
    """Slow heads: nothing at all, a byte now and then, and a second request that never gets whole."""
    [listening] = await bound("127.0.0.1", 0)
    async with answering(_hello, [listening]):
        address = listening.getsockname()
        silent, end = await asyncio.open_connection(*address)
        slow, drips = await asyncio.open_connection(*address)
        used, more = await _asks(address)
        more.write(b"GET / HT")
        for byte in b"GET / HTTP/1.1\r\nX: ":
            drips.write(bytes([byte]))
            await asyncio.sleep(1)
        for reader in (silent, slow, used):
            async with asyncio.timeout(10):
                assert await reader.read() == b""
        again, last = await _asks(address)
        await asyncio.sleep(40)  # between two requests a client may take its time
        last.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        await again.readuntil(b"hello")
        for writer in (end, drips, more, last):
            writer.close()


@pytest.mark.fault(59)
async def test_connections_do_not_take_the_last_file(monkeypatch: pytest.MonkeyPatch, clock: LoopClock) -> None:
    monkeypatch.setattr("launcher.listening.connections_most", lambda: 3)
    [listening] = await bound("127.0.0.1", 0)
    async with answering(_hello, [listening]):
        address = listening.getsockname()
        opened = await asyncio.gather(*(asyncio.open_connection(*address) for _ in range(20)))
        ended = [asyncio.create_task(reader.read()) for reader, _ in opened]
        await asyncio.sleep(1)
        assert sum(task.done() for task in ended) == 17, "also if they come at once"
        answered = [await _asks(address) for _ in range(3)]  # each in the place of one that never asked
        assert set(await asyncio.gather(*ended)) == {b""}
        fourth = await _asks(address)
        assert await answered[0][0].read() == b"", "then the oldest that asks for nothing now"
        for _, writer in [*opened, *answered, fourth]:
            writer.close()


async def test_a_server_that_dies_takes_the_service_down() -> None:
    async def hello(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    [listening] = await bound("127.0.0.1", 0)
    with pytest.raises(BaseExceptionGroup):  # noqa: PT012 - what is raised is raised where the block is left
        async with answering(hello, [listening]):
            server = next(task for task in asyncio.all_tasks() if task.get_name() == "http")
            running = server.get_coro()
            assert running is not None  # as it would be for a task that began eagerly, from Python 3.12 on
            running.throw(RuntimeError("broken"))
            await asyncio.sleep(3_600)
