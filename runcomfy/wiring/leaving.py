"""
What a program does with calls that are under way when it ends.

Programs make their calls in threads and event loops of their own. When the main thread ends, Python lets daemon
threads stand still where they are, and takes the worker threads away that every call needs to end what it has rented:
also from threads that it waits for. So before that happens, calls in daemon threads are cancelled and waited for until
what they rented is gone, and other threads are let run to their end, as Python itself would have it.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 - its exit function must be registered before ours
import os
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from runcomfy.domain.exceptions import Interrupted

T = TypeVar("T")

_LOOK_UP_SECONDS: Final = 0.5
"""How often a waiting thread looks up: on Windows, Ctrl+C is not heard in the middle of a wait."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    loop: asyncio.AbstractEventLoop
    task: asyncio.Task[Any]
    thread: threading.Thread
    """Which waits for the call: the one it runs in, or the one that has handed it to the loop of another."""
    pid: int


_CALLS: Final[set[_Call]] = set()
_CHANGED: Final = threading.Condition()
_leaving = threading.Event()
_ASKED_BY: ContextVar[threading.Thread | None] = ContextVar("asked_by", default=None)


async def asked_by(thread: threading.Thread, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a thread that waits for it while it runs in the loop of another one."""
    _ASKED_BY.set(thread)
    return await work


@contextmanager
def under_way() -> Iterator[None]:
    """Say that the task that runs now must not be left behind in this block. Raises Interrupted: the program ends."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - coroutines are run by tasks
    call = _Call(task.get_loop(), task, _ASKED_BY.get() or threading.current_thread(), os.getpid())
    if _leaving.is_set() and call.thread.daemon:
        raise Interrupted("the program is ending", hint="nothing was begun")
    with _CHANGED:
        _CALLS.add(call)
    try:
        yield
    finally:
        _forget(call)


def _forget(call: _Call) -> None:
    with _CHANGED:
        _CALLS.discard(call)
        _CHANGED.notify_all()


def _calls() -> list[_Call]:
    with _CHANGED:
        return [call for call in _CALLS if call.pid == os.getpid()]  # a forked process has none of its parent's


def leave() -> None:
    """Wait for what is under way; Ctrl+C cancels what this would wait for, and a second one leaves it behind."""
    _leaving.set()
    told: set[_Call] = set()
    waited_for: set[threading.Thread] = set()
    patient = True
    while True:
        try:
            for call in _calls():
                if patient and _python_waits_for(call.thread):
                    waited_for.add(call.thread)
                elif call.loop.is_closed() or not call.loop.is_running():
                    _run_out(call, told)
                elif call not in told:
                    told.add(call)
                    with suppress(RuntimeError):  # it was closed just now
                        call.loop.call_soon_threadsafe(call.task.cancel)
            if not _calls() and not (patient and any(thread.is_alive() for thread in waited_for)):
                return
            with _CHANGED:
                _CHANGED.wait(_LOOK_UP_SECONDS)
        except KeyboardInterrupt:
            if not patient:
                raise
            patient = False


def _python_waits_for(thread: threading.Thread) -> bool:
    return thread.is_alive() and not thread.daemon and thread is not threading.current_thread()


def _run_out(call: _Call, told: set[_Call]) -> None:
    """Cancel a call whose loop stands still, and run that until it has ended. After KeyboardInterrupt it can go on."""
    if not call.loop.is_closed():
        if call not in told:
            told.add(call)
            call.task.cancel()
        with suppress(Exception, asyncio.CancelledError):  # what came of it, or the loop begins to run just now
            call.loop.run_until_complete(call.task)
        if call.loop.is_running():
            return  # it is somebody else's again, and looked at as that
    _forget(call)


with suppress(RuntimeError):  # the program is ending already
    # Functions registered with `threading` come before the usual ones, the last one first. The executors' own was
    # registered when their module was imported above.
    getattr(threading, "_register_atexit", atexit.register)(leave)
