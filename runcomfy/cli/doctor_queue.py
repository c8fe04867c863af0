"""What `comfyctl doctor` asks of the queue: its database, who holds it up, who works, the ComfyUI it runs on."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from runcomfy.application.doctor import Finding, examine_server, tested
from runcomfy.cli.words import show_span
from runcomfy.domain.exceptions import StoreUnavailable, foreign_text

if TYPE_CHECKING:
    from runcomfy.bootstrap import App

OLD: Final = timedelta(seconds=5)
"""A transaction that is open for so long is in everybody's way: our own take milliseconds."""


def has_queue(app: App) -> bool:
    """Whether there is a queue to look at: a project, or a database."""
    return app.queue_settings.config_file is not None or app.queue_exists


async def examine_queue(app: App) -> list[Finding]:
    """Test the queue's database, and where its jobs are to run."""
    if not app.queue_exists:
        where = f"not there yet; the first `comfyctl agent start` makes {app.queue_where}"
        found = [Finding("queue database", ok=True, detail=where)]
    else:
        found = [await tested("queue database", lambda: _database(app))]
        if found[0].ok:
            found += [*await _transactions(app), await tested("queue", lambda: _state(app))]
    if app.queue_settings.where == "server":
        found += await examine_server(app.given_server(app.queue_settings.api_base_url))
    return found


async def _database(app: App) -> str:
    from runcomfy.cli.queue_display import counts_line

    store = await app.job_store()
    await store.run(lambda _: None)  # takes the lock of a writer, and writes nothing
    return f"{app.queue_where} can be read and written: {counts_line(await store.counts())}"


async def _transactions(app: App) -> list[Finding]:
    """Name whose transaction is open: it slows every claim, and keeps old rows from being cleaned up."""
    standing = await app.open_transactions(older_than=OLD)
    if standing is None:
        return []
    if not standing:
        return [Finding("open transactions", ok=True, detail=f"none older than {OLD.total_seconds():.0f} s")]
    who = "; ".join(
        f"{foreign_text(each.application or 'a program without a name', 60)} (process {each.pid}, {each.state}) for "
        f"{show_span(each.age)}"
        for each in standing[:5]
    )
    error = StoreUnavailable(
        f"transactions of others are open in the queue's database: {who}",
        hint=f"end them there, or with SELECT pg_terminate_backend({standing[0].pid})",
    )
    return [Finding("open transactions", ok=False, detail=error.message, error=error)]


async def _state(app: App) -> str:
    from runcomfy.cli.agent_status import workers_line
    from runcomfy.cli.queue_display import pause_line

    store = await app.job_store()
    pauses = [pause_line(pause, now=store.now()) for pause in await store.pauses()]
    return "; ".join([await workers_line(app), *(pauses or ["nothing is paused"])])
