"""
Can this machine run this graph? Every reason why not, before anything is submitted.

ComfyUI names one unknown class at a time and drops single outputs silently, so a machine that bills by the second
is a poor place to learn what is wrong. The rules here are those of ComfyUI's own validation (execution.py, 0.3.64 to
0.38), applied to its node list (`/object_info`): only nodes that an output node needs are judged, numbers in quotes
are converted, inputs nobody knows are passed over. The node list does not show which inputs a node checks by itself,
nor the files that were just uploaded; where that or anything else is unclear the graph passes: the server has the
last word, and a graph that it would run must never be refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runcomfy.domain.exceptions import PreflightFailed, foreign_text
from runcomfy.domain.workflow import close_matches

MAX_INPUTS: Final = 10_000
"""Inputs of one node after dynamic ones are unfolded; real nodes have at most some hundreds."""

MAX_NESTING: Final = 8
"""Depth of choices within choices."""

MODEL_EXTENSIONS: Final = (".safetensors", ".sft", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl", ".gguf", ".onnx")

FOLDER_BY_INPUT: Final[Mapping[str, str]] = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "vae": "vae",
    "controlnet_path": "xlabs/controlnets",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "clip_name3": "text_encoders",
    "lora_name": "loras",
    "control_net_name": "controlnet",
    "style_model_name": "style_models",
    "gligen_name": "gligen",
    "hypernetwork_name": "hypernetworks",
    "upscale_model": "upscale_models",
}

FOLDER_BY_CLASS: Final[Mapping[str, str]] = {
    "CLIPVisionLoader": "clip_vision",
    "UpscaleModelLoader": "upscale_models",
    "PhotoMakerLoader": "photomaker",
    "AudioEncoderLoader": "audio_encoders",
    "ModelPatchLoader": "model_patches",
    "PartPacker_Loader.checkpoint": "PartPacker",
}
"""Where the input's name does not tell, or tells wrongly."""

STALE_LISTS: Final = frozenset({("LoadLatent", "latent")})
"""Inputs whose class checks the file itself although nothing in the node list says so."""

