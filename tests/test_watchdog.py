"""What keeps a test's programs from outliving the run that started them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runcomfy.testing import watchdog

LASTING = [sys.executable, "-c", "import time; print('runs', flush=True); time.sleep(600)"]
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform == "win32", reason="used for PostgreSQL's programs on POSIX"),
]


def watched(folder: Path, command: list[str]) -> subprocess.Popen[bytes]:
    """Start a program with somebody who watches over it; what it says goes into a file beside the folder."""
    folder.mkdir()
    order = {"command": command, "user": None, "group": None, "log": f"{folder}.log", "folder": str(folder)}
    return subprocess.Popen([sys.executable, watchdog.__file__, json.dumps(order)], stdin=subprocess.PIPE)


@pytest.mark.parametrize(("last_words", "stays"), [(b"", False), (watchdog.KEEP, True)], ids=["killed", "kept"])
def test_a_program_ends_with_who_started_it_and_its_folder_with_it_unless_that_is_to_be_kept(
    tmp_path: Path, last_words: bytes, stays: bool
) -> None:
    folder = tmp_path / "cluster"
    process = watched(folder, LASTING)
    while not Path(f"{folder}.log").exists() or b"runs" not in Path(f"{folder}.log").read_bytes():
        assert process.poll() is None
    process.communicate(last_words, timeout=60)
    assert process.returncode != 0, "the program was ended by a signal"
    assert folder.exists() is stays


def test_a_program_that_ends_by_itself_leaves_its_status_and_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    process = watched(folder, [sys.executable, "-c", "raise SystemExit(7)"])
    assert process.wait(timeout=60) == 7
    assert folder.exists()
    process.communicate()
