"""
What the user wants, put into the graph: the image, the prompt, seeds, and every `--set`.

`bind` decides nothing that a sidecar has already said; without one it looks for the places people mean (`guess`).
The result is a value: a graph of its own, what must be uploaded first, which seeds were used, which results are
promised. Where numbers fall outside what a node takes is for `preflight` to say, except for seeds that we chose
ourselves: `fit_seeds` moves those into the range of the machine's own node list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from runcomfy.domain.exceptions import BadInput, TargetUnknown, ValueInvalid, WorkflowInvalid, foreign_text
from runcomfy.domain.guess import guess_image, guess_prompt, guess_seeds
from runcomfy.domain.job import JobRequest
from runcomfy.domain.named_inputs import Meaning, check_required, holds_text, meaning_of, names_a_file
from runcomfy.domain.sidecar import NamedInput, SeedRange, Sidecar, fits_range
from runcomfy.domain.workflow import (
    Graph,
    Workflow,
    canonical_sha256,
    check_cycles,
    close_matches,
    copy_json,
    is_link,
    plain_json,
)
from runcomfy.domain.workflow_io import DeclaredOutput

RANDOM_SEED_MAX: Final = 2**32 - 1
"""What a seed is drawn from where nobody says more: every seed node known takes at least these, or says its range."""

GIVEN_SEED_MAX: Final = 2**64 - 1
"""The largest seed ComfyUI's own samplers take; a given seed is used as it is up to here."""

Place = tuple[str, str]
"""(node id, input name)."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of this computer that has to be on the server before the graph can run."""

    node_id: str
    input_name: str
    path: str
    """As the user gave it."""
    kind: str
    """`image` if it must be a picture, else `file`."""


@dataclass(frozen=True, slots=True)
class Applied:
    """One value that was put into the graph."""

    target: str
    """`node id.input`."""
    value: Any
    source: str
    """What asked for it: `--image`, `--prompt`, `--seed`, `random`, `default`, `inputs.NAME` or `--set TARGET`."""


@dataclass(frozen=True)
class BoundWorkflow:
    """A graph with everything in its place. `graph` belongs to this value; do not change it."""

    graph: Graph = field(repr=False)
    """Inputs that wait for an upload hold `@path`; `with_uploads` puts in the names the server gave."""
    uploads: tuple[Upload, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)
    """Every seed the graph runs with: `node id.input` -> value, chosen by us or given."""
    declared: tuple[DeclaredOutput, ...] = ()
    applied: tuple[Applied, ...] = ()
    name: str = ""
    free_seeds: frozenset[Place] = frozenset()
    """(node id, input) of seeds that we put in and whose range nobody stated; see `fit_seeds`."""

    @cached_property
    def sha256(self) -> str:
        """Of the bound graph as canonical JSON, before uploads got their names."""
        return canonical_sha256(self.graph)

    @property
    def waiting(self) -> frozenset[Place]:
        """Return (node id, input name) of every input that waits for its upload."""
        return frozenset((upload.node_id, upload.input_name) for upload in self.uploads)

    def with_uploads(self, names: Mapping[Upload, str]) -> Graph:
        """Return the graph to submit: a copy in which every upload is named as the server named it.

        Raises ValueInvalid if an upload has no name yet.
        """
        graph: Graph = copy_json(self.graph)
        for upload in self.uploads:
            name = names.get(upload)
            if not name:
                raise ValueInvalid(f"{foreign_text(upload.path)} was not uploaded", hint="upload it before submitting")
            graph[upload.node_id]["inputs"][upload.input_name] = name
        return graph


def bind(
    workflow: Workflow,
    sidecar: Sidecar | None,
    request: JobRequest,
    *,
    random_int: Callable[[int, int], int],
    files: Collection[str] = (),
) -> BoundWorkflow:
    """Return the graph with the request in it; the workflow itself is not touched.

    `random_int(low, high)` draws a seed, both ends included. Later wins: what the file holds, the sidecar's
    defaults, `image`, `prompt` and `seed`, then every `inputs`, then every `sets`. Inputs that are links are left
    alone, except by `sets` and by names that say the node. `files`: values of `inputs` that are files of this
    computer; where an input takes a file they are uploaded, any other text is a name that the server knows.

    Raises BadInput (required inputs missing), TargetUnknown, TargetAmbiguous, ValueInvalid.
    """
    check_required(request)
    binder = _Binder(workflow, sidecar or Sidecar(), random_int)
    binder.defaults()
    if request.image is not None:
        binder.image(request.image)
    if request.prompt is not None:
        binder.prompt(request.prompt)
    named = binder.meanings(request)
    sets = binder.resolved(request.sets)
    skip = {place for meaning, _, _ in named if not meaning.all_seeds for place in meaning.places}
    seed = next((binder.seed_value(value) for meaning, value, _ in named if meaning.all_seeds), request.seed)
    binder.seeds(seed, skip=skip | {place for places, _, _ in sets for place in places})
    for meaning, value, name in named:
        if not meaning.all_seeds:
            binder.named(meaning, value, name, files)
    for places, value, key in sets:
        binder.set(places, value, key)
    binder.require(by_name=bool(request.inputs))
    return binder.result()


