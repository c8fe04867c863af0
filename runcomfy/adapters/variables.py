"""
The variables this program reads, one per setting: type, unit, where the value goes, what it is for.

pydantic-settings reads them from its layers and checks them; every mistake is found in one go. Every variable is unset
(None) here unless a layer sets it: the defaults are in `runcomfy.domain.settings`, and meet the values only when all
layers are merged, so that no default can hide what a file said.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from runcomfy.adapters.rates import PLANS, SERVER_TYPE
from runcomfy.domain.durations import HINT as DURATION_HINT
from runcomfy.domain.durations import parse_duration
from runcomfy.domain.exceptions import RunComfyError, foreign_text
from runcomfy.domain.secret import Secret, is_loopback
from runcomfy.domain.settings import DEFAULT_API_BASE_URL, KNOWN_SERVER_TYPES

_YEAR: Final = timedelta(days=366)
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


# --- checks -----------------------------------------------------------------------------------------------


def _refuse(words: str, kind: str = "setting") -> PydanticCustomError:
    # Braces would be read as a template.
    return PydanticCustomError(kind, "{words}", {"words": words})


def _shown(value: object) -> str:
    return repr(foreign_text(value, 60))


def _duration(value: object) -> timedelta:
    if isinstance(value, timedelta):
        duration = value
    else:
        try:
            duration = parse_duration(str(value))
        except RunComfyError as error:
            raise _refuse(error.message) from error
    if not timedelta(0) < duration <= _YEAR:
        raise _refuse(f"{_shown(value)} is not more than nothing and at most a year")
    return duration


def _whole(least: int, most: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        text = str(value).strip()
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise _refuse(f"{_shown(value)} is not a whole number")
        if not least <= int(text) <= most:
            raise _refuse(f"{_shown(value)} is not between {least} and {most}")
        return int(text)

    return check


def _rate_per_second(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError as error:
        raise _refuse(f"{_shown(value)} is not a number") from error
    if not math.isfinite(number) or not 0 < number <= 1000:
        raise _refuse(f"{_shown(value)} is not more than 0 and at most 1000")
    return number


def _usd(value: object) -> Decimal:
    try:
        amount = Decimal(str(value).strip().removeprefix("$"))
    except InvalidOperation as error:
        raise _refuse(f"{_shown(value)} is not an amount") from error
    if not amount.is_finite() or not 0 < amount <= 10_000:
        raise _refuse(f"{_shown(value)} is not more than 0 and at most 10000")
    return amount


def _switch(value: object) -> bool:
    word = str(value).strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise _refuse(f"{_shown(value)} is neither true nor false")


def _plan(value: object) -> str:
    word = str(value).strip().lower()
    word = {"hobby": "payg", "pay-as-you-go": "payg", "pay as you go": "payg"}.get(word, word)
    if word not in PLANS:
        raise _refuse(f"{_shown(value)} is not a plan of RunComfy")
    return word


def _log_level(value: object) -> str:
    word = str(value).strip().upper()
    if word not in LOG_LEVELS:
        raise _refuse(f"{_shown(value)} is not a level")
    return word


def _server_type(value: object) -> str:
    name = str(value).strip()
    if not SERVER_TYPE.fullmatch(name):
        raise _refuse(f"{_shown(value)} cannot be a machine type")
    return name


def _path(value: object) -> str:
    text = str(value).strip()
    if "\0" in text:
        raise _refuse("has a NUL character inside")
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:  # "~somebody" who does not exist
        raise _refuse(f"{_shown(value)} begins with an unknown user's home") from error


def _path_list(value: object) -> str:
    return os.pathsep.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def check_base_url(value: object) -> str:
    """Return the API's address without a trailing slash, or raise what is wrong with it.

    A password in it and everything after its path is never repeated in the error.
    """
    text = str(value).strip().rstrip("/")
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise _refuse("is not an address") from error
    if parts.scheme not in ("http", "https") or not host:
        raise _refuse("is not an address that begins with https:// and names a host")
    if not re.fullmatch(r"[a-z0-9._:-]+", host) or any(c.isspace() or not c.isprintable() for c in str(value).strip()):
        raise _refuse("has characters inside that no address has")
    if parts.scheme == "http" and not is_loopback(host):
        raise _refuse(f"would send the token unencrypted to {foreign_text(host, 80)}", kind="insecure_url")
    if parts.username is not None or parts.password is not None:
        raise _refuse("has a user name or password inside; the token is sent in a header")
    if "?" in text or "#" in text:
        raise _refuse("has a ? or # inside; give the scheme and the host only")
    if parts.path.endswith(("/prod", "/prod/api")):
        raise _refuse("ends with a path that is added by itself; give the scheme and the host only")
    return text


def _token(value: object) -> Secret:
    return value if isinstance(value, Secret) else Secret(str(value))


# --- kinds of values --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of value: how it is checked, and how people are told about it."""

    annotation: Any
    unit: str
    hint: str
    """How to write one that is accepted."""
    secret: bool = False
    place: bool = False
    """A path on this computer. Those come from the environment only: a credentials file that lies in a foreign folder
    must not say where we write."""


