"""
The database as a file: made so that nobody else can read it, refused where SQLite cannot keep its promises.

A server's database (PostgreSQL) has none of these cares; they are kept apart from `sql.py` for that.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import psutil
from sqlalchemy import Connection, Engine, StaticPool, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from runcomfy.adapters.stores.database import WRITES
from runcomfy.adapters.stores.errors import corrupt, local_error, locked
from runcomfy.adapters.stores.waking import Listener
from runcomfy.domain.exceptions import RunComfyError, StoreUnavailable

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs3", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afpfs", "afs", "ncpfs", "webdav", "davfs", "ceph"}
    | {"lustre", "beegfs", "gpfs", "glusterfs", "sshfs"}
    | {f"fuse.{name}" for name in ("sshfs", "rclone", "s3fs", "gcsfuse", "goofys", "glusterfs", "ceph", "davfs2")}
)
"""What SQLite's write-ahead log does not work on: its readers share memory, which other computers do not have.
Not in the list are file systems that are sometimes local (9p, virtiofs): there the attempt to switch it on decides."""

IN_MEMORY: Final = Path(":memory:")
"""Not a file: a database that ends with its store, for whom no file can be had."""

_CHECKED_UP_TO_BYTES: Final = 64 * 1024 * 1024
"""Files larger than this are not read through at every start."""

_RETRY_LOCK_AFTER_SECONDS: Final = 0.01


class _Turn:
    """Held by whoever of this process writes to a file."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class _Turns:
    """What all who write to a file in this process take turns by, for each file that is in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_path: WeakValueDictionary[Path, _Turn] = WeakValueDictionary()

    def of(self, path: Path) -> _Turn:
        with self._lock:
            return self._by_path.setdefault(path.absolute(), _Turn())

    def forget(self) -> None:
        """Begin anew in a forked process: whoever wrote is not there."""
        self._lock = threading.Lock()
        for turn in list(self._by_path.values()):
            turn.lock = threading.Lock()


_TURNS: Final = _Turns()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_TURNS.forget)


class SqliteFile:
    """One database file. Every method blocks and belongs into the store's thread."""

    def __init__(
        self,
        path: Path,
        *,
        durable: bool,
        busy_timeout: timedelta,
        wake_interval: timedelta = timedelta(milliseconds=3),
    ) -> None:
        self.path = path
        self._wake_interval = wake_interval
        self._durable = durable
        self._busy_seconds = busy_timeout.total_seconds()
        self._turn = _Turn() if path == IN_MEMORY else _TURNS.of(path)
        # Windows writes the time of a file down when it is closed.
        self._log = None if path == IN_MEMORY or os.name == "nt" else path.with_name(f"{path.name}-wal")

    @property
    def where(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def changes_seen_by_polling(self) -> timedelta | None:
        """How often `PRAGMA data_version` is asked while somebody waits."""
        return self._wake_interval

    def written_ago(self) -> float | None:
        """Return how old the newest entry of the write-ahead log is: whoever commits has written one before.

        Only asked for its times, never opened: closing a handle would drop the locks of this process's connections.
        """
        if self._log is None:
            return None
        try:
            at = self._log.stat().st_mtime_ns
        except OSError:
            return None
        if at % 1_000_000_000 == 0:
            return None  # most likely a file system that counts in whole seconds
        ago = time.time() - at / 1e9
        return ago if ago >= 0 else None

    @property
    def shareable(self) -> bool:
        """What is in memory belongs to one connection."""
        return self.path != IN_MEMORY

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Also what the file system says, and text that is none."""
        return (SQLAlchemyError, sqlite3.Error, OSError, UnicodeDecodeError)

    def error(self, error: Exception) -> RunComfyError:
        """Return what an error of SQLite or of the system means."""
        return local_error(error, self.path)

    def upgrading(self, connection: Connection) -> None:
        """Whoever opens the file is alone with it already."""

    def try_again(self, error: Exception) -> bool:
        """SQLite waits by itself; who was refused has waited long enough."""
        return False

    def time(self, connection: Connection) -> datetime | None:
        """Everybody who opens the file lives by this computer's clock."""
        return None

    def version(self, connection: Connection) -> Callable[[], int]:
        """Return what tells a number that is another one after somebody else's commit."""
        ask = raw(connection).execute

        def version() -> int:
            return int(ask("PRAGMA data_version").fetchone()[0])

        return version

    def changes(self, connection: Connection) -> int | None:
        """Return how many rows this connection ever changed."""
        return raw(connection).total_changes

    def listen(self, changed: Callable[[], None]) -> Listener:
        """A file does not call: it is asked (`changes_seen_by_polling`)."""
        raise NotImplementedError("a file is asked for changes")

    def reading(self, engine: Engine) -> Engine:
        """Reads are transactions: they begin without a lock, and cost nothing."""
        return engine

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Take turns with the other connections of this process.

        SQLite would let them wait as it does for other processes, by sleeping: each time longer, up to 0.1 s, while
        the file may be free. Raises StoreUnavailable if it is not one's turn within the time for a lock.
        """
        lock = self._turn.lock
        if not lock.acquire(timeout=self._busy_seconds):
            raise locked(self.path)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Be the only one, of all processes, who makes or upgrades the file; make the folder first.

        Raises StoreUnavailable if another process does not come to an end, or the file is on another computer.
        """
        if self.path == IN_MEMORY:
            yield
            return
        self._make_folder()
        where = self.path.parent.resolve()
        if (kind := network_file_system(where)) is not None:
            raise StoreUnavailable(
                f"{where} is on a network file system ({kind}), where SQLite loses data",
                hint="set RUNCOMFY_STATE_DIR to a folder on a disk of this computer",
            )
        lock = os.open(self.path.with_name(self.path.name + ".lock"), _flags(os.O_CREAT | os.O_RDWR), 0o600)
        try:
            deadline = time.monotonic() + self._busy_seconds
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise locked(self.path)
                time.sleep(_RETRY_LOCK_AFTER_SECONDS)
            self._make_file()
            yield
        finally:
            os.close(lock)  # which also unlocks it

    def engine(self) -> Engine:
        """Return an engine with one connection, in which transactions begin as WRITES says."""
        # hide_parameters: values (a machine's id is part of its address) stay out of error texts.
        engine = create_engine("sqlite://", creator=self._connect, poolclass=StaticPool, hide_parameters=True)
        event.listen(engine, "begin", _begin)
        return engine

    def check(self, connection: Connection) -> None:
        """Raise StoreCorrupt if the file's pages contradict themselves. Files above 64 MB are not read through."""
        if self.path == IN_MEMORY or self.path.stat().st_size > _CHECKED_UP_TO_BYTES:
            return
        verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise corrupt(self.path, str(verdict))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=self._busy_seconds,
            isolation_level=None,  # transactions begin and end where we say
            check_same_thread=False,  # the pool may close it from another thread; it is used from one
            cached_statements=256,
        )
        try:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal" and self.path != IN_MEMORY:
                raise StoreUnavailable(
                    f"the file system of {self.path} does not support SQLite's write-ahead log",
                    hint="set RUNCOMFY_STATE_DIR to a folder on a disk of this computer",
                )
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'NORMAL'}")
            if self._durable:
                connection.execute("PRAGMA fullfsync=ON")  # macOS: reach the platter, not only the disk's cache
                connection.execute("PRAGMA checkpoint_fullfsync=ON")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA cell_size_check=ON")
        except UnicodeDecodeError as error:
            # SQLite quotes the damaged schema in its message, and Python cannot read the quotation.
            connection.close()
            raise corrupt(self.path, "its schema is not text") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_folder(self) -> None:
        missing = [folder for folder in (self.path.parent, *self.path.parent.parents) if not folder.exists()]
        for folder in reversed(missing):
            try:
                folder.mkdir(0o700)
            except FileExistsError:
                continue  # another process was quicker
            _sync_folder(folder.parent)

    def _make_file(self) -> None:
        try:
            handle = os.open(self.path, _flags(os.O_CREAT | os.O_EXCL | os.O_RDWR), 0o600)
        except FileExistsError:
            # Never opened here: closing any handle of the file would drop the locks of this process's connections.
            found = self.path.lstat()
            if not stat.S_ISREG(found.st_mode):
                raise StoreUnavailable(
                    f"{self.path} is not a file of its own",
                    hint="name the real folder with RUNCOMFY_STATE_DIR instead of linking the database",
                ) from None
            if os.name != "nt" and stat.S_IMODE(found.st_mode) & 0o077:
                self.path.chmod(0o600)
            return
        os.close(handle)
        _sync_folder(self.path.parent)