PAGE_ONLY: Final[Mapping[str, str]] = {
    "Note": "it is a note for readers; delete it",
    "MarkdownNote": "it is a note for readers; delete it",
    "Reroute": "it exists on the page only; export the workflow again with Export (API)",
    "PrimitiveNode": "it exists on the page only; export the workflow again with Export (API)",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why the graph cannot run there. `code` is stable; `node_id` is empty if no single node is meant."""

    node_id: str
    title: str
    class_type: str
    input_name: str
    code: str
    """unknown-class, input-missing, value-too-small, value-too-large, value-unreadable, value-not-in-list,
    missing-model, bad-link, no-output."""
    message: str
    hint: str

    def as_dict(self) -> dict[str, str]:
        """Return the problem as it appears in `--json`."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file that the graph names."""

    node_id: str
    input_name: str
    file: str
    folder: str
    """Below the server's `models` folder; empty if it cannot be told."""


@dataclass(frozen=True, slots=True)
class FileToCheck:
    """A file that the graph expects in the server's own folders; its list of files may be old."""

    node_id: str
    input_name: str
    name: str
    """As the widget holds it: `a.png`, `folder/a.png`, `a.png [output]`."""


def preflight(
    graph: Mapping[str, Any],
    node_info: Mapping[str, Any],
    *,
    uploads: Collection[tuple[str, str]] = (),
    class_names: Collection[str] = (),
) -> list[Problem]:
    """Return everything that the server's node list says against the graph; empty if it should run.

    `node_info` needs the entries of the classes used; a class without one is one the server does not have. `uploads`
    are inputs, as (node id, input name), whose files are still to be sent. `class_names`, if known, is every class
    of the server, for "did you mean". Never raises, whatever the server's list looks like.
    """
    check = _Check(graph, node_info, set(uploads), class_names)
    check.run()
    return check.problems


def files_to_check(
    graph: Mapping[str, Any], node_info: Mapping[str, Any], *, uploads: Collection[tuple[str, str]] = ()
) -> list[FileToCheck]:
    """Return the files the graph takes from the server's folders, which only a look at these can confirm."""
    check = _Check(graph, node_info, set(uploads), ())
    check.run()
    return check.files


def model_files(graph: Mapping[str, Any]) -> list[ModelFile]:
    """Return the model files that the graph names, as far as their names tell."""
    return [
        ModelFile(node_id, name, value, _folder(str(raw.get("class_type", "")), name))
        for node_id, raw in graph.items()
        for name, value in raw.get("inputs", {}).items()
        if isinstance(value, str) and value.lower().endswith(MODEL_EXTENSIONS)
    ]


def require_runnable(problems: Sequence[Problem], *, where: str = "the server") -> None:
    """Raise PreflightFailed if there are any problems; the message names the first ones, `details` all of them."""
    if not problems:
        return
    shown = "; ".join(f"{problem.message}" for problem in problems[:3])
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise PreflightFailed(
        f"{where} cannot run the workflow: {shown}{more}",
        hint=next((problem.hint for problem in problems if problem.hint), ""),
        details={"problems": [problem.as_dict() for problem in problems]},
    )


@dataclass(frozen=True, slots=True)
class _Spec:
    """What the node list says of one input."""

    name: str
    type: Any
    """A type's name, or the list of choices."""
    options: Mapping[str, Any]
    required: bool

    @property
    def choices(self) -> list[Any] | None:
        """The choices in either spelling; None if the input is not a choice, or its choices are not known."""
        if isinstance(self.type, list):
            return self.type
        found = self.options.get("options") if self.type == "COMBO" else None
        return found if isinstance(found, list) else None

    @property
    def is_upload(self) -> bool:
        """Whether the choices are files that may have come since the list was made."""
        return any(str(key).endswith("_upload") and value for key, value in self.options.items())

    @property
    def is_remote(self) -> bool:
        """Whether the page, not the server, fetches the choices."""
        return bool(self.options.get("remote") or self.options.get("remote_combo"))


class _Check:
    def __init__(
        self,
        graph: Mapping[str, Any],
        node_info: Mapping[str, Any],
        uploads: set[tuple[str, str]],
        class_names: Collection[str],
    ) -> None:
        self._graph = graph
        self._info = node_info
        self._uploads = uploads
        self._class_names = class_names
        self.problems: list[Problem] = []
        self.files: list[FileToCheck] = []

    def run(self) -> None:
        unknown = [node_id for node_id in self._graph if self._entry(node_id) is None]
        for node_id in unknown:
            self._unknown_class(node_id)
        outputs = [node_id for node_id in self._graph if (self._entry(node_id) or {}).get("output_node") is True]
        if not outputs and not unknown:
            self.problems.append(
                Problem(
                    "", "", "", "", "no-output",
                    "no node of the workflow saves or shows anything, so ComfyUI would refuse it",
                    "add an output node such as SaveImage",
                )
            )  # fmt: skip
        # What hangs below an unknown class is judged too: it may well be the output node.
        specs = {node_id: list(self._specs(node_id)) for node_id in self._needed([*outputs, *unknown])}
        for node_id in self._graph:  # the file's order, which is the one people know
            for spec in specs.get(node_id, ()):
                self._input(node_id, spec)

    def _unknown_class(self, node_id: str) -> None:
        class_type = self._class(node_id)
        hint = PAGE_ONLY.get(class_type, "install the node pack that has it, or use another machine image")
        meant = close_matches(class_type, {*self._class_names, *self._info} - {class_type})
        if meant and class_type not in PAGE_ONLY:
            hint = f"did you mean {' or '.join(foreign_text(name, 60) for name in meant)}? Otherwise {hint}"
        self._add(node_id, "", "unknown-class", f"the server has no node class {_shown(class_type)}", hint)

    def _needed(self, starts: Sequence[str]) -> set[str]:
        """The nodes that these need, themselves included: the server looks at no others."""
        needed: set[str] = set()
        waiting = list(starts)
        while waiting:
            node_id = waiting.pop()
            if node_id in needed:
                continue
            needed.add(node_id)
            inputs = self._inputs(node_id)
            known = {spec.name for spec in self._specs(node_id)} if self._entry(node_id) is not None else set(inputs)
            for name, value in inputs.items():
                if name in known and isinstance(value, list) and len(value) == 2 and self._is_node(value[0]):
                    waiting.append(value[0])
        return needed

    # --- one input ----------------------------------------------------------------------------------------

    def _input(self, node_id: str, spec: _Spec) -> None:
        inputs = self._inputs(node_id)
        if spec.name not in inputs:
            if spec.required:
                self._add(
                    node_id,
                    spec.name,
                    "input-missing",
                    f"its input {_shown(spec.name)} is missing",
                    f"add it: --set +{foreign_text(node_id, 60)}.{foreign_text(spec.name, 80)}=… ({_type_words(spec)})",
                )
            return
        if (node_id, spec.name) in self._uploads:
            return
        value = inputs[spec.name]
        if isinstance(value, list):
            self._link(node_id, spec, value)
        else:
            self._value(node_id, spec, value)

    def _link(self, node_id: str, spec: _Spec, value: list[Any]) -> None:
        def bad(said: str, hint: str = "correct the link, or export the workflow again") -> None:
            self._add(node_id, spec.name, "bad-link", f"its input {_shown(spec.name)} {said}", hint)

        if len(value) != 2:
            bad("is a list that is no link", 'a list as a value is written {"__value__": [...]}')
        elif not self._is_node(value[0]):
            bad(f"links to node {_shown(value[0])}, which is not in the graph")
        elif (source := self._entry(value[0])) is None:
            return  # its class is unknown and reported as such
        elif isinstance(outputs := source.get("output"), list):
            slot = value[1]
            source_name = self._name(value[0])
            if type(slot) is not int or not -len(outputs) <= slot < len(outputs):
                has = f"has {len(outputs)}" if outputs else "delivers nothing"
                bad(f"takes output {_shown(slot)} of {source_name}, which {has}")
            elif not _types_fit(outputs[slot], spec.type):
                bad(
                    f"needs {_type_words(spec)}, but output {slot} of {source_name} is {_shown(outputs[slot])}",
                    "link it to an output of the right type",
                )

    def _value(self, node_id: str, spec: _Spec, value: Any) -> None:
        if isinstance(value, dict) and "__value__" in value:
            value = value["__value__"]
        convert = CONVERSIONS.get(spec.type) if isinstance(spec.type, str) else None
        if convert is not None:
            try:
                value = convert(value)
            except (TypeError, ValueError, OverflowError):
                self._add(
                    node_id,
                    spec.name,
                    "value-unreadable",
                    f"its input {_shown(spec.name)} cannot be {_shown(value)}: it takes {_type_words(spec)}",
                    "give a whole number" if spec.type == "INT" else "give a number",
                )
                return
        if not self._out_of_range(node_id, spec, value):
            self._choice(node_id, spec, value)

    def _out_of_range(self, node_id: str, spec: _Spec, value: Any) -> bool:
        low, high = spec.options.get("min"), spec.options.get("max")
        if not isinstance(value, (int, float)):
            return False
        target = f"{foreign_text(node_id, 60)}.{foreign_text(spec.name, 80)}"
        if isinstance(low, (int, float)) and value < low:
            code, said, hint = "value-too-small", f"smaller than {low}", f"choose at least {low}: --set {target}={low}"
        elif isinstance(high, (int, float)) and value > high:
            code, said, hint = "value-too-large", f"larger than {high}", f"choose at most {high}: --set {target}={high}"
        else:
            return False
        self._add(node_id, spec.name, code, f"its input {_shown(spec.name)} is {_shown(value)}, {said}", hint)
        return True

    def _choice(self, node_id: str, spec: _Spec, value: Any) -> None:
        choices = spec.choices
        is_file = spec.is_upload or (self._class(node_id), spec.name) in STALE_LISTS
        if is_file and isinstance(value, str):
            self.files.append(FileToCheck(node_id, spec.name, value))
            return
        if choices is None or is_file or spec.is_remote:
            return
        several = isinstance(value, list) and any(
            str(key).startswith("multi") and flag for key, flag in spec.options.items()
        )
        for item in value if several else [value]:
            if item not in choices:
                self._not_in_list(node_id, spec, item, choices)
                return

    def _not_in_list(self, node_id: str, spec: _Spec, value: Any, choices: Sequence[Any]) -> None:
        names = [item for item in choices if isinstance(item, str)]
        meant = close_matches(value, names) if isinstance(value, str) else []
        did_you_mean = f"did you mean {' or '.join(foreign_text(name, 120) for name in meant)}? " if meant else ""
        if _is_model(value, names):
            folder = _folder(self._class(node_id), spec.name)
            where = f"models/{folder}" if folder else "the folder this node reads its models from"
            self._add(
                node_id,
                spec.name,
                "missing-model",
                f"the model {_shown(value)} ({foreign_text(spec.name, 60)}) is not on the server",
                f"{did_you_mean}Put the file into {where} on the machine, or choose one it has"
                + (f": {_some(names)}" if names else " (it has none)"),
            )
            return
        self._add(
            node_id,
            spec.name,
            "value-not-in-list",
            f"its input {_shown(spec.name)} cannot be {_shown(value)}",
            did_you_mean + (f"Choose one of: {_some(choices)}" if choices else "the server offers no choice at all"),
        )

    # --- the node list ------------------------------------------------------------------------------------

    def _specs(self, node_id: str) -> Iterator[_Spec]:
        """The inputs the server would look at, with dynamic ones unfolded as this node uses them."""
        entry = self._entry(node_id)
        groups = entry.get("input") if entry is not None else None
        found: dict[str, _Spec] = {}
        for spec in _unfold(groups, self._inputs(node_id), "", 0):
            kept = found.get(spec.name)
            if kept is None or (spec.required and not kept.required):
                found[spec.name] = spec
            if len(found) >= MAX_INPUTS:
                break
        yield from found.values()

    def _entry(self, node_id: str) -> Mapping[str, Any] | None:
        entry = self._info.get(self._class(node_id))
        return entry if isinstance(entry, Mapping) else None

    def _class(self, node_id: str) -> str:
        return str(self._graph[node_id].get("class_type", ""))

    def _inputs(self, node_id: str) -> Mapping[str, Any]:
        inputs = self._graph[node_id].get("inputs")
        return inputs if isinstance(inputs, Mapping) else {}

    def _is_node(self, node_id: Any) -> bool:
        return isinstance(node_id, str) and node_id in self._graph

    def _title(self, node_id: str) -> str:
        meta = self._graph[node_id].get("_meta")
        title = meta.get("title") if isinstance(meta, Mapping) else None
        return foreign_text(title if isinstance(title, str) and title else self._class(node_id), 120)

    def _name(self, node_id: str) -> str:
        return f"node {foreign_text(node_id, 60)} ({self._title(node_id)})"

    def _add(self, node_id: str, input_name: str, code: str, said: str, hint: str) -> None:
        self.problems.append(
            Problem(
                node_id=node_id,
                title=self._title(node_id),
                class_type=foreign_text(self._class(node_id), 120),
                input_name=input_name,
                code=code,
                message=f"{self._name(node_id)}: {said}",
                hint=foreign_text(hint, 600),
            )
        )


CONVERSIONS: Final[Mapping[str, Callable[[Any], Any]]] = {"INT": int, "FLOAT": float}
"""What the server does to literals before it judges them; texts and truth values accept anything."""


def _unfold(groups: Any, inputs: Mapping[str, Any], prefix: str, depth: int) -> Iterator[_Spec]:
    """Yield the inputs of a node list's `input` object, nested ones by their dotted names."""
    if not isinstance(groups, Mapping) or depth > MAX_NESTING:
        return
    for group in ("required", "optional"):
        members = groups.get(group)
        if not isinstance(members, Mapping):
            continue
        for short, raw in members.items():
            if not isinstance(short, str) or not isinstance(raw, (list, tuple)) or not raw:
                continue
            options = raw[1] if len(raw) > 1 and isinstance(raw[1], Mapping) else {}
            spec = _Spec(prefix + short, raw[0], options, group == "required")
            if spec.type == "COMFY_DYNAMICCOMBO_V3":
                yield from _unfold_choice(spec, inputs, depth)
            elif spec.type == "COMFY_AUTOGROW_V3":
                yield from _unfold_autogrow(spec)
            elif spec.type == "COMFY_DYNAMICSLOT_V3":
                if spec.name in inputs:
                    yield _Spec(spec.name, "*", {}, required=False)
                    yield from _unfold(options.get("inputs"), inputs, f"{spec.name}.", depth + 1)
            else:
                yield spec


def _unfold_choice(spec: _Spec, inputs: Mapping[str, Any], depth: int) -> Iterator[_Spec]:
    """A choice that brings inputs of its own. The server ignores one that is absent or unknown, and so do we."""
    chosen = inputs.get(spec.name)
    choices = spec.options.get("options")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, Mapping) and "key" in choice and choice["key"] == chosen:
            yield _Spec(spec.name, "*", {}, required=False)
            yield from _unfold(choice.get("inputs"), inputs, f"{spec.name}.", depth + 1)
            return


