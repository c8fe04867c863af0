"""
The machines of one account that work off one queue: rented, watched, paid ahead, shared, replaced, ended.

The pool does what it is told (`launch`, `want`, `drain`: the plan's words; `lease`: dispatch's) and what cannot wait
for a plan: an ill machine takes no further jobs, one that is gone voids the leases on it, one that nobody pays for is
not renewed. Which machines there should be is the plan's business, which job goes where the dispatch's.

What happens to a machine is in `pool_members`, what the provider's list says in `pool_watch`, how machines are paid
ahead in `pool_renewal`. Two loops look after all machines; one that waits for work costs nothing but its record.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from runcomfy.application.finish import finish
from runcomfy.application.machines import Machines
from runcomfy.application.own_machine import ComfyFactory
from runcomfy.application.pool_members import Member, Members
from runcomfy.application.pool_renewal import Renewal
from runcomfy.application.pool_watch import PROOF_AFTER_A_JOB, Watch
from runcomfy.application.pool_works import Works
from runcomfy.application.pooled import MachineLease, PooledMachine
from runcomfy.application.station import KEPT
from runcomfy.domain.exceptions import (
    LeaseLost,
    MachineLost,
    NoCapacity,
    RunComfyError,
    StopUnconfirmed,
)
from runcomfy.domain.health import Harm, harm_of
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId, MachineState, OwnerId, Purpose
from runcomfy.domain.money import cost_of, meter
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.work import Work

log = logging.getLogger("runcomfy.pool")

USUAL_BOOT: Final = timedelta(seconds=180)
"""What a start takes where nothing is known of the type: the median that users of RunComfy report."""
TAKEN_OVER_FOR: Final = timedelta(seconds=60)
"""How long a machine that was taken over waits for those who look for their prompts there."""
ALIVE: Final = (MachineState.BOOTING, MachineState.READY, MachineState.LOST)


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One machine of the pool as people see it."""

    id: MachineId
    server_id: str
    server_type: str
    stage: Stage
    doing: str
    """In words: `starting`, `computing`, `idle`, `checking`, `draining`, `ending`."""
    jobs: tuple[JobId, ...]
    usd_per_hour: Decimal
    spent_usd: Decimal
    stops_at: datetime | None
    """When it stops by itself, as far as the provider has confirmed."""
    why: str
    """Why it was launched."""
    draining: str
    suspect: str
    warm: tuple[str, ...]
    ready_at: datetime | None
    idle_s: float | None


