"""Run ComfyUI workflows on GPU machines rented by the second.

    async with runcomfy.connect() as comfy:
        result = await comfy.run("generate_flux_mesh", image="render.png", prompt="a helmet of polished steel")

Everything heavy loads when it is first used, so that importing this package stays quick.
"""

from __future__ import annotations

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# CONJURE keeps a folder `runcomfy/` of its own without an `__init__.py`. A regular package would hide the
# modules in it; extending the path lets both be found.
__path__ = extend_path(__path__, __name__)

if TYPE_CHECKING:
    from runcomfy.connection import connect
    from runcomfy.domain.exceptions import RunComfyError
    from runcomfy.domain.job import JobRequest, JobResult, Output
    from runcomfy.domain.progress import Progress

__all__ = ["JobRequest", "JobResult", "Output", "Progress", "RunComfyError", "connect"]
__version__ = "0.1.0"

_HOMES = {
    "connect": "runcomfy.connection",
    "RunComfyError": "runcomfy.domain.exceptions",
    "JobRequest": "runcomfy.domain.job",
    "JobResult": "runcomfy.domain.job",
    "Output": "runcomfy.domain.job",
    "Progress": "runcomfy.domain.progress",
}


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'runcomfy' has no attribute {name!r}") from None
    from importlib import import_module

    return getattr(import_module(home), name)
