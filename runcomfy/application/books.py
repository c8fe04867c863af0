"""
Our books of machines: intents, states, owners, and what was billed.

Every write goes through here, so that what this process holds (`held`) is known without asking anybody: it is the last
word of a program that has to leave. Writes on the way to a stop are soft: a full disk never prevents a stop (I23).

What may cost money (an intent, a longer running time) is written within the budgets: the store refuses what would pass
a hard one in the transaction that writes it (I6); a soft one is told once per window.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import uuid4

from runcomfy.domain.budget import Budget, BudgetState, made_out
from runcomfy.domain.evidence import may_be_it, same_type
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    LeaseLost,
    LocalError,
    MachineFailed,
    ValueInvalid,
    foreign_text,
)
from runcomfy.domain.lease import Owner, is_held_under
from runcomfy.domain.machine import (
    OPEN,
    IllegalTransition,
    Machine,
    MachineEvent,
    MachineId,
    MachineReport,
    MachineState,
    Purpose,
    ServerId,
)
from runcomfy.domain.money import Rate, show_usd
from runcomfy.domain.settings import KNOWN_SERVER_TYPES, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

log = logging.getLogger("runcomfy.machines")

BILLS_AGAIN: Final = timedelta(days=1)
"""How far back bills are looked at again each round; the first round looks at all."""
Tell = Callable[[str], None]
"""Takes a sentence for the user."""


def dearer(before: Machine, after: Machine) -> MachineFailed | None:
    """Return why a machine is not kept whose real type costs more than the one asked for; None if it does not."""
    if after.usd_per_hour <= before.usd_per_hour:
        return None
    return MachineFailed(
        f"machine {after.server_id} is a {after.server_type} for ${after.usd_per_hour} per hour; asked for was a "
        f"{before.server_type} for ${before.usd_per_hour}",
        hint="it is ended; try again, or another --server-type; look at RunComfy's page if it happens again",
        details={"server_id": after.server_id, "asked": before.server_type, "got": after.server_type},
    )


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
        self._named_otherwise: set[MachineId] = set()
        """Machines of which it was told that the provider calls their type by a name that has no price."""
        self._asked_at: dict[MachineId, float] = {}
        """By the loop's time, which does not jump: when the launches of this process had left for sure."""
        self._asked_by: dict[MachineId, datetime] = {}
        self._owed: dict[MachineId, dict[str, Any]] = {}
        """Fields that could not be written down: known to nobody but us, and written with the next that can be."""
        self.unwritten: set[MachineId] = set()
        """Of which an event could not be written down: the books say less than is known."""
        self.not_longer: set[MachineId] = set()
        """Whose last wish for a longer time was answered, with an error: most likely it was not granted."""
        self._unposted: set[MachineId] = set()
        """Whose cost could not be written down; that is said once."""
        self._bills_seen: datetime | None = None
        """Machines that have not changed since then were looked at for a bill that is open in the ledger."""

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
        self,
        *,
        purpose: Purpose,
        server_type: str,
        duration: timedelta,
        reason: str,
        version_id: str | None = None,
        for_user: str = "",
        for_project: str = "",
    ) -> Machine:
        """Return the machine that is to be rented; nothing is written or sent yet.

        `for_user`, `for_project`: whose budgets it counts against until jobs have run on it. Raises ValueInvalid,
        BudgetExceeded (dearer per hour than allowed).
        """
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
            run_id=self.owner.id,
            for_user=for_user,
            for_project=for_project,
        )

    async def note_type(self, machine: Machine, report: MachineReport) -> Machine:
        """Take over the type that the provider says a machine has, with its price: a launch may be given another one.

        It is billed at that price from now on. A name without a price proves nothing (providers rename things): it is
        told once, and the books stay as they are. Raises LeaseLost.
        """
        if not report.server_type or same_type(report.server_type, machine.server_type):
            return machine
        real = foreign_text(report.server_type, 40)
        rate = self.settings.rates.find(report.server_type)
        if rate is None:
            if machine.id not in self._named_otherwise:
                self._named_otherwise.add(machine.id)
                log.warning("machine_of_unknown_type", extra={"fields": {**self.facts(machine), "real_type": real}})
                self.tell(
                    f"WARNING: RunComfy calls machine {machine.server_id} a {real}, of which no price is known; it is "
                    f"booked as the {machine.server_type} that was asked for. Compare the price on RunComfy's page."
                )
            return machine
        usd, source = rate.usd_per_hour, f"{rate.plan}, {rate.source}"
        words = f"{real} in place of {machine.server_type}, booked at ${usd} per hour"
        self.tell(f"WARNING: RunComfy says that machine {machine.server_id} is a {words}")
        fields = {**self.facts(machine), "real_type": real, "real_usd_per_hour": str(usd)}
        log.warning("machine_of_another_type", extra={"fields": fields})
        return await self.change_softly(
            machine, note=f"RunComfy says {words}", server_type=real, usd_per_hour=usd, rate_source=source
        )

    # -- budgets -------------------------------------------------------------------------------------------

    def budgets_for(self, machine: Machine) -> list[Budget]:
        """Return the budgets that a machine counts against."""
        return made_out(self.settings.budgets, project=machine.for_project, user=machine.for_user)

    async def add_intent(self, machine: Machine) -> None:
        """Write a launch intent within the budgets. Raises BudgetExceeded: nothing was written then; LocalError."""
        states = await self.store.add_machine(
            machine, at=self.clock.now(), note=machine.reason, budgets=self.budgets_for(machine)
        )
        await self.alert(states, run_id=machine.run_id)

    async def ask_duration(self, machine: Machine, *, total: timedelta) -> Machine:
        """Write down that a running time is about to be asked for; a longer one only within the budgets.

        Raises BudgetExceeded (nothing changed), LeaseLost, LocalError.
        """
        after, states = await self.store.ask_duration(
            machine.id,
            total=total,
            at=self.clock.now(),
            by=self.owner.id,
            epoch=machine.epoch,
            budgets=self.budgets_for(machine) if total > machine.duration else (),
        )
        self.hold(after)
        await self.alert(states, run_id=after.run_id)
        return after

    async def alert(self, states: Sequence[BudgetState], *, run_id: str = "") -> None:
        """Tell of every budget that is nearly used up, once per window. What cannot be remembered is told again."""
        for state in states:
            budget, limit = state.budget, state.budget.alerts_at
            if limit is None or state.committed < limit:
                continue
            window = state.window.start.isoformat() if state.window.start is not None else run_id
            key = f"budget {self.account} {budget.name} {limit} {window}"
            with suppress(LocalError):
                if not await self.store.first_alert(key, at=self.clock.now()):
                    continue
            cap = f" of {show_usd(budget.hard)}" if budget.hard is not None else ""
            when = f"; resets {state.window.end:%Y-%m-%d %H:%M} UTC" if state.window.end is not None else ""
            self.tell(
                f"BUDGET: {show_usd(state.committed)}{cap} per {budget.name} is spent or committed "
                f"(alert at {show_usd(limit)}{when})"
            )
            facts = {"budget": budget.name, "committed_usd": str(state.committed), "alerts_at_usd": str(limit)}
            log.warning("budget_alert", extra={"fields": facts})

    # -- books ---------------------------------------------------------------------------------------------

    async def post(self, machine: Machine, *, note: str) -> None:
        """Bring the ledger up to the end of the bill; what is there already is not written again."""
        end = machine.stop_accepted_at or machine.gone_at
        if machine.ready_at is None or end is None:
            return
        try:
            await self.store.close_bill(machine.id, end=end, recorded_at=self.clock.now(), note=note)
        except LocalError as error:
            if machine.id not in self._unposted:
                self._unposted.add(machine.id)
                self.tell(f"the cost of {machine.server_id} could not be written down: {error}")

    async def write_end(self, row: Machine) -> bool:
        """Return whether this process has seen a machine gone whose row is open still; the row and its bill are ended.

        Raises LocalError: it cannot be written down yet. Raises LeaseLost: it is somebody else's.
        """
        if "gone_at" not in self._owed.get(row.id, {}):
            return False
        await self._write_answer(row)
        if row.id in self._owed:
            try:
                gone = await self.record(row, MachineEvent.GONE, note="gone; written later")
            except IllegalTransition as error:  # the books are odd: what they say is not tried again each round
                self._owed.pop(row.id, None)
                log.warning("machine_end_not_recorded", extra={"fields": {**self.facts(row), "error": error.code}})
                return False
            await self.post(gone, note="ready until gone, written later")
        return True

    async def _write_ends(self) -> None:
        for machine_id in [machine_id for machine_id, owed in self._owed.items() if "gone_at" in owed]:
            row = await self.store.machine(machine_id)
            if row is None or not row.is_open or row.owner_id != self.owner.id:
                self._owed.pop(machine_id, None)
            else:
                with suppress(LeaseLost):
                    await self.write_end(row)

    async def close_bills(self) -> list[Machine]:
        """Bring every ledger up to the end of its bill that a write was refused for, or an older version left so (I9).

        Before that, rows are ended whose machines this process has seen gone. Return the machines concerned. Raises
        LocalError.
        """
        await self._write_ends()
        began, seen = self.clock.now(), self._bills_seen
        behind = list(await self.store.unbilled(provider=self.provider, account=self.account, since=seen))
        for machine in behind:
            if machine.bill_ends is not None:
                note = f"{machine.bill_words}, written later"
                await self.store.close_bill(machine.id, end=machine.bill_ends, recorded_at=began, note=note)
            self.tell(f"the end of the bill of {machine.server_id} was not in the ledger; it is now")
            log.warning("bill_closed_late", extra={"fields": self.facts(machine)})
        self._bills_seen = began - BILLS_AGAIN
        return behind

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
            changes={**self._owed.get(machine.id, {}), **(changes or {})},
        )
        self._owed.pop(machine.id, None)
        self.unwritten.discard(machine.id)
        self.hold(after)
        return after

    async def change(self, machine: Machine, *, note: str, **fields: Any) -> Machine:
        """Change fields without an event, fenced by the epoch; raises LeaseLost, LocalError."""
        await self._write_answer(machine)
        after = await self.store.change(
            machine.id,
            at=self.clock.now(),
            by=self.owner.id,
            epoch=machine.epoch,
            note=note,
            **{**self._owed.get(machine.id, {}), **fields},
        )
        self._owed.pop(machine.id, None)
        self.hold(after)
        return after

    def owe(self, machine: Machine, **fields: Any) -> None:
        """Remember what could not be written of a machine: it is written with the next that can be."""
        if machine.owner_id == self.owner.id:
            self._owed.setdefault(machine.id, {}).update(fields)

    async def _write_answer(self, machine: Machine) -> None:
        """Write down what a launch was answered, if that was refused: for a row without it there is no machine (I2).

        Also that its machine is gone by now, if that was refused, too.

        Raises LeaseLost, LocalError.
        """
        owed = self._owed.get(machine.id, {})
        if "server_id" not in owed:
            return
        row = await self.store.machine(machine.id)
        if row is None or row.state is not MachineState.REQUESTED:
            return
        written: list[tuple[MachineEvent, dict[str, Any]]] = [(MachineEvent.LISTED, owed)]
        if "gone_at" in owed:  # it was ended as well meanwhile: open, it would be taken for a machine
            listed = {name: value for name, value in owed.items() if name != "gone_at"}
            written = [(MachineEvent.LISTED, listed), (MachineEvent.GONE, {"gone_at": owed["gone_at"]})]
        for event, changes in written:
            await self.store.record(
                machine.id,
                event,
                at=self.clock.now(),
                by=self.owner.id,
                epoch=machine.epoch,
                note="answered; written later" if event is MachineEvent.LISTED else "gone; written later",
                changes=changes,
            )
        self._owed.pop(machine.id, None)

    async def record_softly(
        self, machine: Machine, event: MachineEvent, *, note: str, changes: Mapping[str, Any]
    ) -> Machine:
        """Record on the way to a stop: a full disk or odd books never prevent the stop itself.

        Raises LeaseLost: somebody else looks after the machine now, and it is no longer ours to end (I7).
        """
        try:
            await self._write_answer(machine)
            return await self.record(machine, event, note=note, changes=changes)
        except LeaseLost:
            self._let_go(machine)
            raise
        except (LocalError, IllegalTransition) as error:
            if isinstance(error, LocalError):
                self.unwritten.add(machine.id)
                await self._unless_taken(machine)
                self.owe(machine, **changes)
            log.warning("machine_event_not_recorded", extra={"fields": {"event": event, "error": error.code}})
            with suppress(IllegalTransition):
                machine = machine.on(event, at=self.clock.now())
            machine = replace(machine, **changes)
            self.hold(machine)
            return machine

    async def change_softly(self, machine: Machine, *, note: str, **fields: Any) -> Machine:
        """Change fields on the way to a stop; what cannot be written is kept in memory and logged.

        Raises LeaseLost, as `record_softly` does.
        """
        try:
            return await self.change(machine, note=note, **fields)
        except LeaseLost:
            self._let_go(machine)
            raise
        except LocalError as error:
            await self._unless_taken(machine)
            self.owe(machine, **fields)
            log.warning("machine_change_not_recorded", extra={"fields": {"error": error.code, **self.facts(machine)}})
            machine = replace(machine, **fields)
            self.hold(machine)
            return machine

    async def _unless_taken(self, machine: Machine) -> None:
        """Raise LeaseLost if somebody else has the machine: a full disk can still be read (I7)."""
        try:
            row = await self.store.machine(machine.id)
        except LocalError:
            return
        if row is not None and not is_held_under(row.epoch, machine.epoch):
            self._let_go(machine)
            raise LeaseLost(
                f"machine {machine.id} was taken over in the meantime",
                hint="another comfyctl looks after it now; see `comfyctl machines ls`",
                details={"epoch": row.epoch, "expected_epoch": machine.epoch},
            )

    async def latest(self, machine_id: MachineId) -> Machine | None:
        """Return a machine as it is in the store, or as we know it where the store cannot say.

        An answer that could not be written down (a full disk) is known to nobody but us.
        """
        known = self.held.get(machine_id)
        try:
            row = await self.store.machine(machine_id)
        except LocalError:
            return known
        if row is None or (known is not None and known.epoch == row.epoch and known.server_id and not row.server_id):
            return known
        return row

    def _let_go(self, machine: Machine) -> None:
        """Forget a machine that somebody else has by now."""
        self.held.pop(machine.id, None)
        self._owed.pop(machine.id, None)

    def hold(self, machine: Machine) -> None:
        """Remember the machine while it is open and ours."""
        if machine.state in OPEN and machine.owner_id == self.owner.id:
            self.held[machine.id] = machine
        else:
            self.held.pop(machine.id, None)

    def forget(self, machine: Machine) -> None:
        """Let go of a launch that was written down, or was going to be, and was never sent."""
        self.held.pop(machine.id, None)
        self._asked_at.pop(machine.id, None)

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

    # -- launches whose answer was lost ----------------------------------------------------------------------

    def asked(self, machine: Machine) -> None:
        """Remember that the launch request has left, at the latest now."""
        self._asked_at[machine.id] = asyncio.get_running_loop().time()

    def presume_asked(self, machine: Machine, owner: Owner | None) -> None:
        """Presume that the launch of a process that died may have left as late as its last sign of life."""
        if owner is not None:
            self._asked_by[machine.id] = min(max(machine.requested_at, owner.heartbeat_at), self.clock.now())

    def must_be_visible(self, machine: Machine) -> bool:
        """Whether what this launch started must have appeared in the provider's lists by now.

        For launches of this process the loop's time decides, since clocks jump; for those of others their stamps.
        """
        window = self.settings.cloud.visibility_window
        asked_at = self._asked_at.get(machine.id)
        if asked_at is not None:
            return asyncio.get_running_loop().time() - asked_at >= window.total_seconds()
        return self.clock.now() - self._asked_by.get(machine.id, machine.requested_at) >= window

    async def fitting(
        self, machine: Machine, reports: Sequence[MachineReport]
    ) -> tuple[list[MachineReport], list[MachineReport]]:
        """Return the reports that may be what this launch started: new, unknown to us, and of the same kind.

        The second list has those that are new and of its type but differ otherwise: likely somebody else's, yet with
        them around it cannot be said that nothing was started.
        """
        rows = list(self.held.values())  # also what could not be written down yet
        with suppress(LocalError):
            rows += await self.rows(open_only=False)
        known = {row.server_id for row in rows if row.server_id is not None and row.id != machine.id}
        return may_be_it(machine, reports, known, types=self.settings.rates.rates)

    def kept_until(self, machine: Machine, report: MachineReport) -> datetime:
        """Return until when a machine that belongs to no process may live: its planned stop, known or reckoned."""
        if (planned := report.stopping_at or machine.planned_stop_at) is not None:
            return planned
        return (machine.ready_at or self.clock.now()) + (machine.duration or self.settings.cloud.duration)

    async def row_of(self, server_id: ServerId) -> Machine | None:
        """Return our row of a machine the provider names, if we have one."""
        rows = await self.rows(open_only=False, server_ids=[server_id])
        return next((row for row in rows if row.is_open), rows[-1] if rows else None)

    async def rows(
        self,
        *,
        open_only: bool = True,
        states: Collection[MachineState] | None = None,
        server_ids: Collection[ServerId] | None = None,
    ) -> Sequence[Machine]:
        """Return our books' machines of this account; see `Store.machines`."""
        return await self.store.machines(
            provider=self.provider,
            account=self.account,
            open_only=open_only,
            states=states,
            server_ids=server_ids,
        )

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
