"""
Executors of one queue as programs that can be stopped at any call: frozen and woken, or killed, in virtual time.

Each program has its own connection to the database and its own clients of the server. Whatever it does to the world
goes through a port behind its `Fate`: while that is closed no call leaves and no answer arrives. A frozen program goes
on where it stood when it is woken, however much time has passed. A killed one never does: nothing of it runs, not even
the cleanup that an exception would bring, until the story is over.

What the world thinks of it afterwards is asked of the oracles: the emulated server's run log, the files on the disk,
the rows of the database (`complaints`).
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Self

from PIL import Image

import workflows
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.results import DiskResults
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.application.executor import Executor
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.job_queue import JobQueue
from runcomfy.application.orchestrator import RunComfyOrchestrator
from runcomfy.application.placing import Placer
from runcomfy.application.station import GivenStation
from runcomfy.domain.exceptions import CredentialsMissing
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import LAST_WORDS, Attempt, EventKind, Outcome, QueuedJob, QueueStatus, WorkerId
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.settings import QueueSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.programs import EmulatedProcesses, Killed
from runcomfy.testing.workers import queue_settings_for

LOOK_EVERY: Final = 0.25
"""Seconds between two looks of a story at what it waits for."""
PUBLISHED: Final = "in store.finish"
"""The point between giving results their names and the commit that makes them count."""


class _CutOff(Exception):
    """Raised inside a transaction whose program dies there: the database forgets it."""


class Fate:
    """What becomes of one program. Every call of its ports passes two points: `before port.call`, `after port.call`."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        """Every point passed, in order."""
        self.dead = False
        self._awake = asyncio.Event()
        self._awake.set()
        self._over = False
        self._stops: dict[str, tuple[int, asyncio.Event]] = {}
        self._lost_answers: dict[str, list[Exception]] = {}

    def stop_at(self, point: str, *, time: int = 1) -> asyncio.Event:
        """Freeze at a point, when it is passed for the how-manieth time from now on; the event says that it was."""
        reached = asyncio.Event()
        self._stops[point] = time, reached
        return reached

    def stops_at(self, point: str) -> bool:
        """Whether the next passing of that point is where it stops."""
        return self._stops.get(point, (0, None))[0] == 1

    def lose_answer(self, call: str, error: Exception) -> None:
        """Let the next such call (`store.claim`) do what was asked for and its answer get lost: it raises `error`."""
        self._lost_answers.setdefault(call, []).append(error)

    def lost_answer(self, call: str) -> Exception | None:
        """Return what the call raises in place of its answer, if that is lost."""
        errors = self._lost_answers.get(call)
        return errors.pop(0) if errors else None

    def freeze(self) -> None:
        """Let no call leave and no answer arrive."""
        self._awake.clear()

    def wake(self) -> None:
        """Go on; not if it was killed."""
        if not self.dead:
            self._awake.set()

    def end(self) -> None:
        """The story is over: what still waits here ends without an effect."""
        self._over = True
        self._awake.set()

    def forget_stops(self) -> None:
        """Stop nowhere any more."""
        self._stops.clear()

    async def point(self, name: str) -> None:
        """Pass a point, unless it is where the program stops."""
        if not self._over and not self.dead:
            self.passed.append(name)
        count, reached = self._stops.get(name, (0, None))
        if reached is not None:
            self._stops[name] = count - 1, reached
            if count == 1:
                self.freeze()
                reached.set()
        await self._awake.wait()
        if self._over and self.dead:
            raise Killed


class Held:
    """A port of a program: its calls pass the fate's points. What the calls in `opens` return is held as well."""

    def __init__(self, port: Any, fate: Fate, name: str, *, opens: Iterable[str] = ()) -> None:
        self._port, self._fate, self._name, self._opens = port, fate, name, frozenset(opens)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not inspect.iscoroutinefunction(found):
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            point = f"{self._name}.{name}"
            await self._fate.point(f"before {point}")
            if kwargs.get("publish") is not None:
                kwargs["publish"] = self._cut_off_after(kwargs["publish"], f"in {point}")
            try:
                result = await found(*args, **kwargs)
                if (lost := self._fate.lost_answer(point)) is not None:
                    raise lost
            except _CutOff:
                await self._fate.point(f"in {point}")
                raise
            finally:
                await self._fate.point(f"after {point}")
            return Held(result, self._fate, self._name) if name in self._opens else result

        return call

    def _cut_off_after(self, publish: Callable[[], None], point: str) -> Callable[[], None]:
        def published() -> None:
            publish()
            if self._fate.stops_at(point):
                raise _CutOff

        return published


