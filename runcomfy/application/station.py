"""
Where the jobs of one executor run, held from job to job.

A station stays when a job leaves: a plain ComfyUI that somebody else keeps, the dev server while it lives, or a machine
of the executor's own. That one is rented when the first job needs it, paid ahead lease by lease, shared by every job
that runs at the same time, and ended when it had nothing to do for a while. If the executor dies, the machine stops by
itself within its lease; an executor that comes before takes it over, because a prompt may still run there.

`places` says what can be gone to now. It is asked with every claim, so it reads what was found out last; the books are
looked at again in the background.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from runcomfy.application.by_hand import ASKED_EVERY, ByHand
from runcomfy.application.dev_server import DEV_PURPOSES
from runcomfy.application.dispatch import Choice
from runcomfy.application.finish import finish
from runcomfy.application.health import wait_until_usable
from runcomfy.application.machines import Machines
from runcomfy.application.own_machine import OwnMachine, explained, share_of
from runcomfy.application.placing import OWN_MACHINE, JobFacts, Place, Placer, Show, TellBill, TimeStep
from runcomfy.application.reaper import Reaper
from runcomfy.domain.exceptions import (
    GpuOutOfMemory,
    MachineFailed,
    MachineLost,
    NotComfyUI,
    RunComfyError,
    ServerUnreachable,
    WorkerDead,
)
from runcomfy.domain.job import BillLine, JobId
from runcomfy.domain.machine import Machine, MachineState, Purpose
from runcomfy.domain.place_key import machine_key
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import QueuedJob
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.station")

KEPT: Final = "executor: "
"""Beginning of the reason for which an executor's machine was launched; another executor may take it over."""
SURVEY_EVERY: Final = 10.0
"""Seconds for which what the books say of other machines is believed."""
IDLE_CLOCK: Final = "idle clock"
GPU_FAILURES: Final = 2
"""Failures of the GPU in a row after which a machine is not used again: its driver may be lost."""


class Station(Protocol):
    """What an executor works at. Its methods may be called by several jobs at once."""

    def places(self) -> Collection[str]:
        """Return the keys of the places that jobs can go on at here, now. Never waits."""
        ...

    def at(
        self,
        *,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill,
        prefer: str | None = None,
        facts: JobFacts | None = None,
    ) -> AbstractAsyncContextManager[Place]:
        """Be at a place for the block: at the one of the key `prefer`, if it is one of `places`.

        Raises what keeps it from being gone to: ConfigurationError, ProviderError, BootTimeout, BudgetExceeded.
        """
        ...

    def room(self) -> int | None:
        """Return how many more jobs could be begun; None: as many as the executor's slots allow."""
        ...

    def choose(self, waiting: Sequence[QueuedJob]) -> Sequence[Choice]:
        """Return which of these to begin, and where. Only a station with seats of its own has a choice to make."""
        ...

    async def ready(self) -> None:
        """Make sure that jobs could run here, as far as can be known without renting.

        Raises ConfigurationError, ProviderError, BudgetExceeded, LocalError.
        """
        ...

    async def idle(self) -> None:
        """Be told that there is nothing to do: what has had nothing to do for long enough is ended."""
        ...

    async def close(self) -> None:
        """End what was rented. Harmless when repeated."""
        ...


class GivenStation:
    """A ComfyUI that already runs, at an address that the user has named."""

    def __init__(self, placer: Placer, url: str) -> None:
        self._placer = placer
        self._url = url
        self.key: Final = placer.key_of(url)

    def places(self) -> Collection[str]:
        """Return the server's key."""
        return (self.key,)

    def at(
        self,
        *,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill,
        prefer: str | None = None,
        facts: JobFacts | None = None,
    ) -> AbstractAsyncContextManager[Place]:
        """Be at the server for the block."""
        return self._placer.at(
            server_url=self._url,
            server_type=None,
            job_id=job_id,
            show=show,
            step=step,
            on_bill=on_bill,
            prefer=prefer,
            facts=facts,
        )

    def room(self) -> None:
        """The executor's slots count."""

    def choose(self, waiting: Sequence[QueuedJob]) -> Sequence[Choice]:
        """There is one place: whatever is claimed goes there."""
        return ()

    async def ready(self) -> None:
        """See the protocol."""
        await self._placer.ask_server(self._url)

    async def idle(self) -> None:
        """Nothing was rented."""

    async def close(self) -> None:
        """The client belongs to who gave it."""


