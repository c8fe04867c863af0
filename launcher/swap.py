"""
Putting our files into a CONJURE project, and putting back what was there.

What is replaced is kept first, under the hash of its content, in `.runcomfy-orchestrator` at the project's root; a
manifest is written before anything else, so that what lies there has a reason. Every file is replaced whole. So
whoever is killed in the middle does the same once more, or the opposite: both look at what each file is now, and do
what is left to do. A file that somebody has changed meanwhile is nobody's to overwrite. Nothing is followed out of the
project.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.files import local_error, make_private_dir, open_regular, remove_quietly, write_atomically
from runcomfy.adapters.folder_lock import FolderLock
from runcomfy.application.faultpoints import faultpoint
from runcomfy.domain.exceptions import (
    FolderWatched,
    InputFileInvalid,
    InputFileMissing,
    LocalError,
    ValueInvalid,
    foreign_text,
)

FOLDER: Final = ".runcomfy-orchestrator"
MANIFEST: Final = "manifest.json"
LOCK: Final = ".lock"
IGNORE: Final = ".gitignore"
SCHEMA: Final = 1
MAX_BYTES: Final = 4 * 1024**2
"""Of a source file or the manifest; what is larger is something else."""
NEW_FILE: Final = 0o644

MARKS: Final = (
    "launcher/generation_services.py",
    "launcher/api_server.py",
    "launcher/main.py",
    "launcher/state_manager.py",
    "launcher/subprocess_manager.py",
    "launcher/config.py",
    "launcher/backend_agent.py",
    "launcher/instruction_manager.py",
    "runcomfy/dev_server_startup.py",
    "runcomfy/runcomfy_orchestrator.py",
)
"""Files of CONJURE; a folder that has at least two of them is one, if not only those that any project may have."""
COMMON: Final = frozenset({"launcher/main.py", "launcher/config.py"})
MARKS_NEEDED: Final = 2
SECOND_REVISION: Final = ("launcher/local_comfyui_service.py", "runcomfy/serverless_service.py")

_HASH: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Target:
    """A file of CONJURE that one of ours takes the place of."""

    path: str
    shim: str
    always: bool = False
    """Whether it is put there even if CONJURE has no such file."""

    def content(self) -> bytes:
        """Return what is put there."""
        return (Path(__file__).with_name("shims") / self.shim).read_bytes()


TARGETS: Final = (
    Target("launcher/generation_services.py", "generation_services.py", always=True),
    Target("launcher/local_comfyui_service.py", "local_comfyui_service.py"),
    Target("runcomfy/dev_server_startup.py", "dev_server_startup.py"),
)
"""Only what imports written bare, and scripts run by their path, reach; the rest is found as installed packages."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the manifest says of one file."""

    path: str
    sha256: str | None
    """Of what was there; None: nothing was."""
    mode: int
    mtime_ns: int
    shim_sha256: str


