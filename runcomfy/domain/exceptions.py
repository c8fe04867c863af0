"""
Everything that can go wrong, as one tree with exit codes.

    RunComfyError                     1   a defect of ours, or anything not foreseen
    ├── BadInput                      2   the workflow, a value, a file, the command line
    │   ├── WorkflowNotFound  WorkflowNotJson  WorkflowIsUiFormat  WorkflowInvalid
    │   ├── TargetUnknown  TargetAmbiguous  ValueInvalid
    │   ├── InputFileMissing  InputFileInvalid
    │   ├── PreflightFailed  PromptRejected
    │   ├── JobFileInvalid  JobNotFound  JobBusy  NameTaken  IdempotencyConflict
    │   └── AddressRefused  TooManyRequests (retryable)
    ├── ConfigurationError            3   settings and credentials
    │   ├── CredentialsMissing  CredentialsMalformed  SettingInvalid  InsecureUrl  ExtraMissing
    ├── ProviderError                 4   the cloud, the machine, the ComfyUI on it
    │   ├── WrongUrl  AuthRejected  AccessDenied  OutOfCredit  NoCapacity  LaunchRefused
    │   ├── ProviderBusy (retryable)  RateLimited (retryable)  AnswerUnreadable
    │   ├── LaunchUnclear  LaunchAmbiguous  MachineNotFound  MachineFailed  MachineLost  StopUnconfirmed
    │   ├── ServerUnreachable  NotComfyUI  ServerTooOld
    │   ├── DeploymentUnusable  RequestUnclear  RequestNotFound  RequestFailed
    ├── WorkflowFailed                5   ComfyUI ran the workflow and it did not succeed
    │   ├── NodeFailed  GpuOutOfMemory  PromptInterrupted  PromptRemoved  ServerRestarted  WorkerDead  NodeStuck
    ├── DeadlineExceeded              6   it took longer than allowed
    │   ├── JobTimeout  BootTimeout
    ├── VerificationFailed            7   the results are not what they must be
    │   ├── OutputMissing  OutputCorrupt  DownloadFailed
    ├── BudgetExceeded                8   refused before money was spent
    ├── LocalError                    9   this computer's disk or database
    │   ├── DiskFull  StoreUnavailable  StoreCorrupt  StoreTooNew  LeaseLost  FolderWatched  AddressInUse
    └── Interrupted                 130   the user pressed Ctrl+C, or asked for cancellation

Every class has its own stable `code`, which appears in logs, in `--json` output and in the documentation.
The message says what happened, `hint` what to do about it, `details` holds facts for programs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar

FOREIGN_TEXT_LIMIT = 256
"""Characters kept of a text that came from outside: nobody knows what it holds (kopf cuts at the same length)."""


def foreign_text(text: object, limit: int = FOREIGN_TEXT_LIMIT) -> str:
    """Return text from outside made safe to show: one line, no control or escape characters, cut to `limit`."""
    raw = str(text)[: limit * 4]
    if raw.isascii() and raw.isprintable() and "  " not in raw:
        clean = raw.strip()  # the usual case, asked for often
    else:
        clean = "".join(" " if c.isspace() else c for c in raw if c.isspace() or unicodedata.category(c)[0] != "C")
        clean = " ".join(clean.split())
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


class RunComfyError(Exception):
    """Something went wrong; the base of every error of this library."""

    code: ClassVar[str] = "internal-error"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    """Whether the same call, made again later, may succeed. Read by the retry policy."""

    def __init__(self, message: str = "", *, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        default = (type(self).__doc__ or "").strip().split("\n")[0]
        super().__init__(message or default)
        self.message = message or default
        self.hint = hint
        self.details: dict[str, Any] = dict(details or {})

    def as_dict(self) -> dict[str, Any]:
        """Return `{code, message, hint, details}` as it appears in `--json` output."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


# --- 2: bad input -----------------------------------------------------------------------------------------


class BadInput(RunComfyError):
    """What was asked for cannot be done as written; nothing was sent and nothing is owed."""

    code = "bad-input"
    exit_code = 2


class WorkflowNotFound(BadInput):
    """There is no workflow of that name, nor a file at that path."""

    code = "workflow-not-found"


class WorkflowNotJson(BadInput):
    """The workflow file is not JSON."""

    code = "workflow-not-json"


class WorkflowIsUiFormat(BadInput):
    """The workflow was saved for the ComfyUI page, not for its API."""

    code = "workflow-ui-format"


class WorkflowInvalid(BadInput):
    """The file is JSON but not a ComfyUI graph, or the graph contradicts itself."""

    code = "workflow-invalid"


