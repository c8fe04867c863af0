"""`comfyctl doctor`: which layer is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from runcomfy.application.doctor import Finding
    from runcomfy.bootstrap import App


@click.command()
@click.option("--server", metavar="URL", help="Test a ComfyUI instead of the account.")
@click.option("--canary", is_flag=True, help="Rent the cheapest machine for minutes: is it ended by itself? Costs.")
@click.option("--yes", is_flag=True, help="With --canary: do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(server: str | None, canary: bool, yes: bool, as_json: bool) -> int:
    """Test each layer alone and say which one is wrong. Launches and changes nothing, but with --canary.

    The account; the serverless deployment, if one is set; where there is a queue, its database, who holds it up, and
    the ComfyUI its jobs run on.
    """
    if canary:
        from runcomfy.cli.doctor_canary import run_canary

        if server:
            words = "--canary tests the account, --server a ComfyUI: one of them"
            raise click.UsageError(words, click.get_current_context())
        return run_async(lambda interrupts: run_canary(interrupts, yes=yes, as_json=as_json))
    if yes:
        raise click.UsageError("--yes is the answer to --canary's question", click.get_current_context())
    return run_async(lambda interrupts: _doctor(interrupts, server, as_json=as_json))


async def _doctor(interrupts: Interrupts, server: str | None, *, as_json: bool) -> int:
    from runcomfy.application.doctor import examine_server
    from runcomfy.cli.app import open_app
    from runcomfy.cli.doctor_queue import examine_queue, has_queue

    async with open_app(interrupts, quiet=as_json) as app:
        if server:
            found = await examine_server(app.given_server(server))
        else:
            found = await _examine_account()
            serverless = await _examine_serverless(app)
            found = [*_needed(found, app), *serverless, *(await examine_queue(app) if has_queue(app) else ())]
    return _report(found, as_json=as_json)


def _needed(found: list[Finding], app: App) -> list[Finding]:
    """Where jobs run elsewhere (on a ComfyUI that is there, serverless), what renting needs is not missed."""
    from runcomfy.application.doctor import Finding
    from runcomfy.cli.doctor_queue import has_queue
    from runcomfy.domain.exceptions import CredentialsMissing

    settings = app.settings
    serverless = bool(settings.serverless.deployment_id and settings.cloud.tokens)
    elsewhere = serverless or (has_queue(app) and app.queue_settings.where == "server")
    if not elsewhere or not isinstance(found[0].error, CredentialsMissing):
        return found
    return [Finding("credentials", ok=False, skipped=True, detail="none; they are needed for rented machines only")]


async def _examine_serverless(app: App) -> list[Finding]:
    """Look at the deployment, where one is set."""
    from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
    from runcomfy.application.doctor import Finding, examine_deployment
    from runcomfy.application.faultpoints import entered
    from runcomfy.domain.exceptions import RunComfyError

    settings = app.settings
    if not settings.serverless.deployment_id:
        return []
    try:
        client = RunComfyServerless(settings.serverless, settings.cloud, clock=app.clock)
        async with entered(client, "serverless") as api:
            return [await examine_deployment(api)]
    except RunComfyError as error:
        return [Finding("serverless deployment", ok=False, detail=error.message, error=error)]


async def _examine_account() -> list[Finding]:
    from runcomfy.adapters.canary_file import last_outcome
    from runcomfy.adapters.clock import SystemClock
    from runcomfy.adapters.config import load_settings
    from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
    from runcomfy.application.doctor import Finding, examine_cloud, lease_finding
    from runcomfy.application.faultpoints import entered
    from runcomfy.domain.exceptions import CredentialsMissing

    try:
        loaded = load_settings(require_cloud=True, require_version=False)
    except CredentialsMissing as error:
        return [Finding("credentials", ok=False, detail=error.message, error=error)]
    found = [Finding("credentials", ok=True, detail=f"from {loaded.credentials_file or 'the environment'}")]
    async with entered(RunComfyAPIClient(loaded.cloud, clock=SystemClock()), "provider") as provider:
        examined = await examine_cloud(loaded, provider, provider.probe_host)
        return [*found, *examined, lease_finding(last_outcome(loaded.files.state_dir, provider.account))]


def _report(found: list[Finding], *, as_json: bool) -> int:
    from runcomfy.cli.output import show_error, show_json
    from runcomfy.domain.exceptions import foreign_text

    if as_json:
        show_json(
            [
                {
                    "layer": f.layer,
                    "ok": f.ok,
                    "skipped": f.skipped,
                    "detail": f.detail,
                    **({"error": f.error.as_dict()} if f.error else {}),
                }
                for f in found
            ]
        )
    else:
        for finding in found:
            word = "ok  " if finding.ok else "--  " if finding.skipped else "BAD "
            click.echo(f"{word} {finding.layer}: {foreign_text(finding.detail, 300)}")
    bad = next((f.error for f in found if f.error is not None), None)
    if bad is None:
        return 0
    if not as_json:
        show_error(bad)
    return bad.exit_code
