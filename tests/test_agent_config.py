"""The queue's settings: from which folder, which file, which variable; and what is said of what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.agent_config import describe_queue_settings, load_queue_settings
from runcomfy.adapters.agent_variables import VARIABLES
from runcomfy.adapters.config import default_settings, load_settings
from runcomfy.domain.exceptions import SettingInvalid
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings

GUIDE = """\
default_priority: 50
retry_limit: 2            # global default; can be overridden per job (DB column)
poll_interval_ms: 1000

paths:
  jobs_processing: "jobs/processing"
  jobs_finished: "jobs/finished"
  database: "database/comfyui_agent.db"

comfyui:
  api_base_url: "http://127.0.0.1:8188"
  timeout_seconds: 300
"""

Load = Callable[..., QueueSettings]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "comfyui_agent" / "config").mkdir(parents=True)
    return folder


@pytest.fixture
def load(project: Path, tmp_path: Path) -> Load:
    def load(text: str | None = None, /, *, env: dict[str, str] | None = None, **more: Any) -> QueueSettings:
        if text is not None:
            write(project / "comfyui_agent" / "config" / "global_config.yaml", text)
        more.setdefault("cwd", project)
        return load_queue_settings(settings=default_settings(state_dir=str(tmp_path / "state")), env=env or {}, **more)

    return load


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(load: Load, *arguments: Any, **more: Any) -> SettingInvalid:
    with pytest.raises(SettingInvalid) as caught:
        load(*arguments, **more)
    return caught.value


# --- where the settings come from -----------------------------------------------------------------------------


def test_the_guides_own_file_says_what_the_defaults_say(load: Load, project: Path) -> None:
    found = load(GUIDE)
    assert found.warnings == ()
    assert (found.root, found.jobs_processing) == (str(project), str(project / "jobs" / "processing"))
    assert found.database.reveal() == str(project / "database" / "comfyui_agent.db")
    empty = load("")
    names = [each.name for each in fields(QueueSettings) if each.name != "sources"]
    assert {name: getattr(found, name) for name in names} == {name: getattr(empty, name) for name in names}
    assert found.sources["retry_limit"].endswith("global_config.yaml, line 2")
    assert empty.sources["retry_limit"] == "default"


def test_where_there_is_no_project_the_database_is_in_the_state_folder(load: Load, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = load(cwd=empty)
    assert found.database.reveal() == str(tmp_path / "state" / "runcomfy.sqlite3")
    assert (found.root, found.config_file, found.workflows_file) == (str(empty), None, None)
    assert list(empty.iterdir()) == []  # looking makes nothing
    (empty / "jobs" / "processing").mkdir(parents=True)
    assert load(cwd=empty).database.reveal() == str(empty / "database" / "comfyui_agent.db")


def test_a_configuration_beside_the_package_or_in_a_plain_config_folder(load: Load, project: Path) -> None:
    plain = write(project / "config" / "global_config.yaml", "retry_limit: 7")
    assert (load().retry_limit, load().config_file) == (7, str(plain))
    assert load("retry_limit: 9").retry_limit == 9  # the guide's own place comes first
    workflows = write(project / "config" / "workflows.yaml", "{}")
    assert load().workflows_file == str(workflows)
    nearer = write(project / "comfyui_agent" / "config" / "workflows.yaml", "{}")
    assert load().workflows_file == str(nearer)


def test_the_sibling_systems_files_are_chosen_by_its_word(load: Load, project: Path) -> None:
    alpha = """\
databases:
  comfyui: "database/alpha_comfyui_agent.db"
  audiobook: "database/alpha_audiobook.db"
paths:
  jobs_processing: "comfyui_jobs/processing"
comfyui:
  api_base_url: "http://${COMFYUI_HOST:-127.0.0.1}:${COMFYUI_PORT:-8000}"
  timeout_seconds: 30000
  retry_limit: 3
  default_priority: 40
  poll_interval_ms: 500
logging:
  level: "INFO"
