"""
What the pool remembers of how machines and their types do: breakers per type and for the account, usual run times.

The rules are in `domain.health`; here is only the memory, and the history that the store keeps of run times. Nothing
here ends or launches anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median
from typing import Final

from runcomfy.domain.exceptions import LocalError, RunComfyError
from runcomfy.domain.health import (
    ENOUGH_RUNS,
    Blame,
    Breaker,
    BreakerRules,
    HealthRules,
    blame_of,
)
from runcomfy.domain.machine import MachineId
from runcomfy.domain.settings import PoolSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.pool")

HISTORY: Final = timedelta(days=14)
HISTORY_ROWS: Final = 2_000
HISTORY_EVERY: Final = 600.0
"""Seconds after which run times are read again: other processes add to them."""
RUNS_KEPT: Final = 200
"""Run times kept of a workflow on a type."""

Said = Callable[[str, str, str], None]
"""Takes a decision: what was done, to what, and why."""


@dataclass(slots=True)
class _Runs:
    """How long a workflow took on a type, without the runs that had to load models."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RUNS_KEPT))
    slow: dict[MachineId, bool] = field(default_factory=dict)
    """Whether the last run on a machine was slow."""


class PoolHealth:
    """The memory of one pool."""

    def __init__(self, store: Store, clock: Clock, settings: PoolSettings, *, said: Said) -> None:
        self._store, self._clock, self._said = store, clock, said
        self.rules = HealthRules(
            flip_limit=settings.flip_limit,
            flip_window_s=settings.flip_window.total_seconds(),
            slow_factor=settings.slow_factor,
        )
        rest = settings.breaker_rest.total_seconds()
        self.breaker_rules = BreakerRules(limit=settings.breaker_failures, rest_s=rest, rest_most_s=6 * rest)
        self._types: dict[str, Breaker] = {}
        self._account = Breaker()
        self._refused = ""
        self._runs: dict[tuple[str, str], _Runs] = {}
        self._read_at = float("-inf")

    # -- breakers ------------------------------------------------------------------------------------------

    def room(self, server_type: str) -> int | None:
        """Return how many launches of a type the breakers allow; None: as many as one likes."""
        now = _now()
        if self._refused:
            return 0
        rooms = [room for b in (self._account, self._of(server_type)) if (room := b.room(now)) is not None]
        return min(rooms, default=None)

    def why_not(self, server_type: str) -> str:
        """Return why the breakers allow none, for people; empty if they do."""
        now = _now()
        if self._refused:
            return f"nothing is launched: {self._refused}"
        if why := self._account.why_not(now):
            return f"nothing is launched: {why}"
        why = self._of(server_type).why_not(now)
        return f"{server_type} is not launched: {why}" if why else ""

    def pausing(self, server_type: str) -> bool:
        """Return whether a type is not launched only for a moment, after a failure that does not count for much yet."""
        now = _now()
        return not self._refused and self._account.room(now) != 0 and self._of(server_type).pausing(now)

    def waits_s(self, server_type: str) -> float:
        """Return for how many seconds no machine of a type is launched, for what happened to those before."""
        now = _now()
        return max(0.0, *((b.closed_until or now) - now for b in (self._account, self._of(server_type))))

    def launch_began(self, server_type: str) -> None:
        """Count a launch that is sent now."""
        now = _now()
        self._account = self._account.began(now)
        self._set(server_type, self._of(server_type).began(now))

    def launched(self) -> None:
        """Count a launch that the provider has answered with a machine: the account is in order."""
        self._account = self._account.usable(self.breaker_rules).worked()

    def launch_failed(self, server_type: str, error: RunComfyError | None) -> None:
        """Count a launch that started nothing; `error` None: it was broken off."""
        blame, now, rules = blame_of(error) if error is not None else Blame.NOBODY, _now(), self.breaker_rules
        why = error.message if error is not None else ""
        before = self._of(server_type)
        match blame:
            case Blame.ACCOUNT | Blame.BUSY:
                rest = rules.rest_s if blame is Blame.ACCOUNT else rules.busy_rest_s
                self._set(server_type, before.released())
                self._set_account(self._account.failed(now, why, rules, rest_s=rest))
                return
            case Blame.STOCK:
                self._fail(server_type, why, rest_s=rules.stock_rest_s)
            case Blame.REFUSED:
                self._fail(server_type, why, rest_s=rules.rest_s)
            case Blame.TYPE:
                self._fail(server_type, why)
            case Blame.NOBODY:
                self._set(server_type, before.released())
        self._account = self._account.released()

    def refused(self, error: RunComfyError) -> None:
        """Remember that the provider refuses the account (a token that was revoked): no launch would do better."""
        if not self._refused:
            self._said("breaker", "the account", f"nothing is launched: {error.message}")
        self._refused = error.message

    @property
    def is_refused(self) -> bool:
        """Whether the provider refuses the account."""
        return bool(self._refused)

    def answered(self) -> None:
        """Remember that the provider takes the account's credentials (again)."""
        self._refused = ""

    def start_failed(self, server_type: str, why: str) -> None:
        """Count a machine that did not become usable, or turned out to be ill."""
        self._fail(server_type, why)

    def start_unclear(self, server_type: str) -> None:
        """Count a start that was broken off and says nothing about the type."""
        self._set(server_type, self._of(server_type).released())

    def usable(self, server_type: str) -> None:
        """Count a machine that became usable."""
        self._set(server_type, self._of(server_type).usable(self.breaker_rules))

    def worked(self, server_type: str) -> None:
        """Count a job that went well."""
        self._set(server_type, self._of(server_type).worked())

    def _of(self, server_type: str) -> Breaker:
        return self._types.get(server_type, Breaker())

    def _fail(self, server_type: str, why: str, *, rest_s: float | None = None) -> None:
        self._set(server_type, self._of(server_type).failed(_now(), why, self.breaker_rules, rest_s=rest_s))

    def _set(self, server_type: str, after: Breaker) -> None:
        before = self._of(server_type)
        self._types[server_type] = after
        self._tell(before, after, server_type)

    def _set_account(self, after: Breaker) -> None:
        before, self._account = self._account, after
        self._tell(before, after, "the account")

    def _tell(self, before: Breaker, after: Breaker, what: str) -> None:
        if after.closed_until is not None and after.closed_until != before.closed_until:
            rest = after.closed_until - _now()
            self._said("breaker", what, f"nothing is launched for {rest:.0f} s: {after.why}")
            log.warning("pool_breaker", extra={"fields": {"what": what, "seconds": round(rest), "why": after.why}})

    # -- run times -----------------------------------------------------------------------------------------

    def usual(self, workflow: str, server_type: str, machine_id: MachineId) -> float | None:
        """Return how long a workflow usually takes on a type, in seconds; None if that says nothing about a machine.

        That is so with too few runs, and when it was slow on another machine, too: then the jobs have become longer.
        """
        runs = self._runs.get((server_type, workflow))
        if runs is None or len(runs.seconds) < ENOUGH_RUNS:
            return None
        if any(slow for other, slow in runs.slow.items() if other != machine_id):
            return None
        return median(runs.seconds)

    def observed(self, workflow: str, server_type: str, machine_id: MachineId, seconds: float) -> None:
        """Remember a run that had its models loaded."""
        runs = self._runs.setdefault((server_type, workflow), _Runs())
        if len(runs.seconds) >= ENOUGH_RUNS:
            runs.slow[machine_id] = seconds > self.rules.slow_factor * median(runs.seconds)
        runs.seconds.append(seconds)

    def forget(self, machine_id: MachineId) -> None:
        """Let go of a machine."""
        for runs in self._runs.values():
            runs.slow.pop(machine_id, None)

    async def learn(self) -> None:
        """Read run times from the store, if that was not done for a while. A store that refuses is asked later."""
        now = _now()
        if now - self._read_at < HISTORY_EVERY:
            return
        self._read_at = now
        try:
            works = await self._store.works(since=self._clock.now() - HISTORY, limit=HISTORY_ROWS)
        except LocalError as error:
            log.warning("pool_history_unread", extra={"fields": {"error": error.code}})
            return
        read: dict[tuple[str, str], deque[float]] = {}
        for work in works:
            if work.outcome != "done" or work.cold or work.computing_at is None or work.computed_at is None:
                continue
            kept = read.setdefault((work.server_type, work.workflow), deque(maxlen=RUNS_KEPT))
            kept.append((work.computed_at - work.computing_at).total_seconds())
        for key, seconds in read.items():
            self._runs.setdefault(key, _Runs()).seconds = seconds


def _now() -> float:
    return asyncio.get_running_loop().time()
