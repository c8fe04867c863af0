"""
The one place that picks concrete adapters.

`App` wires one process: settings, the store, the account's provider, ComfyUI clients, the results folder. Everything
that needs the cloud is opened when it is first needed, so that a job on a given server needs neither credentials nor a
database.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import workflows
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.dev_server_file import PublishedDevServer
from runcomfy.adapters.dev_server_state import DevServerStateManager
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.application.books import Books, quiet
from runcomfy.application.dev_server import DevServer
from runcomfy.application.live import Live
from runcomfy.application.machines import Machines
from runcomfy.application.orchestrator import RunComfyOrchestrator
from runcomfy.application.owner import OwnerSession
from runcomfy.application.placing import Placer
from runcomfy.domain.exceptions import LocalError, RunComfyError, SettingInvalid, ValueInvalid, foreign_text
from runcomfy.domain.job import JobRequest
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import Machine
from runcomfy.domain.queued import Barred, NewJob, WorkerId
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.settings import QueueSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.processes import Processes
from runcomfy.ports.provider import Provider
from runcomfy.ports.store import Store

if TYPE_CHECKING:
    from runcomfy.adapters.stores.database import Database
    from runcomfy.adapters.stores.jobs import SqlJobs
    from runcomfy.adapters.stores.postgres import OpenTransaction
    from runcomfy.adapters.stores.sql import SqlStore
    from runcomfy.application.cost_optimizer import CostOptimizer
    from runcomfy.application.executor import Executor, Workplace
    from runcomfy.application.fleet import Fleet
    from runcomfy.application.heartbeat import Pulse
    from runcomfy.application.job_queue import JobQueue
    from runcomfy.application.job_run import RunsJobs
    from runcomfy.application.machine_pool import MachinePool
    from runcomfy.application.monitor import Monitor
    from runcomfy.application.pooled import Pool
    from runcomfy.application.presence import Presence
    from runcomfy.application.role import Role
    from runcomfy.application.service import Crew, ServeOptions
    from runcomfy.application.time_left import TimeLeftBook
    from runcomfy.domain.plan_view import Policy

STORE_NAME = "runcomfy.sqlite3"
DATABASE_URL = "RUNCOMFY_DATABASE_URL"
"""Puts the machines' books, and the queue unless it has a database of its own, on a PostgreSQL."""
QUEUE_PREFIX = "COMFYUI_AGENT_"
SERVE_PARTS = "runcomfy.serve"
"""The group of entry points whose parts join `comfyctl serve`: each a callable that takes the `App` and the
`ServeOptions` and returns an async context manager, entered before the first job and left after the last."""
SERVES: Final = "RUNCOMFY_SERVE"
"""What the API server works on when no command line says it: `pool`, `queue` or `none`."""
Tell = Callable[[str], None]


def serves(settings: Settings | None = None) -> frozenset[str]:
    """Return what the API server works on beside HTTP, by `RUNCOMFY_SERVE`.

    `pool`: the queue over rented machines. `queue`: the queue on a ComfyUI of the user's. `none`: nothing; others do.
    Unset: `pool` if there is an account, else `none`. Raises SettingInvalid, ConfigurationError.
    """
    said = os.environ.get(SERVES, "").strip().lower()
    if not said:
        cloud = (settings or load_settings()).cloud
        said = "pool" if cloud.user_id and cloud.tokens and cloud.workflow_version_id else "none"
    parts = {"pool": frozenset({"queue", "pool"}), "queue": frozenset({"queue"}), "none": frozenset[str]()}
    if said not in parts:
        raise SettingInvalid(
            f"{SERVES} is {foreign_text(said, 40)!r}", hint="write pool, queue or none", details={"setting": SERVES}
        )
    return parts[said]


