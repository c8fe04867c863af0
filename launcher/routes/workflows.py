"""`GET /workflows`: what can be asked for by name, what it takes and delivers."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from launcher.backend import Backend, backend_of
from launcher.intake import registry_of
from launcher.plain_json import PlainJson
from launcher.schemas import WorkflowList, answers
from launcher.teller import teller_of
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import BadInput, ConfigurationError, RunComfyError
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow

router = APIRouter(prefix="/workflows", tags=["workflows"])

Serves = Annotated[Backend, Depends(backend_of)]


@router.get("", response_model=None, responses=answers(200, WorkflowList))
async def list_workflows(backend: Serves) -> PlainJson:
    """List the project's own workflows and those that ship."""
    found = await asyncio.to_thread(_all, backend.app)
    for one in found:
        one["usual"] = await _usual(backend.app, one["name"])
    return PlainJson({"workflows": found}, headers={"Cache-Control": "no-store"})


def _all(app: App) -> list[dict[str, Any]]:
    """Return every workflow that can be read; blocks."""
    registry, load = registry_of(app), app.workflow_files()
    shown = []
    for name in registry.names():
        try:
            resolved = registry.resolve(name)
            text, toml, _ = load(resolved.workflow)
            workflow = Workflow.parse(text, name=name)
            sidecar = Sidecar.parse(toml, name) if toml is not None else Sidecar()
            shown.append(_view(name, resolved.description, workflow, sidecar, resolved.required_inputs))
        except (BadInput, ConfigurationError):
            continue  # `comfyctl workflows check` says what is wrong with it; it cannot be asked for
    return shown


def _view(
    name: str, description: str, workflow: Workflow, sidecar: Sidecar, required: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "name": name,
        "description": description or sidecar.description,
        "inputs": [
            {
                "name": one.name,
                "kind": one.kind,
                "required": one.required or one.name in required,
                "description": one.description,
                "minimum": one.minimum,
                "maximum": one.maximum,
                "default": _default(one.name, one.targets, workflow, sidecar),
            }
            for one in sidecar.inputs.values()
        ],
        "seeds": [
            {"target": seed.target, "minimum": str(seed.minimum), "maximum": str(seed.maximum)}
            for seed in sidecar.seeds.values()
        ],
        "outputs": [
            {"name": one.name, "kind": str(one.kind), "description": one.description}
            for one in sidecar.outputs.values()
        ],
        "usual": None,
    }


def _default(name: str, targets: tuple[str, ...], workflow: Workflow, sidecar: Sidecar) -> Any:
    """Return what an input is if nobody says anything: the sidecar's word, else the graph's own value."""
    if name in sidecar.defaults:
        return sidecar.defaults[name]
    try:
        value = workflow.value(*workflow.resolve(targets[0])) if targets else None
    except RunComfyError:
        return None
    return value if isinstance(value, (str, int, float, bool)) else None


async def _usual(app: App, name: str) -> dict[str, float] | None:
    """Return how long a run takes, from own history; None without any."""
    try:
        said = await teller_of(app).glances.estimate(name, server_type=None, count=1)
    except RunComfyError:
        return None
    seconds = said.get("seconds")
    if not isinstance(seconds, dict):
        return None
    return {"low_s": seconds["low"], "expected_s": seconds["expected"], "high_s": seconds["high"]}
