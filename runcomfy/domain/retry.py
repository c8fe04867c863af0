"""
What follows when a run of a queued job fails: again, never again, or nothing at all until something is repaired.

    Retry         a fault that passes: again after a wait that doubles, drawn at random up to it (full jitter), up to
                  the job's limit; limit 2 means at most three runs
    Fail          it would fail again, or the limit is reached
    Quarantine    as many machines died under the job as one job may kill (I14)
    Pause         what every job needs is missing (a server, credentials, credit, room on the disk): nothing is
                  claimed until it is back, and the job waits unharmed
    StoreTrouble  the database cannot be written: nothing can be decided now
    Stopped       we stopped it ourselves; whoever did knows what is next

Every class of the error tree has its row in `KINDS`; what has none (a user's own subclass) goes by its base. Being
"submitted" matters for some: a server that does not answer before the prompt was sent costs the job nothing.

This room decides only. Writing the decision down, and waiting, is the executor's work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from typing import Final

from runcomfy.domain import exceptions as errors
from runcomfy.domain.exceptions import RunComfyError

Draw = Callable[[float, float], float]
"""Draws a number between two, such as `random.uniform`."""

PAUSE_FIRST: Final = timedelta(seconds=15)
PAUSE_MOST: Final = timedelta(minutes=5)
"""What is missing is looked for again after 15 s, 30 s, … 5 min: a ComfyUI that is started by hand is found soon, and
one that stays away for the night costs nothing."""
BUSY_FIRST: Final = timedelta(seconds=5)
BUSY_MOST: Final = timedelta(minutes=1)
"""A provider that says "not now" is asked again sooner."""


class Kind(Enum):
    """What sort of fault an error is."""

    WRONG = auto()
    """What was asked for; or somebody's will. Never again."""
    TRANSIENT = auto()
    KILLED = auto()
    """The machine went away; counted against the job if the job's prompt was on it."""
    MISSING = auto()
    """What every job of this computer needs is not there."""
    UNREACHABLE = auto()
    """No sensible answer from a server. Where the server may come back with the prompt, the job waits for it."""
    BUSY = auto()
    """The provider cannot now. Costs no retry."""
    BUDGET = auto()
    STORE = auto()
    OURS = auto()
    """Stopped by ourselves, or the lease is lost."""


