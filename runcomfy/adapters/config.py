"""
Settings: environment over credentials file over defaults, and for each value where it came from.

Everything that is wrong is found in one go and told in one error, with the place to set it. What the variables are is
in `variables`, how the file is read in `credentials`, what machines cost in `rates`; this module joins them. It writes
nothing and asks nobody: whether credentials are accepted, `comfyctl doctor` finds out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import state
from runcomfy.adapters.credentials import (
    FILE_KEYS,
    FILE_VARIABLE,
    CredentialsFile,
    find_credentials,
    flaw,
    is_placeholder,
)
from runcomfy.adapters.http_variables import HTTP_VARIABLES
from runcomfy.adapters.pool_variables import POOL_VARIABLES, budget_shown, budgets_from
from runcomfy.adapters.rates import load_rates
from runcomfy.adapters.setting_kinds import Variable, text_shown
from runcomfy.adapters.variables import BY_NAME, OTHERS, QUEUE_PREFIX, VARIABLES, Layer, read_layers
from runcomfy.domain.exceptions import (
    ConfigurationError,
    CredentialsMalformed,
    CredentialsMissing,
    InsecureUrl,
    SettingInvalid,
    foreign_text,
)
from runcomfy.domain.secret import Secret, is_loopback
from runcomfy.domain.settings import (
    AppSettings,
    CloudSettings,
    ComfySettings,
    FileSettings,
    HttpSettings,
    PoolSettings,
    ServerlessSettings,
    Settings,
)

__all__ = ["SettingRow", "default_settings", "describe_settings", "load_rates", "load_settings"]

STATE_FILE_NAME: Final = "dev_server_state.json"
_TOKENS: Final = ("RUNCOMFY_API_TOKEN", "RUNCOMFY_API_TOKEN_2")
_NOT_TO_STOP: Final = frozenset(
    {"RUNCOMFY_MAX_USD_PER_HOUR", *(variable.name for variable in (*POOL_VARIABLES, *HTTP_VARIABLES))}
)
"""What limits renting, or is asked over HTTP, says nothing about what has been rented."""
_WITH_COMMAS: Final = frozenset(
    {"RUNCOMFY_POOL_SERVER_TYPES", "RUNCOMFY_SERVERLESS_FILE_HOSTS", "RUNCOMFY_HTTP_ALLOWED_HOSTS"}
)
_NEEDED: Final[Mapping[str, str]] = {
    "RUNCOMFY_USER_ID": "user id",
    "RUNCOMFY_API_TOKEN": "API token",
    "RUNCOMFY_WORKFLOW_VERSION_ID": "workflow version id",
}


def load_settings(
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    require_cloud: bool = False,
    require_version: bool = True,
    overrides: Mapping[str, Any] | None = None,
    to_stop: bool = False,
) -> Settings:
    """Return all settings, merged and checked.

    `env` and `cwd` replace the process's environment and working directory. `overrides` win over everything: variable
    name or `section.field` -> value, as text or already of the right type; None counts as not given.
    `require_cloud` asks for credentials; with `require_version=False` they may lack the workflow version id, which only
    launching needs. `to_stop`: nothing is rented, so a pool's or a budget's setting that is wrong is left out with a
    warning: it must not keep anybody from ending machines.

    Raises:
        CredentialsMissing: something required is nowhere to be found, or the file that was named is not there.
        CredentialsMalformed: a credential cannot be right, or its file cannot be read.
        InsecureUrl: the API's address would have the token travel unencrypted.
        SettingInvalid: another value cannot be used.
        With several problems, the first of these classes in the order malformed, insecure, invalid, missing;
        `details["problems"]` has them all.
    """
    variables = os.environ if env is None else env
    here = working_directory(cwd)
    problems: list[ConfigurationError] = []
    file = _read_file(variables, here, problems)
    unread = bool(problems)
    layers = _layers(overrides or {}, variables, file, problems)
    values, flaws = read_layers([layer for layer, _ in layers])
    sources = _sources([layer for layer, _ in layers])
    problems += [_invalid(BY_NAME[f.name], f.words, sources[f.name], insecure=f.insecure) for f in flaws]
    _check_address(values, sources, file, problems)
    if require_cloud and not unread:  # without the file that was named, who knows what is missing
        problems += _missing(values, file, layers, problems, version=require_version)
    settings = _sections(values, variables, here, problems)
    left_out = [problem for problem in problems if to_stop and problem.details.get("setting") in _NOT_TO_STOP]
    problems = [problem for problem in problems if problem not in left_out]
    if problems:
        raise _joined(problems)
    settings = replace(
        settings,
        sources={v.name: sources.get(v.name, "default") for v in VARIABLES},
        credentials_file=str(file.path) if file.path else None,
    )
    ignored = tuple(f"{problem.message}; ignored here, where nothing is rented" for problem in left_out)
    return replace(settings, warnings=(*ignored, *file.warnings, *_advice(settings, variables, file)))


def working_directory(cwd: Path | None) -> Path:
    """Return the folder to begin in, whole. Raises SettingInvalid if it is gone."""
    try:
        return (Path.cwd() if cwd is None else cwd).absolute()
    except OSError as error:
        raise SettingInvalid("the working directory no longer exists", hint="change into a folder that does") from error


# --- layers -----------------------------------------------------------------------------------------------


def _read_file(env: Mapping[str, str], cwd: Path, problems: list[ConfigurationError]) -> CredentialsFile:
    try:
        return find_credentials(env, cwd)
    except ConfigurationError as error:
        problems.append(error)
        return CredentialsFile(path=None, searched=(Path(env[FILE_VARIABLE]),) if env.get(FILE_VARIABLE) else ())


def _layers(
    overrides: Mapping[str, Any], env: Mapping[str, str], file: CredentialsFile, problems: list[ConfigurationError]
) -> list[tuple[Layer, dict[str, str]]]:
    """Return the layers, each with the credentials that were left out because they only hold a place.

    A malformed credential is a problem only in the layer that would be used: one that a stronger layer covers does no
    harm.
    """
    from_file = {name: entry.value for name, entry in file.entries.items()}
    from_file = {name: v for name, v in from_file.items() if name in BY_NAME and not BY_NAME[name].kind.place}
    raw: list[tuple[str, Mapping[str, Any]]] = [
        ("override", _override_names(overrides, problems)),
        ("environment", env),
        (str(file.path or ""), from_file),
    ]
    layers: list[tuple[Layer, dict[str, str]]] = []
    taken: set[str] = set()
    for source, given in raw:
        values = {name: given[name] for name in BY_NAME if given.get(name) not in (None, "")}
        values = {name: v for name, v in values.items() if not (isinstance(v, str) and not v.strip())}
        skipped = {}
        for name in FILE_KEYS:
            if name not in values:
                continue
            text = values[name].reveal() if isinstance(values[name], Secret) else str(values[name]).strip()
            if is_placeholder(text):
                skipped[name] = _place(name, source, file)
                del values[name]
            elif name not in taken and (words := flaw(text, in_path=name not in _TOKENS)):
                problems.append(_malformed(name, words, _place(name, source, file)))
                del values[name]
            else:
                values[name] = text
        taken |= values.keys()
        layers.append((Layer(source, values), skipped))
    return layers


def _override_names(overrides: Mapping[str, Any], problems: list[ConfigurationError]) -> dict[str, Any]:
    by_target = {v.target: v.name for v in reversed(VARIABLES) if v.target}
    named = {}
    for key, value in overrides.items():
        name = key if key in BY_NAME else by_target.get(key)
        if name is None:
            problems.append(SettingInvalid(f"{foreign_text(key, 60)} is not a setting", hint=_did_you_mean(key)))
        else:
            named[name] = value
    return named


def _sources(layers: Sequence[Layer]) -> dict[str, str]:
    return {name: layer.source for layer in reversed(layers) for name in layer.values}


def _place(name: str, source: str, file: CredentialsFile) -> str:
    """Return where a credential stands: the variable, or file and line."""
    if file.path is not None and source == str(file.path):
        return f"{source}, line {file.entries[name].line}"
    return source


# --- problems ---------------------------------------------------------------------------------------------


def _malformed(name: str, words: str, place: str) -> ConfigurationError:
    return CredentialsMalformed(
        f"{name} ({place}) {words}",
        hint=f"correct {name} there: {BY_NAME[name].kind.hint}",
        details={"setting": name, "place": place},
    )


def _invalid(variable: Variable, words: str, source: str, *, insecure: bool = False) -> ConfigurationError:
    kind = InsecureUrl if insecure else SettingInvalid
    return kind(
        f"{variable.name} ({source}) {words}" if words[:1].isalpha() else f"{variable.name} ({source}): {words}",
        hint=f"{variable.kind.hint}, in {variable.name}",
        details={"setting": variable.name, "place": source},
    )


def _check_address(
    values: Mapping[str, Any], sources: Mapping[str, str], file: CredentialsFile, problems: list[ConfigurationError]
) -> None:
    """Refuse to send a token of the user's to an address that only a file in the working directory names."""
    address, name = values.get("RUNCOMFY_API_BASE_URL"), "RUNCOMFY_API_BASE_URL"
    if address is None or not file.by_chance or sources[name] != str(file.path):
        return
    if is_loopback(urlsplit(address).hostname or ""):
        return
    if any(sources.get(token) not in (None, str(file.path)) for token in _TOKENS):
        problems.append(
            SettingInvalid(
                f"{name} stands in {file.path}, but the token does not: it would be sent where that file says",
                hint=f"set {name} in the environment too, or name the file in {FILE_VARIABLE}",
                details={"setting": name, "place": str(file.path)},
            )
        )