def fit_seeds(bound: BoundWorkflow, node_info: Mapping[str, Any]) -> BoundWorkflow:
    """Return the same with every seed of unstated range moved into the range that the machine's node list gives.

    Never raises for a strange node list: a seed whose range cannot be read stays as it is.
    """
    moved: dict[str, int] = {}
    graph = bound.graph
    for node_id, input_name in bound.free_seeds:
        value = bound.seeds.get(f"{node_id}.{input_name}")
        limits = _seed_limits(node_info, graph[node_id]["class_type"], input_name)
        if value is None or limits is None:
            continue
        fitted = into_range(value, *limits)
        if fitted != value:
            if not moved:
                graph = copy_json(graph)
            graph[node_id]["inputs"][input_name] = fitted
            moved[f"{node_id}.{input_name}"] = fitted
    if not moved:
        return bound
    applied = tuple(replace(a, value=moved[a.target]) if a.target in moved else a for a in bound.applied)
    return replace(bound, graph=graph, seeds={**bound.seeds, **moved}, applied=applied)


def into_range(seed: int, minimum: int, maximum: int) -> int:
    """Return the seed itself if the range has it, else the one value of the range it always stands for."""
    return (seed - minimum) % (maximum - minimum + 1) + minimum


def parse_value(text: str, current: Any = None, graph: Mapping[str, Any] | None = None) -> Any:
    """Return what a text of the command line means for an input that holds `current` now.

    JSON if it is JSON, else the text itself. Where the input holds a text, a number, `true`, `null`, an object or a
    list stays text (a prompt may well be `42`); a link to a node of `graph` and a quoted text do not. A list that is
    no link is wrapped the way ComfyUI wants list values. `@@…` is a text that begins with one `@`; `@path` is an
    upload and not for this function.

    Raises ValueInvalid for NaN and infinities, which JSON and ComfyUI do not know.
    """
    if text.startswith("@@"):
        return text[1:]
    try:
        value = json.loads(text, parse_constant=_not_finite)
    except (ValueError, RecursionError):
        return text
    if isinstance(current, str) and not isinstance(value, str) and not is_link(value, graph or {}):
        return text
    return _value(value, graph or {}, text)


def _not_finite(word: str) -> float:
    # Refused only once it is sure that the whole is JSON: "NaN" in a sentence is a word like any other.
    return {"NaN": math.nan, "Infinity": math.inf}.get(word, -math.inf)


def _value(value: Any, graph: Mapping[str, Any], shown: str) -> Any:
    """Return a value as it goes into an input; refuse what ComfyUI cannot read."""
    try:
        plain = plain_json(value, "")
    except WorkflowInvalid:
        raise ValueInvalid(
            f"{foreign_text(shown, 80)} cannot be sent: it is not JSON, too deep, or a number in it is not finite",
            hint="use texts, finite numbers, true, false, null, lists and objects",
        ) from None
    if isinstance(plain, list) and not is_link(plain, graph):
        return {"__value__": plain}
    return plain


def _seed_limits(node_info: Mapping[str, Any], class_type: str, input_name: str) -> tuple[int, int] | None:
    info = node_info.get(class_type)
    groups = info.get("input") if isinstance(info, Mapping) else None
    for group in ("required", "optional"):
        inputs = groups.get(group) if isinstance(groups, Mapping) else None
        spec = inputs.get(input_name) if isinstance(inputs, Mapping) else None
        options = spec[1] if isinstance(spec, (list, tuple)) and len(spec) > 1 else None
        if isinstance(options, Mapping):
            low, high = options.get("min", 0), options.get("max", GIVEN_SEED_MAX)
            if type(low) is int and type(high) is int and low <= high:
                return low, high
    return None


