"""
The worker of the queue: claims jobs by priority and age, runs them, and survives what may happen meanwhile.

    turn      nothing paused, a slot free: claim, one task per job (`job_run`); at a station with seats of its own it
              chooses the jobs (`dispatch`), and slots do not count
    watch     every second, and after every change: what is no longer held is cut (`claims`)
    report    progress, a batch every two seconds
    sweep     prompts of cancelled jobs whose worker is gone are ended at the places served here (`sweeper`)
    plan      one executor of the database takes back the jobs of dead workers (`planner`)
    drain     told to stop: claims no more, lets jobs run for a while, then cuts them with their prompts left running

A database that refuses writes stops nothing that runs: nothing is claimed and nothing launched until it works again
(I23). The heart beats in a thread of its own (`heartbeat`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, Protocol, Self

from runcomfy.application.claims import Claims
from runcomfy.application.dispatch import Choice, Chooser, Dispatch
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.gate import Gate
from runcomfy.application.heartbeat import LoopHeart, Pulse
from runcomfy.application.job_queue import EXECUTOR
from runcomfy.application.job_run import Bench, JobRun, RunsJobs, Why
from runcomfy.application.placing import PlaceFactory
from runcomfy.application.planner import Planner
from runcomfy.application.station import GivenStation
from runcomfy.application.sweeper import Sweeper
from runcomfy.application.working_off import SURE, limits_of, looks_done
from runcomfy.domain import retry
from runcomfy.domain.exceptions import (
    JobBusy,
    JobNotFound,
    LeaseLost,
    LocalError,
    RunComfyError,
    foreign_text,
)
from runcomfy.domain.lease import Owner
from runcomfy.domain.queued import (
    Barred,
    Pause,
    QueuedJob,
    WorkerId,
)
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobKey, JobStore
from runcomfy.ports.processes import Processes

log = logging.getLogger("runcomfy.queue")

REPORT_EVERY: Final = 2.0
TROUBLE_FIRST: Final = 0.5
TROUBLE_MOST: Final = 15.0
"""Seconds between two looks at a database that refuses."""
CUT_WITHIN: Final = timedelta(seconds=30)
"""How long runs that were cut may take to leave their places. Ending a rented machine has its own patience."""


class Workplace(Protocol):
    """Where an executor's jobs run: `Station`."""

    @property
    def at(self) -> PlaceFactory:
        """What gives a job its place."""
        ...

    def places(self) -> Collection[str]:
        """Return the keys of the places that jobs can go on at here."""
        ...

    def room(self) -> int | None:
        """Return how many more jobs could be begun here; None: as many as `slots` allows. See `dispatch.Chooser`."""
        ...

    def choose(self, waiting: Sequence[QueuedJob]) -> Sequence[Choice]:
        """Return which of these jobs to begin, and where. Asked only where `room` is a number."""
        ...

    async def ready(self) -> None:
        """Make sure that jobs could run here, as far as can be known without renting; raise what keeps them from it."""
        ...

    async def idle(self) -> None:
        """Be told that nothing runs: what is rented may be ended."""
        ...

    async def close(self) -> None:
        """End what was rented and let go of the rest."""
        ...


