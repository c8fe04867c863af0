"""
A ComfyUI workflow as a value: the graph in API format, checked once, and the words people use for its inputs.

A graph that comes out of `Workflow.parse` is one that a server can at least read: nodes are objects with a class,
links point to nodes that are there, nothing goes round in circles, and nothing in it is too deep or too large to be
handled. Whether a certain machine can run it is `preflight`'s question; what the user wants changed in it is
`binding`'s. Files are read by others: this module sees text.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NoReturn, TypeGuard

from runcomfy.domain.exceptions import (
    TargetAmbiguous,
    TargetUnknown,
    WorkflowInvalid,
    WorkflowIsUiFormat,
    WorkflowNotJson,
    foreign_text,
)

Graph = dict[str, dict[str, Any]]
"""API format: node id -> {"class_type", "inputs", "_meta"?}. Immutable by convention: copy with `copy_json`."""

MAX_BYTES: Final = 50_000_000
"""The largest real workflows are a few MB, most of it pictures drawn into widgets."""

MAX_DEPTH: Final = 100
"""A graph is three levels deep; widget values of real nodes add a handful. Deeper ones only exhaust stacks."""

EXPORT_HINT: Final = (
    "in ComfyUI choose Workflow > Export (API); in older versions switch on dev mode in the settings, "
    "then Save (API Format)"
)


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a graph."""

    id: str
    class_type: str
    title: str
    """What people see: the title given in ComfyUI, else the class."""
    has_title: bool
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Link:
    """An input that takes what another node delivers."""

    node_id: str
    input_name: str
    source_id: str
    slot: int


def copy_json(value: Any) -> Any:
    """Return a deep copy of a JSON value (mappings become dicts, tuples lists)."""
    if isinstance(value, Mapping):
        return {key: copy_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_json(item) for item in value]
    return value


def canonical_sha256(graph: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a graph, the same for every way of writing the same JSON."""
    text = json.dumps(graph, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def is_link(value: Any, graph: Mapping[str, Any]) -> TypeGuard[list[Any]]:
    """Whether a value is a link to a node of this graph: `["node id", output number]`."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) is int
        and value[0] in graph
    )


def close_matches(wanted: str, names: Iterable[str]) -> list[str]:
    """Return up to three names that look like the wanted one, whatever their case; the best first."""
    by_folded: dict[str, str] = {}
    for name in names:
        by_folded.setdefault(name.casefold(), name)
    # Both sides are cut: the comparison takes quadratic time and either text may come from outside.
    folded = {key[:200]: name for key, name in by_folded.items()}
    return [folded[key] for key in difflib.get_close_matches(wanted.casefold()[:200], list(folded), n=3)]


