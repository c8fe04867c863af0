"""
What the cloud's own books say of a simulated day: I1-I9, I19, I22, I23, and that nothing is left on.

It hears each call when the emulated cloud has worked on it, before anybody is answered, and looks at the machines once
a minute. What our books hold is asked for to be compared with that, never the other way round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

from runcomfy.domain.machine import Machine, MachineState
from runcomfy.domain.money import seconds_between
from runcomfy.domain.renewal import lease_for
from runcomfy.domain.settings import PoolSettings
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy.cloud import CallRecord
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine
from runcomfy.testing.simulation.harm import Blow, Harm, harm_of
from runcomfy.testing.simulation.load import Order, number_of
from runcomfy.testing.simulation.violations import Found
from runcomfy.testing.simulation.world import POOL

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

PROGRAM_FAULTS: Final = frozenset({1, 2, 3, 54, 55, 61, 62, 63, 64})
"""What happens to our own programs."""
STORE_FAULTS: Final = frozenset({54, 55})
PROVIDER_AWAY: Final = frozenset({26, 29, 74, 11, 10, 25, 31, 32})
"""While these last, the provider may not be heard at all."""
SLACK: Final = 60.0
"""Seconds of I9."""
RATE: Final = 60.0 + 15.0
"""Calls in a minute: one a second, and a burst."""
UNKNOWN_MOST: Final = 420.0
"""Undisturbed seconds that a machine which bills may be nobody's: a look, and the time until it must be visible."""
UNASKED_MOST: Final = 900.0
"""Undisturbed seconds after which a machine that runs on must have been asked to stop again: some looks."""
RETRY_AFTER_CAP: Final = 60.0


