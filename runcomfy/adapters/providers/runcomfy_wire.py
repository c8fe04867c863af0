"""
RunComfy's JSON in our words, and our requests in RunComfy's. Pure: what it is given comes from the client.

RunComfy documents eight fields of a machine and promises nothing about them, so reading is tolerant: objects may be
wrapped, fields may be missing, null, of another type or new. It is strict where a wrong guess would cost money: an
answer in which a machine cannot be told apart, or a list of which a part is missing, is no answer at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Final
from urllib.parse import urlsplit

from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.machine import CloudWorkflow, MachineReport, Phase, ServerId
from runcomfy.domain.secret import SecretUrl

PHASES: Final[Mapping[str, Phase]] = {
    # `Starting`, `Ready` and `Deleting` are documented; clients of RunComfy have branches for the others.
    "starting": Phase.STARTING,
    "initializing": Phase.STARTING,
    "pending": Phase.STARTING,
    "creating": Phase.STARTING,
    "ready": Phase.READY,
    "running": Phase.READY,
    "deleting": Phase.STOPPING,
    "stopping": Phase.STOPPING,
    "terminating": Phase.STOPPING,
    "deleted": Phase.GONE,
    "stopped": Phase.GONE,
    "terminated": Phase.GONE,
    "error": Phase.FAILED,
    "failed": Phase.FAILED,
}

_ID: Final = re.compile(r"\w[\w.:-]{0,199}", re.ASCII)
"""An id becomes a part of a path, so it must not be able to lead elsewhere."""
_LISTS: Final = ("servers", "workflows", "machines", "data", "items", "results")
_SINGLES: Final = ("server", "machine", "data")
_NEXT: Final = ("next", "next_url", "next_page", "next_page_token", "next_cursor", "nextToken", "cursor")
_MORE: Final = ("has_more", "has_next", "hasMore", "truncated")
_TOTALS: Final = ("total", "total_count", "totalCount")
_PAGE_COUNTS: Final = ("pages", "total_pages", "totalPages")
_PAGING_HOMES: Final = ("pagination", "paging", "meta", "links")


FIRST_TIME: Final = datetime(2000, 1, 1, tzinfo=UTC)
LAST_TIME: Final = datetime(2200, 1, 1, tzinfo=UTC)
LONGEST: Final = timedelta(days=36_500)
"""A machine that is said to run longer is said to run for nobody knows how long."""
MOST_USD: Final = Decimal(10) ** 12
"""More is no balance; written out, "1e999999999" has a billion digits."""
FEWEST_DIGITS: Final = 30
"""After the point: less than that is nothing, and "1e-999999999" has as many."""


class Unreadable(Exception):
    """The text is not the JSON this API sends; says in words what is wrong."""


@dataclass(frozen=True, slots=True)
class Page:
    """One answer to a question for a list."""

    entries: Sequence[Mapping[str, Any]]
    next: str | int | None = None
    """Where the rest is: an address, or a page number; None: this was the last."""
    total: int | None = None
    """How many entries the whole list has, if the answer says so."""


def read_json(body: bytes) -> Any:
    """Decode a body. Raises Unreadable."""
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        head = body[:512].lstrip().lower()
        kind = "an HTML page" if head.startswith((b"<!doctype", b"<html")) else "not JSON"
        raise Unreadable("an empty body" if not body.strip() else kind) from None


def read_id(value: Any) -> str | None:
    """Return an id that may become a part of a path; None if it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def read_url(value: Any) -> SecretUrl | None:
    """Return an address that can be asked; None if it is none."""
    if not isinstance(value, str):
        return None
    text = value.strip()
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return None
    return SecretUrl(text) if usable and text.isascii() and text.isprintable() and " " not in text else None


def read_time(value: Any) -> datetime | None:
    """Read a time in UTC; one without an offset is taken for UTC, as RunComfy's documents write them.

    None, too, for a time that no machine of ours can have: "0001-01-01" is how Go writes that there is none, and sums
    with such times leave the calendar.
    """
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value.strip())
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return at if FIRST_TIME <= at <= LAST_TIME else None


