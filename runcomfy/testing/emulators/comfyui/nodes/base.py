"""What a node of the emulated ComfyUI is, and what it may ask of the server that runs it.

This module is the seam between the server (queue, graph, cache, sockets) and the node library (pictures,
meshes, media): either side can be read, tested and replaced without the other. Values that travel along links
are the node library's own business; the server passes them on and never looks inside, except for
`ExecutionBlocker` and for lists of a class whose output or input is declared to be a list.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

T = TypeVar("T")
Inputs = Mapping[str, Any]
"""A node's arguments by name: literals converted to their declared type, links by what they carry."""

Graph = dict[str, dict[str, Any]]
"""A workflow in API format: node id -> {"class_type", "inputs", "_meta"?}."""


class NodeInterrupted(Exception):
    """The running prompt was interrupted; nodes let it pass."""


@dataclass(frozen=True, slots=True)
class ExecutionBlocker:
    """An output value that stops every node which would read it.

    With a message the server reports an `execution_error` of type `ExecutionBlocked` and the prompt goes on;
    without one the nodes behind are left out silently.
    """

    message: str | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """An output value that is still to be computed by a node of `NodeResult.expand`."""

    node: str
    slot: int = 0


@dataclass(frozen=True, slots=True)
class NodeResult:
    """What a node delivered.

    `outputs` has one value for each declared output (or `ExecutionBlocker`, or a `Link` into `expand`). `ui` is
    what `executed` and the history show: key -> list of values; None for a node that has nothing to show.
    `expand` is a graph with ids of its own choice, linked among themselves by these ids; the server prefixes
    them as ComfyUI does (`"1"` of node `"7"` becomes `"7.0.0.1"`) and links to nodes outside keep their ids.
    """

    outputs: Sequence[Any] = ()
    ui: Mapping[str, Sequence[Any]] | None = None
    expand: Graph | None = None


@dataclass(frozen=True, slots=True)
class Folders:
    """The server's own folders; absolute paths that exist."""

    input: Path
    output: Path
    temp: Path
    user: Path
    models: Path

    @classmethod
    def below(cls, base: Path) -> Folders:
        """Return the folders of a server whose base folder that is."""
        return cls(base / "input", base / "output", base / "temp", base / "user", base / "models")

    def of(self, kind: str) -> Path | None:
        """The folder for a file reference's `type`, None for a type nobody knows."""
        return {"input": self.input, "output": self.output, "temp": self.temp}.get(kind)

    def annotated(self, name: str, default: str = "input") -> Path:
        """Return the path of a name as widgets hold it: `a.png`, `folder/a.png`, `a.png [output]`.

        The result may point outside the folder or to nothing: callers check.
        """
        for kind in ("input", "output", "temp"):
            if name.endswith(f"[{kind}]"):
                return getattr(self, kind) / name[: -len(kind) - 2].rstrip()  # type: ignore[no-any-return]
        return getattr(self, default) / name  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A node's inputs in the form of `/object_info`: name -> [type or list of choices, options]."""

    required: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    optional: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    hidden: Mapping[str, Any] = field(default_factory=dict)
    """Name -> what the real server injects ("PROMPT", "UNIQUE_ID"…). Only shown: nodes ask their context."""


@dataclass(frozen=True, slots=True)
class SavePath:
    """Where the next files of a prefix go; `counter` is the first free number."""

    folder: Path
    subfolder: str
    stem: str
    counter: int

    def name(self, extension: str, *, index: int = 0, underscore: bool = True) -> str:
        """`stem_00001_.png`, or `stem_00001.flac` without the underscore; `extension` with its dot."""
        return f"{self.stem}_{self.counter + index:05}{'_' if underscore else ''}{extension}"

    def reference(self, name: str, kind: str = "output") -> dict[str, str]:
        """The object that histories and `executed` carry for a file."""
        return {"filename": name, "subfolder": self.subfolder, "type": kind}


def save_path(
    prefix: str, folder: Path, *, width: int = 0, height: int = 0, now: Callable[[], float] = time.time
) -> SavePath:
    """Expand a `filename_prefix` and find the first free number, as SaveImage and its kin do.

    Known variables are %year% %month% %day% %hour% %minute% %second% %width% %height%; anything else in percent
    signs stays literal. Creates the subfolder. A prefix that leaves the folder raises a plain `Exception`, which
    ends the prompt as an execution error with the text of the real server.
    """
    stamp = time.localtime(now())
    known = {
        "width": str(width),
        "height": str(height),
        "year": str(stamp.tm_year),
        "month": f"{stamp.tm_mon:02}",
        "day": f"{stamp.tm_mday:02}",
        "hour": f"{stamp.tm_hour:02}",
        "minute": f"{stamp.tm_min:02}",
        "second": f"{stamp.tm_sec:02}",
    }
    for name, value in known.items():
        prefix = prefix.replace(f"%{name}%", value)
    root = folder.resolve()
    wanted = Path(prefix.replace("\\", "/"))
    target = (root / wanted.parent).resolve()
    if not target.is_relative_to(root):
        raise Exception(  # noqa: TRY002 - the real server raises exactly this, and clients see the type's name
            "**** ERROR: Saving image outside the output folder is not allowed."
            f"\n full_output_folder: {target}\n         output_dir: {root}"
        )
    target.mkdir(parents=True, exist_ok=True)
    stem = wanted.name
    taken = re.compile(re.escape(stem) + r"_(\d+)", re.IGNORECASE)
    numbers = [int(found[1]) for entry in target.iterdir() if (found := taken.match(entry.name))]
    inside = target.relative_to(root).as_posix()
    return SavePath(target, "" if inside == "." else inside, stem, max(numbers, default=0) + 1)


