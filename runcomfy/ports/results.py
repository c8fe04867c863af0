"""
Where results go on this computer, and how they are known to be whole.

Names that came from a server are data: every name here is made by us from the job, a counter and the sniffed type.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from runcomfy.domain.job import JobId, Output, OutputKind

Publish = Callable[[], None]
"""Gives every result its final name, durably: quick, blocking, and undone by itself if it raises."""
Through = Callable[[Publish, tuple[Output, ...]], Awaitable[None]]
"""Decides whether results count: calls the publishing once, at the right moment, in a thread; or raises."""


@dataclass(frozen=True, slots=True)
class Media:
    """What a file was found to be, by its content."""

    kind: OutputKind
    mime: str
    extension: str
    """With the dot, lower case, by content: `.png`."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Width, height, frames; vertices, triangles; seconds: what decoding told."""


@dataclass(frozen=True, slots=True)
class ResultFile:
    """A downloaded and inspected file that waits to be committed."""

    partial: str
    """Where it lies now, inside the job's folder."""
    node: str
    media: Media
    size_bytes: int
    sha256: str
    name: str = ""
    """The output's name in the sidecar."""
    file_name: str = ""
    """The file name wanted, without folder (`flux.png`); empty: made from node and counter."""
    remote_name: str = ""
    passing: bool = False
    """Whether the server keeps it among its temporary files (a preview)."""


class JobFolder(Protocol):
    """The folder of one job. Nothing in it counts as a result before `commit`."""

    @property
    def path(self) -> str:
        """The folder."""
        ...

    def partial(self) -> str:
        """Return a new path for a file being downloaded."""
        ...

    async def inspect(self, partial: str, *, expected: OutputKind | None = None) -> Media:
        """Decode the file and say what it is.

        Raises OutputCorrupt if it is broken, a page of HTML, a bomb, or not of the expected kind; the file is kept
        for diagnosis under a name that says so.
        """
        ...

    async def write_text(self, partial: str, text: str) -> tuple[int, str]:
        """Write a text result; return its size in bytes and sha256."""
        ...

    async def convert(self, file: ResultFile, to: str) -> ResultFile:
        """Return the picture in another format (png, jpg, webp); other kinds are returned as they are."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user about what the commit found in its way, or gave another name than wished for."""
        ...

    async def commit(
        self, files: Sequence[ResultFile], manifest: Mapping[str, Any], *, through: Through | None = None
    ) -> tuple[Output, ...]:
        """Give every file its final name and write the manifest, flushed to the disk once for all.

        Either everything is there afterwards, or an error is raised and no final name exists. `through` decides
        whether the results count, after everything that takes time was done; what it raises takes the names back,
        and once it was called it is not cancelled: a cancellation that comes meanwhile is too late if it succeeds.
        Raises DiskFull, LocalError, OutputCorrupt, and what `through` raises.
        """
        ...

    async def set_aside(self) -> Sequence[str]:
        """Keep what was fetched, under names that say that it was discarded; return their paths."""
        ...

    async def amend(self, facts: Mapping[str, Any]) -> None:
        """Add to the manifest what became known only after the commit: what the job cost, how long its end took.

        The results stay what they are if it fails. Raises DiskFull, LocalError.
        """
        ...

    async def abandon(self) -> None:
        """Remove what was not committed; keep files set aside for diagnosis. Remove the folder if it is empty."""
        ...


class Results(Protocol):
    """This computer's disk."""

    async def check_input(self, path: str, *, kind: str) -> None:
        """Make sure an input file can be used: exists, is readable, not empty, decodes if it is to be a picture.

        Raises InputFileMissing, InputFileInvalid (not an image, 0 bytes, too many pixels).
        """
        ...

    async def files_among(self, values: Collection[str]) -> frozenset[str]:
        """Return which of these texts are absolute paths of files that are there. Never raises."""
        ...

    async def open_folder(self, job_id: JobId, *, under: str, again: bool = False) -> JobFolder:
        """Make the folder `under/job_id` for a job's results, and prove that it can be written before money is spent.

        `again`: results of earlier runs of the job may be there; they are kept in a folder of their own when new ones
        are committed, or give way to the very same content. Raises DiskFull, LocalError.
        """
        ...

    async def open_beside(
        self, job_id: JobId, *, file: str, root: str | None = None, earlier: Mapping[str, str] | None = None
    ) -> JobFolder:
        """Make the folder of `file` for a job whose one result goes there, and prove that it can be written.

        Several results get numbers; the content decides the ending. What is there already is kept under another name,
        unless it is the same content or what `earlier` (path -> sha256) says that earlier runs of the job delivered.
        Nothing is written outside `root`, wherever links lead.

        Raises ValueInvalid, DiskFull, LocalError.
        """
        ...
