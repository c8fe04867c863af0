"""
Results whose path the user has chosen: `outputs.file_path` of a job file.

Downloads wait in a hidden folder beside it (`.work-<job>`, on the same file system), so that giving them their names
is a rename. Nothing of anybody's is ever overwritten or moved, for another job's row may name it: where a name is taken
the result gets the next free number (`NAME_1.png`) and a note, unless what is there is the very same content or what an
earlier run of the same job delivered. The folder is looked at when the job begins
and again when names are given: a link that leads out of the allowed folder is refused, a folder that was exchanged
meanwhile, too.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.files import DISK, PRIVATE_DIR, Disk, local_error, remove_quietly, safe_name
from runcomfy.adapters.job_folder import DiskJobFolder, content_of, free_name, kept_endings, output_of, take_over
from runcomfy.adapters.result_commit import NameAppeared, Plan, mark_of
from runcomfy.domain.exceptions import OutputCorrupt, ValueInvalid, foreign_text
from runcomfy.domain.job import PICTURE_FORMATS, JobId, Output, OutputKind
from runcomfy.domain.out_file import SAME, Delivered, names_beside, split_name
from runcomfy.domain.settings import FileSettings
from runcomfy.ports.results import ResultFile, Through

WORK: Final = ".work-"
"""Beginning of the folder in which a job's files wait, beside where they go."""
TRIES: Final = 5
"""How often names are chosen anew when another job was quicker."""
FORMAT_OF: Final[Mapping[str, str]] = {extension: name for name, extension in PICTURE_FORMATS.items()}


def make_room(job_id: JobId, file: str, root: str | None) -> tuple[str, str]:
    """Make the folders for a result at the path `file`; return its folder and the one where downloads wait.

    Raises ValueInvalid (not below `root` once links are followed, or a folder), LocalError, DiskFull.
    """
    try:
        target = Path(file)
        if not target.is_absolute() or "\0" in file:
            raise ValueInvalid(f"{foreign_text(file, 200)!r} is not an absolute path", hint="write the path out")
        if root is not None:
            _check_within(target.parent, root, file)
        _make_folders(target.parent)
        if root is not None:
            _check_within(target.parent, root, file)
        if target.is_dir() and not target.is_symlink():
            raise ValueInvalid(
                f"{foreign_text(file, 200)} is a folder, and a result would go there", hint="choose another name"
            )
        work = target.parent / (WORK + safe_name(job_id, fallback="job"))
        try:
            work.mkdir(mode=PRIVATE_DIR)
        except FileExistsError:
            take_over(work, home=target.parent)
    except OSError as error:
        raise local_error(error, file, "make the folder of") from error
    except ValueError as error:  # on another drive than the root
        raise ValueInvalid(f"{foreign_text(file, 200)!r} is no path: {foreign_text(error)}") from None
    return str(target.parent), str(work)


def _check_within(folder: Path, root: str, file: str) -> None:
    """Make sure that what is there of a folder lies below the root, wherever links lead."""
    real_root = os.path.realpath(root)
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    real = os.path.realpath(there)
    above = Path(root).is_relative_to(there)  # nothing of the root itself is there yet
    common = os.path.commonpath([real_root, real])
    if not above and os.path.normcase(common) != os.path.normcase(real_root):
        raise ValueInvalid(
            f"{foreign_text(file, 200)} does not lie below {foreign_text(root, 200)}: a link leads out of it",
            hint="write the real path, or move the folder back",
        )


def _make_folders(folder: Path) -> None:
    """Make a folder of the user's, with the permissions that new folders have here; durably."""
    missing = [folder]
    while not missing[-1].is_dir() and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for each in reversed(missing[:-1]):
        each.mkdir(exist_ok=True)
        DISK.fsync_directory(str(each.parent))


def usual_mode(folder: str) -> int | None:
    """Return the permissions that new files get in a folder; None where there are no such permissions."""
    if os.name == "nt":
        return None
    probe = free_name(folder, ".partial-mode-")
    fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
        remove_quietly(probe)


