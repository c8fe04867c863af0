"""
YAML as data only: texts, numbers, lists, names with values, each with its line.

PyYAML's scanner and parser tell what stands where; nothing is constructed by it, so no tag can make an object and no
alias can grow. What YAML offers beyond that (anchors, aliases, tags, several documents) is refused with its line:
nobody needs it in a job file, and it is how small files become large ones. The tree is built without recursion.
What the names mean is left to the callers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.marked import Branch, Entry, Items, Leaf, Node, Problem, below, unprintable

MAX_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 24
MAX_VALUES: Final = 50_000
LONGEST_NAME: Final = 200

LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser where PyYAML was built with it, else the one in Python: ten to twenty times slower, same events."""


class _Refused(Exception):
    """The way out of the loop; caught in this module."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not been seen yet."""

    line: int
    where: str
    mapping: bool
    entries: list[Entry] = field(default_factory=list)
    items: list[Node] = field(default_factory=list)
    key: Leaf | None = None
    lines: dict[str, int] = field(default_factory=dict)


def read_yaml(data: bytes, *, loader: Any = LOADER) -> tuple[Node | None, list[Problem]]:
    """Return the file's one document, None if there is none, and what is wrong with it. Never raises.

    With problems the tree is None.
    """
    if len(data) > MAX_BYTES:
        return None, [Problem(1, "", f"the file has more than {MAX_BYTES // 1024} KiB", "name large data by its path")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return None, [Problem(line, "", "the text is not UTF-8", "save the file as UTF-8")]
    if problem := _strange_character(text):
        return None, [problem]
    spans: list[tuple[int, int]] = []
    try:
        return _document(_events(text, loader), spans), []
    except _Refused as refused:
        return None, [refused.problem]
    except yaml.YAMLError as error:
        return None, [_syntax(error, text, spans)]
    except (ValueError, OverflowError, RecursionError, IndexError, TypeError) as error:
        # What hostile texts get out of the parser itself, such as an escape code of no character.
        return None, [Problem(1, "", f"this is not YAML: {foreign_text(error, 120)}", _SYNTAX_HINT)]


_SYNTAX_HINT: Final = "write `name: value` lines; put texts with : # { or quotes inside into quotes"


def _strange_character(text: str) -> Problem | None:
    name = unprintable(text)
    if name is None:
        return None
    line = next((n for n, words in enumerate(text.split("\n"), 1) if unprintable(words)), 1)
    return Problem(line, "", f"there is a control character ({name})", "remove it; is this a text file?")


def _syntax(error: yaml.YAMLError, text: str, spans: Sequence[tuple[int, int]]) -> Problem:
    problem, context = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    words = foreign_text(getattr(error, "problem", None) or getattr(error, "reason", None) or error, 120)
    # What is never closed is noticed at the end of the file; the user has to look where it was opened.
    mark = (
        context if context is not None and ("end of stream" in words or "stream end" in words) else problem or context
    )
    about = getattr(error, "context", None)
    said = f"{foreign_text(about, 80)}, {words}" if about else words
    lines = text.splitlines()
    number = min(mark.line if mark else 0, max(0, len(lines) - 1))
    if spans and spans[-1][1] == number:
        # A quote that was forgotten is closed by the next one, lines later; that is where the parser stumbles.
        first = spans[-1][0]
        said = f"the text in quotes that begins here goes on to line {number + 1}"
        return Problem(first + 1, _names_at(lines, first), f"this is not YAML: {said}", "is a quote missing?")
    return Problem(number + 1, _names_at(lines, number), f"this is not YAML: {said}", _SYNTAX_HINT)


_NAME: Final = re.compile(r"(\s*)([\w.-]{1,80})\s*:(?:\s|$)")


def _names_at(lines: Sequence[str], number: int) -> str:
    """Return the field that a line is about, judged by its indentation: the parser tells only of what it has read."""
    names: list[str] = []
    indent = sys.maxsize
    for line in reversed(lines[max(0, number - 1_000) : number + 1]):
        match = _NAME.match(line)
        if match and len(match[1]) < indent:
            names.insert(0, match[2])
            indent = len(match[1])
        if indent == 0:
            break
    return ".".join(names)


def _events(text: str, loader: Any) -> Iterator[Any]:
    parser = loader(text)
    try:
        while parser.check_event():
            yield parser.get_event()
    finally:
        parser.dispose()


def _document(events: Iterator[Any], spans: list[tuple[int, int]]) -> Node | None:
    """Return the one document's tree. Raises _Refused, or what the parser raises.

    `spans` gets the first and last line of texts in quotes that are longer than a line.
    """
    stack: list[_Open] = []
    root: Node | None = None
    documents = values = 0
    for event in events:
        match event:
            case yaml.DocumentStartEvent():
                documents += 1
                if documents > 1:
                    raise _refused(event, stack, "a second document begins here (---)", "write one file for each")
                continue
            case yaml.NodeEvent():
                values += 1
                if values > MAX_VALUES:
                    raise _refused(event, stack, f"there are more than {MAX_VALUES} values", "name large data by path")
                _plain_only(event, stack)
            case _:
                pass
        node: Node | None = None
        match event:
            case yaml.ScalarEvent():
                node = Leaf(_line(event), event.value, quoted=not event.implicit[0])
                if event.style in ("'", '"') and _end_line(event) > _line(event):
                    spans.append((_line(event) - 1, _end_line(event) - 1))
                if name := unprintable(node.text):
                    raise _refused(event, stack, f"there is a control character ({name})", "remove it")
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                _open(event, stack)
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                node = _closed(stack.pop())
            case _:
                pass
        if node is None:
            continue
        if stack:
            _take(node, stack)
        else:
            root = node
    return root


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _end_line(event: Any) -> int:
    return int(event.end_mark.line) + 1


def _field(stack: list[_Open]) -> str:
    """The name of what is being read."""
    if not stack:
        return ""
    top = stack[-1]
    if top.mapping:
        return below(top.where, top.key.text) if top.key is not None else top.where
    return below(top.where, len(top.items))


def _refused(event: Any, stack: list[_Open], message: str, hint: str) -> _Refused:
    return _Refused(Problem(_line(event), _field(stack), message, hint))


def _plain_only(event: Any, stack: list[_Open]) -> None:
    if isinstance(event, yaml.AliasEvent):
        name = foreign_text(event.anchor, 40)
        raise _refused(event, stack, f"*{name} points to another place", "write the value itself, or put it in quotes")
    if event.anchor is not None:
        name = foreign_text(event.anchor, 40)
        raise _refused(event, stack, f"&{name} names a place", "write the value alone, or put it in quotes")
    if event.tag is not None:
        tag = foreign_text(event.tag, 60)
        raise _refused(event, stack, f"a tag ({tag}) is not taken", "write the value alone, or put it in quotes")


def _open(event: Any, stack: list[_Open]) -> None:
    if stack and stack[-1].mapping and stack[-1].key is None:
        raise _refused(event, stack, "a list or a mapping is used as a name", "names are texts")
    if len(stack) >= MAX_DEPTH:
        raise _refused(event, stack, f"this is nested more than {MAX_DEPTH} deep", "write it flatter")
    stack.append(_Open(_line(event), _field(stack), isinstance(event, yaml.MappingStartEvent)))


def _closed(done: _Open) -> Node:
    return Branch(done.line, tuple(done.entries)) if done.mapping else Items(done.line, tuple(done.items))


def _take(node: Node, stack: list[_Open]) -> None:
    top = stack[-1]
    if not top.mapping:
        top.items.append(node)
    elif top.key is not None:
        top.entries.append(Entry(top.key.line, top.key.text, node))
        top.key = None
    elif isinstance(node, Leaf):
        top.key = _name(node, top)
    else:
        raise AssertionError("a list or mapping as a name is refused where it opens")


def _name(leaf: Leaf, top: _Open) -> Leaf:
    field_name = below(top.where, leaf.text[:LONGEST_NAME])
    if not leaf.text.strip():
        raise _Refused(Problem(leaf.line, top.where, "a name is empty", "write a name before the colon"))
    if len(leaf.text) > LONGEST_NAME:
        raise _Refused(
            Problem(leaf.line, top.where, f"a name has more than {LONGEST_NAME} characters", "is a colon missing?")
        )
    if leaf.text in top.lines:
        first = top.lines[leaf.text]
        raise _Refused(Problem(leaf.line, field_name, f"it is there twice; first on line {first}", "keep one of them"))
    top.lines[leaf.text] = leaf.line
    return leaf
