"""
What a finished prompt left behind, found in the server's history.

Every kind of node has its own habits: pictures under `images`, videos there too, meshes under `3d` or as a bare path
in `result`, texts under `text`, and custom nodes under names nobody can list. So every key and every list is walked,
and what looks like a result is taken (ComfyUI's output keys by node kind). Nothing here trusts the server: shapes
that make no sense are passed over, and names are data for asking the server again, never paths on this computer.
Downloading and judging the content is left to others; the kind given here is a guess by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runcomfy.domain.exceptions import OutputMissing, foreign_text
from runcomfy.domain.job import FileRef, OutputKind

MAX_DEPTH: Final = 20
"""Results lie one or two levels deep."""

MAX_FOUND: Final = 10_000
"""More results than any prompt has; a hostile history must not fill memory with copies."""

MESH_EXTENSIONS: Final = frozenset(
    {".glb", ".gltf", ".obj", ".fbx", ".stl", ".usdz", ".ply", ".splat", ".spz", ".ksplat", ".dae", ".3mf"}
)

KIND_BY_EXTENSION: Final[Mapping[str, OutputKind]] = {
    **dict.fromkeys(
        (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".exr"), OutputKind.IMAGE
    ),
    **dict.fromkeys(MESH_EXTENSIONS, OutputKind.MESH),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v"), OutputKind.VIDEO),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac"), OutputKind.AUDIO),
    **dict.fromkeys((".txt", ".md", ".csv", ".json", ".srt", ".vtt"), OutputKind.TEXT),
}

KIND_BY_KEY: Final[Mapping[str, OutputKind]] = {
    "images": OutputKind.IMAGE,
    "a_images": OutputKind.IMAGE,
    "b_images": OutputKind.IMAGE,
    "gifs": OutputKind.VIDEO,
    "video": OutputKind.VIDEO,
    "videos": OutputKind.VIDEO,
    "audio": OutputKind.AUDIO,
    "3d": OutputKind.MESH,
    "mesh": OutputKind.MESH,
    "model_file": OutputKind.MESH,
}
"""Asked only where the name has no extension anybody knows."""


@dataclass(frozen=True, slots=True)
class FoundOutput:
    """One result: a file on the server, or a text that came with the history. Exactly one of the two is set."""

    node_id: str
    key: str
    """The history's name for the list it was in (`images`, `3d`, `text`…)."""
    index: int
    """Its place among the results of that key; positions differ between history and jobs API, so this counts ours."""
    kind: OutputKind
    file: FileRef | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class DeclaredOutput:
    """A result that the workflow promises (from its sidecar)."""

    name: str
    node_id: str
    kind: OutputKind
    file_name: str = ""
    """What to call it on this computer (`flux.png`); empty: no wish."""
    required: bool = True
    title: str = ""
    """What people call the node."""


@dataclass(frozen=True, slots=True)
class MatchedOutput:
    """A result, and what it was declared as; None for results nobody declared."""

    found: FoundOutput
    declared: DeclaredOutput | None = None


def find_outputs(outputs: Mapping[str, Any]) -> list[FoundOutput]:
    """Return every result in a history entry's `outputs`, in the server's order, each once per node. Never raises."""
    found: list[FoundOutput] = []
    nodes: Any = outputs  # what a server sent; its type is only hoped for
    for node_id, ui in nodes.items() if isinstance(nodes, Mapping) else ():
        if not isinstance(ui, Mapping) or not isinstance(node_id, str):
            continue
        seen: set[FileRef | tuple[str, str]] = set()
        for key, value in ui.items():
            if not isinstance(key, str):
                continue
            index = 0
            for item in _walk(value, key, 0):
                mark = item if isinstance(item, FileRef) else (key, item)
                if mark in seen:
                    continue
                seen.add(mark)
                if isinstance(item, FileRef):
                    found.append(FoundOutput(node_id, key, index, guess_kind(item.filename, key), file=item))
                else:
                    found.append(FoundOutput(node_id, key, index, OutputKind.TEXT, text=item))
                index += 1
                if len(found) >= MAX_FOUND:
                    return found
    return found


def guess_kind(filename: str, key: str = "") -> OutputKind:
    """Return what a result probably is: by the name's extension, else by the history's key.

    Videos come under `images`, so the extension speaks first.
    """
    known = KIND_BY_EXTENSION.get(_extension(filename))
    return known or KIND_BY_KEY.get(key, OutputKind.FILE)


