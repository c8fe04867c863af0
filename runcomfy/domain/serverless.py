"""
Requests to a serverless deployment: what RunComfy says about them, which result is which, what one may have cost.

A request is one run of the deployment's saved workflow with some values laid over it. The status of a request says only
whether it is over; whether it went well stands in its result, and `completed` covers failures too. Nobody rents a
machine here, so there is nothing to stop but the request itself: RunComfy wakes and ends the instances.

Pure values; talking to RunComfy is the client's work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, NewType

from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    DeploymentUnusable,
    GpuOutOfMemory,
    InputFileInvalid,
    NodeFailed,
    OutOfCredit,
    OutputMissing,
    PromptInterrupted,
    PromptRejected,
    RequestFailed,
    RequestNotFound,
    RunComfyError,
    ValueInvalid,
)
from runcomfy.domain.job import OutputKind
from runcomfy.domain.money import RateTable, meter
from runcomfy.domain.secret import SecretUrl

RequestId = NewType("RequestId", str)
"""RunComfy's id of one request."""

Overrides = Mapping[str, Mapping[str, Any]]
"""Node id -> `{"inputs": {name: value}}`, laid over the deployment's saved graph."""


class RequestState(StrEnum):
    """RunComfy's words for where a request stands."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    """Over; how it ended stands in the result."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    UNKNOWN = "unknown"
    """A word we do not know: not over, as far as anybody can tell."""

    @property
    def over(self) -> bool:
        """Whether nothing more happens to the request."""
        return self in (RequestState.COMPLETED, RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELED)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request that RunComfy has taken in."""

    request_id: RequestId
    status_url: str = ""
    result_url: str = ""
    cancel_url: str = ""
    """Where RunComfy says these calls go; empty: where its documentation says."""


@dataclass(frozen=True, slots=True)
class RequestReport:
    """What the status call says."""

    request_id: RequestId
    state: RequestState
    word: str = ""
    """As RunComfy wrote it."""
    queue_position: int | None = None
    """How many are ahead; 0 is next. None unless it waits."""
    instance_id: str = ""
    """The instance that serves it, once there is one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of a result's errors."""

    code: int | None = None
    name: str = ""
    words: str = ""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file among a request's outputs, by RunComfy's own names. Data only: never a path here."""

    node: str
    channel: str
    """Under which list it stood: `images`, `3d`, `files`, …"""
    filename: str = ""
    subfolder: str = ""
    type: str = "output"
    url: SecretUrl | None = None
    """Needs no token, and is gone after 7 days (RunComfy API reference). None: the run brought no new file."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What the result call says."""

    request_id: RequestId
    state: RequestState
    files: tuple[RemoteFile, ...] = ()
    faults: tuple[Fault, ...] = ()
    created_at: datetime | None = None
    finished_at: datetime | None = None
    instance_id: str = ""
    outputs: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """As RunComfy sent them."""


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """What RunComfy says about the deployment."""

    name: str = ""
    hardware: tuple[str, ...] = ()
    enabled: bool | None = None
    keep_warm: timedelta | None = None
    min_instances: int | None = None


# --- which file is which ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """A result that a request must bring."""

    name: str
    node: str
    kind: OutputKind
    channels: tuple[str, ...] = ()
    """Lists to look into first; whatever else the node brought comes after them."""
    file: str = ""
    """The name it gets here."""


_MESHES: Final = (".glb", ".gltf", ".obj", ".stl", ".ply", ".fbx")
_PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
_ENDINGS: Final[Mapping[OutputKind, tuple[str, ...]]] = {OutputKind.MESH: _MESHES, OutputKind.IMAGE: _PICTURES}


def find_file(result: RequestResult, wanted: Wanted) -> RemoteFile:
    """Return the file that is this result.

    The list a node's files stand under has changed between ComfyUI versions (a mesh has been seen under `3d` and
    `files`), so every list of the node is looked through. Raises OutputMissing.
    """
    there = [file for file in result.files if file.node == wanted.node and file.type != "temp"]
    order = {channel: index for index, channel in enumerate(wanted.channels)}
    endings = _ENDINGS.get(wanted.kind, ())

    def rank(file: RemoteFile) -> tuple[bool, bool, int]:
        named = file.filename.lower().endswith(endings) if endings else True
        return file.url is None, not named, order.get(file.channel, len(order))

    best = min(there, key=rank, default=None)
    if best is not None and best.url is not None:
        return best
    if best is not None or any(fault.code == NO_NEW_FILE for fault in result.faults):
        raise OutputMissing(
            f"RunComfy brought no new file for {wanted.name} (node {wanted.node}): everything came from its cache",
            hint="use another seed; with the very same inputs ComfyUI computes, and writes, nothing",
            details={"request_id": result.request_id, "node": wanted.node},
        )
    raise OutputMissing(
        f"the request brought no {wanted.name} (node {wanted.node})",
        hint="check that the deployment's workflow has that node, and that it saves what it makes",
        details={
            "request_id": result.request_id,
            "node": wanted.node,
            "nodes": sorted({file.node for file in result.files})[:20],
        },
    )


