"""
A machine that this process has rented to run jobs on: launched or taken over, paid ahead while it is held, and gone, by
the provider's word, when it is ended. A machine that goes away by itself ends what runs on it at once.

When it is held and for whom is decided by others: for one job (`placing`), or from job to job (`station`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from runcomfy.application.health import wait_until_usable
from runcomfy.application.machines import Boot, Machines
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    LeaseLost,
    LocalError,
    MachineLost,
    ProviderError,
    RunComfyError,
    foreign_text,
)
from runcomfy.domain.job import BillLine
from runcomfy.domain.machine import Machine, Phase, Purpose
from runcomfy.domain.money import meter, seconds_between
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.placing")

EXPLAINED_WITHIN = timedelta(seconds=10)
"""How long the provider may take to say whether a machine that fell silent is still there."""
LOOK_SHARE: Final = 0.25
"""The part of the account's requests that may go into looking whether machines are still there."""
LOOK_AT_LEAST: Final = timedelta(seconds=30)
"""So often all the same: a machine's end is to be known to the minute."""
AT_LEAST: Final = 0.01
"""Seconds of any wait: the loop may wake a breath before the time it was asked for."""
END_BEFORE: Final = timedelta(seconds=15)
"""How long before the end of what is paid a machine is ended that no budget pays longer: a stop needs a moment."""

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
        self._lost: RunComfyError | None = None
        self._cuts: list[Callable[[], None]] = []
        self.machine: Machine | None = None
        """As it was last seen; None before the provider has answered."""
        self.server: ComfyUI | None = None
        """Its ComfyUI, once that answers."""

    def intend(self, server_type: str, *, reason: str, for_user: str = "", for_project: str = "") -> None:
        """Say what is to be rented, and for whom; nothing is written or sent. Raises ValueInvalid, BudgetExceeded."""
        self._intent = self._machines.books.intent(
            purpose=Purpose.RUN,
            server_type=server_type,
            duration=self._machines.settings.cloud.run_lease,
            reason=reason,
            for_user=for_user,
            for_project=for_project,
        )

    async def launch(self, *, show: Show, step: TimeStep) -> ComfyUI:
        """Rent what was intended and return its ComfyUI when that can be used.

        Raises BudgetExceeded, ProviderError, BootTimeout, MachineFailed, MachineLost; `end` then ends what was rented.
        """
        if self._intent is None:
            raise RunComfyError("a machine was to be launched that nobody had asked for")
        launching = Progress(Step.LAUNCHING, message=f"launching a {self._intent.server_type} machine")
        async with self._machines.launch_lock():
            self.machine = await self._machines.launch(self._intent, sending=lambda: show(launching))
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
        self._keeper = asyncio.create_task(self._keep(self.machine), name=f"lease-{machine.id}")
        step("check")
        show(Progress(Step.CHECKING, message="the machine is Ready; asking its ComfyUI"))
        self.server = self._comfyui(report.url)
        async with self.while_there():
            await wait_until_usable(
                self.server,
                within=self._machines.settings.cloud.comfyui_timeout,
                on_wait=lambda why: show(Progress(Step.CHECKING, message=why)),
            )
        return self.server

    async def _keep(self, machine: Machine) -> None:
        try:
            await keep_lease(self._machines, machine)
        except RunComfyError as error:
            self._machines.tell(error.message)
            self._lost = error
            for cut in list(self._cuts):
                cut()

    @asynccontextmanager
    async def while_there(self) -> AsyncIterator[None]:
        """Let the block run as long as the machine is there and paid; it is broken off when it is not any more.

        Raises MachineLost, BudgetExceeded in place of the cancellation then. Several tasks may be in such blocks.
        """
        if self._lost is not None:
            raise self._lost
        task = asyncio.current_task()
        if task is None:
            raise RunComfyError("a machine is used outside of any task")
        cancelling, was_cut = task.cancelling(), False

        def cut() -> None:
            nonlocal was_cut
            was_cut = True
            task.cancel()

        self._cuts.append(cut)
        try:
            yield
        except asyncio.CancelledError:
            if was_cut and task.uncancel() <= cancelling and self._lost is not None:
                raise self._lost from None
            raise
        finally:
            self._cuts.remove(cut)

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


