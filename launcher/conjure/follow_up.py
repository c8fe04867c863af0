"""
What follows from a run that ended well: the mesh is kept for its picture, the files get their fixed places.

It is written down as plain JSON before the run begins, so that it can be done by another process, too, if the one that
asked for the run is gone when the job ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from launcher.conjure.engine import Engine, Made
from launcher.conjure.errors import GenerationFailed
from launcher.conjure.memo import KeptMesh, MeshMemo
from launcher.conjure.parameters import FLUX_MESH, IMAGE_TO_MESH, mesh_parameters
from launcher.conjure.places import Places, Verified
from runcomfy.domain.exceptions import LocalError, VerificationFailed

log = logging.getLogger("launcher.follow_up")

NOISE_SEED: Final = "3.noise_seed"
MESH_SEED: Final = "32.seed"


@dataclass(frozen=True, slots=True)
class FollowUp:
    """What is to be done with the results of one run."""

    workflow: str
    root: str
    """The folder that has CONJURE's `data`."""
    publish: Mapping[str, str]
    """Place, from the root and with slashes -> name of the output in the workflow's sidecar."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    """As it was asked for, or drawn."""
    image_sha256: str = ""
    """Of the picture that a mesh was made from, where the run did not make the picture."""
    mode: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Return what `as_dict` gave. Raises ValueError."""
        try:
            found = cls(**plain)
            dict(found.publish), dict(found.sets)
        except TypeError as error:
            raise ValueError("it is no follow-up") from error
        return found


async def follow_up(engine: Engine, made: Made, follow: FollowUp) -> None:
    """Keep the mesh, put the files at their places. Raises GenerationFailed, LocalError, DownloadFailed."""
    if "mesh" in made.outputs:
        await _keep(engine, made, follow)
    results = {Path(place): result_of(made, name) for place, name in follow.publish.items()}
    async with engine.publishing:
        await asyncio.to_thread(Places(Path(follow.root)).publish, results)
    await engine.settled(made.job_id)


async def _keep(engine: Engine, made: Made, follow: FollowUp) -> None:
    if follow.workflow not in (FLUX_MESH, IMAGE_TO_MESH):
        return
    mesh = result_of(made, "mesh")
    used = made.seeds.get(MESH_SEED, follow.seed)
    kept = KeptMesh(
        image_sha256=follow.image_sha256 or result_of(made, "flux").sha256,
        parameters=mesh_parameters(follow.workflow, follow.sets),
        seeds=tuple(dict.fromkeys((used, made.seeds.get(NOISE_SEED, used), follow.seed))),
        seed_used=used,
        job_id=made.job_id,
        prompt_id=made.prompt_id,
        sha256=mesh.sha256,
        size_bytes=mesh.size_bytes,
    )
    try:
        await asyncio.to_thread(MeshMemo(engine.folder / "meshes").keep, kept, mesh)
    except (LocalError, VerificationFailed) as error:
        # What was asked for is there; only the next call for this mesh will cost a run.
        log.warning("mesh_not_kept", extra={"fields": {"job": made.job_id, "error": error.code}})


def result_of(made: Made, name: str) -> Verified:
    """Return a verified output of a run by its name in the sidecar. Raises GenerationFailed."""
    output = made.outputs.get(name)
    if output is None:
        raise GenerationFailed(
            f"the job {made.job_id} brought no {name}",
            hint="look at its manifest; the workflow may have been changed",
            details={"job_id": made.job_id, "code": "output-missing"},
        )
    return Verified(output.path, output.size_bytes, output.sha256)