def match_declared(found: Sequence[FoundOutput], declared: Sequence[DeclaredOutput]) -> list[MatchedOutput]:
    """Join results with what was promised; results nobody declared follow, in the server's order.

    A result fits a declaration if it is the node's and of that kind; a file of unknown kind will do, since its
    content is looked at later anyway.

    Raises OutputMissing if something required is not there, or if there is nothing at all.
    """
    left = list(found)
    matched: list[MatchedOutput] = []
    missing: list[DeclaredOutput] = []
    for wanted in declared:
        mine = [item for item in left if item.node_id == wanted.node_id]
        # Files before texts: SaveText shows its text and also saves it, and the file is what was asked for.
        fitting = sorted(
            (item for item in mine if _fits(item, wanted.kind)),
            key=lambda item: (item.kind is not wanted.kind, item.file is None or item.file.type == "temp"),
        )
        if fitting:
            left.remove(fitting[0])
            matched.append(MatchedOutput(fitting[0], wanted))
        elif wanted.required:
            missing.append(wanted)
    if missing:
        raise _missing(missing, found)
    if not found:
        raise OutputMissing(
            "the prompt ended without any result",
            hint="an output node such as SaveImage must be reached; look at the server's log for what was left out",
        )
    return matched + [MatchedOutput(item) for item in left]


def _missing(missing: Sequence[DeclaredOutput], found: Sequence[FoundOutput]) -> OutputMissing:
    words = []
    for wanted in missing:
        title = f" ({foreign_text(wanted.title, 80)})" if wanted.title else ""
        mine = [f"{item.kind}" for item in found if item.node_id == wanted.node_id]
        instead = f" (it delivered: {', '.join(sorted(set(mine)))})" if mine else ""
        words.append(f"{wanted.name} ({wanted.kind}) from node {foreign_text(wanted.node_id, 60)}{title}{instead}")
    return OutputMissing(
        f"the workflow finished without {'; '.join(words)}",
        hint="a node before it may have been blocked or failed; look at the server's log for these nodes",
        details={
            "missing": [{"name": item.name, "node": item.node_id, "kind": str(item.kind)} for item in missing],
            "found": [
                {"node": item.node_id, "key": foreign_text(item.key, 60), "kind": str(item.kind)} for item in found[:50]
            ],
        },
    )


def _fits(item: FoundOutput, kind: OutputKind) -> bool:
    return item.kind is kind or (item.file is not None and OutputKind.FILE in (item.kind, kind))


def _walk(value: Any, key: str, depth: int) -> Iterator[FileRef | str]:
    if depth > MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        file = _file_of(value)
        if file is not None:
            yield file
            return
        for item in value.values():
            yield from _walk(item, "", depth + 1)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item, key, depth + 1)
    elif isinstance(value, str):
        if key == "text":
            yield value
        elif (path := _path_of(value)) is not None:
            yield path


def _file_of(value: Mapping[str, Any]) -> FileRef | None:
    filename, kind, subfolder = value.get("filename"), value.get("type"), value.get("subfolder")
    if not isinstance(filename, str) or not filename or kind not in ("output", "temp"):
        return None  # "input" names what the workflow was given, not what it made
    folder = subfolder if isinstance(subfolder, str) else ""
    if not folder:
        # The jobs API names 3D files with their folder; /view would cut it off and look in the wrong place.
        folder, filename = _split(filename)
    return FileRef(filename, folder, str(kind))


def _path_of(text: str) -> FileRef | None:
    """A bare path as 3D nodes report it, relative to the output folder."""
    if len(text) > 1024 or "\n" in text or _extension(text) not in MESH_EXTENSIONS:
        return None
    path = text.replace("\\", "/")
    if "://" in path:
        return None
    if path.startswith("/") or path[1:2] == ":":
        # Some custom nodes give the server's full path; only what lies in its output folder can be asked for.
        _, inside, path = path.rpartition("/output/")
        if not inside:
            return None
    folder, filename = _split(path)
    return FileRef(filename, folder, "output") if filename else None


def _split(path: str) -> tuple[str, str]:
    """Return (folder, name). A path that climbs or is absolute stays whole: it is for the server to refuse."""
    parts = path.split("/")
    if len(parts) == 1 or "" in parts or ".." in parts or "." in parts:
        return "", path
    return "/".join(parts[:-1]), parts[-1]


def _extension(name: str) -> str:
    base = name.replace("\\", "/").rpartition("/")[2]
    stem, dot, extension = base.rpartition(".")
    return f".{extension.lower()}" if dot and stem else ""
