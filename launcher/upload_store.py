"""
Files that clients send, on the disk before the answer: `state/uploads/ID/NAME`.

Rule 1: a file is judged by its content. What no workflow takes as an input is not kept.
Rule 2: whoever uses a file says so before the job is put in (`use`), with the name of its queue; a file that no job of
the queue uses is swept a day after it was touched. Several queues may share a state folder: what a job of another one
uses is left to that one's own service, as long as it was seen within three months.
Rule 3: names are ours: the folder's is random (or made from an idempotency key, so that a repeated request means the
same file), the file's is a safe form of what the client called it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from launcher.errors import NotFound, TooLarge
from launcher.views import media_type
from runcomfy.adapters.files import fsync_directory, local_error, make_private_dir, open_new, open_regular, safe_name
from runcomfy.adapters.media import check_input_image
from runcomfy.adapters.media_sniff import Sniffed, sniff
from runcomfy.adapters.media_source import Corrupt, Source
from runcomfy.domain.exceptions import InputFileInvalid, foreign_text
from runcomfy.domain.job import OutputKind

FOLDER: Final = "uploads"
USED_BY: Final = ".used-by"
QUEUES: Final = "uploads_used_by"
"""Of the state folder: a file for each queue, touched whenever its service uses or sweeps uploads."""
GOING: Final = ".going-"
PART: Final = ".part"
CHUNK: Final = 256 * 1024
ID: Final = re.compile(r"[0-9a-f]{32}\Z")
KEPT_UNUSED_S: Final = 24 * 3600.0
KEPT_FOR_OTHERS_S: Final = 90 * 24 * 3600.0
"""How long after its last sign a queue that shares this folder keeps its uploads."""
_PICTURES_TOO: Final = frozenset({".bmp", ".tif", ".exr", ".hdr"})
_FILES_TOO: Final = frozenset({".aac", ".aiff", ".fbx", ".dae"})
_KINDS: Final = frozenset({OutputKind.IMAGE, OutputKind.MESH, OutputKind.VIDEO, OutputKind.AUDIO})
KnownKeys = Callable[[Collection[str]], Awaitable[Collection[str]]]


@dataclass(frozen=True, slots=True)
class Kept:
    """A file that was received whole."""

    id: str
    path: str
    kind: OutputKind
    media_type: str
    size_bytes: int
    sha256: str
    fresh: bool = True
    """Whether this request brought it."""

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.path).name

    def as_dict(self) -> dict[str, object]:
        """Return it as clients are told."""
        return {
            "upload": self.id,
            "kind": str(self.kind),
            "file": self.name,
            "media_type": self.media_type,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
        }


class Incoming:
    """A file while it arrives."""

    def __init__(self, store: UploadStore, folder: Path, file: BinaryIO, name: str) -> None:
        self._store, self._folder, self._file, self._name = store, folder, file, name
        self._hash = hashlib.sha256()
        self._size = 0
        self._is_kept = False

    @property
    def folder(self) -> Path:
        """Its own, until it is kept."""
        return self._folder

    async def take(self, path: Path) -> None:
        """Take what lies in a file of its folder, and remove that. Raises TooLarge, LocalError."""
        try:
            with await asyncio.to_thread(open_regular, path) as file:
                while data := await asyncio.to_thread(file.read, CHUNK):
                    await self.write(data)
            await asyncio.to_thread(path.unlink)
        except OSError as error:
            raise local_error(error, path, "read") from error

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises TooLarge, DiskFull, LocalError."""
        self._size += len(data)
        if self._size > self._store.most_bytes:
            raise TooLarge(
                f"the file has more than {self._store.most_bytes // 1024**2} MB",
                hint="make it smaller, or raise RUNCOMFY_HTTP_MAX_UPLOAD",
            )
        await asyncio.to_thread(self._write, data)

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise local_error(error, self._folder, "keep an upload in") from error
        self._hash.update(data)

    async def keep(self, *, as_id: str | None = None, salt: str = "", named: str | None = None) -> Kept:
        """Judge the file and give it its name. `as_id`: with which key its folder is named, so that it is found again.

        `named`: the folder's name itself. Raises InputFileInvalid (nothing is kept), DiskFull, LocalError.
        """
        try:
            kept = await asyncio.to_thread(self._keep, as_id, salt, named)
        except BaseException:
            await self.abort()
            raise
        self._is_kept = True
        return kept

    def _keep(self, key: str | None, salt: str, name: str | None) -> Kept:
        sha256 = self._hash.hexdigest()
        part = self._folder / PART
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise local_error(error, self._folder, "keep an upload in") from error
        stem = safe_name(self._name, fallback="upload").rpartition(".")[0] or safe_name(self._name, fallback="upload")
        named = part.rename(self._folder / f"{stem[:60]}.part")
        found = judged(named, max_pixels=self._store.max_pixels)
        final = named.rename(self._folder / f"{stem[:60]}{found.extension}")
        fsync_directory(self._folder)
        folder = self._folder
        if key is not None:
            name = made_id(key, salt, sha256, final.name)
        if name is not None:
            wanted = folder.parent / name
            if (wanted / final.name).is_file():
                shutil.rmtree(folder, ignore_errors=True)
                return self._kept(wanted / final.name, found, sha256, fresh=False)
            shutil.rmtree(wanted, ignore_errors=True)
            folder = folder.rename(wanted)
        fsync_directory(folder.parent)
        return self._kept(folder / final.name, found, sha256, fresh=True)

    def _kept(self, path: Path, found: Sniffed, sha256: str, *, fresh: bool) -> Kept:
        kind = found.kind if found.kind in _KINDS else kind_for(found)
        return Kept(path.parent.name, str(path), kind, media_type(path.name), self._size, sha256, fresh)

    async def abort(self) -> None:
        """Keep nothing of it, unless it is kept already (`UploadStore.forget`). Harmless when repeated."""
        if not self._is_kept:
            await asyncio.to_thread(self._abort)

    def _abort(self) -> None:
        with suppress(OSError):
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class UploadStore:
    """The uploads of one state folder."""

    def __init__(self, state_dir: str, *, most_bytes: int, max_pixels: int) -> None:
        """`most_bytes`: of one file."""
        self.folder = Path(state_dir).absolute() / FOLDER
        self.most_bytes = most_bytes
        self.max_pixels = max_pixels
        self._touching = threading.Lock()
        """Held by threads while they take a file into use, or look a last time whether it may go."""

    async def open(self, name: str) -> Incoming:
        """Begin to receive a file; `name` is what the client calls it. Raises LocalError."""
        folder, file = await asyncio.to_thread(self._open)
        return Incoming(self, folder, file, name)

    def _open(self) -> tuple[Path, BinaryIO]:
        folder = make_private_dir(self.folder) / secrets.token_hex(16)
        try:
            folder.mkdir(mode=0o700)
            return folder, open_new(folder / PART)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise local_error(error, folder, "keep an upload in") from error

    async def keep(self, data: bytes, name: str, *, as_id: str | None = None, salt: str = "") -> Kept:
        """Keep bytes that are here already. Raises as `Incoming` does."""
        incoming = await self.open(name)
        try:
            await incoming.write(data)
        except BaseException:
            await incoming.abort()
            raise
        return await incoming.keep(as_id=as_id, salt=salt)

    async def find(self, upload_id: str) -> str:
        """Return the path of an upload. Raises NotFound."""
        path = await asyncio.to_thread(self._find, upload_id) if ID.match(upload_id) else None
        if path is None:
            raise _no_upload(upload_id)
        return path

    def _find(self, upload_id: str) -> str | None:
        try:
            names = sorted(entry.name for entry in (self.folder / upload_id).iterdir())
        except OSError:
            return None
        return next((str(self.folder / upload_id / name) for name in names if not name.startswith(".")), None)

    def holds(self, path: str) -> bool:
        """Return whether a path is one of an upload."""
        parent = Path(path).parent
        return parent.parent == self.folder and ID.match(parent.name) is not None

    async def use(self, paths: Collection[str], key: str, *, queue: str = "") -> None:
        """Say that the job of `queue` with this idempotency key uses these files; before it is put in.

        Raises NotFound (one was swept meanwhile), LocalError.
        """
        ours = [path for path in paths if self.holds(path)]
        if ours:
            await asyncio.to_thread(self._use, ours, key, queue)

    def _use(self, paths: Collection[str], key: str, queue: str) -> None:
        self._seen(queue)
        for path in paths:
            note = Path(path).parent / USED_BY
            try:
                with self._touching:
                    with note.open("a", encoding="utf-8") as file:
                        note.chmod(0o600)
                        file.write(f"\n{queue}\t{key}\n")  # a line of its own, whatever a crash left of the last one
                        file.flush()
                        os.fsync(file.fileno())  # for the job will be
                    os.utime(note.parent)
                    fsync_directory(note.parent)
            except FileNotFoundError as error:
                raise _no_upload(note.parent.name) from error
            except OSError as error:
                raise local_error(error, note, "write") from error

    async def forget(self, kept: Collection[Kept]) -> None:
        """Remove what a request brought that came to nothing."""
        for one in kept:
            if one.fresh:
                await asyncio.to_thread(shutil.rmtree, Path(one.path).parent, ignore_errors=True)

    # -- sweeping ------------------------------------------------------------------------------------------

    async def sweep(self, known_keys: KnownKeys, *, queue: str = "", now: float | None = None) -> int:
        """Remove uploads that no job uses and nobody touched for a day; return how many.

        `known_keys` tells which of some idempotency keys `queue` has; `now` in seconds since 1970, as the disk has.
        """
        now = time.time() if now is None else now
        removed = 0
        for folder, keys in await asyncio.to_thread(self._old, queue, now):
            if not keys or not await known_keys(keys):
                removed += await asyncio.to_thread(self._remove, folder, now)
        return removed

    def _remove(self, folder: Path, now: float) -> bool:
        """Remove an upload, unless a job has taken it into use since it was looked at."""
        with self._touching:
            if not _is_old(folder, now):
                return False
            # Other processes do not see the lock: nobody can take into use what has another name by now.
            going = folder.with_name(f"{GOING}{folder.name}")
            try:
                folder.rename(going)
                if not _is_old(going, now):
                    going.rename(folder)
                    return False
            except OSError:
                return False  # another process does the same
            shutil.rmtree(going, ignore_errors=True)
            return True

    def _old(self, queue: str, now: float) -> list[tuple[Path, list[str]]]:
        """Return uploads that may go if `queue` has none of their keys."""
        self._seen(queue)
        found, others = [], dict[str, bool]()
        with suppress(OSError):
            for folder in self.folder.iterdir():
                with suppress(OSError):
                    if folder.name.startswith(GOING):  # of a process that was killed
                        if _is_old(folder, now):
                            shutil.rmtree(folder, ignore_errors=True)
                    elif ID.match(folder.name) and _is_old(folder, now):
                        users = _users(folder)
                        for other in {name for name, _ in users} - {queue, ""}:
                            others[other] = others[other] if other in others else self._lives(other, now)
                        if not any(others.get(name, False) for name, _ in users):
                            found.append((folder, [key for name, key in users if name in (queue, "")]))
        return found

    def _mark(self, queue: str) -> Path:
        return self.folder.parent / QUEUES / made_id(queue)

    def _seen(self, queue: str) -> None:
        """Note that the service of a queue works on this folder."""
        if queue:
            mark = self._mark(queue)
            try:
                make_private_dir(mark.parent)
                mark.touch(mode=0o600)
            except OSError as error:
                raise local_error(error, mark, "write") from error

    def _lives(self, queue: str, now: float) -> bool:
        """Return whether a queue was seen not too long ago."""
        try:
            return now - self._mark(queue).stat().st_mtime < KEPT_FOR_OTHERS_S
        except OSError:
            return False


