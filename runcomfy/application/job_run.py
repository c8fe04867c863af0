"""
One claimed job, from claim to the line that says how it ended.

The orchestrator does the job; this decides what follows (`domain.retry`) and writes it down under the claim's fence.
A run that is cut says first why: that decides whether its prompt goes on running for the next worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum, auto
from typing import Any, Final, Protocol

from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.gate import Gate
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.journal import Journal
from runcomfy.application.placing import OWN_MACHINE, POOL_MACHINE, JobFacts, Place, PlaceFactory
from runcomfy.application.store_journal import StoreJournal
from runcomfy.domain import retry
from runcomfy.domain.exceptions import (
    JobFileInvalid,
    LeaseLost,
    LocalError,
    MachineFailed,
    MachineLost,
    PromptRemoved,
    RunComfyError,
    ServerRestarted,
    WorkerDead,
    foreign_text,
)
from runcomfy.domain.job import JobRequest, JobResult
from runcomfy.domain.progress import Progress
from runcomfy.domain.queued import Ending, Outcome, QueuedJob, QueueStatus, Reason, RowId
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.queue")


class RunsJobs(Protocol):
    """What does a job: `RunComfyOrchestrator`."""

    async def run(
        self,
        request: JobRequest,
        *,
        on_progress: Callable[[Progress], None] | None = None,
        cancel: asyncio.Event | None = None,
        journal: Journal | None = None,
        at: PlaceFactory | None = None,
    ) -> JobResult:
        """Do the job; what goes wrong with it is in the result."""
        ...


class Why(Enum):
    """Why a run is cut."""

    CANCELLED = auto()
    """A user ended the job: the prompt is interrupted."""
    LOST = auto()
    """The job is somebody else's by now: the prompt is theirs, too."""
    DRAIN = auto()
    """This process ends: the job goes back to the queue, its prompt runs on where the server stays."""
    TAKEN_BACK = auto()
    """It waited its turn at a machine and is better begun elsewhere, or later: it goes back to the queue at no cost."""


_WORDS: Final = {
    Why.CANCELLED: str(Outcome.CANCELLED),
    Why.LOST: str(Outcome.DISCARDED),
    Why.DRAIN: str(Outcome.PUT_BACK),
    Why.TAKEN_BACK: str(Outcome.PUT_BACK),
}
"""How a run that was cut leaves its place."""
EXCUSES: Final = 3
"""How often in a row a machine of the pool may fail a job that had sent nothing there yet, at no cost to the job."""
LEAVES_IN_DOUBT: Final = (MachineLost, MachineFailed, WorkerDead)
"""After these nobody knows what a prompt does that was sent to a machine of the pool, until that is seen gone."""
FLAPS_EXCUSED: Final = 6
"""How often in a row a machine of the pool may be not Ready for a while under a job, at no cost to the job."""
EXCUSED_DELAY: Final = timedelta(seconds=2)
"""How long such a job waits: the machine is found to be ill meanwhile."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every run of an executor works with."""

    store: JobStore
    settings: QueueSettings
    orchestrator: RunsJobs
    at: PlaceFactory
    places: Callable[[], Collection[str]]
    """The keys of the places that can be gone to now."""
    pulse: Pulse
    policy: retry.RetryPolicy
    draw: retry.Draw
    gate: Gate
    reached: Callable[[], None]
    """Called when a run has a server that takes prompts."""
    trouble: Callable[[LocalError | None], None]
    """Called with what the database refuses, and with None when it works again."""
    leaving: Callable[[], bool]
    """Whether this process is to end at once."""
    tell: Callable[[str], None]
    excused: Counter[RowId] = field(default_factory=Counter)
    """How often in a row a job was put back because machines failed before it had sent anything."""


