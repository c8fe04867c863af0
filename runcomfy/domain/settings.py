"""
Every setting, frozen, with its unit and default.

Reading them (environment over credentials file over defaults) and naming their sources is `runcomfy.adapters.config`'s
work. A setting that came from a guess in the provider's facts is here so that it can be changed without us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Final

from runcomfy.domain.budget import Budget
from runcomfy.domain.money import RateTable
from runcomfy.domain.secret import Secret

KNOWN_SERVER_TYPES: Final = ("medium", "large", "extra-large", "2x-large", "2xl-turbo")
"""The complete documented list (RunComfy API reference); other names may be added with a price, untested."""

DEFAULT_API_BASE_URL: Final = "https://api.runcomfy.net"
"""The prose of RunComfy's API reference; its examples use beta-api.runcomfy.net, which serves the same paths."""


WAIT_PRICES: Final = ("batch", "normal", "person waiting")
"""Words for the price of waiting: 1, 5 and 20 times what a machine costs."""


@dataclass(frozen=True, slots=True)
class CloudSettings:
    """The account and how to talk to its API."""

    base_url: str = DEFAULT_API_BASE_URL
    user_id: str = ""
    tokens: tuple[Secret, ...] = ()
    """One or two: RunComfy shows two so that they can be rotated; the second is used when the first is refused."""
    workflow_version_id: str = ""
    server_type: str = "medium"
    duration: timedelta = timedelta(seconds=3600)
    """How long a dev server runs, counted from ready."""
    run_lease: timedelta = timedelta(minutes=10)
    """How long a machine rented for one job is paid ahead; renewed at half while the job lives (RunComfy's shortest
    documented durations are 300 to 600 s)."""
    max_retries: int = 3
    poll_interval: timedelta = timedelta(seconds=5)
    boot_timeout: timedelta = timedelta(seconds=1800)
    comfyui_timeout: timedelta = timedelta(seconds=300)
    """How long a Ready machine may take until its ComfyUI answers."""
    request_timeout: timedelta = timedelta(seconds=30)
    requests_per_second: float = 1.0
    """The account's limit as documented ("about one per second, some bursts")."""
    burst: int = 5
    stop_reserve: int = 2
    """How many requests of the burst only calls that stop machines may use."""
    retry_after_cap: timedelta = timedelta(seconds=60)
    """A Retry-After longer than this is not obeyed to the letter: negative, absurd or hostile values exist."""
    visibility_window: timedelta = timedelta(seconds=120)
    """How long a machine may stay out of the provider's lists after its launch."""
    not_found_grace: timedelta = timedelta(seconds=60)
    """How long a 404 right after a launch means "not visible yet"."""
    stop_alarm_after: timedelta = timedelta(minutes=5)
    """A machine that outlives its stop by this much is shouted about; the stop is still repeated."""
    plan: str = "payg"
    max_usd_per_hour: Decimal | None = None
    """Refuse to launch a type that costs more."""


@dataclass(frozen=True, slots=True)
class ComfySettings:
    """How to talk to ComfyUI servers."""

    execution_timeout: timedelta = timedelta(seconds=3600)
    poll_interval: timedelta = timedelta(seconds=5)
    max_retries: int = 3
    request_timeout: timedelta = timedelta(seconds=30)
    download_timeout: timedelta = timedelta(minutes=30)
    """Total time for one file, however slowly it drips."""
    stall_timeout: timedelta = timedelta(minutes=15)
    """How long a node may show no progress at all before it counts as stuck (loading a model is silent)."""
    unreachable_timeout: timedelta = timedelta(minutes=2)
    """How long a server may not answer before the job is given up (a restart takes 7 to 13 s)."""
    worker_dead_after: timedelta = timedelta(seconds=20)
    """How long prompts may wait with nothing running before the worker counts as dead."""
    ping_interval: timedelta = timedelta(seconds=20)
    max_output_bytes: int = 8 * 1024**3
    max_frame_bytes: int = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class FileSettings:
    """Files on this computer."""

    state_dir: str
    output_dir: str = "outputs"
    durable: bool = True
    """Whether results and database commits are flushed to the disk (fsync) before they count."""
    max_input_pixels: int = 64_000_000
    max_output_pixels: int = 250_000_000
    state_copies: tuple[str, ...] = ()
    """Further places where a copy of dev_server_state.json is kept, for programs that look there."""


