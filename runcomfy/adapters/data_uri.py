"""
A picture as a data URI, for APIs that take files inside a request.

Its pixels are never changed, so that the same picture gives the same result wherever it runs. What is larger than is
advised is only packed more tightly; if it still is, it is sent as it is, up to what the API can take at all.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import time
from typing import Final

from runcomfy.adapters import media
from runcomfy.adapters.files import open_regular
from runcomfy.domain.exceptions import InputFileInvalid, foreign_text

ADVISED_BYTES: Final = 256 * 1024
"""Of a picture in a data URI (RunComfy's serverless pages)."""
MAX_BYTES: Final = 7 * 1024**2
"""Of a picture: as base64, and with the rest of the request, it stays below the 10 MB that the gateway takes."""
_TRIES: Final = 20
_PAUSE_SECONDS: Final = 0.1
"""CONJURE's add-on writes its render anew every 3 s, in place: half a picture is whole a moment later."""

_log = logging.getLogger("runcomfy.serverless")


def png_data_uri(path: str | os.PathLike[str], *, max_pixels: int) -> str:
    """Return the picture as `data:image/png;base64,…`; other formats become PNG. Blocks.

    Raises InputFileMissing, InputFileInvalid (not a whole picture, or too large for the API), LocalError.
    """
    data = _whole(path, max_pixels)
    if not data.startswith(b"\x89PNG") or len(data) > ADVISED_BYTES:
        packed = _packed(data)
        if not data.startswith(b"\x89PNG") or len(packed) < len(data):
            data = packed
    if len(data) > MAX_BYTES:
        raise InputFileInvalid(
            f"{foreign_text(os.fspath(path), 512)} has {len(data) / 1e6:.1f} MB as PNG; a serverless request takes "
            f"{MAX_BYTES / 1e6:.1f} MB",
            hint="make the picture smaller: RunComfy advises at most 256 KB",
            details={"size_bytes": len(data), "limit_bytes": MAX_BYTES},
        )
    if len(data) > ADVISED_BYTES:
        _log.info("picture_larger_than_advised", extra={"fields": {"bytes": len(data), "advised": ADVISED_BYTES}})
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _whole(path: str | os.PathLike[str], max_pixels: int) -> bytes:
    """Read the picture when it is whole."""
    for attempt in range(_TRIES):
        try:
            media.check_input_image(path, max_pixels)
            with open_regular(path, follow=True) as file:
                before = os.fstat(file.fileno()).st_mtime_ns
                data = file.read()
                if os.fstat(file.fileno()).st_mtime_ns == before and data:
                    return data
        except InputFileInvalid:
            if attempt == _TRIES - 1 or not _may_become_one(path):
                raise
        except OSError as error:
            raise media.input_error(error, path) from error
        time.sleep(_PAUSE_SECONDS)
    raise InputFileInvalid(
        f"{foreign_text(os.fspath(path), 512)} is being written all the time",
        hint="wait until the program that writes it has ended",
    )


def _may_become_one(path: str | os.PathLike[str]) -> bool:
    try:
        with open_regular(path, follow=True) as file:
            changed = time.time() - os.fstat(file.fileno()).st_mtime
            return changed < _TRIES * _PAUSE_SECONDS and file.read(4) in (b"", b"\x89PNG")
    except OSError:
        return False


def _packed(data: bytes) -> bytes:
    """Return the same pixels as a PNG, packed tightly. The picture was checked before."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)  # as ComfyUI does when it loads one
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            picture = picture.convert("RGB")
        target = io.BytesIO()
        picture.save(target, "PNG", optimize=True)
    return target.getvalue()
