"""
The prompt of one run on one server: sent, or found again after a crash; watched; taken back when nobody wants it.

A prompt outlives the process that sent it. So before anything is sent the run's journal is asked for an earlier one,
and the server is asked what became of it, in the order queue, then history: a prompt that ends in between is then not
taken for lost. Only what is missed twice in a row, a moment apart, is not there (I12, I13). A server that cannot be
asked decides nothing: its error goes to the caller, and the journal stays as it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.journal import EarlierPrompt, Journal
from runcomfy.application.placing import OWN_MACHINE, POOL_MACHINE, Place
from runcomfy.application.watcher import Ended, Watcher
from runcomfy.domain.evidence import LOOKS_THAT_MISS, Whereabouts, whereabouts
from runcomfy.domain.exceptions import RunComfyError, WorkerDead
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import NodeLabel, Progress
from runcomfy.domain.progress_fold import Polled
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.orchestrator")

CANCEL_WITHIN: Final = timedelta(seconds=15)
"""How long the server may take to be told that a prompt is no longer wanted; it may be the server that hangs."""
LOOK_GAP_SECONDS: Final = 1.5
"""Between two searches: a request that a dead process had sent may be read late and still be queued by then."""
CANCEL_AGAIN_SECONDS: Final = 5.0
"""How often a prompt that does not end is told again to."""
END_POLL_SECONDS: Final = 0.25
OBEYS_WITHIN: Final = timedelta(minutes=5)
"""A node looks up between its steps, and hardly any step takes minutes. One that does not then stands still for ever:
its machine can only be ended, and bills until it is."""
FRESH_SECONDS: Final = 5.0
"""How old the journal's word may be when a prompt is sent: a process that was suspended in between may have lost the
job meanwhile, and its prompt would run beside its successor's."""


async def look_up(server: ComfyUI, prompt_id: PromptId) -> Polled:
    """Ask once where a prompt is: queue first, then history. Raises ServerUnreachable, NotComfyUI."""
    queue = await server.queue()
    waits_or_runs = prompt_id in queue.running or prompt_id in queue.pending
    return Polled(queue, None if waits_or_runs else await server.history(prompt_id))


async def find_prompt(server: ComfyUI, prompt_id: PromptId) -> Polled | None:
    """Return what the server says of a prompt that waits, runs or has ended; None if it proves to have none such."""
    for number in range(LOOKS_THAT_MISS):
        if number:
            await asyncio.sleep(LOOK_GAP_SECONDS)
        found = await look_up(server, prompt_id)
        if whereabouts(found, prompt_id) is not Whereabouts.MISSED:
            return found
    return None


async def end_prompt(server: ComfyUI, prompt_id: PromptId, *, alone: bool) -> None:
    """Take a prompt back by its id and return when it is seen ended: in the history, or missed twice in a row.

    Waits for as long as it runs; whoever has less patience puts a limit around it. Raises ServerUnreachable.
    """
    loop = asyncio.get_running_loop()
    next_call = loop.time()
    misses = 0
    while True:
        at = whereabouts(await look_up(server, prompt_id), prompt_id)
        if at is Whereabouts.ENDED:
            return
        if at is Whereabouts.HELD:
            misses = 0
            if loop.time() >= next_call:
                await server.cancel(prompt_id, alone=alone)
                next_call = loop.time() + CANCEL_AGAIN_SECONDS
            await asyncio.sleep(END_POLL_SECONDS)
            continue
        misses += 1
        if misses >= LOOKS_THAT_MISS:
            return
        await asyncio.sleep(LOOK_GAP_SECONDS)