KINDS: Final[Mapping[type[RunComfyError], Kind]] = {
    RunComfyError: Kind.TRANSIENT,  # a defect, or something nobody foresaw: may pass, and the limit bounds it
    # what was asked for
    errors.BadInput: Kind.WRONG,
    errors.WorkflowNotFound: Kind.WRONG,
    errors.WorkflowNotJson: Kind.WRONG,
    errors.WorkflowIsUiFormat: Kind.WRONG,
    errors.WorkflowInvalid: Kind.WRONG,
    errors.TargetUnknown: Kind.WRONG,
    errors.TargetAmbiguous: Kind.WRONG,
    errors.ValueInvalid: Kind.WRONG,
    errors.InputFileMissing: Kind.WRONG,
    errors.InputFileInvalid: Kind.WRONG,
    errors.PreflightFailed: Kind.WRONG,
    errors.PromptRejected: Kind.WRONG,
    errors.JobFileInvalid: Kind.WRONG,
    errors.JobNotFound: Kind.WRONG,
    errors.JobBusy: Kind.WRONG,
    errors.NameTaken: Kind.WRONG,
    errors.IdempotencyConflict: Kind.WRONG,
    errors.AddressRefused: Kind.WRONG,
    errors.TooManyRequests: Kind.WRONG,  # of whoever puts jobs in; no run of a job meets it
    # settings
    errors.ConfigurationError: Kind.MISSING,
    errors.CredentialsMissing: Kind.MISSING,
    errors.CredentialsMalformed: Kind.MISSING,
    errors.SettingInvalid: Kind.MISSING,
    errors.ExtraMissing: Kind.MISSING,
    errors.InsecureUrl: Kind.MISSING,
    # the cloud, the machine
    errors.ProviderError: Kind.TRANSIENT,
    errors.WrongUrl: Kind.MISSING,
    errors.AuthRejected: Kind.MISSING,
    errors.AccessDenied: Kind.MISSING,
    errors.OutOfCredit: Kind.MISSING,
    errors.LaunchRefused: Kind.MISSING,
    errors.LaunchUnclear: Kind.BUSY,
    errors.LaunchAmbiguous: Kind.BUSY,
    errors.NoCapacity: Kind.BUSY,
    errors.ProviderBusy: Kind.BUSY,
    errors.RateLimited: Kind.BUSY,
    errors.AnswerUnreadable: Kind.UNREACHABLE,
    errors.DeploymentUnusable: Kind.MISSING,
    errors.RequestUnclear: Kind.WRONG,  # again would be a second run, and a second bill
    errors.RequestNotFound: Kind.TRANSIENT,
    errors.RequestFailed: Kind.TRANSIENT,
    errors.ServerUnreachable: Kind.UNREACHABLE,
    errors.NotComfyUI: Kind.UNREACHABLE,
    errors.ServerTooOld: Kind.MISSING,
    errors.MachineNotFound: Kind.TRANSIENT,
    errors.MachineFailed: Kind.KILLED,
    errors.MachineLost: Kind.KILLED,
    errors.StopUnconfirmed: Kind.TRANSIENT,
    # the workflow
    errors.WorkflowFailed: Kind.TRANSIENT,
    errors.NodeFailed: Kind.TRANSIENT,
    errors.GpuOutOfMemory: Kind.TRANSIENT,
    errors.PromptInterrupted: Kind.WRONG,  # somebody pressed stop, and meant it
    errors.PromptRemoved: Kind.TRANSIENT,
    errors.ServerRestarted: Kind.KILLED,
    errors.WorkerDead: Kind.KILLED,
    errors.NodeStuck: Kind.TRANSIENT,
    # too late, or not whole
    errors.DeadlineExceeded: Kind.TRANSIENT,
    errors.JobTimeout: Kind.TRANSIENT,
    errors.BootTimeout: Kind.TRANSIENT,
    errors.VerificationFailed: Kind.TRANSIENT,
    errors.OutputMissing: Kind.TRANSIENT,
    errors.OutputCorrupt: Kind.TRANSIENT,
    errors.DownloadFailed: Kind.TRANSIENT,
    errors.BudgetExceeded: Kind.BUDGET,
    # this computer
    errors.LocalError: Kind.MISSING,
    errors.AddressInUse: Kind.MISSING,
    errors.DiskFull: Kind.MISSING,
    errors.StoreUnavailable: Kind.STORE,
    errors.StoreCorrupt: Kind.STORE,
    errors.StoreTooNew: Kind.STORE,
    errors.LeaseLost: Kind.OURS,
    errors.FolderWatched: Kind.MISSING,
    errors.Interrupted: Kind.OURS,
}

MAY_STILL_RUN: Final = frozenset(
    {errors.NodeStuck.code, errors.WorkerDead.code, errors.JobTimeout.code, RunComfyError.code}
)
"""After these the prompt may wait or run on its server although nobody wants it any more."""


class Scope(Enum):
    """Who pauses."""

    HOST = "host"
    """The executors of this computer."""
    QUEUE = "queue"


@dataclass(frozen=True, slots=True)
class Retry:
    """Run it again after `delay`; costs one of the job's retries."""

    delay: timedelta
    killed_machine: bool = False
    end_prompt: bool = False
    """The prompt may still run; it must be seen ended before anything new starts (I12)."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The job has failed for good. `why`: `error` if trying again is senseless, else `limit`."""

    why: str
    killed_machine: bool = False
    end_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The job is taken out: machines die under it."""

    killed: int
    """How many."""
    end_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Pause:
    """Claim nothing in the scope; the job goes back as it was, with the prompt it may have on a server."""

    scope: Scope
    retry_in: timedelta | None
    """None: until `until`, or until somebody resumes it."""
    until: datetime | None = None
    """Aware UTC: when what is missing will be there, if that is known as a time."""


@dataclass(frozen=True, slots=True)
class StoreTrouble:
    """Nothing can be written down; the next owner finds the job as the database has it."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """We stopped the run ourselves, or it is somebody else's by now."""


