"""
Named places at which a test can let this process die, stop, fail or stand still, to prove that recovery needs nobody's
help.

`FAULT=launch.intended:1:kill` in the environment kills the process, as `kill -9` does, when it reaches the point
`launch.intended` for the first time; several are separated by commas. Unset, as always outside tests, a point costs one
look at an empty table. Values that are not of this form are somebody else's and ignored.

There are two kinds of points. Some stand by hand in the application, at steps of a story: `launch.intended`. All others
stand where a port is entered: whatever has an effect outside this process is called through a port, the wiring hands
every port to the application through `entered`, and what that returns passes `provider.launch_machine.before` and
`provider.launch_machine.after` round the call. So there is no remote call and no durable write without a point. While
nobody asks for points, `entered` returns the port itself.

`FAULT_LOG=file` has the name of every point that is reached appended to that file.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

from runcomfy.domain.exceptions import RunComfyError

P = TypeVar("P")

ACTIONS: Final = ("kill", "stop", "raise", "sleep")
"""`kill`: end at once, no cleanup. `stop`: freeze, as a suspended computer does (not on Windows). `raise`: a defect.
`sleep`: block the thread (the event loop, if the point is in it) for 30 s; `sleep=2.5` for so many seconds."""
SLEEP_SECONDS: Final = 30.0
_SLEEP: Final = re.compile(r"sleep=\d{1,6}(\.\d{1,6})?\Z")

UNVISITED: Final = frozenset({"now", "partial", "sibling"})
"""Methods of ports that touch nothing outside this process."""
OPENS: Final = {"open_folder": "folder", "open_beside": "folder", "renewer": "renewer"}
"""Methods of ports that return another port, and what its points are called."""


def plan_of(text: str) -> dict[str, tuple[int, str]]:
    """Return what happens at which point, at the how-manieth visit, from the variable's value."""
    plan: dict[str, tuple[int, str]] = {}
    for item in text.split(","):
        name, _, rest = item.strip().partition(":")
        count, _, action = rest.partition(":")
        known = action in ACTIONS or _SLEEP.match(action)
        if name and count.isdecimal() and int(count) > 0 and known:
            plan[name] = int(count), action
    return plan


_plan: Final[dict[str, tuple[int, str]]] = {}
_listeners: Final[list[Callable[[str], None]]] = []

_inside: Final[ContextVar[tuple[str, ...]]] = ContextVar("inside", default=())


def faultpoint(name: str) -> None:
    """Do what the environment asks for at this point: nothing, unless a test does."""
    if _plan and name in _plan:
        _visit(name)
    for listener in tuple(_listeners):
        listener(name)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` of every point that this process reaches, for the block: it may raise what ends the story.

    Of ports only those tell that were entered within the block.
    """
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
    if action.startswith("sleep"):
        time.sleep(float(action.partition("=")[2] or SLEEP_SECONDS))
        return
    # Where there is no SIGKILL, SIGTERM ends a process just as suddenly (Windows: TerminateProcess).
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


# -- ports -----------------------------------------------------------------------------------------------------


def entered(port: P, name: str) -> P:
    """Return the port as the application shall use it: itself, or one whose every call passes two points.

    `name` begins the points' names: `store`. What a port's methods open (a job's folder) is entered with it. A function
    may be given in place of a port.
    """
    if not (_plan or _listeners):
        return port
    return cast("P", Entered(port, name))


def inside() -> tuple[str, ...]:
    """Return the calls of entered ports that are under way here, the outermost first: `("jobs.finish",)`."""
    return _inside.get()


@contextmanager
def _passing(name: str) -> Generator[None]:
    """Pass the points before and after something, also if it fails."""
    faultpoint(f"{name}.before")
    token = _inside.set((*_inside.get(), name))
    try:
        yield
    finally:
        _inside.reset(token)
        faultpoint(f"{name}.after")


class Entered:
    """A port whose calls pass points. It is taken for the port itself, also by `isinstance`."""

    __slots__ = ("_entered_name", "_entered_port")

    _entered_port: Any
    _entered_name: str

    def __init__(self, port: Any, name: str) -> None:
        object.__setattr__(self, "_entered_port", port)
        object.__setattr__(self, "_entered_name", name)

    @property  # type: ignore[misc] # a proxy says that it is what it stands for
    def __class__(self) -> Any:
        return type(self._entered_port)

    def __repr__(self) -> str:
        return repr(self._entered_port)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._entered_port, name)
        if name.startswith("_") or name in UNVISITED or not callable(found) or inspect.isclass(found):
            return found
        return _visited(found, f"{self._entered_name}.{name}", opens=OPENS.get(name))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._entered_port, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function, or the port that is called itself."""
        return _visited(self._entered_port, self._entered_name, opens=None)(*args, **kwargs)

    async def __aenter__(self) -> Any:
        with _passing(f"{self._entered_name}.open"):
            await self._entered_port.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> Any:
        with _passing(f"{self._entered_name}.close"):
            return await self._entered_port.__aexit__(*error)


class _Block:
    """What a port's method returns to be entered by `async with`: the points lie round its beginning."""

    def __init__(self, block: Any, name: str) -> None:
        self._block, self._name = block, name

    async def __aenter__(self) -> Any:
        with _passing(self._name):
            return await self._block.__aenter__()

    async def __aexit__(self, *error: Any) -> Any:
        return await self._block.__aexit__(*error)


def _visited(found: Callable[..., Any], name: str, *, opens: str | None) -> Callable[..., Any]:
    """Return a call of a port with the points round it."""

    def told(kwargs: dict[str, Any]) -> dict[str, Any]:
        # What the port calls back in the middle of it, inside its transaction.
        if callable(publish := kwargs.get("publish")):
            kwargs = {**kwargs, "publish": _visited(publish, f"{name}.publish", opens=None)}
        return kwargs

    def opened(result: Any) -> Any:
        return Entered(result, opens) if opens is not None else result

    if inspect.iscoroutinefunction(found):

        async def call(*args: Any, **kwargs: Any) -> Any:
            with _passing(name):
                return opened(await found(*args, **told(kwargs)))

        return call

    def call_now(*args: Any, **kwargs: Any) -> Any:
        if inspect.isasyncgenfunction(inspect.unwrap(found)):
            return _Block(found(*args, **kwargs), name)
        with _passing(name):
            return opened(found(*args, **told(kwargs)))

    return call_now


def _log_to(path: str) -> Callable[[str], None]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o600)

    def note(name: str) -> None:
        os.write(file, f"{name}\n".encode())

    return note


def obey(environment: Mapping[str, str]) -> None:
    """Do from now on what `FAULT` and `FAULT_LOG` say, as at the start of a process; for one that was forked."""
    _plan.clear()
    _plan.update(plan_of(environment.get("FAULT", "")))
    if path := environment.get("FAULT_LOG"):
        _listeners.append(_log_to(path))


obey(os.environ)
