"""
Values as somebody wrote them into a file, each with the line it stands on.

A file's reader (YAML) makes the tree; whoever knows the fields reads it, and can say "line 7, inputs.seed" of whatever
is wrong. What a bare word means is decided here, once: the rules are those of YAML 1.2 (`true` and `false` are
switches, `no` is a word, `12:30` and `2025-08-09` are texts), which is what people expect who never read YAML 1.1.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runcomfy.domain.exceptions import foreign_text

_INTEGER: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_ONCE_SWITCHES: Final = frozenset({"yes", "no", "on", "off"})
_LONGEST_NUMBER: Final = 60
"""Characters. 2**64 has 20; longer ones are typing errors, and some take quadratic time to read."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A single value."""

    line: int
    text: str
    quoted: bool = False
    """Whether it is a text by its form (quotes, `|`, `>`), whatever it looks like."""

    @property
    def forgotten(self) -> bool:
        """Whether there is nothing at all after the colon."""
        return not self.quoted and not self.text

    @property
    def doubtful(self) -> bool:
        """Whether readers of YAML disagree about it: a text for some, true or false for others."""
        return not self.quoted and self.text.lower() in _ONCE_SWITCHES

    @property
    def value(self) -> str | int | float | bool | None:
        """What it means. Raises ValueError, in words, for a number that cannot be used."""
        text = self.text
        if self.quoted:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.fullmatch(text):
            raise ValueError(f"{text} is not a finite number")
        if not _FLOAT.fullmatch(text) and not _INTEGER.fullmatch(text):
            return text
        if len(text) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(text)} characters is too long")
        if _INTEGER.fullmatch(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return int(text, base)
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is too large")
        return number


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    line: int
    items: tuple[Leaf | Items | Branch, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A name and what stands behind its colon."""

    line: int
    key: str
    value: Leaf | Items | Branch


@dataclass(frozen=True, slots=True)
class Branch:
    """Names with their values, each name once."""

    line: int
    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def get(self, key: str) -> Entry | None:
        """Return the entry of that name."""
        return next((entry for entry in self.entries if entry.key == key), None)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(entry.key for entry in self.entries)


Node = Leaf | Items | Branch


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in a file."""

    line: int
    field: str
    """Names joined by dots, `inputs.seed`; empty: the file as a whole."""
    message: str
    hint: str = ""

    @property
    def where(self) -> str:
        """Line and field, for people."""
        return f"line {self.line}" + (f", {foreign_text(self.field, 120)}" if self.field else "")

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """Return the problem as it appears in an error's details."""
        return {"line": self.line, "field": self.field, "message": self.message, "hint": self.hint}


def joined(problems: Sequence[Problem], *, most: int = 5) -> tuple[str, str]:
    """Return (what is wrong, what to do) of several problems as one sentence each."""
    words = "; ".join(map(str, problems[:most]))
    if len(problems) > most:
        words += f"; and {len(problems) - most} more"
    return words, "; ".join(dict.fromkeys(problem.hint for problem in problems[:most] if problem.hint))


def below(field: str, key: str | int) -> str:
    """Return the name of a part of a field: `inputs.seed`, `inputs.sizes[0]`."""
    if isinstance(key, int):
        return f"{field}[{key}]"
    return f"{field}.{key}" if field else key


def what_it_is(node: Node) -> str:
    """Return what stands there, for the sentence "expected this, found that"."""
    match node:
        case Branch():
            return "names with values"
        case Items():
            return "a list"
        case Leaf(forgotten=True):
            return "nothing"
        case Leaf(quoted=True):
            return f"the text {foreign_text(node.text, 60)!r}"
        case _:
            return foreign_text(node.text, 60)


def unprintable(text: str) -> str | None:
    """Return the name of the first character that no text of a person has (escape codes, NUL), if there is one."""
    if text.isascii() and text.isprintable():
        return None
    for character in text:
        if character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cs"):
            return f"U+{ord(character):04X}"
    return None


def plain(node: Node, field: str, problems: list[Problem]) -> Any:
    """Return a node as plain values that JSON knows; what cannot be used goes into `problems` and is None."""
    match node:
        case Branch():
            return {entry.key: plain(entry.value, below(field, entry.key), problems) for entry in node}
        case Items():
            return [plain(item, below(field, number), problems) for number, item in enumerate(node.items)]
        case Leaf():
            try:
                return node.value
            except ValueError as error:
                problems.append(Problem(node.line, field, str(error), "write a finite number, or put it in quotes"))
                return None
