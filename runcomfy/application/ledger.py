"""
Reading the books for reports: of every machine its bill, what ran on it, and whose it was.

Nothing is written here. What a machine that still runs has cost since its last entry is counted as so far; a bill that
was closed is taken from the ledger as it was posted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from runcomfy.domain.machine import Machine, MachineId
from runcomfy.domain.money import LedgerEntry
from runcomfy.domain.shares import Billed, billed
from runcomfy.domain.work import Work
from runcomfy.ports.store import Store


@dataclass(frozen=True, slots=True)
class MachineBill:
    """One machine as the books have it."""

    machine: Machine
    entries: tuple[LedgerEntry, ...]
    pieces: tuple[Billed, ...]
    """The entries, and what has run up since."""
    works: tuple[Work, ...]

    @property
    def usd(self) -> Decimal:
        """What it has cost, in USD."""
        return sum((piece.usd for piece in self.pieces), Decimal(0))

    @property
    def so_far(self) -> bool:
        """Whether some of it is not in the ledger yet."""
        return any(piece.so_far for piece in self.pieces)


async def read_bills(
    store: Store, *, provider: str, account: str, now: datetime, since: datetime | None = None, works: bool = True
) -> list[MachineBill]:
    """Return the bills of the account's machines that were open at `since` or later (None: of all), oldest first.

    `works`: with the jobs that were there; of a month those are many (`with_works` adds them for some).

    Each bill is whole, also what of it lies before `since`: what a job pays depends on the jobs before it. Raises
    LocalError.
    """
    machines = await store.machines(provider=provider, account=account, open_only=False, since=since)
    if not machines:
        return []
    ids = {machine.id for machine in machines}
    entries: dict[MachineId, list[LedgerEntry]] = defaultdict(list)
    # A bill begins when its machine is ready, which is not before it was asked for (one taken over: not before ready).
    begun = min(min(machine.requested_at, machine.ready_at or machine.requested_at) for machine in machines)
    for entry in await store.ledger(since=begun if since is not None else None):
        if entry.machine_id in ids:
            entries[entry.machine_id].append(entry)
    bills = [
        MachineBill(machine, tuple(entries[machine.id]), tuple(billed(machine, entries[machine.id], now=now)), ())
        for machine in machines
    ]
    return await with_works(store, bills) if works else bills


async def with_works(store: Store, bills: Sequence[MachineBill]) -> list[MachineBill]:
    """Return bills with the jobs that were at their machines. Raises LocalError."""
    works: dict[MachineId, list[Work]] = defaultdict(list)
    for work in await store.works(machine_ids={bill.machine.id for bill in bills}):
        works[work.machine_id].append(work)
    return [replace(bill, works=tuple(works[bill.machine.id])) for bill in bills]