class _Binder:
    """Collects what goes where; one use."""

    def __init__(self, workflow: Workflow, sidecar: Sidecar, random_int: Callable[[int, int], int]) -> None:
        self._workflow = workflow
        self._sidecar = sidecar
        self._random_int = random_int
        self._graph: Graph = copy_json(workflow.graph)
        self._touched: set[Place] = set()
        self._uploads: dict[Place, Upload] = {}
        self._applied: dict[Place, Applied] = {}
        self._free_seeds: set[Place] = set()
        self._seed_places: set[Place] = set()
        self._relinked = False
        kinds = {"image": "image", "file": "file"}
        self._kinds = {
            workflow.resolve(target): kinds.get(item.kind, "")
            for item in sidecar.inputs.values()
            for target in item.targets
        }

    # --- what is asked for --------------------------------------------------------------------------------

    def defaults(self) -> None:
        for key, value in self._sidecar.defaults.items():
            for place in self._places(key):
                self._put(place, _value(value, self._graph, str(value)), "default", touch=False)

    def image(self, path: str) -> None:
        named = self._named("image")
        places = self._targets(named) if named else [guess_image(self._workflow)]
        for place in self._unlinked(places, "--image"):
            self._upload(place, path, "image", "--image")

    def prompt(self, text: str) -> None:
        named = self._named("text", prefer="prompt")
        places = self._targets(named) if named else guess_prompt(self._workflow)
        for place in self._unlinked(places, "--prompt"):
            self._put(place, text, "--prompt")

    def seeds(self, given: int | None, *, skip: Collection[Place]) -> None:
        for place, stated in self._seed_ranges():
            self._seed_places.add(place)
            if place in skip or is_link(self._held(place), self._graph):
                continue
            if stated is None:
                self._free_seeds.add(place)
            if given is not None:
                low, high = (stated.minimum, stated.maximum) if stated else (0, GIVEN_SEED_MAX)
                self._put(place, into_range(given, low, high), "--seed")
            else:
                low, high = (stated.minimum, stated.maximum) if stated else (0, RANDOM_SEED_MAX)
                self._put(place, self._random_int(low, high), "random")

    def resolved(self, sets: Mapping[str, Any]) -> list[tuple[list[Place], Any, str]]:
        return [(self._places(key, from_user=True), value, key) for key, value in sets.items()]

    def meanings(self, request: JobRequest) -> list[tuple[Meaning, Any, str]]:
        """Return what the names of `inputs` mean; a name without a value counts as left out."""
        return [
            (meaning_of(name, self._workflow, self._sidecar, request.input_names), value, name)
            for name, value in request.inputs.items()
            if value is not None
        ]

    def seed_value(self, value: Any) -> int:
        """Return the seed that a job file gives."""
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) <= 20:
            value = int(value)
        if type(value) is not int:
            raise ValueInvalid(
                f"seed = {foreign_text(value, 60)!r} is not a whole number", hint="leave it out for a random one"
            )
        return value

    def named(self, meaning: Meaning, value: Any, name: str, files: Collection[str]) -> None:
        """Put the value of one of `inputs` where it goes."""
        source, item = f"inputs.{foreign_text(name, 80)}", meaning.named
        for place in meaning.places:
            kind = item.kind if item else self._kinds.get(place, "")
            if isinstance(value, str) and not holds_text(place, self._workflow, kind):
                if value.startswith("@") and not value.startswith("@@"):
                    self._upload(place, value[1:], self._kind_of(place), source)
                    continue
                if value in files and names_a_file(place, self._workflow, kind):
                    self._upload(place, value, self._kind_of(place), source)
                    continue
                value = value.removeprefix("@") if value.startswith("@@") else value
            if not (isinstance(value, str) and isinstance(self._workflow.value(*place), str)):
                value = self._parsed(place, value)
                _check_range(item, value, name)
            self._put(place, value, source)

    def set(self, places: list[Place], value: Any, key: str) -> None:
        source = f"--set {key}"
        named = self._sidecar.inputs.get(key)
        for place in places:
            if isinstance(value, str) and value.startswith("@") and not value.startswith("@@"):
                self._upload(place, value[1:], self._kind_of(place), source)
                continue
            final = self._parsed(place, value)
            _check_range(named, final, key)
            self._put(place, final, source)

    def require(self, *, by_name: bool = False) -> None:
        """Make sure that what the sidecar calls required was given. `by_name`: the request has names, not options."""
        missing = [item for item in self._sidecar.inputs.values() if item.required and not self._given(item)]
        if missing:
            flags = [item.name if by_name else _flag(item) for item in missing]
            raise BadInput(
                f"{self._workflow.name or 'the workflow'} needs {' and '.join(flags)}",
                hint="; ".join(
                    f"{flag}: {item.description or item.kind}" for flag, item in zip(flags, missing, strict=True)
                ),
                details={"missing": [item.name for item in missing]},
            )

    def _given(self, item: NamedInput) -> bool:
        places = self._targets(item)
        # A target that was linked to another node by --set is given too.
        return all(place in self._touched or is_link(self._held(place), self._graph) for place in places)

    def result(self) -> BoundWorkflow:
        if self._relinked:
            check_cycles(self._graph, "the workflow with the links of --set")
        held = {place: self._held(place) for place in sorted(self._seed_places)}
        return BoundWorkflow(
            graph=self._graph,
            uploads=tuple(self._uploads.values()),
            seeds={_target(place): value for place, value in held.items() if type(value) is int},
            declared=tuple(
                DeclaredOutput(
                    name=item.name,
                    node_id=(node_id := self._workflow.find_node(item.node)),
                    kind=item.kind,
                    file_name=item.file,
                    required=item.required,
                    title=self._workflow.title(node_id),
                )
                for item in self._sidecar.outputs.values()
            ),
            applied=tuple(self._applied.values()),
            name=self._workflow.name,
            free_seeds=frozenset(self._free_seeds),
        )

    # --- places -------------------------------------------------------------------------------------------

    def _named(self, kind: str, prefer: str = "") -> NamedInput | None:
        """The sidecar's input for `--image` or `--prompt`: by name, or the only one of that kind."""
        by_name = self._sidecar.inputs.get(prefer or kind)
        if by_name and by_name.kind == kind:
            return by_name
        of_kind = [item for item in self._sidecar.inputs.values() if item.kind == kind]
        return of_kind[0] if len(of_kind) == 1 else None

    def _targets(self, item: NamedInput) -> list[Place]:
        return [self._workflow.resolve(target) for target in item.targets]

    def _places(self, key: str, *, from_user: bool = False) -> list[Place]:
        """Where a key of `sets` or of the defaults points: a named input of the sidecar, or a target."""
        named = self._sidecar.inputs.get(key)
        if named:
            return self._targets(named)
        try:
            return [self._workflow.resolve(key)]
        except TargetUnknown as error:
            meant = close_matches(key, self._sidecar.inputs) if from_user else []
            if meant and "." not in key:
                raise TargetUnknown(error.message, hint=f"did you mean {' or '.join(meant)}?") from None
            raise

    def _seed_ranges(self) -> list[tuple[Place, SeedRange | None]]:
        stated = {self._workflow.resolve(seed.target): seed for seed in self._sidecar.seeds.values()}
        if stated:
            return list(stated.items())
        return [(place, None) for place in guess_seeds(self._workflow)]

    def _unlinked(self, places: Collection[Place], flag: str) -> list[Place]:
        free = [place for place in places if not is_link(self._held(place), self._graph)]
        if places and not free:
            shown = ", ".join(_target(place) for place in places)
            raise ValueInvalid(
                f"{flag} has nowhere to go: {foreign_text(shown)} takes its value from another node",
                hint=f"set that node's input, or overwrite the link: --set {_target(next(iter(places)))}=…",
            )
        return free

    # --- values -------------------------------------------------------------------------------------------

    def _held(self, place: Place) -> Any:
        node_id, input_name = place
        return self._graph[node_id]["inputs"].get(input_name)

    def _put(self, place: Place, value: Any, source: str, *, touch: bool = True) -> None:
        node_id, input_name = place
        self._graph[node_id]["inputs"][input_name] = copy_json(value)
        self._uploads.pop(place, None)
        self._applied.pop(place, None)  # so that the order is that of the last word
        self._applied[place] = Applied(_target(place), value, source)
        if source.startswith(("--set", "inputs.")):
            self._free_seeds.discard(place)
            if input_name.rpartition(".")[2] in ("seed", "noise_seed"):
                self._seed_places.add(place)
        if touch:
            self._touched.add(place)

    def _upload(self, place: Place, path: str, kind: str, source: str) -> None:
        if not path:
            raise ValueInvalid(f"{source}: no file is named", hint="write the path after the @, or @@ for a text")
        self._put(place, f"@{path}", source)
        self._uploads[place] = Upload(place[0], place[1], path, kind)

    def _kind_of(self, place: Place) -> str:
        known = self._kinds.get(place)
        if known:
            return known
        return "image" if self._workflow.nodes[place[0]].class_type.startswith("LoadImage") else "file"

    def _parsed(self, place: Place, value: Any) -> Any:
        current = self._workflow.value(*place)
        if isinstance(value, str):
            parsed = parse_value(value, current, self._graph)
        else:
            parsed = _value(value, self._graph, f"the value for {_target(place)}")
        self._relinked = self._relinked or is_link(parsed, self._graph)
        return parsed


def _target(place: Place) -> str:
    return f"{place[0]}.{place[1]}"


def _check_range(item: NamedInput | None, value: Any, name: str) -> None:
    if item and not fits_range(value, item.minimum, item.maximum):
        raise ValueInvalid(
            f"{foreign_text(name, 80)} = {foreign_text(value, 60)} is outside {_range(item)}",
            hint="choose a value in between",
        )


def _flag(item: NamedInput) -> str:
    if item.kind == "image" and item.name == "image":
        return "--image"
    return "--prompt" if item.name == "prompt" else f"--set {item.name}=…"


def _range(item: NamedInput) -> str:
    low = "…" if item.minimum is None else f"{item.minimum:g}"
    high = "…" if item.maximum is None else f"{item.maximum:g}"
    return f"{low} to {high}"
