"""
The machines of a pool, one record each, and what can happen to a record: usable, void, drained, ended, gone.

Everything that changes a machine of the pool goes through here, so that it is written down, told to whoever listens,
and done once, whoever found out first: the list of the provider (`pool_watch`), the renewals (`pool_renewal`), a job
that failed, or the plan. A machine that only waits for work has no task and no connection of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from runcomfy.application.by_hand import ByHand, by_hand_words
from runcomfy.application.ending import Said
from runcomfy.application.finish import finish
from runcomfy.application.machines import Machines
from runcomfy.application.own_machine import ComfyFactory
from runcomfy.application.pool_health import PoolHealth
from runcomfy.application.pooled import PooledMachine
from runcomfy.domain.decision import Decision
from runcomfy.domain.durations import show_span
from runcomfy.domain.exceptions import LeaseLost, LocalError, RunComfyError
from runcomfy.domain.health import Health
from runcomfy.domain.job import PromptId
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, MachineState
from runcomfy.domain.money import cost_of, show_usd
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.pool")

PROMPTS_KEPT: Final = 500
STOP_AGAIN: Final = timedelta(minutes=1)
"""After how long a stop that the provider refused is tried again. `Ending` has its own patience before it gives up."""


@dataclass(eq=False, slots=True)
class Member:
    """A machine of the pool, and what only its keeper needs to know of it. Times are the loop's."""

    pooled: PooledMachine
    intent: Machine | None = None
    """What this process launched; None: it was taken over."""
    hold_s: float = 0.0
    """How long the plan leaves it alone once it is usable."""
    attach_s: float = 0.0
    """How long it is not ended once it is usable, so that those whose prompts run there can go on with them."""
    attach_until: float = 0.0
    health: Health = field(default_factory=Health)
    url: SecretUrl | None = None
    client: ComfyUI | None = None
    client_used: bool = False
    """Whether jobs ran over the client, so that it may hold a connection."""
    billed_since: float | None = None
    confirmed_s: float = 0.0
    """The running time that the provider has confirmed, counted from `billed_since`."""
    told_not_moved: bool = False
    """Whether the user was told that the provider does not prolong it."""
    asked: timedelta | None = None
    """A running time that was asked for and not read back yet."""
    asked_at: float = 0.0
    refused: str = ""
    """What a budget said to its last renewal."""
    seen: bool = False
    """Whether the provider has ever shown it."""
    starting_at: float | None = None
    """When it was last seen not to be ready yet."""
    usable: bool = False
    """Whether its ComfyUI has answered since it was Ready last."""
    was_usable: bool = False
    down_since: float = 0.0
    """Since when it is waited for: since its launch, since it is Ready, since it was not any more."""
    probed_at: float = 0.0
    gate: asyncio.Task[None] | None = None
    proof: asyncio.Task[None] | None = None
    ending: asyncio.Task[None] | None = None
    stop_error: RunComfyError | None = None
    prompts: deque[PromptId] = field(default_factory=lambda: deque(maxlen=PROMPTS_KEPT))
    """Prompts of jobs that were here last."""
    asking: asyncio.Task[None] | None = None
    """Finds out whether somebody's own prompt computes there."""
    by_hand: bool = False
    """Whether that was so when it was asked last: it has no job any more, and is in use all the same."""
    hand: ByHand = field(default_factory=ByHand)
    said: Said = field(default_factory=Said)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def machine(self) -> Machine:
        """Our books' row."""
        return self.pooled.machine

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.machine.server_type} machine {self.machine.server_id or '(not answered yet)'}"

    @property
    def ended(self) -> bool:
        """Whether its end has begun."""
        return self.ending is not None

    def left(self, now: float) -> float | None:
        """Return for how many more seconds it is paid by the provider's own word; None: it does not bill yet."""
        return None if self.billed_since is None else self.billed_since + self.confirmed_s - now


