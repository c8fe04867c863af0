"""
Looking at the queue: jobs, attempts, the event log.

Numbers of events are given out before their transaction is committed, so on a server a later number may be seen
before an earlier one. A reader that went on from it would never see the other. So the log is read up to the first
number that is missing, until it is sure that nobody will fill it: every transaction that was going on when the gap
was seen has ended, or what comes after it is older than any transaction of ours can be.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, select

from runcomfy.adapters.stores import tables
from runcomfy.adapters.stores.jobs_claim import MAY_START, NOT_BARRED, barred_in
from runcomfy.adapters.stores.jobs_rows import attempt_of, event_of, job_of, safe, table_in, time_in
from runcomfy.adapters.stores.jobs_sql import ATTEMPTS, COLUMNS, EVENTS, Sql, in_list, listed, stamps
from runcomfy.domain.job import JobId
from runcomfy.domain.queued import (
    Arrival,
    Attempt,
    Barred,
    JobEvent,
    PastResult,
    QueuedJob,
    QueueStatus,
    RowId,
    Waiting,
)

PAUSES: Final = select(tables.queue_pauses).order_by(tables.queue_pauses.c.since, tables.queue_pauses.c.scope)
_BY_ID: Final = Sql(f"SELECT {COLUMNS} FROM jobs WHERE id = :id")
_BY_TEXT: Final = Sql(
    f"SELECT {COLUMNS} FROM jobs WHERE config_name = :text UNION SELECT {COLUMNS} FROM jobs WHERE uid = :text"
)
_COUNTS: Final = Sql("SELECT status, count(*) FROM jobs GROUP BY status")
_WAITING: Final = "SELECT workflow_id, username, project, count(*), min(created_at) FROM jobs WHERE "
_BY_KIND: Final = " GROUP BY workflow_id, username, project"
_BACKLOG: Final = Sql(_WAITING + MAY_START[0] + _BY_KIND, postgres=_WAITING + MAY_START[1] + _BY_KIND)
_ARRIVALS: Final = Sql(
    "SELECT id, uid, workflow_id, username, project, created_at, end_time FROM jobs "
    "WHERE id > :after ORDER BY id DESC LIMIT :count"
)
_NAMES: Final = in_list("config_name", "names", "text")
_FILES_TEXT: Final = "SELECT config_name, content_sha256, held_sha256, status, source_path FROM jobs WHERE "
_FILES: Final = Sql(_FILES_TEXT + _NAMES[0], postgres=_FILES_TEXT + _NAMES[1])
_KEYS: Final = in_list("idempotency_key", "keys", "text")
_KNOWN_KEYS: Final = Sql(
    f"SELECT idempotency_key FROM jobs WHERE {_KEYS[0]}", postgres=f"SELECT idempotency_key FROM jobs WHERE {_KEYS[1]}"
)
_ATTEMPTS: Final = Sql(f"SELECT {ATTEMPTS} FROM job_attempts WHERE job_id = :job_id ORDER BY token")
_OF_JOB: Final = Sql(
    f"SELECT {EVENTS} FROM job_events WHERE job_id = :job_id AND number > :after ORDER BY number LIMIT :count"
)
_ALL: Final = Sql(f"SELECT {EVENTS} FROM job_events WHERE number > :after ORDER BY number LIMIT :count")
_SETTLED: Final = Sql(
    "SELECT max(number) AS number FROM job_events",
    # By number and not by time: an old event is found at once, and what is newer is read through its gaps.
    postgres="SELECT number FROM job_events WHERE at <= :settled ORDER BY number DESC LIMIT 1",
)
_IDS: Final = in_list("jobs.id", "ids", "bigint")
_THESE: Final = Sql(
    f"SELECT {COLUMNS} FROM jobs WHERE {_IDS[0]}", postgres=f"SELECT {COLUMNS} FROM jobs WHERE {_IDS[1]}"
)
# Larger than the number of every transaction that has written anything yet.
_NEXT_TRANSACTION: Final = Sql("SELECT 0", postgres="SELECT txid_current()")
_OLDEST_GOING_ON: Final = Sql("SELECT 0", postgres="SELECT txid_snapshot_xmin(txid_current_snapshot())")

_DONE_TEXT: Final = "SELECT id, end_time FROM jobs WHERE status = 'done' "
_NEWEST_FIRST: Final = "ORDER BY id DESC LIMIT :count"
_DONE: Final = Sql(_DONE_TEXT + _NEWEST_FIRST)
_DONE_OF: Final = Sql(_DONE_TEXT + "AND workflow_id = :workflow " + _NEWEST_FIRST)
_RESULTS_TEXT: Final = "SELECT id, workflow_id, end_time, result FROM jobs WHERE status = 'done' AND "
_RESULTS: Final = Sql(_RESULTS_TEXT + _IDS[0], postgres=_RESULTS_TEXT + _IDS[1])

SURELY_OVER: Final = timedelta(minutes=5)
"""Longer than a transaction of ours can last: the server ends statements and idle transactions after a minute."""

MAX_NUMBER: Final = 2**63 - 1


def find(connection: Connection, key: int | str) -> QueuedJob | None:
    """Return the job with this number, uid or config name."""
    if not isinstance(key, str):
        row = _BY_ID.run(connection, {"id": key}).first() if abs(key) <= MAX_NUMBER else None
        return None if row is None else job_of(row)
    rows = _BY_TEXT.run(connection, {"text": safe(key)}).fetchall()
    if rows:
        # Somebody may have named a job like another one's uid.
        return min((job_of(row) for row in rows), key=lambda job: job.config_name != safe(key))
    return find(connection, int(key)) if key.isascii() and key.isdigit() and len(key) < 20 else None


def newest(
    connection: Connection,
    *,
    before: int | None,
    status: QueueStatus | None,
    workflow_id: str | None,
    user: str | None,
    limit: int,
) -> list[QueuedJob]:
    """Return a page of jobs by number, the newest first."""
    conditions, parameters = [], dict[str, Any]()
    if status is not None:
        conditions.append(f"status = '{QueueStatus(status).value}'")
    for column, wanted in (("workflow_id", workflow_id), ("username", user)):
        if wanted is not None:
            conditions.append(f"{column} = :{column}")
            parameters[column] = safe(wanted)
    if before is not None:
        conditions.append("id < :before")
        parameters["before"] = max(-MAX_NUMBER, min(before, MAX_NUMBER))
    where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
    query = Sql(f"SELECT {COLUMNS} FROM jobs {where}ORDER BY id DESC LIMIT {max(0, int(limit))}")
    return [job_of(row) for row in query.run(connection, parameters)]


def these(connection: Connection, ids: Collection[RowId]) -> dict[RowId, QueuedJob]:
    """Return jobs by number; those that there are."""
    rows = _THESE.run(connection, {"ids": listed(connection, ids)})
    return {job.id: job for job in map(job_of, rows)}


def past_results(
    connection: Connection, *, workflow: str | None, limit: int, known: Collection[tuple[RowId, datetime]]
) -> list[PastResult]:
    """Return what came of the newest jobs that are done, but for those that the reader has already."""
    parameters: dict[str, Any] = {"count": max(0, limit)}
    if workflow is not None:
        parameters["workflow"] = safe(workflow)
    ended = [
        (RowId(row[0]), time_in(row[1]))
        for row in (_DONE if workflow is None else _DONE_OF).run(connection, parameters)
    ]
    wanted = [job_id for job_id, at in ended if at is not None and (job_id, at) not in known]
    found: list[PastResult] = []
    for job_id, name, end_time, result in (
        _RESULTS.run(connection, {"ids": listed(connection, wanted)}) if wanted else ()
    ):
        if (at := time_in(end_time)) is not None:
            found.append(PastResult(RowId(job_id), str(name), at, table_in(result)))
    return found


def settled(connection: Connection, now: datetime) -> int:
    """Return an event's number above which every event of the future is; 0 if there is no such event."""
    number = _SETTLED.run(connection, {"settled": stamps(connection).exact(now - SURELY_OVER)}).scalar()
    return int(number) if number is not None else 0


