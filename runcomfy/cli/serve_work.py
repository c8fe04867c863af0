"""What `comfyctl serve` does: open the product with the options laid over the settings, serve, and say what happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runcomfy.application.service import ServeOptions
from runcomfy.cli.agent_voice import Narrated, Voice
from runcomfy.cli.agent_work import last_words
from runcomfy.domain.exceptions import CredentialsMissing, LocalError, ValueInvalid
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
    host: str | None = None
    port: int | None = None
    no_http: bool = False
    no_pool: bool = False
    no_queue: bool = False
    server: str | None = None
    as_json: bool = False

    @property
    def pool(self) -> bool:
        """Whether machines are rented."""
        return not (self.no_pool or self.no_queue or self.server is not None)

    @property
    def http(self) -> bool:
        """Whether HTTP is answered; what is only to be worked off need not be looked at."""
        return not self.no_http and (not self.once or self.host is not None or self.port is not None)

    def queue(self) -> dict[str, Any]:
        """Return what the options say of the queue's settings. Raises ValueInvalid."""
        if self.no_queue and (self.once or self.monitor):
            raise ValueInvalid(
                "--no-queue runs nothing, --once and --monitor want something run", hint="give one of them"
            )
        if self.no_http and self.no_queue:
            raise ValueInvalid("--no-http and --no-queue leave nothing to do", hint="give one of them")
        if self.no_http and (self.host is not None or self.port is not None):
            raise ValueInvalid("--no-http answers nowhere, --host and --port say where", hint="give one of them")
        if self.server is not None and not self.server.strip():  # a variable of the shell that is not set
            raise ValueInvalid("--server names no address", hint="for example --server http://127.0.0.1:8188")
        if self.pool:
            return {"where": "pool"}
        return {"where": "server", "api_base_url": self.server}

    def overrides(self) -> dict[str, Any]:
        """Return the settings that the options give."""
        from runcomfy.adapters.pool_variables import SERVE_SETTINGS, pool_overrides

        return pool_overrides({name: getattr(self, name) for name in SERVE_SETTINGS})


async def work(interrupts: Interrupts, asked: Asked, where: Mapping[str, Any]) -> int:
    """Serve until Ctrl+C or SIGTERM, or with `once` until there is nothing to do."""
    interrupts.listens = True
    machines = ", machines are ended" if asked.pool else ""
    interrupts.answer = f"stopping: nothing new is begun{machines} (Ctrl+C again leaves at once)"
    with Voice(as_json=asked.as_json) as voice:
        async with _opened(interrupts, asked, where) as app:
            app.tell = voice
            interrupts.say, interrupts.clear = voice, voice.clear
            interrupts.last_words = lambda: last_words(app, voice)
            options = _options(app, asked, voice)
            await _greet(app, options, voice)
            store = await app.job_store()
            try:
                served = await app.serve(
                    options, interrupts.event, observed=lambda orchestrator: Narrated(orchestrator, store, voice)
                )
            finally:
                if asked.pool:
                    await _tell_cost(app, voice)
            if interrupts.event.is_set():
                voice(_ended(served, left=len(app.held())) if asked.pool else _stopped(asked))
    return 0


def _opened(interrupts: Interrupts, asked: Asked, where: Mapping[str, Any]) -> App:
    """Return the product, not yet entered. Raises ConfigurationError; with a pool, also for want of an account."""
    from runcomfy.cli.app import open_app

    queue = {**where, **asked.queue()}
    try:
        return open_app(
            interrupts,
            asked.overrides(),
            require_cloud=asked.pool,
            launches=asked.pool,
            queue=queue,
            quiet=asked.as_json,
        )
    except CredentialsMissing as error:
        if asked.pool:
            without = "without an account: --no-pool (jobs run on a ComfyUI of yours, --server URL), or --no-queue"
            error.hint = f"{error.hint}; {without}" if error.hint else without
        raise


def _options(app: App, asked: Asked, voice: Voice) -> ServeOptions:
    def listening(where: Any) -> None:
        """Say where the page is. Its code logs in once, and says nothing afterwards."""
        voice(f"answering HTTP at {where.address}", address=where.address)
        voice(f"the page, for you alone: {where.page}", page=where.page)

    monitor = _is_project(app) if asked.monitor is None else asked.monitor
    return ServeOptions(
        monitor=monitor and not asked.no_queue,
        once=asked.once,
        guard=not asked.no_guard,
        queue=not asked.no_queue,
        pool=asked.pool,
        extra={"http": {"enabled": asked.http, "host": asked.host, "port": asked.port, "listening": listening}},
    )


def _stopped(asked: Asked) -> str:
    return "stopped" if asked.no_queue else "stopped; the next start goes on where this one ended"


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
        mine = {row.id: row for row in await books.rows(open_only=False) if row.run_id == books.owner.id}
        if mine:
            spent = total(entry for entry in await books.store.ledger() if entry.machine_id in mine)
            voice(cost_line(spent, (row.server_id for row in mine.values())))


def cost_line(spent: Decimal, server_ids: Iterable[str | None]) -> str:
    """Return what a run has cost. A launch without a machine's id was refused, or started nothing."""
    rented = sum(server_id is not None for server_id in server_ids)
    what = "no machine" if not rented else "1 machine" if rented == 1 else f"{rented} machines"
    return f"this run has cost {show_usd(spent)} ({what})"


def _is_project(app: App) -> bool:
    settings = app.queue_settings
    return settings.config_file is not None or Path(settings.jobs_processing).is_dir()


async def _greet(app: App, options: ServeOptions, voice: Voice) -> None:
    from runcomfy.cli.queue_display import counts_line
    from runcomfy.domain.secret import SecretUrl

    queue, pool = app.queue_settings, app.settings.pool
    store = await app.job_store()
    voice(f"queue {app.queue_where}: {counts_line(await store.counts())}")
    if options.monitor:
        voice(f"job files are taken up from {queue.jobs_processing}")
    if "queue" not in options.parts:
        voice("no job is run by this process; what others do with the queue is shown")
        return
    if "pool" not in options.parts:
        server = SecretUrl(queue.api_base_url).masked
        voice(f"jobs run on the ComfyUI at {server}, {queue.slots} at once; results go to {queue.jobs_finished}")
        return
    types = ", ".join(app.pool_types())
    least = f", at least {pool.min_machines}" if pool.min_machines else ""
    voice(f"up to {pool.max_machines} machines{least} of type {types}; results go to {queue.jobs_finished}")
    caps = [f"{show_usd(b.hard)} per {b.name}" for b in app.settings.budgets if b.hard is not None]
    voice(
        f"budgets: {', '.join(caps)}" if caps else "no budget is set: only the number of machines limits what is spent"
    )
