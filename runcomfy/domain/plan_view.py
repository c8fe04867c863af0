"""
What the plan sees and what it may ask for: the values between the pure `scaling.plan` and whoever feeds it.

Two feed it: the fleet of `comfyctl serve`, and the replay of a trace under virtual time. Both hand over the same
values, so what a replay says of a policy is what the product does.

Times are seconds on one axis of the caller's own, which never jumps (the event loop's clock; virtual time in a replay).
Prices are USD per hour as floats: here money is weighed, not booked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class Stage(StrEnum):
    """Where a machine is, for the plan."""

    BOOTING = "booting"
    READY = "ready"
    DRAINING = "draining"
    """It takes no further jobs and is ended when the last one is done."""


@dataclass(frozen=True, slots=True)
class OfferView:
    """A machine type that can be had."""

    name: str
    usd_per_hour: float
    boot_s: float = 180.0
    """From request to Ready, median. RunComfy bills nothing of it."""
    boot_p90_s: float = 300.0
    load_s: float = 30.0
    """From Ready until the first job computes (models are loaded); billed."""
    boot_billed: bool = False
    step_s: float = 1.0
    """Billing step."""
    minimum_s: float = 0.0
    speed: float = 1.0
    """Run time of a job there, relative to the reference type; own history, not list specs."""
    room: int = 1
    """How many more may be launched; 0 while its breaker is open."""
    own: bool = False
    """One's own hardware: costs nothing more when it runs."""


@dataclass(frozen=True, slots=True)
class MachineView:
    """A machine that is there or on its way."""

    id: str
    offer: str
    stage: Stage
    launched_at: float
    ready_at: float
    """When it is, or is expected to be, able to take a job."""
    free_at: float
    """When everything it has is predicted to be done; not later than now if it is idle."""
    jobs: int = 0
    idle_since: float | None = None
    last_used: float | None = None
    warm: frozenset[str] = frozenset()
    """Workflows whose models it has loaded."""
    hold_until: float = 0.0
    """Not to be stopped before (asked for by an intent)."""
    billed_since: float | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """Jobs of one kind that wait."""

    workflow: str
    count: int
    oldest_at: float
    service_s: float
    """Predicted run time of one on the reference type, mean."""
    offers: tuple[str, ...] = ()
    """Types it can run on; empty: any."""
    batch: bool = False
    """Whether they came as one batch, after which nobody waits for more."""


@dataclass(frozen=True, slots=True)
class DemandView:
    """What is known of arrivals; made by `demand.Demand`."""

    seen: int = 0
    """Arrivals counted so far."""
    rate_fast: float = 0.0
    """Arrivals per second, exponentially averaged over 90 s."""
    rate_slow: float = 0.0
    """The same over 600 s."""
    service_s: float = 30.0
    service_cv2: float = 1.0
    """Squared coefficient of variation of run times."""
    silences: tuple[float, ...] = ()
    """Lengths of past silences (no machine had work), oldest first; the newest count most."""
    waits_per_cold: float | None = None
    """Measured: job-seconds of waiting, over all jobs, that one cold start has caused; None without any."""
    last_arrival: float | None = None
    silent_since: float | None = None
    """Since when no machine has work and nothing waits; None while there is work, or before anything was seen."""
    group: float = 1.0
    """How many jobs come together (three pictures of one prompt), as a job sees it: the mean square over the mean."""
    overlap: float = 1.0
    """How often arrivals find work in progress, relative to arrivals at the same rate that know nothing of each other.
    Below 1 where people wait for a result before they send again, above 1 where they send in bursts."""
    rate_session: float = 0.0
    """Arrivals per second while somebody works: over gaps below five minutes."""
    only_batches: bool = False
    """Whether all that came since the last silence came as known batches: nobody waits for more."""


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch that is known ahead."""

    count: int
    work_s: float
    at: float


@dataclass(frozen=True, slots=True)
class PresenceView:
    """Signals that pay; those that do not are left out by whoever makes this."""

    present: int = 0
    """Sources that are there now."""
    left_at: float | None = None
    """When the last one left."""
    expected_until: float | None = None
    """Until when an intent says that work comes."""
    batches: tuple[BatchView, ...] = ()
    lead_s: float = 300.0
    """How long before the first work a presence signal comes, measured."""
    since: float | None = None
    """Since when somebody is there without a break; None: nobody is, or it is not known."""
    recall: float = 1.0
    """Share of the works that came after a silence which signals had announced, measured."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What stands outside and wins."""

    max_machines: int = 1
    min_machines: int = 0
    budget_s: float | None = None
    """Machine-seconds at the cheapest offer that budgets still allow; None: no budget."""
    why_not: str = ""
    """Why nothing may be launched now; empty if something may."""


@dataclass(frozen=True, slots=True)
class PlanView:
    """Everything a plan is made from."""

    now: float
    offers: tuple[OfferView, ...]
    """The first one is the reference type."""
    machines: tuple[MachineView, ...] = ()
    backlog: tuple[Backlog, ...] = ()
    demand: DemandView = field(default_factory=DemandView)
    presence: PresenceView = field(default_factory=PresenceView)
    limits: Limits = field(default_factory=Limits)
    wait_usd_per_hour: float = 8.75
    """What an hour of one job's waiting is worth."""
    keep_alive_s: float | None = None
    """A fixed keep-alive that the user set."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Rent machines."""

    offer: str
    count: int
    why: str
    expected_usd: float
    """What it is expected to cost more than not doing it, in USD."""
    hold_s: float = 0.0
    """Not to be stopped for so long after it is ready (an intent)."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End a machine that is idle."""

    machine_id: str
    why: str
    expected_usd: float = 0.0
    """What it is expected to save, as a negative amount, in USD."""


@dataclass(frozen=True, slots=True)
class Extend:
    """Keep a machine that is idle until then; its lease is renewed as far as that needs."""

    machine_id: str
    until: float
    why: str


Action = Launch | Stop | Extend


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to look again if nothing happens before."""

    actions: tuple[Action, ...] = ()
    look_at: float | None = None
    """None: only something that happens can change the plan."""


class Policy(Protocol):
    """Anything that plans: the product's plan, or one it is compared with. Pure."""

    @property
    def name(self) -> str:
        """Return what tables call it."""
        ...

    def plan(self, view: PlanView) -> Plan:
        """Return what to do."""
        ...
