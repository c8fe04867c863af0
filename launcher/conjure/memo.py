"""
Which mesh belongs to which picture.

CONJURE asks for a picture and, in a second call, for the mesh of that picture. The workflow makes both in one run, so
the mesh of a run is kept under the hash of its picture: the second call finds it, whatever the picture's file is called
by then, from another service object or another process too. Kept are the newest `MOST_KEPT`; each is compared with its
hash before it is given away.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.files import local_error, make_private_dir, write_atomically
from runcomfy.conjure.files import Verified, copy_verified, verified

MOST_KEPT: Final = 64
MOST_BYTES: Final = 4 * 1024**3
"""Meshes have been seen with 3 to 29 MB."""


@dataclass(frozen=True, slots=True)
class MeshParameters:
    """What shapes a mesh, beside its picture and its seed."""

    num_steps: int
    cfg_scale: float
    grid_res: int
    simplify_mesh: bool
    target_num_faces: int

    def fits(self, wanted: Mapping[str, Any]) -> bool:
        """Whether a mesh made with these is what somebody wants; what they do not name, they do not mind.

        The number of faces is obeyed only when the mesh is simplified, so it counts only then.
        """
        mine = asdict(self)
        if not self.simplify_mesh:
            mine.pop("target_num_faces")
        return all(wanted.get(name) is None or wanted[name] == value for name, value in mine.items())


@dataclass(frozen=True, slots=True)
class KeptMesh:
    """A mesh and what it was made from."""

    image_sha256: str
    parameters: MeshParameters
    seeds: tuple[int, ...]
    """Every seed by which a caller may mean this mesh: the sampler's own, and the one that was asked for."""
    seed_used: int
    job_id: str
    prompt_id: str
    sha256: str
    size_bytes: int
    path: str = ""


class MeshMemo:
    """Kept meshes in a folder, shared by processes. Every method blocks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, mesh: KeptMesh, source: Verified) -> None:
        """Keep a mesh for its picture. Raises LocalError, DownloadFailed (it has changed since it was verified)."""
        make_private_dir(self._folder)
        facts = {**asdict(mesh), "parameters": asdict(mesh.parameters), "path": ""}
        name = f"{mesh.image_sha256}-{_digest([facts['parameters'], mesh.seed_used])}"
        target = self._folder / f"{name}.glb"
        temporary = copy_verified(source, self._folder, mode=0o600)
        try:
            os.replace(temporary, target)  # noqa: PTH105
        except OSError as error:
            raise local_error(error, target, "write") from error
        write_atomically(self._folder / f"{name}.json", json.dumps(facts), durable=True)
        self._bound()

    def find(self, image_sha256: str, wanted: Mapping[str, Any], seed: int) -> KeptMesh | None:
        """Return the newest kept mesh of a picture with equal parameters; None if there is none, or it is damaged.

        Seed 0 stands for any, as CONJURE uses it.
        """
        for path in sorted(self._folder.glob(f"{image_sha256}-*.json"), key=_mtime, reverse=True):
            mesh = _read(path)
            if mesh is None or not mesh.parameters.fits(wanted) or (seed and seed not in mesh.seeds):
                continue
            found = verified(Path(mesh.path))
            if found is not None and (found.size_bytes, found.sha256) == (mesh.size_bytes, mesh.sha256):
                with suppress(OSError):
                    os.utime(path)
                return mesh
        return None

    def _bound(self) -> None:
        """Remove the oldest beyond the bounds. Another process may do so at the same time."""
        size = 0
        for number, path in enumerate(sorted(self._folder.glob("*.json"), key=_mtime, reverse=True)):
            mesh = path.with_suffix(".glb")
            with suppress(OSError):
                size += mesh.stat().st_size
            if number >= MOST_KEPT or (number and size > MOST_BYTES):
                for old in (path, mesh):
                    with suppress(OSError):
                        old.unlink()
        limit = time.time() - 3_600
        for litter in self._folder.glob(".tmp-*"):
            with suppress(OSError):
                if litter.stat().st_mtime < limit:
                    litter.unlink()


def _read(path: Path) -> KeptMesh | None:
    try:
        facts = json.loads(path.read_bytes())
        return KeptMesh(
            image_sha256=str(facts["image_sha256"]),
            parameters=MeshParameters(**facts["parameters"]),
            seeds=tuple(int(seed) for seed in facts["seeds"]),
            seed_used=int(facts["seed_used"]),
            job_id=str(facts["job_id"]),
            prompt_id=str(facts["prompt_id"]),
            sha256=str(facts["sha256"]),
            size_bytes=int(facts["size_bytes"]),
            path=str(path.with_suffix(".glb")),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
