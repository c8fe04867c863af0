"""
The folder of a job on this disk, and the one moment in which its files become results.

    open_folder -> partial, partial ... -> inspect each -> commit (all or nothing) -> abandon what is left

Rule 1: names are made here, from the job, the node, a counter and the content; a server's names are data (threat S1).
Rule 2: until `commit` every file has a name that says it is partial; `manifest.json` comes last and means "whole".
Rule 3: what is renamed is what was downloaded: its hash is read back from the disk and compared first.
Rule 4: a commit that fails, or is cancelled, takes back every name it gave.

Downloading is left to the ComfyUI client, decoding to `runcomfy.adapters.media`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters import media
from runcomfy.adapters.files import (
    DISK,
    Disk,
    local_error,
    make_private_dir,
    open_new,
    open_regular,
    remove_quietly,
    safe_name,
    write_atomically,
)
from runcomfy.adapters.result_commit import REPLACED, Commit, Move, Plan, measure
from runcomfy.domain.exceptions import LocalError, OutputCorrupt, ValueInvalid
from runcomfy.domain.job import Output, OutputKind
from runcomfy.domain.settings import FileSettings
from runcomfy.ports.results import Media, ResultFile, Through

MANIFEST: Final = "manifest.json"
PARTIAL: Final = ".partial-"
REJECTED: Final = "rejected-"
DISCARDED: Final = "discarded-"
EARLIER: Final = "earlier-"
"""Folders with the results of earlier runs of a job."""
_REMOTE_NAME_LIMIT: Final = 4096

# fmt: off
_KEPT_EXTENSIONS: Final[Mapping[OutputKind, frozenset[str]]] = {
    OutputKind.TEXT: frozenset((
        "txt", "md", "csv", "tsv", "json", "jsonl", "srt", "vtt", "ass", "xml", "yaml", "yml", "toml", "log", "svg",
        "obj", "mtl", "cube",
    )),
    OutputKind.FILE: frozenset((
        "ply", "fbx", "stl", "usdz", "usd", "usda", "usdc", "splat", "ksplat", "spz", "abc", "blend", "vox", "3mf",
        "zip", "npy", "npz", "safetensors", "latent", "exr", "hdr", "tif", "tiff", "bmp", "avif", "heic", "jxl", "psd",
        "tga", "dds", "ktx2", "pdf", "avi", "mpg", "aac", "aiff", "mid", "bin",
    )),
}
# fmt: on
"""Endings that a wanted or remote name may keep because the content cannot tell: none of them is a program."""
_TELL_LITTLE: Final = frozenset({".txt", ".bin", ".zip", ".gz"})
"""What content alone says of text, of unknown formats, and of formats that are archives (.usdz, .npz, .spz)."""


def take_over(folder: Path, *, again: bool = False, home: Path | None = None) -> None:
    """Use a folder that is there already, if it is ours and holds no results, or `again`. Raises LocalError.

    Files that were to be replaced, and were not, go back to `home`, or stay in the folder.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise LocalError(
            f"{folder} is not a folder, and results would go there", hint="remove it, or choose another folder (--out)"
        )
    for entry in folder.iterdir():
        if entry.name.startswith((PARTIAL, ".tmp-")):
            remove_quietly(entry)
        elif entry.name.startswith(REPLACED):
            _put_back(entry, home or folder)
        elif not (again or entry.name.startswith((REJECTED, DISCARDED))):
            raise LocalError(
                f"{folder} already holds files; results are never written over others",
                hint="choose another job id or another folder (--out)",
                details={"path": str(folder), "file": safe_name(entry.name)},
            )


def _put_back(entry: Path, folder: Path) -> None:
    """Give a file its name again that was to be replaced by results which never came to count."""
    original = folder / entry.name.removeprefix(REPLACED)
    with suppress(OSError):
        if os.path.lexists(original):
            entry.unlink()
        else:
            entry.rename(original)


def _is_litter(name: str) -> bool:
    return name.startswith((PARTIAL, ".tmp-", REPLACED, REJECTED, DISCARDED, EARLIER))


def content_of(path: str) -> tuple[int, str] | None:
    """Return size and sha256 of an ordinary file; None for anything else."""
    try:
        with open_regular(path) as file:
            return measure(file.fileno())
    except OSError:
        return None


