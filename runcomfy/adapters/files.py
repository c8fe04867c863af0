"""
Files on this computer, written whole or not at all.

Every durable file of ours goes through `write_atomically`; every name made from a text that came from outside goes
through `safe_name`. All functions block: callers on the event loop run them in a thread. What a file means (settings,
state, results) is left to the callers.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import BinaryIO, Final

from runcomfy.domain.exceptions import DiskFull, LocalError, foreign_text

PRIVATE_FILE: Final = 0o600
PRIVATE_DIR: Final = 0o700

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""Disk full, file too big for the file system or the process's limit, quota used up: all mean "no room"."""

EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""No more open files or memory."""

_NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)
_OPEN_FLAGS: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_DIRECTORY_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS})
_SHARING_RETRIES: Final = 10
_SHARING_PAUSE_SECONDS: Final = 0.02
"""Windows refuses to replace a file that a virus scanner or a reader holds open; they let go within milliseconds."""


class Disk:
    """The calls that make a file final. Its failures cannot be provoked on a healthy disk, so tests replace it."""

    def fsync(self, fd: int) -> None:
        """Flush an open file to the disk."""
        os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        """Rename; `target` must not exist."""
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "there is already a file of that name", target)
        os.rename(source, target)  # noqa: PTH104 - this is the call that stands behind the seam

    def replace(self, source: str, target: str) -> None:
        """Rename over `target`, in one step for every reader."""
        for _ in range(_SHARING_RETRIES if os.name == "nt" else 0):
            try:
                os.replace(source, target)  # noqa: PTH105
            except PermissionError:
                time.sleep(_SHARING_PAUSE_SECONDS)
            else:
                return
        os.replace(source, target)  # noqa: PTH105

    def fsync_directory(self, path: str) -> None:
        """Flush a directory's names to the disk, where the operating system can (Windows cannot)."""
        if os.name == "nt":
            return
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network and FUSE file systems have no such operation; their renames are as durable as they get.
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(fd)


DISK: Final = Disk()


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says nothing of the file: this process, or the computer, has no handles or memory left."""
    return isinstance(error, OSError) and error.errno in EXHAUSTED


def local_error(error: OSError, path: str | os.PathLike[str], doing: str) -> LocalError:
    """Return what an operating system error means to us: DiskFull or LocalError, with the path and what to do.

    `doing` completes the sentence "could not ...".
    """
    shown = foreign_text(os.fspath(path), limit=1024)
    reason = foreign_text(error.strerror or str(error))
    details = {"path": shown, "errno": errno.errorcode.get(error.errno or 0, "")}
    if error.errno in NO_ROOM:
        return DiskFull(
            f"could not {doing} {shown}: {reason}",
            hint="free some space on that disk, or choose another folder (--out, RUNCOMFY_STATE_DIR)",
            details=details,
        )
    hint = "check that the folder exists and that you may write to it, or choose another one"
    if isinstance(error, PermissionError):
        hint = "check who owns the folder and its permissions, or choose another one"
    elif is_exhausted(error):
        hint = "let this program have more open files (ulimit -n) or memory, or give it less to do at once"
    return LocalError(f"could not {doing} {shown}: {reason}", hint=hint, details=details)


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | str,
    *,
    mode: int = PRIVATE_FILE,
    durable: bool = True,
    disk: Disk = DISK,
) -> None:
    """Write a file so that every reader, at every moment, sees the old content or the new one, whole.

    Text is written as UTF-8. `durable` flushes file and directory to the disk before returning. The file is created
    private and only then opened up to `mode`. A symbolic link at `path` is replaced, not followed.

    Raises DiskFull, LocalError; the old content is then still there, and nothing else is left behind.
    """
    target = os.fspath(path)
    folder = os.path.dirname(target) or os.curdir  # noqa: PTH120 - text in, text out: no Path round trip
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            if mode != PRIVATE_FILE:
                Path(temporary).chmod(mode)
            if durable:
                disk.fsync(file.fileno())
        disk.replace(temporary, target)
        temporary = ""
        if durable:
            disk.fsync_directory(folder)
    except OSError as error:
        raise local_error(error, target, "write") from error
    finally:
        if temporary:
            remove_quietly(temporary)


def fsync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory's names to the disk, where the operating system can. Raises LocalError, DiskFull."""
    try:
        DISK.fsync_directory(os.fspath(path))
    except OSError as error:
        raise local_error(error, path, "flush") from error


