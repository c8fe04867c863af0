"""
Puts input files onto a ComfyUI server under names made of their content.

A name that begins with the content's hash cannot be taken by another content, so a lost answer can be repeated and a
prompt that waits cannot find its input replaced. An upload counts once the server is seen to hold every byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import unicodedata
from dataclasses import dataclass
from typing import IO, Final

import aiohttp

from runcomfy.adapters.comfyui.download import view_path
from runcomfy.adapters.comfyui.exchange import Answer, Exchange
from runcomfy.adapters.files import is_exhausted, local_error, open_regular
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    InputFileInvalid,
    InputFileMissing,
    NotComfyUI,
    ServerUnreachable,
    foreign_text,
)
from runcomfy.domain.job import FileRef

HASH_DIGITS: Final = 20
NAME_BYTES: Final = 120
"""Of the original name, in UTF-8: with the hash and a possible " (1)" it stays below the 255 of file systems."""
FORM_BYTES: Final = 2048
"""More than the form around the file takes; the server's limit is for the whole request."""
IN_MEMORY_BYTES: Final = 8 * 1024 * 1024
_SLOWEST_BYTES_PER_SECOND: Final = 64 * 1024
"""An upload slower than this is given up (a house's uplink has ten times as much)."""
_FORBIDDEN: Final = frozenset("\"'\\/:*?<>|`")


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be uploaded. `data` is held for small files, so that what was hashed is what is sent."""

    path: str
    sha256: str
    size_bytes: int
    data: bytes | None
    stamp: tuple[int, int]

    @property
    def name(self) -> str:
        """The content-addressed name."""
        return f"{self.sha256[:HASH_DIGITS]}_{clean_name(os.path.basename(self.path))}"  # noqa: PTH119


def clean_name(name: str) -> str:
    """Return a file name that survives form headers, the server and any file system; its extension is kept."""
    text = unicodedata.normalize("NFC", name)
    text = "".join("_" if c in _FORBIDDEN else c for c in text if unicodedata.category(c)[0] != "C")
    # Brackets at the end would be read as a folder ("name [output]"); two dots anywhere are refused by the server.
    text = text.replace("[", "(").replace("]", ")").strip(". \t")
    while ".." in text:
        text = text.replace("..", ".")
    stem, dot, extension = text.rpartition(".")
    if not dot or len(extension.encode()) > 16:
        stem, extension = text, ""
    else:
        extension = dot + extension
    room = NAME_BYTES - len(extension.encode())
    stem = stem.encode()[:room].decode("utf-8", "ignore").strip(". \t")
    return (stem or "file") + extension


def read_content(path: str) -> Content:
    """Hash a file; blocks. Raises InputFileMissing, InputFileInvalid."""
    try:
        with open_regular(path, follow=True) as file:
            before = os.fstat(file.fileno())
            data = file.read(IN_MEMORY_BYTES + 1)
            digest = hashlib.sha256(data)
            size = len(data)
            whole = size <= IN_MEMORY_BYTES
            if not whole:
                while part := file.read(1024 * 1024):
                    digest.update(part)
                    size += len(part)
    except FileNotFoundError:
        raise InputFileMissing(f"there is no file {shown_path(path)}", hint="check the path") from None
    except OSError as error:
        if is_exhausted(error):
            raise local_error(error, path, "read") from None
        reason = foreign_text(error.strerror or type(error).__name__)
        raise InputFileMissing(
            f"{shown_path(path)} cannot be read: {reason}", hint="it must be an ordinary file that you may read"
        ) from None
    if size == 0:
        raise InputFileInvalid(f"{shown_path(path)} is empty", hint="give a file with something in it")
    return Content(path, digest.hexdigest(), size, data if whole else None, (before.st_mtime_ns, before.st_size))


def shown_path(path: str) -> str:
    """A path as it is shown in messages."""
    return repr(foreign_text(path, 200))


async def store(exchange: Exchange, content: Content) -> str:
    """Upload and return the server's name for it, once the server holds every byte.

    Raises InputFileInvalid, ServerUnreachable, NotComfyUI.
    """
    overwrite = False
    trouble: ServerUnreachable | AnswerUnreadable | None = None
    for attempt in range(exchange.settings.max_retries + 1):
        if attempt:
            await asyncio.sleep(min(0.2 * 2**attempt, 5.0))
        try:
            name = await _post(exchange, content, overwrite=overwrite)
            stored = await _stored_size(exchange, name, hoped=content.size_bytes)
        except (ServerUnreachable, AnswerUnreadable) as error:
            # The name says what the content is: sending it again does no harm.
            trouble = error
            continue
        if stored == content.size_bytes:
            return name
        # Under a name made from the content only a broken copy can lie, ours or that of an earlier attempt.
        overwrite = True
        trouble = ServerUnreachable(
            f"{exchange.address.masked} holds {stored if stored is not None else 'none'} of "
            f"{content.size_bytes} bytes of an upload",
            hint="check the free disk space on that machine",
            details={"kind": "cut"},
        )
    raise trouble if trouble is not None else ServerUnreachable(f"{exchange.address.masked} takes no uploads")


async def _post(exchange: Exchange, content: Content, *, overwrite: bool) -> str:
    seconds = exchange.settings.request_timeout.total_seconds() + content.size_bytes / _SLOWEST_BYTES_PER_SECOND
    body = io.BytesIO(content.data) if content.data is not None else await asyncio.to_thread(_reopen, content)
    try:
        # Names in a form are raw UTF-8: the server stores percent-encoded ones to the letter.
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", body, filename=content.name, content_type="application/octet-stream")
        form.add_field("type", "input")
        if overwrite:
            form.add_field("overwrite", "true")
        async with exchange.deadline(seconds):
            answer = await exchange.once("POST", "/upload/image", data=form)
    finally:
        body.close()
    if content.data is None:
        await asyncio.to_thread(_check_unchanged, content)
    return _name_given(exchange, answer, content)


def _name_given(exchange: Exchange, answer: Answer, content: Content) -> str:
    exchange.refuse_strangers(answer.status, answer.headers)
    if answer.status == 413:
        raise too_large(content, None)
    if answer.status >= 500 or answer.status == 429:
        raise exchange.busy(answer)
    if answer.status in (404, 405):
        raise exchange.not_comfyui(f"answers {answer.status} to an upload")
    if answer.status != 200:
        raise InputFileInvalid(
            f"the server refuses the upload of {shown_path(content.path)} ({answer.status})",
            hint="rename the file to plain letters and try again",
        )
    body = exchange.json(answer)
    name = body.get("name") if isinstance(body, dict) else None
    subfolder = body.get("subfolder") if isinstance(body, dict) else None
    if not isinstance(name, str) or not name or not isinstance(subfolder, str | None):
        raise AnswerUnreadable(f"{exchange.address.masked} does not say under which name it stored an upload")
    return f"{subfolder}/{name}" if subfolder else name


async def _stored_size(exchange: Exchange, name: str, *, hoped: int) -> int | None:
    """How many bytes the server holds under that input name; None if it has no such file.

    HEAD is cheapest, but a proxy in between may drop the length of an answer without a body, or send a body where there
    is none: where it does not say `hoped`, a GET has the last word.
    """
    path = view_path(FileRef(name, type="input"))
    told: int | None = None
    try:
        answer = await exchange.ask("HEAD", path)
        told = _count(answer.headers.get("Content-Length", "")) if answer.status == 200 else None
    except NotComfyUI as error:
        if error.details.get("kind") != "not-http":
            raise
    if told == hoped:
        return told
    answer = await exchange.ask("GET", path, headers={"Range": "bytes=0-0"})
    if answer.status == 206:
        return _count(answer.headers.get("Content-Range", "").rpartition("/")[2])
    if answer.status == 416:  # not one byte
        return 0
    return len(answer.body) if answer.status == 200 else told  # 200: ranges are unknown here, that was all of it


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def too_large(content: Content, limit: int | None) -> InputFileInvalid:
    """The error for a file over the server's upload limit, in bytes where it is known."""
    than = f"the {limit} bytes this server takes" if limit is not None else "this server takes"
    return InputFileInvalid(
        f"{shown_path(content.path)} has {content.size_bytes} bytes, more than {than}",
        hint="make the file smaller, or start ComfyUI with a larger --max-upload-size",
        details={"size_bytes": content.size_bytes, "limit_bytes": limit},
    )


def _reopen(content: Content) -> IO[bytes]:
    try:
        return open_regular(content.path, follow=True)
    except OSError as error:
        if is_exhausted(error):
            raise local_error(error, content.path, "read") from None
        raise InputFileMissing(
            f"{shown_path(content.path)} went away while it was uploaded", hint="leave the file where it is"
        ) from None


def _check_unchanged(content: Content) -> None:
    try:
        now = os.stat(content.path)  # noqa: PTH116
    except OSError:
        now = None
    if now is None or (now.st_mtime_ns, now.st_size) != content.stamp:
        raise InputFileInvalid(
            f"{shown_path(content.path)} changed while it was uploaded", hint="wait until the file is finished"
        )
