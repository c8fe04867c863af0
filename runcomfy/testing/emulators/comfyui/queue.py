"""The prompt queue and the history, kept the way ComfyUI keeps them.

Waiting prompts are plain tuples in a heap, on purpose: two prompts with the same number and the same id make the
heap compare their graphs, which raises, and that is how a client can stop a real server's only worker for good.
"""

from __future__ import annotations

import asyncio
import copy
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HISTORY_LIMIT = 10_000
"""Entries kept; the oldest goes first."""

QueueItem = tuple[float, str, dict[str, Any], dict[str, Any], list[str], dict[str, Any]]
"""(number, prompt id, graph, extra_data, output node ids, secret extra_data)."""


def public(item: QueueItem) -> list[Any]:
    """The five fields that `/queue` and the history show."""
    return list(item[:5])


@dataclass(slots=True)
class Finished:
    """How a prompt ended."""

    success: bool
    messages: list[tuple[str, dict[str, Any]]]
    outputs: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """The history's `status`."""
        return {
            "status_str": "success" if self.success else "error",
            "completed": self.success,
            "messages": [[event, data] for event, data in self.messages],
        }


class PromptQueue:
    """Waiting, running and finished prompts of one server process.

    `changed` is called whenever the count may have changed: each call becomes a `status` broadcast.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.waiting: list[QueueItem] = []
        self.running: dict[int, QueueItem] = {}
        self.history: dict[str, dict[str, Any]] = {}
        self.flags: dict[str, Any] = {}
        self._changed = changed
        self._tasks = 0
        self._wake = asyncio.Event()

    @property
    def remaining(self) -> int:
        """Waiting and running prompts."""
        return len(self.waiting) + len(self.running)

    def put(self, item: QueueItem) -> None:
        """Queue a prompt. Raises TypeError after queueing it if number and id equal a waiting one's."""
        heapq.heappush(self.waiting, item)
        self._changed()
        self._wake.set()

    async def get(self) -> tuple[int, QueueItem] | None:
        """Wait for a prompt or a flag; None means that only a flag came. Raises as `put` does."""
        while not self.waiting and not self.flags:
            self._wake.clear()
            await self._wake.wait()
        if not self.waiting:
            return None
        item = heapq.heappop(self.waiting)
        self._tasks += 1
        self.running[self._tasks] = item
        self._changed()
        return self._tasks, item

    def done(self, task: int, finished: Finished) -> None:
        """Move a running prompt to the history."""
        item = self.running.pop(task)
        while len(self.history) >= HISTORY_LIMIT:
            del self.history[next(iter(self.history))]
        self.history.pop(item[1], None)
        self.history[item[1]] = {
            "prompt": public(item),
            "outputs": copy.deepcopy(finished.outputs),
            "status": finished.status(),
            "meta": copy.deepcopy(finished.meta),
        }
        self._changed()

    def drop_running(self, task: int) -> None:
        """Forget a running prompt without a trace (a fault, never the server's own doing)."""
        self.running.pop(task, None)
        self._changed()

    def wipe(self) -> None:
        """Remove everything that waits."""
        self.waiting = []
        self._changed()

    def delete(self, matches: Callable[[QueueItem], bool]) -> bool:
        """Remove the first waiting prompt that matches; True if there was one."""
        for index, item in enumerate(self.waiting):
            if matches(item):
                self.waiting.pop(index)
                heapq.heapify(self.waiting)
                self._changed()
                return True
        return False

    def delete_id(self, prompt_id: object) -> bool:
        """Remove the first waiting prompt of that id; True if there was one."""
        return self.delete(lambda item: item[1] == prompt_id)

    def set_flag(self, name: str, value: object) -> None:
        """Ask the worker for something when it is idle."""
        self.flags[name] = value
        self._wake.set()

    def take_flags(self) -> dict[str, Any]:
        """The flags set since the last time."""
        flags, self.flags = self.flags, {}
        return flags

    def entries(self, prompt_id: str | None = None, max_items: int | None = None, offset: int = -1) -> dict[str, Any]:
        """The history as `/history` answers it.

        `max_items` alone keeps the newest; `offset` counts from the oldest. A negative `max_items` keeps nothing.
        """
        if prompt_id is not None:
            return {prompt_id: self.history[prompt_id]} if prompt_id in self.history else {}
        keys = list(self.history)
        if offset < 0 and max_items is not None:
            offset = len(keys) - max_items
        kept = [
            key
            for index, key in enumerate(keys)
            if index >= offset and (max_items is None or index - max(offset, 0) < max_items)
        ]
        return {key: self.history[key] for key in kept}
