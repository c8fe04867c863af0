"""Jobs and events of the queue as people and programs see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from runcomfy.cli.words import show_span, show_time
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.queued import (
    FLEET_SCOPE,
    QUEUE_SCOPE,
    Attempt,
    EventKind,
    JobEvent,
    Pause,
    Phase,
    QueuedJob,
    QueueStatus,
    Reason,
)

HEADERS: Final = ("no", "name", "type", "priority", "status", "runs", "what")

ENDED_BY_USER: Final = (Reason.CANCELLED, Reason.QUARANTINED)
"""Reasons that are shown in the place of `failed`."""


# -- for programs --------------------------------------------------------------------------------------------


def job_facts(job: QueuedJob) -> dict[str, Any]:
    """Return a job as `--json` prints it: the published columns by their names, then what goes beyond them."""
    return {
        "id": job.id,
        "config_name": job.config_name,
        "job_type": job.job_type,
        "workflow_id": job.workflow_id,
        "priority": job.priority,
        "status": str(job.status),
        "retries_attempted": job.retries_attempted,
        "run_count": job.run_count,
        "retry_limit": job.retry_limit,
        "start_time": iso(job.start_time),
        "end_time": iso(job.end_time),
        "duration": job.duration,
        "error_trace": job.error_trace,
        "metadata": dict(job.metadata),
        "worker_id": job.worker_id,
        "lease_expires_at": iso(job.lease_expires_at),
        "uid": job.uid,
        "reason": job.reason,
        "progress": job.progress,
        "message": job.message,
        "phase": str(job.phase),
        "prompt_id": job.prompt_id,
        "not_before": iso(job.not_before),
        "created_at": iso(job.created_at),
        "user": job.user,
        "project": job.project,
        "idempotency_key": job.idempotency_key,
        "source_path": job.source_path,
        "lost_count": job.lost_count,
        "kill_count": job.kill_count,
        "result": dict(job.result),
    }


def attempt_facts(attempt: Attempt) -> dict[str, Any]:
    """Return an attempt as `--json` prints it."""
    return {
        "token": attempt.token,
        "run": attempt.run,
        "worker_id": attempt.worker_id,
        "started_at": iso(attempt.started_at),
        "ended_at": iso(attempt.ended_at),
        "outcome": str(attempt.outcome) if attempt.outcome else None,
        "prompt_id": attempt.prompt_id,
        "error_code": attempt.error_code,
        "error_trace": attempt.error_trace,
    }


def event_facts(event: JobEvent) -> dict[str, Any]:
    """Return an event as `--json` prints it."""
    return {
        "number": event.number,
        "at": iso(event.at),
        "kind": str(event.kind),
        "job_id": event.job_id,
        "token": event.token,
        "worker_id": event.worker_id,
        "data": dict(event.data),
    }


def pause_facts(pause: Pause) -> dict[str, Any]:
    """Return a pause as `--json` prints it."""
    return {
        "scope": pause.scope,
        "reason": pause.reason,
        "message": pause.message,
        "since": iso(pause.since),
        "until": iso(pause.until),
        "by": pause.by,
    }


def iso(at: datetime | None) -> str | None:
    """Return a time as programs read it."""
    return at.isoformat() if at is not None else None


# -- for people ----------------------------------------------------------------------------------------------


def row(job: QueuedJob, *, now: datetime) -> tuple[str, ...]:
    """Return a job as a line of the table."""
    return (
        str(job.id),
        job.config_name,
        job.job_type,
        str(job.priority),
        status_word(job),
        str(job.run_count),
        foreign_text(what_happens(job, now=now), 100),
    )


def status_word(job: QueuedJob) -> str:
    """Return the status, or why a job is not done where that has a word of its own."""
    return job.reason if job.status is QueueStatus.FAILED and job.reason in ENDED_BY_USER else str(job.status)


def what_happens(job: QueuedJob, *, now: datetime) -> str:
    """Return what a job is doing, waits for, or ended with, in a few words."""
    match job.status:
        case QueueStatus.PROCESSING:
            return f"{job.progress:.0f}% {job.message}".rstrip() if job.message or job.progress else "just taken"
        case QueueStatus.PENDING:
            return _waits(job, now=now)
        case QueueStatus.DONE:
            paths = output_paths(job)
            shown = Path(paths[0]).name if paths else "no files"
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            return f"{shown}{more}, {_seconds(job.duration)}"
        case QueueStatus.FAILED:
            return last_error(job)


def _waits(job: QueuedJob, *, now: datetime) -> str:
    words = []
    if job.place is not None and job.phase is not Phase.NONE and job.others_from is not None and job.others_from > now:
        place = f" of {job.place}" if job.place.startswith("machine:") else ""
        words.append(f"its worker{place} is gone, free for others in {_until(job.others_from, now)}")
    if job.not_before is not None and job.not_before > now:
        words.append(f"next try in {_until(job.not_before, now)}")
    if job.run_count and (error := last_error(job)):
        words.append(f"after {error}")
    return ", ".join(words) or "waits"


def _until(at: datetime, now: datetime) -> str:
    return show_span(at - now + timedelta(seconds=1))


def last_error(job: QueuedJob) -> str:
    """Return the first line of the job's last error."""
    lines = (job.error_trace or "").strip().splitlines()
    return foreign_text(lines[0], 160) if lines else job.reason