class NodeHost(Protocol):
    """The server's half of a `NodeContext`."""

    async def report_progress(self, node_id: str, value: float, maximum: float, preview: Image.Image | None) -> None:
        """Tell the sockets; raises NodeInterrupted."""
        ...

    async def report_text(self, node_id: str, text: str) -> None:
        """Send a text frame."""
        ...

    async def node_sleep(self, node_id: str, seconds: float) -> None:
        """Wait, scaled by the emulator's speed."""
        ...

    def check_interrupted(self) -> None:
        """Raise NodeInterrupted if asked to stop."""
        ...


@dataclass(frozen=True, slots=True)
class NodeContext:
    """One run of one node; made by the server for each."""

    prompt_id: str
    node_id: str
    folders: Folders
    prompt: Graph
    """The whole graph as it is written into the metadata of files."""
    extra_data: Mapping[str, Any]
    host: NodeHost
    now: Callable[[], float] = time.time
    save_metadata: bool = True
    """False under `--disable-metadata`."""

    async def progress(self, value: float, maximum: float, preview: Image.Image | None = None) -> None:
        """Report step `value` of `maximum`, with a preview picture if there is one.

        Raises NodeInterrupted when the prompt was interrupted: the real server looks here and before each node.
        """
        await self.host.report_progress(self.node_id, value, maximum, preview)

    async def send_text(self, text: str) -> None:
        """Send a text frame (binary event 3) about this node."""
        await self.host.report_text(self.node_id, text)

    async def sleep(self, seconds: float) -> None:
        """Work for that long, divided by the emulator's speed. Does not look for interrupts."""
        await self.host.node_sleep(self.node_id, seconds)

    async def in_thread(self, func: Callable[..., T], *args: Any) -> T:
        """Run heavy or blocking work on the loop's executor, so that the server keeps answering."""
        return await asyncio.get_running_loop().run_in_executor(None, func, *args)

    def check_interrupted(self) -> None:
        """Raise NodeInterrupted if the running prompt was interrupted."""
        self.host.check_interrupted()

    def save_path(self, prefix: str, kind: str = "output", *, width: int = 0, height: int = 0) -> SavePath:
        """`save_path` below the folder of that kind. Looks at the disk."""
        folder = self.folders.of(kind)
        if folder is None:
            raise ValueError(f"no folder of type {kind!r}")
        return save_path(prefix, folder, width=width, height=height, now=self.now)


Run = Callable[[NodeContext, dict[str, Any]], Awaitable[NodeResult]]


@dataclass(frozen=True, slots=True)
class NodeClass:
    """One node class: what `/object_info` says of it, and how it runs."""

    name: str
    run: Run
    inputs: InputSpec | Callable[[Folders], InputSpec] = field(default_factory=InputSpec)
    """A function where the choices depend on files (LoadImage lists the input folder)."""
    outputs: tuple[Any, ...] = ()
    """The type of each output: a name such as "IMAGE", or a list of choices."""
    output_names: tuple[str, ...] = ()
    """Empty means: the types are the names."""
    output_is_list: tuple[bool, ...] = ()
    """Empty means none; a list output runs the nodes behind it once for each entry."""
    input_is_list: bool = False
    """True: the node is called once and gets every input as a list."""
    output_node: bool = False
    display_name: str = ""
    category: str = "sd"
    python_module: str = "nodes"
    description: str = ""
    deprecated: bool = False
    experimental: bool = False
    api_node: bool = False
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    """More keys of this class's `/object_info` entry (output_tooltips, search_aliases…)."""
    concurrent: bool = False
    """True for nodes that are async functions on the real server: two of the same prompt overlap."""
    validate: Callable[[Folders, Inputs], bool | str] | None = None
    """The class's own check at POST /prompt: True, or what is wrong. Gets the literal inputs only."""
    validated_inputs: frozenset[str] = frozenset()
    """Inputs that `validate` looks after: the server leaves out its own range and list checks for them."""
    fingerprint: Callable[[Folders, Inputs], Any] | None = None
    """What the node depends on beside its inputs (a file's content), as IS_CHANGED does; part of the cache key.
    NaN means "never cached"."""
    needs: Callable[[Inputs], Sequence[str]] | None = None
    """For inputs declared `{"lazy": True}`: which of them are wanted, given those known so far (the others are
    None). Asked again after each answer until it wants nothing new."""
    since: tuple[int, int, int] = (0, 0, 0)
    """First server version that has the class; older emulated versions do not know it."""

    def spec(self, folders: Folders) -> InputSpec:
        """The inputs as of now."""
        return self.inputs(folders) if callable(self.inputs) else self.inputs