@dataclass(eq=False, slots=True)
class _Use:
    """One job's time on a machine that several share."""

    seconds: float = 0.0


@dataclass(eq=False, slots=True)
class _Kept:
    """A machine that is kept from job to job."""

    own: OwnMachine
    server: ComfyUI
    machine: Machine
    uses: list[_Use] = field(default_factory=list)
    counted_at: float = 0.0
    """By the loop's time: until when the shares of its uses are counted."""
    unused_since: float = 0.0
    retired: str = ""
    """Why no further job goes there; empty while any may."""
    gpu_failures: int = 0
    clocked: bool = False
    """Whether somebody looks how long it has not been used."""
    ending: asyncio.Task[None] | None = None
    by_hand: ByHand = field(default_factory=ByHand)

    @property
    def key(self) -> str:
        """Return the key of the place."""
        return machine_key(self.machine.id)

    def begin(self, use: _Use) -> None:
        """Count a job in."""
        self.count()
        self.uses.append(use)

    def end(self, use: _Use) -> None:
        """Count a job out."""
        self.count()
        self.uses.remove(use)
        self.unused_since = self.counted_at

    def count(self) -> None:
        """Divide the time that has passed among the jobs that were there."""
        now = asyncio.get_running_loop().time()
        for use in self.uses:
            use.seconds += (now - self.counted_at) / len(self.uses)
        self.counted_at = now

    def bill_of(self, use: _Use, now: datetime) -> tuple[BillLine, ...]:
        """Return what a job has to pay until now."""
        self.count()
        until = now + timedelta(seconds=use.seconds)
        return (share_of(self.machine, now, until, where="the executor's machine"),)


