"""
The name of a ComfyUI server, the same on every host that means the same server, and no way in.

A prompt of a dead worker is looked for only where it was sent to, so two servers must never share a name: an address
that every computer has (loopback) gets this computer's name with it.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final
from urllib.parse import urlsplit

from runcomfy.domain.machine import MachineId
from runcomfy.domain.secret import SecretUrl, is_loopback

_PORTS: Final = {"http": 80, "https": 443}
_ADDRESS: Final = re.compile(r"[0-9.]+|[0-9a-f:.]*:[0-9a-f:.]*")
_LOCAL_ENDINGS: Final = (".local", ".lan", ".internal", ".home", ".home.arpa")


def machine_key(machine_id: MachineId | str) -> str:
    """Return the key of a machine in our books: `machine:<our id>`."""
    return f"machine:{machine_id}"


def server_key(url: str, host: str) -> str:
    """Return the key of a server that somebody named: `server:<host>:<port>`, with the path a proxy wants.

    `host` names this computer. A public host name may be all that protects a rented machine: it is shown masked, told
    apart by a short digest.
    """
    parts = urlsplit(url)
    name = (parts.hostname or "").rstrip(".").lower()
    port = parts.port or _PORTS.get(parts.scheme, 0)
    path = parts.path.rstrip("/")
    if name in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "::") or name.endswith(".localhost"):  # noqa: S104 - compared
        name = "localhost"
    shown = f"[{name}]" if ":" in name else name
    if name == "localhost" or is_loopback(name):
        return f"server:{shown}:{port}{path}@{host}"
    if _ADDRESS.fullmatch(name) or "." not in name or name.endswith(_LOCAL_ENDINGS):
        return f"server:{shown}:{port}{path}"
    digest = hashlib.sha256(f"{name}:{port}{path}".encode()).hexdigest()[:16]
    return f"server:{SecretUrl(f'{parts.scheme}://{name}').masked.partition('://')[2]}:{port}#{digest}"
