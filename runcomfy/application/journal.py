"""
What a run writes down as it goes: nothing for a single `run`, every step under a fence for a job of the queue.

The orchestrator calls these at the moments that matter after a crash; what is durable when a call returns is what the
next worker finds. A call may raise LeaseLost: the run then stops, leaves the prompt alone and publishes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from runcomfy.domain.job import Output, PromptId

Publish = Callable[[], None]
"""Gives every result its final name: quick, blocking, and undone by itself if it raises."""


@dataclass(frozen=True, slots=True)
class EarlierPrompt:
    """The prompt of an attempt that was cut off: maybe waiting, running, ended, or never sent."""

    prompt_id: PromptId
    place: str
    """The key of the place it is at (`Place.key`)."""
    accepted: bool
    """Whether the server is known to have accepted it: missing there, it is lost; else it was never sent."""
    unwanted: bool = False
    """It must be seen ended before anything new starts."""


class Journal(Protocol):
    """The run's own record. One per attempt."""

    def random_int(self, low: int, high: int) -> int:
        """Draw a seed, both ends included; the same run draws the same ones again after a crash.

        So what is drawn follows from `prompt_id`, and begins anew when that changes.
        """
        ...

    @property
    def earlier(self) -> EarlierPrompt | None:
        """The prompt to go on with, if there is one."""
        ...

    @property
    def prompt_id(self) -> PromptId:
        """The id the next prompt is to be sent under."""
        ...

    async def submitting(self, prompt_id: PromptId, *, place: str) -> None:
        """Called before the prompt is sent; it is sent only after this returned. Raises LeaseLost.

        Called again with the same id if so much time passed meanwhile that the job may have been lost.
        """
        ...

    async def accepted(self, prompt_id: PromptId) -> None:
        """Called when the server has accepted the prompt. Raises LeaseLost."""
        ...

    async def attached(self) -> None:
        """Called when the earlier prompt was found on its server, waiting, running or ended. Raises LeaseLost."""
        ...

    async def gone(self, *, lost: bool) -> None:
        """Called when the earlier prompt is proven to be on no server any more; `lost`: it had been accepted.

        Afterwards `earlier` is None, and `prompt_id` is a new one where the old one may have run. Raises LeaseLost.
        """
        ...

    def leaves_prompt(self, error: BaseException) -> bool:
        """Whether a prompt that may still run after `error` is to be left running (somebody else goes on with it)."""
        ...

    async def commit(self, publish: Publish, outputs: tuple[Output, ...], facts: Mapping[str, Any]) -> None:
        """Have the results named, in the moment in which they count, or not at all. Raises LeaseLost.

        If it raises, the results do not count, and the names are taken back: a journal that cannot tell whether its
        record was kept has to find out first. It is not cancelled, once it was called.
        """
        ...


class NoJournal:
    """A single run: nothing outlives the process but its results."""

    def __init__(self, random_int: Callable[[int, int], int], in_thread: Callable[[Publish], Awaitable[None]]) -> None:
        self.random_int = random_int
        self._in_thread = in_thread
        self._prompt_id = PromptId(str(uuid4()))

    @property
    def earlier(self) -> EarlierPrompt | None:
        """There is none."""
        return None

    @property
    def prompt_id(self) -> PromptId:
        """One for the whole run."""
        return self._prompt_id

    async def submitting(self, prompt_id: PromptId, *, place: str) -> None:
        """Write nothing."""

    async def accepted(self, prompt_id: PromptId) -> None:
        """Write nothing."""

    async def attached(self) -> None:
        """Write nothing."""

    async def gone(self, *, lost: bool) -> None:
        """Write nothing."""

    def leaves_prompt(self, error: BaseException) -> bool:
        """Nobody else would go on with it."""
        return False

    async def commit(self, publish: Publish, outputs: tuple[Output, ...], facts: Mapping[str, Any]) -> None:
        """Name the results."""
        await self._in_thread(publish)
