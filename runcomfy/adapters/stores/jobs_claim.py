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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs_rows import Entry, entry_of, safe
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
from runcomfy.domain.queued import Barred, ClaimLimits, EventKind, Outcome, Phase, RowId, WorkerId

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

_USERS, _PROJECTS = in_list("username", "barred_users", "text"), in_list("project", "barred_projects", "text")
NOT_BARRED: Final = tuple(
    f"NOT ({users}) AND NOT ({projects})" for users, projects in zip(_USERS, _PROJECTS, strict=True)
)
"""Leaves out the jobs of users and projects that have to wait, for SQLite and for PostgreSQL."""


def barred_in(connection: Connection, barred: Barred) -> dict[str, Any]:
    """Return the parameters of `NOT_BARRED`."""
    return {
        "barred_users": listed(connection, map(safe, sorted(barred.users))),
        "barred_projects": listed(connection, map(safe, sorted(barred.projects))),
    }


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
            # ARRAY: a server that plans for any number of rows would rather join the whole table.
            f"jobs AS (UPDATE jobs {_SET} WHERE id = ANY(ARRAY(SELECT id FROM picked)) RETURNING {COLUMNS}), "
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
        **barred_in(connection, claim.limits.barred),
    }


# -- with limits -----------------------------------------------------------------------------------------------

_ALONE: Final = Sql("SELECT 1", postgres="SELECT pg_advisory_xact_lock(7246011, 1)")
"""On SQLite a transaction that writes is alone already."""

_RUNNING: Final = Sql(
    "SELECT workflow_id, job_type, username, place, worker_id, count(*) FROM jobs WHERE status = 'processing' "
    "GROUP BY workflow_id, job_type, username, place, worker_id"
)

_LIMITED: Final = tuple(f"{start} AND {others}" for start, others in zip(MAY_START, NOT_BARRED, strict=True))
_CANDIDATE: Final = "id, priority, workflow_id, job_type, username, phase, place"
_SAME_LINE: Final = "AND workflow_id = :workflow_id AND job_type = :job_type AND username = :username"


class _Of(StrEnum):
    """Whose jobs are candidates, as the condition that says so."""

    ALL = ""
    LINE = f"{_SAME_LINE} AND (priority, id) >= (:priority, :id)"
    ONE = "AND id = :only"


_CANDIDATES: Final = {
    of: Sql(
        f"SELECT {_CANDIDATE} FROM jobs WHERE {_LIMITED[0]} {of} ORDER BY priority, id LIMIT :count",
        postgres=f"SELECT {_CANDIDATE} FROM jobs WHERE {_LIMITED[1]} {of} ORDER BY priority, id LIMIT :count",
    )
    for of in _Of
}
_WITH_PROMPT: Final = Sql(
    f"SELECT {_CANDIDATE} FROM jobs INDEXED BY ix_jobs_places WHERE {_LIMITED[0]} AND phase <> '' "
    "ORDER BY priority, id",
    postgres=f"SELECT {_CANDIDATE} FROM jobs WHERE {_LIMITED[1]} AND phase <> '' ORDER BY priority, id",
)

_LINE: Final = "workflow_id, job_type, username"
_FIRST: Final = f"SELECT {_LINE}, priority, id FROM jobs {{index}} WHERE status = 'pending'"
_FIRST_ORDER: Final = f"ORDER BY {_LINE}, priority, id LIMIT 1"


def _next(same: int) -> str:
    """Return, for SQLite, the first job of the next line that has the first `same` columns in common with the last."""
    columns = _LINE.split(", ")
    alike = [f"next.{name} = lines.{name}" for name in columns[:same]]
    order = ", ".join(f"next.{name}" for name in (*columns, "priority", "id"))
    where = " AND ".join(("next.status = 'pending'", *alike, f"next.{columns[same]} > lines.{columns[same]}"))
    return f"(SELECT next.id FROM jobs AS next INDEXED BY ix_jobs_lines WHERE {where} ORDER BY {order} LIMIT 1)"


