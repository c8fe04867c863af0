"""
The files of one CONJURE project: where generations find and leave them.

CONJURE's launcher and its Blender add-on look for results at these paths, relative to the working directory, and not
where a job puts them. How they are read and written is `runcomfy.conjure.files`' business; which of them a client may
name is decided here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runcomfy.conjure import files
from runcomfy.conjure.files import FLUX_IMAGE, MODELS, RENDER, USER_PROMPT, Verified
from runcomfy.domain.exceptions import ValueInvalid

FLUX_RESULTS: Final = Path("data", "generated_images", "flux_results")
MESHES: Final = MODELS / "partpacker_results"
MESH: Final = MODELS / files.MESH
STATE: Final = Path("data", "input", "state.json")


def flux_result(seed: int) -> Path:
    """Return where a picture made from text alone goes in local mode."""
    return FLUX_RESULTS / f"flux_result_{seed}.png"


def mesh_result(seed: int) -> Path:
    """Return where a mesh goes in local mode."""
    return MESHES / f"partpacker_result_{seed}.glb"


@dataclass(frozen=True, slots=True)
class Places:
    """The fixed places of one project. Every method blocks."""

    root: Path = field(default_factory=Path.cwd)
    """The working directory of CONJURE: the folder that has `data/`."""

    def at(self, path: str | os.PathLike[str]) -> Path:
        """Return where a path of CONJURE's is. Raises ValueInvalid: that is no path."""
        if "\0" in str(path):
            raise ValueInvalid("that is no path")
        try:
            return self.root / Path(path).expanduser() if str(path).startswith("~") else self.root / path
        except RuntimeError as error:
            raise ValueInvalid("that is no path: there is no such user", hint="write the whole path") from error

    def holds(self, path: str) -> bool:
        """Whether a path lies in this project: as it is written, and where its links lead.

        The project is its folder and what `data` in it leads to. A path that cannot be followed counts as outside;
        for one that is written as outside nothing is looked at, so that nothing can be learned of it.
        """
        if "\0" in path or path.startswith("~") or ".." in re.split(r"[/\\]", path):
            return False
        homes = (self.root, self.root.resolve(), (self.root / "data").resolve())
        written = Path(os.path.abspath(self.root / path))  # noqa: PTH100 - `resolve` would look at it
        if not any(written.is_relative_to(home) for home in homes):
            return False
        try:
            led = written.resolve()
        except (OSError, RuntimeError):  # links in a circle
            return False
        return any(led.is_relative_to(home) for home in homes)

    def publish(self, results: Mapping[Path, Verified]) -> None:
        """Put copies of results at their places (`runcomfy.conjure.files.publish`)."""
        files.publish({self.root / place: result for place, result in results.items()})

    def user_prompt(self) -> str:
        """Return the user's prompt; empty if there is none. Raises LocalError."""
        return files.read_prompt(self.root / USER_PROMPT)


__all__ = [
    "FLUX_IMAGE",
    "FLUX_RESULTS",
    "MESH",
    "MESHES",
    "RENDER",
    "STATE",
    "USER_PROMPT",
    "Places",
    "Verified",
    "flux_result",
    "mesh_result",
]
