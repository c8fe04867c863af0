"""
The model of leases: how long a machine is paid ahead, and which of two processes keeps the pool (I5, I19).

Time goes in steps; a lease is `LEASE` of them, and so is the hold on the role. What can go wrong: a renewal is granted
and not heard of, or lost; the keeper is killed, or sleeps while another takes its role, and goes on then.

Left out: clocks that jump (`domain.lease` and the role count by a clock that does not), and how the machine is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from runcomfy.domain.lease import is_held_under, role_is_held
from runcomfy.domain.protocol.search import Step
from runcomfy.domain.renewal import is_due, total_for

NOON: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
STEP_S: Final = 60
LEASE: Final = 2
LEASE_TIME: Final = timedelta(seconds=LEASE * STEP_S)


class Keeper(NamedTuple):
    """One process that would keep the pool."""

    at: str = "waits"
    """waits, keeps, hears, decides, sleeps, dead."""
    until: int = 0
    """How long it holds the role, by its own word."""
    epoch: int = 0
    asked: int = 0
    """When it asked for the role, or for the renewal."""


class State(NamedTuple):
    """Everything there is."""

    keepers: tuple[Keeper, Keeper] = (Keeper(), Keeper())
    now: int = 0
    ends: int = LEASE
    """When the cloud stops the machine by itself."""
    believed: int = LEASE
    """Until when we believe that it is paid."""
    coming: int = 0
    """An asked-for end that the cloud has not read yet; 0: none."""
    wanted: int = 0
    """When somebody last wanted it who was in charge."""
    holder: int = -1
    expires: int = 0
    epoch: int = 0
    twice: bool = False
    """Whether two have decided at the same time, each for the whole pool."""
    faults: int = 2


@dataclass(frozen=True, slots=True)
class Leases:
    """The protocol, and what could be done differently: each field set is a design that is rejected."""

    faults: int = 2
    horizon: int = 3
    believes_what_it_asked_for: bool = False
    adds_to_what_is_left: bool = False
    counts_from_the_answer: bool = False
    decides_without_an_epoch: bool = False
    keeps_its_epoch_for_the_next: bool = False
    renews_without_the_role: bool = False

    def start(self) -> State:
        """Return the state in which the machine is paid for, and nobody keeps the pool."""
        return State(faults=self.faults)

    def broken(self, state: State) -> str:
        """Return the invariant that is broken."""
        if state.believed > state.ends:
            return "I5: a machine is believed to be paid for longer than it is"
        if max(state.ends, state.coming) > state.wanted + LEASE:
            return "I5: a machine is paid for longer than a lease after the last who wanted it"
        if state.twice:
            return "I19: a process decides that is no longer in charge"
        if sum(keeper.at == "keeps" and state.now < keeper.until for keeper in state.keepers) > 1:
            return "I19: two processes believe that they are in charge"
        return ""

    def ended(self, state: State) -> bool:
        """Whether somebody keeps the pool, or all is over: the machine has stopped by itself."""
        return state.now == self.horizon or any(k.at == "keeps" and state.now < k.until for k in state.keepers)

    # -- what can happen ---------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[Step]:
        """Return everything that can happen next."""
        busy = state.coming or any(keeper.at in ("asks", "decides") for keeper in state.keepers)
        if state.now < self.horizon and not (busy and not state.faults):
            yield Step(f"a minute passes ({state.now + 1})", state._replace(now=state.now + 1))
        if state.coming:
            granted = state._replace(ends=max(state.ends, state.coming), coming=0)
            yield Step(f"the cloud grants the machine until {state.coming}", granted)
            if state.faults:
                yield Step("the renewal is lost", _fault(state._replace(coming=0)), fault=True)
        for number, keeper in enumerate(state.keepers):
            yield from self._keeper(state, number, keeper)

    def _keeper(self, state: State, number: int, keeper: Keeper) -> Iterator[Step]:
        who = f"process {'AB'[number]}"
        if keeper.at == "waits":
            yield Step(f"{who} asks for the role", _with(state, number, Keeper("asks", asked=state.now)))
        elif keeper.at == "asks":
            yield self._role(state, number, keeper, who)
        elif keeper.at == "decides":
            yield self._decides(state, number, keeper, who)
        elif keeper.at == "keeps":
            yield from self._keeps(state, number, keeper, who)
        if state.faults and keeper.at in ("keeps", "decides", "asks"):
            yield Step(f"{who} is killed", _with(_fault(state), number, Keeper("dead")), fault=True)

    def _role(self, state: State, number: int, keeper: Keeper, who: str) -> Step:
        held = role_is_held(expires_at=_at(state.expires), now=_at(state.now), signed_off=False)
        if state.holder not in (-1, number) and held:
            return Step(f"{who} is refused the role", _with(state, number, Keeper()))
        epoch = state.epoch + (state.holder != number and not self.keeps_its_epoch_for_the_next)
        asked = state.now if self.counts_from_the_answer else keeper.asked
        taken = state._replace(holder=number, expires=state.now + LEASE, epoch=epoch, wanted=state.now)
        words = f"{who} has the role until {asked + LEASE} (epoch {epoch})"
        if self.counts_from_the_answer:  # the answer is on its way for a moment
            asked += 1
        return Step(words, _with(taken, number, Keeper("keeps", asked + LEASE, epoch)))

    def _keeps(self, state: State, number: int, keeper: Keeper, who: str) -> Iterator[Step]:
        holds = state.now < keeper.until
        if not holds and not self.renews_without_the_role:
            yield Step(f"{who} sees that its time is over", _with(state, number, Keeper()))
            return
        mine = state.holder == number and is_held_under(state.epoch, keeper.epoch)
        wanted = state.now if mine else state.wanted
        if is_due((state.believed - state.now) * STEP_S, LEASE_TIME) and not state.coming and state.now < state.ends:
            total = int(total_for(state.now * STEP_S, LEASE_TIME).total_seconds()) // STEP_S
            if self.adds_to_what_is_left:
                total = state.ends + LEASE
            asked = state._replace(coming=total, wanted=wanted)
            if self.believes_what_it_asked_for:
                asked = asked._replace(believed=total)
            yield Step(f"{who} asks for the machine until {total}", asked)
        if state.believed < state.ends:
            words = f"{who} reads in the list that it is paid until {state.ends}"
            yield Step(words, state._replace(believed=state.ends, wanted=wanted))
        yield Step(f"{who} renews its role", _with(state, number, keeper._replace(at="asks", asked=state.now)))
        yield Step(f"{who} plans for the whole pool", _with(state, number, keeper._replace(at="decides")))

    def _decides(self, state: State, number: int, keeper: Keeper, who: str) -> Step:
        keeps = _with(state, number, keeper._replace(at="keeps"))
        fenced = is_held_under(state.epoch, keeper.epoch) or self.decides_without_an_epoch
        if not fenced:
            return Step(f"{who} finds that another is in charge", _with(state, number, Keeper()))
        if state.holder != number:
            return Step(f"{who} writes its decisions beside those of the other", keeps._replace(twice=True))
        return Step(f"{who} writes its decisions", keeps)


def _at(step: int) -> datetime:
    return NOON + timedelta(seconds=step * STEP_S)


def _fault(state: State) -> State:
    return state._replace(faults=state.faults - 1)


def _with(state: State, number: int, keeper: Keeper) -> State:
    first, second = state.keepers
    return state._replace(keepers=(keeper, second) if number == 0 else (first, keeper))
