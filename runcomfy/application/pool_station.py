"""
Where an executor's jobs run when machines are rented as they are needed: on seats of the pool's machines.

A machine has a few seats. One job computes, the next one's prompt waits in the server's queue already, so that the
machine is never idle between two jobs. A seat is free again when its prompt has ended; while the job still fetches its
results it keeps the machine busy without one. Which job goes where is decided by `domain.placement`; launching,
leasing, judging and ending machines is the pool's business.

A seat on a machine that went away, or was not Ready in between, is void: the job that has it is broken off at once and
fails with MachineLost, wherever it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Final

from runcomfy.application.dispatch import Choice
from runcomfy.application.placing import POOL_MACHINE, JobFacts, Place, Show, TellBill, TimeStep
from runcomfy.application.pool_seat import PRESUMED_S, Experience, PoolSeat
from runcomfy.application.pooled import MachineLease, Pool, PooledMachine
from runcomfy.application.work_book import outcome_of
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    BudgetExceeded,
    MachineFailed,
    MachineLost,
    NotComfyUI,
    RunComfyError,
    ServerRestarted,
    ServerUnreachable,
    WorkerDead,
)
from runcomfy.domain.job import BillLine, JobId
from runcomfy.domain.placement import BackWhy, Pending, Second, Spot, place, take_back
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import Phase, QueuedJob, RowId
from runcomfy.domain.settings import PoolSettings
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock

log = logging.getLogger("runcomfy.station")

LATE_S: Final = 15.0
"""How much longer a machine that is late is expected to start at least; it grows with the delay."""
GAIN_S: Final = 2.0
"""A job is moved to an idle machine only if that begins it so much earlier: taking it back and sending it again is six
requests."""
MACHINE_FAILS: Final = (MachineLost, MachineFailed, ServerRestarted, WorkerDead)
"""After these the prompts of everybody on the machine are in doubt."""


class PoolStation:
    """An executor's station over the pool. Also its `Chooser`: jobs are claimed for seats."""

    def __init__(
        self,
        pool: Pool,
        settings: PoolSettings,
        *,
        clock: Clock,
        works: Iterable[Work] = (),
        outlives: Callable[[], bool] = lambda: False,
    ) -> None:
        """`works`: earlier runs, to know from the start how long jobs take.

        `outlives`: whether the pool's machines go on when this process ends, so that prompts may be left running there.
        """
        self._pool, self._settings, self._clock = pool, settings, clock
        self._outlives = outlives
        self.experience = Experience(works)
        self._seats: dict[tuple[JobId, int], PoolSeat] = {}
        """By job and attempt: a job may be claimed again while an older run of it still ends here."""
        self._at: dict[PooledMachine, list[PoolSeat]] = {}
        """The same seats by machine, in the order in which they were taken."""
        self._looked: dict[PooledMachine, int] = {}
        """The machine's `changes` when its seats were looked at last."""
        self._listed: Sequence[PooledMachine] = ()
        self._known: frozenset[PooledMachine] = frozenset()
        """The pool's machines as of `_listed`."""
        self._delayed: dict[RowId, float] = {}
        """Since when (loop) others have passed a job, or it was held for a machine that starts."""
        self._listeners: list[Callable[[], None]] = []
        self._gone_listeners: list[Callable[[], None]] = []
        self._had: Sequence[PooledMachine] = ()
        """The pool's machines when it last changed."""
        pool.on_change(self._changed)

    # -- what there is -------------------------------------------------------------------------------------

    def on_change(self, listener: Callable[[], None]) -> None:
        """See `Chooser`."""
        self._listeners.append(listener)

    def on_gone(self, listener: Callable[[], None]) -> None:
        """See `Chooser`."""
        self._gone_listeners.append(listener)

    def _changed(self) -> None:
        for machine, seats in list(self._at.items()):
            if self._looked.get(machine) == machine.changes:
                continue
            self._looked[machine] = machine.changes
            for seat in list(seats):
                if not seat.void:
                    seat.look()
                    continue
                seat.spare()
                if seat.cut is not None:
                    seat.cut()
        had, self._had = self._had, self._pool.machines
        if had is not self._had and any(machine.gone for machine in set(had).difference(self._had)):
            for listener in self._gone_listeners:
                listener()
        for listener in self._listeners:
            listener()

    def places(self) -> Collection[str]:
        """Return the keys of the machines that answer: those that drain, too, for prompts that are there already."""
        return {machine.key for machine in self._pool.machines if _answers(machine)}

    def room(self) -> int:
        """Return how many seats are free."""
        depth = self._settings.depth
        return sum(max(0, depth - machine.seated) for machine in self._pool.machines if machine.takes_jobs)

    async def ready(self) -> None:
        """Nothing can be said without renting: who has no machine waits until the plan has one."""

    async def idle(self) -> None:
        """The plan ends machines."""

    async def close(self) -> None:
        """The pool's keeper ends machines."""

    # -- choosing ------------------------------------------------------------------------------------------

    def choose(self, waiting: Sequence[QueuedJob]) -> Sequence[Choice]:
        """See `Chooser`."""
        now = asyncio.get_running_loop().time()
        jobs = {row.id: row for row in waiting}
        pending = [self._pending(row, now) for row in waiting]
        placed = place(
            pending,
            self._spots(now, {job.bound for job in pending if job.bound is not None}),
            self.experience,
            patience_s=self._settings.affinity_wait.total_seconds(),
        )
        for job in placed.delayed:
            self._delayed.setdefault(job, now)
        self._forget(jobs, now)
        return [Choice(jobs[placement.job], placement.machine) for placement in placed.placements]

    def _forget(self, jobs: Collection[RowId], now: float) -> None:
        """Drop what is known of jobs that are not at the head of the queue any more, after a while."""
        patience = self._settings.affinity_wait.total_seconds()
        for job, since in list(self._delayed.items()):
            if job not in jobs and now - since > 2 * patience:
                del self._delayed[job]

    def _pending(self, row: QueuedJob, now: float) -> Pending:
        there = row.phase is not Phase.NONE and row.place in self.places()
        delayed = now - self._delayed[row.id] if row.id in self._delayed else 0.0
        return Pending(row.id, row.priority, row.workflow_id, row.place if there else None, delayed)

    def _spots(self, now: float, bound: Collection[str] | None = None) -> list[Spot]:
        """Return the machines as placement sees them; with `bound` only those with a seat, and those named there."""
        machines = self._pool.machines
        if bound is not None:
            depth = self._settings.depth
            machines = [machine for machine in machines if machine.seated < depth or machine.key in bound]
        return [self._spot(machine, now) for machine in machines]

    def _spot(self, machine: PooledMachine, now: float) -> Spot:
        seated = [lease for lease in machine.leases if lease.computed_at is None]
        foreign = self._foreign(machine, now)
        starts = machine.stage is Stage.BOOTING
        late = now - machine.expected_ready_at
        ready_s = (-late if late < 0 else max(LATE_S, late)) if starts else 0.0
        seats = self._settings.depth - len(seated) if machine.takes_jobs or starts else 0
        return Spot(
            id=machine.key,
            server_type=machine.machine.server_type,
            usd_per_hour=float(machine.machine.usd_per_hour),
            seats=max(0, seats),
            taken=len(seated) + foreign,
            free_s=sum(_left(lease, now) for lease in seated) + foreign * PRESUMED_S,
            ready_s=ready_s,
            warm=frozenset(machine.warm).union(lease.workflow for lease in machine.leases),
            usable=machine.stage is not Stage.DRAINING and not machine.draining,
        )

    def _foreign(self, machine: PooledMachine, now: float) -> int:
        """Return how many prompts of a user's own are in a server's queue, as far as anybody has looked (fault 69)."""
        return max((seat.foreign(now) for seat in self._at.get(machine, ())), default=0)

    def seat(self, job: QueuedJob, place: str | None = None) -> bool:
        """See `Chooser`."""
        key = place or next((choice.place for choice in self.choose([job])), None)
        machine = self._machine(key)
        if machine is None:
            return False
        facts = JobFacts(job.workflow_id, job.token, job.user, job.project)
        attach = job.phase is not Phase.NONE and job.place == machine.key
        try:
            self._take(machine, job.uid, facts, attach=attach)
        except MachineLost as error:
            log.info("seat_gone", extra={"fields": {"job": job.uid, "machine": machine.id, "error": error.message}})
            return False
        self._delayed.pop(job.id, None)
        return True

    def _take(self, machine: PooledMachine, job_id: JobId, facts: JobFacts, *, attach: bool) -> PoolSeat:
        server_type = machine.machine.server_type
        expected = self.experience.run_s(facts.workflow, server_type)
        if facts.workflow not in machine.warm:
            expected += self.experience.load_s(facts.workflow, server_type)
        lease = self._pool.lease(
            machine,
            job_id=job_id,
            attempt=facts.attempt,
            workflow=facts.workflow,
            user=facts.user,
            project=facts.project,
            expected_s=expected,
            attach=attach,
        )
        seat = PoolSeat(
            self._pool, lease, others=lambda: self._at.get(machine, ()), there=self._there, learn=self._learn
        )
        self._seats[job_id, facts.attempt] = seat
        self._at.setdefault(machine, []).append(seat)
        return seat

    def _forget_seat(self, seat: PoolSeat) -> None:
        if self._seats.pop((seat.lease.job_id, seat.lease.attempt), None) is not seat:
            return
        machine = seat.lease.machine
        self._at[machine].remove(seat)
        if not self._at[machine]:
            del self._at[machine]
            self._looked.pop(machine, None)

    def _there(self, machine: PooledMachine) -> bool:
        """Whether a machine belongs to the pool."""
        machines = self._pool.machines
        if machines is not self._listed or not isinstance(machines, tuple):
            self._listed, self._known = machines, frozenset(machines)
        return machine in self._known

    def release(self, job_id: JobId, attempt: int) -> None:
        """See `Chooser`."""
        seat = self._seats.get((job_id, attempt))
        if seat is not None:
            self._forget_seat(seat)
            self._pool.give_back(seat.lease, outcome="put-back")

    def reconsider(self, priorities: Mapping[JobId, int], unplaced: Sequence[QueuedJob]) -> Mapping[JobId, BackWhy]:
        """See `Chooser`."""
        if not self._may_move(priorities, unplaced):
            return {}
        now = asyncio.get_running_loop().time()
        waits = {
            job_id: seat
            for (job_id, _), seat in self._seats.items()
            if job_id in priorities and not seat.began and (seat.behind or seat.foreign(now))
        }
        numbered = dict(enumerate(waits))
        if not numbered:
            return {}
        seconds = []
        for number, job_id in numbered.items():
            lease = waits[job_id].lease
            begins = _begins(lease, now) + PRESUMED_S * waits[job_id].foreign(now)
            machine = lease.machine.key
            seconds.append(Second(RowId(number), priorities[job_id], lease.workflow, machine, begins))
        pending = [self._pending(row, now) for row in unplaced]
        back = take_back(seconds, pending, self._spots(now), self.experience, gain_s=GAIN_S)
        return {numbered[number]: why for number, why in back.items()}

    def _may_move(self, priorities: Mapping[JobId, int], unplaced: Sequence[QueuedJob]) -> bool:
        """Whether anything of what `take_back` asks for can be: with a thousand full machines it hardly ever is."""
        least = max(priorities.values(), default=None)
        if least is None or any(row.priority < least for row in unplaced):
            return least is not None
        depth = self._settings.depth
        if len(self._at) < len(self._pool.machines):
            return True
        return any(not m.takes_jobs or m.seated < depth or not self._there(m) for m in self._at)

    def _learn(self, lease: MachineLease) -> None:
        """Remember how long a prompt has computed. Only the length matters; the stamps are made up from it."""
        if lease.computing_at is None or lease.computed_at is None:
            return
        until = self._clock.now()
        since = until - timedelta(seconds=lease.computed_at - lease.computing_at)
        machine = lease.machine.machine
        self.experience.learn(
            Work(
                machine.id,
                lease.job_id,
                lease.attempt,
                lease.workflow,
                machine.server_type,
                began_at=min(lease.began_at, since),
                computing_at=since,
                computed_at=until,
                cold=lease.cold,
            )
        )

    # -- being there ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def at(
        self,
        *,
        job_id: JobId,
        show: Show,
        step: TimeStep,
        on_bill: TellBill,
        prefer: str | None = None,
        facts: JobFacts | None = None,
    ) -> AsyncIterator[Place]:
        """Be at the machine where the job has its seat; without one, at that of the key `prefer`, else at the best.

        Without `facts` somebody looks in at `prefer`: that takes no seat. Raises MachineLost, MachineFailed.
        """
        step("place")
        if facts is None:
            yield self._visited(prefer)
            return
        seat = self._seats.get((job_id, facts.attempt)) or self._seat_now(job_id, facts, prefer)
        lease, machine = seat.lease, seat.lease.machine
        if machine.server is None or seat.void:
            self.release(job_id, facts.attempt)
            raise seat.lost()
        show(Progress(Step.PLACING, message=f"on machine {machine.machine.server_id} of the pool"))
        here = Place(
            machine.server,
            POOL_MACHINE,
            alone=self._settings.depth == 1,
            key=machine.key,
            machine=machine.machine,
            share=lambda _: self._bill(lease),
            seat=seat,
            outlives=self._outlives(),
            attempt=facts.attempt,
        )
        error: BaseException | None = None
        try:
            async with self._while_there(seat):
                yield here
        except RunComfyError as caught:
            error = _explained(caught, seat)
            if error is caught:
                raise
            raise error from caught
        except BaseException as caught:
            error = caught
            raise
        finally:
            here.bill, here.share = self._bill(lease), None
            outcome = outcome_of(error, here.outcome)
            excused = outcome == "failed" and (seat.waited or isinstance(error, BudgetExceeded))
            self._leave(seat, "put-back" if excused else outcome, error)
            on_bill(here.bill)

    def _leave(self, seat: PoolSeat, outcome: str, error: BaseException | None) -> None:
        self._forget_seat(seat)
        failed = error if isinstance(error, RunComfyError) and outcome == "failed" else None
        if isinstance(error, MACHINE_FAILS):
            for other in [seat, *self._at.get(seat.lease.machine, ())]:
                other.spare()
        self._pool.give_back(seat.lease, outcome=outcome, error=failed)

    def _visited(self, key: str | None) -> Place:
        machine = self._machine(key)
        if machine is None or machine.server is None:
            raise ServerUnreachable("that machine of the pool is not there any more")
        return Place(machine.server, POOL_MACHINE, alone=False, key=machine.key, machine=machine.machine)

    def _seat_now(self, job_id: JobId, facts: JobFacts, prefer: str | None) -> PoolSeat:
        """Take a seat for a job that was claimed without one."""
        wanted = self._machine(prefer)
        if wanted is None:
            now = asyncio.get_running_loop().time()
            asked = Pending(RowId(0), 0, facts.workflow, delayed_s=self._settings.affinity_wait.total_seconds())
            placed = place([asked], self._spots(now, ()), self.experience, patience_s=0.0)
            wanted = self._machine(next((placement.machine for placement in placed.placements), None))
            if wanted is None:
                raise MachineLost("no machine of the pool has a seat free", hint="the job is tried again")
        return self._take(wanted, job_id, facts, attach=wanted.key == prefer)

    @asynccontextmanager
    async def _while_there(self, seat: PoolSeat) -> AsyncIterator[None]:
        """Let the block run as long as the seat is good; it is broken off, as MachineLost, when it is void."""
        task = asyncio.current_task()
        if task is None:
            raise RunComfyError("a machine is used outside of any task")
        cancelling, was_cut = task.cancelling(), False

        def cut() -> None:
            nonlocal was_cut
            if not was_cut:
                was_cut = True
                task.cancel()

        seat.cut = cut
        try:
            yield
        except asyncio.CancelledError:
            if was_cut and task.uncancel() <= cancelling:
                raise seat.lost() from None
            raise
        finally:
            seat.cut = None

    # -- small things --------------------------------------------------------------------------------------

    def _machine(self, key: str | None) -> PooledMachine | None:
        return next((machine for machine in self._pool.machines if machine.key == key and _answers(machine)), None)

    def _bill(self, lease: MachineLease) -> tuple[BillLine, ...]:
        """Return the job's share of the machine so far."""
        machine, amount = lease.machine.machine, self._pool.cost_share(lease)
        price = machine.usd_per_hour
        seconds = (amount * 3600 / price).quantize(Decimal("0.001")) if price else Decimal(0)
        return (BillLine(f"{machine.server_type} (this job's share of it)", seconds, price, amount),)


