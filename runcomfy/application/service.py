"""
The long-running service of `comfyctl serve`: one process that works off the queue over rented machines.

    role      only who holds `fleet` plans, dispatches and renews (I19); a second service on the same books waits and
              takes over when the first is gone; one that slept through its time lets go of everything and asks again
    crew      what works while the role is held: pool, executor, fleet, reconciler, monitor (`Crew`)
    end       told to stop: nothing is launched or begun, running jobs go on for a while, machines are ended

A loop that dies takes the service down loudly. What is rented is ended whenever the service ends in good order; after a
`kill -9` the next one takes the machines over, and without a next one they end by their leases.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from runcomfy.application.role import Role
from runcomfy.application.working_off import failed_here, left_behind, left_words
from runcomfy.domain.exceptions import BudgetExceeded, LocalError, RunComfyError
from runcomfy.domain.queued import Pause, QueueStatus
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.fleet")

STANDBY_EVERY: Final = 5.0
"""Seconds between two looks whether the role is free."""
DONE_LOOK: Final = 1.0
"""Seconds between two looks whether everything is worked off."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How a service runs, beside the settings; also what parts that join it are told."""

    monitor: bool = False
    """Whether the folder of job files is watched, too."""
    once: bool = False
    """Work off what is there, end all machines, leave."""
    guard: bool = True
    """Whether the guard process may be started."""
    queue: bool = True
    """Whether this process works off the queue at all; without, it only shows it, and needs no pool."""
    pool: bool = True
    """Whether jobs run over rented machines; without, where the queue's settings say."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """For parts that join the service."""
    shut_down: Callable[[], None] = lambda: None
    """Ends the service in good order, as one Ctrl+C does; for parts. Whoever serves fills it in."""

    @property
    def parts(self) -> frozenset[str]:
        """What of the service works in this process, beside the parts that join it."""
        return frozenset(name for name, on in (("queue", self.queue), ("pool", self.pool and self.queue)) if on)


class Works(Protocol):
    """The executor."""

    async def run(self, stop: asyncio.Event, leave: asyncio.Event | None = None, *, once: bool = False) -> None:
        """Work until told to stop, then let running jobs go on for a while, or until `leave` is set."""
        ...

    @property
    def failed(self) -> int:
        """How many jobs have ended as failed, or were set aside."""
        ...

    async def paused(self) -> Pause | None:
        """Return what keeps jobs from being begun, if anything does. Raises LocalError."""
        ...


class Plans(Protocol):
    """The fleet."""

    async def run(self) -> None:
        """Plan until cancelled."""
        ...

    async def end(self) -> None:
        """Take back what is said of the plan."""
        ...

    async def left(self) -> int:
        """Return how many jobs wait that could be begun. Raises LocalError."""
        ...

    def stuck(self) -> RunComfyError | None:
        """Return why what waits will get no machine, if it will not."""
        ...


class Watches(Protocol):
    """The monitor of job files."""

    async def run(self, stop: asyncio.Event) -> None:
        """Take job files up until told to stop."""
        ...

    async def once(self) -> Any:
        """Take up what is there."""
        ...


@dataclass(slots=True)
class Crew:
    """What works while the role is held. Whoever made it ends the machines, or lets go of them if the role is lost."""

    executor: Works
    fleet: Plans
    loops: tuple[Callable[[], Coroutine[Any, Any, None]], ...] = ()
    """What else runs until the end, for example the reconciler."""
    monitor: Watches | None = None


class Service:
    """`await run(stop)` serves until told to stop."""

    def __init__(
        self,
        role: Role,
        hire: Callable[[], AbstractAsyncContextManager[Crew]],
        jobs: JobStore,
        *,
        tell: Callable[[str], None],
    ) -> None:
        """`hire` makes the crew of one term; it is called with the role held."""
        self.role = role
        self._hire, self._jobs, self._tell = hire, jobs, tell
        self._failed = 0
        self._unasked: LocalError | None = None
        """Why the role could not be asked for last."""
        self.serving = asyncio.Event()
        """Set once this process was the one that serves."""

    async def run(self, stop: asyncio.Event, leave: asyncio.Event | None = None, *, once: bool = False) -> None:
        """Serve until `stop`, then drain, or until `leave` is set. `once`: until everything is worked off.

        Raises what keeps it from serving at all; with `once` also why jobs are left over, or else that jobs failed.
        """
        waits, said = False, ""
        try:
            while not stop.is_set():
                if await self._takes_role():
                    waits, said = False, ""
                    if await self._term(stop, leave, once=once):
                        return
                    self._tell("the role was lost (this process slept, or the database was away): asking for it again")
                    continue
                if self._unasked is not None:
                    if said != self._unasked.code:
                        self._tell(
                            "whether this process may go on serving cannot be found out now "
                            f"({self._unasked.message}): asking again until it can"
                        )
                    said, waits = self._unasked.code, False
                else:
                    if not waits:
                        self._tell("another process serves these books; this one takes over when that is gone")
                    said, waits = "", True
                with suppress(TimeoutError):
                    async with asyncio.timeout(STANDBY_EVERY):
                        await stop.wait()
        finally:
            await self.role.drop()

    async def _takes_role(self) -> bool:
        self._unasked = None
        try:
            return await self.role.take()
        except LocalError as error:
            self._unasked = error
            log.warning("role_not_asked", extra={"fields": {"error": error.code}})
            if self.role.epoch is None and not self.serving.is_set():
                raise
            return False

    async def _term(self, stop: asyncio.Event, leave: asyncio.Event | None, *, once: bool) -> bool:
        """Serve while the role is held; return whether that was the end, and not the role's loss."""
        try:
            async with self._hire() as crew:
                self.serving.set()
                return await self._served(crew, stop, leave or asyncio.Event(), once=once)
        except BaseExceptionGroup as group:
            raise first_of(group) from group

    async def _served(self, crew: Crew, stop: asyncio.Event, leave: asyncio.Event, *, once: bool) -> bool:
        enough, away = asyncio.Event(), asyncio.Event()
        stuck: RunComfyError | None = None
        async with asyncio.TaskGroup() as group:
            held = group.create_task(self.role.keep(), name="serve-role")
            loops = [group.create_task(loop(), name="serve-loop") for loop in crew.loops]
            plans = group.create_task(crew.fleet.run(), name="serve-fleet")
            work = group.create_task(crew.executor.run(enough, away), name="serve-executor")
            told = group.create_task(_passed_on(stop, enough), name="serve-stop")
            hurried = group.create_task(_passed_on(leave, away), name="serve-leave")
            done = group.create_task(self._worked_off(crew), name="serve-once") if once else None
            if crew.monitor is not None and not once:
                loops.append(group.create_task(crew.monitor.run(enough), name="serve-monitor"))
            ends: set[asyncio.Task[Any]] = {held, work, told, hurried, plans, *loops, *([done] if done else [])}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            plans.cancel()  # nothing is launched any more
            if held.done():
                away.set()  # what runs is somebody else's by now
            enough.set()
            await asyncio.wait({work, held}, return_when=asyncio.FIRST_COMPLETED)
            if held.done():
                away.set()
            await asyncio.wait({work})
            if done is not None and done.done():
                stuck = done.result()
            ends.discard(held)
            for task in ends:
                task.cancel()
            # A launch that is being broken off takes a while; without the role machines would be left, not ended.
            await asyncio.wait(ends)
            lost = held.done()
            held.cancel()
        await crew.fleet.end()
        self._failed += crew.executor.failed
        if stuck is None and once and not lost and not stop.is_set():
            stuck = failed_here(self._failed)
        elif stuck is not None and (failed := failed_here(self._failed)) is not None:
            self._tell(failed.message)
        if stuck is not None:
            raise stuck
        return not lost or stop.is_set()

    async def _worked_off(self, crew: Crew) -> RunComfyError | None:
        """Return when nothing is left to be done, or nothing can be; in that case why.

        Jobs that wait for a time are waited for, and so are pauses that end by themselves.
        """
        if crew.monitor is not None:
            await crew.monitor.once()
        while True:
            with suppress(LocalError):
                ready, counts = await crew.fleet.left(), await self._jobs.counts()
                if not counts[QueueStatus.PROCESSING]:
                    waiting = counts[QueueStatus.PENDING]
                    if not waiting:
                        return None
                    pause = await crew.executor.paused()
                    # A budget's pause may last a month; the plan, too, does not wait for a budget (`stuck`).
                    if pause is not None and (pause.until is None or pause.reason == BudgetExceeded.code):
                        return await left_behind(self._jobs, pause)
                    if ready >= waiting and (stuck := crew.fleet.stuck()) is not None:
                        self._tell(f"{left_words(waiting)}: {stuck.message}")
                        return stuck
            await asyncio.sleep(DONE_LOOK)


