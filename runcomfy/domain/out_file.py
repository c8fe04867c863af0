"""
Where a job file wants its result, and what several results are called then.

`checked_out_file` reads the path as text, on every system alike: a job file travels between hosts, so both separators
count and what no Windows could hold is refused everywhere. It knows nothing of links; whoever opens the folder looks
at what is really there. `names_beside` gives the names: the wanted one to the result that was meant, numbers to the
others. The content decides the ending, never the wish.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from runcomfy.domain.exceptions import ValueInvalid, foreign_text
from runcomfy.domain.job import OutputKind
from runcomfy.domain.workflow_io import KIND_BY_EXTENSION

LONGEST_NAME: Final = 200
"""Bytes of one name: file systems take 255, and numbers and words are added."""
LONGEST_PATH: Final = 1_000
"""Bytes of the whole path."""

SAME: Final[Mapping[str, str]] = {
    ".jpeg": ".jpg",
    ".jpe": ".jpg",
    ".tiff": ".tif",
    ".oga": ".ogg",
    ".m4v": ".mp4",
    ".aif": ".aiff",
    ".midi": ".mid",
    ".mpeg": ".mpg",
}
"""Endings that mean the same format."""
_OTHERS: Final = (
    ".hdr", ".psd", ".heic", ".jxl", ".svg", ".ogv", ".mka", ".zip", ".gz", ".npy", ".npz", ".safetensors", ".latent",
    ".pdf", ".bin", ".vox", ".abc", ".blend", ".usd", ".usda", ".usdc", ".tga", ".dds", ".ktx2", ".jsonl", ".tsv",
    ".xml", ".yaml", ".yml", ".toml", ".log", ".mtl", ".cube", ".ass", ".tif", ".jpg", ".aiff", ".mid", ".mpg",
)  # fmt: skip
KNOWN: Final = frozenset({*KIND_BY_EXTENSION, *SAME, *SAME.values(), *_OTHERS})
"""What counts as an ending: `portrait_v1.5` has none."""

_FORBIDDEN: Final = re.compile(r'[<>:"|?*]')
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|clock\$|com[0-9¹²³]|lpt[0-9¹²³])", re.IGNORECASE)
"""Names that are devices on Windows, with any ending (Microsoft: Naming Files, Paths, and Namespaces)."""
_TURNING: Final = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Invisible characters that let a name be read backwards."""


# --- the path ---------------------------------------------------------------------------------------------


def checked_out_file(text: str, root: str, finished: str) -> str:
    """Return the absolute path of a result: `text` from `root`, or absolute, and below `finished` in any case.

    `root` and `finished` are absolute paths of this computer. Raises ValueInvalid: outside, no plain names, too long,
    a folder.
    """
    shown = foreign_text(text, 200)
    windows = "\\" in finished or _has_drive(finished)
    if not text.strip():
        _refuse("the path of the result is empty", "write for example jobs/finished/image/NAME.png")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in _TURNING for c in text):
        _refuse(f"the path of the result has characters that cannot be seen: {shown!r}", "write it anew")
    parts = _parts(text)
    absolute = text.startswith(("/", "\\")) or _has_drive(text)
    whole = parts if absolute else [*_parts(root), *parts]
    if ".." in parts or (not absolute and text.startswith("~")):
        _refuse(f"the path of the result must not climb: {shown!r}", "write it without .. and ~")
    base = _parts(finished)
    fold: Callable[[str], str] = str.casefold if windows else str
    inside = len(whole) > len(base) and [*map(fold, whole[: len(base)])] == [*map(fold, base)]
    if not inside:
        _refuse(
            f"results go below {foreign_text(finished, 200)}, and {shown!r} does not lie there",
            "write outputs.file_path as jobs/finished/image/NAME.png",
        )
    below = whole[len(base) :]
    if text.rstrip().endswith(("/", "\\")):
        _refuse(f"{shown!r} names a folder", "add the name of the file")
    for part in below:
        _check_name(part, shown)
    separator = "\\" if windows else "/"
    found = finished.rstrip("/\\") + separator + separator.join(below)
    if len(found.encode("utf-8", "replace")) > LONGEST_PATH:
        _refuse(f"the path of the result is longer than {LONGEST_PATH} bytes", "choose shorter names")
    return found


