"""
Claiming: which pending jobs a worker gets, and the statement that makes them its own.

Without limits one statement picks and takes. With limits or a fair order the pick is made here, row by row, from as
few rows as it takes: what may not start now is passed over inside the database, so that a long line of jobs that wait
for their workflow's turn is never read. Such claims are made one at a time over the whole database, or two of them
could each take the last free place.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs_rows import Entry, entry_of
from runcomfy.adapters.stores.jobs_sql import (
    COLUMNS,
    Sql,
    close_open_attempts,
    in_list,
    listed,
    run_of,
    stamps,
    tell,
)
from runcomfy.domain.queued import ClaimLimits, EventKind, Outcome, Phase, RowId, WorkerId

_AT_PLACES: Final = in_list("place", "places", "text")
_BY_IDS: Final = in_list("id", "ids", "bigint")


def _may_start(at_places: str) -> str:
    # A wait that was written in the future means that the clock was set back since; it means nothing any more.
    # A prompt that may run is for workers that reach its place; the planner says from when for others too.
    return (
        "status = 'pending' AND (not_before IS NULL OR not_before <= :now OR waits_since > :now) "
        f"AND (phase = '' OR place IS NULL OR others_from <= :now OR {at_places})"
    )


MAY_START: Final = (_may_start(_AT_PLACES[0]), _may_start(_AT_PLACES[1]))
"""What a worker may claim, for SQLite and for PostgreSQL."""

# A run that goes on with the prompt of an earlier worker began when that one claimed it, and is not counted again.
_GOES_ON: Final = "phase IN ('submitting', 'submitted')"
_SET: Final = (
    "SET status = 'processing', token = token + 1, worker_id = :worker, lease_expires_at = :lease_expires_at, "
    f"start_time = CASE WHEN {_GOES_ON} AND start_time IS NOT NULL THEN start_time ELSE :now_whole END, "
    f"run_began_at = CASE WHEN {_GOES_ON} AND run_began_at IS NOT NULL THEN run_began_at ELSE :now END, "
    f"run_counted = CASE WHEN {_GOES_ON} THEN run_counted ELSE 0 END, "
    "place = CASE WHEN phase = '' THEN :home ELSE place END, "
    "end_time = NULL, reason = '', not_before = NULL, waits_since = NULL, others_from = NULL, message = '', "
    f"result = '{{}}', progress = CASE WHEN {_GOES_ON} THEN progress ELSE 0 END"
)


_BEGUN: Final = "job_id, token, run, worker_id, started_at, place, prompt_id"
# A user's SQL may have set a token back, or given a number out again: then the attempt is written over.
_ANEW: Final = (
    "ON CONFLICT (job_id, token) DO UPDATE SET run = excluded.run, worker_id = excluded.worker_id, "
    "started_at = excluded.started_at, place = excluded.place, prompt_id = excluded.prompt_id, ended_at = NULL, "
    "outcome = NULL, error_code = '', error_trace = '', error = NULL, result = '{}'"
)
_BEGIN: Final = Sql(
    f"INSERT INTO job_attempts ({_BEGUN}) VALUES (:job_id, :token, :run, :worker, :now, :place, :prompt_id) {_ANEW}"
)
_BEGIN_ALL: Final = (
    f"INSERT INTO job_attempts ({_BEGUN}) SELECT id, token, COALESCE(run_count, 0) + 1 - run_counted, worker_id, :now, "
    f"place, prompt_id FROM jobs {_ANEW}"
)
_TELL_ALL: Final = (
    "INSERT INTO job_events (at, kind, job_id, token, worker_id, data) SELECT :now, 'claimed', id, token, worker_id, "
    "'{}' FROM jobs ORDER BY priority, id"
)


def _taking(pick: tuple[str, str]) -> Sql:
    """Return the statement that claims what `pick` selects and returns the rows."""
    return Sql(
        f"UPDATE jobs {_SET} WHERE id IN ({pick[0]}) RETURNING {COLUMNS.replace('jobs.', '')}",
        # MATERIALIZED: looked up again for each row, the selection would pick more than it may.
        # Attempts and events go the same way.
        postgres=(
            f"WITH picked AS MATERIALIZED ({pick[1]} FOR UPDATE SKIP LOCKED), "
            f"jobs AS (UPDATE jobs {_SET} FROM picked WHERE jobs.id = picked.id RETURNING {COLUMNS}), "
            f"tried AS ({_BEGIN_ALL}), told AS ({_TELL_ALL}) SELECT {COLUMNS} FROM jobs"
        ),
    )


_CLAIM: Final = _taking(
    (
        f"SELECT id FROM jobs WHERE {MAY_START[0]} ORDER BY priority, id LIMIT :count",
        f"SELECT id FROM jobs WHERE {MAY_START[1]} ORDER BY priority, id LIMIT :count",
    )
)
_CLAIM_THESE: Final = _taking(
    (
        f"SELECT id FROM jobs WHERE {MAY_START[0]} AND {_BY_IDS[0]}",
        f"SELECT id FROM jobs WHERE {MAY_START[1]} AND {_BY_IDS[1]} ORDER BY id",
    )
)


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker asks for."""

    worker: WorkerId
    count: int
    lease: timedelta
    places: Collection[str]
    limits: ClaimLimits
    only: RowId | None