def _unfold_autogrow(spec: _Spec) -> Iterator[_Spec]:
    """A row of like inputs, of which the first `min` are required."""
    template = spec.options.get("template")
    if not isinstance(template, Mapping):
        return
    names, prefix = template.get("names"), template.get("prefix")
    least, most = template.get("min"), template.get("max")
    if isinstance(names, list):
        members = [name for name in names if isinstance(name, str)]
    elif isinstance(prefix, str) and type(most) is int:
        members = [f"{prefix}{number}" for number in range(min(most, MAX_INPUTS))]
    else:
        return
    groups = template.get("input")
    for group, inner in groups.items() if isinstance(groups, Mapping) else ():
        if not isinstance(inner, Mapping) or not inner:
            continue
        raw = next(iter(inner.values()))
        if not isinstance(raw, (list, tuple)) or not raw:
            return
        options = raw[1] if len(raw) > 1 and isinstance(raw[1], Mapping) else {}
        for number, name in enumerate(members):
            needed = group == "required" and type(least) is int and number < least
            yield _Spec(f"{spec.name}.{name}", raw[0], options, needed)
        return


def _types_fit(received: Any, wanted: Any) -> bool:
    """Whether an output may feed an input: equal, a wildcard, or unions (`MESH,FILE_3D`) with a type in common."""
    if received == wanted:
        return True
    sides = []
    for side in (received, wanted):
        if isinstance(side, str):
            types = {word.strip() for word in side.split(",")}
            if any("*" in word or word == "COMFY_MATCHTYPE_V3" for word in types):
                return True
            sides.append(types)
        elif not isinstance(side, list):
            return True  # not a type anybody knows
    if len(sides) < 2:
        # A list of choices and a named type: text does not fit a choice. Two lists are for the server to compare.
        return bool(sides) is False or "COMBO" in sides[0]
    return bool(sides[0] & sides[1])


