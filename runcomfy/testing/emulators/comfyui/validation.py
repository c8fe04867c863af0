"""What POST /prompt says about a graph before it queues it: the checks and the words of the real server."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runcomfy.testing.emulators.comfyui.nodes.base import Folders, Graph, NodeClass
from runcomfy.testing.emulators.comfyui.versions import Capabilities

LONGEST_SHOWN_LIST = 20
"""Combos with more choices are named by their length only."""

DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"

Problem = dict[str, Any]
Verdict = tuple[bool, list[Problem]]


@dataclass(slots=True)
class Validation:
    """The answer: `error` is None if at least one output node may run."""

    error: Problem | None
    outputs: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)


def problem(kind: str, message: str, details: str, extra_info: Mapping[str, Any] | None = None) -> Problem:
    """One error object."""
    return {"type": kind, "message": message, "details": details, "extra_info": dict(extra_info or {})}


def input_specs(node: NodeClass, folders: Folders, inputs: Mapping[str, Any]) -> dict[str, InputInfo]:
    """Every input the class knows, those of chosen dynamic combos included under dotted names."""
    spec = node.spec(folders)
    found: dict[str, InputInfo] = {}
    for category, group in (("required", spec.required), ("optional", spec.optional)):
        for name, config in group.items():
            _collect(found, name, name, config, category == "required", inputs)
    return found


@dataclass(frozen=True, slots=True)
class InputInfo:
    """One input: its type (a name or a list of choices), options, and how errors call it."""

    name: str
    label: str
    type: Any
    options: Mapping[str, Any]
    required: bool

    @property
    def config(self) -> list[Any]:
        """`input_config` of error objects."""
        return [self.type, dict(self.options)]

    @property
    def choices(self) -> list[Any] | None:
        """The combo's choices, None for anything else."""
        if isinstance(self.type, list | tuple):
            return list(self.type)
        if self.type == "COMBO":
            return list(self.options.get("options", []))
        if self.type == DYNAMIC_COMBO:
            return [option["key"] for option in self.options.get("options", [])]
        return None


def _collect(
    found: dict[str, InputInfo],
    name: str,
    label: str,
    config: Sequence[Any],
    required: bool,
    inputs: Mapping[str, Any],
) -> None:
    options = dict(config[1]) if len(config) > 1 else {}
    found[name] = InputInfo(name, label, config[0], options, required)
    if config[0] != DYNAMIC_COMBO:
        return
    for option in options.get("options", []):
        if option["key"] != inputs.get(name):
            continue
        for category in ("required", "optional"):
            for inner, inner_config in option["inputs"].get(category, {}).items():
                _collect(found, f"{name}.{inner}", inner, inner_config, category == "required", inputs)


def is_link(value: object) -> bool:
    """Whether an input value points to another node's output."""
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int | float)
    )


def types_fit(received: Any, wanted: Any) -> bool:
    """Whether an output of one type may feed an input of the other; `*` fits all, commas mean alternatives."""
    if received == wanted or "*" in (received, wanted):
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return isinstance(received, list | tuple) and wanted == "COMBO"
    have = {part.strip() for part in received.split(",")}
    want = {part.strip() for part in wanted.split(",")}
    return "*" in want or have <= want


