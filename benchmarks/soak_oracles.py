"""
What a soak is judged by: the clouds' bills and the ComfyUI servers' own logs, the clients' books and the files.

Our rows are read to tell the story of what went wrong, and where a promise is about them (every second that is billed
is in the ledger; a job has one last word). They never speak for themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from PIL import Image

from benchmarks.soak_clients import Books, Put
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.machine import Machine, Transition
from runcomfy.domain.money import LedgerEntry, seconds_between
from runcomfy.domain.queued import Attempt, EventKind, JobEvent, QueuedJob, QueueStatus, RowId

LEDGER_ALLOWS: Final = Decimal(2)
"""Seconds of a bill that may be missing in the ledger: answers take time on the way."""
LEDGER_AHEAD: Final = Decimal(60)
"""Seconds that the ledger may have beyond the bill: if a machine went away unseen, its planned end counts (I9)."""
GONE_WITHIN: Final = 60.0
"""Seconds beyond its timeout within which a machine that nobody needs is gone (I25)."""


@dataclass
class Found:
    """What the oracles say."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Files that are not what they have to be, and whatever else contradicts a promise."""
    leaked_s: float = 0.0
    """Seconds that were billed though nobody needed the machine, and seconds billed that are not in the ledger."""
    leaks: list[str] = field(default_factory=list)
    machines: int = 0
    billed_s: float = 0.0
    ran: int = 0
    again: Counter[str] = field(default_factory=Counter)
    """Runs of a job beyond its first, by why that had to be."""

    @property
    def violations(self) -> list[str]:
        """Every story."""
        return [*self.lost, *self.doubled, *self.wrong, *self.leaks]


@dataclass(frozen=True, slots=True)
class Ran:
    """One beginning of a prompt, by the log of the process that ran it."""

    prompt: str
    pid: int
    place: str
    began: float
    ended: float | None
    outcome: str


@dataclass(frozen=True, slots=True)
class Owned:
    """A machine of ours, by our books."""

    machine: Machine
    ledger: Sequence[LedgerEntry]
    story: Sequence[Transition]

    @property
    def told(self) -> str:
        """Its story, a line each."""
        return "\n".join(f"    {step.at:%H:%M:%S.%f} {step.event} {step.state} {step.note}" for step in self.story)

    @property
    def taken_over(self) -> list[float]:
        """When it was taken over: it is kept for those who look for their prompts there."""
        return [step.at.timestamp() for step in self.story if step.event == "taken-over"]


@dataclass
class Rows:
    """What our books say."""

    jobs: Sequence[QueuedJob]
    attempts: Mapping[RowId, Sequence[Attempt]]
    events: Sequence[JobEvent]
    machines: Mapping[str, Owned]
    """By the provider's id."""


async def read_rows(queue: str, books: Mapping[str, str]) -> Rows:
    """Read everything of ours. `books`: where the books of each account are."""
    jobs = SqlJobs(store_from(queue, clock=SystemClock()))
    await jobs.open()
    try:
        rows = await jobs.jobs()
        attempts = {row.id: await jobs.attempts(row.id) for row in rows}
        events: list[JobEvent] = []
        while more := await jobs.events(after=events[-1].number if events else 0, limit=5_000):
            events += more
    finally:
        await jobs.close()
    machines = {}
    for account, where in books.items():
        async with SqlStore.over(store_from(where, clock=SystemClock())) as store:
            for machine in await store.machines(provider="runcomfy", account=account, open_only=False):
                if machine.server_id is not None:
                    ledger, story = await store.ledger(machine_id=machine.id), await store.story(machine.id)
                    machines[str(machine.server_id)] = Owned(machine, ledger, story)
    return Rows(rows, attempts, events, machines)


def runs_in(log: Path, place: str) -> list[Ran]:
    """Return what a ComfyUI's processes have run, the last word on each."""
    last: dict[tuple[int, str, float], Ran] = {}
    if log.is_file():
        for line in log.read_text().splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # killed in the middle of it
            ran = Ran(said["prompt"], said["pid"], place, said["began"], said["ended"], said["outcome"])
            last[ran.pid, ran.prompt, ran.began] = ran
    return list(last.values())


