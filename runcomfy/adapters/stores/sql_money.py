"""
Money in the store: what may be spent, checked where the intent is written; what was spent, written once.

Whoever writes a launch intent or asks for more time holds the account's row first. So of two processes the second
reads what the first has committed, and the last dollar is spent once.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from operator import itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, bindparam, func, insert, select

from runcomfy.adapters.stores import sql_parts as parts
from runcomfy.adapters.stores import tables
from runcomfy.adapters.stores.columns import read_amount, read_time
from runcomfy.adapters.stores.jobs_rows import safe
from runcomfy.adapters.stores.jobs_sql import Sql, in_list, listed, stamps
from runcomfy.domain.budget import Budget, BudgetState, Busy, Charge, Period, busy_of, charge_of, committed, refusal
from runcomfy.domain.machine import OPEN, Machine, MachineId, MachineState, OwnerId
from runcomfy.domain.money import LedgerEntry

_machines, _ledger, _alerts = tables.machines, tables.ledger, tables.budget_alerts

_ENTRIES: Final = select(_ledger.c.number, *(_ledger.c[name] for name in tables.ENTRY_FIELDS))

_REACHED: Final = select(func.max(_ledger.c.ended_at)).where(_ledger.c.machine_id == _machines.c.id).scalar_subquery()
_BILL_ENDS: Final = func.coalesce(_machines.c.stop_accepted_at, _machines.c.gone_at)
_UNBILLED: Final = (
    select(_machines)
    .where(
        _machines.c.provider == bindparam("by"),
        _machines.c.account == bindparam("whose"),
        _machines.c.ready_at < _BILL_ENDS,
        _REACHED.is_(None) | (_REACHED < _BILL_ENDS),
    )
    .order_by(_machines.c.requested_at, _machines.c.id)
)
_UNBILLED_LATELY: Final = _UNBILLED.where(_machines.c.since >= bindparam("after"))


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
            stored, run = [_as_stored(budget) for budget in budgets], safe(run_id)
            charges, busy = _charges(connection, stored, Which(provider, account), now=now, run_id=run)
            return [
                BudgetState(budget, window, committed(budget, window, charges, busy, run_id=run))
                for budget in stored
                for window in [budget.window(now)]
            ]

        return await self._read(work) if budgets else []

    async def first_alert(self, key: str, *, at: datetime) -> bool:
        """Return whether nobody has said this before, and remember that it is said."""

        def work(connection: Connection) -> bool:
            said = parts.insert_or_leave(connection, _alerts).returning(_alerts.c.key)
            return connection.execute(said, {"key": key, "at": at}).one_or_none() is not None

        return await self._write(work)

    async def close_bill(
        self, machine_id: MachineId, *, end: datetime, recorded_at: datetime, note: str
    ) -> LedgerEntry | None:
        """Bring a machine's ledger up to `end`; return what was added, None if there was nothing to add."""

        def work(connection: Connection) -> LedgerEntry | None:
            machine = parts.held_machine(connection, machine_id)
            return parts.bring_up_bill(connection, machine, end=end, recorded_at=recorded_at, note=note)

        return await self._write(work)

    async def unbilled(self, *, provider: str, account: str, since: datetime | None = None) -> Sequence[Machine]:
        """Return machines whose bill has an end that their ledger does not reach; `since`: that changed since then."""
        query = _UNBILLED if since is None else _UNBILLED_LATELY
        which = {"by": provider, "whose": account} | ({} if since is None else {"after": since})
        return await self._read(lambda connection: [tables.machine_of(row) for row in connection.execute(query, which)])

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
            # Put in order here: asked to do it, SQLite reads the whole ledger in its order to find the last of it.
            query = query.where(_ledger.c.ended_at > since)
        rows = await self._read(lambda connection: connection.execute(query).all())
        return [LedgerEntry(*row[1:]) for row in sorted(rows, key=itemgetter(0))]


# -- inside a transaction --------------------------------------------------------------------------------------

