"""
`kill -9` at every durable write and every remote call of every command, on real databases; then the invariants.

`python -m benchmarks killpoints [--record] [--database sqlite|postgres|both] [--only PATTERN | --recovery]`: each scene
(`runcomfy.testing.killpoints`) is told once to learn which points its command passes, and then once for each of them:
killed there, started again, and judged by the emulated cloud's books and the ComfyUI servers' logs.

    points         places at which commands were to die: (scene, point, visit)
    not reached    of those, how many the command did not pass that time
    violations     stories after which something was wrong
    first claim    how soon a killed controller's restart works again, with 10,000 jobs in its queue (I20)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psutil

from benchmarks.common import summary
from benchmarks.results import Figure, Result, keep, told_to_keep
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.queued import EventKind
from runcomfy.domain.secret import Secret
from runcomfy.testing.forked import Commands
from runcomfy.testing.killpoints import PATIENCE, SCENES, KillPoint, Stage, Told, points_of, staged, tell
from runcomfy.testing.postgres import PostgresForTests

AT_ONCE: Final = 6
"""Stories that are told at the same time: their processes mostly wait."""
DATABASES: Final = ("sqlite", "postgres")


class Sweep:
    """All stories over one kind of database."""

    def __init__(self, database: str, folder: Path, commands: Commands, server: PostgresForTests | None) -> None:
        self.database, self._folder, self._commands, self._server = database, folder, commands, server
        self._places, self._making = asyncio.Semaphore(AT_ONCE), asyncio.Lock()
        self._number = 0
        self.told: list[Told] = []
        self.learned: list[Told] = []
        """The stories that nothing killed."""

    async def story(self, scene: str, at: KillPoint | None) -> Told:
        """Tell one story in a world of its own."""
        async with self._places:
            self._number += 1
            folder = self._folder / f"{self.database}-{self._number}"
            dsn = ""
            if self._server is not None:
                async with self._making:  # the first one makes the template, which nobody may look at meanwhile
                    dsn = await asyncio.to_thread(self._server.database)
            try:
                async with staged(self._commands, folder, dsn) as stage:
                    told = await tell(SCENES[scene], stage, at)
            finally:
                if self._server is not None:
                    await asyncio.to_thread(self._server.drop, dsn)
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        (self.learned if at is None else self.told).append(told)
        if told.complaints:
            print(json.dumps({"database": self.database, "at": str(at or scene), "wrong": told.complaints}), flush=True)
            print(told.said, file=sys.stderr)
        return told

    async def run(self, only: str) -> None:
        """Learn the points of every scene, then die at each."""
        scenes = [scene for scene in SCENES if fnmatch(scene, only.partition(":")[0])]
        learned = await asyncio.gather(*(self.story(scene, None) for scene in scenes))
        points = [
            point
            for scene, told in zip(scenes, learned, strict=True)
            for point in points_of(scene, told.points)
            if fnmatch(str(point), only)
        ]
        await asyncio.gather(*(self.story(point.scene, point) for point in points))


async def sweep(databases: Sequence[str], only: str) -> list[Sweep]:
    """Tell every story over each of these databases, one kind after the other."""
    sweeps = []
    with TemporaryDirectory(prefix="comfyctl-killpoints-") as name:
        for database in databases:
            with ExitStack() as stack:
                server = stack.enter_context(PostgresForTests(fsync=True)) if database == "postgres" else None
                async with Commands() as commands:
                    sweeps.append(Sweep(database, Path(name), commands, server))
                    await sweeps[-1].run(only)
    return sweeps


# -- recovery ----------------------------------------------------------------------------------------------------

QUEUED: Final = 10_000
RECOVERY_S: Final = 2.0
"""And one list call, which a test's cloud answers at once."""
RESTARTS: Final = 3
"""Each in a world of its own."""
CONTROLLERS: Final[dict[str, Callable[[Stage], list[str]]]] = {
    "agent execute": lambda stage: ["agent", "execute", "--server", stage.comfyui.url],
    "serve": lambda _: ["serve", "--no-http", "--no-guard", "--no-monitor", "--wait-price", "100"],
}


@dataclass(frozen=True, slots=True)
class Recovered:
    """How soon a killed controller's restart claimed its first job."""

    database: str
    command: str
    seconds: float
    processor_s: float
    """What the process itself had computed by then: the figure of a computer that does nothing else."""
    queued_s: float | None = None
    """For how long its threads had to wait for a processor that others had; None where the system does not tell."""


def queued_for(pid: int) -> float | None:
    """Return for how many seconds the threads of a process were ready to run and had no processor (Linux)."""
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
        found = [int(each.read_text().split()[1]) / 1e9 for each in tasks]
    except (OSError, ValueError, IndexError):
        return None
    return sum(found) if found else None


