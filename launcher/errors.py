"""
What goes wrong, as HTTP says it: one status for each kind of error, one shape for every body.

    {"detail": "what happened", "error": {"code": "…", "message": "…", "hint": "…", "details": {…}}}

    413, 410, 415 …         errors of this package that name their own status (`HttpError`)
    404                     JobNotFound, MachineNotFound
    409                     IdempotencyConflict, JobBusy, NameTaken; BudgetExceeded (the state of the account, which
                            can change, forbids it: nobody is asked to pay this API, so it is not 402)
    429                     TooManyRequests, with Retry-After
    422                     every other BadInput; a body that does not fit (`detail` is then FastAPI's list)
    500                     a defect of ours, or a run's failure told by a call that waits for it
    502                     the cloud or a machine did not do its part; results that are not what they must be
    503                     settings and credentials; the database; somebody stopped it
    504                     it took longer than allowed
    507                     the disk is full

CONJURE reads `detail`, so it is a sentence wherever an error of ours is told. Paths of this computer and addresses of
machines are cut out; what nobody foresaw is logged and says nothing of itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from launcher.plain_json import PlainJson
from launcher.views import without_paths
from runcomfy.adapters.log import redact
from runcomfy.domain import exceptions as known
from runcomfy.domain.exceptions import RunComfyError, foreign_text

log = logging.getLogger(__name__)

STATUS: Final[Mapping[type[RunComfyError], int]] = {
    known.JobNotFound: 404,
    known.MachineNotFound: 404,
    known.IdempotencyConflict: 409,
    known.JobBusy: 409,
    known.NameTaken: 409,
    known.TooManyRequests: 429,
    known.BadInput: 422,
    known.ConfigurationError: 503,
    known.BudgetExceeded: 409,
    known.ServerUnreachable: 502,
    known.ProviderError: 502,
    known.DeadlineExceeded: 504,
    known.VerificationFailed: 502,
    known.DiskFull: 507,
    known.LocalError: 503,
    known.Interrupted: 503,
}
"""The nearest ancestor of an error counts."""

MESSAGE_LIMIT: Final = 2_000
DETAIL_ITEMS: Final = 50
"""Entries of a list, or names of an object, in what an error tells programs."""


class HttpError(RunComfyError):
    """A request that HTTP itself has a status for."""

    code = "request-refused"
    status: ClassVar[int] = 400


class TooLarge(HttpError):
    """The body or a file of it is larger than allowed."""

    code = "too-large"
    exit_code = 2
    status = 413


class NotFound(HttpError):
    """There is no such thing."""

    code = "not-found"
    exit_code = 2
    status = 404


class Conflict(HttpError):
    """It cannot be done as things stand."""

    code = "conflict"
    exit_code = 2
    status = 409


class Gone(HttpError):
    """The file is no longer what was verified."""

    code = "file-gone"
    status = 410


class NotSupported(HttpError):
    """The body is in no form that is understood here."""

    code = "media-type-not-supported"
    exit_code = 2
    status = 415


def status_of(error: RunComfyError) -> int:
    """Return the status an error is told with; one that brings its own (`status`) has the last word."""
    if isinstance(error, HttpError):
        return error.status
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def error_body(error: RunComfyError) -> dict[str, Any]:
    """Return an error as clients read it, without paths of this computer or secrets."""
    message = _text(error.message)
    facts = {
        "code": error.code,
        "message": message,
        "hint": _text(error.hint),
        "details": _clean(error.details),
    }
    return {"detail": message, "error": facts}


def plain_body(code: str, message: str, hint: str = "") -> dict[str, Any]:
    """Return a body of the same shape for what is no error of ours."""
    return {"detail": message, "error": {"code": code, "message": message, "hint": hint, "details": {}}}


def error_response(error: RunComfyError) -> PlainJson:
    """Return the whole answer that tells an error."""
    return PlainJson(error_body(error), status_of(error), headers=_headers(error))


def install_errors(web: FastAPI) -> None:
    """Let every error of every route be told in one shape."""
    web.add_exception_handler(RunComfyError, _ours)
    web.add_exception_handler(RequestValidationError, _unfit)
    web.add_exception_handler(HTTPException, _http)
    web.add_exception_handler(Exception, _unforeseen)


async def _ours(request: Request, error: Exception) -> PlainJson:
    if not isinstance(error, RunComfyError):
        raise error
    status = status_of(error)
    if status >= 500:
        fields = {"route": _route(request), "error": error.code, "message": redact(foreign_text(error.message))}
        log.warning("request_failed", extra={"fields": fields})
    return error_response(error)


async def _unfit(request: Request, error: Exception) -> PlainJson:
    """A body that does not fit: FastAPI's list stays, beside a sentence; what was sent is not sent back."""
    del request
    if not isinstance(error, RequestValidationError):
        raise error
    problems = [
        {
            "type": str(problem.get("type", "")),
            "loc": [part if isinstance(part, int) else foreign_text(part, 80) for part in problem.get("loc", ())],
            "msg": foreign_text(problem.get("msg", ""), 300),
        }
        for problem in list(error.errors())[:DETAIL_ITEMS]
    ]
    words = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems[:3]) or "the request does not fit"
    facts = {"code": "request-invalid", "message": words, "hint": "see /openapi.json", "details": {}}
    return PlainJson({"detail": problems, "error": facts}, 422)


async def _http(request: Request, error: Exception) -> PlainJson:
    del request
    if not isinstance(error, HTTPException):
        raise error
    phrase = HTTPStatus(error.status_code).phrase if error.status_code in list(HTTPStatus) else "Error"
    said = str(error.detail or phrase)
    code = phrase.lower().replace(" ", "-").replace("'", "")
    body = plain_body(code, foreign_text(said, 500))
    return PlainJson(body, error.status_code, headers=dict(error.headers or {}))


async def _unforeseen(request: Request, error: Exception) -> PlainJson:
    fields = {"route": _route(request), "error": type(error).__name__}
    log.error("request_broke", exc_info=error, extra={"fields": fields})
    body = plain_body("internal-error", "something went wrong here that nobody foresaw", "the log has the details")
    return PlainJson(body, 500)


def _route(request: Request) -> str:
    """Return the method and the route's pattern: what a client wrote into the path is not logged."""
    route = request.scope.get("route")
    return f"{request.method} {getattr(route, 'path', '?')}"


def _headers(error: RunComfyError) -> dict[str, str]:
    after = error.details.get("retry_after_s")
    if not isinstance(after, (int, float)) or not math.isfinite(after):
        return {}
    return {"Retry-After": str(max(1, math.ceil(after)))}


def _text(text: str) -> str:
    return redact(without_paths(text))[:MESSAGE_LIMIT]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        items = list(value.items())[:DETAIL_ITEMS]
        return {foreign_text(name, 80): _clean(item) for name, item in items if name not in ("url", "path")}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_clean(item) for item in list(value)[:DETAIL_ITEMS]]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return foreign_text(value)
