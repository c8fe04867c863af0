"""
Pictures as they are when a generation is asked for.

The add-on writes `render.png` anew every 3 s, in place: whoever reads it in between has half a picture, and whoever
uploads it a minute later has another one than was meant. So a picture is read whole, checked, and kept under its hash
until nobody needs it any more; its own file is left alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from launcher.conjure.errors import PictureMissing
from runcomfy.adapters.files import (
    DISK,
    local_error,
    make_private_dir,
    open_regular,
    remove_quietly,
    write_atomically,
)
from runcomfy.adapters.media import check_input_image, likely_extension
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing, ValueInvalid, foreign_text

TRIES: Final = 40
PAUSE_SECONDS: Final = 0.1
"""Together longer than the add-on takes for one picture."""
MAX_BYTES: Final = 256 * 1024**2
_NO_FILE: Final = frozenset(
    getattr(errno, name)
    for name in "EINVAL EACCES EPERM ENXIO ENODEV ENAMETOOLONG ELOOP EISDIR".split()  # noqa: SIM905
    if hasattr(errno, name)
)
"""The path leads to no ordinary file that may be read: the caller's mistake, not this computer's."""
KEPT_SECONDS: Final = 30 * 24 * 3_600
"""Jobs of the queue may be run again from their inputs for so long."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A picture that no longer changes."""

    path: str
    sha256: str


def path_of(picture: Any) -> str:
    """Return the path that a caller gave, as text or as a path. Raises PictureMissing, ValueInvalid (it is none)."""
    name = os.fspath(picture) if isinstance(picture, (str, os.PathLike)) else None
    if not isinstance(name, str) or "\0" in name:
        raise ValueInvalid(f"{foreign_text(picture, 60)!r} is no path", hint="give the path of a picture")
    if not name:
        raise PictureMissing("no picture is named", hint="give the path of a picture")
    return name


def snapshot(picture: Path, folder: Path, *, max_pixels: int) -> Snapshot:
    """Keep the picture as it is now in `folder` and return the copy. Blocks, for some seconds at most.

    Raises PictureMissing, InputFileInvalid (no picture, or one that stays half-written), LocalError.
    """
    make_private_dir(folder)
    broken: InputFileInvalid | None = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_SECONDS)
        data = _read_still(picture)
        if data is None:
            continue
        try:
            return _keep(data, folder, max_pixels=max_pixels)
        except _Broken as error:
            broken = InputFileInvalid(
                error.of.message.replace(foreign_text(error.path, limit=512), foreign_text(str(picture), limit=512)),
                hint=error.of.hint,
                details=error.of.details,
            )
            if not _is_cut(data):
                break  # waiting would not make a picture of it
    raise broken or InputFileInvalid(
        f"{foreign_text(str(picture), limit=512)} is being written all the time",
        hint="wait until the program that writes it has ended",
    )


def _read_still(picture: Path) -> bytes | None:
    """Return the content, None if the file changed while it was read."""
    try:
        with open_regular(picture, follow=True) as file:
            before = os.fstat(file.fileno())
            if before.st_size > MAX_BYTES:
                raise InputFileInvalid(
                    f"{foreign_text(str(picture), limit=512)} is larger than {MAX_BYTES >> 20} MiB",
                    hint="make it smaller",
                )
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PictureMissing(
            f"there is no file {foreign_text(str(picture), limit=512)}", hint="check the path", details={}
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FILE:
            raise local_error(error, picture, "read") from error
        is_folder = os.path.isdir(picture)  # noqa: PTH112 - `Path.is_dir` fails for a path that is too long
        words = "is a folder, not a file" if is_folder else f"cannot be read: {foreign_text(error)}"
        raise InputFileMissing(f"{foreign_text(str(picture), limit=512)} {words}", hint="check the path") from error
    still = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size
    return data if still else None


def _is_cut(data: bytes) -> bool:
    """Whether it may be the beginning of a picture that is being written."""
    return not data or data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8"))


class _Broken(Exception):
    """What was read is no whole picture."""

    def __init__(self, of: InputFileInvalid, path: str) -> None:
        super().__init__(of.message)
        self.of, self.path = of, path


def _keep(data: bytes, folder: Path, *, max_pixels: int) -> Snapshot:
    """Keep a picture under its hash. Several callers may keep the same one at once. Raises _Broken, LocalError."""
    digest = hashlib.sha256(data).hexdigest()
    for found in folder.glob(f"{digest}.*"):
        with suppress(OSError, InputFileInvalid, InputFileMissing):  # then it is written anew
            check_input_image(found, max_pixels=max_pixels)
            os.utime(found)
            return Snapshot(str(found), digest)
    # Under a name of this call's own until it is known to be a picture, and which.
    own = folder / f".tmp-{uuid4().hex}"
    try:
        write_atomically(own, data, durable=False)
        try:
            check_input_image(own, max_pixels=max_pixels)
        except InputFileInvalid as error:
            raise _Broken(error, str(own)) from error
        final = folder / f"{digest}{likely_extension(own)}"
        DISK.replace(os.fspath(own), os.fspath(final))
    except OSError as error:
        raise local_error(error, folder, "write to") from error
    finally:
        remove_quietly(own)
    return Snapshot(str(final), digest)


def sweep(folder: Path, *, now: float | None = None) -> None:
    """Remove copies that nobody has asked for in a month. Never raises."""
    limit = (time.time() if now is None else now) - KEPT_SECONDS
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < limit:
                    path.unlink()
