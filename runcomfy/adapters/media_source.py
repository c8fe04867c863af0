"""
Reading a file that may be hostile: every read says how much it wants, and gets that or an error.

The checkers of pictures, meshes, video and sound share this; they raise `Corrupt` with a reason, and
`runcomfy.adapters.media` turns it into the error that fits the file's role.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, Final

CHUNK: Final = 1 << 20
"""Bytes read at once where a whole file passes through: memory stays flat, and reads are still few."""

SMALL_READ: Final = 64 * CHUNK
"""The most that is ever read in one piece, whatever the file says of itself."""


class Corrupt(Exception):
    """The file is not what its first bytes promise; the text says why."""


class Source:
    """An open file of known size."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.head = file.read(min(self.size, 4096))
        """The first bytes, for telling what it is."""
        self._reads_left = 200_000 + self.size // 64

    def at(self, offset: int, count: int) -> bytes:
        """Return exactly `count` bytes from `offset`. Raises Corrupt if the file does not have them."""
        if count < 0 or offset < 0 or offset + count > self.size:
            raise Corrupt(f"it ends too early: {count} bytes are expected at {offset}, the file has {self.size}")
        if count > SMALL_READ:
            raise Corrupt(f"a part of it claims {count} bytes, more than is sensible")
        self._reads_left -= 1
        if self._reads_left < 0:
            # Parts of some bytes each, millions of them, are only sent to keep a reader busy.
            raise Corrupt("it has an absurd number of parts")
        if offset + count <= len(self.head):
            return self.head[offset : offset + count]
        self.file.seek(offset)
        data = self.file.read(count)
        if len(data) != count:
            raise Corrupt(f"it ends too early: {count} bytes were expected at {offset}")
        return data

    def pieces(self, offset: int, count: int) -> Iterator[bytes]:
        """Yield `count` bytes from `offset` in pieces of at most CHUNK."""
        end = offset + count
        while offset < end:
            piece = self.at(offset, min(CHUNK, end - offset))
            yield piece
            offset += len(piece)