def read_page(payload: Any) -> Page:
    """Find the entries of a list, bare or wrapped, and what the answer says about further pages. Raises Unreadable."""
    if isinstance(payload, list):
        return Page(_objects(payload))
    if not isinstance(payload, dict):
        raise Unreadable(f"a {type(payload).__name__} instead of a list")
    refuse_errors(payload)
    for name in _LISTS:
        inner = payload.get(name)
        if isinstance(inner, list):
            return _paged(_objects(inner), payload)
        if isinstance(inner, dict) and any(isinstance(inner.get(deeper), list) for deeper in _LISTS):
            page = read_page(inner)
            outer = _paged(page.entries, payload)
            return Page(page.entries, page.next or outer.next, page.total if page.total is not None else outer.total)
    raise Unreadable("an object without a list")


def refuse_errors(payload: Any) -> None:
    """Raise Unreadable if an answer with a good status says that something went wrong.

    RunComfy's newer APIs send errors that way (status 200 and an error code); a list that failed is not an empty one.
    """
    if isinstance(payload, dict) and (
        payload.get("success") is False or any(payload.get(name) for name in ("error", "errors", "error_code"))
    ):
        raise Unreadable("an error in the place of an answer")


def _objects(entries: list[Any]) -> Sequence[Mapping[str, Any]]:
    for entry in entries:
        if not isinstance(entry, dict):
            raise Unreadable(f"a list with a {type(entry).__name__} in it")
    return entries


def _paged(entries: Sequence[Mapping[str, Any]], payload: Mapping[str, Any]) -> Page:
    """Read the marks of paging; a mark that says "there is more" without saying where makes the answer unreadable."""
    homes = [payload, *(home for name in _PAGING_HOMES if isinstance(home := payload.get(name), dict))]
    total: int | None = None
    more = False
    for home in homes:
        for name in _NEXT:
            value = home.get(name)
            if not value:
                continue
            if isinstance(value, str) and value[:8].lower().startswith(("/", "http://", "https://")):
                return Page(entries, value, _integer(home, _TOTALS))
            if name in ("next", "next_page") and isinstance(value, int) and not isinstance(value, bool):
                return Page(entries, value, _integer(home, _TOTALS))
            raise Unreadable(f"a part of a list, with its rest behind an unknown mark ({name})")
        more = more or any(home.get(name) is True for name in _MORE)
        page, pages = _integer(home, ("page", "current_page")), _integer(home, _PAGE_COUNTS)
        if pages is not None and pages > 1:
            if page is None:
                raise Unreadable("a part of a list, without saying which")
            if page < pages:
                return Page(entries, page + 1, _integer(home, _TOTALS))
        if total is None:
            total = _integer(home, _TOTALS)
    if more:
        raise Unreadable("a part of a list, without saying where the rest is")
    return Page(entries, None, total)