class _Lease:
    """What is paid ahead of one machine, and whether the machine is there.

    Time since ready is counted by the loop, since clocks jump and the provider's may differ from ours.
    """

    def __init__(self, machines: Machines, machine: Machine) -> None:
        self._machines, self._machine = machines, machine
        self._loop = asyncio.get_running_loop()
        now = machines.clock.now()
        self._ready_at = self._loop.time() - max(0.0, (now - (machine.ready_at or now)).total_seconds())
        self._lease = machines.settings.cloud.run_lease
        self._confirmed = machine.duration
        self._refused: BudgetExceeded | None = None
        self._renew_at = self._loop.time()
        self._look_at = self._loop.time() + machines.settings.pool.status_every.total_seconds()

    @property
    def _used(self) -> timedelta:
        return timedelta(seconds=round(self._loop.time() - self._ready_at))

    async def keep(self) -> None:
        while True:
            now = self._loop.time()
            if now >= self._renew_at:
                await self._renew()
            if now >= self._look_at:
                await self._look()
                self._look_at = self._loop.time() + await self._look_every()
            due = min(self._renew_at, self._look_at)
            await asyncio.sleep(max(AT_LEAST, due - self._loop.time()))

    async def _renew(self) -> None:
        left = self._confirmed - self._used
        self._renew_at = self._loop.time() + self._lease.total_seconds() / 8
        if left > self._lease / 2:
            return
        latest = await self._ours()
        try:
            self._confirmed = (await self._machines.extend(latest, total=self._used + self._lease)).duration
        except LeaseLost as error:
            raise self._taken() from error
        except BudgetExceeded as error:
            self._not_paid(error, left)
        except (ProviderError, LocalError) as error:
            # Never assumed longer than confirmed: the next round tries again.
            fields = {"machine": latest.id, "error": error.code}
            log.warning("lease_not_renewed", extra={"fields": fields})
        else:
            self._refused = None

    def _not_paid(self, error: BudgetExceeded, left: timedelta) -> None:
        """A hard budget pays no longer: the machine lives to the end of what is paid, and no second more (I6)."""
        before = min(END_BEFORE, self._lease / 20)
        if left <= before:
            raise BudgetExceeded(
                f"machine {self._machine.server_id} was ended at the end of what was paid: {error.message}",
                hint=error.hint,
                details=error.details,
            ) from error
        if self._refused is None:
            self._machines.tell(
                f"machine {self._machine.server_id} is not prolonged and ends in {left.total_seconds():.0f} s: "
                f"{error.message}"
            )
            log.warning("lease_refused", extra={"fields": {"machine": self._machine.id, "error": error.code}})
        self._refused = error
        self._renew_at = min(self._renew_at, self._loop.time() + (left - before).total_seconds())

    async def _look(self) -> None:
        """Look whether the machine is still there. Raises MachineLost; what cannot be asked now is asked later."""
        machine = await self._ours()
        if machine.server_id is None:
            return
        try:
            report = await self._machines.provider.get_machine_status(machine.server_id)
        except ProviderError as error:
            log.warning("machine_look_failed", extra={"fields": {"machine": machine.id, "error": error.code}})
            return
        if report is None or report.phase is Phase.GONE:
            if await self._machines.gone_unasked(machine, note="went away while it was used") is not None:
                raise self._lost("it is not there any more")
        elif report.phase is Phase.STOPPING:
            await self._machines.stops_unasked(machine)
            raise self._lost("RunComfy is stopping it")
        elif report.phase is Phase.FAILED:
            raise self._lost(f"RunComfy says {foreign_text(report.status, 40)!r} of it")

    async def _ours(self) -> Machine:
        """Return the machine as it is known now; raise MachineLost if somebody else has it, or it has ended."""
        latest = await self._machines.books.latest(self._machine.id) or self._machine
        if latest.owner_id != self._machines.books.owner.id or not latest.is_open:
            raise self._taken()
        return latest

    async def _look_every(self) -> float:
        """Seconds between two looks: the more machines the account has, the rarer."""
        cloud, pool = self._machines.settings.cloud, self._machines.settings.pool
        try:
            machines = len(await self._machines.books.rows())
        except LocalError:
            machines = 1
        fair = timedelta(seconds=machines / (cloud.requests_per_second * LOOK_SHARE))
        usual = max(pool.status_every, cloud.poll_interval)
        return max(usual, min(fair, LOOK_AT_LEAST)).total_seconds()

    def _taken(self) -> MachineLost:
        return self._lost("another process has ended it or looks after it now")

    def _lost(self, why: str) -> MachineLost:
        return MachineLost(
            f"machine {self._machine.server_id} went away during the job: {why}",
            hint="run the job again; look at `comfyctl machines ls` for what still runs",
            details={"server_id": self._machine.server_id},
        )


async def keep_lease(machines: Machines, machine: Machine) -> None:
    """Renew what is paid ahead, at half, while the machine is held; if its owner dies it stops by itself (I5).

    Never returns. Raises MachineLost as soon as the machine is known to be gone (its books are closed then) or
    somebody else has it; BudgetExceeded at the end of what is paid, if a hard budget refuses to pay longer.
    """
    await _Lease(machines, machine).keep()


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