def _folder(class_type: str, input_name: str) -> str:
    if class_type.endswith("Preprocessor"):
        return ""  # these fetch their models themselves, into a folder of their own
    by_class = FOLDER_BY_CLASS.get(f"{class_type}.{input_name}") or FOLDER_BY_CLASS.get(class_type)
    return by_class or FOLDER_BY_INPUT.get(input_name, "")


def _is_model(value: Any, choices: Sequence[str]) -> bool:
    if not isinstance(value, str):
        return False
    if value.lower().endswith(MODEL_EXTENSIONS):
        return True
    models = sum(choice.lower().endswith(MODEL_EXTENSIONS) for choice in choices)
    return bool(models) and models * 2 > len(choices)


def _type_words(spec: _Spec) -> str:
    if spec.choices is not None:
        return f"one of {_some(spec.choices)}" if spec.choices else "a choice"
    words = {"INT": "a whole number", "FLOAT": "a number", "STRING": "a text", "BOOLEAN": "true or false"}
    if not isinstance(spec.type, str):
        return "a choice"
    return words.get(spec.type, _shown(spec.type))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "a choice" if value else "an empty list"
    return foreign_text(repr(value) if isinstance(value, str) else value, 120)


def _some(choices: Sequence[Any]) -> str:
    shown = ", ".join(foreign_text(choice, 60) for choice in choices[:8])
    return f"{shown} and {len(choices) - 8} more" if len(choices) > 8 else shown