class CloudOracle:
    """Listens to one world's cloud."""

    def __init__(self, world: World, found: Found) -> None:
        self.world, self.found = world, found
        self.harm: Harm = harm_of(world)
        self.budget_caps: dict[str, Decimal] = {}
        self._calls: deque[float] = deque()
        self._cut: tuple[str, str, float] | None = None
        """The last call, if its connection was broken under it."""
        self._held_until = 0.0
        self._held_at = 0.0
        self._launched = len(world.cloud.launched)
        self._intents: dict[str, str] = {}
        """Intent -> what became of the launch that was sent for it."""
        self._unknown: dict[str, float] = {}
        """Undisturbed seconds for which a machine that bills was not in our books as such."""
        self._unasked: dict[str, float] = {}
        """Undisturbed seconds since a machine that still bills was asked to stop."""
        self._explained: set[str] = set()
        """Machines of which it was said already why nobody has them."""
        self._launchers: list[tuple[float, int]] = []
        self._longer_failed: dict[str, float] = {}
        world.cloud.on_call.append(self._heard)
        world.services.observers.append(self._visited)

    # -- each call -----------------------------------------------------------------------------------------

    def _heard(self, record: CallRecord) -> None:
        now = self.world.seconds
        self._rate(record, now)
        if record.method == "POST" and record.path == "servers":
            if not record.refused:
                created = self.world.cloud.launched[self._launched :]
                self.harm.spawn(self._check_intent(record, created[-1] if created else "", now))
                self._check_lease(record.body, "estimated_duration", None, now)
            self._launched = len(self.world.cloud.launched)
        elif record.method == "DELETE":
            self._check_stop(record, now)
        elif record.path.endswith("/update-estimated-duration"):
            server_id = record.path.split("/")[1]
            machine = self.world.cloud.machines.get(server_id)
            if record.status != 200 or record.reply is not None or not record.worked:
                self._longer_failed[server_id] = now
            if machine is not None and record.worked:
                self._check_lease(record.body, "update_estimated_duration", machine, now)

    def _rate(self, record: CallRecord, now: float) -> None:
        """I22: calls per minute, and Retry-After.

        Where a connection breaks under a GET or DELETE, the HTTP client repeats it once by itself: that is one call.
        """
        call, calls = (record.method, record.path), self._calls
        repeats = self._cut == (*call, now)
        self._cut = (*call, now) if record.reply in ("lost", "reset") and not repeats else None
        if repeats:
            return
        calls.append(now)
        while calls[0] < now - 60:
            calls.popleft()
        if len(calls) > RATE and not self._disturbed(STORE_FAULTS, now - 60, now):
            self.found.add("I22", f"{len(calls)} calls in a minute", at=now, mark="rate")
        if self._held_at + 1 < now < self._held_until - 1 and not self._disturbed(
            PROGRAM_FAULTS, self._held_at - 1, now
        ):
            left = self._held_until - now
            self.found.add("I22", f"{record.method} {record.path} {left:.0f} s before Retry-After was over", at=now)
        if record.status in (429, 503) and record.reply is None and record.retry_after is not None:
            seconds = _retry_after(record.retry_after, record.at)
            if seconds is not None and seconds > 0:
                self._held_at = now
                self._held_until = max(self._held_until, now + min(seconds, RETRY_AFTER_CAP))

    async def _check_intent(self, record: CallRecord, server_id: str, now: float) -> None:
        """I1, I3, I23: one committed intent for each launch that is sent, and one launch for each intent."""
        rows = await self.world.services.machines(open_only=False)
        open_rows = [row for row in rows if row.state is MachineState.REQUESTED and row.server_id is None]
        fresh = [row for row in open_rows if str(row.id) not in self._intents]
        if fresh:
            self._intents[str(fresh[-1].id)] = server_id
            self._check_budget(rows, record.at, now)
            return
        if open_rows:
            self._explained |= {server_id, self._intents[str(open_rows[-1].id)]}
            self.found.add(
                "I3",
                f"intent {open_rows[-1].id} was sent again, though the first answer did not say no",
                server_id,
                at=now,
            )
        elif self._store_trouble(now):
            self.found.add("I23", "a machine was launched while the books could not be written", server_id, at=now)
        else:
            self.found.add("I1", "a machine was launched without an intent in the books", server_id, at=now)

    def _check_lease(self, body: Any, name: str, machine: EmulatedMachine | None, now: float) -> None:
        """I5: no machine is ever paid ahead by more than a lease."""
        asked = body.get(name) if isinstance(body, dict) else None
        if not isinstance(asked, int):
            return
        used = 0.0
        if machine is not None and machine.ready_at is not None:
            used = (self.world.cloud.now() - machine.ready_at).total_seconds()
        cloud = self.world.services.settings.cloud
        machines = len(self.world.cloud.machines)
        lease = lease_for(min(machines, 100), lease=cloud.run_lease, requests_per_second=cloud.requests_per_second)
        ahead, most = asked - used, lease.total_seconds() + 60 + (self._early(machine) if machine is not None else 0.0)
        if ahead > most and not (machine is not None and self._misled(machine)):
            subject = machine.server_id if machine is not None else ""
            self.found.add("I5", f"a machine was paid {ahead:.0f} s ahead, a lease is {most:.0f} s", subject, at=now)

    def _check_budget(self, rows: Sequence[Machine], at: datetime, now: float) -> None:
        """I6: what is billed and what may still be, by the cloud's books, within the caps when a launch is sent."""
        budgets = self.world.budgets
        for budget in budgets:
            if budget.hard is None or budget.project or budget.user:
                continue
            window = budget.window(at)
            total = Decimal(0)
            for machine in self.world.cloud.machines.values():
                if machine.foreign or machine.traits.ignores_stop_time or machine.traits.ignores_delete:
                    continue
                start = machine.ready_at or at
                end = (
                    machine.billed_until
                    or machine.gone_at
                    or max(at, start + timedelta(seconds=machine.estimated_duration))
                )
                start, end = max(start, window.start or start), min(end, window.end or end)
                total += machine.usd_per_hour * seconds_between(start, end) / 3600
            if total > budget.hard * Decimal("1.02"):
                what = f"${total:.2f} is committed with this launch, the budget per {budget.name} is ${budget.hard}"
                self.found.add("I6", what, at=now)

    def _check_stop(self, record: CallRecord, now: float) -> None:
        """I7 and I8: nobody else's machine, and none that computes without a reason."""
        server_id = record.path.split("/")[1]
        machine = self.world.cloud.machines.get(server_id)
        if machine is None:
            return
        self._unasked[server_id] = 0.0
        if machine.foreign:
            self.found.add("I7", "a machine of somebody else was asked to stop", server_id, at=now)
            return
        prompt = _running(machine)
        if prompt is None:
            return
        prompt_id, number = prompt
        order = self.world.acknowledged.get(f"job-{number}") if number is not None else None
        wanted = prompt_id in self.harm.by_hand or (isinstance(order, Order) and order.cancelled_at is None)
        if not wanted or self._may_stop_busy(server_id, now):
            return
        invariant = "I21" if any(0 <= now - at < 180 for at in self.harm.clock_set) else "I8"
        whose = "a person's prompt" if number is None else f"job-{number}"
        self.found.add(invariant, f"a machine was asked to stop while it computed {whose}", server_id, at=now)

    def _may_stop_busy(self, server_id: str, now: float) -> bool:
        """Whether there is a reason: a budget, it was hit itself, its lease could not be prolonged, a service ends."""
        if self.world.budgets:
            return True
        if self.harm.hit(server_id, before=now, within=2_400):
            return True
        if now - self._longer_failed.get(server_id, -1e9) < 900:
            return True
        return self._disturbed(PROGRAM_FAULTS | PROVIDER_AWAY, now - 1_500, now)

    def _visited(self, app: Any, place: str) -> None:
        """I19: the role goes from one to the next, and not back and forth between two that live."""
        if place != "before provider.launch_machine":
            return
        now = self.world.seconds
        who = id(app)
        launchers = self._launchers
        if launchers and launchers[-1][1] != who:
            previous = next((at for at, other in reversed(launchers) if other == who), None)
            taken_over = next(at for at, other in launchers if previous is None or at > previous)
            others = {other for at, other in launchers if previous is not None and at > previous}
            alive = {id(served.app) for served in self.world.served}
            if (
                previous is not None
                and others & alive
                and not self._disturbed(PROGRAM_FAULTS - {63}, taken_over - 5, now)
            ):
                self.found.add("I19", "two services launch machines by turns", at=now, mark="turns")
        launchers.append((now, who))

    # -- each minute ---------------------------------------------------------------------------------------

    async def look(self, passed: float) -> None:
        """I2, I3, I4: look at the machines that bill; `passed` is the time since the last look, in seconds."""
        now = self.world.seconds
        billing = [m for m in self.world.cloud.machines.values() if m.bills and not m.foreign]
        for server_id in set(self._unknown) - {m.server_id for m in billing}:
            del self._unknown[server_id]
        if not billing or not self.healthy(now):
            return
        rows = {str(row.server_id): row for row in await self.world.services.machines(open_only=False) if row.server_id}
        for machine in billing:
            server_id = machine.server_id
            row = rows.get(server_id)
            if row is not None and row.state not in (MachineState.STOPPED, MachineState.NEVER):
                self._unknown.pop(server_id, None)
                self._look_at_stop(machine, now, passed)
                continue
            unknown = self._unknown[server_id] = self._unknown.get(server_id, 0.0) + passed
            if unknown <= UNKNOWN_MOST:
                continue
            if server_id in self._explained:
                continue
            if row is None:
                self.found.add(
                    "I2", f"it bills and is in no row of ours for {unknown:.0f} s", server_id, at=now, mark="row"
                )
            else:
                number = "I4" if row.state is MachineState.STOPPED else "I3"
                self.found.add(number, f"it bills, and our books call it {row.state}", server_id, at=now, mark="gone")

    def _look_at_stop(self, machine: EmulatedMachine, now: float, passed: float) -> None:
        if machine.server_id not in self._unasked:
            return
        unasked = self._unasked[machine.server_id] = self._unasked[machine.server_id] + passed
        if unasked > UNASKED_MOST:
            what = (
                f"it was asked to stop, still bills, and nobody has asked again for {unasked:.0f} undisturbed seconds"
            )
            self.found.add("I4", what, machine.server_id, at=now, mark="asked")

    def healthy(self, now: float) -> bool:
        """Whether somebody serves who can hear the provider and write the books."""
        awake = [served for served in self.world.served if served.app.awake.is_set() and not served.app.killed.is_set()]
        return bool(awake) and not self._disturbed(STORE_FAULTS | {26, 29, 62, 64}, now, now)

    # -- at the end ----------------------------------------------------------------------------------------

    async def judge(self) -> None:
        """I2, I9, I25 and what the day's machines have come to."""
        now = self.world.seconds
        rows: dict[str, list[Machine]] = {}
        for row in await self.world.services.machines(open_only=False):
            if row.server_id is not None:
                rows.setdefault(str(row.server_id), []).append(row)
        for server_id, bill in self.world.cloud.books.items():
            if bill.foreign:
                if server_id in rows:
                    self.found.add("I7", "a machine of somebody else is in our books", server_id, at=now)
                continue
            if bill.ended_at is None and bill.ready_at is not None:
                self.found.add("I25", "it still bills, long after everything had ended", server_id, at=now)
            own = rows.get(server_id, [])
            if len(own) > 1:
                self.found.add("I3", f"{len(own)} intents have this machine", server_id, at=now)
            if not own:
                self._unowned(server_id, now)
                continue
            await self._compare(own[0], server_id, now)

    def _unowned(self, server_id: str, now: float) -> None:
        machine = self.world.cloud.machines[server_id]
        if machine.ready_at is None or server_id in self._explained:
            return
        seconds = self._shown_for(machine, machine.ready_at)
        if seconds > UNKNOWN_MOST:
            what = f"it was billed for {seconds:.0f} s after a list had shown it, and is in no row of ours"
            self.found.add("I2", what, server_id, at=now)

    def _shown_for(self, machine: EmulatedMachine, ready: datetime) -> float:
        """Return for how many seconds it billed after the first list that somebody read who lived on."""
        end = machine.billed_until or machine.gone_at or self.world.cloud.now()
        begin = self.world.now - timedelta(seconds=self.world.seconds)
        for call in self.world.cloud.calls:
            if call.method != "GET" or call.path.partition("?")[0] != "servers" or not ready <= call.at < end:
                continue
            if self._unanswered(call) or call.status != 200:
                continue
            at = (call.at - begin).total_seconds()
            if not self._disturbed(PROGRAM_FAULTS, at, at + 60):
                return (end - call.at).total_seconds()
        return 0.0

    async def _compare(self, row: Machine, server_id: str, now: float) -> None:
        """I9: the ledger of a machine against its bill, within 60 s or 1 %, or what nobody could know."""
        machine = self.world.cloud.machines[server_id]
        billed = machine.seconds(self.world.cloud.now())
        entries = await self.world.services.books.ledger(machine_id=row.id)
        since = machine.ready_at if machine.ready_at is not None and self._early(machine) else row.requested_at
        spans = ((max(entry.started_at, since), max(entry.ended_at, since)) for entry in entries)
        ours = sum((seconds_between(start, end) for start, end in spans), Decimal(0))
        allowed = max(Decimal(SLACK), billed / 100) + Decimal(self._unheard(machine) + self._unwatched(machine))
        if abs(ours - billed) > allowed and not self._misled(machine):
            what = f"our ledger has {ours:.1f} s, the cloud bills {billed:.1f} s (at most {allowed:.0f} s may differ)"
            self.found.add("I9", what, server_id, at=now)

    def _unwatched(self, machine: EmulatedMachine) -> float:
        """Return how many seconds longer than in life nobody looks whether a machine is there that nobody asked to go.

        What I9 promises of one that crashed or was deleted by hand (22, 68), it promises for pools that look as often
        as they do by themselves. In a simulated day they look more rarely, and a list that was read for something else
        meanwhile (for a launch, by the guard) tells the pool nothing. If a list was refused meanwhile, that may have
        been the pool's, and it looks again only a round later.
        """
        end = machine.billed_until or machine.gone_at
        if end is None or not any(
            blow.number in (22, 68) and blow.machine == machine.server_id for blow in self.harm.blows
        ):
            return 0.0
        round_, usual = POOL["status_every"], PoolSettings().status_every
        refused = [
            call.at
            for call in self.world.cloud.calls
            if (call.method, call.path) == ("GET", "servers") and (self._unanswered(call) or call.status != 200)
        ]
        until = end + round_
        while any(until - round_ <= at <= until for at in refused):
            until += round_
        return float((until - end - usual).total_seconds())

    def _unanswered(self, call: CallRecord) -> bool:
        """Whether who made a call learned nothing by it."""
        patience = self.world.services.settings.cloud.request_timeout.total_seconds()
        return call.reply is not None or not call.worked or call.delay >= patience

    def _unheard(self, machine: EmulatedMachine) -> float:
        """Return for how many seconds after a machine's end nobody was told of it, by two good lists.

        If its status was asked for and not told, lists alone do not say it (I4, and row 11 of the catalogue: two lists
        and the status by id); nor does its status alone, before a second list agrees. For ever, if nobody who lived on
        had been told before that it was ready, or for how long it was prolonged.
        """
        end, ready = machine.billed_until or machine.gone_at, machine.ready_at
        if end is None or ready is None:
            return 0.0
        begin = self.world.now - timedelta(seconds=self.world.seconds)
        good, heard, longer, asked_in_vain = 0, False, False, False
        for call in self.world.cloud.calls:
            about, lists = call.path == f"servers/{machine.server_id}", call.path == "servers"
            unanswered = self._unanswered(call)
            if call.path == f"servers/{machine.server_id}/update-estimated-duration":
                longer = longer or unanswered or call.status >= 500
            if call.method != "GET" or not (about or lists) or call.at < ready:
                continue
            if unanswered or call.status not in (200, 404):
                asked_in_vain = asked_in_vain or (about and call.at >= end)
                continue
            at = (call.at - begin).total_seconds()
            if self._disturbed(PROGRAM_FAULTS, at, at + 60):
                continue  # who heard it may have died of it, or could not write it down
            if call.at < end:
                heard, longer = True, longer and about  # a list that comes later confirms what was prolonged
            else:
                good += lists
                asked_in_vain = asked_in_vain and not about
                if good >= 2 and not asked_in_vain:
                    return 1e6 if longer or not heard else (call.at - end).total_seconds() + call.delay
        return 1e6

    def _misled(self, machine: EmulatedMachine) -> bool:
        """Whether the cloud itself called a machine ready, in its own words, that never was.

        Such a word means that it is alive and bills (row 13 of the catalogue), and nobody could know better.
        """
        return machine.ready_at is None and bool(self._renamed(machine))

    def _early(self, machine: EmulatedMachine) -> float:
        """Return for how many seconds before it was ready the cloud may have called it so, in its own words."""
        if machine.ready_at is None:
            return 0.0
        ready = self.world.seconds - (self.world.now - machine.ready_at).total_seconds()
        return max((ready - blow.at for blow in self._renamed(machine) if blow.at < ready), default=0.0)

    def _renamed(self, machine: EmulatedMachine) -> list[Blow]:
        return [blow for blow in self.harm.blows if blow.number == 13 and blow.machine == machine.server_id]

    # -- what was wrong ------------------------------------------------------------------------------------

    def _disturbed(self, numbers: frozenset[int], start: float, end: float) -> bool:
        return self.harm.any_of(numbers, start, end)

    def blows(self, start: float, end: float) -> list[Blow]:
        """Return what was wrong in an interval."""
        return list(self.harm.between(start, end))

    def _store_trouble(self, now: float) -> bool:
        return self._disturbed(STORE_FAULTS, now, now)


def _running(machine: EmulatedMachine) -> tuple[str, int | None] | None:
    """Return the prompt that a machine computes, and which job's it is."""
    comfyui = machine.comfyui or machine.comfyui_was
    if not isinstance(comfyui, ComfyUIEmulator) or not comfyui.alive or comfyui.process.hanging:
        return None
    current = comfyui.process.current
    if current is None:
        return None
    record = next(each for each in reversed(comfyui.run_log) if each.prompt_id == current.prompt_id)
    return current.prompt_id, number_of(record.graph)


def _retry_after(value: str, now: datetime) -> float | None:
    if value.isdecimal():
        return float(value)
    try:
        return (parsedate_to_datetime(value) - now).total_seconds()
    except (TypeError, ValueError):
        return None
