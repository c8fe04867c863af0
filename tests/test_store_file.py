"""Where the database may lie, and who may read it."""

# ruff: noqa: ASYNC240 - while a test looks at a file, nobody waits for the loop

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from sqlalchemy.exc import SQLAlchemyError, StatementError

from runcomfy.adapters.stores.errors import local_error
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.adapters.stores.sqlite import SqliteFile, kind_of, network_file_system
from runcomfy.domain.exceptions import DiskFull, LocalError, StoreCorrupt, StoreTooNew, StoreUnavailable
from runcomfy.domain.machine import Machine
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import ready


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "runcomfy.sqlite3"


def a_store(path: Path) -> SqlStore:
    return SqlStore(path, clock=LoopClock(), durable=False)


async def filled(path: Path) -> Machine:
    """Leave a database with one ready machine behind."""
    async with a_store(path) as store:
        return await ready(store)


def test_network_file_systems_are_told_from_local_ones() -> None:
    mounts = [
        ("/", "ext4", "rw"),
        ("/mnt/data", "nfs4", "rw"),
        ("/mnt/data/ssd", "xfs", "rw"),
        ("/z", "ntfs", "rw,remote"),
    ]
    assert kind_of(Path("/home/me"), mounts) is None
    assert kind_of(Path("/mnt/data/state"), mounts) == "nfs4"
    assert kind_of(Path("/mnt/data/ssd/state"), mounts) is None
    assert kind_of(Path("/mnt/database"), mounts) is None
    assert kind_of(Path("/z/state"), mounts) == "a network drive"
    assert kind_of(Path("/home"), []) is None
    assert kind_of(Path("/home"), [*mounts, ("/", "CIFS", "")]) == "cifs"


def test_the_temporary_folder_of_tests_is_on_a_local_disk(tmp_path: Path) -> None:
    assert network_file_system(tmp_path) is None


async def test_a_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = psutil.disk_partitions(all=True)[0]._replace(mountpoint=str(path.parents[1].resolve()), fstype="nfs4")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [part])  # noqa: A006 - psutil's name
    with pytest.raises(StoreUnavailable, match="nfs4") as caught:
        await a_store(path).open()
    assert "RUNCOMFY_STATE_DIR" in caught.value.hint
    assert not path.exists()


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows gives rights by list, not by bits")
@pytest.mark.usefixtures("no_umask")
async def test_nobody_else_can_read_what_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "runcomfy.sqlite3"
    async with SqlStore(path, clock=LoopClock()) as store:
        await ready(store)
        made = {item.name: stat.S_IMODE(item.stat().st_mode) for item in path.parent.iterdir()}
    assert {f"{path.name}{end}" for end in ("", "-wal", "-shm")} <= set(made)
    assert set(made.values()) == {0o600}
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in path.parents[:2]] == [0o700, 0o700]


@pytest.mark.skipif(os.name == "nt", reason="Windows gives rights by list, not by bits")
async def test_a_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    machine = await filled(path)
    path.chmod(0o644)
    async with a_store(path) as store:
        assert await store.machine(machine.id) == machine
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name == "nt", reason="making links needs a right there")
@pytest.mark.parametrize("name", ["", ".lock"])
async def test_a_link_in_the_databases_place_is_not_followed(path: Path, tmp_path: Path, name: str) -> None:
    path.parent.mkdir()
    target = tmp_path / "target"
    target.touch()
    path.with_name(path.name + name).symlink_to(target)
    with pytest.raises(StoreUnavailable):
        await a_store(path).open()
    assert target.read_bytes() == b""


@pytest.mark.parametrize("kind", ["a file where the folder belongs", "a folder where the file belongs"])
async def test_odd_places_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state" / "runcomfy.sqlite3"
    if kind.startswith("a file"):
        path.parent.touch()
    else:
        path.mkdir(parents=True)
    with pytest.raises(StoreUnavailable, match=r"runcomfy\.sqlite3"):
        await a_store(path).open()


