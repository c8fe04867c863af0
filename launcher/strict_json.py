"""Reads JSON that clients send as the standard has it, and not as generously as Python does."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError

from runcomfy.domain.exceptions import foreign_text


def strict_json(data: bytes | str) -> Any:
    """Return what a JSON text says: no NaN, no name twice, nothing that is no Unicode.

    Raises RequestValidationError.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name is there twice")
        return found

    def no_constant(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        said = json.loads(text, object_pairs_hook=once, parse_constant=no_constant)
        json.dumps(said, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else foreign_text(error, 120)
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body",), "msg": f"not JSON: {why}"}]) from error
    return said
