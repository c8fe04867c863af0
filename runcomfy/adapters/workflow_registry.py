"""
Which graph a workflow's id stands for: the project's `workflows.yaml`, then the workflows that ship.

    wf_realistic_portrait:
      template_path: "workflows/wf_realistic_portrait.json"   # from the project's folder, or beside this file
      required_inputs: ["prompt", "seed", "steps"]
      inputs: {prompt: 6.text, seed: 3.seed}                  # name -> where it goes, as in a sidecar
      description: "Portraits that look like photographs"

The user's entry counts more than a shipped workflow of the same name. The file is read again when it has changed.
Reading the graph itself is `workflow_files`' work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from threading import Lock
from typing import Final

from runcomfy.adapters.files import open_regular
from runcomfy.adapters.yaml_text import MAX_BYTES, read_yaml
from runcomfy.domain.exceptions import SettingInvalid, WorkflowNotFound, foreign_text
from runcomfy.domain.marked import Branch, Entry, Items, Leaf, Node, Problem, below, joined, what_it_is

FIELDS: Final = ("template_path", "required_inputs", "inputs", "description")
Mark = tuple[int, int, int]
"""Of a file: size, time of change, number; another one means other content."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a workflow's id stands for."""

    workflow: str
    """A path, absolute, or the name of a workflow that ships."""
    input_names: Mapping[str, str] = field(default_factory=dict)
    """Name -> target, from the entry."""
    required_inputs: tuple[str, ...] = ()
    description: str = ""


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One workflow of `workflows.yaml`."""

    name: str
    line: int
    template_path: str
    """As written."""
    required_inputs: tuple[str, ...] = ()
    inputs: Mapping[str, str] = field(default_factory=dict)
    description: str = ""


class WorkflowRegistry:
    """Finds workflows by their ids. Its methods read files, so they block; they may be called from any thread."""

    def __init__(self, *, root: str, workflows_file: str | None, shipped: Callable[[], Sequence[str]]) -> None:
        """`shipped` names the workflows that ship; `root` is the project's folder."""
        self._root = Path(root)
        self._file = Path(workflows_file) if workflows_file is not None else None
        self._shipped = shipped
        self._lock = Lock()
        self._read: tuple[Mark | None, Mapping[str, RegistryEntry]] | None = None

    def names(self) -> list[str]:
        """Return every id there is. Raises SettingInvalid (the file)."""
        return sorted({*self.entries(), *self._shipped()})

    def resolve(self, workflow_id: str) -> Resolved:
        """Return what an id stands for.

        Raises WorkflowNotFound (no such id, or its file is missing), SettingInvalid (`workflows.yaml` itself).
        """
        entry = self.entries().get(workflow_id)
        if entry is not None:
            return Resolved(self._template(entry), entry.inputs, entry.required_inputs, entry.description)
        if workflow_id in self._shipped():
            return Resolved(workflow_id)
        names = self.names()
        close = get_close_matches(workflow_id[:200], names, n=3)
        known = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names)}"
        where = f"or add it to {self._file}" if self._file is not None else "or name it in a workflows.yaml"
        raise WorkflowNotFound(
            f"there is no workflow {foreign_text(workflow_id, 80)!r}",
            hint=f"{known}; {where}",
            details={"workflow_id": foreign_text(workflow_id), "known": names},
        )

    def entries(self) -> Mapping[str, RegistryEntry]:
        """Return what `workflows.yaml` says; nothing if there is none. Raises SettingInvalid."""
        if self._file is None:
            return {}
        with self._lock:
            mark = mark_of(self._file)
            if self._read is None or self._read[0] != mark:
                self._read = (mark, _load(self._file) if mark is not None else {})
            return self._read[1]

    def marks(self) -> tuple[tuple[str, Mark | None], ...]:
        """Return what changes when a file does that decides what the ids stand for. Never raises."""
        files: list[Path] = []
        if self._file is not None:
            files.append(self._file)
            try:
                entries = self.entries()
            except SettingInvalid:
                entries = {}
            for entry in entries.values():
                for path in self._candidates(entry.template_path):
                    files += [path, path.with_suffix(".toml")]
        return tuple((str(path), mark_of(path)) for path in files)

    # -- files ---------------------------------------------------------------------------------------------

    def _candidates(self, template_path: str) -> list[Path]:
        """Where an entry's file may be: from the project's folder, then beside `workflows.yaml`."""
        try:
            written = Path(template_path).expanduser()
        except RuntimeError:  # the home of a user who does not exist
            written = Path(template_path)
        bases = [self._root] + ([self._file.parent] if self._file is not None else [])
        return list(dict.fromkeys(Path(os.path.normpath(base / written)) for base in bases))

    def _template(self, entry: RegistryEntry) -> str:
        paths = self._candidates(entry.template_path)
        for path in paths:
            if path.is_file():
                return str(path)
        name = entry.template_path.replace("\\", "/").rpartition("/")[2].removesuffix(".json")
        if name in self._shipped():
            return name
        raise WorkflowNotFound(
            f"the workflow {foreign_text(entry.name, 80)} ({self._file}, line {entry.line}) has no file: "
            f"there is no {' nor '.join(map(str, paths))}",
            hint="correct its template_path, or put the API-format .json file there",
            details={"workflow_id": entry.name, "searched": [str(path) for path in paths]},
        )


