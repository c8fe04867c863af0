"""
What a run of the queue writes down, each write under the fence of its claim.

The order is what makes a crash harmless: the prompt's id is committed before it is sent, the result's names are given
in the transaction that says `done`. What cannot be written because the database is locked or the disk is full is tried
again while the lease surely holds, and then left: the next owner finds the prompt by its id and takes its result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any, Final, TypeVar
from uuid import uuid4

from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.journal import EarlierPrompt, Publish
from runcomfy.domain.evidence import needs_new_name
from runcomfy.domain.exceptions import LeaseLost, LocalError, ServerRestarted, StoreUnavailable
from runcomfy.domain.job import Output, PromptId
from runcomfy.domain.queued import Ending, Outcome, Phase, QueuedJob
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.queue")

T = TypeVar("T")

AGAIN_FIRST_SECONDS: Final = 0.25
AGAIN_MOST_SECONDS: Final = 5.0
"""Between two tries of a write that the database refused."""


class _NotNamed(Exception):
    """The disk refused to name the results: that is the run's failure, not the database's."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class StoreJournal:
    """Keeps `runcomfy.application.journal.Journal` for one claim."""

    def __init__(
        self,
        store: JobStore,
        row: QueuedJob,
        pulse: Pulse,
        *,
        leaves: Callable[[BaseException], bool],
        here: Callable[[], str],
        reached: Callable[[], None],
        trouble: Callable[[LocalError | None], None],
        leaving: Callable[[], bool],
        kill_limit: int,
        excused: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        `leaves` answers `leaves_prompt`, `here` names the place the run is at. `reached` is called when the run has a
        server that takes prompts, `trouble` with the error when the database refuses a write and with None when it
        takes one, `leaving` says whether this process is to end at once, `excused` whether the last machine was not
        Ready for a while under the job: what it had is no more then, and the job has killed nothing.
        """
        self._store, self._pulse = store, pulse
        self._id, self._token = row.id, row.token
        self._leaves, self._here, self._reached = leaves, here, reached
        self._trouble, self._leaving = trouble, leaving
        self._excused, self._kills_left = excused, kill_limit - row.kill_count
        self._earlier = earlier_prompt(row)
        self._written = self._earlier.prompt_id if self._earlier else None
        self._name(self._earlier.prompt_id if self._earlier else _new_id())
        self.touched = False
        """Whether this run has a prompt on a server, or may have: sent, or found again."""
        self.sent: PromptId | None = None
        """The prompt that the server is known to have, by the name that it goes by there."""
        self.killed = False
        """Whether the server died under the earlier prompt."""
        self.done: QueuedJob | None = None
        """The row, once the result is committed."""

    def _name(self, prompt_id: PromptId) -> None:
        self._prompt_id = prompt_id
        self._random = Random(prompt_id)  # noqa: S311 - seeds of pictures, not secrets

    def random_int(self, low: int, high: int) -> int:
        """Draw a seed; which one follows from the prompt's id."""
        return self._random.randint(low, high)

    @property
    def earlier(self) -> EarlierPrompt | None:
        """What the row says of an earlier attempt's prompt."""
        return self._earlier

    @property
    def prompt_id(self) -> PromptId:
        """The earlier prompt's id while that one may exist or was never sent, else a new one."""
        return self._prompt_id

    async def submitting(self, prompt_id: PromptId, *, place: str) -> None:
        """Write the id and the place down. A prompt that never arrived and is sent again is no second run."""
        again = prompt_id == self._written

        async def write() -> None:
            await self._store.write_ahead(
                self._id, self._token, place=place, prompt_id=prompt_id, counts_as_run=not again
            )

        async def stands() -> bool:
            row = await self._store.job(self._id)
            return row is not None and (row.token, row.prompt_id, row.phase) == (
                self._token,
                prompt_id,
                Phase.SUBMITTING,
            )

        await self.insist(write, stands)
        self._written = prompt_id
        self.touched = True
        self._reached()

    async def accepted(self, prompt_id: PromptId) -> None:
        """Write that the server has it. Not worth ending the run for: who looks for it finds it by its id."""
        self.sent = prompt_id
        await self._try(lambda: self._store.accepted(self._id, self._token, prompt_id=prompt_id))
        faultpoint("queue.accepted")

    async def attached(self) -> None:
        """Write that this worker goes on with the prompt."""
        self.touched = True
        self.sent = self._prompt_id
        self._reached()
        await self._try(lambda: self._store.attached(self._id, self._token))

    async def gone(self, *, lost: bool) -> None:
        """Write that the earlier prompt is on no server. One that may have run is never sent under its id again.

        Raises ServerRestarted, too: nothing is run again of a job under which the last server died that it may kill.
        """
        earlier, unwanted = self._earlier, self._earlier is not None and self._earlier.unwanted
        lost = lost and not unwanted
        await self.insist(lambda: self._store.prompt_gone(self._id, self._token, lost=lost), self._no_prompt)
        self._earlier = None
        if earlier is None or needs_new_name(accepted=earlier.accepted, unwanted=unwanted, lost=lost):
            self._name(_new_id())
        if earlier is not None and lost and earlier.place == self._here() and not self._excused():
            self.killed = True
            if self._kills_left <= 1:
                raise ServerRestarted(
                    "ComfyUI restarted once more while the prompt waited or ran",
                    hint="look for a crash in the server's log; `comfyctl queue retry` runs the job again",
                    details={"prompt_id": earlier.prompt_id},
                )

    def leaves_prompt(self, error: BaseException) -> bool:
        """Ask the run why it ends."""
        return self._leaves(error)

    async def commit(self, publish: Publish, outputs: tuple[Output, ...], facts: Mapping[str, Any]) -> None:
        """Write `done` and have the results named, in one transaction; find out what became of it if that is unclear.

        Raises LeaseLost, and what the database said if the result was not taken.
        """
        result = {**facts, "outputs": [{**output.as_dict(), "name": output.name} for output in outputs]}
        ending = Ending(Outcome.DONE, result=result)
        faultpoint("queue.committing")
        named: list[Exception | None] = []

        def name_once() -> None:
            if named:  # it was the record that failed
                return
            try:
                publish()
            except Exception as error:
                named.append(error)
                raise
            named.append(None)

        async def write() -> None:
            try:
                self.done = await self._store.finish(self._id, self._token, ending, publish=name_once)
            except LocalError as error:
                if named and named[0] is not None:
                    raise _NotNamed(named[0]) from error
                raise

        try:
            await self.insist(write, self._committed)
        except _NotNamed as error:
            raise error.cause from None
        except LocalError as error:
            if isinstance(error, StoreUnavailable) and await self._found_committed():
                return
            raise

    # -- writes that are refused ---------------------------------------------------------------------------

    async def insist(self, write: Callable[[], Awaitable[T]], stands: Callable[[], Awaitable[bool]]) -> None:
        """Write; while the lease surely holds, try again what the database refuses.

        `stands` finds out whether a refused write was kept all the same (its answer may be what was lost).
        Raises LeaseLost, and the last refusal.
        """
        wait, refused = AGAIN_FIRST_SECONDS, False
        while True:
            try:
                if not (refused and await stands()):
                    await write()
            except LeaseLost:
                raise
            except LocalError as error:
                refused = True
                self._trouble(error)
                if not self._pulse.fresh or self._leaving():
                    raise
            else:
                if refused:
                    self._trouble(None)
                return
            await asyncio.sleep(wait)
            wait = min(wait * 2, AGAIN_MOST_SECONDS)

    async def _try(self, write: Callable[[], Awaitable[None]]) -> None:
        try:
            await write()
        except LeaseLost:
            raise
        except LocalError as error:
            self._trouble(error)

    async def _no_prompt(self) -> bool:
        row = await self._store.job(self._id)
        return row is not None and row.token == self._token and row.phase is Phase.NONE

    async def _committed(self) -> bool:
        """Whether this very attempt is the one that is done; the row itself may be somebody else's by now."""
        attempts = await self._store.attempts(self._id)
        kept = any(attempt.token == self._token and attempt.outcome is Outcome.DONE for attempt in attempts)
        if kept and self.done is None:
            self.done = await self._store.job(self._id)
        return kept

    async def _found_committed(self) -> bool:
        """Ask until it is known, for names are taken back on a no.

        A process that is told to leave before leaves the names as they are: if they do not count, the next attempt
        of the job finds them in its way and goes round them; results that count and are gone would be worse.
        """
        wait = AGAIN_FIRST_SECONDS
        while True:
            try:
                return await self._committed()
            except LocalError as error:
                self._trouble(error)
                if self._leaving():
                    log.error("commit_unclear", extra={"fields": {"row": self._id, "token": self._token}})
                    return True
            await asyncio.sleep(wait)
            wait = min(wait * 2, AGAIN_MOST_SECONDS)


def earlier_prompt(row: QueuedJob) -> EarlierPrompt | None:
    """Return the prompt that an earlier attempt left, as the row has it."""
    if row.phase is Phase.NONE or not row.prompt_id or not row.place:
        return None
    return EarlierPrompt(
        prompt_id=row.prompt_id,
        place=row.place,
        accepted=row.phase is not Phase.SUBMITTING,
        unwanted=row.phase is Phase.ENDING,
    )


def _new_id() -> PromptId:
    return PromptId(str(uuid4()))
