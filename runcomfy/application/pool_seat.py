"""
A seat at a machine of the pool, and what is expected of the jobs that take one.

Prompts of one machine run in the order in which they are sent, so those who prepare a job side by side line up before
they send it. A seat knows whether its turn has come, whether somebody else's prompt (a user's own, in ComfyUI's page)
is in the way, and whether the machine was lost under it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from runcomfy.application.pooled import MachineLease, Pool, PooledMachine
from runcomfy.application.seat import Seat
from runcomfy.domain.estimate import History
from runcomfy.domain.exceptions import BudgetExceeded, MachineLost
from runcomfy.domain.job import PromptId
from runcomfy.domain.plan_view import Stage
from runcomfy.domain.progress import QueueView
from runcomfy.domain.work import Work

PRESUMED_S: Final = 30.0
"""How long a job is taken to compute of which nothing at all is known."""
LINE_UP_S: Final = 3.0
"""How long a machine may have nothing to compute because one that comes first is still being prepared."""
SEEN_S: Final = 30.0
"""For how long somebody else's prompt is believed to be there that was seen in a server's queue."""
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
        there: Callable[[PooledMachine], bool],
        learn: Callable[[MachineLease], None],
    ) -> None:
        """`others`: every seat at this machine. `there`: whether a machine belongs to the pool. `learn` hears of a
        prompt that has ended.
        """
        self.lease = lease
        self.sent: PromptId | None = None
        """Its prompt, once the server has it."""
        self._foreign: tuple[float, int] = float("-inf"), 0
        """When (loop) the server's queue was read last, and how many prompts of others were in it."""
        self._pool, self._others, self._there, self._learn = pool, others, there, learn
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
        while any(seat.sent is None for seat in self._ahead()):
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

    def submitted(self, prompt_id: PromptId) -> None:
        """See `Seat`."""
        self.sent = self.lease.prompt_id = prompt_id
        for seat in self._others():
            seat._moved.set()

    def computing(self) -> None:
        """See `Seat`."""
        self._compute(0.0)

    def _compute(self, ago_s: float) -> None:
        if self.lease.computing_at is None and self.lease.computed_at is None:
            self._pool.computing(self.lease, ago_s=ago_s)
            self.look()

    def computed(self, seconds: float | None = None) -> None:
        """See `Seat`."""
        if self.lease.computed_at is not None:
            return
        if seconds is not None:  # perhaps nobody has heard it begin
            self._compute(max(0.0, seconds))
        self._pool.computed(self.lease)
        if self.lease.computing_at is not None:
            self._learn(self.lease)

    def saw(self, queue: QueueView) -> None:
        """See `Seat`: what is there and not ours, a user has started by hand."""
        ours = {seat.sent for seat in self._others()}
        if None not in ours:
            foreign = sum(1 for prompt_id in (*queue.running, *queue.pending) if prompt_id not in ours)
            self._foreign = asyncio.get_running_loop().time(), foreign

    def foreign(self, now: float) -> int:
        """Return how many prompts of others were in the server's queue a moment ago."""
        at, count = self._foreign
        return count if now - at < SEEN_S else 0

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
    def unpaid(self) -> bool:
        """See `Seat`."""
        return bool(self.lease.machine.unpaid)

    @property
    def flapped(self) -> bool:
        """See `Seat`."""
        return self.lease.void and self.lease.machine.flapped

    @property
    def outran(self) -> bool:
        """See `Seat`."""
        return self.lease.machine.outran

    @property
    def server_gone(self) -> bool:
        """See `Seat`: one that is being ended, or has another keeper now, may still compute (I12)."""
        return self.lease.machine.gone

    @property
    def _left(self) -> bool:
        """Whether the machine is none of the pool's any more, or is being ended."""
        machine = self.lease.machine
        if machine.gone or machine.server is None or (self.lease.void and machine.draining):
            return True
        return not self._there(machine)

    @property
    def server_stays(self) -> bool:
        """See `Seat`."""
        machine = self.lease.machine
        return machine.stage is not Stage.DRAINING and not machine.draining and not self._left

    @property
    def void(self) -> bool:
        """Whether the machine went away, or was not Ready in between."""
        return self.lease.void or self.lease.given_back or self._left

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

    def lost(self) -> MachineLost | BudgetExceeded:
        """Return the error of a job whose seat is void."""
        machine = self.lease.machine
        if machine.unpaid:
            return BudgetExceeded(
                f"machine {machine.machine.server_id} was ended at the end of what was paid: {machine.unpaid}",
                hint="the job waits, at no cost to it, until the budgets allow a machine; or raise the budget",
                details={"machine": machine.id, "server_id": machine.machine.server_id},
            )
        why = "it went away" if self._left or not self.lease.void else "it was not Ready for a while"
        if self.outran:
            why = "it was ended at the end of its lease, which could not be prolonged"
        return MachineLost(
            f"machine {machine.machine.server_id} of the pool was lost during the job: {why}",
            hint="nothing is to be done: the job runs on another machine; `comfyctl machines ls` shows them",
            details={"machine": machine.id, "server_id": machine.machine.server_id},
        )
