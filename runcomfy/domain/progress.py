"""What a person is told while a job runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from runcomfy.domain.job import PromptId


class Step(StrEnum):
    """Which part of a job is being done."""

    PLACING = "placing"
    LAUNCHING = "launching"
    BOOTING = "booting"
    CHECKING = "checking"
    UPLOADING = "uploading"
    QUEUED = "queued"
    RUNNING = "running"
    FETCHING = "fetching"
    STOPPING = "stopping"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class NodeLabel:
    """How a node of the workflow is called when people are told about it."""

    title: str = ""
    class_type: str = ""


def _no_labels() -> Mapping[str, NodeLabel]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Progress:
    """A snapshot. `percent` (0 to 100) counts the workflow's nodes, cached ones included, and never goes back."""

    step: Step
    percent: float = 0.0
    message: str = ""
    node_id: str | None = None
    node_title: str = ""
    value: float | None = None
    """The current node's own progress, `value` of `maximum` (sampler steps, for example)."""
    maximum: float | None = None
    nodes_done: int = 0
    nodes_total: int = 0
    queue_position: int | None = None
    """How many prompts are ahead on the server; 0 is next."""
    elapsed: timedelta = timedelta(0)
    """Since the job began."""
    expected: timedelta | None = None
    """How long this step is expected to take, where history tells."""
    preview: bytes | None = None
    """An encoded preview picture (JPEG or PNG), when the server sent one."""
    done: frozenset[str] = frozenset()
    """Nodes of the workflow that have ended, cached ones included."""
    cached: frozenset[str] = frozenset()
    """Nodes that the server did not have to compute."""
    active: frozenset[str] = frozenset()
    """Nodes that the server says to be running now; several, where some work beside each other. Older servers name
    only `node_id`."""
    labels: Mapping[str, NodeLabel] = field(default_factory=_no_labels, compare=False, repr=False)
    """Every node of the graph that was sent, where it is known."""
    server_type: str = ""
    """The type of the rented machine the job is at; empty before, and on a server that was given."""
    joined: bool = False
    """Whether the prompt of an earlier attempt is gone on with: what ran before was not heard."""
    earlier_usd: Decimal = Decimal(0)
    """What earlier attempts of the job have cost."""


@dataclass(frozen=True, slots=True)
class QueueView:
    """One reading of the server's queue: ids that run, and ids that wait in the order in which they will run."""

    running: tuple[str, ...]
    pending: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """What the server remembers of a prompt that ended."""

    prompt_id: PromptId
    outputs: Mapping[str, Any]
    status: str
    """`success` or `error`; empty if the server left it out."""
    messages: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(frozen=True, slots=True)
class SocketUp:
    """The socket to the server is open (again)."""


@dataclass(frozen=True, slots=True)
class SocketDown:
    """The socket is closed, refused or silent; `reason` says how it was noticed."""

    reason: str = ""
    lost: bool = False
    """Whether an open connection broke; False: it could not be opened, or we closed it ourselves."""


@dataclass(frozen=True, slots=True)
class Said:
    """A text message of the server about our prompt (or about no prompt in particular, such as `status`)."""

    type: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Preview:
    """A preview picture, with the node it belongs to where the server says so."""

    image: bytes
    mime: str
    node_id: str | None = None


@dataclass(frozen=True, slots=True)
class NodeText:
    """A progress text of a node."""

    node_id: str
    text: str


ServerEvent = SocketUp | SocketDown | Said | Preview | NodeText
"""What a subscription to a prompt delivers."""
