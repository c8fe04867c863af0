"""
Caps on what is spent, and what counts against them.

Committed spend is what was billed so far, what every living lease may still bill, and what every open launch intent
may: a machine that is paid ahead for ten minutes has spent them already as far as a budget is concerned (I6). So a cap
holds even if every process of ours dies now. Stores call `refusal` in the transaction that writes an intent or asks for
more time, so that two processes cannot both pass the last dollar.

Windows are calendar hours, days and months in UTC. A lease that reaches into the next window counts there, too. A
machine that is not ready yet may become so at any moment; in each window it counts with the most it can cost there, so
that what was allowed once stays within the cap whenever it starts. What no check can hold back is a provider that
bills beyond a lease, or brings back a machine that it said was gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Final, NamedTuple

from runcomfy.domain.exceptions import BudgetExceeded
from runcomfy.domain.machine import Machine, MachineId, MachineState
from runcomfy.domain.money import billed_interval, meter, show_usd
from runcomfy.domain.work import Work

SOFT_FRACTION: Final = Decimal("0.8")
"""Where a budget alerts if nobody said where."""
STARTS_WITHIN: Final = timedelta(hours=1)
"""How long after its intent a machine may still become ready: longer than a start is waited for."""
_MOST_WINDOWS: Final = 24 * 32
"""Windows looked at for one lease: hours of a month."""
_NOTHING: Final = timedelta(0)
_MICROSECOND: Final = timedelta(microseconds=1)


class Period(StrEnum):
    """Over what a budget is counted."""

    RUN = "run"
    """One command's doing: what `run_id` names."""
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class Window:
    """An interval in which spend is summed. `end` None: it never resets."""

    start: datetime | None
    end: datetime | None


@dataclass(frozen=True, slots=True)
class Budget:
    """A cap in USD on committed spend. `hard` refuses, `soft` alerts; either may be missing."""

    period: Period
    hard: Decimal | None = None
    soft: Decimal | None = None
    project: str | None = None
    """Counts only what is spent on this project's jobs; `*`: every project by itself."""
    user: str | None = None
    """Counts only what is spent on this user's jobs; `*`: every user by themselves."""

    @property
    def alerts_at(self) -> Decimal | None:
        """From what on the user is told, in USD."""
        return self.soft if self.soft is not None or self.hard is None else self.hard * SOFT_FRACTION

    @property
    def name(self) -> str:
        """What it is called in sentences, for example `day` or `day of user ann`."""
        whose = f" of project {self.project}" if self.project else ""
        return f"{self.period}{whose}{f' of user {self.user}' if self.user else ''}"

    def window(self, at: datetime) -> Window:
        """Return the window that `at` (aware, UTC) is in."""
        match self.period:
            case Period.RUN:
                return Window(None, None)
            case Period.HOUR:
                start = at.replace(minute=0, second=0, microsecond=0)
                return Window(start, start + timedelta(hours=1))
            case Period.DAY:
                start = at.replace(hour=0, minute=0, second=0, microsecond=0)
                return Window(start, start + timedelta(days=1))
            case Period.MONTH:
                start = at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
                return Window(start, (start + timedelta(days=32)).replace(day=1))

    def windows(self, now: datetime, until: datetime) -> Iterator[Window]:
        """Yield the windows from the one of `now` to the one of `until`."""
        window = self.window(now)
        for _ in range(_MOST_WINDOWS):
            yield window
            if window.end is None or window.end >= until:
                return
            window = self.window(window.end)


@dataclass(frozen=True, slots=True)
class BudgetState:
    """How one budget stands in one window."""

    budget: Budget
    window: Window
    committed: Decimal
    """USD."""

    @property
    def left(self) -> Decimal | None:
        """What may still be committed, in USD; None without a hard cap."""
        return None if self.budget.hard is None else max(Decimal(0), self.budget.hard - self.committed)


class Charge(NamedTuple):
    """What one machine has cost and may still cost if nobody does anything any more."""

    machine_id: MachineId
    usd_per_hour: Decimal
    run_id: str
    for_project: str
    for_user: str
    start: datetime
    end: datetime
    begun: bool = True
    """False: it is not ready, and may be billed for as long as from `start` to `end` at any time after `start`."""

    def within(self, window: Window) -> timedelta:
        """Return how long it is, or at most may be, billed in a window."""
        start = self.start if window.start is None else max(self.start, window.start)
        if not self.begun:
            lease = self.end - self.start
            return lease if window.end is None else max(_NOTHING, min(lease, window.end - start))
        end = self.end if window.end is None else min(self.end, window.end)
        return max(_NOTHING, end - start)


