"""How an emulated instance runs a request: media in, the graph through an emulated ComfyUI, files out."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

import aiohttp

from runcomfy.testing.emulators.serverless.requests import EmulatedRequest

MAX_URL_BYTES: Final = 50 * 1024 * 1024
"""What RunComfy fetches for a picture."""
Files = list[tuple[str, str, dict[str, Any], bytes]]
"""Node, list, the file as ComfyUI names it, its content."""


class Failed(Exception):
    """The request ends with an error of RunComfy's."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code, self.words = code, words


class Canceled(Exception):
    """Somebody cancelled the request."""


class Runner:
    """Runs requests on one ComfyUI."""

    def __init__(self, url: str, http: aiohttp.ClientSession, *, look_every: float) -> None:
        self._url, self._http, self._look_every = url, http, look_every

    async def run(self, request: EmulatedRequest) -> tuple[Files, bool]:
        """Return the files it made, and whether all of them came from ComfyUI's cache. Raises Failed, Canceled."""
        graph: dict[str, Any] = json.loads(json.dumps(request.graph))
        await self._take_media_in(request, graph)
        request.prompt_id = await self._submit(graph)
        entry = await self._until_over(request)
        status = entry.get("status", {})
        messages = dict(status.get("messages", []))
        if status.get("status_str") != "success":
            data = messages.get("execution_error", {})
            words = f"node {data.get('node_id')}: {str(data.get('exception_message', 'unknown')).strip()}"
            raise Failed(10011, words)
        outputs: Mapping[str, Any] = entry.get("outputs", {})
        cached = set(messages.get("execution_cached", {}).get("nodes", []))
        files = [
            (node, channel, file, await self._view(file))
            for node, channels in outputs.items()
            for channel, entries in channels.items()
            for file in entries
            if isinstance(file, dict) and "filename" in file
        ]
        return files, bool(outputs) and set(outputs) <= cached

    async def _take_media_in(self, request: EmulatedRequest, graph: dict[str, Any]) -> None:
        for node_id, node in graph.items():
            for name, value in node.get("inputs", {}).items():
                given = request.overrides.get(node_id, {}).get("inputs", {}) if request.overrides else node["inputs"]
                is_media = isinstance(value, str) and value.startswith(("data:", "http://", "https://"))
                if is_media:
                    node["inputs"][name] = await self._upload(value)
                elif node.get("class_type") == "LoadImage" and name == "image" and name in given:
                    raise Failed(10009, f"node {node_id}: a plain file name cannot be fetched")

    async def _upload(self, value: str) -> str:
        """Put a file into ComfyUI's input folder, named by its content: the same one twice is the same input."""
        kind, data = await self._media(value)
        stem = hashlib.sha256(data).hexdigest()[:16]
        form = aiohttp.FormData({"overwrite": "true"})
        form.add_field("image", data, filename=f"{stem}.{kind}", content_type=f"image/{kind}")
        async with self._http.post(f"{self._url}/upload/image", data=form) as answer:
            if answer.status != 200:
                raise Failed(10009, f"the upload was refused ({answer.status})")
            return str((await answer.json())["name"])

    async def _media(self, value: str) -> tuple[str, bytes]:
        if value.startswith("data:"):
            head, _, body = value.partition(",")
            try:
                return head.removeprefix("data:image/").partition(";")[0] or "png", base64.b64decode(
                    body, validate=True
                )
            except (ValueError, binascii.Error):
                raise Failed(10009, "the data URI is not base64") from None
        try:
            async with self._http.get(value, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise Failed(10009, f"the address answers {answer.status}")
                return "png", await answer.content.read(MAX_URL_BYTES)
        except aiohttp.ClientError as error:
            raise Failed(10009, f"the address cannot be fetched: {type(error).__name__}") from None

    async def _submit(self, graph: dict[str, Any]) -> str:
        async with self._http.post(f"{self._url}/prompt", json={"prompt": graph, "client_id": "serverless"}) as answer:
            body = await answer.json()
            if answer.status != 200:
                raise Failed(10008, json.dumps(body)[:2_000])
            return str(body["prompt_id"])

    async def _until_over(self, request: EmulatedRequest) -> dict[str, Any]:
        while True:
            if request.cancel_wanted.is_set() and not request.traits.ignores_cancel:
                async with self._http.post(f"{self._url}/interrupt", json={}):
                    raise Canceled
            if not request.traits.never_ends:
                async with self._http.get(f"{self._url}/history/{request.prompt_id}") as answer:
                    found = await answer.json()
                if request.prompt_id in found:
                    entry: dict[str, Any] = found[request.prompt_id]
                    return entry
            await asyncio.sleep(self._look_every)

    async def _view(self, file: Mapping[str, Any]) -> bytes:
        query = {name: str(file.get(name, "")) for name in ("filename", "subfolder", "type")}
        async with self._http.get(f"{self._url}/view?{urlencode(query)}") as answer:
            return await answer.read()
