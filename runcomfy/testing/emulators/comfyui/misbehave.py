"""Turns a `Fault` into what happens on the wire."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web
from multidict import CIMultiDict

from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.emulators.comfyui.keys import Handler
from runcomfy.testing.emulators.comfyui.process import ServerProcess

PIECE = 64 * 1024


async def misbehave(
    process: ServerProcess, request: web.Request, handler: Handler, fault: Fault, count: int
) -> web.StreamResponse:
    """Answer one call as the fault says; `count` is how often it has struck."""
    real = await _worked(request, handler) if fault.work else None
    if fault.delay:
        await _wait(process, fault.delay)
    if fault.reply == "never":
        await _wait(process, None)
    if fault.reply in ("never", "lost"):
        return _cut(request)
    if fault.redirect is not None:
        where = str(request.rel_url) if fault.redirect == "self" else fault.redirect
        return web.Response(status=302, headers={"Location": where})
    status, headers, body = await _pieces(request, real)
    if fault.body is not None:
        body = fault.body
        headers = CIMultiDict({"Content-Type": fault.content_type})
        status = 200
    elif fault.status is not None:
        body, headers = b"", CIMultiDict()
    headers.extend(fault.headers)
    if fault.corrupt is not None:
        body = fault.corrupt(body, count)
    return await _send(process, request, fault, fault.status or status, headers, body)


async def _worked(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return error


async def _wait(process: ServerProcess, seconds: float | None) -> None:
    """Wait, but not longer than the server lives."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.over.wait()


def _cut(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _pieces(request: web.Request, real: web.StreamResponse | None) -> tuple[int, CIMultiDict[str], bytes]:
    """A response taken apart: status, headers without those about length, body."""
    if real is None:
        return 200, CIMultiDict(), b""
    headers = CIMultiDict(real.headers)
    status, body = real.status, b""
    if isinstance(real, web.FileResponse):
        path = real._path
        body = await asyncio.get_running_loop().run_in_executor(None, path.read_bytes)
        headers["Accept-Ranges"] = "bytes"
        stat = path.stat()
        headers["ETag"] = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
        wanted = request.http_range
        if wanted.start is not None or wanted.stop is not None:
            start, stop, _ = wanted.indices(len(body))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            status, body = 206, body[start:stop]
    elif isinstance(real, web.Response):
        raw = real.body
        body = raw if isinstance(raw, bytes) else b""
    for name in ("Content-Length", "Transfer-Encoding", "Content-Encoding"):
        headers.pop(name, None)
    return status, headers, body


async def _send(
    process: ServerProcess,
    request: web.Request,
    fault: Fault,
    status: int,
    headers: CIMultiDict[str],
    body: bytes,
) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers=headers)
    response.headers["X-Emulator"] = "runcomfy-testing"
    if fault.endless:
        response.enable_chunked_encoding()
    else:
        response.content_length = fault.claim if fault.claim is not None else len(body)
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        if fault.endless:
            while not process.over.is_set():
                await response.write(body or bytes(PIECE))
        await _write(process, fault, response, body)
        short = fault.truncate is not None or (fault.claim is not None and fault.claim != len(body))
        if short:
            # Half a body and the end of the connection, as a proxy that gives up does it.
            await asyncio.sleep(0)
            if request.transport is not None:
                request.transport.close()
            return response
        await response.write_eof()
    return response


async def _write(process: ServerProcess, fault: Fault, response: web.StreamResponse, body: bytes) -> None:
    if fault.truncate is not None:
        body = body[: fault.truncate]
    if fault.rate is None:
        await response.write(body)
        return
    piece = max(1, int(fault.rate))
    for start in range(0, len(body), piece):
        await response.write(body[start : start + piece])
        await _wait(process, 1.0)
        if process.over.is_set():
            return
