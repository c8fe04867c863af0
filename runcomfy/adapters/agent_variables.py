"""
The queue's settings, one by one: where each may be written, what it may hold, what it is for.

Each is a key of the project's configuration file and an environment variable that begins with COMFYUI_AGENT_. The keys
at the top level and below `paths` and `comfyui` are those of the ComfyUI Agent's own configuration; what that does not
know stands below `agent`. Defaults are in `runcomfy.domain.settings`; reading the layers is `agent_config`'s work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from runcomfy.adapters.setting_kinds import PATH, SERVER_TYPE_NAME, SWITCH, Kind
from runcomfy.adapters.variables import QUEUE_PREFIX
from runcomfy.domain.durations import HINT as DURATION_HINT
from runcomfy.domain.durations import parse_duration
from runcomfy.domain.exceptions import ValueInvalid, foreign_text
from runcomfy.domain.queued import FIRST_PRIORITY, LAST_PRIORITY
from runcomfy.domain.secret import Secret

_YEAR: Final = timedelta(days=366)
_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")
WHERE: Final = ("server", "cloud", "pool")

Read = Callable[[Any], Any]
"""Takes a text (of a file or variable) or a value that is right already; raises ValueError with what is wrong."""


# --- kinds of values --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sort:
    """A sort of value: how it is read, and how people are told about it."""

    read: Read
    unit: str
    hint: str


def _shown(value: object) -> str:
    return repr(foreign_text(value, 60))


def _like(kind: Kind) -> Sort:
    """The same sort of value as the rest of the program has."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind.annotation)

    def read(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(error.errors(include_url=False)[0]["msg"]) from None

    return Sort(read, kind.unit, kind.hint)


def _whole(least: int, most: int, unit: str) -> Sort:
    def read(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"[-+]?[0-9]{1,18}", text):
            raise ValueError(f"{_shown(value)} is not a whole number")
        if not least <= int(text) <= most:
            raise ValueError(f"{_shown(value)} is not between {least} and {most}")
        return int(text)

    return Sort(read, unit, f"write a whole number from {least} to {most}")


def _duration(
    *, milliseconds: bool = False, least: timedelta = timedelta(milliseconds=1), most: timedelta = _YEAR
) -> Sort:
    """A duration; a number without a unit is of seconds, or of milliseconds where the key says so."""

    def read(value: Any) -> timedelta:
        if isinstance(value, timedelta):
            duration = value
        else:
            text = str(value).strip()
            try:
                duration = parse_duration(f"{text}ms" if milliseconds and _NUMBER.fullmatch(text) else text)
            except ValueInvalid as error:
                raise ValueError(error.message) from None
        if not least <= duration <= most:
            lowest = "less than nothing" if not least else f"less than {least.total_seconds():g} s"
            raise ValueError(f"{_shown(value)} is {lowest} or more than {most.total_seconds():g} s")
        return duration

    unit = "milliseconds" if milliseconds else "seconds"
    return Sort(read, unit, "write milliseconds (250), or a number with a unit (2s)" if milliseconds else DURATION_HINT)


def _where(value: Any) -> str:
    word = str(value).strip().lower()
    if word not in WHERE:
        raise ValueError(f"{_shown(value)} is none of server, cloud and pool")
    return word


def _address(value: Any) -> str:
    """The address of a ComfyUI. What is wrong is told without repeating it: a machine's address is a secret."""
    text = str(value).strip().rstrip("/")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("is not an address") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("is not an address that begins with http:// or https:// and names a host")
    if any(c.isspace() or not c.isprintable() for c in text) or "?" in text or "#" in text:
        raise ValueError("has characters inside that the address of a server does not have")
    return text


def _database(value: Any) -> Secret:
    """A path, or the address of a PostgreSQL; never repeated in an error, for the password in it."""
    text = value.reveal() if isinstance(value, Secret) else str(value).strip()
    if any(not c.isprintable() for c in text):
        raise ValueError("has control characters inside")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Secret(str(_like(PATH).read(text)))
    scheme = scheme.lower()
    if scheme == "sqlite":
        path = rest.removeprefix("/")
        if not path or path == ":memory:":
            raise ValueError("names no file; a queue in memory would forget its jobs")
        return Secret(path)
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ValueError(f"{_shown(scheme)} is not a kind of database that can be used")
    try:
        _ = urlsplit(text).hostname, urlsplit(text).port
    except ValueError:
        raise ValueError("is not the address of a database") from None
    return Secret(f"postgresql://{rest}")


def is_server(database: str) -> bool:
    """Return whether a database is named by its address rather than its path."""
    return database.startswith("postgresql://")


def database_shown(database: Secret) -> str:
    """Return a path as it is, an address without user, password and options."""
    text = database.reveal()
    if not is_server(text):
        return text
    try:
        parts = urlsplit(text)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "postgresql://***"
    user = "***@" if parts.username or parts.password else ""
    return f"postgresql://{user}{parts.hostname or ''}{port}{parts.path}"


def _counts(value: Any) -> dict[str, int]:
    """Names with how many jobs of them may run at once: `wf_a=2, *=1`, or the mapping itself."""
    one = _whole(1, 1_000_000, "jobs").read
    if isinstance(value, Mapping):
        return {str(name): one(count) for name, count in value.items()}
    counts: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in str(value).split(","))):
        name, separator, count = part.rpartition("=")
        if not separator or not name.strip():
            raise ValueError(f"{_shown(part)} is not NAME=NUMBER")
        counts[name.strip()] = one(count)
    return counts


