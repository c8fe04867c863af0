"""
The shapes of what the HTTP API takes and gives, for its OpenAPI document.

Answers are made by `launcher.views` and are not read back through these models: they document, tests compare. What is
asked for (`JobOrder` and the small orders) is checked by them.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

TEXT_LIMIT: Final = 100_000
"""Characters of a prompt or another text for the workflow."""
NAME_LIMIT: Final = 200
MOST_VALUES: Final = 1_000
"""Values that one request may set."""
LONGEST_TIMEOUT_S: Final = 30 * 24 * 3600
"""Thirty days, as in job files."""

_NO_CONTROLS: Final = r"^[^\x00-\x1f\x7f]*$"
_NO_CONTROLS_BUT_LINES: Final = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
Name = Annotated[str, StringConstraints(max_length=NAME_LIMIT, pattern=_NO_CONTROLS)]
Words = Annotated[str, StringConstraints(max_length=TEXT_LIMIT, pattern=_NO_CONTROLS_BUT_LINES)]
SEED_LIMIT: Final = 2**64 - 1
Seed = Annotated[int, Field(ge=0, le=SEED_LIMIT, strict=True)]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid")


# -- what is asked for -------------------------------------------------------------------------------------


class JobOrder(_Order):
    """A job to be done."""

    workflow: Annotated[str, StringConstraints(min_length=1, max_length=NAME_LIMIT)] | dict[str, Any] = Field(
        description="The name of a workflow that `GET /workflows` lists, or a graph in ComfyUI's API format."
    )
    prompt: Words | None = Field(None, description="What to make.")
    negative: Words | None = Field(None, description="The negative prompt, for workflows that have one.")
    seed: Seed | None = Field(None, description="Left out: a random one.")
    image: str | None = Field(None, description="`data:image/png;base64,…`, or `upload:ID` of `POST /uploads`.")
    image_url: Annotated[str, StringConstraints(max_length=2_000)] | None = Field(
        None, description="Where a picture is fetched from before the answer; public addresses only."
    )
    inputs: Annotated[dict[Name, Any], Field(max_length=MOST_VALUES)] = Field(
        default_factory=dict, description="Values by name; `upload:ID` or a data URL for files."
    )
    sets: Annotated[dict[Name, Any], Field(max_length=MOST_VALUES)] = Field(
        default_factory=dict, description="`NODE.input` -> value."
    )
    convert: Literal["png", "jpg", "webp"] | None = Field(None, description="Make pictures of this kind.")
    priority: Annotated[int, Field(ge=1, le=999, strict=True)] | None = Field(
        None, description="1 runs first; left out: 50, or what the queue's settings say."
    )
    timeout_s: Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT_S, allow_inf_nan=False)] | None = Field(
        None, description="Seconds that one try may take."
    )
    server_type: Name | None = Field(
        None, description="The type of machine it needs; left out: any that may be rented."
    )
    user: Name = Field("", description="For whom: limits and costs are counted by it.")
    project: Name = Field("", description="For what: costs are counted by it.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Yours; kept with the job.")
    job_type: Name | None = Field(None, description="For limits by type of job.")
    retry_limit: Annotated[int, Field(ge=0, le=100, strict=True)] | None = Field(
        None, description="Tries after the first."
    )
    webhook_url: Annotated[str, StringConstraints(max_length=2_000)] | None = Field(
        None, description="Told when the job has ended; public addresses only."
    )
    dry_run: bool = Field(False, description="Only say whether it could run, and what it would take and cost.")


class JobChange(_Order):
    """A job's place in the queue."""

    priority: Annotated[int, Field(ge=1, le=999, strict=True)] | None = Field(None, description="1 runs first.")
    first: Literal[True] | None = Field(None, description="Before all others.")


class Again(_Order):
    """The same job once more, with another seed."""

    seed: Seed | None = Field(None, description="Left out: a random one.")


class PauseOrder(_Order):
    """Why the queue is paused."""

    message: Annotated[str, StringConstraints(max_length=500, pattern=_NO_CONTROLS)] = Field(
        "", description="Why; shown wherever the queue is looked at."
    )


class StopOrder(_Order):
    """Stopping a machine must be meant."""

    confirm: bool = Field(False, description="Must be true, else the answer is 409.")


class PresenceOrder(_Order):
    """Somebody is there, or work comes."""

    event: Literal["opened", "left", "intent", "batch"] = Field(
        description="Somebody is there; is gone; will want something soon; a batch comes."
    )
    source: Annotated[str, StringConstraints(min_length=1, max_length=NAME_LIMIT, pattern=_NO_CONTROLS)] = Field(
        "page", description="Who says it; each source is scored by what followed."
    )
    seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = Field(
        None, description="How long it holds; of a batch: how long its work takes in all."
    )
    jobs: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] | None = Field(
        None, description="How many jobs a batch has; it must say so."
    )
    user: Name = Field("", description="For whom.")


