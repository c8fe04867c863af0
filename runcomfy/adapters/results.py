"""
Results and input files on this computer's disk.

Where a job's results go is made, and proved to be writable, before money is spent: a folder of the job's own
(`job_folder`), or a path that the user chose (`results_beside`).
"""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from runcomfy.adapters import media
from runcomfy.adapters.files import (
    DISK,
    PRIVATE_DIR,
    Disk,
    local_error,
    make_private_dir,
    open_new,
    remove_quietly,
    safe_name,
)
from runcomfy.adapters.job_folder import DiskJobFolder, final_names, partial_name, take_over
from runcomfy.adapters.results_beside import BesideFolder, make_room, usual_mode
from runcomfy.domain.exceptions import DiskFull
from runcomfy.domain.job import JobId, OutputKind
from runcomfy.domain.settings import FileSettings

__all__ = ["DiskJobFolder", "DiskResults", "final_names"]

PROVEN_FOR_SECONDS: Final = 5.0
"""How long a folder that took a probe needs no other."""
LEAST_FREE_BYTES: Final = 64 << 20
"""Room that must be there before a machine is rented: a picture, a mesh and the manifest, several times over."""
LEAST_FREE_PART: Final = 10
"""On a disk that is small itself a tenth of it does; asking for more would refuse it even when it is empty."""

_PROBE_BYTES: Final = 4096


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

    async def files_among(self, values: Collection[str]) -> frozenset[str]:
        """See the port."""
        return await asyncio.to_thread(lambda: frozenset(value for value in values if _is_file(value)))

    async def open_folder(self, job_id: JobId, *, under: str, again: bool = False) -> DiskJobFolder:
        """See the port. A folder left by an attempt that committed nothing is used again, its partial files removed."""
        path = await asyncio.to_thread(self._make_folder, job_id, under, again=again)
        return DiskJobFolder(path, settings=self._settings, disk=self._disk, again=again)

    async def open_beside(
        self, job_id: JobId, *, file: str, root: str | None = None, earlier: Mapping[str, str] | None = None
    ) -> DiskJobFolder:
        """See the port."""
        return await asyncio.to_thread(self._make_beside, job_id, file, root, earlier or {})

    def _make_beside(self, job_id: JobId, file: str, root: str | None, earlier: Mapping[str, str]) -> DiskJobFolder:
        _, work = make_room(job_id, file, root)
        try:
            try:
                self._prove_writable(Path(work))
                mode = usual_mode(work)
            except (OSError, DiskFull):
                with suppress(OSError):  # refused if anything is in it
                    Path(work).rmdir()
                raise
        except OSError as error:
            raise local_error(error, work, "write to") from error
        return BesideFolder(str(Path(file)), work, settings=self._settings, disk=self._disk, earlier=earlier, mode=mode)

    def _make_folder(self, job_id: JobId, under: str, *, again: bool) -> str:
        parent = make_private_dir(Path(under).absolute())
        folder = parent / safe_name(job_id, fallback="job")
        try:
            try:
                folder.mkdir(mode=PRIVATE_DIR)
            except FileExistsError:
                take_over(folder, again=again)
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
        usage = shutil.disk_usage(folder)
        free, least = usage.free, min(LEAST_FREE_BYTES, usage.total // LEAST_FREE_PART)
        if free < least:
            raise DiskFull(
                f"only {free / 1e6:.0f} MB are free where results go ({folder})",
                hint=f"free at least {math.ceil(least / 1e6)} MB, or choose another folder (--out)",
                details={"path": str(folder), "free_bytes": free},
            )
        probe = folder / partial_name(0)
        try:
            with open_new(probe) as file:
                file.write(b"\0" * _PROBE_BYTES)
                file.flush()
                if self._settings.durable:
                    self._disk.fsync(file.fileno())
        finally:
            remove_quietly(probe)
        self._proven[folder.parent] = now


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_absolute() and Path(value).is_file()
    except (OSError, ValueError):
        return False
