"""
The job file: which fields it has, what each may hold, and how a mistake is told so that the user finds it.

    job_type: T2I                       # required
    workflow_id: wf_realistic_portrait  # required: an entry of workflows.yaml, or a workflow that ships
    priority: 20                        # 1 to 999, lower runs first
    inputs:                             # required, may be {}
      prompt: "a knight in rain"
      seed: 123456
    outputs:
      file_path: "jobs/finished/image/knight.png"   # required
    metadata: {creator: cli}            # anything; kept in the database
    retry_limit: 2                      # 0 to 100
    timeout: 10m
    user: ada
    project: knights

Every mistake of a file is found in one go. Where the file lies, what its workflow is and where results may go are for
others to say: this module sees a tree and gives values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Final, TypeVar

from runcomfy.domain.durations import parse_duration
from runcomfy.domain.exceptions import BadInput, JobFileInvalid, NameTaken, ValueInvalid, foreign_text
from runcomfy.domain.marked import (
    Branch,
    Entry,
    Items,
    Leaf,
    Node,
    Problem,
    below,
    joined,
    plain,
    what_it_is,
)
from runcomfy.domain.queued import FIRST_PRIORITY, LAST_PRIORITY

T = TypeVar("T")

REQUIRED: Final = ("job_type", "workflow_id", "inputs", "outputs")
FIELDS: Final = (*REQUIRED, "priority", "metadata", "retry_limit", "timeout", "user", "project")
OUTPUT_FIELDS: Final = ("file_path",)
MOST_RETRIES: Final = 100
LONGEST_TIMEOUT: Final = timedelta(days=30)
LONGEST_WORD: Final = 200
LONGEST_PATH: Final = 4_000
_SHORTEST_PATH: Final = 4
"""Shorter texts may stand in any sentence."""

_QUOTE_HINT: Final = "put the text in quotes"
_SWITCH_HINT: Final = 'write true or false for a switch, or put the word in quotes for a text: "{}"'
_TEXT_NAMES: Final = frozenset({"prompt", "negative_prompt", "text", "negative"})
_TEXT_ENDINGS: Final = ("_text", "_prompt", ".text", ".prompt")


@dataclass(frozen=True, slots=True)
class JobFile:
    """What a job file says, checked, with the line of each field."""

    job_type: str
    workflow_id: str
    inputs: Mapping[str, Any]
    file_path: str
    """`outputs.file_path`, as written."""
    priority: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    retry_limit: int | None = None
    timeout: timedelta | None = None
    user: str = ""
    project: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Field (`inputs.seed`) -> line."""


def read_job_file(tree: Node | None, *, file_name: str) -> JobFile:
    """Return what the tree says. Raises JobFileInvalid with every problem."""
    if isinstance(tree, Branch):
        return _Reader(tree, file_name).read()
    if tree is None or (isinstance(tree, Leaf) and not tree.text):
        problem = Problem(1, "", "the file is empty", f"write {', '.join(REQUIRED)}")
    else:
        hint = f"write `name: value` lines: {', '.join(REQUIRED)}"
        problem = Problem(tree.line, "", f"expected names with values, found {what_it_is(tree)}", hint)
    raise invalid([problem], file_name=file_name)


def invalid(problems: Sequence[Problem], *, file_name: str, cause: BadInput | None = None) -> JobFileInvalid:
    """Return the error that tells these problems: "T2I_x.yaml, line 7, inputs.seed: …"."""
    words, hint = joined(problems)
    first = problems[0]
    details: dict[str, Any] = {
        "file": file_name,
        "line": first.line,
        "field": first.field,
        "problems": [problem.as_dict() for problem in problems],
    }
    if cause is not None:
        details = {**cause.details, **details, "cause": cause.code}
    return JobFileInvalid(f"{foreign_text(file_name, 120)}, {words}", hint=hint, details=details)


def blamed(error: BadInput, lines: Mapping[str, int], *, file_name: str, inputs: Mapping[str, Any]) -> JobFileInvalid:
    """Return `error`, found out with the workflow or the queue at hand, with the line of the field that is to blame.

    `inputs` are those the file gives. An error that is about none of them is the workflow's, or of all inputs.
    """
    if isinstance(error, JobFileInvalid):
        return error
    if isinstance(error, NameTaken):
        where = "outputs.file_path"
    elif (named := error.details.get("field")) in lines:
        where = str(named)
    elif "missing" in error.details:
        where = "inputs"
    elif (guilty := _guilty(error, inputs)) is not None:
        where = below("inputs", guilty)
    elif error.code.startswith("workflow"):
        where = "workflow_id"
    else:
        where = "inputs"
    problem = Problem(lines.get(where, 1), where, error.message, error.hint)
    return invalid([problem], file_name=file_name, cause=error)


