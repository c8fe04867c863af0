"""
A thousand ComfyUI servers that each say something every 100 ms, heard by one process on one core.

The sockets are real, on the loopback. The servers are one other process that speaks as ComfyUI does and computes
nothing: to each of its thousand addresses the product's own client keeps a socket, a watcher folds what is said, and
every snapshot goes the whole way to where the API and the page would read it (`RunRecord`, `Live`). Every second
message is `progress` and carries the time it was sent; the others are `progress_state` of a workflow of eight nodes. In
the end each server says that its prompt has ended, and each watcher reads the history and returns.

Bars: 10,000 messages a second on one core, none lost, none later than the next one is sent (100 ms) at the 99th
percentile.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import psutil

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.application.journal import NoJournal
from runcomfy.application.live import Live
from runcomfy.application.run_record import RunRecord
from runcomfy.application.watcher import Watcher
from runcomfy.domain.job import JobId, PromptId
from runcomfy.domain.progress import NodeLabel, Progress
from runcomfy.domain.settings import ComfySettings

SERVERS: Final = int(os.environ.get("BENCHMARK_SERVERS", "1000"))
EVERY: Final = 0.1
WARM_UP: Final = 3.0
SECONDS: Final = 15.0
TURN: Final = 0.002
END_WITHIN: Final = 60.0
"""Seconds in which every watcher must have seen the end of its prompt."""
AT_ONCE: Final = 50
"""Connections that are opened at the same time."""
MOST: Final = 10_000_000
"""The steps that a node says it has; the one it is at tells when that was sent, in milliseconds."""
BAR_RATE: Final = SERVERS / EVERY
SLACK: Final = 100
"""Messages that may lie beyond the ends of the time that is measured, in a second."""
BAR_LATE_MS: Final = 1000 * EVERY
NODES: Final = {str(number): NodeLabel(f"Node {number}", "KSampler") for number in range(1, 9)}

_KEY: Final = re.compile(rb"sec-websocket-key: *(\S+)", re.IGNORECASE)
_PATH: Final = re.compile(rb"GET /s(\d+)(/\S*) HTTP")
_ACCEPTS: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def prompt_of(server: int) -> PromptId:
    return PromptId(f"00000000-0000-4000-8000-{server:012d}")


# -- the servers, in a process of their own ----------------------------------------------------------------


class Line(asyncio.Protocol):
    """A connection to one of the servers: an HTTP request, or its socket."""

    def __init__(self, park: Park) -> None:
        self._park = park
        self._got = b""
        self._is_socket = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._got += data
        while self._frame() if self._is_socket else self._request():
            pass

    def _request(self) -> bool:
        head, end, rest = self._got.partition(b"\r\n\r\n")
        if not end:
            return False
        self._got = rest
        path = _PATH.match(head)
        assert path is not None, head
        server = int(path[1])
        if path[2].startswith(b"/ws"):
            key = _KEY.search(head)
            assert key is not None
            accept = base64.b64encode(hashlib.sha1(key[1] + _ACCEPTS).digest())  # noqa: S324 - RFC 6455
            self.transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            self._is_socket = True
            self._park.sockets[server] = self.transport
        else:
            body = json.dumps(self._park.answer(server, path[2].decode())).encode()
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
        return True

    def _frame(self) -> bool:
        """Read one frame of the client; only pings and the close are answered. RFC 6455, 5.2."""
        got = self._got
        if len(got) < 6:
            return False
        size, head = got[1] & 127, 2
        if size == 126:
            size, head = int.from_bytes(got[2:4], "big"), 4
        if len(got) < head + 4 + size:
            return False
        mask, masked = got[head : head + 4], got[head + 4 : head + 4 + size]
        self._got = got[head + 4 + size :]
        said = bytes(byte ^ mask[at % 4] for at, byte in enumerate(masked))
        kind = got[0] & 15
        if kind == 9:
            self.transport.write(bytes((0x8A, len(said))) + said)
        if kind == 8:
            self.transport.write(bytes((0x88, len(said))) + said)
            self.transport.close()
        return True


class Park:
    """All servers."""

    def __init__(self) -> None:
        self.sockets: dict[int, asyncio.Transport] = {}
        self.sent = 0
        self.over = False
        self.asked = 0

    def answer(self, server: int, path: str) -> Any:
        self.asked += 1
        name = prompt_of(server)
        if path == "/queue":
            return {"queue_running": [] if self.over else [[0, name, {}, {}, []]], "queue_pending": []}
        if path.startswith("/history") and self.over:
            return {name: {"outputs": {}, "status": {"status_str": "success", "completed": True, "messages": []}}}
        return {}

    def say(self, server: int, kind: str, data: dict[str, Any]) -> None:
        text = json.dumps({"type": kind, "data": data | {"prompt_id": prompt_of(server)}}).encode()
        size = bytes((len(text),)) if len(text) < 126 else b"\x7e" + len(text).to_bytes(2, "big")
        if server in self.sockets:  # else it could not be opened in time, on a computer that has no time
            self.sockets[server].write(b"\x81" + size + text)

    async def talk(self, began: float, until: Callable[[], bool]) -> None:
        """Have each server say something every 100 ms, each at a time of its own, until told to stop."""
        state = {
            number: {"value": 1, "max": 1, "state": "finished", "node_id": number, "display_node_id": number}
            for number in list(NODES)[:4]
        }
        due = 0
        while not until():
            now = time.time() - began
            last = int(now / EVERY * SERVERS)
            for number in range(due, last):
                server, turn = number % SERVERS, number // SERVERS
                at = int((time.time() - began) * 1000)
                if turn % 2:
                    running = {"value": at, "max": MOST, "state": "running", "node_id": "5", "display_node_id": "5"}
                    self.say(server, "progress_state", {"nodes": state | {"5": running}})
                else:
                    self.say(server, "progress", {"value": at, "max": MOST, "node": "5"})
            self.sent += last - due
            due = last
            await asyncio.sleep(TURN)

    def end(self) -> None:
        self.over = True
        for server in range(SERVERS):
            self.say(server, "execution_success", {"timestamp": int(time.time() * 1000)})
            self.say(server, "executing", {"node": None})


async def serve() -> None:
    """Be the servers: a line begins the talk, the next one ends it, the end of the input ends all."""
    loop, park = asyncio.get_running_loop(), Park()
    server = await loop.create_server(lambda: Line(park), "127.0.0.1", 0, backlog=SERVERS)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    began = json.loads(await loop.run_in_executor(None, sys.stdin.readline))["began"]
    for number in range(SERVERS):
        park.say(number, "execution_start", {"timestamp": int(time.time() * 1000)})
        park.say(number, "executing", {"node": "5"})
    gc.freeze()
    enough = loop.run_in_executor(None, sys.stdin.readline)
    cpu, wall = time.process_time(), time.perf_counter()
    await park.talk(began, enough.done)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    print(json.dumps({"sent": park.sent, "core_share": share, "asked": park.asked}), flush=True)
    park.end()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


# -- the controller ----------------------------------------------------------------------------------------


class Heard:
    """What has arrived where people look, and how old it was."""

    def __init__(self) -> None:
        self.began = 0.0
        self.messages = 0
        self.delays_ms: list[float] = []
        self.measures = False


class Ear:
    """Hears one server's prompt, as a running job does."""

    def __init__(self, number: int, url: str, live: Live, heard: Heard) -> None:
        clock, settings, self._prompt = SystemClock(), ComfySettings(), prompt_of(number)
        self.client = ComfyUIWorkflowClient(f"{url}/s{number}", settings, clock=clock)
        self.listens = asyncio.Event()
        self._watcher = Watcher(self.client, settings, clock=clock)
        self._watching = live.begin(JobId(self._prompt), "fan-in")
        self._heard, self._last = heard, -1.0
        began = asyncio.get_running_loop().time()
        self._record = RunRecord(
            JobId(self._prompt), self._told, began, NoJournal(random.randint, asyncio.to_thread), self._prompt
        )

    def _told(self, progress: Progress) -> None:
        self._watching.progress(progress)
        value, heard = progress.value, self._heard
        if value is None or progress.percent == 100.0:
            return  # before the first message, and after the last one
        heard.messages += 1
        if value != self._last:
            self._last = value
            if heard.measures:
                heard.delays_ms.append((time.time() - heard.began) * 1000 - value)

    async def run(self) -> None:
        try:
            async with self.client.listen(self._prompt) as events:
                self.listens.set()
                await self._watcher.watch(self._prompt, NODES, events=events, on_progress=self._record.show)
            self._watching.over()
        finally:
            await self.client.close()


