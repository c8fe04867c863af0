"""
A soak: real processes and real sockets, everything spoiled and killed at random, and nothing may be lost or doubled.

`python -m benchmarks soak [--minutes 20] [--seed 1] [--database sqlite|postgres] [--record] [--keep]`

    clients --- proxies --- comfyctl serve (a front that is never killed, two that share a pool's books)
                                  |            |
                              database      proxies --- emulated clouds --- machines: proxies --- ComfyUI processes
                                  |
                    comfyctl agent execute, comfyctl guard, comfyctl queue add

The clouds, the ComfyUI processes and their proxies belong to another process (`soak_outside`), whose books and logs are
what the campaign believes. Two processes are never killed, only stopped: a front that also works off jobs on a ComfyUI
of its own, and one that rents machines with another account. Their memory is measured. At the end all faults go off,
and everything must come to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import psutil

from benchmarks.common import report, summary
from benchmarks.results import Figure, Result, keep, told_to_keep
from benchmarks.soak_clients import Books, Clients, job_file, write_workflow
from benchmarks.soak_oracles import Found, Judge, read_rows
from benchmarks.soak_outside import ACCOUNTS, spoil
from benchmarks.soak_outsiders import Outsiders, outsiders
from benchmarks.soak_plan import Deed, plan
from benchmarks.soak_processes import Kept, course, environment, growth, guards
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.application.machine_pool import TAKEN_OVER_FOR
from runcomfy.testing.fault_proxy import FaultProxy

RUN_LEASE: Final = 40.0
KEEP_ALIVE: Final = 10.0
ATTACH_GRACE: Final = 45.0
CLIENTS: Final = 14
MEASURE_EVERY: Final = 1.0
KILLED_STARTING: Final = 0.15
"""The share of kills that do not ask whether their victim is at work yet."""
TOLD_MOST: Final = 60
"""Stories that are printed."""
CALM_WITHIN: Final = 150.0
"""Seconds in which everything must have come to its end when the faults are off."""
SETTINGS: Final = {
    "COMFYUI_AGENT_LEASE_SECONDS": "8",
    "COMFYUI_AGENT_HEARTBEAT_SECONDS": "1",
    "COMFYUI_AGENT_REAP_SECONDS": "1",
    "COMFYUI_AGENT_ATTACH_GRACE_SECONDS": str(ATTACH_GRACE),
    "COMFYUI_AGENT_BACKOFF_FIRST_SECONDS": "0.5",
    "COMFYUI_AGENT_BACKOFF_MOST_SECONDS": "3",
    "COMFYUI_AGENT_RETRY_LIMIT": "50",
    "COMFYUI_AGENT_LOST_LIMIT": "1000",
    "COMFYUI_AGENT_KILL_LIMIT": "1000",
    "COMFYUI_AGENT_TIMEOUT_SECONDS": "60",
    "COMFYUI_AGENT_DRAIN_SECONDS": "10",
    "COMFYUI_AGENT_WAKE_INTERVAL_MS": "100",
    "COMFYUI_POLL_INTERVAL": "0.5",
    "COMFYUI_REQUEST_TIMEOUT": "6",
    "COMFYUI_DOWNLOAD_TIMEOUT": "20",
    "COMFYUI_STALL_TIMEOUT": "20",
    "COMFYUI_UNREACHABLE_TIMEOUT": "20",
    "COMFYUI_WORKER_DEAD_AFTER": "6",
    "COMFYUI_PING_INTERVAL": "3",
    "RUNCOMFY_RUN_LEASE": str(RUN_LEASE),
    "RUNCOMFY_KEEP_ALIVE": str(KEEP_ALIVE),
    "RUNCOMFY_PLAN_EVERY": "1",
    "RUNCOMFY_STATUS_EVERY": "2",
    "RUNCOMFY_RECONCILE_EVERY": "5",
    "RUNCOMFY_POLL_INTERVAL": "0.3",
    "RUNCOMFY_VISIBILITY_WINDOW": "3",
    "RUNCOMFY_NOT_FOUND_GRACE": "2",
    "RUNCOMFY_MACHINE_TIMEOUT": "25",
    "RUNCOMFY_COMFYUI_TIMEOUT": "20",
    "RUNCOMFY_HTTP_TIMEOUT": "6",
    "RUNCOMFY_REQUESTS_PER_SECOND": "18",
    "RUNCOMFY_BURST": "30",
    "RUNCOMFY_RETRY_AFTER_CAP": "5",
    "RUNCOMFY_STOP_ALARM_AFTER": "30",
    "RUNCOMFY_BREAKER_REST": "5",
    "RUNCOMFY_GUARD": "true",
    "RUNCOMFY_GUARD_PERIOD": "3",
    "RUNCOMFY_POOL_SERVER_TYPES": "medium,large",
    "RUNCOMFY_HTTP_MAX_PER_MINUTE": "1000000",
    "RUNCOMFY_HTTP_MAX_WAITING": "100000",
}


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Soak:
    """One campaign."""

    def __init__(self, folder: Path, *, minutes: float, seed: int, database: str = "sqlite") -> None:
        self.folder, self.minutes, self.seed, self.database = folder, minutes, seed, database
        self.kept: list[Kept] = []
        self.fronts: list[FaultProxy] = []
        self.way_to_database: FaultProxy | None = None
        self.books = Books()
        self.kills: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.unwell: list[str] = []
        """What went wrong that no oracle sees: processes that did not end, a campaign that did not come to rest."""
        self.calm_from = 0.0
        self.warm, self.until = 0.0, 0.0
        self._adding: set[asyncio.subprocess.Process] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._began = time.monotonic()
        self._queue = ""
        self._accounts: dict[str, str] = {}
        """Where each account's books are."""

    # -- who takes part ---------------------------------------------------------------------------------------------

    def _books_of(self, told: dict[str, Any]) -> dict[str, str]:
        """Return where each account's books are, by the account's digest."""
        usual = load_settings(overrides={}).cloud
        found = {}
        for name, variables in told["accounts"].items():
            cloud = replace(usual, base_url=variables["RUNCOMFY_API_BASE_URL"], user_id=name)
            found[RunComfyAPIClient(cloud, clock=SystemClock()).account] = self._accounts[name]
        return found

    def _make_folders(self) -> None:
        for name in ("logs", "in", "out", "near", "far", "outside"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    async def _open_database(self, stack: AsyncExitStack) -> dict[str, dict[str, str]]:
        """Return the variables that say where the databases are, for the processes of both accounts."""
        if self.database == "sqlite":
            self._queue = str(self.folder / "queue.sqlite3")
            self._accounts = {name: str(self.folder / name / "runcomfy.sqlite3") for name in ACCOUNTS}
            return {name: {"COMFYUI_AGENT_DATABASE": self._queue} for name in ACCOUNTS}
        from runcomfy.testing.postgres import PostgresForTests

        server = stack.enter_context(PostgresForTests())
        self._accounts = {name: server.database() for name in ACCOUNTS}
        self._queue = self._accounts[ACCOUNTS[0]]
        address = urlsplit(self._queue)
        self.way_to_database = await stack.enter_async_context(
            FaultProxy(str(address.hostname), int(address.port or 5432), seed=self.seed)
        )
        proxied = {name: _at_port(dsn, self.way_to_database.port) for name, dsn in self._accounts.items()}
        return {
            name: {"COMFYUI_AGENT_DATABASE": proxied[ACCOUNTS[0]], "RUNCOMFY_DATABASE_URL": proxied[name]}
            for name in ACCOUNTS
        }

    async def _begin(self, stack: AsyncExitStack, told: dict[str, Any]) -> None:
        where = await self._open_database(stack)
        base = SETTINGS | {
            "COMFYUI_AGENT_ROOT": str(self.folder),
            "COMFYUI_AGENT_JOBS_PROCESSING": str(self.folder / "in"),
            "COMFYUI_AGENT_JOBS_FINISHED": str(self.folder / "out"),
            "COMFYUI_AGENT_WORKFLOWS": str(write_workflow(self.folder)),
        }  # fmt: skip
        near, far = (
            environment(**base, **where[name], **told["accounts"][name], RUNCOMFY_STATE_DIR=str(self.folder / name))
            for name in ACCOUNTS
        )
        self._near = near
        ports = [free_port() for _ in range(3)]
        for port in ports:
            self.fronts.append(await stack.enter_async_context(FaultProxy("127.0.0.1", port, seed=self.seed)))
        own, pool = told["own"], ("serve", "--max-machines", "2", "--no-monitor")
        self._add(
            "front", "service", ["serve", "--server", own, "--no-monitor", "--port", str(ports[0])], near, mortal=False
        )
        self._add("far", "service", [*pool, "--max-machines", "1", "--no-http"], far, mortal=False)
        self._add("near-1", "service", [*pool, "--port", str(ports[1])], near)
        self._add("near-2", "service", [*pool, "--port", str(ports[2])], near)
        self._add("worker", "executor", ["agent", "execute", "--server", own, "--slots", "2"], near)
        for kept in self.kept:
            stack.push_async_callback(kept.cut)
            await kept.start()
        stack.push_async_callback(self._end_guards)

    def _add(self, name: str, kind: str, command: Sequence[str], env: dict[str, str], *, mortal: bool = True) -> None:
        word = "answering HTTP" if kind == "service" and mortal else "\n"
        self.kept.append(Kept(name, kind, command, env, self.folder, word, mortal))

    async def _token(self) -> str:
        path = self.folder / "near" / "http_token"

        def look() -> str:
            return path.read_text().strip() if path.is_file() else ""

        while not (token := await asyncio.to_thread(look)):  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.1)
        return token

    def _guards(self) -> list[psutil.Process]:
        return guards([self.folder / "near", self.folder / "far"])

    async def _end_guards(self) -> None:
        for guard in await asyncio.to_thread(self._guards):
            with suppress(psutil.Error):
                guard.kill()

    # -- what is done to them ---------------------------------------------------------------------------------------

    async def _spoil(self, outside: Outsiders, deeds: Sequence[Deed]) -> None:
        for deed in deeds:
            wait = self._began + deed.at - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            if deed.kind == "kill":
                who = await self._kill(outside, deed)
                self.kills.update([who] if who and who != "client" else [])  # a client is counted when it was hit
            elif deed.kind == "stop":
                who = await self._stop(outside, deed)
                self.stops.update([who] if who else [])
            else:
                who = deed.target if await self._do(outside, deed) else ""
                self.faults.update([deed.counted_as] if who else [])
            self._note(deed.kind, deed, who or "nobody")

    async def _kill(self, outside: Outsiders, deed: Deed) -> str:
        """Kill somebody of a kind; return who it was. If there is none of that kind it is a service."""
        if deed.target == "comfyui":
            return "comfyui" if await outside.do("kill", pick=deed.pick) else ""
        if deed.target == "guard" and (found := await asyncio.to_thread(self._guards)):
            with suppress(psutil.Error):
                found[int(deed.pick * len(found))].kill()
                return "guard"
        if deed.target == "client":
            self._spawn(self._add_by_command(killed_after=0.15 + deed.pick))
            return "client"
        kind = "executor" if deed.target == "executor" else "service"
        mortal = [kept for kept in self.kept if kept.mortal and kept.kind == kind]
        first = int(deed.pick * len(mortal))
        for kept in mortal[first:] + mortal[:first]:
            # Most are killed at work; those that only start would never get there on a slow computer.
            if (kept.at_work or deed.pick * 100 % 1 < KILLED_STARTING) and kept.kill():
                self._note("kills", deed, kept.name)
                return kind
        return "comfyui" if await outside.do("kill", pick=deed.pick) else ""

    async def _stop(self, outside: Outsiders, deed: Deed) -> str:
        if deed.target == "comfyui":
            return "comfyui" if await outside.do("stop", pick=deed.pick, seconds=min(deed.seconds, 14)) else ""
        if deed.target == "guard" and (found := await asyncio.to_thread(self._guards)):
            guard = found[int(deed.pick * len(found))]
            with suppress(psutil.Error):
                guard.suspend()
                asyncio.get_running_loop().call_later(deed.seconds, _resume, guard)
                return "guard"
        kind = "executor" if deed.target == "executor" else "service"
        among = [kept for kept in self.kept if kept.kind == kind]
        kept = among[int(deed.pick * len(among))]
        self._note("stops", deed, kept.name)
        return kind if kept.sleep(deed.seconds) else ""

    async def _do(self, outside: Outsiders, deed: Deed) -> bool:
        said = {
            "pick": deed.pick, "seconds": deed.seconds, "name": deed.name, "values": dict(deed.values),
            "directions": list(deed.directions), "target": deed.target,
        }  # fmt: skip
        if deed.target not in ("http", "database"):
            return bool(await outside.do(deed.kind, **said))
        proxy = self.way_to_database if deed.target == "database" else self.fronts[int(deed.pick * len(self.fronts))]
        if proxy is None:
            return False
        spoil(proxy, {"kind": deed.kind, **said}, self._spawn)
        return True

    def _note(self, what: str, deed: Deed, who: str) -> None:
        """Keep a word of what was done to whom, for whoever reads a story."""
        with (self.folder / "logs" / "done.log").open("a") as log:
            now = datetime.now(UTC)
            log.write(f"{now:%H:%M:%S.%f} {what} {who} {deed.name} {deed.seconds:.1f} s {dict(deed.values)}\n")

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- clients ----------------------------------------------------------------------------------------------------

    async def _add_by_command(self, killed_after: float | None) -> None:
        """Put a job in by `comfyctl queue add`, which is killed in the middle of it, and once more."""
        number = len(self.books.by_file) + 1
        path = job_file(self.folder, number, random.Random(number), self.books)
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "runcomfy.cli.main", "queue", "add", str(path),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                cwd=self.folder, env=self._near,
            )  # fmt: skip
            try:
                async with asyncio.timeout(killed_after):
                    said, _ = await process.communicate()
            except TimeoutError:
                process.kill()
                await process.wait()
                self.kills["client"] += 1
                killed_after = None
                continue
            if process.returncode == 0:
                return
            self.books.counted[f"queue add: {process.returncode}"] += 1
            if self.calm_from:
                self.books.wrong.append(f"queue add {path.name} ends with {process.returncode}: {said.decode()[-800:]}")
                return
            await asyncio.sleep(1)

    async def _measure(self) -> None:
        while True:
            for kept in self.kept:
                kept.look()
                if not kept.mortal:
                    kept.measure(time.monotonic() - self._began)
            await asyncio.sleep(MEASURE_EVERY)

    # -- the campaign -----------------------------------------------------------------------------------------------

    async def run(self) -> Found:
        """Do all of it; return what the oracles say."""
        self._make_folders()
        async with AsyncExitStack() as stack:
            outside, told = await stack.enter_async_context(outsiders(self.folder))
            await self._begin(stack, told)
            token = await self._token()
            clients = Clients(
                [(f"http://127.0.0.1:{p.port}", f"127.0.0.1:{p.upstream[1]}") for p in self.fronts],
                token,
                self.seed,
                self.books,
            )
            deeds = plan(self.seed, self.minutes, database=self.database != "sqlite")
            self._began = time.monotonic()
            self.until = self.minutes * 60
            self.warm = min(300.0, max(10.0, self.until / 4))
            draw = random.Random(self.seed)
            puts = [asyncio.create_task(clients.put_in(lambda: draw.expovariate(1 / 3))) for _ in range(CLIENTS)]
            beside = [asyncio.create_task(clients.listen()), asyncio.create_task(self._measure())]
            try:
                await self._spoil(outside, deeds)
                await asyncio.sleep(max(0.0, self._began + self.until - time.monotonic()))
                await self._calm(outside)
                clients.stop.set()
                await self._come_to_rest(outside, clients, puts)
            finally:
                clients.giving_up.set()
                for task in (*beside, *puts, *self._tasks):
                    task.cancel()
                await asyncio.gather(*beside, *puts, *self._tasks, return_exceptions=True)
            await self._end()
            outsides = await outside.do("books")
            (self.folder / "bills.json").write_text(json.dumps(outsides, indent=1))
            self._met(outsides)
            rows = await read_rows(self._queue, self._books_of(told))
        timeout_s = max(RUN_LEASE, TAKEN_OVER_FOR.total_seconds() + KEEP_ALIVE)
        return Judge(rows, self.books, outsides, timeout_s=timeout_s, grace_s=ATTACH_GRACE).judge()

    def _met(self, outsides: dict[str, Any]) -> None:
        met = Counter(outsides["met"])
        for proxy in (*self.fronts, *([self.way_to_database] if self.way_to_database else [])):
            met.update(proxy.met)
        self.met = met

    async def _calm(self, outside: Outsiders) -> None:
        await outside.do("calm")
        for proxy in (*self.fronts, *([self.way_to_database] if self.way_to_database else [])):
            proxy.clear()
            await proxy.start()
        for kept in self.kept:
            kept.wake()
        for guard in await asyncio.to_thread(self._guards):
            _resume(guard)
        self.calm_from = time.time()

    async def _come_to_rest(self, outside: Outsiders, clients: Clients, puts: Sequence[asyncio.Task[None]]) -> None:
        """Wait until everything that was asked for has ended and no machine is left."""
        try:
            async with asyncio.timeout(CALM_WITHIN):
                await asyncio.gather(*puts)
                while self._tasks or await self._left() or any((await outside.do("state"))["alive"].values()):  # noqa: ASYNC110
                    await asyncio.sleep(1)
                await self._heard_all()
        except TimeoutError:
            left, state = await self._left(), await outside.do("state")
            self.unwell.append(
                f"after {CALM_WITHIN:.0f} calm seconds {left} jobs have not ended, {self.books.unanswered} orders are "
                f"not answered, {sum(not put.done() for put in puts)} clients wait, and there are the machines "
                f"{state['alive']}"
            )

    async def _left(self) -> int:
        from benchmarks.soak_oracles import jobs_left

        return await jobs_left(self._queue)

    async def _heard_all(self) -> None:
        from benchmarks.soak_oracles import last_event

        last = await last_event(self._queue)
        with suppress(TimeoutError):  # what it has not heard then is told by the oracle
            async with asyncio.timeout(30):
                while not self.books.told or max(self.books.told) < last:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)

    async def _end(self) -> None:
        codes = await asyncio.gather(*(kept.end() for kept in self.kept))
        for kept, code in zip(self.kept, codes, strict=True):
            if code != 0:
                self.unwell.append(f"{kept.name}, told to stop, ended with {code}:\n{kept._tail()}")

    def growths(self) -> dict[str, float | None]:
        """Return by which share the memory of those who were never killed grew after the warm-up."""
        return {k.name: growth(k.sizes, warm=self.warm, until=self.until) for k in self.kept if not k.mortal}


