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
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from decimal import Decimal
from typing import Final

from runcomfy.application.dispatch import Choice
from runcomfy.application.placing import POOL_MACHINE, JobFacts, Place, Show, TellBill, TimeStep
from runcomfy.application.pooled import MachineLease, Pool, PooledMachine
from runcomfy.application.seat import Seat
from runcomfy.application.work_book import outcome_of
from runcomfy.domain.estimate import History
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
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

PRESUMED_S: Final = 30.0
"""How long a job is taken to compute of which nothing at all is known."""
LATE_S: Final = 15.0
"""How much longer a machine that is late is expected to start at least; it grows with the delay."""
GAIN_S: Final = 2.0
"""A job is moved to an idle machine only if that begins it so much earlier: taking it back and sending it again is six
requests."""
LINE_UP_S: Final = 3.0
"""How long a machine may have nothing to compute because one that comes first is still being prepared."""
MACHINE_FAILS: Final = (MachineLost, MachineFailed, ServerRestarted, WorkerDead)
"""After these the prompts of everybody on the machine are in doubt."""
REMEMBERED: Final = 400
"""Finished runs that are looked at for how long the next one takes."""


class Experience:
    """What is expected of workflows, from runs that were seen; keeps `domain.placement.Foresight`."""

    def __init__(self, works: Iterable[Work] = ()) -> None:
        """`works`: runs of earlier days, oldest first."""
        self._works: deque[Work] = deque(works, maxlen=REMEMBERED)
        self._history: History | None = None
        self._runs: dict[tuple[str, str], float] = {}
        self._loads: dict[tuple[str, str], float] = {}

    def learn(self, work: Work) -> None:
        """Take a run that has ended."""
        self._works.append(work)
        self._history = None
        self._runs.clear()
        self._loads.clear()

    def run_s(self, workflow: str, server_type: str) -> float:
        """See `Foresight`."""
        key = workflow, server_type
        if key not in self._runs:
            prediction = self._known().predict(workflow, server_type)
            self._runs[key] = prediction.p50_s if prediction is not None else PRESUMED_S
        return self._runs[key]

    def load_s(self, workflow: str, server_type: str) -> float:
        """See `Foresight`."""
        key = workflow, server_type
        if key not in self._loads:
            known = self._known()
            extra = known.cold_extra_s(server_type, workflow)
            self._loads[key] = (known.cold_extra_s(server_type) or 0.0) if extra is None else extra
        return self._loads[key]

    def _known(self) -> History:
        if self._history is None:
            self._history = History(self._works)
        return self._history


