"""
The model of prompts: one job, two workers who may both believe that it is theirs, one ComfyUI (I11, I12, I13).

What can go wrong: the answer to a prompt that was sent is lost, or the prompt itself; the server cannot be asked; it
restarts, and has neither queue nor history; a worker is killed, or sleeps until its lease is over and goes on then.
What another worker had sent may be read late by the server, though before the second of two searches: that is what the
pause between them is for.

Left out: a worker sleeps after it has read its own word back from the database, and before the prompt leaves
(`FRESH_SECONDS` bounds how old that word is; only the server could refuse such a prompt).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from runcomfy.domain.evidence import LOOKS_THAT_MISS, Whereabouts, needs_new_name, whereabouts
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import HistoryEntry, QueueView
from runcomfy.domain.progress_fold import Polled
from runcomfy.domain.protocol.search import Step
from runcomfy.domain.queued import Phase, QueueStatus, is_held_by

AT_A_SERVER: Final = (Phase.SUBMITTING, Phase.SUBMITTED)


class Row(NamedTuple):
    """The job, as the database has it."""

    status: QueueStatus = QueueStatus.PENDING
    token: int = 0
    phase: Phase = Phase.NONE
    prompt: int = 0


class Server(NamedTuple):
    """A ComfyUI: what it holds and what it has run. A name that stands twice was taken twice."""

    queue: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    coming: tuple[tuple[int, int], ...] = ()
    """Prompts that were sent and are not read yet, with who sent them (-1: nobody hears the answer)."""


class Worker(NamedTuple):
    """One process, with what it remembers of its claim."""

    at: str = "idle"
    """idle, looks, looks in history, writes, sends, waits, hears, watches, takes, dead."""
    token: int = 0
    prompt: int = 0
    accepted: bool = False
    misses: int = 0
    watching: bool = False
    """Whether it looks for what it has sent itself."""


class State(NamedTuple):
    """Everything there is."""

    row: Row = Row()
    workers: tuple[Worker, ...] = (Worker(), Worker())
    server: Server = Server()
    commits: int = 0
    named: int = 0
    claims: int = 0
    faults: int = 2


@dataclass(frozen=True, slots=True)
class Submits:
    """The protocol, and what could be done differently: each field set is a design that is rejected."""

    faults: int = 2
    sends_again_without_looking: bool = False
    takes_a_new_name_each_time: bool = False
    believes_one_miss: bool = False
    reads_the_history_first: bool = False
    takes_no_answer_for_a_miss: bool = False
    writes_after_sending: bool = False
    commits_without_a_fence: bool = False
    sends_without_a_fence: bool = False

    def start(self) -> State:
        """Return the state in which the job was just accepted."""
        return State(faults=self.faults)

    def broken(self, state: State) -> str:
        """Return the invariant that is broken."""
        server = state.server
        if state.commits > 1:
            return "I11: two attempts have committed a result"
        both = server.queue + server.history
        if len(set(both)) < len(both):
            return "I13: the same prompt is taken twice"
        if len(server.queue) > 1:
            return "I12: two prompts of the job wait or run at the same time"
        return ""

    def ended(self, state: State) -> bool:
        """Whether the job is done, and nothing of it waits or runs."""
        return state.row.status is QueueStatus.DONE and not state.server.queue and not state.server.coming

    # -- what can happen ---------------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[Step]:
        """Return everything that can happen next."""
        yield from self._server(state)
        for number, worker in enumerate(state.workers):
            yield from self._worker(state, number, worker)
            mine = state.row.status is QueueStatus.PROCESSING and state.row.token == worker.token
            if worker.at in ("idle", "dead") or not state.faults:
                continue
            dead = _with(_fault(state), number, Worker("dead"))
            coming = tuple((name, -1 if by == number else by) for name, by in state.server.coming)
            yield Step(
                f"{_name(number)} is killed", dead._replace(server=state.server._replace(coming=coming)), fault=True
            )
            if mine and worker.at != "sends":
                slept = _fault(_back(state))
                yield Step(f"{_name(number)} sleeps, and its lease is over", slept, fault=True)
        held = any(worker.token == state.row.token and worker.at not in ("dead", "idle") for worker in state.workers)
        if state.row.status is QueueStatus.PROCESSING and not held:
            yield Step("the lease of the job is over", _back(state))

    def _server(self, state: State) -> Iterator[Step]:
        server = state.server
        for sent in server.coming:
            prompt, by = sent
            left = tuple(other for other in server.coming if other != sent)
            read = state._replace(server=server._replace(coming=left, queue=(*server.queue, prompt)))
            yield Step(f"the server takes prompt {prompt}", self._hears(read, by, at="hears") if by >= 0 else read)
            lost = state._replace(server=server._replace(coming=left))
            if by < 0:
                yield Step(f"prompt {prompt} never arrives", lost)
            elif state.faults:
                looks = self._hears(_fault(read), by, at="looks")
                yield Step(f"the server takes prompt {prompt}; the answer is lost", looks, fault=True)
                looks = self._hears(_fault(lost), by, at="looks")
                yield Step(f"prompt {prompt} is lost on its way", looks, fault=True)
        if server.queue:
            prompt, *rest = server.queue
            ran = server._replace(queue=tuple(rest), history=(*server.history, prompt))
            yield Step(f"prompt {prompt} has run", state._replace(server=ran))
        if state.faults and (server.queue or server.history):
            empty = server._replace(queue=(), history=())
            yield Step("the server restarts, and remembers nothing", _fault(state._replace(server=empty)), fault=True)

    def _hears(self, state: State, number: int, *, at: str) -> State:
        worker = state.workers[number]
        return _with(state, number, worker._replace(at=at, misses=0, watching=True))

    def _worker(self, state: State, number: int, worker: Worker) -> Iterator[Step]:
        who = _name(number)
        if worker.at in ("idle", "dead"):
            # Each fault sends the job back once at most.
            if state.row.status is QueueStatus.PENDING and state.claims <= self.faults:
                yield self._claims(state, number)
        elif worker.at in ("looks", "looks in history"):
            yield from self._looks(state, number, worker)
        elif worker.at == "writes":
            yield self._writes(state, number, worker)
        elif worker.at == "sends":
            coming = (*state.server.coming, (worker.prompt, number))
            sent = state._replace(server=state.server._replace(coming=coming))
            yield Step(f"{who} sends prompt {worker.prompt}", _with(sent, number, worker._replace(at="waits")))
        elif worker.at == "hears":
            heard = self._fenced(state, number, worker._replace(at="looks", accepted=True), phase=Phase.SUBMITTED)
            yield Step(f"{who} writes that prompt {worker.prompt} was accepted", heard)
        elif worker.at == "takes":
            yield self._commits(state, number, worker)

    def _claims(self, state: State, number: int) -> Step:
        row = state.row._replace(status=QueueStatus.PROCESSING, token=state.row.token + 1)
        worker = Worker("looks", row.token, row.prompt, accepted=row.phase is not Phase.SUBMITTING)
        named = state.named
        if row.phase not in AT_A_SERVER or self.takes_a_new_name_each_time:
            named += 1
            worker = worker._replace(at="writes", prompt=named, accepted=False)
        elif self.sends_again_without_looking:
            worker = worker._replace(at="writes")
        claimed = state._replace(row=row, named=named, claims=state.claims + 1)
        return Step(f"{_name(number)} claims the job (token {row.token})", _with(claimed, number, worker))

    def _fenced(self, state: State, number: int, worker: Worker, *, phase: Phase, fence: bool = True) -> State:
        """Write a step of the run under the fence; who holds the job no more stops."""
        if fence and not is_held_by(state.row.status, state.row.token, worker.token):
            return _with(state, number, Worker())
        row = state.row._replace(phase=phase, prompt=0 if phase is Phase.NONE else worker.prompt)
        return _with(state._replace(row=row), number, worker)

    def _writes(self, state: State, number: int, worker: Worker) -> Step:
        words = f"{_name(number)} writes that it sends prompt {worker.prompt}"
        sends = worker._replace(at="sends", misses=0)
        if self.writes_after_sending:
            return Step(f"{_name(number)} goes to send prompt {worker.prompt}", _with(state, number, sends))
        fence = not self.sends_without_a_fence
        return Step(words, self._fenced(state, number, sends, phase=Phase.SUBMITTING, fence=fence))

    def _looks(self, state: State, number: int, worker: Worker) -> Iterator[Step]:
        first, second = ("queue", "history")
        if self.reads_the_history_first:
            first, second = second, first
        reading = first if worker.at == "looks" else second
        words = f"{_name(number)} looks for prompt {worker.prompt} in the {reading}"
        if worker.misses and any(by != number for _, by in state.server.coming):
            return  # the pause between two searches: what somebody else had sent is read, or was lost, by then
        at = _found(reading, state.server.queue, state.server.history, worker.prompt)
        yield Step(f"{words}: {at.name.lower()}", self._judged(state, number, worker, at))
        if state.faults:
            if self.takes_no_answer_for_a_miss:
                after = self._judged(_fault(state), number, worker._replace(at="looks in history"), Whereabouts.MISSED)
            elif worker.watching:
                after = _with(_fault(state), number, worker._replace(at="looks"))
            else:
                after = _with(_back(_fault(state), worker.token), number, Worker())
            yield Step(f"{words}: no answer", after, fault=True)

    def _judged(self, state: State, number: int, worker: Worker, at: Whereabouts) -> State:
        if at is Whereabouts.ENDED:
            return _with(state, number, worker._replace(at="takes"))
        if at is Whereabouts.HELD:
            watches = worker._replace(at="looks", misses=0, watching=True, accepted=True)
            return self._fenced(state, number, watches, phase=Phase.SUBMITTED)
        if worker.at == "looks":
            return _with(state, number, worker._replace(at="looks in history"))
        misses = worker.misses + 1
        if misses < (1 if self.believes_one_miss else LOOKS_THAT_MISS):
            return _with(state, number, worker._replace(at="looks", misses=misses))
        return self._is_nowhere(state, number, worker)

    def _is_nowhere(self, state: State, number: int, worker: Worker) -> State:
        """The prompt is proven to be on no server; one that may have run is not sent again under its name."""
        writes = worker._replace(at="writes", misses=0, watching=False)
        named = state.named
        if needs_new_name(accepted=worker.accepted, unwanted=False, lost=worker.accepted):
            named += 1
            writes = writes._replace(prompt=named, accepted=False)
        return self._fenced(state._replace(named=named), number, writes, phase=Phase.NONE)

    def _commits(self, state: State, number: int, worker: Worker) -> Step:
        who = _name(number)
        if not self.commits_without_a_fence and not is_held_by(state.row.status, state.row.token, worker.token):
            return Step(f"{who} comes too late; its result is discarded", _with(state, number, Worker()))
        row = state.row._replace(status=QueueStatus.DONE, phase=Phase.NONE, prompt=0)
        done = state._replace(row=row, commits=state.commits + 1)
        return Step(f"{who} commits the result", _with(done, number, Worker()))


# -- the code's own decision ---------------------------------------------------------------------------------------


@lru_cache(maxsize=10_000)
def _found(reading: str, queue: tuple[int, ...], history: tuple[int, ...], prompt: int) -> Whereabouts:
    """Judge one of the two reads of a search: the other has said nothing."""
    name = PromptId(str(prompt))
    if reading == "queue":
        ids = tuple(PromptId(str(other)) for other in queue)
        return whereabouts(Polled(QueueView(running=ids[:1], pending=ids[1:]), None), name)
    ended = HistoryEntry(name, {}, "success") if prompt in history else None
    return whereabouts(Polled(QueueView(running=(), pending=()), ended), name)


# -- states from states --------------------------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"worker {'AB'[number]}"


def _fault(state: State) -> State:
    return state._replace(faults=state.faults - 1)


def _with(state: State, number: int, worker: Worker) -> State:
    return state._replace(workers=tuple(worker if n == number else other for n, other in enumerate(state.workers)))


def _back(state: State, token: int | None = None) -> State:
    """The job waits again, with the prompt that it may have."""
    if state.row.status is not QueueStatus.PROCESSING or token not in (None, state.row.token):
        return state
    return state._replace(row=state.row._replace(status=QueueStatus.PENDING))
