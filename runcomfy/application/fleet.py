"""
The fleet: decides, again and again, how many machines of which type the queue deserves now.

    view     what waits, what machines there are, what history and clients say, what budgets leave
    plan     the pure policy (`domain.scaling`): launch, stop, keep
    apply    within the hard limits, which stand outside the policy and win: the number of machines, the budgets, and
             that no busy machine is stopped; each decision is written down with what, why and the expected cost

Whoever runs this holds the role `fleet` of the books (`role`); without it nothing is decided. It plans when something
changed, when the plan asked to be looked at again, and at the latest every `plan_every`. Times are the loop's (I21).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from runcomfy.application.axis import Axis
from runcomfy.application.fleet_demand import FleetDemand, FleetSignals
from runcomfy.application.fleet_failing import Failing
from runcomfy.application.fleet_offers import FleetOffers
from runcomfy.application.gate import standing_pause
from runcomfy.application.job_queue import host_scope
from runcomfy.application.latency import price_for
from runcomfy.application.pooled import Pool, PooledMachine
from runcomfy.application.purse import Purse
from runcomfy.application.role import Role
from runcomfy.domain.decision import Decision
from runcomfy.domain.durations import show_duration
from runcomfy.domain.exceptions import (
    AuthRejected,
    BudgetExceeded,
    LocalError,
    NoCapacity,
    OutOfCredit,
    RunComfyError,
    foreign_text,
)
from runcomfy.domain.plan_view import (
    Action,
    Backlog,
    Extend,
    Launch,
    Limits,
    MachineView,
    OfferView,
    Plan,
    PlanView,
    Policy,
    Stage,
    Stop,
)
from runcomfy.domain.queued import FLEET_SCOPE, QUEUE_SCOPE, Barred, Waiting
from runcomfy.domain.settings import PoolSettings
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.fleet")

FLEET: Final = "fleet"
"""The role's name in the books."""
PLAN_GAP: Final = 0.5
"""Seconds between two plans: a busy queue changes a thousand times a second."""
BUDGETS_EVERY: Final = 5.0
"""Seconds for which what was read of the budgets is believed, to look ahead by; the cap itself is the store's."""
SOON: Final = 0.05


@dataclass(slots=True)
class _Coming:
    """A launch that was not answered yet."""

    offer: str
    asked_at: float


@dataclass(slots=True)
class Backdrop:
    """What a fleet works with, beside its pool and its policy."""

    store: Store
    jobs: JobStore
    offers: FleetOffers
    demand: FleetDemand
    signals: FleetSignals
    purse: Purse
    role: Role
    clock: Clock
    jobs_axis: Axis
    """Of the queue's stamps."""
    axis: Axis
    """Of the books' stamps."""
    wait_usd_per_hour: float
    tell: Callable[[str], None] = field(default=lambda _: None)


