"""
The outside of a soak, a process of its own: emulated clouds, and ComfyUI servers, each behind a fault proxy.

`python -m benchmarks.soak_outside FOLDER` is told what to do in lines of JSON on its standard input and answers each
with one line. Its books, and the logs that the ComfyUI processes write, are what the campaign believes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine
from runcomfy.testing.fault_proxy import Direction, FaultProxy, toxic

ACCOUNTS: Final = ("near", "far")
BOOT_SECONDS: Final = 1.0
DELETE_SECONDS: Final = 0.5
RESTART_AFTER: Final = 0.2
"""What watches over a ComfyUI process starts it again so much later."""


class Spares:
    """ComfyUI processes that have started and wait to be needed, so that machines have theirs in no time."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
        self._starting: set[asyncio.Task[None]] = set()

    def more(self, count: int = 1) -> None:
        """Start some."""
        for _ in range(count):
            task = asyncio.create_task(self._start())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.soak_comfyui",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        await process.stdout.readline()
        self._waiting.put_nowait(process)

    async def take(self, folder: Path, log: Path) -> tuple[asyncio.subprocess.Process, int]:
        """Return a process that serves a folder, and its port."""
        while True:
            process = await self._waiting.get()
            self.more()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps({"folder": str(folder), "log": str(log)}).encode() + b"\n")
            if line := await process.stdout.readline():
                return process, int(json.loads(line)["port"])

    async def end(self) -> None:
        """End those that nobody needed."""
        for task in list(self._starting):
            await task
        while not self._waiting.empty():
            process = self._waiting.get_nowait()
            process.kill()
            await process.wait()


class ComfyUIProcess:
    """A ComfyUI behind a proxy, replaced when it dies; keeps `ComfyServer` of the emulated cloud."""

    def __init__(self, folder: Path, name: str, spares: Spares) -> None:
        self._folder, self._spares = folder, spares
        self.name = name
        self.log = folder / "run_log.jsonl"
        self.proxy = FaultProxy("127.0.0.1", 1)
        self.process: asyncio.subprocess.Process | None = None
        self.killed: list[float] = []
        """Wall stamps of the kills."""
        self._keeper: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Start the process and listen before it; return the proxy's address."""
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        self.proxy.host, self.proxy.port = host, port
        address = await self.proxy.start()
        await self._boot()
        self._keeper = asyncio.create_task(self._keep())
        return f"http://{address}"

    async def _boot(self) -> None:
        self.process, port = await self._spares.take(self._folder, self.log)
        self.proxy.upstream = ("127.0.0.1", port)

    async def _keep(self) -> None:
        while True:
            if self.process is not None:
                await self.process.wait()
            self.proxy.upstream = ("127.0.0.1", 1)
            await asyncio.sleep(RESTART_AFTER)
            await self._boot()

    def kill(self) -> None:
        """Let it go away without a word: the machine is taken away."""
        if self._keeper is not None:
            self._keeper.cancel()
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> bool:
        """Send it a signal; return whether it was there."""
        if self.process is None or self.process.returncode is not None:
            return False
        if number == signal.SIGKILL:
            self.killed.append(time.time())
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
            return True
        return False

    async def stop(self) -> None:
        """Go away."""
        self.kill()
        await self.proxy.stop()
        if self.process is not None:
            await self.process.wait()