class Judge:
    """Compares what happened with what had to."""

    def __init__(self, rows: Rows, books: Books, outside: Mapping[str, Any], *, timeout_s: float, grace_s: float):
        """`timeout_s`: a machine's own. `grace_s`: how long a prompt waits for those who can reach it."""
        self._rows, self._books, self._outside = rows, books, outside
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._runs: dict[str, list[Ran]] = defaultdict(list)
        self._by_place: dict[str, list[Ran]] = {}
        logs = {bill["server_id"]: bill["log"] for bill in outside["bills"] if bill["log"]} | {"own": outside["own"]}
        for place, log in logs.items():
            self._by_place[place] = runs_in(Path(log), place)
            for ran in self._by_place[place]:
                self._runs[ran.prompt].append(ran)
        self._prompts: dict[RowId, set[str]] = defaultdict(set)
        for event in rows.events:
            if event.job_id is not None and event.data.get("prompt_id"):
                self._prompts[event.job_id].add(str(event.data["prompt_id"]))
        self._kinds: dict[RowId, list[JobEvent]] = defaultdict(list)
        for event in rows.events:
            if event.job_id is not None:
                self._kinds[event.job_id].append(event)
        self.found = Found()

    def judge(self) -> Found:
        """Ask all of them."""
        self._jobs()
        self._strangers()
        self._machines()
        self._listener()
        self.found.wrong += self._books.wrong
        return self.found

    # -- jobs ------------------------------------------------------------------------------------------------------

    def _jobs(self) -> None:
        found, rows = self.found, {str(job.uid): job for job in self._rows.jobs}
        files = {job.config_name: job for job in self._rows.jobs}
        wanted = [(put, rows.get(put.job_id)) for put in self._books.puts.values()]
        wanted += [(put, files.get(name)) for name, put in self._books.by_file.items()]
        found.jobs = len(wanted)
        known = set()
        for put, job in wanted:
            if job is None:
                found.lost.append(f"{put.key} was asked for {put.asked} times and is not in the queue")
                continue
            if job.id in known:
                found.wrong.append(f"{put.key}: two orders are one job, {job.id}")
            known.add(job.id)
            self._job(put, job)
        for job in self._rows.jobs:
            if job.id not in known:
                found.doubled.append(f"job {job.id} ({job.config_name}) was put in though nobody asked for it")

    def _job(self, put: Put, job: QueuedJob) -> None:
        found = self.found
        if job.status is not QueueStatus.DONE:
            found.lost.append(f"{put.key} is {job.status} ({job.reason}): {job.message}\n{self.story(job)}")
            return
        commits = sum(event.kind is EventKind.DONE for event in self._kinds[job.id])
        if commits != 1:
            found.doubled.append(f"{put.key} was committed {commits} times\n{self.story(job)}")
        outputs = job.result.get("outputs", ())
        if not outputs:
            found.wrong.append(f"{put.key} is done without a result\n{self.story(job)}")
        for output in outputs:
            found.wrong += [f"{put.key}: {what}\n{self.story(job)}" for what in _of_file(output, put)]
        self._runs_of(put, job)

    def _runs_of(self, put: Put, job: QueuedJob) -> None:
        """A prompt runs once, and a job whose prompt has come to its end on a server that lives is not run again."""
        ends = [ran for prompt in self._prompts[job.id] for ran in self._runs[prompt]]
        self.found.ran += len(ends)
        for prompt in self._prompts[job.id]:
            alive = sorted((ran for ran in self._runs[prompt] if ran.outcome == "success"), key=lambda ran: ran.began)
            if any(self._why_again(ran, later) is None for ran, later in pairwise(alive)):
                self.found.doubled.append(f"{put.key}: prompt {prompt} ran {len(alive)} times\n{self.story(job)}")
        whole = sorted((ran for ran in ends if ran.outcome == "success"), key=lambda ran: ran.began)
        if not whole and not any(self._cut(ran) for ran in ends):
            self.found.wrong.append(f"{put.key} is done, and no server has run it to the end\n{self.story(job)}")
        for ran, later in pairwise(whole):
            why = self._why_again(ran, later)
            if why is None:
                self.found.doubled.append(f"{put.key} ran twice: {ran}, then {later}\n{self.story(job)}")
            else:
                self.found.again[why] += 1

    def _why_again(self, ran: Ran, later: Ran) -> str | None:
        """Return what took the first result away before it could be had; None: nothing did."""
        if any(
            other.pid != ran.pid and (ran.ended or 0) <= other.began <= later.began
            for other in self._by_place[ran.place]
        ):
            return "its ComfyUI was killed before the result was fetched"
        if any((ran.ended or 0) - 1 <= at <= later.began for at in self._outside["kills"]):
            return "its ComfyUI was killed before the result was fetched"
        bill = next((bill for bill in self._outside["bills"] if bill["server_id"] == ran.place), None)
        if bill is not None and bill["ended_at"] and _wall(bill["ended_at"]) <= later.began:
            return "its machine was gone before the result was fetched"
        if self._account(ran.place) != self._account(later.place) and later.began - ran.began >= self._grace_s:
            return "nobody who could reach its machine came back in time"
        return None

    def _cut(self, ran: Ran) -> bool:
        """Return whether its server was killed while it ran or just then, before it could log that it was done."""
        return ran.ended is None and any(
            other.pid != ran.pid and other.began > ran.began for other in self._by_place[ran.place]
        )

    def _account(self, place: str) -> str:
        """Return whose a place is: only services of that account can reach it."""
        return next((str(b["account"]) for b in self._outside["bills"] if b["server_id"] == place), place)

    def _strangers(self) -> None:
        claimed = {prompt for prompts in self._prompts.values() for prompt in prompts}
        for prompt, runs in self._runs.items():
            if prompt not in claimed:
                self.found.doubled.append(f"prompt {prompt} is no job's, and ran: {runs}")

    # -- machines --------------------------------------------------------------------------------------------------

    def _machines(self) -> None:
        found = self.found
        for bill in self._outside["bills"]:
            found.machines += 1
            seconds = Decimal(bill["seconds"])
            found.billed_s += float(seconds)
            row = self._rows.machines.get(bill["server_id"])
            entries = row.ledger if row is not None else ()
            ours = sum((seconds_between(e.started_at, e.ended_at) for e in entries), Decimal(0))
            if ours - seconds > LEDGER_AHEAD:
                found.wrong.append(f"machine {bill['server_id']}: billed {seconds} s, our ledger has {ours} s")
            if seconds - ours > LEDGER_ALLOWS:
                found.leaked_s += float(seconds - ours)
                told = row.told if row is not None else ""
                found.leaks.append(
                    f"machine {bill['server_id']} {bill['traits']}: the cloud bills {seconds} s, our ledger has "
                    f"{ours} s ({'no row of ours' if row is None else row.machine.state})\n{told}"
                )
            idle = self._idle(bill)
            if idle > 0:
                found.leaked_s += idle
                told = row.told if row is not None else "    no row of ours"
                found.leaks.append(
                    f"machine {bill['server_id']} {bill['traits']} was billed {idle:.0f} s for nobody\n{told}"
                )

    def _idle(self, bill: Mapping[str, Any]) -> float:
        """Return for how long a machine was billed beyond its timeout and a minute after anybody needed it."""
        if not bill["ready_at"]:
            return 0.0
        end = _wall(bill["ended_at"]) if bill["ended_at"] else datetime.now(UTC).timestamp()
        needed = _wall(bill["ready_at"])
        worst = 0.0
        row = self._rows.machines.get(bill["server_id"])
        times = [(at, at) for at in (row.taken_over if row is not None else ())]
        times += [(ran.began, ran.ended or ran.began) for ran in self._by_place.get(bill["server_id"], ())]
        for since, until in sorted(times):
            worst = max(worst, since - needed)
            needed = max(needed, until)
        return max(0.0, max(worst, end - needed) - self._timeout_s - GONE_WITHIN)

    # -- events ----------------------------------------------------------------------------------------------------

    def _listener(self) -> None:
        told, found = self._books.told, self.found
        twice = [number for number, count in Counter(told).items() if count > 1]
        if twice:
            found.wrong.append(f"a listener was told {len(twice)} events more than once: {twice[:10]}")
        if told:
            missed = sorted({event.number for event in self._rows.events} - set(told))
            if missed:
                found.wrong.append(f"a listener was never told {len(missed)} events: {missed[:10]}")

    def story(self, job: QueuedJob) -> str:
        """Return what is known of a job, a line each."""
        lines = [f"    {e.at:%H:%M:%S.%f} {e.kind} token {e.token} {dict(e.data)}" for e in self._kinds[job.id]]
        lines += [
            f"    attempt {attempt.token}: {attempt.started_at:%H:%M:%S.%f} {attempt.outcome} "
            f"at {attempt.place} prompt {attempt.prompt_id} {attempt.error_code}"
            for attempt in self._rows.attempts[job.id]
        ]
        runs = sorted((r for p in self._prompts[job.id] for r in self._runs[p]), key=lambda ran: ran.began)
        for ran in runs:
            at = datetime.fromtimestamp(ran.began, UTC)
            lines.append(f"    ran {at:%H:%M:%S.%f} {ran.outcome} at {ran.place} by {ran.pid} prompt {ran.prompt}")
        return "\n".join(lines)