def _number(least: int, most: int, unit: str) -> Kind:
    return Kind(
        Annotated[int, BeforeValidator(_whole(least, most))], unit, f"write a whole number from {least} to {most}"
    )


def _text(unit: str, hint: str, check: Callable[[object], Any] = str, *, place: bool = False) -> Kind:
    return Kind(Annotated[str, BeforeValidator(check)], unit, hint, place=place)


DURATION: Final = Kind(Annotated[timedelta, BeforeValidator(_duration)], "duration", DURATION_HINT)
RETRIES: Final = _number(0, 100, "count")
REQUESTS: Final = _number(0, 10_000, "requests")
BYTES: Final = _number(1, 10**15, "bytes")
PIXELS: Final = _number(1, 10**12, "pixels")
PER_SECOND: Final = Kind(
    Annotated[float, BeforeValidator(_rate_per_second)], "requests per second", "write a number, for example 1 or 0.5"
)
USD_PER_HOUR: Final = Kind(
    Annotated[Decimal, BeforeValidator(_usd)], "USD per hour", "write an amount, for example 2.50"
)
SWITCH: Final = Kind(Annotated[bool, BeforeValidator(_switch)], "true or false", "write true or false")
PLAN: Final = _text("plan", "write payg or pro", _plan)
LOG_LEVEL: Final = _text("level", f"write one of {', '.join(LOG_LEVELS)}", _log_level)
SERVER_TYPE_NAME: Final = _text("machine type", f"write one of {', '.join(KNOWN_SERVER_TYPES)}", _server_type)
ADDRESS: Final = _text("address", f"write {DEFAULT_API_BASE_URL}, or http:// with a loopback host", check_base_url)
ID: Final = _text("id", "copy it whole from RunComfy's pages")
PATH: Final = _text("path", "write a path", _path, place=True)
NAMED: Final = _text("path", "name a file that exists", place=True)
PATHS: Final = _text("paths", "write paths with : between them (on Windows ;)", _path_list, place=True)
USER: Final = Kind(Annotated[str, BeforeValidator(str)], "id", "copy it from the address of RunComfy's dashboard", True)
TOKEN: Final = Kind(Annotated[Secret, BeforeValidator(_token)], "token", "copy it from RunComfy's profile page", True)


# --- the variables ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting."""

    name: str
    kind: Kind
    target: str
    """`section.field` of `Settings`; empty if the value is only used while the settings are loaded."""
    help: str


