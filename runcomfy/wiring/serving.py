"""What works off a queue: monitor, executors, the pool with its plan, and `serve` with the parts that join it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import workflows
from runcomfy.adapters.clock import SystemClock
from runcomfy.application.faultpoints import entered
from runcomfy.domain.exceptions import LocalError, SettingInvalid
from runcomfy.domain.lease import Owner
from runcomfy.domain.queued import Barred, NewJob, WorkerId
from runcomfy.domain.settings import QueueSettings
from runcomfy.wiring.core import Core

if TYPE_CHECKING:
    from runcomfy.adapters.stores.jobs import SqlJobs
    from runcomfy.application.executor import Executor, Workplace
    from runcomfy.application.fleet import Fleet
    from runcomfy.application.heartbeat import Pulse
    from runcomfy.application.job_run import RunsJobs
    from runcomfy.application.machine_pool import MachinePool
    from runcomfy.application.monitor import Monitor
    from runcomfy.application.pooled import Pool
    from runcomfy.application.role import Role
    from runcomfy.application.service import Crew, ServeOptions
    from runcomfy.domain.plan_view import Policy

SERVE_PARTS = "runcomfy.serve"
"""The group of entry points whose parts join `comfyctl serve`: each a callable that takes the `App` and the
`ServeOptions` and returns an async context manager, entered before the first job and left after the last."""


class Serving(Core):
    """One process of the product that may work for a queue."""

    # -- workers -----------------------------------------------------------------------------------------------

    async def monitor(self, *, hold: bool = False) -> Monitor:
        """Return what takes job files up. `hold`: be the one monitor of the folder, from now on.

        Raises FolderWatched, LocalError.
        """
        from runcomfy.adapters.job_files import YamlJobFiles
        from runcomfy.adapters.workflow_registry import WorkflowRegistry
        from runcomfy.application.monitor import Monitor

        settings, store, orchestrator = self.queue_settings, await self.job_store(), self.orchestrator()
        registry = WorkflowRegistry(root=settings.root, workflows_file=settings.workflows_file, shipped=workflows.names)
        files = entered(YamlJobFiles(settings, registry=registry), "job_files")
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

    # -- a pool ------------------------------------------------------------------------------------------------

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
            start = entered(start_guard, "guard.start")
            pid = await asyncio.to_thread(start, self.settings, account, database_url=self._database_url)
        except LocalError as error:
            self._say(f"no guard was started: {error.message}")
            return False
        return pid is not None

    async def _keep_guard(self) -> None:
        """See to it that there is a guard, for as long as this process serves."""
        while True:
            await self.start_guard()
            await asyncio.sleep(self.settings.pool.reconcile_every.total_seconds())

    # -- serving -----------------------------------------------------------------------------------------------

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
            await reconciler.resolve()
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
            whole = ours and options.once and not stop.is_set()
            await finish(reconciler.close(after=pool.close(keep=not ours), at_least_once=whole))