class Program:
    """One running executor: what it did, what it said, and its fate."""

    def __init__(
        self, executor: Executor, store: SqlJobs, fate: Fate, said: list[str], processes: EmulatedProcesses
    ) -> None:
        self.executor, self.store, self.fate = executor, store, fate
        self.said = said
        """Every sentence for the user, in order."""
        self.stop, self.leave = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._processes = processes

    @property
    def id(self) -> WorkerId:
        """What the rows call it."""
        return self.executor.worker

    def begin(self, *, once: bool = False) -> asyncio.Task[None]:
        """Work, in a task of its own."""
        self.task = asyncio.create_task(self.executor.run(self.stop, self.leave, once=once), name=f"program {self.id}")
        return self.task

    def freeze(self) -> None:
        """Be as a process that was sent SIGSTOP, or whose computer sleeps."""
        self.fate.freeze()

    def wake(self) -> None:
        """Go on where it stood."""
        self.fate.wake()

    async def kill(self, *, noticed: bool = True) -> None:
        """Die as by `kill -9`. `noticed`: the others share its computer, whose process table tells them."""
        self.fate.dead = True
        self.fate.freeze()
        if noticed:
            self._processes.dead.add(self.executor.owner.id)
        await self.store.close()  # the system closes what a process held open

    async def end(self, *, at_once: bool = False) -> None:
        """Stop in good order, as by one Ctrl+C or (`at_once`) by two, and wait for the end."""
        self.stop.set()
        if at_once:
            self.leave.set()
        task, self.task = self.task, None
        if task is not None:
            await task
        await self.store.close()


