"""What a target is, what it has to find out, and how one input is run within its limits."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from runcomfy.domain.exceptions import RunComfyError

TOKEN: Final = "canary-0f1e2d3c4b5a69788796a5b4c3d2e1f0"
"""Our secret in every target that has one; no text of ours may hold it."""
USER_ID: Final = "user-canary-5d41402abc4b2a76b971"
MACHINE: Final = "http://secret-label-77aa55-comfyui.runcomfy.test:8188"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SECRETS: Final = re.compile(f"{TOKEN}|{USER_ID}|secret-label")
SECONDS: Final = 2
"""Processor time that one input may take."""

Seeds = Iterable[tuple[str, bytes]]
"""(name, input)."""


for _name in ("runcomfy", "launcher", "python_multipart"):
    logging.getLogger(_name).addHandler(logging.NullHandler())  # a million inputs would fill the terminal


class Broken(AssertionError):
    """A reader did what it must not; the text says what."""


class Hang(BaseException):
    """An input took longer than allowed. No `except Exception` of the product may swallow it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One reader.

    Attributes:
        name: also the corpus's folder.
        run: takes one input; returns when all is well, raises whatever is not.
        seeds: what the corpus grows from, made anew from what the repository has.
        share: of a million runs, how many are this target's; by what a run costs and what it may find.
        max_bytes: inputs are not grown longer.
        words: dictionary entries of this target alone.
        is_json: whether mutating JSON values makes sense beside mutating bytes.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], Seeds]
    share: int
    max_bytes: int = 4096
    words: tuple[str, ...] = ()
    is_json: bool = True


def demand(truth: object, what: str) -> None:
    """Raise Broken unless it is so."""
    if not truth:
        raise Broken(what)


def plain(text: object, what: str, *, limit: int = 4096) -> None:
    """Demand a text that can be shown: no control characters, bounded, without our secrets."""
    if not isinstance(text, str):
        raise Broken(f"{what} is no text: {type(text).__name__}")
    if len(text) > limit:
        raise Broken(f"{what} has {len(text)} characters")
    if _CONTROL.search(text):
        raise Broken(f"{what} has control characters: {text!r}")
    without_secrets(text, what)


def without_secrets(text: str, what: str) -> None:
    """Demand that none of our secrets is in a text."""
    if _SECRETS.search(text):
        raise Broken(f"{what} tells a secret: {text[:200]!r}")


def refused(error: RunComfyError) -> None:
    """Look at an error of our tree: it can be shown, and tells no secret, not even in its details."""
    plain(error.message, f"the message of {error.code}")
    plain(error.hint, f"the hint of {error.code}")
    without_secrets(repr(error.details), f"the details of {error.code}")


@contextmanager
def only_ours(*others: type[Exception]) -> Iterator[None]:
    """Let errors of our tree pass, judged, and those that are documented for this reader."""
    try:
        yield
    except RunComfyError as error:
        refused(error)
    except others:
        return


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} s of processor time")


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Hang inside the block once it has taken so much processor time (where the system has such a clock)."""
    setitimer: Any = getattr(signal, "setitimer", None)
    if setitimer is None:
        yield
        return
    before = signal.signal(signal.SIGPROF, _too_long)
    setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