def network_file_system(folder: Path) -> str | None:
    """Return the kind of network file system a folder is on, or None if it is local or cannot be told."""
    if sys.platform == "win32" and str(folder).startswith("\\\\"):
        return "a network share"
    try:
        parts = psutil.disk_partitions(all=True)
    except (OSError, RuntimeError):
        return None
    return kind_of(folder, ((part.mountpoint, part.fstype, part.opts) for part in parts))


def kind_of(folder: Path, mounts: Iterable[tuple[str, str, str]]) -> str | None:
    """Return the network file system among `mounts` (where, kind, options) that holds the folder, or None."""
    holding = [mount for mount in mounts if folder.is_relative_to(mount[0])]
    if not holding:
        return None
    # Of mounts on the same place, the last one covers the others.
    _, kind, options = max(enumerate(holding), key=lambda item: (len(Path(item[1][0]).parts), item[0]))[1]
    if kind.lower() in NETWORK_FILE_SYSTEMS:
        return kind.lower()
    return "a network drive" if "remote" in options.split(",") else None


def raw(connection: Connection) -> sqlite3.Connection:
    """Return the driver's own connection."""
    driver: sqlite3.Connection = connection.connection.dbapi_connection  # type: ignore[assignment]
    return driver


def _begin(connection: Connection) -> None:
    # Writers queue up at BEGIN, where SQLite waits; a later upgrade from reading to writing would fail at once.
    if connection.get_execution_options().get(WRITES):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _flags(flags: int) -> int:
    return flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _sync_folder(folder: Path) -> None:
    """Flush a folder, so that a new name in it outlives a power loss; Windows does that by itself."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        # A folder that we may pass but not read, or a file system without the notion: nothing more can be done.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
