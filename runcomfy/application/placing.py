"""
Where a job runs: a server that already runs, the warm dev server, or a machine of its own.

All three are one shape, a `Place`, entered and left the same way, so that the cold path and the warm path are the same
code. Leaving a machine of one's own ends it, whatever happened.
"""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Protocol

from runcomfy.application.dev_server import DevServer
from runcomfy.application.finish import finish
from runcomfy.application.health import check_comfyui, wait_until_usable
from runcomfy.application.machines import Boot, Machines
from runcomfy.application.reaper import Reaper
from runcomfy.domain.exceptions import LeaseLost, LocalError, MachineLost, ProviderError, RunComfyError
from runcomfy.domain.job import BillLine, JobId, JobRequest
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import Machine, MachineReport, Phase, Purpose
from runcomfy.domain.money import meter, seconds_between, total
from runcomfy.domain.place_key import machine_key, server_key
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.placing")

EXPLAINED_WITHIN = timedelta(seconds=10)
"""How long the provider may take to say whether a machine that fell silent is still there."""

Show = Callable[[Progress], None]
TimeStep = Callable[[str], None]
"""Called with a step's name when the step begins; the orchestrator measures."""
TellBill = Callable[[tuple[BillLine, ...]], None]
"""Called with what a machine of one's own cost when it was ended, also if the job never got to it."""


@dataclass(slots=True)
class Place:
    """A ComfyUI to run on, and what it costs to be there. `bill` is filled when the place is left."""

    server: ComfyUI
    kind: str
    """`server`, `dev server` or `own machine`."""
    alone: bool
    """Whether nobody else uses the server, so that an interrupt without an id can hit nobody else."""
    key: str = ""
    """Names the server across processes and hosts, without being able to reach it: `machine:<our id>`, or
    `server:<host and port>`, with this computer's name where the address is loopback. See `server_key`."""
    machine: Machine | None = None
    bill: tuple[BillLine, ...] = ()
    since: datetime | None = None
    """From when this job has a share in the machine's bill."""

    @property
    def cost_usd(self) -> Decimal:
        """What being there cost, once it is known."""
        return sum((line.amount_usd for line in self.bill), Decimal(0))


ComfyFactory = Callable[[SecretUrl], ComfyUI]


class PlaceFactory(Protocol):
    """Whatever gives a job its place: a `Placer` for one request, or an executor's `Station`."""

    def __call__(
        self, *, job_id: JobId, show: Show, step: TimeStep, on_bill: TellBill, prefer: str | None = None
    ) -> AbstractAsyncContextManager[Place]:
        """Be at the place for the block: the one of the key `prefer`, where an earlier prompt is, if that can be."""
        ...


def owed(place: Place, *, now: datetime) -> tuple[BillLine, ...]:
    """Return what being there has cost this job until now, before the bill is made when the place is left."""
    if place.bill or place.machine is None or place.since is None:
        return place.bill
    return (_share(place.machine, place.since, now),)


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
        self._comfyui = comfyui
        self._given_server = given_server
        self._cloud = cloud
        self.tell = tell

    def at_request(self, request: JobRequest) -> PlaceFactory:
        """Return what finds or rents the place that a request asks for."""
        return partial(self.at, server_url=request.server_url, server_type=request.server_type)

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
    ) -> AsyncIterator[Place]:
        """Be at the place for the block. A machine of one's own is gone, by the provider's word, when it is left.

        A single run has no earlier prompt that `prefer` could name.
        """
        if server_url is not None:
            async with self._at_server(server_url, step) as place:
                yield place
            return
        machines, dev = await self._cloud()
        warm = None
        if machines.settings.app.machine_reuse:
            step("place")
            warm = await self._warm(machines, dev, job_id)
        if warm is not None:
            show(Progress(Step.PLACING, message=f"using the dev server {warm[0].server_id} ({warm[0].server_type})"))
            async with self._at_dev_server(machines, dev, warm, job_id) as place:
                yield place
        else:
            wanted = server_type or machines.settings.cloud.server_type
            async with self._at_own_machine(machines, wanted, job_id, show, step, on_bill) as place:
                yield place

    @asynccontextmanager
    async def _at_server(self, url: str, step: TimeStep) -> AsyncIterator[Place]:
        step("check")
        server = self._given_server(url)  # kept warm by its giver, for the next job
        await server.probe()
        yield Place(server, "server", alone=False, key=server_key(url, self._host))

    # -- the dev server ------------------------------------------------------------------------------------

    async def _warm(
        self, machines: Machines, dev: DevServer, job_id: JobId
    ) -> tuple[Machine, MachineReport, ComfyUI] | None:
        """Return the dev server, marked as used by this job, if it is alive in every layer."""
        found = await dev.find()
        if found is None or found[1].url is None:
            return None
        machine, report = found
        server = self._comfyui(found[1].url)
        try:
            _, error = await check_comfyui(server)
            if error is None:
                await machines.store.begin_use(Use(machine.id, machines.books.owner.id, job_id, machines.clock.now()))
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
    async def _at_dev_server(
        self, machines: Machines, dev: DevServer, warm: tuple[Machine, MachineReport, ComfyUI], job_id: JobId
    ) -> AsyncIterator[Place]:
        machine, report, server = warm
        started = machines.clock.now()
        place = Place(server, "dev server", alone=False, key=machine_key(machine.id), machine=machine, since=started)
        if report.stopping_at is not None and report.stopping_at - started < timedelta(minutes=5):
            left = max(0.0, (report.stopping_at - started).total_seconds())
            self.tell(f"the dev server stops in {left:.0f} s; `comfyctl dev extend` lets it run longer")
        try:
            yield place
        except RunComfyError as error:
            raise await _explained(error, machines, machine) from error
        finally:
            ended = machines.clock.now()
            place.bill = (_share(machine, started, ended),)
            await finish(self._leave_dev_server(machines, dev, place, report, job_id))

    async def _leave_dev_server(
        self, machines: Machines, dev: DevServer, place: Place, report: MachineReport, job_id: JobId
    ) -> None:
        machine = place.machine
        await place.server.close()
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
        self, machines: Machines, server_type: str, job_id: JobId, show: Show, step: TimeStep, on_bill: TellBill
    ) -> AsyncIterator[Place]:
        lease = machines.settings.cloud.run_lease
        intent = machines.books.intent(
            purpose=Purpose.RUN, server_type=server_type, duration=lease, reason=f"job {job_id}"
        )
        step("place")
        await Reaper(machines).reap(wait=False)
        place: Place | None = None
        keeper: asyncio.Task[None] | None = None
        machine: Machine | None = None
        try:
            show(Progress(Step.LAUNCHING, message=f"launching a {server_type} machine"))
            async with machines.launch_lock():
                machine = await machines.launch(intent)
            step("boot")
            machine, report = await machines.wait_ready(machine, on_boot=lambda boot: show(_booting(boot)))
            if report.url is None:
                raise MachineLost("the machine is Ready but has no address")
            keeper = asyncio.create_task(keep_lease(machines, machine), name=f"lease-{job_id}")
            step("check")
            show(Progress(Step.CHECKING, message="the machine is Ready; asking its ComfyUI"))
            place = Place(
                self._comfyui(report.url), "own machine", alone=True, key=machine_key(machine.id), machine=machine
            )
            place.since = machine.ready_at or machines.clock.now()
            await wait_until_usable(
                place.server,
                within=machines.settings.cloud.comfyui_timeout,
                on_wait=lambda why: show(Progress(Step.CHECKING, message=why)),
            )
            yield place
        except RunComfyError as error:
            raise await _explained(error, machines, machine) from error
        finally:
            try:
                step("stop")
                show(Progress(Step.STOPPING, message="stopping the machine"))
            finally:  # not even a terminal that is gone keeps the machine from being ended
                await finish(self._end_own(machines, intent, machine, job_id, place, keeper, on_bill))

    async def _end_own(
        self,
        machines: Machines,
        intent: Machine,
        rented: Machine | None,
        job_id: JobId,
        place: Place | None,
        keeper: asyncio.Task[None] | None,
        on_bill: TellBill,
    ) -> None:
        """End what was rented for this job, and tell its bill: a machine that never worked has one too."""
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        ended: Machine | None = None
        try:
            ended = await machines.settle(intent, reason=f"job {job_id} is over")
        finally:
            try:
                machine = ended or await machines.books.latest(rented.id if rented else intent.id) or rented
                bill = await _bill(machines, machine)
                if place is not None:
                    place.machine, place.bill = machine, bill
                on_bill(bill)
            finally:
                if place is not None:
                    await place.server.close()


