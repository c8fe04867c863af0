"""
Pictures as they are when a generation is asked for.

The add-on writes `render.png` anew every 3 s, in place: whoever reads it in between has half a picture, and whoever
uploads it a minute later has another one than was meant. So a picture is read whole, checked, and kept under its hash
until nobody needs it any more; its own file is left alone.
"""

from __future__ import annotations

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
    remove_quietly,
    write_atomically,
)
from runcomfy.adapters.media import check_input_image, likely_extension
from runcomfy.conjure.files import PAUSE_SECONDS, TRIES, read_still
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing, ValueInvalid, foreign_text

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
        data = read_still(picture, missing=PictureMissing)
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