async def hear(url: str, order: Callable[[str], None], answer: Callable[[], Awaitable[bytes]]) -> dict[str, Any]:
    """Listen to all servers while they talk; return what came of it."""
    me, heard, live = psutil.Process(), Heard(), Live(SystemClock())
    before = me.memory_info().rss
    ears = [Ear(number, url, live, heard) for number in range(SERVERS)]
    tasks: list[asyncio.Task[None]] = []
    for start in range(0, SERVERS, AT_ONCE):
        some = ears[start : start + AT_ONCE]
        tasks += [asyncio.create_task(ear.run()) for ear in some]
        await asyncio.gather(*(ear.listens.wait() for ear in some))
    gc.collect()
    heard.began = time.time()
    order(json.dumps({"began": heard.began}))
    await asyncio.sleep(WARM_UP)
    heard.measures, first = True, heard.messages
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.sleep(SECONDS)
    heard.measures = False
    took, computed, counted = time.perf_counter() - wall, time.process_time() - cpu, heard.messages - first
    rss = me.memory_info().rss
    order("enough")
    said = json.loads(await answer())
    done, late = await asyncio.wait(tasks, timeout=END_WITHIN)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "per_second": counted / took,
        "core_share": computed / took,
        "us_per_message": 1e6 * computed / counted,
        "lost": said["sent"] - heard.messages,
        "sent": said["sent"],
        "asked": said["asked"],
        "servers_core_share": said["core_share"],
        "ended": sum(1 for task in done if task.exception() is None),
        "delay_p50_ms": middle(heard.delays_ms),
        "delay_p99_ms": high(heard.delays_ms, 0.99),
        "delay_max_ms": max(heard.delays_ms),
        "late": sum(1 for delay in heard.delays_ms if delay > BAR_LATE_MS),
        "timed": len(heard.delays_ms),
        "kb_per_server": (rss - before) / 1e3 / SERVERS,
    }


