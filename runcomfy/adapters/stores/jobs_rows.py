"""
Rows of the queue's tables as values, and back.

The `jobs` table is open to users and their SQL, so what is read here is forgiven: a time in another notation is
understood, a lease nobody can read has run out, an unreadable number is the column's default. What is written is
strict. Times are texts on SQLite (the published ones to the second, as `CURRENT_TIMESTAMP` writes them; ours to the
microsecond) and `timestamptz` on PostgreSQL; JSON is text on both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from runcomfy.adapters.stores import tables
from runcomfy.domain.exceptions import ValueInvalid, foreign_text
from runcomfy.domain.job import JobId, JobRequest, PromptId
from runcomfy.domain.queued import (
    DEFAULT_PRIORITY,
    Attempt,
    EventKind,
    JobEvent,
    Outcome,
    Phase,
    QueuedJob,
    QueueStatus,
    RowId,
    WorkerId,
)

JOB_COLUMNS: Final = tuple(column.name for column in tables.jobs.columns)
ATTEMPT_COLUMNS: Final = tuple(field.name for field in fields(Attempt))
EVENT_COLUMNS: Final = tuple(field.name for field in fields(JobEvent))

_STATUSES: Final = {str(status): status for status in QueueStatus}
_PHASES: Final = {str(phase): phase for phase in Phase}
_KINDS: Final = {str(kind): kind for kind in EventKind}
_OUTCOMES: Final = {str(outcome): outcome for outcome in Outcome}
_REQUEST_FIELDS: Final[Mapping[str, Field[Any]]] = {field.name: field for field in fields(JobRequest)}

TRACE_LIMIT: Final = 20_000
"""Characters of `error_trace`: enough for a node's traceback, not for what a hostile server may send."""


# -- times -----------------------------------------------------------------------------------------------------


class Stamps:
    """How times are written for one kind of database."""

    def __init__(self, dialect: str) -> None:
        self._texts = dialect != "postgresql"

    def exact(self, at: datetime | None) -> Any:
        """Return a time to the microsecond."""
        if at is None:
            return None
        utc = at.astimezone(UTC)
        return utc.replace(tzinfo=None).isoformat(" ", "microseconds") if self._texts else utc

    def whole(self, at: datetime | None) -> Any:
        """Return a time as the published columns have it: to the second where it is text, cut off."""
        if at is None:
            return None
        utc = at.astimezone(UTC)
        return utc.replace(tzinfo=None).isoformat(" ", "seconds") if self._texts else utc

    def kept(self, at: datetime) -> datetime:
        """Return a time as the published columns give it back."""
        return at.astimezone(UTC).replace(microsecond=0) if self._texts else at.astimezone(UTC)


def time_in(value: object) -> datetime | None:
    """Return the time a column says, in UTC; None for none, or one that nobody can read."""
    if value is None:
        return None
    if not isinstance(value, datetime):
        return _time_said(str(value))
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


@lru_cache(maxsize=1024)  # jobs that were claimed together have their times in common
def _time_said(text: str) -> datetime | None:
    try:
        at = datetime.fromisoformat(text.strip())
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


# -- JSON ------------------------------------------------------------------------------------------------------


def json_text(value: object, what: str = "a value") -> str:
    """Return JSON for a column; raise ValueInvalid for what JSON cannot say (NaN, a set, an object)."""
    try:
        return _STRICT.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueInvalid(
            f"{what} cannot be stored: {foreign_text(error)}", hint="use texts, numbers, lists and tables only"
        ) from None


def told_text(value: Mapping[str, Any]) -> str:
    """Return JSON for what is only told, never run: what JSON cannot say is put into words."""
    try:
        return _LENIENT.encode(value)
    except (ValueError, RecursionError):
        return json.dumps({"text": foreign_text(value)})


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON")


def _words(value: object) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


# Made once: json.dumps makes one for each call that asks for anything but its defaults.
_STRICT: Final = json.JSONEncoder(allow_nan=False, default=_plain, separators=(",", ":"))
_LENIENT: Final = json.JSONEncoder(allow_nan=False, default=_words, separators=(",", ":"), skipkeys=True)


def table_in(value: object) -> Mapping[str, Any]:
    """Return the JSON object a column says; what is none is kept as its `text`."""
    if value is None or value in ("", "{}"):
        return {}
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {"text": str(value)}
    return found if isinstance(found, Mapping) else {"text": str(value)}


def request_text(request: JobRequest) -> str:
    """Return a request as JSON; fields that have their default are left out, so that new fields change no old job."""
    said: dict[str, Any] = {}
    for name, field in _REQUEST_FIELDS.items():
        value = getattr(request, name)
        if name == "job_id" or value == _default(field):
            continue
        said[name] = value.total_seconds() if isinstance(value, timedelta) else value
    return json_text(said, "what the job is to run")


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def request_in(value: object) -> JobRequest | None:
    """Return the request a column says, None if it says none that this program can read whole."""
    return None if value is None else _request_said(str(value))