Busy = Mapping[MachineId, Mapping[tuple[str, str], timedelta]]
"""How long machines computed, by project and user of the jobs."""

Stint = tuple[MachineId, str, str, datetime, datetime | None]
"""One job's computing: machine, project, user, from when to when (None: nobody wrote down that it ended)."""


def charge_of(machine: Machine, *, now: datetime) -> Charge | None:
    """Return what a machine may cost, None if it never will."""
    interval = billed_interval(machine, now=now)
    if machine.is_open and machine.stop_accepted_at is None:
        # Also one that was asked to stop: without a yes its lease may be billed to the end.
        lease = max(machine.duration, machine.asked_duration or _NOTHING, _NOTHING)
        if machine.ready_at is None:
            interval = now, now + lease
        else:
            interval = machine.ready_at, max(now, machine.planned_stop_at or now, machine.ready_at + lease)
    if interval is None or machine.state is MachineState.NEVER:
        return None
    whose = (machine.run_id, machine.for_project, machine.for_user)
    begun = machine.ready_at is not None
    return Charge(machine.id, machine.usd_per_hour, *whose, *interval, begun=begun)


def stints_of(works: Iterable[Work]) -> Iterator[Stint]:
    """Yield the computing of jobs that got so far."""
    for work in works:
        if work.computing_at is not None:
            done = work.computed_at or work.ended_at
            yield work.machine_id, work.project, work.user, work.computing_at, done


def busy_of(stints: Iterable[Stint], charges: Iterable[Charge], *, now: datetime) -> Busy:
    """Return how long machines computed, and for whom.

    A job whose process died is taken to have computed until its machine was gone, and not for ever.
    """
    ends = {charge.machine_id: min(now, charge.end) for charge in charges}
    busy: dict[MachineId, dict[tuple[str, str], timedelta]] = {}
    for machine_id, project, user, start, done in stints:
        if (end := ends.get(machine_id)) is None:
            continue
        if done is not None and done < end:
            end = done
        if end > start:
            by_whom = busy.setdefault(machine_id, {})
            by_whom[project, user] = by_whom.get((project, user), _NOTHING) + (end - start)
    return busy


def committed(budget: Budget, window: Window, charges: Iterable[Charge], busy: Busy, *, run_id: str = "") -> Decimal:
    """Return the committed spend in USD that counts against a budget in a window.

    Of a machine that served several users or projects, each counts by the share of its busy seconds; one that has not
    served anybody yet counts for whom it was launched. A budget per run counts what has this `run_id`, and nothing if
    that is empty.
    """
    per_run = budget.period is Period.RUN
    total = Decimal(0)
    for charge in charges:
        if per_run and not (run_id and charge.run_id == run_id):
            continue
        if billed := charge.within(window):
            total += _price(charge, billed) * _fraction(budget, charge, busy)
    return total


def _price(charge: Charge, billed: timedelta) -> Decimal:
    return meter(charge.start, charge.start + billed, charge.usd_per_hour)


