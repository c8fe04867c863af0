"""Runs one prompt: cache, order, lists, blockers, expansion, failures, and every message on the way."""

from __future__ import annotations

import asyncio
import copy
import math
import traceback
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from runcomfy.testing.emulators.comfyui.graph import Agenda, RunningGraph
from runcomfy.testing.emulators.comfyui.nodes.base import (
    ExecutionBlocker,
    Graph,
    Link,
    NodeClass,
    NodeContext,
    NodeInterrupted,
    NodeResult,
)
from runcomfy.testing.emulators.comfyui.progress import PromptProgress, encode_preview
from runcomfy.testing.emulators.comfyui.queue import Finished, QueueItem
from runcomfy.testing.emulators.comfyui.validation import input_specs, is_link

if TYPE_CHECKING:
    from runcomfy.testing.emulators.comfyui.process import ServerProcess

Values = list[list[Any]]
"""For each output slot the list of its values; one value unless a list output is about."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What a node delivered, kept for the next prompt with the same key."""

    outputs: Values
    ui: dict[str, Any] | None


class NodeFailure(Exception):
    """A node raised; carries what the messages need."""

    def __init__(self, node_id: str, error: Exception, inputs: dict[str, Any]) -> None:
        super().__init__(node_id, error)
        self.node_id = node_id
        self.error = error
        self.inputs = inputs


def type_name(error: BaseException) -> str:
    """`ValueError`, `torch.OutOfMemoryError`."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def shown(value: Any) -> Any:
    """A value in `current_inputs`: plain ones as they are, anything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