def _guilty(error: BadInput, inputs: Mapping[str, Any]) -> str | None:
    """Return the input an error is about: it says so, or its words have the input's name or the file it names."""
    for key in ("name", "input", "target"):
        if (said := error.details.get(key)) in inputs:
            return str(said)
    longest_first = sorted(inputs, key=len, reverse=True)
    for name in longest_first:
        if _mentions(error.message, name):
            return name
    for name in longest_first:
        value = inputs[name]
        if isinstance(value, str) and len(value) > _SHORTEST_PATH and value.removeprefix("@") in error.message:
            return name
    return None


def _mentions(message: str, name: str) -> bool:
    """Whether the name stands in the message as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) is not None


class _Reader:
    """Reads one file; one use."""

    def __init__(self, tree: Branch, file_name: str) -> None:
        self._tree = tree
        self._file_name = file_name
        self._problems: list[Problem] = []
        self._lines: dict[str, int] = {}

    def read(self) -> JobFile:
        tree = self._tree
        self._note("", tree)
        meant = self._known(tree, "", FIELDS)
        for name in REQUIRED:
            if tree.get(name) is None and name not in meant:
                self._missing(tree.line, name)
        job_type = self._field(tree, "job_type", self._word, "")
        workflow_id = self._field(tree, "workflow_id", self._word, "")
        priority = self._field(tree, "priority", self._whole(FIRST_PRIORITY, LAST_PRIORITY), None)
        inputs: dict[str, Any] = self._field(tree, "inputs", self._inputs, {})
        file_path = self._field(tree, "outputs", self._outputs, "")
        metadata: dict[str, Any] = self._field(tree, "metadata", self._metadata, {})
        retry_limit = self._field(tree, "retry_limit", self._whole(0, MOST_RETRIES), None)
        timeout = self._field(tree, "timeout", self._timeout, None)
        user, project = (self._field(tree, name, self._word, "") for name in ("user", "project"))
        if self._problems:
            raise invalid(sorted(self._problems, key=lambda p: p.line), file_name=self._file_name)
        return JobFile(
            job_type=job_type,
            workflow_id=workflow_id,
            inputs=inputs,
            file_path=file_path,
            priority=priority,
            metadata=metadata,
            retry_limit=retry_limit,
            timeout=timeout,
            user=user,
            project=project,
            lines=self._lines,
        )

    # -- problems ------------------------------------------------------------------------------------------

    def _wrong(self, node: Node, where: str, message: str, hint: str = "") -> None:
        self._problems.append(Problem(node.line, where, message, hint))

    def _missing(self, line: int, where: str) -> None:
        hints = {
            "job_type": "write the kind of job, for example job_type: T2I",
            "workflow_id": "name an entry of workflows.yaml, or a workflow that ships",
            "inputs": "write the workflow's inputs below it, or inputs: {} if it needs none",
        }
        hint = hints.get(where, "say where the result goes: outputs: with file_path: below it")
        self._problems.append(Problem(line, where, "it is missing", hint))

    def _known(self, branch: Branch, prefix: str, names: Sequence[str]) -> set[str]:
        """Refuse fields that do not exist; return which were probably meant."""
        meant = set()
        for entry in branch:
            if entry.key in names:
                continue
            close = get_close_matches(entry.key.lower()[:60], names, n=1, cutoff=0.6)
            meant.update(close)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}; put notes into metadata"
            where = below(prefix, foreign_text(entry.key, 60))
            self._problems.append(Problem(entry.line, where, "there is no such field", hint))
        return meant

    def _note(self, prefix: str, branch: Branch) -> None:
        for entry in branch:
            where = below(prefix, entry.key)
            self._lines[where] = entry.line
            if isinstance(entry.value, Branch):
                self._note(where, entry.value)

    # -- fields --------------------------------------------------------------------------------------------

    def _field(self, branch: Branch, name: str, read: Callable[[Entry, str], T | None], otherwise: T) -> T:
        entry = branch.get(name)
        found = None if entry is None else read(entry, name)
        return otherwise if found is None else found

    def _word(self, entry: Entry, where: str) -> str | None:
        text = self._text(entry.value, where)
        if text is None:
            return None
        text = text.strip()
        if len(text) > LONGEST_WORD or "\n" in text:
            self._wrong(entry.value, where, f"it is longer than a line of {LONGEST_WORD} characters", "write one word")
            return None
        return text

    def _text(self, node: Node, where: str) -> str | None:
        """The text that was written, be it one that looks like a number or like `no`."""
        if not isinstance(node, Leaf):
            self._wrong(node, where, f"expected a text, found {what_it_is(node)}", _QUOTE_HINT)
        elif node.forgotten or not node.text.strip():
            self._wrong(node, where, "it is empty", "write a value after the colon")
        elif not node.quoted and node.text.lower() in ("true", "false", "null", "~"):
            self._wrong(node, where, f"expected a text, found {node.text}", f'{_QUOTE_HINT}: "{node.text}"')
        else:
            return node.text
        return None

    def _whole(self, least: int, most: int) -> Callable[[Entry, str], int | None]:
        def read(entry: Entry, where: str) -> int | None:
            node = entry.value
            try:
                value = node.value if isinstance(node, Leaf) else None
            except ValueError:
                value = None
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                hint = "write it without quotes" if isinstance(value, str) and value.strip().isdigit() else ""
                words = f"expected a whole number from {least} to {most}, found {what_it_is(node)}"
                self._wrong(node, where, words, hint or f"write a number such as {max(least, min(50, most))}")
                return None
            return value

        return read

    def _timeout(self, entry: Entry, where: str) -> timedelta | None:
        text = self._text(entry.value, where)
        if text is None:
            return None
        try:
            duration = parse_duration(text)
        except ValueInvalid as error:
            self._wrong(entry.value, where, error.message, error.hint)
            return None
        if not timedelta(0) < duration <= LONGEST_TIMEOUT:
            self._wrong(entry.value, where, "it is not more than nothing and at most 30 days", "write for example 10m")
            return None
        return duration

    def _branch(self, entry: Entry, where: str, hint: str) -> Branch | None:
        if isinstance(entry.value, Branch):
            return entry.value
        # What is forgotten stands where the name is.
        line = entry.line if isinstance(entry.value, Leaf) else entry.value.line
        words = f"expected names with values, found {what_it_is(entry.value)}"
        self._problems.append(Problem(line, where, words, hint))
        return None

    def _outputs(self, entry: Entry, where: str) -> str | None:
        hint = 'write file_path: "jobs/finished/image/NAME.png" below it, two spaces further in'
        branch = self._branch(entry, where, hint)
        if branch is None:
            return None
        meant = self._known(branch, where, OUTPUT_FIELDS)
        path = branch.get("file_path")
        if path is None:
            if not meant:
                self._missing(entry.line, below(where, "file_path"))
            return None
        text = self._text(path.value, below(where, "file_path"))
        if text is not None and len(text) > LONGEST_PATH:
            self._wrong(path.value, below(where, "file_path"), f"it has more than {LONGEST_PATH} characters")
            return None
        return text

    def _metadata(self, entry: Entry, where: str) -> dict[str, Any] | None:
        if isinstance(entry.value, Leaf) and entry.value.forgotten:
            return {}
        branch = self._branch(entry, where, "write names with values below it, or leave it out")
        return None if branch is None else plain(branch, where, self._problems)

    def _inputs(self, entry: Entry, where: str) -> dict[str, Any] | None:
        branch = self._branch(entry, where, "write the workflow's inputs below it, or {} if it needs none")
        if branch is None:
            return None
        return {each.key: self._input(each, below(where, each.key)) for each in branch}

    def _input(self, entry: Entry, where: str) -> Any:
        node = entry.value
        if isinstance(node, Leaf):
            if node.forgotten:
                hint = 'write a value after the colon, "" for an empty text, null for none'
                self._wrong(node, where, "there is no value", hint)
                return None
            if wants_text(entry.key):
                return node.text if node.quoted else self._text(node, where)
        elif wants_text(entry.key):
            self._wrong(node, where, f"expected a text, found {what_it_is(node)}", _QUOTE_HINT)
            return None
        self._doubts(node, where)
        return plain(node, where, self._problems)

    def _doubts(self, node: Node, where: str) -> None:
        """Refuse `yes` and `no` without quotes: ComfyUI takes the text "no" for true."""
        match node:
            case Leaf(doubtful=True):
                self._wrong(node, where, f"{node.text} may mean a switch or a text", _SWITCH_HINT.format(node.text))
            case Items():
                for number, item in enumerate(node.items):
                    self._doubts(item, below(where, number))
            case Branch():
                for entry in node:
                    self._doubts(entry.value, below(where, entry.key))
            case _:
                pass


def wants_text(name: str) -> bool:
    """Return whether an input of that name takes what a person writes, whatever it looks like."""
    return name in _TEXT_NAMES or name.endswith(_TEXT_ENDINGS)
