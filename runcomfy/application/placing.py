"""
Where a job runs: a server that already runs, the warm dev server, or a machine of its own.

All three are one shape, a `Place`, entered and left the same way, so that the cold path and the warm path are the same
code. Leaving a machine of one's own ends it, whatever happened.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Final, Protocol

from runcomfy.application.dev_server import DevServer
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.health import check_comfyui
from runcomfy.application.job_queue import workflow_id_of
from runcomfy.application.machines import Machines
from runcomfy.application.own_machine import ComfyFactory, OwnMachine, Show, TimeStep, explained, share_of, total_of
from runcomfy.application.reaper import Reaper
from runcomfy.application.seat import Seat
from runcomfy.application.work_book import JobFacts, WorkBook
from runcomfy.domain.earlier import earlier_bill
from runcomfy.domain.exceptions import BudgetExceeded, LeaseLost, LocalError, RunComfyError
from runcomfy.domain.job import BillLine, JobId, JobRequest
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import Machine, MachineReport
from runcomfy.domain.money import seconds_between, total
from runcomfy.domain.place_key import machine_key, server_key
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.work import Work
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.placing")

__all__ = [
    "DEV_SERVER",
    "OWN_MACHINE",
    "POOL_MACHINE",
    "ComfyFactory",
    "JobFacts",
    "Place",
    "PlaceFactory",
    "Placer",
    "Show",
    "TellBill",
    "TimeStep",
    "owed",
]

OWN_MACHINE: Final = "own machine"
DEV_SERVER: Final = "dev server"
POOL_MACHINE: Final = "pool machine"
DEV_SERVER_SHOWN: Final = "the dev server"

TellBill = Callable[[tuple[BillLine, ...]], None]
"""Called with what a machine of one's own cost when it was ended, also if the job never got to it."""


@dataclass(slots=True)
class Place:
    """A ComfyUI to run on, and what it costs to be there. `bill` is filled when the place is left."""

    server: ComfyUI
    kind: str
    """`server`, `dev server`, `own machine` or `pool machine`."""
    alone: bool
    """Whether nobody else uses the server, so that an interrupt without an id can hit nobody else."""
    key: str = ""
    """Names the server across processes and hosts, without being able to reach it: `machine:<our id>`, or
    `server:<host and port>`, with this computer's name where the address is loopback. See `server_key`."""
    machine: Machine | None = None
    bill: tuple[BillLine, ...] = ()
    since: datetime | None = None
    """From when this job pays for the machine."""
    share: Callable[[datetime], tuple[BillLine, ...]] | None = None
    """What this job has to pay until then, of a machine that several share."""
    seat: Seat = field(default_factory=Seat)
    """Is told when the server computes the job's prompt."""
    outcome: str = ""
    """How the job leaves, in the queue's words, where that is known better than from the error it leaves with."""
    outlives: bool = True
    """Whether the server goes on existing when this process ends."""
    attempt: int = 0
    """The token of the queue's claim, where the books hear of the job; 0 without the queue."""

    @property
    def cost_usd(self) -> Decimal:
        """What being there cost, once it is known."""
        return total_of(self.bill)


class PlaceFactory(Protocol):
    """Whatever gives a job its place: a `Placer` for one request, or an executor's `Station`."""

    def __call__(
        self,
        *,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill,
        prefer: str | None = None,
        facts: JobFacts | None = None,
    ) -> AbstractAsyncContextManager[Place]:
        """Be at the place for the block: the one of the key `prefer`, where an earlier prompt is, if that can be.

        `facts` say whose job it is; without them somebody only looks in, and the books do not hear of it.
        """
        ...


def owed(place: Place, *, now: datetime) -> tuple[BillLine, ...]:
    """Return what being there has cost this job until now, before the bill is made when the place is left."""
    if place.share is not None and not place.bill:
        return place.share(now)
    if place.bill or place.machine is None or place.since is None:
        return place.bill
    return (share_of(place.machine, place.since, now, where=f"the {place.kind}"),)


