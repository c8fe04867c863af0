"""`comfyctl dev`: the one warm dev server. The same as `python runcomfy/dev_server_startup.py`, a command per verb."""

from __future__ import annotations

from typing import Any

import click


@click.group()
def dev() -> None:
    """Start, look at, extend and stop the one warm dev server."""


def _server_options(command: Any) -> Any:
    options = (
        click.option("--server-type", metavar="TYPE", help="Machine type (default: RUNCOMFY_DEFAULT_SERVER_TYPE)."),
        click.option("--duration", metavar="TIME", help="How long it runs, from ready: seconds, or 90m, 2h."),
        click.option("--warm-up", is_flag=True, help="Run the workflow once, so that its models are loaded."),
        click.option("--monitor", is_flag=True, help="Stay and show queue, progress and cost."),
        click.option("--show-url", is_flag=True, help="Show the whole address; who knows it can use the machine."),
        click.option("--no-interactive", is_flag=True, help="Never read stdin."),
    )
    for option in reversed(options):  # help lists what was put on last first
        command = option(command)
    return command


@dev.command()
@_server_options
def start(**options: Any) -> int:
    """Launch the dev server, or reuse the one that runs."""
    from runcomfy.cli.dev_server import start_command

    return start_command(**options)


@dev.command()
@_server_options
def restart(**options: Any) -> int:
    """Stop the dev server and launch a new one of the same type and duration, unless told otherwise."""
    from runcomfy.cli.dev_server import restart_command

    return restart_command(**options)


@dev.command()
@click.option("--show-url", is_flag=True, help="Show the whole address; who knows it can use the machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(show_url: bool, as_json: bool) -> int:
    """Show the dev server as it really is."""
    from runcomfy.cli.dev_server import status_command

    return status_command(show_url=show_url, as_json=as_json)


@dev.command()
def shutdown() -> int:
    """Stop the dev server and look until it is gone."""
    from runcomfy.cli.dev_server import shutdown_command

    return shutdown_command()


dev.add_command(shutdown, "stop")


@dev.command()
@click.argument("time")
def extend(time: str) -> int:
    """Let the dev server run longer by TIME (seconds, or 30m, 1h)."""
    from runcomfy.cli.dev_server import extend_command

    return extend_command(time)


@dev.command()
@click.option("--no-interactive", is_flag=True, help="Never read stdin.")
def monitor(no_interactive: bool) -> int:
    """Stay and show the dev server's queue, progress and cost."""
    from runcomfy.cli.dev_server import monitor_command

    return monitor_command(no_interactive=no_interactive)
