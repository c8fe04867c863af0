"""
The model of launches: two processes of one account, one of which tries twice, and a stranger (I1, I2, I3, I7).

What can go wrong: the answer is lost, whether a machine was started or not; a list is empty by mistake; a process is
killed at any moment and starts again without its memory; a machine appears late; a stranger starts one of the same type
meanwhile.

Left out: what a stranger starts while we launch differs from ours in its duration or workflow version; one that is the
same in all, and first seen while an answer of ours is missing, is taken for ours (the contract of the search for lost
launches). One that was there before may be the same in all, but the list that is noted before a launch is right. A
machine is visible before the visibility window is over: that is what the window means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Final, NamedTuple

from runcomfy.domain.evidence import LISTS_THAT_AGREE, Launched, may_be_it, what_was_started
from runcomfy.domain.machine import (
    NEXT,
    OPEN,
    Machine,
    MachineEvent,
    MachineId,
    MachineReport,
    MachineState,
    Phase,
    Purpose,
    ServerId,
)
from runcomfy.domain.protocol.search import Step

STRANGERS: Final = -1
"""Stands for the launch of a machine that is none of ours."""
NOON: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
SHOWN: Final = {"starting": Phase.STARTING, "ready": Phase.READY}


class Server(NamedTuple):
    """A machine at the cloud."""

    launch: int
    """Which row asked for it, or `STRANGERS`."""
    shown: str = "hidden"
    """hidden, starting, ready, gone."""
    alike: bool = True
    """Whether it is like ours in duration and workflow version."""


class Row(NamedTuple):
    """A launch in our books."""

    owner: int | None
    """None: its process is dead."""
    state: MachineState = MachineState.REQUESTED
    server: int | None = None
    before: frozenset[int] = frozenset()
    late: bool = False
    """Whether the visibility window is over."""
    reported: bool = False
    """Whether a person was told that it cannot be known."""


class Process(NamedTuple):
    """One of ours."""

    at: str = "waits"
    row: int = -1
    tries: int = 1
    late_lists: int = 0
    before: frozenset[int] = frozenset()
    server: int = -1


class State(NamedTuple):
    """Everything there is."""

    processes: tuple[Process, ...]
    rows: tuple[Row, ...] = ()
    servers: tuple[Server, ...] = ()
    sent: tuple[int, ...] = ()
    """Rows whose request is under way."""
    lock: int | None = None
    faults: int = 2
    lies: int = LISTS_THAT_AGREE - 1
    """Lists that are empty by mistake: one fewer than those that have to agree."""
    strangers: int = 1


@dataclass(frozen=True, slots=True)
class Launches:
    """The protocol, and what could be done differently: each field set is a design that is rejected."""

    tries: tuple[int, ...] = (2, 1)
    faults: int = 2
    strangers: int = 1
    intent_after_the_call: bool = False
    retries_without_looking: bool = False
    does_not_wait_for_the_window: bool = False
    counts_early_lists: bool = False
    believes_one_list: bool = False
    notes_nothing_before: bool = False
    takes_what_is_near: bool = False
    launches_without_the_lock: bool = False
    forgets_what_others_left: bool = False

    def start(self) -> State:
        """Return the state before anything was asked for."""
        return State(tuple(Process(tries=tries) for tries in self.tries), faults=self.faults, strangers=self.strangers)

    # -- what must hold ----------------------------------------------------------------------------------------

    def broken(self, state: State) -> str:
        """Return the invariant that is broken."""
        for server in state.servers:
            if server.launch >= len(state.rows) and server.shown != "gone":
                return "I1: a machine runs that no intent tells of"
        if any(launch >= len(state.rows) for launch in state.sent):
            return "I1: a request has left that no intent tells of"
        for number, row in enumerate(state.rows):
            if row.server is not None and state.servers[row.server].launch == STRANGERS:
                return "I7: a stranger's machine is taken for ours"
            if row.server is not None and state.servers[row.server].launch != number:
                return "I2: a launch claims what another one started"
            if row.state is MachineState.NEVER and not row.reported and _runs(state, number):
                return "I3: a machine runs of a launch that is said to have started nothing"
        return ""

    def ended(self, state: State) -> bool:
        """Whether nobody does anything any more, and every machine of ours is known, or reported."""
        if any(process.at != "done" for process in state.processes) or state.sent:
            return False
        if any(row.state is MachineState.REQUESTED for row in state.rows):
            return False
        return all(
            server.launch == STRANGERS
            or server.shown == "gone"
            or state.rows[server.launch].server == number
            or state.rows[server.launch].reported
            for number, server in enumerate(state.servers)
        )

    # -- what can happen ---------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[Step]:
        """Return everything that can happen next."""
        yield from self._cloud(state)
        for number, process in enumerate(state.processes):
            if process.at == "done":
                continue
            yield from self._process(state, number, process)
            if state.faults and process.at != "waits":
                yield Step(f"{_name(number)} is killed, and starts again", _killed(state, number), fault=True)

    def _cloud(self, state: State) -> Iterator[Step]:
        for launch in state.sent:
            yield from self._answered(state, launch)
        for number, server in enumerate(state.servers):
            if server.shown in ("hidden", "starting"):
                shown = "starting" if server.shown == "hidden" else "ready"
                words = f"machine {number} is listed as {shown}"
                yield Step(words, _with_server(state, number, server._replace(shown=shown)))
        if state.strangers:
            early = not state.rows and all(process.at in ("waits", "locked", "begins") for process in state.processes)
            servers = (*state.servers, Server(STRANGERS, "ready", alike=early))
            words = f"a stranger starts machine {len(state.servers)}{', like ours,' if early else ''}"
            yield Step(words, state._replace(servers=servers, strangers=state.strangers - 1))
        for number, row in enumerate(state.rows):
            hidden = any(server == Server(number) for server in state.servers)
            is_open = row.state is MachineState.REQUESTED and not row.late and number not in state.sent
            if is_open and not hidden and not _is_listened_for(state, number, "intended"):
                words = f"the visibility window of launch {number} is over"
                yield Step(words, _with_row(state, number, row._replace(late=True)))

    def _answered(self, state: State, launch: int) -> Iterator[Step]:
        """A request arrives: it starts a machine or not, and its answer arrives or not."""
        sent = tuple(other for other in state.sent if other != launch)
        started = state._replace(sent=sent, servers=(*state.servers, Server(launch)))
        nothing = state._replace(sent=sent)
        server = len(state.servers)
        caller = next((n for n, p in enumerate(state.processes) if p.at == "sends" and p.row == launch), None)
        if caller is None:
            yield Step(f"launch {launch} starts machine {server}; nobody hears the answer", started)
            yield Step(f"launch {launch} starts nothing; nobody hears the answer", nothing)
            return
        process = state.processes[caller]
        told = process._replace(at="answered", server=server)
        lost = process._replace(at="finds", late_lists=0)
        if self.retries_without_looking:
            lost = process._replace(at="absent")
        yield Step(f"launch {launch} starts machine {server}, and is answered", _with(started, caller, told))
        yield Step(f"launch {launch} is refused", _with(nothing, caller, process._replace(at="refused")))
        if state.faults:
            words = f"launch {launch} starts machine {server}, and the answer is lost"
            yield Step(words, _with(_fault(started), caller, lost), fault=True)
            words = f"launch {launch} starts nothing, and the answer is lost"
            yield Step(words, _with(_fault(nothing), caller, lost), fault=True)

    def _process(self, state: State, number: int, process: Process) -> Iterator[Step]:
        who = _name(number)
        row = state.rows[process.row] if 0 <= process.row < len(state.rows) else None
        if process.at == "waits" and (state.lock is None or self.launches_without_the_lock):
            locked = _with(state._replace(lock=number), number, process._replace(at="locked"))
            yield Step(f"{who} takes the launch lock", locked)
        elif process.at == "locked":
            yield self._looks_behind(state, number, process)
        elif process.at == "begins":
            yield from self._before(state, number, process)
        elif process.at == "intended":
            yield self._sends(state, number, process)
        elif process.at == "sent unwritten":
            written = state._replace(rows=(*state.rows, Row(number, before=process.before)))
            yield Step(f"{who} writes the intent", _with(written, number, process._replace(at="sends")))
        elif process.at == "answered" and row is not None:
            known = row._replace(state=NEXT[row.state, MachineEvent.LISTED], server=process.server)
            words = f"{who} writes that launch {process.row} is machine {process.server}"
            yield Step(words, _done(_with_row(state, process.row, known), number))
        elif process.at == "refused" and row is not None:
            refused = row._replace(state=NEXT[row.state, MachineEvent.REFUSED])
            yield Step(f"{who} writes that it was refused", _done(_with_row(state, process.row, refused), number))
        elif process.at in ("finds", "resolves") and row is not None:
            yield from self._finds(state, number, process, row)
        elif process.at == "absent" and row is not None:
            yield self._closes(state, number, process, row)

    def _looks_behind(self, state: State, number: int, process: Process) -> Step:
        """What dead processes left comes first: their unanswered launches are looked for, their machines ended."""
        if not self.forgets_what_others_left:
            for other, row in enumerate(state.rows):
                if row.owner is not None or row.state not in OPEN:
                    continue
                mine = _with_row(state, other, row._replace(owner=number))
                if row.state is MachineState.REQUESTED:
                    resolves = process._replace(at="resolves", row=other, late_lists=0)
                    return Step(f"{_name(number)} looks for what launch {other} started", _with(mine, number, resolves))
                return Step(f"{_name(number)} ends the machine of launch {other}", _stopped(mine, other))
        return Step(f"{_name(number)} may launch", _with(state, number, process._replace(at="begins")))

    def _before(self, state: State, number: int, process: Process) -> Iterator[Step]:
        seen = frozenset() if self.notes_nothing_before else frozenset(_visible(state))
        new = len(state.rows)
        if self.intent_after_the_call:
            after = process._replace(at="sent unwritten", row=new, before=seen)
            sent = state._replace(sent=(*state.sent, new))
            yield Step(f"{_name(number)} sends launch {new}", _with(sent, number, after))
            return
        rows = (*state.rows, Row(number, before=seen))
        after = process._replace(at="intended", row=new)
        words = f"{_name(number)} notes what is listed, and writes the intent of launch {new}"
        yield Step(words, _with(state._replace(rows=rows), number, after))

    def _sends(self, state: State, number: int, process: Process) -> Step:
        sent = state._replace(sent=(*state.sent, process.row))
        return Step(f"{_name(number)} sends launch {process.row}", _with(sent, number, process._replace(at="sends")))

    def _finds(self, state: State, number: int, process: Process, row: Row) -> Iterator[Step]:
        who = _name(number)
        late = row.late or self.does_not_wait_for_the_window
        lists = process.late_lists + (late or self.counts_early_lists)
        known = frozenset(r.server for n, r in enumerate(state.rows) if r.server is not None and n != process.row)
        for listed, fault in ((_visible(state), False), ((), True)):
            if fault and (not state.lies or not _visible(state)):
                continue
            judged, server = self._judged(row, known, tuple((n, state.servers[n]) for n in listed), late, lists)
            after = state._replace(lies=state.lies - 1) if fault else state
            words = f"{who} lists {', '.join(map(str, listed)) or 'nothing'}{' by mistake' if fault else ''}"
            process = process._replace(late_lists=min(lists, 2))
            words, follows = self._follows(after, number, process, judged, server, words)
            yield Step(words, follows, fault)

    def _follows(
        self, state: State, number: int, process: Process, judged: Launched, server: int, words: str
    ) -> tuple[str, State]:
        """What a list means is written down, and the process goes on."""
        row = state.rows[process.row]
        if judged is Launched.LOOK_AGAIN:
            return words, _with(state, number, process)
        if judged is Launched.TAKE:
            taken = row._replace(state=NEXT[row.state, MachineEvent.LISTED], server=server)
            after = _with_row(state, process.row, taken)
            words = f"{words}: machine {server} is what launch {process.row} started"
            if process.at == "finds":
                return words, _done(after, number)
            return f"{words}, and is ended", _with(_stopped(after, process.row), number, process._replace(at="locked"))
        if judged is Launched.AMBIGUOUS:
            told = row._replace(state=NEXT[row.state, MachineEvent.ABSENT], reported=True)
            after = _with_row(state, process.row, told)
            words = f"{words}: it cannot be told; reported"
            if process.at == "finds":
                return words, _done(after, number)
            return words, _with(after, number, process._replace(at="locked"))
        words = f"{words}: launch {process.row} started nothing"
        if process.at == "finds":
            return words, _with(state, number, process._replace(at="absent"))
        closed = row._replace(state=NEXT[row.state, MachineEvent.ABSENT])
        return words, _with(_with_row(state, process.row, closed), number, process._replace(at="locked"))

    def _closes(self, state: State, number: int, process: Process, row: Row) -> Step:
        closed = _with_row(state, process.row, row._replace(state=NEXT[row.state, MachineEvent.ABSENT]))
        if process.tries == 1:
            return Step(f"{_name(number)} gives up", _done(closed, number))
        again = process._replace(at="begins", tries=process.tries - 1, row=-1, late_lists=0)
        return Step(f"{_name(number)} tries again", _with(closed, number, again))

    def _judged(
        self,
        row: Row,
        known: frozenset[int],
        listed: tuple[tuple[int, Server], ...],
        late: bool,
        lists: int,
    ) -> tuple[Launched, int]:
        exact, near = _fitting(row.before, known, listed)
        if self.takes_what_is_near:
            exact, near = [*exact, *near], []
        counted = lists if late else 0
        if self.believes_one_list and counted == 1:
            counted = 2
        judged = what_was_started(exact, near, late_lists=counted)
        return judged, int(exact[0].server_id) if exact else -1


# -- the code's own decision ---------------------------------------------------------------------------------------


@lru_cache(maxsize=100_000)
def _fitting(
    before: frozenset[int], known: frozenset[int], listed: tuple[tuple[int, Server], ...]
) -> tuple[list[MachineReport], list[MachineReport]]:
    machine = Machine(
        id=MachineId("ours"),
        provider="cloud",
        account="account",
        purpose=Purpose.RUN,
        server_type="medium",
        duration=timedelta(minutes=10),
        usd_per_hour=Decimal(1),
        rate_source="",
        requested_at=NOON,
        since=NOON,
        before_ids=tuple(ServerId(str(number)) for number in sorted(before)),
    )
    reports = [
        MachineReport(
            ServerId(str(number)),
            SHOWN[server.shown],
            server.shown,
            server_type="medium",
            duration=timedelta(minutes=10 if server.alike else 60),
        )
        for number, server in listed
    ]
    exact, near = may_be_it(machine, reports, {ServerId(str(number)) for number in known}, types=())
    return exact, near


# -- states from states --------------------------------------------------------------------------------------------


def _name(number: int) -> str:
    return "AB"[number]


def _runs(state: State, row: int) -> bool:
    return row in state.sent or any(one.launch == row and one.shown != "gone" for one in state.servers)


def _visible(state: State) -> tuple[int, ...]:
    return tuple(number for number, server in enumerate(state.servers) if server.shown in SHOWN)


def _is_listened_for(state: State, row: int, at: str) -> bool:
    return any(process.row == row and process.at == at for process in state.processes)


def _fault(state: State) -> State:
    return state._replace(faults=state.faults - 1)


def _with(state: State, number: int, process: Process) -> State:
    processes = tuple(process if n == number else other for n, other in enumerate(state.processes))
    return state._replace(processes=processes)


def _with_row(state: State, number: int, row: Row) -> State:
    return state._replace(rows=tuple(row if n == number else other for n, other in enumerate(state.rows)))


def _with_server(state: State, number: int, server: Server) -> State:
    return state._replace(servers=tuple(server if n == number else other for n, other in enumerate(state.servers)))


def _done(state: State, number: int) -> State:
    """The process has what it wanted, or was told why not; others may launch."""
    freed = state._replace(lock=None if state.lock == number else state.lock)
    return _with(freed, number, Process(at="done", tries=0))


def _stopped(state: State, number: int) -> State:
    """A machine of ours is stopped and seen gone: how, is the model of stops' business."""
    row = state.rows[number]
    if row.server is not None:
        state = _with_server(state, row.server, state.servers[row.server]._replace(shown="gone"))
    asked = NEXT[row.state, MachineEvent.STOP_ASKED]
    return _with_row(state, number, row._replace(state=NEXT[asked, MachineEvent.GONE]))


def _killed(state: State, number: int) -> State:
    """The process loses its memory, its rows have nobody any more, its lock is broken by whoever comes next."""
    rows = tuple(row._replace(owner=None) if row.owner == number else row for row in state.rows)
    freed = state._replace(rows=rows, lock=None if state.lock == number else state.lock, faults=state.faults - 1)
    return _with(freed, number, Process(tries=state.processes[number].tries))
