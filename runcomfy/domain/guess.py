"""
Where the image, the prompt and the seeds go in a graph that nobody has described.

The rules are those a person would use looking at the graph, and they stop where a person would start to doubt: two
places that fit equally well are an error that lists them, never a choice made in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from runcomfy.domain.exceptions import TargetAmbiguous, TargetUnknown, foreign_text
from runcomfy.domain.workflow import Node, Workflow, is_link

Place = tuple[str, str]
"""(node id, input name)."""

PROMPT_INPUTS: Final = frozenset(
    {
        "text", "prompt", "positive_prompt", "positive", "caption", "string", "value",
        "clip_l", "clip_g", "t5xxl", "text_l", "text_g", "bert", "mt5xl", "llama", "qwen25_7b", "byt5",
    }
)  # fmt: skip
"""Inputs that hold what a person writes, as text encoders, string and prompt nodes name them."""

TEXT_CLASS_WORDS: Final = ("textencode", "prompt", "string", "text")
"""A class is a text node only with one of these in its name: `value` and `text` alone are used for anything."""

NOT_A_PROMPT: Final = ("save", "preview", "show", "display", "note", "negative", "regex", "replace")


def guess_seeds(workflow: Workflow) -> list[Place]:
    """Return the inputs named `seed` or `noise_seed` (also `x.seed`) that hold a whole number."""
    return [
        (node.id, name)
        for node in workflow.nodes.values()
        for name, value in node.inputs.items()
        if name.rpartition(".")[2] in ("seed", "noise_seed") and type(value) is int
    ]


def guess_image(workflow: Workflow) -> Place:
    """Return where an image goes: the only LoadImage node, else the only node with a text input `image`.

    Raises TargetUnknown, TargetAmbiguous.
    """
    holders = [node for node in workflow.nodes.values() if isinstance(node.inputs.get("image"), str)]
    loaders = [node for node in holders if node.class_type.startswith("LoadImage")]
    for group in ([node for node in loaders if node.class_type == "LoadImage"], loaders, holders):
        if len(group) == 1:
            return group[0].id, "image"
        if group:
            raise _doubt("image", [(node.id, "image") for node in group], workflow)
    raise TargetUnknown(
        "the workflow has no node that loads an image, so --image has nowhere to go",
        hint="leave --image out, or name the input: --set NODEID.input=@path/to/file",
    )


def guess_prompt(workflow: Workflow) -> list[Place]:
    """Return where a prompt goes: every text input of one node.

    That is the text node reached from a sampler's `positive` (or `conditioning`) link, through any nodes between;
    in a graph without such a link the only text node there is.

    Raises TargetUnknown, TargetAmbiguous.
    """
    for starts in _conditioning_links(workflow):
        found = _distinct(_reached(workflow, starts))
        if len(found) == 1:
            return found[0]
        if found:
            raise _doubt("prompt", [place for places in found for place in places], workflow)
    found = _distinct(
        places for node in workflow.nodes.values() if _is_text_node(node) and (places := _own_texts(node))
    )
    if len(found) == 1:
        return found[0]
    if found:
        raise _doubt("prompt", [place for places in found for place in places], workflow)
    raise TargetUnknown(
        "the workflow has no node that takes a prompt, so --prompt has nowhere to go",
        hint="leave --prompt out, or name the input: --set NODEID.input=TEXT",
    )


def _conditioning_links(workflow: Workflow) -> Iterable[list[str]]:
    """Groups of nodes that positive conditioning comes from, the surest group first."""
    sampling = ("sampler", "guider")
    positive = [link for link in workflow.links if link.input_name == "positive"]
    conditioning = [link for link in workflow.links if link.input_name == "conditioning"]
    for links in (
        [link for link in positive if any(w in workflow.nodes[link.node_id].class_type.lower() for w in sampling)],
        positive,
        [link for link in conditioning if any(w in workflow.nodes[link.node_id].class_type.lower() for w in sampling)],
        conditioning,
    ):
        if links:
            yield [link.source_id for link in links]


def _reached(workflow: Workflow, starts: Iterable[str]) -> Iterable[list[Place]]:
    """Walk upwards from conditioning; stop at every node that holds or is fed a prompt."""
    waiting, seen = list(starts), set[str]()
    while waiting:
        node = workflow.nodes[waiting.pop(0)]
        if node.id in seen:
            continue
        seen.add(node.id)
        places = _prompt_places(workflow, node)
        if places:
            yield places
            continue
        links = {name: value[0] for name, value in node.inputs.items() if is_link(value, workflow.graph)}
        # A node that passes both kinds on (ControlNet) says which is which; never walk into the negative one.
        waiting.extend(source for name, source in links.items() if not name.startswith("neg"))


def _prompt_places(workflow: Workflow, node: Node) -> list[Place]:
    """The texts a node is fed with: its own, or those of the nodes its text inputs are linked to."""
    if not _is_text_node(node):
        return []
    places = []
    for name, value in node.inputs.items():
        if name not in PROMPT_INPUTS:
            continue
        if isinstance(value, str):
            places.append((node.id, name))
        elif is_link(value, workflow.graph) and (source := _source_text(workflow, value[0])):
            places.append(source)
    return list(dict.fromkeys(places))


def _source_text(workflow: Workflow, node_id: str) -> Place | None:
    """Follow a text link to the one text it comes from; None where it forks."""
    for _ in range(len(workflow.nodes)):
        node = workflow.nodes[node_id]
        texts = _own_texts(node)
        if texts:
            return texts[0] if len(texts) == 1 else None
        linked = [v[0] for k, v in node.inputs.items() if k in PROMPT_INPUTS and is_link(v, workflow.graph)]
        if len(linked) != 1:
            return None
        node_id = linked[0]
    return None


def _own_texts(node: Node) -> list[Place]:
    return [(node.id, name) for name, value in node.inputs.items() if name in PROMPT_INPUTS and isinstance(value, str)]


def _is_text_node(node: Node) -> bool:
    lowered = node.class_type.lower()
    return any(word in lowered for word in TEXT_CLASS_WORDS) and not any(word in lowered for word in NOT_A_PROMPT)


def _distinct(groups: Iterable[list[Place]]) -> list[list[Place]]:
    return [list(group) for group in dict.fromkeys(tuple(group) for group in groups)]


def _doubt(what: str, places: list[Place], workflow: Workflow) -> TargetAmbiguous:
    shown = [
        f"{node_id}.{name} ({workflow.title(node_id)}, {workflow.nodes[node_id].class_type})"
        for node_id, name in places
    ]
    value = "@path/to/file" if what == "image" else "TEXT"
    return TargetAmbiguous(
        f"the {what} could go to {len(places)} inputs: {foreign_text('; '.join(shown), 1000)}",
        hint=f"say which: --set {foreign_text(shown[0].split(' (')[0], 120)}={value}",
        details={"candidates": shown},
    )
