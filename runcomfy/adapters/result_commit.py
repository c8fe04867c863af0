"""
The moment in which downloaded files become results, in three blocking steps for three threads.

    stage    every file is what was downloaded, flushed; everything that takes time or room is done
    publish  names change, and the directories are flushed: quick, and undone by itself if it raises
    settle   what the new results took the place of is removed

`publish` is called by whoever decides whether the results count (a database, inside its transaction), so a name that
counts is durable before the record of it is. `undo` takes the names back if that decision fails afterwards.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from runcomfy.adapters.files import (
    DISK,
    PRIVATE_DIR,
    Disk,
    local_error,
    open_new,
    open_regular,
    remove_quietly,
    safe_name,
)
from runcomfy.domain.exceptions import LocalError, OutputCorrupt
from runcomfy.domain.job import Output
from runcomfy.ports.results import ResultFile

REPLACED: Final = "old-"
"""Beginning of the name under which a file waits that is to go once its successor counts."""
_READ: Final = 1 << 20


def measure(fd: int) -> tuple[int, str]:
    """Return size and sha256 of an open file, read from its beginning."""
    digest = hashlib.sha256()
    size = 0
    os.lseek(fd, 0, os.SEEK_SET)
    while piece := os.read(fd, _READ):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


class NameAppeared(Exception):
    """A name that was free when it was chosen is taken now: choose anew. Never leaves the folder."""


@dataclass(frozen=True, slots=True)
class Move:
    """One change of a name."""

    source: str
    target: str
    mark: tuple[int, int] | None = None
    """Which file it was (device and inode), once it was done."""


@dataclass(slots=True)
class Plan:
    """What a commit is to do. Paths are absolute and on one file system."""

    files: Sequence[ResultFile]
    outputs: tuple[Output, ...]
    """One per file, in the same order: where it goes."""
    directories: tuple[str, ...]
    """To be flushed once the names have changed."""
    kept: list[Move] = field(default_factory=list)
    """What is in the way and is somebody's: moved aside before the new names are given."""
    replaced: list[str] = field(default_factory=list)
    """What is in the way and is the job's own, or the very same content: goes when the new results count."""
    made: tuple[str, ...] = ()
    """Folders that were made for it."""
    staging: str = ""
    """Where what is replaced waits meanwhile."""
    manifest: tuple[str, str] | None = None
    """Path and text of a manifest, written last: it means that everything before it is there."""
    mode: int | None = None
    """Permissions of the results; None: as they are."""
    anchor: tuple[str, tuple[int, int]] | None = None
    """A folder that must still be the one that was looked at, and which that is."""
    fleeting: bool = False
    """Whether `staging` goes when nothing is left in it."""


