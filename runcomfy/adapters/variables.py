"""
The variables this program reads, one per setting: type, unit, where the value goes, what it is for.

pydantic-settings reads them from its layers and checks them; every mistake is found in one go. Every variable is unset
(None) here unless a layer sets it: the defaults are in `runcomfy.domain.settings`, and meet the values only when all
layers are merged, so that no default can hide what a file said. Those of pools and budgets are in `pool_variables`,
those of the HTTP API in `http_variables`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from runcomfy.adapters.conjure_variables import CONJURE_VARIABLES
from runcomfy.adapters.http_variables import HTTP_VARIABLES
from runcomfy.adapters.pool_variables import POOL_VARIABLES
from runcomfy.adapters.serverless_variables import SERVERLESS_VARIABLES
from runcomfy.adapters.setting_kinds import (
    ADDRESS,
    BYTES,
    DURATION,
    ID,
    LOG_LEVEL,
    NAMED,
    PATH,
    PATHS,
    PER_SECOND,
    PIXELS,
    PLAN,
    REQUESTS,
    RETRIES,
    SERVER_TYPE_NAME,
    SWITCH,
    TOKEN,
    USD_PER_HOUR,
    USER,
    Variable,
    number,
)

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
    Variable("RUNCOMFY_BURST", number(1, 10_000, "requests"), "cloud.burst", "How many calls may follow at once."),
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
    *POOL_VARIABLES,
    *HTTP_VARIABLES,
    *SERVERLESS_VARIABLES,
    *CONJURE_VARIABLES,
)

BY_NAME: Final[Mapping[str, Variable]] = {variable.name: variable for variable in VARIABLES}

OTHERS: Final = frozenset(
    {
        "RUNCOMFY_DATABASE_URL",
    }
)
"""Variables that are known and read elsewhere: the queue's database (`agent_config`)."""

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
