"""
`data/input/state.json`: the file through which CONJURE's launcher, its Blender add-on and this service talk.

The others write it as they like: whole, in place, without a lock, from a copy they read earlier. So a reader may find
half a file, and is patient: it looks again for a while, and only then says that there is no JSON object in it. A write
of ours is one step for every reader, keeps every key it does not name, and is held apart from other writes of ours, in
this process and in others. What cannot be read is never thrown away: it is kept beside, under another name.

What is written between somebody else's reading and writing is lost, as it always was; nothing here can mend that.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from launcher.conjure.errors import StateUnreadable
from runcomfy.adapters.files import local_error, open_regular, write_atomically
from runcomfy.adapters.folder_lock import FolderLock
from runcomfy.conjure.files import SHARED_FILE, make_shared_dir
from runcomfy.domain.exceptions import FolderWatched, LocalError, ValueInvalid, foreign_text

log = logging.getLogger("launcher.state_file")

TRIES: Final = 20
PAUSE_SECONDS: Final = 0.05
"""One second together; the add-on writes its few kilobytes in far less."""
LOCK_SECONDS: Final = 2.0
MAX_BYTES: Final = 4 * 1024**2
MAX_KEYS: Final = 1_000
MAX_KEY: Final = 200
REFUSED_KEYS: Final = frozenset({"__proto__", "constructor", "prototype"})
"""Names that are not data to the JavaScript of a page that shows the file."""
LOCK_NAME: Final = ".state.json.lock"

State = dict[str, Any]


class StateFile:
    """One state file. Every method blocks; they may be called from any thread."""

    def __init__(self, path: Path, *, tries: int = TRIES, pause_seconds: float = PAUSE_SECONDS) -> None:
        self._path = path
        self._tries, self._pause = tries, pause_seconds
        self._writing = threading.Lock()
        self._last: State | None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self._path

    @property
    def last(self) -> State:
        """What was last read or written, without looking; nothing if nothing was."""
        return dict(self._last or {})

    def read(self) -> State:
        """Return what the file holds; nothing if there is none. Raises StateUnreadable, LocalError."""
        reason = ""
        for attempt in range(self._tries):
            if attempt:
                time.sleep(self._pause)
            try:
                raw = self._raw()
            except FileNotFoundError:
                return {}
            except PermissionError as error:  # on Windows: being replaced just now
                if attempt + 1 == self._tries:
                    raise local_error(error, self._path, "read") from error
                continue
            except OSError as error:
                raise local_error(error, self._path, "read") from error
            state, reason = _parsed(raw)
            if state is not None:
                self._last = state
                return dict(state)
        raise StateUnreadable(
            f"{self._path.name} holds no JSON object: {reason}",
            hint="correct it, or remove it: a new one is made",
            details={"path": str(self._path)},
        )

    def update(self, changes: Mapping[str, Any]) -> State:
        """Lay `changes` over the state and return it. Raises ValueInvalid, LocalError."""
        check(changes)
        return self.change(lambda state: state.update(changes))

    def change(self, change: Callable[[State], None]) -> State:
        """Change the state as a whole, read just now, and return it. Raises ValueInvalid, LocalError.

        A file that stays unreadable is kept as `state.json.unreadable-…`; the change is then made to what was last
        read from it.
        """
        make_shared_dir(self._path.parent)
        with self._writing, self._locked():
            try:
                state = self.read()
            except StateUnreadable:
                self._set_aside()
                state = dict(self._last or {})
            change(state)
            text = json.dumps(state, indent=4, ensure_ascii=False)
            if len(text) > MAX_BYTES or len(state) > MAX_KEYS:
                raise ValueInvalid(
                    "the state would become too large", hint=f"at most {MAX_KEYS} keys and {MAX_BYTES >> 20} MiB"
                )
            write_atomically(self._path, text, mode=self._mode(), durable=False)
            self._last = dict(state)
            return state

    def mark(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does; None: there is none."""
        with suppress(OSError):
            found = self._path.stat()
            return found.st_size, found.st_mtime_ns, found.st_ino
        return None

    # -- the file ------------------------------------------------------------------------------------------

    def _raw(self) -> bytes:
        with open_regular(self._path, follow=True) as file:
            return file.read(MAX_BYTES + 1)

    def _mode(self) -> int:
        with suppress(OSError):
            return stat.S_IMODE(self._path.stat().st_mode)
        return SHARED_FILE

    def _set_aside(self) -> None:
        try:
            raw = self._raw()
        except OSError as error:
            raise local_error(error, self._path, "read") from error
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        kept = self._path.with_name(f"{self._path.name}.unreadable-{stamp}-{os.getpid()}")
        write_atomically(kept, raw, mode=SHARED_FILE, durable=True)
        log.warning("state_unreadable", extra={"fields": {"kept": kept.name}})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold other writers of ours off; where that cannot be had in time, go on without."""
        lock = FolderLock(self._path.parent, name=LOCK_NAME)
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                lock.take()
                break
            except FolderWatched:
                if time.monotonic() >= until:
                    log.warning("state_lock_busy")
                    break
                time.sleep(self._pause)
            except LocalError:  # a file system without locks, or a folder that takes no new file
                break
        try:
            yield
        finally:
            lock.release()


def check(changes: Mapping[str, Any]) -> None:
    """Refuse what must not get into the file. Raises ValueInvalid."""
    for key in changes:
        if not key or len(key) > MAX_KEY or key in REFUSED_KEYS or not key.isprintable():
            raise ValueInvalid(f"{foreign_text(key, 60)!r} cannot be a key of the state", hint="use a plain name")
    try:
        text = json.dumps(dict(changes), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueInvalid("the values are not JSON, or too deep", hint="no NaN, no infinities") from error
    if len(text) > MAX_BYTES:
        raise ValueInvalid("the values are too large", hint=f"at most {MAX_BYTES >> 20} MiB")


def as_json(state: Mapping[str, Any]) -> str:
    """Return a state as JSON that every reader takes. Raises StateUnreadable: its values are too deep.

    Others write what their JSON library lets through: half characters are escaped, what is no number becomes null.
    """
    try:
        text = json.dumps(dict(state))
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    except RecursionError as error:
        raise StateUnreadable("the state's values are too deep", hint="see what wrote them") from error
    return text


def _parsed(raw: bytes) -> tuple[State | None, str]:
    if len(raw) > MAX_BYTES:
        return None, f"it is larger than {MAX_BYTES >> 20} MiB"
    try:
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return None, "it is empty" if not raw.strip() else foreign_text(str(error), 120)
    if not isinstance(found, dict):
        return None, "it is JSON, but no object"
    return found, ""
