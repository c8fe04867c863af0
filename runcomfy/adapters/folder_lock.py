"""
One process per folder: a lock file that the operating system frees when the process ends, however it ends.

The file says who holds it, for whoever comes second. It is never removed: a file that is removed while somebody waits
for its lock can be held twice.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Final

from runcomfy.adapters.files import PRIVATE_FILE, local_error
from runcomfy.domain.exceptions import FolderWatched, foreign_text

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_NAME: Final = ".monitor.lock"
_BYTE: Final = 1 << 30
"""Windows locks bytes, and what is locked cannot be read by others: this one is far behind the words."""
_HELD: Final = frozenset({errno.EACCES, errno.EAGAIN, errno.EDEADLK})
_NOT_KNOWN: Final = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_TRIES: Final = 5


class FolderLock:
    """The lock of one folder. Every method blocks."""

    def __init__(self, folder: Path, *, name: str = LOCK_NAME) -> None:
        """`name`: of the lock's file; a folder may have several locks."""
        self._path = folder / name
        self._fd: int | None = None

    def take(self) -> bool:
        """Hold the folder; harmless when held already. False: this file system has no locks, so nothing is held.

        Raises FolderWatched, LocalError.
        """
        if self._fd is not None:
            if self._is_current(self._fd):
                return True
            self.release()  # the folder was removed and made again: that is another lock
        for _ in range(_TRIES):
            fd = self._open()
            try:
                locked = self._lock(fd)
            except BaseException:
                os.close(fd)
                raise
            if not locked:
                os.close(fd)
                return False
            if self._is_current(fd):
                self._fd = fd
                self._sign(fd)
                return True
            os.close(fd)  # removed between opening and locking
        raise FolderWatched(f"{self._path} is removed again and again", hint="see who cleans up that folder")

    def release(self) -> None:
        """Let go. Harmless when repeated."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            os.ftruncate(fd, 0)
            if sys.platform == "win32":
                os.lseek(fd, _BYTE, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
        except OSError:
            pass  # closing frees it
        finally:
            os.close(fd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT
        for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY", "O_NOINHERIT"):
            flags |= getattr(os, name, 0)
        try:
            return os.open(self._path, flags, PRIVATE_FILE)
        except OSError as error:
            raise local_error(error, self._path, "lock") from error

    def _lock(self, fd: int) -> bool:
        try:
            if sys.platform == "win32":
                os.lseek(fd, _BYTE, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise self._watched(fd) from None
            if error.errno in _NOT_KNOWN:
                return False
            raise local_error(error, self._path, "lock") from error
        return True

    def _is_current(self, fd: int) -> bool:
        try:
            there = self._path.stat(follow_symlinks=False)
        except OSError:
            return False
        mine = os.fstat(fd)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _sign(self, fd: int) -> None:
        words = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n"
        try:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, words)
        except OSError:
            return  # who holds it is a courtesy; that it is held counts

    def _watched(self, fd: int) -> FolderWatched:
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            facts = json.loads(os.read(fd, 1_000))
            pid, host = int(facts["pid"]), foreign_text(facts["host"], 80)
        except (OSError, ValueError, KeyError, TypeError):
            who, details = "another process", {}
        else:
            who, details = f"process {pid} on {host}", {"pid": pid, "host": host}
        return FolderWatched(
            f"{self._path.parent} is watched already, by {who}",
            hint="one monitor serves any number of executors: start this one with `comfyctl agent execute`, or stop "
            "the other one first",
            details={"folder": str(self._path.parent), **details},
        )