def _fraction(budget: Budget, charge: Charge, busy: Busy) -> Decimal:
    """Return which part of a machine's spend counts against a budget."""
    if budget.project is None and budget.user is None:
        return Decimal(1)
    by_whom = busy.get(charge.machine_id)
    if not by_whom:
        return Decimal(int(_counts(budget, charge.for_project, charge.for_user)))
    whole = sum(by_whom.values(), _NOTHING)
    part = sum((time for whose, time in by_whom.items() if _counts(budget, *whose)), _NOTHING)
    return Decimal(1) if part == whole else Decimal(part // _MICROSECOND) / Decimal(whole // _MICROSECOND)


def _counts(budget: Budget, project: str, user: str) -> bool:
    return budget.project in (None, project) and budget.user in (None, user)


def made_out(budgets: Collection[Budget], *, project: str, user: str) -> list[Budget]:
    """Return the budgets that a job of this project and user counts against, with `*` put as who it is.

    A budget that names somebody wins over `*` of the same period.
    """
    named = {(b.period, b.project, b.user) for b in budgets if "*" not in (b.project, b.user)}
    found = []
    for budget in budgets:
        if not (_meant(budget.project, project) and _meant(budget.user, user)):
            continue
        whose = _one(budget.project, project), _one(budget.user, user)
        if "*" not in (budget.project, budget.user) or (budget.period, *whose) not in named:
            found.append(replace(budget, project=whose[0], user=whose[1]))
    return found


def _one(wanted: str | None, given: str) -> str | None:
    return given if wanted == "*" else wanted


def _meant(wanted: str | None, given: str) -> bool:
    return wanted is None or (bool(given) and wanted in ("*", given))


def refusal(
    budgets: Collection[Budget], charges: Collection[Charge], busy: Busy, candidate: Machine, *, now: datetime
) -> tuple[BudgetExceeded | None, list[BudgetState]]:
    """Return what a hard cap says against `candidate`, and how budgets would stand with it.

    `charges` are of all machines of the account that may bill in any window concerned, the candidate's own older row
    among them if there is one: what it adds to that is what is asked for. `budgets` are made out (`made_out`). The
    states are those of the windows of `now`, and of each later one to which the candidate adds something.
    """
    run_id, own = candidate.run_id, charge_of(candidate, now=now)
    new = [] if own is None else [own]
    old = [charge for charge in charges if charge.machine_id == candidate.id]
    others = [charge for charge in charges if charge.machine_id != candidate.id]
    ahead = [charge for charge in others if charge.end > now]
    until = now if own is None else own.end + (_NOTHING if own.begun else STARTS_WITHIN)
    states: list[BudgetState] = []
    for budget in budgets:
        for number, window in enumerate(budget.windows(now, until)):
            before = _alone(budget, window, old, busy, run_id=run_id)
            after = _alone(budget, window, new, busy, run_id=run_id)
            if number and after <= before:
                continue
            rest = committed(budget, window, ahead if number else others, busy, run_id=run_id)
            states.append(BudgetState(budget, window, rest + after))
            if budget.hard is not None and rest + after > budget.hard and after > before:
                state = BudgetState(budget, window, rest + before)
                lease_of = "" if old else candidate.server_type
                return exceeded(state, wanted=after - before, lease_of=lease_of), states
    return None, states


def _alone(budget: Budget, window: Window, charges: Collection[Charge], busy: Busy, *, run_id: str) -> Decimal:
    """Return what a machine counts by itself; one without a run is a run of its own."""
    if budget.period is Period.RUN and not run_id:
        charges = [charge._replace(run_id="-") for charge in charges]
    return committed(budget, window, charges, busy, run_id=run_id or "-")


def exceeded(state: BudgetState, *, wanted: Decimal, lease_of: str = "") -> BudgetExceeded:
    """Return the error that says which cap is reached, with the figures and when it resets.

    `lease_of`: the machine type of which `wanted` pays the first lease, if it does: a cap that is smaller than that
    lets nobody begin, ever, and that is said then.
    """
    budget, resets = state.budget, state.window.end
    cap = budget.hard or Decimal(0)
    details = {
        "budget": budget.name,
        "cap_usd": str(budget.hard),
        "committed_usd": format(state.committed, "f"),
        "wanted_usd": format(wanted, "f"),
        "resets_at": resets.isoformat() if resets is not None else None,
    }
    if lease_of and wanted > cap:
        return BudgetExceeded(
            f"the budget per {budget.name} is {show_usd(cap)}: one lease of a {lease_of} machine costs "
            f"{show_usd(wanted)}, more than the budget",
            hint="raise the budget (`comfyctl costs budgets` shows all), choose a cheaper machine type, or a shorter "
            "lease (RUNCOMFY_RUN_LEASE); waiting until it resets does not help",
            details={**details, "lease_usd": format(wanted, "f")},
        )
    when = f"it resets at {resets:%Y-%m-%d %H:%M} UTC" if resets is not None else "it does not reset"
    return BudgetExceeded(
        f"the budget per {budget.name} is {show_usd(cap)}: {show_usd(state.committed)} is spent "
        f"or committed, and this may cost {show_usd(wanted)} more",
        hint=f"{when}; or raise the budget (`comfyctl costs budgets` shows all)",
        details=details,
    )
