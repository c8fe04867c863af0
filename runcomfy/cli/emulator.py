"""`comfyctl emulator`: the emulated cloud in the foreground, for trying things and for tests in other processes."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import timedelta

import click

from runcomfy.cli.output import tell
from runcomfy.cli.runner import Interrupts, run_async


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; 0 takes any free one.")
@click.option(
    "--boot-seconds",
    type=click.FloatRange(min=0),
    default=5.0,
    show_default=True,
    help="How long machines are Starting; real ones take about 180 s.",
)
@click.option(
    "--delete-seconds",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="How long machines are Deleting.",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="How much quicker than told the nodes of the emulated ComfyUI work.",
)
@click.option("--no-comfyui", is_flag=True, help="Machines get an address that leads nowhere.")
@click.option("--no-rate-limit", is_flag=True, help="Never answer 429.")
@click.option(
    "--shell",
    "form",
    type=click.Choice(["posix", "powershell"]),
    default="powershell" if sys.platform == "win32" else "posix",
    show_default=True,
    help="The form of the printed lines.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the variables as one JSON object on one line.")
def emulator(
    port: int,
    boot_seconds: float,
    delete_seconds: float,
    speed: float,
    *,
    no_comfyui: bool,
    no_rate_limit: bool,
    form: str,
    as_json: bool,
) -> int:
    """Run the emulated cloud in the foreground until Ctrl+C. No GPU, no model, no money.

    Prints the environment variables that point other commands at it.
    """

    async def serve(interrupts: Interrupts) -> int:
        from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

        cloud = RunComfyEmulator(
            port=port,
            boot_time=timedelta(seconds=boot_seconds),
            delete_takes=delete_seconds,
            comfyui=not no_comfyui,
            comfyui_speed=speed,
            rate_limit=not no_rate_limit,
        )
        interrupts.listens = True
        try:
            await cloud.start()
        except OSError as error:
            raise click.ClickException(f"cannot listen at port {port}: {error.strerror or error}") from error
        async with cloud:
            named = cloud.environment()
            click.echo(json.dumps(named) if as_json else environment_lines(named, form=form))
            sys.stdout.flush()  # whoever started us through a pipe waits for these lines
            tell(f"the cloud at {cloud.url} is emulated: no GPU model runs and nothing costs money")
            tell(f"what bills there: {cloud.url}/__emulator__/bill; end it with Ctrl+C")
            await interrupts.event.wait()
            still = cloud.billing
        if still:
            tell(f"machines were still billing when the emulated cloud ended: {', '.join(still)}")
        return 0

    return run_async(serve)


def environment_lines(named: Mapping[str, str], *, form: str) -> str:
    """Return lines that set the variables when pasted into a shell of that form."""
    if form == "powershell":
        return "\n".join(f"$env:{name} = '{value.replace(chr(39), chr(39) * 2)}'" for name, value in named.items())
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in named.items())
