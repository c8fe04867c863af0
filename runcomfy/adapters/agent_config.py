"""
The queue's settings: a command's own words over the environment over the project's file over the defaults.

The project's folder is the working directory, if it has `comfyui_agent/config/global_config.yaml`,
`config/global_config.yaml` or `jobs/processing`. Elsewhere the queue works too, with its database in the state folder.
Everything that is wrong is found in one go, with file, line and key. What the settings are is in `agent_variables`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.agent_variables import (
    BY_FIELD,
    BY_KEY,
    CONFIG_VARIABLE,
    DATABASE_URL_VARIABLE,
    ENVIRONMENT_VARIABLE,
    VARIABLES,
    QueueVariable,
    database_shown,
    is_server,
)
from runcomfy.adapters.config import SettingRow, working_directory
from runcomfy.adapters.setting_kinds import text_shown
from runcomfy.adapters.variables import QUEUE_PREFIX
from runcomfy.adapters.yaml_text import MAX_BYTES, read_yaml
from runcomfy.domain.durations import show_duration
from runcomfy.domain.exceptions import SettingInvalid, foreign_text
from runcomfy.domain.marked import Branch, Entry, Leaf, Node, Problem, below, what_it_is
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.settings import QueueSettings, Settings

__all__ = ["PROJECT_CONFIGS", "STATE_DATABASE", "describe_queue_settings", "is_project", "load_queue_settings"]

CONFIG_FOLDERS: Final = ("comfyui_agent/config", "config")
PROJECT_CONFIGS: Final = tuple(f"{folder}/global_config.yaml" for folder in CONFIG_FOLDERS)
WORKFLOWS_NAME: Final = "workflows.yaml"
JOBS_PROCESSING: Final = "jobs/processing"
JOBS_FINISHED: Final = "jobs/finished"
PROJECT_DATABASE: Final = "database/comfyui_agent.db"
STATE_DATABASE: Final = "runcomfy.sqlite3"
"""In the state folder: the database where there is no project."""

_DEFAULTS: Final = {each.name: each.default for each in fields(QueueSettings)}
_HEARTBEAT: Final = _DEFAULTS["heartbeat"]
_BACKOFF_MOST: Final = _DEFAULTS["backoff_most"]

_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SECRET_NAME: Final = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Given:
    """A value somebody gave for a setting."""

    value: Any
    source: str
    place: str
    """What the error names: the variable, or file, line and key."""
    base: Path
    """Where a relative path begins."""


def is_project(root: Path) -> bool:
    """Return whether a folder is a project: it has a configuration or a folder for job files."""
    return (root / JOBS_PROCESSING).is_dir() or any((root / name).is_file() for name in PROJECT_CONFIGS)


def load_queue_settings(
    *,
    settings: Settings,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    config_file: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> QueueSettings:
    """Return the queue's settings, merged and checked; nothing is created.

    `env` and `cwd` replace the process's environment and working directory. `config_file` wins over
    COMFYUI_AGENT_CONFIG; the project's folder is then the one that file belongs to. `overrides`: field or variable ->
    value, as text or already of the right type; None counts as not given.

    Raises SettingInvalid: a value, a file or a key cannot be used; `details["problems"]` has them all.
    """
    return _Loader(settings, env, cwd, config_file, overrides or {}).load()


class _Loader:
    """Loads once."""

    def __init__(
        self,
        settings: Settings,
        env: Mapping[str, str] | None,
        cwd: Path | None,
        config_file: str | os.PathLike[str] | None,
        overrides: Mapping[str, Any],
    ) -> None:
        self._settings = settings
        self._env = os.environ if env is None else env
        self._cwd = working_directory(cwd)
        self._named = os.fspath(config_file) if config_file is not None else self._variable(CONFIG_VARIABLE)
        self._overrides = overrides
        self._problems: list[dict[str, str]] = []
        self._warnings: list[str] = []

    def load(self) -> QueueSettings:
        given = self._from_overrides()
        for name, value in self._from_environment().items():
            given.setdefault(name, value)
        root = self._root(given)
        file = self._config_file(root)
        if self._named is not None and "root" not in given and file is not None:
            root = _project_of(file)
        from_file, root_of_file = self._from_file(file, root)
        if "root" not in given and root_of_file is not None:
            root = root_of_file
        for name, value in from_file.items():
            given.setdefault(name, value)
        values = {name: each for name, each in self._read(given).items() if name != "root"}
        found = self._complete(values, root, file)
        self._unknown_variables()
        if self._problems:
            raise self._error()
        sources = dict.fromkeys(BY_FIELD, "default") | {name: each.source for name, each in given.items()}
        return replace(found, sources=sources, warnings=tuple(self._warnings))

    # -- problems ------------------------------------------------------------------------------------------

    def _wrong(self, place: str, words: str, hint: str, key: str, *, colon: bool = False) -> None:
        separator = " " if words[:1].isalpha() and not colon else ": "
        problem = {"message": f"{place}{separator}{words}", "hint": hint, "setting": key, "place": place}
        if problem not in self._problems:  # the project's folder is read before all else, and again with it
            self._problems.append(problem)

    def _error(self) -> SettingInvalid:
        problems = self._problems
        words = "; ".join(problem["message"] for problem in problems)
        return SettingInvalid(
            words if len(problems) == 1 else f"{len(problems)} problems with the queue's settings: {words}",
            hint="; ".join(dict.fromkeys(problem["hint"] for problem in problems if problem["hint"])),
            details={**{k: problems[0][k] for k in ("setting", "place")}, "problems": problems},
        )

    # -- overrides and environment -------------------------------------------------------------------------

    def _variable(self, name: str) -> str | None:
        return self._env.get(name, "").strip() or None

    def _from_overrides(self) -> dict[str, _Given]:
        by_name = {variable.name: variable for variable in VARIABLES}
        given = {}
        for key, value in self._overrides.items():
            variable = BY_FIELD.get(key) or by_name.get(key)
            if variable is None:
                close = get_close_matches(key, [*BY_FIELD, *by_name], 1, 0.6)
                hint = f"did you mean {close[0]}?" if close else "`comfyctl config show` lists them all"
                self._wrong(foreign_text(key, 60), "is not a setting of the queue", hint, key)
            elif value is not None and value != "":
                given[variable.field] = _Given(value, "override", variable.field, self._cwd)
        return given

    def _from_environment(self) -> dict[str, _Given]:
        given = {}
        for variable in VARIABLES:
            if (text := self._variable(variable.name)) is not None:
                given[variable.field] = _Given(text, "environment", variable.name, self._cwd)
        if "database" not in given and (text := self._variable(DATABASE_URL_VARIABLE)) is not None:
            given["database"] = _Given(text, f"environment ({DATABASE_URL_VARIABLE})", DATABASE_URL_VARIABLE, self._cwd)
        return given

    def _unknown_variables(self) -> None:
        names = [CONFIG_VARIABLE, *(variable.name for variable in VARIABLES)]
        for name in sorted(self._env):
            if name.startswith(QUEUE_PREFIX) and name not in names:
                close = get_close_matches(name, names, 1, 0.6)
                ending = f"; did you mean {close[0]}?" if close else ""
                self._warnings.append(f"{foreign_text(name, 60)} is not a setting{ending}")

    # -- the project's folder and its file -----------------------------------------------------------------

    def _root(self, given: Mapping[str, _Given]) -> Path:
        if "root" not in given:
            return self._cwd
        chosen = self._read({"root": given["root"]}).get("root")
        if chosen is None:
            return self._cwd
        root = Path(chosen)
        if not root.is_dir():
            self._wrong(given["root"].place, f"names no folder: {foreign_text(root)}", "name a folder", "root")
        return root

    def _config_file(self, root: Path) -> Path | None:
        if self._named is not None:
            path = _absolute(self._named, self._cwd)
            if not path.is_file():
                self._wrong(CONFIG_VARIABLE, f"names no file: {foreign_text(path)}", "name a file that exists", "")
                return None
            return path
        name = "global_config.yaml"
        chosen = self._variable(ENVIRONMENT_VARIABLE)
        if chosen is not None:
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", chosen):
                self._wrong(ENVIRONMENT_VARIABLE, f"{foreign_text(chosen, 40)!r} is no name", "write alpha or prod", "")
                return None
            name = f"global_{chosen}.yaml"
        for folder in CONFIG_FOLDERS:
            if (path := root / folder / name).is_file():
                return path
        if chosen is not None and any((root / config).is_file() for config in PROJECT_CONFIGS):
            # Without any configuration the word may be another program's; beside one it is a mistake.
            wanted = " nor ".join(str(root / folder / name) for folder in CONFIG_FOLDERS)
            self._wrong(ENVIRONMENT_VARIABLE, f"asks for a file that is not there: neither {wanted}", "write it", "")
        return None

    def _from_file(self, file: Path | None, root: Path) -> tuple[dict[str, _Given], Path | None]:
        if file is None:
            return {}, None
        tree, problems = self._tree(file)
        shown = _relative(file, root)
        for problem in problems:
            self._wrong(f"{shown}, {problem.where}", problem.message, problem.hint, problem.field, colon=True)
        if tree is None:
            return {}, None
        if not isinstance(tree, Branch):
            if not isinstance(tree, Leaf) or tree.text:
                words = f"expected names with values, found {what_it_is(tree)}"
                self._wrong(f"{shown}, line {tree.line}", words, "write `name: value` lines", "", colon=True)
            return {}, None
        given: dict[str, _Given] = {}
        foreign: list[str] = []
        ranks: dict[str, int] = {}
        for key, entry in _entries(tree):
            variable = BY_KEY.get(key)
            if variable is None:
                self._unknown_key(key, entry, shown, foreign)
                continue
            place = f"{shown}, line {entry.line}, {key}"
            value = self._value(entry.value, place, variable)
            rank = variable.keys.index(key)
            if value is not None and rank < ranks.get(variable.field, len(variable.keys)):
                ranks[variable.field] = rank
                given[variable.field] = _Given(value, f"{file}, line {entry.line}", place, root)
        if foreign:
            self._warnings.append(f"{shown}: not settings of this program: {', '.join(foreign)}")
        new_root = given.get("root")
        if new_root is None:
            return given, None
        chosen = self._read({"root": new_root}).get("root")
        if chosen is None:
            return given, None
        if not Path(chosen).is_dir():
            self._wrong(new_root.place, "names no folder", "name a folder", "root")
            return given, None
        return {name: replace(each, base=Path(chosen)) for name, each in given.items()}, Path(chosen)

    @staticmethod
    def _tree(file: Path) -> tuple[Node | None, list[Problem]]:
        try:
            with file.open("rb") as opened:
                data = opened.read(MAX_BYTES + 1)
        except OSError as error:
            words = f"it cannot be read: {foreign_text(error.strerror or error)}"
            return None, [Problem(1, "", words, "check its permissions")]
        return read_yaml(data)

    def _unknown_key(self, key: str, entry: Entry, shown: str, foreign: list[str]) -> None:
        words = foreign_text(key, 80)
        close = get_close_matches(key, BY_KEY, 1, 0.75) or [
            known for known in BY_KEY if known.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        if close:
            where = f"{shown}, line {entry.line}"
            self._warnings.append(f"{where}: {words} is not a setting; did you mean {close[0]}?")
        else:
            foreign.append(f"{words} (line {entry.line})")

    def _value(self, node: Node, place: str, variable: QueueVariable) -> Any:
        """What a key of the file holds, as the setting's sort reads it; None if nothing, or if it is wrong."""
        if isinstance(node, Branch) and variable.field in ("limit_workflow", "limit_job_type"):
            return {each.key: each.value.text if isinstance(each.value, Leaf) else "a list" for each in node}
        if not isinstance(node, Leaf):
            self._wrong(place, f"expected one value, found {what_it_is(node)}", variable.sort.hint, variable.field)
            return None
        if not node.quoted and node.text in ("", "~", "null"):
            return None
        return self._expanded(node.text, place, variable)

    def _expanded(self, text: str, place: str, variable: QueueVariable) -> str | None:
        """Put in what `${NAME}` and `${NAME:-otherwise}` stand for."""
        failed = False

        def put_in(match: re.Match[str]) -> str:
            nonlocal failed
            name, otherwise = match.groups()
            if variable.field != "database" and _SECRET_NAME.search(name):
                # A file in a foreign folder must not have a token sent to an address it names.
                self._wrong(place, f"does not take ${{{name}}}: it may be a secret", "write another", variable.field)
            elif (found := self._variable(name)) is not None:
                return found
            elif otherwise is not None:
                return str(otherwise)
            else:
                hint = f"set {name}, or write ${{{name}:-value}}"
                self._wrong(place, f"asks for {name}, which is not set", hint, variable.field)
            failed = True
            return ""

        expanded = _VARIABLE.sub(put_in, text)
        return None if failed else expanded

    # -- values --------------------------------------------------------------------------------------------

    def _read(self, given: Mapping[str, _Given]) -> dict[str, Any]:
        values = {}
        for field, each in given.items():
            variable = BY_FIELD[field]
            try:
                value = variable.sort.read(each.value)
            except ValueError as error:
                self._wrong(each.place, str(error), variable.sort.hint, field)
                continue
            if variable.path:
                value = str(_absolute(value, each.base))
            elif isinstance(value, Secret) and not is_server(value.reveal()):
                value = Secret(str(_absolute(value.reveal(), each.base)))
            values[field] = value
        return values

    def _complete(self, values: dict[str, Any], root: Path, file: Path | None) -> QueueSettings:
        project = file is not None or is_project(root)
        values.setdefault("jobs_processing", str(_absolute(JOBS_PROCESSING, root)))
        values.setdefault("jobs_finished", str(_absolute(JOBS_FINISHED, root)))
        if "database" not in values:
            folder = root if project else Path(self._settings.files.state_dir)
            values["database"] = Secret(str(_absolute(PROJECT_DATABASE if project else STATE_DATABASE, folder)))
        if values.get("workflows_file") is None:
            values["workflows_file"] = _workflows_file(root, file)
        elif not Path(values["workflows_file"]).is_file():
            path = foreign_text(values["workflows_file"])
            self._wrong(BY_FIELD["workflows_file"].name, f"names no file: {path}", "name a file that exists", "")
        # What was not given follows from what was.
        if "lease" in values and "heartbeat" not in values:
            values["heartbeat"] = min(_HEARTBEAT, values["lease"] / 4)
        if "backoff_first" in values and "backoff_most" not in values:
            values["backoff_most"] = max(_BACKOFF_MOST, values["backoff_first"])
        found = QueueSettings(root=str(root), config_file=str(file) if file else None, **values)
        if found.heartbeat * 2 > found.lease:
            words = f"is {show_duration(found.lease)}; it must be at least twice the heartbeat"
            hint = f"choose at least {show_duration(found.heartbeat * 2)}, better four times the heartbeat"
            self._wrong(BY_FIELD["lease"].keys[0], f"{words} ({show_duration(found.heartbeat)})", hint, "lease")
        if found.backoff_first > found.backoff_most:
            words = f"is more than agent.backoff_most_seconds ({show_duration(found.backoff_most)})"
            self._wrong(BY_FIELD["backoff_first"].keys[0], words, "choose less", "backoff_first")
        return found


