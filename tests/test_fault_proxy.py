"""The fault proxy: each toxic does what it says, from when it is switched on, to the direction it is for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from runcomfy.testing.fault_proxy import (
    KINDS,
    Bandwidth,
    Direction,
    FaultProxy,
    HalfClose,
    Latency,
    LimitData,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
    toxic,
)

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def proxied(handler: Handler = echo) -> AsyncIterator[FaultProxy]:
    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await handler(reader, writer)

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    try:
        async with FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1], seed=1) as proxy:
            yield proxy
    finally:
        server.close()


@asynccontextmanager
async def client(proxy: FaultProxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> float:
    """Send, wait for the same bytes back, return how long that took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    writer.write(data)
    assert await reader.readexactly(len(data)) == data
    return loop.time() - began


async def test_without_toxics_bytes_pass_unchanged_and_ends_are_passed_on() -> None:
    async with proxied() as proxy:
        async with client(proxy) as (reader, writer):
            await asked(reader, writer, bytes(range(256)) * 2_000)
            writer.write_eof()
            assert await reader.read() == b""
        assert proxy.accepted == 1
        assert not proxy.met
        assert proxy.passed_bytes == {Direction.UP: 512_000, Direction.DOWN: 512_000}


async def test_latency_delays_each_byte_once_also_on_open_connections_and_ends_with_its_removal() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        assert await asked(reader, writer, b"a") < 1
        with proxy.spoiled(Latency(seconds=5), Direction.DOWN):
            assert 5 <= await asked(reader, writer, b"b") < 6
        with proxy.spoiled(Latency(seconds=5, jitter=2)):
            assert 6 <= await asked(reader, writer, b"c") < 15
        assert await asked(reader, writer, b"d") < 1
        assert proxy.met["latency"] == 2


async def test_latency_does_not_add_up_over_what_is_under_way() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        loop = asyncio.get_running_loop()
        proxy.add(Latency(seconds=10), Direction.UP)
        began = loop.time()
        for _ in range(5):
            writer.write(b"x")
            await asyncio.sleep(1)
        assert await reader.readexactly(5) == b"xxxxx"
        assert 14 <= loop.time() - began < 16


async def test_bandwidth_lets_so_many_bytes_pass_in_a_second() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        proxy.add(Bandwidth(bytes_per_second=1_000), Direction.UP)
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write(b"x" * 5_000)
        await reader.readexactly(1_000)
        assert 0.9 <= loop.time() - began < 1.5, "it comes evenly, not in one lump"
        await reader.readexactly(4_000)
        assert 4.9 <= loop.time() - began < 6


async def test_a_slow_close_tells_the_end_late_and_the_data_in_time() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        proxy.add(SlowClose(seconds=7), Direction.DOWN)
        assert await asked(reader, writer, b"x") < 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        writer.write_eof()
        assert await reader.read() == b""
        assert 7 <= loop.time() - began < 8


async def test_a_timeout_holds_everything_back_and_then_closes() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        loop = asyncio.get_running_loop()
        await asyncio.sleep(30)
        proxy.add(Timeout(seconds=20))
        began = loop.time()
        writer.write(b"x")
        assert await reader.read() == b""
        assert 20 <= loop.time() - began < 21, "counted from when it was switched on"
        assert proxy.met == {"timeout": 1}


async def test_a_timeout_of_zero_leaves_the_connection_half_open_and_loses_nothing_when_it_ends() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        held = proxy.add(Timeout(), Direction.UP)
        answer = asyncio.create_task(asked(reader, writer, b"abc"))
        await asyncio.sleep(3_600)
        assert not answer.done()
        proxy.remove(held)
        assert await answer >= 3_600


async def test_a_reset_is_a_reset_to_both_sides() -> None:
    upstream: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
            upstream.set_result("end")
        except ConnectionResetError:
            upstream.set_result("reset")
        writer.close()

    async with proxied(listening) as proxy, client(proxy) as (reader, writer):
        writer.write(b"x")
        proxy.add(ResetPeer(seconds=4))
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert 4 <= loop.time() - began < 5
        assert await upstream == "reset"


