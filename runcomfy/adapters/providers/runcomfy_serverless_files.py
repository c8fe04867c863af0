"""
Downloads one result of a serverless request, whole.

Results lie at addresses that need no token and get none. An answer of the API may name any address, so only RunComfy's
own hosts (and those the user added) are asked, over https, and a redirect is no answer. Whether the bytes are a picture
or a mesh is judged by others.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import BinaryIO, Final

import aiohttp
import backoff
from yarl import URL

from runcomfy.adapters.files import local_error, open_new, remove_quietly
from runcomfy.domain.exceptions import DownloadFailed, OutputMissing, RunComfyError, foreign_text
from runcomfy.domain.secret import is_loopback
from runcomfy.domain.serverless import RemoteFile
from runcomfy.domain.settings import ComfySettings
from runcomfy.ports.comfyui import Fetched

OWN_HOSTS: Final = (".runcomfy.net", ".runcomfy.com")
WRITE_BYTES: Final = 1024 * 1024
"""Written at once: each write is a hop to a thread."""
_MAX_PAUSE: Final = 10


class _TryAgain(Exception):
    """This attempt brought nothing; the next one may."""


async def download(
    http: aiohttp.ClientSession,
    file: RemoteFile,
    destination: str,
    *,
    settings: ComfySettings,
    api: URL,
    hosts: Sequence[str] = (),
    agent: str = "",
) -> Fetched:
    """Fetch `file` to the new file `destination`; nothing is left there if an error is raised.

    `api` is the API's own address: if that is this computer (an emulator), results may be there too.

    Raises OutputMissing, DownloadFailed, DiskFull, LocalError.
    """
    url = _checked(file, api, hosts)
    pauses = backoff.expo(base=2, factor=1, max_value=_MAX_PAUSE)
    next(pauses)  # backoff's generators begin with an empty step
    limit = asyncio.timeout(settings.download_timeout.total_seconds())
    try:
        async with limit:
            for attempt in range(settings.max_retries + 1):
                try:
                    return await _attempt(http, url, file, destination, settings, agent)
                except _TryAgain as error:
                    if attempt == settings.max_retries:
                        raise _failed(file, str(error)) from None
                    await asyncio.sleep(backoff.full_jitter(next(pauses)))
    except TimeoutError:
        if not limit.expired():
            raise
        raise _failed(file, f"it took longer than {settings.download_timeout.total_seconds():g} s") from None
    raise AssertionError("the last attempt neither returned nor raised")


def _checked(file: RemoteFile, api: URL, hosts: Sequence[str]) -> URL:
    if file.url is None:
        raise OutputMissing(f"{_name(file)} has no address", hint="run it again with another seed")
    try:
        url = URL(file.url.reveal(), encoded=True)
        host = (url.host or "").lower().rstrip(".")
    except ValueError:
        raise _refused(file, "its address is none") from None
    if url.user or url.password:
        raise _refused(file, "its address has a user name in it")
    if is_loopback(api.host or "") and is_loopback(host):
        return url
    if url.scheme != "https":
        raise _refused(file, "its address does not begin with https")
    if host == api.host or host.endswith(OWN_HOSTS) or host in hosts:
        return url
    raise _refused(file, f"{foreign_text(host, 80)} is not a host of RunComfy's")


async def _attempt(
    http: aiohttp.ClientSession, url: URL, file: RemoteFile, destination: str, settings: ComfySettings, agent: str
) -> Fetched:
    seconds = settings.request_timeout.total_seconds()
    patience = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    headers = {"User-Agent": agent, "Accept-Encoding": "identity"}
    try:
        async with http.get(url, headers=headers, allow_redirects=False, timeout=patience) as response:
            _accept(response, file, settings)
            return await _save(response, file, destination, settings)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise _TryAgain(f"the connection broke ({type(error).__name__})") from None


def _accept(response: aiohttp.ClientResponse, file: RemoteFile, settings: ComfySettings) -> None:
    status = response.status
    if status in (401, 403, 404, 410):
        raise OutputMissing(
            f"RunComfy does not have {_name(file)} any more (HTTP {status})",
            hint="results are deleted after 7 days; run it again",
            details={"status": status},
        )
    if 300 <= status < 400:
        raise _refused(file, f"it redirects elsewhere (HTTP {status})")
    if status != 200:
        raise _TryAgain(f"the server answers {status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _TryAgain("it came compressed, which was not asked for")
    if response.content_length is not None and response.content_length > settings.max_output_bytes:
        raise _too_large(file, settings)


async def _save(
    response: aiohttp.ClientResponse, file: RemoteFile, destination: str, settings: ComfySettings
) -> Fetched:
    digest = hashlib.sha256()
    size = 0
    try:
        sink = await asyncio.to_thread(open_new, destination)
    except OSError as error:
        raise local_error(error, destination, "create") from error
    whole = False
    try:
        buffer = bytearray()
        async for chunk in response.content.iter_any():
            buffer += chunk
            size += len(chunk)
            if size > settings.max_output_bytes:
                raise _too_large(file, settings)
            if len(buffer) >= WRITE_BYTES:
                digest.update(buffer)
                await _write(sink, bytes(buffer), destination)
                buffer.clear()
        digest.update(buffer)
        await _write(sink, bytes(buffer), destination)
        if size == 0:
            raise _TryAgain("it is empty")
        whole = True
    finally:
        await asyncio.shield(asyncio.to_thread(_close, sink, None if whole else destination))
    return Fetched(size, digest.hexdigest())


async def _write(sink: BinaryIO, part: bytes, destination: str) -> None:
    try:
        await asyncio.to_thread(sink.write, part)
    except OSError as error:
        raise local_error(error, destination, "write") from error


def _close(sink: BinaryIO, remove: str | None) -> None:
    try:
        sink.close()
    except OSError as error:
        if remove is None:
            raise local_error(error, sink.name, "write") from error
    finally:
        if remove is not None:
            remove_quietly(remove)


def _name(file: RemoteFile) -> str:
    return (
        repr(foreign_text(file.filename, 120)) if file.filename else f"a result of node {foreign_text(file.node, 40)}"
    )


def _failed(file: RemoteFile, reason: str) -> RunComfyError:
    return DownloadFailed(
        f"{_name(file)} could not be downloaded whole: {reason}",
        hint="RunComfy keeps results for 7 days; check the connection and fetch it again",
        details={"file": foreign_text(file.filename, 120), "node": foreign_text(file.node, 40)},
    )


def _refused(file: RemoteFile, reason: str) -> RunComfyError:
    return DownloadFailed(
        f"{_name(file)} was not fetched: {reason}",
        hint="if that is where RunComfy keeps results now, add the host to RUNCOMFY_SERVERLESS_FILE_HOSTS",
        details={"file": foreign_text(file.filename, 120), "node": foreign_text(file.node, 40)},
    )


def _too_large(file: RemoteFile, settings: ComfySettings) -> RunComfyError:
    return DownloadFailed(
        f"{_name(file)} is larger than the {settings.max_output_bytes} bytes allowed for one result",
        hint="raise COMFYUI_MAX_OUTPUT_BYTES if this is expected",
        details={"file": foreign_text(file.filename, 120)},
    )
