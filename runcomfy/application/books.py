"""
Our books of machines: intents, states, owners, and what was billed.

Every write goes through here, so that what this process holds (`held`) is known without asking anybody: it is the last
word of a program that has to leave. Writes on the way to a stop are soft: a full disk never prevents a stop (I23).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from runcomfy.domain.exceptions import BudgetExceeded, LeaseLost, LocalError, ValueInvalid
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import (
    OPEN,
    IllegalTransition,
    Machine,
    MachineEvent,
    MachineId,
    Purpose,
    ServerId,
)
from runcomfy.domain.money import LedgerEntry, Rate, meter
from runcomfy.domain.settings import KNOWN_SERVER_TYPES, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.machines")

Tell = Callable[[str], None]
"""Takes a sentence for the user."""


def quiet(_: str) -> None:
    """Tell nobody."""


class Books:
    """What one owner writes down about the machines of one account."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        settings: Settings,
        owner: Owner,
        *,
        provider: str,
        account: str,
        tell: Tell = quiet,
    ) -> None:
        self.store = store
        self.clock = clock
        self.settings = settings
        self.owner = owner
        self.provider = provider
        self.account = account
        self.tell = tell
        self.held: dict[MachineId, Machine] = {}
        """What this process has rented or is ending, as far as it knows."""

    def price(self, server_type: str) -> Rate:
        """Return the rate of a type; refuse before any money is spent.

        Raises ValueInvalid (no price known), BudgetExceeded (dearer than the limit set).
        """
        rate = self.settings.rates.find(server_type)
        if rate is None:
            known = ", ".join(self.settings.rates.rates)
            raise ValueInvalid(
                f"no price is known for the machine type {server_type!r}",
                hint=f"use one of {known}; or add it with its price to a file and name that in RUNCOMFY_RATES_FILE",
            )
        cap = self.settings.cloud.max_usd_per_hour
        if cap is not None and rate.usd_per_hour > cap:
            raise BudgetExceeded(
                f"{server_type} costs ${rate.usd_per_hour} per hour, more than the limit of ${cap}",
                hint="raise RUNCOMFY_MAX_USD_PER_HOUR or choose a cheaper --server-type",
                details={"usd_per_hour": str(rate.usd_per_hour), "cap_usd_per_hour": str(cap)},
            )
        if server_type not in KNOWN_SERVER_TYPES:
            self.tell(f"note: RunComfy does not document the machine type {server_type}; it may be refused")
        return rate

    def intent(
        self, *, purpose: Purpose, server_type: str, duration: timedelta, reason: str, version_id: str | None = None
    ) -> Machine:
        """Return the machine that is to be rented; nothing is written or sent yet."""
        if duration <= timedelta(0):
            raise ValueInvalid("the duration must be longer than nothing", hint="give --duration in seconds, e.g. 3600")
        rate = self.price(server_type)
        now = self.clock.now()
        return Machine(
            id=MachineId(str(uuid4())),
            provider=self.provider,
            account=self.account,
            purpose=purpose,
            server_type=server_type,
            duration=duration,
            usd_per_hour=rate.usd_per_hour,
            rate_source=f"{rate.plan}, {rate.source}",
            requested_at=now,
            since=now,
            workflow_version_id=version_id or self.settings.cloud.workflow_version_id,
            reason=reason,
            owner_id=self.owner.id,
        )

    # -- books ---------------------------------------------------------------------------------------------

    async def post(self, machine: Machine, *, note: str) -> None:
        """Bring the ledger up to the end of the bill; what is there already is not written again."""
        end = machine.stop_accepted_at or machine.gone_at
        if machine.ready_at is None or end is None:
            return
        try:
            posted = await self.store.ledger(machine_id=machine.id)
            start = max((entry.ended_at for entry in posted), default=machine.ready_at)
            if end <= start:
                return
            await self.store.post(
                [
                    LedgerEntry(
                        machine_id=machine.id,
                        started_at=start,
                        ended_at=end,
                        usd_per_hour=machine.usd_per_hour,
                        amount_usd=meter(start, end, machine.usd_per_hour),
                        recorded_at=self.clock.now(),
                        note=note,
                    )
                ]
            )
        except LocalError as error:
            self.tell(f"the cost of {machine.server_id} could not be written down: {error}")

    async def record(
        self, machine: Machine, event: MachineEvent, *, note: str, changes: Mapping[str, Any] | None = None
    ) -> Machine:
        """Apply an event and changes, fenced by the epoch; raises LeaseLost, IllegalTransition, LocalError."""
        after = await self.store.record(
            machine.id,
            event,
            at=self.clock.now(),
            by=self.owner.id,
            epoch=machine.epoch,
            note=note,
            changes=changes or {},
        )
        self.hold(after)
        return after

    async def change(self, machine: Machine, *, note: str, **fields: Any) -> Machine:
        """Change fields without an event, fenced by the epoch; raises LeaseLost, LocalError."""
        after = await self.store.change(
            machine.id, at=self.clock.now(), by=self.owner.id, epoch=machine.epoch, note=note, **fields
        )
        self.hold(after)
        return after

    async def record_softly(
        self, machine: Machine, event: MachineEvent, *, note: str, changes: Mapping[str, Any]
    ) -> Machine:
        """Record on the way to a stop: a full disk, a lost lease or odd books never prevent the stop itself."""
        try:
            return await self.record(machine, event, note=note, changes=changes)
        except (LocalError, IllegalTransition) as error:
            log.warning("machine_event_not_recorded", extra={"fields": {"event": event, "error": error.code}})
            with suppress(IllegalTransition):
                machine = machine.on(event, at=self.clock.now())
            machine = replace(machine, **changes)
            self.hold(machine)
            return machine

    async def change_softly(self, machine: Machine, *, note: str, **fields: Any) -> Machine:
        """Change fields on the way to a stop; what cannot be written is kept in memory and logged."""
        try:
            return await self.change(machine, note=note, **fields)
        except LocalError as error:
            log.warning("machine_change_not_recorded", extra={"fields": {"error": error.code, **self.facts(machine)}})
            machine = replace(machine, **fields)
            self.hold(machine)
            return machine

    async def latest(self, machine_id: MachineId) -> Machine | None:
        """Return a machine as it is in the store, or as we last knew it where the store cannot be read."""
        try:
            return await self.store.machine(machine_id)
        except LocalError:
            return self.held.get(machine_id)

    def hold(self, machine: Machine) -> None:
        """Remember the machine while it is open and ours."""
        if machine.state in OPEN and machine.owner_id == self.owner.id:
            self.held[machine.id] = machine
        else:
            self.held.pop(machine.id, None)

    async def hand_over(self, machine: Machine, *, kept_until: datetime | None, note: str) -> Machine:
        """Leave the machine running without a process; it is kept until then and may be reaped after."""
        machine = await self.change(machine, note=note, kept_until=kept_until)
        machine = await self.store.take_over(
            machine.id, expected_owner=self.owner.id, new_owner=None, at=self.clock.now(), note=note
        )
        self.held.pop(machine.id, None)
        return machine

    async def take_over(self, machine: Machine, *, note: str) -> Machine:
        """Become the machine's owner. Raises LeaseLost if somebody else did first."""
        machine = await self.store.take_over(
            machine.id, expected_owner=machine.owner_id, new_owner=self.owner.id, at=self.clock.now(), note=note
        )
        self.hold(machine)
        return machine

    async def try_take_over(self, machine: Machine, *, note: str) -> Machine | None:
        """Become the owner, or None if somebody else was quicker."""
        try:
            return await self.take_over(machine, note=note)
        except LeaseLost:
            return None

    async def row_of(self, server_id: ServerId) -> Machine | None:
        """Return our row of a machine the provider names, if we have one."""
        rows = await self.rows(open_only=False)
        return next((row for row in rows if row.server_id == server_id), None)

    async def rows(self, *, open_only: bool = True) -> Sequence[Machine]:
        """Return our books' machines of this account."""
        return await self.store.machines(provider=self.provider, account=self.account, open_only=open_only)

    def facts(self, machine: Machine) -> dict[str, Any]:
        """Return what a log line says of a machine."""
        return {
            "machine": machine.id,
            "server_id": machine.server_id,
            "type": machine.server_type,
            "state": str(machine.state),
            "purpose": str(machine.purpose),
            "usd_per_hour": str(machine.usd_per_hour),
            "reason": machine.reason,
        }
