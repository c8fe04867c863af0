"""`comfyctl run`: one workflow, once."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from runcomfy.cli.runner import Interrupts, run_async
from runcomfy.domain.job import PICTURE_FORMATS

if TYPE_CHECKING:
    from runcomfy.domain.job import JobRequest, JobResult


@click.command()
@click.argument("workflow")
@click.option("--image", metavar="PATH", help="The input picture.")
@click.option("--prompt", metavar="TEXT", help="What to make.")
@click.option("--seed", type=int, help="For every seed of the workflow; random unless given, always reported.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="TARGET=VALUE",
    help="TARGET is NODEID.input, Title.input or Class.input; VALUE is JSON or text; @FILE uploads that file.",
)
@click.option("--out", metavar="DIR", help="Where results go, in a folder of the job's own (default: outputs).")
@click.option("--server", metavar="URL", help="A ComfyUI that already runs: nothing is launched, nothing billed.")
@click.option("--server-type", metavar="TYPE", help="Machine type, if one has to be launched.")
@click.option("--timeout", metavar="TIME", help="Seconds or 90s, 10m, 1h; counted from when the machine is ready.")
@click.option("--convert", type=click.Choice(list(PICTURE_FORMATS)), help="Convert picture results.")
@click.option("--budget", metavar="USD", help="The most this run may cost; what would cost more is not begun.")
@click.option("--user", metavar="NAME", help="Whose budgets it counts against, and who is shown in the costs.")
@click.option("--project", metavar="NAME", help="For which project it is, likewise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
@click.option("--dry-run", is_flag=True, help="Check and show everything, send nothing.")
@click.option("--queue", "queued", is_flag=True, help="Put it into the queue and follow it; Ctrl+C leaves it there.")
@click.option("--priority", type=click.IntRange(1, 999), help="With --queue: its place, 1 first (default: 50).")
@click.option("--key", metavar="TEXT", help="With --queue: the same key again finds the same job, and runs nothing.")
def run(workflow: str, as_json: bool, dry_run: bool, queued: bool, **options: Any) -> int:
    """Run WORKFLOW, a shipped name or the path of an API-format file, and bring its verified results.

    Without --server it runs on the dev server if that is alive, else on a machine of its own, which is stopped at the
    end whatever happens. With --queue it runs where the queue's executors run.
    """
    for name in ("budget", "timeout", "server_type", "server"):
        if options[name] is not None and not options[name].strip():
            words = f"--{name.replace('_', '-')} is empty: give a value, or leave the option out"
            raise click.UsageError(words, click.get_current_context())
    for name in ("priority", "key"):
        if options[name] is not None and not queued:
            raise click.UsageError(f"--{name} is for jobs in the queue: add --queue", click.get_current_context())
    if queued and options["budget"] is not None:
        words = "--budget is for a run of its own; what the queue may cost is said to `comfyctl serve`"
        raise click.UsageError(words, click.get_current_context())
    if dry_run:
        from runcomfy.cli.dry_run import dry_run as show

        return _guarded(as_json, lambda: show(request_of(workflow, options), as_json=as_json))
    if queued:
        from runcomfy.cli.run_queued import run_queued

        return _guarded(
            as_json,
            lambda: run_async(lambda ui: run_queued(ui, request_of(workflow, options), options, {}, as_json=as_json)),
        )
    return _guarded(as_json, lambda: run_async(lambda interrupts: _run(interrupts, workflow, options, as_json=as_json)))


def _guarded(as_json: bool, work: Any) -> int:
    """Run `work`; with --json an error that comes before there is a job is printed as a failed job's object."""
    from runcomfy.domain.exceptions import RunComfyError

    try:
        code = work()
        return int(code)
    except RunComfyError as error:
        if not as_json:
            raise
        from runcomfy.cli.output import show_json

        show_json(early_failure(error))
        return error.exit_code


def early_failure(error: Any) -> dict[str, Any]:
    """Return the object that `--json` prints for a job that never began."""
    from uuid import uuid4

    from runcomfy.domain.job import JobId, JobResult, JobStatus

    result = JobResult(
        JobId(str(uuid4())), JobStatus.FAILED, error=error.as_dict(), exit_code=error.exit_code, cost_usd=Decimal(0)
    )
    return result.as_dict()


def request_of(workflow: str, options: dict[str, Any]) -> JobRequest:
    """Return the request that the options make. Raises BadInput."""
    from runcomfy.domain.durations import parse_duration
    from runcomfy.domain.exceptions import ValueInvalid
    from runcomfy.domain.job import JobRequest

    sets: dict[str, Any] = {}
    for item in options["sets"]:
        target, sign, value = item.partition("=")
        if not sign or not target.strip():
            raise ValueInvalid(
                f"--set {item!r} has no '='", hint="write --set TARGET=VALUE, for example --set 3.steps=30"
            )
        sets[target.strip()] = value
    timeout = parse_duration(options["timeout"]) if options["timeout"] else None
    if timeout is not None and not timeout:
        raise ValueInvalid("a timeout of nothing cannot be met", hint="write for example --timeout 10m")
    return JobRequest(
        workflow=workflow,
        image=options["image"],
        prompt=options["prompt"],
        seed=options["seed"],
        sets=sets,
        out_dir=options["out"],
        server_url=options["server"],
        server_type=options["server_type"],
        timeout=timeout,
        convert=options["convert"],
        user=options["user"] or "",
        project=options["project"] or "",
    )


async def _run(interrupts: Interrupts, workflow: str, options: dict[str, Any], *, as_json: bool) -> int:
    from runcomfy.cli.app import open_app
    from runcomfy.cli.output import tell
    from runcomfy.cli.progress_display import Display
    from runcomfy.cli.words import ended_well

    request = request_of(workflow, options)
    interrupts.listens = True
    overrides = {"RUNCOMFY_BUDGET_RUN": options["budget"]} if options["budget"] is not None else None
    async with open_app(interrupts, overrides, quiet=as_json) as app:
        with Display(silent=as_json) as display:
            app.tell = display.tell
            display.attach(interrupts)
            result = await app.orchestrator().run(request, on_progress=display, cancel=interrupts.event)
        if result.status == "cancelled" and not as_json:
            for line in ended_well(app.held()):
                tell(line)
    return show_result(result, as_json=as_json)


def show_result(result: JobResult, *, as_json: bool) -> int:
    """Print what came of a job and return its exit code."""
    from runcomfy.cli.output import bill_table, show_error, show_json

    if as_json:
        show_json(result.as_dict())
        return result.exit_code
    for output in result.outputs:
        click.echo(f"{output.kind:<6} {output.path}  ({output.size_bytes:,} bytes)")
    for target, seed in result.seeds.items():
        if result.outputs:
            click.echo(f"seed   {target} = {seed}")
    if result.bill:
        click.echo(bill_table(result.bill))
    elif result.outputs:
        click.echo("cost   nothing was billed: the job ran on a server that was already there")
    if result.exception is not None:
        from runcomfy.domain.exceptions import RunComfyError

        if isinstance(result.exception, RunComfyError):
            show_error(result.exception)
            _show_problems(result.exception.details.get("problems"))
    return result.exit_code


def _show_problems(problems: Any) -> None:
    """List every problem of a refused workflow, each with what to do, when there is more than one."""
    from runcomfy.cli.output import tell

    if not isinstance(problems, list) or len(problems) < 2:
        return
    for problem in problems:
        tell(f"  - {problem['message']} -> {problem['hint']}")  # the message names the node