Decision = Retry | Fail | Quarantine | Pause | StoreTrouble | Stopped


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient the queue is. Frozen; `decide` has no memory."""

    limit: int = 2
    """Retries of a job that names no limit of its own."""
    kill_limit: int = 2
    first: timedelta = timedelta(seconds=5)
    most: timedelta = timedelta(minutes=10)

    def decide(
        self,
        error: RunComfyError,
        *,
        submitted: bool,
        server_stays: bool,
        retries_attempted: int,
        retry_limit: int | None,
        kill_count: int,
        pauses: int,
        draw: Draw,
    ) -> Decision:
        """Return what follows.

        `submitted`: the job has (or may have) a prompt on a server, of this attempt or of an earlier one.
        `server_stays`: that server goes on existing when the place is left. `kill_count`: machines that died under
        the job before. `pauses`: how often in a row this computer has paused already.
        """
        kind = kind_of(error)
        if kind is Kind.OURS:
            return Stopped()
        if kind is Kind.STORE:
            return StoreTrouble()
        if kind is Kind.WRONG:
            return Fail("error")
        if kind is Kind.BUDGET:
            return Pause(Scope.QUEUE, None, until=resets_at(error))
        if kind is Kind.MISSING or (kind is Kind.UNREACHABLE and (server_stays or not submitted)):
            return Pause(Scope.HOST, growing(PAUSE_FIRST, PAUSE_MOST, pauses))
        if kind is Kind.BUSY and not submitted:
            return Pause(Scope.HOST, growing(BUSY_FIRST, BUSY_MOST, pauses))
        killed = kind is Kind.KILLED and submitted
        end_prompt = submitted and (error.code in MAY_STILL_RUN or kind is Kind.UNREACHABLE)
        if killed and kill_count + 1 >= self.kill_limit:
            return Quarantine(kill_count + 1, end_prompt)
        if retries_attempted >= (self.limit if retry_limit is None else retry_limit):
            return Fail("limit", killed_machine=killed, end_prompt=end_prompt)
        most = growing(self.first, self.most, retries_attempted)
        delay = timedelta(seconds=draw(0.0, most.total_seconds()))
        return Retry(delay, killed_machine=killed, end_prompt=end_prompt)

    def keeps_prompt(self, error: RunComfyError, *, server_stays: bool) -> bool:
        """Return whether a prompt on a server is left alone after `error`, for whoever goes on with the job."""
        if isinstance(error, errors.LeaseLost):
            return True
        return server_stays and kind_of(error) in (Kind.STORE, Kind.MISSING, Kind.UNREACHABLE, Kind.BUDGET)


def kind_of(error: RunComfyError) -> Kind:
    """Return the kind of an error; a class that has no row goes by its nearest base that has one."""
    return next(KINDS[base] for base in type(error).__mro__ if base in KINDS)


def resets_at(error: RunComfyError) -> datetime | None:
    """Return when the window of the budget that refused is over; None: it never is, or waiting does not help.

    It does not where one lease costs more than the whole budget (`domain.budget.exceeded`).
    """
    resets = error.details.get("resets_at")
    if not isinstance(resets, str) or "lease_usd" in error.details:
        return None
    return datetime.fromisoformat(resets)


def growing(first: timedelta, most: timedelta, times: int) -> timedelta:
    """Return `first` doubled `times` times, at most `most`."""
    return min(most, first * (1 << min(max(times, 0), 32)))