"""
    write(project / "config" / "global_alpha.yaml", alpha)
    found = load(env={"E3_ENV": "alpha", "COMFYUI_PORT": "8010"})
    assert found.api_base_url == "http://127.0.0.1:8010"
    assert (found.retry_limit, found.default_priority) == (3, 40)
    assert (found.poll_interval, found.job_timeout) == (timedelta(milliseconds=500), timedelta(seconds=30_000))
    assert found.database.reveal() == str(project / "database" / "alpha_comfyui_agent.db")
    assert found.jobs_processing == str(project / "comfyui_jobs" / "processing")
    assert found.warnings == (
        "config/global_alpha.yaml: not settings of this program: databases.audiobook (line 3), logging (line 12)",
    )
    assert load().retry_limit == 2  # without the word the file is not read
    write(project / "config" / "global_config.yaml", "")
    error = refused(load, env={"E3_ENV": "prod"})
    assert "global_prod.yaml" in error.message
    assert "E3_ENV" in refused(load, env={"E3_ENV": "../../etc"}).message


def test_a_main_database_counts_more_than_the_programs_own(load: Load, project: Path) -> None:
    found = load("databases: {comfyui: a.db, main: b.db}")
    assert found.database.reveal() == str(project / "b.db")
    assert load("databases: {main: b.db}\npaths: {database: c.db}").database.reveal() == str(project / "c.db")


def test_a_named_file_brings_its_project_with_it(load: Load, project: Path, tmp_path: Path) -> None:
    file = write(project / "comfyui_agent" / "config" / "other.yaml", "paths: {database: x.db}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for found in (load(cwd=elsewhere, config_file=file), load(cwd=elsewhere, env={"COMFYUI_AGENT_CONFIG": str(file)})):
        assert (found.root, found.config_file) == (str(project), str(file))
        assert found.database.reveal() == str(project / "x.db")
    assert "names no file" in refused(load, config_file=tmp_path / "none.yaml").message
    loose = write(tmp_path / "loose.yaml", "slots: 3\nagent: {slots: 2}")
    assert load(config_file=loose).root == str(tmp_path)
    plain = write(tmp_path / "elsewhere" / "config" / "global_config.yaml", "retry_limit: 4")
    assert load(config_file=plain).root == str(tmp_path / "elsewhere")


def test_the_projects_folder_may_be_named_in_the_environment_and_in_the_file(load: Load, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write(other / "config" / "global_config.yaml", "retry_limit: 5")
    found = load(env={"COMFYUI_AGENT_ROOT": str(other), "COMFYUI_AGENT_JOBS_FINISHED": "here"})
    assert (found.root, found.retry_limit) == (str(other), 5)
    assert found.jobs_finished == str(tmp_path / "project" / "here")  # as a shell would take it
    found = load(f"paths: {{root: '{other.as_posix()}', jobs_finished: out}}")
    assert (found.root, found.jobs_finished) == (str(other), str(other / "out"))
    assert "names no folder" in refused(load, env={"COMFYUI_AGENT_ROOT": str(tmp_path / "none")}).message


# --- every setting --------------------------------------------------------------------------------------------

SAMPLES: dict[str, tuple[str, Any]] = {
    "default_priority": ("7", 7),
    "retry_limit": ("0", 0),
    "poll_interval": ("250", timedelta(milliseconds=250)),
    "stable_for": ("2s", timedelta(seconds=2)),
    "where": ("cloud", "cloud"),
    "api_base_url": ("https://gpu.example:8443/comfy/", "https://gpu.example:8443/comfy"),
    "server_type": ("large", "large"),
    "job_timeout": ("1h30m", timedelta(minutes=90)),
    "lease": ("90", timedelta(seconds=90)),
    "heartbeat": ("5", timedelta(seconds=5)),
    "reap_every": ("3", timedelta(seconds=3)),
    "attach_grace": ("0", timedelta(0)),
    "drain": ("1m", timedelta(minutes=1)),
    "slots": ("4", 4),
    "limit_place": ("2", 2),
    "limit_workflow": ("wf_a=2, *=1", {"wf_a": 2, "*": 1}),
    "limit_job_type": ("T2V=1", {"T2V": 1}),
    "limit_user": ("9", 9),
    "fair_users": ("yes", True),
    "backoff_first": ("0.5", timedelta(milliseconds=500)),
    "backoff_most": ("20", timedelta(seconds=20)),
    "lost_limit": ("4", 4),
    "kill_limit": ("1", 1),
    "idle_after": ("30", timedelta(seconds=30)),
    "wake_interval": ("10", timedelta(milliseconds=10)),
}
PLACES = ("root", "jobs_processing", "jobs_finished", "workflows_file", "database")


def sample(field: str, tmp_path: Path) -> tuple[str, Any]:
    """A text for the setting, and what it means."""
    if field not in PLACES:
        return SAMPLES[field]
    path = tmp_path / "project" / "chosen"
    if field == "workflows_file":
        write(path, "{}")
    else:
        path.mkdir(exist_ok=True)
    return "chosen", Secret(str(path)) if field == "database" else str(path)


@pytest.mark.parametrize("field", [each.name for each in fields(QueueSettings)])
def test_every_field_can_be_set_by_file_environment_and_override(field: str, load: Load, tmp_path: Path) -> None:
    if field in ("config_file", "sources", "warnings"):
        return  # these tell of the others
    (variable,) = [each for each in VARIABLES if each.field == field]
    text, meant = sample(field, tmp_path)
    assert getattr(load(""), field) != meant
    assert getattr(load("", env={variable.name: text}), field) == meant
    assert load("", env={variable.name: text}).sources[field] == "environment"
    assert getattr(load("", overrides={field: text}), field) == meant
    assert getattr(load("", overrides={variable.name: meant}, env={variable.name: "nonsense \0"}), field) == meant
    for key in variable.keys:
        nested = text
        for part in reversed(key.split(".")):
            nested = f"{{{part}: {nested}}}" if nested.startswith("{") else f"{{{part}: '{nested}'}}"
        assert getattr(load(nested), field) == meant, nested
        assert load(nested, env={variable.name: text}).sources[field] == "environment"


def test_no_variable_of_the_queue_is_taken_for_a_misspelt_one() -> None:
    env = {variable.name: "1" for variable in VARIABLES} | {"RUNCOMFY_DATABASE_URL": "postgresql://h/d"}
    env |= {"RUNCOMFY_STATE_DIR": os.devnull, "COMFYUI_AGENT_CONFIG": "x"}
    assert load_settings(env=env).warnings == ()


def test_limits_may_be_written_as_a_tree(load: Load) -> None:
    found = load("executor:\n  limits:\n    machine: 1\n    workflow:\n      wf_a: 2\n      '*': 4\n    user: 3\n")
    assert (found.limit_place, found.limit_workflow, found.limit_user) == (1, {"wf_a": 2, "*": 4}, 3)
    assert "line 4" in refused(load, "agent:\n  limits:\n    user: 1\n    workflow:\n      wf_a: many\n").message


def test_what_is_not_given_follows_from_what_is(load: Load) -> None:
    found = load(env={"COMFYUI_AGENT_LEASE_SECONDS": "6", "COMFYUI_AGENT_BACKOFF_FIRST_SECONDS": "20m"})
    assert (found.heartbeat, found.backoff_most) == (timedelta(seconds=1.5), timedelta(minutes=20))
    assert load(env={"COMFYUI_AGENT_LEASE_SECONDS": "10m"}).heartbeat == timedelta(seconds=15)


# --- databases ------------------------------------------------------------------------------------------------


def test_a_database_on_a_server_counts_by_place_and_never_shows_its_password(load: Load, tmp_path: Path) -> None:
    secret = "postgresql://ada:hunter2@db.example:5433/jobs?sslmode=require"
    found = load("paths: {database: x.db}", env={"RUNCOMFY_DATABASE_URL": secret})
    assert found.database.reveal() == secret
    rows = {row.name: row for row in describe_queue_settings(found)}
    assert rows["COMFYUI_AGENT_DATABASE"].value_shown == "postgresql://***@db.example:5433/jobs"
    assert rows["COMFYUI_AGENT_DATABASE"].source == "environment (RUNCOMFY_DATABASE_URL)"
    assert "hunter2" not in repr(found) + repr(rows)
    found = load(env={"RUNCOMFY_DATABASE_URL": secret, "COMFYUI_AGENT_DATABASE": "mine.db"})
    assert found.database.reveal().endswith("mine.db")
    for text, meant in (("postgres://h/d", "postgresql://h/d"), ("postgresql+psycopg://h/d", "postgresql://h/d")):
        assert load(env={"COMFYUI_AGENT_DATABASE": text}).database.reveal() == meant
    assert load(f"paths: {{database: '{secret}'}}").database.reveal() == secret
    assert load(
        "paths: {database: 'postgresql://a:${PGPASSWORD}@h/d'}", env={"PGPASSWORD": "pw"}
    ).database.reveal() == ("postgresql://a:pw@h/d")
    path = tmp_path / "x.db"
    assert load("", env={"COMFYUI_AGENT_DATABASE": f"sqlite:///{path.as_posix()}"}).database.reveal() == str(path)


@pytest.mark.parametrize(
    "text", ["mysql://root:hunter2@h/d", "sqlite://", "sqlite:///:memory:", "postgresql://h:hunter2/d"]
)
def test_a_database_that_cannot_be_used_is_refused_without_being_repeated(load: Load, text: str) -> None:
    error = refused(load, env={"COMFYUI_AGENT_DATABASE": text})
    assert "COMFYUI_AGENT_DATABASE" in error.message
    assert "hunter2" not in f"{error.message} {error.hint} {error.details}"


def test_a_machines_address_is_not_shown(load: Load) -> None:
    found = load(env={"COMFYUI_AGENT_API_BASE_URL": "https://a1b2c3-comfyui.runcomfy.example"})
    shown = {row.name: row.value_shown for row in describe_queue_settings(found)}
    assert "a1b2c3" not in str(shown)
    assert "runcomfy.example" in shown["COMFYUI_AGENT_API_BASE_URL"]


# --- mistakes -------------------------------------------------------------------------------------------------


def test_every_mistake_is_told_with_file_line_and_key(load: Load) -> None:
    error = refused(
        load,
        "default_priority: 1000\nretry_limit: two\npoll_interval_ms: 5\ncomfyui:\n  api_base_url: 127.0.0.1:8188\n"
        "agent:\n  where: moon\n  slots: [1, 2]\n  limits: {workflow: {a: 0}}\n",
        env={"COMFYUI_AGENT_FAIR_USERS": "maybe"},
    )
    problems = [problem["message"] for problem in error.details["problems"]]
    file = "comfyui_agent/config/global_config.yaml"
    for words in (
        f"{file}, line 1, default_priority: '1000' is not between 1 and 999",
        f"{file}, line 2, retry_limit: 'two' is not a whole number",
        f"{file}, line 3, poll_interval_ms: '5' is less than 0.01 s or more than 3600 s",
        f"{file}, line 5, comfyui.api_base_url is not an address that begins with http:// or https:// and names a host",
        f"{file}, line 7, agent.where: 'moon' is none of server, cloud and pool",
        f"{file}, line 8, agent.slots expected one value, found a list",
        f"{file}, line 9, agent.limits.workflow: '0' is not between 1 and 1000000",
        "COMFYUI_AGENT_FAIR_USERS: 'maybe' is neither true nor false",
    ):
        assert words in problems
    assert len(problems) == 8
    assert all(words in error.message for words in problems)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agent: {lease_seconds: 10, heartbeat_seconds: 6}", "at least twice the heartbeat"),
        ("agent: {backoff_first_seconds: 30, backoff_most_seconds: 20}", "more than agent.backoff_most_seconds"),
        ("retry_limit: 1\nretry_limit: 2", "line 2, retry_limit: it is there twice"),
        ("- a", "expected names with values, found a list"),
        ("retry_limit: [", "this is not YAML"),
        ("paths: {jobs_finished: '~nobodyhere/x'}", "unknown user's home"),
        ("paths: {workflows: none.yaml}", "names no file"),
        ('paths: {database: "a\\tb"}', "has control characters inside"),
        ("agent: {limits: {workflow: two}}", "'two' is not NAME=NUMBER"),
        ("comfyui: {api_base_url: 'http://h/?x=1'}", "has characters inside that the address of a server does not"),
        ("comfyui: {api_base_url: 'http://x/?${RUNCOMFY_API_TOKEN}'}", "may be a secret"),
        ("comfyui: {api_base_url: 'http://${NOWHERE}/'}", "asks for NOWHERE, which is not set"),
    ],
)
def test_what_cannot_be_is_refused(load: Load, text: str, words: str) -> None:
    assert words in refused(load, text, env={"RUNCOMFY_API_TOKEN": "t0ken"}).message


def test_what_is_left_empty_is_as_if_it_were_not_there(load: Load) -> None:
    names = [each.name for each in fields(QueueSettings) if each.name not in ("sources", "config_file")]
    usual = load("")
    for text in ("---\n", "paths:\nagent:\n", "retry_limit: ~\npoll_interval_ms: null\ndefault_priority:\n"):
        assert {name: getattr(load(text), name) for name in names} == {name: getattr(usual, name) for name in names}
    assert load(overrides={"retry_limit": None, "where": ""}).sources["retry_limit"] == "default"


def test_a_folder_of_the_project_that_cannot_be_is_refused_once(load: Load, tmp_path: Path) -> None:
    home = refused(load, env={"COMFYUI_AGENT_ROOT": "~nobodyhere/x"})
    assert len(home.details["problems"]) == 1
    assert "unknown user's home" in home.message
    home = refused(load, "paths: {root: '~nobodyhere/x'}")
    assert len(home.details["problems"]) == 1
    none = refused(load, f"paths: {{root: '{(tmp_path / 'none').as_posix()}'}}")
    assert "line 1, paths.root names no folder" in none.message


def test_misspelt_keys_and_variables_are_named_with_what_was_meant(load: Load) -> None:
    found = load("defualt_priority: 3\nslots: 4\naudio:\n  voice: x\n", env={"COMFYUI_AGENT_RETRYLIMIT": "1"})
    file = "comfyui_agent/config/global_config.yaml"
    assert found.warnings == (
        f"{file}, line 1: defualt_priority is not a setting; did you mean default_priority?",
        f"{file}, line 2: slots is not a setting; did you mean agent.slots?",
        f"{file}: not settings of this program: audio (line 3)",
        "COMFYUI_AGENT_RETRYLIMIT is not a setting; did you mean COMFYUI_AGENT_RETRY_LIMIT?",
    )
    error = refused(load, overrides={"slot": 1})
    assert "did you mean slots?" in error.hint


@given(text=st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_no_file_makes_anything_but_settings_or_the_one_error(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    write(root / "config" / "global_config.yaml", "").write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(SettingInvalid):
        load_queue_settings(settings=default_settings(state_dir=str(root)), env={}, cwd=root)
