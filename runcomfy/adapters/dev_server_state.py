"""
`dev_server_state.json`: which dev server runs, told to programs that cannot ask our store.

The file is a published snapshot, computed when it is written; nothing in it is ever read back and added to. The truth
about a machine is in the store and at the provider, so what is loaded here is a hint to be verified. The names of the
fields are CONJURE's; we add more of our own and keep those that somebody else added.

Copies for programs that look elsewhere hold CONJURE's fields and no others: its own reader takes a file with a field
it does not know for no file at all.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import state as state_folder
from runcomfy.adapters.files import DISK, Disk, local_error, make_private_dir, open_regular, write_atomically
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.clock import Clock

FILE_NAME: Final = "dev_server_state.json"
SCHEMA_VERSION: Final = 1
ACTIVE: Final = frozenset({"running", "ready"})
"""The words for a server that can be used."""
_MAX_BYTES: Final = 1024 * 1024
_NAMES_TRIED: Final = 100

log = logging.getLogger("runcomfy.dev_server_state")


@dataclass(slots=True)
class DevServerState:
    """What is published about the dev server. Times are ISO 8601 with offset, costs USD, durations seconds.

    The first eleven fields are CONJURE's. `repr` hides the machine's address and the user id.
    """

    server_id: str
    user_id: str
    base_url: str
    """Without a trailing slash. Who knows it can use the machine."""
    status: str
    """`running` while it can be used, `starting`, `stopping`, `stopped`."""
    launch_time: str
    workflow_version: str
    server_type: str = "medium"
    total_cost: float = 0.0
    """What the machine has cost from ready to the moment of writing."""
    session_cost: float = 0.0
    """The same: a machine is one session."""
    last_health_check: str | None = None
    health_status: str = "unknown"
    """`unknown`, `healthy`, `unhealthy`, `unreachable`."""

    provider: str = "runcomfy"
    machine_id: str | None = None
    """Our own id of the machine, as in the store."""
    ready_time: str | None = None
    planned_stop_time: str | None = None
    """When the provider will stop the machine by itself."""
    estimated_duration: int | None = None
    """Running time asked for, counted from ready."""
    last_used: str | None = None
    """When the last job on it ended."""
    usd_per_hour: str | None = None
    """Decimal as text."""
    plan: str | None = None
    rate_source: str | None = None
    """Where the price comes from, with its date."""
    updated_time: str | None = None
    """When this snapshot was computed."""
    schema_version: int = SCHEMA_VERSION
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that somebody else wrote; kept as they are."""

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("user_id", "base_url", "extra")}
        try:
            address = SecretUrl(self.base_url).masked
        except ValueError:  # it came out of a file and may be anything
            address = "***"
        return f"DevServerState({', '.join(f'{k}={v!r}' for k, v in shown.items())}, base_url={address!r})"


_FIELDS: Final = {f.name: f for f in fields(DevServerState) if f.name != "extra"}
CONJURE_FIELDS: Final = tuple(_FIELDS)[:11]
_WHOLE: Final = frozenset({"estimated_duration", "schema_version"})
_COSTS: Final = frozenset({"total_cost", "session_cost"})
_VITAL: Final = frozenset({"server_id", "base_url", "status"})
"""Without a readable word in these, the file names no server; it is broken, not merely old."""


