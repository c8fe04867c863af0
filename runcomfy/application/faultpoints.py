"""
Named places at which a test can let this process die, stop or fail, to prove that recovery needs nobody's help.

`FAULT=launch.sent:1:kill` in the environment kills the process, as `kill -9` does, when it reaches the point
`launch.sent` for the first time; several are separated by commas. Unset, as always outside tests, a point costs one
look at an empty table. Values that are not of this form are somebody else's and ignored.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from runcomfy.domain.exceptions import RunComfyError

ACTIONS: Final = ("kill", "stop", "raise")
"""`kill`: end at once, no cleanup. `stop`: freeze, as a suspended computer does (not on Windows). `raise`: a defect."""


def plan_of(text: str) -> dict[str, tuple[int, str]]:
    """Return what happens at which point, at the how-manieth visit, from the variable's value."""
    plan: dict[str, tuple[int, str]] = {}
    for item in text.split(","):
        name, _, rest = item.strip().partition(":")
        count, _, action = rest.partition(":")
        if name and count.isdecimal() and int(count) > 0 and action in ACTIONS:
            plan[name] = int(count), action
    return plan


_plan: Final = plan_of(os.environ.get("FAULT", ""))


_listeners: Final[list[Callable[[str], None]]] = []


def faultpoint(name: str) -> None:
    """Do what the environment asks for at this point: nothing, unless a test does."""
    if _plan and name in _plan:
        _visit(name)
    for listener in _listeners:
        listener(name)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` of every point that this process reaches, for the block: it may raise what ends the story."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _visit(name: str) -> None:
    left, action = _plan[name]
    _plan[name] = left - 1, action
    if left != 1:
        return
    if action == "raise":
        raise RunComfyError(f"fault point {name}", hint="FAULT is set in the environment; tests do that")
    if action == "stop" and hasattr(signal, "SIGSTOP"):
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    # Where there is no SIGKILL, SIGTERM ends a process just as suddenly (Windows: TerminateProcess).
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
