"""
What the fleet knows of work: when jobs come, how long they run and wait, and what clients announce.

The learning is done by `domain.demand`; this feeds it. At the start it is fed the jobs, runs and signals of the last
days in the order in which they happened, and later what is new, so that a restart forgets nothing and history and
present are learned from in the same way.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from runcomfy.application.axis import Axis
from runcomfy.application.fleet_offers import LOOK_BACK, FleetOffers
from runcomfy.domain.demand import Demand, SignalScore
from runcomfy.domain.plan_view import BatchView, DemandView, PresenceView
from runcomfy.domain.queued import Arrival, RowId
from runcomfy.domain.signal import PRESENCE_FOR, Signal, SignalKind
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.store import Store

MOST_ARRIVALS: Final = 20_000
"""Jobs of history that are learned from."""
_REMEMBERED: Final = 50_000
"""Jobs whose coming is remembered until they run."""
BATCH_LATE: Final = 600.0
"""Seconds after its time for which a batch that did not come is still waited for."""
INTENT_DEFAULT: Final = 300.0
_SIGNAL_OVERLAP: Final = 30.0
"""Seconds of signals that are read twice: another process's clock may be a little behind."""


class FleetDemand:
    """Feeds `Demand` from the queue's rows and the books' runs, and `Signals` with them."""

    def __init__(self, jobs: JobStore, offers: FleetOffers, signals: FleetSignals, *, axis: Axis) -> None:
        """`axis` is that of the queue's clock."""
        self._jobs, self._offers, self._signals, self._axis = jobs, offers, signals, axis
        self._demand = Demand()
        self._newest = RowId(0)
        self._came: OrderedDict[str, float] = OrderedDict()
        """By uid: when a job came that has not computed yet."""
        self._counted: set[tuple[str, str, int]] = set()
        """Runs that were learned from."""
        self._worked = False
        """Whether there was ever any work: the very first comes after a silence, too."""

    # -- history -------------------------------------------------------------------------------------------

    async def rebuild(self) -> None:
        """Learn from what is kept. Raises LocalError."""
        self._demand = Demand()
        since = asyncio.get_running_loop().time() - LOOK_BACK.total_seconds()
        told = await self._jobs.arrivals(limit=MOST_ARRIVALS)
        self._newest = told[-1].id if told else RowId(0)
        past = [(at, arrival) for arrival in told if arrival.at is not None and (at := self._of(arrival)) >= since]
        past.sort(key=lambda each: each[0])
        await asyncio.to_thread(self._relive, past)

    def _of(self, arrival: Arrival) -> float:
        return self._axis.of(arrival.at) if arrival.at is not None else float("-inf")

    def _relive(self, past: Sequence[tuple[float, Arrival]]) -> None:
        self._worked = bool(past)
        first: dict[str, Work] = {}
        for work in self._offers.works:
            if work.computing_at is not None:
                first.setdefault(work.job_id, work)
        busy_until = float("-inf")
        for at, arrival in past:
            ran = first.get(arrival.uid)
            silence = at > busy_until
            if silence:
                if busy_until > float("-inf"):
                    self._demand.went_silent(busy_until)
                self._demand.work_came(at)
                if ran is None or self._was_cold(at, ran):
                    self._demand.cold_start(at)
            batch = self._signals.work_came(at, arrival.user, after_silence=silence)
            self._came_in(at, arrival, batch=batch)
            if ran is not None:
                self._learn(ran)
            if arrival.ended_at is not None:
                busy_until = max(busy_until, at, self._axis.of(arrival.ended_at))
            else:
                busy_until = float("inf")  # it still waits or runs
        if float("-inf") < busy_until < float("inf"):
            self._demand.went_silent(busy_until)

    def _was_cold(self, at: float, ran: Work) -> bool:
        """Return whether a job that came after a silence found no machine, as far as its wait tells.

        That a machine had not computed its workflow yet is not enough: somebody may have announced the work.
        """
        if not ran.cold or ran.computing_at is None:
            return False
        return self._axis.of(ran.computing_at) - at >= self._offers.boot_s(ran.server_type) / 2

    def _came_in(self, at: float, arrival: Arrival, *, batch: bool) -> None:
        self._demand.arrived(at, 1, self._offers.run_s(arrival.workflow_id), batch=batch)
        self._came[arrival.uid] = at
        if len(self._came) > _REMEMBERED:
            self._came.popitem(last=False)

    # -- what is new ---------------------------------------------------------------------------------------

    async def follow(self, *, silent: bool) -> None:
        """Learn what came since the last look; `silent`: nothing had been to do until then. Raises LocalError."""
        told = await self._jobs.arrivals(after=self._newest, limit=MOST_ARRIVALS)
        now = asyncio.get_running_loop().time()
        for arrival in told:
            self._newest = max(self._newest, arrival.id)
            at = self._of(arrival) if arrival.at is not None else now
            batch = self._signals.work_came(at, arrival.user, after_silence=silent)
            self._came_in(at, arrival, batch=batch)
            silent = False

    def learn(self, works: Iterable[Work]) -> None:
        """Learn from runs; those that were learned from already are passed over."""
        for work in works:
            self._learn(work)

    def _learn(self, work: Work) -> None:
        key = (work.machine_id, work.job_id, work.attempt)
        if work.computing_at is None or work.computed_at is None or key in self._counted:
            return
        self._counted.add(key)
        if (came := self._came.pop(work.job_id, None)) is not None:
            self._demand.waited(max(0.0, self._axis.of(work.computing_at) - came))
        if work.outcome in ("", "done"):
            seconds = (work.computed_at - work.computing_at).total_seconds()
            self._demand.served(max(0.0, self._offers.on_reference(seconds, work.server_type)))

    def forget(self, works: Collection[Work]) -> None:
        """Drop what is remembered of runs that are not among the ones looked back at any more."""
        self._counted &= {(work.machine_id, work.job_id, work.attempt) for work in works}

    def observe(self, now: float, *, busy: bool, machines: bool) -> None:
        """Say whether there is work now, and whether a machine is there or on its way."""
        if not busy:
            self._demand.went_silent(now)
            return
        was_silent = not self._worked or self._demand.view(now).silent_since is not None
        self._worked = True
        self._demand.work_came(now)
        if was_silent and not machines:
            self._demand.cold_start(now)

    def view(self, now: float) -> DemandView:
        """Return what is known now."""
        return self._demand.view(now)


