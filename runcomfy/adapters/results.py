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
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters import media
from runcomfy.adapters.files import (
    DISK,
    PRIVATE_DIR,
    Disk,
    local_error,
    make_private_dir,
    open_new,
    open_regular,
    remove_quietly,
    safe_name,
    write_atomically,
)
from runcomfy.domain.exceptions import DiskFull, LocalError, OutputCorrupt, ValueInvalid
from runcomfy.domain.job import JobId, Output, OutputKind
from runcomfy.domain.settings import FileSettings
from runcomfy.ports.results import Media, ResultFile

MANIFEST: Final = "manifest.json"
PARTIAL: Final = ".partial-"
REJECTED: Final = "rejected-"
PROVEN_FOR_SECONDS: Final = 5.0
"""How long a folder that took a probe needs no other."""
LEAST_FREE_BYTES: Final = 64 << 20
"""Room that must be there before a machine is rented: a picture, a mesh and the manifest, several times over."""

_PROBE_BYTES: Final = 4096
_READ: Final = 1 << 20
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


class DiskResults:
    """Keeps `runcomfy.ports.results.Results` on this computer's disk."""

    def __init__(self, settings: FileSettings, *, disk: Disk = DISK) -> None:
        self._settings = settings
        self._disk = disk
        self._proven: dict[Path, float] = {}

    async def check_input(self, path: str, *, kind: str) -> None:
        """See the port. `kind` is `image`, or anything else for a file that only has to be there."""
        if kind == OutputKind.IMAGE:
            await asyncio.to_thread(media.check_input_image, path, self._settings.max_input_pixels)
        else:
            await asyncio.to_thread(media.check_input_file, path)

    async def open_folder(self, job_id: JobId, *, under: str) -> DiskJobFolder:
        """See the port. A folder left by an attempt that committed nothing is used again, its partial files removed."""
        path = await asyncio.to_thread(self._make_folder, job_id, under)
        return DiskJobFolder(path, settings=self._settings, disk=self._disk)

    def _make_folder(self, job_id: JobId, under: str) -> str:
        parent = make_private_dir(Path(under).absolute())
        folder = parent / safe_name(job_id, fallback="job")
        try:
            try:
                folder.mkdir(mode=PRIVATE_DIR)
            except FileExistsError:
                _take_over(folder)
            try:
                self._prove_writable(folder)
            except (OSError, DiskFull):
                with suppress(OSError):  # refused if anything is in it
                    folder.rmdir()
                raise
        except OSError as error:
            raise local_error(error, folder, "write to") from error
        return str(folder)

    def _prove_writable(self, folder: Path) -> None:
        """Make sure that results can be written there; not again within a few seconds, when many jobs follow."""
        now = time.monotonic()
        if now - self._proven.get(folder.parent, -PROVEN_FOR_SECONDS) < PROVEN_FOR_SECONDS:
            return
        free = shutil.disk_usage(folder).free
        if free < LEAST_FREE_BYTES:
            raise DiskFull(
                f"only {free / 1e6:.0f} MB are free where results go ({folder})",
                hint=f"free at least {LEAST_FREE_BYTES / 1e6:.0f} MB, or choose another folder (--out)",
                details={"path": str(folder), "free_bytes": free},
            )
        probe = folder / _partial_name(0)
        try:
            with open_new(probe) as file:
                file.write(b"\0" * _PROBE_BYTES)
                file.flush()
                if self._settings.durable:
                    self._disk.fsync(file.fileno())
        finally:
            remove_quietly(probe)
        self._proven[folder.parent] = now


def _take_over(folder: Path) -> None:
    """Use a folder that is there already, if it is ours and holds no results. Raises LocalError."""
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise LocalError(
            f"{folder} is not a folder, and results would go there", hint="remove it, or choose another folder (--out)"
        )
    for entry in folder.iterdir():
        if entry.name.startswith((PARTIAL, ".tmp-")):
            remove_quietly(entry)
        elif not entry.name.startswith(REJECTED):
            raise LocalError(
                f"{folder} already holds files; results are never written over others",
                hint="choose another job id or another folder (--out)",
                details={"path": str(folder), "file": safe_name(entry.name)},
            )


def _partial_name(number: int) -> str:
    # The folder is ours alone; the random part is for a folder that somebody opened to others.
    return f"{PARTIAL}{number}-{secrets.token_hex(6)}"


