"""
A ComfyUI server that costs nearly nothing, in this process: for what is told of whoever keeps hundreds.

It keeps the port's contract as far as a well-behaved server needs it: one prompt computes at a time, the others wait
in its queue, sockets say what happens, the history keeps what came of it. Every result is the same small picture.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from runcomfy.domain.exceptions import ServerUnreachable, ValueInvalid
from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.progress import HistoryEntry, QueueView, Said, ServerEvent, SocketUp
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import Fetched, ServerInfo, Submitted
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine
from runcomfy.testing.samples import png_chunk, png_from, png_header

NODES: Final[Mapping[str, Any]] = {
    "Compute": {
        "input": {"required": {"seconds": ["FLOAT", {"default": 1.0, "min": 0.0, "max": 1e6}]}},
        "output": ["IMAGE"],
        "output_node": False,
    },
    "SaveImage": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {"default": "bench"}]}},
        "output": [],
        "output_node": True,
    },
}


def graph(seconds: float, number: int) -> dict[str, Any]:
    """Return a graph that takes so long."""
    return {
        "1": {"class_type": "Compute", "inputs": {"seconds": seconds}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"job-{number}"}},
    }


def _png(side: int = 16) -> bytes:
    rows = b"".join(b"\0" + bytes((20 * y + x) % 256 for x in range(3 * side)) for y in range(side))
    return png_from(png_header(side, side), png_chunk(b"IDAT", zlib.compress(rows)))


PICTURE: Final = _png()
SHA256: Final = hashlib.sha256(PICTURE).hexdigest()


class LightServer:
    """The server of one emulated machine."""

    def __init__(self, park: LightComfyUIs, server_id: str) -> None:
        self.url = f"https://{server_id}-comfyui.runcomfy.invalid"
        self.waiting: dict[PromptId, float] = {}
        self.running: PromptId | None = None
        self.history: dict[PromptId, HistoryEntry] = {}
        self.listeners: dict[PromptId, asyncio.Queue[ServerEvent]] = {}
        self.up = False
        self._park = park
        self._end: asyncio.TimerHandle | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Answer from now on; return the address."""
        self.up = True
        self._park.by_url[self.url] = self
        return self.url

    async def stop(self) -> None:
        """Answer no more."""
        self.up = False
        if self._end is not None:
            self._end.cancel()

    def add(self, prompt_id: PromptId, seconds: float) -> None:
        """Queue a prompt that takes so long."""
        self.waiting[prompt_id] = seconds
        self._next()

    def _next(self) -> None:
        if self.running is not None or not self.waiting:
            return
        prompt_id = next(iter(self.waiting))
        seconds = self.waiting.pop(prompt_id)
        self.running = prompt_id
        self._park.begun(prompt_id)
        began = self._park.stamp()
        self.say(prompt_id, "execution_start", timestamp=began)
        self._end = asyncio.get_running_loop().call_later(seconds, self._ended, prompt_id, began)

    def _ended(self, prompt_id: PromptId, began: int) -> None:
        images = {"images": [{"filename": f"{prompt_id}.png", "subfolder": "", "type": "output"}]}
        about = {"prompt_id": prompt_id}
        messages = (
            ("execution_start", {**about, "timestamp": began}),
            ("execution_success", {**about, "timestamp": self._park.stamp()}),
        )
        self.history[prompt_id] = HistoryEntry(prompt_id, {"2": images}, "success", messages)
        self.running = None
        self._next()
        self.say(prompt_id, "executed", node="2", output=images)
        self.say(prompt_id, "execution_success")
        self.say(prompt_id, "executing", node=None)

    def say(self, prompt_id: PromptId, kind: str, **data: Any) -> None:
        """Send a message to whoever listens for a prompt."""
        if prompt_id in self.listeners:
            self.listeners[prompt_id].put_nowait(Said(kind, {"prompt_id": prompt_id, **data}))


