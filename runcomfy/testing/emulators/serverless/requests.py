"""Emulated requests and the instances that serve them: their facts, what the API says of them, and what they cost."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from runcomfy.testing.emulators.runcomfy.machines import billed_usd

NAMES: Final[Mapping[int, str]] = {
    10000: "InternalError",
    10001: "InsufficientFunds",
    10002: "DisabledDeployment",
    10003: "DeletedDeployment",
    10004: "QueuePromptUnexpectedError",
    10005: "PollingUnexpectedError",
    10006: "RetrievalUnexpectedError",
    10007: "ComfyUIUnreachable",
    10008: "PromptRejected",
    10009: "MediaUploadError",
    10011: "ComfyUIExecutionError",
    10012: "RequestLost",
    10013: "EmptyWorkflow",
    200001: "ExecutionWithoutNewYield",
}
OVER: Final = frozenset({"succeeded", "failed", "canceled"})


@dataclass(frozen=True, slots=True)
class RequestTraits:
    """How one request misbehaves; the default does not.

    Attributes:
        fails: ends with this error code after it ran, without results.
        words: the error's words.
        crashes: the instance dies while it runs (10012), and is billed until then.
        never_ends: runs until it is cancelled.
        ignores_cancel: a cancellation is accepted, and nothing comes of it.
        stuck: the status says `in_progress` for ever, though the result is there.
        without_urls: it succeeds, with files that have no address and the error 200001, as with inputs seen before.
        only: of these nodes alone results are told.
        channel: the list that meshes stand under.
        corrupt: files hold other bytes than they should: `html`, `empty`, `cut`.
        hidden: for so many seconds the request is not found by status and result calls.
    """

    fails: int | None = None
    words: str = ""
    crashes: bool = False
    never_ends: bool = False
    ignores_cancel: bool = False
    stuck: bool = False
    without_urls: bool = False
    only: tuple[str, ...] | None = None
    channel: str = "3d"
    corrupt: str | None = None
    hidden: float = 0.0


@dataclass(slots=True)
class EmulatedRequest:
    """One request, as the emulated cloud knows it."""

    request_id: str
    overrides: Mapping[str, Any]
    graph: dict[str, Any]
    """What ComfyUI gets: the deployment's graph with the overrides, or the request's own."""
    created_at: datetime
    created_loop: float
    traits: RequestTraits
    state: str = "in_queue"
    """in_queue, in_progress, succeeded, failed, canceled."""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    instance_id: str = ""
    prompt_id: str = ""
    outputs: dict[str, Any] = field(default_factory=dict)
    error: list[dict[str, Any]] = field(default_factory=list)
    cancel_wanted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in OVER

    def fail(self, code: int, words: str) -> None:
        """Let it end badly."""
        self.state = "failed"
        self.error = [{"error": NAMES.get(code, "UnknownError"), "errorCode": code, "debugInfo": words}]


@dataclass(slots=True)
class EmulatedInstance:
    """A GPU of the deployment: woken by a request, kept warm for a while after the last."""

    instance_id: str
    usd_per_hour: Decimal
    woken_at: datetime
    """When it was told to wake: from then on it is billed."""
    ready_at: datetime | None = None
    ended_at: datetime | None = None

    def seconds(self, now: datetime) -> Decimal:
        """What is billed of it so far."""
        return Decimal(str(((self.ended_at or now) - self.woken_at).total_seconds()))

    def usd(self, now: datetime) -> Decimal:
        """What it costs so far, cold start and warm time included."""
        return billed_usd(self.seconds(now), self.usd_per_hour)


def written(at: datetime | None, *, style: str) -> str | None:
    """Write a time as one of RunComfy's sources does: `naive`, `offset`, or `zulu`."""
    if at is None:
        return None
    text = at.strftime("%Y-%m-%dT%H:%M:%S.%f")
    return text + {"naive": "", "offset": "+00:00", "zulu": "Z"}[style]


def status_of(request: EmulatedRequest, ahead: int, urls: Mapping[str, str], *, british: bool) -> dict[str, Any]:
    """What the status call says: `completed` covers failures, too."""
    word = {"succeeded": "completed", "failed": "completed"}.get(request.state, request.state)
    if word == "canceled" and british:
        word = "cancelled"
    if request.traits.stuck and word == "completed":
        word = "in_progress"
    answer: dict[str, Any] = {
        "request_id": request.request_id,
        "status": word,
        "status_url": urls["status_url"],
        "result_url": urls["result_url"],
    }
    if word == "in_queue":
        answer["queue_position"] = ahead
    if request.instance_id:
        answer["instance_id"] = request.instance_id
    return answer


def result_of(request: EmulatedRequest, *, times: str, british: bool) -> dict[str, Any]:
    """What the result call says."""
    word = "cancelled" if request.state == "canceled" and british else request.state
    answer: dict[str, Any] = {
        "request_id": request.request_id,
        "status": word,
        "created_at": written(request.created_at, style=times),
        "finished_at": written(request.finished_at, style=times),
    }
    if request.state == "succeeded":
        answer["outputs"] = request.outputs
    if request.error:
        answer["error"] = request.error
    if request.instance_id:
        answer["instance_id"] = request.instance_id
    return answer
