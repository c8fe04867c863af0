"""Settings: one place to look, every mistake named, every value with its source."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import fields
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import state
from runcomfy.adapters.agent_variables import VARIABLES as QUEUE_VARIABLES
from runcomfy.adapters.config import default_settings, load_rates
from runcomfy.adapters.variables import BY_NAME, VARIABLES
from runcomfy.cli.config import config, reference_page
from runcomfy.config import (
    AppSettings,
    CloudSettings,
    ComfySettings,
    FileSettings,
    Settings,
    describe_settings,
    load_settings,
)
from runcomfy.domain.exceptions import ConfigurationError, InsecureUrl, SettingInvalid
from runcomfy.domain.settings import KNOWN_SERVER_TYPES, HttpSettings, PoolSettings, ServerlessSettings

ROOT = Path(__file__).parents[1]


def load(env: dict[str, str] | None = None, *, cwd: Path | None = None, **options: Any) -> Settings:
    """Load settings from these variables alone."""
    return load_settings(env={"RUNCOMFY_CREDENTIALS_FILE": os.devnull, **(env or {})}, cwd=cwd, **options)


# --- merging ------------------------------------------------------------------------------------------------


def test_what_nobody_sets_has_the_default_of_the_dataclass(tmp_path: Path) -> None:
    settings = load({"RUNCOMFY_STATE_DIR": str(tmp_path)})
    assert settings.cloud == CloudSettings()
    assert settings.comfy == ComfySettings()
    assert settings.app == AppSettings()
    assert settings.files == FileSettings(state_dir=str(tmp_path))
    assert settings.sources["RUNCOMFY_POLL_INTERVAL"] == "default"
    assert settings.sources["RUNCOMFY_STATE_DIR"] == "environment"


def test_every_field_of_the_settings_has_a_variable() -> None:
    sections = {
        "cloud": CloudSettings,
        "comfy": ComfySettings,
        "files": FileSettings,
        "app": AppSettings,
        "pool": PoolSettings,
        "http": HttpSettings,
        "serverless": ServerlessSettings,
    }
    wanted = {f"{name}.{f.name}" for name, section in sections.items() for f in fields(section)}
    targets = {variable.target for variable in VARIABLES if variable.target}
    assert {target for target in targets if not target.startswith("budgets.")} == wanted
    assert len(BY_NAME) == len(VARIABLES)


@pytest.mark.parametrize(
    ("name", "text", "section", "field", "value"),
    [
        (
            "RUNCOMFY_API_BASE_URL",
            "https://beta-api.runcomfy.net/",
            "cloud",
            "base_url",
            "https://beta-api.runcomfy.net",
        ),
        ("RUNCOMFY_API_BASE_URL", "http://127.0.0.1:8080", "cloud", "base_url", "http://127.0.0.1:8080"),
        ("RUNCOMFY_API_BASE_URL", "http://[::1]:80", "cloud", "base_url", "http://[::1]:80"),
        ("RUNCOMFY_DEFAULT_SERVER_TYPE", "2xl-turbo", "cloud", "server_type", "2xl-turbo"),
        ("RUNCOMFY_DEFAULT_DURATION", "7200", "cloud", "duration", timedelta(hours=2)),
        ("RUNCOMFY_DEFAULT_DURATION", "1h30m", "cloud", "duration", timedelta(minutes=90)),
        ("RUNCOMFY_MACHINE_TIMEOUT", "1800", "cloud", "boot_timeout", timedelta(minutes=30)),
        ("RUNCOMFY_POLL_INTERVAL", "0.5", "cloud", "poll_interval", timedelta(milliseconds=500)),
        ("RUNCOMFY_MAX_RETRIES", "0", "cloud", "max_retries", 0),
        ("RUNCOMFY_PLAN", "Hobby", "cloud", "plan", "payg"),
        ("RUNCOMFY_MAX_USD_PER_HOUR", "$2.50", "cloud", "max_usd_per_hour", Decimal("2.50")),
        ("RUNCOMFY_REQUESTS_PER_SECOND", "0.5", "cloud", "requests_per_second", 0.5),
        ("COMFYUI_EXECUTION_TIMEOUT", "3600", "comfy", "execution_timeout", timedelta(hours=1)),
        ("COMFYUI_POLL_INTERVAL", "5s", "comfy", "poll_interval", timedelta(seconds=5)),
        ("COMFYUI_MAX_RETRIES", " 9 ", "comfy", "max_retries", 9),
        ("RUNCOMFY_DURABLE", "no", "files", "durable", False),
        ("CONJURE_AUTO_SHUTDOWN", "TRUE", "app", "auto_shutdown", True),
        ("CONJURE_MACHINE_REUSE", "0", "app", "machine_reuse", False),
        ("CONJURE_IDLE_TIMEOUT", "600", "app", "idle_timeout", timedelta(minutes=10)),
        ("RUNCOMFY_LOG_LEVEL", "debug", "app", "log_level", "DEBUG"),
    ],
)
def test_a_variable_sets_its_field(name: str, text: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(load({name: text}), section), field) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("RUNCOMFY_POLL_INTERVAL", "soon"),
        ("RUNCOMFY_POLL_INTERVAL", "0"),
        ("RUNCOMFY_DEFAULT_DURATION", "-5"),
        ("RUNCOMFY_DEFAULT_DURATION", "9999d"),
        ("RUNCOMFY_MAX_RETRIES", "3.5"),
        ("RUNCOMFY_MAX_RETRIES", "-1"),
        ("RUNCOMFY_MAX_RETRIES", "9" * 5000),
        ("RUNCOMFY_BURST", "0"),
        ("RUNCOMFY_STOP_RESERVE", "5"),
        ("RUNCOMFY_REQUESTS_PER_SECOND", "nan"),
        ("RUNCOMFY_REQUESTS_PER_SECOND", "0"),
        ("RUNCOMFY_MAX_USD_PER_HOUR", "NaN"),
        ("RUNCOMFY_MAX_USD_PER_HOUR", "free"),
        ("RUNCOMFY_PLAN", "gold"),
        ("RUNCOMFY_DEFAULT_SERVER_TYPE", "two words"),
        ("RUNCOMFY_DURABLE", "perhaps"),
        ("RUNCOMFY_LOG_LEVEL", "loud"),
        ("RUNCOMFY_STATE_DIR", "~nobody-of-that-name/state"),
        ("RUNCOMFY_STATE_COPIES", "~nobody-of-that-name/state"),
        ("RUNCOMFY_STATE_DIR", "state\0"),
        ("RUNCOMFY_SERVERLESS_FILE_HOSTS", "files.example, two words"),
        ("RUNCOMFY_RATES_FILE", "nowhere.toml"),
        ("RUNCOMFY_API_BASE_URL", "api.runcomfy.net"),
        ("RUNCOMFY_API_BASE_URL", "ftp://api.runcomfy.net"),
        ("RUNCOMFY_API_BASE_URL", "https://"),
        ("RUNCOMFY_API_BASE_URL", "https://[::1"),
        ("RUNCOMFY_API_BASE_URL", "https://host:99999"),
        ("RUNCOMFY_API_BASE_URL", "https://a b.example"),
        ("RUNCOMFY_API_BASE_URL", "https://host/prod/api"),
        ("RUNCOMFY_API_BASE_URL", "https://host?x=1"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_variable_and_what_to_write(name: str, text: str) -> None:
    with pytest.raises(SettingInvalid) as invalid:
        load({name: text})
    assert name in f"{invalid.value.message} {invalid.value.hint}"
    assert invalid.value.hint
    assert len(invalid.value.message) < 300


@pytest.mark.parametrize(
    "address", ["http://api.runcomfy.net", "http://127.0.0.1.evil.example", "http://10.0.0.1", "http://localhost.evil"]
)
def test_an_address_in_the_clear_is_refused_unless_it_is_this_computer(address: str) -> None:
    with pytest.raises(InsecureUrl, match="unencrypted"):
        load({"RUNCOMFY_API_BASE_URL": address})


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingInvalid) as invalid:
        load({"RUNCOMFY_API_BASE_URL": "https://me:canary@api.runcomfy.net"})
    assert "canary" not in f"{invalid.value} {invalid.value.hint} {invalid.value.details}"


def test_overrides_win_by_variable_or_by_field() -> None:
    overrides = {
        "RUNCOMFY_PLAN": "pro",
        "comfy.max_retries": 1,
        "cloud.duration": timedelta(minutes=5),
        "app.log_level": None,
    }
    settings = load({"RUNCOMFY_PLAN": "payg", "COMFYUI_MAX_RETRIES": "2"}, overrides=overrides)
    assert (settings.cloud.plan, settings.comfy.max_retries) == ("pro", 1)
    assert settings.cloud.duration == timedelta(minutes=5)
    assert settings.sources["COMFYUI_MAX_RETRIES"] == "override"
    assert settings.sources["RUNCOMFY_LOG_LEVEL"] == "default"


def test_an_override_that_is_no_setting_is_refused() -> None:
    with pytest.raises(SettingInvalid, match="RUNCOMFY_PLN"):
        load(overrides={"RUNCOMFY_PLN": "pro"})


def test_an_empty_variable_counts_as_not_set() -> None:
    settings = load({"RUNCOMFY_PLAN": "", "RUNCOMFY_POLL_INTERVAL": "  "})
    assert settings.sources["RUNCOMFY_PLAN"] == settings.sources["RUNCOMFY_POLL_INTERVAL"] == "default"


@given(
    name=st.sampled_from([v.name for v in VARIABLES if v.name != "RUNCOMFY_CREDENTIALS_FILE"]),
    text=st.text(st.characters(exclude_characters="\0"), max_size=30),
)
def test_any_text_in_any_variable_gives_settings_or_one_of_our_errors(name: str, text: str) -> None:
    try:
        settings = load({name: text})
    except ConfigurationError as error:
        assert name in f"{error.message} {error.hint}"  # noqa: PT017 - both ends are right, this one must say why
        return
    assert {row.name for row in describe_settings(settings)} == set(BY_NAME)


# --- places -------------------------------------------------------------------------------------------------


def test_the_state_folder_is_the_one_that_is_named_else_the_checkouts(tmp_path: Path) -> None:
    assert state.path({"RUNCOMFY_STATE_DIR": str(tmp_path / "a" / ".." / "b")}) == tmp_path / "b"
    assert state.path({"RUNCOMFY_STATE_DIR": " "}) == ROOT / "state"
    assert state.path({}) == ROOT / "state"
    assert load({}).files.state_dir == str(ROOT / "state")
    assert load({"RUNCOMFY_STATE_DIR": "here"}, cwd=tmp_path).files.state_dir == str(tmp_path / "here")


def test_installed_the_state_lies_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "state" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(Path(state.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("installed_state", installed)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    found = module.path({})
    assert found.name == "runcomfy-orchestrator"
    assert not found.is_relative_to(tmp_path / "site-packages")


def test_copies_of_the_state_file_may_be_files_or_folders(tmp_path: Path) -> None:
    (tmp_path / "conjure").mkdir()
    text = os.pathsep.join(["conjure", "other.json", f"new{os.sep}", "", "conjure"])
    assert load({"RUNCOMFY_STATE_COPIES": text}, cwd=tmp_path).files.state_copies == (
        str(tmp_path / "conjure" / "dev_server_state.json"),
        str(tmp_path / "other.json"),
        str(tmp_path / "new" / "dev_server_state.json"),
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot remove the working directory")
def test_a_working_directory_that_is_gone_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(SettingInvalid, match="working directory"):
        load()
    monkeypatch.chdir(tmp_path)


# --- warnings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RUNCOMFY_POL_INTERVAL", "RUNCOMFY_POLL_INTERVAL"),
        ("RUNCOMFY_TOKEN", None),
        ("COMFYUI_MAX_RETRYS", "COMFYUI_MAX_RETRIES"),
        ("RUNCOMFY_SOMETHING_ELSE_ENTIRELY", None),
    ],
)
def test_a_mistyped_variable_is_warned_about(name: str, meant: str | None) -> None:
    (warning,) = load({name: "1"}).warnings
    assert name in warning
    assert meant is None or f"did you mean {meant}?" in warning


@pytest.mark.parametrize(
    "name", ["RUNCOMFY_REQUEST_TIMEOUT", "RUNCOMFY_DEPLOYMENT_ID", "COMFYUI_PATH", "CONJURE_HOME", "PATH"]
)
def test_variables_of_others_are_left_alone(name: str) -> None:
    settings = load({name: "1800"})
    assert settings.warnings == ()
    assert settings.cloud.request_timeout == timedelta(seconds=30)


def test_the_wrong_domain_is_warned_about() -> None:
    assert any(
        ".net, not .com" in warning for warning in load({"RUNCOMFY_API_BASE_URL": "https://api.runcomfy.com"}).warnings
    )


def test_a_machine_type_without_a_price_is_warned_about() -> None:
    settings = load({"RUNCOMFY_DEFAULT_SERVER_TYPE": "9x-large"})
    assert settings.rates.find("9x-large") is None
    assert any("9x-large has no payg price" in warning for warning in settings.warnings)


# --- rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "prices"),
    [("payg", ["0.99", "1.75", "2.50", "4.99", "7.49"]), ("pro", ["0.79", "1.39", "1.99", "3.99", "5.99"])],
)
def test_the_shipped_prices_are_runcomfys_list(plan: str, prices: list[str]) -> None:
    table = load({"RUNCOMFY_PLAN": plan}).rates
    rates = [table.find(name) for name in KNOWN_SERVER_TYPES]
    assert [str(rate.usd_per_hour) for rate in rates if rate] == prices
    assert all(rate and rate.tested and rate.gpu and rate.vram_gb and rate.plan == plan for rate in rates)
    assert set(table.rates) == set(KNOWN_SERVER_TYPES)
    assert isinstance(table.as_of, date)
    assert all(rate and table.as_of.isoformat() in rate.source for rate in rates)


def rates_file(folder: Path, text: str) -> Path:
    path = folder / "rates.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_users_prices_are_laid_over_the_shipped_ones(tmp_path: Path) -> None:
    types = "[types.medium]\npayg = 1.05\n[types.h200-x]\npayg = 8.75\npro=6.99\n[types.only-pro]\npro = 3\n"
    rates_file(tmp_path, f"as_of = 2027-01-02\n{types}")
    settings = load({"RUNCOMFY_RATES_FILE": "rates.toml", "RUNCOMFY_DEFAULT_SERVER_TYPE": "h200-x"}, cwd=tmp_path)
    medium, large, added = (settings.rates.find(name) for name in ("medium", "large", "h200-x"))
    assert medium is not None
    assert medium.usd_per_hour == Decimal("1.05")
    assert "2027-01-02" in medium.source
    assert large is not None
    assert "2027-01-02" not in large.source
    assert added is not None
    assert (added.usd_per_hour, added.tested) == (Decimal("8.75"), False)
    assert settings.rates.find("only-pro") is None
    assert settings.rates.as_of == date(2027, 1, 2)
    assert any("h200-x" in warning and "untested" in warning for warning in settings.warnings)
    assert settings.rates_file == str(tmp_path / "rates.toml")


def test_a_users_prices_may_stand_alone(tmp_path: Path) -> None:
    path = rates_file(tmp_path, "as_of = 2027-01-02\nreplace = true\n[types.medium]\npayg = 1\n")
    assert set(load_rates(plan="payg", extra=path).rates) == {"medium"}


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "as_of = 2027-01-02",
        "[types.medium]\npayg = 1",
        "as_of = 2027-01-02T00:00:00Z\n[types.medium]\npayg = 1",
        "as_of = 2027-01-02\ntypes = 3",
        "as_of = 2027-01-02\n[types]\nmedium = 3",
        'as_of = 2027-01-02\n[types.medium]\npayg = "cheap"',
        "as_of = 2027-01-02\n[types.medium]\npayg = -1",
        "as_of = 2027-01-02\n[types.medium]\npayg = 0",
        "as_of = 2027-01-02\n[types.medium]\npayg = nan",
        "as_of = 2027-01-02\n[types.medium]\npro = inf",
        "as_of = 2027-01-02\n[types.medium]\npayg = true",
        "as_of = 2027-01-02\n[types.medium]\npayg = 99999999",
        'as_of = 2027-01-02\n[types."two words"]\npayg = 1',
        "as_of = 2027-01-02\nformat = 2\n[types.medium]\npayg = 1",
        "as_of = 2027-01-02\nx = " + "[" * 5000,
        "as_of = 2027-01-02\n[types.medium]\npayg = 1\n" + "#" * 1024 * 1024,
    ],
)
def test_a_broken_rate_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = rates_file(tmp_path, text)
    with pytest.raises(SettingInvalid) as invalid:
        load_rates(plan="payg", extra=path)
    assert str(path) in invalid.value.message


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_rate_table_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rates") / "rates.toml"
    path.write_bytes(data)
    with pytest.raises(SettingInvalid, match="rate table"):
        load_rates(plan="payg", extra=path)


# --- showing ------------------------------------------------------------------------------------------------


def test_secrets_are_stars_and_every_value_has_its_source() -> None:
    env = {"RUNCOMFY_API_TOKEN": "canary-token", "RUNCOMFY_USER_ID": "canary-user", "RUNCOMFY_POLL_INTERVAL": "90"}
    rows = {row.name: row for row in describe_settings(load(env))}
    assert "canary" not in repr(rows)
    assert rows["RUNCOMFY_API_TOKEN"].value_shown == rows["RUNCOMFY_USER_ID"].value_shown == "***"
    assert rows["RUNCOMFY_API_TOKEN_2"].value_shown == ""
    assert (rows["RUNCOMFY_POLL_INTERVAL"].value_shown, rows["RUNCOMFY_POLL_INTERVAL"].source) == (
        "1m30s",
        "environment",
    )
    assert rows["RUNCOMFY_POLL_INTERVAL"].unit == "duration"
    assert rows["CONJURE_AUTO_SHUTDOWN"].value_shown == "false"


def test_config_show_prints_every_setting_and_the_warnings_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNCOMFY_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("RUNCOMFY_API_TOKEN", "canary-token")
    monkeypatch.setenv("RUNCOMFY_PLN", "pro")
    result = CliRunner().invoke(config, ["show"])
    assert result.exit_code == 0
    assert "canary" not in result.output
    assert all(name in result.stdout for name in BY_NAME)
    assert all(variable.name in result.stdout for variable in QUEUE_VARIABLES)
    assert result.stderr == "warning: RUNCOMFY_PLN is not a setting; did you mean RUNCOMFY_PLAN?\n"


def test_config_show_json_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNCOMFY_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("RUNCOMFY_USER_ID", "canary-user")
    result = CliRunner().invoke(config, ["show", "--json"])
    shown = json.loads(result.stdout)
    rows = {row["name"]: row for row in shown["settings"]}
    assert rows["RUNCOMFY_USER_ID"]["value"] == "***"
    assert rows["RUNCOMFY_USER_ID"]["source"] == "environment"
    assert set(rows["RUNCOMFY_PLAN"]) == {"name", "value", "source", "unit", "help"}
    assert shown["warnings"] == []


def test_the_reference_page_is_current_and_has_every_setting() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: comfyctl config reference > docs/reference/settings.md"
    headings = [line.split(" ", 1) for line in page.splitlines() if line.startswith("##")]
    assert [words for mark, words in headings if mark == "##"] == [*(v.name for v in VARIABLES), "The queue"]
    assert [words for mark, words in headings if mark == "###"] == [v.name for v in QUEUE_VARIABLES]


def test_defaults_are_described_without_any_source() -> None:
    rows = describe_settings(default_settings(state_dir="somewhere"))
    assert {row.source for row in rows} == {"default"}
