"""
Fleets by themselves: over a real queue and real books, with a small pool whose machines cost nothing.

For tests of what decides how many machines there are (`runcomfy.application.fleet.Fleet`) without a cloud, a ComfyUI or
an executor: machines boot, stand idle, compute for as long as the story says, and go when they are told to.
"""

# ruff: noqa: S101 - asserts show what is shown

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.axis import Axis
from runcomfy.application.fleet import FLEET, Backdrop, Fleet
from runcomfy.application.fleet_demand import FleetDemand, FleetSignals
from runcomfy.application.fleet_offers import FleetOffers, wait_usd_per_hour
from runcomfy.application.pooled import MachineLease, PooledMachine
from runcomfy.application.presence import Presence
from runcomfy.application.purse import Purse
from runcomfy.application.role import Role
from runcomfy.domain.budget import Budget
from runcomfy.domain.decision import Decision
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.machine import MachineId
from runcomfy.domain.plan_view import Launch, Plan, PlanView, Policy, Stage, Stop
from runcomfy.domain.queued import QueuedJob
from runcomfy.domain.scaling import CostPlan
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings, PoolSettings
from runcomfy.domain.work import Work
from runcomfy.testing.clock import SettableClock
from runcomfy.testing.contracts.jobs_words import DONE, take
from runcomfy.testing.light_comfyui import LightClient, LightComfyUIs
from runcomfy.testing.programs import EmulatedProcesses, settings_for
from runcomfy.testing.standing_pool import StandingPool

MINUTES: Final = 60.0
HOURS: Final = 3_600.0
ACCOUNT: Final = CloudSettings(
    base_url="http://127.0.0.1:9", user_id="u", tokens=(Secret("t"),), workflow_version_id="v", server_type="medium"
)


def now() -> float:
    """Return the running loop's time."""
    return asyncio.get_running_loop().time()


class Rented(StandingPool):
    """Machines on order, from nobody: each boots, stands idle, computes what the story says, and goes when told."""

    def __init__(self, clock: SettableClock) -> None:
        """Launches are answered after a second, machines Ready after three minutes, and gone at once when drained."""
        super().__init__(clock)
        self._server = LightClient(LightComfyUIs(clock), "https://light.invalid")
        self.boots, self.answers_after, self.goes_after = 180.0, 1.0, 0.0
        self.asked: list[tuple[float, str]] = []
        """Every launch: when, and of which type."""
        self.holds: list[float] = []
        self.whose: list[tuple[str, str]] = []
        self.drained: list[tuple[float, str]] = []
        self.most = 0
        """As many as were there at once, with those that were asked for and those that were going."""
        self._under_way = 0
        self.fails: dict[str, RunComfyError] = {}
        """By type: why no launch works."""

    def _count(self) -> None:
        self.most = max(self.most, len(self._machines) + self._under_way)

    async def launch(
        self, server_type: str, *, why: str, hold_s: float = 0.0, for_user: str = "", for_project: str = ""
    ) -> MachineId:
        """See `Pool`: it is there when it is answered, or `fails` says why not."""
        self.asked.append((now(), server_type))
        self.holds.append(hold_s)
        self.whose.append((for_user, for_project))
        self._under_way += 1
        self._count()
        try:
            await asyncio.sleep(self.answers_after)
        finally:
            self._under_way -= 1
        if (error := self.fails.get(server_type)) is not None:
            raise error
        machine = self.add(self._server, server_type=server_type, boots=self.boots)
        machine.hold_until = now() + self.boots + hold_s if hold_s else 0.0
        return machine.id

    def stand(self, count: int = 1, server_type: str = "medium") -> list[PooledMachine]:
        """Have machines that are Ready."""
        return [self.add(self._server, server_type=server_type) for _ in range(count)]

    def ready(self, machine: PooledMachine, server: Any) -> None:
        """Let a machine be usable, and idle."""
        if machine in self._machines:
            super().ready(machine, server)
            machine.idle_since = now()
            self._count()

    def use(self, machine: PooledMachine, job: QueuedJob) -> MachineLease:
        """Take a seat, and compute."""
        lease = self.lease(machine, job_id=job.uid, attempt=1, workflow=job.workflow_id, user=job.user)
        machine.idle_since = None
        self.computing(lease)
        return lease

    def leave(self, lease: MachineLease) -> None:
        """Give a seat back; the machine is idle then."""
        self.give_back(lease, outcome="done")
        lease.machine.idle_since = lease.machine.last_used = now()
        self._changed()

    def drain(self, machine_id: MachineId, *, why: str) -> None:
        """See `Pool`: an idle one is gone `goes_after` seconds later."""
        machine = self._of(machine_id)
        self.drained.append((now(), why))
        machine.draining, machine.stage, machine.idle_since = why, Stage.DRAINING, None
        if not machine.leases:
            asyncio.get_running_loop().call_later(self.goes_after, self._go, machine)
        self._changed()

    def _go(self, machine: PooledMachine) -> None:
        if machine in self._machines:
            self._machines.remove(machine)
            self._changed()

    def room(self, server_type: str) -> int:
        """See `Pool`: only the fleet has limits."""
        return 100

    def why_no_room(self, server_type: str) -> str:
        """See `Pool`."""
        return ""

    def pausing(self, server_type: str) -> bool:
        """See `Pool`."""
        return False