def _missing(
    values: Mapping[str, Any],
    file: CredentialsFile,
    layers: Iterable[tuple[Layer, dict[str, str]]],
    problems: Iterable[ConfigurationError],
    *,
    version: bool,
) -> list[ConfigurationError]:
    malformed = {problem.details.get("setting") for problem in problems}
    names = [name for name in _NEEDED if name not in values and name not in malformed]
    if "RUNCOMFY_API_TOKEN" in names and "RUNCOMFY_API_TOKEN_2" in values:
        names.remove("RUNCOMFY_API_TOKEN")
    # All but launching works without the version; beside other gaps it is named, so that one look fills them all.
    if not names or (not version and names == ["RUNCOMFY_WORKFLOW_VERSION_ID"]):
        return []
    skipped = {name: place for _, names_left_out in layers for name, place in names_left_out.items()}
    remarks = [f"{name} is still empty or the example's value ({skipped[name]})" for name in names if name in skipped]
    remarks += [f"line {file.without_colon[n]} of {file.path} has no colon" for n in names if n in file.without_colon]
    what = ", ".join(f"{name} ({_NEEDED[name]})" for name in names)
    keys = ", ".join(FILE_KEYS[name] for name in names)
    if file.path is not None:
        where = f"set {', '.join(names)} in the environment, or write {keys} into {file.path}"
    else:
        target = file.searched[0] if file.searched else "credentials.txt"
        where = f"set them in the environment, or copy credentials.example.txt to {target} and fill in {keys}"
        where += f" (searched: {', '.join(map(str, file.searched))})"
    return [
        CredentialsMissing(
            f"missing: {what}" + (f"; {'; '.join(remarks)}" if remarks else ""),
            hint=where,
            details={"missing": names, "read": str(file.path or ""), "searched": [str(p) for p in file.searched]},
        )
    ]