class App:
    """One process of the product. `async with App(...) as app:`; what is open is closed when the block is left."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        tell: Tell = quiet,
        launches: bool = True,
        queue: Mapping[str, Any] | None = None,
        queue_config: str | os.PathLike[str] | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Nothing is opened yet. `launches=False`: the workflow version id, which launching needs, may be missing.

        `overrides` may hold the queue's variables, too. `queue`: field of `QueueSettings` -> value that wins over
        everything; None counts as not given. `queue_config`: the project's configuration file. `processes` knows
        which processes live; left out, this computer's own table.
        """
        given = dict(overrides or {})
        self._queue_overrides = {name: given.pop(name) for name in list(given) if name.startswith(QUEUE_PREFIX)}
        self._queue_overrides |= {name: value for name, value in (queue or {}).items() if value is not None}
        self._queue_config = queue_config
        self._database_url = str(given.pop(DATABASE_URL, "") or os.environ.get(DATABASE_URL, "")).strip()
        self._overrides = given
        self.settings = settings or load_settings(overrides=self._overrides)
        self.clock = clock or SystemClock()
        self.tell = tell
        self.live = Live(self.clock)
        """What the jobs of this process are doing."""
        self._time_left: TimeLeftBook | None = None
        self._launches = launches
        self._processes = processes
        self._monitor: Monitor | None = None
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._cloud: tuple[Machines, DevServer] | None = None
        self._books: SqlStore | None = None
        self._given: dict[str, ComfyUI] = {}
        self._queue_settings: QueueSettings | None = None
        self._opening_jobs = asyncio.Lock()
        self._jobs: SqlJobs | None = None
        self._jobs_database: Database | None = None

    async def __aenter__(self) -> App:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def processes(self) -> Processes:
        """What knows which processes live."""
        if self._processes is None:
            from runcomfy.adapters.processes import ProcessTable

            self._processes = ProcessTable()
        return self._processes

    async def close(self) -> None:
        """Close clients, sign off as an owner, close the store."""
        given, self._given = list(self._given.values()), {}
        for server in given:
            await server.close()
        await self._stack.aclose()

    # -- the cloud -----------------------------------------------------------------------------------------

    async def cloud(self, *, in_memory: bool = False) -> tuple[Machines, DevServer]:
        """Return what rents and ends machines, opened on first use.

        `in_memory` keeps no books: only for stopping and listing machines when the database cannot be used.

        Raises ConfigurationError (credentials), LocalError (the store).
        """
        async with self._opening:
            if self._cloud is None:
                self._cloud = await self._open_cloud(in_memory=in_memory)
            return self._cloud

    async def _open_cloud(self, *, in_memory: bool) -> tuple[Machines, DevServer]:
        from runcomfy.adapters.stores.sql import SqlStore

        settings = self.settings
        if not self._has_credentials():
            # Read once more for the error that names every missing value with the place to set it.
            settings = load_settings(overrides=self._overrides, require_cloud=True, require_version=self._launches)
        folder = Path(settings.files.state_dir)
        if in_memory:
            store = await self._stack.enter_async_context(SqlStore.over(self._database(":memory:")))
        else:
            store = await self._open_books()
        provider = await self._provider(store, settings)
        session = await self._stack.enter_async_context(OwnerSession(store, self.processes, self.clock))
        books = Books(
            store, self.clock, settings, session.owner, provider=provider.name, account=provider.account, tell=self.tell
        )
        machines = Machines(provider, self.processes, books, prompt_places=self._prompt_places)
        manager = DevServerStateManager(folder / "dev_server_state.json", copies=settings.files.state_copies)
        return machines, DevServer(machines, PublishedDevServer(manager), self.comfyui)

    async def books(self) -> Store:
        """Return the machines' books, opened on first use; no account is needed for that. Raises LocalError."""
        async with self._opening:
            return await self._open_books()

    async def _open_books(self) -> SqlStore:
        from runcomfy.adapters.stores.sql import SqlStore

        if self._books is None:
            database = self._database(self._machines_database(Path(self.settings.files.state_dir)))
            self._books = await self._stack.enter_async_context(SqlStore.over(database))
        return self._books

    def _machines_database(self, folder: Path) -> str:
        from runcomfy.adapters.stores.choose import is_server

        if not self._database_url:
            return str(folder / STORE_NAME)
        if not is_server(self._database_url):
            raise SettingInvalid(
                f"{DATABASE_URL} is not the address of a PostgreSQL",
                hint="write postgresql://user:password@host/name, or leave it out: the books are then a file",
                details={"setting": DATABASE_URL},
            )
        return self._database_url

    def _database(self, name: str, **options: Any) -> Database:
        from runcomfy.adapters.log import register_secret
        from runcomfy.adapters.stores.choose import is_server, store_from

        if is_server(name):
            register_secret(Secret(name))
            with suppress(ValueError):  # what cannot be read is refused below
                password = urlsplit(name).password or ""
                for text in filter(None, {password, unquote(password)}):
                    register_secret(Secret(text))
        return store_from(Secret(name), clock=self.clock, durable=self.settings.files.durable, **options)

    def _has_credentials(self) -> bool:
        cloud = self.settings.cloud
        return bool(cloud.user_id and cloud.tokens and (cloud.workflow_version_id or not self._launches))

    async def _provider(self, store: Store, settings: Settings) -> Provider:
        from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
        from runcomfy.application.limiter import StoreLimiter

        cloud = settings.cloud
        account = RunComfyAPIClient(cloud, clock=self.clock).account  # known without asking anybody
        limiter = StoreLimiter(store, account, cloud, self.clock)
        return await self._stack.enter_async_context(RunComfyAPIClient(cloud, clock=self.clock, limiter=limiter))

    async def _prompt_places(self) -> Collection[str] | None:
        """Return where prompts of the queue may still run; None if that cannot be found out."""
        from runcomfy.adapters.stores.job_places import prompt_places

        try:
            if not self.queue_exists:
                return None  # a machine of a queue belongs to a queue that is somewhere else
            await self.job_store()
            return await prompt_places(self._jobs_database) if self._jobs_database is not None else None
        except RunComfyError as error:
            self._say(f"the queue cannot be read ({error.message}): machines of queues are left alone for now")
            return None

    async def start_guard(self) -> bool:
        """Start the process that ends what outlives everything else, unless there is one; whether one was started.

        A guard that cannot be started is said, not raised: the machines' own leases stand before it. None is started
        in a story with a clock of its own: the guard goes by the computer's.
        """
        from runcomfy.adapters.guard_process import start_guard

        if not self.settings.pool.guard or not isinstance(self.clock, SystemClock):
            return False
        machines, _ = await self.cloud()
        account = machines.provider.account
        try:
            pid = await asyncio.to_thread(start_guard, self.settings, account, database_url=self._database_url)
        except LocalError as error:
            self._say(f"no guard was started: {error.message}")
            return False
        return pid is not None

    async def _keep_guard(self) -> None:
        """See to it that there is a guard, for as long as this process serves."""
        while True:
            await self.start_guard()
            await asyncio.sleep(self.settings.pool.reconcile_every.total_seconds())

    def held(self) -> list[Machine]:
        """Return what this process has rented and not ended, as far as it knows."""
        return list(self._cloud[0].books.held.values()) if self._cloud is not None else []

    # -- ComfyUI -------------------------------------------------------------------------------------------

    def comfyui(self, url: SecretUrl) -> ComfyUI:
        """Return a new client of the ComfyUI at `url`; whoever asked closes it."""
        from runcomfy.adapters.log import register_secret

        register_secret(url)  # who knows a rented machine's address can use it
        return self._client(url)

    def _client(self, url: SecretUrl) -> ComfyUI:
        from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient

        return ComfyUIWorkflowClient(url, self.settings.comfy, clock=self.clock)

    def given_server(self, url: str) -> ComfyUI:
        """Return the client of a server that the user named; kept warm until the app is closed."""
        parts = urlsplit(url if len(url) < 2_000 else "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueInvalid(
                f"{foreign_text(url, 80)!r} is not the address of a ComfyUI server",
                hint="write it as http://host:8188 or https://host",
            )
        if url not in self._given:
            self._given[url] = self._client(SecretUrl(url))
        return self._given[url]

    # -- the queue -----------------------------------------------------------------------------------------

    @property
    def queue_settings(self) -> QueueSettings:
        """The queue's settings, read on first use. Raises SettingInvalid."""
        if self._queue_settings is None:
            from runcomfy.adapters.agent_config import load_queue_settings

            self._queue_settings = load_queue_settings(
                settings=self.settings,
                env={**os.environ, DATABASE_URL: self._database_url},
                config_file=self._queue_config,
                overrides=self._queue_overrides,
            )
        return self._queue_settings

    @property
    def queue_where(self) -> str:
        """What the queue's database is called, without secrets."""
        from runcomfy.adapters.agent_variables import database_shown

        return database_shown(self.queue_settings.database)

    @property
    def queue_exists(self) -> bool:
        """Whether there is a database to look into; one on a server is taken to be there."""
        from runcomfy.adapters.stores.choose import is_server

        name = self.queue_settings.database
        return is_server(name) or Path(name.reveal()).exists()

    async def job_store(self) -> SqlJobs:
        """Return the queue's database, opened on first use. Raises LocalError, SettingInvalid."""
        from runcomfy.adapters.stores.jobs import SqlJobs

        async with self._opening_jobs:
            if self._jobs is None:
                settings = self.queue_settings
                database = self._database(settings.database.reveal(), wake_interval=settings.wake_interval)
                self._jobs_database = database
                self._jobs = await self._stack.enter_async_context(SqlJobs(database))
            return self._jobs

    async def job_queue(self, *, looks_often: bool = False) -> JobQueue:
        """Return the queue as programs use it; what is put in is checked as far as it can be without a machine.

        `looks_often`: it is read by many while this process writes, and is not to wait for that.
        """
        from runcomfy.adapters.stores.jobs import SqlJobs
        from runcomfy.adapters.stores.jobs_beside import JobsBeside
        from runcomfy.application.job_queue import JobQueue

        async def check(request: JobRequest) -> None:
            await self.orchestrator().prepare(request)

        store: JobStore = await self.job_store()
        if looks_often and isinstance(store, SqlJobs):
            store = await self._stack.enter_async_context(JobsBeside(store))
        return JobQueue(store, self.queue_settings, check=check, processes=self.processes)

    async def open_transactions(self, *, older_than: timedelta) -> list[OpenTransaction] | None:
        """Return transactions of others that are open in the queue's database; None: it is a file."""
        await self.job_store()
        database = self._jobs_database
        look = getattr(database.kind, "open_transactions", None) if database is not None else None
        if database is None or look is None:
            return None
        found: list[OpenTransaction] = await database.read(lambda connection: look(connection, older_than=older_than))
        return found

    async def monitor(self, *, hold: bool = False) -> Monitor:
        """Return what takes job files up. `hold`: be the one monitor of the folder, from now on.

        Raises FolderWatched, LocalError.
        """
        from runcomfy.adapters.job_files import YamlJobFiles
        from runcomfy.adapters.workflow_registry import WorkflowRegistry
        from runcomfy.application.monitor import Monitor

        settings, store, orchestrator = self.queue_settings, await self.job_store(), self.orchestrator()
        registry = WorkflowRegistry(root=settings.root, workflows_file=settings.workflows_file, shipped=workflows.names)
        files = YamlJobFiles(settings, registry=registry)
        if hold:
            self._stack.callback(files.release)
            await asyncio.to_thread(files.hold)

        async def check(job: NewJob) -> None:
            await orchestrator.prepare(job.request)

        return Monitor(store, files, settings, check=check, tell=self._say, clock=self.clock)

    async def executor(
        self,
        *,
        observed: Callable[[RunsJobs], RunsJobs] = lambda runs: runs,
        station: Workplace | None = None,
        barred: Callable[[], Barred] = Barred,
    ) -> Executor:
        """Return a worker of the queue, which beats in a thread of its own. `observed` may see each job as it runs.

        `station` wins over where the settings say that jobs run; `barred` says whose jobs are not begun now.

        Raises LocalError, ConfigurationError.
        """
        from runcomfy.application.aftermath import Aftermath
        from runcomfy.application.executor import Executor

        settings, store = self.queue_settings, await self.job_store()
        owner = self.processes.me(now=store.now())
        rents = station is not None or settings.where != "server"
        after = Aftermath(store, self.books, self._prompt_places, clock=self.clock, tell=self._say) if rents else None
        return Executor(
            store,
            settings,
            station or self._station(),
            observed(self.live.observing(self.orchestrator())),
            owner,
            clock=self.clock,
            processes=self.processes,
            heart=self._heart(store, owner, settings),
            barred=barred,
            after=after.clear if after is not None else None,
            tell=self._say,
        )

    def _heart(self, store: SqlJobs, owner: Owner, settings: QueueSettings) -> Pulse | None:
        """Return what renews a worker's leases, in a thread of its own; None: the event loop does."""
        from runcomfy.application.heartbeat import Heart

        renewer = store.renewer(WorkerId(owner.id), lease=settings.lease)
        return Heart(renewer, every=settings.heartbeat, lease=settings.lease, close=renewer.close)

    def _station(self) -> Workplace:
        """Return where this process's jobs run, as the queue's settings say."""
        from runcomfy.application.station import CloudStation, GivenStation

        settings = self.queue_settings
        if settings.where == "pool":
            raise SettingInvalid(
                "the queue's jobs are to run over a pool of rented machines, which one process keeps for all",
                hint="run `comfyctl serve`; or give --server or --cloud",
                details={"setting": "where"},
            )
        if settings.where == "cloud":
            return CloudStation(self._placer(), server_type=settings.server_type, idle_after=settings.idle_after)
        return GivenStation(self._placer(), settings.api_base_url)

    def _say(self, sentence: str) -> None:
        self.tell(sentence)  # whoever listens may change

    # -- a pool --------------------------------------------------------------------------------------------

    def pool_types(self) -> tuple[str, ...]:
        """Return the machine types that a pool may rent, the reference type first."""
        chosen = self.settings.pool.server_types
        return chosen or (self.queue_settings.server_type or self.settings.cloud.server_type,)

    async def pool(self, role: Role) -> MachinePool:
        """Return the pool of the account, for whoever holds the role. Raises ConfigurationError, LocalError."""
        from runcomfy.application.machine_pool import MachinePool

        machines, _ = await self.cloud()
        return MachinePool(machines, self.comfyui, in_charge=role.holds)

    async def fleet_role(self) -> Role:
        """Return this process's wish to be the one that plans for the books. Raises ConfigurationError, LocalError."""
        from runcomfy.application.fleet import FLEET
        from runcomfy.application.role import Role

        machines, _ = await self.cloud()
        return Role(FLEET, machines.store, machines.books.owner, clock=self.clock, processes=machines.processes)

    async def fleet(self, pool: Pool, role: Role, *, policy: Policy | None = None) -> Fleet:
        """Return what plans for a pool, by the product's plan or another. Raises ConfigurationError, LocalError."""
        from runcomfy.application.axis import Axis
        from runcomfy.application.fleet import Backdrop, Fleet
        from runcomfy.application.fleet_demand import FleetDemand, FleetSignals
        from runcomfy.application.fleet_offers import FleetOffers, wait_usd_per_hour
        from runcomfy.application.purse import Purse
        from runcomfy.domain.scaling import CostPlan

        machines, _ = await self.cloud()
        store, jobs, settings = machines.store, await self.job_store(), machines.settings
        offers = FleetOffers(store, settings, self.clock, provider=machines.provider.name, types=self.pool_types())
        axis, jobs_axis = Axis(self.clock.now), Axis(jobs.now)
        lead_s = settings.pool.presence_lead.total_seconds()
        signals = FleetSignals(store, self.clock, axis=axis, lead_s=lead_s, tell=self._say)
        purse = Purse(store, settings.budgets, self.clock, run_id=machines.books.owner.id, tell=self._say)
        backdrop = Backdrop(
            store=store,
            jobs=jobs,
            offers=offers,
            demand=FleetDemand(jobs, offers, signals, axis=jobs_axis),
            signals=signals,
            purse=purse,
            role=role,
            clock=self.clock,
            jobs_axis=jobs_axis,
            axis=axis,
            wait_usd_per_hour=wait_usd_per_hour(settings.pool.wait_price, offers.price(offers.reference)),
            tell=self._say,
        )
        return Fleet(pool, policy or CostPlan(), settings.pool, backdrop, lease=settings.cloud.run_lease)

    async def serve(
        self,
        options: ServeOptions,
        stop: asyncio.Event,
        leave: asyncio.Event | None = None,
        *,
        observed: Callable[[RunsJobs], RunsJobs] = lambda runs: runs,
    ) -> bool:
        """Work off the queue until `stop` is set, over a pool or where the settings say, or only let parts look at it.

        With a pool the machines are ended at the end; see `application.service`. Return whether this process ever was
        the one that serves. Parts of installed packages (`SERVE_PARTS`) join: entered before the first job, left after
        the last. Raises what keeps it from serving.
        """
        from importlib.metadata import entry_points

        options = replace(options, shut_down=stop.set)
        # Without an account nothing is to listen first.
        role = await self.fleet_role() if "pool" in options.parts else None
        async with AsyncExitStack() as parts:
            for point in entry_points(group=SERVE_PARTS):
                await parts.enter_async_context(point.load()(self, options))
            if role is not None:
                return await self._serve_pool(role, options, stop, leave, observed)
            if "queue" in options.parts:
                await self._serve_queue(options, stop, leave, observed)
            else:
                await stop.wait()
        return True

    async def _serve_pool(
        self,
        role: Role,
        options: ServeOptions,
        stop: asyncio.Event,
        leave: asyncio.Event | None,
        observed: Callable[[RunsJobs], RunsJobs],
    ) -> bool:
        from runcomfy.application.service import Service

        hire = lambda: self._crew(role, options, observed, stop)  # noqa: E731 - a term's crew
        service = Service(role, hire, await self.job_store(), tell=self._say)
        await service.run(stop, leave, once=options.once)
        return service.serving.is_set()

    async def _serve_queue(
        self,
        options: ServeOptions,
        stop: asyncio.Event,
        leave: asyncio.Event | None,
        observed: Callable[[RunsJobs], RunsJobs],
    ) -> None:
        from runcomfy.application.service import serve_queue

        # Before anything is begun: a second monitor on the folder is told so at once.
        monitor = await self.monitor(hold=True) if options.monitor else None
        executor = await self.executor(observed=observed)
        await serve_queue(executor, monitor, await self.job_store(), stop, leave, once=options.once, tell=self._say)

    @asynccontextmanager
    async def _crew(
        self, role: Role, options: ServeOptions, observed: Callable[[RunsJobs], RunsJobs], stop: asyncio.Event
    ) -> AsyncIterator[Crew]:
        """Put together what works for one term of the role; machines are ended after it, unless the role is lost.

        Told to `stop`, a process that has lost the role and finds that nobody else took it ends the machines all the
        same: there is no other to go on with them.
        """
        from runcomfy.application.finish import finish
        from runcomfy.application.machine_pool import takes_over
        from runcomfy.application.pool_station import PoolStation
        from runcomfy.application.reconciler import Reconciler
        from runcomfy.application.service import Crew

        machines, _ = await self.cloud()
        pool, reconciler = await self.pool(role), Reconciler(machines, spare=takes_over)
        try:
            await pool.adopt()
            fleet = await self.fleet(pool, role)
            await fleet.begin()
            station = PoolStation(
                pool, machines.settings.pool, clock=self.clock, works=fleet.works, outlives=lambda: not role.holds()
            )
            executor = await self.executor(observed=observed, station=station, barred=fleet.barred)
            if options.monitor and self._monitor is None:  # the folder is ours from the first term on
                self._monitor = await self.monitor(hold=True)
            guards = (self._keep_guard,) if options.guard and self.settings.pool.guard else ()

            async def adopt() -> None:
                """Take over, later, too: what an executor that has just died leaves behind."""
                while True:
                    await asyncio.sleep(machines.settings.pool.reconcile_every.total_seconds())
                    with suppress(LocalError):  # asked again
                        await pool.adopt()

            loops = (pool.run, reconciler.watch, adopt, *guards)
            yield Crew(executor, fleet, loops=loops, monitor=self._monitor)
        finally:
            ours = role.holds() or (stop.is_set() and await finish(role.take_softly()))
            await finish(reconciler.close(after=pool.close(keep=not ours)))

    # -- money ---------------------------------------------------------------------------------------------

    async def costs(self) -> CostOptimizer:
        """Return what answers questions about the account's money. Raises ConfigurationError, LocalError."""
        from runcomfy.adapters.balance_file import BalanceFile
        from runcomfy.application.cost_optimizer import CostOptimizer

        machines, _ = await self.cloud()
        files = self.settings.files
        balances = BalanceFile(Path(files.state_dir), durable=files.durable)
        return CostOptimizer(machines.books, machines.provider, balances)

    # -- signals -------------------------------------------------------------------------------------------

    def presence(self, *, user: str = "") -> Presence:
        """Return what says that somebody is there, or that work comes."""
        from runcomfy.application.presence import Presence

        return Presence(self.books, self.clock, user=user)

    # -- jobs ----------------------------------------------------------------------------------------------

    def orchestrator(self) -> RunComfyOrchestrator:
        """Return what runs jobs."""
        from runcomfy.adapters.log import redact
        from runcomfy.adapters.results import DiskResults

        return RunComfyOrchestrator(
            settings=self.settings,
            clock=self.clock,
            results=DiskResults(self.settings.files),
            placer=self._placer(),
            load_workflow=self.workflow_files(),
            random_int=random.SystemRandom().randint,
            veil=redact,
        )

    def time_left(self) -> TimeLeftBook:
        """Return what tells how long jobs will still take; history is read when it is first asked."""
        from runcomfy.application.time_left import TimeLeftBook

        if self._time_left is None:
            self._time_left = TimeLeftBook(self.job_store, self.books, self.clock, has_books=self._has_books)
        return self._time_left

    def _has_books(self) -> bool:
        """Whether the machines' books are there: asking how long a job takes is no reason to make them."""
        return bool(self._database_url) or (Path(self.settings.files.state_dir) / STORE_NAME).exists()

    def _placer(self) -> Placer:
        return Placer(self.comfyui, self.given_server, self.cloud, tell=self._say)

    @staticmethod
    def workflow_files() -> WorkflowFiles:
        """Return what loads workflows, shipped ones and files."""
        return WorkflowFiles(workflows.names, workflows.load)