@lru_cache(maxsize=64)  # a row is read when it is claimed and again when it ends
def _request_said(text: str) -> JobRequest | None:
    try:
        said = json.loads(text)
        if said.keys() - _REQUEST_FIELDS.keys():
            return None
        if "timeout" in said:
            said["timeout"] = timedelta(seconds=said["timeout"])
        if "required_inputs" in said:
            said["required_inputs"] = tuple(said["required_inputs"])
        return JobRequest(**said)
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return None


# -- rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of `jobs`, with what only the store wants to know."""

    job: QueuedJob
    run_began_at: datetime | None
    run_counted: bool
    """Whether `run_count` has the run that is going on."""
    body_sha256: str
    waits_since: datetime | None


def entry_of(row: Sequence[Any]) -> Entry:
    """Return a whole row (`JOB_COLUMNS`)."""
    return Entry(job_of(row), time_in(row[38]), bool(row[39]), _text(row[37]), time_in(row[40]))


def job_of(row: Sequence[Any]) -> QueuedJob:
    """Return the job a whole row (`JOB_COLUMNS`) says."""
    return QueuedJob(
        RowId(row[0]),
        _text(row[1]),
        _text(row[2]),
        _text(row[3]),
        _number(row[4], DEFAULT_PRIORITY),
        _STATUSES[row[5]],
        _number(row[6], 0),
        _number(row[7], 0),
        None if row[8] is None else _number(row[8], None),
        None if row[9] is None else time_in(row[9]),
        None if row[10] is None else time_in(row[10]),
        _decimal(row[11], None),
        None if row[12] is None else _text(row[12]),
        table_in(row[13]),
        None if row[14] is None else WorkerId(_text(row[14])),
        None if row[15] is None else time_in(row[15]),
        JobId(_text(row[16])),
        _number(row[17], 0),
        _text(row[18]),
        request_in(row[19]),
        _PHASES.get(row[20], Phase.NONE),
        row[21],
        row[22],
        None if row[23] is None else time_in(row[23]),
        None if row[24] is None else time_in(row[24]),
        None if row[25] is None else time_in(row[25]),
        _text(row[26]),
        _text(row[27]),
        row[28],
        _text(row[29]),
        _text(row[30]),
        _text(row[31]),
        _number(row[32], 0),
        _number(row[33], 0),
        _decimal(row[34], 0.0),
        _text(row[35]),
        table_in(row[36]),
    )


def attempt_of(row: Sequence[Any]) -> Attempt:
    """Return the attempt that a row (`ATTEMPT_COLUMNS`) says."""
    job_id, token, run, worker_id, started_at, ended_at, outcome, place, prompt_id, code, trace, result = row
    return Attempt(
        job_id=RowId(job_id),
        token=token,
        run=run,
        worker_id=WorkerId(worker_id),
        started_at=time_in(started_at) or datetime.fromtimestamp(0, UTC),
        ended_at=time_in(ended_at),
        outcome=_OUTCOMES.get(outcome),
        place=place,
        prompt_id=None if prompt_id is None else PromptId(prompt_id),
        error_code=code,
        error_trace=trace,
        result=table_in(result),
    )


def event_of(row: Sequence[Any]) -> JobEvent:
    """Return the event that a row (`EVENT_COLUMNS`) says; a kind that only a newer program knows is a note."""
    number, at, kind, job_id, token, worker_id, data = row
    known = _KINDS.get(kind)
    return JobEvent(
        number=number,
        at=time_in(at) or datetime.fromtimestamp(0, UTC),
        kind=known or EventKind.NOTE,
        job_id=None if job_id is None else RowId(job_id),
        token=token,
        worker_id=None if worker_id is None else WorkerId(worker_id),
        data=table_in(data) if known else {**table_in(data), "kind": kind},
    )


def _text(value: Any) -> str:
    if type(value) is str:
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)


def _number(value: Any, default: Any) -> Any:
    if type(value) is int:
        return value
    try:
        return default if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        return default


def _decimal(value: Any, default: Any) -> Any:
    if type(value) is float or value is None:
        return default if value is None else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def safe(text: str) -> str:
    """Return text that any database takes: what is no Unicode is written escaped."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


# -- errors ----------------------------------------------------------------------------------------------------


def trace_of(error: Mapping[str, Any]) -> str:
    """Return an error (`RunComfyError.as_dict()`) as people read it: code, message, hint, and the details."""
    lines = [f"{error.get('code', 'error')}: {error.get('message', '')}"]
    if hint := error.get("hint"):
        lines.append(f"hint: {hint}")
    details = error.get("details")
    for name, value in details.items() if isinstance(details, Mapping) else ():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            lines += [f"{name}:", *("  " + item.rstrip("\n").replace("\n", "\n  ") for item in value)]
        else:
            lines.append(f"{name}: {value if isinstance(value, str) else told_text({'': value})[4:-1]}")
    return safe("\n".join(lines))[:TRACE_LIMIT]
