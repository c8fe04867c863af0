"""Plays the client's side of a recording against another ComfyUI server, at the recorded moments."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import Any

import aiohttp
from yarl import URL

from runcomfy.testing.recordings import Answer, Bindings, Event, Recording, Results

Hook = Callable[["Replay"], Awaitable[None]]
MakeFile = Callable[[str, int], bytes]

LINGER = 2.0
"""Seconds of listening after the last recorded event."""
LOOKS = 2_000
"""How often a history is asked for that the recorder found and that is not there yet: a node that works in a thread may
take longer than the virtual time that the recording gives it."""


class Replay:
    """One recording on its way through another server.

    `hooks` run when their line of the recording (counted from 1) is reached: what was done to the recorded server by
    hand (a file removed, the process killed) has to be done to this one. `make_file` gives the bytes of an uploaded
    file by name and recorded length; file contents are not part of recordings. Lines in `skipped` are not played.
    """

    def __init__(
        self,
        recording: Recording,
        url: str,
        *,
        make_file: MakeFile,
        hooks: Mapping[int, Hook] | None = None,
        substitutions: Mapping[str, str] | None = None,
        skipped: Container[int] = (),
    ) -> None:
        self.recording = recording
        self.url = url
        self.bindings = Bindings()
        self.results = Results(substitutions=dict(substitutions or {}))
        self._make_file = make_file
        self._hooks = dict(hooks or {})
        self._skipped = skipped
        self._answers = recording.answers()
        self._pending: dict[int, asyncio.Task[None]] = {}
        self._sockets: dict[str, aiohttp.ClientWebSocketResponse] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._closed_by_us: set[str] = set()

    async def run(self) -> Results:
        """Play everything and listen a little longer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with aiohttp.ClientSession(auto_decompress=True) as self._http:
            for line, event in enumerate(self.recording.events, start=1):
                if event["dir"] == "http-res":
                    await self._answered(event["n"])
                if line not in self._hooks and event["dir"] not in ("http-req", "ws-open", "ws-in", "ws-close"):
                    continue
                await asyncio.sleep(max(0.0, began + event["t"] - loop.time()))
                if line in self._hooks:
                    await self._hooks[line](self)
                if line not in self._skipped:
                    await self._play(event)
            await asyncio.sleep(LINGER)
            for number in list(self._pending):
                await self._answered(number)
            for reader in self._readers:
                reader.cancel()
            await asyncio.gather(*self._readers, return_exceptions=True)
            for sock in list(self._sockets):
                await self._close(sock)
        return self.results

    async def _play(self, event: Event) -> None:
        if event["dir"] == "http-req" and "note" not in event:
            self._pending[event["n"]] = asyncio.create_task(self._ask(event))
        elif event["dir"] == "ws-open":
            await self._open(event)
        elif event["dir"] == "ws-in":
            socket = self._sockets.get(event["sock"])
            if socket is not None:
                await socket.send_str(event["text"])
        elif event["dir"] == "ws-close" and event["kind"] != "HANDSHAKE" and event.get("code") != 1006:
            await self._close(event["sock"])

    # HTTP

    async def _ask(self, event: Event) -> None:
        headers = {name: self._here(value) for name, value in event.get("headers", {}).items()}
        # What a recorder's library added by itself is not repeated: the answer must not depend on it.
        arguments: dict[str, Any] = {}
        if "json" in event:
            arguments["data"] = self.bindings.translate(json.dumps(event["json"], ensure_ascii=False)).encode()
            headers.setdefault("Content-Type", "application/json")
        elif "text" in event:
            arguments["data"] = self.bindings.translate(event["text"]).encode()
        elif "form" in event:
            body, content_type = self._form(event["form"])
            arguments["data"], headers["Content-Type"] = io.BytesIO(body), content_type
        path = self.bindings.translate(event["path"])
        url = URL(self.url + path, encoded=True)
        for _ in range(LOOKS):
            try:
                async with (
                    asyncio.timeout(self._patience(event)),
                    self._http.request(
                        event["method"], url, headers=headers, allow_redirects=False, **arguments
                    ) as response,
                ):
                    answer = Answer(response.status, dict(response.headers), await response.read())
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                answer = Answer(error=type(error).__name__)
            self.results.answers[event["n"]] = answer
            if not self._came_too_early(event, answer):
                return

    def _came_too_early(self, event: Event, answer: Answer) -> bool:
        """Whether a prompt's history is still empty that was there when the recorder asked."""
        _, want = self._answers.get(event["n"], ({}, {}))
        looks = event["method"] == "GET" and event["path"].startswith("/history/")
        return looks and bool(want.get("json")) and answer.status == want.get("status") and answer.body == b"{}"

    def _patience(self, event: Event) -> float | None:
        """The recorder's time limit, where it was reached; else none."""
        _, answer = self._answers.get(event["n"], ({}, {}))
        timed_out = answer.get("error", "").startswith("TimeoutError")
        return float(answer["t"] - event["t"]) if timed_out else None

    def _here(self, value: str) -> str:
        """A recorded header value with this server's address and validators in it."""
        value = self.bindings.known.get(value, value)
        for theirs, recorded in self.results.substitutions.items():
            value = value.replace(recorded, theirs) if recorded in value else value
        return value

    async def _answered(self, number: int) -> None:
        task = self._pending.pop(number, None)
        if task is None:
            return
        await task
        _, want = self._answers.get(number, ({}, {}))
        got = self.results.answers[number]
        for name in ("Etag", "Last-Modified"):
            if name in want.get("headers", {}):
                self.bindings.known[want["headers"][name]] = _header(got, name)
        if "json" in want and got.error is None:
            with contextlib.suppress(ValueError):
                self.bindings.learn(want["json"], json.loads(got.body))

    def _form(self, fields: list[Event]) -> tuple[bytes, str]:
        """A form written by hand, so that names go out as raw UTF-8, as recorded."""
        boundary = "----recorded"
        parts = bytearray()
        for one in fields:
            parts += f'--{boundary}\r\nContent-Disposition: form-data; name="{one["name"]}"'.encode()
            if "length" in one:
                if one.get("filename") is not None:
                    name = one["filename"].replace('"', '\\"')
                    parts += f'; filename="{name}"'.encode()
                parts += b"\r\nContent-Type: application/octet-stream\r\n\r\n"
                parts += self._make_file(one.get("filename") or "", one["length"])
            else:
                parts += b"\r\n\r\n" + str(one["value"]).encode()
            parts += b"\r\n"
        parts += f"--{boundary}--\r\n".encode()
        return bytes(parts), f"multipart/form-data; boundary={boundary}"

    # Sockets

    async def _open(self, event: Event) -> None:
        sock = event["sock"]
        headers = {name: self._here(value) for name, value in event.get("headers", {}).items()}
        try:
            socket = await self._http.ws_connect(self.url + event["url"], headers=headers, max_msg_size=0)
        except aiohttp.WSServerHandshakeError as error:
            self.results.refused[sock] = error.status
            return
        self._sockets[sock] = socket
        self.results.messages[sock] = []
        self._readers.append(asyncio.create_task(self._read(sock, socket)))

    async def _read(self, sock: str, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            message = await socket.receive()
            if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                self.results.messages[sock].append(message.data)
                self._learn_message(sock, message.data)
                continue
            if sock not in self._closed_by_us:
                self.results.ended[sock] = socket.close_code
            return

    def _learn_message(self, sock: str, data: str | bytes) -> None:
        """Bind a socket id that the server made up: only its first message says it."""
        if len(self.results.messages[sock]) == 1 and isinstance(data, str):
            first = self.recording.messages(sock)[:1]
            if first and "json" in first[0]:
                self.bindings.learn(first[0]["json"], json.loads(data))

    async def _close(self, sock: str) -> None:
        self._closed_by_us.add(sock)
        socket = self._sockets.pop(sock, None)
        if socket is not None:
            await socket.close()


def _header(answer: Answer, name: str) -> str:
    return next((value for key, value in answer.headers.items() if key.lower() == name.lower()), "")
