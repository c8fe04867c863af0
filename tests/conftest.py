"""Shared by every test: no test reads the developer's own environment, credentials or state."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from hypothesis import HealthCheck, settings
from PIL import Image

from runcomfy.adapters.log import unconfigure_logging
from runcomfy.cli.main import call, comfyctl
from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.settings import CloudSettings, PoolSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.comfyui_clients import a_client
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, settings_for
from runcomfy.testing.remembered import Remembered
from runcomfy.testing.rented_pools import RunningPool, running_pool
from runcomfy.testing.signals import no_longer_ignored
from runcomfy.testing.worker_stories import workers_at
from runcomfy.testing.workers import Worker, Workers

pytest_plugins = ["runcomfy.testing.plugin"]

# The contract suites ship with the package; their asserts are to explain themselves like those in this folder.
pytest.register_assert_rewrite("runcomfy.testing.contracts")


# In every check fewer examples than Hypothesis takes by itself (100); every night many more.
settings.register_profile("default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("nightly", deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_sessionstart() -> None:
    """Start programs that can be interrupted, and have the policy make no event loops of its own.

    pytest-asyncio and looptime ask it for the current one, also in plain tests; as long as nobody has ever set one it
    makes one, which nobody closes. Once one was set, be it none, it makes no more.
    """
    no_longer_ignored()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        asyncio.set_event_loop(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have virtual time look once, not 42 times, whether anything happens before it goes on; begin with the page.

    What happens in the loop, in its executors and between its own sockets happens before that; the looks were a third
    of the processor time of the stories. The tests of the page mostly wait, for up to half a minute each: as the last
    ones they would leave all other workers without anything to do.
    """
    items.sort(key=lambda item: item.path.parent.name != "web")
    for item in items:
        item.add_marker(pytest.mark.looptime(noop_cycles=1))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Read the tests, as each worker does, in little time.

    Having asserts explain themselves takes most of it: what pytest has made of a file is kept, whole or not at all,
    also where the processes that tests start and kill are to leave nothing behind. And what is read stays: nobody looks
    for garbage among it, now or later.
    """
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    gc.disable()
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = writes_none
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _migrations_replayed() -> Iterator[None]:
    """Make each empty SQLite database from remembered statements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "upgrade", Remembered(command.upgrade).upgrade)
        yield


@pytest.fixture(scope="session", autouse=True)
def _packages_looked_through_once() -> Iterator[None]:
    """Look for what installed packages add once, and again where another path is looked through."""
    look = metadata.entry_points

    @cache
    def found(path: tuple[str, ...], **which: str) -> Any:
        return look(**which)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "entry_points", lambda **which: found(tuple(sys.path), **which))
        yield


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


@pytest.fixture
def comfyui(comfyui_server: ComfyUIEmulator) -> ComfyUIEmulator:
    """An emulated ComfyUI, where nothing else is said of it."""
    return comfyui_server


@pytest.fixture
async def client(comfyui: ComfyUIEmulator) -> AsyncIterator[ComfyUIWorkflowClient]:
    """A client of it, under virtual time."""
    async with a_client(comfyui.url) as client:
        yield client


@pytest.fixture
def workers(comfyui: ComfyUIEmulator, tmp_path: Path, clock: LoopClock) -> Workers:
    """What starts workers on that server, with a queue in the test's folder."""
    return workers_at(comfyui, tmp_path, clock)


@pytest.fixture
async def worker(workers: Workers) -> AsyncIterator[Worker]:
    """One of them, which works during the test."""
    async with workers.start() as worker:
        yield worker


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    """Programs that share an emulated account and a state folder."""
    return Programs(cloud, settings_for(cloud_settings, tmp_path / "state"), clock)


@pytest.fixture
async def program(programs: Programs) -> AsyncIterator[Program]:
    """One of them, which runs during the test."""
    async with programs.start() as program:
        yield program


@pytest.fixture
def keepers(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    """Programs that may keep a pool of up to four machines of one account, one after the other."""
    ours = settings_for(cloud_settings, tmp_path / "state")
    return Programs(cloud, replace(ours, pool=PoolSettings(max_machines=4)), clock)


@pytest.fixture
async def pool(program: Program) -> AsyncIterator[RunningPool]:
    """The pool of `program`; tests close it themselves, in virtual time."""
    async with running_pool(program) as pool:
        yield pool


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of one colour, 64 by 48."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 48), (200, 100, 50)).save(path)
    return path


@pytest.fixture
def comfy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run comfyctl in a folder of the test's own; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = call(comfyctl, list(arguments))
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run
