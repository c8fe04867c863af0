"""What `comfyctl serve` does: open the product with the options laid over the settings, serve, and say what happens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runcomfy.cli.agent_voice import Narrated, Voice
from runcomfy.cli.agent_work import last_words
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.money import show_usd, total

if TYPE_CHECKING:
    from runcomfy.bootstrap import App
    from runcomfy.cli.runner import Interrupts


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says."""

    max_machines: int | None = None
    min_machines: int | None = None
    budget_run: str | None = None
    budget_hour: str | None = None
    budget_day: str | None = None
    budget_month: str | None = None
    wait_price: str | None = None
    latency_target: str | None = None
    server_types: tuple[str, ...] = ()
    keep_alive: str | None = None
    monitor: bool | None = None
    """None: if this folder is a project."""
    once: bool = False
    no_guard: bool = False
    as_json: bool = False

    def overrides(self) -> dict[str, Any]:
        """Return the settings that the options give."""
        from runcomfy.adapters.pool_variables import SERVE_SETTINGS, pool_overrides

        return pool_overrides({name: getattr(self, name) for name in SERVE_SETTINGS})


async def work(interrupts: Interrupts, asked: Asked, where: Mapping[str, Any]) -> int:
    """Serve until Ctrl+C or SIGTERM, or with `once` until there is nothing to do."""
    from runcomfy.application.service import ServeOptions
    from runcomfy.cli.app import open_app

    interrupts.listens = True
    interrupts.answer = "stopping: nothing new is begun, machines are ended (Ctrl+C again leaves at once)"
    with Voice(as_json=asked.as_json) as voice:
        async with open_app(
            interrupts, asked.overrides(), require_cloud=True, queue={**where, "where": "pool"}, quiet=asked.as_json
        ) as app:
            app.tell = voice
            interrupts.say, interrupts.clear = voice, voice.clear
            interrupts.last_words = lambda: last_words(app, voice)
            monitor = _is_project(app) if asked.monitor is None else asked.monitor
            options = ServeOptions(monitor=monitor, once=asked.once, guard=not asked.no_guard)
            await _greet(app, options, voice)
            store = await app.job_store()
            try:
                served = await app.serve(
                    options, interrupts.event, observed=lambda orchestrator: Narrated(orchestrator, store, voice)
                )
            finally:
                await _tell_cost(app, voice)
            if interrupts.event.is_set():
                voice(_ended(served, left=len(app.held())))
    return 0


def _ended(served: bool, *, left: int) -> str:
    if not served:
        return "stopped: this process only waited for its turn, and had no machines"
    if left:
        return f"stopped: {left} machines may still run (`comfyctl machines ls`); the next start takes them over"
    return "stopped: the machines are ended; the next start goes on where this one ended"


async def _tell_cost(app: App, voice: Voice) -> None:
    """Say what the machines that this process has rented have cost, by the ledger."""
    with suppress(LocalError):
        machines, _ = await app.cloud()
        books = machines.books
        mine = {row.id for row in await books.rows(open_only=False) if row.run_id == books.owner.id}
        if mine:
            spent = total(entry for entry in await books.store.ledger() if entry.machine_id in mine)
            voice(f"this run has cost {show_usd(spent)} ({len(mine)} launches)")


def _is_project(app: App) -> bool:
    settings = app.queue_settings
    return settings.config_file is not None or Path(settings.jobs_processing).is_dir()


async def _greet(app: App, options: Any, voice: Voice) -> None:
    from runcomfy.cli.queue_display import counts_line

    queue, pool = app.queue_settings, app.settings.pool
    store = await app.job_store()
    voice(f"queue {app.queue_where}: {counts_line(await store.counts())}")
    if options.monitor:
        voice(f"job files are taken up from {queue.jobs_processing}")
    types = ", ".join(app.pool_types())
    least = f", at least {pool.min_machines}" if pool.min_machines else ""
    voice(f"up to {pool.max_machines} machines{least} of type {types}; results go to {queue.jobs_finished}")
    caps = [f"{show_usd(b.hard)} per {b.name}" for b in app.settings.budgets if b.hard is not None]
    voice(
        f"budgets: {', '.join(caps)}" if caps else "no budget is set: only the number of machines limits what is spent"
    )
