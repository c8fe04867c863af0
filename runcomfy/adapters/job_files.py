"""
Job files on this computer: found below a folder, read whole, made into jobs.

What is taken: `*.yaml` and `*.yml`, in any folder below. What is not: hidden files and folders, what editors and
copying programs leave beside a file, links (they may lead out of the folder, and be turned while one looks), names that
are no text. Rules of the fields are `runcomfy.domain.job_file`'s, the lock is `folder_lock`'s; when to read a file, the
monitor says.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.files import local_error, open_regular
from runcomfy.adapters.folder_lock import FolderLock
from runcomfy.adapters.workflow_registry import Resolved, WorkflowRegistry, mark_of
from runcomfy.adapters.yaml_text import MAX_BYTES, read_yaml
from runcomfy.domain.exceptions import BadInput, InputFileMissing, JobFileInvalid, foreign_text
from runcomfy.domain.job import JobRequest
from runcomfy.domain.job_file import JobFile, invalid, read_job_file, wants_text
from runcomfy.domain.marked import Problem, unprintable
from runcomfy.domain.out_file import checked_out_file
from runcomfy.domain.queued import NewJob
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.job_files import FolderScan, FoundFile, ReadJob, StrangeFile

FOLDERS: Final = ("image", "video", "audio", "speech", "3d")
SUFFIXES: Final = (".yaml", ".yml")
DEEPEST: Final = 32

_MEDIA: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".exr"}
    | {".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"}
    | {".glb", ".gltf", ".obj", ".ply", ".stl", ".fbx"}
)
"""Inputs that end like these and are a file of the project are meant as that file."""


class YamlJobFiles:
    """Keeps `runcomfy.ports.job_files.JobFiles` for the folder that the settings name."""

    def __init__(self, settings: QueueSettings, *, registry: WorkflowRegistry) -> None:
        self._settings = settings
        self._folder = Path(settings.jobs_processing)
        self._registry = registry
        self._lock = FolderLock(self._folder)

    # -- the folder ----------------------------------------------------------------------------------------

    def hold(self) -> Sequence[str]:
        """Make missing folders and be the one monitor of this folder."""
        for folder in [self._folder / name for name in FOLDERS] + [Path(self._settings.jobs_finished)]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise local_error(error, folder, "make the folder") from error
        if self._lock.take():
            return ()
        return (f"{self._folder} is on a file system without locks: make sure that only one monitor watches it",)

    def release(self) -> None:
        """Let another monitor have the folder."""
        self._lock.release()

    def scan(self) -> FolderScan:
        """Return every job file below the folder."""
        files: list[FoundFile] = []
        strange: list[StrangeFile] = []
        try:
            _look(str(self._folder), files, strange, depth=0)
        except OSError as error:
            raise local_error(error, self._folder, "look into") from error
        files.sort(key=lambda found: (found.name, found.path))
        return FolderScan(tuple(files), tuple(strange))

    def find(self, path: str) -> FoundFile:
        """Return the file at a path, wherever it lies."""
        absolute = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
        try:
            found = os.stat(absolute)  # noqa: PTH116
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "it is not a file")
        except (OSError, ValueError) as error:
            reason = foreign_text(getattr(error, "strerror", None) or error)
            raise InputFileMissing(
                f"the job file {foreign_text(path)} cannot be read: {reason}", hint="name a YAML file that exists"
            ) from error
        return FoundFile(absolute, os.path.basename(absolute), _mark(found), found.st_mtime)  # noqa: PTH119

    def read(self, found: FoundFile) -> bytes | JobFileInvalid | None:
        """Return the content; None if the file has changed since it was found."""
        inside = found.path.startswith(os.path.join(str(self._folder), ""))  # noqa: PTH118
        try:
            with open_regular(found.path, follow=not inside) as opened:
                if _mark(os.fstat(opened.fileno())) != found.mark:
                    return None
                data = opened.read(MAX_BYTES + 1)
                return data if _mark(os.fstat(opened.fileno())) == found.mark else None
        except FileNotFoundError:
            return None
        except OSError as error:
            words = f"it cannot be read: {foreign_text(error.strerror or error)}"
            return invalid([Problem(1, "", words, "check its permissions")], file_name=found.name)

    def surroundings(self) -> Hashable:
        """Return the marks of the configuration, the list of workflows, and their graphs."""
        config = self._settings.config_file
        return self._registry.marks(), mark_of(Path(config)) if config else None

    # -- jobs ----------------------------------------------------------------------------------------------

    def job(self, found: FoundFile, data: bytes) -> ReadJob:
        """Return the job that the content describes."""
        tree, problems = read_yaml(data)
        if problems:
            raise invalid(problems, file_name=found.name)
        fields = read_job_file(tree, file_name=found.name)
        resolved = self._told(found, fields, "workflow_id", lambda: self._registry.resolve(fields.workflow_id))
        root, finished = self._settings.root, self._settings.jobs_finished
        out_file = self._told(
            found, fields, "outputs.file_path", lambda: checked_out_file(fields.file_path, root, finished)
        )
        return ReadJob(self._new_job(found, data, fields, resolved, out_file), fields.lines)

    def _new_job(self, found: FoundFile, data: bytes, fields: JobFile, resolved: Resolved, out_file: str) -> NewJob:
        root = Path(self._settings.root)
        return NewJob(
            request=JobRequest(
                workflow=resolved.workflow,
                inputs={
                    name: value if wants_text(name) else _with_files(value, root)
                    for name, value in fields.inputs.items()
                },
                input_names=resolved.input_names,
                required_inputs=resolved.required_inputs,
                out_file=out_file,
                out_root=self._settings.jobs_finished,
                timeout=fields.timeout,
            ),
            workflow_id=fields.workflow_id,
            config_name=found.name,
            job_type=fields.job_type,
            priority=fields.priority,
            retry_limit=fields.retry_limit,
            metadata=fields.metadata,
            user=fields.user,
            project=fields.project,
            source_path=found.path,
            content_sha256=hashlib.sha256(data).hexdigest(),
        )

    @staticmethod
    def _told(found: FoundFile, fields: JobFile, where: str, ask: Callable[[], Any]) -> Any:
        """Return what `ask` gives; what it refuses is told with the line of the field."""
        try:
            return ask()
        except BadInput as error:
            problem = Problem(fields.lines.get(where, 1), where, error.message, error.hint)
            raise invalid([problem], file_name=found.name, cause=error) from error


# --- looking into folders ---------------------------------------------------------------------------------


def _mark(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _look(folder: str, files: list[FoundFile], strange: list[StrangeFile], *, depth: int) -> None:
    """Collect what lies below a folder. Raises OSError for the first folder only."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith((".", "~", "#")):
                continue
            try:
                _judge(entry, files, strange, depth)
            except FileNotFoundError:
                continue  # gone while we looked
            except OSError as error:
                words = f"it cannot be looked at: {foreign_text(error.strerror or error)}"
                strange.append(StrangeFile(entry.path, words, "check its permissions"))


