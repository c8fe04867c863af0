"""
CONJURE's fixed file places, and how they are written.

CONJURE's launcher and its Blender add-on look for results at these paths, relative to the working directory, and not
where a job puts them. A result gets there as a copy: written beside its place, flushed, compared with the hash that
was recorded when it was verified, and then renamed over what was there. What the user owns (the prompt, the render) is
only ever read.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from runcomfy.adapters.files import (
    DISK,
    fsync_directory,
    local_error,
    make_private_dir,
    open_regular,
    remove_quietly,
)
from runcomfy.domain.exceptions import DownloadFailed, ValueInvalid

FLUX_IMAGE: Final = Path("data", "generated_images", "flux", "flux.png")
FLUX_RESULTS: Final = Path("data", "generated_images", "flux_results")
RENDER: Final = Path("data", "generated_images", "gestureCamera", "render.png")
MESHES: Final = Path("data", "generated_models", "partpacker_results")
MESH: Final = MESHES / "partpacker_result_0.glb"
USER_PROMPT: Final = Path("data", "generated_text", "userPrompt.txt")
STATE: Final = Path("data", "input", "state.json")

SHARED_FILE: Final = 0o644
"""CONJURE, Blender and its add-on read these; they may run as another user."""
_CHUNK: Final = 1 << 20
MAX_PROMPT_BYTES: Final = 256 * 1024


def flux_result(seed: int) -> Path:
    """Return where a picture made from text alone goes in local mode."""
    return FLUX_RESULTS / f"flux_result_{seed}.png"


def mesh_result(seed: int) -> Path:
    """Return where a mesh goes in local mode."""
    return MESHES / f"partpacker_result_{seed}.glb"


@dataclass(frozen=True, slots=True)
class Verified:
    """A file whose content is known: a job's result, or a kept copy of one."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Places:
    """The fixed places of one project. Every method blocks."""

    root: Path = field(default_factory=Path.cwd)
    """The working directory of CONJURE: the folder that has `data/`."""

    def at(self, path: str | os.PathLike[str]) -> Path:
        """Return where a path of CONJURE's is. Raises ValueInvalid: that is no path."""
        if "\0" in str(path):
            raise ValueInvalid("that is no path")
        try:
            return self.root / Path(path).expanduser() if str(path).startswith("~") else self.root / path
        except RuntimeError as error:
            raise ValueInvalid("that is no path: there is no such user", hint="write the whole path") from error

    def holds(self, path: str) -> bool:
        """Whether a path lies in this project: as it is written, and where its links lead.

        The project is its folder and what `data` in it leads to. A path that cannot be followed counts as outside;
        for one that is written as outside nothing is looked at, so that nothing can be learned of it.
        """
        if "\0" in path or path.startswith("~") or ".." in re.split(r"[/\\]", path):
            return False
        homes = (self.root, self.root.resolve(), (self.root / "data").resolve())
        written = Path(os.path.abspath(self.root / path))  # noqa: PTH100 - `resolve` would look at it
        if not any(written.is_relative_to(home) for home in homes):
            return False
        try:
            led = written.resolve()
        except (OSError, RuntimeError):  # links in a circle
            return False
        return any(led.is_relative_to(home) for home in homes)

    def publish(self, results: Mapping[Path, Verified]) -> None:
        """Put copies of results at their places: all are written and compared before the first is renamed.

        Raises DownloadFailed (a result is no longer what was verified), DiskFull, LocalError; nothing is replaced
        then.
        """
        waiting: list[tuple[str, Path]] = []
        try:
            for place, result in results.items():
                target = self.root / place
                make_shared_dir(target.parent)
                waiting.append((copy_verified(result, target.parent), target))
            for temporary, target in waiting:
                try:
                    DISK.replace(temporary, os.fspath(target))
                except OSError as error:
                    raise local_error(error, target, "replace") from error
            _flush_folders(target.parent for _, target in waiting)
        finally:
            for temporary, _ in waiting:
                remove_quietly(temporary)

    def user_prompt(self) -> str:
        """Return the user's prompt; empty if there is none. Raises LocalError."""
        path = self.root / USER_PROMPT
        try:
            with open_regular(path, follow=True) as file:
                return file.read(MAX_PROMPT_BYTES).decode("utf-8", "replace").strip().removeprefix("\ufeff")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise local_error(error, path, "read") from error


def make_shared_dir(folder: Path) -> None:
    """Make a folder of the project, with the permissions its other folders get. Raises LocalError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise local_error(error, folder, "make the folder") from error


def copy_verified(result: Verified, folder: Path, *, mode: int = SHARED_FILE) -> str:
    """Copy a result into a temporary file of the folder and compare it; return the file's path.

    Raises DownloadFailed, DiskFull, LocalError; nothing is left behind then.
    """
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
        with os.fdopen(fd, "wb") as target, open_regular(result.path) as source:
            size, digest = _copy(source, target)
            target.flush()
            os.fsync(target.fileno())
        if (size, digest) != (result.size_bytes, result.sha256):
            raise DownloadFailed(
                f"{result.path} is not what was verified: it has changed since",
                hint="run the generation again",
                details={"path": result.path},
            )
        Path(temporary).chmod(mode)
    except OSError as error:
        remove_quietly(temporary)
        raise local_error(error, folder, "write to") from error
    except BaseException:
        remove_quietly(temporary)
        raise
    return temporary


def _copy(source: BinaryIO, target: BinaryIO) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def verified(path: Path) -> Verified | None:
    """Return what a file holds now; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            digest, size = hashlib.sha256(), 0
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError:
        return None
    return Verified(str(path), size, digest.hexdigest())


def private_folder(path: Path) -> Path:
    """Return a folder of ours in the state folder, made if it is missing. Raises LocalError."""
    return make_private_dir(path)


def _flush_folders(folders: Iterable[Path]) -> None:
    for folder in set(folders):
        with suppress(Exception):  # the files themselves are flushed, and their names are there
            fsync_directory(folder)