class JobRun:
    """One attempt. `await run()` ends when everything is written that can be."""

    def __init__(self, bench: Bench, row: QueuedJob) -> None:
        self._bench = bench
        self.row = row
        self.cancel = asyncio.Event()
        self.why: Why | None = None
        self.ending = False
        """Whether its end is being written: what the store says of the claim from now on is our own doing."""
        self.unwritten = False
        """Whether its end could not be written down, so that the claim stays open."""
        self.failed = False
        """Whether the job ended with it, as failed or quarantined."""
        self.progress: tuple[float, str] | None = None
        """Percent and words that were not reported yet."""
        self._asked_back = False
        """Whether the server was told to take the waiting prompt out of its queue."""
        self._withdrawn = False
        """Whether it has: the prompt is proven to be nowhere, and never ran."""
        self._place: Place | None = None
        self.journal = StoreJournal(
            bench.store,
            row,
            bench.pulse,
            leaves=self._leaves,
            here=lambda: self._place.key if self._place is not None else "",
            reached=bench.reached,
            trouble=bench.trouble,
            leaving=bench.leaving,
            kill_limit=bench.settings.kill_limit,
            excused=lambda: bench.excused[row.id] > 0,
        )

    @property
    def key(self) -> tuple[int, int]:
        """Names the claim: the same job may be claimed again while an older run of it still ends."""
        return self.row.id, self.row.token

    def cut(self, why: Why) -> None:
        """End the run in good order; the first reason counts, but for a lost claim, which outranks all."""
        if self.why is None or why not in (Why.DRAIN, Why.TAKEN_BACK):
            self.why = why
        self.cancel.set()

    @property
    def can_go_back(self) -> bool:
        """Whether taking it back may be tried: it ends for no other reason, and nothing of it is on its way."""
        journal = self.journal
        on_its_way = journal.touched and journal.sent is None
        # Taken back before it has looked for the prompt that is there, it would be claimed again at once, for ever.
        unasked = journal.earlier is not None and not journal.touched
        return self.why is None and not (self.ending or self._asked_back or on_its_way or unasked)

    async def take_back(self) -> bool:
        """Give the job back to the queue if its prompt has not begun to compute; False if it goes on as it is."""
        if not self.can_go_back:
            return False
        prompt_id, place = self.journal.sent, self._place
        if prompt_id is not None and place is not None:
            self._asked_back = True
            try:
                self._withdrawn = await place.server.withdraw(prompt_id)
            except RunComfyError as error:  # whether it is still there is found out by whoever watches it
                log.warning("prompt_not_withdrawn", extra={"fields": {"job": self.row.uid, "error": error.code}})
                return False
            if not self._withdrawn:
                self._asked_back = False
                return False
        self.cut(Why.TAKEN_BACK)
        return True

    async def run(self) -> None:
        """Do the job and write down what came of it."""
        row = self.row
        log.info("job_begun", extra={"fields": {"job": row.uid, "row": row.id, "token": row.token}})
        try:
            result = await self._bench.orchestrator.run(
                await self._request(), on_progress=self._note, cancel=self.cancel, journal=self.journal, at=self._at
            )
            error: RunComfyError | None = result.exception if isinstance(result.exception, RunComfyError) else None
        except RunComfyError as refused:  # before anything was begun
            error = refused
        self.ending = True
        if self.journal.done is not None:
            self._bench.excused.pop(self.row.id, None)
            self._tell_done(self.journal.done)
            return
        await finish(self._conclude(error or RunComfyError("the run ended without a result and without an error")))
        faultpoint("queue.ended")

    async def _request(self) -> JobRequest:
        row, settings = self.row, self._bench.settings
        if row.request is None:
            raise JobFileInvalid(
                "the row says nothing of what to run",
                hint="put jobs in with `comfyctl queue add FILE`, a job file, or JobQueue.enqueue",
            )
        request = row.request
        earlier = dict(request.earlier_outputs)
        if request.out_file is not None:
            for attempt in await self._bench.store.attempts(row.id):
                for output in attempt.result.get("outputs", ()):
                    earlier[str(output["path"])] = str(output["sha256"])
        return replace(
            request,
            job_id=row.uid,
            user=row.user or request.user,
            project=row.project or request.project,
            timeout=request.timeout or settings.job_timeout,
            out_dir=request.out_dir or settings.jobs_finished,
            earlier_outputs=earlier,
        )

    @asynccontextmanager
    async def _at(self, **options: Any) -> AsyncIterator[Place]:
        row = self.row
        facts = JobFacts(row.workflow_id, row.token, row.user, row.project)
        async with self._bench.at(**options, facts=facts) as place:
            self._place = place
            try:
                yield place
            except BaseException:
                place.outcome = self._left_as()
                raise

    def _left_as(self) -> str:
        """Return the word for how a run that is broken off leaves its place; empty: what went wrong says it."""
        if self.journal.done is not None:
            return str(Outcome.DONE)  # the result stands, whatever came after
        return _WORDS.get(self.why, "") if self.why is not None else ""

    def _note(self, progress: Progress) -> None:
        self.progress = progress.percent, foreign_text(progress.message or progress.step)

    # -- prompts that are left running ---------------------------------------------------------------------

    @property
    def _server_stays(self) -> bool:
        """Whether the server goes on existing without this run; one that was not reached is not ours to end."""
        place = self._place
        if place is not None and place.kind == POOL_MACHINE:
            return place.seat.server_stays and (place.outlives or self.why is not Why.DRAIN)
        if place is None or place.kind != OWN_MACHINE:
            return True
        return self.why is not Why.DRAIN and place.key in self._bench.places()

    @property
    def _may_run_on(self) -> bool:
        """Whether a prompt of the job may run on at a machine of the pool that nobody reaches any more.

        No other run begins before that one has ended or the machine is seen gone (I12): the row keeps the prompt.
        """
        place, journal = self._place, self.journal
        if place is None or place.kind != POOL_MACHINE or place.seat.server_gone:
            return False
        return journal.touched or journal.earlier is not None

    def _leaves(self, error: BaseException) -> bool:
        if self._withdrawn or (self._place is not None and self._place.seat.void):
            return True  # nobody can be told there; whoever claims the job next sees what became of it
        if isinstance(error, RunComfyError) and retry.kind_of(error) is not retry.Kind.OURS:
            return self._bench.policy.keeps_prompt(error, server_stays=self._server_stays)
        if self.why is Why.DRAIN:
            return self._server_stays
        return isinstance(error, LeaseLost) or self.why is Why.LOST

    def _keeps(self, error: RunComfyError) -> bool:
        if self._withdrawn:
            return False
        if self.why is Why.TAKEN_BACK and self.journal.touched:
            return True  # it was sent in the very moment: the next attempt sees what became of it
        untouched = self.journal.earlier is not None and not self.journal.touched
        return untouched or (self.journal.touched and self._leaves(error))

    # -- the end -------------------------------------------------------------------------------------------

    async def _conclude(self, error: RunComfyError) -> None:
        """Write down how the run ended, or leave it to the next owner if nothing can be written."""
        if isinstance(error, LeaseLost) or self.why in (Why.LOST, Why.CANCELLED):
            await self._discard()
            return
        row: QueuedJob | None = None
        try:
            ending = await self._ending(error)
        except LeaseLost:
            await self._discard()
            return

        async def write() -> None:
            nonlocal row
            row = await self._bench.store.finish(self.row.id, self.row.token, ending)

        async def stands() -> bool:
            attempts = await self._bench.store.attempts(self.row.id)
            return any(a.token == self.row.token and a.outcome is ending.outcome for a in attempts)

        try:
            await self.journal.insist(write, stands)
        except LeaseLost:
            await self._discard()
        except LocalError as refused:
            self.unwritten = True
            self._tell(f"how it ended could not be written down ({refused.message}); the next worker goes on with it")
        else:
            self._tell_ending(ending, error, row)

    async def _ending(self, error: RunComfyError) -> Ending:
        facts = error.as_dict()
        if self._asked_back and isinstance(error, PromptRemoved):
            self._withdrawn = True  # that was us: the watch has found out first
        if self._withdrawn:
            return Ending(Outcome.PUT_BACK)
        if (excused := self._excused(error)) is not None:
            return excused
        if retry.kind_of(error) is retry.Kind.OURS:
            return Ending(Outcome.PUT_BACK, keeps_prompt=self._keeps(error))
        # A machine that was ended at the end of its lease did not die of the job.
        outran = self._place is not None and self._place.seat.outran
        decision = self._decide(error, outran=outran)
        # A prompt of an earlier attempt that this one did not get to is not forgotten by a failure of its own.
        gone = self._place is not None and self._place.seat.server_gone
        left = self.journal.earlier is not None and not self.journal.touched and not gone
        ends = isinstance(decision, retry.Retry | retry.Fail | retry.Quarantine) and decision.end_prompt
        runs_on = self._may_run_on and (ends or isinstance(error, LEAVES_IN_DOUBT))
        ends = ends and self._server_stays  # a machine that is gone takes its prompts along
        match decision:
            case retry.Pause():
                # What a worker misses that slept through its lease, its successor took away: no fault of the place.
                await self._insist_on_claim()
                await self._bench.gate.pause(decision, error)  # first, or the job would be claimed again at once
                return Ending(
                    Outcome.PUT_BACK, error=facts, keeps_prompt=self._keeps(error), killed_machine=self.journal.killed
                )
            case retry.StoreTrouble() | retry.Stopped():
                return Ending(Outcome.PUT_BACK, error=facts, keeps_prompt=self._keeps(error))
            case retry.Quarantine():
                return Ending(
                    Outcome.QUARANTINED,
                    error=facts,
                    reason=Reason.QUARANTINED,
                    killed_machine=True,
                    end_prompt=ends,
                )
            case retry.Retry():
                return Ending(
                    Outcome.REQUEUED,
                    error=facts,
                    delay=decision.delay,
                    killed_machine=(decision.killed_machine or self.journal.killed) and not outran,
                    end_prompt=ends or left or runs_on,
                )
            case retry.Fail():
                return Ending(
                    Outcome.FAILED,
                    error=facts,
                    killed_machine=(decision.killed_machine or self.journal.killed) and not outran,
                    end_prompt=ends or left,
                )

    def _decide(self, error: RunComfyError, *, outran: bool) -> retry.Decision:
        """Return what follows by the usual rules. `outran`: the machine was ended at the end of its lease."""
        bench, row = self._bench, self.row
        return bench.policy.decide(
            error,
            submitted=self.journal.touched or self.journal.killed,
            server_stays=self._server_stays,
            retries_attempted=row.retries_attempted,
            retry_limit=row.retry_limit,
            kill_count=0 if outran else row.kill_count + (self.journal.killed and self.journal.touched),
            pauses=bench.gate.in_a_row,
            draw=bench.draw,
        )

    def _excused(self, error: RunComfyError) -> Ending | None:
        """Return how a run ends that a machine of the pool has failed without its doing; None: by the usual rules."""
        place, journal, excused = self._place, self.journal, self._bench.excused
        keeps = self._may_run_on and not isinstance(error, ServerRestarted)
        if place is not None and place.seat.unpaid and retry.kind_of(error) is retry.Kind.BUDGET:
            return Ending(Outcome.PUT_BACK, error=error.as_dict(), keeps_prompt=keeps)
        fault = retry.kind_of(error) in (retry.Kind.KILLED, retry.Kind.UNREACHABLE)
        if place is None or place.kind != POOL_MACHINE or not fault:
            excused.pop(self.row.id, None)
            return None
        if journal.sent is not None and place.seat.waited:
            # Another one's prompt was computing.
            excused[self.row.id] = max(1, excused[self.row.id])
            return Ending(Outcome.PUT_BACK, error=error.as_dict(), keeps_prompt=keeps)
        if place.seat.flapped and excused[self.row.id] < FLAPS_EXCUSED:
            # It did not die, and what is ill is the machine: the pool replaces one that does so again and again.
            excused[self.row.id] += 1
            return Ending(Outcome.PUT_BACK, error=error.as_dict(), delay=EXCUSED_DELAY, keeps_prompt=keeps)
        if journal.touched or journal.earlier is not None or excused[self.row.id] >= EXCUSES:
            excused.pop(self.row.id, None)
            return None
        excused[self.row.id] += 1
        return Ending(Outcome.PUT_BACK, error=error.as_dict(), delay=EXCUSED_DELAY)

    async def _insist_on_claim(self) -> None:
        """Raise LeaseLost if the claim is known to be over."""
        try:
            row = await self._bench.store.job(self.row.id)
        except LocalError as refused:
            self._bench.trouble(refused)
            return
        if row is None or (row.token, row.status) != (self.row.token, QueueStatus.PROCESSING):
            raise LeaseLost("the job is somebody else's by now", details={"job": self.row.uid})

    async def _discard(self) -> None:
        """Say that the run does not count. Its claim is gone, so nothing is written but that."""
        row: QueuedJob | None = None
        try:
            row = await self._bench.store.job(self.row.id)
        except LocalError as error:
            self._bench.trouble(error)
        fields = {"job": self.row.uid, "row": self.row.id, "token": self.row.token}
        if row is not None and row.status is QueueStatus.FAILED:
            log.info("job_cancelled", extra={"fields": fields})
            self._tell("cancelled")
            return
        log.warning("job_discarded", extra={"fields": fields})
        self._tell("another worker has taken it over meanwhile; what this one did is discarded")

    # -- words ---------------------------------------------------------------------------------------------

    def _tell(self, sentence: str) -> None:
        self._bench.tell(f"{self.row.config_name}: {sentence}")

    def _tell_done(self, row: QueuedJob) -> None:
        paths = [str(output.get("path", "")) for output in row.result.get("outputs", ())]
        seconds = f" in {row.duration:.1f} s" if row.duration is not None else ""
        log.info("job_done", extra={"fields": {"job": row.uid, "row": row.id, "token": self.row.token}})
        self._tell(f"done{seconds}: {', '.join(paths)}")

    def _tell_ending(self, ending: Ending, error: RunComfyError, row: QueuedJob | None) -> None:
        fields = {"job": self.row.uid, "row": self.row.id, "token": self.row.token, "error": error.code}
        log.info("job_run_over", extra={"fields": {**fields, "outcome": str(ending.outcome)}})
        self.failed = ending.outcome in (Outcome.FAILED, Outcome.QUARANTINED)
        match ending.outcome:
            case Outcome.REQUEUED:
                after = f"in {ending.delay.total_seconds():.0f} s"
                self._tell(f"{error.message}; tried again {after}")
            case Outcome.PUT_BACK:
                kept = "; its prompt runs on" if ending.keeps_prompt and self.why is Why.DRAIN else ""
                cause = f"{error.message}; " if ending.error and self._place is not None else ""
                self._tell(f"{cause}put back into the queue{kept}")
            case Outcome.QUARANTINED:
                self._tell(f"taken out of the queue: machines die under it ({error.message})")
            case _:
                self._tell(f"failed: {error.message}{f' ({error.hint})' if error.hint else ''}")