class QueuePrograms:
    """Starts programs that share one database and one server. `async with QueuePrograms(...) as programs:`."""

    def __init__(self, database: str, comfyui: ComfyUIEmulator, clock: Clock, folder: Path, **changes: Any) -> None:
        """`database`: a path or a DSN. `changes` are laid over the queue's settings."""
        self.comfyui, self.clock, self.folder = comfyui, clock, folder
        settings = load_settings(overrides={})
        self.settings: Settings = replace(settings, files=replace(settings.files, durable=False))
        self.queue_settings: QueueSettings = queue_settings_for(
            comfyui.url, folder, database=Secret(database), **changes
        )
        self.processes = EmulatedProcesses()
        self.programs: list[Program] = []
        self._stack = AsyncExitStack()
        self.store = self.open()
        """The connection of somebody who only looks on, and asks for things."""
        self.queue = JobQueue(self.store, self.queue_settings, processes=self.processes)

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self.store)
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            for program in self.programs:
                await self._over(program)
        finally:
            await self._stack.aclose()

    @staticmethod
    async def _over(program: Program) -> None:
        dead = program.fate.dead
        program.fate.end()
        program.stop.set()
        program.leave.set()
        if program.task is not None:
            if dead:
                program.task.cancel()
            with suppress(Killed, asyncio.CancelledError):
                await program.task

    def open(self, *, busy_timeout: timedelta = timedelta(seconds=30), durable: bool = False) -> SqlJobs:
        """Return a connection of its own, not opened yet."""
        return SqlJobs(
            store_from(
                self.queue_settings.database,
                clock=self.clock,
                durable=durable,
                busy_timeout=busy_timeout,
                wake_interval=timedelta(seconds=1),  # asked in virtual time, where a second is nothing
            )
        )

    async def start(
        self,
        *,
        works: bool = True,
        once: bool = False,
        heart: Callable[[SqlJobs, WorkerId], Pulse] | None = None,
        busy_timeout: timedelta = timedelta(seconds=30),
        results: Any = None,
        **changes: Any,
    ) -> Program:
        """Start a program; it ends with the story. `changes` are laid over the queue's settings."""
        store = await self._stack.enter_async_context(self.open(busy_timeout=busy_timeout))
        program = self._program(store, replace(self.queue_settings, **changes), heart, results)
        self.programs.append(program)
        if works:
            program.begin(once=once)
        return program

    def _program(
        self,
        disk: SqlJobs,
        settings: QueueSettings,
        heart: Callable[[SqlJobs, WorkerId], Pulse] | None,
        results: Any,
    ) -> Program:
        fate, said = Fate(), list[str]()
        store: Any = Held(disk, fate, "store")
        clients: dict[str, ComfyUI] = {}

        def comfyui(url: str) -> ComfyUI:
            if url not in clients:
                client = ComfyUIWorkflowClient(SecretUrl(url), self.settings.comfy, clock=self.clock)
                self._stack.push_async_callback(client.close)
                held: Any = Held(client, fate, "comfyui")
                clients[url] = held
            return clients[url]

        async def no_cloud() -> Any:
            raise CredentialsMissing("this program has no cloud")

        placer = Placer(lambda url: comfyui(url.reveal()), comfyui, no_cloud, tell=said.append, host="test-host")
        folders: Any = Held(
            results or DiskResults(self.settings.files), fate, "results", opens=("open_folder", "open_beside")
        )
        orchestrator = RunComfyOrchestrator(
            settings=self.settings,
            clock=self.clock,
            results=folders,
            placer=placer,
            load_workflow=WorkflowFiles(workflows.names, workflows.load),
            random_int=random.SystemRandom().randint,
        )
        owner = self.processes.me(now=self.clock.now())
        executor = Executor(
            store,
            settings,
            GivenStation(placer, settings.api_base_url),
            orchestrator,
            owner,
            clock=self.clock,
            processes=self.processes,
            heart=heart(disk, WorkerId(owner.id)) if heart is not None else None,
            tell=said.append,
        )
        return Program(executor, disk, fate, said, self.processes)

    # -- jobs ----------------------------------------------------------------------------------------------

    def request(self, number: int = 1, *, seconds: float = 1.0) -> JobRequest:
        """Return a request for a picture of its own that takes so long, at a path of its own."""
        return JobRequest(drawing(seconds, number), out_file=str(self.target(number)))

    def target(self, number: int = 1) -> Path:
        """Where the result of `request(number)` goes."""
        return Path(self.queue_settings.jobs_finished) / f"{number}.png"

    async def put(self, number: int = 1, *, seconds: float = 1.0, **given: Any) -> QueuedJob:
        """Put such a job in."""
        return await self.queue.enqueue(self.request(number, seconds=seconds), **given)

    async def when(self, condition: Callable[[], Any], what: str, *, within: float = 3_600) -> None:
        """Wait until the condition, which may be asynchronous, holds; fail with the words if it never does."""
        loop = asyncio.get_running_loop()
        until = loop.time() + within
        while True:
            found = condition()
            if not (await found if inspect.isawaitable(found) else found):
                if loop.time() >= until:
                    raise AssertionError(f"did not happen within {within} s: {what}")
                await asyncio.sleep(LOOK_EVERY)
                continue
            return

    async def began(self, count: int = 1) -> None:
        """Wait until the server has begun so many prompts."""
        await self.when(lambda: len(self.comfyui.run_log) >= count, f"prompt {count} begins")

    # -- oracles -------------------------------------------------------------------------------------------

    async def kinds(self, job: QueuedJob) -> list[EventKind]:
        """Return the events of a job, in order."""
        return [event.kind for event in (await self.queue.show(job)).events]

    async def runs(self, job: QueuedJob) -> list[str]:
        """Return how each execution of a job on the server ended, by the server's own log."""
        known = await self.prompts(job)
        return [record.outcome for record in self.comfyui.run_log if record.prompt_id in known]

    async def prompts(self, job: QueuedJob) -> set[str]:
        """Return every prompt id that was ever written down for a job."""
        events = (await self.queue.show(job)).events
        return {str(event.data["prompt_id"]) for event in events if event.data.get("prompt_id")}

    async def complaints(self) -> list[str]:
        """Return everything in which the rows, the files and the server's log contradict the promises (I10-I15)."""
        found: list[str] = []
        claimed: set[str] = set()
        for job in await self.queue.list():
            story = await self.queue.show(job)
            claimed |= {str(e.data["prompt_id"]) for e in story.events if e.data.get("prompt_id")}
            words = [event.kind for event in story.events if event.kind in LAST_WORDS]
            found += [f"{job.config_name}: {what}" for what in contradictions(job, story.attempts, words)]
        log = Counter(record.prompt_id for record in self.comfyui.run_log)
        found += [f"prompt {prompt} ran {count} times" for prompt, count in log.items() if count > 1]
        found += [f"prompt {prompt} is no job's" for prompt in log.keys() - claimed]
        return found

    def litter(self) -> list[str]:
        """Return what lies among the results and is none: partial files, folders of work."""
        folder = Path(self.queue_settings.jobs_finished)
        return sorted(path.name for path in folder.rglob("*") if path.name.startswith("."))