@dataclass(slots=True)
class Report:
    """What was done, or would be."""

    project: str
    revision: str
    state: str
    """`installed`, `not installed`, `half installed`, `half uninstalled` or `changed`."""
    files: list[dict[str, str]] = field(default_factory=list)
    """`path` and `what` became, or is, of it."""
    notes: list[str] = field(default_factory=list)
    backup: str | None = None
    python: str | None = None
    """The interpreter for which it was installed: CONJURE has to be run by one that has this product."""
    dry_run: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the report as `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Project:
    """A CONJURE project."""

    root: Path
    revision: str
    """`R1` (local and cloud) or `R2` (also serverless and local ComfyUI)."""

    @property
    def folder(self) -> Path:
        """Where what was replaced is kept."""
        return self.root / FOLDER

    def place(self, path: str) -> Path:
        """Return where a file of the project is. Raises InputFileInvalid if a link leads there."""
        place = self.root / path
        if Path(os.path.realpath(place)) != place:
            raise InputFileInvalid(
                f"{foreign_text(path)} is, or lies behind, a link: nothing is written where a link leads",
                hint="give the path of the project's own folder, with its own files",
                details={"path": path},
            )
        return place

    def read(self, path: str) -> bytes | None:
        """Return a file's content; None if there is none. Raises InputFileInvalid, LocalError."""
        place = self.place(path)
        try:
            with open_regular(place) as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise local_error(error, place, "read") from error
        if len(data) > MAX_BYTES:
            raise InputFileInvalid(f"{foreign_text(path)} is too large for a source file", hint="look what it is")
        return data


def find_project(path: str | os.PathLike[str]) -> Project:
    """Return the CONJURE project at `path`, or whose `launcher` folder that is.

    Raises InputFileMissing, ValueInvalid (it is none; says what is missed).
    """
    given = Path(path)
    shown = foreign_text(given, 500)
    try:
        root = given.expanduser().resolve(strict=True)
        is_folder = root.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputFileMissing(f"there is no folder {shown}", hint="give the folder that holds launcher/") from error
    if not is_folder:
        raise ValueInvalid(f"{shown} is not a folder", hint="give the folder that holds CONJURE's launcher/")
    found = _marks(root)
    if root.name == "launcher" and not found and _is_project(root.parent):
        root = root.parent
        found = _marks(root)
    if (root / "launcher" / "swap.py").exists():
        raise ValueInvalid(f"{shown} is this product itself, not CONJURE", hint="give the folder of CONJURE")
    if not _is_project(root):
        missed = ", ".join(mark for mark in MARKS if mark not in found)
        raise ValueInvalid(
            f"{shown} is not a CONJURE project: {len(found)} of its files were found there, not {missed}",
            hint="give the folder that holds CONJURE's launcher/ and runcomfy/",
            details={"found": found},
        )
    second = any((root / mark).exists() for mark in SECOND_REVISION)
    return Project(root, "R2" if second else "R1")


def _marks(root: Path) -> list[str]:
    return [mark for mark in MARKS if (root / mark).is_file()]


def _is_project(root: Path) -> bool:
    found = _marks(root)
    return (len(found) >= MARKS_NEEDED and bool(set(found) - COMMON)) or (root / FOLDER / MANIFEST).is_file()


# -- the three verbs ---------------------------------------------------------------------------------------


def status(project: Project) -> Report:
    """Say what is installed, and whether a file was changed since. Changes nothing. Raises InputFileInvalid."""
    book = _read_manifest(project)
    report = Report(str(project.root), project.revision, "not installed")
    entries = book.entries if book is not None else {}
    kinds = []
    for target in TARGETS:
        kind = _kind(project.read(target.path), target, entries.get(target.path))
        if kind != "absent":
            kinds.append(kind)
            report.files.append({"path": target.path, "what": kind})
    if book is not None:
        report.backup, report.python = str(project.folder), book.python
        report.state = _state(book, kinds)
    elif "ours" in kinds:
        report.notes.append("our files are there, but not what they replaced: restore it with your version control")
        report.state = "half uninstalled"
    return report


def install(project: Project, *, force: bool = False, dry_run: bool = False) -> Report:
    """Put our files into the project; what they replace is kept. Repeating it does what is left to do.

    Raises ValueInvalid (a file was changed since, and not `force`), InputFileInvalid (links), LocalError.
    """
    with _held(project, dry_run=dry_run):
        book = _read_manifest(project)
        entries = dict(book.entries) if book is not None and book.state != "uninstalled" else {}
        report = Report(str(project.root), project.revision, "installed", dry_run=dry_run, python=sys.executable)
        report.backup = str(project.folder)
        steps: list[tuple[Target, bytes | None, bytes | None]] = []
        changed = []
        for target in TARGETS:
            now, entry = project.read(target.path), entries.get(target.path)
            kind = _kind(now, target, entry)
            if kind == "absent" and not target.always:
                continue
            if kind == "ours" and entry is None:
                raise ValueInvalid(
                    f"{target.path} is ours already, but what it replaced is not in {FOLDER}",
                    hint=f"restore it first, for example with: git checkout -- {target.path}",
                )
            if kind in ("changed", "removed") and not force:
                changed.append(target.path)
                continue
            what, new = _to_install(target, now, entry, kind)
            steps.append((target, new, target.content() if what != "there already" else None))
            if new is not None or entry is None:
                entries[target.path] = _entry(project, target, now)
            report.files.append({"path": target.path, "what": what})
        if changed:
            raise _changed(changed, "install")
        if dry_run:
            report.state = status(project).state
            return report
        _write_manifest(project, "installing", entries)
        faultpoint("swap.written")
        for _, original, _ in steps:
            if original is not None:
                _keep(project, original)
        faultpoint("swap.kept")
        for target, _, content in steps:
            if content is not None:
                mode = entries[target.path].mode
                write_atomically(project.place(target.path), content, mode=mode)
                faultpoint("swap.replaced")
        # Only now are an older version's files known to be gone: until then they are told by what the manifest says.
        renewed = {
            target.path: replace(entries[target.path], shim_sha256=_sha(target.content())) for target, *_ in steps
        }
        _write_manifest(project, "installed", {**entries, **renewed})
    return report


def uninstall(project: Project, *, force: bool = False, dry_run: bool = False) -> Report:
    """Put back what was there before, byte for byte. Nothing to do is a success; repeating it does what is left.

    Raises ValueInvalid (a file was changed since, and not `force`), InputFileInvalid (links; a backup that is damaged),
    LocalError.
    """
    if not (project.folder / MANIFEST).is_file():
        report = status(project)
        report.dry_run = dry_run
        return report
    with _held(project, dry_run=dry_run):
        book = _read_manifest(project)
        report = Report(str(project.root), project.revision, "not installed", dry_run=dry_run)
        if book is None:
            return report
        left = [] if book.state == "uninstalled" else _to_put_back(project, book, report, force=force)
        if dry_run:
            report.state = status(project).state
            return report
        if book.state != "uninstalled":
            _put_back(project, book, left, report)
        _clear(project, book, report)
    _remove_folder(project, report)
    return report


# -- installing --------------------------------------------------------------------------------------------


def _to_install(target: Target, now: bytes | None, entry: Entry | None, kind: str) -> tuple[str, bytes | None]:
    """Return what happens to a file, and its content if that is to be kept."""
    if kind == "ours":
        return "there already", None
    if kind == "older":
        return "renewed", None
    if kind == "original" and entry is not None:
        return "put in place", now
    if kind == "changed" and entry is not None:
        return "put in place of the changed file, which is kept", now
    if now is None:
        return "added", None
    return "put in place, the original is kept", now


def _entry(project: Project, target: Target, now: bytes | None) -> Entry:
    shim = _sha(target.content())
    if now is None:
        return Entry(target.path, None, NEW_FILE, 0, shim)
    facts = project.place(target.path).stat()
    return Entry(target.path, _sha(now), stat.S_IMODE(facts.st_mode), facts.st_mtime_ns, shim)


def _keep(project: Project, data: bytes) -> None:
    place = project.folder / _sha(data)
    with suppress(OSError), open_regular(place) as file:
        if file.read(MAX_BYTES + 1) == data:
            return
    write_atomically(place, data)


# -- putting back ------------------------------------------------------------------------------------------

Step = tuple[Entry, bytes | None, bytes | None]
"""A file, what goes there (None: nothing), and a changed content that is kept beside it."""


def _to_put_back(project: Project, book: _Book, report: Report, *, force: bool) -> list[Step]:
    """Return what is to be put back; every backup has been read and compared. Raises ValueInvalid, InputFileInvalid."""
    steps: list[Step] = []
    changed = []
    for target in TARGETS:
        entry = book.entries.get(target.path)
        if entry is None:
            continue
        now = project.read(target.path)
        kind = _kind(now, target, entry)
        if kind == "original" or (kind == "removed" and entry.sha256 is None):
            report.files.append({"path": target.path, "what": "as it was"})
            continue
        if kind in ("changed", "removed") and not force:
            changed.append(target.path)
            continue
        original = _kept(project, entry.sha256) if entry.sha256 is not None else None
        steps.append((entry, original, now if kind == "changed" else None))
        what = "removed" if original is None else "put back"
        report.files.append({"path": target.path, "what": what + ("; the changed file is kept" if now else "")})
        if kind != "changed":
            report.files[-1]["what"] = what
    if changed:
        raise _changed(changed, "uninstall")
    return steps


def _put_back(project: Project, book: _Book, steps: Sequence[Step], report: Report) -> None:
    for _, _, mine in steps:
        if mine is not None:
            _keep(project, mine)
            report.notes.append(f"the changed file is kept as {project.folder / _sha(mine)}")
    _write_manifest(project, "uninstalling", book.entries, python=book.python)
    faultpoint("swap.begun")
    for entry, original, _ in steps:
        place = project.place(entry.path)
        if original is None:
            remove_quietly(place)
        else:
            write_atomically(place, original, mode=entry.mode)
            with suppress(OSError):
                os.utime(place, ns=(entry.mtime_ns, entry.mtime_ns))
        faultpoint("swap.put-back")
    _write_manifest(project, "uninstalled", book.entries, python=book.python)
    faultpoint("swap.ended")


def _kept(project: Project, sha256: str) -> bytes:
    data = project.read(f"{FOLDER}/{sha256}")
    if data is None or _sha(data) != sha256:
        raise InputFileInvalid(
            f"what was kept in {FOLDER} is {'gone' if data is None else 'damaged'}",
            hint="restore CONJURE's files with your version control, then remove that folder",
            details={"sha256": sha256},
        )
    return data


def _clear(project: Project, book: _Book, report: Report) -> None:
    """Remove what was kept and is back at its place, then the manifest."""
    for entry in book.entries.values():
        if entry.sha256 is not None:
            now = project.read(entry.path)
            if now is not None and _sha(now) == entry.sha256:
                remove_quietly(project.folder / entry.sha256)
            else:
                report.notes.append(f"the original of {entry.path} stays in {project.folder}")
    faultpoint("swap.cleared")
    remove_quietly(project.folder / MANIFEST)


def _remove_folder(project: Project, report: Report) -> None:
    names = sorted(path.name for path in project.folder.iterdir()) if project.folder.is_dir() else []
    kept = [name for name in names if _HASH.fullmatch(name)]
    remove_quietly(project.folder / LOCK)
    if kept:
        report.backup = str(project.folder)
        return
    remove_quietly(project.folder / IGNORE)
    with suppress(OSError):
        project.folder.rmdir()


# -- what is there -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Book:
    state: str
    python: str
    entries: Mapping[str, Entry]


def _kind(now: bytes | None, target: Target, entry: Entry | None) -> str:
    """Say what a file is: `ours`, `older` (ours of another version), `original`, `changed`, `removed`, `absent`."""
    found = _sha(now) if now is not None else None
    if found == _sha(target.content()):
        return "ours"
    if entry is None:
        return "absent" if found is None else "original"
    if found == entry.shim_sha256:
        return "older"
    if found == entry.sha256:
        return "original"
    return "removed" if found is None else "changed"


def _state(book: _Book, kinds: Sequence[str]) -> str:
    if book.state == "uninstalled":
        return "not installed"
    if "changed" in kinds or "removed" in kinds:
        return "changed"
    if book.state == "installed" and all(kind in ("ours", "older") for kind in kinds):
        return "installed"
    return "half uninstalled" if book.state == "uninstalling" else "half installed"


def _read_manifest(project: Project) -> _Book | None:
    """Return what the manifest says; None if there is none. Nothing in it is believed that could not be ours."""
    data = project.read(f"{FOLDER}/{MANIFEST}")
    if data is None:
        return None
    try:
        document = json.loads(data.decode("utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError("written by another version")
        entries = [_entry_of(item) for item in document["files"]]
        state, python = str(document["state"]), str(document["python"])
        known = {target.path for target in TARGETS}
        if state not in ("installing", "installed", "uninstalling", "uninstalled"):
            raise ValueError("an unknown state")
        if {entry.path for entry in entries} - known:
            raise ValueError("a file that is not one of ours")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputFileInvalid(
            f"{FOLDER}/{MANIFEST} cannot be read: {foreign_text(error, 80)}",
            hint="restore CONJURE's files with your version control, then remove that folder",
        ) from error
    return _Book(state, foreign_text(python, 500), {entry.path: entry for entry in entries})


def _entry_of(item: Mapping[str, Any]) -> Entry:
    sha256, shim = item["sha256"], item["shim_sha256"]
    for text in (sha256, shim):
        if text is not None and not _HASH.fullmatch(text):
            raise ValueError("a hash that is none")
    if shim is None:
        raise ValueError("a hash that is none")
    mode, mtime_ns = int(item["mode"]), int(item["mtime_ns"])
    return Entry(str(item["path"]), sha256, mode & 0o777, max(0, mtime_ns), shim)


def _write_manifest(project: Project, state: str, entries: Mapping[str, Entry], *, python: str = "") -> None:
    document = {
        "schema": SCHEMA,
        "product": "runcomfy-orchestrator",
        "version": _version(),
        "state": state,
        "python": python or sys.executable,
        "written_at": datetime.now(UTC).isoformat(),
        "files": [asdict(entry) for entry in entries.values()],
    }
    write_atomically(project.folder / MANIFEST, json.dumps(document, indent=2) + "\n")


@contextmanager
def _held(project: Project, *, dry_run: bool) -> Iterator[None]:
    """Be the only one who changes the project. A dry run changes nothing and waits for nobody."""
    project.place(FOLDER)
    if dry_run:
        yield
        return
    make_private_dir(project.folder)
    lock = FolderLock(project.folder, name=LOCK)
    try:
        lock.take()
    except FolderWatched as error:
        raise LocalError("another `comfyctl conjure` works on this project", hint="wait for it, then repeat") from error
    try:
        if not (project.folder / IGNORE).exists():
            write_atomically(project.folder / IGNORE, "*\n")
        yield
    finally:
        lock.release()
        if not (project.folder / MANIFEST).exists():  # it came to nothing
            _remove_folder(project, Report("", "", ""))


def _changed(paths: Sequence[str], verb: str) -> ValueInvalid:
    return ValueInvalid(
        f"changed since it was installed: {', '.join(paths)}",
        hint=f"look at the change; `comfyctl conjure {verb} --force` keeps a copy of the changed file and goes on",
        details={"files": list(paths)},
    )


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version() -> str:
    try:
        return version("runcomfy-orchestrator")
    except PackageNotFoundError:
        return ""