class Execution:
    """One run of one prompt. Also the host of its nodes' contexts."""

    def __init__(self, process: ServerProcess, item: QueueItem, *, fails: str | None = None) -> None:
        """`fails`: how its first node does (`PromptFault.fails`)."""
        self._process = process
        self._fails = fails
        self._number, self.prompt_id, graph, self._extra, self._outputs, _ = item
        self.client_id = self._extra.get("client_id")
        self._graph = RunningGraph(copy.deepcopy(graph), process.nodes, process.folders)
        self._progress = PromptProgress(self.prompt_id, self.client_id, self._graph, process.hub, process.capabilities)
        self._fingerprints: dict[str, Any] = {}
        self._results: dict[str, CacheEntry] = {}
        self._agenda = Agenda(self._graph, process.folders, lambda node_id: node_id in self._results)
        self._expanded: dict[str, list[Sequence[Any]]] = {}
        self._tasks: dict[str, asyncio.Task[list[NodeResult]]] = {}
        self._ui: dict[str, dict[str, Any]] = {}
        self.executed: list[str] = []
        self.cached: list[str] = []
        self.messages: list[tuple[str, dict[str, Any]]] = []

    async def run(self) -> Finished:
        """Run to the end, whatever it is. Only cancellation comes out."""
        self._message("execution_start", {"prompt_id": self.prompt_id})
        self._look_up()
        self._message("execution_cached", {"nodes": self.cached, "prompt_id": self.prompt_id})
        for node_id in self._outputs:
            self._agenda.add(node_id)
        try:
            while self._agenda:
                node_id = await self._agenda.next()
                if await self._step(node_id):
                    self._agenda.complete(node_id)
        except NodeFailure as failure:
            self._report(failure)
            success = False
        else:
            self._message("execution_success", {"prompt_id": self.prompt_id})
            success = True
        finally:
            for task in self._tasks.values():
                task.cancel()
        return Finished(
            success,
            self.messages,
            {node_id: record["output"] for node_id, record in self._ui.items()},
            {node_id: record["meta"] for node_id, record in self._ui.items()},
        )

    # Messages

    def _message(self, event: str, data: dict[str, Any], *, broadcast: bool = False) -> None:
        data = {**data, "timestamp": self._process.stamp()}
        self.messages.append((event, data))
        if self.client_id is not None or broadcast:
            self._process.hub.send(event, data, self.client_id)

    def _tell(self, event: str, data: dict[str, Any]) -> None:
        if self.client_id is not None:
            self._process.hub.send(event, data, self.client_id)

    def _report(self, failure: NodeFailure) -> None:
        node_id = self._graph.real(failure.node_id)
        facts: dict[str, Any] = {
            "prompt_id": self.prompt_id,
            "node_id": node_id,
            "node_type": self._graph.entry(node_id)["class_type"],
            "executed": list(self.executed),
        }
        if isinstance(failure.error, NodeInterrupted):
            self._message("execution_interrupted", facts, broadcast=True)
            return
        facts |= {
            "exception_message": f"{failure.error}\n",
            "exception_type": type_name(failure.error),
            "traceback": traceback.format_tb(failure.error.__traceback__),
            "current_inputs": failure.inputs,
            "current_outputs": self._graph.ids(),
        }
        self._message("execution_error", facts)

    # Cache

    def _look_up(self) -> None:
        self._fingerprints = self._graph.fingerprints()
        for node_id, mark in self._fingerprints.items():
            unsure = isinstance(mark, float) and math.isnan(mark)
            self._graph.entry(node_id)["is_changed"] = mark if unsure else [mark]
        signatures = {self._graph.signature(node_id, self._fingerprints) for node_id in self._graph.original}
        self._process.cache.keep_only(signatures)
        for node_id in self._graph.original:
            self._remember(node_id)
        self.cached = list(self._results)

    def _remember(self, node_id: str) -> None:
        entry = self._process.cache.get(self._graph.signature(node_id, self._fingerprints))
        if entry is not None:
            self._results[node_id] = entry

    def _keep(self, node_id: str, entry: CacheEntry) -> None:
        self._results[node_id] = entry
        self._process.cache.put(self._graph.signature(node_id, self._fingerprints), entry)

    # One node

    async def _step(self, node_id: str) -> bool:
        """Run a node, or carry it on; False if it waits for something first."""
        if node_id not in self._tasks and node_id not in self._expanded and node_id not in self._results:
            self._remember(node_id)
        if node_id in self._results:
            self._deliver_cached(node_id, self._results[node_id])
            return True
        inputs: dict[str, list[Any]] = {}
        try:
            if node_id in self._tasks:
                results = await self._tasks.pop(node_id)
            elif node_id in self._expanded:
                results = [NodeResult(self._resolved(one)) for one in self._expanded.pop(node_id)]
            else:
                self._progress.start(node_id)
                inputs = self._gather(node_id)
                self._announce(node_id)
                if self._ask_lazily(node_id, inputs):
                    return False
                if self._graph.node_class(node_id).concurrent:
                    self._start_task(node_id, inputs)
                    return False
                results = await self._call(node_id, inputs)
            if not self._finish(node_id, results):
                return False
        except Exception as error:
            inputs |= self._hidden(node_id)
            formatted = {name: [shown(value) for value in values] for name, values in inputs.items()}
            raise NodeFailure(node_id, error, formatted) from error
        self._progress.finish(node_id)
        self.executed.append(node_id)
        return True

    def _deliver_cached(self, node_id: str, entry: CacheEntry) -> None:
        self._tell(
            "executed",
            {
                "node": node_id,
                "display_node": self._graph.real(node_id),
                "output": None if entry.ui is None else entry.ui["output"],
                "prompt_id": self.prompt_id,
            },
        )
        if entry.ui is not None:
            self._ui[node_id] = entry.ui
        self._progress.finish(node_id)

    def _announce(self, node_id: str) -> None:
        if self.client_id is not None:
            self._process.last_node = self._graph.real(node_id)
        self._tell(
            "executing",
            {"node": node_id, "display_node": self._graph.real(node_id), "prompt_id": self.prompt_id},
        )

    def _gather(self, node_id: str) -> dict[str, list[Any]]:
        """Every input as a list of values; lazy ones that nobody computed yet are `[None]`."""
        inputs = self._graph.entry(node_id)["inputs"]
        known = input_specs(self._graph.node_class(node_id), self._process.folders, inputs)
        found: dict[str, list[Any]] = {}
        for name, value in inputs.items():
            if name not in known:
                continue
            if is_link(value):
                source = self._results.get(value[0])
                found[name] = [None] if source is None else source.outputs[value[1]]
            else:
                found[name] = [value]
        return found

    def _hidden(self, node_id: str) -> dict[str, list[Any]]:
        """What the real server passes without a link or a widget; nodes here ask their context for it."""
        known = {
            "PROMPT": self._graph.original,
            "EXTRA_PNGINFO": self._extra.get("extra_pnginfo"),
            "UNIQUE_ID": node_id,
        }
        wanted = self._graph.node_class(node_id).spec(self._process.folders).hidden
        return {name: [known[kind]] for name, kind in wanted.items() if isinstance(kind, str) and kind in known}

    def _ask_lazily(self, node_id: str, inputs: dict[str, list[Any]]) -> bool:
        node = self._graph.node_class(node_id)
        if node.needs is None:
            return False
        links = self._graph.entry(node_id)["inputs"]
        wanted = [
            name
            for name in node.needs({name: values[0] for name, values in inputs.items()})
            if is_link(links.get(name)) and links[name][0] not in self._results
        ]
        for name in wanted:
            self._agenda.need(links[name][0], links[name][1], node_id)
        return bool(wanted)

    def _start_task(self, node_id: str, inputs: dict[str, list[Any]]) -> None:
        unblock = self._agenda.block(node_id)
        task = asyncio.create_task(self._call(node_id, inputs), name=f"node {node_id}")
        task.add_done_callback(lambda _: unblock())
        self._tasks[node_id] = task

    async def _call(self, node_id: str, inputs: dict[str, list[Any]]) -> list[NodeResult]:
        """Call the node for each entry of its longest input list, or once if it wants lists."""
        node = self._graph.node_class(node_id)
        context = NodeContext(
            prompt_id=self.prompt_id,
            node_id=node_id,
            folders=self._process.folders,
            prompt=self._graph.original,
            extra_data=self._extra,
            host=self,
            now=self._process.now,
            save_metadata=self._process.options.save_metadata,
        )
        calls: list[dict[str, Any]]
        if node.input_is_list:
            calls = [dict(inputs)]
        else:
            length = max((len(values) for values in inputs.values()), default=1)
            calls = [
                {name: values[min(index, len(values) - 1)] for name, values in inputs.items() if values}
                for index in range(length)
            ]
        results: list[NodeResult] = []
        for arguments in calls:
            results.append(await self._call_once(node, context, arguments))  # noqa: PERF401 - one after another
        return results

    async def _call_once(self, node: NodeClass, context: NodeContext, arguments: dict[str, Any]) -> NodeResult:
        blocker = _blocker_in(arguments)
        if blocker is not None:
            if blocker.message is not None:
                self._report_blocked(context.node_id, node, blocker.message)
            return NodeResult([ExecutionBlocker()] * len(node.outputs))
        await self._process.awake()
        self.check_interrupted()
        await self._process.stalls.before(context.node_id)
        if self._fails is not None:
            raise _gpu_failure(self._fails)
        return await node.run(context, arguments)

    def _report_blocked(self, node_id: str, node: NodeClass, message: str) -> None:
        self._process.hub.send(
            "execution_error",
            {
                "prompt_id": self.prompt_id,
                "node_id": node_id,
                "node_type": node.name,
                "executed": list(self.executed),
                "exception_message": f"Execution Blocked: {message}",
                "exception_type": "ExecutionBlocked",
                "traceback": [],
                "current_inputs": [],
                "current_outputs": [],
            },
            self.client_id,
        )

    def _finish(self, node_id: str, results: list[NodeResult]) -> bool:
        ui: dict[str, list[Any]] = {}
        for result in results:
            for key, values in (result.ui or {}).items():
                ui.setdefault(key, []).extend(self._registered(value) for value in values)
        if ui:
            self._show(node_id, ui)
        if any(result.expand is not None for result in results):
            self._expand(node_id, results)
            return False
        node = self._graph.node_class(node_id)
        outputs = _merged(node, [result.outputs for result in results])
        self._keep(node_id, CacheEntry(outputs, self._ui.get(node_id)))
        return True

    def _registered(self, value: Any) -> Any:
        """A ui value; with `--enable-assets` file references carry an asset id."""
        options = self._process.options
        if options.enable_assets and self._process.capabilities.assets and isinstance(value, dict):
            return {**value, "id": str(uuid.uuid4())} if "filename" in value else value
        return value

    def _show(self, node_id: str, ui: Mapping[str, Any]) -> None:
        real = self._graph.real(node_id)
        self._ui[node_id] = {
            "meta": {
                "node_id": node_id,
                "display_node": real,
                "parent_node": self._graph.parent(node_id),
                "real_node_id": real,
            },
            "output": ui,
        }
        self._tell("executed", {"node": node_id, "display_node": real, "output": ui, "prompt_id": self.prompt_id})

    def _expand(self, node_id: str, results: list[NodeResult]) -> None:
        kept: list[Sequence[Any]] = []
        wanted: list[Link] = []
        for call, result in enumerate(results):
            prefix = f"{node_id}.{call}.0."
            graph = _prefixed(result.expand or {}, prefix)
            self._graph.expand(node_id, graph)
            outputs = [
                Link(prefix + value.node, value.slot) if isinstance(value, Link) else value for value in result.outputs
            ]
            kept.append(outputs)
            wanted += [value for value in outputs if isinstance(value, Link)]
            wanted += [Link(one, -1) for one in graph if self._graph.node_class(one).output_node]
            for one in graph:
                self._remember(one)
        for link in wanted:
            self._agenda.need(link.node, link.slot, node_id)
        self._expanded[node_id] = kept

    def _resolved(self, outputs: Sequence[Any]) -> list[Any]:
        return [
            self._results[value.node].outputs[value.slot][0] if isinstance(value, Link) else value for value in outputs
        ]

    # NodeHost

    async def report_progress(self, node_id: str, value: float, maximum: float, preview: Image.Image | None) -> None:
        """See `NodeHost`."""
        await self._process.awake()
        value = min(value, maximum)
        if not self._progress.due(node_id, value, maximum, preview is not None):
            return
        self.check_interrupted()
        encoded = None
        if preview is not None and self._process.hub.sockets:
            encoded = await asyncio.get_running_loop().run_in_executor(None, encode_preview, preview)
        self._progress.report(node_id, value, maximum, encoded)
        await self._process.stalls.at(node_id, value / maximum if maximum else 1.0)

    async def report_text(self, node_id: str, text: str) -> None:
        """See `NodeHost`."""
        self._progress.text(node_id, text)

    async def node_sleep(self, node_id: str, seconds: float) -> None:
        """See `NodeHost`."""
        await asyncio.sleep(seconds / self._process.speed)
        await self._process.awake()

    def check_interrupted(self) -> None:
        """See `NodeHost`."""
        if self._process.interrupted:
            self._process.interrupted = False
            raise NodeInterrupted