class TargetUnknown(BadInput):
    """No node of the workflow has that input."""

    code = "target-unknown"


class TargetAmbiguous(BadInput):
    """More than one node fits; say which one is meant."""

    code = "target-ambiguous"


class ValueInvalid(BadInput):
    """A value cannot be used where it was given."""

    code = "value-invalid"


class InputFileMissing(BadInput):
    """An input file does not exist or cannot be read."""

    code = "input-file-missing"


class InputFileInvalid(BadInput):
    """An input file is not what it should be."""

    code = "input-file-invalid"


class PreflightFailed(BadInput):
    """The machine's node list says that the workflow cannot run there; `details["problems"]` has every reason."""

    code = "preflight-failed"


class PromptRejected(BadInput):
    """ComfyUI refused the workflow when it was submitted."""

    code = "prompt-rejected"


class JobFileInvalid(BadInput):
    """A job file cannot be read; the message names line and field."""

    code = "job-file-invalid"


class JobNotFound(BadInput):
    """The queue has no such job."""

    code = "job-not-found"


class JobBusy(BadInput):
    """The job is being processed."""

    code = "job-busy"


class NameTaken(BadInput):
    """Another job has that name."""

    code = "name-taken"


class IdempotencyConflict(BadInput):
    """The idempotency key belongs to a job with another body."""

    code = "idempotency-conflict"


class AddressRefused(BadInput):
    """The address may not be used: it points into this computer or a private network, or is none."""

    code = "address-refused"


class TooManyRequests(BadInput):
    """One client asked for too much at once; `details["retry_after_s"]` says when to come again."""

    code = "too-many-requests"
    retryable = True


# --- 3: configuration -------------------------------------------------------------------------------------


class ConfigurationError(RunComfyError):
    """A setting is missing or cannot be used."""

    code = "configuration-error"
    exit_code = 3


class CredentialsMissing(ConfigurationError):
    """Credentials are needed and none were found."""

    code = "credentials-missing"


class CredentialsMalformed(ConfigurationError):
    """A credential was found but cannot be right."""

    code = "credentials-malformed"


class SettingInvalid(ConfigurationError):
    """A setting has a value that cannot be used."""

    code = "setting-invalid"


class InsecureUrl(ConfigurationError):
    """A secret would travel unencrypted."""

    code = "insecure-url"


class ExtraMissing(ConfigurationError):
    """What was asked for needs a package that is not installed."""

    code = "extra-missing"


# --- 4: provider ------------------------------------------------------------------------------------------


class ProviderError(RunComfyError):
    """The cloud, or the machine it rented out, did not do its part."""

    code = "provider-error"
    exit_code = 4


class WrongUrl(ProviderError):
    """The cloud's gateway does not know this path: the address is wrong, not the token."""

    code = "provider-wrong-url"


class AuthRejected(ProviderError):
    """The cloud does not accept the token."""

    code = "provider-auth-rejected"


class AccessDenied(ProviderError):
    """The token is known, but this account or user id may not do that."""

    code = "provider-access-denied"


class OutOfCredit(ProviderError):
    """The account has no money or quota left."""

    code = "provider-out-of-credit"


class NoCapacity(ProviderError):
    """No machine of that type is to be had now; another type may do."""

    code = "provider-no-capacity"


class LaunchRefused(ProviderError):
    """The cloud refused to start the machine; none was started."""

    code = "provider-launch-refused"


class ProviderBusy(ProviderError):
    """The cloud did not answer, or answered that it cannot now."""

    code = "provider-busy"
    retryable = True


class RateLimited(ProviderError):
    """The account sent more requests than the cloud allows."""

    code = "provider-rate-limited"
    retryable = True


class AnswerUnreadable(ProviderError):
    """The answer is not what this API sends; something else may be answering in its place."""

    code = "provider-answer-unreadable"


class LaunchUnclear(ProviderError):
    """A launch was sent and its answer never came or cannot be read: a machine may have been started."""

    code = "provider-launch-unclear"


class LaunchAmbiguous(ProviderError):
    """Several new machines fit one unanswered launch; none was touched."""

    code = "provider-launch-ambiguous"


class MachineNotFound(ProviderError):
    """The cloud knows no machine with that id."""

    code = "machine-not-found"


class MachineFailed(ProviderError):
    """The machine was rented but never became usable."""

    code = "machine-failed"


class MachineLost(ProviderError):
    """The machine went away while it was needed."""

    code = "machine-lost"


