"""
Keeps the memory of programs that run for weeks from growing by what is free: how glibc hands out memory.

With its defaults each of a service's dozen threads gets an arena of its own, and what is freed in one is of no use to
the others; large buffers are, after the first, taken from there as well and leave holes. Other systems' allocators are
left as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Final

ARENAS: Final = 2
LARGE: Final = 256 * 1024
"""Bytes from which a buffer has its own pages, which go back to the system when it is freed."""
# From glibc's malloc.h.
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_USERS_OWN: Final = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def share_arenas(environment: Mapping[str, str] = os.environ) -> bool:
    """Let all threads share few arenas; call it before there are any. Return whether that was done.

    What the user has set for the allocator stands, and without glibc there is nothing to set.
    """
    if sys.platform != "linux" or any(name in environment for name in _USERS_OWN):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has neither arenas nor a use for this
        return False
    return bool(library.mallopt(_M_ARENA_MAX, ARENAS)) and bool(library.mallopt(_M_MMAP_THRESHOLD, LARGE))