# The first job of each line, found by jumping from one line to the next in the index.
_LINES: Final = Sql(
    f"WITH RECURSIVE lines({_LINE}, priority, id) AS ("
    f"SELECT * FROM ({_FIRST.format(index='INDEXED BY ix_jobs_lines')} {_FIRST_ORDER}) UNION ALL "
    "SELECT first.workflow_id, first.job_type, first.username, first.priority, first.id FROM lines, jobs AS first "
    f"WHERE first.id = COALESCE({_next(2)}, {_next(1)}, {_next(0)})) "
    f"SELECT {_LINE}, priority, id FROM lines",
    postgres=(
        f"WITH RECURSIVE lines({_LINE}, priority, id) AS (({_FIRST.format(index='')} {_FIRST_ORDER}) UNION ALL "
        f"SELECT next.* FROM lines CROSS JOIN LATERAL ({_FIRST.format(index='')} AND ({_LINE}) > "
        f"(lines.workflow_id, lines.job_type, lines.username) {_FIRST_ORDER}) AS next) "
        f"SELECT {_LINE}, priority, id FROM lines"
    ),
)
_AT_ONCE: Final = 200
"""How many jobs are looked at in their order before it is asked which lines there are."""


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

    def __init__(self, claim: Claim, running: Iterable[Sequence[Any]]) -> None:
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
        """How many may start that have no prompt anywhere yet."""
        if claim.limits.place is not None and claim.places:
            free = (max(0, claim.limits.place - self.places[place]) for place in set(claim.places))
            self.new_ones = sum(free) - own_without_place

    def for_line(self, workflow_id: str, job_type: str, user: str) -> bool:
        """Whether another job of this workflow, type and user may start."""
        of_workflow = self.limits.workflow.get(workflow_id, self.limits.workflow.get("*"))
        of_type = self.limits.job_type.get(job_type)
        return (
            (of_workflow is None or self.workflows[workflow_id] < of_workflow)
            and (of_type is None or self.job_types[job_type] < of_type)
            and (self.limits.user is None or self.users[user] < self.limits.user)
        )

    def for_one(self, job: _Candidate) -> bool:
        """Whether this job may start now."""
        if not self.for_line(job.workflow_id, job.job_type, job.user):
            return False
        if job.phase == Phase.NONE or job.place is None:
            return self.new_ones > 0
        return self.limits.place is None or self.places[job.place] < self.limits.place

    def take(self, job: _Candidate) -> None:
        """Count a job that starts."""
        self.workflows[job.workflow_id] += 1
        self.job_types[job.job_type] += 1
        self.users[job.user] += 1
        self.new_ones -= 1  # also one whose prompt is there: it has that place's room
        if job.phase != Phase.NONE and job.place is not None:
            self.places[job.place] += 1


class _Choice:
    """Picks the jobs of one claim, in order."""

    def __init__(self, connection: Connection, parameters: Mapping[str, Any], claim: Claim) -> None:
        self._connection, self._parameters, self._claim = connection, parameters, claim
        self.room = _Room(claim, _RUNNING.run(connection))
        self.ids: list[RowId] = []

    def make(self) -> list[RowId]:
        """Return the numbers of the jobs to claim."""
        if self._claim.only is not None:
            self._take(self._read(_Of.ONE, only=self._claim.only, count=1))
            return self.ids
        whole = not self._claim.limits.fair_users and self._in_order()
        if not whole and self._wants_more:
            self._by_lines()
        if self._wants_more and self.room.new_ones <= 0:
            # There is no room for new prompts, but for those that run already there may be.
            rows = _WITH_PROMPT.run(self._connection, self._parameters)
            self._take(job for job in (_Candidate(*row) for row in rows) if job.id not in self.ids)
        return self.ids

    @property
    def _wants_more(self) -> bool:
        return len(self.ids) < self._claim.count

    def _take(self, jobs: Iterable[_Candidate]) -> None:
        for job in jobs:
            if not self._wants_more:
                return
            if self.room.for_one(job):
                self.room.take(job)
                self.ids.append(job.id)

    def _in_order(self) -> bool:
        """Take from the first jobs there are; return whether there are no others."""
        jobs = self._read(_Of.ALL, count=_AT_ONCE)
        self._take(jobs)
        return len(jobs) < _AT_ONCE

    def _by_lines(self) -> None:
        """Take by lines: jobs of one workflow, type and user. One without room is not looked at, however long."""
        chosen = set(self.ids)
        fair = self._claim.limits.fair_users
        heads: list[tuple[Any, int, int, tuple[str, str, str], list[_Candidate] | None]] = []

        def put(priority: Any, job_id: int, line: tuple[str, str, str], known: list[_Candidate] | None) -> None:
            if self.room.for_line(*line):
                heapq.heappush(heads, (priority, self.room.users[line[2]] if fair else 0, job_id, line, known))

        for workflow_id, job_type, user, priority, job_id in _LINES.run(self._connection):
            put(priority, job_id, (workflow_id, job_type, user), None)
        while heads and self._wants_more and self.room.new_ones > 0:
            priority, running, job_id, line, known = heapq.heappop(heads)
            if known is None or (fair and running != self.room.users[line[2]]):
                # Only its first job was known, or its user has more at work than when it was put in line.
                jobs = self._of_line(line, priority, job_id) if known is None else known
                jobs = [job for job in jobs if job.id not in chosen]
            else:
                self._take(known[:1])
                chosen.add(known[0].id)
                jobs = known[1:] or [job for job in self._of_line(line, priority, job_id) if job.id not in chosen]
            if jobs:
                put(jobs[0].priority, jobs[0].id, line, jobs)

    def _of_line(self, line: tuple[str, str, str], priority: Any, job_id: int) -> list[_Candidate]:
        words = dict(zip(("workflow_id", "job_type", "username"), line, strict=True))
        return self._read(_Of.LINE, **words, priority=priority, id=job_id, count=self._claim.count + 1)

    def _read(self, of: _Of, **which: Any) -> list[_Candidate]:
        rows = _CANDIDATES[of].run(self._connection, {**self._parameters, **which})
        return [_Candidate(*row) for row in rows]


def _chosen(connection: Connection, parameters: Mapping[str, Any], claim: Claim) -> list[RowId]:
    """Pick the jobs to claim, in order; nobody else picks meanwhile."""
    _ALONE.run(connection)
    return _Choice(connection, parameters, claim).make()
