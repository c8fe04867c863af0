"""
What a name in a job file means: which inputs of the graph get its value.

    1  a name of the workflow's entry in `workflows.yaml`
    2  a name of the sidecar; `seed` stands for the seeds it lists
    3  `NODE_param` (`31_seed`), or `Title.param` and the other targets of `--set`
    4  the only input of that name in the graph that is not fed by another node
    5  `prompt`, `image` and `seed`: where `--prompt`, `--image` and `--seed` would go

The first that knows the name decides; a name that nobody knows, or that several inputs have, is an error that lists
what could be meant. Values are `binding`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runcomfy.domain.exceptions import TargetAmbiguous, TargetUnknown, ValueInvalid, foreign_text
from runcomfy.domain.guess import PROMPT_INPUTS, guess_image, guess_prompt, guess_seeds
from runcomfy.domain.job import JobRequest
from runcomfy.domain.sidecar import NamedInput, Sidecar
from runcomfy.domain.workflow import Workflow, close_matches, is_link

Place = tuple[str, str]
"""(node id, input name)."""

FILE_INPUTS: Final = frozenset({"image", "mask", "video", "audio", "file", "model_file", "mesh"})
"""Inputs of loading nodes that name a file in the server's input folder."""
LISTED: Final = 60
"""Candidates shown in an error; all of them are in its details."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means."""

    places: tuple[Place, ...]
    named: NamedInput | None = None
    """The sidecar's entry, if it is one."""
    all_seeds: bool = False
    """Whether it stands for the workflow's seeds, each to be brought into its own range."""


def meaning_of(name: str, workflow: Workflow, sidecar: Sidecar, input_names: Mapping[str, str]) -> Meaning:
    """Return where the value of a name goes. Raises TargetUnknown, TargetAmbiguous."""
    if (target := input_names.get(name)) is not None:
        named = sidecar.inputs.get(target)
        return _of_sidecar(named, workflow) if named else Meaning((workflow.resolve(target),))
    if (named := sidecar.inputs.get(name)) is not None:
        return _of_sidecar(named, workflow)
    if name == "seed" and sidecar.seeds:
        return Meaning(tuple(workflow.resolve(seed.target) for seed in sidecar.seeds.values()), all_seeds=True)
    if found := _by_node(name, workflow):
        return Meaning((_only(name, found, workflow),))
    if "." in name and (place := _by_target(name, workflow)) is not None:
        return Meaning((place,))
    free = [(node.id, name) for node in workflow.nodes.values() if _is_free(workflow, node.inputs, name)]
    if len(free) == 1:
        return Meaning((free[0],))
    if (guess := _GUESSES.get(name)) is not None:
        return Meaning(_guessed(guess, name, free, workflow))
    if free:
        raise _ambiguous(name, free, workflow)
    raise _unknown(name, workflow, sidecar, input_names)


def _of_sidecar(named: NamedInput, workflow: Workflow) -> Meaning:
    return Meaning(tuple(workflow.resolve(target) for target in named.targets), named)


def _by_node(name: str, workflow: Workflow) -> list[Place]:
    """`NODE_param`, split in every way: ids and names of inputs may have underscores themselves."""
    splits = [(name[:at], name[at + 1 :]) for at, char in enumerate(name) if char == "_"]
    nodes = workflow.nodes
    return [(node_id, param) for node_id, param in splits if node_id in nodes and param in nodes[node_id].inputs]


def _by_target(name: str, workflow: Workflow) -> Place | None:
    """`Title.param`; None if it is none, so that the error can list what the job file could have said."""
    try:
        return workflow.resolve(name)
    except TargetUnknown:
        return None


def _is_free(workflow: Workflow, inputs: Mapping[str, Any], name: str) -> bool:
    return name in inputs and not is_link(inputs[name], workflow.graph)


def _seeds(workflow: Workflow) -> list[Place]:
    """Where `seed` goes in a graph that calls it something else."""
    found = guess_seeds(workflow)
    if not found:
        raise TargetUnknown("the workflow has no seed", hint="leave it out")
    if len(found) > 1:
        raise _ambiguous("seed", found, workflow)
    return found


_GUESSES: Final[Mapping[str, Callable[[Workflow], list[Place]]]] = {
    "prompt": guess_prompt,
    "image": lambda workflow: [guess_image(workflow)],
    "seed": _seeds,
}


