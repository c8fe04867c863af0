"""What the commands of `comfyctl queue` do: open the queue, ask or change one thing, print."""

from __future__ import annotations

import asyncio
import getpass
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from runcomfy.cli import queue_display as display
from runcomfy.cli.output import show_error, show_json, table, tell
from runcomfy.cli.runner import Interrupts
from runcomfy.domain.exceptions import (
    BadInput,
    ConfigurationError,
    JobNotFound,
    NameTaken,
    RunComfyError,
    foreign_text,
)
from runcomfy.domain.queued import Ingested, JobEvent, Pause, QueuedJob, QueueStatus

if TYPE_CHECKING:
    from runcomfy.application.job_queue import JobQueue
    from runcomfy.bootstrap import App
    from runcomfy.ports.jobs import JobStore

LINES: Final = 50
"""Jobs of each status that a list shows people, unless they say how many."""
LOOK_EVERY: Final = timedelta(seconds=1)
"""A watching command looks at least so often: progress of running jobs wakes nobody."""
ORDER: Final = (QueueStatus.PROCESSING, QueueStatus.PENDING, QueueStatus.FAILED, QueueStatus.DONE)


@asynccontextmanager
async def open_queue(
    interrupts: Interrupts, where: Mapping[str, Any], *, quiet: bool, makes: bool = False
) -> AsyncIterator[App]:
    """Open the product on the queue that the options name.

    Only what puts jobs in `makes` a database: a command that is called in a wrong folder must not leave one there.
    Raises JobNotFound if there is none.
    """
    from runcomfy.cli.app import open_app

    async with open_app(interrupts, queue=where, quiet=quiet, launches=False) as app:
        if not makes and not app.queue_exists:
            raise JobNotFound(
                f"there is no queue at {app.queue_where} yet",
                hint="change into the project's folder, or put a job in: `comfyctl queue add FILE`",
            )
        yield app


# -- looking -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """One reading of the queue."""

    jobs: Sequence[QueuedJob]
    counts: Mapping[QueueStatus, int]
    pauses: Sequence[Pause]
    workers: str


async def list_jobs(
    interrupts: Interrupts,
    status: QueueStatus | None,
    limit: int | None,
    where: Mapping[str, Any],
    *,
    as_json: bool,
    watch: bool,
) -> int:
    """Print the jobs, once or for as long as the user looks."""
    async with open_queue(interrupts, where, quiet=as_json, makes=True) as app:
        if not watch and not app.queue_exists:
            show_json([]) if as_json else click.echo(
                f"the queue is empty: there is no database at {app.queue_where} yet"
            )
            return 0
        store = await app.job_store()
        if watch:
            await _watch_jobs(app, store, interrupts, status, limit, as_json=as_json)
        elif as_json:
            show_json([display.job_facts(job) for job in await _jobs(store, status, limit)])
        else:
            for line in _lines(await _view(app, store, status, limit or LINES), store):
                click.echo(line)
    return 0


async def _jobs(store: JobStore, status: QueueStatus | None, limit: int | None) -> list[QueuedJob]:
    """Return what is worked on, what waits in its order, what has ended with the newest first."""
    found: list[QueuedJob] = []
    for one in ORDER if status is None else (status,):
        ended = one in (QueueStatus.FAILED, QueueStatus.DONE)
        found += await store.jobs(status=one, limit=limit, newest_first=ended)
    return found


async def _view(app: App, store: JobStore, status: QueueStatus | None, limit: int) -> View:
    from runcomfy.cli.agent_status import workers_line

    return View(
        jobs=await _jobs(store, status, limit),
        counts=await store.counts(),
        pauses=await store.pauses(),
        workers=await workers_line(app),
    )


def _lines(view: View, store: JobStore) -> list[str]:
    now = store.now()
    lines = [table(display.HEADERS, [display.row(job, now=now) for job in view.jobs])] if view.jobs else []
    shown = {status: sum(1 for job in view.jobs if job.status is status) for status in QueueStatus}
    more = [f"{view.counts[s] - n} more {s}" for s, n in shown.items() if n and view.counts.get(s, 0) > n]
    if more:
        lines.append(f"not shown: {', '.join(more)} (--limit shows more)")
    return [*lines, display.counts_line(view.counts), *_notices(view, store)]


def _notices(view: View, store: JobStore) -> list[str]:
    return [*(display.pause_line(pause, now=store.now()) for pause in view.pauses), view.workers]