def drawing(seconds: float, number: int) -> dict[str, Any]:
    """Return a graph that takes so long and whose picture depends on the number."""
    steps = max(1, min(20, round(seconds)), round(seconds / 30))
    inputs = {"steps": steps, "seconds_per_step": seconds / steps, "preview": False, "seed": number}
    return {
        "1": {"class_type": "ProbeSteps", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"job-{number}"}},
    }


def failing() -> dict[str, Any]:
    """Return a graph whose run fails."""
    return {
        "1": {"class_type": "ProbeFail", "inputs": {"message": "it burst", "kind": "RuntimeError", "after_steps": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "never"}},
    }


def contradictions(job: QueuedJob, attempts: Sequence[Attempt], words: Sequence[EventKind]) -> Iterable[str]:
    """Yield where a job's row, its attempts, its log and its files contradict each other, or it has not ended."""
    done = [attempt for attempt in attempts if attempt.outcome is Outcome.DONE]
    if not job.ended:
        yield f"is {job.status}"
        return
    if any(attempt.outcome is None for attempt in attempts):
        yield "has an attempt that nobody ended"
    if (job.status is QueueStatus.DONE) != (bool(words) and words[-1] is EventKind.DONE):
        yield f"is {job.status}, and its log says {words}"
    if job.status is not QueueStatus.DONE:
        if not job.reason:
            yield "failed without a reason"
        return
    if len(done) != words.count(EventKind.DONE) or not done:
        yield f"was committed {len(done)} times and told {words.count(EventKind.DONE)} times"
    outputs = job.result.get("outputs", ())
    if not outputs:
        yield "is done without a result"
    for output in outputs:
        yield from _of_file(Path(output["path"]), output)


def _of_file(path: Path, output: dict[str, Any]) -> Iterable[str]:
    try:
        data = path.read_bytes()
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError) as error:
        yield f"its result cannot be read: {error}"
        return
    if len(data) != output["size_bytes"] or hashlib.sha256(data).hexdigest() != output["sha256"]:
        yield f"{path.name} is not the file that was recorded"