@dataclass(frozen=True)
class Workflow:
    """A graph that has been read and found sound. Make it with `Workflow.parse`."""

    graph: Graph = field(repr=False)
    name: str = ""
    """The shipped name or the file's name, for messages; may be empty."""

    @classmethod
    def parse(cls, data: str | bytes | Mapping[str, Any], *, name: str = "") -> Workflow:
        """Read a graph in API format: JSON text, its bytes, or the object itself.

        A saved request body (`{"prompt": {...}}`) is unwrapped.

        Raises WorkflowNotJson (with line and column), WorkflowIsUiFormat, WorkflowInvalid.
        """
        shown = name or "the workflow"
        found = data if isinstance(data, Mapping) else _read_json(data, shown)
        if not isinstance(found, Mapping):
            raise WorkflowInvalid(
                f"{shown} is JSON, but {_kind(found)} instead of an object of nodes", hint=EXPORT_HINT
            )
        clean = plain_json(found, shown)
        wrapped = clean.get("prompt")
        if isinstance(wrapped, dict) and "class_type" not in wrapped:
            clean = wrapped
        if isinstance(clean.get("nodes"), list):
            raise WorkflowIsUiFormat(
                f"{shown} was saved for the ComfyUI page, not for its API (it has lists of nodes and links)",
                hint=EXPORT_HINT,
            )
        _check_nodes(clean, shown)
        _check_links(clean, shown)
        check_cycles(clean, shown)
        return cls(graph=clean, name=name)

    @cached_property
    def sha256(self) -> str:
        """Of the graph as canonical JSON: independent of spaces, key order and file name."""
        return canonical_sha256(self.graph)

    @cached_property
    def nodes(self) -> Mapping[str, Node]:
        """Node id -> node, in the file's order."""
        found = {}
        for node_id, raw in self.graph.items():
            title = _given_title(raw)
            found[node_id] = Node(node_id, raw["class_type"], title or raw["class_type"], bool(title), raw["inputs"])
        return found

    @cached_property
    def class_types(self) -> frozenset[str]:
        """Every node class the graph uses."""
        return frozenset(node.class_type for node in self.nodes.values())

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Every link, in the file's order."""
        return tuple(
            Link(node.id, name, value[0], value[1])
            for node in self.nodes.values()
            for name, value in node.inputs.items()
            if is_link(value, self.graph)
        )

    def title(self, node_id: str) -> str:
        """Return what people call the node; an id that is not in the graph is its own title."""
        node = self.nodes.get(node_id)
        return node.title if node else node_id

    def value(self, node_id: str, input_name: str) -> Any:
        """Return what an input holds in the file; None if it is absent."""
        node = self.nodes.get(node_id)
        return node.inputs.get(input_name) if node else None

    def find_node(self, name: str) -> str:
        """Return the id of the node that goes by this id, title or class, in this order.

        Raises TargetUnknown, TargetAmbiguous.
        """
        for fits in _tiers():
            found = [node.id for node in self.nodes.values() if fits(node, name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise TargetAmbiguous(
                    f"{len(found)} nodes are called {foreign_text(name)!r}: "
                    + ", ".join(f"{self._called(node_id)}" for node_id in found[:10]),
                    hint="use the node's id",
                )
        names = [n for node in self.nodes.values() for n in (node.id, node.title, node.class_type)]
        raise TargetUnknown(f"no node is called {foreign_text(name)!r}", hint=_did_you_mean(name, names))

    def resolve(self, target: str) -> tuple[str, str]:
        """Return (node id, input name) for `NODEID.input`, `Title.input` or `Class.input`.

        Ids, titles and input names may themselves contain dots (`format.bit_depth` is an input's name), so every
        way of splitting is tried. An id wins over a title, a title over a class; a node fits only if it has that
        input in the file. That last rule is on purpose: ComfyUI ignores inputs it does not know, so a mistyped name
        would change nothing and tell nobody. Who wants to add an input that the file leaves out says so with a
        plus: `+NODEID.input`.

        Raises TargetUnknown (with what was probably meant), TargetAmbiguous (with the candidates).
        """
        splits = [(target[:at], target[at + 1 :]) for at, char in enumerate(target) if char == "."]
        for fits in _tiers():
            found = {
                (node.id, input_name)
                for name, input_name in splits
                for node in self.nodes.values()
                if input_name in node.inputs and fits(node, name)
            }
            if found:
                return self._only(target, found)
        if target.startswith("+"):
            return self._resolve_new(target)
        raise self._unknown(target, splits)

    def _resolve_new(self, target: str) -> tuple[str, str]:
        plain = target[1:]
        splits = [(plain[:at], plain[at + 1 :]) for at, char in enumerate(plain) if char == "." and plain[at + 1 :]]
        for fits in _tiers():
            # The longest name wins: with a node "a" and a node "a.b", "+a.b.c" is input "c" of the latter.
            for name, input_name in reversed(splits):
                found = {(node.id, input_name) for node in self.nodes.values() if fits(node, name)}
                if found:
                    return self._only(target, found)
        raise self._unknown(plain, splits)

    def _only(self, target: str, found: set[tuple[str, str]]) -> tuple[str, str]:
        if len(found) == 1:
            return next(iter(found))
        candidates = [
            f"{node_id}.{input_name} ({self.title(node_id)}, {self.nodes[node_id].class_type})"
            for node_id, input_name in sorted(found, key=lambda pair: (list(self.graph).index(pair[0]), pair[1]))
        ]
        raise TargetAmbiguous(
            f"{foreign_text(target)!r} fits {len(found)} inputs: {foreign_text('; '.join(candidates), 1000)}",
            hint=f"name the node by its id, for example {foreign_text(candidates[0].split(' (')[0])}",
            details={"candidates": candidates},
        )

    def _unknown(self, target: str, splits: Sequence[tuple[str, str]]) -> TargetUnknown:
        shown = foreign_text(target)
        if not splits:
            return TargetUnknown(
                f"{shown!r} is not a target", hint="write NODEID.input, Title.input or Class.input, as in 3.seed"
            )
        for fits in _tiers():
            for name, input_name in reversed(splits):
                holders = [node for node in self.nodes.values() if fits(node, name)]
                if holders:
                    names = sorted({known for node in holders for known in node.inputs})
                    meant = close_matches(input_name, names) or names[:8]
                    listed = " or ".join(f"{name}.{known}" for known in meant)
                    return TargetUnknown(
                        f"{shown!r}: {self._called(holders[0].id)} has no input "
                        f"{foreign_text(input_name)!r} in this file",
                        hint=foreign_text(
                            (f"did you mean {listed}? " if listed else "")
                            + f"To add an input that the file leaves out, write +{holders[0].id}.{input_name}",
                            600,
                        ),
                        details={"inputs": names},
                    )
        known = [
            f"{name}.{input_name}"
            for node in self.nodes.values()
            for name in dict.fromkeys((node.id, node.title, node.class_type))
            for input_name in node.inputs
        ]
        return TargetUnknown(f"{shown!r}: no node goes by that id, title or class", hint=_did_you_mean(target, known))

    def _called(self, node_id: str) -> str:
        node = self.nodes[node_id]
        words = f"{node.title}, {node.class_type}" if node.title != node.class_type else node.class_type
        return f"node {foreign_text(node.id, 60)} ({foreign_text(words, 120)})"


def _tiers() -> tuple[Callable[[Node, str], bool], ...]:
    """What a name may mean, the strongest first."""
    return (
        lambda node, name: node.id == name,
        lambda node, name: node.has_title and node.title == name,
        lambda node, name: node.class_type == name,
    )


def _did_you_mean(wanted: str, names: Iterable[str]) -> str:
    meant = close_matches(wanted, names)
    if meant:
        return foreign_text(f"did you mean {' or '.join(meant)}?", 600)
    return "`comfyctl workflows show` lists the nodes and their inputs"


def _kind(value: Any) -> str:
    words: dict[type, str] = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "an object" if isinstance(value, Mapping) else "a number")


def _read_json(data: str | bytes, shown: str) -> Any:
    if len(data) > MAX_BYTES:
        raise WorkflowInvalid(
            f"{shown} is larger than {MAX_BYTES // 1_000_000} MB, which no ComfyUI graph is",
            hint="check that the path names a workflow file",
        )
    text = data if isinstance(data, str) else _decode(data, shown)
    try:
        return json.loads(text.removeprefix("\ufeff"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise WorkflowNotJson(
            f"{shown} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            hint=EXPORT_HINT if not text.strip() else "correct the file there, or export it again from ComfyUI",
            details={"line": error.lineno, "column": error.colno},
        ) from None
    except RecursionError:
        raise WorkflowInvalid(f"{shown} is nested too deeply to be a ComfyUI graph", hint=EXPORT_HINT) from None
    except ValueError as error:  # our refusal of NaN, or a number with thousands of digits
        raise WorkflowNotJson(f"{shown} is not JSON: {foreign_text(error)}", hint="correct the value") from None


def _decode(data: bytes, shown: str) -> str:
    if data.startswith(b"\x89PNG"):
        raise WorkflowNotJson(f"{shown} is a picture, not JSON", hint=f"export the workflow as a file: {EXPORT_HINT}")
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise WorkflowNotJson(
            f"{shown} is not text: byte {error.start} is not {encoding.upper()}", hint="save the file as UTF-8"
        ) from None


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON value")


def plain_json(value: Any, shown: str, depth: int = 0) -> Any:
    """Copy a value into plain dicts and lists. Raises WorkflowInvalid for what is not JSON, or too deep."""
    if depth > MAX_DEPTH:
        raise WorkflowInvalid(f"{shown} is nested too deeply to be a ComfyUI graph", hint=EXPORT_HINT)
    if isinstance(value, int) and value.bit_length() > 1024:
        raise WorkflowInvalid(f"{shown} has a number with hundreds of digits", hint="no node takes such a number")
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WorkflowInvalid(f"{shown} has a number that is not finite", hint="JSON knows no NaN and no infinity")
        return value
    if isinstance(value, (list, tuple)):
        return [plain_json(item, shown, depth + 1) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise WorkflowInvalid(
                    f"{shown}: {foreign_text(repr(key), 60)} is used as a name, but names and node ids are texts",
                    hint=f"write {foreign_text(repr(str(key)), 60)}",
                )
        return {key: plain_json(item, shown, depth + 1) for key, item in value.items()}
    raise WorkflowInvalid(f"{shown} holds a {type(value).__name__}, which JSON cannot express", hint="use plain values")


def _given_title(raw: Mapping[str, Any]) -> str:
    meta = raw.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return title if isinstance(title, str) else ""


def _check_nodes(graph: Mapping[str, Any], shown: str) -> None:
    if not graph:
        raise WorkflowInvalid(f"{shown} has no nodes", hint=EXPORT_HINT)
    for node_id, raw in graph.items():
        where = f"{shown}: node {foreign_text(node_id, 60)!r}"
        if not isinstance(raw, dict):
            raise WorkflowInvalid(f"{where} is {_kind(raw)}, not an object", hint=EXPORT_HINT)
        class_type = raw.get("class_type")
        if not isinstance(class_type, str) or not class_type:
            raise WorkflowInvalid(f"{where} has no class_type", hint=EXPORT_HINT)
        inputs = raw.get("inputs")
        if not isinstance(inputs, dict):
            said = "has no inputs" if "inputs" not in raw else f"has {_kind(inputs)} as inputs"
            raise WorkflowInvalid(
                f"{where} ({foreign_text(class_type, 80)}) {said}",
                hint='a node without inputs still needs "inputs": {}',
            )


def _check_links(graph: Mapping[str, Any], shown: str) -> None:
    """In API format a list always is a link; a list meant as a value is written {"__value__": [...]}."""
    for node_id, raw in graph.items():
        for name, value in raw["inputs"].items():
            if not isinstance(value, list) or is_link(value, graph):
                continue
            where = f"{shown}: input {foreign_text(name, 60)!r} of node {foreign_text(node_id, 60)!r}"
            if len(value) != 2:
                said = f"is a list of {len(value)}"
            elif not isinstance(value[0], str):
                said = f"links to {foreign_text(repr(value[0]), 60)}, but node ids are texts"
            elif type(value[1]) is not int:
                said = f"takes output {foreign_text(repr(value[1]), 60)}, but outputs are counted in whole numbers"
            else:
                said = f"links to node {foreign_text(value[0], 60)!r}, which is not in the graph"
            raise WorkflowInvalid(
                f"{where} {said}",
                hint='a link is ["node id", output number]; a list as a value is written {"__value__": [...]}',
            )


def check_cycles(graph: Mapping[str, Any], shown: str) -> None:
    """Make sure that no node needs its own result. Raises WorkflowInvalid, naming the nodes of the circle."""
    done: set[str] = set()
    for start in graph:
        if start in done:
            continue
        path: list[str] = [start]
        on_path = {start}
        waiting = [_sources(graph, start)]
        while waiting:
            source = next(waiting[-1], None)
            if source is None:
                waiting.pop()
                left = path.pop()
                on_path.discard(left)
                done.add(left)
            elif source in on_path:
                round_trip = [*path[path.index(source) :], source]
                raise WorkflowInvalid(
                    f"{shown} goes in a circle: {foreign_text(' -> '.join(reversed(round_trip)))}",
                    hint="a node cannot need its own result; correct the links between these nodes",
                    details={"cycle": round_trip},
                )
            elif source not in done:
                path.append(source)
                on_path.add(source)
                waiting.append(_sources(graph, source))


def _sources(graph: Mapping[str, Any], node_id: str) -> Iterator[str]:
    return (value[0] for value in graph[node_id]["inputs"].values() if is_link(value, graph))
