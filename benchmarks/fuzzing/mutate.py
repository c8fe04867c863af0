"""Changes inputs in ways that keep them meaningful: values inside JSON, lines, answers, lengths; bytes at the last."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from benchmarks.fuzzing.http import SEPARATOR

VALUES: Final[tuple[Any, ...]] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    1e308,
    -1e308,
    1e-320,
    0.5,
    "",
    "0",
    " ",
    "\0",
    "\x1b[31m",
    "a" * 300,
    "\ud800",
    "\u202e",
    "../../x",
    "C:\\x",
    "http://[",
    "1e999999999",
    "NaN",
    "2026-11-20T10:00:00Z",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-12:00",
    [],
    {},
    [[]],
    [None],
    {"": ""},
)
"""What readers stumble over."""
PIECES: Final = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"%",
    b"9" * 25,
    b"-",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"../",
    SEPARATOR,
)
JSON_DEPTH: Final = 30


def mutated(data: bytes, chance: random.Random, *, is_json: bool, words: Sequence[str], max_bytes: int) -> bytes:
    """Return the input with one to four changes."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        changed = _json(data, chance, words) if is_json and chance.random() < 0.6 else None
        data = changed if changed is not None else _bytes(data, chance, words)
    return data[:max_bytes]


def _bytes(data: bytes, chance: random.Random, words: Sequence[str]) -> bytes:
    at, until = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
    until = min(until, at + 64)
    kind = chance.randrange(7)
    if kind == 0:
        return data[:at] + data[until:]
    if kind == 1:
        return data[:at] + chance.choice(PIECES) + data[at:]
    if kind == 2 and words:
        return data[:at] + chance.choice(words).encode("utf-8", "surrogatepass") + data[until:]
    if kind == 3:
        return data[:at] + data[at:until] * chance.randint(2, 5) + data[until:]
    if kind == 4 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 5:
        number = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data), 12)).to_bytes(
            4, chance.choice(("big", "little"))
        )
        return data[:at] + number + data[at + 4 :]
    parts = data.split(SEPARATOR)
    chance.shuffle(parts)
    return SEPARATOR.join(parts[: chance.randint(1, len(parts))])


def _json(data: bytes, chance: random.Random, words: Sequence[str]) -> bytes | None:
    """Change a value of the JSON that one of the parts ends with; None if none does."""
    parts = data.split(SEPARATOR)
    number = chance.randrange(len(parts))
    part = parts[number]
    start = min((found for mark in (b"{", b"[") if (found := part.find(mark)) >= 0), default=-1)
    if start < 0:
        return None
    try:
        value = json.loads(part[start:])
    except (ValueError, RecursionError):
        return None
    places = list(_places(value, 0))
    if not places:
        return None
    holder, key = chance.choice(places)
    chance.choice(_CHANGES)(holder, key, chance, words)
    try:
        written = json.dumps(value, separators=(",", ":"), ensure_ascii=chance.random() < 0.5)
    except (ValueError, RecursionError):
        return None
    parts[number] = part[:start] + written.encode("utf-8", "surrogatepass")
    return SEPARATOR.join(parts)


def _places(value: Any, depth: int) -> Any:
    if depth > JSON_DEPTH:
        return
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key], depth + 1)


def _put(holder: Any, key: Any, chance: random.Random, words: Sequence[str]) -> None:
    holder[key] = chance.choice(VALUES)


def _word(holder: Any, key: Any, chance: random.Random, words: Sequence[str]) -> None:
    holder[key] = chance.choice(words) if words else "word"


def _drop(holder: Any, key: Any, chance: random.Random, words: Sequence[str]) -> None:
    del holder[key]


def _wrap(holder: Any, key: Any, chance: random.Random, words: Sequence[str]) -> None:
    holder[key] = chance.choice(([holder[key]], {chance.choice(words) if words else "a": holder[key]}))


def _repeat(holder: Any, key: Any, chance: random.Random, words: Sequence[str]) -> None:
    if isinstance(holder, list):
        holder.extend([holder[key]] * chance.randint(1, 4))
    else:
        holder[chance.choice(words) if words else f"{key}2"] = holder[key]


def _other_sign(holder: Any, key: Any, chance: random.Random, words: Sequence[str]) -> None:
    found = holder[key]
    if isinstance(found, (int, float)):
        holder[key] = chance.choice((-found, found * 1000, found + 1, str(found)))
    elif isinstance(found, str):
        holder[key] = chance.choice((found + "\n", found.upper(), found[: len(found) // 2], found * 3, [found]))


_CHANGES: Final[tuple[Callable[[Any, Any, random.Random, Sequence[str]], None], ...]] = (
    _put,
    _put,
    _word,
    _drop,
    _wrap,
    _repeat,
    _other_sign,
)