class PoolSeat(Seat):
    """A seat that was taken at a machine of the pool."""

    def __init__(
        self,
        pool: Pool,
        lease: MachineLease,
        *,
        others: Callable[[], Iterable[PoolSeat]],
        learn: Callable[[MachineLease], None],
    ) -> None:
        """`others`: every seat of this station. `learn` hears of a prompt that has ended."""
        self.lease = lease
        self.sent = False
        self._pool, self._others, self._learn = pool, others, learn
        self._moved = asyncio.Event()
        self._at_turn: list[Callable[[], None]] = []
        self.cut: Callable[[], None] | None = None
        """Breaks off what its job does; None while there is nothing to break off."""
        self._had_turn = self._spared = False

    async def line_up(self) -> None:
        """See `Seat`: prompts run in the order in which they are sent, and priority is to decide on that.

        A machine that has nothing to compute does not wait for long for somebody's uploads.
        """
        loop = asyncio.get_running_loop()
        idle_since = loop.time()
        while any(not seat.sent for seat in self._ahead()):
            now = loop.time()
            if any(lease.computing_at is not None and lease.computed_at is None for lease in self.lease.machine.leases):
                idle_since = now
            left = idle_since + LINE_UP_S - now
            if left <= 0:
                return
            self._moved.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._moved.wait()

    def _ahead(self) -> list[PoolSeat]:
        """Return the seats of those that came before and have not ended."""
        seats = {id(seat.lease): seat for seat in self._others()}
        ahead = []
        for lease in self.lease.machine.leases:
            if lease is self.lease:
                break
            if lease.computed_at is None and (seat := seats.get(id(lease))) is not None:
                ahead.append(seat)
        return ahead

    def submitted(self) -> None:
        """See `Seat`."""
        self.sent = True
        for seat in self._others():
            seat._moved.set()

    def computing(self) -> None:
        """See `Seat`."""
        if self.lease.computing_at is None and self.lease.computed_at is None:
            self._pool.computing(self.lease)
            self.look()

    def computed(self, seconds: float | None = None) -> None:
        """See `Seat`."""
        if self.lease.computed_at is not None:
            return
        if seconds is not None:
            self.computing()
        self._pool.computed(self.lease)
        if self.lease.computing_at is not None:
            self._learn(self.lease)

    @property
    def began(self) -> bool:
        """Whether its prompt was seen to compute, or to have ended."""
        return self.lease.computing_at is not None or self.lease.computed_at is not None

    @property
    def behind(self) -> bool:
        """See `Seat`: somebody else computes there, or came before and has not ended yet."""
        if self.began:
            return False
        came_before = True
        for other in self.lease.machine.leases:
            if other is self.lease:
                came_before = False
            elif other.computed_at is None and (came_before or other.computing_at is not None):
                return True
        return False

    @property
    def waited(self) -> bool:
        """See `Seat`."""
        return self._spared and not self.began

    def spare(self) -> None:
        """Hear that the machine fails: if the job's turn has not come it was not its doing."""
        self._spared = self._spared or not self._had_turn

    @property
    def server_gone(self) -> bool:
        """See `Seat`."""
        machine = self.lease.machine
        return machine.server is None or all(known is not machine for known in self._pool.machines)

    @property
    def server_stays(self) -> bool:
        """See `Seat`."""
        machine = self.lease.machine
        return machine.stage is not Stage.DRAINING and not machine.draining and not self.server_gone

    @property
    def void(self) -> bool:
        """Whether the machine went away, or was not Ready in between."""
        return self.lease.void or self.lease.given_back or self.server_gone

    def at_turn(self, listener: Callable[[], None]) -> None:
        """See `Seat`."""
        self._at_turn.append(listener)
        self.look()

    def look(self) -> None:
        """Tell those who wait for its turn, if that has come."""
        self._moved.set()
        self._had_turn = self._had_turn or not self.behind
        if self._at_turn and self._had_turn:
            listeners, self._at_turn = self._at_turn, []
            for listener in listeners:
                listener()

    def lost(self) -> MachineLost:
        """Return the error of a job whose seat is void."""
        machine = self.lease.machine
        why = "it went away" if self.server_gone or not self.lease.void else "it was not Ready for a while"
        return MachineLost(
            f"machine {machine.machine.server_id} of the pool was lost during the job: {why}",
            hint="nothing is to be done: the job runs on another machine; `comfyctl machines ls` shows them",
            details={"machine": machine.id, "server_id": machine.machine.server_id},
        )


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
        self._seats: dict[JobId, PoolSeat] = {}
        self._delayed: dict[RowId, float] = {}
        """Since when (loop) others have passed a job, or it was held for a machine that starts."""
        self._listeners: list[Callable[[], None]] = []
        pool.on_change(self._changed)

    # -- what there is -------------------------------------------------------------------------------------

    def on_change(self, listener: Callable[[], None]) -> None:
        """See `Chooser`."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for seat in list(self._seats.values()):
            if not seat.void:
                seat.look()
                continue
            seat.spare()
            if seat.cut is not None:
                seat.cut()
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
        placed = place(
            [self._pending(row, now) for row in waiting],
            self._spots(now),
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

    def _spots(self, now: float) -> list[Spot]:
        return [self._spot(machine, now) for machine in self._pool.machines]

    def _spot(self, machine: PooledMachine, now: float) -> Spot:
        seated = [lease for lease in machine.leases if lease.computed_at is None]
        starts = machine.stage is Stage.BOOTING
        late = now - machine.expected_ready_at
        ready_s = (-late if late < 0 else max(LATE_S, late)) if starts else 0.0
        seats = self._settings.depth - len(seated) if machine.takes_jobs or starts else 0
        return Spot(
            id=machine.key,
            server_type=machine.machine.server_type,
            usd_per_hour=float(machine.machine.usd_per_hour),
            seats=max(0, seats),
            taken=len(seated),
            free_s=sum(_left(lease, now) for lease in seated),
            ready_s=ready_s,
            warm=frozenset(machine.warm).union(lease.workflow for lease in seated),
            usable=machine.stage is not Stage.DRAINING and not machine.draining,
        )

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
        seat = self._seats[job_id] = PoolSeat(self._pool, lease, others=self._seats.values, learn=self._learn)
        return seat

    def release(self, job_id: JobId) -> None:
        """See `Chooser`."""
        seat = self._seats.pop(job_id, None)
        if seat is not None:
            self._pool.give_back(seat.lease, outcome="put-back")

    def reconsider(self, priorities: Mapping[JobId, int], unplaced: Sequence[QueuedJob]) -> Mapping[JobId, BackWhy]:
        """See `Chooser`."""
        now = asyncio.get_running_loop().time()
        numbered = dict(
            enumerate(job_id for job_id, seat in self._seats.items() if job_id in priorities and seat.behind)
        )
        if not numbered:
            return {}
        seconds = []
        for number, job_id in numbered.items():
            lease = self._seats[job_id].lease
            begins = _begins(lease, now)
            machine = lease.machine.key
            seconds.append(Second(RowId(number), priorities[job_id], lease.workflow, machine, begins))
        pending = [self._pending(row, now) for row in unplaced]
        back = take_back(seconds, pending, self._spots(now), self.experience, gain_s=GAIN_S)
        return {numbered[number]: why for number, why in back.items()}

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
        seat = self._seats.get(job_id) or self._seat_now(job_id, facts, prefer)
        lease, machine = seat.lease, seat.lease.machine
        if machine.server is None or seat.void:
            self.release(job_id)
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
            self._leave(job_id, seat, outcome_of(error, here.outcome), error)
            on_bill(here.bill)

    def _leave(self, job_id: JobId, seat: PoolSeat, outcome: str, error: BaseException | None) -> None:
        if self._seats.get(job_id) is seat:
            del self._seats[job_id]
        failed = error if isinstance(error, RunComfyError) and outcome == "failed" else None
        if isinstance(error, MACHINE_FAILS):
            for other in [seat, *self._seats.values()]:
                if other.lease.machine is seat.lease.machine:
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
            placed = place([asked], self._spots(now), self.experience, patience_s=0.0)
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
    return machine.server is not None and machine.stage is not Stage.BOOTING


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
    if isinstance(error, MachineLost):
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
