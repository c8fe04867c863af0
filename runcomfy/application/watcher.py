"""
Watches one prompt until it has ended: socket first, polling behind it, one outcome.

The socket makes it quick, polling makes it true: a prompt about which nothing was heard for one poll period is looked
up, so losing every message costs at most that period. What is heard and read goes through one pure fold
(`runcomfy.domain.progress_fold`); here are only the waiting, the asking and the error that an ending means.

Opening the socket, submitting and fetching results are left to others.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from runcomfy.application.seat import Seat
from runcomfy.domain.altered import replace
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    GpuOutOfMemory,
    NodeFailed,
    NodeStuck,
    NotComfyUI,
    OutputMissing,
    PromptInterrupted,
    PromptRemoved,
    ProviderError,
    RunComfyError,
    ServerRestarted,
    ServerUnreachable,
    WorkerDead,
    foreign_text,
)
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import NodeLabel, Progress, ServerEvent, SocketDown, SocketUp
from runcomfy.domain.progress_fold import (
    Ending,
    Failure,
    Limits,
    Polled,
    PollFailed,
    Tick,
    WatchEvent,
    WatchState,
    fold,
    progress_of,
    watching,
)
from runcomfy.domain.settings import ComfySettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI

SETTLE_SECONDS: Final = 1.0
"""After a hint of the end (success said, prompt not found) the server is asked again this soon: the history follows
the success message within 0.4 s in all measurements."""
DEAF_PACE: Final = 0.25
"""Where nothing can be heard about a prompt it is asked after each time this share of its age has passed, up to the
poll period: a prompt that runs for 50 ms is not noticed 5 s later."""
DEAF_FIRST_SECONDS: Final = 0.05
LOOKS_AT_AN_END: Final = 2
"""A history entry that makes no sense is looked at again: nothing about it changes any more, but a proxy may pass."""

_OVER: Final = frozenset({Ending.SUCCESS, Ending.ERROR, Ending.INTERRUPTED, Ending.REMOVED})
"""Endings after which the server goes on with the next prompt; after any other one that is not known."""

_GPU_TROUBLE: Final = re.compile(
    r"out of memory on device|(cuda|hip|mps backend|xpu)[\w ]* out of memory|allocation on device|"
    r"cuda (driver )?error|hip error|cublas_status|cudnn(_status| error)|device-side assert|"
    r"illegal memory access|unspecified launch failure|nvidia driver|gpu (is )?lost|outofmemoryerror",
    re.IGNORECASE,
)
"""How torch and the drivers say that the GPU had too little memory or failed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A prompt that ended in success, as the server remembers it. `outputs` may be empty: see whoever needs them."""

    prompt_id: PromptId
    outputs: Mapping[str, Any]
    cached: frozenset[str] = frozenset()
    """Nodes whose result the server had already."""
    started_at: datetime | None = None
    """By the server's clock, which is not ours."""
    ended_at: datetime | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Watcher:
    """Watches prompts on one server; usable for many at once."""

    def __init__(self, server: ComfyUI, settings: ComfySettings, *, clock: Clock) -> None:
        self._server = server
        self._settings = settings
        self._clock = clock

    async def watch(
        self,
        prompt_id: PromptId,
        labels: Mapping[str, NodeLabel],
        *,
        events: AsyncIterator[ServerEvent],
        on_progress: Callable[[Progress], None] | None = None,
        found: Polled | None = None,
        seat: Seat | None = None,
    ) -> Ended:
        """Return what the server remembers of the prompt once it has succeeded.

        `events` is what `ComfyUI.listen` gave, opened before the prompt was submitted. `on_progress` is called in the
        event loop for each change; what it raises ends the watch. `found`: the prompt was submitted by somebody else
        and this was read about it just now; the server tells its progress to their socket, so that asking leads.
        `seat` is told when the prompt begins to compute, and when it has ended, before its history is read.

        Raises NodeFailed, GpuOutOfMemory, PromptInterrupted, PromptRemoved, ServerRestarted, WorkerDead, NodeStuck,
        ServerUnreachable, NotComfyUI, OutputMissing.
        """
        watch = _Watch(self._server, self._settings, self._clock, prompt_id, labels, on_progress, found, seat or Seat())
        listening = asyncio.create_task(watch.hear(events), name=f"hear {prompt_id}")
        try:
            while watch.state.ending is None:
                await watch.wait(listening)
                if watch.state.ending is None:
                    await watch.ask()
        finally:
            listening.cancel()
            await asyncio.wait({listening})
        if not listening.cancelled() and (error := listening.exception()) is not None:
            raise error
        return watch.conclude()