async def recovery(database: str, command: str, stage: Stage, *, jobs: int = QUEUED) -> Recovered:
    """Fill the queue, kill a controller at work, and take the time of its restart."""
    await stage.put(jobs, seconds=0.2)
    start = CONTROLLERS[command]
    async with SqlJobs(store_from(Secret(stage.database), clock=SystemClock())) as store:

        async def claimed(after: int) -> int:
            """Return the newest event's number once something was claimed after that one."""
            async with asyncio.timeout(PATIENCE):
                while True:
                    events = await store.events(after=after, limit=QUEUED * 10)
                    if any(event.kind is EventKind.CLAIMED for event in events):
                        return events[-1].number
                    await asyncio.sleep(0.01)

        process = await stage.start(*start(stage))
        last = await claimed(await store.settled())
        last = await claimed(last)  # it works: there is a machine, and a prompt that runs
        process.send(signal.SIGKILL)
        await process.wait()
        last = max([last, *(event.number for event in await store.events(after=last, limit=QUEUED * 10))])
        began = time.monotonic()
        process = await stage.start(*start(stage))
        await claimed(last)
        seconds = time.monotonic() - began
        computed, queued = sum(psutil.Process(process.pid).cpu_times()[:2]), queued_for(process.pid)
        process.send(signal.SIGKILL)
        await process.wait()
    return Recovered(database, command, seconds, computed, queued)


async def recoveries(databases: Sequence[str]) -> list[Recovered]:
    """Take the time of each controller over each kind of database: the middle one of several restarts."""
    found = []
    with TemporaryDirectory(prefix="comfyctl-recovery-") as name:
        for database in databases:
            with ExitStack() as stack:
                server = stack.enter_context(PostgresForTests(fsync=True)) if database == "postgres" else None
                async with Commands() as commands:
                    for command in CONTROLLERS:
                        tries = []
                        for number in range(RESTARTS):
                            dsn = server.database() if server is not None else ""
                            folder = Path(name) / f"{database}-{command}-{number}".replace(" ", "-")
                            async with staged(commands, folder, dsn) as stage:
                                tries.append(await recovery(database, command, stage))
                            print(json.dumps(asdict(tries[-1])), flush=True)
                        found.append(sorted(tries, key=lambda each: each.seconds)[RESTARTS // 2])
    return found


# -- the command -------------------------------------------------------------------------------------------------


def result_of(sweeps: Sequence[Sweep], recovered: Sequence[Recovered], took_s: float) -> Result:
    """Return what was found as figures."""
    figures, notes = [], []
    for sweep in sweeps:
        told, missed = sweep.told, [each for each in sweep.told if not each.reached]
        wrong = sum(bool(each.complaints) for each in [*told, *sweep.learned])
        slowest = max((each.recovery_s for each in told), default=0.0)
        figures += [
            Figure(f"{sweep.database}: commands killed, each at another point", f"{len(told) - len(missed):,}"),
            Figure(f"{sweep.database}: points that were not reached when it counted", str(len(missed))),
            Figure(f"{sweep.database}: violations", str(wrong), "0", wrong == 0),
            Figure(f"{sweep.database}: slowest restart of a command, to its end", f"{slowest:.1f} s"),
        ]
        if missed:
            points = ", ".join(str(each.at) for each in missed)
            notes.append(f"{sweep.database}: passed the first time, and not when they were to kill: {points}.")
    for each in recovered:
        queued = "" if each.queued_s is None else f", {each.queued_s:.2f} s waiting for a processor"
        figures.append(
            Figure(
                f"{each.database}: first claim after a kill, {each.command}, {QUEUED:,} jobs queued",
                f"{each.seconds:.2f} s ({each.processor_s:.2f} s computing{queued})",
                f"at most {RECOVERY_S:g} s and a list call",
                each.seconds <= RECOVERY_S,
            )
        )
    if recovered:
        notes.append(
            f"First claim: the middle one of {RESTARTS} restarts, from the start of the process on; the interpreter's "
            "start and imports are not in it, since it is forked. Its machine lives, and is not started anew. "
            "Computing and waiting are all its threads'; what the database and the emulators wait for is in neither."
        )
    notes.append(
        "A point is a place before or after a call of a port, at its first or second visit, or in the middle of a "
        "launch, an extension or a stop; calls that only read our own books are none."
    )
    return Result("killpoints", "make killpoints", figures, took_s, notes)


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks killpoints")
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    parser.add_argument("--database", choices=(*DATABASES, "both"), default="both")
    parser.add_argument("--only", default="*", help="scene and point: 'run: provider.*'; without recovery")
    parser.add_argument("--recovery", action="store_true", help="only how soon a killed controller works again")
    asked = parser.parse_args(arguments)
    if asked.recovery and asked.record:
        parser.error("--recovery is a part of the campaign, which is recorded whole")
    began = time.monotonic()
    databases = DATABASES if asked.database == "both" else (asked.database,)
    sweeps = [] if asked.recovery else asyncio.run(sweep(databases, asked.only))
    if any(not swept.told for swept in sweeps):
        names = ", ".join(str(scene) for scene in SCENES)
        parser.error(f"no point fits {asked.only!r}; it is SCENE: POINT, and the scenes are {names}")
    recovered = asyncio.run(recoveries(databases)) if asked.only == "*" else []
    result = result_of(sweeps, recovered, time.monotonic() - began)
    summary(result)
    if told_to_keep(*arguments):
        keep(result)
    return 0 if result.met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
