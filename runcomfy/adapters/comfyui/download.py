"""
Downloads one file from a ComfyUI server, whole.

A cut download goes on where it stopped, but only after the parts are proved to belong together: the server answers a
range of another file all the same (it does not honour `If-Range` for tags), so tag, date and length are compared here.
They are compared once more when the last byte has come, for a file that changes while it is read is not a result
(a PNG that came in one piece is spared that: it carries its own proof).
Whether the bytes are a picture or a mesh is judged by others.
"""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

import aiohttp
from aiofiles.threadpool import wrap
from aiofiles.threadpool.binary import AsyncBufferedReader

from runcomfy.adapters.comfyui.exchange import Exchange, is_html
from runcomfy.adapters.files import local_error, open_new, remove_quietly
from runcomfy.domain.exceptions import DownloadFailed, OutputMissing, ServerUnreachable, foreign_text
from runcomfy.domain.job import FileRef
from runcomfy.ports.comfyui import Fetched

WRITE_BYTES: Final = 1024 * 1024
"""Written at once: each write is a hop to a thread."""
PAUSE_SECONDS: Final = 0.2
PAUSE_CAP_SECONDS: Final = 5.0
MAX_RESTARTS: Final = 3
"""How often a file that changed is read again from its beginning."""

_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})$")
_PNG_BEGIN: Final = b"\x89PNG\r\n\x1a\n"
_PNG_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
_PAGES: Final = (".html", ".htm", ".xhtml")


def view_path(file: FileRef) -> str:
    """The path of a file on the server, percent-encoded. A folder inside the name belongs into `subfolder`."""
    folder, name = posixpath.split(file.filename)
    subfolder = posixpath.join(file.subfolder, folder) if folder else file.subfolder
    # A name with half a character in it is none that a server can have: it is asked for, and not there.
    return "/view?" + urlencode({"filename": name, "subfolder": subfolder, "type": file.type}, errors="replace")


@dataclass(frozen=True, slots=True)
class Facts:
    """What identifies one state of a file on the server."""

    tag: str = ""
    modified: str = ""
    size: int | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], size: int | None) -> Facts:
        """Read them from an answer."""
        return cls(headers.get("ETag", ""), headers.get("Last-Modified", ""), size)

    @property
    def tells_states_apart(self) -> bool:
        """Whether two equal facts mean the same content."""
        return bool(self.tag or self.modified)

    def fits(self, other: Facts) -> bool:
        """Whether nothing that both say differs."""
        return all(
            mine == theirs
            for mine, theirs in (
                (self.tag, other.tag),
                (self.modified, other.modified),
                (self.size, other.size),
            )
            if mine not in ("", None) and theirs not in ("", None)
        )


class _TryAgain(Exception):
    """This attempt brought nothing; the next one may."""


async def fetch(exchange: Exchange, file: FileRef, destination: str) -> Fetched:
    """Download `file` to the new file `destination`; nothing is left there if an error is raised.

    The file is not flushed to the disk: whoever makes it a result does that once for all of a job's files.

    Raises OutputMissing, DownloadFailed, ServerUnreachable, NotComfyUI, DiskFull, LocalError.
    """
    sink = _Sink(destination)
    whole = False
    try:
        fetched = await _Download(exchange, file, sink).run()
        await sink.finish()
        whole = True
        return fetched
    except OSError as error:
        doing = "create" if isinstance(error, FileExistsError) else "write"
        raise local_error(error, destination, doing) from None
    finally:
        if not whole:
            await sink.discard()


