"""`comfyctl serve`: work off the queue over a pool of rented machines, until told to stop."""

from __future__ import annotations

import sys
from typing import Any

import click

from runcomfy.cli.agent import Lines
from runcomfy.cli.queue_commands import queue_options
from runcomfy.cli.runner import run_async


@click.command()
@click.option("--max-machines", type=click.IntRange(1, 10_000), help="Rented at once at most, starting ones counted.")
@click.option("--min-machines", type=click.IntRange(0, 10_000), help="Kept even with nothing to do (default: 0).")
@click.option("--budget-run", metavar="USD", help="Spent by this command at most.")
@click.option("--budget-hour", metavar="USD", help="Spent in a clock hour (UTC) at most.")
@click.option("--budget-day", metavar="USD", help="Spent in a day (UTC) at most.")
@click.option("--budget-month", metavar="USD", help="Spent in a calendar month (UTC) at most.")
@click.option(
    "--wait-price",
    metavar="PRICE",
    help="What an hour of one job's waiting is worth: batch, normal (default), person waiting, or USD.",
)
@click.option("--latency-target", metavar="TIME", help="In place of a price: 95 of 100 jobs should wait no longer.")
@click.option("--server-type", "server_types", metavar="TYPE", multiple=True, help="May be rented; repeatable.")
@click.option("--keep-alive", metavar="TIME", help="Keep an idle machine for so long (default: learned).")
@click.option("--monitor/--no-monitor", default=None, help="Also take up job files (default: if this is a project).")
@click.option("--once", is_flag=True, help="Work off what is there, end all machines, leave.")
@click.option("--no-guard", is_flag=True, help="Start no guard process.")
@click.option("--host", metavar="NAME", help="Answer HTTP here (default: 127.0.0.1, this computer alone).")
@click.option("--port", type=click.IntRange(0, 65_535), help="Answer HTTP at this port; 0: any (default: 8000).")
@click.option("--no-http", is_flag=True, help="Answer no HTTP: no API, no page.")
@click.option("--no-pool", is_flag=True, help="Rent nothing: jobs run on the ComfyUI at --server, or your own.")
@click.option("--no-queue", is_flag=True, help="Run nothing: the API and the page alone.")
@click.option("--server", metavar="URL", help="Run jobs on this ComfyUI, and rent nothing.")
@queue_options
@Lines
def serve(as_json: bool, **options: Any) -> int:
    """Work off the queue over rented machines: launched when that pays, shared, replaced when ill, ended when not.

    Also answers HTTP at http://127.0.0.1:8000: the API, and the page, whose address is printed with a code that logs in
    once. Each part can be switched off. With --no-pool or --server jobs run on a ComfyUI of yours and no account is
    needed. With --once HTTP is answered only if --host or --port is given.

    The first Ctrl+C (or SIGTERM) begins nothing more, lets what runs go on for a while, and ends the machines; the
    second leaves at once. After that, or after a crash, machines end by their leases, and the next start takes up what
    is left. Budgets are hard: what would go above one is not launched, and jobs wait.

    With --once jobs that wait for their next try are waited for. It exits 0 only if nothing is left: else with the code
    of what keeps jobs from being begun (8: a budget, 4: no machine can be had, 2: the queue is paused), or 5 if jobs
    failed in this run.
    """
    from runcomfy.cli.serve_work import Asked, work

    where = {"database": options.pop("database"), "config": options.pop("config")}
    asked = Asked(**options, as_json=as_json)
    return run_async(lambda interrupts: work(interrupts, asked, where), stays=True)


def main() -> None:
    """Run `python launcher/main.py` and exit with its code."""
    from runcomfy.cli.main import call

    sys.exit(call(serve, name="launcher/main.py"))


def main_as_server() -> None:
    """Run `python launcher/api_server.py`: the same, and without an account an API that runs nothing."""
    from runcomfy.cli.main import call

    sys.exit(call(_as_server, name="launcher/api_server.py"))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def _as_server(arguments: tuple[str, ...]) -> int:
    """Serve what RUNCOMFY_SERVE says: pool, queue or none (default: pool if there is an account, else none)."""
    from runcomfy.bootstrap import serves

    parts = serves()
    flags = [] if "pool" in parts else ["--no-pool"] if "queue" in parts else ["--no-queue"]
    code: int = serve.main([*flags, *arguments], prog_name="launcher/api_server.py", standalone_mode=False)
    return code
