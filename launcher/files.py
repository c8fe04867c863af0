"""
Files for clients: whole or in ranges, and only those that still are what was verified.

A result is known by its size and its SHA-256. A file that has another size, or another content, is not sent: what
was written down as a result must not be something else by the time it is fetched. What was hashed once is not hashed
again until the file itself changes. The media type is what our own inspection found, never what a server said; nothing
that is sent may run as a page.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from launcher.errors import Gone, NotFound, plain_body
from launcher.listening import is_watched
from runcomfy.adapters.files import local_error, make_private_dir, open_regular, remove_quietly, safe_name
from runcomfy.adapters.media_thumbnail import thumbnail
from runcomfy.domain.exceptions import OutputCorrupt

log = logging.getLogger("runcomfy.http")

CHUNK: Final = 256 * 1024
ROOM_TAKES: Final = 10
"""Times the patience with a client, until there is room for another piece: systems hold megabytes for a slow line."""
KNOWN_MOST: Final = 4_096
THUMBNAILS: Final = "thumbnails"
THUMBNAIL_KEPT_S: Final = 30 * 24 * 3600.0
"""After it was last looked at; it is made anew if somebody wants it again."""
THUMBNAILS_MOST: Final = 256 * 1024**2
"""Bytes of all of them: some tens of thousands."""

SAFE_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_RANGE: Final = re.compile(r"\s*bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*\Z")

NOTHING: Final = (0, 0)

Mark = tuple[str, int, int, int, int, int]
"""Of an open file: path, device, number, size, times of change in nanoseconds; of these anybody can set the first back,
nobody the second."""

_HASHED: Final[OrderedDict[Mark, str]] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file that a client may have."""

    path: str
    name: str
    """What it is called on the client's side."""
    media_type: str
    size_bytes: int | None = None
    """As it was verified; None: it was not (an input)."""
    sha256: str | None = None


async def send_file(request: Request, wanted: Wanted, *, patience: timedelta, download: bool = False) -> Response:
    """Return the answer: the file, a range of it, 304 or 416; `patience` is for a client that takes nothing of it.

    Raises Gone.
    """
    file, size, sha256 = await asyncio.to_thread(_open_verified, wanted)
    etag = f'"{sha256}"'
    headers = {
        **SAFE_HEADERS,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": disposition(wanted.name, download=download),
    }
    if _matches(request.headers.get("if-none-match"), etag):
        await asyncio.to_thread(file.close)
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", etag) == etag:
        found = range_of(asked, size)
        if found == NOTHING:
            await asyncio.to_thread(file.close)
            body = plain_body("range-not-satisfiable", f"the file has {size} bytes", "ask for a range inside it")
            return JSONResponse(body, 416, headers={**SAFE_HEADERS, "Content-Range": f"bytes */{size}"})
        if found is not None:
            start, end, status = *found, 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    return _OpenFile(file, start, end, status, headers=headers, media_type=wanted.media_type, patience=patience)