async def serve_queue(
    executor: Works,
    monitor: Watches | None,
    jobs: JobStore,
    stop: asyncio.Event,
    leave: asyncio.Event | None,
    *,
    once: bool,
    tell: Callable[[str], None],
) -> None:
    """Work off the queue without a pool, until `stop`, then drain, or until `leave` is set.

    `once`: until everything is worked off. Raises what keeps it from working; with `once` also why jobs are left over,
    or else that jobs failed.
    """
    if once:
        if monitor is not None:
            await monitor.once()
        await executor.run(stop, leave, once=True)
        if stop.is_set():
            return
        left, failed = await left_behind(jobs, await executor.paused()), failed_here(executor.failed)
        if left is not None and failed is not None:
            tell(failed.message)
        if (error := left or failed) is not None:
            raise error
        return
    try:
        async with asyncio.TaskGroup() as group:
            if monitor is not None:
                group.create_task(monitor.run(stop), name="serve-monitor")
            group.create_task(executor.run(stop, leave), name="serve-executor")
    except BaseExceptionGroup as group_of_errors:
        raise first_of(group_of_errors) from group_of_errors


async def _passed_on(first: asyncio.Event, then: asyncio.Event) -> None:
    await first.wait()
    then.set()


def first_of(group: BaseExceptionGroup) -> BaseException:
    """Return the first error of a group that is none itself; one of ours before any other."""
    leaves: list[BaseException] = []

    def walk(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                walk(each)
        else:
            leaves.append(error)

    walk(group)
    return next((leaf for leaf in leaves if isinstance(leaf, RunComfyError)), leaves[0])
