"""Shared by every test: no test reads the developer's own environment, credentials or state."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from runcomfy.adapters.log import unconfigure_logging

pytest_plugins = ["runcomfy.testing.plugin"]

# The contract suites ship with the package; their asserts are to explain themselves like those in this folder.
pytest.register_assert_rewrite("runcomfy.testing.contracts")

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_sessionstart() -> None:
    """Have the policy make no event loops of its own.

    pytest-asyncio and looptime ask it for the current one, also in plain tests; as long as nobody has ever set one it
    makes one, which nobody closes. Once one was set, be it none, it makes no more.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop(None)


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A user's variables or credentials.txt must not reach a test, nor a test the user's state."""
    for name in list(os.environ):
        if name.startswith(("RUNCOMFY_", "COMFYUI_", "CONJURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("RUNCOMFY_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("RUNCOMFY_GUARD", "false")  # a process that outlives its test; stories about it start it
    yield
    unconfigure_logging()
