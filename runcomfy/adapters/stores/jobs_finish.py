"""
How attempts end: what an `Ending` makes of a job, and many of them written with few statements.

Finishes that wait for the database at the same time are written together: their rows are locked and read at once,
judged one by one, and written with one statement for jobs, one for attempts, one for events. What each costs is then
little more than its share of the flush.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs_rows import Entry, safe, told_text, trace_of
from runcomfy.adapters.stores.jobs_sql import (
    Sql,
    Told,
    changed,
    closing,
    hold_some,
    run_of,
    stamps,
    tell,
)
from runcomfy.adapters.stores.jobs_sql import write as keep
from runcomfy.domain.exceptions import LeaseLost, RunComfyError
from runcomfy.domain.queued import (
    Ending,
    EventKind,
    Outcome,
    Phase,
    QueuedJob,
    QueueStatus,
    Reason,
    RowId,
    is_held_by,
)

_AT_A_SERVER: Final = (Phase.SUBMITTING, Phase.SUBMITTED)

_STATUS: Final[Mapping[Outcome, QueueStatus]] = {
    Outcome.DONE: QueueStatus.DONE,
    Outcome.FAILED: QueueStatus.FAILED,
    Outcome.CANCELLED: QueueStatus.FAILED,
    Outcome.QUARANTINED: QueueStatus.FAILED,
    Outcome.REQUEUED: QueueStatus.PENDING,
    Outcome.PUT_BACK: QueueStatus.PENDING,
}
_REASON: Final[Mapping[Outcome, str]] = {
    Outcome.CANCELLED: Reason.CANCELLED,
    Outcome.QUARANTINED: Reason.QUARANTINED,
}
_KIND: Final = {outcome: EventKind(outcome.value) for outcome in _STATUS}

_OUTCOME: Final = Sql("SELECT outcome FROM job_attempts WHERE job_id = :job_id AND token = :token")
_DISCARD: Final = Sql(
    "UPDATE job_attempts SET outcome = 'discarded', ended_at = COALESCE(ended_at, :at) "
    # Not what the worker itself said before: that stands.
    "WHERE job_id = :job_id AND token = :token AND (outcome IS NULL OR outcome IN ('lost', 'cancelled', 'quarantined'))"
)


@dataclass(slots=True)
class Finish:
    """One attempt that is to end, and what came of asking for it."""

    job_id: RowId
    token: int
    ending: Ending
    job: QueuedJob | None = None
    error: RunComfyError | None = None
    repeated: bool = False
    """Whether it was written before, and only the answer had been lost."""
    locked: bool = False
    """Whether nothing could be said, because somebody has the row in an open transaction."""

    def __post_init__(self) -> None:
        """Refuse what no worker can say."""
        if self.ending.outcome not in _STATUS:
            raise ValueError(f"a worker cannot end an attempt as {self.ending.outcome}")

    def outcome(self) -> QueuedJob:
        """Return the job as it is now; raise LeaseLost if the attempt no longer counted."""
        if self.error is not None:
            raise self.error
        if self.job is None:
            raise AssertionError("asked before it was written")
        return self.job


def write(connection: Connection, now: datetime, finishes: Sequence[Finish]) -> None:
    """End attempts, each by itself: one that lost its lease is told so in its `error` and spoils no other.

    One whose row somebody else has is `locked`, and to be asked for again.
    """
    end_time = stamps(connection).kept(now)
    held, locked = hold_some(connection, (finish.job_id for finish in finishes))
    entries: dict[RowId, Entry] = {}
    attempts: list[dict[str, Any]] = []
    events: list[Told] = []
    late: list[Finish] = []
    for finish in finishes:
        finish.job, finish.error, finish.repeated = None, None, False
        finish.locked = finish.job_id in locked
        if finish.locked:
            continue
        entry = held.get(finish.job_id)
        if entry is None or not is_held_by(entry.job.status, entry.job.token, finish.token) or finish.job_id in entries:
            late.append(finish)
            continue
        after = ended(entry, finish.ending, now, end_time)
        entries[finish.job_id], finish.job = after, after.job
        attempts.append(_attempt(entry, after, finish.ending))
        worker, data = entry.job.worker_id, _told(finish.ending, after.job)
        events.append((_KIND[finish.ending.outcome], finish.job_id, finish.token, worker, data))
    if entries:
        keep(connection, now, jobs=list(entries.values()), attempts=attempts, events=events)
    for finish in late:
        found = entries.get(finish.job_id) or held.get(finish.job_id)
        _too_late(connection, now, finish, None if found is None else found.job)


def ended(entry: Entry, ending: Ending, now: datetime, end_time: datetime) -> Entry:
    """Return what an ending makes of a job that is processing. `end_time` is now, as the database keeps it."""
    job, outcome = entry.job, ending.outcome
    status = _STATUS[outcome]
    waits = status is QueueStatus.PENDING
    runs = outcome not in (Outcome.PUT_BACK, Outcome.CANCELLED)
    trace = ending.trace or (trace_of(ending.error) if ending.error else "")
    phase = _phase_after(job.phase, ending)
    done = outcome is Outcome.DONE
    return changed(
        entry,
        status=status,
        # A run counts once, whether or not it came as far as the server.
        run_count=job.run_count + (runs and not entry.run_counted),
        run_counted=phase in _AT_A_SERVER and entry.run_counted,
        waits_since=now if waits and ending.delay > timedelta(0) else None,
        retries_attempted=job.retries_attempted + (outcome is Outcome.REQUEUED),
        end_time=None if waits else end_time,
        duration=job.duration if outcome is Outcome.PUT_BACK else seconds_of_run(entry, now),
        error_trace=None if done else safe(trace) or job.error_trace,
        worker_id=None,
        lease_expires_at=None,
        reason="" if done or waits else safe(_reason(ending)),
        phase=phase,
        place=None if phase is Phase.NONE else job.place,
        prompt_id=None if phase is Phase.NONE else job.prompt_id,
        not_before=now + ending.delay if waits and ending.delay > timedelta(0) else None,
        others_from=None,
        # Only losses in a row count: a run that came to an end of its own began a new row.
        lost_count=job.lost_count if outcome is Outcome.PUT_BACK else 0,
        kill_count=0 if done else job.kill_count + ending.killed_machine,
        progress=100.0 if done else job.progress if not waits or ending.keeps_prompt else 0.0,
        message="",
        result=ending.result if not waits else {},
    )


def _phase_after(before: Phase, ending: Ending) -> Phase:
    if ending.outcome is Outcome.PUT_BACK and ending.keeps_prompt:
        return before
    if before is Phase.ENDING and ending.outcome is not Outcome.DONE:
        return before  # nobody has seen the earlier prompt end
    if before in _AT_A_SERVER and ending.end_prompt:
        return Phase.ENDING
    return Phase.NONE


def _reason(ending: Ending) -> str:
    code = str(ending.error.get("code", "")) if ending.error else ""
    return _REASON.get(ending.outcome) or ending.reason or code


def seconds_of_run(entry: Entry, now: datetime) -> float | None:
    """Return how long the run has taken, from its first claim on; never less than nothing, for clocks are set back."""
    began = entry.run_began_at or entry.job.start_time
    return None if began is None else max(0.0, (now - began).total_seconds())


def _attempt(before: Entry, after: Entry, ending: Ending) -> dict[str, Any]:
    code = str(ending.error.get("code", "")) if ending.error else ending.reason
    return closing(
        before.job,
        before.job.token,
        ending.outcome,
        code=code,
        trace=safe(ending.trace or (trace_of(ending.error) if ending.error else "")),
        error=told_text(ending.error) if ending.error else None,
        result=ending.result,
        run=max(after.job.run_count, run_of(before)),
    )


def _told(ending: Ending, job: QueuedJob) -> Mapping[str, Any]:
    data: dict[str, Any] = {}
    if ending.error:
        data = {name: ending.error[name] for name in ("code", "message", "hint") if ending.error.get(name)}
    if job.reason:
        data["reason"] = job.reason
    if job.not_before is not None:
        data["wait_seconds"] = ending.delay.total_seconds()
    return data


def _too_late(connection: Connection, now: datetime, finish: Finish, job: QueuedJob | None) -> None:
    """Discard, unless the same was written before: an answer that was lost on the way is asked for again."""
    key = {"job_id": finish.job_id, "token": finish.token}
    attempt = _OUTCOME.run(connection, key).first()
    if attempt is not None and attempt[0] == finish.ending.outcome.value and job is not None:
        finish.job, finish.repeated = job, True
        return
    if _DISCARD.run(connection, {**key, "at": stamps(connection).exact(now)}).rowcount:
        said = {"outcome": finish.ending.outcome.value}
        tell(connection, now, [(EventKind.DISCARDED, finish.job_id, finish.token, None, said)])
    finish.error = lease_lost(finish.job_id, finish.token, job)


def lease_lost(job_id: RowId, token: int, job: QueuedJob | None) -> LeaseLost:
    """Return the error for a worker whose token counts no more, saying why as far as the row tells."""
    if job is None:
        why = "it was deleted"
    elif job.cancelled:
        why = "it was cancelled"
    elif job.status is QueueStatus.PROCESSING:
        why = f"worker {job.worker_id or 'unknown'} took it over"
    else:
        why = f"it is {job.status} now"
    name = job_id if job is None else f"{job.config_name} ({job_id})"
    return LeaseLost(
        f"job {name} is no longer held by this worker: {why}",
        hint="nothing is lost: what this worker made is set aside; see `comfyctl queue show`",
        details={"job": job_id, "token": token},
    )
