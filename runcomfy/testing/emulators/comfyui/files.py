"""Uploads and `/view`: names, folders, refusals and headers as the real server has them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import mimetypes
import os
import uuid
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.web_request import FileField
from PIL import Image

from runcomfy.testing.emulators.comfyui.keys import fault_of_this_call, process_of
from runcomfy.testing.emulators.comfyui.nodes.base import Folders

routes = web.RouteTableDef()

TYPES = {
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".obj": "model/obj",
    ".webp": "image/webp",
    ".webm": "video/webm",
    ".mp4": "video/mp4",
    ".flac": "audio/flac",
    ".opus": "audio/ogg",
    ".mp3": "audio/mpeg",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".latent": "application/octet-stream",
}
"""Said here because a machine's own table may say otherwise."""

ACTIVE_TYPES = {
    "text/html",
    "text/html-sandboxed",
    "application/xhtml+xml",
    "text/javascript",
    "application/javascript",
    "text/css",
    "image/svg+xml",
    "text/xml",
    "application/xml",
}
"""Since 0.28.0 never shown by a browser, always downloaded."""


def content_type(name: str) -> str:
    """The type `/view` gives to a name."""
    extension = Path(name).suffix.lower()
    return TYPES.get(extension) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def _inside(folder: Path, path: Path) -> bool:
    """Whether a path, taken apart textually as the real server does, stays inside a folder."""
    try:
        return os.path.commonpath((str(folder), os.path.abspath(path))) == str(folder)  # noqa: PTH100 - not resolved
    except ValueError:  # another drive
        return False


def _folder(folders: Folders, kind: str | None) -> tuple[Path, str]:
    """The upload folder of a `type`. Raises TypeError for an unknown one, which ends as a 500."""
    wanted = kind or "input"
    folder = folders.of(wanted)
    if folder is None:
        raise TypeError(f"no folder of type {wanted!r}")
    return folder, wanted


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Upload:
    """One upload form."""

    def __init__(self, request: web.Request, form: Any) -> None:
        self._process = process_of(request)
        self._keep = fault_of_this_call().keep
        self.form = form
        self.kind = ""
        self.subfolder = ""
        self.name = ""
        self.path: Path | None = None

    def place(self) -> bool:
        """Find the file's place; False for what the real server answers with an empty 400."""
        image = self.form.get("image")
        folder, self.kind = _folder(self._process.folders, self.form.get("type"))
        if not image:
            return False
        self.name = image.filename
        if not self.name:
            raise ValueError("a file part without a name")
        self.subfolder = self.form.get("subfolder", "")
        target = folder / os.path.normpath(self.subfolder)
        self.path = Path(os.path.abspath(target / self.name))  # noqa: PTH100 - must not resolve links
        if not _inside(folder, target):
            return False
        target.mkdir(parents=True, exist_ok=True)
        if os.path.isabs(self.name):  # noqa: PTH117 - a name, not a path of ours
            raise ValueError("absolute file name")
        return _inside(folder, self.path)

    def store(self) -> None:
        """Write the file under a free name, unless it is there already."""
        image: FileField = self.form["image"]
        data = image.file.read()
        overwrite = self.form.get("overwrite") in ("true", "1")
        if not self._find_name(data, overwrite=overwrite):
            assert self.path is not None  # noqa: S101 - place() came first
            self.path.write_bytes(data if self._keep is None else data[: self._keep])

    def _find_name(self, data: bytes, *, overwrite: bool) -> bool:
        """Settle the name; True if an equal file is there."""
        assert self.path is not None  # noqa: S101 - place() came first
        stem, extension = os.path.splitext(self.name)  # noqa: PTH122 - a name, not a path
        folder, count = self.path.parent, 1
        while not overwrite and self.path.exists():
            if _hash(self.path) == hashlib.sha256(data).hexdigest():
                return True
            self.name = f"{stem} ({count}){extension}"
            self.path = folder / self.name
            count += 1
        return False

    def answer(self) -> dict[str, Any]:
        """What the client is told."""
        said: dict[str, Any] = {"name": self.name, "subfolder": self.subfolder, "type": self.kind}
        if self._process.options.enable_assets and self._process.capabilities.assets and self.path is not None:
            data = self.path.read_bytes()
            # The real hash is BLAKE3, which nothing here computes: same length, same content same hash.
            said["asset"] = {
                "id": str(uuid.uuid4()),
                "name": self.name,
                "asset_hash": f"blake3:{hashlib.blake2b(data, digest_size=32).hexdigest()}",
                "size": len(data),
                "mime_type": content_type(self.name),
                "tags": [self.kind, "uploaded"],
            }
        return said


@routes.post("/upload/image")
async def upload_image(request: web.Request) -> web.Response:
    """Store a file of any kind."""
    upload = Upload(request, await request.post())
    if not upload.place():
        return web.Response(status=400)
    await asyncio.get_running_loop().run_in_executor(None, upload.store)
    return web.json_response(upload.answer())