# --- errors ---------------------------------------------------------------------------------------------------

NO_NEW_FILE: Final = 200001
"""`ExecutionWithoutNewYield`: the inputs were those of an earlier run, so ComfyUI computed nothing."""

_AGAIN: Final = "this is RunComfy's trouble and usually passes; run it again"
_Row = tuple[type[RunComfyError], str, str]

CODES: Final[Mapping[int, _Row]] = {
    # RunComfy API reference, errors: the HTTP layer, what gates a deployment, what happens to a request.
    401001: (AuthRejected, "RunComfy does not accept the token", "copy it again from RunComfy's profile page"),
    403003: (
        AccessDenied,
        "the deployment belongs to another account",
        "check RUNCOMFY_DEPLOYMENT_ID, and whose token RUNCOMFY_API_TOKEN is",
    ),
    404001: (
        RequestNotFound,
        "RunComfy does not know the deployment or the request",
        "check RUNCOMFY_DEPLOYMENT_ID on RunComfy's deployments page",
    ),
    422001: (
        ValueInvalid,
        "RunComfy does not accept the request's values",
        "node ids and input names must be those of the deployment's workflow",
    ),
    500001: (RequestFailed, "RunComfy had an internal error", _AGAIN),
    10000: (RequestFailed, "RunComfy had an internal error", _AGAIN),
    10001: (
        OutOfCredit,
        "the account has no money left, and the deployment is disabled",
        "pay on RunComfy's billing page, then enable the deployment again by hand",
    ),
    10002: (DeploymentUnusable, "the deployment is disabled", "enable it on RunComfy's deployments page"),
    10003: (
        DeploymentUnusable,
        "the deployment was deleted",
        "make another on RunComfy's deployments page, and put its id into RUNCOMFY_DEPLOYMENT_ID",
    ),
    10004: (RequestFailed, "RunComfy's queue failed", _AGAIN),
    10005: (RequestFailed, "RunComfy lost sight of the run", _AGAIN),
    10006: (RequestFailed, "RunComfy could not collect the results", _AGAIN),
    10007: (
        RequestFailed,
        "RunComfy could not reach the deployment's ComfyUI",
        "it also happens while an instance starts; run it again, and look at the deployment's log if it stays",
    ),
    10008: (
        PromptRejected,
        "the deployment's ComfyUI refused the workflow",
        "the words above name the node; its models and node packs must be in the deployment's image",
    ),
    10009: (
        InputFileInvalid,
        "RunComfy could not take a file that an input names",
        "send a data URI (256 KB for a picture is advised) or a public https address that does not redirect",
    ),
    10011: (NodeFailed, "the workflow failed on RunComfy", "the words above are ComfyUI's own"),
    10012: (
        RequestFailed,
        "the run was lost when RunComfy's instance crashed",
        "run it again; if it stays, the deployment's hardware may be too small",
    ),
    10013: (
        DeploymentUnusable,
        "the deployment has no workflow",
        "save the workflow in RunComfy's cloud again, and make the deployment use that version",
    ),
    NO_NEW_FILE: (
        OutputMissing,
        "RunComfy brought no new file: everything came from its cache",
        "use another seed; with the very same inputs ComfyUI computes, and writes, nothing",
    ),
}

REFUSALS: Final = frozenset({401001, 403003, 404001, 422001, 10001, 10002, 10003, 10008, 10009, 10013})
"""Codes that leave no doubt that a request was not taken in."""
_MEMORY: Final = ("out of memory", "outofmemory", "cuda oom", "allocation on device")