def _integer(home: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for name in names:
        value = home.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def read_machines(entries: Sequence[Mapping[str, Any]]) -> list[MachineReport]:
    """Read a whole list. A machine that is in it twice counts once, as the more alive of the two.

    An id that no path can hold is none of those we know: its machine is listed under a name made up for it, and the
    rest of the list counts. An entry without any id might be one of ours. Raises Unreadable.
    """
    found: dict[ServerId, MachineReport] = {}
    for entry in entries:
        if (name := _made_up(entry.get("server_id"))) is not None:
            report = replace(read_machine({**entry, "server_id": name}), addressable=False)
        else:
            report = read_machine(entry)
        before = found.get(report.server_id)
        if before is None or (before.phase is Phase.GONE and report.phase is not Phase.GONE):
            found[report.server_id] = report
    return list(found.values())


def read_single(payload: Any, *, expected: ServerId | None = None) -> MachineReport:
    """Read an answer about one machine, bare or wrapped. Raises Unreadable.

    With `expected`, an object that has a status but no id is taken to be about that machine; one with another id is
    not accepted.
    """
    if not isinstance(payload, dict):
        raise Unreadable(f"a {type(payload).__name__} instead of a machine")
    if "server_id" not in payload:
        for name in _SINGLES:
            inner = payload.get(name)
            if isinstance(inner, dict):
                payload = inner
                break
    if expected is not None and _server_id(payload) is None and isinstance(payload.get("current_status"), str):
        payload = {**payload, "server_id": expected}
    report = read_machine(payload)
    if expected is not None and report.server_id != expected:
        raise Unreadable("an answer about another machine")
    return report


def _made_up(server_id: Any) -> str | None:
    """Return a name for an id that cannot be asked about; None if it can be, or is no text at all."""
    if not isinstance(server_id, str) or not server_id.strip() or read_id(server_id.strip()) is not None:
        return None
    digest = hashlib.sha256(server_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"unusable-id-{digest[:12]}"


def read_machine(entry: Mapping[str, Any]) -> MachineReport:
    """Read one machine object. Only its id is needed. Raises Unreadable."""
    server_id = _server_id(entry)
    if server_id is None:
        raise Unreadable("a machine without a usable id")
    status = _text(entry, "current_status", "status")
    phase, duration = PHASES.get(status.casefold(), Phase.UNKNOWN), _duration(entry.get("estimated_duration"))
    ready_at, stopping_at = read_time(entry.get("service_ready_at")), read_time(entry.get("estimated_stopping_at"))
    if ready_at is None and phase is Phase.READY and duration is not None and stopping_at is not None:
        # Left out, or no time (fault 13): the other two tell it, stop time = ready time + duration.
        ready_at = max(stopping_at - duration, FIRST_TIME)
    return MachineReport(
        server_id=server_id,
        phase=phase,
        status=status,
        server_type=_text(entry, "server_type"),
        url=read_url(entry.get("main_service_url")),
        duration=duration,
        ready_at=ready_at,
        stopping_at=stopping_at,
        workflow_version_id=_text(entry, "workflow_version_id"),
    )


def read_workflows(entries: Sequence[Mapping[str, Any]]) -> list[CloudWorkflow]:
    """Read the list of workflows. One without a version id is shown; it cannot be launched."""
    return [
        CloudWorkflow(
            workflow_id=_text(entry, "workflow_id", "id"),
            name=_text(entry, "workflow_name", "name"),
            version_id=_text(entry, "version_id", "latest_version_id"),
            created_at=_text(entry, "created_at"),
            updated_at=_text(entry, "updated_at"),
        )
        for entry in entries
    ]


def read_money(payload: Any) -> Decimal | None:
    """Read the balance in USD; None if the answer does not have it."""
    if not isinstance(payload, dict) or str(payload.get("currency", "USD")).upper() != "USD":
        return None
    amount = payload.get("balance_usd")
    if isinstance(amount, bool) or not isinstance(amount, int | float | str) or len(str(amount)) > FEWEST_DIGITS:
        return None
    try:
        money = Decimal(str(amount))
    except (InvalidOperation, ValueError):
        return None
    if not money.is_finite() or not -MOST_USD < money < MOST_USD:
        return None
    return money if money.adjusted() > -FEWEST_DIGITS else Decimal(0)


def read_user_id(payload: Any) -> str | None:
    """Read the user id out of the answer about the token's owner."""
    return _text(payload, "id") or None if isinstance(payload, dict) else None


def launch_body(*, server_type: str, duration: timedelta, workflow_version_id: str) -> dict[str, Any]:
    """The request for a machine (RunComfy API reference, launch a machine). Durations are whole seconds."""
    return {
        "workflow_version_id": workflow_version_id,
        "server_type": server_type,
        "estimated_duration": whole_seconds(duration),
    }


def duration_body(total: timedelta) -> dict[str, Any]:
    """The request for another duration. The field's name differs from the launch's: it repeats "update"."""
    return {"update_estimated_duration": whole_seconds(total)}


def whole_seconds(span: timedelta) -> int:
    """Round a span up to seconds: a machine must not end before it was meant to."""
    return -(-span // timedelta(seconds=1))


def _server_id(entry: Mapping[str, Any]) -> ServerId | None:
    named = read_id(entry.get("server_id"))
    return ServerId(named) if named is not None else None


def _text(entry: Mapping[str, Any], *names: str) -> str:
    for name in names:
        value = entry.get(name)
        if isinstance(value, str) and value:
            return foreign_text(value)
    return ""


def _duration(value: Any) -> timedelta | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        span = timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        return None
    return span if timedelta(0) < span <= LONGEST else None