def _guessed(
    guess: Callable[[Workflow], list[Place]], name: str, free: list[Place], workflow: Workflow
) -> tuple[Place, ...]:
    """Return what a person would mean by the name; where that is in doubt too, say what could be meant."""
    try:
        return tuple(guess(workflow))
    except TargetAmbiguous as error:
        if free:
            raise _ambiguous(name, free, workflow) from None
        candidates = [str(shown) for shown in error.details.get("candidates", ())]
        raise _in_doubt(name, candidates) from None
    except TargetUnknown as error:
        if free:
            raise _ambiguous(name, free, workflow) from None
        raise TargetUnknown(
            f"the workflow has no input that {name!r} could mean: {error.message}",
            hint=f"leave it out, or use one of: {_listed(_nodes_and_params(workflow))}",
            details={"name": name, "candidates": _nodes_and_params(workflow)},
        ) from None


def _only(name: str, found: Sequence[Place], workflow: Workflow) -> Place:
    if len(found) > 1:
        raise _ambiguous(name, found, workflow)
    return found[0]


def _ambiguous(name: str, found: Sequence[Place], workflow: Workflow) -> TargetAmbiguous:
    candidates = [
        f"{node_id}_{param} ({workflow.title(node_id)}, {workflow.nodes[node_id].class_type})"
        for node_id, param in found
    ]
    return _in_doubt(name, candidates)


def _in_doubt(name: str, candidates: Sequence[str]) -> TargetAmbiguous:
    return TargetAmbiguous(
        f"{foreign_text(name, 80)!r} could be {len(candidates)} inputs: {_listed(candidates, '; ')}",
        hint=f"name the node too, for example {foreign_text(candidates[0].split(' (')[0], 120)}" if candidates else "",
        details={"name": foreign_text(name), "candidates": list(candidates)},
    )


def _unknown(name: str, workflow: Workflow, sidecar: Sidecar, input_names: Mapping[str, str]) -> TargetUnknown:
    known = [*input_names, *sidecar.inputs]
    params = [param for node in workflow.nodes.values() for param in node.inputs]
    single = [param for param in dict.fromkeys(params) if _is_single(workflow, param)]
    candidates = list(dict.fromkeys([*known, *single, *_nodes_and_params(workflow)]))
    meant = close_matches(name, candidates)
    return TargetUnknown(
        f"the workflow has no input called {foreign_text(name, 80)!r}",
        hint=(f"did you mean {foreign_text(' or '.join(meant), 300)}? " if meant else "")
        + f"Its inputs: {_listed(candidates)}",
        details={"name": foreign_text(name), "candidates": candidates},
    )


def _is_single(workflow: Workflow, param: str) -> bool:
    return sum(_is_free(workflow, node.inputs, param) for node in workflow.nodes.values()) == 1


def _nodes_and_params(workflow: Workflow) -> list[str]:
    """Every input that takes a value, as `NODE_param`."""
    return [
        f"{node.id}_{param}"
        for node in workflow.nodes.values()
        for param in node.inputs
        if _is_free(workflow, node.inputs, param)
    ]


def _listed(candidates: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(candidates) - LISTED} more" if len(candidates) > LISTED else ""
    return foreign_text(between.join(candidates[:LISTED]), 2_000) + more


# --- what has to be there ---------------------------------------------------------------------------------


def check_required(request: JobRequest) -> None:
    """Make sure that every name in `required_inputs` has a value. Raises ValueInvalid naming those that have none."""
    given = [name for name, value in request.inputs.items() if value is not None]
    flags = {"prompt": request.prompt, "image": request.image, "seed": request.seed}
    names = [*given, *request.sets]
    missing = [name for name in request.required_inputs if flags.get(name) is None and not _is_given(name, names)]
    if missing:
        there = f"given are {_listed(given)}" if given else "there are none"
        raise ValueInvalid(
            f"required inputs are missing: {foreign_text(', '.join(missing), 500)}",
            hint=f"add them below inputs ({there})",
            details={"missing": missing},
        )


def _is_given(name: str, given: Collection[str]) -> bool:
    """Whether a name has a value, under its own name or with a node's before it.

    A required prompt is there if any name has `_text` or `prompt` in it, as E3's agent reads its own files.
    """
    if name in given or any(each.endswith((f"_{name}", f".{name}")) for each in given):
        return True
    return name == "prompt" and any("_text" in each or ".text" in each or "prompt" in each for each in given)


# --- what kind of value it takes --------------------------------------------------------------------------


def names_a_file(place: Place, workflow: Workflow, kind: str) -> bool:
    """Whether an input takes the name of a file in the server's input folder. `kind` is what the sidecar says of it."""
    if kind:
        return kind in ("image", "file")
    node_id, param = place
    return param in FILE_INPUTS and "load" in workflow.nodes[node_id].class_type.lower()


def holds_text(place: Place, workflow: Workflow, kind: str) -> bool:
    """Whether an input holds what a person writes, so that an `@` at its beginning is a part of it."""
    if kind:
        return kind == "text"
    return place[1] in PROMPT_INPUTS and isinstance(workflow.value(*place), str)