async def measure() -> Result:
    found = Findings(
        "fan_in",
        f"Real sockets on the loopback; {SERVERS:,} servers in one other process on the same computer.",
        "Every message goes the whole way to the snapshot that the API and the page read.",
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.fan_in", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = json.loads(await process.stdout.readline())["port"]
        orders = process.stdin
        figures = await hear(
            f"http://127.0.0.1:{port}", lambda line: orders.write(line.encode() + b"\n"), process.stdout.readline
        )
    finally:
        process.stdin.close()
        await process.wait()
    report("fan_in", servers=SERVERS, **{name: round(value, 3) for name, value in figures.items()})
    found.at_least("messages heard, by one process on one core", figures["per_second"], BAR_RATE - SLACK, "/s")
    found.at_most("share of a core they take", figures["core_share"], 1.0)
    found.told("processor time for each message", figures["us_per_message"], "µs")
    found.at_most("messages lost", figures["lost"], 0)
    found.told("from sent to shown, median", figures["delay_p50_ms"], "ms")
    found.at_most("from sent to shown, p99", figures["delay_p99_ms"], BAR_LATE_MS, "ms")
    found.told("from sent to shown, longest", figures["delay_max_ms"], "ms")
    found.told("messages shown later than the next one was sent", 100 * figures["late"] / figures["timed"], "%")
    found.at_least("prompts whose end was seen", figures["ended"], SERVERS)
    found.told("memory for each server that is listened to", figures["kb_per_server"], "kB")
    return found.result()


def main() -> Result:
    return asyncio.run(measure())


if __name__ == "__main__":
    asyncio.run(serve())
