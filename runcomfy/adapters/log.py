"""
The log: one JSON object per line in `logs/comfyctl.log` of the state folder, enough to answer afterwards why a machine
was launched or stopped.

Callers log an event name and fields: `log.info("machine_launched", extra={"fields": {"machine": ..., "usd": ...}})`.
Here secrets are cut out, control characters stripped, texts bounded. Logging never fails into the program and never
prints a traceback of its own: a full disk costs lines, and the number of lines lost is the first line written when
there is room again.

Several processes share the file without losing lines. Every line is one write at the end of the file, opened for that
line, so a process never holds on to a file that another one has renamed. Whoever finds the file too long takes a lock
and renames it; a writer that had it open at that instant writes to the renamed file, which is kept. Windows cannot
append in one step or rename an open file, so there every line is written under the lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit

from runcomfy.adapters.files import PRIVATE_DIR, PRIVATE_FILE, make_private_dir
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.secret import Secret, SecretUrl, is_loopback
from runcomfy.domain.settings import Settings

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

ROOT: Final = "runcomfy"
FILE_NAME: Final = "comfyctl.log"
MAX_BYTES: Final = 5_000_000
BACKUPS: Final = 5
_TEXT_LIMIT: Final = 4_096
_TRACEBACK_LIMIT: Final = 16_384
_HUGE: Final = 65_536
"""Texts are cut to this before they are cleaned, so that a huge one costs little, and to their limit only afterwards,
so that no secret is cut in half and passes."""
_ITEMS: Final = 100
_DEPTH: Final = 5
_SHORTEST_SECRET: Final = 4
"""A shorter text cannot be cut out without cutting words."""
_UNMISTAKABLE: Final = 8
"""From this length on a secret is cut out inside words too."""

# --- secrets ----------------------------------------------------------------------------------------------

_PATTERNS: Final = (
    ("bearer", re.compile(r"(?i)\b(bearer)\s+[^\s\"',;]+"), r"\1 ***"),
    ("basic", re.compile(r"(?i)\b(basic)\s+[a-z0-9+/=]{16,}"), r"\1 ***"),
    (
        "authorization",
        re.compile(r"(?i)\b(authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?)(?!bearer|basic)[^\s\"',;]+"),
        r"\1***",
    ),
    # A machine's host name is all that is needed to use it. A label of the DNS has at most 63 characters.
    ("-comfyui.", re.compile(r"(?i)[a-z0-9][a-z0-9_-]{0,62}?-comfyui\.(?=[a-z0-9])"), "***-comfyui."),
    ("://", re.compile(r"://[^/\s@]{1,200}@"), "://***@"),
    ("=", re.compile(r"(?i)([?&](?:access_|api_)?(?:token|key|sig|signature|password)=)[^&\s\"']+"), r"\1***"),
)
"""What must occur in a text, in lower case, for the pattern to be worth a search; the pattern; what it becomes."""
_MACHINE_HOST: Final = re.compile(r"(?i)[a-z0-9][a-z0-9_-]{0,62}-comfyui\.[a-z0-9.-]+")
"""A host name that is cut out by its looks. There may be thousands a day, each of which would cost every line."""
_SECRET_KEY: Final = re.compile(r"(?i)token|secret|passw|authorization|api[-_]?key|cookie|^user_?id$")


class Redactor:
    """Cuts secrets out of texts: those it was told, and what looks like one."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._pattern: re.Pattern[str] | None = None
        self._made_of = 0
        """Of how many texts the pattern was made: it is made again when it is needed, not with every text."""

    def add(self, secret: str) -> None:
        """Cut this text out from now on, also in its URL-quoted and JSON-escaped forms."""
        if len(secret) < _SHORTEST_SECRET:
            return
        forms = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1]}
        self._known |= forms

    def clean(self, text: str) -> str:
        """Return the text without secrets."""
        if self._made_of != len(self._known):
            known = set(self._known)  # another thread may add to it
            alternatives = map(_as_pattern, sorted(known, key=len, reverse=True))
            self._pattern, self._made_of = re.compile("|".join(alternatives), re.IGNORECASE), len(known)
        if self._pattern is not None:
            text = self._pattern.sub("***", text)
        lower = text.lower()
        for needle, pattern, instead in _PATTERNS:
            if needle in lower:
                text = pattern.sub(instead, text)
        return text


