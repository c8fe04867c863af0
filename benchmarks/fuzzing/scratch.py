"""A folder for inputs that are read as files; in memory where the system has such a place."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

_folder: Path | None = None


def scratch() -> Path:
    """Return it; it goes with the process."""
    global _folder  # noqa: PLW0603
    if _folder is None or not _folder.is_dir():
        memory = Path("/dev/shm")  # noqa: S108 - a private folder below it
        _folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
    return _folder


def forget() -> None:
    """Take another folder from now on: this process is a copy of the one that made the old one."""
    global _folder  # noqa: PLW0603
    _folder = None


def written(name: str, data: bytes) -> Path:
    """Write a file of this name anew and return where it is."""
    path = scratch() / name
    path.write_bytes(data)
    return path
