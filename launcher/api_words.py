"""
What the product says of a request in the words of its commands, said in the words of the API.

Whoever binds a workflow's inputs speaks to people at a command line (`--image`, `--set 6.text=…`); clients of the API
know fields (`image`, `sets`). The errors are the same, with the same codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from runcomfy.domain.exceptions import BadInput, IdempotencyConflict

_FIELDS: Final = ("image", "prompt", "seed", "negative", "convert", "priority")
_SET: Final = re.compile(r"--set (?P<target>[^\s=]+)=(?P<value>\S*)")
_TIMEOUT: Final = re.compile(r"--timeout(?: (?P<minutes>\d+)m\b)?")
_PLAIN: Final = re.compile(rf"--(?P<field>{'|'.join(_FIELDS)}|set)\b(?!-)")


def api_words(text: str) -> str:
    """Return a text with the fields of the API where it names options of a command."""
    if "--" not in text:
        return text
    text = _SET.sub(_as_set, text)
    text = _TIMEOUT.sub(lambda found: f"timeout_s {int(found[1]) * 60}" if found[1] else "timeout_s", text)
    return _PLAIN.sub(lambda found: "sets" if found["field"] == "set" else found["field"], text)


def _as_set(found: re.Match[str]) -> str:
    value = found["value"]
    if value.startswith("@"):
        value = "upload:ID"
    return f'"sets": {{"{found["target"]}": {value or "…"}}}'


@contextmanager
def in_api_words() -> Iterator[None]:
    """Have what is refused in the block be said in the words of the API."""
    try:
        yield
    except BadInput as error:
        error.message, error.hint = api_words(error.message), api_words(error.hint)
        error.args = (error.message,)
        raise


def with_key(error: IdempotencyConflict, ours: str, said: str) -> IdempotencyConflict:
    """Return a conflict that names the key as the client sent it, and not as it is kept."""
    return IdempotencyConflict(error.message.replace(ours, said), hint=error.hint, details=error.details)