def mark_of(path: Path) -> Mark | None:
    """Return the mark of a file, None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


# --- reading ----------------------------------------------------------------------------------------------


def _load(file: Path) -> Mapping[str, RegistryEntry]:
    try:
        with open_regular(file, follow=True) as opened:
            tree, problems = read_yaml(opened.read(MAX_BYTES + 1))
    except OSError as error:
        words = f"it cannot be read: {foreign_text(error.strerror or error)}"
        tree, problems = None, [Problem(1, "", words, "check its permissions")]
    if not problems:
        found = _entries(tree, problems)
        if not problems:
            return found
    words, hint = joined(problems)
    raise SettingInvalid(
        f"{file}, {words}",
        hint=hint,
        details={"place": str(file), "problems": [problem.as_dict() for problem in problems]},
    )


def _entries(tree: Node | None, problems: list[Problem]) -> dict[str, RegistryEntry]:
    if tree is None or (isinstance(tree, Leaf) and tree.forgotten):
        return {}
    if not isinstance(tree, Branch):
        hint = "write an id, a colon, and below it template_path: …"
        problems.append(Problem(tree.line, "", f"expected ids of workflows, found {what_it_is(tree)}", hint))
        return {}
    return {entry.key: found for entry in tree if (found := _entry(entry, problems)) is not None}


def _entry(entry: Entry, problems: list[Problem]) -> RegistryEntry | None:
    if not isinstance(entry.value, Branch):
        words = f"expected template_path and required_inputs, found {what_it_is(entry.value)}"
        problems.append(Problem(entry.line, entry.key, words, "write template_path: … below the id, further in"))
        return None
    for part in entry.value:
        if part.key not in FIELDS:
            close = get_close_matches(part.key, FIELDS, 1, 0.6)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}"
            problems.append(Problem(part.line, below(entry.key, part.key), "there is no such field", hint))
    path = entry.value.get("template_path")
    if path is None:
        hint = "name the API-format .json file"
        problems.append(Problem(entry.line, below(entry.key, "template_path"), "it is missing", hint))
        return None
    inputs = entry.value.get("inputs")
    description = entry.value.get("description")
    return RegistryEntry(
        name=entry.key,
        line=entry.line,
        template_path=_text(path.value, below(entry.key, "template_path"), problems),
        required_inputs=_texts(entry.value.get("required_inputs"), below(entry.key, "required_inputs"), problems),
        inputs=_targets(inputs, below(entry.key, "inputs"), problems),
        description=_text(description.value, below(entry.key, "description"), problems) if description else "",
    )


def _text(node: Node, where: str, problems: list[Problem]) -> str:
    if isinstance(node, Leaf) and node.text.strip():
        return node.text.strip()
    problems.append(Problem(node.line, where, f"expected a text, found {what_it_is(node)}", "put the text in quotes"))
    return ""


def _texts(entry: Entry | None, where: str, problems: list[Problem]) -> tuple[str, ...]:
    if entry is None or (isinstance(entry.value, Leaf) and entry.value.forgotten):
        return ()
    if not isinstance(entry.value, Items):
        hint = 'write a list: ["prompt", "seed"]'
        problems.append(Problem(entry.line, where, f"expected a list, found {what_it_is(entry.value)}", hint))
        return ()
    return tuple(_text(item, below(where, number), problems) for number, item in enumerate(entry.value.items))


def _targets(entry: Entry | None, where: str, problems: list[Problem]) -> dict[str, str]:
    if entry is None or (isinstance(entry.value, Leaf) and entry.value.forgotten):
        return {}
    if not isinstance(entry.value, Branch):
        words = f"expected names with targets, found {what_it_is(entry.value)}"
        problems.append(Problem(entry.line, where, words, "write for example prompt: 6.text below it"))
        return {}
    return {part.key: _text(part.value, below(where, part.key), problems) for part in entry.value}
