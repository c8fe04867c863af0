"""
`e3`, and the programs behind `python -m comfyui_agent`: the queue's commands under the names its users know.

The same commands as `comfyctl queue` and `comfyctl agent`, in another tree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import click

from runcomfy.cli.main import LazyGroup, Table, call

E3: Final[Table] = {
    "init": (
        "runcomfy.cli.agent:init",
        "Make a project: its folders and its configuration.",
    ),
    "add": ("runcomfy.cli.queue_commands:add", "Take up job files."),
    "queue": ("runcomfy.cli.queue_commands:queue", "Look at the queue, change its order."),
    "retry": ("runcomfy.cli.queue_commands:retry", "Let a job that has ended run again."),
    "start": ("runcomfy.cli.agent:start", "Watch the folder of job files and run what waits."),
    "monitor": ("runcomfy.cli.agent:monitor", "Watch the folder of job files only."),
    "run": ("runcomfy.cli.agent:execute", "Run what waits only."),
    "status": ("runcomfy.cli.agent:status", "Who works on the queue, and what is paused."),
}


@click.group(cls=LazyGroup, table=E3, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "--version", package_name="runcomfy-orchestrator", prog_name="e3")
def e3() -> None:
    """Job files in, verified files out: a queue for ComfyUI that survives whatever happens to its programs.

    The same commands as `comfyctl queue` and `comfyctl agent`; the same exit codes, too.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `e3` and exit with its code."""
    sys.exit(call(e3, arguments, name="e3"))


def start_program() -> None:
    """Be `python -m comfyui_agent.run`."""
    _program("start", "run")


def monitor_program() -> None:
    """Be `python -m comfyui_agent.monitor`."""
    _program("monitor", "monitor")


def execute_program() -> None:
    """Be `python -m comfyui_agent.execute`."""
    _program("run", "execute")


def _program(command: str, door: str) -> None:
    module, _, attribute = E3[command][0].partition(":")
    found = getattr(import_module(module), attribute)
    sys.exit(call(found, name=f"python -m comfyui_agent.{door}"))


if __name__ == "__main__":
    main()
