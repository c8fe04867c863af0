"""
The life of a rented machine, as a table.

Three facts are kept apart because they come from different mouths: what we intend (a row written before the call),
what the provider says (`MachineReport`), and what ComfyUI on the machine answers (checked by the application).

Rule 1: every state change goes through `Machine.on`.
Rule 2: this file knows no provider; STOPPED means the same for all of them.
Rule 3: only the provider's own word ends billing. Asking for a stop does not, and neither does silence: that is why
        LOST and STOPPING still bill. A provider's yes to a stop closes the bill provisionally; seeing the machine
        run again reopens it.
Rule 4: a launch that was never answered (REQUESTED) may have started a machine. It ends as NEVER only when the
        provider refused it, or when nothing appeared in its lists for the whole visibility window.

    REQUESTED --listed--> BOOTING --answered--> READY --stop-asked--> STOPPING --gone--> STOPPED
        |--refused / absent--> NEVER              |--silent--> LOST --answered--> READY
    STOPPED --listed--> STOPPING                  (it came back: the stop is asked for again)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Final, NewType

from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.secret import SecretUrl

MachineId = NewType("MachineId", str)
"""Our own id of a machine: the uuid of the intent that asked for it."""

ServerId = NewType("ServerId", str)
"""The provider's id of a machine (RunComfy says server_id)."""

OwnerId = NewType("OwnerId", str)


class Purpose(StrEnum):
    """Why a machine was rented, which decides who may end it."""

    DEV = "dev"
    """Kept warm for a working day; lives without a process until `kept_until`."""
    RUN = "run"
    """Rented by one command for its own job; ends with it."""
    TAKEN = "taken"
    """Found on the account and taken over because the user said so."""
    POOL = "pool"
    """Rented by a pool for the jobs of the queue; whoever holds the pool's role takes it over from a dead one."""


class MachineState(StrEnum):
    """Where a machine is in its life, as far as we can prove."""

    REQUESTED = "requested"
    BOOTING = "booting"
    READY = "ready"
    LOST = "lost"
    STOPPING = "stopping"
    STOPPED = "stopped"
    NEVER = "never"


class MachineEvent(StrEnum):
    """What happened to a machine."""

    LISTED = "listed"
    ANSWERED = "answered"
    SILENT = "silent"
    STOP_ASKED = "stop-asked"
    GONE = "gone"
    REFUSED = "refused"
    ABSENT = "absent"


S, E = MachineState, MachineEvent

NEXT: Final[Mapping[tuple[MachineState, MachineEvent], MachineState]] = {
    (S.REQUESTED, E.LISTED): S.BOOTING,
    (S.REQUESTED, E.REFUSED): S.NEVER,
    (S.REQUESTED, E.ABSENT): S.NEVER,
    (S.BOOTING, E.ANSWERED): S.READY,
    (S.LOST, E.ANSWERED): S.READY,
    (S.READY, E.ANSWERED): S.READY,
    (S.STOPPING, E.ANSWERED): S.STOPPING,  # it became ready after we had asked it to stop
    (S.BOOTING, E.SILENT): S.LOST,
    (S.READY, E.SILENT): S.LOST,
    (S.STOPPED, E.LISTED): S.STOPPING,
    (S.NEVER, E.LISTED): S.BOOTING,
    **{(state, E.STOP_ASKED): S.STOPPING for state in (S.BOOTING, S.READY, S.LOST, S.STOPPING)},
    **{(state, E.GONE): S.STOPPED for state in (S.BOOTING, S.READY, S.LOST, S.STOPPING)},
}

OPEN: Final = frozenset({S.REQUESTED, S.BOOTING, S.READY, S.LOST, S.STOPPING})
"""States in which a machine may exist at the provider."""


class IllegalTransition(RunComfyError):
    """A machine cannot do that in the state it is in."""

    code = "illegal-transition"