class CloudStation:
    """The dev server while it lives, else a machine of the executor's own."""

    def __init__(self, placer: Placer, *, server_type: str | None, idle_after: timedelta) -> None:
        """Nothing is asked or rented yet. `server_type` None: the one of the settings."""
        self._placer = placer
        self._server_type = server_type
        self._idle_after = idle_after.total_seconds()
        self._kept: dict[str, _Kept] = {}
        self._others: dict[str, Machine] = {}
        """By key: dev servers, and machines of executors that are gone."""
        self._surveyed_at = float("-inf")
        self._surveying: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[_Kept] | None = None
        self._audience: list[tuple[Show, TimeStep]] = []
        """Jobs that wait for the machine that is being started."""
        self._adopting: dict[str, asyncio.Task[_Kept | None]] = {}
        self._background: set[asyncio.Task[None]] = set()

    # -- what there is -------------------------------------------------------------------------------------

    def places(self) -> Collection[str]:
        """See the protocol. What the books say is looked up in the background, for the next time."""
        stale = asyncio.get_running_loop().time() - self._surveyed_at > SURVEY_EVERY
        if stale and (self._surveying is None or self._surveying.done()):
            self._surveying = asyncio.create_task(self._survey_softly(), name="survey")
        return {*(kept.key for kept in self._kept.values() if not kept.retired), *self._others}

    async def _survey_softly(self) -> None:
        try:
            await self._survey()
        except RunComfyError as error:
            self._surveyed_at = asyncio.get_running_loop().time()
            log.warning("survey_failed", extra={"fields": {"error": error.code}})

    async def _survey(self) -> None:
        """Look into the books for machines that could be gone to. Asks no provider."""
        machines, _ = await self._placer.cloud()
        rows = [
            r for r in await machines.books.rows() if r.server_id is not None and machine_key(r.id) not in self._kept
        ]
        owners = await machines.store.owners([row.owner_id for row in rows if row.owner_id is not None])
        now = machines.clock.now()

        def usable(row: Machine) -> bool:
            if row.purpose in DEV_PURPOSES:
                return machines.settings.app.machine_reuse and row.state is MachineState.READY
            owner = owners.get(row.owner_id) if row.owner_id is not None else None
            abandoned = owner is None or not machines.processes.lives(owner, now=now)
            return abandoned and _is_executors(row) and row.state in (MachineState.BOOTING, MachineState.READY)

        self._others = {machine_key(row.id): row for row in rows if usable(row)}
        self._surveyed_at = asyncio.get_running_loop().time()

    def room(self) -> None:
        """The executor's slots count: its machine is rented when the first job comes."""

    def choose(self, waiting: Sequence[QueuedJob]) -> Sequence[Choice]:
        """Whatever is claimed finds its machine by itself."""
        return ()

    async def ready(self) -> None:
        """See the protocol."""
        machines, _ = await self._placer.cloud()
        machines.books.price(self._server_type or machines.settings.cloud.server_type)
        await machines.provider.list_machines()
        await self._survey()

    # -- being there ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def at(
        self,
        *,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill,
        prefer: str | None = None,
        facts: JobFacts | None = None,
    ) -> AsyncIterator[Place]:
        """See the protocol."""
        step("place")
        machines, dev = await self._placer.cloud()
        taken = await self._wanted(machines, prefer) if prefer is not None else None
        if taken is None and machines.settings.app.machine_reuse:
            warm = await self._placer.warm(machines, dev, job_id)
            if warm is not None:
                show(Progress(Step.PLACING, message=f"using the dev server {warm[0].server_id}"))
                async with self._placer.at_dev_server(machines, dev, warm, job_id, facts) as place:
                    yield place
                return
            await self._not_silent(machines, prefer)
        kept, use = taken or await self._any(machines, show, step)
        async with self._at_kept(machines, kept, use, on_bill) as place:
            try:
                async with self._placer.book(machines).present(place, job_id, facts):
                    yield place
            finally:
                await finish(place.seat.settled())

    async def _wanted(self, machines: Machines, key: str) -> tuple[_Kept, _Use] | None:
        """Return the machine of that key, if it is kept here or nobody's; it answers."""
        kept = self._kept.get(key)
        if kept is None:
            await self._survey()
            row = self._others.get(key)
            if row is not None and row.purpose not in DEV_PURPOSES:
                kept = await self._adopt(machines, row)
        use = _Use()
        return (kept, use) if kept is not None and await self._taken(machines, kept, use) else None

    async def _not_silent(self, machines: Machines, key: str | None) -> None:
        """Make sure that the dev server of that key, which cannot be used, is gone: a prompt may go on there.

        Raises ServerUnreachable.
        """
        row = self._others.get(key) if key is not None else None
        if row is None or row.purpose not in DEV_PURPOSES:
            return
        silent = ServerUnreachable(
            f"the dev server {row.server_id}, where the prompt of an earlier attempt is, does not answer",
            hint="look at `comfyctl dev status`; when it is stopped the job runs elsewhere",
        )
        if not isinstance(await explained(silent, machines, row), MachineLost):
            raise silent

    async def _any(self, machines: Machines, show: Show, step: TimeStep) -> tuple[_Kept, _Use]:
        """Return a machine that is kept here, the least busy one, or one that is started now; it answers."""
        use = _Use()
        while True:
            usable = [kept for kept in self._kept.values() if not kept.retired]
            kept = min(usable, key=lambda kept: len(kept.uses), default=None) or await self._started(show, step)
            if await self._taken(machines, kept, use):
                return kept, use

    async def _taken(self, machines: Machines, kept: _Kept, use: _Use) -> bool:
        """Begin a use of a machine; False if it turns out to be gone, or out of order for good."""
        if kept.retired:
            return False
        kept.begin(use)  # first: what is in use is not ended for being idle
        try:
            await self._answers(machines, kept)
        except (MachineLost, MachineFailed) as error:
            self._retire(kept, error)
            self._leave(kept, use)
            return False
        except BaseException:
            self._leave(kept, use)
            raise
        return True

    async def _answers(self, machines: Machines, kept: _Kept) -> None:
        """Make sure that a machine's ComfyUI is there; what was known a moment ago is believed."""
        try:
            await kept.server.probe()
        except (ServerUnreachable, NotComfyUI) as error:
            known = await explained(error, machines, kept.machine)
            if isinstance(known, MachineLost):
                raise known from error
            await wait_until_usable(kept.server, within=machines.settings.comfy.unreachable_timeout)

    @asynccontextmanager
    async def _at_kept(self, machines: Machines, kept: _Kept, use: _Use, on_bill: TellBill) -> AsyncIterator[Place]:
        clock = machines.clock
        place = Place(kept.server, OWN_MACHINE, alone=False, key=kept.key, machine=kept.machine)
        place.share = lambda now: kept.bill_of(use, now)
        try:
            async with kept.own.while_there():
                yield place
            kept.gpu_failures = 0
        except RunComfyError as error:
            known = await explained(error, machines, kept.machine)
            self._judge(kept, known)
            if known is error:
                raise
            raise known from error
        finally:
            place.bill, place.share = kept.bill_of(use, clock.now()), None
            self._leave(kept, use)
            on_bill(place.bill)

    def _judge(self, kept: _Kept, error: RunComfyError) -> None:
        """Decide whether a machine can be used again after what went wrong on it."""
        if isinstance(error, GpuOutOfMemory):
            kept.gpu_failures += 1
        broken = isinstance(error, (MachineLost, MachineFailed, WorkerDead)) or kept.gpu_failures >= GPU_FAILURES
        if broken:
            self._retire(kept, error)

    def _retire(self, kept: _Kept, error: RunComfyError) -> None:
        if not kept.retired:
            kept.retired = error.message
            fields = {"machine": kept.machine.id, "server_id": kept.machine.server_id, "error": error.code}
            log.warning("machine_retired", extra={"fields": fields})

    def _leave(self, kept: _Kept, use: _Use) -> None:
        kept.end(use)
        if not kept.uses and (kept.retired or not kept.clocked):
            self._spawn(self._end_unused(kept), name=IDLE_CLOCK)

    async def _end_unused(self, kept: _Kept) -> None:
        """End a machine when nobody has used it for long enough, or at once if nobody can; one clock per machine."""
        kept.clocked = True
        try:
            while not kept.uses:
                left = kept.unused_since + self._idle_after - asyncio.get_running_loop().time()
                if kept.retired or left <= 0:
                    if await self._ended_unless_used(kept):
                        return
                    left = ASKED_EVERY.total_seconds()
                await asyncio.sleep(left)
        finally:
            kept.clocked = False

    # -- starting ------------------------------------------------------------------------------------------

    async def _started(self, show: Show, step: TimeStep) -> _Kept:
        """Return the machine that is being started, for whoever waits; when nobody waits any more, its start ends."""
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(), name="start a machine")
        starting, waiter = self._starting, (show, step)
        self._audience.append(waiter)
        try:
            return await asyncio.shield(starting)
        finally:
            self._audience.remove(waiter)
            if not self._audience and not starting.done():
                self._starting = None
                self._spawn(_cancelled(starting))

    def _show(self, progress: Progress) -> None:
        for show, _ in list(self._audience):
            show(progress)

    def _step(self, name: str) -> None:
        for _, step in list(self._audience):
            step(name)

    async def _start(self) -> _Kept:
        """Take over what an executor that is gone has left, or rent a machine."""
        machines, _ = await self._placer.cloud()
        await self._survey()
        for row in [row for row in self._others.values() if row.purpose not in DEV_PURPOSES]:
            if (kept := await self._adopt(machines, row)) is not None:
                return kept
        own = OwnMachine(machines, self._placer.comfyui)
        wanted = self._server_type or machines.settings.cloud.server_type
        own.intend(wanted, reason=f"{KEPT}jobs of the queue")
        await Reaper(machines).reap(wait=False, spare=_is_executors)
        try:
            server = await own.launch(show=self._show, step=self._step)
        except BaseException:
            await finish(_given_up(own, "it never became usable"))
            raise
        return self._keep(own, server)

    async def _adopt(self, machines: Machines, row: Machine) -> _Kept | None:
        """Take over a machine that nobody has any more; None if somebody else was quicker, or it is of no use."""
        key = machine_key(row.id)
        if (kept := self._kept.get(key)) is not None:
            return kept
        task = self._adopting.get(key)
        if task is None:
            # A task of its own: prompts of several jobs may run there, and one of those may be cancelled.
            task = self._adopting[key] = asyncio.create_task(self._take_over(machines, row), name=f"adopt {row.id}")
            task.add_done_callback(lambda _: self._adopting.pop(key, None))
        return await asyncio.shield(task)

    async def _take_over(self, machines: Machines, row: Machine) -> _Kept | None:
        own = OwnMachine(machines, self._placer.comfyui)
        try:
            note = "taken over: the executor that rented it is gone"
            server = await own.take_over(row, note=note, show=self._show, step=self._step)
        except RunComfyError as error:
            self._placer.tell(f"machine {row.server_id} of an executor that is gone is not usable: {error.message}")
            await finish(_given_up(own, f"not usable: {error.code}"))
            return None
        except BaseException:
            await finish(_given_up(own, "its takeover was broken off"))
            raise
        finally:
            self._others.pop(machine_key(row.id), None)
        if server is None:
            return None
        self._placer.tell(f"went on with machine {row.server_id}, which an executor that is gone had rented")
        return self._keep(own, server)

    def _keep(self, own: OwnMachine, server: ComfyUI) -> _Kept:
        if own.machine is None:
            raise RunComfyError("a machine answers that nobody has launched")
        now = asyncio.get_running_loop().time()
        kept = _Kept(own, server, own.machine, counted_at=now, unused_since=now)
        self._kept[kept.key] = kept
        self._spawn(self._end_unused(kept), name=IDLE_CLOCK)
        return kept

    # -- ending --------------------------------------------------------------------------------------------

    async def _end(self, kept: _Kept, reason: str) -> None:
        self._kept.pop(kept.key, None)
        kept.retired = kept.retired or reason
        if kept.ending is None:
            self._placer.tell(f"ending machine {kept.machine.server_id}: {reason}")
            kept.ending = asyncio.create_task(_given_up(kept.own, reason), name=f"end {kept.machine.id}")
        await finish(_of(kept.ending))

    async def _ended_unless_used(self, kept: _Kept) -> bool:
        """End a machine that has no job; False if somebody computes there by hand, or a job has begun meanwhile."""
        tell, name = self._placer.tell, kept.machine.server_id or kept.machine.id
        if not kept.retired and (await kept.by_hand.uses(kept.server, name, tell=tell) or kept.uses):
            return False
        await self._end(kept, kept.retired or "the executor had nothing to do")
        return True

    async def idle(self) -> None:
        """See the protocol."""
        now = asyncio.get_running_loop().time()
        for kept in list(self._kept.values()):
            if not kept.uses and now - kept.unused_since >= self._idle_after:
                await self._ended_unless_used(kept)

    async def close(self) -> None:
        """See the protocol. Raises StopUnconfirmed if a machine may still bill; every other one is ended first."""
        if self._starting is not None:
            self._spawn(_cancelled(self._starting))
            self._starting = None
        for task in self._adopting.values():
            self._spawn(_cancelled(task))
        if self._surveying is not None:
            self._spawn(_cancelled(self._surveying))
        ends = [self._end(kept, "the executor ends") for kept in list(self._kept.values())]
        outcomes = await asyncio.gather(*ends, return_exceptions=True)
        idle = [task for task in self._background if task.get_name() == IDLE_CLOCK]
        for task in idle:
            task.cancel()
        while self._background:
            await asyncio.wait(set(self._background))
        for kept in list(self._kept.values()):  # what was on its way up meanwhile
            await self._end(kept, "the executor ends")
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str = "station") -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, RunComfyError):
            self._placer.tell(f"{error.message}; {error.hint}")
        elif error is not None:
            log.error("station_defect", exc_info=error)


def _is_executors(row: Machine) -> bool:
    """Whether an executor rented the machine for its jobs."""
    return row.purpose is Purpose.RUN and row.reason.startswith(KEPT)


async def _given_up(own: OwnMachine, reason: str) -> None:
    """End a machine, and let go of its ComfyUI."""
    try:
        await own.end(reason=reason)
    finally:
        await own.close()


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # told by whoever waited for it


async def _of(task: asyncio.Task[None]) -> None:
    await asyncio.shield(task)