def _as_pattern(secret: str) -> str:
    escaped = re.escape(secret)
    return escaped if len(secret) >= _UNMISTAKABLE else rf"(?<![\w-]){escaped}(?![\w-])"


_redactor: Final = Redactor()


def register_secret(secret: str | Secret | SecretUrl) -> None:
    """Cut this text out of every line from now on; of an address, its host name. Harmless when repeated."""
    if isinstance(secret, Secret):
        _redactor.add(secret.reveal())
        return
    text = secret.reveal() if isinstance(secret, SecretUrl) else secret
    if "://" not in text:
        _redactor.add(text)
        return
    with contextlib.suppress(ValueError):  # an address that cannot be read names no host
        host = urlsplit(text).hostname or ""
        if not is_loopback(host) and _MACHINE_HOST.fullmatch(host) is None:
            _redactor.add(host)


def redact(text: str) -> str:
    """Return the text as the log would show it: on one line, without secrets and control characters."""
    return _redactor.clean(_strip(text))


def _strip(text: str, *, keep: str = "") -> str:
    """Return the text without control, format and surrogate characters; every blank is a plain one."""
    if text.isprintable():
        return text
    return "".join(
        c if c in keep else " " if c.isspace() else c
        for c in text
        if c in keep or c.isspace() or unicodedata.category(c)[0] != "C"
    )


# --- lines ------------------------------------------------------------------------------------------------


def _value(value: object, depth: int = 0) -> Any:
    """Return a field's value as JSON, cleaned and bounded. Never fails."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, timedelta):
        return round(value.total_seconds(), 6)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Mapping) and depth < _DEPTH:
        pairs = list(value.items())[:_ITEMS]
        return {_text(key, 256): _field(str(key), item, depth + 1) for key, item in pairs}
    if isinstance(value, (list, tuple, set, frozenset)) and depth < _DEPTH:
        return [_value(item, depth + 1) for item in list(value)[:_ITEMS]]
    return _text(value)


def _field(key: str, value: object, depth: int = 0) -> Any:
    if isinstance(value, str) and value and _SECRET_KEY.search(key):
        return "***"
    return _value(value, depth)


def _text(value: object, limit: int = _TEXT_LIMIT) -> str:
    try:
        text = str(value)
    except Exception as error:  # noqa: BLE001 - somebody's __str__; the line matters more
        text = f"<{type(value).__name__}: {type(error).__name__}>"
    clean = redact(text[:_HUGE])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _event(record: logging.LogRecord) -> str:
    try:
        return _text(record.getMessage())
    except Exception:  # noqa: BLE001 - arguments that do not fit their format; the line matters more
        return _text(record.msg)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", None)
    return {str(key): value for key, value in fields.items()} if isinstance(fields, Mapping) else {}


def _traceback(record: logging.LogRecord) -> str:
    if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
        text = "".join(traceback.format_exception(*record.exc_info))
    else:
        text = record.exc_text or ""
    text += record.stack_info or ""
    return _redactor.clean(_strip(text[-_HUGE:], keep="\n"))[-_TRACEBACK_LIMIT:]


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": _event(record),
            "logger": record.name,
            "pid": record.process,
        }
        for key, value in _fields(record).items():
            name = _text(key, 256)
            line[f"{name}_" if name in line else name] = _field(key, value)
        if text := _traceback(record):
            line["traceback"] = text
        return json.dumps(line, ensure_ascii=False)


class ConsoleLines(logging.Formatter):
    """A record as one line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        fields = " ".join(f"{_text(key, 256)}={_field(key, value)}" for key, value in _fields(record).items())
        at = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S")
        return f"{at} {record.levelname.lower()} {_event(record)} {fields}".rstrip()


# --- the file ---------------------------------------------------------------------------------------------


class LineSink(Protocol):
    """Where lines go."""

    def append(self, line: bytes) -> None:
        """Add one line, with its end. Raises OSError."""
        ...


