"""
What budgets still allow: whose jobs may begin, and whether anything may be launched.

The cap itself is kept by the store, in the transaction that writes a launch intent or asks for more time (I6). This
only looks ahead, so that nobody keeps asking for what will be refused, and says once why jobs wait and until when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final

from runcomfy.domain.budget import Budget, BudgetState, exceeded, made_out
from runcomfy.domain.exceptions import BudgetExceeded
from runcomfy.domain.money import show_usd
from runcomfy.domain.queued import Barred, QueuedJob
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.fleet")

ASK_AGAIN: Final = 60.0
"""Seconds after a refusal until the same is asked for again: a machine that was ended early frees what it had ahead."""

Who = tuple[str, str]
"""User and project of a job."""


class Purse:
    """How the budgets stand, as last read. `refresh` reads; the rest never waits."""

    def __init__(
        self,
        store: Store,
        budgets: Sequence[Budget],
        clock: Clock,
        *,
        run_id: str,
        tell: Callable[[str], None],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`run_id` names whose doing budgets per run count. `wake` is called when somebody is asked about."""
        self._store, self._clock, self._run_id = store, clock, run_id
        self._budgets = tuple(budgets)
        self._personal = any(budget.user or budget.project for budget in budgets)
        self._tell, self._wake = tell, wake
        self._general: Sequence[BudgetState] = ()
        self._used_up: dict[Who, BudgetState | None] = {}
        self._asked: set[Who] = set()
        self._said: set[tuple[str, datetime | None]] = set()
        self._refused: tuple[BudgetExceeded, float] | None = None

    # -- reading -------------------------------------------------------------------------------------------

    async def refresh(self, whose: Collection[Who] = ()) -> None:
        """Read how the budgets stand, for everybody and for those whose jobs wait. Raises LocalError."""
        if not self._budgets:
            return
        now = self._clock.now()
        general = [budget for budget in self._budgets if not budget.user and not budget.project]
        self._general = await self._store.budgets(general, now=now, run_id=self._run_id) if general else ()
        if not self._personal:
            return
        asked, self._asked = self._asked | set(whose), set()
        # Who is known to be out of money is asked about even without a job: the next one may begin at once.
        asked |= {who for who, state in self._used_up.items() if state is not None}
        theirs = {
            (user, project): [
                budget
                for budget in made_out(self._budgets, project=project, user=user)
                if budget.user or budget.project
            ]
            for user, project in asked
        }
        wanted = list(dict.fromkeys(budget for budgets in theirs.values() for budget in budgets))
        states = await self._store.budgets(wanted, now=now, run_id=self._run_id) if wanted else ()
        spent = {state.budget: state for state in states if _used_up(state)}
        self._used_up = {
            who: next((spent[budget] for budget in budgets if budget in spent), None) for who, budgets in theirs.items()
        }
        for state in spent.values():
            self._say(state)

    def knows(self, whose: Collection[Who]) -> bool:
        """Return whether it was read how the budgets of all of these stand."""
        return not self._personal or set(whose) <= self._used_up.keys()

    def _say(self, state: BudgetState) -> None:
        key = state.budget.name, state.window.end
        if key in self._said:
            return
        self._said.add(key)
        log.warning("budget_used_up", extra={"fields": {"budget": key[0], "committed_usd": str(state.committed)}})
        whose = f"user {state.budget.user}" if state.budget.user else f"project {state.budget.project}"
        self._tell(f"jobs of {whose} wait: {used_up_words(state)}")

    # -- jobs ----------------------------------------------------------------------------------------------

    def may_begin(self, job: QueuedJob) -> bool:
        """Return whether the budgets of the job's user and project allow it; who was not asked about yet waits."""
        return self.allows(job.user, job.project)

    def barred(self) -> Barred:
        """Return whose jobs wait because a budget of theirs is used up; a project's bars it for everybody."""
        states = [state for state in self._used_up.values() if state is not None]
        return Barred(
            users=frozenset(state.budget.user for state in states if state.budget.user),
            projects=frozenset(state.budget.project for state in states if state.budget.project),
        )

    def allows(self, user: str, project: str) -> bool:
        """Return whether jobs of that user and project may begin."""
        if not self._personal:
            return True
        who = user, project
        if who not in self._used_up:
            if who not in self._asked:
                self._asked.add(who)
                self._wake()
            return False
        return self._used_up[who] is None

    def used_up(self, user: str, project: str) -> BudgetExceeded | None:
        """Return why jobs of that user and project wait, if a budget of theirs is used up."""
        state = self._used_up.get((user, project))
        return exceeded(state, wanted=Decimal(0)) if state is not None else None

    # -- machines ------------------------------------------------------------------------------------------

    def refused(self, error: BudgetExceeded) -> None:
        """Hear that a launch was refused."""
        self._refused = error, asyncio.get_running_loop().time() + ASK_AGAIN

    def allowed(self) -> None:
        """Hear that a launch was not refused."""
        self._refused = None

    @property
    def refusal(self) -> BudgetExceeded | None:
        """What was refused last, while it is not asked for again."""
        if self._refused is None:
            return None
        error, until = self._refused
        reset = _reset(error)
        if asyncio.get_running_loop().time() >= until or (reset is not None and self._clock.now() >= reset):
            return None
        return error

    def short_of(self, usd: Decimal, lease_of: str = "") -> BudgetExceeded | None:
        """Return the budget of everybody that does not allow to commit so much more, if there is one."""
        for state in self._general:
            if state.left is not None and state.left < usd:
                return exceeded(state, wanted=usd, lease_of=lease_of)
        return None

    def seconds(self, usd_per_hour: float) -> float | None:
        """Return how many machine-seconds at a price the budgets of everybody still allow; None: any number."""
        left = [state.left for state in self._general if state.left is not None]
        if not left or usd_per_hour <= 0:
            return None
        return float(min(left)) * 3600 / usd_per_hour

    def forbids(self, usd: Decimal, lease_of: str = "") -> BudgetExceeded | None:
        """Return why nothing that commits so much, a lease of that type, may be launched now; None if it may."""
        return self.refusal or self.short_of(usd, lease_of)

    def news(self, error: BudgetExceeded) -> bool:
        """Return whether this was not said yet, of this budget in its window; and remember that it is said."""
        key = str(error.details.get("budget", error.message)), _reset(error)
        if key in self._said:
            return False
        self._said.add(key)
        return True


def _used_up(state: BudgetState) -> bool:
    return state.left is not None and state.left <= 0


def used_up_words(state: BudgetState) -> str:
    """Return which budget is used up, with the figures and when it resets."""
    resets = state.window.end
    when = f"it resets at {resets:%Y-%m-%d %H:%M} UTC" if resets is not None else "it does not reset"
    cap = show_usd(state.budget.hard or Decimal(0))
    return f"the budget per {state.budget.name} is {cap}, {show_usd(state.committed)} is spent or committed; {when}"


def _reset(error: BudgetExceeded) -> datetime | None:
    said = error.details.get("resets_at")
    return datetime.fromisoformat(said) if isinstance(said, str) else None