class Commit:
    """One commit of one job's results."""

    def __init__(self, plan: Plan, *, durable: bool, disk: Disk = DISK) -> None:
        self.plan = plan
        self._durable = durable
        self._disk = disk
        self._moved: list[Move] = []
        self._waiting: list[str] = []
        self._manifest = ""
        """The manifest's temporary name, once it is written."""
        self.cancelled = threading.Event()
        """Set by whoever does not want the results any more: no further step is begun."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What will be there."""
        return self.plan.outputs

    # -- the steps -----------------------------------------------------------------------------------------

    def stage(self) -> None:
        """Check and flush every file; write the manifest aside. Raises DiskFull, LocalError, OutputCorrupt."""
        try:
            for file in self.plan.files:
                self._verify(file)
            if self.plan.manifest is not None:
                self._write_aside(*self.plan.manifest)
        except BaseException:
            self.undo()
            raise

    def publish(self) -> None:
        """Give every file its final name, durably; undone by itself if it raises. Raises DiskFull, LocalError."""
        try:
            self._check_anchor()
            for path in self.plan.replaced:
                self._rename(path, self._waiting_name(path))
                self._waiting.append(self._moved[-1].target)
            for move in self.plan.kept:
                self._rename(move.source, move.target)
            for file, output in zip(self.plan.files, self.plan.outputs, strict=True):
                if os.path.lexists(output.path):
                    raise NameAppeared(output.path)
                self._rename(file.partial, output.path)
            if self.plan.manifest is not None:
                with self._step(self.plan.manifest[0], "write"):
                    mark = mark_of(self._manifest)
                    self._disk.replace(self._manifest, self.plan.manifest[0])
                self._moved.append(Move(self._manifest, self.plan.manifest[0], mark))
            if self.plan.fleeting:
                with suppress(OSError):  # refused while anything is in it
                    os.rmdir(self.plan.staging)  # noqa: PTH106
            for directory in self.plan.directories if self._durable else ():
                with self._step(directory, "flush"):
                    self._disk.fsync_directory(directory)
            for output in self.plan.outputs:
                with self._step(output.path, "find"):
                    _same_size(output)
        except BaseException:
            self._take_back()
            raise

    def undo(self) -> None:
        """Take back every name that was given, and the manifest; the files are partial again. Harmless if repeated."""
        self._take_back()
        if self._manifest:
            remove_quietly(self._manifest)
            self._manifest = ""
        for folder in self.plan.made:
            with suppress(OSError):  # refused if anything is in it
                os.rmdir(folder)  # noqa: PTH106

    def settle(self) -> None:
        """Remove what the results, which count now, took the place of."""
        for path in self._waiting:
            remove_quietly(path)
        self._waiting = []

    # -- parts ---------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self, path: str, doing: str) -> Iterator[None]:
        if self.cancelled.is_set():
            raise LocalError("the commit of the results was cancelled")
        try:
            yield
        except OSError as error:
            raise local_error(error, path, doing) from error

    def _verify(self, file: ResultFile) -> None:
        """The bytes on the disk are those that were downloaded and inspected; then flush them."""
        with self._step(file.partial, "read back"), open_regular(file.partial, writable=True) as opened:
            found = measure(opened.fileno())
            if found != (file.size_bytes, file.sha256):
                raise OutputCorrupt(
                    f"a result of node {safe_name(file.node)} changed on this disk after it was downloaded",
                    hint="run the job again; if it happens again, check the disk and what else writes there",
                    details={"expected_sha256": file.sha256, "sha256": found[1], "size_bytes": found[0]},
                )
            if self.plan.mode is not None and hasattr(os, "fchmod"):
                os.fchmod(opened.fileno(), self.plan.mode)
            if self._durable:
                self._disk.fsync(opened.fileno())

    def _write_aside(self, path: str, text: str) -> None:
        self._manifest = os.path.join(os.path.dirname(path), f".tmp-{secrets.token_hex(6)}")  # noqa: PTH118, PTH120
        with self._step(path, "write"), open_new(self._manifest) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            if self._durable:
                self._disk.fsync(file.fileno())

    def _rename(self, source: str, target: str) -> None:
        with self._step(target, "rename a result to"):
            mark = mark_of(source)
            self._disk.rename(source, target)
        self._moved.append(Move(source, target, mark))

    def _waiting_name(self, path: str) -> str:
        return os.path.join(self.plan.staging, REPLACED + os.path.basename(path))  # noqa: PTH118, PTH119

    def _check_anchor(self) -> None:
        if self.plan.anchor is None:
            return
        folder, mark = self.plan.anchor
        with self._step(folder, "find"):
            if mark_of(folder) != mark:
                raise LocalError(
                    f"{folder} is not the folder any more that it was when the job began",
                    hint="put it back, and look who exchanged it",
                )

    def _take_back(self) -> None:
        if self.plan.fleeting and self._moved:
            with suppress(OSError):
                os.mkdir(self.plan.staging, PRIVATE_DIR)  # noqa: PTH102
        partials = {file.partial for file in self.plan.files}
        for move in reversed(self._moved):
            with suppress(OSError):
                if mark_of(move.target) != move.mark:
                    continue  # whoever holds the job now has put its own there
                # Not through the seam: this must not fail by design.
                os.rename(move.target, move.source)  # noqa: PTH104
                continue
            if move.source in partials:
                remove_quietly(move.target)
        self._moved, self._waiting = [], []


def mark_of(path: str) -> tuple[int, int]:
    """Return which file or folder that is, whatever it is called (device and inode)."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _same_size(output: Output) -> None:
    found = os.lstat(output.path)
    if not stat.S_ISREG(found.st_mode) or found.st_size != output.size_bytes:
        raise OutputCorrupt(f"{output.path} is not what was written there", hint="check what else writes there")
