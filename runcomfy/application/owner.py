"""
This process as an owner of machines: registered before it rents anything, alive by heartbeat, signed off at the end.

Heartbeats matter only to processes that cannot see our process table (another container, another host); on this
computer a dead owner is recognised at once by its pid and start time.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.lease import HEARTBEAT_EVERY, Owner
from runcomfy.ports.clock import Clock
from runcomfy.ports.processes import Processes
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.owner")


class OwnerSession:
    """`async with OwnerSession(...) as session:` — `session.owner` may hold machines inside the block."""

    def __init__(self, store: Store, processes: Processes, clock: Clock) -> None:
        self._store = store
        self._processes = processes
        self._clock = clock
        self._beat: asyncio.Task[None] | None = None
        self.owner: Owner = processes.me(now=clock.now())

    async def __aenter__(self) -> OwnerSession:
        await self._store.register_owner(self.owner)
        self._beat = asyncio.create_task(self._beat_for_ever(), name="owner-heartbeat")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._beat is not None:
            self._beat.cancel()
            with suppress(asyncio.CancelledError):
                await self._beat
        try:
            await self._store.sign_off(self.owner.id, at=self._clock.now())
        except LocalError as error:
            # Whoever looks later sees that the process is gone.
            log.warning("owner_sign_off_failed", extra={"fields": {"error": error.code}})

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_EVERY.total_seconds())
            try:
                await self._store.heartbeat(self.owner.id, at=self._clock.now())
            except LocalError as error:
                log.warning("owner_heartbeat_failed", extra={"fields": {"error": error.code}})
