"""
The page at `/`: the files that `make web` built, out of the package.

They hold no data, so nobody has to be logged in to get them; what they show they ask the API for. Which headers keep
them from loading anything from elsewhere is the guard's business. Only names that were there when the program started
are served: no address can reach another file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, HTTPException, Request, Response

router = APIRouter(tags=["page"])

FOREVER: Final = "public, max-age=31536000, immutable"
"""The build puts a digest of its content into every asset's name: another content has another name."""
EACH_TIME: Final = "no-cache"
"""Kept, but asked for again each time: after an update the page must name the new assets."""
MEDIA_TYPES: Final[Mapping[str, str]] = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""Not the system's table: on Windows a registry entry may call JavaScript text/plain, and no browser would run it."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """One built file."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, name: str, content: bytes) -> PageFile:
        """Return the file with what browsers are told about it."""
        ending = name.rpartition(".")[2]
        digest = hashlib.sha256(content).hexdigest()[:32]
        return cls(content, MEDIA_TYPES.get(ending, "application/octet-stream"), f'"{digest}"')


@cache
def _built() -> tuple[PageFile, Mapping[str, PageFile]]:
    """Return the page and its assets by name, read once."""
    folder = files("launcher").joinpath("dashboard")
    page = PageFile.of("index.html", folder.joinpath("index.html").read_bytes())
    assets = {
        entry.name: PageFile.of(entry.name, entry.read_bytes())
        for entry in folder.joinpath("assets").iterdir()
        if entry.is_file()
    }
    return page, assets


def _answer(request: Request, file: PageFile, kept: str) -> Response:
    headers = {"ETag": file.etag, "Cache-Control": kept}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the page."""
    return _answer(request, _built()[0], EACH_TIME)


@router.api_route("/assets/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def asset(request: Request, name: str) -> Response:
    """Return a script, style or picture of the page."""
    file = _built()[1].get(name)
    if file is None:
        raise HTTPException(404, "the page has no such file; after an update, load the page again")
    return _answer(request, file, FOREVER)
