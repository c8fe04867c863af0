"""
Each layer between this computer and a result, tested alone, in an order in which the first bad one explains the rest.

Nothing is launched and nothing changed. The gateway in front of RunComfy answers 403 for a path it does not know, so a
wrong address looks like a wrong token to whoever does not read the answer's text; the provider client tells them apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from runcomfy.application.health import check_comfyui
from runcomfy.domain.canary import Outcome
from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    DeploymentUnusable,
    RunComfyError,
    SettingInvalid,
    WrongUrl,
)
from runcomfy.domain.serverless import CODES
from runcomfy.domain.settings import Settings
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.provider import Provider
from runcomfy.ports.serverless import Serverless


@dataclass(frozen=True, slots=True)
class Finding:
    """One layer's answer. `error` says what is wrong; `skipped`: an earlier layer stood in the way."""

    layer: str
    ok: bool
    detail: str = ""
    error: RunComfyError | None = None
    skipped: bool = False


def _skipped(layer: str, why: str) -> Finding:
    return Finding(layer, ok=False, detail=f"not tested: {why}", skipped=True)


async def tested(layer: str, work: Callable[[], Awaitable[str]]) -> Finding:
    """Return what came of testing a layer: what `work` says of it, or what it raises."""
    try:
        return Finding(layer, ok=True, detail=await work())
    except RunComfyError as error:
        return Finding(layer, ok=False, detail=error.message, error=error)


async def examine_cloud(
    settings: Settings, provider: Provider, probe_host: Callable[[], Awaitable[None]]
) -> list[Finding]:
    """Test the account: host and path, token, user id, workflow version, machine list."""
    cloud = settings.cloud

    async def host() -> str:
        await probe_host()
        return f"RunComfy's API answers at {cloud.base_url}"

    found = [await tested("host and path", host)]
    if not found[0].ok:
        return [
            *found,
            *(_skipped(layer, "the API does not answer") for layer in ("token", "user id", "workflow version")),
        ]

    async def token() -> str:
        await provider.get_workflows()
        return "the token and the user id are accepted"

    account = await tested("token", token)
    error = account.error
    if isinstance(error, AccessDenied):
        found.append(Finding("token", ok=True, detail="known to RunComfy"))
        found.append(Finding("user id", ok=False, detail=error.message, error=error))
    elif isinstance(error, AuthRejected):
        found += [account, _skipped("user id", "the token is refused")]
    elif isinstance(error, WrongUrl):
        found.append(Finding("host and path", ok=False, detail=error.message, error=error))
    elif error is not None and error.code == "machine-not-found":
        found.append(Finding("user id", ok=False, detail=error.message, error=error))
    else:
        found.append(account)
    if error is not None:
        return [*found, _skipped("workflow version", "the account's workflows cannot be listed")]
    found.append(Finding("user id", ok=True, detail="the account's workflows can be listed"))

    async def version() -> str:
        return f"version belongs to workflow {await _name_of(cloud.workflow_version_id, provider)!r}"

    found.append(await tested("workflow version", version))

    async def machines() -> str:
        listed = await provider.list_machines()
        return f"{len(listed)} machine(s) listed; see `comfyctl machines ls`"

    found.append(await tested("machine list", machines))
    return found


async def _name_of(version_id: str, provider: Provider) -> str:
    """Return the name of the workflow that a version belongs to. Raises SettingInvalid if there is none."""
    workflows = await provider.get_workflows()
    fitting = next((w for w in workflows if w.version_id == version_id), None)
    if fitting is not None:
        return fitting.name
    mistaken = next((w for w in workflows if w.workflow_id == version_id), None)
    if mistaken is not None:
        raise SettingInvalid(
            "RUNCOMFY_WORKFLOW_VERSION_ID holds a workflow's id, not a version id",
            hint=f"use its version id, {mistaken.version_id}",
        )
    raise SettingInvalid(
        "the account has no workflow with this version id",
        hint="it has: " + (", ".join(f"{w.name} ({w.version_id})" for w in workflows) or "none; save one in the cloud"),
    )


def lease_finding(outcome: Outcome | None) -> Finding:
    """Return what is known of whether machines are ended by themselves: what the last canary has found out."""
    layer = "leases"
    if outcome is None:
        return _skipped(layer, "it costs money: `comfyctl doctor --canary` says how much, and asks")
    return Finding(layer, ok=outcome.ended_by_itself, detail=f"{outcome.sentence} (tried {outcome.at:%Y-%m-%d})")


async def examine_deployment(api: Serverless) -> Finding:
    """Test the serverless deployment: is it known, may it be used, is it enabled. Wakes nothing."""
    layer = "serverless deployment"

    async def deployment() -> str:
        view = await api.deployment()
        if view is None:
            return ""
        if view.enabled is False:
            raise DeploymentUnusable(CODES[10002][1], hint=CODES[10002][2])
        warm = f", kept warm for {view.keep_warm.total_seconds():g} s" if view.keep_warm is not None else ""
        idle = f"; {view.min_instances} instance(s) bill all the time" if view.min_instances else ""
        return f"{view.name or 'it'} is enabled, on {', '.join(view.hardware) or 'unnamed hardware'}{warm}{idle}"

    found = await tested(layer, deployment)
    return found if found.detail else _skipped(layer, "RunComfy says nothing about it that can be read")


async def examine_server(server: ComfyUI) -> list[Finding]:
    """Test one ComfyUI: does it answer, is its node list readable, its queue."""
    layers, error = await check_comfyui(server)
    found = [
        Finding(layer.name, ok=layer.ok, detail=layer.detail, error=None if layer.ok else error) for layer in layers
    ]
    if error is not None:
        return found

    async def queue() -> str:
        view = await server.queue()
        return f"{len(view.running)} running, {len(view.pending)} waiting"

    return [*found, await tested("queue readable", queue)]
