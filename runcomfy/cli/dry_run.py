"""`comfyctl run --dry-run`: everything that can be known without sending anything to anybody."""

from __future__ import annotations

import asyncio
import json
from decimal import ROUND_UP, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from runcomfy.application.orchestrator import Prepared
    from runcomfy.domain.job import JobRequest
    from runcomfy.domain.settings import Settings


def dry_run(request: JobRequest, *, as_json: bool) -> int:
    """Check the request, show the bound graph, where it would run and what it would cost. Sends nothing."""
    return asyncio.run(_dry_run(request, as_json=as_json))


async def _dry_run(request: JobRequest, *, as_json: bool) -> int:
    from runcomfy.bootstrap import App
    from runcomfy.cli.app import load
    from runcomfy.cli.output import show_json

    async with App(load(quiet=as_json)) as app:
        prepared = await app.orchestrator().prepare(request)
        place = await asyncio.to_thread(_place, app.settings, request)
    if as_json:
        show_json(_facts(prepared, place))
        return 0
    _show(prepared, place)
    return 0


def _place(settings: Settings, request: JobRequest) -> dict[str, Any]:
    """Return where the job would run and what that costs, by our books and settings alone."""
    if request.server_url is not None:
        from runcomfy.domain.secret import SecretUrl

        return {
            "where": f"the server {SecretUrl(request.server_url)}",
            "usd_per_hour": "0",
            "note": "nothing is billed",
        }
    from runcomfy.domain.durations import show_duration

    warm = _dev_server(settings) if settings.app.machine_reuse else None
    server_type = warm["server_type"] if warm else request.server_type or settings.cloud.server_type
    rate = settings.rates.find(server_type)
    usd_per_hour = rate.usd_per_hour if rate else None
    place: dict[str, Any] = {
        "where": f"the dev server {warm['server_id']}" if warm else "a machine of its own, stopped at the end",
        "server_type": server_type,
        "usd_per_hour": str(usd_per_hour) if usd_per_hour is not None else None,
        "plan": f"{rate.plan}, {rate.source}" if rate else None,
    }
    if rate is None:
        place["problem"] = f"no price is known for {server_type}: it would be refused"
    elif settings.cloud.max_usd_per_hour is not None and rate.usd_per_hour > settings.cloud.max_usd_per_hour:
        place["problem"] = f"dearer than RUNCOMFY_MAX_USD_PER_HOUR (${settings.cloud.max_usd_per_hour}): refused"
    else:
        limit = request.timeout or settings.comfy.execution_timeout
        most = (rate.usd_per_hour * Decimal(str(limit.total_seconds())) / 3600).quantize(Decimal("0.01"), ROUND_UP)
        place["usd_per_minute"] = str((rate.usd_per_hour / 60).quantize(Decimal("0.0001")))
        place["usd_at_most"] = str(most)
        place["note"] = (
            f"at most ${most} if the job takes its whole timeout of {show_duration(limit)}; starting a machine is free"
        )
    cloud = settings.cloud
    if not (cloud.user_id and cloud.tokens and cloud.workflow_version_id):
        place["credentials"] = "missing: set them in credentials.txt or the environment before a real run"
    return place


def _dev_server(settings: Settings) -> dict[str, Any] | None:
    """Return what the state file says of a running dev server; not verified, since nothing is sent."""
    path = Path(settings.files.state_dir) / "dev_server_state.json"
    try:
        state = json.loads(path.read_bytes())
        if state["status"] == "running":
            return {"server_id": str(state["server_id"]), "server_type": str(state.get("server_type", "medium"))}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _facts(prepared: Prepared, place: dict[str, Any]) -> dict[str, Any]:
    return {
        "dry_run": True,
        "workflow": prepared.workflow.name,
        "sha256": prepared.bound.sha256,
        "graph": prepared.bound.graph,
        "applied": [{"target": a.target, "value": a.value, "source": a.source} for a in prepared.bound.applied],
        "uploads": [{"target": f"{u.node_id}.{u.input_name}", "path": u.path} for u in prepared.bound.uploads],
        "seeds": dict(prepared.bound.seeds),
        "outputs": [{"name": d.name, "node": d.node_id, "kind": str(d.kind)} for d in prepared.bound.declared],
        **place,
    }


def _show(prepared: Prepared, place: dict[str, Any]) -> None:
    from runcomfy.cli.output import table
    from runcomfy.domain.exceptions import foreign_text

    bound = prepared.bound
    click.echo(json.dumps(bound.graph, ensure_ascii=False, indent=2))
    rows = [(a.target, a.source, foreign_text(a.value, 60)) for a in bound.applied]
    click.echo("\n" + table(("target", "from", "value"), rows))
    for declared in bound.declared:
        click.echo(f"result: {declared.name} ({declared.kind}) from node {declared.node_id}")
    click.echo(f"\nwould run on: {place['where']}" + (f" ({place['server_type']})" if "server_type" in place else ""))
    for key in ("usd_per_hour", "note", "problem", "credentials"):
        if place.get(key):
            click.echo(f"{key.replace('_', ' ')}: {place[key]}")
    click.echo("dry run: nothing was sent")
