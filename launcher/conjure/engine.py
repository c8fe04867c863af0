"""
What runs the generations: an event loop of its own in a thread, or the loop of `comfyctl serve`.

A service's synchronous calls come from any thread, with or without a running event loop. The work itself always runs
on the engine's loop, so a call neither needs nor touches the caller's; it blocks the thread it is made from, as every
synchronous call does. Code with a loop of its own that must go on answering uses the `a_…` twins, or calls from a
thread of its own (`asyncio.to_thread`).

    DirectEngine    an `App` of its own: jobs run here and now, on the dev server, a machine of their own, or the
                    user's own ComfyUI
    QueueEngine     the service's queue (`launcher.conjure.queued`): jobs outlive their callers and this process

The same work, asked for again while it runs, is joined and not done twice.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 - its exit function must be registered before ours
import logging
import os
import random
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Hashable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

from launcher.conjure.errors import CalledFromEngine
from launcher.conjure.runs import own_app
from runcomfy.adapters.credentials import find_credentials
from runcomfy.application.job_queue import workflow_id_of
from runcomfy.application.journal import NoJournal
from runcomfy.bootstrap import App
from runcomfy.conjure.progress_tracker import STAGED, progress_tracker
from runcomfy.domain.exceptions import Interrupted, LocalError, RunComfyError, foreign_text
from runcomfy.domain.job import JobId, JobRequest, JobResult, JobStatus, Output

log = logging.getLogger("launcher.generation")

T = TypeVar("T")
LOCAL: Final = "local"
"""The user's own ComfyUI."""
CLOUD: Final = "cloud"
"""The dev server, or a machine that is rented."""


@dataclass(frozen=True, slots=True)
class Order:
    """One run of a workflow, and where."""

    request: JobRequest
    where: str
    follow: Mapping[str, Any] = field(default_factory=dict)
    """What is to be done with the results, as plain JSON: it must be known after a crash, too."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a run brought; `outputs` by the names the workflow's sidecar gives them."""

    job_id: str
    prompt_id: str
    outputs: Mapping[str, Output]
    seeds: Mapping[str, int]
    cost_usd: Decimal
    warning: str = ""
    """What is not as it should be although the results are whole: a machine that was not seen gone."""


@dataclass(slots=True, eq=False)
class Shared:
    """Work that one or more callers wait for."""

    callers: int = 0
    job_id: str = ""
    """Of the job that does it, once there is one."""
    task: asyncio.Task[Any] | None = None
    within: list[Shared] = field(default_factory=list)
    """Shared work that waits for this one: its job is theirs, too."""

    def name(self, job_id: str) -> None:
        """Name the job that does it."""
        self.job_id = job_id
        for each in self.within:
            each.name(job_id)


_OWNED: Final[weakref.WeakSet[DirectEngine]] = weakref.WeakSet()
"""Every engine of this process that has a thread of its own."""
_LOOK_UP_SECONDS: Final = 0.5
"""How often a waiting thread looks up: on Windows, Ctrl+C is not heard in the middle of a wait."""

WATCHED: ContextVar[list[Shared] | None] = ContextVar("watched", default=None)
"""A list that gets the work which a caller waits for, so that its job can be named before it has ended."""
_WORKING: ContextVar[Shared | None] = ContextVar("working", default=None)


