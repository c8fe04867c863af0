"""
Where services of this state folder listen: each writes it down while it does, for `comfyctl page`.

One private file per process. Whether that process still lives is asked of the computer; whether what listens there is
that process, its proof says (`guarding.proving`).
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from runcomfy.adapters.files import make_private_dir, open_regular, remove_quietly, write_atomically
from runcomfy.adapters.processes import ProcessTable
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId

FOLDER: Final = "listening"
_LONGEST: Final = 4_096


@dataclass(frozen=True, slots=True)
class Announced:
    """A service that wrote down where it listens."""

    host: str
    port: int
    process: Owner
    file: Path

    @property
    def address(self) -> str:
        """Where a browser on this computer reaches it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def announce(state_dir: str | Path, host: str, port: int, *, now: datetime) -> Path:
    """Write down that this process listens there; return the file, to be removed at the end. Blocks.

    Raises LocalError, DiskFull.
    """
    me = ProcessTable().me(now=now)
    file = make_private_dir(Path(state_dir) / FOLDER) / f"{me.pid}-{port}.json"
    facts = {
        "host": host,
        "port": port,
        "computer": me.host,
        "pid": me.pid,
        "process_started": me.process_started,
        "since": now.isoformat(),
    }
    write_atomically(file, json.dumps(facts), durable=False)
    return file


def announced(state_dir: str | Path) -> list[Announced]:
    """Return what was written down, the newest first; what cannot be read is left out. Blocks."""
    found = []
    with suppress(OSError):
        for file in (Path(state_dir) / FOLDER).iterdir():
            with suppress(OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
                found.append(_read(file))
    return sorted(found, key=lambda each: each.process.started_at, reverse=True)


def _read(path: Path) -> Announced:
    with open_regular(path) as file:
        facts = json.loads(file.read(_LONGEST))
    since = datetime.fromisoformat(facts["since"])
    if since.tzinfo is None:
        raise ValueError("a time without a zone")
    if not 0 < int(facts["port"]) < 65_536 or not str(facts["host"]).isprintable():
        raise ValueError("no address")
    process = Owner(
        id=OwnerId(path.stem),
        host=str(facts["computer"]),
        pid=int(facts["pid"]),
        process_started=float(facts["process_started"]),
        command="serve",
        started_at=since,
        heartbeat_at=since,
    )
    return Announced(str(facts["host"]), int(facts["port"]), process, path)


def lives(service: Announced) -> bool:
    """Whether the process that wrote it still runs, on this computer. Blocks."""
    table = ProcessTable()
    return service.process.host == table.host and table.lives(service.process, now=service.process.heartbeat_at)


def sweep(state_dir: str | Path) -> list[Announced]:
    """Remove what processes of this computer left behind that have ended; return what lives here. Blocks."""
    here, living = ProcessTable().host, []
    for service in announced(state_dir):
        if lives(service):
            living.append(service)
        elif service.process.host == here:
            remove_quietly(os.fspath(service.file))
    return living
