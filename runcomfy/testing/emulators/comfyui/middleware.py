"""What surrounds every call: records, hanging, faults, origin check, CORS, and the plain 500."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware
from yarl import URL

from runcomfy.testing.emulators.comfyui.keys import Handler, OutsideFolder, struck_by, submitted
from runcomfy.testing.emulators.comfyui.misbehave import misbehave
from runcomfy.testing.emulators.comfyui.process import ServerProcess

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as it came."""

    method: str
    path: str
    """Without query and `/api` prefix."""
    query: str
    boot: int


def plain_500() -> web.Response:
    """What any handler's exception becomes."""
    text = "500 Internal Server Error\n\nServer got itself in trouble"
    response = web.Response(status=500, text=text)
    response.force_close()
    return response


def refused_by_origin(request: web.Request, *, fetch_site: bool) -> bool:
    """The real server's guard against pages of other hosts: only asked when Host names a loopback address."""
    if fetch_site and request.headers.get("Sec-Fetch-Site") == "cross-site":
        return True
    origin = request.headers.get("Origin")
    host = request.headers.get("Host")
    if origin is None or host is None:
        return False
    domain = urlsplit(origin).netloc.lower()
    if not domain:
        return False
    if URL(f"http://{host.lower()}").host not in LOOPBACK:
        return False
    return domain != host.lower()


def allow(response: web.StreamResponse, origin: str) -> None:
    """Let pages of that origin read the answer."""
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Allow-Methods"] = "POST, GET, DELETE, PUT, OPTIONS, PATCH"
    response.headers["Access-Control-Allow-Headers"] = "Content-Type, Authorization"
    response.headers["Access-Control-Allow-Credentials"] = "true"


def make_middlewares(process: ServerProcess, requests: list[RequestRecord]) -> list[Middleware]:
    """The chain, outermost first."""
    options, can = process.options, process.capabilities

    @web.middleware
    async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = request.path
        if path.startswith("/api/") and not path.startswith(("/api/jobs", "/api/assets", "/api/tags")):
            path = path.removeprefix("/api")
        requests.append(RequestRecord(request.method, path, request.query_string, process.boot))
        if options.round_trip:
            await asyncio.sleep(options.round_trip / 2)
        submitted.set(None)  # calls of one connection share their context
        await process.awake()
        found = process.faults.next_http(request.method, path)
        if found is None:
            response = await handler(request)
        else:
            with struck_by(found[0]):
                response = await misbehave(process, request, handler, *found)
        await process.awake()
        if (accepted := submitted.get()) is not None:
            accepted.answered = (found is None or found[0].answers_well) and not process.over.is_set()
        if options.round_trip:
            await asyncio.sleep(options.round_trip / 2)
        return response

    @web.middleware
    async def trouble(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge as error:
            # Said here because the words differ between versions of aiohttp.
            error.text = f"Maximum request body size {int(options.max_upload_size * 1024 * 1024)} exceeded."
            raise
        except web.HTTPException:
            raise
        except OutsideFolder:
            return web.Response(status=403)
        except Exception:  # noqa: BLE001 - whatever a handler did not expect is a plain 500, as in aiohttp
            return plain_500()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if options.cors is None and refused_by_origin(request, fetch_site=can.fetch_site_check):
            return web.Response(status=403)
        response = web.Response() if request.method == "OPTIONS" else await handler(request)
        if options.cors is not None and not response.prepared:
            allow(response, options.cors)
        return response

    @web.middleware
    async def dress(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if response.prepared:
            return response
        response.headers["X-Emulator"] = "runcomfy-testing"
        if options.compress and response.content_type == "application/json":
            response.enable_compression()
        return response

    return [record, dress, guard, trouble]