@dataclass(slots=True)
class _There:
    """What one source has said that still counts. Times by the loop."""

    since: float | None = None
    """OPENED: since when without a break."""
    until: float = float("-inf")
    """OPENED: until when it holds; in the past: nobody is there."""
    left_at: float | None = None
    intent_until: float = float("-inf")
    user: str = ""


@dataclass(slots=True)
class _Batch:
    source: str
    at: float
    jobs: int
    work_s: float
    user: str


class FleetSignals:
    """Hears signals, scores their sources by what followed, and says what those that pay announce now."""

    def __init__(self, store: Store, clock: Clock, *, axis: Axis, lead_s: float, tell: Callable[[str], None]) -> None:
        """`axis` is that of `clock`; `lead_s` is believed until history says how long before work signals come."""
        self._store, self._clock, self._axis = store, clock, axis
        self._lead_s, self._tell = lead_s, tell
        self._score = SignalScore()
        self._there: dict[str, _There] = {}
        self._batches: list[_Batch] = []
        self._heard: OrderedDict[tuple[str, str, object], None] = OrderedDict()
        self._past: list[tuple[float, Signal]] = []
        """Signals of history that were not relived yet, the newest first."""
        self._ignored: set[str] = set()
        self._batch_came: float | None = None
        """When the newest job came, if it belongs to a batch that was announced."""
        self._since = clock.now() - LOOK_BACK

    async def hear(self, *, history: bool = False) -> int:
        """Read what is new; return how many there were. `history`: keep them until jobs of their time are relived.

        Raises LocalError.
        """
        now = self._clock.now()
        found = 0
        told = await self._store.signals(since=self._since)
        for signal in told:
            key = (str(signal.kind), signal.source, signal.at)
            if key in self._heard:
                continue
            self._heard[key] = None
            found += 1
            if history:
                self._past.append((self._axis.of(signal.at), signal))
            else:
                self._take(self._axis.of(signal.at), signal)
        self._past.sort(key=lambda each: -each[0])
        newest = max((signal.at for signal in told), default=now)
        self._since = min(now, newest) - timedelta(seconds=_SIGNAL_OVERLAP)
        while len(self._heard) > _REMEMBERED:
            self._heard.popitem(last=False)
        return found

    def relived(self) -> None:
        """Take the signals that came after the last job of history."""
        self._until(float("inf"))

    def _until(self, at: float) -> None:
        while self._past and self._past[-1][0] <= at:
            self._take(*self._past.pop())

    def _take(self, at: float, signal: Signal) -> None:
        there = self._there.setdefault(signal.source, _There())
        there.user = signal.user or there.user
        match signal.kind:
            case SignalKind.OPENED:
                until = self._axis.ahead(signal.until) if signal.until else at + PRESENCE_FOR.total_seconds()
                if there.since is None or there.until < at:
                    there.since = at
                there.until, there.left_at = max(there.until, until), None
                self._score.said(signal.source, at, there.until)
            case SignalKind.LEFT:
                there.until, there.left_at, there.intent_until = at, at, float("-inf")
                self._score.left(signal.source, at)
                # Work that is announced for later comes whether somebody stays or not.
            case SignalKind.INTENT:
                until = self._axis.ahead(signal.until) if signal.until else at + INTENT_DEFAULT
                there.intent_until = max(there.intent_until, until)
                self._score.said(signal.source, at, there.intent_until)
            case SignalKind.BATCH:
                comes = self._axis.ahead(signal.expected_at) if signal.expected_at else at
                self._score.said(signal.source, at, comes + BATCH_LATE)
                self._batches.append(
                    _Batch(signal.source, comes, signal.jobs, signal.work.total_seconds(), signal.user)
                )

    def work_came(self, at: float, user: str, *, after_silence: bool) -> bool:
        """Say that a job of a user came; return whether it belongs to a batch that was announced."""
        self._until(at)
        mine = [name for name, there in self._there.items() if there.user in ("", user) or not user]
        if len(mine) == len(self._there):
            self._score.work_came(at, after_silence=after_silence)
        else:
            for name in mine:
                self._score.work_came(at, name, after_silence=after_silence)
                after_silence = False
        for batch in self._batches:
            if batch.jobs > 0 and batch.user in ("", user):
                share = batch.work_s / batch.jobs
                batch.jobs, batch.work_s = batch.jobs - 1, max(0.0, batch.work_s - share)
                self._batch_came = at
                return True
        self._batch_came = None
        return False

    def view(self, now: float, *, worth_s: float) -> PresenceView:
        """Return what sources that pay announce. `worth_s`: idle machine-seconds that a spared cold start is worth."""
        heeded = {name: there for name, there in self._there.items() if self._pays(name, worth_s)}
        present = [there for there in heeded.values() if there.until > now]
        gone = [there.left_at if there.left_at is not None else there.until for there in heeded.values()]
        left = [at for at in gone if float("-inf") < at <= now]
        expected = max((there.intent_until for there in heeded.values()), default=float("-inf"))
        self._batches = [b for b in self._batches if b.jobs > 0 and now <= b.at + BATCH_LATE]
        return PresenceView(
            present=len(present),
            left_at=max(left) if left and not present else None,
            expected_until=expected if expected > now else None,
            batches=tuple(BatchView(b.jobs, b.work_s, b.at) for b in self._batches if b.source in heeded),
            lead_s=self._score.lead_s(self._lead_s),
            since=min((there.since for there in present if there.since is not None), default=None),
            recall=max((self._score.score(name).recall for name in heeded), default=0.0) if heeded else 1.0,
        )

    def batched(self, now: float) -> bool:
        """Return whether the newest jobs came as a batch that was announced, and no more of anything is."""
        return self._batch_came is not None and now - self._batch_came <= BATCH_LATE

    def next_change(self, now: float) -> float | None:
        """Return when something that was announced runs out or comes, the next time."""
        times = [at for there in self._there.values() for at in (there.until, there.intent_until) if at > now]
        return min([*times, *(batch.at for batch in self._batches if batch.at > now)], default=None)

    def _pays(self, source: str, worth_s: float) -> bool:
        pays = self._score.pays(source, worth_s)
        if not pays and source not in self._ignored:
            self._ignored.add(source)
            score = self._score.score(source)
            self._tell(
                f"signals of {source} are not heeded for now: of {score.said:.0f} that are over, work came after "
                f"{score.precision:.0%}, and machines would have waited {score.vain_s:.0f} s for each"
            )
        elif pays and source in self._ignored:
            self._ignored.discard(source)
            self._tell(f"signals of {source} are heeded again")
        return pays