async def _watch_jobs(
    app: App,
    store: JobStore,
    interrupts: Interrupts,
    status: QueueStatus | None,
    limit: int | None,
    *,
    as_json: bool,
) -> None:
    """Show the list until Ctrl+C: a live table in a terminal, else a line for each job that changed."""
    interrupts.listens, interrupts.answer = True, ""
    if sys.stdout.isatty() and not as_json:
        from rich.console import Console
        from rich.live import Live

        console = Console()
        with Live(console=console, auto_refresh=False) as live:
            interrupts.clear = live.stop
            async for _ in _changes(store, interrupts):
                room = max(5, console.height - 8)
                live.update(_rich(await _view(app, store, status, min(limit or LINES, room)), store), refresh=True)
        return
    last: dict[int, tuple[Any, ...]] = {}
    said: list[str] = []
    async for _ in _changes(store, interrupts):
        view = await _view(app, store, status, limit or LINES)
        for job in view.jobs:
            row = display.row(job, now=store.now())
            if last.get(job.id) != row:
                last[job.id] = row
                _say(job, row, as_json=as_json)
        notices = _notices(view, store)
        if notices != said and not as_json:
            for line in notices:
                click.echo(line)
        said = notices
        sys.stdout.flush()


def _say(job: QueuedJob, row: Sequence[str], *, as_json: bool) -> None:
    click.echo(json.dumps(display.job_facts(job), default=str) if as_json else "  ".join(row))


def _rich(view: View, store: JobStore) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False)
    for header in display.HEADERS:
        shown.add_column(header, no_wrap=True, overflow="ellipsis", ratio=2 if header in ("name", "what") else None)
    for job in view.jobs:
        shown.add_row(*(Text(foreign_text(cell, 120)) for cell in display.row(job, now=store.now())))
    return Group(shown, Text(display.counts_line(view.counts)), *(Text(line) for line in _notices(view, store)))