class Outside:
    """All of it, and the faults that are on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers: dict[str, ComfyUIProcess] = {}
        self.clouds: dict[str, RunComfyEmulator] = {}
        self.apis: dict[str, FaultProxy] = {}
        self.spares = Spares()
        self.own = ComfyUIProcess(folder / "own", "own", self.spares)
        self.done: Counter[str] = Counter()
        self._later: set[asyncio.Task[None]] = set()

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> dict[str, Any]:
        """Start everything; return what the campaign has to know."""
        self.spares.more(3)
        told: dict[str, Any] = {"accounts": {}, "own": await self.own.start()}
        for name in ACCOUNTS:
            cloud = RunComfyEmulator(
                user_id=name,
                token=f"soak-token-of-{name}",
                boot_time=timedelta(seconds=BOOT_SECONDS),
                delete_takes=DELETE_SECONDS,
                comfyui_factory=self._factory(name),
                requests_per_second=20,
                burst=40,
                balance_usd=Decimal(100_000),
            )
            await cloud.start()
            address = urlsplit(cloud.url)
            proxy = FaultProxy(str(address.hostname), int(address.port or 0))
            self.clouds[name], self.apis[name] = cloud, proxy
            told["accounts"][name] = {**cloud.environment(), "RUNCOMFY_API_BASE_URL": f"http://{await proxy.start()}"}
        return told

    def _factory(self, account: str) -> Callable[[EmulatedMachine], ComfyUIProcess]:
        def make(machine: EmulatedMachine) -> ComfyUIProcess:
            server = ComfyUIProcess(self._folder / account / machine.server_id, machine.server_id, self.spares)
            self.servers[machine.server_id] = server
            return server

        return make

    async def stop(self) -> None:
        """End everything."""
        self.calm()
        for cloud in self.clouds.values():
            with suppress(Exception):  # what went wrong within was told while it was
                await cloud.stop()
        for server in [*self.servers.values(), self.own]:
            await server.stop()
        for proxy in self.apis.values():
            await proxy.stop()
        await self.spares.end()

    # -- what it is told ---------------------------------------------------------------------------------------------

    def _running(self) -> list[ComfyUIProcess]:
        gone = {m.server_id for cloud in self.clouds.values() for m in cloud.machines.values() if m.comfyui is None}
        return [server for name, server in self.servers.items() if name not in gone]

    def _proxies(self, target: str) -> list[FaultProxy]:
        if target == "api":
            return list(self.apis.values())
        return [self.own.proxy] if target == "own" else [server.proxy for server in self._running()]

    def do(self, deed: dict[str, Any]) -> Any:
        """Do what a line says; return what is answered."""
        kind = deed["kind"]
        if kind == "calm":
            return self.calm()
        if kind == "state":
            return self.state()
        if kind == "books":
            return self.books()
        happened = self._happen(kind, deed)
        if happened:
            self.done[kind] += 1
        return happened

    def _happen(self, kind: str, deed: dict[str, Any]) -> bool:
        if kind in ("call", "machine"):
            cloud = _pick(list(self.clouds.values()), deed["pick"])
            (cloud.next_call if kind == "call" else cloud.next_machine)(**deed["values"])
            return True
        if kind in ("kill", "stop"):
            server: ComfyUIProcess = _pick([*self._running(), self.own], deed["pick"])
            if kind == "kill":
                return server.signal(signal.SIGKILL)
            stopped = server.signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(deed["seconds"], server.signal, signal.SIGCONT)
            return stopped
        proxies = self._proxies(deed["target"])
        if not proxies:
            return False
        proxy = _pick(proxies, deed["pick"])
        spoil(proxy, deed, self._spawn)
        return True

    def calm(self) -> bool:
        """Switch every fault off; what sleeps wakes."""
        for cloud in self.clouds.values():
            cloud.behave()
        for proxy in [*self.apis.values(), self.own.proxy, *(server.proxy for server in self.servers.values())]:
            proxy.clear()
        for server in [*self._running(), self.own]:
            server.signal(signal.SIGCONT)
        return True

    def state(self) -> dict[str, Any]:
        """Return what there is now."""
        return {
            "alive": {name: cloud.alive for name, cloud in self.clouds.items()},
            "billing": {name: cloud.billing for name, cloud in self.clouds.items()},
            "met": self._met(),
        }

    def _met(self) -> dict[str, int]:
        met: Counter[str] = Counter()
        for proxy in [*self.apis.values(), self.own.proxy, *(server.proxy for server in self.servers.values())]:
            met.update(proxy.met)
        return dict(met)

    def books(self) -> dict[str, Any]:
        """Return every bill, with where the machine's log is."""
        bills = []
        for account, cloud in self.clouds.items():
            for server_id, bill in cloud.books.items():
                server = self.servers.get(server_id)
                log = str(server.log) if server is not None else ""
                bills.append(
                    {**bill.as_dict(), "account": account, "log": log, "traits": str(_unusual(cloud, server_id))}
                )
        kills = [at for server in [*self.servers.values(), self.own] for at in server.killed]
        return {"bills": bills, "own": str(self.own.log), "met": self._met(), "kills": kills}

    # -- later -----------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._later.add(task)
        task.add_done_callback(self._later.discard)


def _unusual(cloud: RunComfyEmulator, server_id: str) -> dict[str, Any]:
    from dataclasses import asdict, fields

    traits = cloud.machines[server_id].traits
    usual = {field.name: field.default for field in fields(traits)}
    return {name: value for name, value in asdict(traits).items() if value and value != usual[name]}


def _pick(among: Iterable[Any], share: float) -> Any:
    found = list(among)
    return found[min(len(found) - 1, int(share * len(found)))]


def spoil(proxy: FaultProxy, deed: dict[str, Any], spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """Do to a proxy what a deed says, and undo it when its time is over."""
    if deed["kind"] == "reset":
        proxy.reset_all()
        return
    if deed["kind"] == "refuse":

        async def refuse() -> None:
            await proxy.refuse()
            await asyncio.sleep(deed["seconds"])
            with suppress(OSError):
                await proxy.start()

        spawn(refuse())
        return
    switched = proxy.add(toxic(deed["name"], **deed["values"]), *(Direction(way) for way in deed["directions"]))
    asyncio.get_running_loop().call_later(deed["seconds"], proxy.remove, switched)


async def run(folder: Path) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    outside = Outside(folder)

    def say(what: Any) -> None:
        sys.stdout.write(json.dumps(what, default=str) + "\n")
        sys.stdout.flush()

    say(await outside.start())
    while line := await reader.readline():
        try:
            say(outside.do(json.loads(line)))
        except Exception as error:  # noqa: BLE001 - told to the campaign, which ends
            say({"error": f"{type(error).__name__}: {error}"})
    await outside.stop()


if __name__ == "__main__":
    os.environ.pop("FAULT", None)
    asyncio.run(run(Path(sys.argv[1])))
