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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
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

    __slots__ = ("_texts",)

    def __init__(self, text: str, *, postgres: str | None = None) -> None:
        """`postgres`: its own text for PostgreSQL."""
        server = (text if postgres is None else postgres).replace("%", "%%")
        self._texts = {"sqlite": text, "postgresql": _PARAMETER.sub(r"%(\1)s", server)}

    def run(
        self, connection: Connection, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    ) -> CursorResult[*tuple[Any, ...]]:
        """Run it; with a list of parameters, once for each."""
        return connection.exec_driver_sql(self._texts[connection.dialect.name], parameters)


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
# In the order of their numbers: two who lock several rows never wait for each other in a circle.
_HOLD: Final = Sql(
    f"SELECT {COLUMNS} FROM jobs WHERE {_BY_IDS[0]} ORDER BY id",
    postgres=f"SELECT {COLUMNS} FROM jobs WHERE {_BY_IDS[1]} ORDER BY id FOR UPDATE",
)

_SAVED: Final = (
    *("status", "retries_attempted", "run_count", "end_time", "duration", "error_trace", "worker_id"),
    *("lease_expires_at", "token", "reason", "phase", "place", "prompt_id", "not_before", "others_from", "held_sha256"),
    *("lost_count", "kill_count", "progress", "message", "result", "run_counted", "waits_since"),
)
_SAVE: Final = Sql(f"UPDATE jobs SET {', '.join(f'{name} = :{name}' for name in _SAVED)} WHERE id = :id")

_TELL: Final = Sql(
    "INSERT INTO job_events (at, kind, job_id, token, worker_id, data) "
    "VALUES (:at, :kind, :job_id, :token, :worker_id, :data)"
)
_BEGIN: Final = Sql(
    "INSERT INTO job_attempts (job_id, token, run, worker_id, started_at, place, prompt_id) "
    "VALUES (:job_id, :token, :run, :worker_id, :started_at, :place, :prompt_id)"
)
_CLOSE: Final = Sql(
    "UPDATE job_attempts SET ended_at = :at, outcome = :outcome, run = :run, error_code = :error_code, "
    "error_trace = :error_trace, result = :result, error = :error WHERE job_id = :job_id AND token = :token"
)
_CLOSE_OPEN: Final = Sql(
    "UPDATE job_attempts SET ended_at = :at, outcome = :outcome "
    "WHERE job_id = :job_id AND token <= :token AND ended_at IS NULL"
)


def hold(connection: Connection, ids: Iterable[int]) -> dict[RowId, Entry]:
    """Read jobs that are about to change; nobody else changes them until this transaction ends."""
    rows = _HOLD.run(connection, {"ids": listed(connection, sorted(set(ids)))})
    return {row[0]: entry_of(row) for row in rows}


def save(connection: Connection, entries: Sequence[Entry]) -> None:
    """Write jobs that were held: all that ever changes after a job was taken in, but its content and priority."""
    if not entries:
        return
    write = stamps(connection)
    _SAVE.run(connection, [_saved(entry, write) for entry in entries])


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
    if not events:
        return
    at = stamps(connection).exact(now)
    rows = [
        {
            "at": at,
            "kind": kind.value,
            "job_id": job_id,
            "token": token,
            "worker_id": worker_id,
            "data": told_text(data) if data else "{}",
        }
        for kind, job_id, token, worker_id, data in events
    ]
    _TELL.run(connection, rows if len(rows) > 1 else rows[0])


def begin_attempts(connection: Connection, now: datetime, entries: Sequence[Entry], worker: WorkerId) -> None:
    """Write the attempts of jobs just claimed."""
    at = stamps(connection).exact(now)
    rows = [
        {
            "job_id": entry.job.id,
            "token": entry.job.token,
            "run": run_of(entry),
            "worker_id": worker,
            "started_at": at,
            "place": entry.job.place,
            "prompt_id": entry.job.prompt_id,
        }
        for entry in entries
    ]
    _BEGIN.run(connection, rows if len(rows) > 1 else rows[0])


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
    """Return what `close_attempts` writes of one attempt."""
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


def close_attempts(connection: Connection, now: datetime, attempts: Sequence[dict[str, Any]]) -> None:
    """Write how attempts ended."""
    if attempts:
        at = stamps(connection).exact(now)
        _CLOSE.run(connection, [{"at": at, **attempt} for attempt in attempts])


def close_open_attempts(
    connection: Connection, now: datetime, which: Iterable[tuple[RowId, int]], outcome: Outcome
) -> None:
    """End whatever attempt of a job, up to a token, was never ended: its worker is gone or was overruled."""
    at = stamps(connection).exact(now)
    rows = [{"at": at, "outcome": outcome.value, "job_id": job_id, "token": token} for job_id, token in which]
    if rows:
        _CLOSE_OPEN.run(connection, rows)
