"""
A machine of the pool as everybody sees it who does not keep the pool: the dispatch of jobs, the plan, the tables.

`MachinePool` makes and changes these; others only read them and take leases. It also writes down each lease's time on
the machine (`Work`, by `Store.put_work`): when the seat was taken, when its prompt computes, and when the lease ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Protocol

from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId, PromptId
from runcomfy.domain.machine import Machine, MachineId
from runcomfy.domain.place_key import machine_key
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.work import Work
from runcomfy.ports.comfyui import ComfyUI


@dataclass(eq=False, slots=True)
class MachineLease:
    """A job's hold on a seat of a machine, from `MachinePool.lease` to `give_back`.

    `token` is the machine's `epoch` when the seat was taken: a lease with an older one is void, because the machine
    was not Ready in between and what was on it cannot be relied on (fault 16).
    """

    machine: PooledMachine
    job_id: JobId
    attempt: int
    workflow: str
    user: str
    project: str
    token: int
    began_at: datetime
    expected_s: float = 0.0
    """Predicted computing time, for the plan and for placement."""
    computing_at: float | None = None
    """By the loop's time: since when its prompt computes; None while it is prepared or waits its turn."""
    computed_at: float | None = None
    """By the loop's time: since when it only fetches. It holds no seat any more, but keeps the machine busy (I8)."""
    cold: bool = False
    """Whether the machine had not computed this workflow since it became usable."""
    given_back: bool = False
    shared_from: float = 0.0
    """The machine's `shared_s` when the lease began, and when it ended."""
    shared_until: float | None = None
    work: Work | None = None
    """What is written down of it."""
    prompt_id: PromptId | None = None
    """Its prompt, once the server has it: what else is in the server's queue somebody has sent by hand (fault 69)."""

    @property
    def void(self) -> bool:
        """Whether the machine was lost or not Ready since the seat was taken."""
        return self.token != self.machine.epoch


@dataclass(eq=False, slots=True)
class PooledMachine:
    """One machine of the pool. Times marked "loop" are seconds by the event loop's clock."""

    machine: Machine
    """Our books' row, as it was last seen."""
    launched_at: float
    """Loop."""
    expected_ready_at: float
    """Loop: when it is expected to be usable, or was."""
    server: ComfyUI | None = None
    """Its ComfyUI, once that answers."""
    stage: Stage = Stage.BOOTING
    epoch: int = 0
    """Goes up each time it becomes usable: the fencing token of its leases."""
    leases: list[MachineLease] = field(default_factory=list)
    warm: set[str] = field(default_factory=set)
    """Workflows it has computed since it became usable."""
    idle_since: float | None = None
    """Loop; None while it has leases or is not usable."""
    last_used: float | None = None
    """Loop."""
    hold_until: float = 0.0
    """Loop: the plan does not stop it before."""
    wanted_until: float | None = None
    """Loop: until when the plan wants it although it is idle."""
    draining: str = ""
    """Why it takes no further jobs."""
    unpaid: str = ""
    """What a budget said that pays no longer; set when the machine is ended because of it, whatever runs there."""
    flapped: bool = False
    """Whether it is there and not Ready any more: what was on it is void, and nothing died of it."""
    outran: bool = False
    """Whether it went away at the end of its lease, although it was to be prolonged."""
    void: bool = False
    """Whether it was usable once and is not now: nobody can be reached there, and what was sent may run on."""
    gone: bool = False
    """Whether it is proven to exist no more, and nothing that was sent there runs (I4, I12)."""
    suspect: str = ""
    """Why nothing new is sent there just now: something does not answer, and it is being found out what."""
    shared_s: float = 0.0
    """Seconds that one lease that had been there all the time would have to pay for."""
    counted_at: float = 0.0
    """Loop: until when `shared_s` is counted."""
    changes: int = 0
    """Goes up with every change of the machine or of its leases, before the pool's listeners are called."""

    @property
    def id(self) -> MachineId:
        """Our own id."""
        return self.machine.id

    @property
    def key(self) -> str:
        """The key of the place (`Place.key`)."""
        return machine_key(self.machine.id)

    @property
    def seated(self) -> int:
        """How many jobs hold a seat: they compute, or wait their turn in the server's queue."""
        return sum(1 for lease in self.leases if lease.computed_at is None)

    @property
    def takes_jobs(self) -> bool:
        """Whether a job may be placed there now, seats aside."""
        return self.stage is Stage.READY and not self.draining and not self.suspect and self.server is not None

    def predicted_free_at(self, now: float) -> float:
        """Return when what it computes and what waits there is predicted to be done (loop), at least `now`."""
        free_at = now
        for lease in self.leases:
            if lease.computed_at is None:
                begun = lease.computing_at
                free_at += lease.expected_s if begun is None else max(0.0, begun + lease.expected_s - now)
        return free_at


class Pool(Protocol):
    """The machines of one account that work off one queue: `MachinePool`."""

    @property
    def machines(self) -> Sequence[PooledMachine]:
        """Return every machine of the pool, those that start and drain too, oldest first. Never waits."""
        ...

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` soon after anything changed that placement or plan could care about."""
        ...

    def lease(
        self,
        pooled: PooledMachine,
        *,
        job_id: JobId,
        attempt: int,
        workflow: str,
        user: str = "",
        project: str = "",
        expected_s: float = 0.0,
        attach: bool = False,
    ) -> MachineLease:
        """Take a seat at a machine. Raises MachineLost if it takes no jobs or has no seat free. Never waits.

        `attach`: to go on with a prompt that is there already; a machine that drains, or is full, does not refuse that.
        """
        ...

    def computing(self, lease: MachineLease, *, ago_s: float = 0.0) -> None:
        """Say that the lease's prompt computes, and since when. `lease.cold` is right from now on."""
        ...

    def computed(self, lease: MachineLease) -> None:
        """Say that the prompt has ended, well or not: its seat is free for the next job, the machine stays busy."""
        ...

    def give_back(self, lease: MachineLease, *, outcome: str, error: RunComfyError | None = None) -> None:
        """End a lease; harmless when repeated. `error` is what the job failed with: the machine's health counts it."""
        ...

    def cost_share(self, lease: MachineLease) -> Decimal:
        """Return what the job has cost so far in USD: the machine's time, divided among the jobs that were there."""
        ...

    async def launch(
        self, server_type: str, *, why: str, hold_s: float = 0.0, for_user: str = "", for_project: str = ""
    ) -> MachineId:
        """Rent a machine; returns when its intent is durable and the provider has answered, booting goes on behind.

        Raises BudgetExceeded, ProviderError, ValueInvalid, LocalError: nothing runs then.
        """
        ...

    def want(self, machine_id: MachineId, *, until: float) -> None:
        """Say until when (loop) an idle machine is wanted."""
        ...

    def drain(self, machine_id: MachineId, *, why: str) -> None:
        """Let a machine take no further jobs and end it when its last one has left. Harmless when repeated."""
        ...

    def room(self, server_type: str) -> int:
        """Return how many more machines of a type could be launched: limits and the type's breaker count."""
        ...

    def why_no_room(self, server_type: str) -> str:
        """Return why `room` is 0, for people."""
        ...

    def pausing(self, server_type: str) -> bool:
        """Return whether `room` is 0 only for a moment, between two starts of a type that has just failed."""
        ...
