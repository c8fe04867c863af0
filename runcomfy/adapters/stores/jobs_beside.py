"""
The queue's store for a program that looks often while others write: its reads wait for no commit.

A database's thread does one thing after the other, and a commit waits for the disk. Here reads have a thread and a
connection of their own; writes go where they always go, so what was written is seen by the next read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Connection

from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.exceptions import StoreUnavailable

T = TypeVar("T")


class JobsBeside(SqlJobs):
    """The jobs of an open store. Close it before the store is closed; it neither opens nor closes the database."""

    def __init__(self, jobs: SqlJobs) -> None:
        super().__init__(jobs._database)
        self._together = jobs._together  # what is written together is written in one place
        self._sibling = self._database.sibling()
        self._thread: ThreadPoolExecutor | None = None
        self._read = self._aside

    async def open(self) -> None:
        """Be ready to read; harmless when repeated."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-look")

    async def close(self) -> None:
        """Let go of the connection. Harmless when repeated."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._sibling.close)
        finally:
            thread.shutdown(wait=False)

    async def _aside(self, work: Callable[[Connection], T]) -> T:
        if self._thread is None:
            raise StoreUnavailable("the queue is not open for reading")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._sibling.read, work)