class Engine(ABC):
    """Runs orders on its own event loop."""

    outlives_callers: bool = False
    """Whether work goes on when everybody who waited for it has left."""

    def __init__(self) -> None:
        self._shared: dict[Hashable, Shared] = {}
        self.publishing = asyncio.Lock()
        """Held while results get their fixed places, so that picture and mesh there are of one run."""

    @property
    @abstractmethod
    def app(self) -> App:
        """The product, as this process has it."""

    @property
    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where the work runs."""

    @abstractmethod
    async def run(self, order: Order) -> Made:
        """Run a workflow and return its verified files. Raises RunComfyError. On the engine's loop."""

    async def settled(self, job_id: str) -> None:
        """Hear that everything that follows from a job was done."""
        del job_id  # nothing was written down of it

    @property
    def folder(self) -> Path:
        """Where services keep what they know, beside the product's own state."""
        return Path(self.app.settings.files.state_dir) / "conjure"

    def wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work on the engine's loop and wait for it in this thread. Ctrl+C ends it in good order first.

        Raises CalledFromEngine (this thread is the one that would have to do it), Interrupted (the engine was closed).
        """
        loop = self.loop
        if _running_loop() is loop:
            raise CalledFromEngine(
                "a synchronous generation was called on the event loop that would have to do the work",
                hint="await the a_… twin of the method, or call it with asyncio.to_thread",
            )
        task: list[asyncio.Task[T]] = []

        async def named() -> T:
            task.append(asyncio.ensure_future(work()))
            return await task[0]

        future = asyncio.run_coroutine_threadsafe(named(), loop)
        try:
            while True:
                try:
                    return future.result(timeout=_LOOK_UP_SECONDS)
                except TimeoutError:
                    if future.done():
                        return future.result()  # it may be the work's own
        except CancelledError as error:
            raise Interrupted("the generation was ended", hint="run it again when you like") from error
        except KeyboardInterrupt:
            _end(future, loop, task)
            raise

    async def here(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work on the engine's loop from a coroutine of any loop; that one goes on meanwhile."""
        if _running_loop() is self.loop:
            return await work()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self.loop))

    async def once(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work, or join the same work that runs already.

        Whoever comes while it runs joins it: nothing is awaited before. Callers that leave are not missed as long as
        one waits; when none does, the work ends, unless this engine's work outlives its callers.
        """
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = Shared()
            shared.task = asyncio.create_task(self._begun(shared, work), name="generation")
            shared.task.add_done_callback(lambda _: self._forget(key, shared))
        watched = WATCHED.get()
        if watched is not None:
            watched.append(shared)
        if (around := _WORKING.get()) is not None and around is not shared:
            shared.within.append(around)
            around.name(shared.job_id)
        task: asyncio.Task[T] = shared.task  # type: ignore[assignment]
        shared.callers += 1
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if shared.callers == 1 and not task.done() and not self.outlives_callers:
                if self._shared.get(key) is shared:
                    del self._shared[key]  # who comes now begins anew: this one ends
                task.cancel()
                await asyncio.wait({task})
            raise
        finally:
            shared.callers -= 1

    @staticmethod
    async def _begun(shared: Shared, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        _WORKING.set(shared)
        return await work()

    @staticmethod
    def accepted(job_id: str) -> None:
        """Name the job of the work that runs now."""
        shared = _WORKING.get()
        if shared is not None:
            shared.name(job_id)

    def _forget(self, key: Hashable, shared: Shared) -> None:
        if self._shared.get(key) is shared:
            del self._shared[key]
        if shared.task is not None and not shared.task.cancelled():
            shared.task.exception()  # whoever waited has it; when nobody did, the job's own record has

    async def end_work(self) -> None:
        """End what runs, in good order."""
        tasks = [shared.task for shared in self._shared.values() if shared.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


class DirectEngine(Engine):
    """Runs jobs in this process. Without an app it has one of its own, with a thread and a loop, until `close`."""

    def __init__(self, app: App | None = None, *, overrides: Mapping[str, Any] | None = None) -> None:
        """`app` given: the work runs on the loop that runs now, and the app stays the caller's."""
        super().__init__()
        self._overrides = dict(overrides or {})
        self._opening = threading.Lock()
        self._thread: threading.Thread | None = None
        self._app = app
        self._owned = app is None
        self._loop = asyncio.get_running_loop() if app is not None else None
        self._parents: tuple[Any, ...] = ()
        self.closed = False
        if self._owned:
            _OWNED.add(self)

    def begin_anew(self) -> None:
        """Be as new in a process that was forked: the loop's thread, and all that is open, is the parent's there."""
        self._parents = (self._app, self._loop, self._thread, self._shared)  # not let go of: they are not ours to end
        self._app = self._loop = self._thread = None
        self._shared, self.publishing, self._opening = {}, asyncio.Lock(), threading.Lock()

    @property
    def app(self) -> App:
        """The product; settings are read when it is first asked for. Raises ConfigurationError."""
        with self._opening:
            if self._app is None:
                self._app = own_app(self._overrides)
            return self._app

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, and its thread, begun when it is first asked for. Raises Interrupted (the engine was closed)."""
        with self._opening:
            if self.closed:
                raise Interrupted("the generation engine was closed", hint="make a new service object")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="generation", daemon=True)
                self._thread.start()
                _at_exit(self)
            return self._loop

    async def run(self, order: Order) -> Made:
        """Run the job here, at the place that the order names."""
        return await run_directly(self.app, order, self.accepted)

    def close(self) -> None:
        """End what runs, with every machine that was rented for it, and the thread. Harmless when repeated."""
        if self.closed or not self._owned:
            return
        self.closed = True
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _close(self) -> None:
        await self.end_work()
        if self._app is not None:
            await self._app.close()


async def run_directly(app: App, order: Order, accepted: Callable[[str], None]) -> Made:
    """Run a job of an app without its queue. Raises the job's error."""
    job_id = JobId(str(uuid4()))
    request = replace(order.request, job_id=job_id)
    if order.where == LOCAL:
        request = replace(request, server_url=app.queue_settings.api_base_url)
    accepted(job_id)
    name = workflow_id_of(request)
    journal = NoJournal(random.SystemRandom().randint, asyncio.to_thread)
    prompt_id = str(journal.prompt_id)
    progress_tracker.start_workflow_tracking(name, prompt_id, "", staged=name in STAGED)
    progress_tracker.name_also(prompt_id, job_id)
    try:
        result: JobResult = await app.live.observing(app.orchestrator()).run(
            request,
            on_progress=lambda progress: progress_tracker.observe(prompt_id, progress, workflow_name=name),
            journal=journal,
        )
        if result.exception is not None and result.status is not JobStatus.DONE:
            raise result.exception
    except BaseException as error:
        words = error.message if isinstance(error, RunComfyError) else type(error).__name__
        progress_tracker.handle_workflow_completion(prompt_id, success=False, error_message=words)
        raise
    progress_tracker.name_also(prompt_id, str(result.prompt_id or ""))  # the server may have given another one
    progress_tracker.handle_workflow_completion(prompt_id)
    warning = result.exception
    if isinstance(warning, RunComfyError):
        log.error("generation_ended_with_warning", extra={"fields": {"job": job_id, "error": warning.code}})
    return Made(
        job_id=str(result.job_id),
        prompt_id=str(result.prompt_id or ""),
        outputs={output.name: output for output in result.outputs},
        seeds=dict(result.seeds),
        cost_usd=result.cost_usd,
        warning="" if warning is None else foreign_text(warning, 600),
    )


# -- one engine for all services of a process ----------------------------------------------------------------

_ENGINES: dict[tuple[Any, ...], DirectEngine] = {}
_ENGINES_LOCK = threading.Lock()


def shared_engine() -> DirectEngine:
    """Return the engine of this process for the settings as they are now.

    CONJURE makes a service object for every request; they share connections, books and a thread.
    """
    relevant = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_PREFIXES)))
    try:
        here = Path.cwd()
    except OSError as error:
        raise LocalError("the working directory no longer exists", hint="change into a folder that does") from error
    key = (os.getpid(), str(here), relevant, _credentials(here))
    with _ENGINES_LOCK:
        engine = _ENGINES.get(key)
        if engine is None or engine.closed:
            engine = _ENGINES[key] = DirectEngine()
        return engine