class _Watch:
    """One prompt being watched."""

    def __init__(
        self,
        server: ComfyUI,
        settings: ComfySettings,
        clock: Clock,
        prompt_id: PromptId,
        labels: Mapping[str, NodeLabel],
        on_progress: Callable[[Progress], None] | None,
        found: Polled | None,
        seat: Seat,
    ) -> None:
        self._server = server
        self._seat = seat
        self._clock = clock
        self._prompt_id = prompt_id
        self._on_progress = on_progress
        self._interval = settings.poll_interval.total_seconds()
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        limits = Limits(
            stall=settings.stall_timeout.total_seconds(),
            blind=settings.execution_timeout.total_seconds(),
            unreachable=settings.unreachable_timeout.total_seconds(),
            worker_dead=settings.worker_dead_after.total_seconds(),
        )
        self.state: WatchState = watching(prompt_id, labels, now=now, limits=limits)
        self._told: Progress | None = None
        self._began = now
        self._began_at = clock.now()
        self._asked_at = now
        self._wake = asyncio.Event()
        self._hurry = False
        """Whether to ask at once: the end was marked, or the connection changed and something may have been missed."""
        self._trouble: ProviderError | None = None
        self._senseless = 0
        """How often in a row the history had the prompt and could not be read."""
        self._deaf = found is not None
        """Whether the socket says nothing about this prompt because it is another's."""
        if found is not None:
            self._fold(found)

    # --- hearing ------------------------------------------------------------------------------------------

    async def hear(self, events: AsyncIterator[ServerEvent]) -> None:
        """Fold what the socket says, for as long as it lasts."""
        try:
            async for event in events:
                before = self.state
                self._fold(event)
                self._wake_if_due(before, event)
                if self.state.ending is not None:
                    return
            self._fold(SocketDown("the subscription ended"))
        finally:
            self._wake.set()

    def _wake_if_due(self, before: WatchState, event: ServerEvent) -> None:
        after = self.state
        if isinstance(event, SocketUp | SocketDown):
            # What was said meanwhile is lost: look. The first word about the socket tells of no change.
            if before.health.socket is not None and before.health.socket is not after.health.socket:
                self._hurry = True
                self._wake.set()
        elif after.evidence.marked and not before.evidence.marked:
            self._hurry = True
            self._wake.set()
        elif after.ending is not None or after.evidence is not before.evidence:
            self._wake.set()

    def _fold(self, event: WatchEvent) -> None:
        before = self.state
        self.state = fold(before, event, self._loop.time())
        if self.state is not before:
            self._tell_seat(before)
        if self._on_progress is not None and self.state is not before:
            progress = progress_of(self.state)
            if progress != self._told:
                self._told = progress
                elapsed = timedelta(seconds=self._loop.time() - self._began)
                self._on_progress(replace(progress, elapsed=elapsed))

    def _tell_seat(self, before: WatchState) -> None:
        after = self.state
        if after.run.running and not before.run.running:
            self._seat.computing()
        if after.ending in _OVER or (after.evidence.marked and not before.evidence.marked):
            messages = dict(after.history.messages) if after.history is not None else {}
            began, ended = _stamp(messages.get("execution_start")), _last_stamp(after)
            self._seat.computed((ended - began).total_seconds() if began is not None and ended is not None else None)

    # --- asking -------------------------------------------------------------------------------------------

    async def wait(self, listening: asyncio.Task[None]) -> None:
        """Return when the server is to be asked, or when the end is known; re-raise what stopped the listening."""
        while self.state.ending is None:
            if listening.done() and not listening.cancelled() and (error := listening.exception()) is not None:
                raise error
            due = self._due()
            if self._loop.time() >= due:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            except TimeoutError:
                # Timers fire up to a clock tick early; only what was heard meanwhile puts the question off.
                if self._due() <= due:
                    return
            self._fold(Tick())

    def _due(self) -> float:
        """When to ask next, on the loop's clock."""
        state, asked_at = self.state, self._asked_at
        evidence, health = state.evidence, state.health
        soon = asked_at + min(self._interval, SETTLE_SECONDS)
        if self._hurry and health.unreachable_since is None:
            return asked_at
        if self._hurry or evidence.marked or health.absent:
            return soon
        quiet = max(health.heard_at, asked_at) + self._patience(asked_at)
        if evidence.succeeded or evidence.failure is not None or evidence.interrupted:
            return min(quiet, max(health.heard_at, asked_at) + SETTLE_SECONDS)
        return quiet

    def _patience(self, asked_at: float) -> float:
        """How long nothing may be heard until the server is asked, in seconds."""
        if not self._deaf and self.state.health.socket is not False:
            return self._interval
        return min(self._interval, max(DEAF_FIRST_SECONDS, (asked_at - self._began) * DEAF_PACE))

    async def ask(self) -> None:
        """Look the prompt up: queue first, then history, for a prompt that ends in between must not look lost."""
        self._hurry = False
        asked_at = self._loop.time()
        prompt_id = self._prompt_id
        marked = self.state.evidence.marked
        try:
            if marked and (entry := await self._server.history(prompt_id)) is not None:
                answer: Polled | PollFailed = Polled(history=entry)
            else:
                queue = await self._server.queue()
                present = prompt_id in queue.running or prompt_id in queue.pending
                answer = Polled(queue, None if present else await self._server.history(prompt_id))
            self._trouble = None
        except (ServerUnreachable, NotComfyUI, AnswerUnreadable) as error:
            # A page in ComfyUI's place may be a proxy that bridges a restart: believed only if it stays.
            self._trouble = error
            self._make_sense(error)
            answer = PollFailed(error.message, _is_break(error), asked_at)
        else:
            self._senseless = 0
        self._asked_at = self._loop.time()
        before = self.state
        self._fold(answer)
        if isinstance(answer, Polled):
            self._doubt_the_socket(before)
            if answer.queue is not None:
                self._seat.saw(answer.queue)

    def _make_sense(self, error: ProviderError) -> None:
        """Raise OutputMissing if the prompt has ended and its history says nothing sensible at a second look, too."""
        ended = isinstance(error, AnswerUnreadable) and error.details.get("ended") is True
        self._senseless = self._senseless + 1 if ended else 0
        if self._senseless >= LOOKS_AT_AN_END:
            raise OutputMissing(
                f"the prompt has ended, but its results cannot be told: {error.message}",
                hint="run it again; if that goes on, look what on that machine changes ComfyUI's history",
                details={"prompt_id": self._prompt_id, "server": self._server.masked_url},
            ) from error

    def _doubt_the_socket(self, before: WatchState) -> None:
        """An open socket that kept to itself what polling found out has been forgotten by the server."""
        health, after = before.health, self.state
        if self._deaf:
            return
        if health.socket is not True or self._asked_at - health.heard_at < self._interval:
            return
        if after.history is not None and not before.evidence.marked:
            self._server.renew_socket("a prompt ended and the socket did not say so")
        elif after.run.running and not health.heard and before.run.running:
            self._server.renew_socket("a prompt runs and the socket says nothing about it")

    # --- concluding ---------------------------------------------------------------------------------------

    def conclude(self) -> Ended:
        """Return the success, or raise what the ending means."""
        state = self.state
        if state.ending is Ending.SUCCESS:
            entry = state.history
            messages = dict(entry.messages) if entry is not None else {}
            return Ended(
                prompt_id=self._prompt_id,
                outputs=entry.outputs if entry is not None else state.evidence.outputs,
                cached=state.run.cached,
                started_at=_stamp(messages.get("execution_start")),
                ended_at=_stamp(messages.get("execution_success")),
                details={"began_at": self._began_at, "history": entry is not None},
            )
        raise self._error()

    def _error(self) -> RunComfyError:
        state, server = self.state, self._server.masked_url
        details: dict[str, Any] = {"prompt_id": self._prompt_id, "server": server}
        match state.ending:
            case Ending.ERROR:
                return _node_error(state, details)
            case Ending.INTERRUPTED:
                where = _where(state, state.evidence.failure)
                details["node_id"] = state.evidence.failure.node_id if state.evidence.failure else state.run.node
                return PromptInterrupted(
                    f"somebody interrupted the prompt{f' in {where}' if where else ''}",
                    hint="run it again; if the machine is shared, ask who else uses it",
                    details=details,
                )
            case Ending.REMOVED:
                return PromptRemoved(
                    "the prompt is neither in the server's queue nor in its history: somebody removed it",
                    hint="run it again; if the machine is shared, ask who clears its queue",
                    details=details,
                )
            case Ending.RESTARTED:
                return ServerRestarted(
                    "ComfyUI restarted and forgot the prompt",
                    hint="run it again; if it keeps happening, look for a crash in the server's log",
                    details=details,
                )
            case Ending.WORKER_DEAD:
                return WorkerDead(
                    "prompts wait on the server and none runs: its worker thread has died",
                    hint="restart ComfyUI on that machine, or take another machine",
                    details=details,
                )
            case Ending.STUCK:
                where = _where(state, None) or "the prompt"
                silent = round(self._loop.time() - state.health.moved_at)
                return NodeStuck(
                    f"{where} made no progress for {silent} s",
                    hint="if this node is known to be slow, raise the stall timeout",
                    details={**details, "node_id": state.run.node, "percent": state.run.percent, "silent_s": silent},
                )
        if isinstance(self._trouble, NotComfyUI):
            return self._trouble
        reason = self._trouble.message if self._trouble is not None else "no answer"
        return ServerUnreachable(
            f"the ComfyUI server {server} stopped answering while the prompt was watched: {reason}",
            hint="check that the machine is still running; the prompt may have ended there",
            details=details,
        )


