"""
Workers that are killed at random: nothing lost, nothing twice.

Several executors, each a process of its own (`comfyctl agent execute`), work off jobs of 50 ms on one emulated
ComfyUI. Again and again one of them gets SIGKILL at a random moment and another is started in its place. In the end
the oracles are asked: the emulated server's own log of what it ran, the files on the disk, and the database.

    lost               jobs that are not done
    committed_twice    jobs whose log has more than one `done`, or whose file is not the one that was recorded
    run_again          prompts beyond one for each job that the server began
    recovery           seconds from a kill until all that the dead worker held was claimed again
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, NewJob, QueuedJob, QueueStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.in_thread import InThread, served

LEASE_SECONDS = 6
REAP_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Campaign:
    """What came of it."""

    jobs: int
    kills: int
    in_flight: int
    """Jobs that a killed worker held."""
    attached: int
    """How often a worker went on with the prompt of a dead one."""
    lost: int
    committed_twice: int
    run_again: int
    never_sent: int
    """Prompts whose id was written down and that were killed before they left."""
    recovery: tuple[float, ...]
    seconds: float


def graph(number: int, seconds: float) -> dict[str, object]:
    """Return a workflow that takes that long and whose picture depends on the number."""
    return {
        "1": {
            "class_type": "ProbeSteps",
            "inputs": {"steps": 1, "seconds_per_step": seconds, "seed": number, "preview": False},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "kill"}},
    }


class _Workers:
    """The processes, by number; each writes its log into the folder."""

    def __init__(self, folder: Path, database: str, url: str, slots: int) -> None:
        self._folder, self._database, self._url, self._slots = folder, database, url, slots
        self.running: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("COMFYUI_", "RUNCOMFY_"))
        }
        environment |= {
            "COMFYUI_AGENT_DATABASE": self._database,
            "COMFYUI_AGENT_LEASE_SECONDS": str(LEASE_SECONDS),
            "COMFYUI_AGENT_HEARTBEAT_SECONDS": "1",
            "COMFYUI_AGENT_REAP_SECONDS": str(REAP_SECONDS),
            "RUNCOMFY_STATE_DIR": str(self._folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
        }
        log = (self._folder / "workers.log").open("ab")
        with log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "runcomfy.cli.main", "agent", "execute", "--server", self._url,
                "--slots", str(self._slots),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, env=environment,
            )  # fmt: skip
        self.running.append(process)

    async def kill(self, process: asyncio.subprocess.Process) -> None:
        self.running.remove(process)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()

    async def end(self) -> None:
        for process in list(self.running):
            await self.kill(process)


async def run_campaign(
    database: str, folder: Path, *, jobs: int, kills: int, workers: int = 4, slots: int = 3, seed: int = 1,
    job_seconds: float = 0.05,
) -> Campaign:  # fmt: skip
    """Put `jobs` in, kill `kills` workers while they are worked off, and count."""
    draw = random.Random(seed)
    with served(ComfyUIEmulator) as comfyui:
        store = SqlJobs(store_from(database, clock=SystemClock()))
        await store.open()
        crew = _Workers(folder, database, comfyui.call(lambda emulator: emulator.url), slots)
        try:
            new = [
                NewJob(JobRequest(workflow=graph(n, job_seconds), out_file=str(folder / "out" / f"{n}.png")), "kill")
                for n in range(jobs)
            ]
            await store.add(new)
            began = time.perf_counter()
            for _ in range(workers):
                await crew.start()
            held, recovery = await _kill_at_random(store, crew, draw, jobs=jobs, kills=kills)
            await _until_done(store, jobs, patience=LEASE_SECONDS * 5 + jobs * job_seconds * 4)
            seconds = time.perf_counter() - began
        finally:
            await crew.end()
        try:
            return await _count(store, comfyui, jobs, kills, held, recovery, seconds)
        finally:
            await store.close()


async def _kill_at_random(
    store: SqlJobs, crew: _Workers, draw: random.Random, *, jobs: int, kills: int
) -> tuple[int, list[float]]:
    """Kill when the work is far enough for the next kill, so that the kills spread over all of it."""
    held = 0
    watching: list[asyncio.Task[float]] = []
    for number in range(kills):
        while (await store.counts())[QueueStatus.DONE] < jobs * 0.95 * number / kills:
            await store.changed(timeout=timedelta(milliseconds=20))
        await asyncio.sleep(draw.random() * 0.1)
        victim = draw.choice(crew.running)
        await crew.kill(victim)
        at = time.perf_counter()
        orphans = await _held_by(store, victim.pid)
        held += len(orphans)
        if orphans:
            watching.append(asyncio.create_task(_claimed_again(store, orphans, at)))
        await crew.start()
    return held, list(await asyncio.gather(*watching))


async def _held_by(store: SqlJobs, pid: int) -> list[QueuedJob]:
    owners = {str(owner.id) for owner in (await store.owners()).values() if owner.pid == pid}
    processing = await store.jobs(status=QueueStatus.PROCESSING)
    return [job for job in processing if str(job.worker_id) in owners]


async def _claimed_again(store: SqlJobs, orphans: list[QueuedJob], since: float) -> float:
    waiting = {job.id: job.token for job in orphans}
    while waiting:
        for job_id, token in list(waiting.items()):
            job = await store.job(job_id)
            if job is None or job.token > token or job.ended:
                del waiting[job_id]
        await asyncio.sleep(0.05)
    return time.perf_counter() - since


async def _until_done(store: SqlJobs, jobs: int, *, patience: float) -> None:
    last, since = -1, time.perf_counter()
    while True:
        counts = await store.counts()
        done = counts[QueueStatus.DONE] + counts[QueueStatus.FAILED]
        if done >= jobs:
            return
        if done != last:
            last, since = done, time.perf_counter()
        if time.perf_counter() - since > patience:
            return  # what is missing is counted as lost
        await store.changed(timeout=timedelta(seconds=0.2))


async def _count(
    store: SqlJobs,
    comfyui: InThread[ComfyUIEmulator],
    jobs: int,
    kills: int,
    held: int,
    recovery: list[float],
    seconds: float,
) -> Campaign:
    began = Counter(comfyui.call(lambda emulator: [str(record.prompt_id) for record in emulator.run_log]))
    rows = await store.jobs()
    lost = sum(row.status is not QueueStatus.DONE for row in rows)
    twice = attached = never_sent = run_again = 0
    for row in rows:
        events = await store.events(job_id=row.id)
        kinds = Counter(event.kind for event in events)
        attached += kinds[EventKind.ATTACHED]
        outputs = row.result.get("outputs", [])
        whole = bool(outputs) and await asyncio.to_thread(_are_whole, outputs)
        done = row.status is QueueStatus.DONE
        twice += kinds[EventKind.DONE] > 1 or (done and not whole)
        prompts = {str(attempt.prompt_id) for attempt in await store.attempts(row.id) if attempt.prompt_id}
        ran = sum(began[prompt] for prompt in prompts)
        run_again += max(0, ran - 1)
        never_sent += kinds[EventKind.SUBMITTING] - kinds[EventKind.SUBMITTED]
    return Campaign(jobs, kills, held, attached, lost, twice, run_again, max(0, never_sent), tuple(recovery), seconds)


def _are_whole(outputs: list[dict[str, str]]) -> bool:
    try:
        return all(hashlib.sha256(Path(o["path"]).read_bytes()).hexdigest() == o["sha256"] for o in outputs)
    except OSError:
        return False


def tell(found: Findings, database: str, campaign: Campaign) -> None:
    report(
        "queue-kills",
        database=database,
        jobs=campaign.jobs,
        kills=campaign.kills,
        held_when_killed=campaign.in_flight,
        attached_again=campaign.attached,
        lost=campaign.lost,
        committed_twice=campaign.committed_twice,
        run_again=campaign.run_again,
        recovery_p50_s=round(middle(campaign.recovery), 2) if campaign.recovery else None,
        recovery_max_s=round(high(campaign.recovery, 1.0), 2) if campaign.recovery else None,
        allowed_s=LEASE_SECONDS + REAP_SECONDS,
        seconds=round(campaign.seconds, 1),
    )
    found.told(f"{database}: jobs", campaign.jobs)
    found.told(f"{database}: executors killed", campaign.kills)
    found.told(f"{database}: jobs held by one that was killed", campaign.in_flight)
    found.at_most(f"{database}: jobs lost", campaign.lost, 0)
    found.at_most(f"{database}: jobs committed twice", campaign.committed_twice, 0)
    found.at_most(f"{database}: accepted prompts run again", campaign.run_again, 0)
    if campaign.recovery:
        allowed = LEASE_SECONDS + REAP_SECONDS
        found.at_most(
            f"{database}: from a kill until all is claimed again, longest", max(campaign.recovery), allowed, "s"
        )


async def run(jobs: int = 1_000, kills: int = 100) -> Result:
    found = Findings("killing", "Executors are processes, killed at random while they work off jobs of 50 ms.")
    with TemporaryDirectory(prefix="comfyctl-kill-") as folder:
        path = Path(folder) / "queue.sqlite3"
        tell(found, "sqlite", await run_campaign(str(path), Path(folder), jobs=jobs, kills=kills))
    from runcomfy.testing.postgres import PostgresForTests

    with PostgresForTests() as server, TemporaryDirectory(prefix="comfyctl-kill-") as folder:
        tell(found, "postgresql", await run_campaign(server.database(), Path(folder), jobs=jobs, kills=kills))
    return found.result()


def main() -> Result:
    return asyncio.run(run())
