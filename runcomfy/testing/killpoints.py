"""
One story of a command that is killed at a point, started again, and looked at: real processes, sockets and databases.

A scene is a command with what comes before and after it: a run, a dev server's start, what works off a queue. Told with
nothing that kills, it tells which points the command passes, and how often. Told again for each of them, the command
gets SIGKILL there; then the same command is started once more, without a fault and without help. Afterwards the
emulated cloud's books and the log of the ComfyUI servers say what happened, and our books are compared with them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from PIL import Image

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.processes import ProcessTable
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.job import JobRequest
from runcomfy.domain.machine import Machine
from runcomfy.domain.money import seconds_between
from runcomfy.domain.queued import NewJob
from runcomfy.domain.secret import Secret
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.emulators.comfyui.process import RunRecord
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.forked import Commands, Forked
from runcomfy.testing.queue_programs import contradictions, drawing

PATIENCE: Final = 120.0
"""Seconds after which something that should have happened did not; a busy machine is slow."""
VISITS: Final = 2
"""So many visits of one point are told: from then on a story repeats itself."""
LEDGER_SECONDS: Final = Decimal(5)
"""By so much the ledger of one machine may differ from the bill: what was billed while nobody lived to see the end."""
FLIGHTS: Final[Mapping[str, str]] = {
    "provider.launch_machine": "POST servers",
    "provider.change_duration": "POST servers/*/update-estimated-duration",
    "provider.stop_machine": "DELETE *",
}
"""Calls during which a command is killed as well: the cloud has done what it was asked for, and has not answered."""
SUBMIT: Final = "comfyui.submit"
"""The same, where the ComfyUI is the user's: it has the prompt, and has not said so."""

READS: Final = frozenset(
    {f"store.{name}" for name in (
        "machine", "machines", "owners", "uses", "works", "story", "ledger", "boot_times", "unbilled", "budgets",
        "signals", "decisions",
    )}
    | {f"jobs.{name}" for name in (
        "job", "jobs", "changed", "owners", "counts", "events", "attempts", "pauses", "holds", "to_end", "arrivals",
        "past_results", "jobs_with", "settled", "told", "story", "job_of", "busy", "waiting", "waits", "look",
        "prompt_places", "open_transactions", "backlog",
    )}
    | {"dev_file.hint", "results.check_input", "results.files_among", "job_files.scan", "job_files.find",
       "job_files.read", "job_files.job", "job_files.surroundings", "comfyui.close", "comfyui.renew_socket",
       "provider.open", "provider.close"}
)  # fmt: skip
"""Calls that leave nothing behind and ask nobody outside: what is between two of them is between what is round them."""


@dataclass(frozen=True, slots=True)
class KillPoint:
    """Where a command dies: `provider.launch_machine.after`, at the so-manieth visit. `….during`: in the call."""

    scene: str
    point: str
    visit: int = 1

    def __str__(self) -> str:
        return f"{self.scene}: {self.point}" + (f" ({self.visit})" if self.visit > 1 else "")


@dataclass(slots=True)
class Told:
    """What came of one story."""

    at: KillPoint | None
    reached: bool
    complaints: list[str]
    recovery_s: float
    """From the start of the same command until it had ended."""
    points: Counter[str] = field(default_factory=Counter)
    """What was passed, if nothing was to kill."""
    said: str = ""