SERVED: Final = ("pool", "queue", "none")
"""What the API server may work on beside HTTP."""
GENERATION_MODES: Final = ("local", "cloud", "serverless", "cloud_legacy", "local_comfyui", "huggingface")
LOCAL_BACKENDS: Final = ("comfyui", "huggingface")


@dataclass(frozen=True, slots=True)
class AppSettings:
    """The switches CONJURE's orchestrator, API server and generation services have."""

    machine_reuse: bool = True
    """Whether a job may use the dev server."""
    auto_shutdown: bool = False
    """Whether a dev server is stopped when a job on it is done."""
    idle_timeout: timedelta = timedelta(seconds=600)
    """After how long without a job the dev server counts as idle in reports."""
    log_level: str = "INFO"
    serves: str = ""
    """One of `SERVED`; empty: by whether there is an account."""
    generation_mode: str = "local"
    """Holds where CONJURE's state names no mode."""
    local_backend: str = "comfyui"
    hugging_face_token: Secret | None = None


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """The queue, its folders and its workers. Paths are absolute."""

    root: str
    """The project's folder; relative paths in job files and `workflows.yaml` begin there."""
    jobs_processing: str
    """Where job files are dropped, in folders image, video, audio, speech, 3d."""
    jobs_finished: str
    """Where results go; `outputs.file_path` must lie below it."""
    database: Secret
    """A path, or `postgresql://…` (which may hold a password)."""
    workflows_file: str | None = None
    """`workflows.yaml`, if there is one."""
    default_priority: int = 50
    retry_limit: int = 2
    poll_interval: timedelta = timedelta(seconds=1)
    """At the latest this long after a job file appeared it is looked at; also how often an idle executor asks the
    database without being woken."""
    stable_for: timedelta = timedelta(milliseconds=250)
    """How long a job file's size and time must stay as they are before it is read."""
    where: str = "server"
    """`server` (the ComfyUI at `api_base_url`), `cloud` (the dev server if it lives, else a machine of its own), or
    `pool` (a pool of rented machines: `comfyctl serve`)."""
    api_base_url: str = "http://127.0.0.1:8188"
    server_type: str | None = None
    """Of a machine of its own; None: RUNCOMFY_SERVER_TYPE."""
    job_timeout: timedelta = timedelta(seconds=300)
    lease: timedelta = timedelta(seconds=60)
    heartbeat: timedelta = timedelta(seconds=15)
    reap_every: timedelta = timedelta(seconds=15)
    attach_grace: timedelta = timedelta(minutes=5)
    """How long a job whose worker vanished waits for a worker that can reach its prompt."""
    drain: timedelta = timedelta(seconds=30)
    """How long a first SIGTERM or Ctrl+C lets running jobs go on."""
    slots: int = 1
    """Jobs an executor works on at once."""
    limit_place: int | None = None
    """Jobs at one machine at once, over all executors."""
    limit_workflow: Mapping[str, int] = field(default_factory=dict)
    limit_job_type: Mapping[str, int] = field(default_factory=dict)
    limit_user: int | None = None
    fair_users: bool = False
    backoff_first: timedelta = timedelta(seconds=5)
    """Wait before the first retry; doubles, with jitter, up to `backoff_most`."""
    backoff_most: timedelta = timedelta(minutes=10)
    lost_limit: int = 3
    """A job whose lease was lost this often is quarantined."""
    kill_limit: int = 2
    """A job under which this many machines died is quarantined."""
    idle_after: timedelta = timedelta(minutes=2)
    """How long a machine of its own is kept with nothing to do."""
    wake_interval: timedelta = timedelta(milliseconds=3)
    """How often a waiting executor looks whether another process changed the SQLite file."""
    config_file: str | None = None
    """The project's configuration file, if there is one."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> "override", the environment's variable, file and line, or "default"."""
    warnings: tuple[str, ...] = ()
    """What is worth telling the user about the settings, for example a misspelt key."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """Machines rented for the queue (`comfyctl serve`)."""

    max_machines: int = 1
    """At most this many rented at once, those that start or stop counted."""
    min_machines: int = 0
    """Kept even if the plan would end them; budgets and leases still win."""
    server_types: tuple[str, ...] = ()
    """Types the plan may choose from; empty: the one of RUNCOMFY_SERVER_TYPE."""
    depth: int = 2
    """Jobs at one machine at once: one computes, the others' prompts wait in its queue."""
    wait_price: str = "normal"
    """What an hour of one job's waiting is worth: `batch`, `normal`, `person waiting` (1, 5, 20 times the machine's
    price), or USD per hour."""
    latency_target: timedelta | None = None
    """Instead of a price: the wait that 95 of 100 jobs should stay below; solved for the price by replaying history."""
    keep_alive: timedelta | None = None
    """A fixed time that an idle machine is kept, instead of the learned one."""
    affinity_wait: timedelta = timedelta(seconds=60)
    """How long a job may be passed over by others that fit a warm machine better."""
    presence_lead: timedelta = timedelta(seconds=300)
    """How long before work a presence signal usually comes, until history says it."""
    plan_every: timedelta = timedelta(seconds=5)
    """At the latest so long after the last plan there is another."""
    reconcile_every: timedelta = timedelta(seconds=45)
    status_every: timedelta = timedelta(seconds=10)
    """How often the provider's list is read for the machines held: one call for all."""
    flip_limit: int = 3
    """Ready/not-Ready changes within `flip_window` after which a machine is replaced."""
    flip_window: timedelta = timedelta(minutes=5)
    slow_factor: float = 5.0
    """A machine that is this much slower than the median of a workflow on its type, twice in a row, is replaced."""
    breaker_failures: int = 3
    """Failed starts or ill machines of one type in a row, after which it is not launched for `breaker_rest`."""
    breaker_rest: timedelta = timedelta(minutes=10)
    guard: bool = True
    """Whether a guard process is started that ends what outlives its lease when everything else is dead."""
    guard_period: timedelta = timedelta(seconds=30)
    idle_warning: timedelta = timedelta(minutes=2)
    """How long before the guard ends an idle dev server it warns."""
    silence: timedelta = timedelta(minutes=10)
    """A gap without jobs on a machine after which its idle time is no longer shared out over the jobs before."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The HTTP API and the page (`comfyctl serve`)."""

    host: str = "127.0.0.1"
    """Anything but loopback needs the token for every request, CONJURE's endpoints included."""
    port: int = 8000
    """CONJURE's API server listens on 8000."""
    conjure_open: bool = True
    """Whether CONJURE's own endpoints answer on loopback without the token (CONJURE sends none)."""
    conjure_anywhere: bool = False
    """Whether those may then name files outside of CONJURE's folder, too."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, beside loopback's own, that a request's Host may have."""
    max_body_bytes: int = 1024**2
    """Of a request without files."""
    max_upload_bytes: int = 64 * 1024**2
    """Of one file that is sent in, or fetched from an address that a request names."""
    max_waiting: int = 1_000
    """Jobs of one client that may wait at once; more are refused (429)."""
    max_per_minute: int = 120
    """Jobs that one client may put in per minute."""
    session: timedelta = timedelta(hours=12)
    """How long the page stays logged in."""
    stalled: timedelta = timedelta(seconds=60)
    """How long a client may take nothing of an answer before it is given up."""
    allow_private: bool = False
    """Whether webhooks and addresses of pictures may point at this computer or a private network."""
    webhook_url: str | None = field(default=None, repr=False)
    """Is told of the last word of every job; may hold a secret."""