class Fleet:
    """Plans for one pool. `await run()` plans until it is cancelled."""

    def __init__(
        self, pool: Pool, policy: Policy, settings: PoolSettings, backdrop: Backdrop, *, lease: timedelta
    ) -> None:
        """Nothing is read yet. `lease` is how long a machine is paid ahead."""
        self._lease_s = lease.total_seconds()
        self.pool, self.policy, self.settings = pool, policy, settings
        self._with = backdrop
        self._wake = asyncio.Event()
        self._coming: dict[asyncio.Task[None], _Coming] = {}
        self._known: set[str] = set()
        """Machines that answered launches have become."""
        self._failing: dict[str, Failing] = {}
        self._kept: dict[str, float] = {}
        """Machine -> since when it was idle when it was last said that it is kept."""
        self._waiting: Sequence[Waiting] = ()
        self._budgets_at = float("-inf")
        self._stands: tuple[str, str] | None = None
        """The pause that says why nothing is launched, as it was last written."""
        self._forbidden: BudgetExceeded | None = None
        """Why nothing could be launched at the last plan, though jobs waited."""
        self._scopes = (QUEUE_SCOPE, host_scope(backdrop.role.owner))
        """Where a pause keeps the pool's jobs from being begun."""
        self._busy = False
        self._trouble = False
        pool.on_change(self._wake.set)

    # -- running -------------------------------------------------------------------------------------------

    @property
    def works(self) -> Sequence[Work]:
        """Runs of the days looked back at, oldest first, as last read."""
        return self._with.offers.works

    def barred(self) -> Barred:
        """Return whose jobs wait because a budget of theirs is used up. Never waits."""
        return self._with.purse.barred()

    def wake(self) -> None:
        """Plan soon."""
        self._wake.set()

    async def begin(self) -> None:
        """Learn what history says. Raises LocalError."""
        with_ = self._with
        await with_.offers.refresh(at_once=True)
        await with_.signals.hear(history=True)
        await with_.demand.rebuild()
        with_.signals.relived()
        self._waiting = await self._backlog_now()
        served = {(work.user, work.project) for work in with_.offers.works}
        await with_.purse.refresh(served | {(each.user, each.project) for each in self._waiting})
        await with_.jobs.resume(scope=FLEET_SCOPE, by=with_.role.owner.id)  # what another one said
        if self.settings.latency_target is not None:
            await self._price_waiting(self.settings.latency_target)

    async def _price_waiting(self, target: timedelta) -> None:
        """Find the price of waiting that would have kept the target."""
        with_ = self._with
        found = await price_for(target, with_.jobs, with_.offers, self.settings, axis=with_.jobs_axis)
        wanted = f"that 95 of 100 jobs wait no longer than {show_duration(target)}"
        if found is None:
            with_.tell(
                f"too few jobs came yet to say what it takes {wanted}; waiting costs {self._price_shown} until then"
            )
            return
        with_.wait_usd_per_hour = found.usd_per_hour
        how = "takes" if found.met else "cannot be kept by any price; the best is"
        with_.tell(f"by the jobs of the last days, {wanted} {how} {self._price_shown}")

    @property
    def _price_shown(self) -> str:
        return f"${self._with.wait_usd_per_hour:.2f} per job and hour"

    async def end(self) -> None:
        """Take back what is said of machines that are not launched: nobody plans any more."""
        if self._stands is not None:
            self._stands = None
            with suppress(LocalError):
                await self._with.jobs.resume(scope=FLEET_SCOPE, by=self._with.role.owner.id)

    async def run(self) -> None:
        """Plan until cancelled. A store that refuses is said once, and asked again."""
        watcher = asyncio.create_task(self._watch_queue(), name="fleet-queue")
        try:
            while True:
                self._wake.clear()
                plan = Plan()
                try:
                    plan = await self.tick()
                except LocalError as error:
                    self._troubled(error)
                else:
                    self._works_again()
                await self._rest(plan)
        finally:
            watcher.cancel()
            for task in self._coming:
                task.cancel()
            await asyncio.wait({watcher, *self._coming})

    async def _rest(self, plan: Plan) -> None:
        now = asyncio.get_running_loop().time()
        until = now + self.settings.plan_every.total_seconds()
        for at in (plan.look_at, self._with.signals.next_change(now)):
            if at is not None:
                until = min(until, max(at, now) + SOON)
        await asyncio.sleep(PLAN_GAP)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._wake.wait()

    async def _watch_queue(self) -> None:
        mark = 0
        while True:
            try:
                seen = await self._with.jobs.changed(timeout=self.settings.plan_every, seen=mark)
            except LocalError:
                await asyncio.sleep(self.settings.plan_every.total_seconds())
                continue
            if seen != mark:
                mark = seen
                self._wake.set()

    def _troubled(self, error: LocalError) -> None:
        log.warning("fleet_cannot_plan", extra={"fields": {"error": error.code, "message": error.message}})
        if not self._trouble:
            self._with.tell(f"{error.message}; nothing is planned until that works again")
        self._trouble = True

    def _works_again(self) -> None:
        if self._trouble:
            self._trouble = False
            self._with.tell("the database works again: planning goes on")

    async def left(self) -> int:
        """Return how many jobs wait that could be begun, budgets aside. Raises LocalError."""
        return sum(each.count for each in await self._backlog_now())

    def stuck(self) -> RunComfyError | None:
        """Return why what waited at the last plan gets no machine for now: None while some of it may."""
        purse, waiting = self._with.purse, self._waiting
        if waiting and not any(purse.allows(each.user, each.project) for each in waiting):
            return purse.used_up(waiting[0].user, waiting[0].project)
        if not waiting or self.pool.machines or self._coming:
            return None
        return self._forbidden or self._given_up()

    def _given_up(self) -> RunComfyError | None:
        """Return why no machine of any type can be had, if that is not only for a moment."""
        errors: list[RunComfyError] = []
        for name in self._with.offers.types:
            if (failing := self._failing.get(name)) is not None:
                error = failing.given_up
            elif self.pool.room(name) > 0 or self.pool.pausing(name):
                error = None
            else:  # its launches are answered, and its machines do not become usable
                why = self.pool.why_no_room(name)
                error = NoCapacity(why, hint="`comfyctl costs decisions` shows what was tried")
            if error is None:
                return None
            errors.append(error)
        return errors[0]

    async def _backlog_now(self) -> Sequence[Waiting]:
        return await self._with.jobs.backlog(places=[machine.key for machine in self.pool.machines])

    # -- planning ------------------------------------------------------------------------------------------

    async def tick(self) -> Plan:
        """Plan once and do what the plan says. Without the role nothing is planned. Raises LocalError."""
        if not self._with.role.holds():
            return Plan()
        view = await self.view()
        plan = self.policy.plan(view)
        if not self._with.role.holds():  # we may have slept between the two
            return Plan()
        decisions = self._apply(plan.actions, view)
        await self._say_why_not(view)
        if decisions:
            await self._with.store.decide(decisions)
        return plan

    async def view(self) -> PlanView:
        """Return what the plan is made from now. Raises LocalError."""
        with_, now = self._with, asyncio.get_running_loop().time()
        self._waiting = await self._backlog_now()
        await with_.signals.hear()
        await with_.demand.follow(silent=not self._busy)
        if await with_.offers.refresh():
            with_.demand.learn(with_.offers.works)
            with_.demand.forget(with_.offers.works)
        await self._look_into_purse(now)
        now = asyncio.get_running_loop().time()
        machines = self._machines(now)
        # What may not be begun deserves no machine; those that are idle meanwhile are kept no longer than others.
        backlog = self._backlog()
        if backlog and await standing_pause(with_.jobs, self._scopes) is not None:
            backlog = ()
        alive = [machine for machine in machines if machine.stage is not Stage.DRAINING]
        self._busy = bool(backlog) or any(machine.jobs for machine in machines)
        with_.demand.observe(now, busy=self._busy, machines=bool(alive))
        offers = with_.offers.views(lambda name: self._room(name, now))
        demand = with_.demand.view(now)
        worth_s = _worth_s(offers[0], with_.wait_usd_per_hour, demand.waits_per_cold)
        cheapest = min(offer.usd_per_hour for offer in offers)
        keep, forbidden = self.settings.keep_alive, with_.purse.forbids(*self._least)
        if forbidden is not None and backlog:
            await self._refused(offers[0].name, forbidden)
        self._forbidden = forbidden if backlog else None
        return PlanView(
            now=now,
            offers=offers,
            machines=tuple(machines),
            backlog=backlog,
            demand=demand,
            presence=with_.signals.view(now, worth_s=worth_s),
            limits=Limits(
                max_machines=self.settings.max_machines,
                min_machines=min(self.settings.min_machines, self.settings.max_machines),
                budget_s=with_.purse.seconds(cheapest),
                why_not=self._why_not(offers, forbidden),
            ),
            wait_usd_per_hour=with_.wait_usd_per_hour,
            keep_alive_s=None if keep is None else keep.total_seconds(),
        )

    async def _look_into_purse(self, now: float) -> None:
        waiting = {(each.user, each.project) for each in self._waiting}
        purse = self._with.purse
        if now - self._budgets_at < BUDGETS_EVERY and purse.knows(waiting):
            return
        running = {(lease.user, lease.project) for machine in self.pool.machines for lease in machine.leases}
        await purse.refresh(waiting | running)
        self._budgets_at = now

    def _backlog(self) -> tuple[Backlog, ...]:
        """Return what waits by workflow; jobs that no budget lets begin deserve no machine."""
        with_, found = self._with, dict[str, Backlog]()
        now = asyncio.get_running_loop().time()
        for each in self._waiting:
            if not with_.purse.allows(each.user, each.project):
                continue
            oldest = with_.jobs_axis.of(each.oldest_at) if each.oldest_at is not None else now
            known = found.get(each.workflow_id)
            if known is None:
                known = Backlog(each.workflow_id, 0, oldest, with_.offers.run_s(each.workflow_id))
            found[each.workflow_id] = replace(
                known, count=known.count + each.count, oldest_at=min(known.oldest_at, oldest)
            )
        batch = with_.signals.batched(now)
        return tuple(replace(known, batch=batch) for known in found.values())

    def _machines(self, now: float) -> list[MachineView]:
        shown = [self._shown(machine, now) for machine in self.pool.machines]
        for number, (offer, asked_at) in enumerate(self._unseen()):
            ready_at = asked_at + self._with.offers.boot_s(offer)
            shown.append(MachineView(f"asked-{number}", offer, Stage.BOOTING, asked_at, ready_at, max(now, ready_at)))
        return shown

    def _shown(self, pooled: PooledMachine, now: float) -> MachineView:
        machine = pooled.machine
        booting = pooled.stage is Stage.BOOTING
        free_at = pooled.predicted_free_at(now)
        return MachineView(
            id=str(pooled.id),
            offer=machine.server_type,
            stage=Stage.DRAINING if pooled.draining else pooled.stage,
            launched_at=pooled.launched_at,
            # A start that is late is not expected in the past.
            ready_at=max(now, pooled.expected_ready_at) if booting else pooled.expected_ready_at,
            free_at=max(free_at, pooled.expected_ready_at) if booting else free_at,
            jobs=len(pooled.leases),
            idle_since=pooled.idle_since,
            last_used=pooled.last_used,
            warm=frozenset(pooled.warm),
            hold_until=pooled.hold_until,
            billed_since=self._with.axis.of(machine.ready_at) if machine.ready_at is not None else None,
        )

    def _unseen(self) -> list[tuple[str, float]]:
        """Return the launches that are under way and are no machine of the pool yet: type, and when asked for."""
        if not self._coming:
            return []
        since = min(coming.asked_at for coming in self._coming.values())
        new = [m.machine.server_type for m in self.pool.machines if m.launched_at >= since and m.id not in self._known]
        unseen = []
        for coming in sorted(self._coming.values(), key=lambda coming: coming.asked_at):
            if coming.offer in new:
                new.remove(coming.offer)
            else:
                unseen.append((coming.offer, coming.asked_at))
        return unseen

    def _rented(self) -> int:
        """Return how many machines count against the limit: also those that start and those that stop."""
        return len(self.pool.machines) + len(self._unseen())

    def _room(self, offer: str, now: float) -> int:
        failing = self._failing.get(offer)
        if failing is not None and now < failing.until:
            return 0
        return min(self.pool.room(offer), self.settings.max_machines - self._rented())

    @property
    def _least(self) -> tuple[Decimal, str]:
        """What a launch commits at least, paid ahead for a lease, and of which type: the cheapest."""
        price, name = min((self._with.offers.price(name), name) for name in self._with.offers.types)
        return Decimal(repr(round(price * self._lease_s / 3600, 6))), name

    def _why_not(self, offers: Sequence[OfferView], forbidden: BudgetExceeded | None) -> str:
        if forbidden is not None:
            return forbidden.message
        if any(offer.room > 0 for offer in offers) or self._rented() >= self.settings.max_machines:
            return ""
        failing = [known.why for name, known in self._failing.items() if known.why]
        return next(iter(failing), "") or self.pool.why_no_room(offers[0].name)

    # -- doing ---------------------------------------------------------------------------------------------

    def _apply(self, actions: Collection[Action], view: PlanView) -> list[Decision]:
        decisions: list[Decision] = []
        for action in actions:
            match action:
                case Launch():
                    decisions += self._launch(action, view)
                case Stop():
                    decisions += self._stop(action)
                case Extend():
                    decisions += self._keep(action)
        return [*decisions, *self._above_limit()]

    def _launch(self, action: Launch, view: PlanView) -> list[Decision]:
        if view.limits.why_not:
            return []  # a policy that asks all the same is not obeyed
        room = min(action.count, self._room(action.offer, view.now))
        decisions = []
        price = self._with.offers.price(action.offer)
        for _ in range(room):
            decisions.append(self._decided("launch", action.offer, action.why, action.expected_usd / action.count))
            self._with.tell(f"launching a {action.offer} machine (${price:g}/h): {action.why}")
            task = asyncio.create_task(self._rent(action), name=f"launch {action.offer}")
            self._coming[task] = _Coming(action.offer, asyncio.get_running_loop().time())
            task.add_done_callback(self._rented_or_not)
        return decisions

    def _rented_or_not(self, task: asyncio.Task[None]) -> None:
        self._coming.pop(task, None)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("launch_defect", exc_info=error)

    async def _rent(self, action: Launch) -> None:
        who, project = self._for_whom()
        try:
            machine_id = await self.pool.launch(
                action.offer, why=action.why, hold_s=action.hold_s, for_user=who, for_project=project
            )
        except BudgetExceeded as error:
            self._with.purse.refused(error)
            await self._refused(action.offer, error)
        except RunComfyError as error:
            await self._failed(action.offer, error)
        else:
            self._known.add(str(machine_id))
            self._failing.pop(action.offer, None)
            self._with.purse.allowed()

    def _for_whom(self) -> tuple[str, str]:
        """Return the one user and the one project whose jobs wait; nobody's where there are several."""
        waiting = [each for each in self._waiting if self._with.purse.allows(each.user, each.project)]
        users, projects = {each.user for each in waiting}, {each.project for each in waiting}
        return users.pop() if len(users) == 1 else "", projects.pop() if len(projects) == 1 else ""

    async def _refused(self, offer: str, error: BudgetExceeded) -> None:
        """A hard limit said no. That is said and written down once, not with every plan."""
        if self._with.purse.news(error):
            self._with.tell(f"no machine is launched: {error.message}; {error.hint}")
            await self._write([self._decided("refused", offer, f"{error.message}; {error.hint}", 0.0)])

    async def _failed(self, offer: str, error: RunComfyError) -> None:
        now, known = asyncio.get_running_loop().time(), self._failing.setdefault(offer, Failing())
        everywhere = isinstance(error, AuthRejected | OutOfCredit)
        news = known.why != error.message
        for name in self._with.offers.types if everywhere else (offer,):
            self._failing.setdefault(name, Failing()).failed(error, now=now)
        log.warning("launch_failed", extra={"fields": {"type": offer, "error": error.code, "message": error.message}})
        if news:
            again = "" if known.given_up else "; it is tried again"
            self._with.tell(f"a {offer} machine could not be launched: {error.message}{again}")
            await self._write([self._decided("refused", offer, f"{error.code}: {error.message}", 0.0)])

    def _stop(self, action: Stop) -> list[Decision]:
        machine = self._machine(action.machine_id)
        if machine is None or machine.draining:
            return []
        staying = sum(1 for other in self.pool.machines if not other.draining)
        if machine.leases or staying <= min(self.settings.min_machines, self.settings.max_machines):
            return []  # never a busy one, and never below what is to be kept
        return [self._drain(machine, action.why, action.expected_usd)]

    def _drain(self, machine: PooledMachine, why: str, expected_usd: float) -> Decision:
        name = machine.machine.server_id or machine.id
        self._with.tell(f"ending {machine.machine.server_type} machine {name}: {why}")
        self.pool.drain(machine.id, why=why)
        return self._decided("stop", str(machine.id), why, expected_usd)

    def _above_limit(self) -> list[Decision]:
        """Let idle machines go that are more than allowed: the limit may have been lowered between two starts."""
        staying = [machine for machine in self.pool.machines if not machine.draining]
        above = len(staying) - self.settings.max_machines
        idle = [machine for machine in staying if not machine.leases]
        why = f"no more than {self.settings.max_machines} machines are allowed"
        return [self._drain(machine, why, 0.0) for machine in idle[: max(0, above)]]

    def _keep(self, action: Extend) -> list[Decision]:
        machine = self._machine(action.machine_id)
        if machine is None or machine.draining:
            return []
        self.pool.want(machine.id, until=action.until)
        if machine.idle_since is None or self._kept.get(str(machine.id)) == machine.idle_since:
            return []
        self._kept[str(machine.id)] = machine.idle_since
        kind = machine.machine.server_type
        price = self._with.offers.price(kind) if kind in self._with.offers.types else 0.0
        seconds = max(0.0, action.until - asyncio.get_running_loop().time())
        return [self._decided("extend", str(machine.id), action.why, price * seconds / 3600)]

    def _machine(self, machine_id: str) -> PooledMachine | None:
        return next((machine for machine in self.pool.machines if str(machine.id) == machine_id), None)

    # -- words ---------------------------------------------------------------------------------------------

    def _decided(self, action: str, what: str, why: str, expected_usd: float) -> Decision:
        expected = Decimal(repr(round(expected_usd, 6)))
        fields: dict[str, Any] = {"action": action, "what": what, "why": why, "expected_usd": str(expected)}
        log.info("fleet_decided", extra={"fields": {**fields, "epoch": self._with.role.epoch}})
        by = self._with.role.owner.id
        return Decision(self._with.clock.now(), action, what, foreign_text(why, 500), expected, by)

    async def _write(self, decisions: Sequence[Decision]) -> None:
        with suppress(LocalError):  # the log line has it
            await self._with.store.decide(decisions)

    async def _say_why_not(self, view: PlanView) -> None:
        """Keep a word in the queue for whoever looks at it, on why jobs wait for no machine; no worker obeys it."""
        why = view.limits.why_not if view.backlog and not view.machines else ""
        stands = ("no-machine", why) if why else None
        if stands == self._stands:
            return
        if stands is not None:
            await self._with.jobs.pause(
                scope=FLEET_SCOPE, reason=stands[0], message=why, retry_in=self._retry_in(), by=self._with.role.owner.id
            )
        else:
            await self._with.jobs.resume(scope=FLEET_SCOPE, by=self._with.role.owner.id)
        self._stands = stands

    def _retry_in(self) -> timedelta | None:
        refusal = self._with.purse.forbids(*self._least)
        resets = refusal.details.get("resets_at") if refusal is not None else None
        if isinstance(resets, str):
            return max(timedelta(seconds=1), datetime.fromisoformat(resets) - self._with.clock.now())
        return None


def _worth_s(offer: OfferView, wait_usd_per_hour: float, waits_per_cold: float | None) -> float:
    """Return how many idle seconds of a machine one spared cold start is worth."""
    price = max(offer.usd_per_hour, 1e-6)
    waited = waits_per_cold if waits_per_cold is not None else offer.boot_s + offer.load_s
    return offer.load_s + wait_usd_per_hour / price * waited


__all__ = ["FLEET", "Backdrop", "Fleet"]
