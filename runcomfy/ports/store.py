"""
Where the truth about machines and money is kept.

Every method that changes something is durable when it returns (one transaction, flushed to the disk), or raises a
`LocalError` and changed nothing. Several processes use one store at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, OwnerId, Transition
from runcomfy.domain.money import LedgerEntry


class Store(Protocol):
    """Machines, launch and stop intents, owners, transitions, the ledger, and what processes of an account share."""

    async def open(self) -> None:
        """Open or make the database and bring it to the current version (under a lock; several may start at once).

        Raises StoreTooNew, StoreCorrupt, StoreUnavailable (locked for too long, network file system), DiskFull.
        """
        ...

    async def close(self) -> None:
        """Let go of the database. Harmless when repeated."""
        ...

    # owners
    async def register_owner(self, owner: Owner) -> None:
        """Write down a process that may hold machines."""
        ...

    async def heartbeat(self, owner_id: OwnerId, *, at: datetime) -> None:
        """Say that the owner lives."""
        ...

    async def sign_off(self, owner_id: OwnerId, *, at: datetime) -> None:
        """Say that the owner ended in good order, and end its uses of machines."""
        ...

    async def owners(self, ids: Collection[OwnerId] | None = None) -> Mapping[OwnerId, Owner]:
        """Return the owners with these ids, or all that have not signed off."""
        ...

    # machines
    async def add_machine(self, machine: Machine, *, at: datetime, note: str = "") -> None:
        """Write a launch intent (or a machine taken over), with its first transition."""
        ...

    async def machine(self, machine_id: MachineId) -> Machine | None:
        """Return one machine by our id."""
        ...

    async def machines(self, *, provider: str, account: str, open_only: bool = True) -> Sequence[Machine]:
        """Return the account's machines, oldest first."""
        ...

    async def record(
        self,
        machine_id: MachineId,
        event: MachineEvent,
        *,
        at: datetime,
        by: OwnerId,
        epoch: int | None = None,
        note: str = "",
        changes: Mapping[str, Any] | None = None,
    ) -> Machine:
        """Apply an event (`Machine.on`) and field changes to the stored machine, and write the transition.

        With `epoch`, only if the machine's epoch is still that: else LeaseLost. Raises IllegalTransition.
        """
        ...

    async def change(
        self,
        machine_id: MachineId,
        *,
        at: datetime,
        by: OwnerId,
        epoch: int | None = None,
        note: str = "",
        **fields: Any,
    ) -> Machine:
        """Change fields without an event (a planned stop moved, a kept-until date). Same fence as `record`."""
        ...

    async def take_over(
        self,
        machine_id: MachineId,
        *,
        expected_owner: OwnerId | None,
        new_owner: OwnerId | None,
        at: datetime,
        note: str,
    ) -> Machine:
        """Make somebody else the owner, if `expected_owner` still is; the epoch goes up. Else LeaseLost."""
        ...

    async def story(self, machine_id: MachineId) -> Sequence[Transition]:
        """Return everything that happened to the machine, in order."""
        ...

    async def boot_times(self, *, provider: str, server_type: str, limit: int = 20) -> Sequence[timedelta]:
        """Return how long the newest machines of a type took from request to ready, newest first."""
        ...

    # uses
    async def begin_use(self, use: Use) -> None:
        """Say that a living job uses a machine. Raises LeaseLost if the machine is already stopping or stopped."""
        ...

    async def end_use(self, machine_id: MachineId, job_id: str, *, at: datetime) -> None:
        """Say that the job no longer uses the machine; also stamps the machine's last use."""
        ...

    async def uses(self, machine_ids: Collection[MachineId] | None = None) -> Sequence[Use]:
        """Return the uses that have not ended."""
        ...

    # money
    async def post(self, entries: Sequence[LedgerEntry]) -> None:
        """Add entries to the ledger. What is there is never changed."""
        ...

    async def ledger(self, *, machine_id: MachineId | None = None) -> Sequence[LedgerEntry]:
        """Return the entries in the order in which they were written."""
        ...

    # what the processes of one account share
    async def reserve_request(
        self, account: str, *, now: datetime, per_second: float, burst: int, reserve: int, urgent: bool
    ) -> timedelta:
        """Take the account's next free moment for a request and return how long to wait until it.

        A token bucket of `burst`; calls that are not `urgent` leave `reserve` of it alone. A clock that jumps
        never makes the wait longer than emptying and refilling the whole bucket, plus what `hold_requests` asked for.
        """
        ...

    async def hold_requests(self, account: str, *, now: datetime, wait: timedelta) -> None:
        """Let no request of the account start before `now + wait` (Retry-After); urgent ones are held too."""
        ...

    async def take_launch_lock(self, account: str, *, owner_id: OwnerId, now: datetime) -> OwnerId:
        """Try to become the one process of the account that may launch; return the holder (self if it worked).

        The lock does not run out by itself: the caller asks `Processes` whether the holder lives, and breaks it with
        `break_launch_lock` if not.
        """
        ...

    async def break_launch_lock(self, account: str, *, holder: OwnerId) -> None:
        """Free the lock if `holder` still has it (its own, or that of a dead process)."""
        ...