def _joined(problems: Sequence[ConfigurationError]) -> ConfigurationError:
    order: tuple[type[ConfigurationError], ...] = (
        CredentialsMalformed,
        InsecureUrl,
        SettingInvalid,
        CredentialsMissing,
    )
    if len(problems) == 1:
        first = problems[0]
        first.details["problems"] = [{"code": first.code, "message": first.message, "hint": first.hint}]
        return first
    kind = next((kind for kind in order if any(isinstance(p, kind) for p in problems)), ConfigurationError)
    hints = list(dict.fromkeys(p.hint for p in problems if p.hint))
    return kind(
        f"{len(problems)} problems with the settings: " + "; ".join(p.message for p in problems),
        hint="; ".join(hints),
        details={"problems": [{"code": p.code, "message": p.message, "hint": p.hint} for p in problems]},
    )


# --- sections ---------------------------------------------------------------------------------------------


def _sections(
    values: Mapping[str, Any], env: Mapping[str, str], cwd: Path, problems: list[ConfigurationError]
) -> Settings:
    """Return the settings without their sources: what is set, over the defaults of the dataclasses."""
    given: dict[str, dict[str, Any]] = {
        name: {} for name in ("cloud", "comfy", "files", "app", "pool", "http", "budgets", "serverless")
    }
    for variable in VARIABLES:
        section, _, name = variable.target.partition(".")
        if section and variable.name in values:
            given[section][name] = values[variable.name]
    tokens = tuple(dict.fromkeys(values[name] for name in _TOKENS if name in values))
    given["cloud"]["tokens"] = tokens
    if "poll_interval" in given["cloud"]:  # CONJURE's variable is for both APIs
        given["serverless"].setdefault("poll_interval", given["cloud"]["poll_interval"])
    if hosts := given["serverless"].get("file_hosts"):
        given["serverless"]["file_hosts"] = tuple(hosts.split(","))
    files = given["files"]
    chosen = _absolute(files.get("state_dir"), cwd)
    files["state_dir"] = str(chosen or state.path({k: v for k, v in env.items() if k != "RUNCOMFY_STATE_DIR"}))
    if "state_copies" in files:
        files["state_copies"] = _copies(files["state_copies"], cwd, problems)
    cloud = CloudSettings(**given["cloud"])
    if cloud.stop_reserve >= cloud.burst:
        words = f"{cloud.stop_reserve} is not less than RUNCOMFY_BURST ({cloud.burst}): other calls would never leave"
        problems.append(_invalid(BY_NAME["RUNCOMFY_STOP_RESERVE"], words, "with RUNCOMFY_BURST"))
    pool = PoolSettings(**given["pool"])
    if pool.min_machines > pool.max_machines:
        words = f"{pool.min_machines} is more than RUNCOMFY_POOL_MAX_MACHINES ({pool.max_machines})"
        problems.append(_invalid(BY_NAME["RUNCOMFY_POOL_MIN_MACHINES"], words, "with RUNCOMFY_POOL_MAX_MACHINES"))
    budgets, flaws = budgets_from(values)
    problems += [_invalid(BY_NAME[name], words, f"with {name.removesuffix('_SOFT')}") for name, words in flaws]
    rates_file = _absolute(values.get("RUNCOMFY_RATES_FILE"), cwd)
    try:
        rates = load_rates(plan=cloud.plan, extra=rates_file)
    except SettingInvalid as error:
        problems.append(error)
        rates = load_rates(plan=cloud.plan)
    return Settings(
        cloud=cloud,
        comfy=ComfySettings(**given["comfy"]),
        files=FileSettings(**files),
        app=AppSettings(**given["app"]),
        rates=rates,
        pool=pool,
        http=HttpSettings(**given["http"]),
        serverless=ServerlessSettings(**given["serverless"]),
        budgets=budgets,
        rates_file=str(rates_file) if rates_file else None,
    )


