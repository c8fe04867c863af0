"""
The store on a database: owners, machines, uses, and what processes of an account share.

Written in SQLAlchemy Core: SQLite and PostgreSQL run the same statements. What is special about a file is in
`sqlite.py`, about a server in `postgres.py`; the tables are in `tables.py`, their versions in `migrate.py`.

Money is in `sql_money.py`, what the plan reads and writes in `sql_signals.py`; threads, transactions and what errors
mean are the business of `database.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, Select, bindparam, insert, select, update

from runcomfy.adapters.stores import bucket as limiter
from runcomfy.adapters.stores import tables
from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.roles import read_owners
from runcomfy.adapters.stores.sql_money import MoneyPart
from runcomfy.adapters.stores.sql_parts import (
    batches,
    find_machine,
    held_account,
    held_machine,
    no_row,
    save_machine,
    still_held,
)
from runcomfy.adapters.stores.sql_signals import SignalsPart
from runcomfy.adapters.stores.sqlite import SqliteFile
from runcomfy.domain.exceptions import LeaseLost
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import (
    OPEN,
    Machine,
    MachineEvent,
    MachineId,
    MachineState,
    OwnerId,
    Purpose,
    ServerId,
    Transition,
)
from runcomfy.ports.clock import Clock

T = TypeVar("T")

GUARDED_FIELDS: Final = frozenset({"id", "state", "since", "owner_id", "epoch"})
"""What changes only by an event (`Machine.on`) or by `take_over`."""

CHANGEABLE: Final = frozenset(tables.MACHINE_FIELDS) - GUARDED_FIELDS

CLOSED: Final = frozenset(MachineState) - OPEN

ENDING: Final = frozenset({MachineState.STOPPING, MachineState.STOPPED, MachineState.NEVER})
"""States in which no job may begin to use a machine."""

_machines, _uses, _owners, _accounts = tables.machines, tables.machine_uses, tables.owners, tables.accounts
_story = tables.machine_transitions

# Statements are built once; SQLAlchemy keeps what it compiled them to.
_STORY: Final = (
    select(*(_story.c[name] for name in tables.TRANSITION_FIELDS))
    .where(_story.c.machine_id == bindparam("machine_id"))
    .order_by(_story.c.number)
)
_USES: Final = select(_uses).where(_uses.c.ended_at.is_(None)).order_by(_uses.c.started_at, _uses.c.job_id)
_HELD: Final = select(_accounts.c.seen_at, _accounts.c.hold_until).where(_accounts.c.account == bindparam("name"))
_SAVE_ACCOUNT: Final = update(_accounts).where(_accounts.c.account == bindparam("name"))
_LISTED: Final = _machines.c.server_id.in_(bindparam("server_ids", expanding=True))
_SAVE_OWNER: Final = update(_owners).where(_owners.c.id == bindparam("key"))
_BOOTS: Final = (
    select(_machines.c.requested_at, _machines.c.ready_at)
    .where(
        _machines.c.provider == bindparam("by"),
        _machines.c.server_type == bindparam("kind"),
        _machines.c.purpose != Purpose.TAKEN,
        _machines.c.ready_at >= _machines.c.requested_at,  # a clock was set back in between
    )
    .order_by(_machines.c.ready_at.desc())
    .limit(bindparam("most"))
)


class SqlStore(MoneyPart, SignalsPart):
    """Keeps `runcomfy.ports.store.Store` in a database; several processes may use the same one."""

    def __init__(
        self, path: Path, *, clock: Clock, durable: bool = True, busy_timeout: timedelta = timedelta(seconds=10)
    ) -> None:
        """Name the file, or `:memory:`; nothing is touched before `open`.

        `durable`: whether a commit is on the disk before it counts (else a power loss may take the last ones).
        `busy_timeout`: how long to wait for another program's lock.
        """
        self._use(Database(SqliteFile(path, durable=durable, busy_timeout=busy_timeout), clock=clock))

    @classmethod
    def over(cls, database: Database) -> Self:
        """Return the store on any database (`choose.store_from` makes one), which it opens and closes."""
        store = cls.__new__(cls)
        store._use(database)
        return store

    # -- coming and going ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open or make the database and bring it to the current version; harmless when repeated."""
        await self._database.open()

    async def close(self) -> None:
        """Finish what was begun and let go of the database. Harmless when repeated."""
        await self._database.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- owners --------------------------------------------------------------------------------------------

    async def register_owner(self, owner: Owner) -> None:
        """Write down a process that may hold machines."""
        values = tables.values_of(owner)
        await self._write(lambda connection: connection.execute(insert(_owners), values))

    async def heartbeat(self, owner_id: OwnerId, *, at: datetime) -> None:
        """Say that the owner lives."""

        def work(connection: Connection) -> None:
            done = connection.execute(_SAVE_OWNER, {"key": owner_id, "heartbeat_at": at})
            _expect_row(done.rowcount, f"owner {owner_id}")

        await self._write(work)

    async def sign_off(self, owner_id: OwnerId, *, at: datetime) -> None:
        """Say that the owner ended in good order, and end its uses of machines."""

        def work(connection: Connection) -> None:
            done = connection.execute(_SAVE_OWNER, {"key": owner_id, "ended_at": at})
            _expect_row(done.rowcount, f"owner {owner_id}")
            mine = (_uses.c.owner_id == owner_id) & _uses.c.ended_at.is_(None)
            used = select(_uses.c.machine_id).where(mine)
            connection.execute(update(_machines).where(_machines.c.id.in_(used)).values(last_used_at=at))
            connection.execute(update(_uses).where(mine).values(ended_at=at))

        await self._write(work)

    async def owners(
        self, ids: Collection[OwnerId] | None = None, *, but: Collection[OwnerId] = ()
    ) -> Mapping[OwnerId, Owner]:
        """Return the owners with these ids, or all that have not signed off, `but` those."""
        return await self._read(lambda connection: read_owners(connection, ids, but))

    # -- machines ------------------------------------------------------------------------------------------

    async def machine(self, machine_id: MachineId) -> Machine | None:
        """Return one machine by our id."""
        return await self._read(lambda connection: find_machine(connection, machine_id))

    async def machines(
        self,
        *,
        provider: str,
        account: str,
        open_only: bool = True,
        since: datetime | None = None,
        states: Collection[MachineState] | None = None,
        server_ids: Collection[ServerId] | None = None,
    ) -> Sequence[Machine]:
        """Return the account's machines, oldest first; `since`: those that were open at that time or later.

        With `states` or `server_ids` only those among them.
        """
        if since is not None:
            ended_later = _machines.c.state.in_(CLOSED) & (_machines.c.since >= since)
            query = _machines_of(provider, account, open_only=False).where(_machines.c.state.in_(OPEN) | ended_later)
        else:
            query = _machines_of(provider, account, open_only=open_only, listed=server_ids is not None)
        if states is not None:
            query = query.where(_machines.c.state.in_(list(states)))
        ids: dict[str, Any] = {}
        if server_ids is not None:
            ids["server_ids"] = list(server_ids)
            if since is not None:
                query = query.where(_LISTED)
        return await self._read(
            lambda connection: [tables.machine_of(row) for row in connection.execute(query, ids or None)]
        )

    async def record(
        self,
        machine_id: MachineId,
        event: MachineEvent,
        *,
        at: datetime,
        by: OwnerId,
        epoch: int | None = None,
        note: str = "",
        changes: Mapping[str, Any] | None = None,
    ) -> Machine:
        """Apply an event and field changes to the stored machine, and write the transition.

        Raises IllegalTransition; LeaseLost if `epoch` is not the machine's any more; LocalError if there is none;
        TypeError for a field that does not exist or changes only by an event.
        """
        fields = _checked(changes or {})

        def step(machine: Machine) -> Machine:
            return replace(machine.on(event, at=at), **fields)

        return await self._update(machine_id, step, at=at, by=by, epoch=epoch, event=str(event), note=note)

    async def change(
        self,
        machine_id: MachineId,
        *,
        at: datetime,
        by: OwnerId,
        epoch: int | None = None,
        note: str = "",
        **fields: Any,
    ) -> Machine:
        """Change fields without an event. Raises as `record` does."""
        _checked(fields)

        def step(machine: Machine) -> Machine:
            return replace(machine, **fields)

        return await self._update(machine_id, step, at=at, by=by, epoch=epoch, event="changed", note=note)

    async def take_over(
        self,
        machine_id: MachineId,
        *,
        expected_owner: OwnerId | None,
        new_owner: OwnerId | None,
        at: datetime,
        note: str,
    ) -> Machine:
        """Make somebody else the owner, if `expected_owner` still is; the epoch goes up. Else LeaseLost."""

        def step(machine: Machine) -> Machine:
            if machine.owner_id != expected_owner:
                raise LeaseLost(
                    f"machine {machine.id} is held by {machine.owner_id or 'nobody'}, not by "
                    f"{expected_owner or 'nobody'}",
                    hint="another comfyctl was quicker; see `comfyctl machines ls`",
                )
            return replace(machine, owner_id=new_owner, epoch=machine.epoch + 1)

        by = new_owner or expected_owner
        event = "taken-over" if new_owner is not None else "let-go"
        return await self._update(machine_id, step, at=at, by=by, epoch=None, event=event, note=note)

    async def _update(
        self,
        machine_id: MachineId,
        step: Callable[[Machine], Machine],
        *,
        at: datetime,
        by: OwnerId | None,
        epoch: int | None,
        event: str,
        note: str,
    ) -> Machine:
        def work(connection: Connection) -> Machine:
            before = held_machine(connection, machine_id)
            still_held(before, epoch)
            after = step(before)
            save_machine(connection, before, after, at=at, by=by, event=event, note=note)
            return after

        return await self._write(work)

    async def story(self, machine_id: MachineId) -> Sequence[Transition]:
        """Return everything that happened to the machine, in order."""
        key = {"machine_id": machine_id}
        return await self._read(lambda connection: [Transition(*row) for row in connection.execute(_STORY, key)])

    async def boot_times(self, *, provider: str, server_type: str, limit: int = 20) -> Sequence[timedelta]:
        """Return how long the newest machines of a type took from request to ready, newest first.

        Machines that were taken over do not count: nobody knows when they were asked for.
        """
        which = {"by": provider, "kind": server_type, "most": limit}
        return await self._read(
            lambda connection: [ready_at - requested_at for requested_at, ready_at in connection.execute(_BOOTS, which)]
        )

    # -- uses ----------------------------------------------------------------------------------------------

    async def begin_use(self, use: Use) -> None:
        """Say that a living job uses a machine; said again, the newer words count.

        Raises LeaseLost if the machine is already stopping or stopped.
        """

        def work(connection: Connection) -> None:
            machine = held_machine(connection, use.machine_id)
            if machine.state in ENDING:
                raise LeaseLost(
                    f"machine {machine.id} is {machine.state}: no job can start on it",
                    hint="run the job again; it gets another machine",
                )
            values = tables.values_of(use)
            same = (_uses.c.machine_id == use.machine_id) & (_uses.c.job_id == use.job_id)
            if connection.execute(update(_uses).where(same).values(values)).rowcount == 0:
                connection.execute(insert(_uses), values)

        await self._write(work)

    async def end_use(self, machine_id: MachineId, job_id: str, *, at: datetime) -> None:
        """Say that the job no longer uses the machine; also stamps the machine's last use. Harmless when repeated."""

        def work(connection: Connection) -> None:
            held_machine(connection, machine_id)
            living = (_uses.c.machine_id == machine_id) & (_uses.c.job_id == job_id) & _uses.c.ended_at.is_(None)
            if connection.execute(update(_uses).where(living).values(ended_at=at)).rowcount:
                connection.execute(update(_machines).where(_machines.c.id == machine_id).values(last_used_at=at))

        await self._write(work)

    async def uses(self, machine_ids: Collection[MachineId] | None = None) -> Sequence[Use]:
        """Return the uses that have not ended."""

        def work(connection: Connection) -> Sequence[Use]:
            if machine_ids is None:
                return [Use(*row) for row in connection.execute(_USES)]
            queries = [_USES.where(_uses.c.machine_id.in_(some)) for some in batches(sorted(set(machine_ids)))]
            found = [Use(*row) for query in queries for row in connection.execute(query)]
            return sorted(found, key=lambda use: (use.started_at, use.job_id))

        return await self._read(work)

    # -- what the processes of one account share -----------------------------------------------------------

    async def reserve_request(
        self, account: str, *, now: datetime, per_second: float, burst: int, reserve: int, urgent: bool
    ) -> timedelta:
        """Take the account's next free moment for a request and return how long to wait until it.

        How the moments are given out, and what a jumping clock does, is told in `bucket.py`.
        """

        def work(connection: Connection) -> timedelta:
            after, wait = limiter.take(
                _bucket(connection, account),
                now=now,
                per_second=per_second,
                burst=burst,
                reserve=reserve,
                urgent=urgent,
            )
            _save_bucket(connection, account, after)
            return wait

        return await self._write(work)

    async def hold_requests(self, account: str, *, now: datetime, wait: timedelta) -> None:
        """Let no request of the account start before `now + wait`; moments already given out stay as they are."""

        def work(connection: Connection) -> None:
            _save_bucket(connection, account, limiter.hold(_bucket(connection, account), now=now, wait=wait))

        await self._write(work)

    async def requests_held(self, account: str, *, now: datetime) -> timedelta:
        """Return for how much longer no request of the account may start; zero if none is held."""

        def work(connection: Connection) -> timedelta:
            row = connection.execute(_HELD, {"name": account}).one_or_none()
            return limiter.held(limiter.Bucket(seen_at=row[0], hold_until=row[1]), now=now) if row else timedelta(0)

        return await self._read(work)

    async def take_launch_lock(self, account: str, *, owner_id: OwnerId, now: datetime) -> OwnerId:
        """Try to become the one process of the account that may launch; return the holder (self if it worked)."""

        def work(connection: Connection) -> OwnerId:
            holder = held_account(connection, account).launch_lock_owner
            if holder is not None:
                return OwnerId(holder)
            values = {"launch_lock_owner": owner_id, "launch_lock_at": now}
            connection.execute(_SAVE_ACCOUNT, {"name": account, **values})
            return owner_id

        return await self._write(work)

    async def break_launch_lock(self, account: str, *, holder: OwnerId) -> None:
        """Free the lock if `holder` still has it (its own, or that of a dead process)."""
        mine = (_accounts.c.account == account) & (_accounts.c.launch_lock_owner == holder)
        freed = update(_accounts).where(mine).values(launch_lock_owner=None, launch_lock_at=None)
        await self._write(lambda connection: connection.execute(freed))


