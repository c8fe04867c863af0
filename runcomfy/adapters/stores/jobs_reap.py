"""
Leases: renewing them, and taking back what nobody holds any more.

A lease that lies farther ahead than any can was written by a clock that was set back since; it is cut, so that a
jump of the clock never holds a job for longer. A lease nobody can read has run out.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs_finish import seconds_of_run
from runcomfy.adapters.stores.jobs_rows import Entry
from runcomfy.adapters.stores.jobs_sql import (
    Sql,
    Told,
    changed,
    close_open_attempts,
    hold_some,
    in_list,
    listed,
    stamps,
)
from runcomfy.adapters.stores.jobs_sql import write as keep
from runcomfy.adapters.stores.roles import must_hold
from runcomfy.domain.queued import EventKind, Outcome, Phase, QueuedJob, QueueStatus, Reason, RowId, WorkerId

PLANNER: Final = "planner"

# -- leases ----------------------------------------------------------------------------------------------------

_RENEW: Final = Sql(
    "UPDATE jobs SET lease_expires_at = :lease_expires_at WHERE status = 'processing' AND worker_id = :worker "
    "RETURNING id, token",
    # A row in somebody's open transaction is passed over, and all others are renewed; it is held all the same.
    postgres=(
        "WITH mine AS MATERIALIZED (SELECT id FROM jobs WHERE status = 'processing' AND worker_id = :worker "
        "FOR NO KEY UPDATE SKIP LOCKED), renewed AS (UPDATE jobs SET lease_expires_at = :lease_expires_at FROM mine "
        "WHERE jobs.id = mine.id) SELECT id, token FROM jobs WHERE status = 'processing' AND worker_id = :worker"
    ),
)
_ALIVE: Final = Sql("UPDATE owners SET heartbeat_at = :now WHERE id = :worker")
_HELD: Final = Sql("SELECT id, token FROM jobs WHERE status = 'processing' AND worker_id = :worker")


def renew_in(connection: Connection, worker: WorkerId, *, now: datetime, lease: timedelta) -> dict[RowId, int]:
    """Renew every lease of a worker and say that it lives; return job -> token of what it still holds."""
    write = stamps(connection)
    rows = _RENEW.run(connection, {"lease_expires_at": write.whole(now + lease), "worker": worker}).fetchall()
    _ALIVE.run(connection, {"now": write.exact(now), "worker": worker})
    return {RowId(job_id): token for job_id, token in rows}


def held_by(connection: Connection, worker: WorkerId) -> dict[RowId, int]:
    """Return job -> token of what a worker holds."""
    return {RowId(job_id): token for job_id, token in _HELD.run(connection, {"worker": worker})}


# -- taking back -----------------------------------------------------------------------------------------------


def _over(dead: str, lease: str) -> str:
    return f"SELECT id FROM jobs WHERE status = 'processing' AND ({lease} OR {dead}) ORDER BY id"


_DEAD: Final = in_list("worker_id", "dead", "text")
_OVER: Final = Sql(
    # datetime() reads what hands write, with T, fraction and offset; what it cannot read is NULL.
    _over(_DEAD[0], "datetime(lease_expires_at) IS NULL OR datetime(lease_expires_at) < :now"),
    postgres=_over(_DEAD[1], "lease_expires_at IS NULL OR lease_expires_at < :now"),
)
_CUT: Final = Sql(
    "UPDATE jobs SET lease_expires_at = :latest WHERE status = 'processing' AND datetime(lease_expires_at) > :latest",
    postgres=(
        "WITH far AS MATERIALIZED (SELECT id FROM jobs WHERE status = 'processing' AND lease_expires_at > :latest "
        "FOR UPDATE SKIP LOCKED) UPDATE jobs SET lease_expires_at = :latest FROM far WHERE jobs.id = far.id"
    ),
)
# A prompt that may run is for workers that reach its place; from when for others too is decided here, whoever put the
# job back: a worker that left, a user's SQL, a retry.
_UNDATED: Final = (
    "status = 'pending' AND phase <> '' AND place IS NOT NULL AND (others_from IS NULL OR others_from > :from)"
)
_DATE: Final = Sql(
    f"UPDATE jobs INDEXED BY ix_jobs_places SET others_from = :from WHERE {_UNDATED}",
    postgres=(
        f"WITH undated AS MATERIALIZED (SELECT id FROM jobs WHERE {_UNDATED} FOR UPDATE SKIP LOCKED) "
        "UPDATE jobs SET others_from = :from FROM undated WHERE jobs.id = undated.id"
    ),
)

_PLACES: Final = in_list("place", "places", "text")
_BOUND: Final = (
    "status = 'pending' AND phase <> '' AND place IS NOT NULL AND (others_from IS NULL OR others_from > :now)"
)
_FREE: Final = Sql(
    f"UPDATE jobs INDEXED BY ix_jobs_places SET others_from = :now WHERE {_BOUND} AND {_PLACES[0]} RETURNING id",
    postgres=(
        f"WITH bound AS MATERIALIZED (SELECT id FROM jobs WHERE {_BOUND} AND {_PLACES[1]} FOR UPDATE SKIP LOCKED) "
        "UPDATE jobs SET others_from = :now FROM bound WHERE jobs.id = bound.id RETURNING jobs.id"
    ),
)


# Workers that vanished of late without having had this job: what kills workers may be something else.
_OTHER_DEATHS: Final = Sql(
    "SELECT count(DISTINCT worker_id) FROM job_events WHERE kind = 'lost' AND at > :since AND worker_id <> :worker "
    "AND worker_id NOT IN (SELECT worker_id FROM job_events WHERE job_id = :job AND kind = 'lost' "
    "AND worker_id IS NOT NULL)"
)
BLAMED_OVER: Final = timedelta(hours=1)
"""How far back deaths of workers are looked at when a job is suspected of killing them."""


@dataclass(frozen=True, slots=True)
class Reap:
    """What the planner asks for."""

    lease: timedelta
    dead: Collection[WorkerId]
    lost_limit: int
    grace: timedelta
    epoch: int


def reap(connection: Connection, now: datetime, order: Reap) -> list[QueuedJob]:
    """Take back jobs that nobody holds; return them as they are now."""
    must_hold(connection, PLANNER, order.epoch)
    write = stamps(connection)
    _CUT.run(connection, {"latest": write.whole(now + order.lease)})
    over = _OVER.run(connection, {"now": write.whole(now), "dead": listed(connection, order.dead)}).fetchall()
    before: list[Entry] = []
    after: list[Entry] = []
    # What somebody has in an open transaction is left for the next round.
    found = hold_some(connection, (job_id for (job_id,) in over))[0] if over else {}
    for entry in found.values():
        if entry.job.status is QueueStatus.PROCESSING and _is_over(entry.job, now, write.whole(now), order):
            before.append(entry)
            blamed = entry.job.lost_count + 1 >= order.lost_limit and _is_to_blame(connection, entry.job, now)
            after.append(lost(entry, now, write.kept(now), blamed=blamed))
    if after:
        events = [event for pair in zip(before, after, strict=True) for event in _told(*pair)]
        keep(connection, now, jobs=after, events=events)
    for outcome in (Outcome.LOST, Outcome.QUARANTINED):
        ended = [
            (entry.job.id, entry.job.token)
            for entry in after
            if (entry.job.status is QueueStatus.FAILED) == (outcome is Outcome.QUARANTINED)
        ]
        close_open_attempts(connection, now, ended, outcome)
    _DATE.run(connection, {"from": write.exact(now + order.grace)})
    waiting = {entry.job.id for entry in after}
    return [entry.job for entry in hold_some(connection, waiting)[0].values()] if waiting else []


def free_places(connection: Connection, now: datetime, places: Collection[str]) -> int:
    """Let any worker take what waits for one of these places; return how many jobs that are."""
    if not places:
        return 0
    parameters = {"now": stamps(connection).exact(now), "places": listed(connection, places)}
    return len(_FREE.run(connection, parameters).fetchall())


def _is_over(job: QueuedJob, now: datetime, now_whole: Any, order: Reap) -> bool:
    """Judge again what was found before the row was locked: its worker may have renewed it meanwhile."""
    alone = isinstance(now_whole, str)  # a file has one writer at a time
    return alone or job.worker_id in order.dead or job.lease_expires_at is None or job.lease_expires_at < now


def _is_to_blame(connection: Connection, job: QueuedJob, now: datetime) -> bool:
    """Whether workers vanish with this job rather than anyway.

    A job that kills its worker is there each time one dies. Where as many died without it (hosts that are taken away,
    somebody who tests us), three losses prove nothing, and a sound job must not end for them.
    """
    since = stamps(connection).exact(now - BLAMED_OVER)
    found = _OTHER_DEATHS.run(connection, {"since": since, "worker": job.worker_id or "", "job": job.id}).fetchall()
    return int(found[0][0]) <= job.lost_count


def lost(entry: Entry, now: datetime, end_time: datetime, *, blamed: bool) -> Entry:
    """Return what becomes of a job whose worker vanished: it costs nothing, unless it is `blamed` for it."""
    job = entry.job
    count = job.lost_count + 1
    if not blamed:
        return changed(
            entry,
            status=QueueStatus.PENDING,
            worker_id=None,
            lease_expires_at=None,
            lost_count=count,
            others_from=None,
            not_before=None,
            message="",
        )
    at_a_server = job.phase is not Phase.NONE
    return changed(
        entry,
        status=QueueStatus.FAILED,
        reason=Reason.QUARANTINED,
        error_trace=(
            f"{Reason.QUARANTINED}: its worker vanished {count} times in a row\n"
            "hint: see what the attempts have in common (comfyctl queue show), then: comfyctl queue retry"
        ),
        worker_id=None,
        lease_expires_at=None,
        end_time=end_time,
        duration=seconds_of_run(entry, now),
        lost_count=count,
        phase=Phase.ENDING if at_a_server else Phase.NONE,
        place=job.place if at_a_server else None,
        prompt_id=job.prompt_id if at_a_server else None,
        message="",
        run_counted=False,
    )


def _told(before: Entry, after: Entry) -> list[Told]:
    job = before.job
    events: list[Told] = [(EventKind.LOST, job.id, job.token, job.worker_id, {"times": after.job.lost_count})]
    if after.job.status is QueueStatus.FAILED:
        events.append((EventKind.QUARANTINED, job.id, job.token, job.worker_id, {"reason": Reason.QUARANTINED}))
    return events
