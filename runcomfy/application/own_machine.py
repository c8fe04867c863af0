"""
A machine that this process has rented to run jobs on: launched or taken over, paid ahead while it is held, and gone, by
the provider's word, when it is ended.

When it is held and for whom is decided by others: for one job (`placing`), or from job to job (`station`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal

from runcomfy.application.health import wait_until_usable
from runcomfy.application.machines import Boot, Machines
from runcomfy.domain.exceptions import LocalError, MachineLost, ProviderError, RunComfyError
from runcomfy.domain.job import BillLine
from runcomfy.domain.machine import Machine, Phase, Purpose
from runcomfy.domain.money import meter, seconds_between
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.placing")

EXPLAINED_WITHIN = timedelta(seconds=10)
"""How long the provider may take to say whether a machine that fell silent is still there."""

Show = Callable[[Progress], None]
TimeStep = Callable[[str], None]
"""Called with a step's name when the step begins; the orchestrator measures."""
ComfyFactory = Callable[[SecretUrl], ComfyUI]


class OwnMachine:
    """One machine of this process. Whoever starts it ends it, whatever happened; `end` is harmless when repeated."""

    def __init__(self, machines: Machines, comfyui: ComfyFactory) -> None:
        self._machines = machines
        self._comfyui = comfyui
        self._intent: Machine | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.machine: Machine | None = None
        """As it was last seen; None before the provider has answered."""
        self.server: ComfyUI | None = None
        """Its ComfyUI, once that answers."""

    def intend(self, server_type: str, *, reason: str) -> None:
        """Say what is to be rented; nothing is written or sent yet. Raises ValueInvalid, BudgetExceeded."""
        self._intent = self._machines.books.intent(
            purpose=Purpose.RUN,
            server_type=server_type,
            duration=self._machines.settings.cloud.run_lease,
            reason=reason,
        )

    async def launch(self, *, show: Show, step: TimeStep) -> ComfyUI:
        """Rent what was intended and return its ComfyUI when that can be used.

        Raises ProviderError, BootTimeout, MachineFailed, MachineLost; `end` then ends what was rented.
        """
        if self._intent is None:
            raise RunComfyError("a machine was to be launched that nobody had asked for")
        show(Progress(Step.LAUNCHING, message=f"launching a {self._intent.server_type} machine"))
        async with self._machines.launch_lock():
            self.machine = await self._machines.launch(self._intent)
        return await self._bring_up(self.machine, show=show, step=step)

    async def take_over(self, row: Machine, *, note: str, show: Show, step: TimeStep) -> ComfyUI | None:
        """Become the owner of a machine that nobody has any more, and return its ComfyUI; None: somebody was quicker.

        Raises what `launch` raises.
        """
        self.machine = await self._machines.books.try_take_over(row, note=note)
        if self.machine is None:
            return None
        return await self._bring_up(self.machine, show=show, step=step)

    async def _bring_up(self, machine: Machine, *, show: Show, step: TimeStep) -> ComfyUI:
        step("boot")
        self.machine, report = await self._machines.wait_ready(machine, on_boot=lambda boot: show(_booting(boot)))
        if report.url is None:
            raise MachineLost("the machine is Ready but has no address")
        self._keeper = asyncio.create_task(keep_lease(self._machines, self.machine), name=f"lease-{machine.id}")
        step("check")
        show(Progress(Step.CHECKING, message="the machine is Ready; asking its ComfyUI"))
        self.server = self._comfyui(report.url)
        await wait_until_usable(
            self.server,
            within=self._machines.settings.cloud.comfyui_timeout,
            on_wait=lambda why: show(Progress(Step.CHECKING, message=why)),
        )
        return self.server

    async def end(self, *, reason: str) -> Machine | None:
        """End what was rented and return it as it is then; None if there never was a machine."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        ended: Machine | None = None
        try:
            if self._intent is not None:
                ended = await self._machines.settle(self._intent, reason=reason)
            elif self.machine is not None:
                current = await self._machines.books.latest(self.machine.id) or self.machine
                ended = await self._machines.stop(current, reason=reason) if current.is_open else current
        finally:
            known = self.machine or self._intent
            if known is not None:
                self.machine = ended or await self._machines.books.latest(known.id) or self.machine
        return self.machine

    async def close(self) -> None:
        """Close the client of its ComfyUI."""
        if self.server is not None:
            await self.server.close()


async def keep_lease(machines: Machines, machine: Machine) -> None:
    """Renew what is paid ahead, at half, while the machine is held; if its owner dies it stops by itself (I5).

    Time since ready is counted by the loop, since clocks jump and the provider's may differ from ours.
    """
    lease, loop = machines.settings.cloud.run_lease, asyncio.get_running_loop()
    now = machines.clock.now()
    ready_at = loop.time() - max(0.0, (now - (machine.ready_at or now)).total_seconds())
    confirmed = machine.duration
    while True:
        used = timedelta(seconds=round(loop.time() - ready_at))
        if confirmed - used <= lease / 2:
            latest = await machines.books.latest(machine.id) or machine
            try:
                confirmed = (await machines.extend(latest, total=used + lease)).duration
            except (ProviderError, LocalError) as error:
                # Never assumed longer than confirmed: the next round tries again.
                log.warning("lease_not_renewed", extra={"fields": {"machine": machine.id, "error": error.code}})
        await asyncio.sleep(lease.total_seconds() / 8)


def _booting(boot: Boot) -> Progress:
    about = f", usually {boot.expected.total_seconds():.0f} s" if boot.expected else ""
    return Progress(
        Step.BOOTING,
        message=f"{boot.status}{about}; starting is free",
        elapsed=boot.elapsed,
        expected=boot.expected,
    )


async def explained(error: RunComfyError, machines: Machines, machine: Machine | None) -> RunComfyError:
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


def share_of(machine: Machine, started: datetime, ended: datetime, *, where: str) -> BillLine:
    """Return what the time from `started` to `ended` on a machine costs."""
    return BillLine(
        what=f"{machine.server_type} (this job's time on {where})",
        seconds=seconds_between(started, ended),
        usd_per_hour=machine.usd_per_hour,
        amount_usd=meter(started, ended, machine.usd_per_hour),
    )


def total_of(bill: tuple[BillLine, ...]) -> Decimal:
    """Return the sum of a bill, in USD."""
    return sum((line.amount_usd for line in bill), Decimal(0))
