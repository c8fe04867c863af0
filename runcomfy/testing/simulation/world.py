"""
What takes part in a simulated day: the cloud, the services that work for the queue, the guard, and who watches them.

Load, faults and oracles are given a `World` and nothing else. Names and signatures here are what they go by.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final, Self, TypeVar

from runcomfy.application.finish import finish
from runcomfy.application.guard import Guard
from runcomfy.domain.budget import Budget
from runcomfy.domain.exceptions import LocalError, StopUnconfirmed
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Killed
from runcomfy.testing.serving import Served, Services
from runcomfy.testing.simulation.loop import MemoryLoop
from runcomfy.testing.simulation.trace import Trace

T = TypeVar("T")

DAY: Final = timedelta(hours=24)
CALM: Final = timedelta(hours=3)
"""So long before the end nothing goes wrong any more and no job comes: everything is to end by then (I25)."""

POOL: Final[dict[str, Any]] = {
    "max_machines": 4,
    "plan_every": timedelta(minutes=10),
    "status_every": timedelta(minutes=5),
    "reconcile_every": timedelta(minutes=5),
    "guard_period": timedelta(minutes=15),
}
"""How often is looked when nothing happens; what happens wakes all of them. These are the user's to choose."""
CLOUD: Final[dict[str, Any]] = {"poll_interval": timedelta(seconds=15)}
"""How often while a machine boots, or the answer to its launch was lost."""


RESTART: Final = timedelta(seconds=30)
"""After which a service that gave up is started again."""
PAUSES: Final = 0.25
"""How often others come in between when a database is asked."""


QUEUE: Final[dict[str, Any]] = {
    "poll_interval": timedelta(minutes=10),
    "lease": timedelta(minutes=20),
    "heartbeat": timedelta(minutes=5),
    "reap_every": timedelta(minutes=8),
}


@dataclass(slots=True)
class Tally:
    """What a day came to."""

    jobs: int = 0
    machines: int = 0
    faults: int = 0
    kills: int = 0
    services: int = 0