class Stage:
    """A cloud, a ComfyUI of the user's, a folder and a database: the world of one story."""

    def __init__(
        self, commands: Commands, cloud: RunComfyEmulator, comfyui: ComfyUIEmulator, folder: Path, dsn: str
    ) -> None:
        self.commands, self.cloud, self.comfyui, self.folder = commands, cloud, comfyui, folder
        self.dsn = dsn
        self.log = folder / "log.txt"
        self.image = folder / "in.png"
        Image.new("RGB", (32, 32), (200, 30, 60)).save(self.image)

    @property
    def database(self) -> str:
        """The queue's database."""
        return self.dsn or str(self.folder / "queue.sqlite3")

    @property
    def books(self) -> str:
        """The machines' database."""
        return self.dsn or str(self.folder / "state" / "runcomfy.sqlite3")

    def environment(self) -> dict[str, str]:
        """Return what a command is started with."""
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("COV_", "RUNCOMFY_", "COMFYUI_", "FAULT"))}
        place = {"RUNCOMFY_DATABASE_URL": self.dsn} if self.dsn else {"COMFYUI_AGENT_DATABASE": self.database}
        return kept | self.cloud.environment() | place | {
            "RUNCOMFY_STATE_DIR": str(self.folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "RUNCOMFY_GUARD": "false",  # it would end what the restart is to end
            "RUNCOMFY_POLL_INTERVAL": "0.2",
            "RUNCOMFY_VISIBILITY_WINDOW": "1",
            "RUNCOMFY_REQUESTS_PER_SECOND": "50",
            "RUNCOMFY_BURST": "50",
            "RUNCOMFY_STATUS_EVERY": "0.3",
            "RUNCOMFY_PLAN_EVERY": "0.3",
            "RUNCOMFY_RECONCILE_EVERY": "1",
            "RUNCOMFY_POOL_MAX_MACHINES": "1",
            "COMFYUI_AGENT_LEASE_SECONDS": "6",
            "COMFYUI_AGENT_HEARTBEAT_SECONDS": "0.5",
            "COMFYUI_AGENT_REAP_SECONDS": "0.5",
            "COMFYUI_AGENT_API_BASE_URL": self.comfyui.url,
            "NO_COLOR": "1",
        }  # fmt: skip

    async def start(self, *arguments: str, **environment: str) -> Forked:
        """Start a command."""
        return await self.commands.start(arguments, self.environment() | environment, self.folder, self.log)

    async def run(self, *arguments: str, **environment: str) -> int:
        """Run a command to its end and return its code; one that does not end is killed."""
        process = await self.start(*arguments, **environment)
        try:
            async with asyncio.timeout(PATIENCE):
                return await process.wait()
        except TimeoutError:
            process.send(9)
            await process.wait()
            return 1_000

    async def well(self, *arguments: str, **environment: str) -> None:
        """Run a command that belongs to the scene's setting."""
        if code := await self.run(*arguments, **environment):
            raise RuntimeError(f"comfyctl {' '.join(arguments)} ended with {code}: {self.said()}")

    def said(self) -> str:
        """Return the end of what commands printed."""
        return self.log.read_text(errors="replace")[-1_500:] if self.log.exists() else ""

    async def put(self, count: int, *, seconds: float = 0.3) -> None:
        """Put jobs for a picture each into the queue."""
        async with SqlJobs(store_from(Secret(self.database), clock=SystemClock())) as store:
            out = self.folder / "pictures"
            await store.add(
                [
                    NewJob(JobRequest(drawing(seconds, number), out_file=str(out / f"{number}.png")), "story")
                    for number in range(count)
                ]
            )

    # -- what the oracles say ----------------------------------------------------------------------------------

    def ran(self) -> list[RunRecord]:
        """Return every execution on every server, by the servers' own logs."""
        servers = [machine.comfyui or machine.comfyui_was for machine in self.cloud.machines.values()]
        emulators = [self.comfyui, *(server for server in servers if isinstance(server, ComfyUIEmulator))]
        return [record for server in emulators for record in server.run_log]

    async def complaints(self, *, alive: int = 0) -> list[str]:
        """Return what is wrong with machines, bills and prompts; `alive`: how many machines are meant to live."""
        cloud, found = self.cloud, []
        if len(cloud.alive) != alive:
            found.append(f"I2 I20: {len(cloud.alive)} machines are alive, not {alive}")
        again = [prompt for prompt, count in Counter(record.prompt_id for record in self.ran()).items() if count > 1]
        if again:
            found.append(f"I11 I12: {len(again)} prompts ran more than once")
        async with SqlStore.over(store_from(Secret(self.books), clock=SystemClock())) as store:
            rows = await _all_machines(store)
            open_rows = [row for row in rows if row.is_open]
            if len(open_rows) != alive:
                states = ", ".join(f"{row.state}" for row in open_rows)
                found.append(f"I2: {len(open_rows)} machines are open in our books ({states}), not {alive}")
            users = await store.owners({use.owner_id for use in await store.uses()})
            if any(ProcessTable().lives(user, now=SystemClock().now()) for user in users.values()):
                found.append("I20: a process that is gone is taken to use a machine")
            if not alive:
                found += await self._bills(store, rows)
        return found

    async def _bills(self, store: SqlStore, rows: Sequence[Machine]) -> list[str]:
        """I9: every machine's ledger is its bill."""
        found = []
        for server_id, bill in self.cloud.books.items():
            entries = [
                entry for row in rows if row.server_id == server_id for entry in await store.ledger(machine_id=row.id)
            ]
            ours = sum((seconds_between(each.started_at, each.ended_at) for each in entries), Decimal(0))
            if abs(ours - bill.seconds) > LEDGER_SECONDS or (bill.seconds > 1 and not entries):
                found.append(f"I9: the ledger has {ours} s of a machine, the cloud bills {bill.seconds} s")
        return found

    async def queue_complaints(self, jobs: int) -> list[str]:
        """Return what is wrong with the queue's jobs: each is done, once, ran once, and its file is whole."""
        found = []
        async with SqlJobs(store_from(Secret(self.database), clock=SystemClock())) as store:
            rows = await store.jobs()
            if len(rows) != jobs:
                found.append(f"I10 I16: there are {len(rows)} jobs, not {jobs}")
            for row in rows:
                events = [event.kind for event in await store.events(job_id=row.id)]
                found += [
                    f"I11 I15: job {row.id} {words}"
                    for words in contradictions(row, await store.attempts(row.id), events)
                ]
        ran = len(self.ran())
        if ran != jobs:
            found.append(f"I12: {ran} prompts ran for {jobs} jobs")
        return found

    async def result_complaints(self) -> list[str]:
        """Return what is wrong with results of runs: what a manifest names is there, whole; there is one at least."""
        manifests = list((self.folder / "out").glob("*/manifest.json"))
        found = [] if manifests else ["I15: there is no result"]
        for manifest in manifests:
            for output in json.loads(manifest.read_text())["outputs"]:
                path = manifest.parent / output["file"]
                if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != output["sha256"]:
                    found.append(f"I15: {path.name} is not what the manifest says")
        return found


async def _all_machines(store: SqlStore) -> Sequence[Machine]:
    from sqlalchemy import select

    from runcomfy.adapters.stores import tables

    def ids(connection: Any) -> list[tuple[str, str]]:
        columns = tables.machines.c
        return [tuple(row) for row in connection.execute(select(columns.provider, columns.account).distinct())]

    found: list[Machine] = []
    for provider, account in await store._read(ids):
        found += await store.machines(provider=provider, account=account, open_only=False)
    return found


# -- the scenes --------------------------------------------------------------------------------------------------


Does = Callable[[Stage], Awaitable[None]]
Looks = Callable[[Stage], Awaitable[list[str]]]


async def _nothing(_: Stage) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Scene:
    """A command that dies and is started again."""

    name: str
    command: Callable[[Stage], Sequence[str]]
    before: Does = _nothing
    after: Does = _nothing
    """Ends, with commands of the product, what is meant to live on."""
    alive: int = 0
    """Machines that are meant to live after the command."""
    launches: int = 1
    """Machines that may have been launched in all, however the command died."""
    looks: Looks | None = None
    """What else is asked afterwards."""


def _run(stage: Stage) -> list[str]:
    return ["run", "image_invert", "--image", str(stage.image), "--out", str(stage.folder / "out")]


async def _dev_starts(stage: Stage) -> None:
    await stage.well("dev", "start", "--no-interactive")


async def _dev_stops(stage: Stage) -> None:
    await stage.well("dev", "shutdown")


async def _somebody_died(stage: Stage) -> None:
    """Leave a machine behind that nobody owns."""
    if (code := await stage.run(*_run(stage), FAULT="job.execute:1:kill")) != -9:
        raise RuntimeError(f"the run that was to die ended with {code}: {stage.said()}")


async def _two_jobs(stage: Stage) -> None:
    await stage.put(2)


async def _job_file(stage: Stage) -> None:
    await stage.well("agent", "init")
    waiting = stage.folder / "jobs"
    name = "T2I_20261122120000_1_story.yaml"
    text = (
        "job_type: T2I\nworkflow_id: image_invert\n"
        f"inputs: {{image: {json.dumps(str(stage.image))}}}\noutputs: {{file_path: jobs/finished/story.png}}\n"
    )
    (stage.folder / name).write_text(text)
    waiting.mkdir(exist_ok=True)


async def _works_off(stage: Stage) -> None:
    await stage.well("agent", "execute", "--once", "--server", stage.comfyui.url)


def _jobs(count: int) -> Looks:
    return lambda stage: stage.queue_complaints(count)


SCENES: Final[Mapping[str, Scene]] = {
    scene.name: scene
    for scene in (
        Scene("run", _run, launches=2, looks=Stage.result_complaints),
        Scene("dev start", lambda _: ["dev", "start", "--no-interactive"], after=_dev_stops, alive=1),
        Scene("dev extend", lambda _: ["dev", "extend", "10m"], before=_dev_starts, after=_dev_stops, alive=1),
        Scene("dev use", _run, before=_dev_starts, after=_dev_stops, alive=1, looks=Stage.result_complaints),
        Scene("dev shutdown", lambda _: ["dev", "shutdown"], before=_dev_starts),
        Scene("reap", lambda _: ["machines", "reap"], before=_somebody_died),
        Scene(
            "execute",
            lambda stage: ["agent", "execute", "--once", "--server", stage.comfyui.url],
            before=_two_jobs,
            launches=0,
            looks=_jobs(2),
        ),
        Scene(
            "serve",
            lambda _: ["serve", "--once", "--no-http", "--no-guard", "--no-monitor", "--wait-price", "100"],
            before=_two_jobs,
            looks=_jobs(2),
        ),
        Scene(
            "add",
            lambda stage: ["queue", "add", str(stage.folder / "T2I_20261122120000_1_story.yaml")],
            before=_job_file,
            after=_works_off,
            launches=0,
            looks=_jobs(1),
        ),
    )
}


# -- telling ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def staged(commands: Commands, folder: Path, dsn: str) -> AsyncIterator[Stage]:
    """Make the world of one story. `dsn`: of a PostgreSQL database of its own; empty: the databases are files."""
    await asyncio.to_thread(folder.mkdir, parents=True)
    async with (
        RunComfyEmulator(boot_time=0.2, delete_takes=0.1, rate_limit=False, folder=folder / "machines") as cloud,
        ComfyUIEmulator() as comfyui,
    ):
        yield Stage(commands, cloud, comfyui, folder, dsn)


async def tell(scene: Scene, stage: Stage, at: KillPoint | None) -> Told:
    """Tell a story: with nothing that kills (`None`), it ends with the points that were passed."""
    told = Told(at, reached=False, complaints=[], recovery_s=0.0)
    try:
        await scene.before(stage)
        if at is None:
            passed = stage.folder / "points.txt"
            if code := await stage.run(*scene.command(stage), FAULT_LOG=str(passed)):
                told.complaints.append(f"the command ended with {code}")
            told.points = Counter((await asyncio.to_thread(passed.read_text)).split("\n")[:-1])
        else:
            told.reached = await _killed(scene, stage, at)
            began = time.monotonic()
            if code := await stage.run(*scene.command(stage)):
                told.complaints.append(f"I20: started again, the command ended with {code}")
            told.recovery_s = time.monotonic() - began
        await _look(scene, stage, told)
    except RuntimeError as error:
        told.complaints.append(str(error))
    if told.complaints:
        told.said = stage.said()
    return told


async def _look(scene: Scene, stage: Stage, told: Told) -> None:
    launched = len(stage.cloud.launched)
    if launched > scene.launches:
        told.complaints.append(f"I3: {launched} machines were launched, not {scene.launches} at most")
    if scene.alive:
        told.complaints += await stage.complaints(alive=scene.alive)
    await scene.after(stage)
    told.complaints += await stage.complaints()
    if scene.looks is not None:
        told.complaints += await scene.looks(stage)


async def _killed(scene: Scene, stage: Stage, at: KillPoint) -> bool:
    """Let the command die; return whether it did, and not end before."""
    point, _, place = at.point.rpartition(".")
    if place != "during":
        return await stage.run(*scene.command(stage), FAULT=f"{at.point}:{at.visit}:kill") == -9
    arrived, forget = _in_flight(stage, point)
    process = await stage.start(*scene.command(stage))
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while process.code is None:
                if arrived():
                    break
                await asyncio.sleep(0.02)
    process.send(9)
    forget()
    return await process.wait() == -9


def _in_flight(stage: Stage, call: str) -> tuple[Callable[[], bool], Callable[[], object]]:
    """Have what is asked for done, and not answered; return whether that has happened, and what ends it."""
    if call == SUBMIT:
        stage.comfyui.faults.add("POST", "*/prompt", Fault.never())
        return lambda: bool(stage.comfyui.submit_log), stage.comfyui.faults.clear
    pattern, before = FLIGHTS[call], len(stage.cloud.calls)
    fault = stage.cloud.next_call(pattern, delay=PATIENCE)

    def arrived() -> bool:
        return any(fnmatchcase(f"{each.method} {each.path}", pattern) for each in stage.cloud.calls[before:])

    return arrived, lambda: stage.cloud.forget_call(fault)


def points_of(scene: str, passed: Mapping[str, int]) -> list[KillPoint]:
    """Return where a scene's command can be killed, by what it passed when nothing killed it."""
    found = []
    for point, visits in passed.items():
        call, _, place = point.rpartition(".")
        if place in ("before", "after") and call in READS:
            continue
        found += [KillPoint(scene, point, visit) for visit in range(1, min(visits, VISITS) + 1)]
        if place == "after" and (call in FLIGHTS or (call == SUBMIT and scene == "execute")):
            found.append(KillPoint(scene, f"{call}.during"))
    return found
