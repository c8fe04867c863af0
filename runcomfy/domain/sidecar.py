"""
What a workflow's author says about it, in a small TOML file beside the graph.

The graph knows nodes; people know "the image", "the prompt" and "the mesh". A sidecar joins the two:

    description = "A picture and a mesh from a sketch and a prompt"

    [inputs.image]                     # --image, and --set image=@file
    kind = "image"                     # image, text, number or file
    targets = ["16.image"]             # every one of them gets the value
    required = true

    [inputs.steps]                     # --set steps=30
    kind = "number"
    targets = ["3.steps"]
    minimum = 1
    maximum = 100

    [seeds."3.noise_seed"]             # --seed, else random; each within its own range
    minimum = 0
    maximum = "18446744073709551615"   # as a text where TOML's 64 bits end

    [outputs.flux]
    node = "24"                        # id, title or class
    kind = "image"                     # image, mesh, video, audio, text or file
    file = "flux.png"                  # what to call it on this computer
    required = true                    # the default: without it the job has not succeeded

    [defaults]                         # used where the user says nothing; keys as in --set
    steps = 20

    [[models]]                         # for `comfyctl workflows show` only
    file = "flow.pt"
    folder = "PartPacker"

    [[packs]]
    name = "ComfyUI_PartPacker"
    url = "https://github.com/smthemex/ComfyUI_PartPacker"
    classes = ["PartPacker_Loader"]

Targets are resolved against the graph by `Sidecar.check`, so that a sidecar that has fallen behind its graph is
noticed at once. Files are read by others: this module sees text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NoReturn, TypeVar

from runcomfy.domain.exceptions import RunComfyError, WorkflowInvalid, foreign_text
from runcomfy.domain.job import OutputKind
from runcomfy.domain.workflow import Workflow, close_matches

T = TypeVar("T")

INPUT_KINDS: Final = ("image", "text", "number", "file")

SEED_LIMIT: Final = 2**64 - 1
"""The largest seed any ComfyUI node takes."""


@dataclass(frozen=True, slots=True)
class NamedInput:
    """An input with a name of its own, and the places in the graph that get its value."""

    name: str
    kind: str
    targets: tuple[str, ...]
    required: bool = False
    description: str = ""
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class SeedRange:
    """A seed of the workflow and the values its node takes, both ends included."""

    target: str
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class NamedOutput:
    """A result the workflow promises."""

    name: str
    node: str
    kind: OutputKind
    file: str = ""
    required: bool = True
    description: str = ""


@dataclass(frozen=True, slots=True)
class NeededModel:
    """A model file that must be on the machine."""

    file: str
    folder: str = ""
    url: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class NeededPack:
    """A pack of custom nodes that must be installed on the machine."""

    name: str
    url: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A sidecar that has been read. Make it with `Sidecar.parse`."""

    name: str = ""
    description: str = ""
    inputs: Mapping[str, NamedInput] = field(default_factory=dict)
    seeds: Mapping[str, SeedRange] = field(default_factory=dict)
    outputs: Mapping[str, NamedOutput] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[NeededModel, ...] = ()
    packs: tuple[NeededPack, ...] = ()

    @classmethod
    def parse(cls, toml_text: str | bytes, name: str = "") -> Sidecar:
        """Read a sidecar. Raises WorkflowInvalid: not TOML, a key nobody knows, a value of the wrong kind."""
        shown = f"the sidecar of {name}" if name else "the sidecar"
        try:
            text = toml_text if isinstance(toml_text, str) else toml_text.decode("utf-8-sig")
            raw = tomllib.loads(text.removeprefix("\ufeff"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WorkflowInvalid(
                f"{shown} is not TOML: {foreign_text(error)}", hint="correct the .toml file beside the workflow"
            ) from None
        return _Reader(shown).sidecar(raw, name)

    def check(self, workflow: Workflow) -> None:
        """Make sure that everything the sidecar names is in the graph. Raises WorkflowInvalid."""
        for where, target in [
            *((f"inputs.{item.name}", target) for item in self.inputs.values() for target in item.targets),
            *((f'seeds."{seed.target}"', seed.target) for seed in self.seeds.values()),
            *((f'defaults."{key}"', key) for key in self.defaults if key not in self.inputs),
        ]:
            self._in_graph(where, workflow.resolve, target)
        for output in self.outputs.values():
            self._in_graph(f"outputs.{output.name}", workflow.find_node, output.node)

    def _in_graph(self, where: str, look_up: Callable[[str], Any], target: str) -> None:
        try:
            look_up(target)
        except RunComfyError as error:
            raise WorkflowInvalid(
                f"the sidecar of {self.name or 'the workflow'}, {where}: {error.message}", hint=error.hint
            ) from None


class _Reader:
    """Reads tables strictly: a mistyped key would otherwise be a setting that silently does nothing."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def sidecar(self, raw: Mapping[str, Any], name: str) -> Sidecar:
        self._only(raw, "", ("description", "inputs", "seeds", "outputs", "defaults", "models", "packs"))
        return Sidecar(
            name=name,
            description=self._text(raw, "", "description"),
            inputs={key: self._input(key, table) for key, table in self._tables(raw, "inputs")},
            seeds={key: self._seed(key, table) for key, table in self._tables(raw, "seeds")},
            outputs={key: self._output(key, table) for key, table in self._tables(raw, "outputs")},
            defaults=self._defaults(raw),
            models=tuple(self._model(table) for table in self._list(raw, "models")),
            packs=tuple(self._pack(table) for table in self._list(raw, "packs")),
        )

    def _input(self, name: str, table: Mapping[str, Any]) -> NamedInput:
        where = f"inputs.{name}"
        self._only(table, where, ("kind", "targets", "required", "description", "minimum", "maximum"))
        kind = self._text(table, where, "kind") or self._fail(f"{where} has no kind", f"use {_one_of(INPUT_KINDS)}")
        if kind not in INPUT_KINDS:
            self._fail(f"{where}: kind {foreign_text(kind, 40)!r} is unknown", f"use {_one_of(INPUT_KINDS)}")
        targets = self._texts(table, where, "targets")
        if not targets:
            self._fail(f"{where} has no targets", 'for example targets = ["16.image"]')
        return NamedInput(
            name=name,
            kind=kind,
            targets=targets,
            required=self._truth(table, where, "required", default=False),
            description=self._text(table, where, "description"),
            minimum=self._number(table, where, "minimum"),
            maximum=self._number(table, where, "maximum"),
        )

    def _seed(self, target: str, table: Mapping[str, Any]) -> SeedRange:
        where = f'seeds."{target}"'
        self._only(table, where, ("minimum", "maximum"))
        minimum = self._seed_value(table, where, "minimum", 0)
        maximum = self._seed_value(table, where, "maximum", 2**32 - 1)
        if minimum > maximum:
            self._fail(f"{where}: minimum is larger than maximum", "exchange them")
        return SeedRange(target, minimum, maximum)

    def _seed_value(self, table: Mapping[str, Any], where: str, key: str, default: int) -> int:
        value = table.get(key, default)
        if isinstance(value, str):
            digits = value.removeprefix("-")
            value = int(value) if digits.isascii() and digits.isdigit() and len(digits) <= 20 else None
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > SEED_LIMIT:
            self._fail(f"{where}.{key} is not a whole number up to 2^64 - 1", "write 0 or, beyond 2^63, a text")
        return value

    def _output(self, name: str, table: Mapping[str, Any]) -> NamedOutput:
        where = f"outputs.{name}"
        self._only(table, where, ("node", "kind", "file", "required", "description"))
        kind = self._text(table, where, "kind")
        if kind not in tuple(OutputKind):
            self._fail(f"{where}: kind {foreign_text(kind, 40)!r} is unknown", f"use {_one_of(tuple(OutputKind))}")
        file = self._text(table, where, "file")
        if any(char in file for char in "/\\:\0") or file in (".", ".."):
            self._fail(f"{where}: file {foreign_text(file, 60)!r} is not a plain file name", "leave folders out")
        return NamedOutput(
            name=name,
            node=self._text(table, where, "node") or self._fail(f"{where} has no node", 'for example node = "24"'),
            kind=OutputKind(kind),
            file=file,
            required=self._truth(table, where, "required", default=True),
            description=self._text(table, where, "description"),
        )

    def _model(self, table: Mapping[str, Any]) -> NeededModel:
        self._only(table, "models", ("file", "folder", "url", "note"))
        return NeededModel(
            file=self._text(table, "models", "file") or self._fail("an entry of models has no file", "add file = …"),
            folder=self._text(table, "models", "folder"),
            url=self._text(table, "models", "url"),
            note=self._text(table, "models", "note"),
        )

    def _pack(self, table: Mapping[str, Any]) -> NeededPack:
        self._only(table, "packs", ("name", "url", "classes"))
        return NeededPack(
            name=self._text(table, "packs", "name") or self._fail("an entry of packs has no name", "add name = …"),
            url=self._text(table, "packs", "url"),
            classes=self._texts(table, "packs", "classes"),
        )

    def _defaults(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        table = raw.get("defaults", {})
        if not isinstance(table, dict):
            self._fail("defaults is not a table", "write [defaults]")
        for key, value in table.items():
            if not isinstance(value, (str, int, float, bool)):
                self._fail(f'defaults."{key}" is neither a text nor a number', 'quote the target: "3.steps" = 20')
        return dict(table)

    def _only(self, table: Mapping[str, Any], where: str, known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                meant = close_matches(key, known)
                self._fail(
                    f"{foreign_text(f'{where}.{key}' if where else key, 80)} is not a key of a sidecar",
                    f"did you mean {meant[0]}?" if meant else f"known here: {', '.join(known)}",
                )

    def _tables(self, raw: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
        found = raw.get(key, {})
        if not isinstance(found, dict) or not all(isinstance(item, dict) for item in found.values()):
            self._fail(f"{key} is not a table of tables", f'write [{key}."NAME"], the name quoted if it has dots')
        return list(found.items())

    def _list(self, raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
        found = raw.get(key, [])
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            self._fail(f"{key} is not a list of tables", f"write [[{key}]]")
        return found

    def _text(self, table: Mapping[str, Any], where: str, key: str) -> str:
        return self._typed(table, where, key, str, "", "a text")

    def _truth(self, table: Mapping[str, Any], where: str, key: str, *, default: bool) -> bool:
        return self._typed(table, where, key, bool, default, "true or false")

    def _number(self, table: Mapping[str, Any], where: str, key: str) -> float | None:
        value = table.get(key)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or value != value):
            self._fail(f"{where}.{key} is not a number", "write it without quotes")
        return value

    def _texts(self, table: Mapping[str, Any], where: str, key: str) -> tuple[str, ...]:
        found = table.get(key, [])
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            self._fail(f"{where}.{key} is not a list of texts", f'for example {key} = ["…"]')
        return tuple(found)

    def _typed(self, table: Mapping[str, Any], where: str, key: str, kind: type[T], default: T, words: str) -> T:
        value = table.get(key, default)
        if not isinstance(value, kind):
            self._fail(f"{f'{where}.' if where else ''}{key} is not {words}", f"give {words}")
        return value

    def _fail(self, message: str, hint: str) -> NoReturn:
        raise WorkflowInvalid(f"{self._shown}: {message}", hint=hint)


def _one_of(words: tuple[Any, ...]) -> str:
    return ", ".join(str(word) for word in words[:-1]) + f" or {words[-1]}"


def fits_range(value: Any, minimum: float | None, maximum: float | None) -> bool:
    """Whether a number (or a text that is one, as ComfyUI takes them) lies between two limits, where there are any."""
    try:
        number = Decimal(str(value))
    except ArithmeticError:
        return True  # not a number: not for this check
    if not number.is_finite():
        return True
    return (minimum is None or number >= Decimal(str(minimum))) and (maximum is None or number <= Decimal(str(maximum)))
