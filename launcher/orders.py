"""
What a request says of a job, taken in and looked at for its form; what it would do is `intake`'s to find out.

The body comes as JSON or as the fields of a form, which say the same. Nothing here waits for a file or the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from launcher.errors import TooLarge
from launcher.multipart import Form
from launcher.schemas import JobOrder
from launcher.strict_json import strict_json
from runcomfy.domain.exceptions import BadInput, ValueInvalid, foreign_text

KEY_MOST: Final = 255
"""Characters of an idempotency key."""
TEXT_MOST: Final = 100_000
DEPTH_MOST: Final = 64
_JSON_FIELDS: Final = frozenset(
    {"inputs", "sets", "metadata", "seed", "priority", "timeout_s", "retry_limit", "dry_run"}
)
_WORKFLOW: Final = "workflow"


def key_of(request: Request) -> str | None:
    """Return the idempotency key a request names, if any. Raises ValueInvalid."""
    said = request.headers.getlist("idempotency-key")
    if not said:
        return None
    if len(said) > 1 or not 0 < len(said[0]) <= KEY_MOST or not (said[0].isascii() and said[0].isprintable()):
        raise ValueInvalid(
            "the Idempotency-Key cannot be used", hint=f"send one of 1 to {KEY_MOST} printable ASCII characters"
        )
    return said[0]


async def whole_body(request: Request, most: int) -> bytes:
    """Return a body of at most so many bytes. Raises TooLarge, BadInput."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise TooLarge(f"the body has more than {most} bytes", hint="send files as multipart")
    except ClientDisconnect as error:
        raise BadInput("the client left before the body was whole") from error
    return bytes(data)


def order_of(said: Any) -> JobOrder:
    """Return what a body orders. Raises RequestValidationError."""
    try:
        return JobOrder.model_validate(said)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
        raise RequestValidationError(problems) from error


def merged(form: Form) -> dict[str, Any]:
    """Return the fields of a form as the JSON body has them. Raises BadInput, RequestValidationError."""
    fields = dict(form.fields)
    whole = fields.pop("job", None)
    said = strict_json(whole) if whole is not None else {}
    if not isinstance(said, dict):
        raise ValueInvalid("the field job is no JSON object")
    for name, text in fields.items():
        if name in said:
            raise ValueInvalid(f"{foreign_text(name, 80)!r} is given twice", hint="as a field, or in job")
        is_graph = name == _WORKFLOW and text.lstrip().startswith("{")
        said[name] = strict_json(text) if is_graph or (name in _JSON_FIELDS and text.strip()) else text
        if name in _JSON_FIELDS and not text.strip():
            del said[name]  # a form sends what was left empty
    return said


def check_texts(value: Any, where: str, depth: int = 0) -> None:
    """Refuse texts that are too long or hold control characters, and what is nested too deep. Raises ValueInvalid."""
    if depth > DEPTH_MOST:
        raise ValueInvalid(f"{where} is nested too deep", hint=f"at most {DEPTH_MOST} levels")
    match value:
        case str():
            if value.startswith("data:") and where in ("inputs", "sets"):
                return
            if len(value) > TEXT_MOST:
                raise ValueInvalid(f"{where} holds a text of more than {TEXT_MOST} characters")
            if any(ord(c) < 32 and c not in "\t\n\r" for c in value) or "\x7f" in value:
                raise ValueInvalid(f"{where} holds a text with control characters", hint="write plain text")
        case Mapping():
            for name, item in value.items():
                check_texts(name, where, depth + 1)
                check_texts(item, where, depth + 1)
        case list():
            for item in value:
                check_texts(item, where, depth + 1)
        case _:
            return