def take(connection: Connection, now: datetime, claim: Claim) -> list[Entry]:
    """Claim, with attempts and events, and return the jobs in the order of the claim."""
    if claim.count < 1:
        return []
    parameters = _parameters(connection, now, claim)
    if claim.limits.none and claim.only is None:
        rows = _CLAIM.run(connection, {**parameters, "count": claim.count})
        place_of: Mapping[RowId, int] | None = None
    else:
        ids = [claim.only] if claim.limits.none and claim.only is not None else _chosen(connection, parameters, claim)
        if not ids:
            return []
        rows = _CLAIM_THESE.run(connection, {**parameters, "ids": listed(connection, ids)})
        place_of = {job_id: number for number, job_id in enumerate(ids)}
    entries = [entry_of(row) for row in rows]
    if not entries:
        return []
    if place_of is None:
        entries.sort(key=lambda entry: (entry.job.priority, entry.job.id))
    else:
        entries.sort(key=lambda entry: place_of[entry.job.id])
    # A job that came back to pending by a user's SQL has an attempt that nobody ended.
    again = [(entry.job.id, entry.job.token - 1) for entry in entries if entry.job.token > 1]
    close_open_attempts(connection, now, again, Outcome.LOST)
    if connection.dialect.name == "sqlite":
        _begin(connection, now, entries, claim.worker)
    return entries


def _begin(connection: Connection, now: datetime, entries: Sequence[Entry], worker: WorkerId) -> None:
    """Write attempts and events of what was claimed; on a server the claim itself does that."""
    at = stamps(connection).exact(now)
    rows = [
        {
            "job_id": entry.job.id,
            "token": entry.job.token,
            "run": run_of(entry),
            "worker": worker,
            "now": at,
            "place": entry.job.place,
            "prompt_id": entry.job.prompt_id,
        }
        for entry in entries
    ]
    _BEGIN.run(connection, rows)
    tell(connection, now, [(EventKind.CLAIMED, entry.job.id, entry.job.token, worker, {}) for entry in entries])


def _parameters(connection: Connection, now: datetime, claim: Claim) -> dict[str, Any]:
    write = stamps(connection)
    alone = len(claim.places) == 1 and claim.limits.place is not None
    return {
        "now": write.exact(now),
        "now_whole": write.whole(now),
        "lease_expires_at": write.whole(now + claim.lease),
        "worker": claim.worker,
        "places": listed(connection, claim.places),
        # Counted at its place from the claim on, where there is only one it can go to.
        "home": next(iter(claim.places)) if alone else None,
    }