class _Sink:
    """The file here. What is small stays in memory until it is whole and is then written in one hop to a thread."""

    def __init__(self, destination: str) -> None:
        self._destination = destination
        self._held = bytearray()
        self._opened: AsyncBufferedReader | None = None

    async def write(self, part: bytes) -> None:
        self._held += part
        if len(self._held) >= WRITE_BYTES:
            await self._spill()

    async def _spill(self) -> None:
        if self._opened is None:
            self._opened = wrap(await asyncio.to_thread(open_new, self._destination))
        part = bytes(self._held)
        self._held.clear()
        await self._opened.write(part)

    def proves_itself(self) -> bool:
        """Whether a mixture of two states of the file, or a part of it, could not be mistaken for the whole.

        A PNG has a checksum for every part of it and an end of its own; both are checked before it counts as a result,
        so asking the server once more whether the file has changed would tell nothing. No other format is so strict.
        """
        return self._opened is None and self._held.startswith(_PNG_BEGIN) and self._held.endswith(_PNG_END)

    async def rewind(self) -> None:
        """Throw away what came."""
        self._held.clear()
        if self._opened is not None:
            await self._opened.seek(0)
            await self._opened.truncate()

    async def finish(self) -> None:
        """Write what is held back and close; a full disk may show only here."""
        if self._opened is None:
            await asyncio.to_thread(_write_whole, self._destination, self._held)
            return
        await self._spill()
        await self._opened.close()

    async def discard(self) -> None:
        """Leave nothing of ours."""
        if self._opened is not None:
            with suppress(OSError):
                await self._opened.close()
            await asyncio.to_thread(remove_quietly, self._destination)


def _write_whole(destination: str, content: bytes | bytearray) -> None:
    with open_new(destination) as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            remove_quietly(destination)
            raise


