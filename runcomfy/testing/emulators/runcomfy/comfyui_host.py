"""What answers at an emulated machine's address: an emulated ComfyUI, a splash page, or nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from runcomfy.testing.emulators.runcomfy.cloud import Listener
from runcomfy.testing.emulators.runcomfy.faults import SPLASH
from runcomfy.testing.emulators.runcomfy.machines import ComfyServer, EmulatedMachine, call, in_seconds

_log = logging.getLogger("runcomfy.emulator")

ComfyUIFactory = Callable[[EmulatedMachine], ComfyServer]
"""Makes the server of a machine."""


def emulated_comfyui(folder: Path, *, now: Callable[[], float], speed: float = 1.0) -> ComfyUIFactory:
    """Return a factory of emulated ComfyUI servers, each with a folder of its own below `folder`."""

    def make(machine: EmulatedMachine) -> ComfyServer:
        from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

        own = folder / machine.server_id
        own.mkdir(parents=True, exist_ok=True)
        return ComfyUIEmulator(folder=own, speed=speed, now=now)

    return make


class SplashServer:
    """Answers everything with the same page, as a proxy does while the machine behind it is not there yet."""

    def __init__(self, *, status: int) -> None:
        self._status = status
        self._listener: Listener | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen, and return the address."""
        self._listener = Listener(self._answer, host=host, port=port)
        return await self._listener.start()

    async def stop(self) -> None:
        """Go away."""
        if self._listener is not None:
            await self._listener.stop()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=self._status, text=SPLASH, content_type="text/html")


async def free_port(host: str) -> int:
    """Return a port that nobody listens at; somebody else may take it, but hardly does. The loop knows which."""
    probe = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, 0)
    port = int(probe.sockets[0].getsockname()[1])
    probe.close()
    await probe.wait_closed()
    return port


async def put_up(machine: EmulatedMachine, make: ComfyUIFactory | None, *, host: str) -> str:
    """Make the machine's address answer as its traits say, and return the address."""
    if make is None:
        return f"https://{machine.server_id}-comfyui.runcomfy.invalid"
    manner = machine.traits.comfyui
    if manner == "works":
        machine.comfyui = make(machine)
        return await machine.comfyui.start(host)
    if manner not in ("refused", "502", "html"):
        raise ValueError(f"no manner {manner!r} for an address; one of works, refused, 502, html")
    machine.port = await free_port(host)
    if manner != "refused":
        machine.comfyui = SplashServer(status=502 if manner == "502" else 200)
        await machine.comfyui.start(host, machine.port)
    if machine.traits.comfyui_for is not None:
        machine.timers["comfyui"] = asyncio.get_running_loop().call_later(
            in_seconds(machine.traits.comfyui_for), lambda: spawn(machine, _replace(machine, make, host))
        )
    return f"http://{host}:{machine.port}"


def spawn(machine: EmulatedMachine, work: Coroutine[Any, Any, None]) -> None:
    """Do something about the machine in a task of its own, which ends with the cloud at the latest."""
    task = asyncio.get_running_loop().create_task(work)
    machine.work.add(task)

    def done(task: asyncio.Task[None]) -> None:
        machine.work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            machine.errors.append(error)
            _log.error("emulated machine %s failed", machine.server_id, exc_info=error)

    task.add_done_callback(done)


async def _replace(machine: EmulatedMachine, make: ComfyUIFactory, host: str) -> None:
    await take_down(machine)
    if machine.bills:
        machine.comfyui = make(machine)
        await machine.comfyui.start(host, machine.port)


async def take_down(machine: EmulatedMachine) -> None:
    """Make the machine's address refuse connections; what ran there is cut off."""
    server, machine.comfyui = machine.comfyui, None
    if server is None:
        return
    machine.comfyui_was = server
    kill = getattr(server, "kill", None)
    if kill is not None:
        await call(kill())
    await server.stop()
