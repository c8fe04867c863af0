"""
One `comfyctl serve` in a process of its own, over an emulated cloud in another. Two measurements, one after the other:

    events      200 clients listen to everything, from a third process that does nothing else, while 50 jobs are put in
                at once and run on ten machines, two deep: how long an event of the log is on its way, from its own time
                in the database (taken before its commit) to a client's socket, over all events and clients
    job         five clients listen, as a page or two do, while twenty jobs run: how long `GET /jobs/{id}` takes, asked
                fifty times a second over a kept connection. The same with the 200 listeners is told for information

`python -m benchmarks http` prints both. Bars: median event delay below 50 ms, p99 of a job's page below 20 ms. Also
told is what each process took of the processors meanwhile, and the computer's load: what listens and asks runs on the
same processors as what is measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from runcomfy.application.job_queue import JobQueue
from runcomfy.bootstrap import App
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import NewJob, QueuedJob, QueueStatus
from runcomfy.testing.queue_programs import drawing

ROOT: Final = str(Path(__file__).resolve().parents[1])
LISTENERS: Final = 200
OF_A_PAGE: Final = 5
JOBS: Final = 50
MACHINES: Final = 10
SECONDS: Final = 6.0
AT_ONCE: Final = 20
BAR_DELAY_MS: Final = 50.0
BAR_JOB_MS: Final = 20.0
ASK_EVERY: Final = 0.02
WITHIN: Final = 180.0
NUMBER: Final = re.compile(rb"id: (\d+)\nevent: job\n")

CpuSeconds = dict[str, float]


# -- those who listen, in a process of their own -----------------------------------------------------------


class Client(asyncio.Protocol):
    """Listens, and notes what arrived when; what it was is looked at afterwards, for it shares the processors."""

    def __init__(self, asks: bytes) -> None:
        self.asks = asks
        self.arrived: list[tuple[float, bytes]] = []
        self.listens = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self.asks)

    def data_received(self, data: bytes) -> None:
        self.arrived.append((time.time(), data))
        self.listens.set()

    def numbers(self) -> dict[int, float]:
        """Return when each number of the log was complete enough to be read."""
        found: dict[int, float] = {}
        tail = b""
        for at, data in self.arrived:
            text = tail + data
            for match in NUMBER.finditer(text):
                found.setdefault(int(match[1]), at)
            tail = text[-40:]
        return found


async def listen() -> None:
    """Be the listeners: orders come as a line of JSON, the end of the input ends it; then say what was heard."""
    order = json.loads(sys.stdin.readline())
    name, _, port = order["host"].rpartition(":")
    asks = (
        f"GET /events HTTP/1.1\r\nHost: {order['host']}\r\nAuthorization: Bearer {order['token']}\r\n"
        "Accept: text/event-stream\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: Client(asks), name, int(port)))[1] for _ in range(order["listeners"])
    ]
    for client in clients:
        await client.listens.wait()
    gc.freeze()
    print(json.dumps({"listening": len(clients)}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    said = {
        "cpu_s": time.process_time(),
        "megabytes": sum(len(data) for _, data in clients[0].arrived) / 1e6,
        "arrived": [client.numbers() for client in clients],
    }
    print(json.dumps(said), flush=True)


# -- programs ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def program(
    *arguments: str, env: Mapping[str, str], cwd: Path, module: str = "runcomfy.cli.main"
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ROOT, **env},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**28,
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
    async with asyncio.timeout(60):
        while line := await process.stdout.readline():
            facts: dict[str, Any] = json.loads(line)
            if key in facts:
                return facts
    raise RuntimeError("the program has ended")


@asynccontextmanager
async def read_out(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """Read what a program prints, for the block, so that it can go on printing."""

    async def read() -> None:
        assert process.stdout is not None
        while await process.stdout.readline():
            pass

    reading = asyncio.create_task(read())
    try:
        yield
    finally:
        reading.cancel()
        await asyncio.wait([reading])


@asynccontextmanager
async def listeners(
    count: int, host: str, token: str, folder: Path
) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    """Have clients listen for the block; afterwards the dictionary has what they heard."""
    heard: dict[str, Any] = {}
    async with program("listen", env={}, cwd=folder, module="benchmarks.http") as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"host": host, "token": token, "listeners": count}).encode() + b"\n")
        await line_with(process, "listening")
        yield process, heard
        process.stdin.close()
        heard |= await line_with(process, "arrived")


# -- measuring ---------------------------------------------------------------------------------------------


class Asker:
    """Asks for jobs over one kept connection, and does little else."""

    def __init__(self, host: str, token: str) -> None:
        self._host, self._token = host, token
        self.took_ms: list[float] = []

    async def __aenter__(self) -> Asker:
        name, _, port = self._host.rpartition(":")
        self._reader, self._writer = await asyncio.open_connection(name, int(port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, job: QueuedJob) -> None:
        asks = f"GET /jobs/{job.uid} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {self._token}\r\n\r\n"
        start = time.perf_counter()
        self._writer.write(asks.encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert head.startswith(b"HTTP/1.1 200 "), head
        assert length is not None, head
        body = await self._reader.readexactly(int(length[1]))
        self.took_ms.append((time.perf_counter() - start) * 1000)
        assert json.loads(body)["id"] == job.uid


async def done_with(queue: JobQueue, jobs: Sequence[QueuedJob], asker: Asker, before: Mapping[QueueStatus, int]) -> int:
    """Ask for jobs while twenty run, until all have ended; return how many are done."""
    async with asyncio.timeout(WITHIN):
        while True:
            counts = await queue.counts()
            ended = {one: counts[one] - before[one] for one in (QueueStatus.DONE, QueueStatus.FAILED)}
            if sum(ended.values()) == len(jobs):
                return ended[QueueStatus.DONE]
            if counts[QueueStatus.PROCESSING] < AT_ONCE:
                await asyncio.sleep(0.1)
                continue
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                await asker.ask(jobs[len(asker.took_ms) % len(jobs)])
                await asyncio.sleep(ASK_EVERY)


async def put_in(queue: JobQueue, count: int, first: int) -> Sequence[QueuedJob]:
    requests = [JobRequest(drawing(SECONDS, first + number)) for number in range(count)]
    return await queue.enqueue_many([NewJob(request, "drawing") for request in requests])


def used(processes: Mapping[str, psutil.Process]) -> CpuSeconds:
    """Return what processes have taken of the processors, in seconds."""
    times = {name: process.cpu_times() for name, process in processes.items()}
    return {name: taken.user + taken.system for name, taken in times.items()}


def shares(before: CpuSeconds, after: CpuSeconds, took: float) -> dict[str, float]:
    return {f"cpu_of_{name}": round((after[name] - before[name]) / took, 3) for name in before}


async def phase(
    queue: JobQueue, host: str, token: str, folder: Path, programs: Mapping[str, psutil.Process], count: int, first: int
) -> dict[str, Any]:
    """Let some listen while fifty jobs are done, and return the figures."""
    last = await _last_number(queue, 0)
    async with listeners(count, host, token, folder) as (process, heard), Asker(host, token) as asker:
        await asyncio.sleep(1)
        processes = {**programs, "listeners": psutil.Process(process.pid), "asker": psutil.Process()}
        known, before, began = await queue.counts(), used(processes), time.monotonic()
        jobs = await put_in(queue, JOBS, first)
        done = await done_with(queue, jobs, asker, known)
        took = time.monotonic() - began
        after = used(processes)
        await asyncio.sleep(1)
    events = await queue.store.events(after=last, limit=100_000)
    by_kind: dict[str, list[float]] = {}
    for event in events:
        at = event.at.timestamp()
        by_kind.setdefault(str(event.kind), []).extend(
            (numbers[str(event.number)] - at) * 1000 for numbers in heard["arrived"]
        )
    delays = [delay for values in by_kind.values() for delay in values]
    return {
        "listeners": count,
        "done": done,
        "took_s": round(took, 1),
        "events": len(events),
        "delay_ms_p50": round(middle(delays), 1),
        "delay_ms_p99": round(high(delays, 0.99), 1),
        "delay_ms_p50_of": {kind: round(middle(values), 1) for kind, values in by_kind.items()},
        "job_asked": len(asker.took_ms),
        "job_ms_p50": round(middle(asker.took_ms), 2),
        "job_ms_p99": round(high(asker.took_ms, 0.99), 2),
        "megabytes_per_listener": round(heard["megabytes"], 2),
        **shares(before, after, took),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


async def _last_number(queue: JobQueue, after: int) -> int:
    while page := await queue.store.events(after=after, limit=1000):
        after = page[-1].number
    return after


async def measure(folder: Path) -> Result:
    found = Findings(
        "http", "One `comfyctl serve`, the cloud, listeners and asker in processes of their own on the same processors."
    )
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
            host = str((await line_with(served, "address"))["address"]).removeprefix("http://")
            token = (folder / "state" / "http_token").read_text(encoding="utf-8").split()[0]
            overrides = {key: value for key, value in env.items() if key.startswith("RUNCOMFY_")}
            programs = {"service": psutil.Process(served.pid), "cloud": psutil.Process(cloud.pid)}
            async with read_out(served), App(overrides=overrides, queue={"root": str(folder)}) as app:
                queue = await app.job_queue()
                crowd = await phase(queue, host, token, folder, programs, LISTENERS, 0)
                page = await phase(queue, host, token, folder, programs, OF_A_PAGE, JOBS)
    report(
        "http",
        events=crowd,
        job=page,
        bars={"events.delay_ms_p50": BAR_DELAY_MS, "job.job_ms_p99": BAR_JOB_MS},
        met=crowd["delay_ms_p50"] < BAR_DELAY_MS and page["job_ms_p99"] < BAR_JOB_MS,
    )
    found.at_most("event to 200 listeners while 50 jobs run, median", crowd["delay_ms_p50"], BAR_DELAY_MS, "ms")
    found.told("event to 200 listeners while 50 jobs run, p99", crowd["delay_ms_p99"], "ms")
    found.at_most("`GET /jobs/{id}` while 20 jobs run, p99", page["job_ms_p99"], BAR_JOB_MS, "ms")
    found.told("`GET /jobs/{id}` while 20 jobs run, median", page["job_ms_p50"], "ms")
    found.told("`GET /jobs/{id}` with 200 listeners, p99", crowd["job_ms_p99"], "ms")
    found.told("share of a core the service takes, 200 listeners and 50 jobs", crowd["cpu_of_service"])
    return found.result()


def main() -> Result:
    """Measure once."""
    with tempfile.TemporaryDirectory(prefix="bench-http-", ignore_cleanup_errors=True) as name:
        return asyncio.run(measure(Path(name)))


if __name__ == "__main__":
    asyncio.run(listen())
