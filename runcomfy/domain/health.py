"""
Whether a rented machine is well, and whether its type can be had: what is remembered, and what follows from it.

RunComfy has no restart, so an ill machine is replaced. That costs a start; so one bad word is not enough: what counts
is that its ComfyUI is proven dead, or what happened to it again and again. A type that fails again and again, or that
is sold out, rests for a while, so that another one is tried; then a single launch finds out whether it works again.

Times are seconds by one clock that never jumps; nothing here looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    BootTimeout,
    GpuOutOfMemory,
    LaunchRefused,
    MachineFailed,
    MachineLost,
    NoCapacity,
    NodeStuck,
    NotComfyUI,
    OutOfCredit,
    ProviderError,
    RunComfyError,
    ServerRestarted,
    ServerTooOld,
    ServerUnreachable,
    WorkerDead,
    WrongUrl,
)

ONE_CRASH: Final = 30.0
"""Seconds within which jobs that die on a machine died of the same thing: two are there at once."""
SLOW_SECONDS: Final = 5.0
"""Runs shorter than this say nothing about the speed of a machine: the network takes longer than they do."""
DOUBLED_MOST: Final = 4
"""How often a rest is doubled: from 15 s to four minutes where the cloud is busy, from one to 16 where all is taken."""
ENOUGH_RUNS: Final = 5
"""So many runs of a workflow on a type must be known before one is called slow."""


# --- one machine ------------------------------------------------------------------------------------------


class Harm(StrEnum):
    """What the end of a job says about the machine it ran on."""

    NOTHING = "nothing"
    KILLED = "killed"
    """The job died of the machine's doing; once may happen."""
    GPU = "gpu"
    """Too little memory, or the driver is lost: twice in a row, and it is the driver."""
    DEAD = "dead"
    """Proven: it computes nothing any more."""
    SILENT = "silent"
    """It did not answer. Whether it is dead, gone, or our own network is down is to be found out."""


def harm_of(error: RunComfyError | None) -> Harm:
    """Return what a job's error says about its machine; None: the job went well."""
    match error:
        case WorkerDead():
            return Harm.DEAD
        case GpuOutOfMemory():
            return Harm.GPU
        case ServerRestarted() | NodeStuck():
            return Harm.KILLED
        case ServerUnreachable() | NotComfyUI() | MachineFailed() | MachineLost():
            return Harm.SILENT
        case _:
            return Harm.NOTHING


@dataclass(frozen=True, slots=True)
class HealthRules:
    """From what on a machine is ill."""

    flip_limit: int = 3
    flip_window_s: float = 300.0
    slow_factor: float = 5.0
    slow_limit: int = 2
    """Runs in a row."""
    kill_limit: int = 2
    gpu_limit: int = 2
    """Failures in a row."""


@dataclass(frozen=True, slots=True)
class Health:
    """What happened to one machine. Made anew with every event; a machine that was just started is well."""

    flips: tuple[float, ...] = ()
    """When it stopped being Ready without our asking, within the window."""
    kills: tuple[float, ...] = ()
    gpu_failures: int = 0
    slow_runs: int = 0
    slowness: str = ""
    """What the last slow run was, in words."""
    dead: str = ""
    """Why it is proven to compute nothing any more."""

    def flipped(self, now: float, rules: HealthRules) -> Health:
        """Return the health after the machine was Ready and is not."""
        kept = tuple(at for at in self.flips if now - at < rules.flip_window_s)
        return replace(self, flips=(*kept, now)[-max(1, rules.flip_limit) :])

    def died(self, why: str) -> Health:
        """Return the health of a machine that is proven dead; the first reason is kept."""
        return replace(self, dead=self.dead or why)

    def harmed(self, harm: Harm, why: str, now: float) -> Health:
        """Return the health after a job failed there. What died within moments of another died of the same crash."""
        if harm is Harm.DEAD:
            return self.died(why)
        if harm is Harm.GPU:
            return replace(self, gpu_failures=self.gpu_failures + 1)
        if harm is Harm.KILLED and (not self.kills or now - self.kills[-1] > ONE_CRASH):
            return replace(self, kills=(*self.kills, now))
        return self

    def worked(self, workflow: str, seconds: float, usual: float | None, rules: HealthRules) -> Health:
        """Return the health after a job went well; `usual`: how long others took, None if that is not known."""
        well = replace(self, gpu_failures=0)
        if usual is None:
            return well
        if seconds < SLOW_SECONDS or seconds <= rules.slow_factor * usual:
            return replace(well, slow_runs=0, slowness="")
        slowness = f"{workflow} took {seconds:.0f} s, usually {usual:.0f} s"
        return replace(well, slow_runs=self.slow_runs + 1, slowness=slowness)

    def illness(self, now: float, rules: HealthRules) -> str:
        """Return why the machine is to be replaced, in words; empty while it is well."""
        if self.dead:
            return self.dead
        flips = sum(1 for at in self.flips if now - at < rules.flip_window_s)
        if flips >= rules.flip_limit:
            return f"it stopped being Ready {flips} times within {rules.flip_window_s:.0f} s"
        if len(self.kills) >= rules.kill_limit:
            return f"jobs died on it {len(self.kills)} times"
        if self.gpu_failures >= rules.gpu_limit:
            return f"its GPU failed {self.gpu_failures} times in a row"
        if self.slow_runs >= rules.slow_limit:
            return f"it was too slow {self.slow_runs} times in a row ({self.slowness})"
        return ""