def _absolute(path: str | None, cwd: Path) -> Path | None:
    return None if path is None else Path(os.path.normpath(cwd / path))


def _copies(text: str, cwd: Path, problems: list[ConfigurationError]) -> tuple[str, ...]:
    """Return the files named in RUNCOMFY_STATE_COPIES; a folder stands for the usual file name in it."""
    copies = []
    for part in filter(None, (part.strip() for part in text.split(os.pathsep))):
        try:
            path = cwd / Path(part).expanduser()
            folder = part.endswith(("/", os.sep)) or path.is_dir()
        except (RuntimeError, ValueError):  # an unknown user's home; a NUL character
            variable = BY_NAME["RUNCOMFY_STATE_COPIES"]
            problems.append(_invalid(variable, f"{foreign_text(part, 60)!r} cannot be a path", "environment"))
            continue
        copies.append(os.path.normpath(path / STATE_FILE_NAME if folder else path))
    return tuple(dict.fromkeys(copies))


# --- warnings ---------------------------------------------------------------------------------------------


def _advice(settings: Settings, env: Mapping[str, str], file: CredentialsFile) -> list[str]:
    advice = []
    host = urlsplit(settings.cloud.base_url).hostname or ""
    if host.endswith("runcomfy.com"):
        advice.append(f"RUNCOMFY_API_BASE_URL names {host}; RunComfy's API is at api.runcomfy.net (.net, not .com)")
    # Other programs use COMFYUI_ and CONJURE_ too; there only a near miss is worth a word.
    advice += [
        f"{foreign_text(name, 60)} is not a setting; {_did_you_mean(name)}"
        for name in sorted(set(env) - set(BY_NAME) - OTHERS)
        if name.startswith("RUNCOMFY_")
        or (
            name.startswith(("COMFYUI_", "CONJURE_"))
            and not name.startswith(QUEUE_PREFIX)
            and get_close_matches(name, BY_NAME, 1, 0.85)
        )
        or (name.startswith("HUGGINGFACE_") and get_close_matches(name, BY_NAME, 1, 0.92))
    ]
    for name, entry in file.entries.items():
        if name in BY_NAME and BY_NAME[name].kind.place:
            advice.append(f"{name} in {file.path}, line {entry.line}, does not count: set it in the environment")
        elif name not in BY_NAME and name not in OTHERS and get_close_matches(name.upper(), FILE_KEYS, 1, 0.8):
            advice.append(
                f"{foreign_text(name, 60)} in {file.path}, line {entry.line}, is not a key; {_did_you_mean(name)}"
            )
    for server_type in dict.fromkeys((settings.cloud.server_type, *settings.pool.server_types)):
        advice += _about_type(server_type, settings)
    if settings.pool.latency_target is not None and settings.sources["RUNCOMFY_WAIT_PRICE"] != "default":
        advice.append("RUNCOMFY_WAIT_PRICE does not count while RUNCOMFY_LATENCY_TARGET is set")
    return advice


