"""
Every machine of the account with its state, its jobs, its money and its why: what a list of machines has to say.

Only looks: into our books, and at what the provider lists. Whoever shows it decides in which words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from runcomfy.application.monitors import looks_only
from runcomfy.application.reaper import Reaper, Verdict
from runcomfy.domain.durations import show_span
from runcomfy.domain.job import JobId
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import Machine, MachineId, MachineReport, MachineState, Phase
from runcomfy.domain.money import cost_of
from runcomfy.domain.work import Work

if TYPE_CHECKING:
    from runcomfy.application.machines import Machines


@dataclass(frozen=True, slots=True)
class Busy:
    """Who is at a machine."""

    uses: Sequence[Use] = ()
    works: Sequence[Work] = ()

    @property
    def jobs(self) -> Mapping[JobId, str]:
        """The jobs, each once, with its workflow where that is known."""
        found: dict[JobId, str] = {work.job_id: work.workflow for work in self.works if work.ended_at is None}
        for use in self.uses:
            if not looks_only(use):
                found.setdefault(JobId(use.job_id), "")
        return found

    @property
    def computes(self) -> bool:
        """Whether a prompt is being worked on there."""
        return any(work.computing_at and not work.computed_at and not work.ended_at for work in self.works)

    @property
    def monitored(self) -> bool:
        """Whether somebody looks at it."""
        return any(looks_only(use) for use in self.uses)


@dataclass(frozen=True, slots=True)
class MachineRow:
    """What there is to say of one machine at one moment."""

    machine: Machine | None
    """As our books have it; None: they do not."""
    report: MachineReport | None
    """As the provider lists it; None: it does not."""
    busy: Busy
    why: str
    ends: bool
    """Whether a reaper would end it."""
    ours: bool | None
    """None: our books cannot be read."""
    now: datetime

    @property
    def jobs(self) -> Mapping[JobId, str]:
        """Jobs at it, with their workflows. A job of a dead process is on no machine, whatever its row says."""
        return {} if self.ends else self.busy.jobs

    @property
    def shown(self) -> str:
        """Its state for people: what it does, and since when it does nothing."""
        machine = self.machine
        if machine is None:
            return self.report.status if self.report is not None else ""
        if machine.state is not MachineState.READY:
            return f"{machine.state} {show_span(self.now - machine.since)}"
        if machine.draining:
            return f"draining: {machine.draining}"
        if self.jobs:
            return "computing" if self.busy.computes else "busy"
        since = max(filter(None, (machine.last_used_at, machine.ready_at)), default=self.now)
        return f"idle {show_span(self.now - since)}" + (", monitored" if self.busy.monitored else "")

    @property
    def spent(self) -> Decimal | None:
        """What it has cost so far, in USD; None: not in our books."""
        return None if self.machine is None else cost_of(self.machine, now=self.now)

    @property
    def stops_at(self) -> datetime | None:
        """When it ends by itself."""
        told = self.report.stopping_at if self.report is not None else None
        return told or (self.machine.planned_stop_at if self.machine is not None else None)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as `comfyctl machines ls --json` prints it."""
        machine, report = self.machine, self.report
        return {
            "server_id": (report.server_id if report else None)
            or (machine.server_id if machine else None)
            or "(not answered yet)",
            "machine_id": machine.id if machine else None,
            "type": machine.server_type if machine else (report.server_type if report else None) or "?",
            "status": report.status if report else "not listed",
            "ours": self.ours,
            "state": str(machine.state) if machine else "",
            "shown": self.shown,
            "jobs": [f"{job[:8]} {workflow}".strip() for job, workflow in self.jobs.items()],
            "monitored": self.busy.monitored,
            "draining": machine.draining if machine else "",
            "purpose": str(machine.purpose) if machine else "",
            "why": self.why + ("; `comfyctl machines reap` would end it" if self.ends else ""),
            "usd_per_hour": str(machine.usd_per_hour) if machine else None,
            "spent_usd": None if self.spent is None else format(self.spent, "f"),
            "stops_at": self.stops_at,
            "reason": machine.reason if machine else "",
        }


async def machine_rows(cloud: Machines, listed: Sequence[MachineReport], *, has_books: bool = True) -> list[MachineRow]:
    """Return a row for each machine that our books have open or the account lists. Raises LocalError."""
    now = cloud.clock.now()
    reports = {report.server_id: report for report in listed}
    verdicts = await Reaper(cloud).verdicts(listed)
    busy = await _busy(cloud, [verdict.machine.id for verdict in verdicts])

    def row(verdict: Verdict, at_it: Busy) -> MachineRow:
        machine = verdict.machine
        report = reports.get(machine.server_id) if machine.server_id is not None else None
        return MachineRow(machine, report, at_it, verdict.why, verdict.end, ours=True, now=now)

    rows = [row(verdict, busy.get(verdict.machine.id, Busy())) for verdict in verdicts]
    shown = {verdict.machine.server_id for verdict in verdicts}
    others = {server_id: report for server_id, report in reports.items() if server_id not in shown}
    # Every machine there ever was is read only where one of them may be meant: pages ask every other second.
    every = await cloud.books.rows(open_only=False) if others else ()
    closed = {each.server_id: each for each in every if not each.is_open}
    for server_id, report in others.items():
        if server_id in closed:
            rows.append(row(_ended(closed[server_id], report), Busy()))
        else:
            why = "not in our books: never touched; `comfyctl machines adopt ID` takes it over"
            if not has_books:
                why = "our books cannot be read; `comfyctl machines stop ID` stops it all the same"
            ours = False if has_books else None
            rows.append(MachineRow(None, report, Busy(), why, ends=False, ours=ours, now=now))
    return rows


async def _busy(cloud: Machines, ids: Sequence[MachineId]) -> Mapping[MachineId, Busy]:
    """Return who is at each of the machines; a job whose process died is not."""
    if not ids:
        return {}
    now = cloud.clock.now()
    uses = await cloud.store.uses(ids)
    users = await cloud.store.owners({use.owner_id for use in uses})
    living = [u for u in uses if u.owner_id in users and cloud.processes.lives(users[u.owner_id], now=now)]
    works = [work for work in await cloud.store.works(machine_ids=ids) if work.ended_at is None]
    return {
        machine_id: Busy(
            [use for use in living if use.machine_id == machine_id],
            [work for work in works if work.machine_id == machine_id],
        )
        for machine_id in ids
    }


def _ended(machine: Machine, report: MachineReport) -> Verdict:
    """Return what is to be said of a machine that our books have ended and the account still lists."""
    back = report.phase in (Phase.READY, Phase.STARTING)
    return Verdict(machine, end=back, why="it was gone and runs again" if back else "ended; not yet off the list")
