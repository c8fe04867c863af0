"""Strange things where a file is expected: pipes, devices, folders, links, files that are far too large."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import workflows
from runcomfy.adapters import media
from runcomfy.adapters.canary_file import canary_file, last_outcome
from runcomfy.adapters.dev_server_state import FILE_NAME, DevServerStateManager
from runcomfy.adapters.job_files import YamlJobFiles
from runcomfy.adapters.workflow_files import MAX_BYTES, MAX_SIDECAR_BYTES, WorkflowFiles
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.cli.costs_replay import _read as read_trace
from runcomfy.domain.exceptions import JobFileInvalid, LocalError, RunComfyError
from runcomfy.domain.job import OutputKind
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices with names are not on Windows")

HUGE = 5 * 1024**4
"""Bytes that a file says it has; none of them takes room."""


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


STRANGE: dict[str, Callable[[Path], None]] = {
    "pipe": _pipe,
    "folder": _folder,
    "device": _device,
    "circle": _circle,
    "nowhere": _nowhere,
    "huge": _huge,
}


def _workflow(path: Path) -> object:
    return WorkflowFiles(workflows.names, workflows.load)(str(path))


def _sidecar(path: Path) -> object:
    path.with_suffix(".json").write_text("{}")
    path.rename(path.with_suffix(".toml"))
    return WorkflowFiles(workflows.names, workflows.load)(str(path.with_suffix(".json")))


def _registry(path: Path) -> object:
    return WorkflowRegistry(root=str(path.parent), workflows_file=str(path), shipped=workflows.names).names()


def _job(path: Path) -> object:
    root = str(path.parent)
    registry = WorkflowRegistry(root=root, workflows_file=None, shipped=workflows.names)
    settings = QueueSettings(root=root, jobs_processing=root, jobs_finished=root, database=Secret("unused"))
    files = YamlJobFiles(settings, registry=registry)
    found = files.find(str(path))
    data = files.read(found)
    if isinstance(data, JobFileInvalid):
        raise data
    return files.job(found, data or b"")


def _picture(path: Path) -> None:
    media.check_input_image(path, 1_000_000)


def _result(path: Path) -> object:
    return media.inspect(path, max_pixels=1_000_000, expected=OutputKind.IMAGE)


def _trace(path: Path) -> object:
    if path.is_fifo():
        pytest.skip("a trace may come through a pipe, and is waited for")
    return read_trace(str(path), "all", 0, 5.0)


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("reader", [_workflow, _job, _picture, _result, _trace])
def test_what_is_no_file_is_refused_at_once(reader: Callable[[Path], object], strange: str, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    STRANGE[strange](path)
    with pytest.raises(RunComfyError) as refused:
        reader(path)
    assert refused.value.message
    assert len(refused.value.message) < 2_000


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("reader", [_sidecar, _registry])
def test_a_file_beside_the_one_that_was_named_is_read_or_refused(
    reader: Callable[[Path], object], strange: str, tmp_path: Path
) -> None:
    path = tmp_path / "given.x"
    STRANGE[strange](path)
    with suppress(RunComfyError):
        assert reader(path)


@pytest.mark.parametrize("strange", STRANGE)
def test_state_that_is_no_file_is_no_state(strange: str, tmp_path: Path) -> None:
    STRANGE[strange](canary_file(str(tmp_path), "account"))
    assert last_outcome(str(tmp_path), "account") is None
    STRANGE[strange](tmp_path / FILE_NAME)
    manager = DevServerStateManager(tmp_path / FILE_NAME)
    with suppress(LocalError):
        assert manager.load_server_state() is None


def test_the_limits_are_far_above_what_workflows_have() -> None:
    assert max(len(workflows.load(name)[0]) for name in workflows.names()) * 100 < MAX_BYTES
    assert max(len(workflows.load(name)[1] or "") for name in workflows.names()) * 100 < MAX_SIDECAR_BYTES
