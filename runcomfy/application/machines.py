"""
Renting and ending machines so that none is ever forgotten.

The order is always: write the intention, make the call, write the answer, look until the world agrees.

Launching. RunComfy has no idempotency key and no tags. So one process of an account launches at a time (a lock in the
store), notes what the account lists before the call, and after an answer that was lost or makes no sense looks for what
is new: one new machine that fits is ours, none within the visibility window means that none was started, several are
reported and left alone (I1, I3).

Stopping. The wish is written down if the disk lets us, the call is made in any case and repeated for ever, and the
machine counts as gone only when its own status and two full lists say so (I4).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from statistics import median
from uuid import uuid4

from runcomfy.application.books import Books
from runcomfy.application.finish import finish
from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    BootTimeout,
    LaunchAmbiguous,
    LaunchUnclear,
    MachineFailed,
    MachineLost,
    ProviderError,
    RunComfyError,
    StopUnconfirmed,
    WrongUrl,
)
from runcomfy.domain.machine import (
    Machine,
    MachineEvent,
    MachineId,
    MachineReport,
    MachineState,
    Phase,
    Purpose,
    ServerId,
)
from runcomfy.ports.processes import Processes
from runcomfy.ports.provider import Provider

log = logging.getLogger("runcomfy.machines")

LAUNCH_TRIES = 3
"""How often a launch is tried again after it was proven that the earlier try started nothing."""
HOPELESS_AFTER = timedelta(minutes=1)
"""How long a stop is repeated against a cloud that rejects the credentials: repeating cannot mend those. The machine's
own stop time and the next `reap` stand behind it."""
RESTOP_EVERY = timedelta(seconds=30)
"""How often a stop is repeated while the provider says that it is at it."""


@dataclass(frozen=True, slots=True)
class Boot:
    """How a machine's start stands."""

    status: str
    elapsed: timedelta
    expected: timedelta | None


def server_id_of(machine: Machine) -> ServerId:
    """Return the provider's id of a machine that has one; asking for less is a defect of the caller."""
    if machine.server_id is None:
        raise RunComfyError(f"machine {machine.id} was never answered and has no id at the provider")
    return machine.server_id