@dataclass(frozen=True, slots=True)
class Prompting:
    """What one run does with its prompt at its place."""

    place: Place
    journal: Journal
    watcher: Watcher
    tell: Callable[[str], None]
    """Takes a sentence for the user."""
    named: Callable[[PromptId], None]
    """Told the prompt's id whenever it is (newly) known."""
    on_progress: Callable[[Progress], None] | None = None

    async def find_earlier(self) -> Polled | None:
        """Return what became of the prompt of an attempt that was cut off, if this run is to go on with it.

        Otherwise it is proven to be on no server, or is at another place, and the journal says so. Raises LeaseLost,
        ServerUnreachable, NotComfyUI; WorkerDead if a machine of ours neither ends it nor does anything else.
        """
        earlier = self.journal.earlier
        if earlier is None:
            return None
        if earlier.place != self.place.key:
            await self.journal.gone(lost=True)
            return None
        if earlier.unwanted:
            await self._see_ended(earlier.prompt_id)
            await self.journal.gone(lost=False)
            return None
        found = await find_prompt(self.place.server, earlier.prompt_id)
        if found is None:
            _log_earlier("prompt_not_found", earlier)
            await self.journal.gone(lost=earlier.accepted)
            return None
        _log_earlier("prompt_found", earlier)
        self.named(earlier.prompt_id)
        faultpoint("prompt.found")
        await self.journal.attached()
        return found

    async def _see_ended(self, prompt_id: PromptId) -> None:
        """Take a prompt back and see it ended: within a time on a machine of ours, in its own time on a user's."""
        ours = self.place.kind in (OWN_MACHINE, POOL_MACHINE)
        try:
            async with asyncio.timeout(OBEYS_WITHIN.total_seconds() if ours else None):
                await end_prompt(self.place.server, prompt_id, alone=self.place.alone)
        except TimeoutError:
            raise WorkerDead(
                f"prompt {prompt_id} was interrupted and has not ended within {OBEYS_WITHIN.total_seconds():.0f} s",
                hint="nothing is to be done: the machine is replaced, the job runs on another one",
            ) from None

    async def attach(self, found: Polled, prompt_id: PromptId, labels: Mapping[str, NodeLabel]) -> Ended:
        """Watch a prompt that was found again until it has ended; raises what `Watcher.watch` raises."""
        self.place.seat.submitted(prompt_id)
        try:
            async with self.place.server.listen(prompt_id) as events:
                return await self.watcher.watch(
                    prompt_id,
                    labels,
                    events=events,
                    on_progress=self.on_progress,
                    found=found,
                    seat=self.place.seat,
                )
        except BaseException as error:
            await self._leave(error, prompt_id)
            raise

    async def send(
        self, graph: Mapping[str, Any], labels: Mapping[str, NodeLabel], submitted: Callable[[], None]
    ) -> Ended:
        """Write the prompt's id down, send it, and watch it until it has ended. `submitted` is called in between.

        Raises LeaseLost, PromptRejected, and what `Watcher.watch` raises. A prompt that may still run then is taken
        back, unless the journal says that somebody else goes on with it.
        """
        prompt_id = self.journal.prompt_id
        await self.place.seat.line_up()
        await self._write_ahead(prompt_id)
        self.named(prompt_id)
        faultpoint("prompt.written")
        try:
            async with self.place.server.listen(prompt_id) as events:
                answer = await self.place.server.submit(graph, prompt_id=prompt_id)
                prompt_id = answer.prompt_id
                self.named(prompt_id)
                self.place.seat.submitted(prompt_id)
                faultpoint("prompt.sent")
                await self.journal.accepted(prompt_id)
                submitted()
                return await self.watcher.watch(
                    prompt_id, labels, events=events, on_progress=self.on_progress, seat=self.place.seat
                )
        except BaseException as error:
            await self._leave(error, prompt_id)
            raise

    async def _write_ahead(self, prompt_id: PromptId) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await self.journal.submitting(prompt_id, place=self.place.key)
            if loop.time() - began <= FRESH_SECONDS:
                return

    async def _leave(self, error: BaseException, prompt_id: PromptId) -> None:
        if may_still_run(error) and not self.journal.leaves_prompt(error):
            await finish(self._take_back(prompt_id))

    async def _take_back(self, prompt_id: PromptId) -> None:
        server, place = self.place.server, self.place
        told = seen_gone = False
        try:
            async with asyncio.timeout(CANCEL_WITHIN.total_seconds()):
                told = await server.cancel(prompt_id, alone=place.alone)
                while told and place.kind != OWN_MACHINE and not seen_gone:
                    queue = await server.queue()
                    seen_gone = prompt_id not in (*queue.running, *queue.pending)
                    if not seen_gone:
                        await asyncio.sleep(END_POLL_SECONDS)
        except (RunComfyError, TimeoutError) as error:
            log.warning("prompt_not_taken_back", extra={"fields": {"prompt": prompt_id, "error": repr(error)}})
        if place.kind == OWN_MACHINE or seen_gone:
            return
        if told:
            self.tell(f"prompt {prompt_id} was interrupted; it ends when its node next looks up")
        else:
            self.tell(
                f"prompt {prompt_id} may still run on the server: it could not be interrupted without risk to others"
            )


def _log_earlier(event: str, earlier: EarlierPrompt) -> None:
    log.info(event, extra={"fields": {"prompt": earlier.prompt_id, "accepted": earlier.accepted}})


def may_still_run(error: BaseException) -> bool:
    """Whether the prompt may still wait or run after this error, and nobody but its sender would take it back.

    What the journal raises is none of these: a prompt whose run has lost its hold on the job is somebody else's.
    """
    if isinstance(error, RunComfyError):
        return error.code in ("node-stuck", "comfyui-unreachable", "worker-dead", "job-timeout")
    return True
