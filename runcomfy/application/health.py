"""
Whether a machine can be used, asked in layers: each one alone can fail, and the answer says which did.

The provider's "Ready" comes first (it is the caller's business), then ComfyUI's own answer, then its node list. Ready
does not always mean that ComfyUI answers: it may still be starting, or a proxy may answer in its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from runcomfy.domain.exceptions import MachineFailed, NotComfyUI, RunComfyError, ServerTooOld, ServerUnreachable
from runcomfy.ports.comfyui import ComfyUI, ServerInfo

PROBE_EVERY = timedelta(seconds=3)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a health check."""

    name: str
    ok: bool
    detail: str


async def check_comfyui(server: ComfyUI) -> tuple[list[Layer], RunComfyError | None]:
    """Ask ComfyUI once, layer by layer; return the layers and what was wrong with the first bad one."""
    layers: list[Layer] = []
    try:
        info = await server.probe(fresh=True)
        layers.append(Layer("ComfyUI answers", ok=True, detail=f"version {info.version or 'unknown'}"))
    except RunComfyError as error:
        return [Layer("ComfyUI answers", ok=False, detail=error.message)], error
    try:
        classes = await server.class_names()
    except RunComfyError as error:
        return [*layers, Layer("node list readable", ok=False, detail=error.message)], error
    if not classes:
        empty = NotComfyUI("the node list is empty", hint="restart ComfyUI; look at its console")
        return [*layers, Layer("node list readable", ok=False, detail=empty.message)], empty
    return [*layers, Layer("node list readable", ok=True, detail=f"{len(classes)} node classes")], None


async def wait_until_usable(
    server: ComfyUI, *, within: timedelta, on_wait: Callable[[str], None] | None = None
) -> ServerInfo:
    """Wait until ComfyUI on a Ready machine answers in every layer.

    Raises MachineFailed if it does not within the time; ServerTooOld at once.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within.total_seconds()
    while True:
        layers, error = await check_comfyui(server)
        if error is None:
            return await server.probe()
        if isinstance(error, ServerTooOld) or not isinstance(error, (ServerUnreachable, NotComfyUI)):
            raise error
        if loop.time() >= deadline:
            raise MachineFailed(
                f"the machine is Ready but its ComfyUI is not: {error.message}",
                hint="try again with another machine; RunComfy's page may show why this one failed",
                details={"layers": [(layer.name, layer.ok, layer.detail) for layer in layers]},
            ) from error
        if on_wait is not None:
            on_wait(error.message)
        await asyncio.sleep(PROBE_EVERY.total_seconds())