class Placer:
    """Finds or rents the place for a job."""

    def __init__(
        self,
        comfyui: ComfyFactory,
        given_server: Callable[[str], ComfyUI],
        cloud: Callable[[], Awaitable[tuple[Machines, DevServer]]],
        *,
        tell: Callable[[str], None],
        host: str | None = None,
    ) -> None:
        """`host` names this computer where an address is the same on every one; None: as it calls itself."""
        self._host = platform.node() if host is None else host
        self.comfyui = comfyui
        self.cloud = cloud
        self.tell = tell
        self._given_server = given_server
        self._book: WorkBook | None = None

    def at_request(self, request: JobRequest) -> PlaceFactory:
        """Return what finds or rents the place that a request asks for."""
        return partial(
            self.at,
            server_url=request.server_url,
            server_type=request.server_type,
            facts=JobFacts(workflow_id_of(request), user=request.user, project=request.project),
        )

    @asynccontextmanager
    async def at(
        self,
        *,
        server_url: str | None,
        server_type: str | None,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill = lambda _: None,
        prefer: str | None = None,
        facts: JobFacts | None = None,
    ) -> AsyncIterator[Place]:
        """Be at the place for the block. A machine of one's own is gone, by the provider's word, when it is left.

        A single run has no earlier prompt that `prefer` could name. `facts` say whose budgets a machine of its own
        counts against.
        """
        if server_url is not None:
            async with self._at_server(server_url, step) as place:
                yield place
            return
        machines, dev = await self.cloud()
        warm = None
        if machines.settings.app.machine_reuse:
            step("place")
            warm = await self.warm(machines, dev, job_id)
        if warm is not None:
            show(Progress(Step.PLACING, message=f"using the dev server {warm[0].server_id} ({warm[0].server_type})"))
            async with self.at_dev_server(machines, dev, warm, job_id, facts) as place:
                yield place
        else:
            wanted = server_type or machines.settings.cloud.server_type
            own = OwnMachine(machines, self.comfyui)
            payer = facts or JobFacts()
            own.intend(wanted, reason=f"job {job_id}", for_user=payer.user, for_project=payer.project)
            async with self._at_own_machine(machines, own, job_id, show, step, on_bill, facts) as place:
                yield place

    def book(self, machines: Machines) -> WorkBook:
        """Return what writes down who was on a machine."""
        if self._book is None:
            self._book = WorkBook(machines.store, machines.clock)
        return self._book

    async def earlier(self, place: Place, job_id: JobId) -> tuple[BillLine, ...]:
        """Return what the job's attempts before the one at `place` have cost, by the machines' books.

        What cannot be read is logged, and not in the job's figure then; the ledger has it all the same.
        """
        if place.attempt <= 1:
            return ()
        try:
            machines, _ = await self.cloud()
            return await _earlier(machines, place, job_id)
        except RunComfyError as error:
            log.warning("earlier_cost_not_read", extra={"fields": {"job": job_id, "error": error.code}})
            return ()

    def key_of(self, url: str) -> str:
        """Return the key of a server that was named by its address."""
        return server_key(url, self._host)

    async def ask_server(self, url: str) -> None:
        """Make sure that a named server answers now. Raises ServerUnreachable, NotComfyUI, ServerTooOld."""
        await self._given_server(url).probe(fresh=True)

    @asynccontextmanager
    async def _at_server(self, url: str, step: TimeStep) -> AsyncIterator[Place]:
        step("check")
        server = self._given_server(url)  # kept warm by its giver, for the next job
        await server.probe()
        yield Place(server, "server", alone=False, key=self.key_of(url))

    # -- the dev server ------------------------------------------------------------------------------------

    async def warm(
        self, machines: Machines, dev: DevServer, job_id: JobId
    ) -> tuple[Machine, MachineReport, ComfyUI] | None:
        """Return the dev server, marked as used by this job, if it is alive in every layer."""
        found = await dev.find()
        if found is None or found[1].url is None:
            return None
        machine, report = found
        server = self.comfyui(found[1].url)
        try:
            _, error = await check_comfyui(server)
            if error is None:
                await machines.store.begin_use(Use(machine.id, machines.books.owner.id, job_id, machines.clock.now()))
                faultpoint("use.begun")
                return machine, report, server
            why = error.message
        except LeaseLost:
            why = "it is being stopped"
        except BaseException:
            # A use may have been written all the same; one that nobody ends would keep the machine.
            await finish(self._end_use(machines, machine, job_id))
            await finish(server.close())
            raise
        await server.close()
        self.tell(f"the dev server {machine.server_id} is not used: {why}")
        return None

    @asynccontextmanager
    async def at_dev_server(
        self,
        machines: Machines,
        dev: DevServer,
        warm: tuple[Machine, MachineReport, ComfyUI],
        job_id: JobId,
        facts: JobFacts | None = None,
    ) -> AsyncIterator[Place]:
        """Be at the dev server, which `warm` has marked as used by this job, for the block."""
        machine, report, server = warm
        started = machines.clock.now()
        place = Place(server, DEV_SERVER, alone=False, key=machine_key(machine.id), machine=machine, since=started)
        if report.stopping_at is not None and report.stopping_at - started < timedelta(minutes=5):
            left = max(0.0, (report.stopping_at - started).total_seconds())
            self.tell(f"the dev server stops in {left:.0f} s; `comfyctl dev extend` lets it run longer")
        try:
            async with self.book(machines).present(place, job_id, facts):
                yield place
        except RunComfyError as error:
            raise await explained(error, machines, machine) from error
        finally:
            ended = machines.clock.now()
            place.bill = (share_of(machine, started, ended, where=DEV_SERVER_SHOWN),)
            await finish(self._leave_dev_server(machines, dev, place, report, job_id))

    async def _leave_dev_server(
        self, machines: Machines, dev: DevServer, place: Place, report: MachineReport, job_id: JobId
    ) -> None:
        machine = place.machine
        await place.server.close()
        await place.seat.settled()
        if machine is None:
            return
        await self._end_use(machines, machine, job_id)
        if machines.settings.app.auto_shutdown:
            if await self._others_use(machines, machine):
                self.tell("the dev server is not stopped although CONJURE_AUTO_SHUTDOWN is on: another job uses it")
                return
            self.tell("stopping the dev server (CONJURE_AUTO_SHUTDOWN is on)")
            await dev.shutdown(reason="job done and CONJURE_AUTO_SHUTDOWN is on")
        else:
            with suppress(LocalError):
                latest = await machines.store.machine(machine.id)
                await dev.publish(latest or machine, report, health="healthy")

    async def _end_use(self, machines: Machines, machine: Machine, job_id: JobId) -> None:
        try:
            await machines.store.end_use(machine.id, job_id, at=machines.clock.now())
            faultpoint("use.ended")
        except LocalError as error:
            self.tell(f"could not write down that the job has left the dev server: {error.message}")

    @staticmethod
    async def _others_use(machines: Machines, machine: Machine) -> bool:
        try:
            return bool(await machines.living_uses(machine))
        except LocalError:
            return True

    # -- a machine of its own ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _at_own_machine(
        self,
        machines: Machines,
        own: OwnMachine,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill,
        facts: JobFacts | None,
    ) -> AsyncIterator[Place]:
        step("place")
        await Reaper(machines).reap(wait=False)
        place: Place | None = None
        refused = False
        try:
            server = await own.launch(show=show, step=step)
            place = Place(server, OWN_MACHINE, alone=True, machine=own.machine)
            if own.machine is not None:
                place.key, place.since = machine_key(own.machine.id), own.machine.ready_at
            async with own.while_there(), self.book(machines).present(place, job_id, facts):
                yield place
        except RunComfyError as error:
            refused = isinstance(error, BudgetExceeded) and own.machine is None  # there is nothing to stop
            raise await explained(error, machines, own.machine) from error
        finally:
            try:
                step("stop")
                if not refused:
                    show(Progress(Step.STOPPING, message="stopping the machine"))
            finally:  # not even a terminal that is gone keeps the machine from being ended
                await finish(self._end_own(machines, own, job_id, place, on_bill))

    @staticmethod
    async def _end_own(
        machines: Machines, own: OwnMachine, job_id: JobId, place: Place | None, on_bill: TellBill
    ) -> None:
        """End what was rented for this job, and tell its bill: a machine that never worked has one too."""
        try:
            await own.end(reason=f"job {job_id} is over")
        finally:
            try:
                bill = await _bill(machines, own.machine)
                if place is not None:
                    place.machine, place.bill = own.machine, bill
                    await place.seat.settled()
                on_bill(bill)
            finally:
                await own.close()