class EstimateOrder(_Order):
    """Runs that have not been asked for yet."""

    workflow: Annotated[str, StringConstraints(min_length=1, max_length=NAME_LIMIT, pattern=_NO_CONTROLS)] = Field(
        description="Its name."
    )
    server_type: Name | None = Field(None, description="On which type of machine; left out: the usual one.")
    count: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = Field(1, description="How many runs of it.")


# -- what is given -----------------------------------------------------------------------------------------


class ErrorFacts(BaseModel):
    """What happened, for programs."""

    code: str
    message: str
    hint: str
    details: dict[str, Any]


class Problem(BaseModel):
    """Every answer that is not a success."""

    detail: str | list[dict[str, Any]]
    error: ErrorFacts


class ProgressShown(BaseModel):
    """How far a job is."""

    percent: float
    step: str | None
    message: str
    node_id: str | None
    node_title: str | None
    value: float | None
    maximum: float | None
    nodes_done: int
    nodes_total: int
    queue_position: int | None
    elapsed_s: float | None
    preview: str | None


class TimeLeftShown(BaseModel):
    """How long a job will still take: a range that holds four times of five."""

    counts_from: Literal["now", "start"] = Field(
        description="`now` of a job that runs. `start` of one that waits: its own run, once it begins; when that is "
        "depends on workers elsewhere, budgets, pauses and what is put before it, and is not told."
    )
    low_s: float
    expected_s: float
    high_s: float
    sure: bool
    runs: int


class JobMachine(BaseModel):
    """Where a job runs or ran."""

    server_type: str | None
    id: str | None


class JobError(BaseModel):
    """Why it failed."""

    code: str
    message: str
    hint: str


class InputShown(BaseModel):
    """A file that was brought."""

    n: int
    name: str
    kind: str
    file: str
    url: str
    thumbnail: str | None


class OutputShown(BaseModel):
    """A verified result."""

    n: int
    name: str
    kind: str
    file: str
    media_type: str
    size_bytes: int | None
    sha256: str | None
    url: str
    thumbnail: str | None


class JobUrls(BaseModel):
    """Where the rest is."""

    self: str
    events: str
    log: str
    manifest: str


class Job(BaseModel):
    """A job of the queue."""

    id: str
    number: int
    name: str
    workflow: str
    job_type: str
    status: Literal["pending", "processing", "done", "failed"]
    reason: str | None
    prompt: str | None
    priority: int
    user: str
    project: str
    created_at: str | None
    started_at: str | None
    ended_at: str | None
    duration_s: float | None
    attempts: int
    progress: ProgressShown | None
    time_left: TimeLeftShown | None
    cost_usd: str | None = Field(
        description="Its time at rented machines in all its attempts, in USD, so far or when done; machines' idle "
        "time is told by `/costs`. Null while it waits or runs in another process, and of a job that failed."
    )
    seeds: dict[str, int]
    machine: JobMachine | None
    error: JobError | None
    inputs: list[InputShown]
    outputs: list[OutputShown]
    urls: JobUrls


class RequestShown(BaseModel):
    """What was asked for."""

    workflow: str | dict[str, Any]
    prompt: str | None
    seed: int | None
    sets: dict[str, Any]
    inputs: dict[str, Any]


class RunShown(BaseModel):
    """One try."""

    token: int
    run: int
    started_at: str | None
    ended_at: str | None
    outcome: str | None
    error_code: str | None


class NodeShown(BaseModel):
    """A node that was computed, or taken from the cache."""

    node_id: str | None
    title: str | None
    class_type: str | None
    started_s: float | None
    seconds: float | None
    cached: bool | None


class EventShown(BaseModel):
    """A line of the log."""

    number: int
    at: str | None
    kind: str
    data: dict[str, Any]


class JobDetail(Job):
    """Everything that is known of a job."""

    request: RequestShown
    runs: list[RunShown]
    timeline: list[NodeShown]
    events: list[EventShown]


class Counts(BaseModel):
    """Jobs of each status."""

    pending: int
    processing: int
    done: int
    failed: int


class JobList(BaseModel):
    """Jobs, newest first. `next` is what `before` takes for the next page."""

    jobs: list[Job]
    counts: Counts
    next: int | None


class DryRun(BaseModel):
    """It could be run."""

    valid: Literal[True]
    estimate: dict[str, Any] | None


class Upload(BaseModel):
    """A file that was received whole."""

    upload: str
    kind: str
    file: str
    media_type: str
    size_bytes: int
    sha256: str