def _judge(entry: os.DirEntry[str], files: list[FoundFile], strange: list[StrangeFile], depth: int) -> None:
    wanted = entry.name.lower().endswith(SUFFIXES)
    if entry.is_symlink() or _is_junction(entry):
        if wanted or entry.is_dir():
            strange.append(StrangeFile(entry.path, "it is a link", "put the file or folder itself there"))
    elif entry.is_dir(follow_symlinks=False):
        if depth < DEEPEST:
            _look(entry.path, files, strange, depth=depth + 1)
        else:
            strange.append(StrangeFile(entry.path, f"it is more than {DEEPEST} folders deep", "put it higher up"))
    elif wanted and not _is_text(entry.name):
        hint = "give it a name of letters, digits, dots and dashes"
        strange.append(StrangeFile(entry.path, "its name has characters that are no text", hint))
    elif wanted:
        # Windows keeps what it tells of a folder's files back while they are written.
        found = os.stat(entry.path, follow_symlinks=False) if os.name == "nt" else entry.stat(follow_symlinks=False)  # noqa: PTH116
        if stat.S_ISREG(found.st_mode):
            files.append(FoundFile(entry.path, entry.name, _mark(found), found.st_mtime))


def _is_junction(entry: os.DirEntry[str]) -> bool:
    is_junction: Callable[[], bool] | None = getattr(entry, "is_junction", None)  # from Python 3.12 on
    return is_junction is not None and is_junction()


def _is_text(name: str) -> bool:
    if name.isascii() and name.isprintable():
        return True  # the usual case, asked for often
    # What is not UTF-8 comes from the system as lone surrogates.
    return unprintable(name) is None and not any(c in "\t\n\r" for c in name)


# --- files named as inputs --------------------------------------------------------------------------------


def _with_files(value: Any, root: Path) -> Any:
    """Return an input with the files of the project that it names made absolute: executors run elsewhere."""
    if isinstance(value, str):
        return _file(value, root)
    if isinstance(value, list):
        return [_with_files(item, root) for item in value]
    if isinstance(value, Mapping):
        return {name: _with_files(item, root) for name, item in value.items()}
    return value


def _file(text: str, root: Path) -> str:
    upload = text.startswith("@") and not text.startswith("@@")
    name = text[1:] if upload else text
    if not name or len(name) > 1_000 or "\n" in name or "\0" in name:
        return text
    if not upload and os.path.splitext(name)[1].lower() not in _MEDIA:  # noqa: PTH122
        return text
    try:
        path = Path(os.path.normpath(root / name))
        if Path(name).is_absolute() or not path.is_relative_to(root) or not path.is_file():
            return text
    except (OSError, ValueError):
        return text
    return f"@{path}" if upload else str(path)
