"""
What bills after everything of ours has died, at any point of a machine's life: told with virtual time.

A story (a run on a machine of its own; a dev server that is started, prolonged, used and ended) is told once to learn
its kill points: every named fault point, and before and after every durable write and every call to the provider. Then
it is told again for each of them, and there it dies: nothing of it has an effect any more, for ever. The emulated
cloud's own books say what is billed after the death.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from runcomfy.application.faultpoints import listening
from runcomfy.application.guard import Guard
from runcomfy.domain.job import JobId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Killed, Program, Programs, settings_for

GUARD_PERIOD: Final = timedelta(seconds=30)
RUN_LEASE: Final = timedelta(minutes=10)
DEV_DURATION: Final = timedelta(minutes=15)
DEV_LONGER: Final = timedelta(minutes=10)
OCCURRENCES: Final = 3
"""So many visits of one place are kill points: from then on a story repeats itself."""
AFTERWARDS: Final = timedelta(hours=3)
IN_FLIGHT: Final = 40.0
"""Seconds for which the cloud keeps back the answer to a call during which a story dies."""
READS: Final = frozenset(
    f"store.{name}"
    for name in ("machine", "machines", "owners", "uses", "works", "story", "ledger", "boot_times", "heartbeat")
) | {"store.reserve_request", "store.open"}
"""Calls that leave nothing behind: what is between two of them is between the writes around them, too."""
FLIGHTS: Final[Mapping[str, str]] = {
    "during provider.launch_machine": "POST servers",
    "during provider.change_duration": "POST servers/*/update-estimated-duration",
    "during provider.stop_machine": "DELETE *",
}

Tell = Callable[[Program], Awaitable[None]]


async def a_run(program: Program) -> None:
    """A run on a machine of its own that takes longer than its first lease."""
    placer = program.placer
    job = JobId("00000000-0000-4000-8000-000000000001")
    at = placer.at(server_url=None, server_type="medium", job_id=job, show=lambda _: None, step=lambda _: None)
    async with at:
        await asyncio.sleep(1.5 * RUN_LEASE.total_seconds())


async def a_dev_server(program: Program) -> None:
    """A dev server: started, prolonged, used by a job, ended."""
    await program.dev.start(server_type="medium", duration=DEV_DURATION)
    await program.dev.extend(by=DEV_LONGER)
    job = JobId("00000000-0000-4000-8000-000000000002")
    at = program.placer.at(server_url=None, server_type=None, job_id=job, show=lambda _: None, step=lambda _: None)
    async with at:
        await asyncio.sleep(120)
    await program.dev.shutdown()


STORIES: Final[Mapping[str, tuple[Tell, timedelta]]] = {
    "run": (a_run, RUN_LEASE),
    "dev server": (a_dev_server, DEV_DURATION + DEV_LONGER),
}
"""Name -> the story, and the longest lease ahead of it at any time."""


@dataclass(frozen=True, slots=True)
class Death:
    """Where a story dies: at the so-manieth visit of a place."""

    place: str
    visit: int

    def __str__(self) -> str:
        return self.place if self.visit == 1 else f"{self.place} ({self.visit})"


@dataclass(frozen=True, slots=True)
class Leak:
    """What was billed after a death."""

    death: Death
    died: bool
    seconds: Decimal
    usd: Decimal
    usd_per_hour: Decimal
    still_bills: bool
    ledger_usd: Decimal | None
    """What our ledger says of everything, where a guard was there to complete it."""
    bill_usd: Decimal


class _Stage:
    """One telling of a story."""

    def __init__(self, death: Death | None) -> None:
        self._death = death
        self.visits: Counter[str] = Counter()
        self.order: list[Death] = []
        self.program: Program | None = None
        self.killed = asyncio.Event()

    def visit(self, place: str) -> None:
        """Count a visit; die if this is the one."""
        if self.killed.is_set() or self.program is None:
            return
        if place.partition(" ")[2] in READS:
            return
        self.visits[place] += 1
        here = Death(place, self.visits[place])
        if here.visit <= OCCURRENCES:
            self.order.append(here)
        if here == self._death:
            self.die()
            raise Killed

    def die(self) -> None:
        """Be dead from now on."""
        if self.program is not None:
            self.program.drop_dead()
        self.killed.set()


@asynccontextmanager
async def _cloud(folder: Path, *, keeps_word: bool) -> AsyncIterator[tuple[RunComfyEmulator, Programs]]:
    clock = LoopClock()
    async with RunComfyEmulator(now=clock.now, boot_time=60, rate_limit=False, folder=folder / "machines") as cloud:
        if not keeps_word:
            for _ in range(5):
                cloud.next_machine(ignores_stop_time=True)
        account = CloudSettings(
            base_url=cloud.url,
            user_id=cloud.user_id,
            tokens=(Secret(cloud.token),),
            workflow_version_id=str(cloud.workflows[0]["version_id"]),
            run_lease=RUN_LEASE,
        )
        settings = settings_for(account, folder / "state")
        settings = replace(settings, app=replace(settings.app, idle_timeout=AFTERWARDS))
        yield cloud, Programs(cloud, settings, clock)


async def kill_points(story: str, folder: Path) -> list[Death]:
    """Return every place at which the story can die, in the order in which they come."""
    tell, _ = STORIES[story]
    stage = _Stage(None)
    async with _cloud(folder, keeps_word=True) as (_, programs), programs.start(visit=stage.visit) as program:
        stage.program = program
        with listening(stage.visit):
            await tell(program)
        stage.program = None
    shutil.rmtree(folder, ignore_errors=True)
    flights = [Death(place, 1) for place in FLIGHTS if f"after {place.partition(' ')[2]}" in stage.visits]
    return [*stage.order, *flights]


async def leak_of(story: str, death: Death, folder: Path, *, keeps_word: bool) -> Leak:
    """Tell the story to its death; return what was billed from then on.

    Where the provider keeps its word everything of ours is dead; where it ignores leases, only a guard lives.
    """
    tell, _ = STORIES[story]
    stage = _Stage(death)
    async with _cloud(folder, keeps_word=keeps_word) as (cloud, programs):
        async with programs.start(visit=stage.visit) as program:
            guard = None if keeps_word else asyncio.create_task(_guard(programs))
            if death.place in FLIGHTS:
                cloud.next_call(FLIGHTS[death.place], delay=IN_FLIGHT)
            before, died = await _told(tell, program, stage, cloud)
            ledger = None
            if guard is None:
                await asyncio.sleep(AFTERWARDS.total_seconds())
            else:
                async with asyncio.timeout(AFTERWARDS.total_seconds()):
                    ledger = await guard
        bill = cloud.total_usd
        after = {server_id: line.seconds for server_id, line in cloud.books.items()}
        seconds = sum((after[server_id] - before.get(server_id, Decimal(0)) for server_id in after), Decimal(0))
        price = max((line.usd_per_hour for line in cloud.machines.values()), default=Decimal(0))
        leak = Leak(death, died, seconds, seconds * price / 3600, price, bool(cloud.billing), ledger, bill)
    shutil.rmtree(folder, ignore_errors=True)
    return leak


async def _told(
    tell: Tell, program: Program, stage: _Stage, cloud: RunComfyEmulator
) -> tuple[Mapping[str, Decimal], bool]:
    """Tell the story until it dies or ends; return what was billed by then, and whether it died."""
    stage.program = program
    with listening(stage.visit):
        work = asyncio.ensure_future(tell(program))
        end = asyncio.ensure_future(stage.killed.wait())
        flight = asyncio.ensure_future(_dies_in_flight(stage, cloud))
        await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
        died = stage.killed.is_set()
        before = {server_id: line.seconds for server_id, line in cloud.books.items()}
        flight.cancel()
        end.cancel()
        work.cancel()
        await asyncio.wait({work, flight, end})
    if not died:
        work.result()
        program.drop_dead()  # it ended in good order; what follows is the same
    elif not work.cancelled():
        work.exception()
    return before, died


async def _dies_in_flight(stage: _Stage, cloud: RunComfyEmulator) -> None:
    """Die while the cloud has done what it was asked for, and has not answered."""
    death = stage._death
    if death is None or death.place not in FLIGHTS:
        return
    pattern, came = FLIGHTS[death.place], False
    while not came:
        await asyncio.sleep(1)
        came = any(fnmatchcase(f"{call.method} {call.path}", pattern) for call in cloud.calls)
    await asyncio.sleep(1)
    stage.die()


async def _guard(programs: Programs) -> Decimal:
    """Guard until nothing is left, and return what our ledger says then."""
    async with programs.start() as program:
        guard = Guard(program.machines, program.dev, period=GUARD_PERIOD)
        await guard.run()
        await guard.close()
        return await program.billed()


def allowed(story: str, *, keeps_word: bool) -> timedelta:
    """Return how long a machine may bill after the death: its lease, and the guard's period where that counts."""
    lease = STORIES[story][1]
    return lease if keeps_word else lease + GUARD_PERIOD
