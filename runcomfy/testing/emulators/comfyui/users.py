"""Users, settings and user files: the only things that `--multi-user` keeps apart."""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from runcomfy.testing.emulators.comfyui.keys import OutsideFolder, process_of
from runcomfy.testing.emulators.comfyui.process import ServerProcess

routes = web.RouteTableDef()

SETTINGS = "comfy.settings.json"


def _users_file(process: ServerProcess) -> Path:
    return process.folders.user / "users.json"


def _users(process: ServerProcess) -> dict[str, str]:
    path = _users_file(process)
    users: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return users


def _user(request: web.Request) -> str:
    """The request's user. Raises KeyError for an unknown one."""
    process = process_of(request)
    if not process.options.multi_user:
        return "default"
    user = request.headers.get("comfy-user", "default")
    if user not in _users(process):
        raise KeyError(f"Unknown user: {user}")
    return user


def _home(request: web.Request) -> Path:
    home = process_of(request).folders.user / _user(request)
    home.mkdir(parents=True, exist_ok=True)
    return home


@routes.get("/users")
async def get_users(request: web.Request) -> web.Response:
    """Who is there; without `--multi-user` only where things are stored."""
    process = process_of(request)
    if process.options.multi_user:
        return web.json_response({"storage": "server", "users": _users(process)})
    migrated = (process.folders.user / "default").exists()
    return web.json_response({"storage": "server", "migrated": migrated})


@routes.post("/users")
async def post_users(request: web.Request) -> web.Response:
    """Make a user."""
    process = process_of(request)
    name = (await request.json())["username"].strip()
    if not name:
        return web.json_response({"error": "username not provided"}, status=400)
    users = _users(process)
    if name in users.values():
        return web.json_response({"error": "Duplicate username."}, status=400)
    user_id = f"{re.sub(r'[^a-zA-Z0-9-_]+', '-', name)}_{uuid.uuid4()}"
    users[user_id] = name
    _users_file(process).write_text(json.dumps(users))
    return web.json_response(user_id)


def _settings_file(request: web.Request) -> Path:
    try:
        return _home(request) / SETTINGS
    except KeyError:
        raise web.HTTPUnauthorized from None


def _settings(request: web.Request) -> dict[str, Any]:
    path = _settings_file(request)
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return settings


@routes.get("/settings")
async def get_settings(request: web.Request) -> web.Response:
    """All settings."""
    return web.json_response(_settings(request))


@routes.get("/settings/{name}")
async def get_setting(request: web.Request) -> web.Response:
    """One setting, or null."""
    return web.json_response(_settings(request).get(request.match_info["name"]))


@routes.post("/settings")
async def post_settings(request: web.Request) -> web.Response:
    """Change some settings."""
    settings = _settings(request) | await request.json()
    _settings_file(request).write_text(json.dumps(settings))
    return web.Response()


@routes.post("/settings/{name}")
async def post_setting(request: web.Request) -> web.Response:
    """Change one setting."""
    settings = _settings(request) | {request.match_info["name"]: await request.json()}
    _settings_file(request).write_text(json.dumps(settings))
    return web.Response()


def _user_path(request: web.Request, name: str) -> Path:
    """A path below the user's folder. Raises OutsideFolder for one outside."""
    home = _home(request).resolve()
    path = Path(os.path.abspath(home / unquote(name)))  # noqa: PTH100 - textually, as the real server
    if not path.is_relative_to(home):
        raise OutsideFolder(name)
    return path


@routes.get("/userdata")
async def list_userdata(request: web.Request) -> web.Response:
    """Files of a folder."""
    _user(request)
    if not (folder := request.query.get("dir")):
        return web.Response(status=400, text="Directory not provided")
    root = _user_path(request, folder)
    root.mkdir(parents=True, exist_ok=True)
    found = root.rglob("*") if request.query.get("recurse", "").lower() == "true" else root.glob("*")
    return web.json_response(sorted(path.relative_to(root).as_posix() for path in found if path.is_file()))


@routes.get("/userdata/{file}")
async def get_userdata(request: web.Request) -> web.StreamResponse:
    """A file."""
    path = _user_path(request, request.match_info["file"])
    if not path.is_file():
        return web.Response(status=404)
    headers = {"Content-Type": "application/json" if path.suffix == ".json" else "application/octet-stream"}
    if process_of(request).capabilities.guarded_downloads:
        headers |= {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    return web.FileResponse(path, headers=headers)


@routes.post("/userdata/{file}")
async def post_userdata(request: web.Request) -> web.Response:
    """Store the body as it is."""
    path = _user_path(request, request.match_info["file"])
    if request.query.get("overwrite") == "false" and path.exists():
        return web.Response(status=409, text="File already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(await request.read())
    return web.json_response(path.relative_to(_home(request).resolve()).as_posix())


@routes.delete("/userdata/{file}")
async def delete_userdata(request: web.Request) -> web.Response:
    """Remove a file."""
    path = _user_path(request, request.match_info["file"])
    if not path.is_file():
        return web.Response(status=404)
    path.unlink()
    return web.Response(status=204)
