"""What a person is told while a job runs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum


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
