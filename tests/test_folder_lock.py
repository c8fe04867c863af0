"""The lock of a watched folder: who has it, what becomes of it when the folder goes, and systems that know no locks."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from runcomfy.adapters.folder_lock import LOCK_NAME, FolderLock
from runcomfy.domain.exceptions import FolderWatched, LocalError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="looks at POSIX locks")


def test_who_has_a_folder_has_it_until_it_lets_go(tmp_path: Path) -> None:
    one, other = FolderLock(tmp_path), FolderLock(tmp_path)
    assert one.take()
    assert one.take()  # harmless
    with pytest.raises(FolderWatched, match=f"by process {os.getpid()} on") as refused:
        other.take()
    assert refused.value.details["pid"] == os.getpid()
    one.release()
    one.release()  # harmless, too
    assert other.take()
    other.release()


def test_a_folder_that_was_removed_and_made_again_is_locked_anew(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    one = FolderLock(folder)
    assert one.take()
    shutil.rmtree(folder)
    folder.mkdir()
    assert one.take()
    with pytest.raises(FolderWatched):
        FolderLock(folder).take()
    one.release()


def test_a_lock_whose_holder_left_no_readable_name_is_another_process(tmp_path: Path) -> None:
    one = FolderLock(tmp_path)
    assert one.take()
    (tmp_path / LOCK_NAME).write_text("not json", encoding="utf-8")
    with pytest.raises(FolderWatched, match="by another process"):
        FolderLock(tmp_path).take()
    one.release()


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(LocalError):
        FolderLock(tmp_path / "nowhere").take()


@pytest.fixture
def flock_fails(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The errors that the system's next locks end with, the last one first."""
    import fcntl

    errors: list[int] = []
    locks = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        if errors:
            number = errors.pop()
            raise OSError(number, os.strerror(number))
        locks(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    return errors


def test_a_file_system_without_locks_is_said_and_nothing_is_held(tmp_path: Path, flock_fails: list[int]) -> None:
    flock_fails.append(errno.ENOLCK)
    lock = FolderLock(tmp_path)
    assert not lock.take()
    lock.release()


def test_a_lock_that_the_disk_refuses_is_an_error_of_this_computer(tmp_path: Path, flock_fails: list[int]) -> None:
    flock_fails.append(errno.EIO)
    with pytest.raises(LocalError):
        FolderLock(tmp_path).take()
    lock = FolderLock(tmp_path)
    assert lock.take()
    lock.release()


def test_a_lock_file_that_is_removed_at_each_try_is_somebodys_cleaning_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    tries = 0
    locks = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        nonlocal tries
        tries += 1
        locks(fd, operation)
        (tmp_path / LOCK_NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FolderWatched, match="removed again and again"):
        FolderLock(tmp_path).take()
    assert tries > 1
