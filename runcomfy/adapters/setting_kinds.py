"""
The sorts of values that settings have: how each is checked, and how people are told about it.

What is checked may be a text (of a variable, a file, an option) or, from a Python program, a value of the right type
already. Which settings there are is in `variables` and the modules it draws together.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from runcomfy.adapters.rates import PLANS, SERVER_TYPE
from runcomfy.domain.durations import HINT as DURATION_HINT
from runcomfy.domain.durations import parse_duration, show_duration
from runcomfy.domain.exceptions import RunComfyError, foreign_text
from runcomfy.domain.secret import Secret, is_loopback
from runcomfy.domain.settings import DEFAULT_API_BASE_URL, KNOWN_SERVER_TYPES

T = TypeVar("T")

YEAR: Final = timedelta(days=366)
LOG_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


# --- checks -----------------------------------------------------------------------------------------------


def refuse(words: str, kind: str = "setting") -> PydanticCustomError:
    """Return the error that says what is wrong with a value, in these words."""
    # Braces would be read as a template.
    return PydanticCustomError(kind, "{words}", {"words": words})


def shown(value: object) -> str:
    """Return a value as errors quote it: cut, and without control characters."""
    return repr(foreign_text(value, 60))


def text_shown(value: object) -> str:
    """Return a checked value as its variable would hold it; empty for None."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case timedelta():
            return show_duration(value)
        case tuple():
            return os.pathsep.join(map(str, value))
        case float():
            return f"{value:g}"
        case _:
            return str(value)


def duration_of(value: object) -> timedelta:
    """Return a length of time, whatever its size."""
    if isinstance(value, timedelta):
        return value
    try:
        return parse_duration(str(value))
    except RunComfyError as error:
        raise refuse(error.message) from error


def _duration(value: object) -> timedelta:
    duration = duration_of(value)
    if not timedelta(0) < duration <= YEAR:
        raise refuse(f"{shown(value)} is not more than nothing and at most a year")
    return duration


def number_of(value: object) -> float:
    """Return a number, whatever its size."""
    try:
        return float(str(value))
    except ValueError as error:
        raise refuse(f"{shown(value)} is not a number") from error


def several(value: object, read: Callable[[object], T], what: str) -> tuple[T, ...]:
    """Return what `read` makes of each name between commas, each once; `what` they name, if there must be one."""
    names = value if isinstance(value, (tuple, list)) else str(value).split(",")
    found = tuple(dict.fromkeys(read(name) for name in names if str(name).strip()))
    if not found:
        raise refuse(f"{shown(value)} names no {what}")
    return found


def whole_between(least: int, most: int) -> Callable[[object], int]:
    """Return the check of a whole number."""

    def check(value: object) -> int:
        text = str(value).strip()
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise refuse(f"{shown(value)} is not a whole number")
        if not least <= int(text) <= most:
            raise refuse(f"{shown(value)} is not between {least} and {most}")
        return int(text)

    return check


def _rate_per_second(value: object) -> float:
    number = number_of(value)
    if not math.isfinite(number) or not 0 < number <= 1000:
        raise refuse(f"{shown(value)} is not more than 0 and at most 1000")
    return number


def _usd(value: object) -> Decimal:
    try:
        amount = Decimal(str(value).strip().removeprefix("$"))
    except InvalidOperation as error:
        raise refuse(f"{shown(value)} is not an amount") from error
    if not amount.is_finite() or not 0 < amount <= 10_000:
        raise refuse(f"{shown(value)} is not more than 0 and at most 10000")
    return amount


def _switch(value: object) -> bool:
    word = str(value).strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise refuse(f"{shown(value)} is neither true nor false")


def _plan(value: object) -> str:
    word = str(value).strip().lower()
    word = {"hobby": "payg", "pay-as-you-go": "payg", "pay as you go": "payg"}.get(word, word)
    if word not in PLANS:
        raise refuse(f"{shown(value)} is not a plan of RunComfy")
    return word


def _log_level(value: object) -> str:
    word = str(value).strip().upper()
    if word not in LOG_LEVELS:
        raise refuse(f"{shown(value)} is not a level")
    return word


def server_type(value: object) -> str:
    """Return the name of a machine type, if it can be one."""
    name = str(value).strip()
    if not SERVER_TYPE.fullmatch(name):
        raise refuse(f"{shown(value)} cannot be a machine type")
    return name


def _path(value: object) -> str:
    text = str(value).strip()
    if "\0" in text:
        raise refuse("has a NUL character inside")
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:  # "~somebody" who does not exist
        raise refuse(f"{shown(value)} begins with an unknown user's home") from error