class Members:
    """All machines of one pool."""

    def __init__(self, machines: Machines, comfyui: ComfyFactory) -> None:
        self.machines, self.books, self.clock = machines, machines.books, machines.clock
        self.settings = machines.settings
        self.comfyui = comfyui
        self.health = PoolHealth(machines.store, machines.clock, machines.settings.pool, said=self.decided)
        self.closing = asyncio.Event()
        self.look_now = asyncio.Event()
        """Set to have the provider's list read at once."""
        self._all: dict[MachineId, Member] = {}
        self._pooled: tuple[PooledMachine, ...] | None = ()
        self._listeners: list[Callable[[], None]] = []
        self._telling = False
        self._background: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Member]:
        return iter(tuple(self._all.values()))

    def get(self, machine_id: MachineId) -> Member | None:
        """Return a machine of the pool."""
        return self._all.get(machine_id)

    @property
    def pooled(self) -> Sequence[PooledMachine]:
        """Every machine, oldest first."""
        if self._pooled is None:
            self._pooled = tuple(member.pooled for member in self._all.values())
        return self._pooled

    def add(self, member: Member) -> Member:
        """Take a machine in."""
        self._all[member.machine.id] = member
        self._pooled = None
        self.changed(member)
        return member

    def sent(self, member: Member) -> None:
        """Begin to count its start: until now it has waited for its turn, which of many launches takes half an hour."""
        now, pooled = _now(), member.pooled
        pooled.expected_ready_at += now - pooled.launched_at
        pooled.launched_at = member.down_since = now
        self.changed(member)

    def answered(self, member: Member, machine: Machine) -> None:
        """Remember what a launch became: repeated, it has another id than its intent."""
        self._all = {(machine.id if known is member else machine_id): known for machine_id, known in self._all.items()}
        member.pooled.machine = machine
        member.seen = member.seen or machine.ready_at is not None  # it was found in a list, and bills
        self._pooled = None
        self.changed(member)

    def remove(self, member: Member) -> None:
        """Let go of a machine."""
        if self._all.get(member.machine.id) is member:
            del self._all[member.machine.id]
            self.health.forget(member.machine.id)
            if not member.was_usable:
                self.health.start_unclear(member.machine.server_type)
            self.let_go(member)
            self._pooled = None
            self.changed(member)

    # -- telling -------------------------------------------------------------------------------------------

    def on_change(self, listener: Callable[[], None]) -> None:
        """See `Pool.on_change`."""
        self._listeners.append(listener)

    def changed(self, member: Member) -> None:
        """Tell the listeners, once, when the loop comes to it."""
        member.pooled.changes += 1
        if not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = False
        for listener in self._listeners:
            listener()

    def decided(self, action: str, what: str, why: str) -> None:
        """Write down a decision of the pool's own."""
        decision = Decision(at=self.clock.now(), action=action, what=what, why=why, by=self.books.owner.id)

        async def write() -> None:
            try:
                await self.machines.store.decide([decision])
            except LocalError as error:
                log.warning("decision_not_recorded", extra={"fields": {"error": error.code, "action": action}})

        self.spawn(write(), name="decision")

    def spawn(self, work: Coroutine[Any, Any, Any], *, name: str) -> asyncio.Task[Any]:
        """Do something in the background."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, RunComfyError):
            log.warning("pool_task_failed", extra={"fields": {"task": task.get_name(), "error": error.code}})
        elif error is not None:
            log.error("pool_defect", exc_info=error)

    async def quiet(self) -> None:
        """Wait until nothing is done in the background any more."""
        while self._background:
            await asyncio.wait(set(self._background))

    # -- the books -----------------------------------------------------------------------------------------

    async def write(self, member: Member, note: str, *, event: MachineEvent | None = None, **fields: Any) -> bool:
        """Write something down about a machine; return whether it is still ours. A full disk prevents nothing."""
        async with member.writing:
            try:
                if event is None:
                    after = await self.books.change_softly(member.machine, note=note, **fields)
                else:
                    after = await self.books.record_softly(member.machine, event, note=note, changes=fields)
            except LeaseLost:
                self.taken(member)
                return False
            member.pooled.machine = after
            return True

    def taken(self, member: Member) -> None:
        """Let go of a machine that somebody else looks after now."""
        if self._all.get(member.machine.id) is member:
            self.books.tell(f"{member.name} is looked after by another process now; left to it")
            self.void(member, "another process has it")
            self.remove(member)

    # -- what happens to a machine -------------------------------------------------------------------------

    def usable(self, member: Member, client: ComfyUI) -> None:
        """Let jobs go there: its ComfyUI answers."""
        now, pooled = _now(), member.pooled
        first, member.was_usable = not member.was_usable, True
        member.client, pooled.server = client, client
        member.usable, member.probed_at = True, now
        pooled.epoch += 1
        pooled.suspect, pooled.flapped, pooled.void = "", False, False
        pooled.warm.clear()
        pooled.stage = Stage.DRAINING if pooled.draining else Stage.READY
        pooled.expected_ready_at = now
        if first:
            pooled.hold_until = now + member.hold_s
            member.attach_until = now + member.attach_s
        pooled.idle_since = None if pooled.leases else now
        self.health.usable(member.machine.server_type)
        self.changed(member)

    def void(self, member: Member, why: str) -> None:
        """Make every lease void: what was on the machine cannot be relied on any more (fault 16)."""
        pooled = member.pooled
        member.usable = False
        left = member.left(_now())
        # Seen one or two lists late: the lease was over, and the machine did not die of a job.
        pooled.outran = left is not None and left <= 2 * self.settings.pool.status_every.total_seconds()
        pooled.epoch += 1
        pooled.void = True
        pooled.stage = Stage.DRAINING if pooled.draining else Stage.BOOTING
        pooled.idle_since = None
        pooled.warm.clear()
        if pooled.leases:
            log.warning(
                "pool_leases_void",
                extra={"fields": {"machine": member.machine.id, "jobs": len(pooled.leases), "why": why}},
            )
        self.changed(member)

    def suspect(self, member: Member, why: str) -> None:
        """Send nothing new there until it is known what is wrong; empty: nothing is."""
        if member.pooled.suspect != why:
            member.pooled.suspect = why
            self.changed(member)

    def drain(self, member: Member, why: str) -> None:
        """Let no further job go there, and end the machine when the last one has left. The first reason is kept."""
        pooled = member.pooled
        if not pooled.draining:
            pooled.draining = why
            if pooled.stage is Stage.READY:
                pooled.stage = Stage.DRAINING
            if member.machine.server_id is not None:
                self.spawn(self.write(member, f"drained: {why}", draining=why), name=f"drain {member.machine.id}")
            self.changed(member)
        self.end_if_unused(member)

    def end_if_unused(self, member: Member) -> None:
        """End a machine that drains and has no lease any more, when nothing runs there that was sent by hand."""
        pooled = member.pooled
        if member.attach_s and (not member.was_usable or _now() < member.attach_until):
            return
        if not pooled.draining or pooled.leases or member.machine.server_id is None:
            return
        if not member.usable or member.client is None:
            self.end(member, pooled.draining)
        elif not member.ended and (member.asking is None or member.asking.done()):
            member.asking = self.spawn(self._end_unless_used(member), name=f"ask {member.machine.id}")

    async def _end_unless_used(self, member: Member) -> None:
        """End it, unless a prompt computes or waits there that is none of ours: that is never interrupted (fault 69).

        It is asked again with the next list; meanwhile the machine is paid like one that has a job.
        """
        used = member.client is not None and await member.hand.used(member.client, ours=member.prompts)
        if used and member.said.due("by hand"):
            self.books.tell(by_hand_words(member.name, str(member.machine.server_id)))
        member.by_hand = used
        if not used and not member.pooled.leases:
            self.end(member, member.pooled.draining)

    def ill(self, member: Member, why: str, *, dead: bool) -> None:
        """Replace a machine: jobs there may finish, unless it is proven dead. The plan launches another one."""
        if member.ended:
            return
        if member.pooled.draining.startswith("ill"):
            if dead:  # said and counted already
                self.end(member, f"ill: {why}")
            return
        kind = member.machine.server_type
        self.books.tell(f"{member.name} is replaced: {why}")
        self.decided("replace", member.machine.id, why)
        log.warning("machine_ill", extra={"fields": {**self.books.facts(member.machine), "why": why}})
        self.start_failed(kind, why)
        if dead:
            self.end(member, f"ill: {why}")
        else:
            self.drain(member, f"ill: {why}")

    def start_failed(self, server_type: str, why: str) -> None:
        """Count a machine that did not become usable or turned out to be ill, and say how long none follows it."""
        self.health.start_failed(server_type, why)
        if seconds := round(self.health.waits_s(server_type)):
            self.books.tell(f"no other {server_type} machine is launched for {show_span(timedelta(seconds=seconds))}")

    def end(self, member: Member, reason: str) -> None:
        """End a machine, whatever runs there. Harmless when repeated."""
        pooled = member.pooled
        if member.ended:
            return
        pooled.draining = pooled.draining or reason
        self.void(member, reason)
        member.ending = self.spawn(self._end(member, reason), name=f"end {member.machine.id}")

    async def _end(self, member: Member, reason: str) -> None:
        for task in (member.gate, member.proof):
            if task is not None:
                task.cancel()
        while not await self._stopped(member, reason):
            if self.closing.is_set():
                break
            try:
                async with asyncio.timeout(STOP_AGAIN.total_seconds()):
                    await self.closing.wait()
            except TimeoutError:
                continue
        ended = member.machine
        if ended.state is MachineState.STOPPED:
            member.pooled.gone = True
            self.books.tell(f"{member.name} is ended; it cost {show_usd(cost_of(ended, now=self.clock.now()))}")
        self.remove(member)

    async def _stopped(self, member: Member, reason: str) -> bool:
        """Ask for the stop and look until the machine is gone; False if that is to be tried again."""
        try:
            ended = await self._stop(member, reason)
        except LeaseLost:
            return True
        except RunComfyError as error:
            if member.stop_error is None or member.stop_error.code != error.code:
                self.books.tell(f"{error.message}; {error.hint}")
            member.stop_error = error
            return False
        member.stop_error = None
        if ended is None:
            return True
        member.pooled.machine = ended
        return not ended.is_open or ended.owner_id != self.books.owner.id

    async def _stop(self, member: Member, reason: str) -> Machine | None:
        if member.intent is not None:
            ended = await finish(self.machines.settle(member.intent, reason=reason))
            if ended is not None or member.machine.server_id is None:
                return ended
            # Settled before, and not gone: the provider has said for long that it is at it.
        current = await self.books.latest(member.machine.id) or member.machine
        if current.owner_id != self.books.owner.id or not current.is_open:
            return current  # somebody else's to end by now (I7), or ended
        return await finish(self.machines.stop(current, reason=reason))

    def vanished(self, member: Member, note: str) -> None:
        """Let go of a machine that its status and two full lists say is gone. Harmless when repeated."""
        if member.ended:
            return
        facts = {**self.books.facts(member.machine), "jobs": len(member.pooled.leases)}
        log.warning("machine_vanished", extra={"fields": facts})
        member.pooled.gone = True
        member.pooled.draining = member.pooled.draining or "it is not there any more"
        self.void(member, note)
        member.ending = self.spawn(self._gone(member, note), name=f"gone {member.machine.id}")

    async def _gone(self, member: Member, note: str) -> None:
        """Close the books of a machine that is gone."""
        try:
            async with member.writing:
                member.pooled.machine = await finish(self.machines.seen_gone(member.machine, note=note))
            if member.intent is not None:
                await self.machines.settle(member.intent, reason=note)
        except LeaseLost:
            self.taken(member)
        finally:
            self.remove(member)

    # -- its ComfyUI ---------------------------------------------------------------------------------------

    def let_go(self, member: Member) -> None:
        """Close the client of a machine's ComfyUI."""
        for task in (member.gate, member.proof, member.asking):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        client, member.client = member.client, None
        member.pooled.server = None
        self.changed(member)
        if client is not None:
            self.spawn(client.close(), name="close a client")

    def rest(self, member: Member) -> None:
        """Let go of the connections to a machine that has nothing to do; they are made again when it has."""
        if member.client is None or member.url is None or member.pooled.leases or not member.client_used:
            return
        if member.asking is not None and not member.asking.done():
            return
        old, member.client_used = member.client, False
        member.client = member.pooled.server = self.comfyui(member.url)
        self.spawn(old.close(), name="close a client")


def _now() -> float:
    return asyncio.get_running_loop().time()
