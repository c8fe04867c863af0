"""Public door: workflows and what goes into them. It lives in `runcomfy.domain.workflow` and its neighbours."""

from runcomfy.domain.binding import Applied, BoundWorkflow, Upload, bind, fit_seeds, into_range, parse_value
from runcomfy.domain.preflight import (
    FileToCheck,
    ModelFile,
    Problem,
    files_to_check,
    model_files,
    preflight,
    require_runnable,
)
from runcomfy.domain.sidecar import NamedInput, NamedOutput, NeededModel, NeededPack, SeedRange, Sidecar
from runcomfy.domain.workflow import Link, Node, Workflow

__all__ = [
    "Applied",
    "BoundWorkflow",
    "FileToCheck",
    "Link",
    "ModelFile",
    "NamedInput",
    "NamedOutput",
    "NeededModel",
    "NeededPack",
    "Node",
    "Problem",
    "SeedRange",
    "Sidecar",
    "Upload",
    "Workflow",
    "bind",
    "files_to_check",
    "fit_seeds",
    "into_range",
    "model_files",
    "parse_value",
    "preflight",
    "require_runnable",
]
