"""What the plan learns from and what it decided, in the store: jobs' time on machines, signals, decisions, the role."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Select, bindparam, insert, select

from runcomfy.adapters.stores import roles, tables
from runcomfy.adapters.stores import sql_parts as parts
from runcomfy.domain.decision import Decision
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId, OwnerId
from runcomfy.domain.signal import Signal
from runcomfy.domain.work import Work

_work, _signals, _decisions = tables.machine_work, tables.signals, tables.decisions

_OLDEST_FIRST: Final = (_work.c.began_at, _work.c.machine_id, _work.c.job_id, _work.c.attempt)
_SAY: Final = insert(_signals)
_DECIDE: Final = insert(_decisions)
_SIGNALS: Final = select(*(_signals.c[name] for name in tables.SIGNAL_FIELDS)).order_by(
    _signals.c.at, _signals.c.number
)
_SIGNALS_SINCE: Final = _SIGNALS.where(_signals.c.at >= bindparam("since"))
_DECISIONS: Final = select(*(_decisions.c[name] for name in tables.DECISION_FIELDS)).order_by(
    _decisions.c.number.desc()
)


@cache
def _works_by(*names: str) -> Select[Any]:
    """Return the query of works with these parameters; kept, since making it takes longer than asking it."""
    bounds = {
        "jobs": _work.c.job_id.in_(bindparam("jobs", expanding=True)),
        "machines": _work.c.machine_id.in_(bindparam("machines", expanding=True)),
        "since": _work.c.began_at >= bindparam("since"),
        "until": _work.c.began_at < bindparam("until"),
    }
    query = select(_work).where(*(bound for name, bound in bounds.items() if name in names))
    if "most" in names:
        query = query.order_by(*(column.desc() for column in _OLDEST_FIRST)).limit(bindparam("most"))
    return query


class SignalsPart(parts.SqlPart):
    """Work, signals, decisions and roles of `SqlStore`."""

    async def put_work(self, work: Work) -> None:
        """Write down a job's time on a machine, or what is newer of it: known by machine, job and attempt."""
        values = tables.values_of(work)
        await self._write(lambda connection: connection.execute(parts.insert_or_replace(connection, _work), values))

    async def works(
        self,
        *,
        machine_ids: Collection[MachineId] | None = None,
        job_ids: Collection[JobId] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> Sequence[Work]:
        """Return what began in [`since`, `until`), oldest first; with `limit` the newest so many."""
        jobs = None if job_ids is None else sorted(set(job_ids))
        given = {"jobs": jobs, "since": since, "until": until, "most": limit}
        asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        each = [asked]
        if machine_ids is not None:
            each = [{**asked, "machines": some} for some in parts.batches(sorted(set(machine_ids)))]

        def work(connection: Connection) -> Sequence[Work]:
            found = [Work(*row) for one in each for row in connection.execute(_works_by(*one), one)]
            found.sort(key=lambda done: (done.began_at, done.machine_id, done.job_id, done.attempt))
            return found if limit is None else found[max(0, len(found) - limit) :]

        return await self._read(work)

    async def signal(self, signal: Signal) -> None:
        """Write down what a client has told."""
        values = tables.values_of(signal)
        await self._write(lambda connection: connection.execute(_SAY, values))

    async def signals(self, *, since: datetime) -> Sequence[Signal]:
        """Return what was told since then, oldest first."""
        when = {"since": since}
        return await self._read(lambda connection: [Signal(*row) for row in connection.execute(_SIGNALS_SINCE, when)])

    async def decide(self, decisions: Sequence[Decision]) -> None:
        """Write down what the plan decided, all or none."""
        values = [tables.values_of(decision) for decision in decisions]
        if values:
            await self._write(lambda connection: connection.execute(_DECIDE, values))

    async def decisions(self, *, since: datetime | None = None, limit: int = 200) -> Sequence[Decision]:
        """Return the newest decisions, oldest first."""
        query = _DECISIONS if since is None else _DECISIONS.where(_decisions.c.at >= since)
        newest = query.limit(limit)
        found = await self._read(lambda connection: [Decision(*row) for row in connection.execute(newest)])
        return found[::-1]

    async def take_role(
        self, role: str, owner_id: OwnerId, *, lease: timedelta, now: datetime | None = None
    ) -> int | None:
        """Take or keep a role that one process of the database has at a time; return its epoch, None if held.

        The time is the database's, read when the role's row is held; `now` stands in for it.
        """
        clock = self._database.now if now is None else lambda: now
        return await self._write(lambda connection: roles.take_role(connection, clock, role, owner_id, lease=lease))

    async def drop_role(self, role: str, owner_id: OwnerId) -> None:
        """Give the role up, if this owner holds it."""
        await self._write(lambda connection: roles.drop_role(connection, role, owner_id))