async def _earlier(machines: Machines, place: Place, job_id: JobId) -> tuple[BillLine, ...]:
    store, now, attempt = machines.store, machines.clock.now(), place.attempt
    own = await store.works(job_ids=[job_id])
    places = {work.machine_id for work in own if work.attempt < attempt}
    if not places:
        return ()
    there = await store.works(machine_ids=places)
    unended = {work.job_id for work in there if work.ended_at is None} | {job_id}
    works = {*there, *await store.works(job_ids=unended)}
    if place.machine is not None and all(work.attempt < attempt for work in own):  # its own row is still on its way
        works.add(Work(place.machine.id, job_id, attempt, "", place.machine.server_type, began_at=now))
    rows = [await store.machine(machine_id) for machine_id in places]
    known = {row.id: row for row in rows if row is not None}
    return earlier_bill(job_id, attempt, works, known, now=now)


async def _bill(machines: Machines, machine: Machine | None) -> tuple[BillLine, ...]:
    """Return the ledger's lines of a machine; where the ledger cannot be read, what the machine's own times say."""
    if machine is None or machine.ready_at is None:
        return ()
    try:
        entries = await machines.store.ledger(machine_id=machine.id)
    except LocalError:
        entries = []
    if entries and total(entries) > 0:
        return tuple(
            BillLine(
                what=f"{machine.server_type} ({entry.note})",
                seconds=seconds_between(entry.started_at, entry.ended_at),
                usd_per_hour=entry.usd_per_hour,
                amount_usd=entry.amount_usd,
            )
            for entry in entries
        )
    end = machine.stop_accepted_at or machine.gone_at or machines.clock.now()
    return (replace(share_of(machine, machine.ready_at, end, where=""), what=machine.server_type),)
