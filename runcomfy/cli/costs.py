"""`comfyctl costs`: what was spent, on what, what it will be, and whether the books are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from runcomfy.cli.main import LazyGroup, Table
from runcomfy.cli.runner import run_async

Command = TypeVar("Command", bound=Callable[..., Any])

BY: Final = ("day", "machine", "job", "workflow", "user", "project")

COMMANDS: Final[Table] = {
    "estimate": ("runcomfy.cli.costs:estimate", "What jobs that have not run yet will take and cost, from history."),
    "check": ("runcomfy.cli.costs:check", "Compare our ledger with what the provider lists, and with its balance."),
    "budgets": ("runcomfy.cli.costs:budgets", "Every budget: committed, left, when it resets."),
    "plot": ("runcomfy.cli.costs:plot", "A picture of what was spent, busy against idle (PNG or SVG)."),
    "decisions": ("runcomfy.cli.costs:decisions", "What the plan decided, why, and what it was expected to cost."),
    "replay": (
        "runcomfy.cli.costs_replay:replay",
        "Run the plan over a trace of jobs and say what it would have cost.",
    ),
    "tune": ("runcomfy.cli.costs_replay:tune", "Try other settings on your own last days and recommend."),
}

Since = click.option(
    "--since", default="7d", show_default=True, metavar="TIME", help="From when: 7d, 12h, 2026-05-01, 2026-05-01T12:00."
)
GroupedBy = click.option("--by", type=click.Choice(BY), default="day", show_default=True, help="Grouped by what.")
AsJson = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(cls=LazyGroup, table=COMMANDS, invoke_without_command=True)
@Since
@click.option("--until", metavar="TIME", help="Until when (default: now).")
@GroupedBy
@AsJson
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.pass_context
def costs(context: click.Context, since: str, until: str | None, by: str, as_json: bool, as_csv: bool) -> int:
    """Show what was spent: busy money apart from idle money, jobs, the cost of one, and a forecast.

    A machine's idle and loading time is shared out over the jobs it served, by their computing seconds; what is left
    belongs to nobody. Times without a zone, and days, are UTC.
    """
    if context.invoked_subcommand is not None:
        return 0
    from runcomfy.cli.costs_show import show_report

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    return run_async(lambda ui: show_report(ui, since, until, by, as_json=as_json, as_csv=as_csv))


@click.command()
@click.argument("workflows", nargs=-1, required=True, metavar="WORKFLOW...")
@click.option("--count", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Runs of each.")
@click.option("--server-type", metavar="TYPE", help="Machine type (default: RUNCOMFY_DEFAULT_SERVER_TYPE).")
@click.option(
    "--machines", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Machines that share them."
)
@AsJson
def estimate(workflows: tuple[str, ...], count: int, server_type: str | None, machines: int, as_json: bool) -> int:
    """Say what jobs that have not run yet will take and cost, with a range, and on how many runs that rests.

    WORKFLOW is a shipped name or a file, as with `comfyctl run`. Only own history counts; without any nothing is told.
    """
    from runcomfy.cli.costs_show import show_estimates

    return run_async(lambda ui: show_estimates(ui, workflows, count, server_type, machines, as_json=as_json))


@click.command()
@click.option(
    "--since", default="30d", show_default=True, metavar="TIME", help="Machines that were open then, or later."
)
@AsJson
def check(since: str, as_json: bool) -> int:
    """Compare our books with the provider's list of machines, and with its balance where it tells one. Only reads.

    Exit code 4 if money is at stake: a machine that should be gone and is listed, one that our books count and the
    provider does not list, times that differ, a ledger that does not cover what was billed (by more than 1 % and 60 s).
    """
    from runcomfy.cli.costs_show import show_check

    return run_async(lambda ui: show_check(ui, since, as_json=as_json))


@click.command()
@AsJson
def budgets(as_json: bool) -> int:
    """Show every budget: what is spent or committed, what is left, when it resets.

    Committed is what was billed so far, every living lease to its end, and every launch that is under way.
    """
    from runcomfy.cli.costs_show import show_budgets

    return run_async(lambda ui: show_budgets(ui, as_json=as_json))


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@click.option("--since", default="30d", show_default=True, metavar="TIME", help="From when.")
@click.option("--until", metavar="TIME", help="Until when (default: now).")
@GroupedBy
def plot(file: str, since: str, until: str | None, by: str) -> int:
    """Draw what was spent, busy against idle, into FILE (.png or .svg). Needs the extra `plot`."""
    from runcomfy.cli.costs_show import draw_report

    return run_async(lambda ui: draw_report(ui, file, since, until, by))


@click.command()
@click.option("--since", metavar="TIME", help="Not older than this.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most so many, the newest.")
@AsJson
def decisions(since: str | None, limit: int, as_json: bool) -> int:
    """Show what the plan decided: what, why, and what it was expected to cost (or to save, as a minus)."""
    from runcomfy.cli.costs_show import show_decisions

    return run_async(lambda ui: show_decisions(ui, since, limit, as_json=as_json))
