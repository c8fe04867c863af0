"""
CONJURE's fixed files, relative to the working directory: its prompt and render, which are only ever read, and the
places where it looks for results.

A result gets there as a copy: written beside its place, flushed, compared with the hash that was recorded when it was
verified, and then renamed over what was there.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from runcomfy.adapters.files import (
    DISK,
    fsync_directory,
    local_error,
    open_regular,
    remove_quietly,
    write_atomically,
)
from runcomfy.adapters.media import check_input_image
from runcomfy.domain.exceptions import (
    DownloadFailed,
    InputFileInvalid,
    InputFileMissing,
    OutputMissing,
    WorkflowNotFound,
    foreign_text,
)

USER_PROMPT: Final = Path("data", "generated_text", "userPrompt.txt")
RENDER: Final = Path("data", "generated_images", "gestureCamera", "render.png")
FLUX_IMAGE: Final = Path("data", "generated_images", "flux", "flux.png")
MODELS: Final = Path("data", "generated_models")
MESH: Final = Path("partpacker_results", "partpacker_result_0.glb")
"""Below the folder of models."""

SHARED_FILE: Final = 0o644
"""CONJURE, Blender and its add-on read results; they may run as another user."""
MAX_PROMPT_BYTES: Final = 256 * 1024
MAX_PICTURE_BYTES: Final = 256 * 1024**2
MAX_GRAPH_BYTES: Final = 16 * 1024**2
TRIES: Final = 40
PAUSE_SECONDS: Final = 0.1
"""Together longer than the add-on takes to write its render, which it does every 3 s."""
_CHUNK: Final = 1 << 20
_NO_FILE: Final = frozenset(
    getattr(errno, name)
    for name in "EINVAL EACCES EPERM ENXIO ENODEV ENAMETOOLONG ELOOP EISDIR".split()  # noqa: SIM905
    if hasattr(errno, name)
)
"""The path leads to no ordinary file that may be read: the caller's mistake, not this computer's."""


# -- what is read ------------------------------------------------------------------------------------------


def read_prompt(path: Path = USER_PROMPT) -> str:
    """Return the user's prompt, empty if there is none. Blocks. Raises LocalError."""
    try:
        with open_regular(path, follow=True) as file:
            return file.read(MAX_PROMPT_BYTES).decode("utf-8-sig", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise local_error(error, path, "read") from error


def read_graph(path: Path) -> bytes:
    """Return a workflow file's content. Blocks. Raises WorkflowNotFound, LocalError."""
    try:
        with open_regular(path, follow=True) as file:
            return file.read(MAX_GRAPH_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WorkflowNotFound(
            f"there is no workflow file {foreign_text(path, 500)}", hint="give the path of a file in API format"
        ) from error
    except OSError as error:
        raise local_error(error, path, "read") from error


async def copy_picture(picture: Path, copy: Path, *, max_pixels: int) -> None:
    """Copy a picture as it is now; one that is being written is waited for, some seconds at most.

    Raises InputFileMissing, InputFileInvalid, LocalError.
    """
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(PAUSE_SECONDS)
        data = await asyncio.to_thread(read_still, picture)
        if data is None:
            continue
        await asyncio.to_thread(write_atomically, copy, data, durable=False)
        try:
            await asyncio.to_thread(check_input_image, copy, max_pixels)
        except InputFileInvalid as error:
            if attempt == TRIES - 1:
                message = error.message.replace(str(copy), str(picture))
                raise InputFileInvalid(message, hint=error.hint, details=error.details) from error
            continue
        return
    raise InputFileInvalid(
        f"{foreign_text(picture, 500)} is being written all the time",
        hint="wait until the program that writes it has ended",
    )


def read_still(picture: Path, *, missing: type[InputFileMissing] = InputFileMissing) -> bytes | None:
    """Return a picture's content; None if the file changed while it was read. Blocks.

    Raises `missing` (there is none), InputFileMissing (it leads to no file that may be read), InputFileInvalid (too
    large), LocalError.
    """
    shown = foreign_text(str(picture), limit=512)
    try:
        with open_regular(picture, follow=True) as file:
            before = os.fstat(file.fileno())
            if before.st_size > MAX_PICTURE_BYTES:
                raise InputFileInvalid(f"{shown} is larger than {MAX_PICTURE_BYTES >> 20} MiB", hint="make it smaller")
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(f"there is no file {shown}", hint="check the path") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FILE:
            raise local_error(error, picture, "read") from error
        is_folder = os.path.isdir(picture)  # noqa: PTH112 - `Path.is_dir` fails for a path that is too long
        words = "is a folder, not a file" if is_folder else f"cannot be read: {foreign_text(error)}"
        raise InputFileMissing(f"{shown} {words}", hint="check the path") from error
    still = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size
    return data if still else None


# -- what is written ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """A file whose content is known: a job's result, or a kept copy of one."""

    path: str
    size_bytes: int
    sha256: str


def publish(results: Mapping[Path, Verified]) -> None:
    """Put copies of results at their places: all are written and compared before the first is renamed. Blocks.

    Raises OutputMissing (a result is gone), DownloadFailed (it is no longer what was verified), DiskFull, LocalError;
    nothing is replaced then.
    """
    waiting: list[tuple[str, Path]] = []
    try:
        for place, result in results.items():
            make_shared_dir(place.parent)
            waiting.append((copy_verified(result, place.parent), place))
        for temporary, place in waiting:
            try:
                DISK.replace(temporary, os.fspath(place))
            except OSError as error:
                raise local_error(error, place, "replace") from error
        _flush_folders(place.parent for _, place in waiting)
    finally:
        for temporary, _ in waiting:
            remove_quietly(temporary)


def make_shared_dir(folder: Path) -> None:
    """Make a folder of the project, with the permissions its other folders get. Raises LocalError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise local_error(error, folder, "make the folder") from error


def copy_verified(result: Verified, folder: Path, *, mode: int = SHARED_FILE) -> str:
    """Copy a result into a temporary file of the folder and compare it; return the file's path.

    Raises OutputMissing, DownloadFailed, DiskFull, LocalError; nothing is left behind then.
    """
    temporary, shown = "", foreign_text(result.path, limit=512)
    try:
        try:
            source = open_regular(result.path)
        except FileNotFoundError as error:
            raise OutputMissing(f"the result {shown} is gone", hint="run the generation again") from error
        with source:
            fd, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
            with os.fdopen(fd, "wb") as target:
                found = _copy(source, target)
                target.flush()
                os.fsync(target.fileno())
        if found != (result.size_bytes, result.sha256):
            raise DownloadFailed(
                f"{shown} is not what was verified: it has changed since",
                hint="run the generation again",
                details={"path": result.path},
            )
        Path(temporary).chmod(mode)
    except OSError as error:
        remove_quietly(temporary)
        raise local_error(error, folder, "write to") from error
    except BaseException:
        remove_quietly(temporary)
        raise
    return temporary


def _copy(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def verified(path: Path) -> Verified | None:
    """Return what a file holds now; None if it cannot be read. Blocks."""
    try:
        with open_regular(path) as file:
            digest, size = hashlib.sha256(), 0
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError:
        return None
    return Verified(str(path), size, digest.hexdigest())


def _flush_folders(folders: Iterable[Path]) -> None:
    for folder in set(folders):
        with suppress(Exception):  # the files themselves are flushed, and their names are there
            fsync_directory(folder)
