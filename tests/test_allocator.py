"""Threads of a long-running program share their memory, where the allocator has arenas."""

from __future__ import annotations

import asyncio
import ctypes
import platform
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from runcomfy.adapters.allocator import ARENAS, EVERY, keep_giving_back, share_arenas

THREADS = """
import ctypes, os, sys, tempfile, threading
from runcomfy.adapters.allocator import share_arenas
done = share_arenas({}) if sys.argv[1] == "shared" else None
meet = threading.Barrier(8)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def work():
    meet.wait()
    kept = [libc.malloc(5_000) for _ in range(200)]
    meet.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fopen.restype = ctypes.c_void_p
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "info.xml").encode()
    file = ctypes.c_void_p(libc.fopen(path, b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    print(done, open(path).read().count("<heap nr="))
"""


with_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")


@with_glibc
def test_the_threads_of_a_program_share_few_arenas() -> None:
    def told(how: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", THREADS, how], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()

    assert told("shared") == ["True", str(ARENAS)]
    assert int(told("each its own")[1]) > ARENAS


def test_what_the_user_has_set_for_the_allocator_stands() -> None:
    assert not share_arenas({"MALLOC_ARENA_MAX": "8"})
    assert not share_arenas({"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"})


@with_glibc
async def test_what_is_free_between_two_things_that_stay_is_given_back_every_minute() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, resident = 50_000, psutil.Process().memory_info
    buffers = [libc.malloc(size) for _ in range(1_000)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, size)
    stay, go = buffers[::10], [buffer for number, buffer in enumerate(buffers) if number % 10]
    before = resident().rss
    tidying = asyncio.create_task(keep_giving_back())
    for buffer in go:
        libc.free(buffer)
    await asyncio.sleep(EVERY.total_seconds() - 1)
    kept = before - resident().rss
    await asyncio.sleep(2)
    given = before - resident().rss
    tidying.cancel()
    with suppress(asyncio.CancelledError):
        await tidying
    for buffer in stay:
        libc.free(buffer)
    assert kept < size * len(go) / 2 < given
