"""`comfyctl agent`: the programs that work on the queue. Several may, on any hosts, over one database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from runcomfy.cli.queue_commands import AsJson, queue_options
from runcomfy.cli.runner import run_async

if TYPE_CHECKING:
    from runcomfy.cli.agent_work import Task

Command = TypeVar("Command", bound=Callable[..., Any])

Once = click.option("--once", is_flag=True, help="Work off what is there, then leave.")
Lines = click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line in place of sentences.")


def _work_options(command: Command) -> Command:
    options = (
        click.option("--server", metavar="URL", help="Run on this ComfyUI (default: comfyui.api_base_url)."),
        click.option(
            "--cloud", is_flag=True, help="Run on the dev server if it lives, else on a machine rented for it."
        ),
        click.option("--slots", type=click.IntRange(1, 1000), help="Jobs worked on at once (default: 1)."),
    )
    for option in reversed(options):  # help lists what was put on last first
        command = option(command)
    return command


def _run(task: Task, where: Mapping[str, Any]) -> int:
    from runcomfy.cli.agent_work import work

    return run_async(lambda interrupts: work(interrupts, task, where), stays=True)


@click.group()
def agent() -> None:
    """Work on the queue: watch the folder of job files, run what waits.

    The first Ctrl+C (or SIGTERM) takes up nothing more and lets what runs go on for a while; the second leaves at once.
    Either way the next start goes on where this one ended.

    With --once jobs that wait for their next try are waited for. It exits 0 only if nothing is left: else with the code
    of what keeps jobs from being begun (2: the queue is paused, 4: there is no place), or 5 if jobs failed in this run.
    """


@agent.command()
@_work_options
@Once
@queue_options
@Lines
def start(server: str | None, cloud: bool, slots: int | None, once: bool, as_json: bool, **where: Any) -> int:
    """Watch the folder of job files and run what waits, in one process."""
    from runcomfy.cli.agent_work import Task

    task = Task(monitor=True, execute=True, server=server, cloud=cloud, slots=slots, once=once, as_json=as_json)
    return _run(task, where)


@agent.command()
@Once
@queue_options
@Lines
def monitor(once: bool, as_json: bool, **where: Any) -> int:
    """Watch the folder of job files only: what appears there gets into the database."""
    from runcomfy.cli.agent_work import Task

    task = Task(monitor=True, execute=False, once=once, as_json=as_json)
    return _run(task, where)


@agent.command()
@_work_options
@Once
@queue_options
@Lines
def execute(server: str | None, cloud: bool, slots: int | None, once: bool, as_json: bool, **where: Any) -> int:
    """Run what waits in the database only."""
    from runcomfy.cli.agent_work import Task

    task = Task(monitor=False, execute=True, server=server, cloud=cloud, slots=slots, once=once, as_json=as_json)
    return _run(task, where)


@agent.command()
@queue_options
@AsJson
def status(as_json: bool, **where: Any) -> int:
    """Show who works on the queue and on what, what is paused, how much waits."""
    from runcomfy.cli.agent_status import show_status

    return run_async(lambda interrupts: show_status(interrupts, where, as_json=as_json))


@agent.command()
@click.option("-f", "--force", is_flag=True, help="Write configuration files anew that are there already.")
def init(force: bool) -> int:
    """Make a project in this folder: the folders for job files and results, and its configuration."""
    from runcomfy.cli.agent_init import init_here

    return init_here(force=force)
