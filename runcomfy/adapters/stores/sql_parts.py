"""
What the parts of `SqlStore` have in common: the database they are on, and the few steps that changes are made of.

A machine's row is held while it changes, and what changed is told; the row of an account is held by whoever does what
only one process of the account may do at a time. Held is until the transaction ends: SQLite has one writer anyway, on
PostgreSQL the row is locked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, Protocol, TypeVar

from sqlalchemy import Connection, Table, bindparam, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from runcomfy.adapters.stores import tables
from runcomfy.adapters.stores.database import Database
from runcomfy.domain.exceptions import LeaseLost, LocalError
from runcomfy.domain.lease import is_held_under
from runcomfy.domain.machine import Machine, MachineId, OwnerId
from runcomfy.domain.money import LedgerEntry, meter

T = TypeVar("T")

_machines, _story, _accounts = tables.machines, tables.machine_transitions, tables.accounts
_ledger = tables.ledger

# Statements are built once; SQLAlchemy keeps what it compiled them to.
_MACHINE: Final = select(_machines).where(_machines.c.id == bindparam("machine_id"))
_MACHINE_LOCKED: Final = _MACHINE.with_for_update()
_SAVE_MACHINE: Final = update(_machines).where(_machines.c.id == bindparam("key"))
_TELL: Final = insert(_story)
_NEXT_NUMBER: Final = select(func.coalesce(func.max(_story.c.number), 0) + 1).where(
    _story.c.machine_id == bindparam("machine_id")
)
_BILLED_UNTIL: Final = select(func.max(_ledger.c.ended_at, type_=_ledger.c.ended_at.type)).where(
    _ledger.c.machine_id == bindparam("machine_id")
)
_ACCOUNT: Final = select(_accounts).where(_accounts.c.account == bindparam("name")).with_for_update()


class Run(Protocol):
    """`Database.read` or `Database.write`."""

    def __call__(self, work: Callable[[Connection], T], /) -> Awaitable[T]:
        """Run `work` in the database's thread, in a transaction."""
        ...


class SqlPart:
    """A part of `SqlStore`; all parts are on one database."""

    _database: Database
    _read: Run
    _write: Run

    def _use(self, database: Database) -> None:
        self._database = database
        self._read, self._write = database.read, database.write


# -- inside a transaction --------------------------------------------------------------------------------------


def find_machine(connection: Connection, machine_id: MachineId) -> Machine | None:
    """Read a machine, if there is one."""
    row = connection.execute(_MACHINE, {"machine_id": machine_id}).one_or_none()
    return None if row is None else tables.machine_of(row)


def held_machine(connection: Connection, machine_id: MachineId) -> Machine:
    """Read a machine that is about to change; nobody else changes it until this transaction ends."""
    row = connection.execute(_MACHINE_LOCKED, {"machine_id": machine_id}).one_or_none()
    if row is None:
        raise no_row(f"machine {machine_id}")
    return tables.machine_of(row)


def add_machine(connection: Connection, machine: Machine, *, at: datetime, note: str) -> None:
    """Write a machine, and the first line of its story."""
    connection.execute(insert(_machines), tables.values_of(machine))
    _tell(connection, machine, at=at, event="added", by=machine.owner_id, note=note, changes={})


def still_held(machine: Machine, epoch: int | None) -> None:
    """Raise LeaseLost if the machine's epoch is another one than was expected."""
    if epoch is not None and not is_held_under(machine.epoch, epoch):
        raise LeaseLost(
            f"machine {machine.id} was taken over by {machine.owner_id or 'nobody'} in the meantime",
            hint="another comfyctl looks after it now; see `comfyctl machines ls`",
            details={"epoch": machine.epoch, "expected_epoch": epoch},
        )


def save_machine(
    connection: Connection, before: Machine, after: Machine, *, at: datetime, by: OwnerId | None, event: str, note: str
) -> None:
    """Write a held machine as it is now, and tell what changed."""
    values = tables.values_of(after)
    del values["id"]
    connection.execute(_SAVE_MACHINE, {"key": before.id, **values})
    changes = {
        name: tables.as_text(value)
        for name, value in values.items()
        if value != getattr(before, name) and name not in ("state", "since")
    }
    _tell(connection, after, at=at, event=event, by=by, note=note, changes=changes)
    if (end := after.bill_ends) is not None and (end, after.ready_at) != (before.bill_ends, before.ready_at):
        # In the same transaction: whoever dies, or loses the machine, after this has left no bill open.
        bring_up_bill(connection, after, end=end, recorded_at=at, note=after.bill_words)


def bring_up_bill(
    connection: Connection, machine: Machine, *, end: datetime, recorded_at: datetime, note: str
) -> LedgerEntry | None:
    """Bring a held machine's ledger up to `end`; return what was added, None if there was nothing to add."""
    if machine.ready_at is None:
        return None
    until = connection.execute(_BILLED_UNTIL, {"machine_id": machine.id}).scalar()
    start = machine.ready_at if until is None else max(until, machine.ready_at)
    if end <= start:
        return None
    rate = machine.usd_per_hour
    entry = LedgerEntry(machine.id, start, end, rate, meter(start, end, rate), recorded_at, note=note)
    connection.execute(insert(_ledger), tables.values_of(entry))
    return entry


def _tell(
    connection: Connection,
    machine: Machine,
    *,
    at: datetime,
    event: str,
    by: OwnerId | None,
    note: str,
    changes: Mapping[str, str | None],
) -> None:
    number = connection.execute(_NEXT_NUMBER, {"machine_id": machine.id}).scalar_one()
    row = {"machine_id": machine.id, "number": number, "at": at, "event": event, "state": str(machine.state)}
    connection.execute(_TELL, {**row, "by": by or "", "note": note, "changes": dict(changes)})


def held_account(connection: Connection, account: str) -> Any:
    """Read the account's row, which is made at its first use; nobody else changes it until this transaction ends."""
    if (row := connection.execute(_ACCOUNT, {"name": account}).one_or_none()) is not None:
        return row
    connection.execute(insert_or_leave(connection, _accounts), {"account": account, "urgent_until": ()})
    return connection.execute(_ACCOUNT, {"name": account}).one()


def insert_or_leave(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return the INSERT that does nothing if the row is there already."""
    return _insert(connection.dialect.name, table).on_conflict_do_nothing()


def insert_or_replace(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return the INSERT that changes the row if it is there already."""
    return _or_replace(connection.dialect.name, table)


@cache
def _or_replace(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    statement = _insert(dialect, table)
    rest = {column.name: statement.excluded[column.name] for column in table.columns if not column.primary_key}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=rest)


def _insert(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


def batches(values: Sequence[T], *, size: int = 5_000) -> list[Sequence[T]]:
    """Cut a list into parts that a statement takes as parameters."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def no_row(what: str) -> LocalError:
    """Return the error of a row that must be there."""
    return LocalError(
        f"the database has no {what}", hint="was the database replaced, or does RUNCOMFY_STATE_DIR name another one?"
    )
