"""
What one job costs on top of the server's own time: our whole path (bind, check, submit, watch, history, download, hash,
decode, commit with manifest) against a bare aiohttp script that posts, waits on the socket and downloads.

The two take turns, job by job, on one server, so that a noisy machine hits both. Bars: added latency at the median
under 5 ms with durable writes off and under 9 ms with them on, added CPU under 4 ms, at most 3 HTTP requests per job
beyond uploads and downloads.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import aiohttp

import runcomfy
from benchmarks.common import graph, high, middle, report, server

JOBS = 300
WARM_UP = 20


class Bare:
    """The script to compare with."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, socket: aiohttp.ClientWebSocketResponse, name: str
    ) -> None:
        self._http, self._url, self._socket, self._name = http, url, socket, name

    async def job(self, colour: int) -> None:
        prompt_id = str(uuid4())
        body = {"prompt": graph(colour), "client_id": self._name, "prompt_id": prompt_id}
        async with self._http.post(f"{self._url}/prompt", json=body) as answer:
            assert answer.status == 200
            await answer.read()
        images = []
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            said = json.loads(message.data)
            data = said["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if said["type"] == "executed":
                images = data["output"]["images"]
            if said["type"] == "executing" and data["node"] is None:
                break
        for image in images:
            async with self._http.get(f"{self._url}/view?{urlencode(image)}") as answer:
                assert answer.status == 200
                assert await answer.read()


async def timed(work: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Return seconds and CPU seconds of one job."""
    wall, cpu = time.perf_counter(), time.process_time()
    await work()
    return time.perf_counter() - wall, time.process_time() - cpu


async def compare(url: str, folder: Path, *, durable: bool) -> None:
    ours: list[tuple[float, float]] = []
    bare: list[tuple[float, float]] = []
    options: dict[str, Any] = {"RUNCOMFY_DURABLE": "1" if durable else "0", "RUNCOMFY_STATE_DIR": str(folder / "state")}
    async with aiohttp.ClientSession() as http, runcomfy.connect(server_url=url, **options) as comfy:
        name = uuid4().hex
        async with http.ws_connect(f"{url}/ws?clientId={name}") as socket:
            script = Bare(http, url, socket, name)
            colour = 1 if durable else 1_000_000
            for number in range(WARM_UP + JOBS):
                colour += 2
                first = await timed(partial(script.job, colour))
                second = await timed(partial(comfy.run, graph(colour + 1), out_dir=folder / "out"))
                if number >= WARM_UP:
                    bare.append(first)
                    ours.append(second)
    report(
        "overhead",
        durable=durable,
        jobs=JOBS,
        bare_ms=round(1000 * middle([t for t, _ in bare]), 2),
        ours_ms=round(1000 * middle([t for t, _ in ours]), 2),
        added_ms=round(1000 * (middle([t for t, _ in ours]) - middle([t for t, _ in bare])), 2),
        added_p95_ms=round(1000 * (high([t for t, _ in ours]) - high([t for t, _ in bare])), 2),
        added_cpu_ms=round(1000 * (middle([c for _, c in ours]) - middle([c for _, c in bare])), 2),
    )


async def requests_per_job(url: str, folder: Path) -> None:
    """Count the requests of warm jobs, beyond uploads and downloads, as our own HTTP client sends them."""
    from unittest.mock import patch

    seen: list[str] = []
    send = aiohttp.ClientSession._request

    async def counted(self: aiohttp.ClientSession, method: str, address: object, **options: object) -> object:
        seen.append(f"{method} {str(address).split('?', maxsplit=1)[0].removeprefix(url)}")
        return await send(self, method, address, **options)  # type: ignore[arg-type]

    async with runcomfy.connect(server_url=url, RUNCOMFY_STATE_DIR=str(folder / "state")) as comfy:
        await comfy.run(graph(5_000_001), out_dir=folder / "out")
        with patch.object(aiohttp.ClientSession, "_request", counted):
            await comfy.run(graph(5_000_002), out_dir=folder / "out")
    beyond = [line for line in seen if not line.endswith(("/view", "/upload/image"))]
    report("requests", beyond_transfers=len(beyond), which=beyond, transfers=len(seen) - len(beyond))


async def run() -> None:
    with TemporaryDirectory(prefix="comfyctl-bench-") as folder:
        async with server() as url:
            await compare(url, Path(folder), durable=False)
            await compare(url, Path(folder), durable=True)
            await requests_per_job(url, Path(folder))


def main() -> None:
    asyncio.run(run())