class StopUnconfirmed(ProviderError):
    """A stop was asked for and the machine was not seen gone: it may still bill."""

    code = "machine-stop-unconfirmed"


class DeploymentUnusable(ProviderError):
    """The serverless deployment is disabled, deleted, not known, or has no workflow."""

    code = "serverless-deployment-unusable"


class RequestUnclear(ProviderError):
    """A serverless request was sent and its answer never came or cannot be read: it may run, and be billed, once."""

    code = "serverless-request-unclear"


class RequestNotFound(ProviderError):
    """The serverless deployment knows no request with that id."""

    code = "serverless-request-not-found"


class RequestFailed(ProviderError):
    """RunComfy could not carry a serverless request through; the workflow itself is not to blame."""

    code = "serverless-request-failed"
    retryable = True


class ServerUnreachable(ProviderError):
    """The ComfyUI server does not answer."""

    code = "comfyui-unreachable"
    retryable = True


class NotComfyUI(ProviderError):
    """Something answers at that address, but it is not ComfyUI."""

    code = "comfyui-not-found"


class ServerTooOld(ProviderError):
    """The ComfyUI server is older than the oldest release that can be driven safely."""

    code = "comfyui-too-old"


# --- 5: the workflow failed -------------------------------------------------------------------------------


class WorkflowFailed(RunComfyError):
    """ComfyUI ran the workflow and it did not succeed."""

    code = "workflow-failed"
    exit_code = 5


class NodeFailed(WorkflowFailed):
    """A node raised an error."""

    code = "node-failed"


class GpuOutOfMemory(NodeFailed):
    """The GPU had too little memory for the workflow, or its driver failed."""

    code = "gpu-out-of-memory"


class PromptInterrupted(WorkflowFailed):
    """Somebody interrupted the prompt on the server."""

    code = "prompt-interrupted"


class PromptRemoved(WorkflowFailed):
    """The waiting prompt was deleted from the server's queue by somebody."""

    code = "prompt-removed"


class ServerRestarted(WorkflowFailed):
    """ComfyUI restarted while the prompt waited or ran; the prompt is gone."""

    code = "server-restarted"


class WorkerDead(WorkflowFailed):
    """ComfyUI answers but runs nothing: its worker thread has died."""

    code = "worker-dead"


class NodeStuck(WorkflowFailed):
    """A node made no progress for longer than allowed."""

    code = "node-stuck"


# --- 6: too late ------------------------------------------------------------------------------------------


class DeadlineExceeded(RunComfyError):
    """It took longer than allowed."""

    code = "deadline-exceeded"
    exit_code = 6


class JobTimeout(DeadlineExceeded):
    """The job did not finish within its timeout."""

    code = "job-timeout"


class BootTimeout(DeadlineExceeded):
    """The machine did not become ready in time."""

    code = "boot-timeout"


# --- 7: the results are not right -------------------------------------------------------------------------


class VerificationFailed(RunComfyError):
    """The workflow ran, but its results are not what they must be."""

    code = "verification-failed"
    exit_code = 7


class OutputMissing(VerificationFailed):
    """A result that the workflow promises was not delivered."""

    code = "output-missing"


class OutputCorrupt(VerificationFailed):
    """A result was delivered but cannot be decoded."""

    code = "output-corrupt"


class DownloadFailed(VerificationFailed):
    """A result could not be fetched whole."""

    code = "download-failed"


# --- 8, 9, 130 --------------------------------------------------------------------------------------------


class BudgetExceeded(RunComfyError):
    """Launching would pass a price limit; nothing was launched and nothing is owed."""

    code = "budget-exceeded"
    exit_code = 8


class LocalError(RunComfyError):
    """This computer's disk or database does not allow it."""

    code = "local-error"
    exit_code = 9


class DiskFull(LocalError):
    """A file could not be written whole."""

    code = "disk-full"


class StoreUnavailable(LocalError):
    """The database is locked, or cannot be opened."""

    code = "store-unavailable"


class StoreCorrupt(LocalError):
    """The database file is damaged."""

    code = "store-corrupt"


class StoreTooNew(LocalError):
    """The database was written by a newer version of this program."""

    code = "store-too-new"


class LeaseLost(LocalError):
    """Another process took over what this one held; its writes no longer count."""

    code = "lease-lost"


class FolderWatched(LocalError):
    """Another monitor watches the folder; two would take up each file twice."""

    code = "folder-watched"


class AddressInUse(LocalError):
    """Another program listens at this port of this computer."""

    code = "address-in-use"


class Interrupted(RunComfyError):
    """Stopped on request."""

    code = "interrupted"
    exit_code = 130
