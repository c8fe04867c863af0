"""The graph while it runs: which node comes next, what a node's cache key is, where expanded nodes belong."""

from __future__ import annotations

import asyncio
import hashlib
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from runcomfy.testing.emulators.comfyui.nodes.base import Folders, Graph, NodeClass
from runcomfy.testing.emulators.comfyui.validation import input_specs, is_link


class RunningGraph:
    """The submitted graph plus the nodes that others expanded into."""

    def __init__(self, graph: Graph, nodes: Mapping[str, NodeClass], folders: Folders) -> None:
        self.original = graph
        self._nodes = nodes
        self._folders = folders
        self._added: Graph = {}
        self._parents: dict[str, str] = {}
        self._signatures: dict[str, str] = {}

    def entry(self, node_id: str) -> dict[str, Any]:
        """A node as submitted or expanded. Raises KeyError."""
        return self._added[node_id] if node_id in self._added else self.original[node_id]

    def ids(self) -> list[str]:
        """Every node there is by now."""
        return [*self.original, *self._added]

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._added or node_id in self.original

    def node_class(self, node_id: str) -> NodeClass:
        """The class of a node."""
        return self._nodes[self.entry(node_id)["class_type"]]

    def expand(self, parent: str, graph: Graph) -> None:
        """Add nodes under their final ids."""
        for node_id, entry in graph.items():
            self._added[node_id] = entry
            self._parents[node_id] = parent

    def parent(self, node_id: str) -> str | None:
        """The node that expanded into this one."""
        return self._parents.get(node_id)

    def real(self, node_id: str) -> str:
        """The submitted node that this one belongs to; itself for submitted ones."""
        while node_id in self._parents:
            node_id = self._parents[node_id]
        return node_id

    def fingerprints(self) -> dict[str, Any]:
        """Ask every submitted node that depends on more than its inputs; errors count as "changed"."""
        found: dict[str, Any] = {}
        for node_id in self.original:
            node = self.node_class(node_id)
            if node.fingerprint is None:
                continue
            literals = {k: v for k, v in self.entry(node_id)["inputs"].items() if not is_link(v)}
            try:
                found[node_id] = node.fingerprint(self._folders, literals)
            except Exception:  # noqa: BLE001 - the node itself will raise it again, with its own name
                found[node_id] = float("nan")
        return found

    def signature(self, node_id: str, fingerprints: Mapping[str, Any]) -> str:
        """The cache key: class, inputs and the keys of everything before. Equal keys mean equal results."""
        known = self._signatures
        if node_id in known:
            return known[node_id]
        if node_id not in self:
            return f"absent {node_id}"
        entry = self.entry(node_id)
        mark = fingerprints.get(node_id)
        if isinstance(mark, float) and math.isnan(mark):
            mark = uuid.uuid4().hex
        inputs = [
            (name, "link", self.signature(value[0], fingerprints), value[1])
            if is_link(value)
            else (name, "value", value)
            for name, value in sorted(entry["inputs"].items())
        ]
        text = repr((entry["class_type"], mark, inputs))
        known[node_id] = hashlib.blake2b(text.encode(errors="backslashreplace")).hexdigest()
        return known[node_id]


class Agenda:
    """Nodes still to run, in ComfyUI's order: ready ones, outputs and async ones first.

    `is_cached` says whether a node's result is at hand, in which case nobody waits for it.
    """

    def __init__(self, graph: RunningGraph, folders: Folders, is_cached: Callable[[str], bool]) -> None:
        self._graph = graph
        self._folders = folders
        self._is_cached = is_cached
        self._pending: dict[str, int] = {}
        """Node -> how many others it waits for, tasks of its own included."""
        self._blocking: dict[str, dict[str, set[Any]]] = {}
        self._outside = 0
        self._unblocked = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, node_id: str) -> None:
        """Put a node and all it needs on the agenda."""
        todo = [node_id]
        links: list[tuple[str, Any, str]] = []
        while todo:
            one = todo.pop()
            if one in self._pending:
                continue
            self._pending[one] = 0
            self._blocking[one] = {}
            inputs = self._graph.entry(one)["inputs"]
            specs = input_specs(self._graph.node_class(one), self._folders, inputs)
            for name, value in inputs.items():
                if not is_link(value) or (name in specs and specs[name].options.get("lazy")):
                    continue
                if not self._is_cached(value[0]):
                    todo.append(value[0])
                links.append((value[0], value[1], one))
        for link in links:
            self._wait(*link)

    def need(self, source: str, slot: Any, node_id: str) -> None:
        """Let a node on the agenda wait for another one after all."""
        if not self._is_cached(source):
            self.add(source)
        self._wait(source, slot, node_id)

    def _wait(self, source: str, slot: Any, node_id: str) -> None:
        if self._is_cached(source):
            return
        waiting = self._blocking[source].setdefault(node_id, set())
        if not waiting:
            self._pending[node_id] += 1
        waiting.add(slot)

    def block(self, node_id: str) -> Callable[[], None]:
        """Let a node wait for something outside the graph; call the result to end that."""
        self._pending[node_id] += 1
        self._outside += 1

        def unblock() -> None:
            self._outside -= 1
            if node_id in self._pending:
                self._pending[node_id] -= 1
            self._unblocked.set()

        return unblock

    async def next(self) -> str:
        """The next node to run. Raises RuntimeError if those left wait for each other."""
        while not (ready := [node_id for node_id, count in self._pending.items() if count == 0]):
            if not self._outside:
                raise RuntimeError("Dependency cycle detected")
            self._unblocked.clear()
            await self._unblocked.wait()
        return self._pick(ready)

    def _pick(self, ready: list[str]) -> str:
        def eager(node_id: str) -> bool:
            node = self._graph.node_class(node_id)
            return node.output_node or node.concurrent

        for distance in range(3):
            for node_id in ready:
                front = {node_id}
                for _ in range(distance):
                    front = {behind for one in front for behind in self._blocking.get(one, ())}
                wanted = eager if distance == 0 else (lambda n: self._graph.node_class(n).output_node)
                if any(wanted(one) for one in front):
                    return node_id
        return ready[0]

    def complete(self, node_id: str) -> None:
        """A node is done: those behind it wait for one less."""
        for waiting in self._blocking.pop(node_id, {}):
            self._pending[waiting] -= 1
        del self._pending[node_id]
