"""Progress for people: a live line in a terminal, plain lines where the output is piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.progress import Progress, Step

if TYPE_CHECKING:
    from rich.progress import TaskID

    from runcomfy.cli.runner import Interrupts

COUNTED = (Step.BOOTING, Step.QUEUED, Step.RUNNING, Step.FETCHING, Step.FINISHED)
"""Steps with a percentage of their own; during the others the bar stays where it was."""
PLAIN_EVERY = 2.0
"""Seconds between plain lines about the same node."""


def describe(progress: Progress) -> str:
    """Return what is going on in a few words."""
    if progress.step is Step.QUEUED and progress.queue_position is not None:
        ahead = progress.queue_position
        return f"waiting in the server's queue, {ahead} ahead" if ahead else "next in the server's queue"
    if progress.step is Step.RUNNING:
        words = foreign_text(progress.node_title or progress.message or "running", 60)
        if progress.value is not None and progress.maximum:
            words += f" {progress.value:g}/{progress.maximum:g}"
        return words
    return foreign_text(progress.message, 100) or str(progress.step)


class Display:
    """`with Display() as show:` — call `show(progress)`. Writes to stderr."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._live: Any = None
        self._task: TaskID | None = None
        self._last: tuple[str, str] | None = None
        self._last_at = 0.0
        self._percent = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        if not self._silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._live = Bar(
                TextColumn("[bold]{task.fields[step]:<9}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task("", total=100, step="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def attach(self, interrupts: Interrupts) -> None:
        """Let what is said about Ctrl+C be written without tearing the live line."""
        interrupts.say, interrupts.clear = self.tell, self._stop

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, sentence: str) -> None:
        """Write a sentence without tearing the live line."""
        text = foreign_text(sentence, 600)
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    def __call__(self, progress: Progress) -> None:
        """Show a snapshot."""
        if self._silent:
            return
        words = describe(progress)
        if self._live is not None:
            if progress.step in COUNTED:
                self._percent = progress.percent
            self._live.update(self._task, completed=self._percent, description=words, step=str(progress.step))
            return
        now = time.monotonic()
        key = (str(progress.step), progress.node_title or progress.message)
        if key == self._last and now - self._last_at < PLAIN_EVERY:
            return
        self._last, self._last_at = key, now
        percent = f" {progress.percent:5.1f}%" if progress.step in (Step.RUNNING, Step.QUEUED) else ""
        click.echo(f"[{now - self._started:6.1f} s] {progress.step:<9}{percent} {words}", err=True)