def _absolute(path: str | os.PathLike[str], base: Path) -> Path:
    return Path(os.path.normpath(base / Path(path).expanduser()))


def _project_of(file: Path) -> Path:
    """Return the folder of the project that a configuration file belongs to."""
    folder = file.parent
    if folder.name == "config":
        folder = folder.parent
        if folder.name == "comfyui_agent":
            folder = folder.parent
    return folder


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _workflows_file(root: Path, file: Path | None) -> str | None:
    folders = ([file.parent] if file else []) + [root / folder for folder in CONFIG_FOLDERS]
    return next((str(path) for folder in folders if (path := folder / WORKFLOWS_NAME).is_file()), None)


_SECTIONS: Final = frozenset(key.rpartition(".")[0] for key in BY_KEY) - {""}


def _entries(tree: Branch, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Yield every key with its full name; `executor` is another word for the section `agent`."""
    for entry in tree:
        name = "agent" if not prefix and entry.key == "executor" else entry.key
        key = below(prefix, name)
        if key in _SECTIONS and isinstance(entry.value, Branch):
            yield from _entries(entry.value, key)
        elif key in _SECTIONS and isinstance(entry.value, Leaf) and entry.value.forgotten:
            continue
        else:
            yield key, entry


# --- showing ----------------------------------------------------------------------------------------------


def describe_queue_settings(settings: QueueSettings) -> list[SettingRow]:
    """Return every setting of the queue with its value, fit to be shown: no password, no machine's address."""
    return [
        SettingRow(
            variable.name,
            _value_shown(getattr(settings, variable.field)) if variable.field != "api_base_url" else _server(settings),
            settings.sources.get(variable.field, "default"),
            variable.help,
            variable.sort.unit,
        )
        for variable in VARIABLES
    ]


def default_queue_values() -> dict[str, str]:
    """Return variable -> default as it is shown, empty where there is none or it depends on the folder."""
    shown = {}
    for variable in VARIABLES:
        value = _DEFAULTS[variable.field]
        plain = isinstance(value, (str, int, timedelta))
        shown[variable.name] = _value_shown(value) if plain else ""
    return shown


def _server(settings: QueueSettings) -> str:
    return SecretUrl(settings.api_base_url).masked


def _value_shown(value: object) -> str:
    match value:
        case Secret():
            return database_shown(value)
        case Mapping():
            return ", ".join(f"{name}={count}" for name, count in value.items())
        case _:
            return text_shown(value)
