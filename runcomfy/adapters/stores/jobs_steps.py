"""
What a worker writes between its claim and its end, and what users order: each a change of one held row.

A worker's step names its token; a row that is no longer its own raises LeaseLost, and nothing was written.
"""

# ruff: noqa: S608 - what is put into statements are names and words of ours; values are parameters

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs_finish import lease_lost, seconds_of_run
from runcomfy.adapters.stores.jobs_intake import anew
from runcomfy.adapters.stores.jobs_rows import Entry, job_of, safe
from runcomfy.adapters.stores.jobs_sql import (
    COLUMNS,
    Sql,
    changed,
    close_open_attempts,
    hold,
    in_list,
    listed,
    run_of,
    stamps,
    write,
)
from runcomfy.domain.exceptions import JobBusy
from runcomfy.domain.job import PromptId
from runcomfy.domain.queued import EventKind, Outcome, Phase, QueuedJob, QueueStatus, Reason, RowId, is_held_by

Step = Callable[[Entry], tuple[Entry, EventKind, Mapping[str, Any]]]
"""What becomes of a row, and the event that tells it."""

_ATTEMPT: Final = Sql(
    "UPDATE job_attempts SET place = :place, prompt_id = :prompt_id, run = :run "
    "WHERE job_id = :job_id AND token = :token"
)
_AT_PLACES: Final = in_list("place", "places", "text")
# A user's SQL may end a job whose prompt runs: nobody wants that prompt either.
_UNWANTED: Final = "WHERE phase <> '' AND status IN ('done', 'failed') AND"
_TO_END: Final = Sql(
    # SQLite would rather read everything that ever ended.
    f"SELECT {COLUMNS} FROM jobs INDEXED BY ix_jobs_places {_UNWANTED} {_AT_PLACES[0]} ORDER BY id",
    postgres=f"SELECT {COLUMNS} FROM jobs {_UNWANTED} {_AT_PLACES[1]} ORDER BY id",
)


def step(connection: Connection, now: datetime, job_id: RowId, token: int, what: Step) -> QueuedJob:
    """Take a step of a run, if the worker that holds `token` still holds the job. Raises LeaseLost."""
    entry = hold(connection, [job_id]).get(job_id)
    if entry is None or not is_held_by(entry.job.status, entry.job.token, token):
        raise lease_lost(job_id, token, None if entry is None else entry.job)
    after, kind, data = what(entry)
    job = after.job
    write(connection, now, jobs=[after], events=[(kind, job_id, token, job.worker_id, data)])
    if job.prompt_id is not None:  # an attempt keeps the last prompt it had
        attempt = {"place": job.place, "prompt_id": job.prompt_id, "run": run_of(after)}
        _ATTEMPT.run(connection, {"job_id": job_id, "token": token, **attempt})
    return job


def writing_ahead(place: str, prompt_id: PromptId, *, counts_as_run: bool) -> Step:
    """Return the step before a prompt is sent."""

    def what(entry: Entry) -> tuple[Entry, EventKind, Mapping[str, Any]]:
        after = changed(
            entry,
            phase=Phase.SUBMITTING,
            place=safe(place),
            prompt_id=prompt_id,
            run_count=entry.job.run_count + counts_as_run,
            run_counted=entry.run_counted or counts_as_run,
        )
        return after, EventKind.SUBMITTING, {"prompt_id": prompt_id, "place": place, "run": after.job.run_count}

    return what


def accepting(prompt_id: PromptId) -> Step:
    """Return the step after the server took the prompt."""

    def what(entry: Entry) -> tuple[Entry, EventKind, Mapping[str, Any]]:
        return changed(entry, phase=Phase.SUBMITTED, prompt_id=prompt_id), EventKind.SUBMITTED, {"prompt_id": prompt_id}

    return what


def attaching(entry: Entry) -> tuple[Entry, EventKind, Mapping[str, Any]]:
    """Return what it means that the prompt of an earlier worker was found: the server had accepted it."""
    phase = Phase.SUBMITTED if entry.job.phase is Phase.SUBMITTING else entry.job.phase
    return changed(entry, phase=phase), EventKind.ATTACHED, {"prompt_id": entry.job.prompt_id}


