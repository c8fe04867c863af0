"""
One controller, a thousand emulated machines, ten thousand queued jobs: what `comfyctl serve` does with them.

The controller is the product's (`App.serve`: fleet, pool, renewals, dispatch, executor, reconciler, both SQLite files);
the cloud is the emulated one, over HTTP, at the documented request a second. Only the ComfyUI servers are light, and
the heart that renews jobs beats in the loop. All of it is in one process whose idle time is skipped (`skipping`): what
the controller computes takes its processor time, so a loop that is held up would let leases run out here as in life.
The emulators' memory counts, too.

    ramp    a first controller launches a thousand machines, at twenty requests a second (at one it takes an hour), and
            leaves them to whoever comes next, as after its death
    adopt   the controller that is measured takes them over
    work    ten thousand jobs are put in at once, computed and written down
    hold    nothing to do, until two leases have passed since it began
    end     everything is stopped in good order

Bars: one plan under 5 ms at the median while jobs wait, under 1 GB, no machine stopped because its lease ran out, every
job computed once, the ledger equal to the cloud's bill.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.common import Findings, high, middle, report
from benchmarks.results import Result
from benchmarks.skipping import HOLD_MS, SkippingLoop
from runcomfy.application.fleet import Fleet
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.machine_pool import MachinePool
from runcomfy.application.pooled import Pool
from runcomfy.application.role import Role
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App
from runcomfy.domain.job import JobRequest
from runcomfy.domain.machine import MachineId, ServerId
from runcomfy.domain.money import seconds_between
from runcomfy.domain.plan_view import Plan, PlanView, Policy
from runcomfy.domain.queued import NewJob, QueueStatus
from runcomfy.domain.renewal import lease_for
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.settings import CloudSettings, PoolSettings, QueueSettings, Settings
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine
from runcomfy.testing.light_comfyui import LightClient, LightComfyUIs, graph
from runcomfy.testing.programs import settings_for

MACHINES = int(os.environ.get("BENCHMARK_MACHINES", "1000"))
JOBS = int(os.environ.get("BENCHMARK_JOBS", "10000"))
WORKFLOWS = 20
JOB_S = 150.0
LEASES_HELD = 2
BAR_MS = 5.0
BAR_MB = 1024
LOOK_EVERY = 5.0
QUICK = 20.0
"""Requests a second while machines are only launched to be there."""
POLL = timedelta(seconds=30)
"""How often a prompt about which nothing is heard is asked after: light servers tell only its beginning and its end."""


class Cloud(RunComfyEmulator):
    """The emulated cloud, which also notes how close machines came to being stopped by their leases."""

    def __init__(self, loop: SkippingLoop, **options: Any) -> None:
        super().__init__(**options)
        self._own = loop
        self.margins: list[float] = []
        """Seconds that were left when a machine was renewed."""
        self.ran_out: list[str] = []
        """Machines that were stopped because their time was over."""

    def _outcome(self, *args: Any, **options: Any) -> Any:
        began = time.thread_time()
        try:
            return super()._outcome(*args, **options)
        finally:
            self._own.not_counted += time.thread_time() - began  # the cloud's work is not the controller's

    def _change_duration(self, machine: EmulatedMachine, body: Any, *, works: bool) -> Any:
        if machine.stops_at is not None and machine.bills:
            self.margins.append((machine.stops_at - self.now()).total_seconds())
        return super()._change_duration(machine, body, works=works)

    def _end(self, machine: EmulatedMachine) -> None:
        stops_at = machine.stops_at
        if machine.bills and stops_at is not None and self.now() >= stops_at - timedelta(milliseconds=1):
            self.ran_out.append(machine.server_id)
        super()._end(machine)


@dataclass
class Ticks:
    """How long plans took, in milliseconds of processor time."""

    view: list[float] = field(default_factory=list)
    """Reading what is needed and building the view; also what else the loop did meanwhile."""
    plan: list[float] = field(default_factory=list)
    apply: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def clear(self) -> None:
        for values in (self.view, self.plan, self.apply, self.whole):
            values.clear()

    def figures(self) -> dict[str, Any]:
        if not self.plan:
            return {"plans": 0}
        named = {"plan": self.plan, "apply": self.apply, "view": self.view, "tick": self.whole}
        found: dict[str, Any] = {"plans": len(self.plan)}
        for name, values in named.items():
            found |= {f"{name}_p50_ms": round(middle(values), 2), f"{name}_p99_ms": round(high(values, 0.99), 2)}
        return found


def _timed(work: Callable[..., Any], took: list[float]) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        began = time.thread_time()
        try:
            return work(*args)
        finally:
            took.append((time.thread_time() - began) * 1e3)

    return timed


def _timed_async(work: Callable[..., Awaitable[Any]], took: list[float]) -> Callable[..., Awaitable[Any]]:
    async def timed(*args: Any) -> Any:
        began = time.process_time()
        try:
            return await work(*args)
        finally:
            took.append((time.process_time() - began) * 1e3)

    return timed


class _TimedPolicy:
    def __init__(self, policy: Policy, took: list[float]) -> None:
        self._policy, self._took = policy, took

    @property
    def name(self) -> str:
        return self._policy.name

    def plan(self, view: PlanView) -> Plan:
        plan: Plan = _timed(self._policy.plan, self._took)(view)
        return plan


class Controller(App):
    """The product's wiring; only the ComfyUI clients are others, and the heart beats in the loop."""

    def __init__(self, settings: Settings, queue: QueueSettings, clock: LoopClock, servers: LightComfyUIs) -> None:
        super().__init__(settings, clock=clock)
        self._queue_settings = queue
        self._servers = servers
        self.ticks = Ticks()
        self.kept: MachinePool | None = None
        self.in_charge: Role | None = None

    def _client(self, url: SecretUrl) -> ComfyUI:
        return LightClient(self._servers, url.reveal())

    def _heart(self, *_: object) -> Pulse | None:
        return None  # a thread's time is not skipped

    async def pool(self, role: Role) -> MachinePool:
        self.kept = await super().pool(role)
        return self.kept

    async def fleet_role(self) -> Role:
        self.in_charge = await super().fleet_role()
        return self.in_charge

    async def fleet(self, pool: Pool, role: Role, *, policy: Policy | None = None) -> Fleet:
        fleet, ticks = await super().fleet(pool, role, policy=policy), self.ticks
        fleet.policy = _TimedPolicy(fleet.policy, ticks.plan)
        fleet.view = _timed_async(fleet.view, ticks.view)  # type: ignore[method-assign, assignment]
        fleet.tick = _timed_async(fleet.tick, ticks.whole)  # type: ignore[method-assign, assignment]
        fleet._apply = _timed(fleet._apply, ticks.apply)  # type: ignore[method-assign]
        return fleet


