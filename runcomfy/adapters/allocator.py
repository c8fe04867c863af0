"""
Keeps the memory of programs that run for weeks from growing by what is free: how glibc hands out memory.

With its defaults each of a service's dozen threads gets an arena of its own, and what is freed in one is of no use to
the others; large buffers are, after the first, taken from there as well and leave holes. And what is free between two
things that stay is kept until somebody asks for it back. Other systems' allocators are left as they are.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

ARENAS: Final = 2
LARGE: Final = 256 * 1024
"""Bytes from which a buffer has its own pages, which go back to the system when it is freed."""
EVERY: Final = timedelta(minutes=1)
"""Between two times that free pages are given back, which takes 1 ms of a heap of 30 MB."""
# From glibc's malloc.h.
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_USERS_OWN: Final = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def share_arenas(environment: Mapping[str, str] = os.environ) -> bool:
    """Let all threads share few arenas; call it before there are any. Return whether that was done.

    What the user has set for the allocator stands, and without glibc there is nothing to set.
    """
    library = _glibc()
    if library is None or any(name in environment for name in _USERS_OWN):
        return False
    return bool(library.mallopt(_M_ARENA_MAX, ARENAS)) and bool(library.mallopt(_M_MMAP_THRESHOLD, LARGE))


async def keep_giving_back(every: timedelta = EVERY) -> None:
    """Give free pages back to the system again and again; it never returns where that can be done."""
    if (library := _glibc()) is None:
        return
    while True:
        await asyncio.sleep(every.total_seconds())
        await asyncio.to_thread(library.malloc_trim, 0)


def _glibc() -> ctypes.CDLL | None:
    """Return glibc if this program uses it; musl has neither arenas nor a use for any of this."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
