"""
What a policy would have cost over a stream of jobs: the same plan that `comfyctl serve` runs, under virtual time.

A discrete-event simulation: nothing waits, nothing is random unless a seed says so, and no clock is read. The policy is
handed the values that the fleet hands it (`plan_view`), fed by the same `Demand`; it never sees what is to come, and of
run times it sees predictions from those that ended. What the world does to it is the provider's rule:

* A machine is Ready `boot_s` after its launch, and bills from then until it is ended (or from the launch, if the offer
  says so), by steps and with the offer's minimum.
* Ready, it loads models for `load_s`, billed, before its first job computes. It does so at once, as a machine does that
  is warmed up or whose first prompt waits; with `load_ahead=False` it waits for the first job.
* Jobs are taken in the order of arrival, by the machine that was used last (of two prices, the cheaper one), so that
  others can go.
* Only what is idle, or not ready yet, can be ended.

The price of it all is J = dollars + price of waiting x hours waited, where a job waits from its arrival until it
computes: queue, boot and load.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from runcomfy.domain.demand import Demand, SignalScore
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.plan_view import (
    Backlog,
    Extend,
    Launch,
    Limits,
    MachineView,
    OfferView,
    PlanView,
    Policy,
    PresenceView,
    Stage,
    Stop,
)

HOUR: Final = 3600.0
STANDARD: Final = OfferView("standard", 1.75)
"""RunComfy's price of 24 GB, pay as you go; a start takes 180 s and is free, models load in 30 s."""
BRIDGE: Final = OfferView("bridge", 1.5 * 1.75, boot_s=30.0, boot_p90_s=30.0, load_s=0.0, boot_billed=True)
"""A start as serverless offers have it: within 30 s, which are billed, at 1.5 times the price."""
PATIENCE_S: Final = 6 * HOUR
"""How long after the last thing that happened a policy may still keep machines; what is there then is ended."""
_SOURCE: Final = "clients"
"""Signals come from one application that speaks for all of its users: they are scored together."""
_SOONEST_S: Final = 0.05
"""A policy that wants to look again at once looks again so much later, as a loop would."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One job of a stream. Times are seconds; `service_s` is its run time on the reference type."""

    at: float
    service_s: float
    user: str = ""
    workflow: str = ""


@dataclass(frozen=True, slots=True)
class Presence:
    """Signals as a client would send them: opened before a session's first job, left after its last."""

    gap_s: float = 900.0
    """A session ends when its user has had nothing running and sent nothing for so long. A quarter of an hour is also
    how long somebody counts as present who does not say it again (`signal.PRESENCE_FOR`)."""
    lead_s: float = 300.0
    """How long before a session's first job the client says that somebody is there."""
    recall: float = 1.0
    """Share of the sessions that are announced at all."""
    seed: int = 0
    """Which ones, if not all."""


@dataclass(frozen=True, slots=True)
class Told:
    """A signal as it was really told: somebody is there, until then at the latest, or left (`until` is `at`)."""

    at: float
    source: str
    until: float


