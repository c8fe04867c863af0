"""Where the database's errors become ours: one function, so that nothing of SQLAlchemy or sqlite3 gets out."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from pathlib import Path
from typing import Final

from sqlalchemy.exc import DBAPIError, StatementError

from runcomfy.domain.exceptions import (
    DiskFull,
    LocalError,
    RunComfyError,
    StoreCorrupt,
    StoreUnavailable,
    foreign_text,
)

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_WRITE_FAILED: Final = frozenset(
    {
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_DIR_FSYNC,
        sqlite3.SQLITE_IOERR_TRUNCATE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
    }
)
"""A quota, a size limit, a dying disk: SQLite calls only ENOSPC a full disk."""

_FREE_ENOUGH: Final = 1024 * 1024
"""With less than this free, an I/O error is taken for a full disk."""

STILL_STOPS: Final = (
    "machines can still be seen and ended: `comfyctl machines ls` lists what the provider runs, "
    "`comfyctl machines stop ID` stops it"
)


def local_error(error: Exception, path: Path) -> RunComfyError:
    """Return the error of ours that says what `error` means for the database at `path`."""
    if isinstance(error, RunComfyError):
        return error
    orig = error.orig if isinstance(error, StatementError) else error
    if isinstance(orig, RunComfyError):
        return orig
    if isinstance(orig, sqlite3.Error):
        return _of_sqlite(orig, path)
    if isinstance(orig, UnicodeDecodeError):
        return corrupt(path, "it holds text that is none")
    if isinstance(orig, OSError):
        return _of_system(orig, path)
    return StoreUnavailable(f"the database {path} failed: {foreign_text(orig)}", hint=STILL_STOPS)


def is_callers_fault(error: Exception) -> bool:
    """Whether a statement failed because it was given a value of the wrong kind: a defect, not the database's."""
    return (
        isinstance(error, StatementError)
        and not isinstance(error, DBAPIError)
        and isinstance(error.orig, (TypeError, ValueError, AttributeError))
        and not isinstance(error.orig, UnicodeDecodeError)
    )


def corrupt(path: Path, what: str) -> StoreCorrupt:
    """Return the error for a damaged database file."""
    return StoreCorrupt(
        f"the database {path} is damaged: {foreign_text(what)}",
        hint=f"move {path.name} aside or put a backup in its place; {STILL_STOPS}",
    )


def disk_full(path: Path) -> DiskFull:
    """Return the error for a database that could not be written whole; what was there is unharmed."""
    return DiskFull(
        f"the disk is full or takes no more from this user: nothing could be written to {path}",
        hint=f"free some space in {path.parent}; {STILL_STOPS}",
    )


def locked(path: Path) -> StoreUnavailable:
    """Return the error for a database that somebody else kept locked for too long."""
    return StoreUnavailable(
        f"the database {path} is locked by another program",
        hint="close what holds it open (a database browser, a backup, a stuck comfyctl), then try again",
    )


def _of_sqlite(error: sqlite3.Error, path: Path) -> LocalError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    text = str(error)
    match code & 0xFF:
        case sqlite3.SQLITE_FULL:
            return disk_full(path)
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return locked(path)
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return corrupt(path, text)
        case sqlite3.SQLITE_CONSTRAINT:
            return LocalError(f"the database refused it: {foreign_text(text)}")
        case sqlite3.SQLITE_IOERR if code in _WRITE_FAILED or _no_space(path):
            return disk_full(path)
        case sqlite3.SQLITE_CANTOPEN if _no_space(path):
            return disk_full(path)
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return StoreUnavailable(
                f"the database {path} cannot be opened for writing: {foreign_text(text)}",
                hint=f"see who owns {path.parent}, and how many files this process has open",
            )
        case sqlite3.SQLITE_ERROR if "no such" in text:
            return corrupt(path, text)
    return StoreUnavailable(f"the database {path} failed: {foreign_text(text)}", hint=STILL_STOPS)


def _of_system(error: OSError, path: Path) -> LocalError:
    if error.errno in FULL:
        return disk_full(path)
    return StoreUnavailable(
        f"the database {path} cannot be opened: {foreign_text(error.strerror or error)}",
        hint=f"see who owns {path.parent}, or set RUNCOMFY_STATE_DIR to a folder of your own",
    )


def _no_space(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < _FREE_ENOUGH
    except OSError:
        return False