def _answers(machine: PooledMachine) -> bool:
    return machine.server is not None and machine.stage is not Stage.BOOTING and not machine.void


def _left(lease: MachineLease, now: float) -> float:
    """Return how much longer a prompt is expected to take; one that is late may take as long again as it is late."""
    if lease.computing_at is None:
        return lease.expected_s
    over = now - lease.computing_at - lease.expected_s
    return abs(over)


def _begins(lease: MachineLease, now: float) -> float:
    """Return in how many seconds a prompt's turn is expected."""
    ahead = 0.0
    for other in lease.machine.leases:
        if other is lease:
            break
        if other.computed_at is None:
            ahead += _left(other, now)
    return ahead


def _explained(error: RunComfyError, seat: PoolSeat) -> RunComfyError:
    """Return what really happened: a server that fell silent because its machine went away is a lost machine."""
    if isinstance(error, (MachineLost, BudgetExceeded)):
        return error
    if not isinstance(error, (ServerUnreachable, NotComfyUI, AnswerUnreadable)):
        return error
    if seat.void:
        return seat.lost()
    machine = seat.lease.machine.machine
    return MachineFailed(
        f"ComfyUI on machine {machine.server_id} of the pool does not answer: {error.message}",
        hint="nothing is to be done: the machine is replaced, the job runs on another one",
        details={"machine": machine.id, "cause": error.code},
    )
