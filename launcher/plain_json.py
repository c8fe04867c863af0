"""
JSON that every reader takes, whatever the values hold.

A prompt from a command line may hold halves of characters, a manifest may say NaN: UTF-8 and JSON have no form for such
things. One such job is shown a little changed; it never keeps all others from being shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


def plain_json(value: Any) -> bytes:
    """Return a value as JSON in UTF-8: no NaN, no halves of characters."""
    try:
        return _written(value).encode()
    except ValueError:  # rare, so that looking through all of it costs nothing usually
        return _written(finite(value)).encode("utf-8", "replace")


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """Return a value with every number that is none as nothing."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PlainJson(JSONResponse):
    """An answer in such JSON."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return plain_json(content)