class World:
    """One day. `async with World(seed) as world:` sets it up; see `run.py` for what happens in it."""

    def __init__(self, seed: int, loop: MemoryLoop, *, length: timedelta = DAY) -> None:
        """Nothing runs before it is entered."""
        self.seed = seed
        self.loop = loop
        self.length = length
        self.rng = self.stream("world")
        self._pauses = self.stream("pauses").random
        self.clock = LoopClock()
        self.trace = Trace(loop.time)
        self.tally = Tally()
        self.served: list[Served] = []
        """Services that run now."""
        self.acknowledged: dict[str, Any] = {}
        """By its name, each job of which a client was told that it is accepted."""
        self.cloud: RunComfyEmulator
        """Its books are the oracle for what is billed, its ComfyUI servers' run logs for what ran."""
        self.services: Services
        self.budgets: Sequence[Budget] = ()
        """Of services that are started from now on."""
        self.deaths: list[str] = []
        """Programs that ended and should not have."""
        self.guard: GuardProgram | None = None
        self.names: dict[Served, str] = {}
        self._programs: dict[Served, asyncio.Task[None]] = {}
        self._over: dict[Served, asyncio.Event] = {}
        self._returning: set[asyncio.Task[None]] = set()
        self._own: dict[Callable[[World], Any], Any] = {}
        self.folder: Path

    def own(self, kind: Callable[[World], T]) -> T:
        """Return the one thing of a kind that goes with this world; it is made when it is first asked for."""
        if kind not in self._own:
            self._own[kind] = kind(self)
        found: T = self._own[kind]
        return found

    # -- time and chance -----------------------------------------------------------------------------------

    def stream(self, name: str) -> Random:
        """Return a generator of its own for one purpose: what it draws changes nothing for the others."""
        return Random(f"{self.seed}/{name}")

    @property
    def now(self) -> datetime:
        """The virtual time, in UTC."""
        return self.clock.now()

    @property
    def seconds(self) -> float:
        """The virtual time in seconds since the day began."""
        return self.loop.time()

    @property
    def calm_at(self) -> float:
        """The second from which nothing goes wrong any more and no job comes."""
        return max(self.length * 0.5, self.length - CALM).total_seconds()

    async def _pause(self) -> None:
        """Let others come in between, now and then, before a database answers."""
        if self._pauses() < PAUSES:
            await asyncio.sleep(0)

    # -- life ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="comfyctl-simulation-", dir=_memory()))
        self.trace.hide(str(self.folder), "…")
        machines = self.folder / "machines"
        machines.mkdir()
        self.cloud = RunComfyEmulator(now=self.clock.now, folder=machines, balance_usd=None)
        await self.cloud.start()
        account = CloudSettings(
            base_url=self.cloud.url,
            user_id=self.cloud.user_id,
            tokens=(Secret(self.cloud.token),),
            workflow_version_id=str(self.cloud.workflows[0]["version_id"]),
        )
        self.services = Services(self.cloud, account, self.clock, self.folder, in_memory=self._pause, **QUEUE)
        await self.services.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for task in self._returning:
                task.cancel()
            for served in list(self.served):
                served.wake()
                await self._let_end(served)
            if self.guard is not None:
                await self.guard.kill()
            await self.services.__aexit__(None, None, None)
        finally:
            await self.cloud.stop()
            self.cloud.on_call.clear()  # aiohttp keeps the last applications, and with them the cloud they are part of
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- programs ------------------------------------------------------------------------------------------

    async def start_service(self) -> Served:
        """Start one more service on the queue; it serves, or waits until the one that does is gone."""
        started: asyncio.Future[Served] = self.loop.create_future()
        over = asyncio.Event()

        async def live() -> None:
            try:
                async with self.services.start(budgets=self.budgets, cloud=CLOUD, **POOL) as served:
                    served.app.tell = _both(served.app.tell, lambda said: self.trace.tell(name, said))
                    self._over[served] = over
                    started.set_result(served)
                    await over.wait()
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)
                    return
                raise

        self.tally.services += 1
        name = f"service-{self.tally.services}"
        task = self.loop.create_task(live(), name=name)
        served = await started
        self._programs[served] = task
        self.names[served] = name
        self.served.append(served)
        assert served.task is not None  # noqa: S101 - it has begun
        served.task.add_done_callback(lambda done: self._ended(served, name, done))
        self.trace.tell("world", f"{name} is started")
        return served

    async def start_guard(self) -> None:
        """Start the guard, in a program of its own."""
        self.guard = GuardProgram(self)
        self.guard.begin()

    def _ended(self, served: Served, name: str, task: asyncio.Task[bool]) -> None:
        """Note the end of a service that nobody has asked for."""
        if served not in self.served or served.app.killed.is_set() or task.cancelled():
            return
        error = task.exception()
        words = f"{name} ended by itself, " + (
            "without a reason" if error is None else f"{type(error).__name__}: {error}"
        )
        self.trace.tell("world", words)
        if not isinstance(error, LocalError):  # no database is a reason to give up at the start: it is started again
            self.deaths.append(words)
        self.served.remove(served)
        self._return(RESTART, self._let_end(served))

    async def _let_end(self, served: Served) -> None:
        """Have a service end in good order; one that was killed ends at once."""
        if served in self.served:
            self.served.remove(served)
        self._over.pop(served).set()
        task = self._programs.pop(served)
        with suppress(Killed, asyncio.CancelledError):
            await task

    async def stop(self, served: Served) -> None:
        """Stop a service in good order, as by one SIGTERM, and wait for its end."""
        if served not in self.served:
            return
        self.trace.tell("world", f"{self.names[served]} is stopped")
        try:
            await self._let_end(served)
        except (
            StopUnconfirmed,
            LocalError,
        ) as error:  # its last words, and its exit code: whatever looks after it goes on
            self.trace.tell("world", f"{self.names[served]} ended with: {error}")

    async def kill(self, served: Served) -> None:
        """End a service as by SIGKILL, if it still runs."""
        if served not in self.served:
            return
        self.tally.kills += 1
        self.served.remove(served)
        self.trace.tell("world", f"{self.names[served]} is killed")
        await served.kill()
        await self._let_end(served)

    async def kill_and_restart(self, served: Served, after: timedelta) -> None:
        """End a service as by SIGKILL, if it still runs; another one is started so much later. Returns at the kill."""
        if served not in self.served:
            return
        await self.kill(served)
        self._return(after)

    def _return(self, after: timedelta, first: Coroutine[Any, Any, None] | None = None) -> None:
        """Have another service started so much later, as whatever looks after services does; `first` comes first."""

        async def come_back() -> None:
            if first is not None:
                with suppress(LocalError):
                    await first
            await asyncio.sleep(after.total_seconds())
            await self.start_service()

        task = self.loop.create_task(come_back(), name="come back")
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)


class GuardProgram:
    """The guard as `comfyctl guard`, kept by a service: it leaves when there is nothing to guard, and comes back."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._app: Any = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start it; it goes on until it is killed."""
        self._task = self._world.loop.create_task(self._live(), name="guard")

    async def kill(self) -> None:
        """End it as by SIGKILL."""
        task, self._task = self._task, None
        if task is None:
            return
        if self._app is not None:
            self._world.services.processes.dead |= self._app.own.ids
            self._app.killed.set()
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()

    async def kill_and_restart(self, after: timedelta) -> None:
        """End it as by SIGKILL, and start another so much later; returns then."""
        self._world.tally.kills += 1
        await self.kill()
        await asyncio.sleep(after.total_seconds())
        self.begin()

    async def _live(self) -> None:
        world = self._world
        settings = world.services.settings_of(cloud=CLOUD, **POOL)
        app = self._app = world.services.app(settings)
        app.tell = lambda said: world.trace.tell("guard", said)
        with suppress(Killed):
            async with app:
                machines, dev = await app.cloud()
                while True:
                    looks = Guard(machines, dev, period=settings.pool.guard_period)
                    try:
                        await looks.run()
                    finally:
                        await finish(looks.close())
                    await asyncio.sleep(settings.pool.reconcile_every.total_seconds())


def _memory() -> str | None:
    """Return a folder in memory, where the system has one."""
    folder = "/dev/shm"  # noqa: S108 - a folder of its own is made in it
    return folder if sys.platform == "linux" and os.access(folder, os.W_OK) else None


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def tell(sentence: str) -> None:
        first(sentence)
        second(sentence)

    return tell