def _parts(path: str) -> list[str]:
    return [part for part in re.split(r"[/\\]", path) if part not in ("", ".")]


def _has_drive(path: str) -> bool:
    return len(path) > 1 and path[1] == ":" and path[0].isascii() and path[0].isalpha()


def _check_name(part: str, shown: str) -> None:
    if _FORBIDDEN.search(part):
        _refuse(f'{shown!r}: a name has one of < > : " | ? *', "use letters, digits, - and _")
    if part != part.strip() or part.endswith("."):
        _refuse(f"{shown!r}: a name begins or ends with a space, or ends with a dot", "write it without")
    if part.startswith("."):
        _refuse(f"{shown!r}: a name begins with a dot, which hides it", "write it without")
    if _DEVICE.fullmatch(part.split(".", maxsplit=1)[0].strip()):
        _refuse(f"{shown!r}: {foreign_text(part, 40)} is the name of a device on Windows", "choose another name")
    if len(part.encode("utf-8", "replace")) > LONGEST_NAME:
        _refuse(f"{shown!r}: a name is longer than {LONGEST_NAME} bytes", "choose a shorter one")


def _refuse(message: str, hint: str) -> NoReturn:
    raise ValueInvalid(message, hint=hint, details={"field": "outputs.file_path"})


# --- the names --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the names depend on, of one result."""

    kind: OutputKind
    extension: str
    """By its content, with the dot."""
    accepts: frozenset[str] = frozenset()
    """Further endings that the content cannot contradict."""
    declared: bool = False
    """Whether the workflow's sidecar promises it."""
    passing: bool = False
    """Whether it is a preview."""

    def ending(self, wanted: str) -> str:
        """Return the ending it gets where `wanted` was asked for."""
        same = SAME.get(wanted, wanted)
        fits = same in (SAME.get(self.extension, self.extension), *self.accepts) or wanted in self.accepts
        return wanted if wanted and (fits or (wanted, self.extension) == (".ogg", ".opus")) else self.extension


def split_name(name: str) -> tuple[str, str]:
    """Return stem and ending of a file name; what is no known ending belongs to the stem."""
    stem, dot, last = name.rpartition(".")
    if dot and stem and f".{last.lower()}" in KNOWN:
        return stem, f".{last}"
    return name, ""


def names_beside(wanted: str, results: Sequence[Delivered]) -> list[str]:
    """Return a file name for each result where `wanted` was asked for. No two are the same.

    A single result has the wanted stem. Of several, the one that was meant has it: the only one of that ending, or
    else of that kind, among all, or among those that are no previews, or those that the workflow promises. The others
    are numbered by their position; where nothing tells which one was meant, all are.
    """
    stem, ending = split_name(wanted)
    meant = 0 if len(results) == 1 else _meant(ending.lower(), results)
    names = []
    for number, result in enumerate(results):
        own = result.ending(ending.lower())
        shown = ending if own == ending.lower() else own
        if number == meant:
            names.append(f"{stem}{shown}")
        else:
            position = number + 1 if meant is None or number > meant else number + 2
            names.append(f"{stem}_{position}{shown}")
    return names


def _meant(ending: str, results: Sequence[Delivered]) -> int | None:
    if not ending:
        return None
    kind = KIND_BY_EXTENSION.get(ending) or KIND_BY_EXTENSION.get(SAME.get(ending, ending))

    def same_ending(result: Delivered) -> bool:
        return result.ending(ending) == ending

    def same_kind(result: Delivered) -> bool:
        return kind is not None and result.kind is kind

    def any_result(_: Delivered) -> bool:
        return True

    def lasting(result: Delivered) -> bool:
        return not result.passing

    def promised(result: Delivered) -> bool:
        return result.declared

    for fits in (same_ending, same_kind):
        for counts in (any_result, lasting, promised):
            found = [number for number, result in enumerate(results) if fits(result) and counts(result)]
            if len(found) == 1:
                return found[0]
    return None