@dataclass(frozen=True, slots=True)
class World:
    """What surrounds a policy."""

    offers: tuple[OfferView, ...] = (STANDARD,)
    """The first one is the reference type."""
    wait_usd_per_hour: float = 5 * STANDARD.usd_per_hour
    max_machines: int = 32
    min_machines: int = 0
    keep_alive_s: float | None = None
    presence: Presence | None = None
    """Signals made up from the stream's sessions; None: none are."""
    told: tuple[Told, ...] = ()
    """Signals that were really told, in order of time."""
    load_ahead: bool = True

    def at_wait_price(self, times: float) -> World:
        """Return the same world where an hour of waiting is worth so many hours of the reference type."""
        return replace(self, wait_usd_per_hour=times * self.offers[0].usd_per_hour)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy did over a stream. Times in seconds, money in USD."""

    policy: str
    jobs: int
    usd: float
    waited_s: float
    """By all jobs together."""
    wait_usd_per_hour: float
    waits: tuple[float, ...] = field(repr=False)
    """Of every job, in ascending order."""
    cold: int
    """Jobs that computed first on a machine that was not ready when they came."""
    launches: int
    billed_s: float
    busy_s: float
    plans: int
    most_machines: int

    @property
    def cost(self) -> float:
        """J: dollars plus the price of waiting."""
        return self.usd + self.wait_usd_per_hour * self.waited_s / HOUR

    @property
    def usd_per_1000(self) -> float:
        """Dollars for a thousand jobs."""
        return 1000 * self.usd / self.jobs if self.jobs else 0.0

    @property
    def cold_share(self) -> float:
        """Share of the jobs that met a cold start."""
        return self.cold / self.jobs if self.jobs else 0.0

    def wait(self, share: float) -> float:
        """Return the wait that `share` of the jobs stayed below, by nearest rank."""
        if not self.waits:
            return 0.0
        return self.waits[min(len(self.waits) - 1, max(0, math.ceil(share * len(self.waits)) - 1))]


def replay(policy: Policy, stream: Sequence[Arrival], world: World | None = None) -> Outcome:
    """Return what `policy` would have done over `stream`, which must be in order of time.

    Raises ValueInvalid if the policy leaves jobs without a machine for good.
    """
    return _Replay(policy, stream, world or World()).run()


@dataclass(frozen=True, slots=True)
class Session:
    """A stretch of one user's work."""

    user: str
    began_at: float
    jobs: int


def sessions_of(stream: Sequence[Arrival], gap_s: float) -> tuple[list[Session], list[int]]:
    """Return the sessions, and for each job the index of its own.

    A job's end is taken as its arrival plus its run time, so that sessions do not depend on the policy.
    """
    sessions: list[Session] = []
    of_job: list[int] = []
    current: dict[str, tuple[int, float]] = {}
    for job in stream:
        index, busy_until = current.get(job.user, (-1, -math.inf))
        if job.at - busy_until > gap_s:
            index = len(sessions)
            sessions.append(Session(job.user, job.at, 0))
        sessions[index] = replace(sessions[index], jobs=sessions[index].jobs + 1)
        current[job.user] = (index, max(busy_until, job.at + job.service_s))
        of_job.append(index)
    return sessions, of_job


@dataclass(slots=True)
class _Job:
    arrival: Arrival
    session: int
    predicted_s: float


@dataclass(slots=True, eq=False)
class _Machine:
    id: str
    offer: OfferView
    launched_at: float
    ready_at: float
    ready: bool = False
    loaded_at: float | None = None
    """When its models are, or will be, loaded; None: not begun."""
    job: _Job | None = None
    free_at: float = 0.0
    idle_since: float | None = None
    last_used: float | None = None
    hold_until: float = 0.0
    gone: bool = False
    warm: set[str] = field(default_factory=set)

    @property
    def billed_since(self) -> float | None:
        if self.offer.boot_billed:
            return self.launched_at
        return self.ready_at if self.ready else None

    @property
    def takes(self) -> bool:
        """Whether it can take a job now."""
        return self.idle_since is not None

    def billed_s(self, end: float) -> float:
        since = self.billed_since
        if since is None:
            return 0.0
        seconds, step = max(end - since, self.offer.minimum_s), self.offer.step_s
        # A second that is over by a rounding error of the sum is not another step.
        return math.ceil(seconds / step - 1e-9) * step if step > 0 else seconds


