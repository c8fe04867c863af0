"""
What is written down of jobs' time on machines (`Work`), behind the dispatch's back.

Taking a seat must not wait for the disk, so rows are written by one task, the newest word of each. A database that
refuses is asked again; what is still unwritten when the pool is closed, and cannot be written then, is lost to the
reports of costs, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.work import Work
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.pool")

AGAIN_AFTER: Final = 5.0
MOST_UNWRITTEN: Final = 10_000
"""Rows kept for a database that refuses; older ones are let go then."""

_Key = tuple[MachineId, JobId, int]


class Works:
    """Writes rows of work, one after the other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._unwritten: dict[_Key, Work] = {}
        self._writer: asyncio.Task[None] | None = None

    def put(self, work: Work) -> None:
        """Write a row, or what is newer of it, soon."""
        key = (work.machine_id, work.job_id, work.attempt)
        self._unwritten.pop(key, None)
        self._unwritten[key] = work
        while len(self._unwritten) > MOST_UNWRITTEN:
            self._unwritten.pop(next(iter(self._unwritten)))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="works")

    async def _write(self) -> None:
        while self._unwritten:
            key, work = next(iter(self._unwritten.items()))
            try:
                await self._store.put_work(work)
            except LocalError as error:
                log.warning("work_not_recorded", extra={"fields": {"error": error.code, "job": work.job_id}})
                await asyncio.sleep(AGAIN_AFTER)
                if key in self._unwritten:  # to the end: one that is never taken must not hold up the others
                    self._unwritten[key] = self._unwritten.pop(key)
                continue
            if self._unwritten.get(key) is work:
                del self._unwritten[key]

    async def close(self) -> None:
        """Write what is left, each row once."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait({self._writer})
            self._writer = None
        unwritten, self._unwritten = list(self._unwritten.values()), {}
        for work in unwritten:
            try:
                await self._store.put_work(work)
            except LocalError as error:
                log.warning("work_lost", extra={"fields": {"error": error.code, "unwritten": len(unwritten)}})
                return
