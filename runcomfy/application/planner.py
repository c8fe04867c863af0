"""
Takes back the jobs of workers that are gone: the one process of a database that holds the role `planner` (I19).

Every executor runs one of these; those that do not hold the role ask for it again and take it over when its holder is
gone. A holder that slept through its time is stopped by the epoch that its writes name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from runcomfy.domain.exceptions import LeaseLost, LocalError
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import QueuedJob, QueueStatus, WorkerId
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.jobs import JobStore
from runcomfy.ports.processes import Processes

log = logging.getLogger("runcomfy.queue")

PLANNER: Final = "planner"
"""The role's name in the database."""


class Planner:
    """Reaps every `reap_every` while it holds the role."""

    def __init__(
        self,
        store: JobStore,
        settings: QueueSettings,
        owner: Owner,
        processes: Processes,
        *,
        tell: Callable[[str], None],
        trouble: Callable[[LocalError | None], None],
        after: Callable[[Sequence[QueuedJob]], Awaitable[None]] | None = None,
    ) -> None:
        """`owner` is registered. `trouble` hears what the database refuses, and None when it works.

        `after` is called at the end of each round, whoever has the role, with what this one took back.
        """
        self._store, self._settings, self._owner, self._processes = store, settings, owner, processes
        self._tell, self._trouble, self._after = tell, trouble, after
        self.set_aside = 0
        """How many jobs were taken out of the queue, since their workers vanished again and again."""
        self._hurried = asyncio.Event()
        self._dropped: set[OwnerId] = set()
        """Who is gone and does not hold the role: the dead take none, so they are asked about once."""
        self.epoch: int | None = None
        """The hold on the role; None while another process has it."""

    async def run(self) -> None:
        """Reap for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.reap_every.total_seconds()):
                    await self._hurried.wait()
            self._hurried.clear()
            await self.round()

    def hurry(self) -> None:
        """Look at once: something has gone that jobs wait for."""
        self._hurried.set()

    async def round(self) -> Sequence[QueuedJob]:
        """Take or keep the role, and take back what has nobody; return what went back to the queue."""
        back = await self._take_back()
        if self._after is not None:
            try:
                await self._after(back)
            except LocalError as error:  # the next round does it
                log.warning("aftermath_not_cleared", extra={"fields": {"error": error.code}})
        return back

    async def _take_back(self) -> Sequence[QueuedJob]:
        try:
            dead = await self._dead()
            await self._take_role(dead)
            if self.epoch is None:
                return []
            back = await self._store.reap(
                lease=self._settings.lease,
                dead=[WorkerId(owner_id) for owner_id in dead],
                lost_limit=self._settings.lost_limit,
                grace=self._settings.attach_grace,
                epoch=self.epoch,
            )
        except LeaseLost:
            # We slept; somebody else plans by now.
            log.warning("planner_role_lost", extra={"fields": {"owner": self._owner.id, "epoch": self.epoch}})
            self.epoch = None
            return []
        except LocalError as error:
            self._trouble(error)
            return []
        self._trouble(None)
        for job in back:
            self._say(job)
        return back

    async def stop(self) -> None:
        """Give the role up, so that another takes it at once."""
        if self.epoch is not None:
            self.epoch = None
            with suppress(LocalError):  # it runs out by itself
                await self._store.drop_role(PLANNER, self._owner.id)

    async def _dead(self) -> Sequence[OwnerId]:
        """Return the processes that ended without a word, as far as this computer can see."""
        owners, now = await self._store.owners(), self._store.now()
        return [
            owner.id
            for owner in owners.values()
            if owner.id != self._owner.id and not self._processes.lives(owner, now=now)
        ]

    async def _take_role(self, dead: Sequence[OwnerId]) -> None:
        lease = self._settings.lease
        epoch = await self._store.take_role(PLANNER, self._owner.id, lease=lease)
        if epoch is None and (fresh := [owner_id for owner_id in dead if owner_id not in self._dropped]):
            # Its holder may be one of them: on this computer that is known at once, and need not be waited for.
            for owner_id in fresh:
                await self._store.drop_role(PLANNER, owner_id)
                self._dropped.add(owner_id)
            epoch = await self._store.take_role(PLANNER, self._owner.id, lease=lease)
        if epoch is not None and epoch != self.epoch:
            log.info("planner_role_taken", extra={"fields": {"owner": self._owner.id, "epoch": epoch}})
        self.epoch = epoch

    def _say(self, job: QueuedJob) -> None:
        log.warning(
            "job_taken_back",
            extra={"fields": {"job": job.uid, "row": job.id, "status": str(job.status), "lost": job.lost_count}},
        )
        if job.status is QueueStatus.PENDING:
            self._tell(f"{job.config_name}: its worker is gone; it waits for the next one")
        else:
            self.set_aside += 1
            self._tell(f"{job.config_name}: its worker vanished {job.lost_count} times; it is taken out of the queue")