class Validator:
    """One POST /prompt's validation; converts literal values in the graph in place, as the real one does."""

    def __init__(
        self, graph: Graph, nodes: Mapping[str, NodeClass], folders: Folders, capabilities: Capabilities
    ) -> None:
        self._graph = graph
        self._nodes = nodes
        self._folders = folders
        self._can = capabilities
        self._done: dict[Any, Verdict] = {}
        self._path: list[Any] = []

    def validate(self, targets: Sequence[str] | None) -> Validation:
        """Check the output nodes in `targets` (None: all) and everything before them.

        Raises whatever a graph that is no graph raises; the server turns that into its plain 500.
        """
        if self._can.jobs_count_3d and any(not isinstance(node, dict) for node in _items(self._graph)):
            raise TypeError("node replacement walks over objects only")
        outputs: list[str] = []
        for node_id in self._graph:
            entry = self._graph[node_id]
            if "class_type" not in entry:
                return Validation(self._no_class(node_id))
            node = self._nodes.get(entry["class_type"])
            if node is None:
                return Validation(self._missing(node_id, entry))
            if node.output_node and (targets is None or node_id in targets):
                outputs.append(node_id)
        if not outputs:
            return Validation(problem("prompt_no_outputs", "Prompt has no outputs", ""))
        return self._check_outputs(outputs)

    def _no_class(self, node_id: str) -> Problem:
        if not self._can.names_missing_node:
            text = "Cannot execute because a node is missing the class_type property."
            return problem("invalid_prompt", text, f"Node ID '#{node_id}'")
        title = self._graph[node_id].get("_meta", {}).get("title")
        return problem(
            "missing_node_type",
            f"Node '{title or f'ID #{node_id}'}' has no class_type. The workflow may be corrupted or a custom"
            " node is missing.",
            f"Node ID '#{node_id}'",
            {"node_id": node_id, "class_type": None, "node_title": title},
        )

    def _missing(self, node_id: str, entry: dict[str, Any]) -> Problem:
        name = entry["class_type"]
        if not self._can.names_missing_node:
            text = f"Cannot execute because node {name} does not exist."
            return problem("invalid_prompt", text, f"Node ID '#{node_id}'")
        title = entry.get("_meta", {}).get("title", name)
        return problem(
            "missing_node_type",
            f"Node '{title}' not found. The custom node may not be installed.",
            f"Node ID '#{node_id}'",
            {"node_id": node_id, "class_type": name, "node_title": title},
        )

    def _check_outputs(self, outputs: list[str]) -> Validation:
        good: list[str] = []
        texts: list[str] = []
        node_errors: dict[str, Any] = {}
        for output in outputs:
            try:
                valid, reasons = self._check(output)
            except Exception as error:  # noqa: BLE001 - the real server reports whatever its checks raise
                valid, reasons = False, [self._raised(error)]
                self._done[output] = (False, reasons)
            if valid:
                good.append(output)
                continue
            texts += [f"{reason['message']}: {reason['details']}" for reason in reasons]
            for node_id, (node_valid, node_reasons) in self._done.items():
                if not node_valid and node_reasons:
                    entry = node_errors.setdefault(
                        node_id,
                        {
                            "errors": node_reasons,
                            "dependent_outputs": [],
                            "class_type": self._graph[node_id]["class_type"],
                        },
                    )
                    entry["dependent_outputs"].append(output)
        if good:
            return Validation(None, good, node_errors)
        failed = problem("prompt_outputs_failed_validation", "Prompt outputs failed validation", "\n".join(texts))
        return Validation(failed, [], node_errors)

    @staticmethod
    def _raised(error: Exception) -> Problem:
        return problem(
            "exception_during_validation",
            "Exception when validating node",
            str(error),
            {"exception_type": type(error).__name__, "traceback": traceback.format_tb(error.__traceback__)},
        )

    def _check(self, node_id: Any) -> Verdict:
        if node_id in self._done:
            return self._done[node_id]
        inputs = self._graph[node_id]["inputs"]
        if node_id in self._path:
            return self._cycle(node_id)
        self._path.append(node_id)
        try:
            node = self._nodes[self._graph[node_id]["class_type"]]
            problems: list[Problem] = []
            valid = True
            for info in input_specs(node, self._folders, inputs).values():
                valid &= self._check_input(node, info, inputs, problems)
            problems += self._custom(node, inputs)
        finally:
            self._path.pop()
        # A cycle found below has already put its verdict here, and that one carries the reason.
        return self._done.setdefault(node_id, (valid and not problems, problems))

    def _cycle(self, node_id: Any) -> Verdict:
        members = self._path[self._path.index(node_id) :]
        if not self._can.finds_cycles:
            raise RecursionError("maximum recursion depth exceeded")
        shown = " -> ".join(f"{n} ({self._graph[n]['class_type']})" for n in [*members, node_id])
        for member in members:
            info = {"node_id": member, "cycle_nodes": list(members)}
            reason = problem("dependency_cycle", "Dependency cycle detected", shown, info)
            self._done[member] = (False, [reason])
        return self._done[node_id]

    def _check_input(self, node: NodeClass, info: InputInfo, inputs: dict[str, Any], problems: list[Problem]) -> bool:
        """Add what is wrong with this input itself; False if only something before it is wrong."""
        if info.name not in inputs:
            if info.required:
                extra = {"input_name": info.name}
                problems.append(problem("required_input_missing", "Required input is missing", info.label, extra))
            return True
        if isinstance(inputs[info.name], list):
            return self._check_link(info, inputs[info.name], problems)
        self._check_literal(node, info, inputs, problems)
        return True

    def _check_link(self, info: InputInfo, value: list[Any], problems: list[Problem]) -> bool:
        extra: dict[str, Any] = {"input_name": info.name, "input_config": info.config}
        if len(value) != 2:
            text = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            problems.append(problem("bad_linked_input", text, info.name, {**extra, "received_value": value}))
            return True
        source = value[0]
        received = self._nodes[self._graph[source]["class_type"]].outputs[value[1]]
        if not types_fit(received, info.type):
            details = f"{info.name}, received_type({received}) mismatch input_type({info.type})"
            extra |= {"received_type": received, "linked_node": value}
            text = "Return type mismatch between linked nodes"
            problems.append(problem("return_type_mismatch", text, details, extra))
            return True
        try:
            return self._check(source)[0]
        except Exception as error:  # noqa: BLE001 - as above
            extra |= {
                "exception_message": str(error),
                "exception_type": type(error).__name__,
                "traceback": traceback.format_tb(error.__traceback__),
                "linked_node": value,
            }
            text = "Exception when validating inner node"
            self._done[source] = (
                False,
                [problem("exception_during_inner_validation", text, str(error), extra)],
            )
            return False

    def _check_literal(self, node: NodeClass, info: InputInfo, inputs: dict[str, Any], problems: list[Problem]) -> None:
        value = inputs[info.name]
        if isinstance(value, dict) and "__value__" in value:
            value = inputs[info.name] = value["__value__"]
        extra = {"input_name": info.name, "input_config": info.config, "received_value": value}
        try:
            value = inputs[info.name] = _converted(info.type, value)
        except (TypeError, ValueError, OverflowError) as error:
            text = f"Failed to convert an input value to a {info.type} value"
            details = f"{info.name}, {value}, {error}"
            extra["exception_message"] = str(error)
            problems.append(problem("invalid_input_type", text, details, extra))
            return
        if info.name in node.validated_inputs:
            return
        extra["received_value"] = value
        low, high = info.options.get("min"), info.options.get("max")
        if low is not None and value < low:
            text = f"Value {value} smaller than min of {low}"
            problems.append(problem("value_smaller_than_min", text, info.name, extra))
        elif high is not None and value > high:
            text = f"Value {value} bigger than max of {high}"
            problems.append(problem("value_bigger_than_max", text, info.name, extra))
        elif info.choices is not None:
            self._check_choice(info, value, info.choices, problems)

    @staticmethod
    def _check_choice(info: InputInfo, value: Any, choices: list[Any], problems: list[Problem]) -> None:
        chosen = value if info.options.get("multiselect") and isinstance(value, list) else [value]
        wrong = [one for one in chosen if one not in choices]
        if not wrong:
            return
        long = len(choices) > LONGEST_SHOWN_LIST
        shown = f"(list of length {len(choices)})" if long else str(choices)
        extra = {
            "input_name": info.name,
            "input_config": None if long else info.config,
            "received_value": value,
        }
        details = f"{info.name}: {', '.join(repr(one) for one in wrong)} not in {shown}"
        problems.append(problem("value_not_in_list", "Value not in list", details, extra))

    def _custom(self, node: NodeClass, inputs: Mapping[str, Any]) -> list[Problem]:
        if node.validate is None:
            return []
        literals = {name: value for name, value in inputs.items() if not isinstance(value, list)}
        if not node.validated_inputs & literals.keys():
            return []
        verdict = node.validate(self._folders, literals)
        if verdict is True:
            return []
        text = "Custom validation failed for node"
        return [
            problem(
                "custom_validation_failed",
                text,
                name if verdict is False else f"{name} - {verdict}",
                {"input_name": name},
            )
            for name in literals
            if name in node.validated_inputs
        ]


def _items(graph: object) -> list[Any]:
    return list(graph.values())  # type: ignore[attr-defined]


def _converted(kind: Any, value: Any) -> Any:
    if kind == "INT":
        return int(value)
    if kind == "FLOAT":
        return float(value)
    if kind == "STRING":
        return str(value)
    if kind == "BOOLEAN":
        return bool(value)
    return value