@routes.post("/upload/mask")
async def upload_mask(request: web.Request) -> web.Response:
    """Put the upload's alpha on a picture that is there; a missing original is answered like a success."""
    upload = Upload(request, await request.post())
    if not upload.place():
        return web.Response(status=400)
    reference = json.loads(upload.form["original_ref"])
    original = _original(process_of(request).folders, reference)
    if original is not None:
        await asyncio.get_running_loop().run_in_executor(None, _store_masked, upload, original)
    return web.json_response({"name": upload.name, "subfolder": upload.subfolder, "type": upload.kind})


def _original(folders: Folders, reference: dict[str, Any]) -> Path | None:
    name = reference["filename"]
    folder = folders.of(reference.get("type", "output"))
    if not name or name[0] == "/" or ".." in name or folder is None:
        return None
    target = folder
    if reference.get("subfolder"):
        target = folder / reference["subfolder"]
        if not _inside(folder, target):
            return None
    path = target / Path(name).name
    return path if path.is_file() else None


def _store_masked(upload: Upload, original: Path) -> None:
    assert upload.path is not None  # noqa: S101 - place() came first
    with Image.open(original) as below, Image.open(upload.form["image"].file) as above:
        result = below.convert("RGBA")
        result.putalpha(above.convert("RGBA").getchannel("A"))
    result.save(upload.path, format="PNG", compress_level=4)


# /view


@routes.get("/view")
async def view(request: web.Request) -> web.StreamResponse:
    """Serve a file, or a picture of it."""
    found = _locate(request)
    if isinstance(found, web.Response):
        return found
    if "preview" in request.query:
        return await _picture(found, _preview, request.query["preview"])
    channel = request.query.get("channel", "rgba")
    if channel == "rgb":
        return await _picture(found, _rgb)
    if channel == "a":
        return await _picture(found, _alpha)
    return _plain(request, found)


def _locate(request: web.Request) -> Path | web.Response:
    """The file that is asked for, or the refusal."""
    folders = process_of(request).folders
    if "filename" not in request.query:
        return web.Response(status=404)
    name = request.query["filename"]
    kind = request.query.get("type", "output")
    for folder in ("input", "output", "temp"):
        if name.endswith(f"[{folder}]"):
            name, kind = name[: -len(folder) - 2].rstrip(), folder
    if not name or name[0] == "/" or ".." in name:
        return web.Response(status=400)
    root = folders.of(kind)
    if root is None:
        return web.Response(status=400)
    target = root
    if "subfolder" in request.query:
        target = Path(os.path.abspath(root / request.query["subfolder"]))  # noqa: PTH100 - must not resolve links
        if not _inside(root, target):
            return web.Response(status=403)
    path = target / os.path.basename(name)  # noqa: PTH119 - a name, not a path of ours
    if "\0" in str(path) or not path.is_file():
        return web.Response(status=404)
    return path


def _plain(request: web.Request, path: Path) -> web.StreamResponse:
    guarded = process_of(request).capabilities.guarded_downloads
    kind = content_type(path.name)
    headers = {"Content-Disposition": _disposition(path)}
    if guarded:
        headers["X-Content-Type-Options"] = "nosniff"
        if kind in ACTIVE_TYPES:
            headers |= {"Vary": "Sec-Fetch-Dest", "Cache-Control": "no-store"}
        shown_as_picture = kind == "image/svg+xml" and request.headers.get("Sec-Fetch-Dest") == "image"
        if kind in ACTIVE_TYPES and not shown_as_picture:
            kind = "application/octet-stream"
            headers["Content-Disposition"] = f"attachment; {headers['Content-Disposition']}"
    headers["Content-Type"] = kind
    return web.FileResponse(path, headers=headers)


def _disposition(path: Path) -> str:
    name = path.name.replace("\\", "\\\\").replace('"', '\\"')
    return f'filename="{name}"'


async def _picture(path: Path, make: Any, *arguments: str) -> web.Response:
    body, kind = await asyncio.get_running_loop().run_in_executor(None, make, path, *arguments)
    headers = {"Content-Disposition": _disposition(path)}
    return web.Response(body=body, content_type=kind, headers=headers)


def _encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, format=form, **options)
    return data.getvalue()


def _preview(path: Path, wanted: str) -> tuple[bytes, str]:
    parts = wanted.split(";")
    form = parts[0] if parts[0] in ("webp", "jpeg") else "webp"
    quality = int(parts[-1]) if parts[-1].isdigit() else 90
    with Image.open(path) as picture:
        shown = picture.convert("RGB") if form == "jpeg" else picture
        return _encoded(shown, form, quality=quality), f"image/{form}"


def _rgb(path: Path) -> tuple[bytes, str]:
    with Image.open(path) as picture:
        if picture.mode == "RGBA":
            red, green, blue, _ = picture.split()
            return _encoded(Image.merge("RGB", (red, green, blue)), "PNG"), "image/png"
        return _encoded(picture.convert("RGB"), "PNG"), "image/png"


def _alpha(path: Path) -> tuple[bytes, str]:
    with Image.open(path) as picture:
        mask = picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255)
        alpha = Image.new("RGBA", picture.size)
        alpha.putalpha(mask)
        return _encoded(alpha, "PNG"), "image/png"
