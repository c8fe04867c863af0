"""
Working a queue off (`--once`): what still comes, what is left over and why, and what failed.

Jobs that wait for a time (a retry's, or until others may take a job whose worker is gone) are waited for, which their
own dates bound. What cannot be begun by waiting is left, and said: nobody is to take a queue for done that is not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from runcomfy.domain.exceptions import JobBusy, RunComfyError, WorkflowFailed, foreign_text
from runcomfy.domain.queued import ClaimLimits, Pause, QueueStatus
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.jobs import JobStore

SURE: Final = 2
"""After so many looks in a row that found nothing to begin and nothing to wait for there is none: between two
questions to the database a job's time may have come."""


async def looks_done(jobs: JobStore, places: Collection[str], pause: Pause | None, *, before: int) -> int:
    """Return how many looks in a row have found that nothing can be begun here, now or later; see `SURE`.

    Called after a claim that got nothing, while nothing runs; `before` is what the last call returned, 0 at first.
    `pause` keeps jobs from being begun. Raises LocalError.
    """
    if pause is not None:
        return SURE
    ready = sum(each.count for each in await jobs.backlog(places=places))
    waiting = (await jobs.counts())[QueueStatus.PENDING]
    if not waiting:
        return SURE
    return 0 if waiting > ready else before + 1


async def left_behind(jobs: JobStore, pause: Pause | None) -> RunComfyError | None:
    """Return how many jobs wait that were not begun, and why, as an error with the exit code of the reason.

    None: no job waits. Raises LocalError.
    """
    waiting = (await jobs.counts())[QueueStatus.PENDING]
    if not waiting:
        return None
    left = left_words(waiting)
    if pause is None:
        return JobBusy(
            f"{left}: another worker or a limit of the settings keeps them from being begun",
            hint="`comfyctl agent status` shows who works on what",
        )
    kind = next((each for each in _below(RunComfyError) if each.code == pause.reason), JobBusy)
    return kind(
        f"{left}, paused: {foreign_text(pause.message or pause.reason)}",
        hint="`comfyctl queue resume` ends the pause",
        details={"jobs_left": waiting},
    )


def failed_here(count: int) -> RunComfyError | None:
    """Return the error that says that so many jobs failed; None for none."""
    if not count:
        return None
    return WorkflowFailed(
        "1 job failed in this run" if count == 1 else f"{count} jobs failed in this run",
        hint="`comfyctl queue ls` shows why; `comfyctl queue retry` runs a job again",
        details={"jobs_failed": count},
    )


def left_words(count: int) -> str:
    """Return how many jobs are left undone, in words."""
    return "1 job is left undone" if count == 1 else f"{count} jobs are left undone"


def limits_of(settings: QueueSettings) -> ClaimLimits:
    """Return what the settings allow at once, over the whole database."""
    return ClaimLimits(
        workflow=settings.limit_workflow,
        job_type=settings.limit_job_type,
        user=settings.limit_user,
        place=settings.limit_place,
        fair_users=settings.fair_users,
    )


def _below(kind: type[RunComfyError]) -> Iterator[type[RunComfyError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)
