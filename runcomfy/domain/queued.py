"""
A job in the queue: what the `jobs` table says of it, as values, and the few events that may change its status.

`status` is for people and their SQL and has four words only; *why* a job is failed has a column of its own
(`reason`), so a cancelled or quarantined job shows as `failed`. `phase` says what is known of the prompt on a server:
it outlives the worker that wrote it, and is why nothing has to run twice after a crash.

    claim       pending    -> processing   the token goes up by one; every later write of the worker must name it
    finish      processing -> done | failed | pending (a retry, or put back without cost)
    lose        processing -> pending      the lease ran out or the worker is dead; prompt and place are kept
    cancel      pending | processing -> failed (reason `cancelled`)
    retry       failed | done -> pending   the user's order
    ingest      pending | done | failed    the job file's content changed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NewType

from runcomfy.domain.job import JobId, JobRequest, PromptId

RowId = NewType("RowId", int)
"""The number of a job in its database: `jobs.id`."""
WorkerId = NewType("WorkerId", str)
"""The owner id of the process that works on a job; shown in `jobs.worker_id`."""

DEFAULT_PRIORITY: Final = 50
FIRST_PRIORITY: Final = 1
LAST_PRIORITY: Final = 999
DEFAULT_RETRY_LIMIT: Final = 2
"""At most three runs."""
DEFAULT_JOB_TYPE: Final = "JOB"


class QueueStatus(StrEnum):
    """What `jobs.status` says."""

    PENDING = "pending"
    PROCESSING = "processing"
    DONE = "done"
    FAILED = "failed"


class Reason:
    """Words of `jobs.reason` that mean something to the queue; any other is the code of the error (kebab-case)."""

    CANCELLED: Final = "cancelled"
    QUARANTINED: Final = "quarantined"


class Phase(StrEnum):
    """What is known of a job's prompt on a server."""

    NONE = ""
    """There is none: the next worker starts a new one."""
    SUBMITTING = "submitting"
    """Its id was written down before it was sent; the server may have it or not."""
    SUBMITTED = "submitted"
    """The server has accepted it. If the same server process knows it no more, it is lost."""
    ENDING = "ending"
    """It is no longer wanted, and must be seen ended before anything new of this job may start."""


class EventKind(StrEnum):
    """What the event log tells of a job (or, without a job, of the queue)."""

    ENQUEUED = "enqueued"
    UPDATED = "updated"
    HELD = "held"
    """The job file was changed while the job was processing."""
    CLAIMED = "claimed"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    ATTACHED = "attached"
    """A worker went on with the prompt of an earlier one."""
    PROMPT_LOST = "prompt-lost"
    """The server process that had accepted the prompt knows it no more."""
    REQUEUED = "requeued"
    """A run failed and will be tried again."""
    PUT_BACK = "put-back"
    """Back to pending without cost: drained, or the queue was paused under it."""
    LOST = "lost"
    """The worker's lease ran out or its process is gone."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"
    RETRIED = "retried"
    PRIORITY = "priority"
    DISCARDED = "discarded"
    """A late worker's result was not taken."""
    PROMPT_ENDED = "prompt-ended"
    """The prompt of a cancelled job was seen ended on its server."""
    NOTE = "note"
    PAUSED = "paused"
    RESUMED = "resumed"
    FILE_REFUSED = "file-refused"


LAST_WORDS: Final = frozenset({EventKind.DONE, EventKind.FAILED, EventKind.CANCELLED, EventKind.QUARANTINED})
"""After one of these a job has ended, until somebody retries it."""


class Outcome(StrEnum):
    """How an attempt ended; the word its row keeps."""

    DONE = "done"
    FAILED = "failed"
    """For good."""
    REQUEUED = "requeued"
    """It failed and is tried again; costs a retry."""
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"
    PUT_BACK = "put-back"
    """Costs nothing; a prompt that may still run is kept for the next worker."""
    LOST = "lost"
    """The worker vanished; costs nothing."""
    DISCARDED = "discarded"
    """It came too late: somebody else holds the job."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as it is put into the queue. `request.job_id` is left empty: the queue gives the job its ids."""

    request: JobRequest
    workflow_id: str
    config_name: str = ""
    """Empty: one is made (jobs that came without a file)."""
    job_type: str = DEFAULT_JOB_TYPE
    priority: int | None = None
    """None: the queue's default."""
    retry_limit: int | None = None
    """None: the queue's own."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    project: str = ""
    idempotency_key: str | None = None
    source_path: str = ""
    """The job file, absolute; empty if there is none."""
    content_sha256: str = ""
    """Of the job file's bytes."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A row of the `jobs` table."""

    id: RowId
    config_name: str
    job_type: str
    workflow_id: str
    priority: int
    status: QueueStatus
    retries_attempted: int
    run_count: int
    retry_limit: int | None
    start_time: datetime | None
    end_time: datetime | None
    duration: float | None
    """Seconds of the last run, from claim to end."""
    error_trace: str | None
    metadata: Mapping[str, Any]
    worker_id: WorkerId | None
    lease_expires_at: datetime | None
    # beyond the published columns
    uid: JobId
    """Our own id, a UUID: the name of its results folder, and what programs keep."""
    token: int
    """The fence: goes up by one with each claim."""
    reason: str
    request: JobRequest | None
    """None if the row was made by hand in SQL and says nothing of what to run."""
    phase: Phase
    place: str | None
    """The key of the place where the prompt is (`Place.key`)."""
    prompt_id: PromptId | None
    not_before: datetime | None
    others_from: datetime | None
    """From when workers that do not serve `place` may take it too."""
    created_at: datetime | None
    user: str
    project: str
    idempotency_key: str | None
    source_path: str
    content_sha256: str
    held_sha256: str
    """Of a job file that was changed while the job was processing; empty if it was not."""
    lost_count: int
    """Leases lost in a row of one run."""
    kill_count: int
    """Machines that died under it."""
    progress: float
    """0 to 100, now and then."""
    message: str
    """What it is doing, for people."""
    result: Mapping[str, Any]
    """What came of it: outputs, seeds, cost_usd, timings; empty before."""

    @property
    def ended(self) -> bool:
        """Whether nothing more happens unless somebody asks for it."""
        return self.status in (QueueStatus.DONE, QueueStatus.FAILED)

    @property
    def cancelled(self) -> bool:
        """Whether a user cancelled it: only a user's `retry` starts it again."""
        return self.status is QueueStatus.FAILED and self.reason == Reason.CANCELLED