class Stand:
    """What the phases work with."""

    def __init__(self, loop: SkippingLoop, cloud: Cloud, servers: LightComfyUIs) -> None:
        self.loop, self.cloud, self.servers = loop, cloud, servers
        self.ticks = Ticks()
        self.process = psutil.Process()
        self.peak_mb = 0.0
        self.found = Findings(
            "fleet",
            "Idle time is skipped, computing takes its processor time.",
            "The emulated cloud and the light servers are in the same process, and their memory counts.",
        )

    @asynccontextmanager
    async def phase(self, name: str, **more: Any) -> AsyncIterator[dict[str, Any]]:
        loop, cloud, figures = self.loop, self.cloud, dict[str, Any]()
        self.ticks.clear()
        loop.holds.clear()
        calls, margins, requests = len(cloud.calls), len(cloud.margins), self.servers.requests
        at, real, cpu = loop.time(), time.perf_counter(), time.process_time()
        yield figures
        seconds = loop.time() - at
        kinds = Counter(_kind(call.method, call.path) for call in cloud.calls[calls:])
        holds = loop.holds or [0.0]
        self.measure()
        report(
            "fleet",
            phase=name,
            **more,
            seconds=round(seconds, 1),
            real_s=round(time.perf_counter() - real, 1),
            cpu_s=round(time.process_time() - cpu, 1),
            cpu_share=round((time.process_time() - cpu) / max(seconds, 1e-9), 3),
            requests_per_s={kind: round(count / seconds, 3) for kind, count in sorted(kinds.items())},
            requests_per_s_all=round(sum(kinds.values()) / seconds, 3),
            comfyui_requests=self.servers.requests - requests,
            least_margin_s=round(min(cloud.margins[margins:]), 1) if cloud.margins[margins:] else None,
            loop_held_p99_ms=round(high(holds, 0.99), 1),
            loop_held_max_ms=round(max(holds), 1),
            loop_held_over_50_ms=sum(1 for hold in holds if hold > HOLD_MS),
            tasks=len(asyncio.all_tasks()),
            rss_mb=round(self.process.memory_info().rss / 2**20),
            **self.ticks.figures(),
            **figures,
        )

    def measure(self) -> None:
        self.peak_mb = max(self.peak_mb, self.process.memory_info().rss / 2**20)

    async def until(self, true: Callable[[], Awaitable[bool]], serving: asyncio.Task[Any]) -> None:
        while not await true():
            if serving.done():
                await serving
                raise RuntimeError("the service ended by itself")
            self.measure()
            await asyncio.sleep(LOOK_EVERY)


