"""`comfyctl conjure`: put our files into a CONJURE project, put back what was there, say which of both it is."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from launcher.swap import Report

_PATH = click.argument("path", metavar="PATH")
_FORCE = click.option("--force", is_flag=True, help="Go on over files changed since; a copy of each is kept.")
_DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done, do nothing.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group()
def conjure() -> None:
    """Let the application CONJURE generate through this product, or no longer."""


@conjure.command()
@_PATH
@_FORCE
@_DRY_RUN
@_JSON
def install(path: str, force: bool, dry_run: bool, as_json: bool) -> int:
    """Put our files into the CONJURE project at PATH; what they replace is kept there.

    CONJURE must be run by a Python that has this product. Repeating it is harmless.
    """
    from launcher.swap import find_project
    from launcher.swap import install as do

    report = do(find_project(path), force=force, dry_run=dry_run)
    if as_json:
        return _as_json(report)
    _say(report, "would be done in" if dry_run else "installed into")
    if not dry_run:
        click.echo(f"  run CONJURE with this Python: {report.python}")
        click.echo(f"  undo: comfyctl conjure uninstall {_quoted(report.project)}")
    return 0


@conjure.command()
@_PATH
@_FORCE
@_DRY_RUN
@_JSON
def uninstall(path: str, force: bool, dry_run: bool, as_json: bool) -> int:
    """Put back what was in the CONJURE project at PATH before, byte for byte."""
    from launcher.swap import find_project
    from launcher.swap import uninstall as do

    report = do(find_project(path), force=force, dry_run=dry_run)
    if as_json:
        return _as_json(report)
    _say(report, "would be done in" if dry_run else "CONJURE is as it was in")
    if not dry_run:
        click.echo(f"  again: comfyctl conjure install {_quoted(report.project)}")
    return 0


@conjure.command()
@_PATH
@_JSON
def status(path: str, as_json: bool) -> int:
    """Say whether our files are in the CONJURE project at PATH, and whether one was changed since."""
    from launcher.swap import find_project
    from launcher.swap import status as look

    report = look(find_project(path))
    if as_json:
        return _as_json(report)
    _say(report, f"{report.state}:")
    if report.python:
        click.echo(f"  for this Python: {report.python}")
    if report.state == "changed":
        click.echo("  a changed file is not overwritten: look at it, then repeat with --force")
    if report.state.startswith("half"):
        click.echo("  repeat `comfyctl conjure install` or `uninstall`: either goes on where it stopped")
    return 0


def _say(report: Report, words: str) -> None:
    click.echo(f"{words} {report.project} ({report.revision})")
    for file in report.files:
        click.echo(f"  {file['path']}: {file['what']}")
    if report.backup:
        click.echo(f"  kept in {report.backup}")
    for note in report.notes:
        click.echo(f"  {note}")


def _as_json(report: Report) -> int:
    click.echo(json.dumps(report.as_dict(), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))
    return 0


def _quoted(path: str) -> str:
    import shlex
    import subprocess

    return subprocess.list2cmdline([path]) if sys.platform == "win32" else shlex.quote(path)
