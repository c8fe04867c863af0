"""
The bodies of CONJURE's requests and answers, with its defaults.

Numbers and texts are bounded here as far as HTTP goes; what a parameter may be in a workflow is `parameters`' business.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from launcher.conjure.parameters import NotApplied, shown
from runcomfy.domain.exceptions import foreign_text

LONGEST_TEXT: Final = 100_000
MOST_UNKNOWN: Final = 20
IMPORTED_ABOVE: Final = 0.001
"""Parts of a mesh that are smaller than this (in Blender's units cubed) are dropped when it is imported."""


class APIResponse(BaseModel):
    """The envelope of CONJURE's API."""

    success: bool
    message: str
    data: dict[str, Any] | None = None


class Problem(BaseModel):
    """What went wrong."""

    detail: Any
    error: dict[str, Any] | None = None


Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
FilePath = Annotated[str, Field(min_length=1, max_length=4_096)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Asked(BaseModel):
    """What a generation is asked for. Whatever else is in the body is named in the answer as not applied."""

    model_config = ConfigDict(extra="allow")

    def parameters(self) -> dict[str, Any]:
        """Return what is passed on."""
        return self.model_dump(include=set(type(self).model_fields))

    def unknown(self) -> list[dict[str, Any]]:
        """Return what is not."""
        extra = list((self.model_extra or {}).items())[:MOST_UNKNOWN]
        return [
            NotApplied(foreign_text(name, 80), shown(value), "no such parameter is known").as_dict()
            for name, value in extra
        ]


class FluxRequest(Asked):
    """A picture from words."""

    prompt: Text
    seed: int = 0
    randomize_seed: bool = True
    width: int = 1024
    height: int = 1024
    guidance_scale: Finite = 3.5
    num_inference_steps: int = 28


class FluxDepthRequest(Asked):
    """A picture from words over the depth of another."""

    control_image_path: FilePath
    prompt: Text
    seed: int = 0
    randomize_seed: bool = True
    width: int = 1024
    height: int = 1024
    guidance_scale: Finite = 10
    num_inference_steps: int = 28


class PartPackerRequest(Asked):
    """A mesh from a picture."""

    image_path: FilePath
    num_steps: int = 50
    cfg_scale: Finite = 7
    grid_res: int = 384
    seed: int = 0
    simplify_mesh: bool = False
    target_num_faces: int = 100_000


class MeshImportRequest(BaseModel):
    """A mesh for Blender."""

    mesh_path: FilePath
    min_volume_threshold: Finite = IMPORTED_ABOVE


class ConversationRequest(BaseModel):
    """What was said so far."""

    conversation_history: Text
    include_image: bool = True


class InstructionRequest(BaseModel):
    """A tool's name and parameters."""

    instruction: dict[str, Any]


class StateUpdateRequest(BaseModel):
    """Keys of the state with their new values."""

    updates: dict[str, Any]


class StateSetRequest(BaseModel):
    """A key's new value."""

    value: Any
