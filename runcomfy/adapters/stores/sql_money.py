"""
Money in the store: what may be spent, checked where the intent is written; what was spent, written once.

Whoever writes a launch intent or asks for more time holds the account's row first. So of two processes the second
reads what the first has committed, and the last dollar is spent once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select

from runcomfy.adapters.stores import sql_parts as parts
from runcomfy.adapters.stores import tables
from runcomfy.domain.budget import Budget, BudgetState, Period, committed, refusal
from runcomfy.domain.machine import OPEN, Machine, MachineId, MachineState, OwnerId
from runcomfy.domain.money import LedgerEntry, meter
from runcomfy.domain.work import Work

_machines, _ledger, _work, _alerts = tables.machines, tables.ledger, tables.machine_work, tables.budget_alerts

_ENTRIES: Final = select(*(_ledger.c[name] for name in tables.ENTRY_FIELDS)).order_by(_ledger.c.number)


class MoneyPart(parts.SqlPart):
    """Budgets, bills and the ledger of `SqlStore`."""

    async def add_machine(
        self, machine: Machine, *, at: datetime, note: str = "", budgets: Sequence[Budget] = ()
    ) -> Sequence[BudgetState]:
        """Write a launch intent (or a machine taken over), with its first transition, if the budgets allow it.

        Returns how they stand with it; raises BudgetExceeded, and nothing was written then.
        """

        def work(connection: Connection) -> Sequence[BudgetState]:
            # Also without budgets: another process may have some, and this machine counts in them.
            parts.held_account(connection, machine.account)
            states = _allowed(connection, budgets, machine, now=at)
            parts.add_machine(connection, machine, at=at, note=note)
            return states

        return await self._write(work)

    async def ask_duration(
        self,
        machine_id: MachineId,
        *,
        total: timedelta,
        at: datetime,
        by: OwnerId,
        epoch: int,
        budgets: Sequence[Budget] = (),
    ) -> tuple[Machine, Sequence[BudgetState]]:
        """Write down that a longer running time is about to be asked for, if the budgets allow it.

        Raises BudgetExceeded, LeaseLost (`epoch`), LocalError if there is no such machine; nothing was written then.
        """

        def work(connection: Connection) -> tuple[Machine, Sequence[BudgetState]]:
            found = parts.find_machine(connection, machine_id)
            if found is None:
                raise parts.no_row(f"machine {machine_id}")
            parts.held_account(connection, found.account)
            before = parts.held_machine(connection, machine_id)
            parts.still_held(before, epoch)
            after = replace(before, asked_duration=total)
            states = _allowed(connection, budgets, after, now=at)
            parts.save_machine(connection, before, after, at=at, by=by, event="more-time-wanted", note="")
            return after, states

        return await self._write(work)

    async def budgets(
        self,
        budgets: Sequence[Budget],
        *,
        now: datetime,
        run_id: str = "",
        provider: str | None = None,
        account: str | None = None,
    ) -> Sequence[BudgetState]:
        """Return how budgets stand in their windows of `now`; by itself for all accounts of the database."""

        def work(connection: Connection) -> Sequence[BudgetState]:
            of = _of(provider, account)
            machines, works = _counting(connection, budgets, of, now=now, run_id=run_id)
            return [
                BudgetState(budget, window, committed(budget, window, machines, works, now=now, run_id=run_id))
                for budget in budgets
                for window in [budget.window(now)]
            ]

        return await self._read(work) if budgets else []

    async def first_alert(self, key: str, *, at: datetime) -> bool:
        """Return whether nobody has said this before, and remember that it is said."""

        def work(connection: Connection) -> bool:
            return connection.execute(parts.insert_or_leave(connection, _alerts), {"key": key, "at": at}).rowcount == 1

        return await self._write(work)

    async def close_bill(
        self, machine_id: MachineId, *, end: datetime, recorded_at: datetime, note: str
    ) -> LedgerEntry | None:
        """Bring a machine's ledger up to `end`; return what was added, None if there was nothing to add."""

        def work(connection: Connection) -> LedgerEntry | None:
            machine = parts.held_machine(connection, machine_id)
            if machine.ready_at is None:
                return None
            posted = select(func.max(_ledger.c.ended_at, type_=_ledger.c.ended_at.type))
            until = connection.execute(posted.where(_ledger.c.machine_id == machine_id)).scalar()
            start = machine.ready_at if until is None else max(until, machine.ready_at)
            if end <= start:
                return None
            rate = machine.usd_per_hour
            entry = LedgerEntry(machine_id, start, end, rate, meter(start, end, rate), recorded_at, note=note)
            connection.execute(insert(_ledger), tables.values_of(entry))
            return entry

        return await self._write(work)

    async def post(self, entries: Sequence[LedgerEntry]) -> None:
        """Add entries to the ledger, all or none. What is there is never changed."""
        values = [tables.values_of(entry) for entry in entries]
        if values:
            await self._write(lambda connection: connection.execute(insert(_ledger), values))

    async def ledger(
        self, *, machine_id: MachineId | None = None, since: datetime | None = None
    ) -> Sequence[LedgerEntry]:
        """Return the entries in the order in which they were written; `since`: those that end after it."""
        query = _ENTRIES if machine_id is None else _ENTRIES.where(_ledger.c.machine_id == machine_id)
        if since is not None:
            query = query.where(_ledger.c.ended_at > since)
        return await self._read(lambda connection: [LedgerEntry(*row) for row in connection.execute(query)])


# -- inside a transaction --------------------------------------------------------------------------------------


def _allowed(
    connection: Connection, budgets: Sequence[Budget], candidate: Machine, *, now: datetime
) -> Sequence[BudgetState]:
    """Return how budgets stand with a machine as it is about to be written; raise BudgetExceeded."""
    if not budgets:
        return []
    of = _of(candidate.provider, candidate.account)
    machines, works = _counting(connection, budgets, of, now=now, run_id=candidate.run_id)
    refused, states = refusal(budgets, machines, works, candidate, now=now)
    if refused is not None:
        raise refused
    return states


def _of(provider: str | None, account: str | None) -> list[ColumnElement[bool]]:
    which: list[ColumnElement[bool]] = []
    if provider is not None:
        which.append(_machines.c.provider == provider)
    if account is not None:
        which.append(_machines.c.account == account)
    return which


def _counting(
    connection: Connection,
    budgets: Sequence[Budget],
    of: Sequence[ColumnElement[bool]],
    *,
    now: datetime,
    run_id: str,
) -> tuple[Sequence[Machine], Mapping[MachineId, Sequence[Work]]]:
    """Return the machines that may count against budgets from now on, and their works where it matters whose."""
    starts = [start for budget in budgets if (start := budget.window(now).start) is not None]
    counts: list[ColumnElement[bool]] = [_machines.c.state.in_(OPEN)]
    if starts:
        counts.append(and_(_machines.c.state == MachineState.STOPPED, _machines.c.since >= min(starts)))
    if run_id and any(budget.period is Period.RUN for budget in budgets):
        counts.append(_machines.c.run_id == run_id)
    which = and_(*of, or_(*counts))
    machines = [tables.machine_of(row) for row in connection.execute(select(_machines).where(which))]
    works: dict[MachineId, list[Work]] = {}
    if any(budget.project is not None or budget.user is not None for budget in budgets):
        ids = select(_machines.c.id).where(which)
        for row in connection.execute(select(_work).where(_work.c.machine_id.in_(ids))):
            done = Work(*row)
            works.setdefault(done.machine_id, []).append(done)
    return machines, works