class LogFile:
    """A file that several processes append to, renamed to `.1`, `.2`, ... when it is long."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, backups: int = BACKUPS) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._torn = False

    def append(self, line: bytes) -> None:
        """Add one line, with its end. Raises OSError, RunComfyError (the folder cannot be made)."""
        data = b"\n" + line if self._torn else line
        if sys.platform == "win32":
            with _locked(self.path):
                if self._too_long(data):
                    self._shift()
                self._write(data)
        else:
            if self._too_long(data):
                # Held by somebody: then the file is being renamed already, and this line may go to either.
                with contextlib.suppress(OSError), _locked(self.path, wait=False):
                    if self._too_long(data):  # nobody was quicker
                        self._shift()
            self._write(data)

    def _too_long(self, data: bytes) -> bool:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return False
        return size > 0 and size + len(data) > self._max_bytes

    def _shift(self) -> None:
        for number in range(self._backups, 0, -1):
            newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                newer.replace(self.path.with_name(f"{self.path.name}.{number}"))

    def _write(self, data: bytes) -> None:
        fd = _open_private(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(fd, data)
            # What was written of a line that did not fit would swallow the next one.
            self._torn = written < len(data)
            while written < len(data):
                written += os.write(fd, data[written:])
            self._torn = False
        finally:
            os.close(fd)


def _open_private(path: Path, flags: int) -> int:
    """Open a file of ours, made if it is missing, as is its folder; never a link or a pipe planted in its place."""
    flags |= os.O_CREAT
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(path, flags, PRIVATE_FILE)
    except FileNotFoundError:
        make_private_dir(path.parent)
        return os.open(path, flags, PRIVATE_FILE)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock that belongs to a log file. Raises OSError (also if it is held and `wait` is false)."""
    fd = _open_private(path.with_name(f"{path.name}.lock"), os.O_RDWR)
    try:
        if sys.platform == "win32":
            msvcrt.locking(fd, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


class LineHandler(logging.Handler):
    """Hands lines to a sink. No failure leaves it; lines that could not be written are counted."""

    def __init__(self, sink: LineSink) -> None:
        super().__init__()
        self.sink = sink
        self.lost = 0
        """Lines lost since the last one that was written."""
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record."""
        try:
            if self.lost:
                self.sink.append(self._line(self._confession()))
                self.lost = 0
            self.sink.append(self._line(record))
        except Exception:  # noqa: BLE001 - a log that fails must not fail the program, nor print
            self.lost += 1

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """Say nothing: the standard one prints a traceback."""
        self.lost += 1

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    def _confession(self) -> logging.LogRecord:
        fields = {"fields": {"lines": self.lost}}
        return logging.makeLogRecord(
            {
                "name": f"{ROOT}.log",
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": "log_lines_lost",
                **fields,
            }
        )


class StderrSink:
    """Standard error as it is at the moment of the line: tests and displays replace it."""

    def append(self, line: bytes) -> None:
        """Print one line. Raises OSError, ValueError (it is closed)."""
        if sys.stderr is not None:
            sys.stderr.write(line.decode("utf-8"))
            sys.stderr.flush()


# --- setting up -------------------------------------------------------------------------------------------


def configure_logging(settings: Settings, *, console: bool = False) -> None:
    """Send what this library logs to the state folder's log file, and to standard error if `console`.

    Repeating it replaces the former arrangement. Handlers that a program added to the logger `runcomfy` are left alone.
    Never raises: if the folder cannot be made now, it is tried again at every line.
    """
    for token in settings.cloud.tokens:
        register_secret(token)
    register_secret(settings.cloud.user_id)
    if settings.app.hugging_face_token is not None:
        register_secret(settings.app.hugging_face_token)
    folder = Path(settings.files.state_dir) / "logs"
    with contextlib.suppress(OSError, RunComfyError):
        make_private_dir(folder)
        _close_to_others(folder)
    unconfigure_logging()
    logger = logging.getLogger(ROOT)
    logger.propagate = False
    logger.setLevel(settings.app.log_level)
    logger.addHandler(LineHandler(LogFile(folder / FILE_NAME)))
    if console:
        handler = LineHandler(StderrSink())
        handler.setFormatter(ConsoleLines())
        logger.addHandler(handler)


def unconfigure_logging() -> None:
    """Undo `configure_logging`: the logger is again as the program that uses this library has it."""
    logger = logging.getLogger(ROOT)
    for handler in [handler for handler in logger.handlers if isinstance(handler, LineHandler)]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def _close_to_others(folder: Path) -> None:
    """Take from others what an older version or a hand has given them."""
    if sys.platform != "win32":
        folder.chmod(PRIVATE_DIR)
        for file in folder.glob(f"{FILE_NAME}*"):
            if not file.is_symlink():
                file.chmod(PRIVATE_FILE)
