"""
CONJURE's fixed files, relative to the working directory: its prompt and render, which are only ever read, and the
places where it looks for results.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Final

from runcomfy.adapters.files import local_error, open_regular, write_atomically
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
        data = await asyncio.to_thread(_read_still, picture)
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


def _read_still(picture: Path) -> bytes | None:
    """Return the content; None if the file changed while it was read."""
    try:
        with open_regular(picture, follow=True) as file:
            before = os.fstat(file.fileno())
            data = file.read(MAX_PICTURE_BYTES + 1)
            after = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputFileMissing(f"there is no file {foreign_text(picture, 500)}", hint="check the path") from error
    except OSError as error:
        raise local_error(error, picture, "read") from error
    if len(data) > MAX_PICTURE_BYTES:
        raise InputFileInvalid(f"{foreign_text(picture, 500)} is too large for a picture", hint="make it smaller")
    still = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and len(data) == after.st_size
    return data if still else None


def put_result(source: str, place: Path, *, sha256: str | None = None) -> None:
    """Put a copy of a verified result where CONJURE looks for it, whole or not at all. Blocks.

    Raises OutputMissing, DownloadFailed (it is no longer what was verified), DiskFull, LocalError.
    """
    try:
        with open_regular(source) as file:
            data = file.read()
    except FileNotFoundError as error:
        raise OutputMissing(
            f"the result {foreign_text(source, 500)} is gone", hint="run the generation again"
        ) from error
    except OSError as error:
        raise local_error(error, source, "read") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DownloadFailed(
            f"{foreign_text(source, 500)} is not what was verified: it has changed since",
            hint="run the generation again",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise local_error(error, place.parent, "make the folder") from error
    write_atomically(place, data, mode=SHARED_FILE)