def losing_prompt(*, lost: bool) -> Step:
    """Return the step after the prompt was proven to be nowhere."""

    def what(entry: Entry) -> tuple[Entry, EventKind, Mapping[str, Any]]:
        data: dict[str, Any] = {"prompt_id": entry.job.prompt_id}
        if lost:
            kind = EventKind.PROMPT_LOST
        elif entry.job.phase is Phase.ENDING:
            kind = EventKind.PROMPT_ENDED
        else:
            kind, data = EventKind.NOTE, {**data, "prompt": "never arrived"}
        # A prompt that was lost ran, or may have: what follows is another run.
        counted = entry.run_counted and not lost
        return changed(entry, phase=Phase.NONE, place=None, prompt_id=None, run_counted=counted), kind, data

    return what


# -- what users order ------------------------------------------------------------------------------------------


def cancel(connection: Connection, now: datetime, job_id: RowId, *, by: str) -> QueuedJob:
    """End a job for good. One that has ended stays as it is."""
    entry = hold(connection, [job_id])[job_id]
    job = entry.job
    if job.ended:
        return job
    at_a_server = job.phase is not Phase.NONE
    after = changed(
        entry,
        status=QueueStatus.FAILED,
        reason=Reason.CANCELLED,
        token=job.token + 1,  # whoever works on it finds that it holds nothing any more
        end_time=stamps(connection).kept(now),
        duration=seconds_of_run(entry, now) if job.status is QueueStatus.PROCESSING else job.duration,
        worker_id=None,
        lease_expires_at=None,
        phase=Phase.ENDING if at_a_server else Phase.NONE,
        place=job.place if at_a_server else None,
        prompt_id=job.prompt_id if at_a_server else None,
        not_before=None,
        others_from=None,
        message="",
        run_counted=False,
    )
    event = (EventKind.CANCELLED, job_id, after.job.token, job.worker_id, {"by": by} if by else {})
    write(connection, now, jobs=[after], events=[event])
    close_open_attempts(connection, now, [(job_id, job.token)], Outcome.CANCELLED)
    return after.job


def retry(connection: Connection, now: datetime, job_id: RowId, *, by: str) -> QueuedJob:
    """Let an ended job run again from the start, or a waiting one at once. Raises JobBusy."""
    entry = hold(connection, [job_id])[job_id]
    job = entry.job
    if job.status is QueueStatus.PROCESSING:
        raise JobBusy(
            f"job {job.config_name} is processing",
            hint="wait for its end, or cancel it first: comfyctl queue cancel",
            details={"job": job.uid, "worker": job.worker_id},
        )
    # A job file that was changed meanwhile is taken up by the next scan, as a change of a waiting job.
    after = changed(entry, not_before=None) if job.status is QueueStatus.PENDING else anew(entry)
    event = (EventKind.RETRIED, job_id, job.token, None, {"by": by} if by else {})
    write(connection, now, jobs=[after], events=[event])
    return after.job


# -- prompts of jobs that have ended ---------------------------------------------------------------------------


def to_end(connection: Connection, places: Collection[str]) -> list[QueuedJob]:
    """Return ended jobs whose prompt must still be ended at one of these places."""
    rows = _TO_END.run(connection, {"places": listed(connection, (safe(place) for place in places))})
    return [job_of(row) for row in rows]


def prompt_ended(connection: Connection, now: datetime, job_id: RowId, prompt_id: PromptId) -> None:
    """Forget a prompt that was seen ended; nothing if the job has another one, or somebody works on it."""
    entry = hold(connection, [job_id]).get(job_id)
    if (
        entry is None
        or entry.job.prompt_id != prompt_id
        or entry.job.phase is Phase.NONE
        or entry.job.status is QueueStatus.PROCESSING
    ):
        return
    after = changed(
        entry, phase=Phase.NONE, place=None, prompt_id=None, others_from=None, waits_since=entry.waits_since
    )
    event = (EventKind.PROMPT_ENDED, job_id, entry.job.token, None, {"prompt_id": prompt_id})
    write(connection, now, jobs=[after], events=[event])