class DiskJobFolder:
    """Keeps `runcomfy.ports.results.JobFolder`."""

    def __init__(self, path: str, *, settings: FileSettings, disk: Disk = DISK) -> None:
        self._path = path
        self._settings = settings
        self._disk = disk
        self._partials: list[str] = []
        self._texts: set[str] = set()
        self._rejected = 0

    @property
    def path(self) -> str:
        """The folder, absolute."""
        return self._path

    def partial(self) -> str:
        """Return a new path for a file being downloaded. Nothing is created: open it as a new file, with O_EXCL."""
        made = os.path.join(self._path, _partial_name(len(self._partials) + 1))  # noqa: PTH118
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
            extension = media.likely_extension(partial)
            while True:
                self._rejected += 1
                kept = os.path.join(self._path, f"{REJECTED}{self._rejected}{extension}")  # noqa: PTH118
                if not os.path.lexists(kept):
                    break
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
                size, digest = _measure(converted.fileno())
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

    async def commit(self, files: Sequence[ResultFile], manifest: Mapping[str, Any]) -> tuple[Output, ...]:
        """See the port. Cancelled, it takes everything back before the cancellation goes on.

        Raises DiskFull, LocalError, OutputCorrupt (the file on the disk is not the one that was downloaded).
        """
        for file in files:
            self._own(file.partial)
        work = _Commit(self._path, files, manifest, durable=self._settings.durable, disk=self._disk)
        running = asyncio.ensure_future(asyncio.to_thread(work.run))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            work.cancelled.set()
            await _settled(running)
            if not running.cancelled() and running.exception() is None:
                await _settled(asyncio.ensure_future(asyncio.to_thread(work.undo)))
            raise

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


def _measure(fd: int) -> tuple[int, str]:
    """Return size and sha256 of an open file, read from its beginning."""
    digest = hashlib.sha256()
    size = 0
    os.lseek(fd, 0, os.SEEK_SET)
    while piece := os.read(fd, _READ):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


class _Commit:
    """One commit, in a thread: check and flush every file, rename, write the manifest, or take it all back."""

    def __init__(
        self, folder: str, files: Sequence[ResultFile], manifest: Mapping[str, Any], *, durable: bool, disk: Disk
    ) -> None:
        self._folder = folder
        self._files = files
        self._manifest = manifest
        self._durable = durable
        self._disk = disk
        self._renamed: list[tuple[str, str]] = []
        self._written = ""
        self.cancelled = threading.Event()

    def run(self) -> tuple[Output, ...]:
        try:
            for file in self._files:
                self._verify(file)
            outputs = []
            for file, name in zip(self._files, final_names(self._files, self._taken()), strict=True):
                target = os.path.join(self._folder, name)  # noqa: PTH118
                with self._step(target, "rename a result to"):
                    self._disk.rename(file.partial, target)
                self._renamed.append((file.partial, target))
                outputs.append(_output(file, target))
            self._write_manifest(outputs)
            self._check_names(outputs)
        except BaseException:
            self.undo()
            raise
        return tuple(outputs)

    def undo(self) -> None:
        """Take back every name that was given; the files are partial again."""
        if self._written:
            remove_quietly(self._written)
        for partial, target in reversed(self._renamed):
            try:
                os.rename(target, partial)  # noqa: PTH104 - not through the seam: this must not fail by design
            except OSError:
                remove_quietly(target)
        self._written, self._renamed = "", []

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
            found = _measure(opened.fileno())
            if found != (file.size_bytes, file.sha256):
                raise OutputCorrupt(
                    f"a result of node {safe_name(file.node)} changed on this disk after it was downloaded",
                    hint="run the job again; if it happens again, check the disk and what else writes there",
                    details={"expected_sha256": file.sha256, "sha256": found[1], "size_bytes": found[0]},
                )
            if self._durable:
                self._disk.fsync(opened.fileno())

    def _taken(self) -> set[str]:
        return {name.casefold() for name in os.listdir(self._folder)} | {MANIFEST}  # noqa: PTH208

    def _write_manifest(self, outputs: Sequence[Output]) -> None:
        path = os.path.join(self._folder, MANIFEST)  # noqa: PTH118
        shown = dict(self._manifest) | {
            "outputs": [_entry(file, output) for file, output in zip(self._files, outputs, strict=True)]
        }
        text = _as_json(shown)
        # Set first: a write that failed while flushing the directory has already put the name there.
        self._written = path
        # Flushing the directory makes the renames before it durable too: once for the whole job.
        with self._step(path, "write"):
            write_atomically(path, text, durable=self._durable, disk=self._disk)

    def _check_names(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            with self._step(output.path, "find"):
                _same_size(output)


def _as_json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False, default=str) + "\n"


def _same_size(output: Output) -> None:
    found = os.lstat(output.path)
    if not stat.S_ISREG(found.st_mode) or found.st_size != output.size_bytes:
        raise OutputCorrupt(f"{output.path} is not what was written there", hint="check what else writes there")


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


def _extension(file: ResultFile) -> str:
    """The content decides; where it cannot (text, unknown formats), a harmless ending of the wanted name stays."""
    kept = _KEPT_EXTENSIONS.get(file.media.kind, frozenset())
    if file.media.extension in _TELL_LITTLE:
        for name in (file.file_name, file.remote_name[:_REMOTE_NAME_LIMIT]):
            ending = os.path.splitext(safe_name(name))[1].lower()  # noqa: PTH122
            if ending.removeprefix(".") in kept:
                return ending
    return file.media.extension


def _output(file: ResultFile, path: str) -> Output:
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
