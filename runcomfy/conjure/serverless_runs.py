"""
What runs serverless requests, wired: the deployment's client, this computer's disk, the clock.

And what CONJURE's deployment is: which node of generate_flux_mesh2 is which value, and which holds which result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.files import DISK
from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.adapters.results import DiskResults
from runcomfy.application.faultpoints import entered
from runcomfy.application.serverless_run import ServerlessRuns
from runcomfy.domain.job import OutputKind
from runcomfy.domain.serverless import Wanted
from runcomfy.domain.settings import Settings
from runcomfy.ports.clock import Clock
from runcomfy.wiring.leaving import under_way

STEPS_FLUX: Final = 20
STEPS_PARTPACKER: Final = 50
"""What the deployment's workflow has; they are sent only where something else is asked for, as CONJURE sends none."""
MAX_SEED: Final = 2**63 - 1
"""The most that a PrimitiveInt node holds."""
IMAGE: Final = Wanted("flux", "24", OutputKind.IMAGE, ("images",), "flux.png")
MESH: Final = Wanted("mesh", "33", OutputKind.MESH, ("3d", "files", "mesh"), "mesh.glb")


@asynccontextmanager
async def serverless_api(settings: Settings, clock: Clock | None = None) -> AsyncIterator[RunComfyServerless]:
    """Open the client of the deployment that the settings name.

    Raises SettingInvalid (none is named), CredentialsMissing, CredentialsMalformed, InsecureUrl.
    """
    client = entered(
        RunComfyServerless(settings.serverless, settings.cloud, clock=clock or SystemClock(), files=settings.comfy),
        "serverless",
    )
    with under_way():
        async with client:
            yield client


@asynccontextmanager
async def serverless_runs(settings: Settings, clock: Clock | None = None) -> AsyncIterator[ServerlessRuns]:
    """Open what runs requests of that deployment. Raises as `serverless_api`."""
    async with serverless_api(settings, clock) as api:
        yield ServerlessRuns(
            api,
            entered(DiskResults(settings.files, disk=entered(DISK, "disk")), "results"),
            settings,
            clock or SystemClock(),
        )


def conjure_overrides(
    prompt: str, image: str, seed: int, *, steps_flux: int | None = None, steps_partpacker: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return what CONJURE lays over its deployment's graph; `image` is a data URI or a public address.

    The prompt goes to the T5 encoder alone (node 41), as CONJURE has it; the CLIP encoder gets none (node 40).
    """
    values: dict[str, Any] = {"40": "", "41": prompt, "42": seed}
    if steps_partpacker is not None and steps_partpacker != STEPS_PARTPACKER:
        values["43"] = steps_partpacker
    if steps_flux is not None and steps_flux != STEPS_FLUX:
        values["44"] = steps_flux
    return {"16": {"inputs": {"image": image}}, **{node: {"inputs": {"value": v}} for node, v in values.items()}}
