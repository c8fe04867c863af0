"""`comfyctl demo --serve`: the page over the emulated cloud, with a few jobs to look at, until Ctrl+C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from runcomfy.bootstrap import App
    from runcomfy.cli.runner import Interrupts
    from runcomfy.domain.job import JobRequest

PROMPTS: Final = ("a vase of blue glass", "a lighthouse at dusk, oil on canvas")
"""Beside the demo's own: so that the page has something to show when it opens."""


async def serve_demo(
    interrupts: Interrupts, overrides: Mapping[str, str], request: JobRequest, folder: Path, out: Path
) -> None:
    """Answer HTTP on a free port of this computer and work off the queue over the emulated cloud, until told to stop.

    Results go below `out`, an absolute path. Everything that was rented is ended when this returns.
    """
    from runcomfy.application.service import ServeOptions
    from runcomfy.bootstrap import App
    from runcomfy.cli.app import load
    from runcomfy.cli.words import still_billing

    queue = {"where": "pool", "root": str(out), "database": str(folder / "queue.sqlite3")}
    interrupts.listens = True
    interrupts.answer = "stopping: the emulated machines are ended (Ctrl+C again leaves at once)"
    async with App(load(overrides, quiet=True), overrides=overrides, tell=click.echo, queue=queue) as app:
        interrupts.last_words = lambda: still_billing(app.held())
        http = {"enabled": True, "host": "127.0.0.1", "port": 0, "listening": _say}
        await _put(app, request)
        await app.serve(ServeOptions(guard=False, extra={"http": http}), interrupts.event)


def _say(where: Any) -> None:
    click.echo(f"the page, for you alone, until Ctrl+C: {where.page}")


async def _put(app: App, request: JobRequest) -> None:
    queue = await app.job_queue()
    wanted = replace(request, out_dir=None)
    await queue.enqueue_many([wanted, *(replace(wanted, prompt=prompt, seed=None) for prompt in PROMPTS)])