def free_name(folder: str, prefix: str, extension: str = "", *, taken: Collection[str] = ()) -> str:
    """Return the first path `folder/prefix<n>extension` that nothing has and that is not `taken`."""
    number = 1
    while (path := os.path.join(folder, f"{prefix}{number}{extension}")) in taken or os.path.lexists(path):  # noqa: PTH118
        number += 1
    return path


def partial_name(number: int) -> str:
    """Return a new name for a file that is being written."""
    # The folder is ours alone; the random part is for a folder that somebody opened to others.
    return f"{PARTIAL}{number}-{secrets.token_hex(6)}"


class DiskJobFolder:
    """Keeps `runcomfy.ports.results.JobFolder`."""

    def __init__(self, path: str, *, settings: FileSettings, disk: Disk = DISK, again: bool = False) -> None:
        self._path = path
        self._again = again
        """Whether results of earlier runs of the job may be there."""
        self._notes: list[str] = []
        self._settings = settings
        self._disk = disk
        self._partials: list[str] = []
        self._texts: set[str] = set()

    @property
    def path(self) -> str:
        """The folder, absolute."""
        return self._path

    def partial(self) -> str:
        """Return a new path for a file being downloaded. Nothing is created: open it as a new file, with O_EXCL."""
        made = os.path.join(self._path, partial_name(len(self._partials) + 1))  # noqa: PTH118
        self._partials.append(made)
        return made

    async def inspect(self, partial: str, *, expected: OutputKind | None = None) -> Media:
        """See the port. A refused file is kept as `rejected-<n>`, its path in the error's details."""
        self._own(partial)
        return await asyncio.to_thread(self._inspect, partial, expected)

    def _inspect(self, partial: str, expected: OutputKind | None) -> Media:
        try:
            return media.inspect(
                partial,
                max_pixels=self._settings.max_output_pixels,
                expected=expected,
                plain_text=partial in self._texts,
            )
        except OutputCorrupt as error:
            kept = self._set_aside(partial)
            if kept:
                error.details["kept"] = kept
                error.hint = f"{error.hint}; what came is kept as {kept}"
            raise

    def _set_aside(self, partial: str) -> str:
        """Give a refused file a name that says so; return it, empty if that failed."""
        try:
            kept = self._aside_name(REJECTED, media.likely_extension(partial))
            self._disk.rename(partial, kept)
        except OSError:
            return ""
        return kept

    async def write_text(self, partial: str, text: str) -> tuple[int, str]:
        """See the port. Raises DiskFull, LocalError."""
        self._own(partial)
        self._texts.add(partial)
        # Half a surrogate pair cannot be written as UTF-8; it becomes "?", as it would on any screen.
        raw = text.encode("utf-8", "replace")
        await asyncio.to_thread(_write_new, partial, raw)
        return len(raw), hashlib.sha256(raw).hexdigest()

    async def convert(self, file: ResultFile, to: str) -> ResultFile:
        """See the port. The file it was made from is removed. Raises ValueInvalid, OutputCorrupt, DiskFull."""
        self._own(file.partial)
        if to not in media.CONVERTIBLE:
            raise ValueInvalid(
                f"pictures cannot be converted to {to!r}", hint=f"choose one of {', '.join(media.CONVERTIBLE)}"
            )
        if file.media.kind is not OutputKind.IMAGE or file.media.extension == media.CONVERTIBLE[to]:
            return file
        target = self.partial()
        return await asyncio.to_thread(self._convert, file, target, to)

    def _convert(self, file: ResultFile, target: str, to: str) -> ResultFile:
        try:
            found = media.convert(file.partial, target, to, max_pixels=self._settings.max_output_pixels)
            with open_regular(target) as converted:
                size, digest = measure(converted.fileno())
        except BaseException as error:
            remove_quietly(target)
            if isinstance(error, OSError):
                raise local_error(error, target, "write") from error
            raise
        remove_quietly(file.partial)
        return replace(file, partial=target, media=found, size_bytes=size, sha256=digest)

    def _own(self, partial: str) -> None:
        if partial not in self._partials:
            raise ValueError(f"not a partial file of this folder: {partial!r}")

    @property
    def notes(self) -> Sequence[str]:
        """See the port."""
        return tuple(self._notes)

    async def commit(
        self, files: Sequence[ResultFile], manifest: Mapping[str, Any], *, through: Through | None = None
    ) -> tuple[Output, ...]:
        """See the port. Cancelled before it counts, it takes everything back before the cancellation goes on.

        Raises DiskFull, LocalError, OutputCorrupt (the file on the disk is not the one that was downloaded).
        """
        for file in files:
            self._own(file.partial)
        work = await asyncio.to_thread(self._planned, files, manifest)
        return await carry_out(work, through)

    def _planned(self, files: Sequence[ResultFile], manifest: Mapping[str, Any]) -> Commit:
        self._notes.clear()
        try:
            plan = self._plan(files, manifest)
        except OSError as error:
            raise local_error(error, self._path, "look into") from error
        return Commit(plan, durable=self._settings.durable, disk=self._disk)

    def _plan(self, files: Sequence[ResultFile], manifest: Mapping[str, Any]) -> Plan:
        """Return what gives these files their names in this folder."""
        plan = Plan((), (), (self._path,), staging=self._path)
        taken = {name.casefold() for name in os.listdir(self._path)}  # noqa: PTH208
        if self._again:
            taken -= {os.path.basename(path).casefold() for path in self._give_way(plan, files)}  # noqa: PTH119
        names = final_names(files, taken | {MANIFEST})
        plan.files = files
        plan.outputs = tuple(
            output_of(file, os.path.join(self._path, name))  # noqa: PTH118
            for file, name in zip(files, names, strict=True)
        )
        entries = [_entry(file, output) for file, output in zip(files, plan.outputs, strict=True)]
        plan.manifest = (
            os.path.join(self._path, MANIFEST),  # noqa: PTH118
            _as_json({**manifest, "outputs": entries}),
        )
        return plan

    def _give_way(self, plan: Plan, files: Sequence[ResultFile]) -> list[str]:
        """Plan where results of earlier runs go; return what will not be in the way any more."""
        there = [entry.path for entry in os.scandir(self._path) if not _is_litter(entry.name)]
        new = {(file.size_bytes, file.sha256) for file in files}
        others = [path for path in there if os.path.basename(path) != MANIFEST and content_of(path) not in new]  # noqa: PTH119
        if not others:
            plan.replaced = there
        elif there:
            kept = free_name(self._path, EARLIER)
            make_private_dir(kept)
            plan.made = (kept,)
            plan.directories = (kept, self._path)
            plan.kept = [Move(path, os.path.join(kept, os.path.basename(path))) for path in there]  # noqa: PTH118, PTH119
            self._notes.append(f"results of an earlier run are kept in {kept}")
        return there

    async def set_aside(self) -> Sequence[str]:
        """See the port. Raises LocalError, DiskFull."""
        return await asyncio.to_thread(self._discard)

    def _discard(self) -> list[str]:
        kept = []
        for partial in self._partials:
            if not os.path.lexists(partial):
                continue
            name = self._aside_name(DISCARDED, media.likely_extension(partial))
            try:
                self._disk.rename(partial, name)
            except OSError as error:
                raise local_error(error, name, "keep a discarded result as") from error
            kept.append(name)
        return kept

    def _aside_name(self, prefix: str, extension: str) -> str:
        """Return an unused name for a file that is no result."""
        return free_name(self._path, prefix, extension)

    async def amend(self, facts: Mapping[str, Any]) -> None:
        """See the port."""
        await asyncio.to_thread(self._amend, facts)

    def _amend(self, facts: Mapping[str, Any]) -> None:
        path = os.path.join(self._path, MANIFEST)  # noqa: PTH118
        try:
            with open_regular(path) as file:
                manifest = json.loads(file.read())
            write_atomically(path, _as_json({**manifest, **facts}), durable=self._settings.durable, disk=self._disk)
        except (OSError, ValueError) as error:
            raise LocalError(
                f"{path} could not be completed: {error}", hint="the results themselves are whole"
            ) from error

    async def abandon(self) -> None:
        """See the port. Harmless after `commit`, and when repeated."""
        await asyncio.to_thread(self._abandon)

    def _abandon(self) -> None:
        for partial in self._partials:
            remove_quietly(partial)
        try:
            os.rmdir(self._path)  # noqa: PTH106
        except OSError:
            return


