"""`comfyctl queue`: put jobs in, look at them, change their order, end them. Each command is one thing done once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from runcomfy.cli.runner import run_async
from runcomfy.domain.queued import FIRST_PRIORITY, LAST_PRIORITY, QueueStatus

if TYPE_CHECKING:
    from runcomfy.application.job_queue import JobQueue
    from runcomfy.domain.queued import QueuedJob

Command = TypeVar("Command", bound=Callable[..., Any])

AsJson = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def queue_options(command: Command) -> Command:
    """Add the options that say which queue is meant; they arrive as `database` and `config`."""
    database = click.option(
        "--database",
        metavar="PATH",
        help="The queue's database: a file (default: what the configuration says). The address of a PostgreSQL belongs "
        "into COMFYUI_AGENT_DATABASE, where nobody else can read its password.",
    )
    config = click.option(
        "--config",
        metavar="PATH",
        type=click.Path(),
        help="The global_config.yaml (default: comfyui_agent/config/ or config/ below this folder).",
    )
    return database(config(command))


@click.group()
def queue() -> None:
    """Put jobs into the queue, look at them, change their order, end them.

    NAME is a job's config name, its number, or its uid.
    """


# -- putting in ----------------------------------------------------------------------------------------------


@queue.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path())
@queue_options
@AsJson
def add(files: tuple[str, ...], as_json: bool, **where: Any) -> int:
    """Take up job files now, as the monitor would. A file that cannot be used changes nothing."""
    from runcomfy.cli.queue_work import add_files

    return run_async(lambda interrupts: add_files(interrupts, files, where, as_json=as_json))


# -- looking -------------------------------------------------------------------------------------------------


@queue.command("ls")
@click.option("-s", "--status", type=click.Choice([str(status) for status in QueueStatus]), help="Only these.")
@click.option("--limit", type=click.IntRange(1), help="At most so many of each status (default: 50; with --json all).")
@queue_options
@AsJson
@click.option("--watch", is_flag=True, help="Stay and show what changes, until Ctrl+C.")
def ls(status: str | None, limit: int | None, as_json: bool, watch: bool, **where: Any) -> int:
    """List the jobs, what is paused, and whether anybody works on the queue."""
    from runcomfy.cli.queue_work import list_jobs

    wanted = QueueStatus(status) if status else None
    return run_async(lambda ui: list_jobs(ui, wanted, limit, where, as_json=as_json, watch=watch))


@queue.command()
@click.argument("name")
@queue_options
@AsJson
@click.option("--watch", is_flag=True, help="Stay and show its progress until it has ended.")
def show(name: str, as_json: bool, watch: bool, **where: Any) -> int:
    """Show a job: what it does, its attempts, its results, its last error."""
    from runcomfy.cli.queue_work import show_job

    return run_async(lambda interrupts: show_job(interrupts, name, where, as_json=as_json, watch=watch))


@queue.command()
@click.argument("name", required=False)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="How many of the latest.")
@click.option("--follow", is_flag=True, help="Stay and print what happens, until Ctrl+C.")
@queue_options
@AsJson
def events(name: str | None, limit: int, follow: bool, as_json: bool, **where: Any) -> int:
    """Print the event log, of one job or of all; with --json a JSON object per line."""
    from runcomfy.cli.queue_work import print_events

    return run_async(lambda ui: print_events(ui, name, limit, where, as_json=as_json, follow=follow))


# -- changing ------------------------------------------------------------------------------------------------

Change = Callable[["JobQueue", str, str], Awaitable["QueuedJob"]]


def _changed(name: str, where: dict[str, Any], change: Change, said: str, *, as_json: bool) -> int:
    from runcomfy.cli.queue_work import change_job

    return run_async(lambda interrupts: change_job(interrupts, name, where, change, said, as_json=as_json))


@queue.command("set-priority")
@click.argument("name")
@click.argument("priority", type=int)
@queue_options
@AsJson
def set_priority(name: str, priority: int, as_json: bool, **where: Any) -> int:
    """Give a job another priority, 1 (first) to 999 (last); obeyed at the next claim."""

    async def change(jobs: JobQueue, found: str, by: str) -> QueuedJob:
        return await jobs.set_priority(found, priority, by=by)

    if not FIRST_PRIORITY <= priority <= LAST_PRIORITY:
        click.echo(f"priorities go from {FIRST_PRIORITY} to {LAST_PRIORITY}; {priority} is cut to that", err=True)
    return _changed(name, where, change, "has priority {priority}", as_json=as_json)


@queue.command("god-mode")
@click.argument("name")
@queue_options
@AsJson
def god_mode(name: str, as_json: bool, **where: Any) -> int:
    """Let a job be the next one: priority 1."""

    async def change(jobs: JobQueue, found: str, by: str) -> QueuedJob:
        return await jobs.god_mode(found, by=by)

    return _changed(name, where, change, "has priority {priority}", as_json=as_json)


@queue.command()
@click.argument("name")
@queue_options
@AsJson
def retry(name: str, as_json: bool, **where: Any) -> int:
    """Let a job that has ended run again from the start, also a cancelled one; one that waits, at once."""

    async def change(jobs: JobQueue, found: str, by: str) -> QueuedJob:
        return await jobs.retry(found, by=by)

    return _changed(name, where, change, "waits to be run", as_json=as_json)


@queue.command()
@click.argument("name")
@queue_options
@AsJson
def cancel(name: str, as_json: bool, **where: Any) -> int:
    """End a job for good: it is not run any more, no result counts any more, its prompt is interrupted by its id."""

    async def change(jobs: JobQueue, found: str, by: str) -> QueuedJob:
        return await jobs.cancel(found, by=by)

    return _changed(name, where, change, "is {status_word}", as_json=as_json)


@queue.command()
@click.option("--reason", metavar="TEXT", default="", help="Shown to whoever looks at the queue.")
@queue_options
@AsJson
def pause(reason: str, as_json: bool, **where: Any) -> int:
    """Let no further job begin, on any host; what runs goes on."""
    from runcomfy.cli.queue_work import pause_queue

    return run_async(lambda interrupts: pause_queue(interrupts, reason, where, as_json=as_json))


@queue.command()
@queue_options
@AsJson
def resume(as_json: bool, **where: Any) -> int:
    """End every pause, also one that an executor made (a full disk, a refused budget)."""
    from runcomfy.cli.queue_work import resume_queue

    return run_async(lambda interrupts: resume_queue(interrupts, where, as_json=as_json))