class _OpenFile(StreamingResponse):
    """The bytes of a file that is open already: what is sent is what was verified."""

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        end: int,
        status: int,
        *,
        headers: dict[str, str],
        media_type: str,
        patience: timedelta,
    ) -> None:
        super().__init__(_pieces(file, start, end), status, headers=headers, media_type=media_type)
        self._file, self._patience = file, patience.total_seconds()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the file is closed however that ends."""

        async def in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._patience * ROOM_TAKES):
                    await send(message)
            except TimeoutError as error:
                raise _Stalled from error

        try:
            # Our own server looks at the bytes that are taken; another one's only word is that there is room again.
            await super().__call__(scope, receive, send if is_watched(scope) else in_time)
        except _Stalled:
            log.info("client_given_up", extra={"fields": {"seconds": self._patience}})
        finally:
            self._file.close()


class _Stalled(Exception):
    """Nothing can be said any more to a client that takes nothing."""


def range_of(text: str, size: int) -> tuple[int, int] | None:
    """Return (first, behind the last) of a `Range` header; NOTHING if it has none of the file; None: send all of it.

    Several ranges at once, other units and what cannot be read count as no range (RFC 9110, 14.2).
    """
    found = _RANGE.match(text)
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        length = int(found[2])
        return (max(0, size - length), size) if length and size else NOTHING
    first = int(found[1])
    last = int(found[2]) if found[2] else size - 1
    if found[2] and last < first:
        return None
    return (first, min(last, size - 1) + 1) if first < size else NOTHING


def disposition(name: str, *, download: bool) -> str:
    """Return a Content-Disposition that no name can break out of."""
    plain = safe_name(name)
    ascii_name = plain.encode("ascii", "replace").decode().replace("?", "_").replace('"', "_").replace("\\", "_")
    return (
        f"{'attachment' if download else 'inline'}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(plain, safe='')}"
    )


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in header.split(","))


def _open_verified(wanted: Wanted) -> tuple[BinaryIO, int, str]:
    """Open the file that was verified. Raises Gone."""
    try:
        file = open_regular(wanted.path)
    except (OSError, ValueError) as error:
        raise Gone(f"{safe_name(wanted.name)} is no longer there", hint="it was moved, removed or replaced") from error
    try:
        size = os.fstat(file.fileno()).st_size
        if wanted.size_bytes is not None and size != wanted.size_bytes:
            raise _changed(wanted)
        sha256 = _hash(file, wanted.path)
        if wanted.sha256 is not None and sha256 != wanted.sha256:
            raise _changed(wanted)
        file.seek(0)
    except OSError as error:
        file.close()
        raise Gone(f"{safe_name(wanted.name)} cannot be read now", hint="look at the server's disk") from error
    except BaseException:
        file.close()
        raise
    return file, size, sha256


def _changed(wanted: Wanted) -> Gone:
    return Gone(
        f"{safe_name(wanted.name)} is not the file any more that was verified",
        hint="somebody changed it on the server; run the job again",
    )


def _hash(file: BinaryIO, path: str) -> str:
    stat = os.fstat(file.fileno())
    mark = (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    known = _HASHED.get(mark)
    if known is None:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        known = digest.hexdigest()
        _HASHED[mark] = known
        while len(_HASHED) > KNOWN_MOST:
            _HASHED.popitem(last=False)
    return known


async def _pieces(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    await asyncio.to_thread(file.seek, start)
    left = end - start
    while left > 0:
        piece = await asyncio.to_thread(file.read, min(CHUNK, left))
        if not piece:
            return  # it was cut meanwhile: the client sees that the length does not fit
        left -= len(piece)
        yield piece


# -- thumbnails --------------------------------------------------------------------------------------------


async def send_thumbnail(state_dir: str, wanted: Wanted) -> Response:
    """Return a small picture of a picture, made once; always whole. Raises NotFound (it is none), Gone, LocalError."""
    data, sha256 = await asyncio.to_thread(_thumbnail, state_dir, wanted)
    headers = {**SAFE_HEADERS, "ETag": f'"{sha256}-small"', "Cache-Control": "private, max-age=3600"}
    return Response(data, media_type="image/webp", headers=headers)


def _thumbnail(state_dir: str, wanted: Wanted) -> tuple[bytes, str]:
    file, _, sha256 = _open_verified(wanted)
    file.close()
    target = make_private_dir(Path(state_dir) / THUMBNAILS) / f"{sha256}.webp"
    if not target.is_file():
        try:
            thumbnail(wanted.path, target)
        except OutputCorrupt as error:
            raise NotFound(error.message, hint="only pictures have a small picture") from error
    with suppress(OSError):
        os.utime(target)  # who is looked at stays
    try:
        return target.read_bytes(), sha256
    except OSError as error:
        raise local_error(error, target, "read") from error


def sweep_thumbnails(state_dir: str, *, now: float | None = None) -> int:
    """Remove small pictures that nobody looked at for long, and the oldest of too many; return how many. Blocks.

    `now` in seconds since 1970, as the disk has.
    """
    now = time.time() if now is None else now
    there: list[tuple[float, int, Path]] = []
    with suppress(OSError):
        for path in (Path(state_dir) / THUMBNAILS).iterdir():
            with suppress(OSError):
                stat = path.lstat()
                there.append((stat.st_mtime, stat.st_size, path))
    there.sort(reverse=True)
    room, gone = THUMBNAILS_MOST, [path for at, _, path in there if now - at >= THUMBNAIL_KEPT_S]
    for at, size, path in there:
        room -= size
        if room < 0 and now - at < THUMBNAIL_KEPT_S:
            gone.append(path)
    for path in gone:
        remove_quietly(path)
    return len(gone)
