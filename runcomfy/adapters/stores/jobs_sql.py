"""
The queue's statements, and the few steps that every change of a job is made of: hold its row, save it, tell it.

They are SQL as the drivers take it: a queue that claims and completes thousands of jobs a second would spend half its
time in building and unpacking expressions. Parameters are written `:name`; where the two databases differ, a statement
has a text for each.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Connection, CursorResult

from runcomfy.adapters.stores.jobs_rows import (
    ATTEMPT_COLUMNS,
    EVENT_COLUMNS,
    JOB_COLUMNS,
    Entry,
    Stamps,
    entry_of,
    safe,
    told_text,
)
from runcomfy.domain.queued import EventKind, Outcome, QueuedJob, RowId, WorkerId

Told = tuple[EventKind, RowId | None, int, WorkerId | None, Mapping[str, Any]]
"""An event: kind, job, token, worker, data."""

_STAMPS: Final = {name: Stamps(name) for name in ("sqlite", "postgresql")}
_PARAMETER: Final = re.compile(r"(?<![:\w]):([a-z_][a-z0-9_]*)")


class Sql:
    """A statement in the words of each driver."""

    __slots__ = ("_server", "_text")

    def __init__(self, text: str, *, postgres: str | None = None) -> None:
        """`postgres`: its own text for PostgreSQL."""
        self._text, self._server = text, text if postgres is None else postgres

    def text(self, dialect: str) -> str:
        """Return it in the words of `sqlite` or `postgresql`."""
        return self._text if dialect == "sqlite" else _in_server_words(self._server)

    def run(
        self, connection: Connection, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> CursorResult[*tuple[Any, ...]]:
        """Run it; with a list of parameters, once for each."""
        return connection.exec_driver_sql(self.text(connection.dialect.name), parameters)


@lru_cache(maxsize=512)
def _in_server_words(text: str) -> str:
    """Return a statement as the driver of PostgreSQL takes it; kept, since most are asked for again and again."""
    return _PARAMETER.sub(r"%(\1)s", text.replace("%", "%%"))


def listed(connection: Connection, values: Iterable[Any]) -> Any:
    """Return values as `IN_LIST` takes them."""
    return json.dumps(list(values)) if connection.dialect.name == "sqlite" else list(values)


def in_list(column: str, name: str, kind: str) -> tuple[str, str]:
    """Return `column` is one of `:name`, for SQLite and for PostgreSQL."""
    return f"{column} IN (SELECT value FROM json_each(:{name}))", f"{column} = ANY(CAST(:{name} AS {kind}[]))"


def stamps(connection: Connection) -> Stamps:
    """Return how this database writes times."""
    return _STAMPS[connection.dialect.name]


COLUMNS: Final = ", ".join(f"jobs.{name}" for name in JOB_COLUMNS)
ATTEMPTS: Final = ", ".join(ATTEMPT_COLUMNS)
EVENTS: Final = ", ".join(EVENT_COLUMNS)

# -- one job ---------------------------------------------------------------------------------------------------

_BY_IDS: Final = in_list("jobs.id", "ids", "bigint")
# Nobody waits for a row: while somebody's transaction is open on one, everything else goes on. And who does not wait
# cannot wait in a circle.
_HOLD: Final = Sql(
    f"SELECT {COLUMNS} FROM jobs WHERE {_BY_IDS[0]} ORDER BY id",
    postgres=f"SELECT {COLUMNS} FROM jobs WHERE {_BY_IDS[1]} ORDER BY id FOR UPDATE SKIP LOCKED",
)

_THERE: Final = Sql(f"SELECT id FROM jobs WHERE {_BY_IDS[0]}", postgres=f"SELECT id FROM jobs WHERE {_BY_IDS[1]}")

# What is written of jobs, attempts and events, with PostgreSQL's types.
_SAVED: Final[Mapping[str, str]] = {
    "id": "bigint",
    "status": "text",
    "retries_attempted": "integer",
    "run_count": "integer",
    "end_time": "timestamptz",
    "duration": "double precision",
    "error_trace": "text",
    "worker_id": "text",
    "lease_expires_at": "timestamptz",
    "token": "bigint",
    "reason": "text",
    "phase": "text",
    "place": "text",
    "prompt_id": "text",
    "not_before": "timestamptz",
    "others_from": "timestamptz",
    "held_sha256": "text",
    "lost_count": "integer",
    "kill_count": "integer",
    "progress": "double precision",
    "message": "text",
    "result": "text",
    "run_counted": "integer",
    "waits_since": "timestamptz",
}
_CLOSED: Final[Mapping[str, str]] = {
    "job_id": "bigint",
    "token": "bigint",
    "ended_at": "timestamptz",
    "outcome": "text",
    "run": "integer",
    "error_code": "text",
    "error_trace": "text",
    "result": "text",
    "error": "text",
}
_TOLD: Final[Mapping[str, str]] = {
    "at": "timestamptz",
    "kind": "text",
    "job_id": "bigint",
    "token": "bigint",
    "worker_id": "text",
    "data": "text",
}


def _assigned(columns: Mapping[str, str], keys: Collection[str], source: str) -> str:
    return ", ".join(f"{name} = {source}{name}" for name in columns if name not in keys)


_SAVE: Final = Sql(f"UPDATE jobs SET {_assigned(_SAVED, {'id'}, ':')} WHERE id = :id")
_CLOSE: Final = Sql(
    f"UPDATE job_attempts SET {_assigned(_CLOSED, {'job_id', 'token'}, ':')} WHERE job_id = :job_id AND token = :token"
)
_TELL: Final = Sql(f"INSERT INTO job_events ({', '.join(_TOLD)}) VALUES ({', '.join(':' + name for name in _TOLD)})")


def _rows(name: str, columns: Mapping[str, str]) -> str:
    return f"json_to_recordset(CAST(:{name} AS json)) AS row({', '.join(f'{c} {kind}' for c, kind in columns.items())})"


# All of it in one way there and back.
_WRITE: Final = Sql(
    "SELECT 1",
    postgres=(
        f"WITH saved AS (UPDATE jobs SET {_assigned(_SAVED, {'id'}, 'row.')} FROM {_rows('jobs', _SAVED)} "
        # Their numbers are said again, so that no plan reads the whole table, whatever the server believes of its size.
        "WHERE jobs.id = row.id AND jobs.id = ANY(CAST(:saved AS bigint[]))), "
        f"closed AS (UPDATE job_attempts SET {_assigned(_CLOSED, {'job_id', 'token'}, 'row.')} "
        f"FROM {_rows('attempts', _CLOSED)} "
        "WHERE job_attempts.job_id = row.job_id AND job_attempts.token = row.token "
        "AND job_attempts.job_id = ANY(CAST(:closed AS bigint[]))) "
        f"INSERT INTO job_events ({', '.join(_TOLD)}) SELECT {', '.join(f'row.{name}' for name in _TOLD)} "
        f"FROM {_rows('events', {**_TOLD, 'n': 'integer'})} ORDER BY row.n"
    ),
)
_CLOSE_OPEN: Final = Sql(
    "UPDATE job_attempts SET ended_at = :at, outcome = :outcome "
    "WHERE job_id = :job_id AND token <= :token AND ended_at IS NULL"
)


class RowLocked(Exception):
    """Another program, or another process of ours, has a row that is to be changed in its open transaction."""


def hold(connection: Connection, ids: Iterable[int]) -> dict[RowId, Entry]:
    """Read jobs that are about to change; nobody else changes them until this transaction ends. Raises RowLocked."""
    found, locked = hold_some(connection, ids)
    if locked:
        raise RowLocked
    return found


def hold_some(connection: Connection, ids: Iterable[int]) -> tuple[dict[RowId, Entry], set[int]]:
    """Read those that nobody else has; also return the numbers of the others that exist."""
    wanted = set(ids)
    rows = _HOLD.run(connection, {"ids": listed(connection, sorted(wanted))})
    found = {RowId(row[0]): entry_of(row) for row in rows}
    missing = wanted - found.keys()
    if not missing or connection.dialect.name == "sqlite":  # a file has one writer at a time
        return found, set()
    return found, {job_id for (job_id,) in _THERE.run(connection, {"ids": listed(connection, missing)})}


def write(
    connection: Connection,
    now: datetime,
    *,
    jobs: Sequence[Entry] = (),
    attempts: Sequence[dict[str, Any]] = (),
    events: Sequence[Told] = (),
) -> None:
    """Write jobs that were held, how attempts ended (`closing`), and the events that tell it.

    Of a job all is written that ever changes after it was taken in, but its content and priority.
    """
    write = stamps(connection)
    at = write.exact(now)
    saved = [_saved(entry, write) for entry in jobs]
    closed = [{"ended_at": at, **attempt} for attempt in attempts]
    told = [_told(at, event) for event in events]
    if connection.dialect.name == "postgresql":
        for number, event in enumerate(told):
            event["n"] = number
        rows = {"jobs": saved, "attempts": closed, "events": told}
        ids = {"saved": [row["id"] for row in saved], "closed": [row["job_id"] for row in closed]}
        _WRITE.run(connection, {**{name: json.dumps(values, default=str) for name, values in rows.items()}, **ids})
        return
    for statement, values in ((_SAVE, saved), (_CLOSE, closed), (_TELL, told)):
        if values:
            statement.run(connection, values if len(values) > 1 else values[0])


def _told(at: Any, event: Told) -> dict[str, Any]:
    kind, job_id, token, worker_id, data = event
    return {
        "at": at,
        "kind": kind.value,
        "job_id": job_id,
        "token": token,
        "worker_id": worker_id,
        "data": told_text(data) if data else "{}",
    }


def _saved(entry: Entry, write: Stamps) -> dict[str, Any]:
    job = entry.job
    return {
        "id": job.id,
        "status": job.status.value,
        "retries_attempted": job.retries_attempted,
        "run_count": job.run_count,
        "end_time": write.whole(job.end_time),
        "duration": job.duration,
        "error_trace": job.error_trace,
        "worker_id": job.worker_id,
        "lease_expires_at": write.whole(job.lease_expires_at),
        "token": job.token,
        "reason": safe(job.reason),
        "phase": job.phase.value,
        "place": job.place and safe(job.place),
        "prompt_id": job.prompt_id and safe(job.prompt_id),  # a server may choose its own
        "not_before": write.exact(job.not_before),
        "others_from": write.exact(job.others_from),
        "held_sha256": job.held_sha256,
        "lost_count": job.lost_count,
        "kill_count": job.kill_count,
        "progress": job.progress,
        "message": job.message,
        "result": told_text(job.result) if job.result else "{}",
        "run_counted": int(entry.run_counted),
        "waits_since": write.exact(entry.waits_since),
    }


def changed(entry: Entry, *, run_counted: bool | None = None, waits_since: datetime | None = None, **job: Any) -> Entry:
    """Return an entry with other fields. `waits_since` is forgotten unless it is given."""
    return replace(
        entry,
        job=replace(entry.job, **job),
        run_counted=entry.run_counted if run_counted is None else run_counted,
        waits_since=waits_since,
    )


# -- what happened ---------------------------------------------------------------------------------------------


def tell(connection: Connection, now: datetime, events: Sequence[Told]) -> None:
    """Write events, in the transaction of what they tell."""
    if events:
        write(connection, now, events=events)


def run_of(entry: Entry) -> int:
    """Return the number of the run that is going on: counted already, or about to be."""
    return entry.job.run_count + (not entry.run_counted)


def closing(
    job: QueuedJob,
    token: int,
    outcome: Outcome,
    *,
    code: str = "",
    trace: str = "",
    error: str | None = None,
    result: Mapping[str, Any] | None = None,
    run: int,
) -> dict[str, Any]:
    """Return what `write` writes of an attempt that ended."""
    return {
        "job_id": job.id,
        "token": token,
        "outcome": outcome.value,
        "run": run,
        "error_code": safe(code),
        "error_trace": trace,
        "result": told_text(result) if result else "{}",
        "error": error,
    }


def close_open_attempts(
    connection: Connection, now: datetime, which: Iterable[tuple[RowId, int]], outcome: Outcome
) -> None:
    """End whatever attempt of a job, up to a token, was never ended: its worker is gone or was overruled."""
    at = stamps(connection).exact(now)
    rows = [{"at": at, "outcome": outcome.value, "job_id": job_id, "token": token} for job_id, token in which]
    if rows:
        _CLOSE_OPEN.run(connection, rows)