def _is_break(error: ProviderError) -> bool:
    """Whether the failure is one that a restart would cause; a mere silence is not."""
    return isinstance(error, ServerUnreachable) and error.details.get("kind") != "timeout"


def _where(state: WatchState, failure: Failure | None) -> str:
    node = failure.node_id if failure is not None and failure.node_id else state.run.node
    if node is None:
        return ""
    label = state.labels.get(node) or NodeLabel()
    kind = label.class_type or (failure.node_class if failure is not None else "")
    title = label.title or kind
    shown = f'"{foreign_text(title, 80)}" (#{foreign_text(node, 40)}' if title else f"node (#{foreign_text(node, 40)}"
    return f"{shown}, {foreign_text(kind, 80)})" if kind and kind != title else f"{shown})"


def _node_error(state: WatchState, details: dict[str, Any]) -> NodeFailed:
    failure = state.evidence.failure or Failure()
    label = state.labels.get(failure.node_id) or NodeLabel()
    kind, said = foreign_text(failure.exception_type, 120), foreign_text(failure.message)
    details |= {
        "node_id": foreign_text(failure.node_id),
        "node_title": label.title or label.class_type or foreign_text(failure.node_class),
        "node_class": label.class_type or foreign_text(failure.node_class),
        "exception_type": kind,
        "exception_message": said,
    }
    if failure.traceback:
        details["traceback"] = list(failure.traceback)
    where = _where(state, failure) or "a node"
    what = ": ".join(part for part in (kind, said) if part) or "the server did not say why"
    if _GPU_TROUBLE.search(f"{failure.exception_type} {failure.message[:4096]}"):
        return GpuOutOfMemory(
            f"{where} failed on the GPU: {what}",
            hint="use a larger machine, or smaller pictures, batches or models",
            details=details,
        )
    return NodeFailed(
        f"{where} failed: {what}",
        hint="check that node's inputs and model files; the server's log has the traceback",
        details=details,
    )


def _last_stamp(state: WatchState) -> datetime | None:
    """Return when the server says that the prompt ended, well or not."""
    messages = state.history.messages if state.history is not None else ()
    return _stamp(messages[-1][1]) if messages else None


def _stamp(message: Mapping[str, Any] | None) -> datetime | None:
    """The time of a history message (milliseconds since 1970), None if there is none that makes sense."""
    value = (message or {}).get("timestamp")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return datetime.fromtimestamp(value / 1000, tz=UTC)
    except (OverflowError, OSError, ValueError):
        return None
