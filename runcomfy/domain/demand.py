"""
What is known of arrivals, learned one event at a time; and which signals of clients are worth listening to.

Whoever sees jobs come and go (the fleet of `comfyctl serve`, the replay of a trace) tells `Demand` what happens and
asks it for a `DemandView` when it plans. Nothing here is stored: after a restart a history is fed through the same
methods.

Times are seconds on one axis that never jumps, the one of `plan_view`. Every event costs O(1).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from runcomfy.domain.plan_view import DemandView

FAST_S: Final = 90.0
"""Averaging time of the rate that follows bursts within a session."""
SLOW_S: Final = 600.0
"""Averaging time of the rate that outlives the pauses of a session."""
FAST_SHARE: Final = 0.6
"""Weight of the 90 s rate beside the 600 s one."""
_OVERLAP_PRIOR: Final = 3.0
"""Arrivals that met others as often as expected, until there are enough of one's own."""
SILENCES_KEPT: Final = 600
"""Two half-lives of what `keep_alive` weighs: older silences would count less than a quarter."""
TOGETHER_S: Final = 2.0
"""Jobs that come so close together were sent together: three pictures of one prompt."""
SESSION_GAP_S: Final = 300.0
"""Gaps below this are pauses within a session; they tell how quickly somebody works who works."""
_SERVICE_HALF_LIFE: Final = 100
_GROUP_HALF_LIFE: Final = 50
_COLD_HALF_LIFE: Final = 50
_SIGNAL_HALF_LIFE: Final = 50
_DEFAULT_SERVICE_S: Final = 30.0


@dataclass(slots=True)
class _Mean:
    """Mean and spread of a series in which the newest count most: a half-life counted in values, not in time."""

    half_life: float
    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        keep = 0.5 ** (1 / self.half_life)
        self.weight = self.weight * keep + 1
        self.total = self.total * keep + value
        self.squares = self.squares * keep + value * value

    @property
    def mean(self) -> float:
        return self.total / self.weight

    @property
    def cv2(self) -> float:
        if self.total <= 0:
            return 1.0
        # One pseudo-value with cv2 = 1: two equal run times do not make a law.
        seen = max(0.0, self.squares * self.weight / (self.total * self.total) - 1)
        return (seen * self.weight + 1) / (self.weight + 1)


@dataclass(slots=True)
class _Rate:
    """Events per second, exponentially averaged over `tau` and decaying while nothing comes."""

    tau: float
    value: float = 0.0
    at: float = -math.inf

    def add(self, at: float, count: int) -> None:
        self.value = self.now(at) + count / self.tau
        self.at = max(self.at, at)

    def now(self, at: float) -> float:
        return self.value * math.exp(-max(0.0, at - self.at) / self.tau) if self.value else 0.0


