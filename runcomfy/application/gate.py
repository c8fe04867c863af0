"""
Whether jobs may be begun here: pauses, of the whole queue and of this computer, as rows that everybody sees.

What every job needs and is missing (credentials, room on the disk) pauses the executors of this computer, so that no
job's retries are burnt; a server that is away pauses those that work on it, and no pool or other server beside it. When
the time of a pause is over the place is asked first, and then one job is tried: the gate is wide open again only when a
server has taken a prompt.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Final

from runcomfy.application.job_queue import host_scope
from runcomfy.domain import retry
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    LocalError,
    NotComfyUI,
    RunComfyError,
    ServerTooOld,
    ServerUnreachable,
)
from runcomfy.domain.lease import Owner
from runcomfy.domain.queued import QUEUE_SCOPE, Pause, QueueStatus
from runcomfy.ports.jobs import JobStore

READY_WITHIN: Final = timedelta(seconds=10)
"""How long a server may take to say that it is back."""
FOR_GOOD: Final = timedelta(days=1)
"""How long a pause that only a user ends is believed without asking."""
BUDGET_AGAIN: Final = timedelta(seconds=15)
"""How soon a budget is asked again at the earliest: its window turns by our clock, pauses by the database's."""
OF_A_SERVER: Final = (ServerUnreachable, NotComfyUI, ServerTooOld, AnswerUnreadable)
"""What is wrong with one server, and says nothing of another."""
CLOCKS_DIFFER: Final = timedelta(seconds=5)
"""A pause that begins farther ahead than this was written before the clock was set back."""


class Gate:
    """The pauses that hold for one executor."""

    def __init__(
        self,
        store: JobStore,
        owner: Owner,
        policy: retry.RetryPolicy,
        ready: Callable[[], Awaitable[None]],
        *,
        tell: Callable[[str], None],
        trouble: Callable[[LocalError | None], None],
        place: str = "",
    ) -> None:
        """`ready` raises what keeps jobs from running here. `place`: the key of the server, if all jobs go to one."""
        self._store, self._by, self._policy, self._ready = store, owner.id, policy, ready
        self._tell, self._trouble = tell, trouble
        self._host = host_scope(owner)
        self._here = f"{self._host} at {place.removeprefix('server:').partition('@')[0]}" if place else self._host
        self._scopes = (QUEUE_SCOPE, self._host, self._here)
        self.in_a_row = 0
        """How often this executor has paused since a server last took a prompt."""
        self.on_trial = False
        """Whether one job at a time is tried: a pause is over, and no server was reached since."""
        self._until: float | None = None
        self._told = ""

    async def standing(self) -> Pause | None:
        """Return what keeps jobs from being begun, if anything does; a pause whose time is over does not."""
        return await standing_pause(self._store, self._scopes)

    async def opens(self) -> bool:
        """Return whether a job may be begun. Ends pauses whose time is over, if a job could run now."""
        pauses = await self._pauses()
        if not pauses:
            self._told, self._until = "", None
            return True
        if (standing := await self.standing()) is not None:
            self._say(standing)
            return False
        self._until = None
        if not await self._could_run():
            return False
        for pause in pauses:
            await self._store.resume(scope=pause.scope, by=self._by)
        self._told, self.on_trial = "", True
        return True

    async def pause(self, decision: retry.Pause, error: RunComfyError) -> None:
        """Let nothing be begun for a while. Several runs may find out at once what is missing; it counts once."""
        loop = asyncio.get_running_loop()
        if self._until is not None and loop.time() < self._until:
            return
        retry_in = decision.retry_in
        if retry_in is None and decision.until is not None:
            retry_in = max(BUDGET_AGAIN, decision.until - self._store.now())
        self._until = loop.time() + (retry_in or FOR_GOOD).total_seconds()
        self.in_a_row += 1
        scope = self._here if isinstance(error, OF_A_SERVER) else self._host
        if decision.scope is retry.Scope.QUEUE:
            scope = QUEUE_SCOPE
        message = f"{error.message}; {error.hint}" if error.hint else error.message
        try:
            if any(pause.scope == scope and pause.until is None for pause in await self._pauses()):
                return  # somebody's pause is not to end by itself because of ours
            await self._store.pause(scope=scope, reason=error.code, message=message, retry_in=retry_in, by=self._by)
        except LocalError as refused:
            self._trouble(refused)

    def reached(self) -> None:
        """Hear that a server takes prompts."""
        self.in_a_row, self.on_trial = 0, False

    async def _pauses(self) -> Sequence[Pause]:
        return [pause for pause in await self._store.pauses() if pause.scope in self._scopes]

    async def _could_run(self) -> bool:
        """Whether a job that waits would find its place now; if not, the pause is prolonged without trying it."""
        if not await self._store.jobs(status=QueueStatus.PENDING, limit=1):
            return True  # nobody asks, and the first who does finds it out
        error: RunComfyError
        try:
            async with asyncio.timeout(READY_WITHIN.total_seconds()):
                await self._ready()
        except TimeoutError:
            error = ServerUnreachable("ComfyUI does not answer", hint="look whether it still runs")
        except RunComfyError as refused:
            error = refused
        else:
            return True
        decision = self._policy.decide(
            error,
            submitted=False,
            server_stays=True,
            retries_attempted=0,
            retry_limit=None,
            kill_count=0,
            pauses=self.in_a_row,
            draw=random.uniform,
        )
        if not isinstance(decision, retry.Pause):
            return True  # not a fault of the place
        await self.pause(decision, error)
        return False

    def _say(self, pause: Pause) -> None:
        words = f"{pause.scope} {pause.reason} {pause.message}"
        if words != self._told:
            self._told = words
            again = f"; tried again at {pause.until:%Y-%m-%d %H:%M:%S} UTC" if pause.until is not None else ""
            self._tell(f"paused: {pause.message}{again}")


async def standing_pause(store: JobStore, scopes: Collection[str]) -> Pause | None:
    """Return what keeps jobs from being begun in these scopes, if anything does. Raises LocalError."""
    pauses, now = await store.pauses(), store.now()
    return next((pause for pause in pauses if pause.scope in scopes and _stands(pause, now)), None)


def _stands(pause: Pause, now: datetime) -> bool:
    if pause.until is None:
        return True
    return now < pause.until and pause.since <= now + CLOCKS_DIFFER  # else its end would be a day away, too
