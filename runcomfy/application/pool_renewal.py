"""
One loop that pays for all machines of the pool ahead, lease by lease, while they are wanted.

A machine is renewed when half of what was confirmed is left, the most urgent first: asked for as an absolute total, and
believed when the provider's next list shows it (`pool_watch`), never before (fault 24). Many machines get longer
leases, so that the account's rate suffices (`domain.renewal`). Not renewed is what nobody wants: a machine that drains
and has no job, and every machine while this process may not plan. What a budget does not pay takes no more jobs and is
ended just before the end of what is paid (I6); the provider ends what we could not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Final

from runcomfy.application.ending import HOPELESS
from runcomfy.application.own_machine import END_BEFORE
from runcomfy.application.pool_members import Member, Members
from runcomfy.domain.exceptions import BudgetExceeded, LeaseLost, LocalError, ProviderError
from runcomfy.domain.renewal import is_due, lease_for, look_every, total_for

log = logging.getLogger("runcomfy.pool")

AT_ONCE: Final = 4
"""Renewals under way at the same time: one that is not answered must not hold up the others."""
UNPAID: Final = "its time is over and could not be prolonged"


class Renewal:
    """Renews leases, round after round."""

    def __init__(self, members: Members, *, in_charge: Callable[[], bool]) -> None:
        """`in_charge` says whether this process is the one that keeps the account's pool."""
        self._members, self._in_charge = members, in_charge
        self._machines, self._cloud = members.machines, members.settings.cloud

    def lease(self, machines: int | None = None) -> timedelta:
        """Return for how long a machine is paid ahead now, or would be beside so many."""
        count = len(self._members) if machines is None else machines
        return lease_for(count, lease=self._cloud.run_lease, requests_per_second=self._cloud.requests_per_second)

    async def run(self) -> None:
        """Renew for ever."""
        while True:
            await self.round()
            await asyncio.sleep(min(look_every(self._cloud.run_lease), self._next_end()))

    def _next_end(self) -> float:
        """Return the seconds until the time of a machine is over that was not prolonged until then."""
        now, ends = _now(), [float("inf")]
        for member in self._members:
            left = member.left(now)
            if left is not None and left > 0 and not member.ended:
                ends.append(left - self._before if member.refused else left)
        return max(0.1, min(ends))

    @property
    def _before(self) -> float:
        """How long before the end of what is paid a machine is ended: a stop needs a moment."""
        return min(END_BEFORE, self._cloud.run_lease / 20).total_seconds()

    async def round(self) -> None:
        """Renew what is due, the most urgent first."""
        lease, now = self.lease(), _now()
        self.end_what_is_over(self._members)
        due = [
            (left, member)
            for member in self._members
            if not member.ended and (left := member.left(now)) is not None and is_due(left, lease)
        ]
        if not due:
            return
        due.sort(key=lambda pair: pair[0])
        waiting = [member for _, member in reversed(due)]
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(waiting))):
                group.create_task(self._work_off(waiting))
        self.end_what_is_over(self._members)
        if any(member.asked is not None for _, member in due):
            self._members.look_now.set()

    async def _work_off(self, waiting: list[Member]) -> None:
        while waiting:
            await self._renew(waiting.pop())

    def wanted(self, member: Member) -> bool:
        """Whether a machine is to be paid for any longer."""
        used = bool(member.pooled.leases) or member.by_hand
        return not member.ended and self._in_charge() and (used or not member.pooled.draining)

    async def _renew(self, member: Member) -> None:
        if not self.wanted(member) or member.billed_since is None or member.machine.stop_accepted_at is not None:
            return
        total = total_for(_now() - member.billed_since, self.lease())
        before = member.asked, member.asked_at
        # No list confirms anything while this is asked for, or budgets would not count what is about to be granted.
        member.asked, member.asked_at = total, float("inf")
        try:
            await self._machines.ask_longer(member.machine, total=total)
        except BudgetExceeded as error:
            member.asked, member.asked_at = before
            self._not_paid(member, error)
            return
        except LeaseLost:
            self._members.taken(member)
            return
        except (ProviderError, LocalError) as error:
            # It may have been granted all the same: the next list tells. Never assumed longer than confirmed.
            if isinstance(error, HOPELESS):
                self._members.health.refused(error)
            fields = {"machine": member.machine.id, "error": error.code}
            log.warning("lease_not_renewed", extra={"fields": fields})
            if isinstance(error, LocalError):
                member.asked, member.asked_at = before
                return
        member.refused = ""
        member.asked, member.asked_at = total, _now()
        member.pooled.machine = replace(member.machine, asked_duration=total)

    def _not_paid(self, member: Member, error: BudgetExceeded) -> None:
        if not member.refused:
            left = member.left(_now()) or 0.0
            self._members.books.tell(f"{member.name} is not prolonged and ends in {left:.0f} s: {error.message}")
            log.warning("lease_refused", extra={"fields": {"machine": member.machine.id, "error": error.code}})
        member.refused = error.message
        self._members.drain(member, f"a budget does not pay longer: {error.message}")

    def end_what_is_over(self, members: Iterable[Member]) -> None:
        """End what is not paid for any longer, and send nothing to what may end at any moment."""
        now = _now()
        for member in members:
            left = member.left(now)
            if left is None or member.ended:
                continue
            if member.refused and left <= self._before:
                member.pooled.unpaid = member.refused
                self._members.end(member, f"the end of what is paid: {member.refused}")
            elif left <= 0 and not member.pooled.leases and self._in_charge():
                self._members.end(member, UNPAID)
            elif left <= 0:
                self._members.suspect(member, UNPAID)
            elif member.pooled.suspect == UNPAID:
                self._members.suspect(member, "")


def _now() -> float:
    return asyncio.get_running_loop().time()