def _about_type(server_type: str, settings: Settings) -> list[str]:
    rate = settings.rates.find(server_type)
    if rate is None:
        price = f"the machine type {server_type} has no {settings.rates.plan} price and will not be launched"
        return [f"{price}; add one in a file that RUNCOMFY_RATES_FILE names"]
    if not rate.tested:
        return [f"the machine type {server_type} is not one that RunComfy documents; it is untested"]
    return []


def _did_you_mean(name: str) -> str:
    near = get_close_matches(name.upper(), BY_NAME, 1, 0.6)
    return f"did you mean {near[0]}?" if near else "`comfyctl config show` lists them all"


# --- showing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One setting as it is shown to people."""

    name: str
    """The variable."""
    value_shown: str
    """Secrets are stars; what is not set is empty."""
    source: str
    """"override", "environment", the credentials file's path, or "default"."""
    help: str
    unit: str


def default_settings(*, state_dir: str) -> Settings:
    """Return the settings as they are when nothing is set anywhere."""
    cloud = CloudSettings()
    return Settings(
        cloud=cloud,
        comfy=ComfySettings(),
        files=FileSettings(state_dir=state_dir),
        app=AppSettings(),
        rates=load_rates(plan=cloud.plan),
    )


def describe_settings(settings: Settings) -> list[SettingRow]:
    """Return every setting with its value, fit to be shown: secrets are stars."""
    return [
        SettingRow(v.name, _value_shown(v, settings), settings.sources.get(v.name, "default"), v.help, v.kind.unit)
        for v in VARIABLES
    ]


def _value_shown(variable: Variable, settings: Settings) -> str:
    if variable.name in _TOKENS:
        return "***" if settings.sources.get(variable.name, "default") != "default" else ""
    if variable.name == FILE_VARIABLE:
        return settings.credentials_file or ""
    if variable.name == "RUNCOMFY_RATES_FILE":
        return settings.rates_file or ""
    section, _, name = variable.target.partition(".")
    if section == "budgets":
        return budget_shown(variable.name, settings.budgets)
    value = getattr(getattr(settings, section), name)
    if variable.name in _WITH_COMMAS:
        return ",".join(value)
    if variable.kind.secret:
        return "***" if value else ""
    return text_shown(value)
