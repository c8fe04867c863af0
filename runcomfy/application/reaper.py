"""
Ending what is ours, bills, and has nobody any more (I7).

A machine is ended only if it is in our books, its owner's process is dead, no living job uses it, and it is not a dev
server within the time it was meant to live; and only after two full lists of the provider. Machines that are not in our
books are counted and never touched. Launches of dead processes that were never answered are looked for and resolved.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runcomfy.application.machines import Machines
from runcomfy.domain.exceptions import LaunchAmbiguous, RunComfyError
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import (
    Machine,
    MachineEvent,
    MachineReport,
    MachineState,
    OwnerId,
    Phase,
    Purpose,
    ServerId,
)

log = logging.getLogger("runcomfy.reaper")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of one machine of our books, and why."""

    machine: Machine
    end: bool
    why: str


@dataclass(slots=True)
class Reaped:
    """What a reap did."""

    ended: list[Machine] = field(default_factory=list)
    closed: list[Machine] = field(default_factory=list)
    """Already gone at the provider; only our books were behind."""
    kept: list[Verdict] = field(default_factory=list)
    unresolved: list[Machine] = field(default_factory=list)
    """Launches of dead processes of which it is not yet known whether they started a machine."""
    foreign: list[MachineReport] = field(default_factory=list)
    failed: list[tuple[Machine, RunComfyError]] = field(default_factory=list)


def judge(
    machine: Machine, *, owner_lives: bool, owner_pid: int | None, living_use: Use | None, dev_time_left: bool
) -> Verdict:
    """Decide whether a machine of ours has anybody left. Pure, so that the rule can be read and tested alone."""
    if owner_lives:
        return Verdict(machine, end=False, why=f"process {owner_pid} holds it")
    if living_use is not None:
        return Verdict(machine, end=False, why=f"job {living_use.job_id} runs on it")
    if machine.state is MachineState.STOPPING:
        return Verdict(machine, end=True, why="its stop was asked for and never seen through")
    if dev_time_left and machine.state is not MachineState.REQUESTED:
        return Verdict(machine, end=False, why=f"kept until {machine.kept_until:%Y-%m-%d %H:%M:%S} UTC")
    if machine.kept_until is not None:
        return Verdict(machine, end=True, why="it outlived the time it was to be kept")
    return Verdict(machine, end=True, why="the process that rented it is gone")


