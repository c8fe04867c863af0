"""What a guard that outlives its starter is given: the same settings, the secrets by its environment alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from runcomfy.adapters import guard_process
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.guard_process import MAX_LOG_BYTES, guard_environment, guard_log, start_guard
from runcomfy.domain.exceptions import LocalError

TOKEN = "canary-token-of-a-test"


def test_a_guard_gets_what_its_starter_was_told_wherever_that_came_from(tmp_path: Path) -> None:
    rates = tmp_path / "rates.toml"
    rates.write_text("as_of = 2026-11-21\n[types.huge]\nhobby = 5\npro = 4\n", encoding="utf-8")
    told = {
        "RUNCOMFY_API_TOKEN": TOKEN,
        "RUNCOMFY_USER_ID": "somebody",
        "RUNCOMFY_RATES_FILE": str(rates),
        "RUNCOMFY_STATE_DIR": str(tmp_path / "state"),
    }
    settings = load_settings(env=told, cwd=tmp_path, overrides={"RUNCOMFY_MACHINE_TIMEOUT": "7m"})
    found = guard_environment(
        settings,
        database_url="postgresql://h/d",
        base={"HOME": "/somewhere", "FAULT": "books.write", "FAULT_LOG": "x", "PYTHONPATH": "mine"},
    )
    assert (found["HOME"], found["RUNCOMFY_DATABASE_URL"]) == ("/somewhere", "postgresql://h/d")
    assert "FAULT" not in found
    assert "FAULT_LOG" not in found
    assert found["PYTHONPATH"].endswith(f"{os.pathsep}mine")
    again = load_settings(env=found, cwd=tmp_path)
    assert again.cloud.boot_timeout == settings.cloud.boot_timeout
    assert again.rates_file == settings.rates_file == str(rates)
    assert [token.reveal() for token in again.cloud.tokens] == [TOKEN]
    assert (again.cloud.user_id, again.files.state_dir) == ("somebody", settings.files.state_dir)


def test_a_long_log_of_earlier_guards_is_thrown_away_and_a_guard_that_runs_is_not_started_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(env={"RUNCOMFY_STATE_DIR": str(tmp_path / "state")}, cwd=tmp_path)
    log = guard_log(settings)
    log.parent.mkdir(parents=True)
    log.write_bytes(b"x" * (MAX_LOG_BYTES + 1))

    def refused(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(LocalError, match="could not start the guard of"):
        start_guard(settings, "account")
    assert log.stat().st_size == 0
    lock = guard_process.guard_lock(settings, "account")
    assert lock.take()
    assert start_guard(settings, "account") is None
    lock.release()