@dataclass(frozen=True, slots=True)
class PastResult:
    """What came of a job that is done, for those who learn from it."""

    id: RowId
    workflow_id: str
    ended_at: datetime
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job by one worker; its number is the token the worker held."""

    job_id: RowId
    token: int
    run: int
    """The value of `run_count` it belongs to; several attempts share a run when a worker went on with a prompt."""
    worker_id: WorkerId
    started_at: datetime
    ended_at: datetime | None
    outcome: Outcome | None
    place: str | None
    prompt_id: PromptId | None
    error_code: str
    error_trace: str
    result: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of the event log. `number` is its place in the one sequence of all events."""

    number: int
    at: datetime
    kind: EventKind
    job_id: RowId | None
    token: int
    worker_id: WorkerId | None
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ends its attempt."""

    outcome: Outcome
    """DONE, FAILED, REQUEUED, CANCELLED, QUARANTINED or PUT_BACK."""
    error: Mapping[str, Any] | None = None
    """`RunComfyError.as_dict()`."""
    trace: str = ""
    """What `error_trace` shows; empty: made from `error`."""
    reason: str = ""
    """What `jobs.reason` says of a failed job; empty: the error's code."""
    delay: timedelta = timedelta(0)
    """How long until it may be claimed again (REQUEUED, PUT_BACK)."""
    killed_machine: bool = False
    """Whether the machine died under it: one more on `kill_count`."""
    keeps_prompt: bool = False
    """PUT_BACK only: the prompt may still run and is for the next worker; else prompt and place are forgotten."""
    end_prompt: bool = False
    """The prompt may still run and is no longer wanted: phase ENDING."""
    result: Mapping[str, Any] = field(default_factory=dict)


class Ingested(StrEnum):
    """What became of a job file that was looked at."""

    NEW = "new"
    SAME = "same"
    """Known, content and all: nothing to do."""
    UPDATED = "updated"
    """It was pending; now it waits with the new content."""
    PRIORITY = "priority"
    """It is done; only its priority was changed."""
    AGAIN = "again"
    """It had failed, or was changed while it ran; it waits with the new content."""
    HELD = "held"
    """It is processing; the new content is taken up when that has ended."""
    CANCELLED = "cancelled"
    """It was cancelled: only `retry` starts it again."""
    TAKEN = "taken"
    """Another job file, elsewhere, has this name."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Why nothing is claimed. `scope` is `queue`, or `host:NAME` for the executors of one computer."""

    scope: str
    reason: str
    """An error's code, or `asked`."""
    message: str
    since: datetime
    until: datetime | None
    """When executors try again by themselves; None: only `resume` ends it."""
    by: str


QUEUE_SCOPE: Final = "queue"
FLEET_SCOPE: Final = "fleet"
"""The scope of a pause that only says why no machine is launched: nobody is kept from beginning jobs by it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Jobs of one kind that could be begun now."""

    workflow_id: str
    user: str
    project: str
    count: int
    oldest_at: datetime | None
    """When the oldest of them came; None: nobody can read it."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job's coming and going, for those who learn from it when jobs come."""

    id: RowId
    uid: JobId
    workflow_id: str
    user: str
    project: str
    at: datetime | None
    """When it came; None: nobody can read it."""
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Barred:
    """Whose jobs wait, whatever else there is room for: a budget of theirs is used up."""

    users: frozenset[str] = frozenset()
    projects: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.users or self.projects)


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """How much may be processing at once, over the whole database; None means any number."""

    workflow: Mapping[str, int] = field(default_factory=dict)
    """workflow_id -> jobs; the key `*` is for every workflow not named."""
    job_type: Mapping[str, int] = field(default_factory=dict)
    user: int | None = None
    place: int | None = None
    """Jobs at one place (machine), whichever executors they belong to."""
    fair_users: bool = False
    """At equal priority, the user with the fewest jobs processing goes first."""
    barred: Barred = Barred()

    @property
    def none(self) -> bool:
        """Whether there is nothing to count, so that one statement can claim."""
        return not (self.workflow or self.job_type or self.user or self.place or self.fair_users or self.barred)


def is_held_by(status: QueueStatus, token: int, claimed: int) -> bool:
    """Whether a job is still held under the token it was claimed with: the fence of every write of a run (I11)."""
    return status is QueueStatus.PROCESSING and token == claimed