class Executor:
    """One worker process. `await run(stop)` works until told to stop; `run_job` does one job for another engine."""

    def __init__(
        self,
        store: JobStore,
        settings: QueueSettings,
        station: Workplace,
        orchestrator: RunsJobs,
        owner: Owner,
        *,
        clock: Clock,
        processes: Processes,
        heart: Pulse | None = None,
        draw: retry.Draw | None = None,
        barred: Callable[[], Barred] = Barred,
        after: Callable[[Sequence[QueuedJob]], Awaitable[None]] | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`store` is open and stays the caller's; `owner` is registered here. `heart` renews what `worker` holds.

        Without a `heart` one beats in the event loop. `draw(low, high)` draws the jitter of waits. `barred` says whose
        jobs are not begun now, `after` hears what the planner took back.
        """
        self.store, self.settings, self.station = store, settings, station
        self.owner = replace(owner, command=f"{owner.command} {EXECUTOR}".strip())
        self.worker = WorkerId(owner.id)
        self.tell = tell
        self._heart: Pulse = heart or LoopHeart(
            lambda: store.renew(self.worker, lease=settings.lease), every=settings.heartbeat, lease=settings.lease
        )
        self.planner = Planner(store, settings, self.owner, processes, tell=tell, trouble=self._troubled, after=after)
        self._runs: dict[tuple[int, int], tuple[JobRun, asyncio.Task[None]]] = {}
        self._limits, self._barred, self._failed = limits_of(settings), barred, 0
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._resting: asyncio.Task[None] | None = None
        self._broken: BaseException | None = None
        self._coming_and_going = asyncio.Lock()
        self._depth = 0
        """How many `async with` blocks are open."""
        self._leave = asyncio.Event()
        self._trouble: LocalError | None = None
        self._trouble_wait = TROUBLE_FIRST
        policy = retry.RetryPolicy(
            settings.retry_limit, settings.kill_limit, settings.backoff_first, settings.backoff_most
        )
        there = station.key if isinstance(station, GivenStation) else ""
        self._gate = Gate(store, self.owner, policy, station.ready, tell=tell, trouble=self._troubled, place=there)
        self._bench = self._set_up(orchestrator, policy, draw or random.uniform)
        self._claims = self._hold(clock)
        self._sweeper = Sweeper(
            store, station, busy=lambda: [run.row.id for run in self._running()], trouble=self._troubled
        )
        self._dispatch = self._chosen(station) if isinstance(station, Chooser) else None

    def _set_up(self, orchestrator: RunsJobs, policy: retry.RetryPolicy, draw: retry.Draw) -> Bench:
        """Return what every run works with."""
        return Bench(
            store=self.store,
            settings=self.settings,
            orchestrator=orchestrator,
            at=self.station.at,
            places=self.station.places,
            pulse=self._heart,
            policy=policy,
            draw=draw,
            gate=self._gate,
            reached=self._reached,
            trouble=self._troubled,
            leaving=self._leave.is_set,
            tell=self.tell,
        )

    def _hold(self, clock: Clock) -> Claims:
        """Return what claims jobs and sees that they are held."""
        return Claims(
            self.store,
            self.settings,
            self.worker,
            self._heart,
            clock=clock,
            places=self.station.places,
            limits=lambda: replace(self._limits, barred=self._barred()),
            runs=self._running,
            trouble=self._troubled,
            works=lambda: self._trouble is None,
            tell=self.tell,
        )

    def _chosen(self, station: Chooser) -> Dispatch:
        """Let the station choose the jobs."""
        station.on_change(self._wake.set)
        station.on_gone(self.planner.hurry)
        return Dispatch(
            self.store,
            self.settings,
            station,
            claim=self._claims.claim,
            begin=self._begin,
            runs=self._running,
            owes=self._claims.owe,
            barred=self._barred,
        )

    # -- life ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Register as a worker and begin to beat, watch and plan. May be nested; the last to leave ends it."""
        async with self._coming_and_going:
            if self._depth == 0:
                await self._begin_service()
            self._depth += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        await finish(self._leave_block())

    async def _leave_block(self) -> None:
        async with self._coming_and_going:
            self._depth -= 1
            if self._depth == 0:
                await self._end()

    async def _begin_service(self) -> None:
        self._leave.clear()
        try:
            await self.store.register_owner(self.owner)
            self._heart.start(self._claims.beaten)
            await self.planner.round()
        except BaseException:
            await finish(self._heart.stop())
            raise
        for name, loop in (
            ("watch", self._claims.watch()),
            ("report", self._report()),
            ("sweep", self._sweeper.run()),
            ("plan", self.planner.run()),
        ):
            self._tasks.append(self._start(name, loop))

    def _start(self, name: str, loop: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(loop, name=f"queue-{name}")
        task.add_done_callback(self._died)
        return task

    def _died(self, task: asyncio.Task[None]) -> None:
        """A loop of the service never ends by itself: its end is the service's."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._broken = self._broken or error
            self._wake.set()

    async def _end(self) -> None:
        async with AsyncExitStack() as last:  # each is done whatever becomes of those before it
            last.push_async_callback(self._sign_off)
            last.push_async_callback(self._heart.stop)
            last.push_async_callback(self.planner.stop)
            last.push_async_callback(self.station.close)
            last.push_async_callback(self._end_loops)
            await self._cut_all()
            if self._dispatch is not None:
                await self._dispatch.close()

    async def _end_loops(self) -> None:
        tasks = [*self._tasks, *([self._resting] if self._resting is not None else [])]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sign_off(self) -> None:
        if self._claims.owes:  # or nobody would see that the open claim's worker is gone
            return
        with suppress(LocalError):  # whoever looks later sees it all the same
            await self.store.sign_off(self.owner.id)

    async def run(self, stop: asyncio.Event, leave: asyncio.Event | None = None, *, once: bool = False) -> None:
        """Work until `stop` is set, then let running jobs go on for `settings.drain`, or until `leave` is set.

        `once`: work off what can be claimed, now or when its time comes, then return. Cancelling this is a `leave`.
        Raises LocalError if the database cannot be used at the start; later it only waits.
        """
        told = asyncio.create_task(stop.wait())
        obeys = asyncio.create_task(self._leave_with(leave)) if leave is not None else None
        try:
            async with self:
                try:
                    await self._work(stop, told, once=once)
                    if self._broken is None:
                        await self._drain()
                except asyncio.CancelledError:
                    self._leave.set()
                    raise
        finally:
            for task in (told, obeys):
                if task is not None:
                    task.cancel()
        if self._broken is not None:
            raise self._broken

    async def _leave_with(self, leave: asyncio.Event) -> None:
        await leave.wait()
        self._leave.set()

    async def run_job(self, key: JobKey) -> QueuedJob:
        """Claim one job, run it, and return it as it is then; for programs that have an engine of their own.

        Around many calls, `async with executor:` spares each of them the coming and going of a worker.
        A job that has ended is returned as it is. One that failed and is to be tried again is pending afterwards.
        Raises JobNotFound, and JobBusy if it cannot be claimed now.
        """
        async with self:
            row = await self.store.job(key)
            if row is None:
                raise JobNotFound(f"the queue has no job {foreign_text(key, 80)!r}")
            if row.ended:
                return row
            if (pause := await self._gate.standing()) is not None:
                raise JobBusy(f"the queue is paused: {pause.message}", hint="`comfyctl queue resume` ends the pause")
            claimed = await self._claims.claim(1, only=row.id)
            if not claimed:
                raise JobBusy(
                    f"job {row.config_name} cannot be claimed now: it is {row.status}",
                    hint="another worker has it, it waits for a retry, or a limit is reached",
                )
            if self._dispatch is not None and not self._dispatch.seat(claimed[0]):
                await self._dispatch.put_back(claimed[0])
                raise JobBusy(f"job {row.config_name} cannot be begun now: no machine of the pool has a seat free")
            run = self._begin(claimed[0])
            try:
                await asyncio.shield(self._runs[run.key][1])
            except asyncio.CancelledError:
                run.cut(Why.DRAIN)
                raise
            return await self.store.job(row.id) or row

    # -- claiming ------------------------------------------------------------------------------------------

    async def _work(self, stop: asyncio.Event, told: asyncio.Task[Any], *, once: bool) -> None:
        look: asyncio.Task[int] | None = None
        looks, mark, every = 0, 0, self.settings.poll_interval.total_seconds()
        try:
            while not stop.is_set() and self._broken is None:
                self._wake.clear()
                idle = not await self._turn() and not self._runs
                looks = await self._looks_done(looks) if once and idle else 0
                if looks >= SURE:
                    return
                if idle:
                    self._rest()
                if look is None:
                    look = asyncio.create_task(self.store.changed(timeout=self.settings.poll_interval, seen=mark))
                wake = asyncio.create_task(self._wake.wait())
                # What changes matters only to somebody with a slot free; a database that refuses may refuse this, too.
                full = self._dispatch is None and len(self._runs) >= self.settings.slots
                deaf = self._trouble is not None or full
                await asyncio.wait(
                    {wake, told} if deaf else {look, wake, told},
                    return_when=asyncio.FIRST_COMPLETED,
                    timeout=self._trouble_wait if self._trouble is not None else every,
                )
                wake.cancel()
                if look.done():
                    mark, look = self._seen(look, mark), None
                    self._claims.look()
        finally:
            if look is not None:
                look.cancel()
                await asyncio.wait({look})

    async def _looks_done(self, before: int) -> int:
        try:
            if self._trouble is None and not (self._dispatch is not None and self._dispatch.waiting):
                return await looks_done(self.store, self.station.places(), await self.paused(), before=before)
        except LocalError as error:
            self._troubled(error)
        return 0

    @property
    def failed(self) -> int:
        """How many jobs this executor has seen end as failed, or set aside, since it was made."""
        return self._failed + self.planner.set_aside

    async def paused(self) -> Pause | None:
        """Return what keeps jobs from being begun here. Raises LocalError."""
        return await self._gate.standing()

    def _rest(self) -> None:
        """Tell the station that there is nothing to do. What it ends takes a while, and a job may come meanwhile."""

        async def idle() -> None:
            try:
                await self.station.idle()
            except RunComfyError as error:
                log.warning("station_not_at_rest", extra={"fields": {"error": repr(error)}})

        if self._resting is None or self._resting.done():
            self._resting = self._start("idle", idle())

    def _seen(self, look: asyncio.Task[int], mark: int) -> int:
        try:
            return look.result()
        except LocalError as error:
            self._troubled(error)
            return mark

    async def _turn(self) -> int:
        """Claim what there is room for; return how many jobs were begun."""
        room = None if self._dispatch is not None else self.settings.slots - len(self._runs)
        if self._gate.on_trial:
            trial = 1 - len(self._runs)
            room = trial if room is None else min(room, trial)
        if room is not None and room <= 0:
            return 0
        try:
            if not await self._gate.opens():
                return 0
            begun = await (self._begin_some(room or 0) if self._dispatch is None else self._dispatch.turn(room))
        except LocalError as error:
            self._troubled(error)
            return 0
        if begun:  # nothing to claim proves nothing: no word was written
            self._troubled(None)
        elif self._trouble is not None:  # the heart finds out whether words can be written again
            self._trouble_wait = min(self._trouble_wait * 2, TROUBLE_MOST)
        return begun

    async def _begin_some(self, count: int) -> int:
        claimed = await self._claims.claim(count)
        for row in claimed:
            self._begin(row)
        return len(claimed)

    def _running(self) -> Collection[JobRun]:
        return [run for run, _ in self._runs.values()]

    def _begin(self, row: QueuedJob) -> JobRun:
        faultpoint("queue.claimed")
        run = JobRun(self._bench, row)
        task = asyncio.create_task(run.run(), name=f"run-{row.id}")
        self._runs[run.key] = run, task

        def over(task: asyncio.Task[None]) -> None:
            del self._runs[run.key]
            if isinstance(self.station, Chooser):
                self.station.release(row.uid, row.token)
            self._claims.owes = self._claims.owes or run.unwritten
            self._failed += run.failed
            self._wake.set()
            if not task.cancelled() and (error := task.exception()) is not None:
                self._broken, self._claims.owes = self._broken or error, True

        task.add_done_callback(over)
        return run

    def _reached(self) -> None:
        self._gate.reached()
        self._wake.set()

    # -- trouble -------------------------------------------------------------------------------------------

    def _troubled(self, error: LocalError | None) -> None:
        """Hear what the database refuses, or (None) that it works; say each once."""
        if error is None:
            if self._trouble is not None:
                self._trouble, self._trouble_wait = None, TROUBLE_FIRST
                self._wake.set()
                self.tell("the database works again")
            return
        if isinstance(error, LeaseLost):
            return
        log.warning("store_refused", extra={"fields": {"error": error.code, "message": error.message}})
        if self._trouble is None:
            hint = f" ({error.hint})" if error.hint else ""
            self.tell(f"{error.message}{hint}; nothing new is begun until it works again")
        else:
            self._trouble_wait = min(self._trouble_wait * 2, TROUBLE_MOST)
        self._trouble = error

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY)
            fresh = {run.row.id: run.progress for run, _ in self._runs.values() if run.progress and not run.ending}
            if not fresh:
                continue
            for run, _ in self._runs.values():
                run.progress = None
            with suppress(LocalError):  # the next report says it
                await self.store.report(self.worker, fresh)

    # -- the end -------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let jobs run on for a while, then cut what still runs."""
        if self._runs and not self._leave.is_set():
            patience = self.settings.drain.total_seconds()
            self.tell(f"{len(self._runs)} jobs run on for up to {patience:.0f} s; nothing new is begun")
            await self._runs_over(patience)

    async def _cut_all(self) -> None:
        """Cut what runs, and wait for it; what cannot be written down within a while is left to the next owner."""
        for run, _ in self._runs.values():
            run.cut(Why.DRAIN)
        if self._runs and not self._leave.is_set():
            await self._runs_over(CUT_WITHIN.total_seconds())
        self._leave.set()
        while self._runs:
            await asyncio.wait([task for _, task in self._runs.values()])

    async def _runs_over(self, patience: float) -> None:
        """Wait until no job runs any more, for so many seconds at most, and no longer than until `leave`."""
        over = asyncio.create_task(self._leave.wait())
        runs = asyncio.create_task(self._all_over())
        await asyncio.wait({over, runs}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for task in (over, runs):
            task.cancel()

    async def _all_over(self) -> None:
        while self._runs:
            await asyncio.wait([task for _, task in self._runs.values()])
