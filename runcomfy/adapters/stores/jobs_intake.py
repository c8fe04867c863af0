"""
Putting jobs in: those that programs enqueue, and those that job files ask for.

Nothing runs twice by accident: an idempotency key belongs to one job for ever, a job file is known by its name and its
content, and no two jobs write the same file.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs_rows import Entry, Stamps, entry_of, json_text, request_text, safe, told_text
from runcomfy.adapters.stores.jobs_sql import COLUMNS, Sql, Told, changed, hold, in_list, listed, stamps, tell, write
from runcomfy.domain.exceptions import IdempotencyConflict, NameTaken
from runcomfy.domain.queued import (
    FIRST_PRIORITY,
    LAST_PRIORITY,
    EventKind,
    Ingested,
    NewJob,
    Phase,
    QueuedJob,
    QueueStatus,
    RowId,
)

_NEW: Final = (
    "config_name, job_type, workflow_id, priority, status, retry_limit, metadata, uid, request, created_at, username, "
    "project, idempotency_key, source_path, content_sha256, body_sha256"
)
_INSERT: Final = Sql(f"INSERT INTO jobs ({_NEW}) VALUES ({', '.join(':' + name for name in _NEW.split(', '))})")


def _looked_up(column: str) -> Sql:
    found = in_list(f"jobs.{column}", "values", "text")
    # Said for the planner: what no row has is not in the index.
    text = f"SELECT {COLUMNS} FROM jobs WHERE jobs.{column} IS NOT NULL AND "
    return Sql(text + found[0], postgres=text + found[1])


_BY: Final = {column: _looked_up(column) for column in ("uid", "config_name", "idempotency_key")}

_WRITTEN_AGAIN: Final = (
    "job_type, workflow_id, priority, retry_limit, metadata, request, username, project, source_path, content_sha256"
)
_REWRITE: Final = Sql(
    f"UPDATE jobs SET {', '.join(f'{name} = :{name}' for name in _WRITTEN_AGAIN.split(', '))} WHERE id = :id"
)
_PRIORITY: Final = Sql("UPDATE jobs SET priority = :priority WHERE id = :id")
_SEEN: Final = Sql("UPDATE jobs SET content_sha256 = :content, held_sha256 = :held WHERE id = :id")

_MADE_NAME: Final = re.compile(r"[^\w.-]+", re.ASCII)


class Raced(Exception):
    """Another process took the same name or key in this moment: what follows is another answer, so ask again."""


def clamped(priority: int) -> int:
    """Return a priority in the published range."""
    return min(LAST_PRIORITY, max(FIRST_PRIORITY, priority))


def find(connection: Connection, column: str, values: Iterable[str]) -> list[Entry]:
    """Return the jobs that have one of these values."""
    wanted = {safe(value) for value in values}
    if not wanted:
        return []
    return [entry_of(row) for row in _BY[column].run(connection, {"values": listed(connection, wanted)})]


# -- programs --------------------------------------------------------------------------------------------------


def add(connection: Connection, now: datetime, jobs: Sequence[NewJob], *, default_priority: int) -> list[QueuedJob]:
    """Put jobs in, all or none; those whose idempotency key is known come back as they are."""
    known = {
        entry.job.idempotency_key: (entry.job.uid, entry.body_sha256)
        for entry in find(connection, "idempotency_key", (job.idempotency_key for job in jobs if job.idempotency_key))
    }
    write, rows, uids = stamps(connection), [], []
    for job in jobs:
        key, body = job.idempotency_key and safe(job.idempotency_key), body_of(job)
        if key and key in known:
            uid, body_before = known[key]
            if body != body_before:
                raise IdempotencyConflict(
                    f"the idempotency key {job.idempotency_key} belongs to job {uid}, which has another body",
                    hint="use a new key for a new job",
                    details={"job": uid},
                )
            uids.append(uid)
            continue
        row = _row(job, now, write, default_priority=default_priority)
        row["body_sha256"] = body if key else ""
        rows.append(row)
        uids.append(row["uid"])
        if key:
            known[key] = (row["uid"], body)
    _check_names(connection, rows)
    _insert(connection, now, rows)
    found = {entry.job.uid: entry.job for entry in find(connection, "uid", uids)}
    return [found[uid] for uid in uids]


def body_of(job: NewJob) -> str:
    """Return what tells one body from another: everything that was asked for, whatever the order of its fields."""
    said = {field.name: getattr(job, field.name) for field in fields(job) if field.name != "idempotency_key"}
    said["request"] = json.loads(request_text(job.request))
    plain = json.loads(json_text(said, "the job"))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _row(job: NewJob, now: datetime, write: Stamps, *, default_priority: int) -> dict[str, Any]:
    uid = str(uuid4())
    made = f"{_MADE_NAME.sub('_', job.workflow_id)[:80]}_{now:%Y%m%d%H%M%S}_{uid.replace('-', '')[-12:]}"
    return {
        **_content(job, default_priority=default_priority),
        "config_name": safe(job.config_name) or made,
        "status": QueueStatus.PENDING.value,
        "uid": uid,
        "created_at": write.exact(now),
        "idempotency_key": safe(job.idempotency_key) if job.idempotency_key else None,
        "body_sha256": "",
    }


def _content(job: NewJob, *, default_priority: int) -> dict[str, Any]:
    return {
        "job_type": safe(job.job_type),
        "workflow_id": safe(job.workflow_id),
        "priority": clamped(default_priority if job.priority is None else job.priority),
        "retry_limit": job.retry_limit,
        "metadata": told_text(job.metadata),
        "request": request_text(job.request),
        "username": safe(job.user),
        "project": safe(job.project),
        "source_path": safe(job.source_path),
        "content_sha256": job.content_sha256,
    }


def _check_names(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    keys = {row["config_name"]: row["idempotency_key"] for row in rows}
    for entry in find(connection, "config_name", keys):
        if entry.job.idempotency_key and entry.job.idempotency_key == keys[entry.job.config_name]:
            raise Raced  # it is this very job, which another process put in since the keys were looked up
        raise _name_taken(entry.job)
    if len(keys) < len(rows):
        names = [row["config_name"] for row in rows]
        twice = next(name for name in names if names.count(name) > 1)
        raise NameTaken(f"two of the jobs are named {twice}", hint="give each a name of its own, or none")


def _insert(connection: Connection, now: datetime, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    _INSERT.run(connection, [dict(row) for row in rows])
    new = find(connection, "uid", (row["uid"] for row in rows))
    new.sort(key=lambda entry: entry.job.id)
    tell(connection, now, [_enqueued(entry.job) for entry in new])


def _enqueued(job: QueuedJob) -> Told:
    data = {"file": job.source_path} if job.source_path else {}
    return EventKind.ENQUEUED, job.id, job.token, None, data


def _name_taken(job: QueuedJob) -> NameTaken:
    return NameTaken(
        f"there is a job named {job.config_name} already (number {job.id}, {job.status})",
        hint="give another name, or none: then one is made",
        details={"job": job.uid, "config_name": job.config_name},
    )


# -- job files -------------------------------------------------------------------------------------------------


def ingest(connection: Connection, now: datetime, job: NewJob, *, default_priority: int) -> tuple[Ingested, QueuedJob]:
    """Take up a job file, known by its name and content."""
    found = find(connection, "config_name", [job.config_name])
    if not found:
        row = _row(job, now, stamps(connection), default_priority=default_priority)
        _insert(connection, now, [row])
        return Ingested.NEW, find(connection, "uid", [row["uid"]])[0].job
    entry = hold(connection, [found[0].job.id]).get(found[0].job.id)
    if entry is None:  # a user deleted it in this moment
        return ingest(connection, now, job, default_priority=default_priority)
    word = _what_to_do(entry.job, job)
    if word in (Ingested.UPDATED, Ingested.AGAIN):
        _write_again(connection, now, entry, job, word, default_priority=default_priority)
    elif word is Ingested.PRIORITY:
        _only_priority(connection, now, entry.job, job, default_priority=default_priority)
    elif word is Ingested.HELD and entry.job.held_sha256 != job.content_sha256:
        _SEEN.run(connection, {"id": entry.job.id, "content": entry.job.content_sha256, "held": job.content_sha256})
        data = {"file": job.source_path}
        tell(connection, now, [(EventKind.HELD, entry.job.id, entry.job.token, entry.job.worker_id, data)])
    elif word is Ingested.SAME and entry.job.held_sha256:
        # It was changed and changed back: what runs, or ran, is what the file says.
        _SEEN.run(connection, {"id": entry.job.id, "content": entry.job.content_sha256, "held": ""})
    return word, hold(connection, [entry.job.id])[entry.job.id].job


def _what_to_do(known: QueuedJob, job: NewJob) -> Ingested:
    if known.content_sha256 == job.content_sha256:
        return Ingested.SAME
    # A row without a file was enqueued by a program under that name, or written by hand: then the file says what it is.
    of_another = known.source_path != safe(job.source_path) if known.source_path else known.request is not None
    if of_another:
        return Ingested.TAKEN
    if known.cancelled:
        return Ingested.CANCELLED
    match known.status:
        case QueueStatus.PENDING:
            return Ingested.UPDATED
        case QueueStatus.PROCESSING:
            return Ingested.HELD
        case QueueStatus.DONE if not known.held_sha256:
            return Ingested.PRIORITY
    return Ingested.AGAIN


def _write_again(
    connection: Connection, now: datetime, entry: Entry, job: NewJob, word: Ingested, *, default_priority: int
) -> None:
    content = _content(job, default_priority=default_priority)
    _REWRITE.run(connection, {"id": entry.job.id, **content})
    data = {"file": job.source_path, "again": word is Ingested.AGAIN}
    event = (EventKind.UPDATED, entry.job.id, entry.job.token, None, data)
    write(connection, now, jobs=[anew(entry)], events=[event])


def anew(entry: Entry) -> Entry:
    """Return a job as one that waits for its first run; a prompt of before must be seen ended first."""
    job = entry.job
    at_a_server = job.phase is not Phase.NONE
    return changed(
        entry,
        status=QueueStatus.PENDING,
        retries_attempted=0,
        lost_count=0,
        kill_count=0,
        end_time=None,
        duration=None,
        error_trace=None,
        worker_id=None,
        lease_expires_at=None,
        reason="",
        phase=Phase.ENDING if at_a_server else Phase.NONE,
        place=job.place if at_a_server else None,
        prompt_id=job.prompt_id if at_a_server else None,
        not_before=None,
        others_from=None,
        held_sha256="",
        progress=0.0,
        message="",
        result={},
        run_counted=False,
    )


def _only_priority(
    connection: Connection, now: datetime, known: QueuedJob, job: NewJob, *, default_priority: int
) -> None:
    # The new content is remembered, so that it is not looked at again; what ran is in the log and the results.
    _SEEN.run(connection, {"id": known.id, "content": job.content_sha256, "held": ""})
    set_priority(connection, now, known, default_priority if job.priority is None else job.priority, by="")


def set_priority(connection: Connection, now: datetime, job: QueuedJob, priority: int, *, by: str) -> None:
    """Change a priority, and tell it if it is another one."""
    if (wanted := clamped(priority)) == job.priority:
        return
    _PRIORITY.run(connection, {"id": job.id, "priority": wanted})
    data = {"priority": wanted, "before": job.priority, **({"by": by} if by else {})}
    tell(connection, now, [(EventKind.PRIORITY, RowId(job.id), job.token, None, data)])
