"""
What callers may ask of a generation beside picture, prompt and seed, and where it goes in the workflows.

What a workflow has no place for is not dropped in silence: it is named in the answer, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Final

import workflows
from launcher.conjure.memo import MeshParameters
from runcomfy.domain.exceptions import ValueInvalid, foreign_text

FLUX_MESH: Final = "generate_flux_mesh"
FLUX_IMAGE: Final = "flux_image"
IMAGE_TO_MESH: Final = "image_to_mesh"

PICTURE_TARGETS: Final = {
    "width": "6.width",
    "height": "6.height",
    "num_inference_steps": "3.steps",
    "guidance_scale": "34.guidance",
}
MESH_TARGETS: Final = {
    "num_steps": "32.steps",
    "cfg_scale": "32.cfg_scale",
    "grid_res": "32.grid_res",
    "simplify_mesh": "32.simplify_mesh",
    "target_num_faces": "32.target_num_faces",
}
TARGETS: Final[Mapping[str, Mapping[str, str]]] = {
    FLUX_IMAGE: PICTURE_TARGETS,
    FLUX_MESH: {**PICTURE_TARGETS, **MESH_TARGETS},
    IMAGE_TO_MESH: MESH_TARGETS,
}
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "width": (16, 16_384),
    "height": (16, 16_384),
    "num_inference_steps": (1, 100),
    "guidance_scale": (0, 100),
    "num_steps": (3, 1_024),
    "cfg_scale": (1, 20),
    "grid_res": (128, 2_048),
    "target_num_faces": (1_000, 2**31 - 1),
}
"""What the nodes take (their definitions in the packs)."""
WHOLE: Final = frozenset({"width", "height", "num_inference_steps", "num_steps", "grid_res", "target_num_faces"})


@dataclass(frozen=True, slots=True)
class NotApplied:
    """Something that was asked for and has no effect."""

    name: str
    value: Any
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as it appears in answers."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Applied:
    """Values by their targets in the graph, and what had no place."""

    sets: Mapping[str, Any]
    not_applied: tuple[NotApplied, ...]


def apply(workflow: str, asked: Mapping[str, Any]) -> Applied:
    """Return where what was asked for goes. Parameters that are None were not asked for.

    Raises ValueInvalid: a value that the node would not take.
    """
    targets = TARGETS[workflow]
    sets: dict[str, Any] = {}
    left: list[NotApplied] = []
    for name, value in asked.items():
        if value is None:
            continue
        if name not in targets:
            known = name in PICTURE_TARGETS or name in MESH_TARGETS
            reason = f"the workflow {workflow} has no place for it" if known else "no such parameter is known"
            left.append(NotApplied(foreign_text(name, 80), shown(value), reason))
        else:
            sets[targets[name]] = checked(name, value)
    if not asked.get("simplify_mesh") and "32.target_num_faces" in sets:
        del sets["32.target_num_faces"]
        left.append(
            NotApplied("target_num_faces", asked["target_num_faces"], "it counts only when the mesh is simplified")
        )
    return Applied(sets, tuple(left))


def checked(name: str, value: Any) -> Any:
    """Return a parameter's value as its node takes it. Raises ValueInvalid."""
    if name == "simplify_mesh":
        if not isinstance(value, bool):
            raise ValueInvalid(f"simplify_mesh = {foreign_text(value, 60)!r} is not true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueInvalid(f"{name} = {foreign_text(value, 60)!r} is not a number")
    low, high = RANGES[name]
    if not low <= value <= high or (name in WHOLE and value != int(value)):
        kind = "a whole number" if name in WHOLE else "a number"
        raise ValueInvalid(
            f"{name} = {foreign_text(value, 60)} is not {kind} from {low} to {high}",
            hint="choose a value in between",
        )
    return int(value) if name in WHOLE else value


def wanted_mesh(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what somebody wants of a mesh, checked. Raises ValueInvalid."""
    return {name: checked(name, asked[name]) for name in MESH_TARGETS if asked.get(name) is not None}


def mesh_parameters(workflow: str, sets: Mapping[str, Any]) -> MeshParameters:
    """Return the parameters that a run of the workflow makes its mesh with."""
    node = _sampler(workflow)
    values = {name: sets.get(target, node[target.partition(".")[2]]) for name, target in MESH_TARGETS.items()}
    return MeshParameters(**values)


@cache
def _sampler(workflow: str) -> Mapping[str, Any]:
    graph = json.loads(workflows.load(workflow)[0])
    inputs: Mapping[str, Any] = graph["32"]["inputs"]
    return inputs


def shown(value: Any) -> Any:
    """Return somebody's value as answers may repeat it."""
    plain = isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else foreign_text(value, 80)