async def test_a_slicer_cuts_data_up_and_pauses_after_each_piece() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        proxy.add(Slicer(average_bytes=10, variation_bytes=3, seconds=1), Direction.DOWN)
        writer.write(b"x" * 100)
        sizes: list[int] = []
        while sum(sizes) < 100:
            sizes.append(len(await reader.read(100)))
        assert len(sizes) >= 7
        assert max(sizes) <= 13
        assert len(set(sizes)) > 1


@pytest.mark.parametrize("sent", [400, 900])
async def test_limited_data_are_cut_in_the_middle(sent: int) -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        await asked(reader, writer, b"before it is switched on")
        proxy.add(LimitData(size_bytes=500), Direction.DOWN)
        writer.write(b"x" * sent)
        if sent < 500:
            assert await reader.readexactly(sent) == b"x" * sent
            writer.write(b"y" * sent)
        assert len(await reader.read()) == (500 if sent > 500 else 100), "and then the end"
        assert proxy.met == {"limit_data": 1}


async def test_a_half_close_ends_one_direction_and_the_other_goes_on() -> None:
    heard = bytearray()
    over = asyncio.Event()

    async def listening(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"y" * 100)
        with suppress(OSError):
            while data := await reader.read(1_000):
                heard.extend(data)
        over.set()
        writer.close()

    async with proxied(listening) as proxy:
        proxy.add(HalfClose(size_bytes=40), Direction.DOWN)
        async with client(proxy) as (reader, writer):
            assert await reader.read() == b"y" * 40, "an end, and no reset"
            for _ in range(3):
                writer.write(b"still there")
                await asyncio.sleep(10)
            assert heard == b"still there" * 3
            writer.write_eof()
            await over.wait()
        assert proxy.met == {"half_close": 1}


async def test_several_at_once_each_for_its_direction() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        proxy.add(Latency(seconds=3), Direction.UP)
        proxy.add(Latency(seconds=4), Direction.DOWN)
        proxy.add(Slicer(average_bytes=1), Direction.DOWN)
        assert 7 <= await asked(reader, writer, b"abcdef") < 8
        proxy.clear()
        assert await asked(reader, writer, b"abcdef") < 1


async def test_a_toxic_may_be_for_a_share_of_the_connections() -> None:
    async with proxied() as proxy:
        proxy.add(ResetPeer(toxicity=0.5))
        reset = 0
        for _ in range(40):
            async with client(proxy) as (reader, writer):
                try:
                    await asked(reader, writer, b"x")
                except (OSError, asyncio.IncompleteReadError):
                    reset += 1
        assert 8 <= reset <= 32
        assert proxy.met["reset_peer"] == reset


async def test_an_upstream_that_refuses_is_a_reset_and_one_that_moved_is_found() -> None:
    async with proxied() as proxy:
        right, proxy.upstream = proxy.upstream, ("127.0.0.1", 1)
        async with client(proxy) as (reader, _):
            with pytest.raises(ConnectionResetError):
                await reader.read()
        proxy.upstream = right
        async with client(proxy) as (reader, writer):
            await asked(reader, writer, b"x")


async def test_refusing_keeps_what_is_open_and_stopping_ends_it() -> None:
    async with proxied() as proxy, client(proxy) as (reader, writer):
        await asked(reader, writer, b"x")
        await proxy.refuse()
        with pytest.raises(OSError, match=r"."):
            await asyncio.open_connection(proxy.host, proxy.port)
        await asked(reader, writer, b"y")
        await proxy.start()
        async with client(proxy) as (again, writing):
            await asked(again, writing, b"z")
        assert proxy.reset_all() >= 1
        with pytest.raises(ConnectionResetError):
            await reader.read()


def test_toxics_are_made_by_name() -> None:
    assert set(KINDS) == {
        "latency", "bandwidth", "slow_close", "timeout", "reset_peer", "slicer", "limit_data", "half_close",
    }  # fmt: skip
    made = toxic("slicer", average_bytes=5)
    assert isinstance(made, Slicer)
    assert made.name == "slicer"