# Of what is over, budgets need little of each machine, and of many: a month may have tens of thousands. So it is read
# as the driver gives it; a check holds up every other launch of the account.
_ACCOUNTS: Final = " AND m.provider = :provider AND m.account = :account"
_CLOSED: Final = (
    "SELECT m.id, m.usd_per_hour, m.run_id, m.for_project, m.for_user, m.ready_at, "
    "COALESCE(m.stop_accepted_at, m.gone_at) FROM machines m "
    f"WHERE m.state = '{MachineState.STOPPED}' AND m.ready_at IS NOT NULL"
)
_SINCE, _RUN = " AND m.since >= :since", " AND m.run_id = :run_id"
_CLOSED_SINCE: Final = {one: Sql(_CLOSED + _SINCE + _ACCOUNTS * one) for one in (False, True)}
_CLOSED_IN_RUN: Final = {one: Sql(_CLOSED + _RUN + _ACCOUNTS * one) for one in (False, True)}
_STINTS: Final = tuple(
    'SELECT w.machine_id, w.project, w."user", w.computing_at, COALESCE(w.computed_at, w.ended_at) '
    f"FROM machine_work w WHERE {of} AND w.computing_at IS NOT NULL"
    for of in in_list("w.machine_id", "ids", "text")
)
_STINTS_OF: Final = Sql(_STINTS[0], postgres=_STINTS[1])


class Which(NamedTuple):
    """Whose machines count: one account's, or those of all accounts of the database."""

    provider: str | None
    account: str | None

    @property
    def one(self) -> bool:
        """Whether it is one account."""
        return self.account is not None


def _allowed(
    connection: Connection, budgets: Sequence[Budget], candidate: Machine, *, now: datetime
) -> Sequence[BudgetState]:
    """Return how budgets stand with a machine as it is about to be written; raise BudgetExceeded."""
    if not budgets:
        return []
    which = Which(candidate.provider, candidate.account)
    candidate = replace(
        candidate,
        run_id=safe(candidate.run_id),
        for_project=safe(candidate.for_project),
        for_user=safe(candidate.for_user),
    )
    stored = [_as_stored(budget) for budget in budgets]
    charges, busy = _charges(connection, stored, which, now=now, run_id=candidate.run_id)
    refused, states = refusal(stored, charges, busy, candidate, now=now)
    if refused is not None:
        raise refused
    return states


def _as_stored(budget: Budget) -> Budget:
    """Return the budget with names as they lie in the database, or who has a strange one would have no cap."""
    project, user = (name if name is None else safe(name) for name in (budget.project, budget.user))
    return budget if (project, user) == (budget.project, budget.user) else replace(budget, project=project, user=user)


def _charges(
    connection: Connection, budgets: Sequence[Budget], which: Which, *, now: datetime, run_id: str
) -> tuple[Sequence[Charge], Busy]:
    """Return what may count against budgets from now on, and who used it where that matters."""
    charges = {charge.machine_id: charge for charge in _open_charges(connection, which, now=now)}
    starts = [start for budget in budgets if (start := budget.window(now).start) is not None]
    given = {"provider": which.provider, "account": which.account} if which.one else {}
    rows: list[Any] = []
    if starts:
        since = stamps(connection).exact(min(starts))
        rows += _CLOSED_SINCE[which.one].run(connection, {"since": since, **given}).fetchall()
    if run_id and any(budget.period is Period.RUN for budget in budgets):
        rows += _CLOSED_IN_RUN[which.one].run(connection, {"run_id": run_id, **given}).fetchall()
    amount = cache(read_amount)
    for key, price, run, project, user, ready, gone in rows:
        start = read_time(ready)
        end = now if gone is None else read_time(gone)
        charges[key] = Charge(key, amount(price), run, project, user, start, max(start, end))
    if all(budget.project is None and budget.user is None for budget in budgets):
        return list(charges.values()), {}
    stints = _STINTS_OF.run(connection, {"ids": listed(connection, charges)}).fetchall()
    told = (
        (key, project, user, read_time(start), None if done is None else read_time(done))
        for key, project, user, start, done in stints
    )
    return list(charges.values()), busy_of(told, charges.values(), now=now)


def _open_charges(connection: Connection, which: Which, *, now: datetime) -> Iterator[Charge]:
    query = select(_machines).where(_machines.c.state.in_(OPEN))
    if which.one:
        query = query.where(_machines.c.provider == which.provider, _machines.c.account == which.account)
    for row in connection.execute(query):
        if (charge := charge_of(tables.machine_of(row), now=now)) is not None:
            yield charge
