"""
The folder in which users drop job files.

Every method blocks: callers on the event loop run them in a thread. What is in the folder belongs to its users: nothing
there is changed, moved or deleted, but for missing folders and the lock of the one monitor.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runcomfy.domain.exceptions import JobFileInvalid
from runcomfy.domain.queued import NewJob


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A job file as it was when it was looked at."""

    path: str
    """Absolute."""
    name: str
    """Without folder: the job's `config_name`."""
    mark: tuple[int, int, int]
    """Size, time of change, number: while it stays the same, nobody has written."""
    modified: float
    """Seconds since 1970, by the file system's clock."""


@dataclass(frozen=True, slots=True)
class StrangeFile:
    """Something in the folder that is not taken."""

    path: str
    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class FolderScan:
    """What the folder holds."""

    files: tuple[FoundFile, ...]
    """By name, then path."""
    strange: tuple[StrangeFile, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadJob:
    """A job file that was read."""

    job: NewJob
    lines: Mapping[str, int] = field(default_factory=dict)
    """Field (`inputs.seed`) -> line."""


class JobFiles(Protocol):
    """A folder of job files."""

    def hold(self) -> Sequence[str]:
        """Make missing folders and be the one monitor of this folder; return what is worth telling the user.

        Harmless when repeated; also what somebody removed meanwhile is made again. The hold ends with the process at
        the latest. Raises FolderWatched, LocalError.
        """
        ...

    def release(self) -> None:
        """Let another monitor have the folder. Harmless when repeated."""
        ...

    def scan(self) -> FolderScan:
        """Return every job file below the folder, and what lies there that is not taken. Raises LocalError."""
        ...

    def find(self, path: str) -> FoundFile:
        """Return the file at a path, wherever it lies. Raises InputFileMissing."""
        ...

    def read(self, found: FoundFile) -> bytes | JobFileInvalid | None:
        """Return the content; None if the file has changed since it was found; an error if it cannot be read."""
        ...

    def job(self, found: FoundFile, data: bytes) -> ReadJob:
        """Return the job that the content describes.

        Raises JobFileInvalid (with line and field), ConfigurationError (the list of workflows cannot be read).
        """
        ...

    def surroundings(self) -> Hashable:
        """Return something that is another one once a file has changed that job files depend on. Never raises."""
        ...