def _path_list(value: object) -> str:
    return os.pathsep.join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def web_address(text: str) -> SplitResult:
    """Return the parts of an address that begins with http:// or https:// and names a host."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise refuse("is not an address") from error
    if parts.scheme not in ("http", "https") or not host:
        raise refuse("is not an address that begins with https:// and names a host")
    return parts


def check_base_url(value: object) -> str:
    """Return the API's address without a trailing slash, or raise what is wrong with it.

    A password in it and everything after its path is never repeated in the error.
    """
    text = str(value).strip().rstrip("/")
    parts = web_address(text)
    host = parts.hostname or ""
    if not re.fullmatch(r"[a-z0-9._:-]+", host) or any(c.isspace() or not c.isprintable() for c in str(value).strip()):
        raise refuse("has characters inside that no address has")
    if parts.scheme == "http" and not is_loopback(host):
        raise refuse(f"would send the token unencrypted to {foreign_text(host, 80)}", kind="insecure_url")
    if parts.username is not None or parts.password is not None:
        raise refuse("has a user name or password inside; the token is sent in a header")
    if "?" in text or "#" in text:
        raise refuse("has a ? or # inside; give the scheme and the host only")
    if parts.path.endswith(("/prod", "/prod/api")):
        raise refuse("ends with a path that is added by itself; give the scheme and the host only")
    return text


def _token(value: object) -> Secret:
    return value if isinstance(value, Secret) else Secret(str(value))


# --- kinds of values --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of value: how it is checked, and how people are told about it."""

    annotation: Any
    unit: str
    hint: str
    """How to write one that is accepted."""
    secret: bool = False
    place: bool = False
    """A path on this computer. Those come from the environment only: a credentials file that lies in a foreign folder
    must not say where we write."""


def number(least: int, most: int, unit: str) -> Kind:
    """Return the kind of whole numbers in a range."""
    return Kind(
        Annotated[int, BeforeValidator(whole_between(least, most))],
        unit,
        f"write a whole number from {least} to {most}",
    )


def text_of(
    unit: str,
    hint: str,
    check: Callable[[object], Any] = str,
    *,
    into: Any = str,
    secret: bool = False,
    place: bool = False,
) -> Kind:
    """Return a kind of text, which `check` may make `into` something else."""
    return Kind(Annotated[into, BeforeValidator(check)], unit, hint, secret, place)


DURATION: Final = Kind(Annotated[timedelta, BeforeValidator(_duration)], "duration", DURATION_HINT)
RETRIES: Final = number(0, 100, "count")
REQUESTS: Final = number(0, 10_000, "requests")
BYTES: Final = number(1, 10**15, "bytes")
PIXELS: Final = number(1, 10**12, "pixels")
PER_SECOND: Final = Kind(
    Annotated[float, BeforeValidator(_rate_per_second)], "requests per second", "write a number, for example 1 or 0.5"
)
USD_PER_HOUR: Final = Kind(
    Annotated[Decimal, BeforeValidator(_usd)], "USD per hour", "write an amount, for example 2.50"
)
SWITCH: Final = Kind(Annotated[bool, BeforeValidator(_switch)], "true or false", "write true or false")
PLAN: Final = text_of("plan", "write payg or pro", _plan)
LOG_LEVEL: Final = text_of("level", f"write one of {', '.join(LOG_LEVELS)}", _log_level)
SERVER_TYPE_NAME: Final = text_of("machine type", f"write one of {', '.join(KNOWN_SERVER_TYPES)}", server_type)
ADDRESS: Final = text_of("address", f"write {DEFAULT_API_BASE_URL}, or http:// with a loopback host", check_base_url)
ID: Final = text_of("id", "copy it whole from RunComfy's pages")
PATH: Final = text_of("path", "write a path", _path, place=True)
NAMED: Final = text_of("path", "name a file that exists", place=True)
PATHS: Final = text_of("paths", "write paths with : between them (on Windows ;)", _path_list, place=True)
USER: Final = Kind(Annotated[str, BeforeValidator(str)], "id", "copy it from the address of RunComfy's dashboard", True)
TOKEN: Final = Kind(Annotated[Secret, BeforeValidator(_token)], "token", "copy it from RunComfy's profile page", True)


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting."""

    name: str
    kind: Kind
    target: str
    """`section.field` of `Settings`; empty if the value is only used while the settings are loaded."""
    help: str