class WorkflowInput(BaseModel):
    """What a workflow takes."""

    name: str
    kind: str
    required: bool
    description: str
    minimum: float | None
    maximum: float | None
    default: Any


class WorkflowSeed(BaseModel):
    """A seed of a workflow; the limits as text, for they may pass what JavaScript can count."""

    target: str
    minimum: str
    maximum: str


class WorkflowOutput(BaseModel):
    """What a workflow delivers."""

    name: str
    kind: str
    description: str


class Usual(BaseModel):
    """How long one run takes, from own history, in seconds."""

    low_s: float
    expected_s: float
    high_s: float


class WorkflowShown(BaseModel):
    """A workflow that can be asked for by name."""

    name: str
    description: str
    inputs: list[WorkflowInput]
    seeds: list[WorkflowSeed]
    outputs: list[WorkflowOutput]
    usual: Usual | None


class WorkflowList(BaseModel):
    """What can be asked for."""

    workflows: list[WorkflowShown]


class PauseShown(BaseModel):
    """What is paused, and why."""

    scope: str
    reason: str
    message: str
    since: str | None
    until: str | None


class QueueShown(BaseModel):
    """The queue at a glance."""

    counts: Counts
    paused: list[PauseShown]
    workers: int


class MachineJob(BaseModel):
    """A job at a machine."""

    id: str
    workflow: str


class MachineShown(BaseModel):
    """A machine of the account."""

    id: str | None
    server_id: str | None
    server_type: str
    state: str
    whose: Literal["ours", "not ours", "unknown"]
    purpose: str
    usd_per_hour: str | None
    spent_usd: str | None
    ready_at: str | None
    stops_at: str | None
    jobs: list[MachineJob]
    busy: bool
    why: str


class MachineList(BaseModel):
    """The machines; `why` says why they could not be listed."""

    machines: list[MachineShown]
    listed: bool
    why: str | None


class SpentShown(BaseModel):
    """Money and work of a time."""

    usd: str
    busy_s: float
    idle_s: float
    jobs: int


class SpentAt(BaseModel):
    """Money and work of one hour or day."""

    at: str
    usd: str
    busy_s: float
    idle_s: float


class BudgetShown(BaseModel):
    """How a budget stands."""

    name: str
    scope: str
    hard: str | None
    soft: str | None
    spent: str | None
    committed: str | None
    left: str | None
    ends_at: str | None


class MoneyShown(BaseModel):
    """The money now."""

    today: SpentShown
    month: SpentShown
    committed_usd: str
    budgets: list[BudgetShown]
    hours: list[SpentAt]
    days: list[SpentAt]
    forecast_month_usd: str | None


class SignalShown(BaseModel):
    """What was said."""

    kind: str
    source: str
    user: str
    at: str
    until: str | None
    jobs: int
    work_s: float
    expected_at: str | None


class SignalSaid(BaseModel):
    """It was heard."""

    signal: SignalShown


class SignalList(BaseModel):
    """What was said lately and still holds."""

    signals: list[SignalShown]


class Session(BaseModel):
    """Who is asking."""

    kind: str
    name: str
    csrf: None
    version: str


_WORDS: Final = {
    400: "The request cannot be read.",
    401: "No token and no session.",
    402: "It would cost more than allowed.",
    403: "From a foreign page, or not allowed.",
    404: "There is no such thing.",
    405: "Not with this method.",
    408: "The body did not come in time.",
    409: "Not as things stand.",
    410: "The file is no longer what was verified.",
    411: "The body's length is missing.",
    413: "Too large.",
    414: "The address is too long.",
    415: "The body is in no form that is understood.",
    416: "The file has no such range.",
    422: "It could never be done as written.",
    429: "Too many; the header Retry-After says when to come again.",
    431: "The headers are too many, or too long.",
    500: "A defect of the server.",
    502: "The cloud or a machine did not do its part.",
    503: "Settings, credentials or the database do not allow it now.",
    504: "It took too long.",
    507: "The disk is full.",
}

GUARDED: Final = (400, 401, 403, 408, 413, 414, 415, 422, 429, 431, 503)
"""What every route behind the guard may answer."""


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route declares of its answers that are no success, beside those of the guard."""
    return {status: {"model": Problem, "description": _WORDS[status]} for status in sorted({*GUARDED, *statuses})}


def answers(
    status: int, model: type[BaseModel], *statuses: int, description: str = "Successful Response"
) -> dict[int | str, dict[str, Any]]:
    """Return what a route declares: one kind of success, and every status of failure."""
    return {status: {"model": model, "description": description}, **problems(*statuses)}
