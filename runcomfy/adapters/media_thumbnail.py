"""
Small pictures of pictures, for lists that people look at.

The size in the header is looked at before anything is decoded, and Pillow is only offered the format that was found.
Everything here blocks: callers on the event loop run it in a thread.
"""

from __future__ import annotations

import io
import os
import threading
from typing import BinaryIO, Final

from runcomfy.adapters import media_picture
from runcomfy.adapters.files import is_exhausted, local_error, open_regular, write_atomically
from runcomfy.adapters.media_sniff import sniff
from runcomfy.adapters.media_source import Corrupt, Source
from runcomfy.domain.exceptions import OutputCorrupt, foreign_text

SIDE: Final = 320
"""Pixels of the longer side."""
MOST_PIXELS: Final = 64_000_000
_AT_ONCE: Final = threading.BoundedSemaphore(2)
"""Many large pictures decoded at once would add up to gigabytes."""


def thumbnail(path: str | os.PathLike[str], target: str | os.PathLike[str], *, max_pixels: int = MOST_PIXELS) -> None:
    """Write a WEBP of at most 320 pixels a side of the picture at `path` to `target`, whole or not at all.

    Raises OutputCorrupt (it is no picture, a broken one, or one of more than `max_pixels`), LocalError, DiskFull.
    """
    try:
        with open_regular(path) as file:
            source = Source(file)
            found = sniff(source)
            if not found.picture:
                raise Corrupt(f"it is {found.words}, not a picture")
            header = media_picture.read_header(source, found.picture, max_pixels=max_pixels, whole=False)
            with _AT_ONCE:
                file.seek(0)
                data = _small(file, header.format)
    except Corrupt as error:
        raise OutputCorrupt(f"no small picture can be made: {foreign_text(error)}") from error
    except OSError as error:
        raise local_error(error, path, "read") from error
    write_atomically(target, data)


def _small(file: BinaryIO, form: str) -> bytes:
    from PIL import Image

    try:
        with Image.open(file, formats=[form]) as opened:
            opened.draft("RGB", (SIDE * 2, SIDE * 2))
            has_alpha = opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info
            picture = opened.convert("RGBA" if has_alpha else "RGB")
            picture.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", quality=80, method=2)
            return buffer.getvalue()
    except Exception as error:
        if is_exhausted(error):
            raise
        raise Corrupt(f"it cannot be decoded ({str(error) or type(error).__name__})") from error
