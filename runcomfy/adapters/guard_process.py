"""
Starting the guard as a process of its own, which lives on when its parent is killed.

Secrets reach it through its environment only: arguments are seen by every user of a computer. What it says goes into
the log folder. One guard is enough for a state folder and account; a lock, which the system frees when its holder ends
however it ends, tells whether there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.config import describe_settings
from runcomfy.adapters.files import PRIVATE_FILE, local_error, make_private_dir
from runcomfy.adapters.folder_lock import FolderLock
from runcomfy.domain.exceptions import FolderWatched
from runcomfy.domain.settings import Settings

MAX_LOG_BYTES: Final = 1_000_000
"""What guards have said beyond that is thrown away when the next one starts."""
_STARS: Final = "***"
_started: Final[set[int]] = set()
"""Guards that this process started and has not seen end."""


def guard_lock(settings: Settings, account: str) -> FolderLock:
    """Return the lock that the one guard of this state folder and account holds."""
    return FolderLock(Path(settings.files.state_dir), name=f".guard-{account}.lock")


def guard_log(settings: Settings) -> Path:
    """Return the file that a detached guard writes to."""
    return Path(settings.files.state_dir) / "logs" / "guard.log"


def guard_runs(settings: Settings, account: str) -> bool:
    """Return whether there is a guard. Raises LocalError."""
    lock = guard_lock(settings, account)
    try:
        lock.take()
    except FolderWatched:
        return True
    lock.release()
    return False


def start_guard(settings: Settings, account: str, *, database_url: str = "") -> int | None:
    """Start a guard unless there is one, and return its pid; it is not waited for. Blocks for a moment.

    Call it when this process is registered as an owner: a guard stays while there is one that could launch.
    Raises LocalError.
    """
    _bury()
    if guard_runs(settings, account):
        return None
    path = guard_log(settings)
    try:
        make_private_dir(path.parent)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.unlink()
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
    except OSError as error:
        raise local_error(error, path, "write") from error
    try:
        child: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-m", "runcomfy.cli.main", "guard"],
            env=guard_environment(settings, database_url=database_url),
            cwd=settings.files.state_dir,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            close_fds=True,
            **_detached(),
        )
    except OSError as error:
        raise local_error(error, path, "start the guard of") from error
    finally:
        os.close(output)
    child.returncode = 0  # it outlives us on purpose: nobody is to warn that it was not waited for
    _started.add(child.pid)
    return child.pid


def _bury() -> None:
    """Take note of guards of ours that ended: until then each has its place in the system's table of processes."""
    if sys.platform == "win32":
        return
    for pid in tuple(_started):
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # somebody has, or a fork has the set of its parent
            ended = pid
        if ended:
            _started.discard(pid)


def _detached() -> dict[str, Any]:
    """Return what keeps a process alive when its parent, its terminal or its session ends."""
    if sys.platform == "win32":
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_BREAKAWAY_FROM_JOB
        return {"creationflags": flags}
    return {"start_new_session": True}


def guard_environment(
    settings: Settings, *, database_url: str = "", base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the variables that give a guard the same settings as this process has, wherever they came from."""
    environment = dict(os.environ if base is None else base)
    for name in ("FAULT", "FAULT_LOG"):  # a test's way to kill this process, not that one
        environment.pop(name, None)
    for row in describe_settings(settings):
        if row.source not in ("default", "environment") and row.value_shown not in ("", _STARS):
            environment[row.name] = row.value_shown
    cloud, tokens = settings.cloud, settings.cloud.tokens
    environment |= {
        "RUNCOMFY_API_BASE_URL": cloud.base_url,
        "RUNCOMFY_USER_ID": cloud.user_id,
        "RUNCOMFY_STATE_DIR": settings.files.state_dir,
        "RUNCOMFY_CREDENTIALS_FILE": settings.credentials_file or os.devnull,
    }
    for name, token in zip(("RUNCOMFY_API_TOKEN", "RUNCOMFY_API_TOKEN_2"), tokens, strict=False):
        environment[name] = token.reveal()
    if settings.rates_file:
        environment["RUNCOMFY_RATES_FILE"] = settings.rates_file
    if database_url:
        environment["RUNCOMFY_DATABASE_URL"] = database_url
    # `python -m` looks into the working directory first, which is another one there; found as we were found.
    here = str(Path(__file__).resolve().parents[2])
    with suppress(KeyError):
        here = os.pathsep.join((here, environment["PYTHONPATH"]))
    environment["PYTHONPATH"] = here
    return environment
