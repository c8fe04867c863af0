"""Virtual time waits for threads, whoever started them, and not for those that wait for it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import anyio.to_thread
import pytest
import pytest_asyncio

from runcomfy.testing import standstill


def slow() -> str:
    """Take longer than any of the time limits here."""
    threading.Event().wait(0.2)
    return "done"


async def in_executor() -> str:
    return await asyncio.to_thread(slow)


async def in_anyio() -> str:
    return await anyio.to_thread.run_sync(slow)


@pytest.mark.parametrize("work", [in_executor, in_anyio])
async def test_no_time_passes_while_a_thread_works(work: object) -> None:
    assert callable(work)
    loop = asyncio.get_running_loop()
    began = loop.time()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with asyncio.timeout(0.05):
        assert await work() == "done"
    assert (loop.time(), ticks) == (began, 0)
    ticking.cancel()
    await asyncio.sleep(3_600)
    assert loop.time() == began + 3_600


@pytest_asyncio.fixture
async def long_way() -> None:
    await asyncio.sleep(0.05)
    await in_executor()


@pytest.mark.usefixtures("long_way")
async def test_a_story_begins_at_zero_however_long_its_fixtures_take() -> None:
    assert asyncio.get_running_loop().time() == 0


async def test_a_thread_that_waits_for_the_story_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standstill, "PATIENCE", 0.1)
    go_on = threading.Event()
    waits = asyncio.create_task(asyncio.to_thread(go_on.wait, 60))
    await asyncio.sleep(0.01)
    assert not waits.done()
    go_on.set()
    assert await waits


async def test_a_thread_that_waits_for_the_story_takes_no_patience_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(standstill, "PATIENCE", 1.0)
    never, go_on = threading.Event(), threading.Event()
    waits = asyncio.create_task(asyncio.to_thread(go_on.wait, 60))
    await asyncio.to_thread(never.wait, 0.7)
    async with asyncio.timeout(0.05):
        await asyncio.to_thread(never.wait, 0.6)  # the other one is found out meanwhile
    assert asyncio.get_running_loop().time() == 0
    go_on.set()
    assert await waits


@pytest.mark.looptime(False)
async def test_real_time_goes_on_while_a_thread_works() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await in_executor()
    assert time.monotonic() - began >= 0.05


def test_the_fixtures_are_there_without_virtual_time() -> None:
    """It is one of our tools, and nothing that a user's tests need."""
    without = "import sys; sys.modules['looptime'] = None; import runcomfy.testing.plugin"
    subprocess.run([sys.executable, "-c", without], check=True, timeout=120)