class LightComfyUIs:
    """All servers there are, by address. `factory` is what an emulated cloud makes them with."""

    def __init__(self, clock: Clock) -> None:
        self.by_url: dict[str, LightServer] = {}
        self.ran: dict[PromptId, int] = {}
        """How often each prompt was begun."""
        self.requests = 0
        self._clock = clock

    def factory(self, machine: EmulatedMachine) -> LightServer:
        """Return the server of an emulated machine."""
        return LightServer(self, machine.server_id)

    def stamp(self) -> int:
        """Return the time as servers write it: milliseconds since 1970."""
        return int(self._clock.now().timestamp() * 1000)

    def begun(self, prompt_id: PromptId) -> None:
        """Count a prompt that begins to compute."""
        self.ran[prompt_id] = self.ran.get(prompt_id, 0) + 1


class LightClient:
    """Keeps `runcomfy.ports.comfyui.ComfyUI`."""

    def __init__(self, park: LightComfyUIs, url: str) -> None:
        self._park, self._url = park, url.rstrip("/")

    @property
    def masked_url(self) -> str:
        """See the port."""
        return "https://…"

    def _server(self) -> LightServer:
        self._park.requests += 1
        server = self._park.by_url.get(self._url)
        if server is None or not server.up:
            raise ServerUnreachable("nobody answers there")
        return server

    async def probe(self, *, fresh: bool = False) -> ServerInfo:
        """See the port."""
        self._server()
        return ServerInfo("0.27.0", interrupts_by_id=True, cancels_jobs=True)

    async def node_info(self, classes: Collection[str], *, fresh: bool = False) -> Mapping[str, Any]:
        """See the port."""
        self._server()
        return {name: NODES[name] for name in classes if name in NODES}

    async def class_names(self) -> Collection[str]:
        """See the port."""
        self._server()
        return list(NODES)

    async def upload(self, path: str, *, kind: str = "image") -> str:
        """See the port."""
        raise ValueInvalid("graphs that run here have no inputs", hint="`ComfyUIEmulator` takes uploads")

    @asynccontextmanager
    async def listen(self, prompt_id: PromptId) -> AsyncIterator[AsyncIterator[ServerEvent]]:
        """See the port."""
        server = self._server()
        events: asyncio.Queue[ServerEvent] = asyncio.Queue()
        events.put_nowait(SocketUp())
        server.listeners[prompt_id] = events

        async def heard() -> AsyncIterator[ServerEvent]:
            while True:
                yield await events.get()

        try:
            yield heard()
        finally:
            server.listeners.pop(prompt_id, None)

    def renew_socket(self, reason: str) -> None:
        """There is none."""

    async def submit(self, graph: Mapping[str, Any], *, prompt_id: PromptId) -> Submitted:
        """See the port."""
        self._server().add(prompt_id, float(graph["1"]["inputs"]["seconds"]))
        return Submitted(prompt_id)

    async def queue(self) -> QueueView:
        """See the port."""
        server = self._server()
        return QueueView((server.running,) if server.running is not None else (), tuple(server.waiting))

    async def history(self, prompt_id: PromptId) -> HistoryEntry | None:
        """See the port."""
        return self._server().history.get(prompt_id)

    async def cancel(self, prompt_id: PromptId, *, alone: bool) -> bool:
        """See the port."""
        return await self.withdraw(prompt_id)

    async def withdraw(self, prompt_id: PromptId) -> bool:
        """See the port."""
        server = self._server()
        if server.running == prompt_id or prompt_id in server.history:
            return False
        server.waiting.pop(prompt_id, None)
        return True

    async def fetch(self, file: FileRef, destination: str) -> Fetched:
        """See the port."""
        self._server()
        await asyncio.to_thread(Path(destination).write_bytes, PICTURE)
        return Fetched(len(PICTURE), SHA256)

    async def close(self) -> None:
        """There is nothing to close."""
