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
from typing import Final

from launcher.conjure.errors import PictureMissing
from runcomfy.adapters.files import local_error, make_private_dir, open_regular, write_atomically
from runcomfy.adapters.media import check_input_image, likely_extension
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing, foreign_text

TRIES: Final = 40
PAUSE_SECONDS: Final = 0.1
"""Together longer than the add-on takes for one picture."""
MAX_BYTES: Final = 256 * 1024**2
KEPT_SECONDS: Final = 30 * 24 * 3_600
"""Jobs of the queue may be run again from their inputs for so long."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A picture that no longer changes."""

    path: str
    sha256: str


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
        kept = _keep(data, folder)
        try:
            check_input_image(kept, max_pixels=max_pixels)
        except InputFileInvalid as error:
            _forget(kept)
            broken = InputFileInvalid(
                error.message.replace(foreign_text(str(kept), limit=512), foreign_text(str(picture), limit=512)),
                hint=error.hint,
                details=error.details,
            )
            if not _is_cut(data):
                break  # waiting would not make a picture of it
            continue
        return Snapshot(str(kept), kept.stem)
    raise broken or InputFileInvalid(
        f"{foreign_text(str(picture), limit=512)} is being written all the time",
        hint="wait until the program that writes it has ended",
    )


def _read_still(picture: Path) -> bytes | None:
    """Return the content, None if the file changed while it was read."""
    try:
        with open_regular(picture, follow=True) as file:
            before = os.fstat(file.fileno())
            data = file.read(MAX_BYTES + 1)
            after = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise PictureMissing(
            f"there is no file {foreign_text(str(picture), limit=512)}", hint="check the path", details={}
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EACCES, errno.EPERM):
            raise local_error(error, picture, "read") from error
        words = "is a folder, not a file" if picture.is_dir() else f"cannot be read: {foreign_text(error)}"
        raise InputFileMissing(f"{foreign_text(str(picture), limit=512)} {words}", hint="check the path") from error
    if len(data) > MAX_BYTES:
        raise InputFileInvalid(
            f"{foreign_text(str(picture), limit=512)} is larger than {MAX_BYTES >> 20} MiB", hint="make it smaller"
        )
    still = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size
    return data if still else None


def _is_cut(data: bytes) -> bool:
    """Whether it may be the beginning of a picture that is being written."""
    return not data or data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF", b"GIF8"))


def _keep(data: bytes, folder: Path) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    raw = folder / f"{digest}.bin"
    found = next((path for path in folder.glob(f"{digest}.*") if path.suffix != ".bin"), None)
    if found is not None:
        with suppress(OSError):
            os.utime(found)
        return found
    write_atomically(raw, data, durable=False)
    final = raw.with_suffix(likely_extension(raw)) if data else raw
    if final != raw:
        try:
            raw.replace(final)
        except OSError as error:
            raise local_error(error, final, "write") from error
    return final


def _forget(kept: Path) -> None:
    with suppress(OSError):
        kept.unlink()


def sweep(folder: Path, *, now: float | None = None) -> None:
    """Remove copies that nobody has asked for in a month. Never raises."""
    limit = (time.time() if now is None else now) - KEPT_SECONDS
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < limit:
                    path.unlink()