def _at_port(dsn: str, port: int) -> str:
    address = urlsplit(dsn)
    who, _, _ = address.netloc.rpartition("@")
    return urlunsplit(address._replace(netloc=f"{who}@127.0.0.1:{port}" if who else f"127.0.0.1:{port}"))


def _resume(guard: psutil.Process) -> None:
    with suppress(psutil.Error):
        guard.resume()


def result_of(soak: Soak, found: Found, took_s: float) -> Result:
    """Return the figures with their bars."""
    minutes = soak.minutes
    jobs_bar, kills_bar = (2_000, 300) if minutes >= 20 else (0, 0)
    if minutes >= 1_440:
        jobs_bar, kills_bar = 20_000, 1_000
    kills = sum(soak.kills.values())
    figures = [
        Figure("minutes with faults", f"{minutes:g}"),
        _at_least("jobs", found.jobs, jobs_bar),
        _at_least("SIGKILLs", kills, kills_bar),
        Figure("SIGKILLs by kind", _counts(soak.kills)),
        Figure("SIGSTOPs by kind", _counts(soak.stops)),
        Figure("faults switched on", f"{sum(soak.faults.values()):,}"),
        Figure("connections spoiled, by toxic", _counts(soak.met)),
        Figure("orders sent, answered or not", f"{soak.books.counted['puts']:,}"),
        Figure("jobs lost", str(len(found.lost)), "0", not found.lost),
        Figure("jobs or prompts doubled", str(len(found.doubled)), "0", not found.doubled),
        Figure("wrong files, answers or events", str(len(found.wrong)), "0", not found.wrong),
        Figure("machines rented", f"{found.machines:,}"),
        Figure("machine seconds billed", f"{found.billed_s:,.0f}"),
        Figure("machine seconds leaked", f"{found.leaked_s:,.0f}", "0", found.leaked_s == 0),
        Figure("prompts run", f"{found.ran:,}"),
        Figure("runs again, with a reason", _counts(found.again) or "0"),
    ]
    for name, share in soak.growths().items():
        shown = "unknown" if share is None else f"{share * 100:+.1f} %"
        bar = minutes >= 20
        figures.append(
            Figure(
                f"memory of the process {name!r} after the warm-up",
                shown,
                "below +5 %" if bar else "",
                (share is not None and share < 0.05) if bar else None,
            )
        )
    every = max(10.0, minutes * 6)
    for kept in soak.kept:
        if not kept.mortal:
            shown = " ".join(str(size) for size in course(kept.sizes, every=every))
            figures.append(Figure(f"memory of the process {kept.name!r} each {every:g} s, MB", shown))
    alone = [told for kept in soak.kept for told in kept.ended_alone]
    figures.append(Figure("processes that ended by themselves", str(len(alone)), "0", not alone))
    figures.append(Figure("did not come to rest", str(len(soak.unwell)), "0", not soak.unwell))
    name = "soak" if soak.database == "sqlite" else f"soak_{soak.database}"
    more = "" if soak.database == "sqlite" else f" --database {soak.database}"
    return Result(
        name=name,
        command=f"python -m benchmarks soak --minutes {minutes:g} --seed {soak.seed}{more}",
        figures=figures,
        took_s=took_s,
        notes=(
            (
                "Services, executors, guards, clients and ComfyUI processes are killed. Two services never are, and "
                "their memory is measured: a front that works off jobs, and one that rents machines of another account."
            ),
            "The oracles are the emulated clouds' bills, the ComfyUI processes' logs, the clients' books, the files.",
        ),
    )