async def _changes(store: JobStore, interrupts: Interrupts) -> AsyncIterator[None]:
    """Yield at once, then whenever the database may have changed, until Ctrl+C."""
    mark = 0
    while not interrupts.event.is_set():
        yield
        look = asyncio.ensure_future(store.changed(timeout=LOOK_EVERY, seen=mark))
        end = asyncio.ensure_future(interrupts.event.wait())
        await asyncio.wait({look, end}, return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if not look.done():
            look.cancel()
            await asyncio.wait({look})
            return
        mark = look.result()


async def find_job(store: JobStore, name: str) -> QueuedJob:
    """Return the job with that config name, number or uid; the path of its job file will do, too.

    Raises JobNotFound, with the names that come near.
    """
    job = await store.job(name)
    if job is None and (file_name := Path(name).name) != name:
        job = await store.job(file_name)
    if job is not None:
        return job
    names = [other.config_name for other in await store.jobs(limit=1_000, newest_first=True)]
    if not names:
        hint = "the queue is empty; `comfyctl queue add FILE` takes up a job file"
    elif near := get_close_matches(name, names, 3, 0.5) or [n for n in names if name in n][:3]:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = "`comfyctl queue ls` lists the jobs; a job is known by its config name, its number, or its uid"
    raise JobNotFound(f"the queue has no job {foreign_text(name, 120)!r}", hint=hint)


async def show_job(interrupts: Interrupts, name: str, where: Mapping[str, Any], *, as_json: bool, watch: bool) -> int:
    """Print everything of one job."""
    async with open_queue(interrupts, where, quiet=as_json) as app:
        store = await app.job_store()
        job = await find_job(store, name)
        if watch and not job.ended:
            interrupts.listens, interrupts.answer = True, ""
            job = await _watch_job(store, job, interrupts, silent=as_json)
        attempts = await store.attempts(job.id)
        if as_json:
            facts = [display.attempt_facts(attempt) for attempt in attempts]
            show_json({**display.job_facts(job), "attempts": facts})
        else:
            for line in display.details(job, attempts, now=store.now()):
                click.echo(line)
    return 0


async def _watch_job(store: JobStore, job: QueuedJob, interrupts: Interrupts, *, silent: bool) -> QueuedJob:
    """Tell what a job does until it has ended, or until Ctrl+C; return it as it is then."""
    last = ""
    async for _ in _changes(store, interrupts):
        job = await store.job(job.id) or job
        line = f"{job.status}: {display.what_happens(job, now=store.now())}"
        if line != last and not silent:
            tell(line)
        last = line
        if job.ended:
            break
    return job


async def print_events(
    interrupts: Interrupts, name: str | None, limit: int, where: Mapping[str, Any], *, as_json: bool, follow: bool
) -> int:
    """Print the latest events, and those that come, if they are waited for."""
    async with open_queue(interrupts, where, quiet=as_json) as app:
        store = await app.job_store()
        job_id = (await find_job(store, name)).id if name is not None else None
        names: dict[int, str] = {}
        after = max(0, await _newest(store) - limit) if job_id is None else 0
        latest: list[JobEvent] = []
        while batch := await store.events(after=after, job_id=job_id):
            latest = [*latest, *batch][-limit:]
            after = batch[-1].number
        await _print_events(store, latest, names, as_json=as_json)
        if follow:
            interrupts.listens, interrupts.answer = True, ""
            async for _ in _changes(store, interrupts):
                while batch := await store.events(after=after, job_id=job_id):
                    await _print_events(store, batch, names, as_json=as_json)
                    after = batch[-1].number
    return 0


async def _newest(store: JobStore) -> int:
    """Return the number of the newest event, found in a few small questions however long the log is."""
    low, high = 0, 1
    while await store.events(after=high, limit=1):
        low, high = high, high * 2
    while low < high:  # there is nothing above `high`, and something above whatever is below `low`
        middle = (low + high) // 2
        if await store.events(after=middle, limit=1):
            low = middle + 1
        else:
            high = middle
    return low


async def _print_events(store: JobStore, events: Sequence[JobEvent], names: dict[int, str], *, as_json: bool) -> None:
    for event in events:
        if as_json:
            click.echo(json.dumps(display.event_facts(event), ensure_ascii=False, default=str))
            continue
        if event.job_id is not None and event.job_id not in names:
            job = await store.job(event.job_id)
            names[event.job_id] = job.config_name if job else f"job {event.job_id}"
        click.echo(display.event_line(event, names.get(event.job_id or 0, "")))
    sys.stdout.flush()


# -- putting in ----------------------------------------------------------------------------------------------

ADDED: Final[Mapping[Ingested, str]] = {
    Ingested.NEW: "is in the queue",
    Ingested.SAME: "is known already, and its content has not changed",
    Ingested.UPDATED: "waits with its new content",
    Ingested.PRIORITY: "is done; only its priority was changed (`comfyctl queue retry` runs it again)",
    Ingested.AGAIN: "waits to be run again, with its new content",
    Ingested.HELD: "is processing; the new content is taken up when it has ended, if a monitor watches its folder",
    Ingested.CANCELLED: "was cancelled; only `comfyctl queue retry` starts it again",
    Ingested.TAKEN: "is not taken up: another file, elsewhere, has this name",
}


async def add_files(interrupts: Interrupts, files: Sequence[str], where: Mapping[str, Any], *, as_json: bool) -> int:
    """Take up job files, each for itself; the first error's exit code counts."""
    from runcomfy.cli.agent_status import NOBODY

    told: list[dict[str, Any]] = []
    failed: RunComfyError | None = None
    async with open_queue(interrupts, where, quiet=as_json, makes=True) as app:
        monitor = await app.monitor()
        waits = False
        for file in files:
            try:
                what, job = await monitor.add(file)
            except (BadInput, ConfigurationError) as error:
                failed = failed or error
                told.append({"file": file, "error": error.as_dict()})
                if not as_json:
                    show_error(error)
                continue
            waits = waits or job.status is QueueStatus.PENDING
            told.append({"file": file, "what": str(what), "job": display.job_facts(job)})
            if what is Ingested.TAKEN:
                failed = failed or NameTaken(f"another job has the name {job.config_name}")
            if not as_json:
                click.echo(f"{job.config_name} {ADDED[what]} (number {job.id}, priority {job.priority}, {job.status})")
        if waits and not as_json and not await (await app.job_queue()).workers():
            tell(NOBODY)
    if as_json:
        show_json(told)
    return failed.exit_code if failed is not None else 0


def who() -> str:
    """Return who gives an order, for the event log."""
    try:
        return foreign_text(getpass.getuser(), 60)
    except (OSError, KeyError, ImportError):  # a user without a name: containers have them
        return ""


# -- changing ------------------------------------------------------------------------------------------------


async def change_job(
    interrupts: Interrupts,
    name: str,
    where: Mapping[str, Any],
    change: Callable[[JobQueue, str, str], Awaitable[QueuedJob]],
    said: str,
    *,
    as_json: bool,
) -> int:
    """Change one job and say what it is now. `change` gets the queue, the job's uid, and who wants it."""
    async with open_queue(interrupts, where, quiet=as_json) as app:
        store = await app.job_store()
        before = await find_job(store, name)
        job = await change(await app.job_queue(), before.uid, who())
    if as_json:
        show_json(display.job_facts(job))
    else:
        words = said.format(priority=job.priority, status_word=display.status_word(job))
        click.echo(f"{job.config_name} {words}")
    return 0


async def pause_queue(interrupts: Interrupts, reason: str, where: Mapping[str, Any], *, as_json: bool) -> int:
    """Let nothing begin any more."""
    async with open_queue(interrupts, where, quiet=as_json) as app:
        pause = await (await app.job_queue()).pause(reason, by=who())
    if as_json:
        show_json(display.pause_facts(pause))
    else:
        click.echo("paused: nothing begins until `comfyctl queue resume`; what runs goes on")
    return 0


async def resume_queue(interrupts: Interrupts, where: Mapping[str, Any], *, as_json: bool) -> int:
    """Let everything go on."""
    async with open_queue(interrupts, where, quiet=as_json) as app:
        ended = await (await app.job_queue()).resume(by=who())
    if as_json:
        show_json([display.pause_facts(pause) for pause in ended])
    elif ended:
        for pause in ended:
            click.echo(f"goes on: {pause.scope} (was paused: {foreign_text(pause.message or pause.reason, 200)})")
    else:
        click.echo("nothing was paused")
    return 0