class Ordered:
    """A policy that says what the test wants said."""

    name = "ordered"

    def __init__(self, say: Callable[[PlanView], Sequence[Any]]) -> None:
        self.say = say
        self.views: list[PlanView] = []

    def plan(self, view: PlanView) -> Plan:
        """Return what was ordered."""
        self.views.append(view)
        return Plan(tuple(self.say(view)))


def stop_all(view: PlanView) -> list[Stop]:
    """Order every machine to be ended, whatever it does."""
    return [Stop(machine.id, "because", 0.0) for machine in view.machines]


def ten_more(view: PlanView) -> list[Launch]:
    """Order ten machines, whatever there is."""
    return [Launch("medium", 10, "because", 1.0)]


class Office:
    """Books, a queue and a pool, and fleets that plan over them."""

    def __init__(self, books: SqlStore, jobs: SqlJobs, clock: SettableClock, folder: Path) -> None:
        self.books, self.jobs, self.clock = books, jobs, clock
        self._settings = settings_for(ACCOUNT, folder)
        self.processes = EmulatedProcesses()
        self.pool = Rented(clock)
        self.said: list[str] = []
        self.role: Role | None = None

        async def opened() -> SqlStore:
            return books

        self.presence = Presence(opened, clock)

    async def a_role(self, lease: timedelta) -> Role:
        """Return the wish of a new process to plan for the books."""
        owner = self.processes.me(now=self.clock.now())
        await self.books.register_owner(owner)
        return Role(FLEET, self.books, owner, clock=self.clock, processes=self.processes, lease=lease)

    async def fleet(
        self,
        policy: Policy | None = None,
        *,
        budgets: Sequence[Budget] = (),
        holds: bool = True,
        types: Sequence[str] = ("medium",),
        lease: timedelta = timedelta(days=30),
        **pool: Any,
    ) -> Fleet:
        """Return a fleet that holds the role, unless it is not to."""
        if self.role is not None:
            await self.role.drop()
        role = self.role = await self.a_role(lease)
        if holds:
            assert await role.take()
        chosen = {"plan_every": timedelta(seconds=20), "max_machines": 4, "server_types": tuple(types), **pool}
        settings = replace(self._settings, budgets=tuple(budgets), pool=PoolSettings(**chosen))
        offers = FleetOffers(self.books, settings, self.clock, provider="runcomfy", types=types)
        axis, jobs_axis, tell = Axis(self.clock.now), Axis(self.jobs.now), self.said.append
        signals = FleetSignals(self.books, self.clock, axis=axis, lead_s=300.0, tell=tell)
        backdrop = Backdrop(
            store=self.books,
            jobs=self.jobs,
            offers=offers,
            demand=FleetDemand(self.jobs, offers, signals, axis=jobs_axis),
            signals=signals,
            purse=Purse(self.books, settings.budgets, self.clock, run_id=role.owner.id, tell=tell),
            role=role,
            clock=self.clock,
            jobs_axis=jobs_axis,
            axis=axis,
            wait_usd_per_hour=wait_usd_per_hour(settings.pool.wait_price, offers.price(types[0])),
            tell=tell,
        )
        return Fleet(self.pool, policy or CostPlan(), settings.pool, backdrop, lease=settings.cloud.run_lease)

    @asynccontextmanager
    async def running(self, policy: Policy | None = None, **options: Any) -> AsyncIterator[Fleet]:
        """Let a fleet plan beside the block."""
        fleet = await self.fleet(policy, **options)
        await fleet.begin()
        task = asyncio.create_task(fleet.run())
        try:
            yield fleet
            assert not task.done(), "it ended by itself"
        finally:
            task.cancel()
            await asyncio.wait({task})
            await fleet.end()

    async def decisions(self, *actions: str) -> list[Decision]:
        """Return what was decided, only these actions if any are named."""
        found = await self.books.decisions(limit=10_000)
        return [one for one in found if not actions or one.action in actions]

    async def work_off(self, seconds: float = 30.0) -> int:
        """Compute what waits, each job so long, on whatever is idle; return how many."""
        count = 0
        while any(waiting.count for waiting in await self.jobs.backlog()):
            machine = next((m for m in self.pool.machines if m.idle_since is not None and not m.draining), None)
            if machine is None:
                await asyncio.sleep(2)
                continue
            job = await take(self.jobs, lease=timedelta(hours=2))
            began = self.clock.now()
            lease = self.pool.use(machine, job)
            cold = lease.cold
            await asyncio.sleep(seconds)
            at = self.clock.now()
            self.pool.computed(lease)
            await self.jobs.finish(job.id, job.token, DONE)
            self.pool.leave(lease)
            work = Work(
                machine.id, job.uid, job.token, job.workflow_id, "medium", began, job.user, job.project, began, at, at
            )
            await self.books.put_work(replace(work, outcome="done", cold=cold))
            count += 1
        return count


@asynccontextmanager
async def an_office(clock: SettableClock, folder: Path) -> AsyncIterator[Office]:
    """Open an office with empty books and an empty queue in a folder."""
    queue = store_from(folder / "queue.sqlite3", clock=clock, durable=False, wake_interval=timedelta(seconds=10))
    async with SqlStore(folder / "books.sqlite3", clock=clock, durable=False) as books, SqlJobs(queue) as jobs:
        yield Office(books, jobs, clock, folder / "state")