# -- with limits -----------------------------------------------------------------------------------------------

_ALONE: Final = Sql("SELECT 1", postgres="SELECT pg_advisory_xact_lock(7246011, 1)")
"""On SQLite a transaction that writes is alone already."""

_RUNNING: Final = Sql(
    "SELECT workflow_id, job_type, username, place, worker_id, count(*) FROM jobs WHERE status = 'processing' "
    "GROUP BY workflow_id, job_type, username, place, worker_id"
)

# Each user with pending jobs, found by jumping from one to the next in the index.
_USERS_TEXT: Final = (
    "WITH RECURSIVE users(name) AS (SELECT min(username) FROM jobs {index} WHERE status = 'pending' UNION ALL "
    "SELECT (SELECT min(username) FROM jobs {index} WHERE status = 'pending' AND username > users.name) FROM users "
    "WHERE users.name IS NOT NULL) SELECT name FROM users WHERE name IS NOT NULL"
)
_USERS: Final = Sql(
    _USERS_TEXT.format(index="INDEXED BY ix_jobs_users"),
    postgres=_USERS_TEXT.format(index=""),
)


class _Of(StrEnum):
    """Whose jobs are candidates, as the condition that says so."""

    ALL = ""
    USER = "AND username = :user "
    ONE = "AND id = :only "


def _candidates(of: _Of) -> Sql:
    """Return the statement that reads the next rows that may start and are not passed over."""

    def text(may_start: str, lists: int) -> str:
        def none_of(column: str, name: str) -> str:
            found = in_list(column, name, "text")[lists]
            return f"AND NOT ({found}) "

        named = in_list("workflow_id", "named_workflows", "text")[lists]
        return (
            "SELECT id, priority, workflow_id, job_type, username, phase, place FROM jobs "
            f"WHERE {may_start} AND (priority, id) > (:priority, :id) "
            + (of or none_of("username", "full_users"))
            + none_of("workflow_id", "full_workflows")
            + none_of("job_type", "full_job_types")
            + f"AND (:named_only = 0 OR {named}) "
            + "AND (:new_ones = 1 OR phase <> '') ORDER BY priority, id LIMIT :count"
        )

    return Sql(text(MAY_START[0], 0), postgres=text(MAY_START[1], 1))


_CANDIDATES: Final = {of: _candidates(of) for of in _Of}
_MOST_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class _Candidate:
    id: RowId
    priority: Any
    workflow_id: str
    job_type: str
    user: str
    phase: str
    place: str | None


