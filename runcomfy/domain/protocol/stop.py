"""
The model of stops: one machine, who holds it, and who takes it over when its holder seems dead (I4, I7, I8, I23).

What can go wrong: the stop is accepted and the machine runs on, it is refused or unanswered and works all the same, the
provider says 404 of a machine that runs; a status or a list misses it by mistake, or fails; the database cannot be
written; the holder is killed, or sleeps so long that it is taken for dead, and goes on afterwards.

Left out: that all reads of one look lie at the same time (`lies` is one fewer than those that have to agree); a machine
that comes back is the reconciler's business. A stop that cannot be written down leaves at once: that its sender sleeps
in between until it is taken for dead, and the disk has room again, could only be refused by the cloud.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from runcomfy.domain.evidence import LISTS_THAT_AGREE, AfterLook, after_look, entry_of
from runcomfy.domain.lease import is_held_under
from runcomfy.domain.machine import NEXT, MachineEvent, MachineReport, MachineState, Phase, ServerId
from runcomfy.domain.protocol.search import Step

HOLDER: Final = 0
NEXT_ONE: Final = 1
OURS: Final = ServerId("ours")
READ: Final = 1 + LISTS_THAT_AGREE
"""A status and so many lists make one look."""
CLOUD: Final = {"runs": Phase.READY, "stops": Phase.STOPPING}


class Process(NamedTuple):
    """One of ours, with what it remembers."""

    at: str
    """works, wants, calls, reads, closes, done; absent: it has not begun, or is dead."""
    epoch: int = 1
    known: bool = False
    missed: int = 0
    """Reads of this look that did not find it."""
    written: bool = False
    """Whether its wish is in the books."""


class State(NamedTuple):
    """Everything there is."""

    processes: tuple[Process, Process]
    cloud: str = "runs"
    row: MachineState = MachineState.READY
    epoch: int = 1
    accepted: bool = False
    """Whether the bill is closed provisionally."""
    seen_running: bool = False
    """Whether it was seen to run since."""
    used_by_next: bool = False
    """Whether a job of the second process runs on it."""
    hurt: bool = False
    """Whether a machine was stopped under a job by somebody whose it no longer is."""
    faults: int = 3
    lies: int = READ - 1


@dataclass(frozen=True, slots=True)
class Stops:
    """The protocol, and what could be done differently: each field set is a design that is rejected."""

    faults: int = 3
    believes_404: bool = False
    believes_its_status: bool = False
    believes_one_list: bool = False
    takes_a_failed_list_for_empty: bool = False
    believes_a_yes: bool = False
    gives_up: bool = False
    keeps_the_bill_closed: bool = False
    asks_no_fence: bool = False
    needs_the_disk: bool = False
    wishes_once: bool = False
    stops_what_it_cannot_write: bool = False

    def start(self) -> State:
        """Return the state in which the holder's work is over, or may be."""
        return State((Process("works", known=True), Process("absent")), faults=self.faults)

    def broken(self, state: State) -> str:
        """Return the invariant that is broken."""
        if state.row is MachineState.STOPPED and state.cloud == "runs":
            return "I4: a machine is said to be gone and runs"
        if state.hurt:
            return "I7 I8: a machine is stopped under somebody else's job"
        if state.accepted and state.seen_running and all(one.at in ("done", "absent") for one in state.processes):
            return "I4 I9: the bill of a machine stays closed that was seen to run"
        return ""

    def ended(self, state: State) -> bool:
        """Whether the machine is gone, and the books say so."""
        return state.row is MachineState.STOPPED and state.cloud == "gone"

    # -- what can happen ---------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[Step]:
        """Return everything that can happen next."""
        if state.cloud == "stops":
            yield Step("the machine is gone", state._replace(cloud="gone"))
        for number, process in enumerate(state.processes):
            yield from self._process(state, number, process)
        holder, after = state.processes
        if state.faults and holder.at not in ("absent", "done"):
            yield Step("the holder is killed", _with(_fault(state), HOLDER, Process("absent")), fault=True)
        on_its_way = holder.at == "calls" and not (holder.written or self.wishes_once)
        seems_dead = holder.at in ("absent", "done") or (bool(state.faults) and not on_its_way)
        if after.at == "absent" and seems_dead and state.row is not MachineState.STOPPED and state.epoch == 1:
            alive = holder.at not in ("absent", "done")
            taken = (_fault(state) if alive else state)._replace(epoch=2)
            why = "the holder sleeps, and is taken for dead" if alive else "its holder is gone"
            if state.row is MachineState.READY:
                used = taken._replace(used_by_next=True)
                words = f"{why}: the next one takes the machine for its job"
                yield Step(words, _with(used, NEXT_ONE, Process("works", 2, known=True)), fault=alive)
            words = f"{why}: the next one takes the machine over, to end it"
            yield Step(words, _with(taken, NEXT_ONE, Process("wants", 2, known=state.accepted)), fault=alive)

    def _process(self, state: State, number: int, process: Process) -> Iterator[Step]:
        who = ("the holder", "the next one")[number]
        if process.at == "works":
            free = state._replace(used_by_next=False) if number == NEXT_ONE else state
            yield Step(f"{who} needs it no longer", _with(free, number, process._replace(at="wants")))
        elif process.at == "wants":
            yield from self._wishes(state, number, process, who)
        elif process.at == "calls":
            yield from self._calls(state, number, process, who)
        elif process.at == "reads":
            yield from self._reads(state, number, process, who)
        elif process.at == "closes":
            if not self._holds(state, process):
                yield Step(f"{who} finds that it holds it no more", _with(state, number, process._replace(at="done")))
                return
            gone = state._replace(row=NEXT[state.row, MachineEvent.GONE])
            yield Step(f"{who} writes that it is gone", _with(gone, number, process._replace(at="done")))

    def _holds(self, state: State, process: Process) -> bool:
        return self.asks_no_fence or is_held_under(state.epoch, process.epoch)

    def _wishes(self, state: State, number: int, process: Process, who: str) -> Iterator[Step]:
        calls = _with(state, number, process._replace(at="calls"))
        if not self._holds(state, process):
            yield Step(f"{who} finds that it holds it no more", _with(state, number, process._replace(at="done")))
            if self.stops_what_it_cannot_write and state.faults:
                yield Step(f"{who} cannot write that: the disk is full", _fault(calls), fault=True)
            return
        if (state.row, MachineEvent.STOP_ASKED) in NEXT:
            written = _with(state, number, process._replace(at="calls", written=True))
            asked = written._replace(row=NEXT[state.row, MachineEvent.STOP_ASKED])
            yield Step(f"{who} writes that it is to be stopped", asked)
        if state.faults:
            without = _with(state, number, process._replace(at="done")) if self.needs_the_disk else calls
            yield Step(f"{who} cannot write that: the disk is full", _fault(without), fault=True)

    def _calls(self, state: State, number: int, process: Process, who: str) -> Iterator[Step]:
        reads = process._replace(at="reads", missed=0)
        known = reads._replace(known=True)
        hurt = state.hurt or (state.used_by_next and number == HOLDER and state.row is not MachineState.STOPPING)
        called = state._replace(hurt=hurt)
        stops = called._replace(cloud="stops") if state.cloud == "runs" else called
        yes = stops._replace(accepted=True, seen_running=False)
        if self.believes_a_yes:
            known = process._replace(at="closes")
        yield Step(f"{who} asks for the stop; accepted", _with(yes, number, known))
        if not state.faults:
            return
        refused = process._replace(at="done") if self.gives_up else reads
        on = called._replace(accepted=True, seen_running=False)
        if state.cloud == "runs":
            yield Step(
                f"{who} asks for the stop; accepted, yet it runs on", _with(_fault(on), number, known), fault=True
            )
            miss = process._replace(at="closes") if self.believes_404 else reads
            words = f"{who} asks for the stop; 404, although it runs"
            yield Step(words, _with(_fault(called), number, miss), fault=True)
        yield Step(f"{who} asks for the stop; 500, yet it stops", _with(_fault(stops), number, refused), fault=True)
        yield Step(f"{who} asks for the stop; 500", _with(_fault(called), number, refused), fault=True)

    def _reads(self, state: State, number: int, process: Process, who: str) -> Iterator[Step]:
        what = "its status" if process.missed == 0 else f"list {process.missed}"
        there = state.cloud in CLOUD
        if there:
            report = MachineReport(OURS, CLOUD[state.cloud], state.cloud)
            entry = entry_of(OURS, [report])
            phase = None if entry is None else entry.phase
            yield Step(f"{who} reads {what}: it {state.cloud}", self._judged(state, number, process, phase))
            if state.lies:
                lied = state._replace(lies=state.lies - 1)
                words = f"{who} reads {what}: not there, by mistake"
                yield Step(words, self._missed(lied, number, process), fault=True)
        else:
            yield Step(f"{who} reads {what}: not there", self._missed(state, number, process))
        if state.faults:
            failed = _fault(state)
            if self.takes_a_failed_list_for_empty and process.missed:
                after = self._missed(failed, number, process)
            else:
                after = self._judged(failed, number, process, None)
            yield Step(f"{who} reads {what}: no answer", after, fault=True)

    def _missed(self, state: State, number: int, process: Process) -> State:
        missed = process.missed + 1
        enough = 1 if self.believes_its_status else 2 if self.believes_one_list else READ
        if missed < enough:
            return _with(state, number, process._replace(missed=missed))
        return self._judged(state, number, process, Phase.GONE)

    def _judged(self, state: State, number: int, process: Process, phase: Phase | None) -> State:
        """What a look means; the machine of the model is old enough to be visible."""
        judged = after_look(phase, known=process.known, must_be_visible=True)
        if judged in (AfterLook.CLOSE, AfterLook.MISTAKEN):
            return _with(state, number, process._replace(at="closes", missed=0))
        at = "calls" if process.written or self.wishes_once else "wants"
        again = process._replace(at=at, missed=0, known=process.known or phase is not None)
        if judged is AfterLook.RUNS:
            mine = self._holds(state, process)  # nobody hears of what somebody sees who holds it no more
            opened = state.accepted and (self.keeps_the_bill_closed or not mine)
            state = state._replace(accepted=opened, seen_running=state.seen_running or mine)
        if self.keeps_the_bill_closed and state.accepted and judged is AfterLook.RUNS:
            again = again._replace(at="done")
        return _with(state, number, again)


def _with(state: State, number: int, process: Process) -> State:
    holder, after = state.processes
    return state._replace(processes=(process, after) if number == HOLDER else (holder, process))


def _fault(state: State) -> State:
    return state._replace(faults=state.faults - 1)
