"""`comfyctl agent status`: who works on the queue and on what, what is paused, how much waits."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runcomfy.application.planner import PLANNER
from runcomfy.cli import queue_display as display
from runcomfy.cli.output import show_json, table
from runcomfy.cli.queue_work import open_queue
from runcomfy.cli.runner import Interrupts
from runcomfy.cli.words import show_span, show_time
from runcomfy.domain.lease import Owner
from runcomfy.domain.queued import QueuedJob, QueueStatus, WorkerId

if TYPE_CHECKING:
    from runcomfy.bootstrap import App

NOBODY = "nobody works on the queue; `comfyctl agent start` does, or `comfyctl serve` over rented machines"


async def workers_line(app: App) -> str:
    """Return how many executors work on the queue, or that nobody does."""
    workers = await (await app.job_queue()).workers()
    if not workers:
        return NOBODY
    hosts = sorted({host_of(worker) for worker in workers})
    number = "1 executor works" if len(workers) == 1 else f"{len(workers)} executors work"
    return f"{number} on the queue ({', '.join(hosts)})"


def host_of(owner: Owner) -> str:
    """Return the computer an owner runs on."""
    return owner.host.split("/")[0]


async def show_status(interrupts: Interrupts, where: Mapping[str, Any], *, as_json: bool) -> int:
    """Print who works on the queue."""
    async with open_queue(interrupts, where, quiet=as_json) as app:
        queue, store = await app.job_queue(), await app.job_store()
        workers = await queue.workers()
        running = await store.jobs(status=QueueStatus.PROCESSING)
        counts, pauses, now = await store.counts(), await store.pauses(), store.now()
        planner = await store.role_holder(PLANNER)
        watched_by = watcher(Path(app.queue_settings.jobs_processing))
        database = app.queue_where
    if as_json:
        show_json(
            {
                "database": database,
                "workers": [worker_facts(worker, running) for worker in workers],
                "planner": planner,
                "monitor": watched_by,
                "pauses": [display.pause_facts(pause) for pause in pauses],
                "counts": {str(status): counts.get(status, 0) for status in QueueStatus},
            }
        )
        return 0
    click.echo(f"queue: {database}")
    click.echo(display.counts_line(counts))
    for pause in pauses:
        click.echo(display.pause_line(pause, now=now))
    click.echo(f"job files: {watched_by or 'nobody on this computer watches the folder'}")
    if workers:
        rows = [row for worker in workers for row in worker_rows(worker, running, now=now)]
        click.echo(table(("worker", "host", "process", "since", "last seen", "job"), rows))
        if planner is not None:
            click.echo(f"worker {planner[:8]} takes back the jobs of those that are gone")
    else:
        click.echo(NOBODY)
    known = {str(worker.id) for worker in workers}
    for job in running:
        if job.worker_id not in known:
            click.echo(f"{job.config_name}: its worker is gone; it goes back into the queue {_when(job, now=now)}")
    return 0


def watcher(folder: Path) -> str | None:
    """Return who watches a folder of job files, if it is a process of this computer that lives."""
    import psutil

    from runcomfy.adapters.folder_lock import LOCK_NAME

    try:
        facts = json.loads((folder / LOCK_NAME).read_text(encoding="utf-8"))
        pid, host = int(facts["pid"]), str(facts["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    lives = host == socket.gethostname() and psutil.pid_exists(pid)
    return f"process {pid} watches {folder}" if lives else None


def _when(job: QueuedJob, *, now: datetime) -> str:
    if job.lease_expires_at is None or job.lease_expires_at <= now:
        return "as soon as an executor runs"
    return f"in {show_span(job.lease_expires_at - now)} at the latest, if an executor runs then"


def worker_facts(worker: Owner, running: Sequence[QueuedJob]) -> dict[str, Any]:
    """Return a worker as `--json` prints it."""
    return {
        "worker_id": worker.id,
        "host": host_of(worker),
        "pid": worker.pid,
        "started_at": display.iso(worker.started_at),
        "heartbeat_at": display.iso(worker.heartbeat_at),
        "jobs": [job.config_name for job in running if job.worker_id == WorkerId(worker.id)],
    }


def worker_rows(worker: Owner, running: Sequence[QueuedJob], *, now: datetime) -> list[tuple[str, ...]]:
    """Return a line for each job of a worker, or one that says that it has none."""
    mine = [job for job in running if job.worker_id == WorkerId(worker.id)]
    who = (
        str(worker.id)[:8],
        host_of(worker),
        str(worker.pid),
        show_time(worker.started_at),
        f"{show_span(now - worker.heartbeat_at)} ago",
    )
    return [(*who, f"{job.config_name}: {display.what_happens(job, now=now)}") for job in mine] or [(*who, "idle")]