VARIABLES: Final = (
    Variable("RUNCOMFY_API_BASE_URL", ADDRESS, "cloud.base_url", "Where RunComfy's API is: scheme and host."),
    Variable("RUNCOMFY_USER_ID", USER, "cloud.user_id", "The account's user id (userID in the credentials file)."),
    Variable("RUNCOMFY_API_TOKEN", TOKEN, "cloud.tokens", "The account's API token."),
    Variable(
        "RUNCOMFY_API_TOKEN_2", TOKEN, "cloud.tokens", "The account's second token, used when the first is refused."
    ),
    Variable(
        "RUNCOMFY_WORKFLOW_VERSION_ID",
        ID,
        "cloud.workflow_version_id",
        "Version id of the saved workflow that machines are launched with (version_id in the credentials file).",
    ),
    Variable("RUNCOMFY_CREDENTIALS_FILE", NAMED, "", "The credentials file to read in place of the usual ones."),
    Variable(
        "RUNCOMFY_DEFAULT_SERVER_TYPE", SERVER_TYPE_NAME, "cloud.server_type", "Machine type, unless one is given."
    ),
    Variable(
        "RUNCOMFY_DEFAULT_DURATION", DURATION, "cloud.duration", "How long a dev server runs, counted from ready."
    ),
    Variable(
        "RUNCOMFY_RUN_LEASE",
        DURATION,
        "cloud.run_lease",
        "How long a machine rented for one job is paid ahead; renewed at half while the job lives.",
    ),
    Variable("RUNCOMFY_PLAN", PLAN, "cloud.plan", "Which column of the rate table is paid: payg or pro."),
    Variable("RUNCOMFY_RATES_FILE", PATH, "", "A rate table to lay over the shipped one."),
    Variable(
        "RUNCOMFY_MAX_USD_PER_HOUR", USD_PER_HOUR, "cloud.max_usd_per_hour", "Machine types that cost more are refused."
    ),
    Variable(
        "RUNCOMFY_MACHINE_TIMEOUT", DURATION, "cloud.boot_timeout", "How long a machine may take to become ready."
    ),
    Variable(
        "RUNCOMFY_COMFYUI_TIMEOUT",
        DURATION,
        "cloud.comfyui_timeout",
        "How long a ready machine may take until its ComfyUI answers.",
    ),
    Variable(
        "RUNCOMFY_POLL_INTERVAL", DURATION, "cloud.poll_interval", "Time between two looks at a machine's status."
    ),
    Variable("RUNCOMFY_MAX_RETRIES", RETRIES, "cloud.max_retries", "How often a failed call to RunComfy is repeated."),
    Variable(
        "RUNCOMFY_HTTP_TIMEOUT",
        DURATION,
        "cloud.request_timeout",
        "How long one call to RunComfy may take (RUNCOMFY_REQUEST_TIMEOUT is CONJURE's, for serverless runs).",
    ),
    Variable(
        "RUNCOMFY_REQUESTS_PER_SECOND", PER_SECOND, "cloud.requests_per_second", "The account's rate limit at RunComfy."
    ),
    Variable("RUNCOMFY_BURST", _number(1, 10_000, "requests"), "cloud.burst", "How many calls may follow at once."),
    Variable(
        "RUNCOMFY_STOP_RESERVE", REQUESTS, "cloud.stop_reserve", "How much of the burst only calls that stop may use."
    ),
    Variable(
        "RUNCOMFY_RETRY_AFTER_CAP", DURATION, "cloud.retry_after_cap", "The longest Retry-After that is obeyed in full."
    ),
    Variable(
        "RUNCOMFY_VISIBILITY_WINDOW",
        DURATION,
        "cloud.visibility_window",
        "How long a new machine may be missing from RunComfy's list.",
    ),
    Variable(
        "RUNCOMFY_NOT_FOUND_GRACE",
        DURATION,
        "cloud.not_found_grace",
        'How long a "not found" right after a launch means "not visible yet".',
    ),
    Variable(
        "RUNCOMFY_STOP_ALARM_AFTER",
        DURATION,
        "cloud.stop_alarm_after",
        "A machine that outlives its stop by this much raises an alarm; the stop is still repeated.",
    ),
    Variable("COMFYUI_EXECUTION_TIMEOUT", DURATION, "comfy.execution_timeout", "How long a job may take."),
    Variable("COMFYUI_POLL_INTERVAL", DURATION, "comfy.poll_interval", "Time between two looks at queue and history."),
    Variable("COMFYUI_MAX_RETRIES", RETRIES, "comfy.max_retries", "How often a failed call to ComfyUI is repeated."),
    Variable("COMFYUI_REQUEST_TIMEOUT", DURATION, "comfy.request_timeout", "How long one call to ComfyUI may take."),
    Variable("COMFYUI_DOWNLOAD_TIMEOUT", DURATION, "comfy.download_timeout", "How long one file may take, all in all."),
    Variable(
        "COMFYUI_STALL_TIMEOUT",
        DURATION,
        "comfy.stall_timeout",
        "How long a node may show no progress before it counts as stuck.",
    ),
    Variable(
        "COMFYUI_UNREACHABLE_TIMEOUT",
        DURATION,
        "comfy.unreachable_timeout",
        "How long a server may not answer before its job is given up.",
    ),
    Variable(
        "COMFYUI_WORKER_DEAD_AFTER",
        DURATION,
        "comfy.worker_dead_after",
        "How long prompts may wait with nothing running before ComfyUI's worker counts as dead.",
    ),
    Variable("COMFYUI_PING_INTERVAL", DURATION, "comfy.ping_interval", "Time between two signs of life on the socket."),
    Variable("COMFYUI_MAX_OUTPUT_BYTES", BYTES, "comfy.max_output_bytes", "The largest result that is downloaded."),
    Variable("COMFYUI_MAX_FRAME_BYTES", BYTES, "comfy.max_frame_bytes", "The largest socket message that is read."),
    Variable(
        "RUNCOMFY_STATE_DIR", PATH, "files.state_dir", "Folder of the database, the dev server file and the logs."
    ),
    Variable("RUNCOMFY_OUTPUT_DIR", PATH, "files.output_dir", "Folder that gets one folder of results per job."),
    Variable("RUNCOMFY_DURABLE", SWITCH, "files.durable", "Whether results are flushed to the disk before they count."),
    Variable("RUNCOMFY_MAX_INPUT_PIXELS", PIXELS, "files.max_input_pixels", "The largest picture that is sent."),
    Variable("RUNCOMFY_MAX_OUTPUT_PIXELS", PIXELS, "files.max_output_pixels", "The largest picture that is decoded."),
    Variable(
        "RUNCOMFY_STATE_COPIES",
        PATHS,
        "files.state_copies",
        "Further files that get a copy of dev_server_state.json, for programs that look there.",
    ),
    Variable("RUNCOMFY_LOG_LEVEL", LOG_LEVEL, "app.log_level", "The least level that is written to the log."),
    Variable("CONJURE_MACHINE_REUSE", SWITCH, "app.machine_reuse", "Whether a job may use the dev server."),
    Variable(
        "CONJURE_AUTO_SHUTDOWN",
        SWITCH,
        "app.auto_shutdown",
        "Whether a dev server is stopped when a job on it is done.",
    ),
    Variable("CONJURE_IDLE_TIMEOUT", DURATION, "app.idle_timeout", "After how long without a job it counts as idle."),
)