async def carry_out(work: Commit, through: Through | None) -> tuple[Output, ...]:
    """Stage, have published, and settle; or take everything back and raise. See `JobFolder.commit`.

    If `through` itself is broken off (its task is cancelled because the loop ends, the program is made to leave), it
    may have decided already: the names stay as they are, whatever is known of it. Names that do not count are in the
    way of the job's next attempt, which goes round them; results that count and are gone would be lost.
    """
    staging = asyncio.ensure_future(asyncio.to_thread(work.stage))
    try:
        await asyncio.shield(staging)
    except asyncio.CancelledError:
        work.cancelled.set()
        await _settled(staging)
        await _in_thread(work.undo)
        raise
    decide = through(work.publish, work.outputs) if through is not None else asyncio.to_thread(work.publish)
    deciding = asyncio.ensure_future(decide)
    cancelled: asyncio.CancelledError | None = None
    while not deciding.done():
        try:
            await asyncio.wait({deciding})
        except asyncio.CancelledError as error:
            cancelled = error
            if through is None:
                work.cancelled.set()
    try:
        deciding.result()
    except BaseException as error:
        if through is not None and not isinstance(error, Exception):
            raise
        await _in_thread(work.undo)
        if cancelled is not None and through is None:
            raise cancelled from None
        raise
    await _in_thread(work.settle)
    return work.outputs