# --- what a failed launch says ----------------------------------------------------------------------------


class Blame(StrEnum):
    """Whose doing it is that a launch failed."""

    NOBODY = "nobody"
    """We refused it ourselves (a budget, the disk, a word that cannot be)."""
    TYPE = "type"
    """The machine did not become usable."""
    STOCK = "stock"
    """None of that type is to be had now."""
    REFUSED = "refused"
    """The type cannot be launched, and trying again does not mend that."""
    ACCOUNT = "account"
    """The account: no money, no access. A person has to mend it."""
    BUSY = "busy"
    """The cloud cannot be asked now, whatever the type."""


def blame_of(error: RunComfyError) -> Blame:
    """Return whose doing it is that a launch or a start failed."""
    match error:
        case NoCapacity():
            return Blame.STOCK
        case LaunchRefused():
            return Blame.REFUSED
        case OutOfCredit() | AuthRejected() | AccessDenied() | WrongUrl():
            return Blame.ACCOUNT
        case BootTimeout() | MachineFailed() | MachineLost() | ServerTooOld() | ServerUnreachable() | NotComfyUI():
            return Blame.TYPE
        case ProviderError():
            return Blame.BUSY
        case _:
            return Blame.NOBODY


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When launches stop, and for how long. Seconds."""

    limit: int = 3
    """Failed starts and ill machines in a row."""
    rest_s: float = 600.0
    """The first rest; each further one is twice as long."""
    rest_most_s: float = 3600.0

    @property
    def stock_rest_s(self) -> float:
        """What a type rests that is sold out: stock comes back sooner than a defect is mended."""
        return self.rest_s / 10

    @property
    def busy_rest_s(self) -> float:
        """What everything rests when the cloud cannot be asked."""
        return self.rest_s / 40

    def pause_s(self, failures: int) -> float:
        """Return how long nothing of a type is launched after so many failures in a row, below the limit.

        A machine that never became usable has billed meanwhile: the next one is not sent after it at once.
        """
        doubled: int = 1 << min(max(failures - 1, 0), DOUBLED_MOST)
        return min(self.rest_s, self.rest_s / 40 * doubled)


@dataclass(frozen=True, slots=True)
class Breaker:
    """Whether machines of one type, or of an account, may be launched.

    closed --a failure--> pausing, each time twice as long --time--> closed
    closed --failures reach the limit, or one that counts at once--> resting --time--> one trial
    trial --usable--> closed, but the next failure opens it again --a job went well--> as new
    trial --failed--> resting, twice as long
    """

    failures: int = 0
    rests: int = 0
    """How often in a row it opened: makes the next rest longer."""
    rests_until: float | None = None
    pauses_until: float | None = None
    """While it is closed: until when nothing is launched after the last failure."""
    trial: bool = False
    """Whether the one launch that is to find out is under way."""
    why: str = ""
    """What it rests for, in words."""

    def failed(self, now: float, why: str, rules: BreakerRules, *, rest_s: float | None = None) -> Breaker:
        """Return it after a failure. With `rest_s` it opens at once, first for so long; else when the limit is reached.

        Failures of launches that had begun before it opened make the rest no longer.
        """
        failures = self.failures + 1
        if self.resting(now):
            return replace(self, failures=failures)
        if rest_s is None and failures < rules.limit and not self.trial:
            return replace(self, failures=failures, pauses_until=now + rules.pause_s(failures), why=why)
        first = rules.rest_s if rest_s is None else rest_s
        length = first * 2 ** min(self.rests, DOUBLED_MOST)
        length = min(length, max(first, rules.rest_most_s))
        return Breaker(failures, self.rests + 1, now + length, trial=False, why=why)

    def began(self, now: float) -> Breaker:
        """Return it after a launch was begun: after a rest it is the trial."""
        return replace(self, trial=True) if self.rests_until is not None and not self.resting(now) else self

    def released(self) -> Breaker:
        """Return it after a launch ended that said nothing about the type."""
        return replace(self, trial=False)

    def usable(self, rules: BreakerRules) -> Breaker:
        """Return it after a machine became usable."""
        if self.rests_until is None:
            return replace(self, pauses_until=None)
        return replace(self, failures=max(0, rules.limit - 1), rests_until=None, trial=False)

    def worked(self) -> Breaker:
        """Return it after a job went well on a machine of the type, or the account launched one."""
        return Breaker() if self.rests_until is None else self

    def resting(self, now: float) -> bool:
        """Whether it rests at this time."""
        return self.rests_until is not None and now < self.rests_until

    @property
    def closed_until(self) -> float | None:
        """Until when it allows no launch, whether it rests or pauses; None if nothing has failed."""
        return self.pauses_until if self.rests_until is None else self.rests_until

    def pausing(self, now: float) -> bool:
        """Whether it is closed, and only waits a moment after a failure."""
        return self.rests_until is None and self.pauses_until is not None and now < self.pauses_until

    def room(self, now: float) -> int | None:
        """Return how many launches it allows: none while it rests or pauses, one after a rest, else any number."""
        if self.rests_until is None:
            return 0 if self.pausing(now) else None
        return 0 if self.resting(now) or self.trial else 1

    def why_not(self, now: float) -> str:
        """Return why it allows none, for people; empty if it allows one."""
        if self.room(now) != 0:
            return ""
        if self.trial:
            return f"one is being tried again after: {self.why}"
        return f"{self.why}; possible again in {(self.closed_until or now) - now:.0f} s"