def _gpu_failure(kind: str) -> Exception:
    from runcomfy.testing.emulators.comfyui.nodes import utility

    failure: Exception = utility.AcceleratorError(utility.CUDA_TEXT)
    if kind == "oom":
        failure = utility.OutOfMemoryError(utility.OOM_TEXT)
    return failure


def _blocker_in(arguments: Mapping[str, Any]) -> ExecutionBlocker | None:
    return next((value for value in arguments.values() if isinstance(value, ExecutionBlocker)), None)


def _merged(node: NodeClass, results: list[Sequence[Any]]) -> Values:
    merged: Values = []
    for slot in range(len(node.outputs)):
        is_list = slot < len(node.output_is_list) and node.output_is_list[slot]
        values: list[Any] = []
        for outputs in results:
            value = outputs[slot]
            if is_list and not isinstance(value, ExecutionBlocker):
                values.extend(value)
            else:
                values.append(value)
        merged.append(values)
    return merged


def _prefixed(graph: Graph, prefix: str) -> Graph:
    def moved(value: Any) -> Any:
        return [prefix + value[0], value[1]] if is_link(value) and value[0] in graph else value

    return {
        prefix + node_id: {
            **entry,
            "inputs": {name: moved(value) for name, value in entry["inputs"].items()},
        }
        for node_id, entry in graph.items()
    }


