"""
The guard: ends what outlives its lease, whoever owns it, when everything else of ours is dead or hangs (I5).

It is a process of its own, started by `dev start` and `serve`, and does one thing. A machine's end is known from our
books: its lease, confirmed by the provider, and for the dev server the time it may be idle. A machine that still runs a
breath after that is ended. A busy machine of a living owner is never ended: its owner renews the lease at half, and
where our books say that it ran out, the provider is asked before anything is done (I8).

A database that cannot be read stops nothing: the guard goes by what it read last (I23). It leaves when no machine of
ours is open and no process of ours is there that could launch one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from runcomfy.application.dev_server import DEV_PURPOSES, DevServer
from runcomfy.application.machines import Machines
from runcomfy.application.reaper import Reaper, lease_ends
from runcomfy.application.slept import SLEPT, Drift
from runcomfy.domain.exceptions import LeaseLost, LocalError, ProviderError, RunComfyError
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import Machine, MachineReport, MachineState, OwnerId, Phase

log = logging.getLogger("runcomfy.guard")

GUARD: Final = "guard"
"""Last word of a guard's command among the owners: guards do not wait for each other."""
GRACE: Final = timedelta(seconds=10)
"""How long after its time a machine may still be there: the provider ends it itself, and its word comes late."""
GRACE_SHARE: Final = 1 / 3
"""Of the period, if that is less."""
RESETTLE: Final = timedelta(minutes=30)
"""So long after the clock has moved, leases of living owners are judged by both clocks; then by the wall clock."""
AT_LEAST: Final = 0.05
"""Seconds between two rounds."""
END_AGAIN: Final = 30.0
"""Seconds after which a machine is looked at again whose end failed: it may bill, however long the period is."""


@dataclass(frozen=True, slots=True)
class End:
    """When a machine is to be ended, and why."""

    at: datetime
    why: str


def end_of(machine: Machine, *, owner_lives: bool, boot_timeout: timedelta) -> End | None:
    """Return when a machine must be gone by our books; None: its launch is still to be resolved, or ends by itself.

    Pure, so that the rule can be read and tested alone.
    """
    match machine.state:
        case MachineState.REQUESTED:
            return None
        case MachineState.STOPPING if not owner_lives:
            return End(machine.since, "its stop was asked for and never seen through")
        case MachineState.STOPPING if machine.stop_accepted_at is not None:
            return None  # it bills no longer, and its owner looks until it is gone
    ends = lease_ends(machine)
    if ends is not None:
        if owner_lives and machine.asked_duration is not None and machine.ready_at is not None:
            ends = max(ends, machine.ready_at + machine.asked_duration)
        if owner_lives and machine.kept_until is not None:
            ends = max(ends, machine.kept_until)  # its owner looks what the provider does: the canary
        return End(ends, "it outlived its lease")
    never_up = machine.requested_at + boot_timeout
    if owner_lives:
        return End(never_up + machine.duration, "it never came up, and its owner does not end it")
    return End(never_up, "it never came up, and its owner is gone")


