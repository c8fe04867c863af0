"""A quick look whether a ComfyUI answers, without an event loop; running jobs there is the library's work."""

from __future__ import annotations

import json
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Final
from urllib.parse import urlsplit

from runcomfy.domain.exceptions import foreign_text

SECONDS: Final = 2.0
_MOST_BYTES: Final = 4 << 20


def answers(url: str, *, seconds: float = SECONDS) -> tuple[bool, str]:
    """Return whether a ComfyUI answers at `url`, and if not, why. Never raises; blocks for `seconds` at most or so."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False, "the address of the ComfyUI is not one: write it as http://host:8188"
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    try:
        connection = kind(parts.hostname, parts.port, timeout=seconds)
        try:
            connection.request("GET", f"{parts.path.rstrip('/')}/queue", headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(_MOST_BYTES)
        finally:
            connection.close()
        if answer.status != 200:
            return False, f"the ComfyUI of this computer answered with HTTP {answer.status}"
        if len(body) == _MOST_BYTES and b'"queue_running"' in body[:200]:
            return True, ""  # what waits there is sent whole, graph by graph, and need not be read to its end
        queue = json.loads(body)
    except (OSError, HTTPException) as error:
        reason = foreign_text(getattr(error, "strerror", None) or str(error) or type(error).__name__, 120)
        return False, f"no ComfyUI answers at {parts.hostname}:{parts.port or ''}".rstrip(":") + f" ({reason})"
    except ValueError:
        queue = None
    if not isinstance(queue, dict) or "queue_running" not in queue:
        return False, "what answers at the ComfyUI's address is no ComfyUI"
    return True, ""
