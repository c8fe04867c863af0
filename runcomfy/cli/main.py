"""`comfyctl`: the table of commands, loaded when they are used, and the one border where errors become exit codes."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Table = Mapping[str, tuple[str, str]]
"""Name of a command -> `module:attribute`, and its line in the help."""

COMMANDS: Final[Table] = {
    "run": ("runcomfy.cli.run:run", "Run a workflow and bring its verified results."),
    "queue": ("runcomfy.cli.queue_commands:queue", "Put jobs into the queue, look at them, change their order."),
    "agent": ("runcomfy.cli.agent:agent", "Work on the queue: watch the folder of job files, run what waits."),
    "serve": ("runcomfy.cli.serve:serve", "Work off the queue over a pool of rented machines, within budgets."),
    "costs": ("runcomfy.cli.costs:costs", "What was spent, on what, and what it will be; estimates and checks."),
    "presence": ("runcomfy.cli.presence:presence", "Say that somebody is there, or what is about to come."),
    "dev": ("runcomfy.cli.dev:dev", "Start, look at, extend and stop the one warm dev server."),
    "machines": ("runcomfy.cli.machines:machines", "See what the account runs; stop, adopt, reap."),
    "guard": ("runcomfy.cli.guard:guard", "The small process that ends what outlives everything else."),
    "workflows": ("runcomfy.cli.workflows:workflows", "List, show and check workflows."),
    "config": ("runcomfy.cli.config:config", "Show every setting and where it came from."),
    "doctor": ("runcomfy.cli.doctor:doctor", "Test each layer alone and say which one is wrong."),
    "demo": ("runcomfy.cli.demo:demo", "The whole product on an emulated cloud: no account, no GPU."),
    "simulate": ("runcomfy.cli.simulate:simulate", "Live through a day in which much goes wrong, and judge it."),
    "emulator": ("runcomfy.cli.emulator:emulator", "Run the emulated cloud in the foreground."),
}


ENTRY_POINTS: Final = "runcomfy.commands"
"""The group of entry points in which installed packages add commands. One of ours cannot be replaced by them."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that `--help` stays quick.

    Beside its table it has what installed packages add: their names are looked up only for a command that the table
    does not have, and for help.
    """

    def __init__(
        self, *arguments: Any, table: Table = COMMANDS, entry_points: str | None = None, **options: Any
    ) -> None:
        """`entry_points` is the group of entry points with further commands."""
        super().__init__(*arguments, **options)
        self._table = table
        self._group = entry_points

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table, then what was added."""
        return [*self._table, *self._added()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or return None if there is none of that name."""
        if cmd_name in self._table:
            module, _, attribute = self._table[cmd_name][0].partition(":")
            command = getattr(import_module(module), attribute)
        else:
            added = self._added().get(cmd_name)
            if added is None:
                return None
            command = added.load()
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])
        if added := self._added():
            with formatter.section("Added by installed packages"):
                formatter.write_dl([(name, point.dist.name if point.dist else "") for name, point in added.items()])

    def _added(self) -> dict[str, EntryPoint]:
        if self._group is None:
            return {}
        from importlib.metadata import entry_points

        found = {point.name: point for point in entry_points(group=self._group)}
        return {name: found[name] for name in sorted(found) if name not in self._table}


@click.group(cls=LazyGroup, entry_points=ENTRY_POINTS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "--version", package_name="runcomfy-orchestrator", prog_name="comfyctl")
def comfyctl() -> None:
    """Run ComfyUI workflows on machines rented by the second: verified files out, the machine surely stopped.

    Exit codes: 0 done, 1 internal error, 2 bad input, 3 configuration, 4 provider, 5 the workflow failed, 6 timeout,
    7 results failed verification, 8 refused by a budget, 9 local disk or database, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # Starting is importing, which leaves no garbage: looking for it takes a tenth of the time. See `runner.run_async`.
    gc.disable()
    try:
        sys.exit(call(comfyctl, arguments))
    finally:
        gc.enable()


def call(command: click.Command, arguments: Sequence[str] | None = None, *, name: str = "comfyctl") -> int:
    """Run a command and return its exit code; every error ends here, as two lines on stderr."""
    try:
        result = command.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        message, hint = error.format_message(), _usage_hint(error, name)
        _two_lines(message, hint)
        if _wants_json(arguments):
            from runcomfy.cli.output import show_json
            from runcomfy.domain.exceptions import BadInput

            show_json({"error": BadInput(message, hint=hint).as_dict()})
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left; say nothing more
        return 1
    except Exception as error:  # noqa: BLE001 - the border: nothing leaves as a traceback
        return _failed(_full(error) or error, as_json=_wants_json(arguments))
    return result if isinstance(result, int) else 0


def _usage_hint(error: click.ClickException, name: str) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else name
    return f"see `{path} --help`"


def _wants_json(arguments: Sequence[str] | None) -> bool:
    """Whether whoever called reads JSON: then an error is an object, too, beside the lines for people."""
    return "--json" in (sys.argv[1:] if arguments is None else arguments)


def _failed(error: Exception, *, as_json: bool) -> int:
    from runcomfy.cli.output import show_error, show_json
    from runcomfy.domain.exceptions import RunComfyError

    if not isinstance(error, RunComfyError):
        import logging

        logging.getLogger("runcomfy.cli").error("defect", exc_info=error)
        kind, text = type(error).__name__, str(error)
        error = RunComfyError(
            f"unexpected {kind}: {text}", hint="this is a defect of the program; state/logs has the details"
        )
    show_error(error)
    if as_json:
        with suppress(OSError, ValueError):  # it may be stdout that failed
            show_json({"error": error.as_dict()})
    return error.exit_code


def _full(error: Exception) -> Exception | None:
    """Return what to say if our output goes to a disk that is full; results have errors of their own."""
    if not isinstance(error, OSError) or error.errno != errno.ENOSPC:
        return None
    from runcomfy.domain.exceptions import DiskFull

    # What could not be written must not be tried once more at the end: Python then ends with a code of its own.
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return DiskFull("the disk is full: what was to be printed could not be written", hint="free some space there")


def _two_lines(message: str, hint: str) -> None:
    click.echo(f"error: {message}", err=True)
    click.echo(f"  -> {hint}", err=True)


if __name__ == "__main__":
    main()