def known_keys(connection: Connection, keys: Collection[str]) -> set[str]:
    """Return those idempotency keys that a job has."""
    by_written = {safe(key): key for key in keys}
    rows = _KNOWN_KEYS.run(connection, {"keys": listed(connection, by_written)})
    return {by_written[written] for (written,) in rows}


def jobs(
    connection: Connection,
    *,
    status: QueueStatus | None,
    source_dir: str | None,
    limit: int | None,
    newest_first: bool,
    barred: Barred | None = None,
) -> list[QueuedJob]:
    """Return jobs: pending ones by priority and age, others by number."""
    conditions, parameters = [], dict[str, Any]()
    if status is not None:
        # Said as a word: an index of the pending rows is of use only to who names them.
        conditions.append(f"status = '{QueueStatus(status).value}'")
    if source_dir is not None:
        end = "\\" if "\\" in source_dir and "/" not in source_dir else "/"
        parameters["folder"] = safe(source_dir.rstrip("/\\") + end)
        conditions.append("substr(source_path, 1, length(:folder)) = :folder")
    if barred:
        parameters |= barred_in(connection, barred)
        conditions.append(NOT_BARRED[connection.dialect.name != "sqlite"])
    where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
    turn = " DESC" if newest_first else ""
    order = f"priority{turn}, id{turn}" if status is QueueStatus.PENDING else f"id{turn}"
    count = "" if limit is None else f" LIMIT {max(0, int(limit))}"
    query = f"SELECT {COLUMNS} FROM jobs {where}ORDER BY {order}{count}"
    server = query.replace("length(:folder)", "length(CAST(:folder AS text))")
    return [job_of(row) for row in Sql(query, postgres=server).run(connection, parameters)]