class _Room:
    """How many more may start, by everything that is limited."""

    def __init__(self, claim: Claim, running: Sequence[Sequence[Any]]) -> None:
        self.limits = claim.limits
        self.workflows: Counter[str] = Counter()
        self.job_types: Counter[str] = Counter()
        self.users: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        own_without_place = 0
        for workflow_id, job_type, user, place, worker_id, count in running:
            self.workflows[workflow_id] += count
            self.job_types[job_type] += count
            self.users[user] += count
            if place is not None:
                self.places[place] += count
            elif worker_id == claim.worker:
                own_without_place += count
        self.new_ones: float = float("inf")
        if claim.limits.place is not None and claim.places:
            free = (max(0, claim.limits.place - self.places[place]) for place in set(claim.places))
            self.new_ones = sum(free) - own_without_place

    def for_workflow(self, workflow_id: str) -> bool:
        limit = self.limits.workflow.get(workflow_id, self.limits.workflow.get("*"))
        return limit is None or self.workflows[workflow_id] < limit

    def for_job_type(self, job_type: str) -> bool:
        limit = self.limits.job_type.get(job_type)
        return limit is None or self.job_types[job_type] < limit

    def for_user(self, user: str) -> bool:
        return self.limits.user is None or self.users[user] < self.limits.user

    def for_one(self, job: _Candidate) -> bool:
        """Whether this job may start now."""
        if not (self.for_workflow(job.workflow_id) and self.for_job_type(job.job_type) and self.for_user(job.user)):
            return False
        if job.phase == Phase.NONE or job.place is None:
            return self.new_ones > 0
        return self.limits.place is None or self.places[job.place] < self.limits.place

    def take(self, job: _Candidate) -> None:
        """Count a job that starts."""
        self.workflows[job.workflow_id] += 1
        self.job_types[job.job_type] += 1
        self.users[job.user] += 1
        if job.phase == Phase.NONE or job.place is None:
            self.new_ones -= 1
        else:
            self.places[job.place] += 1
            self.new_ones -= 1  # it has that place's room, whoever was to have it

    def passed_over(self, connection: Connection) -> dict[str, Any]:
        """Return what need not be read, as parameters."""
        named = self.limits.workflow.keys() - {"*"}
        known = {*self.workflows, *named}
        return {
            "full_workflows": listed(connection, (name for name in known if not self.for_workflow(name))),
            "full_job_types": listed(
                connection, (name for name in {*self.job_types, *self.limits.job_type} if not self.for_job_type(name))
            ),
            "full_users": listed(connection, (name for name in self.users if not self.for_user(name))),
            "named_workflows": listed(connection, named),
            "named_only": int((limit := self.limits.workflow.get("*")) is not None and limit < 1),
            "new_ones": int(self.new_ones > 0),
        }


def _chosen(connection: Connection, parameters: Mapping[str, Any], claim: Claim) -> list[RowId]:
    """Pick the jobs to claim, in order."""
    _ALONE.run(connection)
    room = _Room(claim, _RUNNING.run(connection).fetchall())

    def line(of: _Of, **which: Any) -> Iterator[_Candidate]:
        return _line(connection, {**parameters, **which}, room, of, at_least=claim.count)

    if claim.only is not None:
        jobs = line(_Of.ONE, only=claim.only)
    elif claim.limits.fair_users:
        users = [user for (user,) in _USERS.run(connection).fetchall() if room.for_user(user)]
        jobs = _in_turn(room, [line(_Of.USER, user=user) for user in users])
    else:
        jobs = line(_Of.ALL)
    chosen: list[RowId] = []
    for job in jobs:
        room.take(job)
        chosen.append(job.id)
        if len(chosen) == claim.count:
            break
    return chosen


def _in_turn(room: _Room, lines: Sequence[Iterator[_Candidate]]) -> Iterator[_Candidate]:
    """Give jobs by priority, then those of the user with the fewest at work, then by age. A line is of one user."""
    heads: list[tuple[Any, int, int, _Candidate, Iterator[_Candidate]]] = []

    def put_next(line: Iterator[_Candidate]) -> None:
        if (job := next(line, None)) is not None:
            heapq.heappush(heads, (job.priority, room.users[job.user], job.id, job, line))

    for line in lines:
        put_next(line)
    while heads:
        _, _, _, job, line = heapq.heappop(heads)
        if room.for_one(job):  # there may be no room any more since it came to the head of its line
            yield job
        if room.for_user(job.user):
            put_next(line)


def _line(
    connection: Connection, parameters: Mapping[str, Any], room: _Room, of: _Of, *, at_least: int
) -> Iterator[_Candidate]:
    """Give the jobs that may start, in order, as long as there is room."""
    after: tuple[Any, int] = (-(2**31), 0)
    count = min(_MOST_AT_ONCE, max(20, 2 * at_least))
    while True:
        asked = {**parameters, **room.passed_over(connection), "priority": after[0], "id": after[1], "count": count}
        found = [_Candidate(*row) for row in _CANDIDATES[of].run(connection, asked)]
        for job in found:
            if room.for_one(job):
                yield job
        if len(found) < count:
            return
        after, count = (found[-1].priority, found[-1].id), _MOST_AT_ONCE