class _Predictions:
    """Mean run times of what has ended, by workflow; of all, where a workflow has not run yet."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, float]] = {}

    def add(self, workflow: str, service_s: float) -> None:
        for name in {workflow, ""}:
            count, total = self._sums.get(name, (0, 0.0))
            self._sums[name] = (count + 1, total + service_s)

    def of(self, workflow: str, otherwise: float) -> float:
        count, total = self._sums.get(workflow) or self._sums.get("") or (0, 0.0)
        return total / count if count else otherwise


# What happens, in the order in which it counts at one and the same moment: what ends, before what comes.
_ENDED, _LOADED, _READY, _TOLD, _RAN_OUT, _OPENED, _ARRIVED, _LOOK = range(8)


class _Replay:
    """One run. Every `_on_…` moves the world; `_plan` lets the policy answer."""

    def __init__(self, policy: Policy, stream: Sequence[Arrival], world: World) -> None:
        self._policy, self._stream, self._world = policy, stream, world
        self._offers = {offer.name: offer for offer in world.offers}
        self._views: dict[int, tuple[OfferView, ...]] = {}
        self._events: list[tuple[float, int, int, int]] = []
        """When, what, the number of the event, and which (job, session or machine)."""
        self._numbers = 0
        self._machines: list[_Machine] = []
        self._all: list[_Machine] = []
        self._queue: deque[_Job] = deque()
        self._demand, self._scores, self._predictions = Demand(), SignalScore(), _Predictions()
        self._sessions, self._session_of = sessions_of(stream, (world.presence or Presence()).gap_s)
        self._left_of_session = [session.jobs for session in self._sessions]
        self._heard: dict[int | str, float] = {}
        """Announced sessions and sources that are there, and until when at the latest."""
        self._there_since: float | None = None
        self._left_at: float | None = None
        self._heeded = True
        self._announced = self._unannounced = 0
        """Works that came after a silence: while somebody was there, and while nobody was."""
        """Since when somebody announced is there without a break."""
        self._computing = 0
        self._to_come = len(stream)
        self._look_at: float | None = None
        self._waits: list[float] = []
        self._usd = self._billed = self._busy = 0.0
        self._cold = self._plans = self._most = 0

    def run(self) -> Outcome:
        for number, job in enumerate(self._stream):
            self._at(job.at, _ARRIVED, number)
        self._announce()
        latest = math.inf
        while self._events and self._events[0][0] <= latest:
            now = self._events[0][0]
            while self._events and self._events[0][0] <= now:
                _, kind, _, which = heapq.heappop(self._events)
                self._happen(now, kind, which)
                if kind != _LOOK:
                    latest = now + PATIENCE_S if not self._to_come else math.inf
            self._dispatch(now)
            self._plan(now)
        if len(self._waits) < len(self._stream):
            raise ValueInvalid(
                f"{self._policy.name} never ran {len(self._stream) - len(self._waits)} of {len(self._stream)} jobs",
                hint="a policy must rent a machine for whatever waits",
            )
        for machine in list(self._machines):
            self._end(machine, latest)
        return Outcome(
            policy=self._policy.name,
            jobs=len(self._stream),
            usd=self._usd,
            waited_s=sum(self._waits),
            wait_usd_per_hour=self._world.wait_usd_per_hour,
            waits=tuple(sorted(self._waits)),
            cold=self._cold,
            launches=len(self._all),
            billed_s=self._billed,
            busy_s=self._busy,
            plans=self._plans,
            most_machines=self._most,
        )

    def _at(self, when: float, kind: int, which: int) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (when, kind, self._numbers, which))

    def _announce(self) -> None:
        presence = self._world.presence
        for number, told in enumerate(self._world.told):
            self._at(told.at, _TOLD, number)
            if told.until > told.at:
                self._at(told.until, _RAN_OUT, number)
        if presence is None:
            return
        chance = random.Random(presence.seed)  # noqa: S311 - a share of the sessions, not a secret
        for number, session in enumerate(self._sessions):
            if chance.random() < presence.recall:
                self._at(session.began_at - presence.lead_s, _OPENED, number)

    # -- what happens ----------------------------------------------------------------------------------------

    def _happen(self, now: float, kind: int, which: int) -> None:
        if kind == _ARRIVED:
            self._on_arrival(now, which)
        elif kind == _OPENED:
            self._opened(now, which, math.inf)
        elif kind == _TOLD:
            told = self._world.told[which]
            if told.until > now:
                self._opened(now, told.source, told.until)
            else:
                self._left(now, told.source)
        elif kind == _RAN_OUT:
            source = self._world.told[which].source
            if self._heard.get(source, math.inf) <= now:
                self._left(now, source)
        elif kind == _LOOK:
            pass  # planning follows whatever happened
        elif not self._all[which].gone:
            machine = self._all[which]
            {_READY: self._on_ready, _LOADED: self._on_loaded, _ENDED: self._on_ended}[kind](now, machine)

    def _on_arrival(self, now: float, number: int) -> None:
        arrival, session = self._stream[number], self._session_of[number]
        silent = not self._queue and not self._computing
        predicted = self._predictions.of(arrival.workflow, self._demand.view(now).service_s)
        self._to_come -= 1
        self._demand.work_came(now)
        if silent and self._heard:
            self._announced += 1
        elif silent:
            self._unannounced += 1
        if not self._machines:
            self._demand.cold_start(now)
        self._demand.arrived(now, 1, predicted)
        if now == self._sessions[session].began_at:
            self._scores.work_came(now, after_silence=silent)
        self._queue.append(_Job(arrival, session, predicted))

    def _opened(self, now: float, who: int | str, until: float) -> None:
        if not self._heard:
            self._there_since = now
            self._heeded = self._scores.pays(_SOURCE, self._worth_s())
        self._heard[who] = max(until, self._heard.get(who, until))
        self._scores.said(_SOURCE, now)

    def _left(self, now: float, who: int | str) -> None:
        if self._heard.pop(who, None) is not None and not self._heard:
            self._scores.left(_SOURCE, now)
            self._left_at, self._there_since = now, None

    def _worth_s(self) -> float:
        """Return how long an idle machine costs as much as one cold start."""
        offer, waited_s = self._world.offers[0], self._demand.view(0.0).waits_per_cold
        times = self._world.wait_usd_per_hour / offer.usd_per_hour if offer.usd_per_hour else 1.0
        return offer.load_s + times * (offer.boot_s + offer.load_s if waited_s is None else waited_s)

    def _on_ready(self, now: float, machine: _Machine) -> None:
        machine.ready = True
        if self._world.load_ahead and machine.offer.load_s > 0:
            machine.loaded_at = machine.free_at = now + machine.offer.load_s
            self._at(machine.loaded_at, _LOADED, int(machine.id))
            return
        if self._world.load_ahead:
            machine.loaded_at = now
        machine.idle_since = machine.free_at = now

    def _on_loaded(self, now: float, machine: _Machine) -> None:
        machine.idle_since = machine.free_at = now

    def _on_ended(self, now: float, machine: _Machine) -> None:
        job = machine.job
        if job is None:
            raise AssertionError("a machine without a job ended one")
        machine.job, machine.idle_since, machine.free_at, machine.last_used = None, now, now, now
        self._computing -= 1
        self._predictions.add(job.arrival.workflow, job.arrival.service_s)
        self._demand.served(job.arrival.service_s)
        self._left_of_session[job.session] -= 1
        if not self._left_of_session[job.session]:
            self._left(now, job.session)

    # -- what the world does ----------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Give waiting jobs to idle machines."""
        idle = [machine for machine in self._machines if machine.takes] if self._queue else []
        # Last of the list first: the cheapest, and of those the one used last.
        idle.sort(key=lambda m: (-m.offer.usd_per_hour, -math.inf if m.last_used is None else m.last_used, m.ready_at))
        while self._queue and idle:
            self._begin(self._queue.popleft(), idle.pop(), now)
        if not self._queue and not self._computing:
            self._demand.went_silent(now)

    def _begin(self, job: _Job, machine: _Machine, now: float) -> None:
        load = machine.offer.load_s if machine.loaded_at is None else 0.0
        if machine.last_used is None and (load or machine.ready_at + machine.offer.load_s > job.arrival.at):
            self._cold += 1
        if machine.loaded_at is None:
            machine.loaded_at = now + load
        seconds = job.arrival.service_s * machine.offer.speed
        waited = now + load - job.arrival.at
        self._waits.append(waited)
        self._demand.waited(waited)
        self._busy += seconds
        self._computing += 1
        machine.job, machine.idle_since = job, None
        machine.free_at = now + load + job.predicted_s * machine.offer.speed
        machine.last_used = now
        machine.warm.add(job.arrival.workflow)
        self._at(now + load + seconds, _ENDED, int(machine.id))

    def _end(self, machine: _Machine, now: float) -> None:
        machine.gone = True
        self._machines.remove(machine)
        seconds = machine.billed_s(now)
        self._billed += seconds
        self._usd += seconds * machine.offer.usd_per_hour / HOUR

    # -- what the policy does ---------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        self._plans += 1
        plan = self._policy.plan(self._view(now))
        for action in plan.actions:
            match action:
                case Launch():
                    self._launch(action, now)
                case Stop():
                    self._stop(action.machine_id, now)
                case Extend():
                    for machine in self._machines:
                        if machine.id == action.machine_id:
                            machine.hold_until = max(machine.hold_until, action.until)
        if plan.look_at is not None:
            at = max(plan.look_at, now + _SOONEST_S)
            # One that is due earlier answers for it: it will say again when to look.
            if self._look_at is None or self._look_at <= now or at < self._look_at:
                self._look_at = at
                self._at(at, _LOOK, 0)

    def _launch(self, action: Launch, now: float) -> None:
        offer = self._offers[action.offer]
        for _ in range(min(action.count, self._world.max_machines - len(self._machines))):
            machine = _Machine(str(len(self._all)), offer, now, now + offer.boot_s)
            machine.free_at = machine.ready_at + offer.load_s
            machine.hold_until = machine.ready_at + action.hold_s if action.hold_s else 0.0
            self._all.append(machine)
            self._machines.append(machine)
            self._at(machine.ready_at, _READY, int(machine.id))
        self._most = max(self._most, len(self._machines))

    def _stop(self, machine_id: str, now: float) -> None:
        for machine in self._machines:
            if machine.id == machine_id and machine.job is None:
                self._end(machine, now)
                return

    def _view(self, now: float) -> PlanView:
        world = self._world
        return PlanView(
            now=now,
            offers=self._offers_with(max(0, world.max_machines - len(self._machines))),
            machines=tuple(self._seen(machine, now) for machine in self._machines),
            backlog=self._backlog(),
            demand=self._demand.view(now),
            presence=self._presence(),
            limits=Limits(max_machines=world.max_machines, min_machines=world.min_machines),
            wait_usd_per_hour=world.wait_usd_per_hour,
            keep_alive_s=world.keep_alive_s,
        )

    def _offers_with(self, room: int) -> tuple[OfferView, ...]:
        if room not in self._views:
            self._views[room] = tuple(replace(offer, room=room) for offer in self._world.offers)
        return self._views[room]

    def _seen(self, machine: _Machine, now: float) -> MachineView:
        return MachineView(
            id=machine.id,
            offer=machine.offer.name,
            stage=Stage.READY if machine.ready else Stage.BOOTING,
            launched_at=machine.launched_at,
            ready_at=machine.ready_at,
            free_at=max(machine.free_at, now) if machine.idle_since is None else min(machine.free_at, now),
            jobs=0 if machine.job is None else 1,
            idle_since=machine.idle_since,
            last_used=machine.last_used,
            warm=frozenset(machine.warm),
            hold_until=machine.hold_until,
            billed_since=machine.billed_since,
        )

    def _backlog(self) -> tuple[Backlog, ...]:
        kinds: dict[str, list[_Job]] = {}
        for job in self._queue:
            kinds.setdefault(job.arrival.workflow, []).append(job)
        believed = self._demand.view(0.0).service_s if kinds else 0.0
        return tuple(
            Backlog(workflow, len(jobs), jobs[0].arrival.at, self._predictions.of(workflow, believed))
            for workflow, jobs in kinds.items()
        )

    def _presence(self) -> PresenceView:
        world = self._world
        if world.presence is None and not world.told:
            return PresenceView()
        works = self._announced + self._unannounced
        names = {who if isinstance(who, str) else self._sessions[who].user for who in self._heard}
        present = len(names) if self._heeded else 0
        return PresenceView(
            present=present,
            left_at=None if present else self._left_at,
            lead_s=self._scores.lead_s((world.presence or Presence()).lead_s),
            since=self._there_since if present else None,
            recall=self._announced / works if works else 1.0,
        )