def counts(connection: Connection) -> Mapping[QueueStatus, int]:
    """Return how many jobs there are of each status; every status is named."""
    found = {str(status): count for status, count in _COUNTS.run(connection)}
    return {status: found.get(status.value, 0) for status in QueueStatus}


def backlog(connection: Connection, now: datetime, places: Collection[str]) -> list[Waiting]:
    """Return what could be claimed now, counted: however much waits, as many rows as there are kinds of it."""
    parameters = {"now": stamps(connection).exact(now), "places": listed(connection, places)}
    return [
        Waiting(str(workflow_id), str(user), str(project), int(count), time_in(oldest))
        for workflow_id, user, project, count, oldest in _BACKLOG.run(connection, parameters)
    ]


def arrivals(connection: Connection, *, after: int, limit: int) -> list[Arrival]:
    """Return the newest jobs with a number above `after`, oldest first."""
    rows = _ARRIVALS.run(connection, {"after": after, "count": max(0, limit)}).fetchall()
    return [
        Arrival(RowId(row_id), JobId(str(uid)), str(workflow_id), str(user), str(project), time_in(at), time_in(ended))
        for row_id, uid, workflow_id, user, project, at, ended in reversed(rows)
    ]


def known_files(connection: Connection, names: Collection[str]) -> Mapping[str, tuple[str, str, QueueStatus, str]]:
    """Return content, held content, status and path of the jobs with these names."""
    asked = {safe(name): name for name in names}
    found = _FILES.run(connection, {"names": listed(connection, asked)}) if asked else ()
    return {asked[name]: (content, held, QueueStatus(status), path) for name, content, held, status, path in found}


def attempts(connection: Connection, job_id: RowId) -> list[Attempt]:
    """Return every attempt of a job, in order."""
    return [attempt_of(row) for row in _ATTEMPTS.run(connection, {"job_id": job_id})]


class EventLog:
    """Reads the event log. Remembers the gaps it saw, as the databases of one process do."""

    def __init__(self) -> None:
        self._gaps: dict[int, int] = {}
        """Number after a gap -> the first transaction that began after it was seen."""

    def read(
        self, connection: Connection, now: datetime, *, after: int, job_id: RowId | None, limit: int
    ) -> list[JobEvent]:
        """Return events with a number above `after`, in order, none of which can be preceded by a later one."""
        parameters = {"after": after, "count": max(0, limit)}
        if job_id is not None:
            # Events of one job are written by who has locked its row: their numbers are in the order of the commits.
            return [event_of(row) for row in _OF_JOB.run(connection, {**parameters, "job_id": job_id})]
        if connection.dialect.name == "sqlite":
            return [event_of(row) for row in _ALL.run(connection, parameters)]
        self._gaps = {number: seen for number, seen in self._gaps.items() if number > after}
        while True:
            # Asked before the rows: what was going on then and has ended since is among them.
            oldest = int(_OLDEST_GOING_ON.run(connection).scalar_one()) if self._gaps else 0
            events = [event_of(row) for row in _ALL.run(connection, parameters)]
            end = self._first_open_gap(events, now, after, oldest)
            if end is None:
                return events
            if events[end].number in self._gaps:
                return events[:end]
            self._gaps[events[end].number] = int(_NEXT_TRANSACTION.run(connection).scalar_one())

    def _first_open_gap(self, events: Sequence[JobEvent], now: datetime, after: int, oldest: int) -> int | None:
        """Return which event comes after a number that may still be filled."""
        expected = after + 1
        for index, event in enumerate(events):
            if event.number != expected and event.at > now - SURELY_OVER:
                seen = self._gaps.get(event.number)
                if seen is None or oldest < seen:
                    return index
            expected = event.number + 1
        return None
