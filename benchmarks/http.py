"""
One `comfyctl serve` in a process of its own, over an emulated cloud in another: 200 clients listen to everything while
50 jobs are put in at once and run on ten machines, two deep.

`python -m benchmarks http` prints how long an event of the log is on its way, from its own time in the database (taken
before its commit) to the client's socket, over all clients; and how long `GET /jobs/{id}` takes while twenty jobs run,
asked by one client over a kept connection. Bars: median event delay below 50 ms, p99 of a job's page below 20 ms.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.common import high, middle, report
from runcomfy.bootstrap import App
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, QueueStatus
from runcomfy.testing.queue_programs import drawing

ROOT: Final = str(Path(__file__).resolve().parents[1])
LISTENERS: Final = 200
JOBS: Final = 50
MACHINES: Final = 10
SECONDS: Final = 6.0
AT_ONCE: Final = 20
BAR_DELAY_MS: Final = 50.0
BAR_JOB_MS: Final = 20.0
ASK_EVERY: Final = 0.02
WITHIN: Final = 180.0


class Client(asyncio.Protocol):
    """Listens, and notes when each number of the log arrived. It does little: it shares the service's processors."""

    NUMBER: Final = re.compile(rb"id: (\d+)\nevent: job\n")

    def __init__(self, path: str, host: str, token: str) -> None:
        self.asks = (
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nAccept: text/event-stream\r\n\r\n"
        ).encode()
        self.arrived: dict[int, float] = {}
        self.size = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.asks)

    def data_received(self, data: bytes) -> None:
        now = time.time()
        self.size += len(data)
        text = self._tail + data
        for found in self.NUMBER.finditer(text):
            self.arrived.setdefault(int(found[1]), now)
        self._tail = text[-40:]


@asynccontextmanager
async def program(*arguments: str, env: Mapping[str, str], cwd: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "runcomfy.cli.main",
        *arguments,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ROOT, **env},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


async def line_with(process: asyncio.subprocess.Process, key: str) -> dict[str, Any]:
    """Return the next object the program prints that has a key."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while line := await process.stdout.readline():
            facts: dict[str, Any] = json.loads(line)
            if key in facts:
                return facts
    raise RuntimeError("the program has ended")


async def measure(folder: Path) -> None:
    quick = ("--boot-seconds", "1", "--delete-seconds", "0.2", "--no-rate-limit", "--json")
    async with program("emulator", *quick, env={}, cwd=folder) as cloud:
        account = {key: str(value) for key, value in (await line_with(cloud, "RUNCOMFY_API_BASE_URL")).items()}
        env = {
            **account,
            "RUNCOMFY_STATE_DIR": str(folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": "",
            "RUNCOMFY_POLL_INTERVAL": "0.5",
            "RUNCOMFY_REQUESTS_PER_SECOND": "50",
            "RUNCOMFY_BURST": "50",
            "RUNCOMFY_WAIT_PRICE": "1000",
            "COMFYUI_AGENT_DRAIN": "1s",
        }
        flags = ("serve", "--json", "--port", "0", "--no-guard", "--no-monitor", "--max-machines", str(MACHINES))
        async with program(*flags, env=env, cwd=folder) as served:
            address = str((await line_with(served, "address"))["address"])
            drain = asyncio.create_task(_read_out(served))
            token = (folder / "state" / "http_token").read_text(encoding="utf-8").split()[0]
            overrides = {key: value for key, value in env.items() if key.startswith("RUNCOMFY_")}
            async with App(overrides=overrides, queue={"root": str(folder)}) as app:
                await _listened(app, address, token)
            drain.cancel()


async def _read_out(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    while await process.stdout.readline():
        pass


async def _listened(app: App, address: str, token: str) -> None:
    loop, host = asyncio.get_running_loop(), address.removeprefix("http://")
    name, _, port = host.rpartition(":")
    clients = [
        (await loop.create_connection(lambda: Client("/events", host, token), name, int(port)))[1]
        for _ in range(LISTENERS)
    ]
    await asyncio.sleep(1)
    queue = await app.job_queue()
    began = time.monotonic()
    requests = [JobRequest(drawing(SECONDS, number)) for number in range(JOBS)]
    jobs = await queue.enqueue_many([NewJob(request, "drawing") for request in requests])
    asked: list[float] = []
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        async with asyncio.timeout(WITHIN):
            while True:
                counts = await queue.counts()
                if counts[QueueStatus.DONE] + counts[QueueStatus.FAILED] == JOBS:
                    break
                if counts[QueueStatus.PROCESSING] < AT_ONCE:
                    await asyncio.sleep(0.1)
                    continue
                until = time.monotonic() + 0.5
                while time.monotonic() < until:
                    job = jobs[len(asked) % JOBS]
                    start = time.perf_counter()
                    async with session.get(f"{address}/jobs/{job.uid}") as answer:
                        await answer.read()
                    assert answer.status == 200, answer.status
                    asked.append((time.perf_counter() - start) * 1000)
                    await asyncio.sleep(ASK_EVERY)
    took = time.monotonic() - began
    await asyncio.sleep(1)
    events = await queue.store.events(limit=100_000)
    delays = [(client.arrived[event.number] - event.at.timestamp()) * 1000 for event in events for client in clients]
    by_kind: dict[str, list[float]] = {}
    for event in events:
        by_kind.setdefault(str(event.kind), []).extend(
            (client.arrived[event.number] - event.at.timestamp()) * 1000 for client in clients
        )
    report(
        "http",
        listeners=LISTENERS,
        jobs=JOBS,
        done=counts[QueueStatus.DONE],
        took_s=round(took, 1),
        events=len(events),
        arrivals=len(delays),
        delay_ms_p50=round(middle(delays), 1),
        delay_ms_p99=round(high(delays, 0.99), 1),
        delay_ms_p50_of={kind: round(middle(values), 1) for kind, values in by_kind.items()},
        job_asked=len(asked),
        job_ms_p50=round(middle(asked), 2),
        job_ms_p99=round(high(asked, 0.99), 2),
        megabytes_per_listener=round(clients[0].size / 1e6, 2),
        bars={"delay_ms_p50": BAR_DELAY_MS, "job_ms_p99": BAR_JOB_MS},
        met=middle(delays) < BAR_DELAY_MS and high(asked, 0.99) < BAR_JOB_MS,
    )


def main() -> None:
    """Measure once."""
    with tempfile.TemporaryDirectory(prefix="bench-http-", ignore_cleanup_errors=True) as name:
        asyncio.run(measure(Path(name)))