def make_private_dir(path: str | os.PathLike[str]) -> Path:
    """Make a folder, and its missing parents, that only this user can enter; return it.

    A folder that is there already is left as it is. Raises LocalError (a file or a dangling link is in the way, no
    permission), DiskFull.
    """
    folder = Path(path)
    try:
        missing = [folder]
        while not missing[-1].is_dir() and missing[-1].parent != missing[-1]:
            missing.append(missing[-1].parent)
        for each in reversed(missing[:-1]):
            # Created closed; a later chmod would leave a moment in which others can look in.
            each.mkdir(mode=PRIVATE_DIR, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    except OSError as error:
        raise local_error(error, folder, "make the folder") from error
    return folder


def open_new(path: str | os.PathLike[str]) -> BinaryIO:
    """Create a private file for writing and reading; it must not exist, not even as a link. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _OPEN_FLAGS
    return os.fdopen(os.open(os.fspath(path), flags, PRIVATE_FILE), "w+b")


def open_regular(path: str | os.PathLike[str], *, follow: bool = False, writable: bool = False) -> BinaryIO:
    """Open an existing ordinary file; never waits for a pipe or a device, follows a link only if told to.

    Raises OSError: a link, folder, pipe or device counts as EINVAL.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | _OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0)
    name = os.fspath(path)
    if not follow and os.path.islink(name):  # noqa: PTH114 - where O_NOFOLLOW is missing, this is all there is
        raise OSError(errno.EINVAL, "is a link", name)
    fd = os.open(name, flags if follow else flags | _NO_FOLLOW)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not an ordinary file", name)
    return os.fdopen(fd, "r+b" if writable else "rb")


def remove_quietly(path: str | os.PathLike[str]) -> None:
    """Remove a file of ours if it can be removed. What stays behind is litter, not a result."""
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError:
        return


_RESERVED: Final = frozenset(
    {"con", "prn", "aux", "nul", "conin$", "conout$", "clock$"}
    | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}
)
"""Names that are devices on Windows, with any extension (Microsoft: Naming Files, Paths, and Namespaces)."""

_FORBIDDEN: Final = re.compile(r'[<>:"/\\|?*%~$`]')
_EXTENSION: Final = re.compile(r"\.[A-Za-z0-9]{1,12}\Z")


def safe_name(text: str, *, limit: int = 80, fallback: str = "file") -> str:
    """Return a file name made from foreign text that is one plain name on every system.

    No separator, drive, control or invisible character; no leading dot, dash or space, no trailing dot or space; no
    Windows device; at most `limit` bytes of UTF-8 with its extension kept. Compatibility forms are folded first: a
    full-width slash is a slash. Different texts may give the same name.
    """
    folded = unicodedata.normalize("NFKC", text[:4096])
    plain = "".join("_" if unicodedata.category(c)[0] in "CZ" and c != " " else c for c in folded)
    name = _FORBIDDEN.sub("_", plain).lstrip(". -").rstrip(". ")
    found = _EXTENSION.search(name)
    extension = found.group() if found else ""
    stem = name.removesuffix(extension) if extension else name
    stem = stem.encode()[: max(1, limit - len(extension))].decode(errors="ignore").rstrip(". ")
    if stem.split(".")[0].strip().lower() in _RESERVED:
        stem = f"_{stem}"
    if not stem.strip("_. "):
        stem = fallback
    return stem + extension