def _at_least(what: str, value: int, bar: int) -> Figure:
    return Figure(what, f"{value:,}", f"at least {bar:,}", value >= bar) if bar else Figure(what, f"{value:,}")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def main(arguments: Sequence[str] = ()) -> int:
    """Run a campaign; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/soak.json")
    parser.add_argument(
        "--keep", action="store_true", help="leave databases, logs and files behind, whatever came of it"
    )
    asked = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="comfyctl-soak-"))
    began = time.monotonic()
    soak = Soak(folder, minutes=asked.minutes, seed=asked.seed, database=asked.database)
    found = asyncio.run(soak.run())
    result = result_of(soak, found, round(time.monotonic() - began, 1))
    for figure in result.figures:
        report(
            result.name,
            what=figure.what,
            value=figure.value,
            **({"bar": figure.bar, "met": figure.met} if figure.bar else {}),
        )
    report(result.name, clients=dict(soak.books.counted), faults=dict(soak.faults))
    stories = [*found.violations, *soak.unwell, *(told for kept in soak.kept for told in kept.ended_alone)]
    for story in stories[:TOLD_MOST]:
        print(f"VIOLATION {story}", flush=True)
    summary(result)
    if asked.record or told_to_keep():
        keep(result)
    if asked.keep or not result.met:
        print(f"what is left of it: {folder}", flush=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if result.met else 1