async def keep_lease(machines: Machines, machine: Machine) -> None:
    """Renew what is paid ahead, at half, while the job lives; a machine whose owner dies stops by itself (I5).

    Time since ready is counted by the loop, since clocks jump and the provider's may differ from ours.
    """
    lease, loop = machines.settings.cloud.run_lease, asyncio.get_running_loop()
    now = machines.clock.now()
    ready_at = loop.time() - max(0.0, (now - (machine.ready_at or now)).total_seconds())
    confirmed = machine.duration
    while True:
        await asyncio.sleep(lease.total_seconds() / 8)
        used = timedelta(seconds=round(loop.time() - ready_at))
        if confirmed - used > lease / 2:
            continue
        latest = await machines.books.latest(machine.id) or machine
        try:
            confirmed = (await machines.extend(latest, total=used + lease)).duration
        except (ProviderError, LocalError) as error:
            # Never assumed longer than confirmed: the next round tries again.
            log.warning("lease_not_renewed", extra={"fields": {"machine": machine.id, "error": error.code}})


def _booting(boot: Boot) -> Progress:
    about = f", usually {boot.expected.total_seconds():.0f} s" if boot.expected else ""
    return Progress(
        Step.BOOTING,
        message=f"{boot.status}{about}; starting is free",
        elapsed=boot.elapsed,
        expected=boot.expected,
    )


async def _explained(error: RunComfyError, machines: Machines, machine: Machine | None) -> RunComfyError:
    """Return what really happened: a server that fell silent because its machine went away is a lost machine."""
    if machine is None or machine.server_id is None or isinstance(error, MachineLost):
        return error
    if error.code not in ("comfyui-unreachable", "server-restarted", "comfyui-not-found", "download-failed"):
        return error
    try:
        async with asyncio.timeout(EXPLAINED_WITHIN.total_seconds()):  # the machine bills meanwhile
            report = await machines.provider.get_machine_status(machine.server_id)
    except (ProviderError, TimeoutError):
        return error
    if report is not None and report.phase not in (Phase.GONE, Phase.STOPPING, Phase.FAILED):
        return error
    return MachineLost(
        f"machine {machine.server_id} went away during the job ({error.message})",
        hint="run the job again; look at `comfyctl machines ls` for what still runs",
        details={"server_id": machine.server_id, "cause": error.code},
    )


def _share(machine: Machine, started: datetime, ended: datetime) -> BillLine:
    return BillLine(
        what=f"{machine.server_type} (this job's time on the dev server)",
        seconds=seconds_between(started, ended),
        usd_per_hour=machine.usd_per_hour,
        amount_usd=meter(started, ended, machine.usd_per_hour),
    )


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
    return (replace(_share(machine, machine.ready_at, end), what=machine.server_type),)
