"""
A role that one process of a database has at a time (I19), held as long as it is renewed.

Who holds it knows until when by the loop's clock, counted from before the renewal was asked for: a process that slept
through its time stops by itself before it asks anybody, and the writes of one that did not notice are fenced by the
epochs of what it writes to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Final, Protocol

from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId
from runcomfy.ports.clock import Clock
from runcomfy.ports.processes import Processes

log = logging.getLogger("runcomfy.fleet")

ROLE_LEASE: Final = timedelta(seconds=60)
"""How long a holder that says nothing any more keeps the role, where nobody can see that its process is gone."""


class KeepsRoles(Protocol):
    """What a role is kept in: the books, or the queue's database."""

    async def take_role(self, role: str, owner_id: OwnerId, *, lease: timedelta) -> int | None:
        """Take or keep a role; return its epoch, None if somebody else has it."""
        ...

    async def drop_role(self, role: str, owner_id: OwnerId) -> None:
        """Give it up, if this owner holds it."""
        ...

    async def owners(self, *, but: Collection[OwnerId]) -> Mapping[OwnerId, Owner]:
        """Return the processes that have not signed off, `but` those."""
        ...


class Role:
    """One process's hold on a role, or its wish for it."""

    def __init__(
        self,
        name: str,
        store: KeepsRoles,
        owner: Owner,
        *,
        clock: Clock,
        processes: Processes,
        lease: timedelta = ROLE_LEASE,
    ) -> None:
        """`owner` is registered in the store."""
        self.name, self.owner = name, owner
        self._store, self._clock, self._processes = store, clock, processes
        self._lease = lease
        self._until = float("-inf")
        self._dropped: set[OwnerId] = set()
        """Who is gone and does not hold it: the dead take no roles, so they are asked about once."""
        self.epoch: int | None = None
        """Of the hold; None while somebody else has it."""

    @property
    def every(self) -> float:
        """Seconds between two renewals: three may fail."""
        return self._lease.total_seconds() / 4

    def holds(self) -> bool:
        """Whether it is held now, without asking anybody."""
        return self.epoch is not None and asyncio.get_running_loop().time() < self._until

    async def take(self) -> bool:
        """Take or keep the role; return whether it is held. Raises LocalError if the store cannot be asked.

        A holder whose process is seen to be gone is not waited for.
        """
        before = self.epoch
        asked_at = asyncio.get_running_loop().time()
        epoch = await self._ask()
        if epoch is None and (dead := await self._dead()):
            for owner in dead:
                await self._store.drop_role(self.name, owner.id)
                self._dropped.add(owner.id)
            epoch = await self._ask()
        self.epoch = epoch
        if epoch is None:
            return False
        self._until = asked_at + self._lease.total_seconds()
        if epoch != before:
            log.info("role_taken", extra={"fields": {"role": self.name, "owner": self.owner.id, "epoch": epoch}})
        return True

    async def take_softly(self) -> bool:
        """Take or keep the role as `take` does; False also where the store cannot be asked."""
        with suppress(LocalError):
            return await self.take()
        return False

    async def _ask(self) -> int | None:
        # By the store's time, read when it is the call's turn: we may be stopped between the asking and that, and a
        # time of before would cut what another holder has got meanwhile.
        return await self._store.take_role(self.name, self.owner.id, lease=self._lease)

    async def _dead(self) -> list[Owner]:
        """Return who is gone and may still be written down as the holder."""
        # Those who were killed never sign off: of a database that has seen many, only who is new is read.
        others, now = await self._store.owners(but={self.owner.id, *self._dropped}), self._clock.now()
        return [owner for owner in others.values() if not self._processes.lives(owner, now=now)]

    async def keep(self) -> None:
        """Renew until the role is lost; return then. A store that refuses is asked again as long as the hold lasts."""
        epoch = self.epoch
        while self.holds():
            await asyncio.sleep(self.every)
            if not self.holds():
                break  # we slept: whatever is said now, the time was over
            try:
                if not await self.take() or self.epoch != epoch:
                    break
            except LocalError as error:
                log.warning("role_not_renewed", extra={"fields": {"role": self.name, "error": error.code}})
        log.warning("role_lost", extra={"fields": {"role": self.name, "owner": self.owner.id, "epoch": epoch}})
        self.epoch = None

    async def drop(self) -> None:
        """Give it up, so that another takes it at once."""
        if self.epoch is not None:
            self.epoch = None
            with suppress(LocalError):  # it runs out by itself
                await self._store.drop_role(self.name, self.owner.id)