class Reaper:
    """Looks at everything the account runs and everything our books say, and repairs the difference."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._store = machines.store
        self._clock = machines.clock

    async def verdicts(self) -> list[Verdict]:
        """Return what would become of every open machine of our books. Changes nothing."""
        rows = await self._machines.books.rows()
        owners = await self._store.owners([row.owner_id for row in rows if row.owner_id is not None])
        uses = await self._store.uses([row.id for row in rows])
        users = await self._store.owners({use.owner_id for use in uses})
        return [self._verdict(row, owners, uses, users) for row in rows]

    def _verdict(
        self, row: Machine, owners: Mapping[OwnerId, Owner], uses: Sequence[Use], users: Mapping[OwnerId, Owner]
    ) -> Verdict:
        now = self._clock.now()
        owner = owners.get(row.owner_id) if row.owner_id is not None else None
        living = [
            use
            for use in uses
            if use.machine_id == row.id
            and (user := users.get(use.owner_id)) is not None
            and self._machines.processes.lives(user, now=now)
        ]
        return judge(
            row,
            owner_lives=owner is not None and self._machines.processes.lives(owner, now=now),
            owner_pid=owner.pid if owner else None,
            living_use=living[0] if living else None,
            dev_time_left=(
                row.purpose in (Purpose.DEV, Purpose.TAKEN) and row.kept_until is not None and row.kept_until > now
            ),
        )

    async def reap(self, *, wait: bool = True) -> Reaped:
        """Repair the books and end what has nobody; return what was done.

        `wait=False` does not wait for unanswered launches to become visible; they are reported as unresolved.
        Raises ProviderError if the account's machines cannot be listed: nothing is decided then.
        """
        report = Reaped()
        first = await self._machines.provider.list_machines()
        await self._see_revenants(first)
        verdicts = await self.verdicts()
        report.kept = [v for v in verdicts if not v.end]
        doomed = [v for v in verdicts if v.end]
        for verdict in [v for v in doomed if v.machine.state is MachineState.REQUESTED]:
            found = await self._resolve(verdict.machine, report, wait=wait)
            if found is not None:
                doomed.append(Verdict(found, end=True, why="its launch was never answered"))
        doomed = [v for v in doomed if v.machine.server_id is not None]
        gone_unasked = await self._kept_but_gone(report.kept, first)
        if doomed or gone_unasked:
            await asyncio.sleep(min(1.0, self._machines.settings.cloud.poll_interval.total_seconds()))
            await self._machines.provider.list_machines()  # the second full list; a failure ends the reap here
        await asyncio.gather(*(self._end(verdict, report) for verdict in doomed))
        for machine in gone_unasked:
            if (closed := await self._machines.gone_unasked(machine, note="not listed any more")) is not None:
                report.closed.append(closed)
                report.kept = [v for v in report.kept if v.machine.id != machine.id]
        ours = {row.server_id for row in await self._machines.books.rows(open_only=False)}
        report.foreign = [r for r in first if r.server_id not in ours and r.phase is not Phase.GONE]
        return report

    async def _see_revenants(self, listed: Sequence[MachineReport]) -> None:
        """A machine whose books were closed and that is listed again is open again, and will be ended."""
        alive = {r.server_id for r in listed if r.phase in (Phase.READY, Phase.STARTING)}
        for row in await self._machines.books.rows(open_only=False):
            if row.state in (MachineState.STOPPED, MachineState.NEVER) and row.server_id in alive:
                log.error("machine_came_back", extra={"fields": self._machines.books.facts(row)})
                await self._machines.books.record(row, MachineEvent.LISTED, note="listed again after its end")

    async def _kept_but_gone(self, kept: Sequence[Verdict], listed: Sequence[MachineReport]) -> list[Machine]:
        """Machines that nobody here is working with, are to be kept, and are not in the provider's list any more."""
        there: set[ServerId] = {r.server_id for r in listed if r.phase is not Phase.GONE}
        return [
            v.machine
            for v in kept
            if v.machine.owner_id is None and v.machine.server_id is not None and v.machine.server_id not in there
        ]

    async def _resolve(self, machine: Machine, report: Reaped, *, wait: bool) -> Machine | None:
        async with self._machines.launch_lock():
            current = await self._store.machine(machine.id)
            if current is None or current.state is not MachineState.REQUESTED:
                return None
            taken = await self._machines.books.try_take_over(current, note="reaped: its process is gone")
            if taken is None:
                return None
            if wait:
                self._machines.tell(
                    f"a launch of {taken.requested_at:%H:%M:%S} UTC was never answered; looking for what it started"
                )
            try:
                found = await self._machines.find_launched(taken, wait=wait)
            except LaunchAmbiguous as error:
                report.failed.append((taken, error))
                return None
        if found is None:
            after = await self._store.machine(taken.id)
            if after is not None and after.state is MachineState.REQUESTED:
                report.unresolved.append(after)
            else:
                report.closed.append(after or taken)
        return found

    async def _end(self, verdict: Verdict, report: Reaped) -> None:
        machine = verdict.machine
        if machine.owner_id != self._machines.books.owner.id:
            taken = await self._machines.books.try_take_over(machine, note=f"reaped: {verdict.why}")
            if taken is None:
                return
            machine = taken
        self._machines.tell(f"ending {machine.server_type} machine {machine.server_id}: {verdict.why}")
        try:
            report.ended.append(await self._machines.stop(machine, reason=f"reaped: {verdict.why}"))
        except RunComfyError as error:
            report.failed.append((machine, error))