def _kind(method: str, path: str) -> str:
    if "update-estimated-duration" in path:
        return "renew"
    return {"POST": "launch", "DELETE": "stop"}.get(method, "list" if path.partition("?")[0] == "servers" else "status")


async def differences(cloud: Cloud, app: App) -> int:
    """Return for how many machines our ledger and the cloud's bill differ by a second or more."""
    machines, _ = await app.cloud()
    ids = {row.server_id: row.id for row in await machines.books.rows(open_only=False)}
    ours: defaultdict[MachineId | None, Decimal] = defaultdict(Decimal)
    for entry in await machines.store.ledger():
        ours[entry.machine_id] += seconds_between(entry.started_at, entry.ended_at)
    gaps = [abs(ours[ids.get(ServerId(known))] - bill.seconds) for known, bill in cloud.books.items()]
    return sum(1 for gap in gaps if gap >= 1)


def jobs(count: int) -> Sequence[NewJob]:
    return [NewJob(JobRequest(graph(JOB_S, n)), f"workflow-{n % WORKFLOWS}") for n in range(count)]


async def all_there(app: Controller) -> bool:
    return app.kept is not None and sum(machine.takes_jobs for machine in app.kept.machines) >= MACHINES


async def ramp(stand: Stand, app: Controller) -> None:
    """Have machines launched, and leave them running."""
    stop = asyncio.Event()
    serving = asyncio.create_task(app.serve(ServeOptions(guard=False), stop))
    async with stand.phase("ramp", machines=MACHINES):
        await stand.until(lambda: all_there(app), serving)
    if app.in_charge is not None:
        # Who does not hold the role, and finds that another has it, ends no machine.
        app.in_charge.take_softly = _another_has_it  # type: ignore[method-assign]
        await app.in_charge.drop()
    stop.set()
    await serving


async def _another_has_it() -> bool:
    return False


