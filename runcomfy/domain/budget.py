"""
Caps on what is spent, and what counts against them.

Committed spend is what was billed so far, what every living lease may still bill, and what every open launch intent
may: a machine that is paid ahead for ten minutes has spent them already as far as a budget is concerned (I6). So a cap
holds even if every process of ours dies now. Stores call `refusal` in the transaction that writes an intent or asks for
more time, so that two processes cannot both pass the last dollar.

Windows are calendar hours, days and months in UTC. A lease that reaches into the next window counts there, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Final

from runcomfy.domain.exceptions import BudgetExceeded
from runcomfy.domain.machine import Machine, MachineId, MachineState
from runcomfy.domain.money import billed_interval, meter, show_usd
from runcomfy.domain.work import Work

SOFT_FRACTION: Final = Decimal("0.8")
"""Where a budget alerts if nobody said where."""
_MOST_WINDOWS: Final = 24 * 32
"""Windows looked at for one lease: hours of a month."""


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


def committed_interval(machine: Machine, *, now: datetime) -> tuple[datetime, datetime] | None:
    """Return from when to when the machine has cost, or may still cost, money if nobody does anything any more."""
    if machine.state is MachineState.NEVER:
        return None
    if not machine.is_open or machine.stop_accepted_at is not None:
        return billed_interval(machine, now=now)
    lease = max(machine.duration, machine.asked_duration or timedelta(0))
    if machine.ready_at is None:
        return now, now + lease
    return machine.ready_at, max(now, machine.planned_stop_at or machine.ready_at, machine.ready_at + lease)


def committed(
    budget: Budget,
    window: Window,
    machines: Collection[Machine],
    works: Mapping[MachineId, Sequence[Work]],
    *,
    now: datetime,
    run_id: str = "",
) -> Decimal:
    """Return the committed spend in USD that counts against a budget in a window.

    Of a machine that served several users or projects, each counts by the share of its busy seconds; one that has not
    served anybody yet counts for whom it was launched.
    """
    total = Decimal(0)
    for machine in machines:
        if budget.period is Period.RUN and machine.run_id != run_id:
            continue
        interval = committed_interval(machine, now=now)
        if interval is None:
            continue
        start = interval[0] if window.start is None else max(interval[0], window.start)
        end = interval[1] if window.end is None else min(interval[1], window.end)
        if end > start:
            fraction = _fraction(budget, machine, works.get(machine.id, ()), now=now)
            total += meter(start, end, machine.usd_per_hour) * fraction
    return total


def _fraction(budget: Budget, machine: Machine, works: Sequence[Work], *, now: datetime) -> Decimal:
    """Return which part of a machine's spend counts against a budget."""
    if budget.project is None and budget.user is None:
        return Decimal(1)
    seconds = [(work, work.busy(now).total_seconds()) for work in works]
    whole = sum(busy for _, busy in seconds)
    if whole <= 0:
        return Decimal(int(_counts(budget, machine.for_project, machine.for_user)))
    part = sum(busy for work, busy in seconds if _counts(budget, work.project, work.user))
    return Decimal(part) / Decimal(whole)


def _counts(budget: Budget, project: str, user: str) -> bool:
    return budget.project in (None, project) and budget.user in (None, user)


def made_out(budgets: Collection[Budget], *, project: str, user: str) -> list[Budget]:
    """Return the budgets that a job of this project and user counts against, with `*` put as who it is.

    A budget that names somebody wins over `*` of the same period.
    """
    named = {(b.period, "project") for b in budgets if b.project == project and project}
    named |= {(b.period, "user") for b in budgets if b.user == user and user}
    found = []
    for budget in budgets:
        whose = "project" if budget.project else "user" if budget.user else ""
        wanted, given = (budget.project or budget.user or ""), {"project": project, "user": user}.get(whose, "")
        if not whose or (wanted == given and given):
            found.append(budget)
        elif wanted == "*" and given and (budget.period, whose) not in named:
            who = {whose: given}
            found.append(Budget(budget.period, budget.hard, budget.soft, who.get("project"), who.get("user")))
    return found


def refusal(
    budgets: Collection[Budget],
    machines: Collection[Machine],
    works: Mapping[MachineId, Sequence[Work]],
    candidate: Machine,
    *,
    now: datetime,
) -> tuple[BudgetExceeded | None, list[BudgetState]]:
    """Return what a hard cap says against `candidate` beside `machines`, and how every budget would stand.

    `machines` are all of the account that may bill in any window concerned, without the candidate's own older row.
    `budgets` are made out (`made_out`).
    """
    others = [machine for machine in machines if machine.id != candidate.id]
    interval = committed_interval(candidate, now=now)
    until = interval[1] if interval is not None else now
    states: list[BudgetState] = []
    for budget in budgets:
        for window in budget.windows(now, until):
            before = committed(budget, window, others, works, now=now, run_id=candidate.run_id)
            with_it = before + committed(budget, window, [candidate], works, now=now, run_id=candidate.run_id)
            states.append(BudgetState(budget, window, with_it))
            if budget.hard is not None and with_it > budget.hard and with_it > before:
                return exceeded(BudgetState(budget, window, before), wanted=with_it - before), states
    return None, states


def exceeded(state: BudgetState, *, wanted: Decimal) -> BudgetExceeded:
    """Return the error that says which cap is reached, with the figures and when it resets."""
    budget, resets = state.budget, state.window.end
    when = f"it resets at {resets:%Y-%m-%d %H:%M} UTC" if resets is not None else "it does not reset"
    return BudgetExceeded(
        f"the budget per {budget.name} is {show_usd(budget.hard or Decimal(0))}: {show_usd(state.committed)} is spent "
        f"or committed, and this may cost {show_usd(wanted)} more",
        hint=f"{when}; or raise the budget (`comfyctl costs budgets` shows all)",
        details={
            "budget": budget.name,
            "cap_usd": str(budget.hard),
            "committed_usd": format(state.committed, "f"),
            "wanted_usd": format(wanted, "f"),
            "resets_at": resets.isoformat() if resets is not None else None,
        },
    )