class MachinePool:
    """Keeps `Pool`. Make it inside the running loop; `adopt` first, then `run` beside the rest, `close` at the end."""

    def __init__(
        self,
        machines: Machines,
        comfyui: ComfyFactory,
        *,
        in_charge: Callable[[], bool] = lambda: True,
    ) -> None:
        """`comfyui` makes a client of a machine's ComfyUI. `in_charge`: whether this process may plan for the account
        now; while it may not, nothing is launched and nothing renewed.
        """
        self._machines, self._books = machines, machines.books
        self._settings, self._clock = machines.settings, machines.clock
        self._in_charge = in_charge
        self._members = Members(machines, comfyui)
        self._watch = Watch(self._members)
        self._renewal = Renewal(self._members, in_charge=in_charge)
        self._works = Works(machines.store)
        self._unpriced: dict[str, str] = {}
        """By type: why it may not be launched whatever else; empty if it may."""
        self._launches: set[asyncio.Task[MachineId]] = set()

    async def run(self) -> None:
        """Look after the machines until cancelled. They stay as they are then: `close` ends them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch.run(), name="pool-watch")
            group.create_task(self._renewal.run(), name="pool-renewal")

    # -- what there is -------------------------------------------------------------------------------------

    @property
    def machines(self) -> Sequence[PooledMachine]:
        """See the protocol."""
        return self._members.pooled

    def on_change(self, listener: Callable[[], None]) -> None:
        """See the protocol."""
        self._members.on_change(listener)

    def rows(self) -> list[PoolRow]:
        """Return the machines as people see them, oldest first."""
        return [self._row(member) for member in self._members]

    def _row(self, member: Member) -> PoolRow:
        pooled, machine, now = member.pooled, member.machine, asyncio.get_running_loop().time()
        left = member.left(now)
        return PoolRow(
            id=machine.id,
            server_id=machine.server_id or "",
            server_type=machine.server_type,
            stage=pooled.stage,
            doing=_doing(member),
            jobs=tuple(lease.job_id for lease in pooled.leases),
            usd_per_hour=machine.usd_per_hour,
            spent_usd=cost_of(machine, now=self._clock.now()),
            stops_at=None if left is None else self._clock.now() + timedelta(seconds=left),
            why=machine.reason,
            draining=pooled.draining,
            suspect=pooled.suspect,
            warm=tuple(sorted(pooled.warm)),
            ready_at=machine.ready_at,
            idle_s=None if pooled.idle_since is None else now - pooled.idle_since,
        )

    # -- leases --------------------------------------------------------------------------------------------

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
        """See the protocol."""
        member = self._members.get(pooled.id)
        if member is None or member.pooled is not pooled or not member.usable or member.ended:
            raise MachineLost(
                f"machine {pooled.machine.server_id} is not there for jobs", hint="the job goes elsewhere"
            )
        if not attach and not pooled.takes_jobs:
            why = pooled.draining or pooled.suspect
            raise MachineLost(f"machine {pooled.machine.server_id} takes no jobs: {why}", hint="the job goes elsewhere")
        if not attach and pooled.seated >= self._settings.pool.depth:
            raise MachineLost(f"machine {pooled.machine.server_id} has no seat free", hint="the job goes elsewhere")
        _count(pooled)
        lease = MachineLease(
            machine=pooled,
            job_id=job_id,
            attempt=attempt,
            workflow=workflow,
            user=user,
            project=project,
            token=pooled.epoch,
            began_at=self._clock.now(),
            expected_s=expected_s,
            cold=workflow not in pooled.warm,
            shared_from=pooled.shared_s,
        )
        pooled.leases.append(lease)
        pooled.idle_since = None
        pooled.last_used = _now()
        member.client_used = True
        lease.work = Work(
            machine_id=pooled.id,
            job_id=job_id,
            attempt=attempt,
            workflow=workflow,
            server_type=pooled.machine.server_type,
            began_at=lease.began_at,
            user=user,
            project=project,
            cold=lease.cold,
        )
        self._works.put(lease.work)
        self._changed(pooled)
        return lease

    def computing(self, lease: MachineLease, *, ago_s: float = 0.0) -> None:
        """See the protocol."""
        if lease.computing_at is None and not lease.given_back:
            lease.computing_at = _now() - ago_s
            # Said when the seat was taken, it may have changed while the job waited its turn behind another.
            lease.cold = lease.workflow not in lease.machine.warm
            since = max(lease.began_at, self._clock.now() - timedelta(seconds=ago_s))
            self._note(lease, computing_at=since, cold=lease.cold)
            self._changed(lease.machine)

    def computed(self, lease: MachineLease) -> None:
        """See the protocol."""
        if lease.computed_at is None and not lease.given_back:
            lease.computed_at = lease.machine.last_used = _now()
            if lease.computing_at is not None:
                self._note(lease, computed_at=self._clock.now())
                if not lease.void:
                    lease.machine.warm.add(lease.workflow)
            self._changed(lease.machine)

    def give_back(self, lease: MachineLease, *, outcome: str, error: RunComfyError | None = None) -> None:
        """See the protocol."""
        if lease.given_back:
            return
        pooled, now = lease.machine, _now()
        _count(pooled)
        lease.given_back, lease.shared_until = True, pooled.shared_s
        pooled.leases.remove(lease)
        pooled.last_used = now
        self._note(lease, ended_at=self._clock.now(), outcome=outcome)
        member = self._members.get(pooled.id)
        if member is not None and member.pooled is pooled:
            if lease.prompt_id is not None:
                member.prompts.append(lease.prompt_id)
            if not pooled.leases and member.usable:
                pooled.idle_since = now
            if not lease.void:
                self._judge(member, lease, outcome, error)
            self._members.end_if_unused(member)
            self._renewal.end_what_is_over([member])
        self._changed(pooled)

    def _changed(self, pooled: PooledMachine) -> None:
        """Tell of a change to a lease; where the machine is gone, that is told."""
        if (member := self._members.get(pooled.id)) is not None and member.pooled is pooled:
            self._members.changed(member)

    def _judge(self, member: Member, lease: MachineLease, outcome: str, error: RunComfyError | None) -> None:
        """Count what the end of a job says about its machine."""
        kind, rules, now = member.machine.server_type, self._members.health.rules, _now()
        if error is None:
            if outcome == "done":
                self._went_well(member, lease)
        elif (harm := harm_of(error)) is Harm.SILENT:
            self._watch.doubt(member, error.message, within=PROOF_AFTER_A_JOB)
        elif harm is not Harm.NOTHING:
            member.health = member.health.harmed(harm, error.message, now)
        if illness := member.health.illness(now, rules):
            log.info("machine_judged", extra={"fields": {"machine": member.machine.id, "type": kind, "why": illness}})
            self._members.ill(member, illness, dead=bool(member.health.dead))

    def _went_well(self, member: Member, lease: MachineLease) -> None:
        kind, workflow, health = member.machine.server_type, lease.workflow, self._members.health
        health.worked(kind)
        if lease.cold or lease.computing_at is None or lease.computed_at is None:
            member.health = replace(member.health, gpu_failures=0)
            return
        seconds = lease.computed_at - lease.computing_at
        usual = health.usual(workflow, kind, member.machine.id)
        health.observed(workflow, kind, member.machine.id, seconds)
        member.health = member.health.worked(workflow, seconds, usual, health.rules)

    def _note(self, lease: MachineLease, **changes: datetime | str | bool) -> None:
        if lease.work is not None:
            lease.work = replace(lease.work, **changes)  # type: ignore[arg-type]
            self._works.put(lease.work)

    def cost_share(self, lease: MachineLease) -> Decimal:
        """See the protocol."""
        pooled = lease.machine
        if lease.shared_until is None:
            _count(pooled)
        until = pooled.shared_s if lease.shared_until is None else lease.shared_until
        began = lease.began_at
        return meter(began, began + timedelta(seconds=until - lease.shared_from), pooled.machine.usd_per_hour)

    # -- the plan's words ----------------------------------------------------------------------------------

    async def launch(
        self, server_type: str, *, why: str, hold_s: float = 0.0, for_user: str = "", for_project: str = ""
    ) -> MachineId:
        """See the protocol."""
        self._ours()
        intent = self._books.intent(
            purpose=Purpose.POOL,
            server_type=server_type,
            duration=self._renewal.lease(len(self._members) + 1),
            reason=why,
            for_user=for_user,
            for_project=for_project,
        )
        if reason := self.why_no_room(server_type):
            raise NoCapacity(reason, hint="look at `comfyctl machines ls` and at the settings of the pool")
        now = _now()
        pooled = PooledMachine(intent, launched_at=now, expected_ready_at=now + USUAL_BOOT.total_seconds())
        member = self._members.add(Member(pooled, intent=intent, hold_s=hold_s, down_since=now))
        self._members.health.launch_began(server_type)
        task: asyncio.Task[MachineId] = asyncio.create_task(self._launch(member, intent), name=f"launch {intent.id}")
        self._launches.add(task)
        task.add_done_callback(self._launches.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise NoCapacity("the pool is being closed: nothing is launched any more") from None
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # whoever waited for it has gone
            raise

    async def _launch(self, member: Member, intent: Machine) -> MachineId:
        health, kind = self._members.health, intent.server_type
        machine: Machine | None = None
        try:
            expected = await self._machines.expected_boot(kind)
            if expected is not None:
                member.pooled.expected_ready_at = member.pooled.launched_at + expected.total_seconds()
            async with self._machines.launch_lock():
                self._ours()
                self._members.sent(member)
                machine = await self._machines.launch(intent)
        except BaseException as error:
            health.launch_failed(kind, error if isinstance(error, RunComfyError) else None)
            if machine is not None:  # broken off while the lock was freed: the launch itself has ended nothing
                self._members.answered(member, machine)
            if machine is not None or isinstance(error, StopUnconfirmed):
                self._members.end(member, "its launch was broken off")  # it may bill: that is tried until it is gone
            else:
                self._members.remove(member)
            raise
        health.launched()
        self._members.answered(member, machine)
        # The watch may be resting for as long as nothing starts; from here on something does.
        asyncio.get_running_loop().call_later(
            self._settings.cloud.poll_interval.total_seconds(), self._members.look_now.set
        )
        if member.pooled.draining:  # said while it was under way
            self._members.end(member, member.pooled.draining)
        return machine.id

    def _ours(self) -> None:
        """Raise if this process may not launch."""
        if not self._in_charge():
            raise LeaseLost("another process keeps the pool of this account now")

    def want(self, machine_id: MachineId, *, until: float) -> None:
        """See the protocol."""
        if (member := self._members.get(machine_id)) is not None:
            member.pooled.wanted_until = until

    def drain(self, machine_id: MachineId, *, why: str) -> None:
        """See the protocol."""
        if (member := self._members.get(machine_id)) is not None:
            self._members.drain(member, why)

    def room(self, server_type: str) -> int:
        """See the protocol."""
        return 0 if self._refusal(server_type) else self._room(server_type)

    def _room(self, server_type: str) -> int:
        free = self._settings.pool.max_machines - len(self._members)
        allowed = self._members.health.room(server_type)
        return max(0, free if allowed is None else min(free, allowed))

    def why_no_room(self, server_type: str) -> str:
        """See the protocol."""
        if refusal := self._refusal(server_type):
            return refusal
        if self._room(server_type) > 0:
            return ""
        if why := self._members.health.why_not(server_type):
            return why
        most = self._settings.pool.max_machines
        return f"{len(self._members)} machines are rented, at most {most} may be (those that start and end counted)"

    def pausing(self, server_type: str) -> bool:
        """See the protocol."""
        return not self._refusal(server_type) and self._members.health.pausing(server_type)

    def _refusal(self, server_type: str) -> str:
        """Return why a type may not be launched at all."""
        if self._members.closing.is_set():
            return "the pool is being closed"
        if server_type not in self._unpriced:  # settings do not change
            try:
                self._books.price(server_type)
            except RunComfyError as error:
                self._unpriced[server_type] = error.message
            else:
                self._unpriced[server_type] = ""
        return self._unpriced[server_type]

    # -- beginning and end ---------------------------------------------------------------------------------

    async def adopt(self) -> list[MachineId]:
        """Take over the machines of other keepers of the pool, and of executors that are gone; return their ids.

        Before anything is reaped: prompts may still run there. Raises LocalError.
        """
        self._ours()
        rows = [row for row in await self._books.rows() if takes_over(row) and self._members.get(row.id) is None]
        owners = await self._machines.store.owners([row.owner_id for row in rows if row.owner_id is not None])
        now = self._clock.now()
        adopted = []
        for row in rows:
            owner = owners.get(row.owner_id) if row.owner_id is not None else None
            lives = owner is not None and self._machines.processes.lives(owner, now=now)
            if row.purpose is not Purpose.POOL and lives:
                continue
            # Who keeps the pool has every machine of it, also those of a process that lives and slept through its time:
            # what that one still writes is refused by the machine's epoch.
            fate = "does not keep the pool any more" if lives else "is gone"
            taken = row
            if row.owner_id == self._me:  # of an earlier term of this process
                if await self._books.write_end(row):  # it was seen gone while nothing could be written
                    continue
                self._books.hold(row)
            elif (found := await self._books.try_take_over(row, note=f"taken over: its process {fate}")) is not None:
                taken = found
            else:
                continue
            if self._members.get(row.id) is not None:  # a launch of ours has gone on with it meanwhile
                continue
            self._members.add(self._adopted(taken))
            self._books.tell(f"went on with {row.server_type} machine {row.server_id}, whose process {fate}")
            adopted.append(taken.id)
        self._members.look_now.set()
        return adopted

    @property
    def _me(self) -> OwnerId:
        return self._books.owner.id

    def _adopted(self, row: Machine) -> Member:
        now, clock = _now(), self._clock.now()
        age = max(0.0, (clock - row.requested_at).total_seconds())
        pooled = PooledMachine(row, launched_at=now - age, expected_ready_at=now, draining=row.draining)
        patience = TAKEN_OVER_FOR.total_seconds()
        member = Member(pooled, hold_s=patience, attach_s=patience, seen=row.ready_at is not None)
        member.down_since = pooled.launched_at if row.ready_at is None else now
        if row.ready_at is not None:
            member.billed_since = now - max(0.0, (clock - row.ready_at).total_seconds())
            member.confirmed_s = row.duration.total_seconds()
        return member

    async def close(self, *, keep: bool = False) -> None:
        """End every machine, several at once; with `keep` leave them to whoever takes them over, or to their leases.

        Raises StopUnconfirmed if a machine may still bill; every other one is ended first.
        """
        await finish(self._close(keep=keep))

    async def _close(self, *, keep: bool) -> None:
        self._members.closing.set()
        for task in list(self._launches):
            task.cancel()
        if self._launches:
            await asyncio.wait(set(self._launches))
        members = list(self._members)
        if keep:
            for member in members:
                self._leave(member)
        else:
            for member in members:
                self._members.end(member, "the pool ends")
        ends = {member.ending for member in members if member.ending is not None}
        if ends:
            await asyncio.wait(ends)
        await self._works.close()
        await self._members.quiet()
        for member in members:
            if member.stop_error is not None:
                raise member.stop_error

    def _leave(self, member: Member) -> None:
        if not member.ended:
            self._members.remove(member)
            self._books.forget(member.machine)


def takes_over(row: Machine) -> bool:
    """Whether a pool goes on with a machine whose process is gone: to be spared when the rest is reaped."""
    executors = row.purpose is Purpose.RUN and row.reason.startswith(KEPT)
    return row.server_id is not None and row.state in ALIVE and (row.purpose is Purpose.POOL or executors)


def _count(pooled: PooledMachine) -> None:
    """Divide the time that has passed among the jobs that were there."""
    now = _now()
    if pooled.leases:
        pooled.shared_s += (now - pooled.counted_at) / len(pooled.leases)
    pooled.counted_at = now


def _doing(member: Member) -> str:
    pooled = member.pooled
    if member.ended:
        return "ending"
    if pooled.draining:
        return "draining"
    if not member.usable:
        return "starting" if member.billed_since is None else "checking"
    if pooled.suspect:
        return "doubted"
    return "idle" if not pooled.leases else "computing"


def _now() -> float:
    return asyncio.get_running_loop().time()
