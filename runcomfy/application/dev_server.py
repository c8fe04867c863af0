"""
Keeping one machine for a working day.

A start takes minutes, so one warm machine is shared by every command until its planned stop. Two starts at once end
with one machine: the launch lock lets one launch, the other waits for what it launched. The machine then belongs to
no process; its `kept_until` says how long it may live so.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from runcomfy.application.by_hand import ByHand
from runcomfy.application.by_order import stop_by_order
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.health import Layer, check_comfyui, wait_until_usable
from runcomfy.application.machines import Boot, Machines
from runcomfy.application.monitors import monitor_id
from runcomfy.application.reaper import Reaper
from runcomfy.domain.dev_server import DevServerSnapshot
from runcomfy.domain.exceptions import (
    BootTimeout,
    LocalError,
    MachineFailed,
    MachineLost,
    MachineNotFound,
    StopUnconfirmed,
)
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import (
    IllegalTransition,
    Machine,
    MachineId,
    MachineReport,
    MachineState,
    Phase,
    Purpose,
)
from runcomfy.domain.money import cost_of
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.dev_state import DevServerFile

log = logging.getLogger("runcomfy.dev_server")

DEV_PURPOSES = (Purpose.DEV, Purpose.TAKEN)


@dataclass(frozen=True, slots=True)
class DevServerStatus:
    """The dev server as it really is now. `report` None: the provider does not list it."""

    machine: Machine
    report: MachineReport | None
    layers: tuple[Layer, ...]
    cost_usd: Decimal
    idle: timedelta | None
    """How long no job has run on it; None while one runs."""
    idle_cost_usd: Decimal
    jobs_running: int
    monitored: bool = False
    """Whether somebody looks at it."""
    ends_idle_in: timedelta | None = None
    """How long until it is ended for being idle; None while that does not count."""

    @property
    def usable(self) -> bool:
        """Ready, and ComfyUI answers in every layer."""
        return bool(self.report and self.report.usable and self.layers and all(layer.ok for layer in self.layers))


class DevServer:
    """Starts, finds, describes and stops the account's dev server."""

    def __init__(self, machines: Machines, file: DevServerFile, comfyui: Callable[[SecretUrl], ComfyUI]) -> None:
        self._machines = machines
        self._file = file
        self._comfyui = comfyui
        self._clock = machines.clock
        self._cloud = machines.settings.cloud
        self._by_hand: defaultdict[MachineId, ByHand] = defaultdict(ByHand)

    # -- finding -------------------------------------------------------------------------------------------

    async def rows(self) -> list[Machine]:
        """Return our books' dev servers that may still run, the newest last."""
        rows = await self._machines.books.rows()
        return [r for r in rows if r.purpose in DEV_PURPOSES and r.state is not MachineState.STOPPING]

    async def find(self) -> tuple[Machine, MachineReport] | None:
        """Return the dev server if the provider says that it is Ready; the state file's hint is verified too."""
        for machine in reversed(await self.rows()):
            if machine.server_id is None:
                continue
            report = await self._machines.provider.get_machine_status(machine.server_id)
            if report is not None and report.usable:
                return await self._refreshed(machine, report), report
            if report is None or report.phase is Phase.GONE:
                await self._close_if_gone(machine)
        return await self._from_hint()

    async def _refreshed(self, machine: Machine, report: MachineReport) -> Machine:
        """Keep up with what the provider says of the stop time, which the user may have changed on its page.

        Books that cannot be written, or that another process moves at this moment, do not matter to who asks.
        """
        with suppress(LocalError, IllegalTransition):
            machine = await self._machines.ready(machine, report)
            if machine.kept_until is not None and report.stopping_at not in (None, machine.kept_until):
                note = "its stop time was changed"
                machine = await self._machines.books.change(machine, note=note, kept_until=report.stopping_at)
        return machine

    async def _close_if_gone(self, machine: Machine) -> None:
        if machine.owner_id is not None:
            return
        taken = await self._machines.books.try_take_over(machine, note="not found at the provider")
        if taken is None:
            return
        if await self._machines.gone_unasked(taken, note="stopped without our asking, or at its planned time") is None:
            await self._machines.books.hand_over(taken, kept_until=taken.kept_until, note="still there")
        else:
            await self._forget(taken)

    async def _from_hint(self) -> tuple[Machine, MachineReport] | None:
        """Take up a machine that only the state file knows, if the account really runs it."""
        server_id = await self._file.hint()
        if server_id is None or await self._machines.books.row_of(server_id) is not None:
            return None
        report = await self._machines.provider.get_machine_status(server_id)
        if report is None or not report.usable:
            return None
        machine = await self._machines.adopt(report, purpose=Purpose.TAKEN, reason="named by the dev server state file")
        kept_until = self._machines.books.kept_until(machine, report)
        return await self._machines.books.hand_over(machine, kept_until=kept_until, note="taken up"), report

    # -- starting ------------------------------------------------------------------------------------------

    async def start(
        self,
        *,
        server_type: str,
        duration: timedelta,
        on_boot: Callable[[Boot], None] | None = None,
        on_wait: Callable[[str], None] | None = None,
    ) -> tuple[Machine, MachineReport, bool]:
        """Launch or reuse the one dev server; return it with the provider's word, and whether it was there before.

        One whose starter died is waited for in its place. One that does not become usable is ended and replaced; one
        that is shut down while it starts is not.

        Raises BudgetExceeded, ValueInvalid (nothing was sent), ProviderError, BootTimeout, MachineFailed, MachineLost;
        what was launched is stopped again then.
        """
        intent = self._machines.books.intent(
            purpose=Purpose.DEV, server_type=server_type, duration=duration, reason="dev server asked for by the user"
        )
        await Reaper(self._machines).reap(wait=False, spare=_was_being_started, spare_unheard=True)
        while True:
            found = await self._there(on_boot, on_wait)
            if found is not None:
                await self.used(found[0])
                return *found, True
            try:
                async with self._machines.launch_lock():
                    if await self._newest() is not None:
                        continue  # somebody was quicker: take theirs
                    if (named := await self._from_hint()) is not None:
                        await self.publish(*named, health="unknown")
                        return *named, True
                    machine = await self._machines.launch(intent)
                return *await self._bring_up(machine, on_boot, on_wait), False
            except BaseException as error:
                cancelled = isinstance(error, asyncio.CancelledError)
                why = "its start was broken off" if cancelled else "it never became usable"
                await finish(self._broken_off(intent, why))
                raise

    async def _broken_off(self, intent: Machine, why: str) -> None:
        ended = await self._machines.settle(intent, reason=why)
        if ended is not None:
            await self._forget(ended)

    async def _forget(self, machine: Machine) -> None:
        """Remove the state file if it names this machine; what cannot be removed is verified by who reads it."""
        with suppress(LocalError):
            if await self._file.hint() == machine.server_id:
                await self._file.clear()

    async def _bring_up(
        self, machine: Machine, on_boot: Callable[[Boot], None] | None, on_wait: Callable[[str], None] | None
    ) -> tuple[Machine, MachineReport]:
        """Wait for our machine in every layer, publish it, and leave it to itself. The caller ends it if that fails."""
        machine, report = await self._machines.wait_ready(machine, on_boot=on_boot)
        faultpoint("dev.ready")
        if report.url is None:
            raise MachineNotFound("the machine is Ready but has no address")
        server = self._comfyui(report.url)
        try:
            await wait_until_usable(server, within=self._cloud.comfyui_timeout, on_wait=on_wait)
        finally:
            await server.close()
        await self.publish(machine, report, health="healthy")
        faultpoint("dev.published")
        kept_until = self._machines.books.kept_until(machine, report)
        machine = await self._machines.books.hand_over(machine, kept_until=kept_until, note="dev server is up")
        faultpoint("dev.up")
        return machine, report

    async def _newest(self) -> Machine | None:
        """Return the newest dev server that was launched and that nobody has begun to stop."""
        return next((row for row in reversed(await self.rows()) if row.server_id is not None), None)

    async def _there(
        self, on_boot: Callable[[Boot], None] | None, on_wait: Callable[[str], None] | None
    ) -> tuple[Machine, MachineReport] | None:
        """Return the dev server that is there, waiting for one that is coming; None if there is none.

        Raises BootTimeout if another living process does not come to an end with its start, MachineLost if somebody
        ordered its end meanwhile.
        """
        loop = asyncio.get_running_loop()
        began, told = loop.time(), False
        patience = self._cloud.boot_timeout + self._cloud.comfyui_timeout
        waited_for: Machine | None = None
        while True:
            row = await self._newest()
            if waited_for is not None and (row is None or row.id != waited_for.id):
                await self._unless_ordered_away(waited_for)
            if row is None:
                return None
            waited_for, now = None, self._clock.now()
            owner = (await self._machines.store.owners([row.owner_id])).get(row.owner_id) if row.owner_id else None
            if owner is not None and self._machines.processes.lives(owner, now=now):
                if not told:
                    self._machines.tell(f"another process (pid {owner.pid}) is starting the dev server; waiting for it")
                    told = True
                if loop.time() - began > patience.total_seconds():
                    raise BootTimeout(
                        f"the process {owner.pid} has not brought its dev server up",
                        hint="end that process, or stop its machine with `comfyctl machines stop ID`",
                        details={"server_id": row.server_id, "pid": owner.pid},
                    )
                if on_boot is not None:
                    on_boot(Boot("starting (another process)", max(now - row.requested_at, timedelta(0)), None))
                waited_for = row
                await asyncio.sleep(self._cloud.poll_interval.total_seconds())
                continue
            if (found := await self._ours_now(row, on_boot, on_wait)) is not None:
                return found

    async def _unless_ordered_away(self, machine: Machine) -> None:
        """Raise MachineLost if a machine was taken from the process that had it, and ended.

        Only a person orders that while the process lives; one that gave up by itself has ended, or ends, its machine.
        """
        row = await self._machines.books.latest(machine.id)
        if row is None or row.owner_id == machine.owner_id or row.state in (MachineState.BOOTING, MachineState.READY):
            return
        holder = machine.owner_id
        owner = (await self._machines.store.owners([holder])).get(holder) if holder is not None else None
        signed_off = owner is not None and owner.ended_at is not None
        if owner is None or not (signed_off or self._machines.processes.lives(owner, now=self._clock.now())):
            return
        raise MachineLost(
            f"the dev server {machine.server_id} was shut down while it was starting",
            hint="somebody ordered that; start it again if it is wanted all the same",
            details={"server_id": machine.server_id},
        )

    async def _ours_now(
        self, row: Machine, on_boot: Callable[[Boot], None] | None, on_wait: Callable[[str], None] | None
    ) -> tuple[Machine, MachineReport] | None:
        """Take a dev server that has no living process in hand until it is usable; None: look again who has it."""
        if row.owner_id is None and (found := await self._still_usable(row)) is not None:
            return found
        taken = await self._machines.books.try_take_over(row, note="nobody is starting it; waiting for it")
        if taken is None:
            return None
        try:
            return await self._bring_up(taken, on_boot, on_wait)
        except (MachineLost, MachineFailed, BootTimeout) as error:
            await self._unless_ordered_away(taken)
            self._machines.tell(f"the dev server {row.server_id} is not usable ({error.message}); replacing it")
            await finish(self._end(taken, f"not usable: {error.code}"))
            return None
        except BaseException:
            if row.kept_until is not None:  # it was there before this start, and stays
                await finish(self._machines.books.hand_over(taken, kept_until=row.kept_until, note="left as it was"))
            else:
                await finish(self._end(taken, "its start was broken off"))
            raise

    async def _still_usable(self, machine: Machine) -> tuple[Machine, MachineReport] | None:
        """Return the running dev server if it answers in every layer at once."""
        if machine.server_id is None:
            return None
        report = await self._machines.provider.get_machine_status(machine.server_id)
        if report is None or report.url is None or not report.usable:
            return None
        machine = await self._refreshed(machine, report)
        server = self._comfyui(report.url)
        try:
            _, error = await check_comfyui(server)
        finally:
            await server.close()
        if error is not None:
            return None
        await self.publish(machine, report, health="healthy")
        return machine, report

    async def _end(self, machine: Machine, why: str) -> Machine:
        """End a machine that was taken in hand, unless a job runs on it: that one may know how to use it (I8)."""
        current = await self._machines.books.latest(machine.id) or machine
        if not current.is_open:
            return current
        if uses := await self._machines.living_uses(current):
            await self._machines.books.hand_over(current, kept_until=current.kept_until, note=why)
            raise MachineFailed(
                f"the dev server {current.server_id} does not answer, and job {uses[0].job_id} uses it",
                hint="wait for the job, or stop the machine with `comfyctl dev shutdown`",
            )
        if current.owner_id is None:
            current = await self._machines.books.take_over(current, note=why)
        stopped = await self._machines.stop(current, reason=why)
        await self._forget(stopped)
        return stopped

    # -- describing ----------------------------------------------------------------------------------------

    async def status(self) -> DevServerStatus | None:
        """Return the dev server as it really is, or None if there is none. Also refreshes the state file."""
        found = await self.find()
        if found is None:
            row = await self._newest()
            if row is None or row.server_id is None:
                with suppress(LocalError):
                    await self._file.clear()
                return None
            return await self._describe(row, await self._machines.provider.get_machine_status(row.server_id), ())
        machine, report = found
        layers: tuple[Layer, ...] = ()
        if report.url is not None:
            server = self._comfyui(report.url)
            try:
                layers = tuple((await check_comfyui(server))[0])
            finally:
                await server.close()
        healthy = bool(layers) and all(layer.ok for layer in layers)
        await self.publish(machine, report, health="healthy" if healthy else "unreachable")
        return await self._describe(machine, report, layers)

    async def _describe(
        self, machine: Machine, report: MachineReport | None, layers: tuple[Layer, ...]
    ) -> DevServerStatus:
        now = self._clock.now()
        living = await self._machines.living_uses(machine)
        monitored = len(await self._machines.living_uses(machine, monitors=True)) > len(living)
        since = machine.last_used_at or machine.ready_at
        idle = None if living or since is None else max(now - since, timedelta(0))
        cost = cost_of(machine, now=now)
        idle_cost = Decimal(0)
        if idle is not None and machine.ready_at is not None and since is not None:
            idle_cost = cost - cost_of(machine, now=max(since, machine.ready_at))
        limit, guarded = self._machines.settings.app.idle_timeout, self._machines.settings.pool.guard
        ends_in = max(limit - idle, timedelta(0)) if guarded and idle is not None and not monitored else None
        return DevServerStatus(
            machine, report, layers, cost, idle, idle_cost, len(living), monitored=monitored, ends_idle_in=ends_in
        )

    async def publish(self, machine: Machine, report: MachineReport, *, health: str) -> None:
        """Write the state file. What cannot be written is said, not raised: the store has the truth."""
        if report.url is None or machine.server_id is None:
            return
        now = self._clock.now()
        snapshot = DevServerSnapshot(
            server_id=machine.server_id,
            machine_id=machine.id,
            user_id=self._cloud.user_id,
            base_url=report.url,
            status="running",
            launch_time=machine.requested_at,
            workflow_version=machine.workflow_version_id,
            server_type=machine.server_type,
            duration=machine.duration,
            usd_per_hour=machine.usd_per_hour,
            plan=self._cloud.plan,
            rate_source=machine.rate_source,
            cost_usd=cost_of(machine, now=now),
            written_at=now,
            ready_at=machine.ready_at,
            planned_stop_at=machine.planned_stop_at,
            last_used_at=machine.last_used_at,
            last_health_check=now,
            health_status=health,
        )
        try:
            await self._file.publish(snapshot)
        except LocalError as error:
            self._machines.tell(f"the dev server state file could not be written: {error.message}")

    # -- ending --------------------------------------------------------------------------------------------

    async def shutdown(self, *, reason: str = "shutdown asked for by the user") -> list[Machine]:
        """Stop every dev server of the account, and the machine the state file names; return those that ended."""
        try:
            await self._from_hint()
        except LocalError as error:  # what our books name is ended all the same
            self._machines.tell(f"the dev server state file could not be read: {error.message}")
        doomed = [
            row
            for row in await self._machines.books.rows()
            if row.purpose in DEV_PURPOSES and row.state is not MachineState.REQUESTED
        ]
        done = await asyncio.gather(*(self.stop_one(row, reason=reason) for row in doomed), return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        with suppress(LocalError):
            await self._file.clear()
        return [outcome for outcome in done if isinstance(outcome, Machine)]

    async def stop_one(self, machine: Machine, *, reason: str) -> Machine:
        """Stop one dev server on the user's order, whoever holds it."""
        stopped = await stop_by_order(self._machines, machine, note=reason)
        if stopped.is_open and stopped.stop_accepted_at is None:
            raise StopUnconfirmed(f"machine {machine.server_id} was not seen gone")
        return stopped

    async def extend(self, *, by: timedelta) -> Machine:
        """Let the dev server run longer by this much; read back and verified."""
        found = await self.find()
        if found is None:
            raise MachineNotFound("there is no running dev server", hint="start one with `comfyctl dev start`")
        machine, report = found
        total = report.duration or machine.duration
        if report.stopping_at is not None and report.ready_at is not None:
            total = report.stopping_at - report.ready_at
        machine = await self._machines.extend(machine, total=total + by)
        await self.used(machine)
        await self.publish(machine, report, health="unknown")
        return machine

    async def computes(self, machine: Machine) -> bool:
        """Whether the dev server's ComfyUI has anything to do, whoever sent it; not if it cannot be asked.

        Nor if it does nothing about it: asked again, the same prompt waits and nothing runs.
        """
        if machine.server_id is None:
            return False
        report = await self._machines.provider.get_machine_status(machine.server_id)
        if report is None or report.url is None:
            return False
        server = self._comfyui(report.url)
        try:
            return await self._by_hand[machine.id].used(server)
        finally:
            await server.close()

    async def used(self, machine: Machine) -> None:
        """Say that the dev server is wanted now: its idle time begins anew. What cannot be written does not matter."""
        with suppress(LocalError):
            await self._machines.books.change(machine, note="used", last_used_at=self._clock.now())

    @asynccontextmanager
    async def monitored(self, machine: Machine) -> AsyncIterator[None]:
        """Say for the block that somebody looks at the dev server: it is not ended for being idle meanwhile."""
        owner = self._machines.books.owner.id
        look = monitor_id(owner)
        with suppress(LocalError):
            await self._machines.store.begin_use(Use(machine.id, owner, look, self._clock.now()))
        try:
            yield
        finally:
            with suppress(LocalError):
                await finish(self._machines.store.end_use(machine.id, look, at=self._clock.now()))

    async def planned_stop(self) -> datetime | None:
        """When the dev server stops by itself, by our books; no question is asked."""
        rows = await self.rows()
        return rows[-1].planned_stop_at if rows else None


def _was_being_started(machine: Machine) -> bool:
    """Whether a dev server that has nobody any more was on its way up: the next start waits for it in its place."""
    coming = machine.state in (MachineState.BOOTING, MachineState.READY)
    return machine.purpose is Purpose.DEV and coming and machine.owner_id is not None and machine.kept_until is None