async def story(stand: Stand, app: Controller) -> None:
    """Take the machines over, work, hold, end."""
    cloud, loop = stand.cloud, stand.loop
    app.ticks = stand.ticks
    stop = asyncio.Event()
    queue = await app.job_queue()
    lease = lease_for(MACHINES, lease=app.settings.cloud.run_lease, requests_per_second=1.0)

    async def all_done() -> bool:
        return (await queue.counts())[QueueStatus.DONE] >= JOBS

    began_at = loop.time()
    serving = asyncio.create_task(app.serve(ServeOptions(guard=False), stop))
    async with stand.phase("adopt", machines=MACHINES):
        await stand.until(lambda: all_there(app), serving)
    async with stand.phase("work", machines=MACHINES, jobs=JOBS, job_s=JOB_S, bar_ms=BAR_MS) as figures:
        began, real, cpu = loop.time(), time.perf_counter(), time.process_time()
        new = jobs(JOBS)
        for start in range(0, JOBS, 1_000):
            await queue.enqueue_many(new[start : start + 1_000])
        figures["put_in_s"] = round(time.perf_counter() - real, 1)
        await stand.until(all_done, serving)
        figures["jobs_per_s"] = round(JOBS / (loop.time() - began), 2)
        figures["jobs_per_cpu_s"] = round(JOBS / (time.process_time() - cpu), 1)
        figures["computing_share"] = round(JOBS * JOB_S / (MACHINES * (loop.time() - began)), 3)
        figures["kept"] = middle(stand.ticks.plan) < BAR_MS
        stand.found.at_most("one plan while jobs wait, median", middle(stand.ticks.plan), BAR_MS, "ms")
        stand.found.told("one plan while jobs wait, p99", high(stand.ticks.plan, 0.99), "ms")
        stand.found.told("the view for it, median", middle(stand.ticks.view), "ms")
        stand.found.told("jobs for each second of processor time", figures["jobs_per_cpu_s"])
    end_at = began_at + LEASES_HELD * lease.total_seconds()
    async with stand.phase("hold", machines=MACHINES, lease_s=lease.total_seconds()):

        async def over() -> bool:
            return loop.time() >= end_at

        await stand.until(over, serving)
        billing = len(cloud.billing)
    async with stand.phase("end"):
        stop.set()
        await serving
    left = len(cloud.alive)
    stand.measure()
    wrong = sum(1 for count in stand.servers.ran.values() if count != 1)
    differ = await differences(cloud, app)
    report(
        "fleet",
        phase="all",
        machines=MACHINES,
        jobs=JOBS,
        launched=len(cloud.launched),
        held_to_the_end=billing,
        leases_missed=len(cloud.ran_out),
        renewals=len(cloud.margins),
        least_margin_s=round(min(cloud.margins), 1),
        computed_once=len(stand.servers.ran) - wrong,
        machines_left=left,
        ledger_differs_from_bill=differ,
        peak_rss_mb=round(stand.peak_mb),
        kept=not (cloud.ran_out or wrong or left or differ)
        and len(stand.servers.ran) == JOBS
        and stand.peak_mb < BAR_MB,
    )
    stand.found.at_most("machines stopped because their lease ran out", len(cloud.ran_out), 0)
    stand.found.at_least("jobs computed once", len(stand.servers.ran) - wrong, JOBS)
    stand.found.at_most("machines left running", left, 0)
    stand.found.at_most("machines whose ledger differs from the bill by a second", differ, 0)
    stand.found.at_most("memory, peak", stand.peak_mb, BAR_MB, "MB")
    stand.found.told("least time left at a renewal", min(cloud.margins), "s")
    stand.found.at_most(
        "machines launched, all of them to be taken over by the next controller", len(cloud.launched), MACHINES
    )


async def run(loop: SkippingLoop) -> Result:
    clock = LoopClock.following_the_wall()
    servers = LightComfyUIs(clock)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="comfyctl-bench-")))
        cloud = Cloud(loop, now=clock.now, comfyui_factory=servers.factory, balance_usd=None)
        await stack.enter_async_context(cloud)
        account = CloudSettings(
            base_url=cloud.url,
            user_id=cloud.user_id,
            tokens=(Secret(cloud.token),),
            workflow_version_id=str(cloud.workflows[0]["version_id"]),
        )
        settings = settings_for(account, folder / "state")
        settings = replace(
            settings,
            comfy=replace(settings.comfy, poll_interval=POLL),
            pool=PoolSettings(max_machines=MACHINES, min_machines=MACHINES, guard=False),
        )
        queue = QueueSettings(
            root=str(folder),
            jobs_processing=str(folder / "jobs" / "processing"),
            jobs_finished=str(folder / "jobs" / "finished"),
            database=Secret(str(folder / "queue.sqlite3")),
            where="pool",
            wake_interval=timedelta(seconds=1),
            job_timeout=timedelta(hours=1),
        )
        stand = Stand(loop, cloud, servers)
        lease = lease_for(MACHINES, lease=account.run_lease, requests_per_second=account.requests_per_second)
        quick = replace(account, requests_per_second=QUICK, burst=int(QUICK), run_lease=lease)
        cloud.requests_per_second, cloud.burst = QUICK, 2 * int(QUICK)
        first = Controller(replace(settings, cloud=quick), queue, clock, servers)
        async with first:
            await ramp(stand, first)
        cloud.requests_per_second, cloud.burst = 1.0, 10
        app = Controller(settings, queue, clock, servers)
        async with app:
            await story(stand, app)
    return stand.found.result()


def main() -> Result:
    loop = SkippingLoop()
    try:
        return loop.run_until_complete(run(loop))
    finally:
        loop.close()


if __name__ == "__main__":
    main()
