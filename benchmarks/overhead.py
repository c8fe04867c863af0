"""
What one job costs on top of the server's own time: our whole path (bind, check, submit, watch, history, download, hash,
decode, commit with manifest) against a bare aiohttp script that posts, waits on the socket and downloads; and the same
job through the queue (enqueued, claimed by an executor in this process, written down, its end heard).

All take turns, job by job, on one server, so that a noisy machine hits all. Bars: added latency at the median
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
from benchmarks.common import Findings, graph, high, middle, report, server
from benchmarks.results import Result
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, QueueStatus
from runcomfy.testing.workers import Worker, Workers, queue_settings_for

JOBS = 300
WARM_UP = 20
BAR_MS = {False: 5.0, True: 9.0}
BAR_CPU_MS = 4.0
BAR_REQUESTS = 3


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


async def queued(worker: Worker, colour: int) -> None:
    (job,) = await worker.queue.enqueue_many([NewJob(JobRequest(graph(colour)), "bench")])
    ended = await worker.queue.wait(job)
    assert ended.status is QueueStatus.DONE, ended


Timed = list[tuple[float, float]]


async def compare(found: Findings, url: str, folder: Path, *, durable: bool) -> None:
    ours: Timed = []
    bare: Timed = []
    through: Timed = []
    options: dict[str, Any] = {"RUNCOMFY_DURABLE": "1" if durable else "0", "RUNCOMFY_STATE_DIR": str(folder / "state")}
    queue_folder = folder / f"queue-{durable}"
    queue_folder.mkdir()
    workers = Workers(load_settings(overrides=options), queue_settings_for(url, queue_folder), SystemClock())
    async with (
        aiohttp.ClientSession() as http,
        runcomfy.connect(server_url=url, **options) as comfy,
        workers.start(tell=lambda _: None) as worker,
    ):
        name = uuid4().hex
        async with http.ws_connect(f"{url}/ws?clientId={name}") as socket:
            script = Bare(http, url, socket, name)
            colour = 1 if durable else 1_000_000
            for number in range(WARM_UP + JOBS):
                colour += 3
                first = await timed(partial(script.job, colour))
                second = await timed(partial(comfy.run, graph(colour + 1), out_dir=folder / "out"))
                third = await timed(partial(queued, worker, colour + 2))
                if number >= WARM_UP:
                    bare.append(first)
                    ours.append(second)
                    through.append(third)
    _tell(found, bare, ours, through, durable=durable)


def _tell(found: Findings, bare: Timed, ours: Timed, through: Timed, *, durable: bool) -> None:
    bare_ms, ours_ms, queue_ms = (1000 * middle([t for t, _ in one]) for one in (bare, ours, through))
    bare_cpu, ours_cpu, queue_cpu = (1000 * middle([c for _, c in one]) for one in (bare, ours, through))
    how = "durable writes" if durable else "durable writes off"
    found.told(f"{how}: the bare script, median", bare_ms, "ms")
    found.at_most(f"{how}: added by the library, median", ours_ms - bare_ms, BAR_MS[durable], "ms")
    found.at_most(f"{how}: added processor time, median", ours_cpu - bare_cpu, BAR_CPU_MS, "ms")
    found.told(f"{how}: added by the queue to that, median", queue_ms - ours_ms, "ms")
    found.told(f"{how}: processor time added by the queue to that, median", queue_cpu - ours_cpu, "ms")
    report(
        "overhead",
        durable=durable,
        jobs=JOBS,
        bare_ms=round(bare_ms, 2),
        ours_ms=round(ours_ms, 2),
        added_ms=round(ours_ms - bare_ms, 2),
        added_p95_ms=round(1000 * (high([t for t, _ in ours]) - high([t for t, _ in bare])), 2),
        added_cpu_ms=round(ours_cpu - bare_cpu, 2),
        queue_ms=round(queue_ms, 2),
        queue_added_ms=round(queue_ms - ours_ms, 2),
        queue_added_cpu_ms=round(queue_cpu - ours_cpu, 2),
    )


async def requests_per_job(found: Findings, url: str, folder: Path) -> None:
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
    found.at_most("requests for a warm job, beyond transfers", len(beyond), BAR_REQUESTS)


async def run() -> Result:
    found = Findings(
        "overhead",
        f"{JOBS} jobs each way, in turns; the queue's database is a SQLite file that is not flushed in this one.",
    )
    with TemporaryDirectory(prefix="comfyctl-bench-") as folder:
        async with server() as url:
            await compare(found, url, Path(folder), durable=False)
            await compare(found, url, Path(folder), durable=True)
            await requests_per_job(found, url, Path(folder))
    return found.result()


def main() -> Result:
    return asyncio.run(run())