class BesideFolder(DiskJobFolder):
    """Keeps `runcomfy.ports.results.JobFolder` for results that go to a path of the user's choice."""

    def __init__(
        self,
        target: str,
        work: str,
        *,
        settings: FileSettings,
        disk: Disk = DISK,
        earlier: Mapping[str, str] | None = None,
        mode: int | None = None,
    ) -> None:
        """`earlier`: path -> sha256 of what earlier runs of the job delivered."""
        super().__init__(work, settings=settings, disk=disk)
        self._folder, self._name = os.path.split(target)
        self._earlier = {_normal(path): sha256 for path, sha256 in (earlier or {}).items()}
        self._mode = mode
        self._mark = mark_of(self._folder)

    @property
    def path(self) -> str:
        """The folder that the results go to, absolute."""
        return self._folder

    async def commit(
        self, files: Sequence[ResultFile], manifest: Mapping[str, Any], *, through: Through | None = None
    ) -> tuple[Output, ...]:
        """See the port. There is no manifest here; pictures are converted to what the wanted name says."""
        notes: list[str] = []
        fitted = [await self._fitted(file, notes) for file in files]
        self._fitting = notes
        outputs = await self._committed(fitted, manifest, through)
        await asyncio.to_thread(self._abandon)
        return outputs

    async def _committed(
        self, files: Sequence[ResultFile], manifest: Mapping[str, Any], through: Through | None
    ) -> tuple[Output, ...]:
        """Commit; where another job was quicker with a name, choose names anew."""
        for _ in range(TRIES):
            try:
                return await super().commit(files, manifest, through=through)
            except NameAppeared:
                self._notes.clear()
        raise OutputCorrupt(
            f"others are quicker with every name like {self._name}",
            hint="give each job an outputs.file_path of its own",
        )

    _fitting: Sequence[str] = ()

    async def _fitted(self, file: ResultFile, notes: list[str]) -> ResultFile:
        """Return a picture in the format that its name asks for, if that can hold it."""
        ending = split_name(self._name)[1].lower()
        to = FORMAT_OF.get(SAME.get(ending, ending))
        moves = int(file.media.details.get("frames", 1)) > 1
        if to is None or file.media.kind is not OutputKind.IMAGE or (moves and to != "webp"):
            return file
        try:
            return await self.convert(file, to)
        except OutputCorrupt as error:
            notes.append(f"a picture was not converted to {to}: {error.message}")
            return file

    def _plan(self, files: Sequence[ResultFile], manifest: Mapping[str, Any]) -> Plan:
        self._notes.extend(self._fitting)
        names = names_beside(self._name, [_delivered(file) for file in files])
        new = {(file.size_bytes, file.sha256) for file in files}
        paths: list[str] = []
        replaced: list[str] = []
        for name in names:
            path = os.path.join(self._folder, name)  # noqa: PTH118
            if os.path.lexists(path):
                there = content_of(path)
                if there is not None and (there in new or self._earlier.get(_normal(path)) == there[1]):
                    replaced.append(path)
                else:
                    stem, ending = split_name(name)
                    path = free_name(self._folder, f"{stem}_", ending, taken=paths)
                    shown = os.path.basename(path)  # noqa: PTH119
                    self._notes.append(f"{name} was there already, from elsewhere; the result is {shown}")
            paths.append(path)
        if len(files) == 1 and names[0] != self._name:
            self._notes.append(f"{self._name} was wanted; the result is {files[0].media.mime}, so it is {names[0]}")
        return Plan(
            files,
            tuple(output_of(file, path) for file, path in zip(files, paths, strict=True)),
            (self._folder,),
            staging=self._path,
            mode=self._mode,
            anchor=(self._folder, self._mark),
            fleeting=True,
            replaced=replaced,
        )

    def _aside_name(self, prefix: str, extension: str) -> str:
        stem = split_name(self._name)[0]
        return free_name(self._folder, f"{stem}.{prefix}", extension)

    async def amend(self, facts: Mapping[str, Any]) -> None:
        """Write nothing: what became known goes where the job itself is kept."""


def _normal(path: str) -> str:
    return os.path.normcase(os.path.normpath(path))


def _delivered(file: ResultFile) -> Delivered:
    return Delivered(
        kind=file.media.kind,
        extension=file.media.extension,
        accepts=kept_endings(file),
        declared=bool(file.name),
        passing=file.passing,
    )