async def _in_thread(work: Callable[[], None]) -> None:
    await _settled(asyncio.ensure_future(asyncio.to_thread(work)))


async def _settled(task: asyncio.Future[Any]) -> None:
    """Wait until a thread's work is over, however often this task is cancelled meanwhile."""
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            continue


def _write_new(path: str, raw: bytes) -> None:
    try:
        with open_new(path) as file:
            file.write(raw)
    except OSError as error:
        remove_quietly(path)
        raise local_error(error, path, "write") from error


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n"


def final_names(files: Sequence[ResultFile], taken: set[str]) -> list[str]:
    """Return one plain file name per file, none of them in `taken` (case folded, which this call extends)."""
    names = []
    counters: dict[str, int] = {}
    for file in files:
        extension = _extension(file)
        stem = ""
        if file.file_name:
            stem = os.path.splitext(safe_name(file.file_name))[0]  # noqa: PTH122
            candidate = stem + extension
        else:
            candidate = ""
        node = safe_name(file.node, limit=60, fallback="node")
        while not candidate or candidate.casefold() in taken:
            key = stem or node
            counters[key] = counters.get(key, 0) + 1
            candidate = f"{key}-{counters[key]}{extension}"
        taken.add(candidate.casefold())
        names.append(candidate)
    return names


def kept_endings(file: ResultFile) -> frozenset[str]:
    """Return the endings, with dots, that the content cannot contradict: it is text, or of an unknown format."""
    if file.media.extension not in _TELL_LITTLE:
        return frozenset()
    return frozenset(f".{ending}" for ending in _KEPT_EXTENSIONS.get(file.media.kind, ()))


def _extension(file: ResultFile) -> str:
    """The content decides; where it cannot (text, unknown formats), a harmless ending of the wanted name stays."""
    kept = kept_endings(file)
    for name in (file.file_name, file.remote_name[:_REMOTE_NAME_LIMIT]) if kept else ():
        ending = os.path.splitext(safe_name(name))[1].lower()  # noqa: PTH122
        if ending in kept:
            return ending
    return file.media.extension


def output_of(file: ResultFile, path: str) -> Output:
    """Return the result that a file becomes at `path`."""
    return Output(
        node=file.node,
        kind=file.media.kind,
        path=path,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        name=file.name,
        remote_name=file.remote_name,
    )


def _entry(file: ResultFile, output: Output) -> dict[str, Any]:
    """One result as the manifest shows it; `file` is relative, so that the folder can be moved."""
    return {
        "node": file.node,
        "name": file.name,
        "kind": str(file.media.kind),
        "file": os.path.basename(output.path),  # noqa: PTH119
        "mime": file.media.mime,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "remote_name": file.remote_name[:_REMOTE_NAME_LIMIT],
        "details": dict(file.media.details),
    }