@pytest.mark.fault(55)
async def test_opening_waits_only_so_long_for_another_that_opens(path: Path) -> None:
    patience = timedelta(seconds=0.1)
    other = SqliteFile(path, durable=False, busy_timeout=patience)
    store = SqlStore(path, clock=LoopClock(), busy_timeout=patience)
    with other.opening(), pytest.raises(StoreUnavailable, match="locked"):
        await store.open()
    assert (await filled(path)).id


@pytest.mark.fault(55)
async def test_who_writes_in_one_process_takes_turns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not sleep until the other has surely ended, as SQLite would have it."""
    one, other = (SqliteFile(path, durable=False, busy_timeout=timedelta(seconds=30)) for _ in range(2))
    begun, goes_on, order = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        with one.writing():
            begun.set()
            assert goes_on.wait(30)
            order.append("first")

    def second() -> None:
        with other.writing():
            order.append("second")

    monkeypatch.setattr(time, "sleep", None)  # calling it fails
    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(first)
        assert begun.wait(30)
        waiting = threads.submit(second)
        hasty = SqliteFile(path, durable=False, busy_timeout=timedelta(seconds=0.05))
        with pytest.raises(StoreUnavailable, match="locked"), hasty.writing():
            pass
        with SqliteFile(path.with_name("other"), durable=False, busy_timeout=timedelta(seconds=30)).writing():
            order.append("another file")
        goes_on.set()
        writing.result(30)
        waiting.result(30)
    assert order == ["another file", "first", "second"]


FORKS = """
import os, sys
from datetime import timedelta
from pathlib import Path
from runcomfy.adapters.stores.sqlite import SqliteFile

file = SqliteFile(Path(sys.argv[1]), durable=False, busy_timeout=timedelta(seconds=5))
with file.writing():
    if (child := os.fork()) == 0:
        with file.writing():
            os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked there")
def test_a_forked_process_waits_for_nobodys_turn(path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", FORKS, str(path)], check=False, timeout=60).returncode == 7


def of_sqlite(code: int, text: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFull),
        (of_sqlite(sqlite3.SQLITE_FULL, "database or disk is full"), DiskFull),
        (of_sqlite(sqlite3.SQLITE_IOERR_FSYNC, "disk I/O error"), DiskFull),
        (of_sqlite(sqlite3.SQLITE_IOERR_WRITE, "disk I/O error"), DiskFull),
        (of_sqlite(sqlite3.SQLITE_IOERR_READ, "disk I/O error"), StoreUnavailable),
        (OSError(errno.EMFILE, "Too many open files"), StoreUnavailable),
        (OSError(errno.EACCES, "Permission denied"), StoreUnavailable),
        (of_sqlite(sqlite3.SQLITE_CANTOPEN, "unable to open database file"), StoreUnavailable),
        (of_sqlite(sqlite3.SQLITE_READONLY, "attempt to write a readonly database"), StoreUnavailable),
        (of_sqlite(sqlite3.SQLITE_NOMEM, "out of memory"), StoreUnavailable),
        (of_sqlite(sqlite3.SQLITE_CORRUPT, "database disk image is malformed"), StoreCorrupt),
        (sqlite3.OperationalError("no such table: machines"), StoreCorrupt),
        (StoreTooNew("newer"), StoreTooNew),
        (SQLAlchemyError("something\x1b[31m new"), StoreUnavailable),
        (StatementError("(wrapped)", None, None, StoreCorrupt("seen inside")), StoreCorrupt),
    ],
)
def test_every_failure_has_a_word_and_a_way_out(path: Path, error: Exception, ours: type[LocalError]) -> None:
    path.parent.mkdir()
    told = local_error(error, path)
    assert type(told) is ours
    assert "\x1b" not in told.message
    if told is not error and not isinstance(error, StatementError):
        assert str(path) in told.message
        assert told.hint
