"""
Errors of the generation services.

Each also is the built-in type that CONJURE's code catches at that place, so that `except FileNotFoundError` and
`except ValueError` go on working there, while everything else has the code and the hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runcomfy.domain.exceptions import (
    ConfigurationError,
    DeadlineExceeded,
    InputFileMissing,
    LocalError,
    RunComfyError,
    ValueInvalid,
    WorkflowFailed,
    foreign_text,
)


class PictureMissing(InputFileMissing, FileNotFoundError):
    """A picture that a generation is to start from does not exist."""


class ModeUnknown(ValueInvalid, ValueError):
    """There is no generation mode of that name."""


class ServiceUnavailable(ConfigurationError):
    """A generation mode cannot be used on this computer as it is set up."""


class AgentMissing(ServiceUnavailable):
    """CONJURE's own agents are not part of this process."""


class RenderMissing(DeadlineExceeded, TimeoutError):
    """Blender has rendered no new picture in time."""


class MeshMissing(InputFileMissing, FileNotFoundError):
    """A mesh that is to be imported does not exist."""


class GenerationFailed(WorkflowFailed):
    """A job of a generation ended without its results; the job's own code is in `details["code"]`."""


class StateUnreadable(LocalError):
    """The state file that CONJURE and its add-on share holds no JSON object, and goes on doing so."""


class CalledFromEngine(RunComfyError, RuntimeError):
    """A synchronous call was made where it would wait for itself: on the engine's own event loop."""


def error_of_job(said: Mapping[str, Any] | None, job_id: str) -> GenerationFailed:
    """Return the error of a job of the queue from what clients are told of it (code, message, hint)."""
    facts = said or {}
    return GenerationFailed(
        foreign_text(str(facts.get("message") or "the job ended without results")),
        hint=foreign_text(str(facts.get("hint") or f"`comfyctl queue show {job_id}` tells what happened")),
        details={"job_id": job_id, "code": foreign_text(str(facts.get("code") or "workflow-failed"), 80)},
    )