@dataclass(frozen=True, slots=True)
class Machine:
    """One rented machine, or one launch that may have started one. Times are aware UTC, money is USD."""

    id: MachineId
    provider: str
    account: str
    """Which account at the provider: a digest of address and user id, never the user id itself."""
    purpose: Purpose
    server_type: str
    duration: timedelta
    """The running time asked for, counted from ready."""
    usd_per_hour: Decimal
    rate_source: str
    """Where the price came from: plan and date of the table."""
    requested_at: datetime
    since: datetime
    state: MachineState = MachineState.REQUESTED
    workflow_version_id: str = ""
    reason: str = ""
    """Why it was launched, in words."""
    owner_id: OwnerId | None = None
    epoch: int = 1
    """Goes up with every change of owner; a write with an older epoch is refused."""
    before_ids: tuple[ServerId, ...] = ()
    """What the account listed just before the launch: what is new after it may be ours."""
    server_id: ServerId | None = None
    ready_at: datetime | None = None
    planned_stop_at: datetime | None = None
    """When the provider says it will stop the machine by itself."""
    kept_until: datetime | None = None
    """Until when a DEV machine may live without a living process; None: as long as its owner lives."""
    stop_asked_at: datetime | None = None
    stop_reason: str = ""
    stop_accepted_at: datetime | None = None
    """The provider's yes to the stop: RunComfy bills until then."""
    gone_at: datetime | None = None
    last_used_at: datetime | None = None
    run_id: str = ""
    """Which command's doing it is, for a budget per run: the owner that launched it, whoever has it now."""
    for_project: str = ""
    for_user: str = ""
    """For whom it was launched, where that is one; empty for a machine of everybody."""
    asked_duration: timedelta | None = None
    """A running time that was asked for and not confirmed yet: budgets count it, nobody relies on it."""
    draining: str = ""
    """Why it takes no further jobs; empty while it does."""

    @property
    def is_open(self) -> bool:
        """Whether the machine may still exist at the provider."""
        return self.state in OPEN

    @property
    def bills(self) -> bool:
        """Whether the machine must be taken to cost money: it was ready, and nobody said that it is gone."""
        return self.ready_at is not None and self.state is not MachineState.STOPPED

    @property
    def bill_ends(self) -> datetime | None:
        """Until when it is billed, as far as that is known by now: the provider's yes to a stop, or its end."""
        return self.stop_accepted_at or self.gone_at

    @property
    def bill_words(self) -> str:
        """What the ledger says of the last entry of a bill that has ended."""
        return "ready until the stop was accepted" if self.stop_accepted_at is not None else "ready until gone"

    def on(self, event: MachineEvent, *, at: datetime) -> Machine:
        """Return the machine after `event`.

        Raises:
            IllegalTransition: if the event cannot happen in this state.
        """
        try:
            state = NEXT[self.state, event]
        except KeyError:
            raise IllegalTransition(f"machine {self.id}: {event} while {self.state}") from None
        machine = replace(self, state=state, since=at if state is not self.state else self.since)
        if event is MachineEvent.STOP_ASKED and self.stop_asked_at is None:
            machine = replace(machine, stop_asked_at=at)
        if event is MachineEvent.GONE:
            machine = replace(machine, gone_at=at)
        if event is MachineEvent.LISTED and self.state in (S.STOPPED, S.NEVER):
            machine = replace(machine, gone_at=None, stop_accepted_at=None)
        return machine


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of a machine's story, as it was written down."""

    machine_id: MachineId
    number: int
    at: datetime
    event: str
    state: str
    by: str
    note: str


class Phase(StrEnum):
    """A provider's status word, reduced to what it means for us."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    GONE = "gone"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """A word we do not know: alive, billed, keep asking."""


@dataclass(frozen=True, slots=True)
class MachineReport:
    """What the provider says about one machine. Only `server_id` is sure to be there."""

    server_id: ServerId
    phase: Phase
    status: str
    """The provider's own word, made safe to show."""
    server_type: str = ""
    url: SecretUrl | None = None
    duration: timedelta | None = None
    ready_at: datetime | None = None
    stopping_at: datetime | None = None
    workflow_version_id: str = ""
    addressable: bool = True
    """Whether the provider can be asked about it; where its id is unusable, `server_id` is a name made up for it."""

    @property
    def usable(self) -> bool:
        """Ready, with an address."""
        return self.phase is Phase.READY and self.url is not None


@dataclass(frozen=True, slots=True)
class CloudWorkflow:
    """A workflow saved in the account's cloud; machines are launched with its version id."""

    workflow_id: str
    name: str
    version_id: str
    created_at: str = ""
    updated_at: str = ""
