"""A file that nobody has written to is asked rarely; one that somebody may be writing to, until that is over."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.sqlite import IN_MEMORY, SqliteFile
from runcomfy.adapters.stores.waking import DOUBT, DOUBT_MOST, Bell, Polling

EVERY = timedelta(milliseconds=3)


class File:
    """Something that is asked for its version."""

    def __init__(self) -> None:
        self.number = 7
        self.asked = 0

    async def ask(self) -> int:
        self.asked += 1
        return self.number


def polling(file: File, written_ago: Callable[[], float | None]) -> tuple[Bell, Polling]:
    bell = Bell()
    looks = Polling(bell, file.ask, written_ago, every=EVERY)
    looks.found(file.number)
    return bell, looks


@pytest.mark.parametrize(
    ("ago", "most", "least"),
    [(3600.0, 22, 18), (1.0, 101, 90), (0.001, 3_400, 2_000), (None, 3_400, 2_000)],
    ids=["long ago", "a second ago", "just now", "not known"],
)
async def test_a_file_is_asked_as_often_as_it_may_have_changed(ago: float | None, most: int, least: int) -> None:
    file = File()
    _, looks = polling(file, lambda: ago)
    async with looks.going_on():
        await asyncio.sleep(10)
    assert least <= file.asked <= most


async def test_a_commit_long_after_its_writing_is_seen_within_a_tenth_of_that_time() -> None:
    """The log is written, then flushed, and only then is the commit there to be read."""
    loop, file = asyncio.get_running_loop(), File()
    wrote_at = loop.time()
    bell, looks = polling(file, lambda: loop.time() - wrote_at)

    async def flushed() -> None:
        await asyncio.sleep(2)
        file.number += 1

    async with looks.going_on():
        committed = asyncio.create_task(flushed())
        await bell.heard(timeout=timedelta(seconds=60))
        assert committed.done()
        assert loop.time() - wrote_at <= 2 + 2 * DOUBT + 0.01
        assert DOUBT_MOST <= 0.5


async def test_waits_that_follow_upon_each_other_are_one_wait() -> None:
    """A worker waits a second at a time, for hours: it looks as rarely as one that waits in one go."""

    async def looks_in(waits: int, seconds: float) -> int:
        file = File()
        _, looks = polling(file, lambda: None)
        for _ in range(waits):
            async with looks.going_on():
                await asyncio.sleep(seconds)
        return file.asked

    assert await looks_in(30, 1.0) <= 1.02 * await looks_in(1, 30.0) + 30


@pytest.mark.skipif(sys.platform == "win32", reason="times of open files are not kept there")
@pytest.mark.looptime(False)
async def test_a_commit_of_another_connection_was_written_just_now(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite3"
    file = SqliteFile(path, durable=False, busy_timeout=timedelta(seconds=1))
    assert file.written_ago() is None, "there is no log yet"
    async with store_from(path, clock=SystemClock()) as other:
        ago = file.written_ago()
        assert ago is not None
        log = Path(f"{path}-wal")
        for seconds, told in ((60.25, True), (-60.25, False)):
            at = time.time() - seconds
            os.utime(log, (at, at))
            ago = file.written_ago()
            assert (ago is not None and 60 < ago < 120) is told
        whole = int(time.time()) - 60
        os.utime(log, (whole, whole))
        assert file.written_ago() is None, "a file system that counts in seconds tells too little"
        before = time.time()
        await other.write(lambda connection: connection.exec_driver_sql("CREATE TABLE news (id INTEGER)"))
        ago = file.written_ago()
        assert ago is None or ago <= time.time() - before + 0.1


def test_what_is_in_memory_has_no_log() -> None:
    assert SqliteFile(IN_MEMORY, durable=False, busy_timeout=timedelta(seconds=1)).written_ago() is None