def error_of(fault: Fault, *, details: Mapping[str, Any]) -> RunComfyError:
    """Return what an error that RunComfy reports means to us; the code and its own words stay in it."""
    said = fault.words or fault.name
    facts = {**details, "runcomfy_code": fault.code, "runcomfy_error": fault.name, "runcomfy_words": fault.words}
    row = CODES.get(fault.code) if fault.code is not None else None
    if row is None:
        code = f" (code {fault.code})" if fault.code is not None else ""
        words = f": {said}" if said else " without saying why"
        return RequestFailed(f"RunComfy gave the request up{code}{words}", hint=_AGAIN, details=facts)
    kind, words, hint = row
    if kind is NodeFailed and any(mark in f"{fault.words} {fault.name}".lower() for mark in _MEMORY):
        kind = GpuOutOfMemory
        hint = "ask for a smaller picture or mesh, or give the deployment hardware with more memory"
    return kind(f"{words} (code {fault.code})" + (f": {said}" if said else ""), hint=hint, details=facts)


def outcome(result: RequestResult) -> RunComfyError | None:
    """Return why a request that is over did not succeed; None if it did."""
    details = {"request_id": result.request_id, "status": result.state.value}
    if result.state is RequestState.SUCCEEDED:
        return None
    if result.state is RequestState.CANCELED:
        return PromptInterrupted(
            f"the request {result.request_id} was cancelled",
            hint="submit it again if that was not meant",
            details=details,
        )
    faults = sorted(result.faults, key=lambda fault: fault.code is None)
    if not faults and result.state is RequestState.COMPLETED and result.files:
        return None  # "completed" is the status call's word; a result that says it, and has files, went well
    return error_of(faults[0] if faults else Fault(), details=details)


# --- money ----------------------------------------------------------------------------------------------------

HARDWARE: Final[Mapping[str, str]] = {
    # RunComfy's serverless names for hardware and the tier of the price table they belong to (RunComfy API reference).
    "TURING_16": "medium",
    "AMPERE_24": "large",
    "AMPERE_48": "extra-large",
    "AMPERE_80": "2x-large",
    "ADA_80_PLUS": "2xl-turbo",
}
HARDWARE_USD: Final[Mapping[str, Mapping[str, Decimal]]] = {
    # Tiers that the Server API has no name for, as of 2026-11 (docs.runcomfy.com, about billing).
    "ADA_48_PLUS": {"payg": Decimal("2.99"), "pro": Decimal("2.15")},
    "HOPPER_141": {"payg": Decimal("8.75"), "pro": Decimal("6.99")},
}


def price_of(hardware: Sequence[str], rates: RateTable) -> Decimal | None:
    """Return the price in USD per hour of a deployment's hardware; None if no table has it."""
    for name in hardware:
        rate = rates.find(HARDWARE.get(name, name))
        if rate is not None:
            return rate.usd_per_hour
        if name in HARDWARE_USD:
            return HARDWARE_USD[name].get(rates.plan)
    return None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request may have cost, in USD. RunComfy's API does not say; its dashboard does.

    An instance is billed from the moment it is told to wake until it is shut down again, so what one request costs
    depends on whether it found an instance awake and on who comes after it.
    """

    usd_per_hour: Decimal
    low_usd: Decimal
    """The run alone: an instance was awake, and somebody else's request followed."""
    usd: Decimal
    """From submit to end, as if an instance had to wake for it. Time in the queue behind others counts too much."""
    high_usd: Decimal
    """With the time the instance is kept warm afterwards."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as manifests and results show it."""
        return {
            "estimate": True,
            "usd": str(self.usd),
            "low_usd": str(self.low_usd),
            "high_usd": str(self.high_usd),
            "usd_per_hour": str(self.usd_per_hour),
            "note": "estimated from the request's times; RunComfy's dashboard has the charge",
        }


def estimate(
    usd_per_hour: Decimal,
    *,
    created_at: datetime,
    running_from: datetime | None,
    finished_at: datetime,
    keep_warm: timedelta | None,
) -> Estimate:
    """Return the estimate for a request; `running_from` is when it was first seen to run, None if it never was."""
    begun = min(max(running_from or created_at, created_at), finished_at)
    warm_until = max(finished_at, created_at) + (keep_warm or timedelta(0))
    return Estimate(
        usd_per_hour=usd_per_hour,
        low_usd=meter(begun, finished_at, usd_per_hour),
        usd=meter(created_at, finished_at, usd_per_hour),
        high_usd=meter(created_at, warm_until, usd_per_hour),
    )
