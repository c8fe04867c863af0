"""
Where the truth about machines and money is kept.

Every method that changes something is durable when it returns (one transaction, flushed to the disk), or raises a
`LocalError` and changed nothing. Several processes use one store at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol

from runcomfy.domain.budget import Budget, BudgetState
from runcomfy.domain.decision import Decision
from runcomfy.domain.job import JobId
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, MachineState, OwnerId, ServerId, Transition
from runcomfy.domain.money import LedgerEntry
from runcomfy.domain.signal import Signal
from runcomfy.domain.work import Work


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

    async def owners(
        self, ids: Collection[OwnerId] | None = None, *, but: Collection[OwnerId] = ()
    ) -> Mapping[OwnerId, Owner]:
        """Return the owners with these ids, or all that have not signed off, `but` those."""
        ...

    # machines
    async def add_machine(
        self, machine: Machine, *, at: datetime, note: str = "", budgets: Sequence[Budget] = ()
    ) -> Sequence[BudgetState]:
        """Write a launch intent (or a machine taken over), with its first transition.

        With `budgets` (made out): in the same transaction, which no other launch or extension of the account can
        interleave with, only if committed spend with this machine stays within every hard cap (I6). Returns how the
        budgets stand with it. Raises BudgetExceeded: nothing was written then.
        """
        ...

    async def ask_duration(
        self,
        machine_id: MachineId,
        *,
        total: timedelta,
        at: datetime,
        by: OwnerId,
        epoch: int,
        budgets: Sequence[Budget] = (),
    ) -> tuple[Machine, Sequence[BudgetState]]:
        """Write down that a longer running time is about to be asked for (`asked_duration`), within the budgets.

        Raises BudgetExceeded, LeaseLost (`epoch`).
        """
        ...

    async def budgets(
        self,
        budgets: Sequence[Budget],
        *,
        now: datetime,
        run_id: str = "",
        provider: str | None = None,
        account: str | None = None,
    ) -> Sequence[BudgetState]:
        """Return how budgets stand in their windows of `now`: of one account, or of all in the database."""
        ...

    async def first_alert(self, key: str, *, at: datetime) -> bool:
        """Return whether nobody has said this before (a budget's name and window), and remember that it is said."""
        ...

    async def machine(self, machine_id: MachineId) -> Machine | None:
        """Return one machine by our id."""
        ...

    async def machines(
        self,
        *,
        provider: str,
        account: str,
        open_only: bool = True,
        since: datetime | None = None,
        states: Collection[MachineState] | None = None,
        server_ids: Collection[ServerId] | None = None,
    ) -> Sequence[Machine]:
        """Return the account's machines, oldest first; `since`: all that were open at that time or later.

        With `states` or `server_ids` only those among them: books of years are not read for one machine.
        """
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
        Where the machine's bill has an end from now on (`Machine.bill_ends`), its ledger is brought up to that in the
        same transaction; so in `change`.
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

    # work
    async def put_work(self, work: Work) -> None:
        """Write down a job's time on a machine, or what is newer of it: known by machine, job and attempt."""
        ...

    async def works(
        self,
        *,
        machine_ids: Collection[MachineId] | None = None,
        job_ids: Collection[JobId] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> Sequence[Work]:
        """Return what began in [`since`, `until`), oldest first; with `limit` the newest so many.

        `job_ids` is meant for a few.
        """
        ...

    # signals and decisions
    async def signal(self, signal: Signal) -> None:
        """Write down what a client has told."""
        ...

    async def signals(self, *, since: datetime) -> Sequence[Signal]:
        """Return what was told since then, oldest first."""
        ...

    async def decide(self, decisions: Sequence[Decision]) -> None:
        """Write down what the plan decided."""
        ...

    async def decisions(self, *, since: datetime | None = None, limit: int = 200) -> Sequence[Decision]:
        """Return the newest decisions, oldest first."""
        ...

    # roles: see `JobStore.take_role`; the role `fleet` is kept where the machines are
    async def take_role(
        self, role: str, owner_id: OwnerId, *, lease: timedelta, now: datetime | None = None
    ) -> int | None:
        """Take or keep a role that one process of the database has at a time; return its epoch, None if held.

        The time is the store's own, read in the transaction; `now` stands in for it.
        """
        ...

    async def drop_role(self, role: str, owner_id: OwnerId) -> None:
        """Give the role up, if this owner holds it."""
        ...

    # money
    async def close_bill(
        self, machine_id: MachineId, *, end: datetime, recorded_at: datetime, note: str
    ) -> LedgerEntry | None:
        """Bring a machine's ledger up to `end` in one transaction; return what was added.

        None if it was never ready, or the ledger reaches that far already. Two processes that close the same bill
        write it once.
        """
        ...

    async def unbilled(self, *, provider: str, account: str, since: datetime | None = None) -> Sequence[Machine]:
        """Return the account's machines whose bill has an end that their ledger does not reach, oldest first.

        `since`: only those that changed their state since then. There are none, unless a write was refused.
        """
        ...

    async def post(self, entries: Sequence[LedgerEntry]) -> None:
        """Add entries to the ledger. What is there is never changed."""
        ...

    async def ledger(
        self, *, machine_id: MachineId | None = None, since: datetime | None = None
    ) -> Sequence[LedgerEntry]:
        """Return the entries in the order in which they were written; `since`: those that end after it."""
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

    async def requests_held(self, account: str, *, now: datetime) -> timedelta:
        """Return for how much longer no request of the account may start; zero if none is held."""
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