class Demand:
    """Arrivals, run times, silences, and the waiting that cold starts caused, from events in order of time."""

    def __init__(self, *, service_s: float = _DEFAULT_SERVICE_S) -> None:
        """`service_s` is the run time believed in until one was told, in seconds on the reference type."""
        self._believed = service_s
        self._seen = 0
        self._last: float | None = None
        self._fast, self._slow = _Rate(FAST_S), _Rate(SLOW_S)
        self._groups, self._group, self._gaps = _Mean(_GROUP_HALF_LIFE), 0, _Mean(_SERVICE_HALF_LIFE)
        self._met, self._expected = _Mean(_SERVICE_HALF_LIFE), _Mean(_SERVICE_HALF_LIFE)
        self._served, self._predicted = _Mean(_SERVICE_HALF_LIFE), _Mean(_SERVICE_HALF_LIFE)
        self._silences: deque[float] = deque(maxlen=SILENCES_KEPT)
        self._silences_view: tuple[float, ...] | None = ()
        self._silent_since: float | None = None
        self._fresh, self._only_batches = True, False
        self._colds = 0.0
        self._waits = 0.0

    def arrived(self, at: float, count: int = 1, service_s: float | None = None, *, batch: bool = False) -> None:
        """Say that jobs came to the queue; `service_s` is the predicted run time of one, on the reference type.

        A known batch (`batch`) says nothing of arrivals to come, so it does not count for the rates.
        """
        if count <= 0:
            return
        self._only_batches = batch and (self._only_batches or self._fresh)
        fresh, self._fresh = self._fresh, False
        if not batch:
            if self._last is not None and at - self._last > TOGETHER_S:
                self._meet(at, busy=not fresh)
            self._seen += count
            self._fast.add(at, count)
            self._slow.add(at, count)
            self._gap(at if self._last is None else at - self._last, count)
        self._last = at if self._last is None else max(self._last, at)
        if service_s is not None and service_s > 0:
            self._predicted.add(service_s)

    def _meet(self, at: float, *, busy: bool) -> None:
        """Count whether what comes finds work in progress, beside how often it would if arrivals did not care."""
        known = self._served if self._served.weight else self._predicted
        rate = FAST_SHARE * self._fast.now(at) + (1 - FAST_SHARE) * self._slow.now(at)
        self._met.add(busy)
        self._expected.add(1 - math.exp(-rate * (known.mean if known.weight else self._believed)))

    def _gap(self, gap_s: float, count: int) -> None:
        if gap_s <= TOGETHER_S:
            self._group += count
            return
        if self._group:
            self._groups.add(self._group)
            if gap_s < SESSION_GAP_S:
                self._gaps.add(gap_s)
        self._group = count

    def served(self, service_s: float) -> None:
        """Say how long a job ran, in seconds on the reference type."""
        if service_s >= 0:
            self._served.add(service_s)

    def went_silent(self, at: float) -> None:
        """Say that from now no machine has work and nothing waits. Saying it again changes nothing."""
        if self._silent_since is None:
            self._silent_since = at

    def work_came(self, at: float) -> None:
        """Say that work is there again. Without a silence before it changes nothing."""
        if self._silent_since is not None:
            self._silences.append(max(0.0, at - self._silent_since))
            self._silent_since, self._silences_view = None, None
            self._fresh = True

    def cold_start(self, at: float) -> None:
        """Say that work came while no machine was there or on its way."""
        keep = 0.5 ** (1 / _COLD_HALF_LIFE)
        self._colds = self._colds * keep + 1
        self._waits *= keep

    def waited(self, seconds: float) -> None:
        """Say how long a job waited from its arrival until it computed: queue, boot and load."""
        if self._colds:
            self._waits += max(0.0, seconds)

    def view(self, now: float) -> DemandView:
        """Return what is known now."""
        if self._silences_view is None:
            self._silences_view = tuple(self._silences)
        known = self._served if self._served.weight else self._predicted
        return DemandView(
            seen=self._seen,
            rate_fast=self._fast.now(now),
            rate_slow=self._slow.now(now),
            service_s=known.mean if known.weight else self._believed,
            service_cv2=known.cv2 if known.weight else 1.0,
            silences=self._silences_view,
            waits_per_cold=self._waits / self._colds if self._colds else None,
            last_arrival=self._last,
            silent_since=self._silent_since,
            only_batches=self._only_batches,
            overlap=(self._met.total + _OVERLAP_PRIOR) / (self._expected.total + _OVERLAP_PRIOR),
            group=self._groups.squares / self._groups.total if self._groups.weight else 1.0,
            rate_session=self._groups.mean / self._gaps.mean if self._gaps.weight else 0.0,
        )


@dataclass(frozen=True, slots=True)
class Score:
    """How good the signals of one source were, the newest counting most."""

    source: str
    said: float
    """Signals that are over: work came, or they ran out."""
    precision: float
    """Share of them after which work came."""
    recall: float
    """Share of the works that came after a silence that this source had announced."""
    lead_s: float
    """How long before its first work such a signal came, mean, in seconds; 0 if none was followed."""
    vain_s: float
    """Seconds that a machine idled for signals of this source before work came or they ran out, per signal."""


_KEEP_SIGNAL: Final = 0.5 ** (1 / _SIGNAL_HALF_LIFE)