_PATH: Final = _like(PATH)
_JOBS: Final = _whole(1, 1_000_000, "jobs")
_TIMES: Final = _whole(1, 1_000, "times")
_COUNTS: Final = Sort(_counts, "jobs by name", "write NAME=NUMBER with commas between; * stands for every other name")
_SECONDS: Final = _duration(least=timedelta(milliseconds=10))
_SECONDS_OR_NONE: Final = _duration(least=timedelta(0))


# --- the settings -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueueVariable:
    """One setting of the queue."""

    field: str
    """Of `QueueSettings`."""
    name: str
    """The environment's variable."""
    keys: tuple[str, ...]
    """Where it may stand in the configuration file; the first is the one to write."""
    sort: Sort
    help: str
    path: bool = False
    """Whether a relative value begins at the project's folder (in a file) or the working directory (elsewhere)."""


def _setting(field: str, keys: str, sort: Sort, words: str, *, name: str = "") -> QueueVariable:
    keys_of = tuple(keys.split())
    last = keys_of[0].rpartition(".")[2]
    return QueueVariable(field, QUEUE_PREFIX + (name or last).upper(), keys_of, sort, words, sort is _PATH)


VARIABLES: Final = (
    _setting("root", "paths.root", _PATH, "The project's folder; relative paths of job files begin there."),
    _setting("jobs_processing", "paths.jobs_processing", _PATH, "The folder where job files are dropped."),
    _setting("jobs_finished", "paths.jobs_finished", _PATH, "The folder results go to; they may go nowhere else."),
    _setting(
        "database",
        "paths.database databases.main databases.comfyui",
        Sort(_database, "path or address", "write a path, or postgresql://user:password@host/name"),
        "The queue's database: a file, or a PostgreSQL that many hosts share.",
    ),
    _setting("workflows_file", "paths.workflows", _PATH, "The file that names the project's workflows."),
    _setting(
        "default_priority",
        "default_priority comfyui.default_priority",
        _whole(FIRST_PRIORITY, LAST_PRIORITY, "priority"),
        "The priority of jobs that name none; lower runs first.",
    ),
    _setting(
        "retry_limit",
        "retry_limit comfyui.retry_limit",
        _whole(0, 100, "count"),
        "How often a failed job is tried again: 2 means at most three runs.",
    ),
    _setting(
        "poll_interval",
        "poll_interval_ms comfyui.poll_interval_ms",
        _duration(milliseconds=True, least=timedelta(milliseconds=10), most=timedelta(hours=1)),
        "At the latest so long after a job file appeared it is looked at, and how often an idle executor asks unasked.",
    ),
    _setting(
        "stable_for",
        "agent.stable_ms",
        _duration(milliseconds=True, least=timedelta(0), most=timedelta(minutes=10)),
        "How long a job file must stay as it is before it is read.",
    ),
    _setting(
        "where",
        "agent.where",
        Sort(_where, "server, cloud or pool", "write server, cloud or pool"),
        "Where jobs run: on the ComfyUI at api_base_url (server), on the dev server or a machine of the executor's own "
        "(cloud), or on a pool of rented machines (pool: what `comfyctl serve` does).",
    ),
    _setting(
        "api_base_url",
        "comfyui.api_base_url",
        Sort(_address, "address", "write the address of a ComfyUI, for example http://127.0.0.1:8188"),
        "The ComfyUI that runs the jobs.",
    ),
    _setting(
        "server_type",
        "agent.server_type",
        _like(SERVER_TYPE_NAME),
        "The type of rented machines, in place of RUNCOMFY_DEFAULT_SERVER_TYPE.",
    ),
    _setting(
        "job_timeout",
        "comfyui.timeout_seconds",
        _SECONDS,
        "How long a job may run, unless its file says otherwise.",
    ),
    _setting("lease", "agent.lease_seconds", _SECONDS, "How long a job stays an executor's without a sign of life."),
    _setting("heartbeat", "agent.heartbeat_seconds", _SECONDS, "How often an executor gives a sign of life."),
    _setting("reap_every", "agent.reap_seconds", _SECONDS, "How often jobs of vanished executors are looked for."),
    _setting(
        "attach_grace",
        "agent.attach_grace_seconds",
        _SECONDS_OR_NONE,
        "How long a job of a vanished executor waits for one that can reach its prompt.",
    ),
    _setting(
        "drain",
        "agent.drain_seconds",
        _SECONDS_OR_NONE,
        "How long the first Ctrl+C or SIGTERM lets running jobs go on.",
    ),
    _setting("slots", "agent.slots", _whole(1, 1_000, "jobs"), "How many jobs an executor works on at once."),
    _setting(
        "limit_place",
        "agent.limits.machine",
        _JOBS,
        "How many jobs one machine gets at once, over all executors.",
        name="LIMIT_MACHINE",
    ),
    _setting(
        "limit_workflow",
        "agent.limits.workflow",
        _COUNTS,
        "How many jobs of a workflow run at once, over all executors.",
        name="LIMIT_WORKFLOW",
    ),
    _setting(
        "limit_job_type",
        "agent.limits.job_type",
        _COUNTS,
        "How many jobs of a type run at once, over all executors.",
        name="LIMIT_JOB_TYPE",
    ),
    _setting(
        "limit_user",
        "agent.limits.user",
        _JOBS,
        "How many jobs of each user run at once, over all executors.",
        name="LIMIT_USER",
    ),
    _setting(
        "fair_users",
        "agent.fair_users",
        _like(SWITCH),
        "Whether, at equal priority, the user with the fewest running jobs goes first.",
    ),
    _setting(
        "backoff_first",
        "agent.backoff_first_seconds",
        _SECONDS_OR_NONE,
        "How long a failed job waits before it is tried again; doubles each time.",
    ),
    _setting("backoff_most", "agent.backoff_most_seconds", _SECONDS_OR_NONE, "The longest such wait."),
    _setting("lost_limit", "agent.lost_limit", _TIMES, "A job whose executors vanished this often is set aside."),
    _setting("kill_limit", "agent.kill_limit", _TIMES, "A job under which so many machines died is set aside."),
    _setting(
        "idle_after",
        "agent.idle_after_seconds",
        _SECONDS_OR_NONE,
        "How long a rented machine is kept with nothing to do.",
    ),
    _setting(
        "wake_interval",
        "agent.wake_interval_ms",
        _duration(milliseconds=True, most=timedelta(minutes=1)),
        "How often a waiting executor looks whether another process changed the database file.",
    ),
)
BY_FIELD: Final[Mapping[str, QueueVariable]] = {variable.field: variable for variable in VARIABLES}
BY_KEY: Final[Mapping[str, QueueVariable]] = {key: variable for variable in VARIABLES for key in variable.keys}

CONFIG_VARIABLE: Final = f"{QUEUE_PREFIX}CONFIG"
"""Names the configuration file, where it is not the project's usual one."""
DATABASE_URL_VARIABLE: Final = "RUNCOMFY_DATABASE_URL"
"""One PostgreSQL for everything; COMFYUI_AGENT_DATABASE counts more."""
ENVIRONMENT_VARIABLE: Final = "E3_ENV"
"""alpha or prod: selects config/global_alpha.yaml or config/global_prod.yaml."""