class NodeCache:
    """Results by key, kept from one prompt to the next; `enabled=False` is `--cache-none`.

    What the next prompt does not contain is forgotten when it begins, as with the real server's default cache.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._entries: dict[str, CacheEntry] = {}
        self._enabled = enabled

    def get(self, key: str) -> CacheEntry | None:
        """The entry of a key."""
        return self._entries.get(key)

    def put(self, key: str, entry: CacheEntry) -> None:
        """Keep an entry."""
        if self._enabled:
            self._entries[key] = entry

    def keep_only(self, keys: set[str]) -> None:
        """Forget everything else."""
        self._entries = {key: entry for key, entry in self._entries.items() if key in keys}

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


class Stalls:
    """Nodes that were told to stand still."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[float, asyncio.Event]] = {}

    def add(self, node_id: str, at: float) -> None:
        """Hold a node at that fraction of its progress; 0 is before it does anything."""
        self._held[node_id] = (at, asyncio.Event())

    def release(self, node_id: str) -> None:
        """Let it go on."""
        held = self._held.pop(node_id, None)
        if held is not None:
            held[1].set()

    async def before(self, node_id: str) -> None:
        """Wait here if the node is held from its start."""
        held = self._held.get(node_id)
        if held is not None and held[0] <= 0:
            await held[1].wait()

    async def at(self, node_id: str, fraction: float) -> None:
        """Wait here if the node is held from a fraction that is now reached."""
        held = self._held.get(node_id)
        if held is not None and 0 < held[0] <= fraction:
            await held[1].wait()