class Machines:
    """Rents, watches and ends machines of one account on behalf of one owner."""

    def __init__(self, provider: Provider, processes: Processes, books: Books) -> None:
        self.provider = provider
        self.processes = processes
        self.books = books
        self.store = books.store
        self.clock = books.clock
        self.settings = books.settings
        self._tries: dict[MachineId, list[MachineId]] = {}
        self._seen: set[ServerId] = set()

    def tell(self, sentence: str) -> None:
        """Say something to the user."""
        self.books.tell(sentence)

    # -- launching -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def launch_lock(self) -> AsyncIterator[None]:
        """Be the only process of the account that launches; waits for a living one, replaces a dead one."""
        account, me = self.provider.account, self.books.owner.id
        told = False
        while (holder := await self.store.take_launch_lock(account, owner_id=me, now=self.clock.now())) != me:
            other = (await self.store.owners([holder])).get(holder)
            if other is None or not self.processes.lives(other, now=self.clock.now()):
                await self.store.break_launch_lock(account, holder=holder)
                continue
            if not told:
                self.tell(f"another process (pid {other.pid}) is launching a machine; waiting for it")
                told = True
            await asyncio.sleep(1.0)
        try:
            yield
        finally:
            await finish(self.store.break_launch_lock(account, holder=me))

    async def launch(self, intent: Machine) -> Machine:
        """Rent the machine of `intent`, exactly one, and return it with the provider's id. Hold `launch_lock`.

        Raises what the provider refuses with; LaunchUnclear or LaunchAmbiguous if it stays open whether one was
        started (the intent is kept, and looked after by `reap`).
        """
        await self._resolve_earlier()
        machine = intent
        for number in range(1, LAUNCH_TRIES + 1):
            before = await self.provider.list_machines()
            machine = replace(
                machine,
                id=intent.id if number == 1 else MachineId(str(uuid4())),
                before_ids=tuple(report.server_id for report in before),
                requested_at=self.clock.now(),
                since=self.clock.now(),
            )
            self._tries.setdefault(intent.id, []).append(machine.id)
            self.books.hold(machine)
            await self.store.add_machine(machine, at=self.clock.now(), note=machine.reason)
            log.info("machine_launch", extra={"fields": self.books.facts(machine)})
            # Shielded: a Ctrl+C while the request is under way must not lose the answer.
            launched = await finish(self._launch_once(machine))
            if launched is not None:
                return launched
            self.tell(f"the launch was not answered and started nothing (try {number} of {LAUNCH_TRIES})")
        raise LaunchUnclear(
            f"{LAUNCH_TRIES} launches in a row were not answered; none of them started a machine",
            hint="try again later, or look at RunComfy's status page",
        )

    async def _resolve_earlier(self) -> None:
        """End what an earlier, never answered launch of a dead process started: one launch in flight at a time.

        We hold the launch lock, so nobody alive is launching now.
        """
        for row in await self.books.rows():
            if row.state is not MachineState.REQUESTED or row.owner_id == self.books.owner.id:
                continue
            taken = await self.books.try_take_over(row, note="its process is gone; resolved before the next launch")
            if taken is None:
                continue
            self.tell(
                f"an earlier launch ({row.requested_at:%H:%M:%S} UTC) was never answered; looking for its machine"
            )
            found = await self.find_launched(taken)
            if found is not None:
                await self.stop(found, reason="its launch was never answered and its process is gone")

    async def _launch_once(self, machine: Machine) -> Machine | None:
        try:
            report = await self.provider.launch_machine(
                server_type=machine.server_type,
                duration=machine.duration,
                workflow_version_id=machine.workflow_version_id,
            )
        except LaunchUnclear as error:
            self.tell("the launch was not answered; looking for what it started")
            log.warning("machine_launch_unclear", extra={"fields": {**self.books.facts(machine), "error": str(error)}})
            return await self.find_launched(machine)
        except RunComfyError as error:
            await self.books.record(machine, MachineEvent.REFUSED, note=error.code)
            raise
        if report.server_id in machine.before_ids or await self.books.row_of(report.server_id) is not None:
            self.tell("the launch was answered with the id of an older machine; looking for what it started")
            return await self.find_launched(machine)
        return await self._listed(machine, report, note="answered")

    async def find_launched(self, machine: Machine, *, wait: bool = True) -> Machine | None:
        """Look for what an unanswered launch started (I3).

        Returns the machine, now with its id, or None once it is sure that nothing was started (the intent is then
        closed). With `wait=False` one look is taken; None then also stands for "not known yet" (the intent is open).

        Raises LaunchAmbiguous if several new machines fit; none of them is touched.
        """
        window = self.settings.cloud.visibility_window
        lists = 0
        while True:
            reports = await self._list_patiently() if wait else await self.provider.list_machines()
            lists += 1
            candidates = await self._candidates(machine, reports)
            if len(candidates) == 1:
                return await self._listed(machine, candidates[0], note="found in the list after a lost answer")
            if candidates:
                ids = [report.server_id for report in candidates]
                await self.books.record(machine, MachineEvent.ABSENT, note=f"ambiguous: {', '.join(ids)}")
                raise LaunchAmbiguous(
                    f"{len(ids)} new machines fit one unanswered launch; none was touched",
                    hint="look at `comfyctl machines ls`; end yours with `comfyctl machines stop ID`",
                    details={"server_ids": ids},
                )
            if self.clock.now() - machine.requested_at >= window and lists >= 2:
                await self.books.record(machine, MachineEvent.ABSENT, note=f"not in {lists} lists within {window}")
                return None
            if not wait:
                return None
            await asyncio.sleep(self.settings.cloud.poll_interval.total_seconds())

    async def _candidates(self, machine: Machine, reports: Sequence[MachineReport]) -> list[MachineReport]:
        """Return the reports that may be what this launch started: new, unknown to us, and of the same kind."""
        rows = await self.store.machines(provider=self.provider.name, account=self.provider.account, open_only=False)
        known = {row.server_id for row in rows if row.server_id is not None}
        return [
            report
            for report in reports
            if report.server_id not in machine.before_ids
            and report.server_id not in known
            and report.phase is not Phase.GONE
            and report.server_type in ("", machine.server_type)
            and report.duration in (None, machine.duration)
            and report.workflow_version_id in ("", machine.workflow_version_id)
        ]

    async def _list_patiently(self) -> Sequence[MachineReport]:
        """Return a full list, however long the provider needs to give one."""
        delay = self.settings.cloud.poll_interval
        while True:
            try:
                return await self.provider.list_machines()
            except ProviderError as error:
                self.tell(f"RunComfy cannot be asked now ({error.code}); asking again in {delay.total_seconds():.0f} s")
                await asyncio.sleep(delay.total_seconds())
                delay = min(delay * 2, timedelta(minutes=1))

    async def _listed(self, machine: Machine, report: MachineReport, *, note: str) -> Machine:
        machine = await self.books.record(
            machine, MachineEvent.LISTED, note=f"{note}; {report.status}", changes={"server_id": report.server_id}
        )
        log.info("machine_launched", extra={"fields": self.books.facts(machine)})
        return machine

    # -- waiting -------------------------------------------------------------------------------------------

    async def expected_boot(self, server_type: str) -> timedelta | None:
        """Return how long a start of this type usually takes (median of our own), or None without history."""
        times = await self.store.boot_times(provider=self.provider.name, server_type=server_type)
        return timedelta(seconds=median(t.total_seconds() for t in times)) if times else None

    async def wait_ready(
        self, machine: Machine, *, on_boot: Callable[[Boot], None] | None = None
    ) -> tuple[Machine, MachineReport]:
        """Wait until the provider says Ready with an address; return the machine and that word.

        Raises BootTimeout, MachineFailed (the provider says so), MachineLost (it went away). The caller ends it.
        """
        server_id = server_id_of(machine)
        cloud = self.settings.cloud
        expected = await self.expected_boot(machine.server_type)
        loop = asyncio.get_running_loop()
        started = loop.time()
        seen = False
        while True:
            report = await self._ask(server_id)
            elapsed = timedelta(seconds=loop.time() - started)
            if report is not None and report.usable:
                return await self.ready(machine, report), report
            if report is not None and report.phase is Phase.FAILED:
                raise MachineFailed(
                    f"RunComfy says {report.status!r} of machine {server_id}",
                    hint="try again, or another --server-type",
                    details={"server_id": server_id},
                )
            seen = seen or report is not None
            if report is not None:
                self._seen.add(server_id)
            gone = report is not None and report.phase in (Phase.GONE, Phase.STOPPING)
            absent = report is None and (seen or elapsed > cloud.not_found_grace)
            if gone or (absent and await self._in_no_list(server_id)):
                raise MachineLost(
                    f"machine {server_id} went away while it was starting",
                    hint="try again; somebody may have stopped it on RunComfy's page",
                    details={"server_id": server_id},
                )
            if elapsed > cloud.boot_timeout:
                raise BootTimeout(
                    f"machine {server_id} was not ready after {elapsed.total_seconds():.0f} s",
                    hint="try another --server-type, or raise RUNCOMFY_MACHINE_TIMEOUT",
                    details={"server_id": server_id, "status": report.status if report else None},
                )
            if on_boot is not None:
                on_boot(Boot(report.status if report else "not visible yet", elapsed, expected))
            await asyncio.sleep(cloud.poll_interval.total_seconds())

    async def ready(self, machine: Machine, report: MachineReport) -> Machine:
        """Write down that the provider says Ready; from its ready time on the machine bills."""
        now = self.clock.now()
        ready_at = machine.ready_at or report.ready_at or now
        # The provider's clock may differ from ours: a stamp from outside this launch is not believed.
        ready_at = min(max(ready_at, machine.requested_at), now)
        changes: dict[str, object] = {"ready_at": ready_at, "planned_stop_at": report.stopping_at}
        if machine.state is MachineState.READY and machine.ready_at == ready_at:
            if machine.planned_stop_at != report.stopping_at:
                return await self.books.change(machine, note="planned stop", planned_stop_at=report.stopping_at)
            return machine
        return await self.books.record(machine, MachineEvent.ANSWERED, note=report.status, changes=changes)

    async def extend(self, machine: Machine, *, total: timedelta) -> Machine:
        """Set the machine's running time, counted from ready, and make sure that the provider moved its stop.

        Raises ProviderError if what is read back is not what was asked for; the old time then holds.
        """
        server_id = server_id_of(machine)
        report = await self.provider.change_duration(server_id, total=total)
        if report.ready_at is not None and report.stopping_at is not None:
            wanted = report.ready_at + total
            if abs(report.stopping_at - wanted) > timedelta(seconds=5):
                raise ProviderError(
                    f"the stop time of {server_id} did not move as asked",
                    hint="look at `comfyctl machines ls`; the machine may stop earlier or later than wanted",
                    details={"wanted": wanted.isoformat(), "got": report.stopping_at.isoformat()},
                )
        return await self.books.change(
            machine,
            note=f"running time set to {total.total_seconds():.0f} s",
            duration=total,
            planned_stop_at=report.stopping_at,
            **({"kept_until": report.stopping_at} if machine.kept_until is not None else {}),
        )

    async def _ask(self, server_id: ServerId, *, urgent: bool = False) -> MachineReport | None:
        """Return the provider's word; a provider that cannot be asked now is asked again."""
        delay = self.settings.cloud.poll_interval
        while True:
            try:
                return await self.provider.get_machine_status(server_id, urgent=urgent)
            except ProviderError as error:
                if not error.retryable:
                    raise
                log.warning("machine_status_failed", extra={"fields": {"error": error.code, "server_id": server_id}})
                await asyncio.sleep(delay.total_seconds())
                delay = min(delay * 2, timedelta(minutes=1))

    async def _in_no_list(self, server_id: ServerId) -> bool:
        """Whether two full lists in a row do not have the machine."""
        for number in range(2):
            if number:
                await asyncio.sleep(self._between_reads())
            if any(r.server_id == server_id and r.phase is not Phase.GONE for r in await self._list_patiently()):
                return False
        return True

    def _between_reads(self) -> float:
        return min(1.0, self.settings.cloud.poll_interval.total_seconds())

    async def adopt(self, report: MachineReport, *, purpose: Purpose, reason: str) -> Machine:
        """Put a machine that the account runs, and that we did not launch, into our books as ours."""
        rate = self.settings.rates.find(report.server_type)
        now = self.clock.now()
        machine = Machine(
            id=MachineId(str(uuid4())),
            provider=self.provider.name,
            account=self.provider.account,
            purpose=purpose,
            server_type=report.server_type or "unknown",
            duration=report.duration or timedelta(0),
            usd_per_hour=rate.usd_per_hour if rate else Decimal(0),
            rate_source=f"{rate.plan}, {rate.source}" if rate else "no price known for this type",
            requested_at=min(now, report.ready_at or now),
            since=now,
            state=MachineState.BOOTING,
            workflow_version_id=report.workflow_version_id,
            reason=reason,
            owner_id=self.books.owner.id,
            server_id=report.server_id,
            kept_until=report.stopping_at,
        )
        await self.store.add_machine(machine, at=now, note=reason)
        self.books.hold(machine)
        return await self.ready(machine, report) if report.usable else machine

    # -- ending --------------------------------------------------------------------------------------------

    async def settle(self, intent: Machine, *, reason: str) -> Machine | None:
        """End whatever came of this intent, also if its answer was never seen; return the machine if there was one."""
        ended: Machine | None = None
        for machine_id in self._tries.pop(intent.id, []):
            machine = await self.books.latest(machine_id)
            if machine is not None and machine.state is MachineState.REQUESTED:
                async with self.launch_lock():
                    machine = await self.find_launched(machine)
            if machine is not None and machine.is_open:
                ended = await self.stop(machine, reason=reason)
        return ended

    async def stop(self, machine: Machine, *, reason: str) -> Machine:
        """Stop the machine and look until it is gone. Does not give up.

        Returns with state STOPPED; or STOPPING, if the provider accepted the stop (so that it bills no longer by its
        own word) but has said "deleting" for longer than the alarm time.
        """
        server_id = server_id_of(machine)
        cloud = self.settings.cloud
        machine = await self.books.record_softly(
            machine, MachineEvent.STOP_ASKED, note=reason, changes={"stop_reason": reason}
        )
        log.info("machine_stop", extra={"fields": {**self.books.facts(machine), "reason": reason}})
        loop = asyncio.get_running_loop()
        asked = loop.time()
        next_call, next_alarm = asked, asked + cloud.stop_alarm_after.total_seconds()
        delay = min(timedelta(seconds=1), cloud.poll_interval)
        known = machine.ready_at is not None or server_id in self._seen
        while True:
            if loop.time() >= next_call:
                try:
                    machine, accepted = await self._ask_to_stop(machine)
                except (AuthRejected, AccessDenied, WrongUrl) as error:
                    if loop.time() - asked >= HOPELESS_AFTER.total_seconds():
                        raise StopUnconfirmed(
                            f"machine {server_id} could not be stopped: {error.message}; it may still bill",
                            hint=f"mend that ({error.hint or error.code}), then `comfyctl machines reap`; "
                            "or stop it on RunComfy's page",
                            details={"server_id": server_id, "cause": error.code},
                        ) from error
                    accepted = False
                known = known or accepted
                next_call = loop.time() + (RESTOP_EVERY if accepted else delay).total_seconds()
            phase = await self._phase(machine)
            known = known or phase not in (None, Phase.GONE)
            old_enough = self.clock.now() - machine.requested_at >= cloud.visibility_window
            if phase is Phase.GONE and (known or old_enough):
                return await self._gone(machine, note=reason)
            if phase in (Phase.READY, Phase.STARTING, Phase.FAILED) and machine.stop_accepted_at is not None:
                machine = await self._reopened(machine, phase)
                next_call = min(next_call, loop.time() + delay.total_seconds())
            if loop.time() >= next_alarm:
                if phase is Phase.STOPPING and machine.stop_accepted_at is not None:
                    self.tell(f"RunComfy accepted the stop of {server_id} but still lists it as deleting")
                    return machine
                next_alarm = loop.time() + cloud.stop_alarm_after.total_seconds()
                self.tell(
                    f"ALARM: machine {server_id} still runs {loop.time() - asked:.0f} s after its stop was "
                    "asked for; still trying. You can also stop it on RunComfy's page."
                )
                log.error("machine_outlives_stop", extra={"fields": self.books.facts(machine)})
            await asyncio.sleep(delay.total_seconds())
            delay = min(delay * 1.5, max(cloud.poll_interval, timedelta(seconds=1)) * 6)

    async def _ask_to_stop(self, machine: Machine) -> tuple[Machine, bool]:
        """Call stop once; keep the provider's yes, which is until when it bills."""
        server_id = server_id_of(machine)
        try:
            accepted = await self.provider.stop_machine(server_id)
        except ProviderError as error:
            self.tell(f"stopping {server_id} failed for now ({error.code}); trying again")
            log.warning("machine_stop_failed", extra={"fields": {**self.books.facts(machine), "error": error.code}})
            if isinstance(error, (AuthRejected, AccessDenied, WrongUrl)):
                raise
            return machine, False
        if accepted and machine.stop_accepted_at is None:
            machine = await self.books.change_softly(machine, note="stop accepted", stop_accepted_at=self.clock.now())
            await self.books.post(machine, note="ready until the stop was accepted")
        return machine, accepted

    async def _phase(self, machine: Machine) -> Phase | None:
        """Return where the provider says the machine is; GONE only if status and two lists agree; None: unclear."""
        server_id = server_id_of(machine)
        try:
            report = await self.provider.get_machine_status(server_id, urgent=True)
            if report is not None and report.phase is not Phase.GONE:
                return report.phase
            for number in range(2):
                if number:
                    await asyncio.sleep(self._between_reads())
                for listed in await self.provider.list_machines(urgent=True):
                    if listed.server_id == server_id and listed.phase is not Phase.GONE:
                        return listed.phase
        except ProviderError as error:
            log.warning("machine_look_failed", extra={"fields": {**self.books.facts(machine), "error": error.code}})
            return None
        return Phase.GONE

    async def gone_unasked(self, machine: Machine, *, note: str) -> Machine | None:
        """Close the books of a machine that is not there any more; None if it still is."""
        if machine.server_id is None or await self._phase(machine) is not Phase.GONE:
            return None
        return await self._gone(machine, note=note)

    async def _gone(self, machine: Machine, *, note: str) -> Machine:
        gone_at = self.clock.now()
        if machine.stop_accepted_at is None and machine.planned_stop_at is not None:
            # It ended by itself, at its planned time at the latest; that is what the provider bills.
            gone_at = min(gone_at, max(machine.planned_stop_at, machine.ready_at or machine.planned_stop_at))
        machine = await self.books.record_softly(machine, MachineEvent.GONE, note=note, changes={"gone_at": gone_at})
        await self.books.post(machine, note="ready until gone")
        log.info("machine_stopped", extra={"fields": self.books.facts(machine)})
        return machine

    async def _reopened(self, machine: Machine, phase: Phase) -> Machine:
        self.tell(f"RunComfy accepted the stop of {machine.server_id}, but it still runs; asking again")
        log.error("machine_runs_after_stop", extra={"fields": self.books.facts(machine)})
        return await self.books.change_softly(
            machine, note=f"seen {phase} after its stop was accepted", stop_accepted_at=None
        )