def _wall(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _of_file(output: Mapping[str, Any], put: Put) -> Iterable[str]:
    path = Path(output["path"])
    try:
        data = path.read_bytes()
        with Image.open(path) as picture:
            colour = picture.convert("RGB").getpixel((0, 0))
    except (OSError, SyntaxError) as error:
        yield f"its result cannot be read: {error}"
        return
    if len(data) != output["size_bytes"] or hashlib.sha256(data).hexdigest() != output["sha256"]:
        yield f"{path.name} is not the file that was recorded"
    if colour != put.colour:
        yield f"{path.name} shows {colour}, and {put.colour} was asked for"


async def jobs_left(queue: str) -> int:
    """Return how many jobs wait or run."""
    jobs = SqlJobs(store_from(queue, clock=SystemClock()))
    await jobs.open()
    try:
        counts = await jobs.counts()
    finally:
        await jobs.close()
    return counts[QueueStatus.PENDING] + counts[QueueStatus.PROCESSING]


async def last_event(queue: str) -> int:
    """Return the number of the newest event."""
    jobs = SqlJobs(store_from(queue, clock=SystemClock()))
    await jobs.open()
    try:
        number = 0
        while more := await jobs.events(after=number, limit=5_000):
            number = more[-1].number
    finally:
        await jobs.close()
    return number