class Guard:
    """Looks after one account's machines. `run` returns when there is nothing to guard any more."""

    def __init__(self, machines: Machines, dev: DevServer, *, period: timedelta) -> None:
        self._machines, self._dev = machines, dev
        self._books, self._clock = machines.books, machines.clock
        self._period = period
        self._grace = min(GRACE, period * GRACE_SHARE)
        self._idle = machines.settings.app.idle_timeout
        self._warning = machines.settings.pool.idle_warning
        self._rows: Sequence[Machine] = ()
        self._owners: Mapping[OwnerId, Owner] = {}
        self._read_once = False
        self._blind = False
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._warned: dict[str, datetime] = {}
        self._unwritten: dict[str, datetime] = {}
        """Until when machines billed that were ended while our books could not be written."""
        self._told: set[tuple[str, str]] = set()
        self._drift = Drift(self._clock)
        self._moved_at: float | None = None
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Guard until nothing is left to guard; it looks twice: who has just started it may not have signed in yet."""
        looked = 0
        while True:
            self._wake.clear()
            await self.once()
            looked += 1
            if looked > 1 and not self._ending and not await self.needed():
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(max(AT_LEAST, self._wait().total_seconds())):
                    await self._wake.wait()

    async def close(self) -> None:
        """See every stop that has begun to its end."""
        while self._ending:
            await asyncio.wait(set(self._ending.values()))

    async def needed(self) -> bool:
        """Whether a machine of ours is open, or a process of ours on this computer could launch one."""
        try:
            rows, owners = await self._books.rows(), await self._machines.store.owners()
        except LocalError:
            return bool(self._rows) or not self._read_once
        if rows:
            return True
        me, now = self._books.owner, self._clock.now()
        return any(
            owner.id != me.id
            and owner.host == me.host
            and not owner.command.endswith(f" {GUARD}")
            and self._machines.processes.lives(owner, now=now)
            for owner in owners.values()
        )

    async def once(self) -> None:
        """Look at everything once; what is to be ended is ended in tasks of their own."""
        self._watch_clock()
        await self._read()
        for machine in self._rows:
            if machine.id in self._ending:
                continue
            try:
                if why := await self._doomed(machine):
                    self._begin_end(machine, why)
            except RunComfyError as error:  # the next round looks again
                log.warning("guard_look_failed", extra={"fields": {"machine": machine.id, "error": error.code}})
        await self._resolve_launches()

    # -- knowing -------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            rows = await self._books.rows()
            owners = await self._machines.store.owners([row.owner_id for row in rows if row.owner_id is not None])
        except LocalError as error:
            if not self._blind:
                self._blind = True
                self._machines.tell(f"our books cannot be read ({error.code}); going by what was read last")
                log.error("guard_blind", extra={"fields": {"error": error.code, "machines": len(self._rows)}})
            return
        if self._blind:
            self._machines.tell("our books can be read again")
        self._blind, self._read_once = False, True
        self._rows, self._owners = rows, owners

    def _owner_lives(self, machine: Machine) -> bool:
        owner = self._owners.get(machine.owner_id) if machine.owner_id is not None else None
        return owner is not None and self._machines.processes.lives(owner, now=self._clock.now())

    def _watch_clock(self) -> None:
        """Notice that the computer has slept or its clock was set; after a while the wall clock is believed again."""
        loop = asyncio.get_running_loop()
        if abs(self._drift.apart()) < SLEPT:
            return
        if self._moved_at is None:
            self._moved_at = loop.time()
            log.warning("clock_moved", extra={"fields": {"seconds": round(self._drift.apart())}})
        elif loop.time() - self._moved_at >= RESETTLE.total_seconds():
            self._moved_at = None
            self._drift.jumped()

    def _now(self, *, owner_lives: bool) -> datetime:
        """Return the time by which a machine is judged (I21).

        Where the clocks differ, the lease of a living owner counts as over when both say so: it counts by the loop's
        time as well. What has no living owner is ended when one of them says so: a lease only gets shorter.
        """
        wall, steady = self._clock.now(), self._drift.steady_now()
        if abs((wall - steady).total_seconds()) < SLEPT:
            return wall
        return min(wall, steady) if owner_lives else max(wall, steady)

    # -- judging -------------------------------------------------------------------------------------------

    async def _doomed(self, machine: Machine) -> str:
        """Return why a machine is to be ended now; empty if it is not."""
        end = self._end_of(machine)
        if end is not None and end.at + self._grace <= self._now(owner_lives=self._owner_lives(machine)):
            return end.why
        if machine.state is MachineState.BOOTING and machine.server_id is not None and not self._owner_lives(machine):
            return await self._came_up_unseen(machine)
        return await self._idle_too_long(machine) if self._counts_idle(machine) else ""

    def _end_of(self, machine: Machine) -> End | None:
        lives = self._owner_lives(machine)
        boot = self._machines.settings.cloud.boot_timeout
        return end_of(machine, owner_lives=lives, boot_timeout=boot)

    async def _came_up_unseen(self, machine: Machine) -> str:
        """A machine whose owner died before it was Ready bills from Ready on, and nobody has written that down."""
        if machine.server_id is None:
            return ""
        report = await self._machines.provider.get_machine_status(machine.server_id)
        if report is None or report.ready_at is None:
            return ""
        try:
            seen = await self._machines.ready(machine, report)
        except LeaseLost:
            return ""  # somebody has it in hand now
        except LocalError:
            stops_at = report.stopping_at
            seen = replace(machine, ready_at=report.ready_at, planned_stop_at=stops_at, state=MachineState.READY)
        self._rows = [seen if row.id == machine.id else row for row in self._rows]
        end = self._end_of(seen)
        return end.why if end is not None and end.at + self._grace <= self._now(owner_lives=False) else ""

    def _counts_idle(self, machine: Machine) -> bool:
        """Whether it is a dev server that is up and belongs to nobody: the time it may be idle counts."""
        return (
            self._idle > timedelta(0)
            and not self._blind
            and machine.purpose in DEV_PURPOSES
            and machine.state is MachineState.READY
            and machine.owner_id is None
        )

    async def _idle_too_long(self, machine: Machine) -> str:
        since = max(filter(None, (machine.last_used_at, machine.ready_at)), default=self._clock.now())
        left = since + self._idle - self._now(owner_lives=False)
        if left > self._warning:
            return ""
        if await self._machines.living_uses(machine, monitors=True):
            return ""
        if await self._dev.computes(machine):  # a prompt that somebody has sent by hand
            await self._dev.used(machine)
            return ""
        if left <= timedelta(0):
            return f"nothing ran on it for {self._idle.total_seconds():.0f} s (CONJURE_IDLE_TIMEOUT)"
        if self._warned.get(machine.id) != since:
            self._warned[machine.id] = since
            self._machines.tell(
                f"WARNING: the dev server {machine.server_id} is idle and is ended in {left.total_seconds():.0f} s "
                "unless a job uses it or `comfyctl dev monitor` looks at it"
            )
            log.warning("dev_server_idle", extra={"fields": self._books.facts(machine)})
        return ""

    def _wait(self) -> timedelta:
        """Return how long to wait: a machine's end is met on time, between the rounds too."""
        waits = [self._period]
        for machine in self._rows:
            if machine.id in self._ending:
                continue
            now = self._now(owner_lives=self._owner_lives(machine))
            if (end := self._end_of(machine)) is not None:
                waits.append(end.at + self._grace - now)
            if self._counts_idle(machine):
                since = machine.last_used_at or machine.ready_at or now
                waits += [since + self._idle - now, since + self._idle - self._warning - now]
        ahead = [wait for wait in waits if wait > timedelta(0)]
        return min(ahead, default=self._period)

    # -- ending --------------------------------------------------------------------------------------------

    def _begin_end(self, machine: Machine, why: str) -> None:
        task = asyncio.create_task(self._end(machine, why), name=f"guard-{machine.id}")
        self._ending[machine.id] = task
        task.add_done_callback(lambda _: self._ending.pop(machine.id, None))

    async def _end(self, machine: Machine, why: str) -> None:
        try:
            taken = await self._taken(machine, why)
            if taken is None:
                return
            self._tell_once(taken, f"ending {taken.server_type} machine {taken.server_id}: {why}")
            log.warning("guard_ends", extra={"fields": {**self._books.facts(taken), "why": why}})
            if (billed_until := self._unwritten.get(taken.id)) is not None:
                note = "ended while our books could not be written"
                taken = await self._books.change(taken, note=note, stop_accepted_at=billed_until)
            if await self._machines.gone_unasked(taken, note=f"guard: {why}; it was gone already") is None:
                taken = await self._machines.stop(taken, reason=f"guard: {why}")
            self._tell_once(taken, f"machine {taken.server_id} is ended")
            await self._remember(taken)
        except RunComfyError as error:
            asyncio.get_running_loop().call_later(END_AGAIN, self._wake.set)
            self._tell_once(machine, f"{error.message}; {error.hint}")
            log.error("guard_end_failed", extra={"fields": {"machine": machine.id, "error": error.code}})

    def _tell_once(self, machine: Machine, sentence: str) -> None:
        """Say something of a machine the first time: what cannot be written down now is tried again every round."""
        if (machine.id, sentence) not in self._told:
            self._told.add((machine.id, sentence))
            self._machines.tell(sentence)

    async def _remember(self, ended: Machine) -> None:
        """Keep until when a machine billed, if our books do not have it: they are completed when they can be."""
        self._unwritten.pop(ended.id, None)
        until = ended.stop_accepted_at or ended.gone_at
        row: Machine | None = None
        with suppress(LocalError):
            row = await self._machines.store.machine(ended.id)
        if until is not None and (row is None or row.is_open):
            self._unwritten[ended.id] = until

    async def _taken(self, machine: Machine, why: str) -> Machine | None:
        """Become the owner of a machine that is still to be ended, as far as everybody can tell; None if it is not."""
        try:
            current = await self._machines.store.machine(machine.id)
        except LocalError:
            current = None  # what was read last has to do
        if current is not None:
            if not current.is_open or current.owner_id != machine.owner_id or current.epoch != machine.epoch:
                return None  # somebody has it in hand
            if current.ready_at is not None:
                machine = current
                end = self._end_of(machine)
                idle = self._counts_idle(machine) and "CONJURE_IDLE_TIMEOUT" in why
                now = self._now(owner_lives=self._owner_lives(machine))
                if not idle and (end is None or end.at + self._grace > now):
                    return None  # renewed meanwhile
        if "CONJURE_IDLE_TIMEOUT" not in why and await self._runs_longer(machine):
            return None
        try:
            taken = await self._books.try_take_over(machine, note=f"guard: {why}")
        except LocalError:
            return machine  # a stop needs no new durable state (I23)
        if taken is not None and await self._began_meanwhile(taken, why):
            return None
        return taken

    async def _began_meanwhile(self, taken: Machine, why: str) -> bool:
        """Whether a job took an idle dev server just now: it is given back then."""
        if "CONJURE_IDLE_TIMEOUT" not in why or not await self._machines.living_uses(taken, monitors=True):
            return False
        await self._books.hand_over(taken, kept_until=taken.kept_until, note="guard: it is used again")
        return True

    async def _runs_longer(self, machine: Machine) -> bool:
        """Whether the provider has a later stop than our books, and there is somebody whose wish that can be."""
        if machine.server_id is None or machine.state is MachineState.STOPPING:
            return False
        lives = self._owner_lives(machine)
        if not lives and machine.owner_id is not None:
            return False  # whatever its owner had asked for: it is dead
        report: MachineReport | None = None
        with suppress(ProviderError):
            report = await self._machines.provider.get_machine_status(machine.server_id, urgent=True)
        if report is None or report.phase is not Phase.READY or report.stopping_at is None:
            return False
        if report.stopping_at + self._grace <= self._now(owner_lives=lives):
            return False
        if not lives:  # the user let it run longer on the provider's page
            with suppress(LocalError, LeaseLost):
                await self._machines.confirmed(machine, report)
        return True

    async def _resolve_launches(self) -> None:
        """Find out what launches of dead processes started, as far as it can be known without waiting."""
        if self._blind or not any(
            row.state is MachineState.REQUESTED and not self._owner_lives(row) for row in self._rows
        ):
            return
        try:
            async with asyncio.timeout(self._period.total_seconds()):  # a living process may hold the launch lock
                await Reaper(self._machines).resolve_launches()
        except (RunComfyError, TimeoutError) as error:
            log.warning("guard_resolve_failed", extra={"fields": {"error": repr(error)}})
