"""
A job: what the user asked for, and what came of it.

One job is one run of a workflow. These are values; doing the job is the orchestrator's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NewType

if TYPE_CHECKING:
    from runcomfy.domain.timeline import NodeTime

JobId = NewType("JobId", str)
PromptId = NewType("PromptId", str)
"""ComfyUI's id of one execution; chosen by us, a canonical lower-case UUID (required since ComfyUI 0.25.0)."""


PICTURE_FORMATS: Final[Mapping[str, str]] = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
"""What picture results can be converted to, with the extension of each."""


class JobStatus(StrEnum):
    """How a job ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


class OutputKind(StrEnum):
    """What a result is, judged by its content."""

    IMAGE = "image"
    MESH = "mesh"
    VIDEO = "video"
    AUDIO = "audio"
    TEXT = "text"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What to run.

    `workflow` is a shipped name, a path to an API-format file, or the graph itself. `sets` maps targets
    (`NODEID.input`, `Title.input`, `Class.input`) to JSON values; a text `@path` uploads that file. `seed` None
    means a random one for every seed the workflow has. `server_url` names a ComfyUI that already runs.
    """

    workflow: str | Mapping[str, Any]
    image: str | None = None
    prompt: str | None = None
    seed: int | None = None
    sets: Mapping[str, Any] = field(default_factory=dict)
    out_dir: str | None = None
    server_url: str | None = None
    timeout: timedelta | None = None
    convert: str | None = None
    """Picture format to convert image results to: png, jpg or webp."""
    server_type: str | None = None
    job_id: JobId | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Values by the names people use in job files: a name of the sidecar, `NODE_param`, `Title.param`, or the only
    input of that name in the graph."""
    input_names: Mapping[str, str] = field(default_factory=dict)
    """Name -> target (`NODEID.input`), from the workflow's entry in `workflows.yaml`; looked at before the sidecar."""
    required_inputs: tuple[str, ...] = ()
    """Names that `inputs` must have."""
    out_file: str | None = None
    """Where the one result goes, as a file; several get numbered names. Wins over `out_dir`."""
    out_root: str | None = None
    """The folder that `out_file` may not leave, not even by a link in its path; None: anywhere."""
    user: str = ""
    project: str = ""
    """Who pays, for budgets and reports."""
    earlier_outputs: Mapping[str, str] = field(default_factory=dict)
    """Path -> sha256 of what earlier runs of the same job delivered to `out_file`: may be replaced if it is still
    that. Anything else found there is kept under another name."""


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file on the server, by the server's own names. Data only: never a path here."""

    filename: str
    subfolder: str = ""
    type: str = "output"


@dataclass(frozen=True, slots=True)
class Output:
    """One verified result on disk."""

    node: str
    kind: OutputKind
    path: str
    size_bytes: int
    sha256: str
    name: str = ""
    """The name the workflow's sidecar gives this output, if it has one."""
    remote_name: str = ""
    """What the server called it; data only, never used as a path."""

    def as_dict(self) -> dict[str, Any]:
        """Return the output as it appears in `--json`."""
        return {
            "node": self.node,
            "kind": str(self.kind),
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, slots=True)
class BillLine:
    """One line of what a job or machine cost."""

    what: str
    seconds: Decimal
    usd_per_hour: Decimal
    amount_usd: Decimal


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of a job. `error` is set exactly when `status` is not done."""

    job_id: JobId
    status: JobStatus
    prompt_id: PromptId | None = None
    outputs: tuple[Output, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)
    cost_usd: Decimal = Decimal(0)
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step: place, boot, check, upload, submit, queue, execute, fetch, stop, total."""
    folder: str | None = None
    bill: tuple[BillLine, ...] = ()
    nodes: tuple[NodeTime, ...] = ()
    """When each node of the workflow ran, as far as that was heard."""
    server_type: str = ""
    """The type of the rented machine; empty on a server that was given."""
    error: Mapping[str, Any] | None = None
    exit_code: int = 0
    exception: Exception | None = field(default=None, repr=False, compare=False)
    """The error itself, for callers who want it raised."""

    def as_dict(self) -> dict[str, Any]:
        """Return the job as the object that `--json` prints."""
        shown: dict[str, Any] = {
            "job_id": self.job_id,
            "status": str(self.status),
            "prompt_id": self.prompt_id,
            "outputs": [output.as_dict() for output in self.outputs],
            "seeds": dict(self.seeds),
            "cost_usd": format(self.cost_usd, "f"),
            "timings": {name: round(seconds, 6) for name, seconds in self.timings.items()},
        }
        if self.error is not None:
            shown["error"] = dict(self.error)
        return shown