def output_paths(job: QueuedJob) -> list[str]:
    """Return the files a job has made."""
    outputs = job.result.get("outputs")
    return [str(output["path"]) for output in outputs if "path" in output] if isinstance(outputs, list) else []


def _seconds(duration: float | None) -> str:
    return (
        f"{duration:.1f} s" if duration is not None and duration < 60 else show_span(timedelta(seconds=duration or 0))
    )


def pause_line(pause: Pause, *, now: datetime) -> str:
    """Return what is paused, why, and what ends it."""
    if pause.scope == FLEET_SCOPE:
        until = f" (until {show_time(pause.until)})" if pause.until is not None and pause.until > now else ""
        return f"no machine is launched for what waits{until}: {foreign_text(pause.message, 300)}"
    what = "the queue" if pause.scope == QUEUE_SCOPE else f"the executors of {pause.scope.partition(':')[2]}"
    if pause.until is None:
        then = "until `comfyctl queue resume`"
    elif pause.until > now:
        then = f"tried again in {show_span(pause.until - now)}"
    else:
        then = "tried again by the next executor"
    return f"paused: {what}, {then}: {foreign_text(pause.message or pause.reason, 300)}"


def counts_line(counts: Mapping[QueueStatus, int]) -> str:
    """Return how many jobs there are of each status."""
    return ", ".join(f"{counts.get(status, 0)} {status}" for status in QueueStatus)


def details(job: QueuedJob, attempts: Sequence[Attempt], *, now: datetime) -> list[str]:
    """Return everything people want to know of one job."""
    pairs = [
        ("name", job.config_name),
        ("number, uid", f"{job.id}, {job.uid}"),
        ("type, workflow", f"{job.job_type}, {job.workflow_id}"),
        ("priority", str(job.priority)),
        ("status", f"{status_word(job)}: {what_happens(job, now=now)}"),
        ("runs", f"{job.run_count} ({job.retries_attempted} retries{_limit(job)})"),
        ("put in", show_time(job.created_at)),
        ("started", show_time(job.start_time)),
        ("ended", show_time(job.end_time)),
        ("worker", job.worker_id or "-"),
        ("prompt", f"{job.prompt_id or '-'}{f' ({job.phase})' if job.phase else ''}"),
        ("job file", job.source_path or "-"),
        ("for", ", ".join(filter(None, (job.user, job.project))) or "-"),
        ("key", job.idempotency_key or "-"),
    ]
    lines = [f"{name:<15} {foreign_text(value, 300)}" for name, value in pairs if value != "-"]
    lines += [f"{'result':<15} {foreign_text(path, 400)}" for path in output_paths(job)]
    lines += [f"{'attempt':<15} {_attempt(attempt)}" for attempt in attempts]
    if job.error_trace and job.status is not QueueStatus.DONE:
        lines += ["", *(foreign_text(line, 300) for line in job.error_trace.strip().splitlines()[:40])]
    return lines


def _limit(job: QueuedJob) -> str:
    return f" of at most {job.retry_limit}" if job.retry_limit is not None else ""


def _attempt(attempt: Attempt) -> str:
    ended = f" {attempt.outcome}" if attempt.outcome else " at work"
    span = f" after {show_span(attempt.ended_at - attempt.started_at)}" if attempt.ended_at else ""
    error = f" ({foreign_text(attempt.error_code, 60)})" if attempt.error_code else ""
    return f"{attempt.token}: {show_time(attempt.started_at)}{ended}{span}{error}, worker {attempt.worker_id[:8]}"


EVENT_WORDS: Final[Mapping[EventKind, str]] = {
    EventKind.ENQUEUED: "put into the queue",
    EventKind.UPDATED: "updated from its file",
    EventKind.HELD: "its file was changed while it runs; taken up when it has ended",
    EventKind.CLAIMED: "taken up",
    EventKind.SUBMITTING: "about to be sent to ComfyUI",
    EventKind.SUBMITTED: "accepted by ComfyUI",
    EventKind.ATTACHED: "found running; going on with it",
    EventKind.PROMPT_LOST: "ComfyUI was restarted and forgot it; it runs again",
    EventKind.REQUEUED: "failed; it will be tried again",
    EventKind.PUT_BACK: "back in the queue at no cost",
    EventKind.LOST: "its worker is gone; back in the queue at no cost",
    EventKind.DONE: "done",
    EventKind.FAILED: "failed",
    EventKind.CANCELLED: "cancelled",
    EventKind.QUARANTINED: "set aside: it has cost too many workers or machines",
    EventKind.RETRIED: "to be run again",
    EventKind.PRIORITY: "priority changed",
    EventKind.DISCARDED: "the result of a late worker was discarded",
    EventKind.PROMPT_ENDED: "its prompt was seen ended",
    EventKind.NOTE: "note",
    EventKind.PAUSED: "paused",
    EventKind.RESUMED: "resumed",
    EventKind.FILE_REFUSED: "a job file cannot be used",
}

TOLD: Final = ("message", "file", "priority", "reason", "code", "scope", "times", "wait_seconds", "prompt", "by")
"""What of an event's data is worth a person's while."""


def event_line(event: JobEvent, name: str) -> str:
    """Return an event as a line; `name` is the job's."""
    facts = [f"{key}={foreign_text(event.data[key], 160)}" for key in TOLD if event.data.get(key) not in (None, "")]
    told = f" ({', '.join(facts)})" if facts else ""
    subject = f"{name}: " if name else ""
    return f"{show_time(event.at)} {subject}{EVENT_WORDS[event.kind]}{told}"
