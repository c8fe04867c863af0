"""
Prompts that somebody has sent by hand to a machine of ours, in ComfyUI's own page, and that none of our jobs waits for.

Such a machine is in use (fault 69): it is not ended for having no job, and what runs there is not interrupted. It is
paid for like any other, within the budgets; a user's order ends it at once. Prompts that wait while nothing computes
are no use: ComfyUI takes what waits at once, so its worker has died, and they would be waited for for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Final

from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import QueueView
from runcomfy.ports.comfyui import ComfyUI

ASKED_WITHIN: Final = timedelta(seconds=10)
"""How long a server may take to say what is in its queue; one that does not answer nobody can use."""
ASKED_EVERY: Final = timedelta(seconds=15)


WORKER_DEAD_AFTER: Final = timedelta(seconds=60)
"""How long one prompt may be the next and nothing run (comfyui-server: "for more than a moment")."""


class ByHand:
    """What is known of the use of one machine that has no job."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self._until = float("-inf")
        self._told = False
        self._next = ""
        """The prompt that was the next when nothing ran; empty while something runs."""
        self._waits_since = 0.0

    async def uses(self, server: ComfyUI, name: str, *, tell: Callable[[str], None]) -> bool:
        """Return whether a prompt computes or waits there. Asks the server now and then, and tells once."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            return True
        if not await self.used(server):
            return False
        if not self._told:
            self._told = True
            tell(by_hand_words(f"machine {name}", name))
        self._until = loop.time() + ASKED_EVERY.total_seconds() / 2
        return True

    async def used(self, server: ComfyUI, *, ours: Collection[PromptId] = ()) -> bool:
        """Return whether a prompt computes or waits on the server that is none of `ours`. Never raises."""
        try:
            async with asyncio.timeout(ASKED_WITHIN.total_seconds()):
                queue = await server.queue()
        except (RunComfyError, TimeoutError):
            return False
        return not {*queue.running, *queue.pending} <= set(ours) and not self._is_dead(queue)

    def _is_dead(self, queue: QueueView) -> bool:
        """Whether the same prompt has been the next for long, and nothing runs."""
        now = asyncio.get_running_loop().time()
        first = "" if queue.running or not queue.pending else queue.pending[0]
        if first != self._next:
            self._next, self._waits_since = first, now
        return bool(first) and now - self._waits_since >= WORKER_DEAD_AFTER.total_seconds()


def by_hand_words(what: str, name: str) -> str:
    """Return why a machine without a job is not ended; `name` is what `comfyctl machines stop` knows it by."""
    return (
        f"{what} has no job, but a prompt that somebody has sent by hand; it is ended when that is done "
        f"(`comfyctl machines stop {name}` ends it at once)"
    )