_PREFIXES: Final = ("RUNCOMFY_", "COMFYUI_", "CONJURE_", "XDG_")


def _credentials(here: Path) -> tuple[Any, ...]:
    """Return what changes when the credentials file does: it may be written while this process runs."""
    try:
        path = find_credentials(os.environ, here).path
        found = path.stat() if path is not None else None
    except (RunComfyError, OSError) as error:
        return (type(error).__name__,)
    return () if found is None else (str(path), found.st_mtime_ns, found.st_size, found.st_ino)


def _forked() -> None:
    """In a process that was forked: another thread of the parent may have held the lock, and will never let go."""
    global _ENGINES_LOCK  # noqa: PLW0603
    _ENGINES_LOCK = threading.Lock()
    _ENGINES.clear()
    for engine in tuple(_OWNED):
        engine.begin_anew()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forked)


def close_engines() -> None:
    """Close every shared engine; what runs is ended in good order."""
    with _ENGINES_LOCK:
        engines = list(_ENGINES.values())
        _ENGINES.clear()
    for engine in engines:
        engine.close()


def _at_exit(engine: DirectEngine) -> None:
    # Ending a machine takes worker threads, which the interpreter no longer gives once it runs the usual exit
    # functions: those registered with `threading` come before, the last one first. The executors' own was registered
    # when their module was imported above.
    register = getattr(threading, "_register_atexit", atexit.register)

    def leave() -> None:
        with suppress(RunComfyError):
            engine.close()

    register(leave)


def _end(future: Future[Any], loop: asyncio.AbstractEventLoop, task: list[asyncio.Task[Any]]) -> None:
    """Cancel work and wait until it has ended: what was rented is gone then."""

    async def ended() -> None:
        for each in task:
            each.cancel()
        if task:
            await asyncio.wait(task)

    asyncio.run_coroutine_threadsafe(ended(), loop).result()
    future.cancel()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


__all__ = [
    "CLOUD",
    "LOCAL",
    "WATCHED",
    "DirectEngine",
    "Engine",
    "Made",
    "Order",
    "Shared",
    "close_engines",
    "run_directly",
    "shared_engine",
]