@dataclass(slots=True)
class _Source:
    since: float | None = None
    until: float = math.inf
    over: float = 0.0
    hits: float = 0.0
    leads: float = 0.0
    vain: float = 0.0
    announced: float = 0.0
    counted: int = 0
    """At which work of all `announced` was brought up to date."""
    born: int = 0
    """How many works had come when this source was first heard of."""

    def close(self, at: float, *, hit: bool, free_s: float) -> float | None:
        """End the signal; return how long it held, None if there was none."""
        if self.since is None:
            return None
        held = max(0.0, min(at, self.until) - self.since)
        self.over = self.over * _KEEP_SIGNAL + 1
        self.hits = self.hits * _KEEP_SIGNAL + hit
        self.leads = self.leads * _KEEP_SIGNAL + (held if hit else 0.0)
        self.vain = self.vain * _KEEP_SIGNAL + max(0.0, held - free_s)
        self.since, self.until = None, math.inf
        return held

    def announced_at(self, work: int) -> float:
        return self.announced * _KEEP_SIGNAL ** (work - self.counted)


class SignalScore:
    """
    Precision and recall of each source of signals, and which sources pay.

    A signal is right if work comes before it runs out. One that is right spares a cold start; every one costs the
    machine that waits for the work it announces. So a source pays while `hits * worth` exceeds the seconds held.
    An event costs as much as there are signals that hold.
    """

    def __init__(self, *, trust: float = 3.0, free_s: float = 180.0) -> None:
        """`trust`: signals of a new source that are believed before it is judged by its own.

        `free_s`: how long a signal costs nothing, in seconds, because the machine it asked for boots.
        """
        self._trust, self._free_s = trust, free_s
        self._sources: dict[str, _Source] = {}
        self._active: dict[str, _Source] = {}
        self._works = 0
        self._leads = _Mean(_SIGNAL_HALF_LIFE)

    def said(self, source: str, at: float, until: float = math.inf) -> None:
        """Say that a source announced work; `until` is when it no longer holds. Saying it again only prolongs it."""
        known = self._sources.get(source)
        if known is None:
            known = self._sources[source] = _Source(counted=self._works, born=self._works)
        self._expire(source, known, at)
        if known.since is None:
            known.since, known.until = at, until
            self._active[source] = known
        else:
            known.until = max(known.until, until)

    def left(self, source: str, at: float) -> None:
        """Say that a source took its announcement back (somebody left)."""
        known = self._active.get(source)
        if known is not None:
            self._expire(source, known, at)
            known.close(at, hit=False, free_s=self._free_s)
            self._active.pop(source, None)

    def work_came(self, at: float, source: str | None = None, *, after_silence: bool = True) -> None:
        """Say that work came: from anybody, or known to be from whom `source` speaks for."""
        self._works += after_silence
        for name, known in list(self._active.items()):
            self._expire(name, known, at)
            if known.since is None or source not in (None, name):
                continue
            if after_silence:
                known.announced, known.counted = known.announced_at(self._works) + 1, self._works
            held = known.close(at, hit=True, free_s=self._free_s)
            if held is not None:
                self._leads.add(held)
            del self._active[name]

    def _expire(self, name: str, known: _Source, now: float) -> None:
        if known.since is not None and known.until <= now:
            known.close(known.until, hit=False, free_s=self._free_s)
            self._active.pop(name, None)

    def score(self, source: str) -> Score:
        """Return how good a source was so far; one never heard of has no signals and full trust."""
        known = self._sources.get(source) or _Source(counted=self._works, born=self._works)
        works = (1 - _KEEP_SIGNAL ** (self._works - known.born)) / (1 - _KEEP_SIGNAL)
        return Score(
            source=source,
            said=known.over,
            precision=(known.hits + self._trust) / (known.over + self._trust),
            recall=known.announced_at(self._works) / works if works else 0.0,
            lead_s=known.leads / known.hits if known.hits else 0.0,
            vain_s=known.vain / known.over if known.over else 0.0,
        )

    def scores(self) -> list[Score]:
        """Return the scores of all sources that ever said something, by name."""
        return [self.score(name) for name in sorted(self._sources)]

    def pays(self, source: str, worth_s: float) -> bool:
        """Return whether to listen to a source. `worth_s`: idle machine-seconds that one spared cold start is worth."""
        known = self._sources.get(source)
        if known is None:
            return True
        return (known.hits + self._trust) * worth_s >= known.vain

    def lead_s(self, otherwise: float) -> float:
        """Return how long before work signals come, over all sources; `otherwise` counts as one signal, in seconds."""
        return (self._leads.total + otherwise) / (self._leads.weight + 1)
