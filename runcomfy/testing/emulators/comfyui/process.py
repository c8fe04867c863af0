"""One life of the emulated server: what is in memory between a start and the next kill.

Queue, history, node cache and client registry live here and vanish together; files belong to the emulator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runcomfy.testing.emulators.comfyui.execution import Execution, NodeCache, Stalls
from runcomfy.testing.emulators.comfyui.faults import FaultPlan
from runcomfy.testing.emulators.comfyui.nodes.base import Folders, NodeClass
from runcomfy.testing.emulators.comfyui.queue import Finished, PromptQueue, QueueItem
from runcomfy.testing.emulators.comfyui.sockets import SocketHub
from runcomfy.testing.emulators.comfyui.versions import Capabilities


@dataclass(frozen=True, slots=True)
class Options:
    """What the server was started with; most are command line options of the real one."""

    folders: Folders
    nodes: Mapping[str, NodeClass]
    capabilities: Capabilities
    now: Callable[[], float]
    max_upload_size: float
    """MB."""
    multi_user: bool = False
    cors: str | None = None
    enable_assets: bool = False
    cache: bool = True
    compress: bool = False
    save_metadata: bool = True
    speed: float = 1.0
    round_trip: float = 0.0
    """Seconds."""


@dataclass(slots=True)
class RunRecord:
    """What really happened to a prompt; for tests that ask the server's own conscience."""

    prompt_id: str
    client_id: Any
    boot: int
    number: float
    started: float
    """Wall stamp, seconds."""
    ended: float | None = None
    outcome: str = "lost"
    """success, error, interrupted; `lost` while it runs and for ever if the process dies."""
    nodes: list[str] = field(default_factory=list)
    """Nodes that were executed, cached ones not included."""
    cached: list[str] = field(default_factory=list)
    graph: dict[str, Any] = field(default_factory=dict)
    forgotten: bool = False
    """Whether it vanished: neither queue nor history knew it afterwards."""


@dataclass(slots=True)
class SubmitRecord:
    """A prompt that was accepted into the queue; for tests that ask when."""

    prompt_id: str
    at: float
    """Wall stamp, seconds."""
    boot: int
    graph: Mapping[str, Any]
    answered: bool = False
    """Whether the answer was sent as it should be; not if it was lost or spoilt, or the server died before."""


