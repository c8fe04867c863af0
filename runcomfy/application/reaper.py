"""
Ending what is ours, bills, and has nobody any more (I7).

A machine is ended only if it is in our books, its owner's process is dead, no living job uses it, and it is not a dev
server within the time it was meant to live; and only after two full lists of the provider. Machines that are not in our
books are counted and never touched. Launches that were never answered are looked for and resolved: those of dead
processes, and those of this one that could not be looked for when they were sent.

What belongs to a live job is spared: where the prompt of a queued job that has not ended may still run, whoever claims
the job next goes on with it, and takes the machine over. It is spared to the end of its lease, which nobody renews.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from runcomfy.application.finish import finish
from runcomfy.application.machines import Machines
from runcomfy.application.monitors import looks_only
from runcomfy.domain.exceptions import LaunchAmbiguous, LaunchUnclear, LeaseLost, RunComfyError
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import (
    IllegalTransition,
    Machine,
    MachineEvent,
    MachineReport,
    MachineState,
    OwnerId,
    Phase,
    Purpose,
    ServerId,
)
from runcomfy.domain.place_key import machine_key

log = logging.getLogger("runcomfy.reaper")

EXECUTORS: Final = "executor: "
"""Beginning of the reason for which a machine was launched by an executor of the queue; another one may take it over.
"""


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
    billed: list[Machine] = field(default_factory=list)
    """Whose ledger did not reach the end of its bill, and does now."""


def judge(
    machine: Machine,
    *,
    owner_lives: bool,
    owner_pid: int | None,
    living_use: Use | None,
    dev_time_left: bool,
    spared: str = "",
) -> Verdict:
    """Decide whether a machine of ours has anybody left. Pure, so that the rule can be read and tested alone.

    `spared`: why a prompt may still run there that somebody goes on with; empty if none can.
    """
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
    if spared:
        return Verdict(machine, end=False, why=spared)
    return Verdict(machine, end=True, why="the process that rented it is gone")


def is_queues(machine: Machine) -> bool:
    """Whether a machine was rented for the jobs of a queue."""
    return machine.purpose is Purpose.POOL or machine.reason.startswith(EXECUTORS)


def lease_ends(machine: Machine) -> datetime | None:
    """Return until when a machine is paid for sure; None while it is not ready, since that starts the count."""
    if machine.ready_at is None:
        return None
    return max(machine.ready_at + machine.duration, machine.planned_stop_at or machine.ready_at)


def _may_be_spared(verdict: Verdict, now: datetime) -> bool:
    """Whether a machine that is to be ended is one where a prompt may run, and is paid for a while."""
    machine = verdict.machine
    if not verdict.end or machine.purpose not in (Purpose.RUN, Purpose.POOL) or machine.server_id is None:
        return False
    if machine.state not in (MachineState.BOOTING, MachineState.READY, MachineState.LOST):
        return False
    ends = lease_ends(machine)
    return ends is not None and ends > now


class Reaper:
    """Looks at everything the account runs and everything our books say, and repairs the difference."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._store = machines.store
        self._clock = machines.clock

    async def verdicts(self, listed: Sequence[MachineReport] = ()) -> list[Verdict]:
        """Return what would become of every open machine of our books, given the provider's list. Changes nothing."""
        stops = {report.server_id: report.stopping_at for report in listed}
        rows = await self._machines.books.rows()
        owners = await self._store.owners([row.owner_id for row in rows if row.owner_id is not None])
        uses = [use for use in await self._store.uses([row.id for row in rows]) if not looks_only(use)]
        users = await self._store.owners({use.owner_id for use in uses})
        found = [
            self._verdict(row, owners, uses, users, stops.get(row.server_id) if row.server_id else None) for row in rows
        ]
        if not any(_may_be_spared(verdict, self._clock.now()) for verdict in found):
            return found
        prompts = await self._machines.prompt_places()  # a question to another database: asked where it matters
        return [self._spared(verdict, prompts) for verdict in found]

    def _spared(self, verdict: Verdict, prompts: Collection[str] | None) -> Verdict:
        machine = verdict.machine
        if not _may_be_spared(verdict, self._clock.now()):
            return verdict
        why = ""
        if prompts is not None and machine_key(machine.id) in prompts:
            why = "the prompt of a queued job may still run there; it is kept to the end of its lease"
        elif prompts is None and is_queues(machine):
            why = "the queue cannot be read, whose prompt may run there; it is kept to the end of its lease"
        return judge(machine, owner_lives=False, owner_pid=None, living_use=None, dev_time_left=False, spared=why)

    def _verdict(
        self,
        row: Machine,
        owners: Mapping[OwnerId, Owner],
        uses: Sequence[Use],
        users: Mapping[OwnerId, Owner],
        stops_at: datetime | None,
    ) -> Verdict:
        now = self._clock.now()
        if row.kept_until is not None and stops_at is not None and stops_at > row.kept_until:
            row = replace(row, kept_until=stops_at)  # the user let it run longer on the provider's page
        owner = owners.get(row.owner_id) if row.owner_id is not None else None
        living = [
            use
            for use in uses
            if use.machine_id == row.id
            and (user := users.get(use.owner_id)) is not None
            and self._machines.processes.lives(user, now=now)
        ]
        lives = owner is not None and self._machines.processes.lives(owner, now=now)
        return judge(
            row,
            owner_lives=lives and not self._machines.has_given_up(row),
            owner_pid=owner.pid if owner else None,
            living_use=living[0] if living else None,
            dev_time_left=(
                row.purpose in (Purpose.DEV, Purpose.TAKEN) and row.kept_until is not None and row.kept_until > now
            ),
        )

    async def reap(
        self,
        *,
        wait: bool = True,
        spare: Callable[[Machine], bool] | None = None,
        spare_unheard: bool = False,
        on_ending: Callable[[], None] = lambda: None,
    ) -> Reaped:
        """Repair the books and end what has nobody; return what was done.

        `wait=False` does not wait for unanswered launches to become visible; they are reported as unresolved.
        Machines that `spare` says yes to are kept: the caller is about to take them over; with `spare_unheard` also
        those that unanswered launches turn out to have started. `on_ending` is called when
        everything is decided and only stops are left, which take as long as the provider needs.

        Raises ProviderError if the account's machines cannot be listed: nothing is decided then.
        """
        report = Reaped()
        report.billed = await self._machines.books.close_bills()
        asked_at = self._clock.now()
        first = await self._machines.provider.list_machines()
        doomed = await self._revenants(first, asked_at)
        back = {v.machine.id for v in doomed}
        for verdict in await self.verdicts(first):
            if verdict.machine.id in back:
                continue
            if not verdict.end:
                report.kept.append(verdict)
            elif verdict.machine.state is not MachineState.REQUESTED:
                if spare is not None and spare(verdict.machine):
                    report.kept.append(Verdict(verdict.machine, end=False, why="about to be taken over"))
                else:
                    doomed.append(verdict)
            elif (found := await self._resolve(verdict.machine, report, wait=wait)) is not None:
                if spare is not None and spare_unheard and spare(found):
                    report.kept.append(Verdict(found, end=False, why="about to be taken over"))
                else:
                    doomed.append(Verdict(found, end=True, why="its launch was never answered"))
        missing = self._kept_but_missing(report.kept, first)
        if doomed or missing:
            await asyncio.sleep(min(1.0, self._machines.settings.cloud.poll_interval.total_seconds()))
            await self._machines.provider.list_machines()  # the second full list; a failure ends the reap here
        on_ending()
        # What has begun to be stopped is stopped to its end, whatever the user presses meanwhile.
        await finish(self._end_all(doomed, report))
        for machine in missing:
            if (closed := await self._machines.gone_unasked(machine, note="not listed any more")) is not None:
                report.closed.append(closed)
                report.kept = [v for v in report.kept if v.machine.id != machine.id]
        listed = [machine.server_id for machine in first]
        ours = {row.server_id for row in await self._machines.books.rows(open_only=False, server_ids=listed)}
        report.foreign = [r for r in first if r.server_id not in ours and r.phase is not Phase.GONE]
        return report

    async def resolve_launches(self) -> Reaped:
        """Find out what the unanswered launches of dead processes started, without waiting; end nothing.

        What is found is in our books as booting from then on, and is ended like any other machine of a dead process.
        """
        report = Reaped()
        for verdict in await self.verdicts():
            if verdict.end and verdict.machine.state is MachineState.REQUESTED:
                await self._resolve(verdict.machine, report, wait=False)
        return report

    async def _revenants(self, listed: Sequence[MachineReport], asked_at: datetime) -> list[Verdict]:
        """Open the books again of machines that were seen gone and are listed as running; they are to be ended.

        What was seen gone since the list was asked for proves nothing: the list may be the older word.
        """
        alive = {r.server_id for r in listed if r.phase in (Phase.READY, Phase.STARTING)}
        rows = await self._machines.books.rows(open_only=False, server_ids=alive)
        held = {row.server_id for row in rows if row.is_open}
        newest = {row.server_id: row for row in rows if row.state is MachineState.STOPPED}
        found = []
        for server_id in alive & newest.keys() - held:
            row = newest[server_id]
            if row.gone_at is not None and row.gone_at >= asked_at:
                continue
            log.error("machine_came_back", extra={"fields": self._machines.books.facts(row)})
            try:
                row = await self._machines.books.record(row, MachineEvent.LISTED, note="listed again after its end")
            except (LeaseLost, IllegalTransition):
                continue  # another process saw it at the same time
            found.append(Verdict(row, end=True, why="it was gone and runs again"))
        return found

    @staticmethod
    def _kept_but_missing(kept: Sequence[Verdict], listed: Sequence[MachineReport]) -> list[Machine]:
        """Machines that nobody here is working with, are to be kept, and are not in the provider's list any more."""
        there: set[ServerId] = {r.server_id for r in listed if r.phase is not Phase.GONE}
        return [
            v.machine
            for v in kept
            if v.machine.owner_id is None and v.machine.server_id is not None and v.machine.server_id not in there
        ]

    async def _resolve(self, machine: Machine, report: Reaped, *, wait: bool) -> Machine | None:
        """Find out what a launch of a dead process started; return the machine if there is one to be ended."""
        async with self._machines.launch_lock():
            current = await self._store.machine(machine.id)
            if current is None or current.state is not MachineState.REQUESTED:
                return None  # somebody else found out while we waited for the lock
            owner = (await self._store.owners([current.owner_id])).get(current.owner_id) if current.owner_id else None
            if current.owner_id != self._machines.books.owner.id:  # of our own we know when they left
                self._machines.books.presume_asked(current, owner)
            if wait:
                self._machines.tell(
                    f"a launch of {current.requested_at:%H:%M:%S} UTC was never answered; looking for what it started"
                )
            try:
                found = await self._machines.find_launched(current, wait=wait)
            except (LaunchAmbiguous, LaunchUnclear) as error:
                report.failed.append((current, error))
                return None
        if found is None:
            after = await self._store.machine(current.id)
            unresolved = after is not None and after.state is MachineState.REQUESTED
            (report.unresolved if unresolved else report.closed).append(after or current)
        return found

    async def _end_all(self, doomed: Sequence[Verdict], report: Reaped) -> None:
        await asyncio.gather(*(self._end(verdict, report) for verdict in doomed))

    async def _end(self, verdict: Verdict, report: Reaped) -> None:
        machine = verdict.machine
        try:
            if machine.owner_id != self._machines.books.owner.id:
                taken = await self._machines.books.try_take_over(machine, note=f"reaped: {verdict.why}")
                if taken is None:
                    return
                machine = taken
            if uses := await self._machines.living_uses(machine):  # begun since it was judged
                why = f"job {uses[0].job_id} runs on it"
                await self._machines.books.hand_over(machine, kept_until=machine.kept_until, note=why)
                report.kept.append(Verdict(machine, end=False, why=why))
                return
            self._machines.tell(f"ending {machine.server_type} machine {machine.server_id}: {verdict.why}")
            report.ended.append(await self._machines.stop(machine, reason=f"reaped: {verdict.why}"))
        except RunComfyError as error:
            report.failed.append((machine, error))