@dataclass(frozen=True, slots=True)
class ServerlessSettings:
    """RunComfy's serverless API: one deployment of a saved workflow, billed while its instances are awake."""

    deployment_id: str = ""
    api_version: str = "v2"
    """RunComfy's newest pages and its own command line use v2; v1 answers the same calls."""
    request_timeout: timedelta = timedelta(seconds=1800)
    """From the submit on, cold start (3 to 5 minutes) and queue included."""
    poll_interval: timedelta = timedelta(seconds=2)
    steps_flux: int = 20
    steps_partpacker: int = 50
    cost_tracking: bool = True
    usd_per_hour: Decimal | None = None
    """Price of the deployment's hardware; None: that of the hardware RunComfy names, from the rate table."""
    file_hosts: tuple[str, ...] = ()
    """Hosts, beside RunComfy's own, that results may be fetched from."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, and where each came from."""

    cloud: CloudSettings
    comfy: ComfySettings
    files: FileSettings
    app: AppSettings
    rates: RateTable
    pool: PoolSettings = field(default_factory=PoolSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    serverless: ServerlessSettings = field(default_factory=ServerlessSettings)
    budgets: tuple[Budget, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    """Variable name -> "environment", the credentials file's path, or "default"."""
    credentials_file: str | None = None
    rates_file: str | None = None
    """The user's own rate table, laid over the shipped one."""
    warnings: tuple[str, ...] = ()
    """What is worth telling the user about the settings, for example a credentials file that others can read."""