BY_NAME: Final[Mapping[str, Variable]] = {variable.name: variable for variable in VARIABLES}

OTHERS: Final = frozenset(
    {
        "RUNCOMFY_DEPLOYMENT_ID",
        "RUNCOMFY_REQUEST_TIMEOUT",
        "RUNCOMFY_DEFAULT_STEPS_FLUX",
        "RUNCOMFY_DEFAULT_STEPS_PARTPACKER",
        "RUNCOMFY_COST_TRACKING",
        "RUNCOMFY_DATABASE_URL",
    }
)
"""Variables that are known and read elsewhere: those of CONJURE's serverless client, and the queue's database
(`agent_config`)."""

QUEUE_PREFIX: Final = "COMFYUI_AGENT_"
"""How the queue's own variables begin; they are read by `agent_config`."""


# --- layers -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """One place values come from. The values are not checked yet."""

    source: str
    """As users read it: "environment", a file's path."""
    values: Mapping[str, Any] = field(repr=False)


class _LayerSource(PydanticBaseSettingsSource):
    """A layer as pydantic-settings wants it: what it does not set, it does not mention."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._layer.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(info, name)[0] for name, info in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


class _Layered(BaseSettings):
    """Reads its fields from the layers it is given, the first one that has a value wins."""

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True, arbitrary_types_allowed=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The process's environment is one of the layers; reading it here again would let it into every test.
        if not isinstance(init_settings, InitSettingsSource):
            raise TypeError("pydantic-settings did not pass the layers")
        return tuple(_LayerSource(settings_cls, layer) for layer in init_settings.init_kwargs["layers"])


_FIELDS: Final[dict[str, Any]] = {variable.name: (variable.kind.annotation | None, None) for variable in VARIABLES}
_Values = create_model("Values", __base__=_Layered, **_FIELDS)
_make: Final[Callable[..., _Layered]] = _Values


@dataclass(frozen=True, slots=True)
class Flaw:
    """A value that cannot be used."""

    name: str
    words: str
    insecure: bool = False


def read_layers(layers: Sequence[Layer]) -> tuple[dict[str, Any], list[Flaw]]:
    """Return the checked values that are set, by variable, and what is wrong with the others. Never raises."""
    flaws: list[Flaw] = []
    remaining = list(layers)
    for _ in range(2):
        try:
            values = _make(layers=remaining)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False, include_context=False)
            flaws = [Flaw(str(e["loc"][0]), e["msg"], insecure=e["type"] == "insecure_url") for e in details]
            bad = {flaw.name for flaw in flaws}
            remaining = [Layer(x.source, {k: v for k, v in x.values.items() if k not in bad}) for x in remaining]
        else:
            found = {name: getattr(values, name) for name in BY_NAME}
            return {name: value for name, value in found.items() if value is not None}, flaws
    raise AssertionError("values without flaws were refused")