# -- inside a transaction --------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _machines_of(provider: str, account: str, *, open_only: bool, listed: bool = False) -> Select[Any]:
    """Return the query of an account's machines, oldest first; kept, since making it takes longer than asking it.

    `listed`: only those among the parameter `server_ids`.
    """
    query = select(_machines).where(_machines.c.provider == provider, _machines.c.account == account)
    if open_only:
        query = query.where(_machines.c.state.in_(OPEN))
    if listed:
        query = query.where(_LISTED)
    return query.order_by(_machines.c.requested_at, _machines.c.id)


def _bucket(connection: Connection, account: str) -> limiter.Bucket:
    row = held_account(connection, account)
    return limiter.Bucket(row.seen_at, row.line_until, row.urgent_until, row.hold_until)


def _save_bucket(connection: Connection, account: str, bucket: limiter.Bucket) -> None:
    connection.execute(
        _SAVE_ACCOUNT,
        {
            "name": account,
            "seen_at": bucket.seen_at,
            "line_until": bucket.line_until,
            "urgent_until": bucket.urgent_until,
            "hold_until": bucket.hold_until,
        },
    )


def _checked(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    if wrong := sorted(set(fields) - CHANGEABLE):
        raise TypeError(f"not a field of a machine that may be changed: {', '.join(wrong)}")
    return fields


def _expect_row(count: int, what: str) -> None:
    if not count:
        raise no_row(what)