class ServerProcess:
    """State and tasks of one boot."""

    def __init__(
        self,
        options: Options,
        faults: FaultPlan,
        boot: int,
        run_log: list[RunRecord],
        submits: list[SubmitRecord],
    ) -> None:
        self.options = options
        self.faults = faults
        self.boot = boot
        self.run_log = run_log
        self.submits = submits
        self.nodes = options.nodes
        self.folders = options.folders
        self.capabilities = options.capabilities
        self.now = options.now
        self.speed = options.speed
        self.counter = 0
        """The next prompt's number."""
        self.interrupted = False
        self.client_id: Any = None
        """Owner of the running prompt, or of the last one."""
        self.last_node: str | None = None
        self.cache = NodeCache(enabled=options.cache)
        self.stalls = Stalls()
        self.crash: BaseException | None = None
        """What ended the publishing loop, and with it a real server."""
        self.worker_error: BaseException | None = None
        self.current: Execution | None = None
        self._run_task: asyncio.Task[Finished] | None = None
        self.over = asyncio.Event()
        """Set when this process ends; what waits for ever waits for this too."""
        self._awake = asyncio.Event()
        self._awake.set()
        self._worker_wanted = True
        self.queue = PromptQueue(self._queue_changed)
        self.hub = SocketHub(
            greeting=self.queue_info,
            current_node=self._current_node,
            features=self.features if self.capabilities.modern_progress else None,
            awake=self.awake,
            over=self.over,
            latency=options.round_trip / 2,
        )
        self._worker: asyncio.Task[None] | None = None
        self._publisher: asyncio.Task[None] | None = None

    def start(self, crashed: Callable[[], None]) -> None:
        """Start worker and publisher; `crashed` is called when the process would have ended by itself."""
        self._worker = asyncio.create_task(self._work(), name=f"comfyui worker {self.boot}")
        self._publisher = asyncio.create_task(self.hub.publish(), name=f"comfyui publisher {self.boot}")

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self.crash = task.exception()
                crashed()

        self._publisher.add_done_callback(ended)

    async def end(self) -> None:
        """Drop everything at once."""
        self._awake.set()
        for task in (self._worker, self._publisher):
            if task is None:
                continue
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    # Hanging

    @property
    def hanging(self) -> bool:
        """Whether the process is held, as by SIGSTOP."""
        return not self._awake.is_set()

    def hang(self) -> None:
        """Answer nothing, send nothing, run nothing, until `resume`."""
        self._awake.clear()

    def resume(self) -> None:
        """Go on where `hang` stopped."""
        self._awake.set()

    async def awake(self) -> None:
        """Wait while the process hangs."""
        if not self._awake.is_set():
            await self._awake.wait()

    # What clients see

    def stamp(self) -> int:
        """Milliseconds, as messages carry them."""
        return int(self.now() * 1000)

    def queue_info(self) -> dict[str, Any]:
        """`{"exec_info": …}`."""
        return {"exec_info": {"queue_remaining": self.queue.remaining}}

    def features(self) -> dict[str, Any]:
        """The server's feature flags."""
        can = self.capabilities
        size = self.options.max_upload_size * 1024 * 1024
        flags: dict[str, Any] = {"supports_preview_metadata": True}
        if can.jobs_count_3d:
            flags["supports_model_type_tags"] = True
        flags["max_upload_size"] = size
        if can.jobs:
            flags["extension"] = {"manager": {"supports_v4": True}}
        if can.jobs_count_3d:
            flags["node_replacements"] = True
            flags["assets"] = self.options.enable_assets
        return flags

    def _queue_changed(self) -> None:
        self.hub.send("status", {"status": self.queue_info()}, None)

    def _current_node(self, sid: str) -> str | None:
        return self.last_node if self.client_id == sid else None

    # The worker

    def kill_worker(self) -> None:
        """Let the worker die: at once if it is idle, else after its prompt. Everything else goes on."""
        self._worker_wanted = False
        if self.current is None and self._worker is not None:
            self._worker.cancel()

    def vanish(self, prompt_id: str) -> None:
        """Let a prompt disappear without a trace; what runs is cut off."""
        self.queue.history.pop(prompt_id, None)
        self.queue.delete_id(prompt_id)
        if self.current is not None and self.current.prompt_id == prompt_id and self._run_task is not None:
            self._run_task.cancel()

    def interrupt(self) -> None:
        """Raise the flag that the running prompt looks at now and then."""
        if not self.faults.ignore_interrupts:
            self.interrupted = True

    async def _work(self) -> None:
        while self._worker_wanted:
            try:
                taken = await self.queue.get()
            except TypeError as error:
                # Two prompts that cannot be ordered: the real worker thread dies of it, silently.
                self.worker_error = error
                return
            await self.awake()
            if taken is not None:
                await self._run(*taken)
            if self.queue.take_flags().get("free_memory"):
                self.cache.clear()

    async def _run(self, task: int, item: QueueItem) -> None:
        fault = self.faults.next_prompt()
        if fault.vanish == "start":
            self.queue.drop_running(task)
            return
        self.interrupted = False
        execution = Execution(self, item, fails=fault.fails)
        record = RunRecord(
            item[1],
            execution.client_id,
            self.boot,
            item[0],
            self.now(),
            graph=json.loads(json.dumps(item[2])),
        )
        self.run_log.append(record)
        self.client_id, self.last_node, self.current = execution.client_id, None, execution
        self._run_task = asyncio.create_task(execution.run(), name=f"prompt {item[1]}")
        try:
            await asyncio.wait((self._run_task,))
        finally:
            self._run_task.cancel()
            self.current, self.last_node = None, None
            record.nodes, record.cached = execution.executed, execution.cached
            record.ended = self.now()
        if self._run_task.cancelled():
            record.forgotten = True
            self.queue.drop_running(task)
            return
        finished = self._run_task.result()
        record.outcome = _outcome(finished)
        if fault.no_outputs:
            finished.outputs, finished.meta = {}, {}
        if self.faults.history_delay:
            await asyncio.sleep(self.faults.history_delay)
        await self.awake()
        if fault.vanish == "end":
            record.forgotten = True
            self.queue.drop_running(task)
            return
        self.queue.done(task, finished)
        if execution.client_id is not None:
            self.hub.send("executing", {"node": None, "prompt_id": item[1]}, execution.client_id)


def _outcome(finished: Finished) -> str:
    if finished.success:
        return "success"
    return "interrupted" if finished.messages[-1][0] == "execution_interrupted" else "error"
