"""The settings of the HTTP API: what opens a door counts from the environment only."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest

from runcomfy.adapters.config import describe_settings, load_settings
from runcomfy.domain.exceptions import SettingInvalid
from runcomfy.domain.settings import HttpSettings


def read(**variables: str) -> HttpSettings:
    return load_settings(env={f"RUNCOMFY_{name}": value for name, value in variables.items()}).http


def test_unset_it_is_as_safe_as_it_can_be() -> None:
    http = read()
    assert http == HttpSettings()
    assert (http.host, http.allowed_hosts, http.allow_private, http.webhook_url) == ("127.0.0.1", (), False, None)


def test_every_setting_can_be_set() -> None:
    http = read(
        HTTP_HOST="[::1]",
        HTTP_PORT="0",
        HTTP_CONJURE_OPEN="no",
        HTTP_ALLOWED_HOSTS="Studio.Example, 10.0.0.7,",
        HTTP_MAX_BODY="1000",
        HTTP_MAX_UPLOAD="2000",
        HTTP_MAX_WAITING="3",
        HTTP_MAX_PER_MINUTE="4",
        HTTP_SESSION="30m",
        HTTP_STALLED="20s",
        HTTP_ALLOW_PRIVATE="true",
        WEBHOOK_URL="https://hooks.example/T/secret",
    )
    assert http == HttpSettings(
        host="::1",
        port=0,
        conjure_open=False,
        allowed_hosts=("studio.example", "10.0.0.7"),
        max_body_bytes=1000,
        max_upload_bytes=2000,
        max_waiting=3,
        max_per_minute=4,
        session=timedelta(minutes=30),
        stalled=timedelta(seconds=20),
        allow_private=True,
        webhook_url="https://hooks.example/T/secret",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_HOST", "http://127.0.0.1"),
        ("HTTP_HOST", "127.0.0.1:8000"),
        ("HTTP_HOST", "a b"),
        ("HTTP_HOST", "*"),
        ("HTTP_HOST", "[example]"),
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "-1"),
        ("HTTP_ALLOWED_HOSTS", "*"),
        ("HTTP_ALLOWED_HOSTS", "https://studio.example"),
        ("HTTP_ALLOWED_HOSTS", ","),
        ("HTTP_CONJURE_OPEN", "perhaps"),
        ("HTTP_MAX_BODY", "0"),
        ("HTTP_MAX_PER_MINUTE", "0"),
        ("HTTP_SESSION", "0s"),
        ("HTTP_STALLED", "0s"),
        ("WEBHOOK_URL", "ftp://x.example/"),
        ("WEBHOOK_URL", "https://user:hunter2@x.example/"),
        ("WEBHOOK_URL", "https://x.example/a b"),
        ("WEBHOOK_URL", "hooks.example"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        read(**{name: value})
    assert caught.value.details["setting"] == f"RUNCOMFY_{name}"
    assert "hunter2" not in str(caught.value)


def test_an_address_that_may_hold_a_secret_is_not_shown() -> None:
    settings = load_settings(env={"RUNCOMFY_WEBHOOK_URL": "https://hooks.example/T/secret"})
    row = next(row for row in describe_settings(settings) if row.name == "RUNCOMFY_WEBHOOK_URL")
    assert row.value_shown == "***"
    assert "secret" not in repr(settings)


def test_names_are_shown_as_they_are_written() -> None:
    settings = load_settings(env={"RUNCOMFY_HTTP_ALLOWED_HOSTS": "a.example,b.example"})
    row = next(row for row in describe_settings(settings) if row.name == "RUNCOMFY_HTTP_ALLOWED_HOSTS")
    assert row.value_shown == "a.example,b.example"


@pytest.mark.parametrize(
    "line",
    [
        "RUNCOMFY_HTTP_HOST: 0.0.0.0",
        "RUNCOMFY_HTTP_ALLOWED_HOSTS: evil.example",
        "RUNCOMFY_HTTP_ALLOW_PRIVATE: true",
        "RUNCOMFY_HTTP_CONJURE_OPEN: true",
        "RUNCOMFY_WEBHOOK_URL: https://evil.example/",
    ],
)
def test_a_file_in_a_foreign_folder_opens_nothing(tmp_path: Path, line: str) -> None:
    (tmp_path / "credentials.txt").write_text(f"{line}\n")
    if sys.platform != "win32":
        (tmp_path / "credentials.txt").chmod(0o600)
    settings = load_settings(env={}, cwd=tmp_path)
    assert settings.http == HttpSettings()
    assert any("does not count" in warning for warning in settings.warnings)


def test_what_is_wrong_with_http_keeps_nobody_from_ending_machines() -> None:
    settings = load_settings(env={"RUNCOMFY_HTTP_PORT": "many"}, to_stop=True)
    assert settings.http.port == HttpSettings().port
    assert any("RUNCOMFY_HTTP_PORT" in warning for warning in settings.warnings)