class _Download:
    def __init__(self, exchange: Exchange, file: FileRef, sink: _Sink) -> None:
        self._exchange = exchange
        self._settings = exchange.settings
        self._sink = sink
        self._path = view_path(file)
        self._name = foreign_text(file.filename, 120)
        self._may_be_a_page = file.filename.lower().endswith(_PAGES)
        self._facts = Facts()
        self._have = 0
        self._digest = hashlib.sha256()
        self._restarts = 0
        self._seen_at = asyncio.get_running_loop().time()
        self._details: dict[str, object] = {"file": self._name, "server": exchange.address.masked}

    async def run(self) -> Fetched:
        total = self._settings.download_timeout.total_seconds()
        limit = asyncio.timeout(total)
        try:
            async with limit:
                await self._until_whole()
        except TimeoutError:
            if not limit.expired():
                raise
            raise self._failed(f"it took longer than {total:g} s") from None
        return Fetched(self._have, self._digest.hexdigest())

    async def _until_whole(self) -> None:
        failures = 0
        while True:
            had = self._have
            try:
                await self._attempt()
                if self._sink.proves_itself() or await self._still_the_same():
                    return
                await self._start_again()
                reason = "it changes while it is read"
            except _TryAgain as error:
                reason = str(error)
            except ServerUnreachable as error:
                reason = error.message
                if self._is_away(error):
                    await asyncio.sleep(1.0)
                    continue
            failures = 0 if self._have > had else failures + 1
            if failures > self._settings.max_retries or self._restarts > MAX_RESTARTS:
                raise self._failed(reason)
            await asyncio.sleep(min(PAUSE_SECONDS * 2**failures, PAUSE_CAP_SECONDS))

    def _is_away(self, error: ServerUnreachable) -> bool:
        """Whether the server is down and worth waiting for: its output folder survives a restart."""
        if error.details.get("kind") not in ("refused", "dns"):
            self._seen_at = asyncio.get_running_loop().time()
            return False
        away = asyncio.get_running_loop().time() - self._seen_at
        if away >= self._settings.unreachable_timeout.total_seconds():
            raise error
        return True

    # --- one attempt --------------------------------------------------------------------------------------

    async def _attempt(self) -> None:
        """Read on from where we are; return when every byte is here."""
        seconds = self._settings.request_timeout.total_seconds()
        patience = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        headers = {"Range": f"bytes={self._have}-"} if self._have else {}
        async with self._exchange.open("GET", self._path, headers=headers, timeout=patience) as response:
            self._seen_at = asyncio.get_running_loop().time()
            if not await self._accept(response):
                return
            buffer = bytearray()
            try:
                async for chunk in response.content.iter_any():
                    buffer += chunk
                    if self._have + len(buffer) > self._settings.max_output_bytes:
                        raise self._too_large()
                    if len(buffer) >= WRITE_BYTES:
                        await self._write(buffer)
            finally:
                # What has come before a cut is kept: the next attempt goes on behind it.
                await self._write(buffer)
        if self._have == 0:
            raise _TryAgain("it is empty")
        if self._facts.size is not None and self._have != self._facts.size:
            raise _TryAgain(f"{self._have} of {self._facts.size} bytes came")

    async def _accept(self, response: aiohttp.ClientResponse) -> bool:
        """Look at the head of an answer; True if its body is what is wanted next, False if nothing is missing."""
        status, headers = response.status, response.headers
        self._refuse(status, headers)
        if status == 416 and self._have:
            return await self._past_the_end(headers)
        if status not in (200, 206):
            raise _TryAgain(f"the server answers {status}")
        if is_html(headers) and not self._may_be_a_page:
            self._details |= {"status": status, "content_type": headers.get("Content-Type", "")}
            raise _TryAgain("a web page came in its place")
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _TryAgain("it came compressed, which was not asked for")
        if status == 206:
            await self._join(headers)
        else:
            if self._have:
                await self._rewind()
            self._facts = Facts.of(headers, response.content_length)
        if self._facts.size is not None and self._facts.size > self._settings.max_output_bytes:
            raise self._too_large()
        return True

    def _refuse(self, status: int, headers: Mapping[str, str]) -> None:
        if status in (400, 403, 404) and not is_html(headers):
            raise OutputMissing(
                f"the server does not have {self._name!r}" + ("" if status == 404 else f" ({status})"),
                hint="a cached run names files that may have been deleted since; run again with another seed",
                details={**self._details, "status": status},
            )
        self._exchange.refuse_strangers(status, headers)

    async def _join(self, headers: Mapping[str, str]) -> None:
        """Make sure that the part that comes belongs behind what is here."""
        found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if not self._have or found is None or found[1] is None or int(found[1]) != self._have:
            await self._start_again()
            raise _TryAgain("another part of it came than was asked for")
        facts = Facts.of(headers, int(found[3]))
        if not facts.tells_states_apart or not facts.fits(self._facts):
            await self._start_again()
            raise _TryAgain("it changes while it is read")

    async def _past_the_end(self, headers: Mapping[str, str]) -> bool:
        """Nothing lies behind what we have: then it is whole, or not what it was."""
        found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if found is not None and int(found[3]) == self._have and self._facts.size in (None, self._have):
            return False
        await self._start_again()
        raise _TryAgain("it became shorter while it was read")

    async def _still_the_same(self) -> bool:
        """Ask once more what the file is; it must be what was read."""
        answer = await self._exchange.ask("HEAD", self._path, repeat=False)
        if answer.status in (405, 501):
            # Some proxies let no HEAD through.
            answer = await self._exchange.ask("GET", self._path, repeat=False, headers={"Range": "bytes=0-0"})
        if answer.status not in (200, 206):
            return False
        found = _CONTENT_RANGE.match(answer.headers.get("Content-Range", ""))
        length = answer.headers.get("Content-Length", "")
        size = int(found[3]) if found is not None else (int(length) if length.isascii() and length.isdigit() else None)
        now = Facts.of(answer.headers, size)
        return now.fits(self._facts) and now.size in (None, self._have)

    # --- the file here ------------------------------------------------------------------------------------

    async def _write(self, buffer: bytearray) -> None:
        if not buffer:
            return
        part = bytes(buffer)
        buffer.clear()
        await self._sink.write(part)
        self._digest.update(part)
        self._have += len(part)

    async def _start_again(self) -> None:
        """Throw away what is here because the server's file is another one now."""
        self._restarts += 1
        await self._rewind()

    async def _rewind(self) -> None:
        await self._sink.rewind()
        self._have, self._digest, self._facts = 0, hashlib.sha256(), Facts()

    # --- errors -------------------------------------------------------------------------------------------

    def _failed(self, reason: str) -> DownloadFailed:
        size = self._facts.size
        got = f"{self._have} of {size if size is not None else '?'} bytes are here"
        return DownloadFailed(
            f"{self._name!r} could not be downloaded whole: {reason}",
            hint="the file is still on the server; check the connection and run again (a cached run is quick)",
            details={**self._details, "received_bytes": self._have, "expected_bytes": size, "state": got},
        )

    def _too_large(self) -> DownloadFailed:
        return DownloadFailed(
            f"{self._name!r} is larger than the {self._settings.max_output_bytes} bytes allowed for one result",
            hint="raise the limit for results if this is expected",
            details=self._details,
        )
