"""`comfyctl doctor --canary`: whether a machine is ended at its time by itself, tried on the user's order."""

from __future__ import annotations

import asyncio
import sys
from decimal import ROUND_UP, Decimal
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from runcomfy.cli.runner import Interrupts
    from runcomfy.domain.canary import Plan


async def run_canary(interrupts: Interrupts, *, yes: bool, as_json: bool) -> int:
    """Say what it costs at most, ask, try it, keep what was found out; return 0 if the provider keeps its word."""
    from runcomfy.adapters.canary_file import keep_outcome
    from runcomfy.application.canary import Canary
    from runcomfy.application.faultpoints import entered
    from runcomfy.cli.app import open_app
    from runcomfy.cli.output import show_json, tell
    from runcomfy.cli.words import ended_well
    from runcomfy.domain.exceptions import ProviderError

    async with open_app(interrupts, require_cloud=True, quiet=as_json) as app:
        interrupts.good_end = lambda: ended_well(app.held())
        machines, _ = await app.cloud()
        canary = Canary(machines, tell=tell)
        plan = canary.plan()
        tell(_cost(plan))
        if not yes and not await _agreed():
            tell("nothing was launched")
            return 0
        outcome = await canary.run(plan)
        path = entered(keep_outcome, "canary.keep")(app.settings.files.state_dir, machines.provider.account, outcome)
        if as_json:
            show_json(outcome.as_dict())
        else:
            click.echo(f"{outcome.sentence}; it cost ${outcome.cost_usd:.4f}")
            tell(f"kept in {path}; `comfyctl doctor` shows it")
        if not outcome.ended_by_itself:
            raise ProviderError(
                "machines are not ended by themselves when their time is up",
                hint="keep `comfyctl guard` or `comfyctl serve` running while you rent machines, and tell RunComfy",
                details=outcome.as_dict(),
            )
    return 0


def _cost(plan: Plan) -> str:
    from runcomfy.cli.words import show_span

    rate = plan.rate
    return (
        f"the canary rents a {rate.server_type} machine (${rate.usd_per_hour} per hour) for {show_span(plan.lease)}, "
        f"does not stop it, and waits up to {show_span(plan.patience)} more for RunComfy to do so; "
        f"it costs at most ${plan.most_usd.quantize(Decimal('0.01'), ROUND_UP)}"
    )


async def _agreed() -> bool:
    """Ask; without a terminal the answer is no."""
    if sys.stdin is None or not sys.stdin.isatty():
        click.echo("add --yes to agree without being asked", err=True)
        return False
    answer = await asyncio.to_thread(input, "go on? [y/N] ")
    return answer.strip().lower() in ("y", "yes")
