"""`e3 init`: a project in this folder."""

from __future__ import annotations

from pathlib import Path

import click

import workflows
from runcomfy.adapters.agent_project import init_project
from runcomfy.application.faultpoints import entered
from runcomfy.cli.output import tell


def init_here(*, force: bool) -> int:
    """Make a project of the working directory and say what is new, and what comes next."""
    root = Path.cwd()
    made = entered(init_project, "agent.init")(root, load=workflows.load, force=force)
    for path in made.made:
        click.echo(f"made  {path}")
    for path in made.backups:
        click.echo(f"kept  {path} (the old content)")
    files = [path for path in made.left if not path.endswith("/")]
    if files:
        click.echo(f"left  {', '.join(files)}" + ("" if force else " (--force writes configuration anew)"))
    tell("next: drop job files into jobs/processing/image/ and run `python -m comfyui_agent.run` in this folder")
    return 0