def _users(folder: Path) -> list[tuple[str, str]]:
    """Return the jobs that use an upload, as (queue, idempotency key); "" is the queue that did not say its name."""
    note = folder / USED_BY
    lines = note.read_text(encoding="utf-8", errors="replace").splitlines() if note.is_file() else []
    said = [(line, *line.partition("\t")) for line in lines if line]
    return [(queue, key) if tab else ("", line) for line, queue, tab, key in said]


def _is_old(folder: Path, now: float) -> bool:
    try:
        return now - folder.stat().st_mtime >= KEPT_UNUSED_S
    except OSError:
        return False


def _no_upload(upload_id: str) -> NotFound:
    return NotFound(
        f"there is no upload {foreign_text(upload_id, 40)!r}",
        hint="send it with POST /uploads; what no job uses is removed after a day",
    )


def made_id(*parts: str) -> str:
    """Return a folder's name made from what a request says: the same request means the same file."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def kind_for(found: Sniffed) -> OutputKind:
    """Return what a file stands for that is known by its first bytes alone."""
    if found.extension in _PICTURES_TOO:
        return OutputKind.IMAGE
    return next(iter(sorted(found.also)), OutputKind.FILE)


def judged(path: Path, *, max_pixels: int) -> Sniffed:
    """Return what a file is, if it can be an input. Blocks. Raises InputFileInvalid, LocalError."""
    try:
        with open_regular(path) as file:
            source = Source(file)
            if not source.size:
                raise InputFileInvalid("the file is empty (0 bytes)", hint="send the file itself")
            found = sniff(source)
            if found.kind in _KINDS and not found.picture and found.check is not None:
                found.check(source)
    except Corrupt as error:
        raise InputFileInvalid(f"the file is damaged: {foreign_text(error)}", hint="send it again, whole") from error
    except OSError as error:
        raise local_error(error, path, "read") from error
    if found.kind not in _KINDS and found.extension not in _PICTURES_TOO | _FILES_TOO:
        raise InputFileInvalid(
            f"no workflow takes this as an input: it looks like {found.words}",
            hint="send a picture (PNG, JPEG, WEBP, GIF), a mesh, a video or a sound",
        )
    if found.picture or found.extension in (".bmp", ".tif"):
        check_input_image(path, max_pixels)
    return found
