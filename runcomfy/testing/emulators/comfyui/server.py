"""The emulator itself: folders, port, and one `ServerProcess` after the other on them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from runcomfy.testing.emulators.comfyui import files, info, jobs, prompts, users
from runcomfy.testing.emulators.comfyui.faults import FaultPlan
from runcomfy.testing.emulators.comfyui.keys import PROCESS, process_of
from runcomfy.testing.emulators.comfyui.middleware import RequestRecord, make_middlewares
from runcomfy.testing.emulators.comfyui.nodes.base import Folders, NodeClass
from runcomfy.testing.emulators.comfyui.process import Options, RunRecord, ServerProcess, SubmitRecord
from runcomfy.testing.emulators.comfyui.sockets import Frame
from runcomfy.testing.emulators.comfyui.versions import Capabilities

DEFAULT_VERSION = "0.33.0"


class ComfyUIEmulator:
    """A ComfyUI server in this process: real HTTP and sockets on loopback, node work done by small stand-ins.

    It behaves as recorded from real servers of versions 0.3.64, 0.10.0 and 0.33.0, and wrongly only where `faults`
    say so. All waiting is done on the running loop's clock, so it can live under virtual time; stamps come from
    `now`. What it really did is in `run_log`, `requests` and `boots`.

        async with ComfyUIEmulator() as comfyui:
            ...  # comfyui.url
    """

    run_log: list[RunRecord]
    """Every prompt that was begun, oldest first, over all boots."""
    submit_log: list[SubmitRecord]
    """Every prompt that was accepted, oldest first, over all boots."""
    requests: list[RequestRecord]
    """Every HTTP request, handshakes included."""
    boots: int
    """How often the server was started."""
    _process: ServerProcess | None
    _runner: web.AppRunner | None
    _crash: asyncio.Task[None] | None

    def __init__(
        self,
        *,
        folder: Path | None = None,
        version: str = DEFAULT_VERSION,
        max_upload_size_mb: float = 100,
        multi_user: bool = False,
        cors: str | None = None,
        enable_assets: bool = False,
        cache: bool = True,
        compress: bool = False,
        save_metadata: bool = True,
        speed: float = 1.0,
        round_trip: float = 0.0,
        now: Callable[[], float] = time.time,
        nodes: Mapping[str, NodeClass] | None = None,
    ) -> None:
        """Prepare a server; before `start` there is only its folder.

        Args:
            folder: base folder with `input`, `output`, `temp`, `user`, `models`; a temporary one by default, removed
                at `stop`.
            version: the ComfyUI version to be.
            max_upload_size_mb: limit of every request body.
            multi_user: `--multi-user`.
            cors: the origin of `--enable-cors-header`, None for the origin check instead.
            enable_assets: `--enable-assets`, as far as clients of prompts see it.
            cache: False for `--cache-none`.
            compress: `--enable-compress-response-body`.
            save_metadata: False for `--disable-metadata`.
            speed: how many times faster than told nodes work.
            round_trip: seconds that every HTTP call takes on the way, there and back; a frame of a socket takes half.
            now: wall clock in seconds, for stamps only.
            nodes: node classes by name; the shipped ones by default.
        """
        self._own_folder = folder is None
        self._base = folder if folder is not None else Path(tempfile.mkdtemp(prefix="comfyui-emulator-"))
        self.folders = Folders.below(self._base.resolve())
        capabilities = Capabilities.of(version)
        self.options = Options(
            folders=self.folders,
            nodes=_known(nodes, capabilities),
            capabilities=capabilities,
            now=now,
            max_upload_size=max_upload_size_mb,
            multi_user=multi_user,
            cors=cors,
            enable_assets=enable_assets,
            cache=cache,
            compress=compress,
            save_metadata=save_metadata,
            speed=speed,
            round_trip=round_trip,
        )
        self.faults = FaultPlan()
        self.run_log, self.submit_log, self.requests, self.boots = [], [], [], 0
        self.host, self.port = "127.0.0.1", 0
        self._process, self._runner, self._crash = None, None, None

    # Life

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Boot; port 0 takes any free one. Returns the base url."""
        self.host, self.port = host, port
        await self._boot()
        return self.url

    @property
    def url(self) -> str:
        """Base url, without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    @property
    def process(self) -> ServerProcess:
        """The living server process. Raises RuntimeError between a kill and the restart."""
        if self._process is None:
            raise RuntimeError("the emulated ComfyUI is not running")
        return self._process

    @property
    def alive(self) -> bool:
        """Whether there is a server process, hanging or not."""
        return self._process is not None

    async def stop(self) -> None:
        """Shut down, and remove the folder if it is a temporary one. A dead server may be stopped too."""
        if self._crash is not None:
            await self._crash
        await self._end()
        if self._own_folder:
            shutil.rmtree(self._base, ignore_errors=True)

    async def kill(self) -> None:
        """End as by SIGKILL: sockets end without a close frame, the port refuses, memory is gone, files stay."""
        await self._end()

    async def restart(self) -> None:
        """Boot again on the same port: empty queue, history and cache, counter at 0, temp wiped."""
        await self._end()
        await self._boot()

    def hang(self) -> None:
        """Freeze as by SIGSTOP: connections stay, nothing is answered, sent or run."""
        self.process.hang()

    def resume(self) -> None:
        """Go on where `hang` stopped."""
        self.process.resume()

    def kill_worker(self) -> None:
        """Let the prompt worker die; the server goes on accepting prompts that never run."""
        self.process.kill_worker()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Interventions

    def inject(self, client_id: str | None, payload: str | bytes, *, text: bool = False) -> None:
        """Send a frame of any content to a client id's socket, or to all.

        Bytes go out as a binary frame, or with `text` as a text frame, so that it can be invalid UTF-8.
        """
        self.process.hub.inject(Frame(client_id, raw=payload, text=text))

    def stall_node(self, node_id: str, *, at: float = 0.0) -> None:
        """Let a node stand still when its progress reaches that fraction; it does not look for interrupts."""
        self.process.stalls.add(node_id, at)

    def release_node(self, node_id: str) -> None:
        """Let a stalled node go on."""
        self.process.stalls.release(node_id)

    def hold_history(self, seconds: float) -> None:
        """Widen the gap between `execution_success` and the history entry."""
        self.faults.history_delay = seconds

    def vanish(self, prompt_id: str) -> None:
        """Let a prompt disappear from queue and history as if it had never been there; a running one stops."""
        self.process.vanish(prompt_id)

    def cut_sockets(self, client_id: str | None = None) -> int:
        """End sockets without a close frame, those of a client id or all; returns how many."""
        chosen = [s for s in self.process.hub.open if client_id in (None, s.sid)]
        for socket in chosen:
            socket.abort()
        return len(chosen)

    async def close_sockets(self, client_id: str | None = None, *, code: int = 1001) -> int:
        """Close sockets politely, those of a client id or all, as a proxy does that restarts; returns how many."""
        chosen = [s for s in self.process.hub.open if client_id in (None, s.sid)]
        for socket in chosen:
            await socket.ws.close(code=code)
        return len(chosen)

    def count(self, method: str, path: str) -> int:
        """How many requests of that method came for that path (without query and `/api`)."""
        return sum(1 for r in self.requests if r.method == method and r.path == path)

    # Machinery

    async def _boot(self) -> None:
        shutil.rmtree(self.folders.temp, ignore_errors=True)
        for folder in (
            self.folders.input,
            self.folders.output,
            self.folders.temp,
            self.folders.user / "default",
            self.folders.models,
        ):
            folder.mkdir(parents=True, exist_ok=True)
        self.boots += 1
        process = ServerProcess(self.options, self.faults, self.boots, self.run_log, self.submit_log)
        app = web.Application(
            client_max_size=int(self.options.max_upload_size * 1024 * 1024),
            middlewares=make_middlewares(process, self.requests),
        )
        app[PROCESS] = process
        _add_routes(app, process)
        # No graceful part: a server that is stopped here is gone, as the real one is.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port, reuse_address=True).start()
        self.port = int(self._runner.addresses[0][1])
        self._process = process
        process.start(self._crashed)

    def _crashed(self) -> None:
        if self._crash is None and self._process is not None:
            self._crash = asyncio.get_running_loop().create_task(self._end(), name="comfyui crash")

    async def _end(self) -> None:
        process, self._process = self._process, None
        runner, self._runner = self._runner, None
        if process is None or runner is None:
            return
        for site in list(runner.sites):
            await site.stop()
        if runner.server is not None:
            for connection in runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
        await process.end()
        # aiohttp waits for handlers; ours may sleep for ever on purpose, so they are told first.
        process.over.set()
        with contextlib.suppress(ConnectionError):
            await runner.cleanup()
        self._crash = None


def _add_routes(app: web.Application, process: ServerProcess) -> None:
    async def websocket(request: web.Request) -> web.StreamResponse:
        process_here = process_of(request)
        return await process_here.hub.serve(request, process_here.faults.next_socket())

    async def nothing(_: web.Request) -> web.Response:
        return web.Response(status=404, content_type="application/octet-stream")

    async def root(_: web.Request) -> web.Response:
        text = "<!doctype html><title>ComfyUI (emulated)</title><p>An emulated ComfyUI without a web page."
        return web.Response(text=text, content_type="text/html")

    definitions = [
        definition
        for table in _tables(process.capabilities)
        for definition in table
        if isinstance(definition, web.RouteDef)
        and (process.capabilities.jobs_cancel or not definition.path.endswith("/cancel"))
    ]
    definitions.append(web.get("/ws", websocket))
    for definition in definitions:
        definition.register(app.router)  # a GET is registered with its HEAD
        if not definition.path.startswith(("/internal", "/api/")):
            web.route(definition.method, f"/api{definition.path}", definition.handler).register(app.router)
    app.router.add_get("/", root)
    # Unknown paths fall through to the static web files of the real server: GET is a 404, the rest a 405.
    app.router.add_get("/{path:.*}", nothing)


def _tables(can: Capabilities) -> list[web.RouteTableDef]:
    tables = [prompts.routes, files.routes, info.routes, users.routes]
    if can.jobs:
        tables.append(jobs.routes)
    return tables


def _known(nodes: Mapping[str, NodeClass] | None, capabilities: Capabilities) -> dict[str, NodeClass]:
    """Return which of these nodes, or of those that are shipped, a server of that version has."""
    if nodes is None:
        from runcomfy.testing.emulators.comfyui.nodes import NODE_CLASSES

        nodes = NODE_CLASSES
    return {name: node for name, node in nodes.items() if node.since <= capabilities.version}