class DevServerStateManager:
    """Reads and writes the file. All methods block; on an event loop they are called in a thread."""

    def __init__(
        self,
        state_file_path: str | os.PathLike[str] | None = None,
        *,
        copies: Iterable[str | os.PathLike[str]] = (),
        clock: Clock | None = None,
        disk: Disk = DISK,
    ) -> None:
        """Make a manager for the file at `state_file_path`, by default in the state folder; nothing is touched yet."""
        self.state_file_path = Path(state_file_path) if state_file_path else state_folder.path() / FILE_NAME
        self.copies = tuple(Path(copy) for copy in copies)
        self._clock = clock
        self._disk = disk

    def save_server_state(self, state: DevServerState) -> None:
        """Write the snapshot, whole or not at all, readable by this user only; then the copies.

        Fields that somebody else added to the file stay in it. A copy that cannot be written is a warning in the log.

        Raises:
            DiskFull, LocalError: the file could not be written; the old one is still there.
        """
        own = {name: getattr(state, name) for name in _FIELDS}
        own["base_url"] = state.base_url.rstrip("/")
        foreign = {**self._foreign_fields(), **{k: v for k, v in state.extra.items() if k not in _FIELDS}}
        make_private_dir(self.state_file_path.parent)
        write_atomically(self.state_file_path, _with_foreign(own, foreign), disk=self._disk)
        text = _to_json({name: own[name] for name in CONJURE_FIELDS})
        for copy in self.copies:
            try:
                write_atomically(copy, text, disk=self._disk)
            except LocalError as error:
                log.warning("dev_server_copy_failed", extra={"fields": {"path": str(copy), "why": error.message}})

    def load_server_state(self) -> DevServerState | None:
        """Return what the file says, or None: there is no file, it is empty, or it was broken and has been set aside.

        Fields that are missing have their defaults (texts without one are empty).

        Raises:
            LocalError: there is a file, and it cannot be read.
        """
        for _ in range(3):
            read = self._read()
            if read is None or not read[0].strip():
                return None
            data, identity = read
            try:
                return _from_json(_parse(data))
            except ValueError as error:
                if self._set_aside(identity, str(error)):
                    return None
        return None

    def clear_server_state(self) -> None:
        """Delete the file and its copies; harmless if there are none. Raises LocalError."""
        try:
            self.state_file_path.unlink(missing_ok=True)
        except OSError as error:
            raise local_error(error, self.state_file_path, "remove") from error
        for copy in self.copies:
            try:
                copy.unlink(missing_ok=True)
            except OSError as error:
                why = error.strerror or type(error).__name__
                log.warning("dev_server_copy_failed", extra={"fields": {"path": str(copy), "why": why}})

    def has_active_server(self) -> bool:
        """Return whether the file says that a server can be used. Raises LocalError."""
        state = self.load_server_state()
        return state is not None and state.status in ACTIVE

    def get_server_info(self) -> dict[str, Any] | None:
        """Return the snapshot in words for people, under CONJURE's keys; None without a server. Raises LocalError."""
        state = self.load_server_state()
        if state is None:
            return None
        return {
            "server_id": state.server_id,
            "status": state.status,
            "base_url": state.base_url,
            "server_type": state.server_type,
            "uptime": self._uptime(state.launch_time),
            "total_cost": f"${state.total_cost:.3f}",
            "session_cost": f"${state.session_cost:.3f}",
            "health_status": state.health_status,
            "last_health_check": state.last_health_check,
        }

    def _uptime(self, launch_time: str) -> str:
        try:
            launched = datetime.fromisoformat(launch_time)
        except ValueError:
            return "unknown"
        now = self._clock.now() if self._clock else datetime.now(UTC)
        launched = launched if launched.tzinfo else launched.replace(tzinfo=UTC)
        minutes = max(0, int((now - launched).total_seconds())) // 60
        return f"{minutes // 60}h {minutes % 60}m"

    def _read(self) -> tuple[bytes, tuple[int, int, int]] | None:
        """Return the bytes of the file and what tells it from a later one in its place, or None if there is none."""
        try:
            with open_regular(self.state_file_path, follow=True) as file:
                found = os.fstat(file.fileno())
                return file.read(_MAX_BYTES + 1), (found.st_dev, found.st_ino, found.st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise local_error(error, self.state_file_path, "read") from error

    def _foreign_fields(self) -> dict[str, Any]:
        try:
            read = self._read()
        except LocalError:
            return {}  # what cannot be read cannot be kept; the write that follows says whether the disk is at fault
        if read is None or not read[0].strip():
            return {}
        try:
            return {name: value for name, value in _parse(read[0]).items() if name not in _FIELDS}
        except ValueError as error:
            self._set_aside(read[1], str(error))
            return {}

    def _set_aside(self, identity: tuple[int, int, int], why: str) -> bool:
        """Rename the broken file so that it can be looked at; False if another file has taken its place meanwhile."""
        stamp = (self._clock.now() if self._clock else datetime.now(UTC)).strftime("%Y%m%dT%H%M%S.%fZ")
        path = self.state_file_path
        try:
            found = path.stat()
            if (found.st_dev, found.st_ino, found.st_mtime_ns) != identity:
                return False
            for number in range(_NAMES_TRIED):
                aside = path.with_name(f"{path.name}.broken-{stamp}" + (f"-{number}" if number else ""))
                try:
                    self._disk.rename(str(path), str(aside))
                except FileExistsError:
                    continue
                log.warning("dev_server_state_broken", extra={"fields": {"path": str(aside), "why": why}})
                return True
        except FileNotFoundError:
            return False
        except OSError as error:
            why = f"{why}; it cannot be renamed: {error.strerror or type(error).__name__}"
        log.warning("dev_server_state_broken", extra={"fields": {"path": str(path), "why": why}})
        return True


def _with_foreign(own: Mapping[str, Any], foreign: Mapping[str, Any]) -> bytes:
    """Return the file's text; without what others added where that would make it a file that nobody can read."""
    try:
        whole = _to_json({**own, **foreign})
    except (RecursionError, ValueError):
        whole = b""
    if 0 < len(whole) <= _MAX_BYTES:
        return whole
    log.warning("dev_server_foreign_fields_dropped", extra={"fields": {"fields": len(foreign)}})
    return _to_json(own)


def _to_json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "backslashreplace"
    )


def _parse(data: bytes) -> dict[str, Any]:
    """Return the object in `data`. Raises ValueError with the reason, which holds nothing out of the file."""
    if len(data) > _MAX_BYTES:
        raise ValueError("larger than a state file can be")
    try:
        document = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - the content is wrong, not the call
    return document


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _from_json(document: Mapping[str, Any]) -> DevServerState:
    """Return the state in `document`. Raises ValueError if a field that says which server it is holds no text."""
    found: dict[str, Any] = {"server_id": "", "user_id": "", "base_url": "", "status": "", "launch_time": ""}
    found["workflow_version"] = ""
    for name in _FIELDS.keys() & document.keys():
        value = document[name]
        if _fits(name, value):
            found[name] = value
        elif name in _VITAL:
            raise ValueError(f"{name} is not a text")
    found["extra"] = {name: value for name, value in document.items() if name not in _FIELDS}
    return DevServerState(**found)


def _fits(name: str, value: object) -> bool:
    if name in _COSTS:
        return type(value) in (int, float) and math.isfinite(float(str(value)))
    if name in _WHOLE:
        return type(value) is int or (value is None and name == "estimated_duration")
    return isinstance(value, str) or (value is None and _FIELDS[name].default is None)
