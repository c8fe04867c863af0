"""
Fetching a file from an address that a client named.

The client chooses where this computer sends a request, so the request reaches public addresses only (`addresses`),
follows few redirects and looks at each, and reads no more than it was allowed to. What the bytes are is found out by
whoever uses them: the type that is returned is only what the other side says.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import aiohttp
from yarl import URL

from launcher.guarding.addresses import IsPublic, Resolve, checked_url, is_public, outbound_session
from runcomfy.adapters.files import local_error, open_new, remove_quietly
from runcomfy.domain.exceptions import AddressRefused, DownloadFailed, InputFileInvalid, foreign_text

MOST_REDIRECTS: Final = 3
_CHUNK: Final = 256 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NO_FILES: Final = frozenset({"text/html", "application/xhtml+xml"})
"""A page that shows a picture is the usual mistake."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that was fetched."""

    path: Path
    size: int
    """Bytes."""
    mime: str
    """What the other side called it; empty if it said nothing."""


async def fetch_public(
    url: str,
    destination: Path,
    *,
    limit_bytes: int,
    allow_private: bool = False,
    timeout: timedelta = timedelta(minutes=2),
    resolve: Resolve | None = None,
    public: IsPublic = is_public,
) -> Fetched:
    """Fetch what an address holds into a new private file and return it; on an error there is no file.

    `timeout` is for everything together. `resolve` and `public` stand in for the system's resolver and the list of
    public addresses. Raises AddressRefused, InputFileInvalid (too large, packed, a web page), DownloadFailed,
    LocalError.
    """
    limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=20)
    try:
        async with (
            asyncio.timeout(timeout.total_seconds()),
            outbound_session(allow_private=allow_private, timeout=limits, resolve=resolve, public=public) as session,
        ):
            target = checked_url(url, allow_private=allow_private, public=public)
            for _ in range(MOST_REDIRECTS + 1):
                async with session.get(target, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return await _keep(response, destination, limit_bytes)
                    target = _next(target, response, allow_private=allow_private, public=public)
    except TimeoutError as error:
        raise _failed("it took too long") from error
    except (aiohttp.ClientError, OSError) as error:
        raise _failed("the server could not be reached, or hung up") from error
    raise _failed(f"more than {MOST_REDIRECTS} redirects")


def _next(here: URL, response: aiohttp.ClientResponse, *, allow_private: bool, public: IsPublic) -> URL:
    """Return where a redirect leads, checked like the first address."""
    try:
        there = here.join(URL(response.headers.get("Location", "")))
    except ValueError:
        raise _failed("a redirect that leads nowhere") from None
    if here.scheme == "https" and there.scheme != "https":
        raise AddressRefused("the address leads on to an unencrypted one", hint="give the last address itself")
    return checked_url(str(there), allow_private=allow_private, public=public)


async def _keep(response: aiohttp.ClientResponse, destination: Path, limit: int) -> Fetched:
    if response.status != 200:
        raise _failed(f"the server answered {response.status}")
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in _NO_FILES:
        raise InputFileInvalid(
            "the address holds a web page, not a file", hint="give the address of the picture itself"
        )
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise InputFileInvalid("the server sent the file packed, which was not asked for", hint="upload the file")
    if response.content_length is not None and response.content_length > limit:
        raise _too_large(limit)
    try:
        file = await asyncio.to_thread(open_new, destination)
    except OSError as error:
        raise local_error(error, destination, "write") from error
    size, whole = 0, False
    try:
        async for chunk in response.content.iter_chunked(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            try:
                await asyncio.to_thread(file.write, chunk)
            except OSError as error:
                raise local_error(error, destination, "write") from error
        whole = True
    finally:
        await asyncio.to_thread(file.close)
        if not whole:
            remove_quietly(destination)
    return Fetched(destination, size, foreign_text(kind, 80))


def _too_large(limit: int) -> InputFileInvalid:
    return InputFileInvalid(
        f"what the address holds is larger than {limit} bytes",
        hint="give a smaller file, or raise RUNCOMFY_HTTP_MAX_UPLOAD",
        details={"limit_bytes": limit},
    )


def _failed(why: str) -> DownloadFailed:
    # No more than that: who may name addresses must not learn from the words what is behind them.
    return DownloadFailed(f"the address could not be fetched: {why}", hint="check it, or upload the file itself")
