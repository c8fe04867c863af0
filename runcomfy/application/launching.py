"""
Renting machines, exactly as many as were asked for (I1, I3).

The order is always: write the intention, make the call, write the answer. RunComfy has no idempotency key and no tags.
So one process of an account launches at a time (a lock in the store), notes what the account lists before the call, and
after an answer that was lost or makes no sense looks for what is new: one new machine that fits is ours, none within
the visibility window means that none was started, several are reported and left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from runcomfy.application.books import Books, dearer
from runcomfy.application.ending import HOPELESS, HOPELESS_AFTER, Ending, Said, ambiguous, billed_since
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.domain.durations import show_span
from runcomfy.domain.evidence import Launched, what_was_started
from runcomfy.domain.exceptions import LaunchUnclear, LeaseLost, LocalError, ProviderError, RunComfyError
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

LAUNCH_TRIES: Final = 3
"""How often a launch is tried again after it was proven that the earlier try started nothing."""
FREE_AGAIN: Final = timedelta(seconds=1)
FREE_AGAIN_MOST: Final = timedelta(seconds=30)
"""After how long it is tried again to free the launch lock, at first and later."""


@dataclass(slots=True)
class _Try:
    """One launch request of this process."""

    machine: Machine
    sent: bool = False
    """Whether the request may have left, and was not refused."""
    given_up: bool = False
    """Whether it was said that its outcome cannot be found out now; `reap` goes on from there."""


class Launching:
    """Launches machines of one account on behalf of one owner."""

    def __init__(self, provider: Provider, processes: Processes, books: Books, ending: Ending) -> None:
        self._provider = provider
        self._processes = processes
        self._books = books
        self._ending = ending
        self._store = books.store
        self._clock = books.clock
        self._cloud = books.settings.cloud
        self._tries: dict[MachineId, list[_Try]] = {}
        self._turn = asyncio.Lock()
        """The store's lock tells processes apart; this one the jobs of this process."""
        self._freeing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def lock(self) -> AsyncIterator[None]:
        """Be the only one of the account who launches; waits for a living process, replaces a dead one."""
        async with self._turn:
            try:
                await self._take_lock()
                yield
            finally:
                await finish(self._free_lock())

    async def _take_lock(self) -> None:
        account, me = self._provider.account, self._books.owner.id
        told = False
        while (holder := await self._store.take_launch_lock(account, owner_id=me, now=self._clock.now())) != me:
            other = (await self._store.owners([holder])).get(holder)
            if other is None or not self._processes.lives(other, now=self._clock.now()):
                await self._store.break_launch_lock(account, holder=holder)
                continue
            if not told:
                self._books.tell(f"another process (pid {other.pid}) is launching a machine; waiting for it")
                told = True
            await asyncio.sleep(1.0)

    async def _free_lock(self) -> None:
        """Free the lock, also if taking it was broken off. If that cannot be written, it is tried until it can."""
        if not await self._freed() and (self._freeing is None or self._freeing.done()):
            self._freeing = asyncio.create_task(self._free_later(), name="free the launch lock")

    async def close(self) -> None:
        """Try no more: whoever signs off, or dies, has the lock taken from him."""
        task, self._freeing = self._freeing, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _freed(self) -> bool:
        try:
            await self._store.break_launch_lock(self._provider.account, holder=self._books.owner.id)
        except LocalError as error:
            log.warning("launch_lock_not_freed", extra={"fields": {"error": error.code}})
            return False
        return True

    async def _free_later(self) -> None:
        """Free the lock as soon as that can be written: others wait for it for as long as this process lives."""
        delay = FREE_AGAIN
        while True:
            await asyncio.sleep(delay.total_seconds())
            delay = min(delay * 2, FREE_AGAIN_MOST)
            async with self._turn:  # not from under a job of this process
                if await self._freed():
                    return

    # -- one machine ---------------------------------------------------------------------------------------

    async def launch(self, intent: Machine, *, sending: Callable[[], None] = lambda: None) -> Machine:
        """Rent the machine of `intent`, exactly one, and return it with the provider's id. Hold the lock.

        If an earlier launch of a dead process, for the same and of the same type, was never answered, the machine that
        it started is taken over in place of another. If it raises, or is cancelled, what it may have started is ended
        before. `sending` is called when a request is about to leave: the budgets allow it.

        Raises BudgetExceeded (a hard budget; nothing was written or sent), what the provider refuses with;
        MachineFailed (it was given a dearer type than asked for);
        LaunchUnclear or LaunchAmbiguous if it stays open whether one was started (the intent is kept, and looked after
        by `reap`).
        """
        try:
            return await self._resolve_earlier(intent) or await self._try(intent, sending)
        except BaseException:
            await finish(self.settle(intent, reason="the launch was broken off", locked=True))
            raise

    async def _try(self, intent: Machine, sending: Callable[[], None]) -> Machine:
        for number in range(1, LAUNCH_TRIES + 1):
            before = await self._provider.list_machines()
            machine = replace(
                intent,
                id=intent.id if number == 1 else MachineId(str(uuid4())),
                before_ids=tuple(report.server_id for report in before),
                requested_at=self._clock.now(),
                since=self._clock.now(),
            )
            attempt = _Try(machine)
            self._tries.setdefault(intent.id, []).append(attempt)
            await finish(self._books.add_intent(machine))
            faultpoint("launch.intended")
            sending()
            log.info("machine_launch", extra={"fields": self._books.facts(machine)})
            # Shielded: a Ctrl+C while the request is under way must not lose the answer.
            launched = await finish(self._launch_once(attempt))
            if launched is not None:
                return launched
            self._books.tell(f"the launch was not answered and started nothing (try {number} of {LAUNCH_TRIES})")
        raise LaunchUnclear(
            f"{LAUNCH_TRIES} launches in a row were not answered; none of them started a machine",
            hint="try again later, or look at RunComfy's status page",
        )

    def is_under_way(self, machine_id: MachineId) -> bool:
        """Whether this process works on that launch: sends it, looks for what it started, or is to end that."""
        return any(attempt.machine.id == machine_id for tries in self._tries.values() for attempt in tries)

    async def _resolve_earlier(self, intent: Machine) -> Machine | None:
        """See what earlier, never answered launches started that nobody works on: one launch in flight at a time.

        A machine that is as good as the one that `intent` asks for is taken over and returned; every other is ended.
        We hold the launch lock, so nobody alive is launching now.
        """
        instead: Machine | None = None
        for row in await self._books.rows(states=[MachineState.REQUESTED]):
            if row.state is not MachineState.REQUESTED or self.is_under_way(row.id):
                continue
            if row.owner_id != self._books.owner.id:
                owner = (await self._store.owners([row.owner_id])).get(row.owner_id) if row.owner_id else None
                if owner is not None and self._processes.lives(owner, now=self._clock.now()):
                    continue  # it could not bring its own launch to an end yet, and still tries
                self._books.presume_asked(row, owner)
            self._books.tell(
                f"an earlier launch ({row.requested_at:%H:%M:%S} UTC) was never answered; looking for its machine"
            )
            found = await self.find_launched(row)
            taken = found and await self._books.try_take_over(found, note="its process is gone")
            if taken and instead is None and _is_as_good(taken, intent):
                self._tries.setdefault(intent.id, []).append(_Try(taken, sent=True))
                self._books.tell(f"going on with machine {taken.server_id}, which that launch has started")
                instead = taken
            elif taken:
                await finish(self._ending.stop(taken, reason="its launch was never answered and its process is gone"))

        return instead

    async def _launch_once(self, attempt: _Try) -> Machine | None:
        machine = attempt.machine
        self._books.hold(machine)
        attempt.sent = True
        try:
            report = await self._provider.launch_machine(
                server_type=machine.server_type,
                duration=machine.duration,
                workflow_version_id=machine.workflow_version_id,
            )
        except LaunchUnclear as error:
            self._books.asked(machine)
            self._books.tell(f"the launch was not answered; {self._looking()}")
            fields = {**self._books.facts(machine), "error": str(error)}
            log.warning("machine_launch_unclear", extra={"fields": fields})
            return await self._find(attempt)
        except RunComfyError as error:
            attempt.sent = False
            await self._books.record_softly(machine, MachineEvent.REFUSED, note=error.code, changes={})
            raise
        self._books.asked(machine)
        faultpoint("launch.answered")
        if report.server_id in machine.before_ids or await self._is_another(machine, report):
            self._books.tell(f"the launch was answered with the id of an older machine; {self._looking()}")
            return await self._find(attempt)
        machine = await self._listed(machine, report, note="answered")
        real = await self._books.note_type(machine, report)
        if (failed := dearer(machine, real)) is not None:
            raise failed
        return real

    def _looking(self) -> str:
        """Say how long it may take, also after Ctrl+C: until then a machine may be there that no list shows."""
        return f"looking for what it started (this may take {show_span(self._cloud.visibility_window)})"

    async def _is_another(self, machine: Machine, report: MachineReport) -> bool:
        """Whether the books know the answered id already. Books that cannot be read now contradict nothing."""
        try:
            row = await self._books.row_of(report.server_id)
        except LocalError:
            return False
        return row is not None and row.id != machine.id

    async def _listed(
        self, machine: Machine, report: MachineReport, *, note: str, bill: Mapping[str, Any] = MappingProxyType({})
    ) -> Machine:
        changes = {"server_id": report.server_id, **bill}
        if machine.owner_id == self._books.owner.id:
            # In memory first: a disk that is full now must not make us lose whom to stop.
            known = machine.on(MachineEvent.LISTED, at=self._clock.now())
            self._books.hold(replace(known, **changes))
        note = f"{note}; {report.status}"
        try:
            machine = await self._books.record(machine, MachineEvent.LISTED, note=note, changes=changes)
        except LocalError:
            self._books.owe(machine, **changes)
            raise
        faultpoint("launch.recorded")
        log.info("machine_launched", extra={"fields": self._books.facts(machine)})
        return machine

    # -- lost answers --------------------------------------------------------------------------------------

    async def find_launched(self, machine: Machine, *, wait: bool = True) -> Machine | None:
        """Look for what an unanswered launch started (I3). Hold the lock.

        A single machine that fits is taken as soon as it can bill, or when the visibility window is over: until then
        a second one may appear, and starting is free. Returns the machine, now with its id, or None once it is sure
        that nothing was started (the intent is then closed). With `wait=False` nothing is waited for; None then also
        stands for "not known yet" (the intent is open).

        Raises LaunchAmbiguous if it cannot be told (the intent is closed, no machine is touched), LaunchUnclear if
        the provider refuses to be asked (the intent stays open).
        """
        late_lists = 0
        shown: dict[ServerId, MachineReport] = {}
        while True:
            sure = self._books.must_be_visible(machine)  # when it is asked: the answer may take long
            reports = await self._list_patiently(machine) if wait else await self._provider.list_machines(urgent=True)
            late_lists += sure
            reports = [_of_its_kind(report, shown.get(report.server_id)) for report in reports]
            exact, near = await self._books.fitting(machine, [*reports, *await self._unlisted(shown, reports)])
            shown = {report.server_id: report for report in exact}
            judged = what_was_started(exact, near, late_lists=late_lists)
            if judged is Launched.TAKE:
                note, bill = "found in the list after a lost answer", self._bill_so_far(machine, exact[0])
                return await self._listed(machine, exact[0], note=note, bill=bill)
            if judged is Launched.AMBIGUOUS:
                ids = [report.server_id for report in exact or near]
                note = f"ambiguous: {', '.join(ids)}"
                await self._books.record_softly(machine, MachineEvent.ABSENT, note=note, changes={})
                raise ambiguous(ids)
            if judged is Launched.NOTHING:
                note = f"not in {late_lists} lists after {self._cloud.visibility_window}"
                await self._books.record_softly(machine, MachineEvent.ABSENT, note=note, changes={})
                return None
            if not wait and not sure:
                return None
            await asyncio.sleep(self._ending.between_reads() if sure else self._cloud.poll_interval.total_seconds())

    async def _unlisted(
        self, shown: Mapping[ServerId, MachineReport], reports: Sequence[MachineReport]
    ) -> list[MachineReport]:
        """Return which machines that an earlier list has shown are not in this one, and not gone: asked by their ids.

        A list may be empty by mistake; one that cannot be asked for is taken to be there.
        """
        listed = {report.server_id for report in reports}
        still = []
        for server_id, before in shown.items():
            if server_id in listed:
                continue
            try:
                now = await self._provider.get_machine_status(server_id, urgent=True)
            except ProviderError:
                now = before
            if now is not None and now.phase is not Phase.GONE:
                still.append(replace(before, phase=now.phase, ready_at=now.ready_at, stopping_at=now.stopping_at))
        return still

    def _bill_so_far(self, machine: Machine, report: MachineReport) -> dict[str, Any]:
        """Return since when a machine that was found bills, and until when at most; nothing if it does not yet.

        That is written down with its id: whoever waits for its being ready may die before, and the machine may be gone
        before anybody looks again. Of an answered launch the list has not yet said that the id means anything.
        """
        ready_at = billed_since(report, machine, now=self._clock.now())
        return {} if ready_at is None else {"ready_at": ready_at, "planned_stop_at": report.stopping_at}

    async def _list_patiently(self, machine: Machine) -> Sequence[MachineReport]:
        """Return a full list, however long the provider needs to give one; not if a person has to mend something."""
        loop = asyncio.get_running_loop()
        delay, began, said = self._cloud.poll_interval, loop.time(), Said()
        while True:
            try:
                return await self._provider.list_machines(urgent=True)
            except ProviderError as error:
                if isinstance(error, HOPELESS) and loop.time() - began >= HOPELESS_AFTER.total_seconds():
                    raise LaunchUnclear(
                        f"a launch of {machine.requested_at:%H:%M:%S} UTC was not answered, and what it started cannot "
                        f"be looked for: {error.message}; a {machine.server_type} machine may run and bill",
                        hint=f"mend that ({error.hint or error.code}), then `comfyctl machines reap`",
                        details={"cause": error.code},
                    ) from error
                if said.due(error.code):
                    self._books.tell(
                        f"RunComfy cannot be asked now ({error.code}) what a launch has started; asking again until "
                        "it answers"
                    )
                await asyncio.sleep(delay.total_seconds())
                delay = min(delay * 2, timedelta(minutes=1))

    # -- ending --------------------------------------------------------------------------------------------

    async def settle(self, intent: Machine, *, reason: str, locked: bool = False) -> Machine | None:
        """End whatever came of this intent, also if its answer was never seen; return the machine if there was one.

        Every launch of the intent is ended, whatever happens to the others; then the first error is raised.
        """
        ended: Machine | None = None
        errors: list[RunComfyError] = []
        for attempt in list(self._tries.get(intent.id, ())):
            try:
                ended = await self._settle_one(attempt, reason=reason, locked=locked) or ended
            except RunComfyError as error:
                errors.append(error)
            else:
                self._tries[intent.id].remove(attempt)
        if errors:
            raise errors[0]
        self._tries.pop(intent.id, None)
        return ended

    async def _settle_one(self, attempt: _Try, *, reason: str, locked: bool) -> Machine | None:
        machine = await self._books.latest(attempt.machine.id)
        if machine is None or machine.owner_id not in (self._books.owner.id, None):
            return None  # nothing was written or sent; or it is somebody else's to end now
        if machine.state is MachineState.REQUESTED and not attempt.sent:
            await self._books.record_softly(machine, MachineEvent.REFUSED, note="broken off, never sent", changes={})
            return None
        if machine.state is MachineState.REQUESTED:
            if attempt.given_up:
                return None
            async with nullcontext() if locked else self.lock():
                found = await self._find_to_end(attempt)
            if found is None:
                return None
            machine = found
        if not machine.is_open:
            return machine if machine.state is MachineState.STOPPED else None
        if machine.owner_id is None:
            machine = await self._books.take_over(machine, note=reason)
        return await self._ending.stop(machine, reason=reason)

    async def _find(self, attempt: _Try) -> Machine | None:
        try:
            return await self.find_launched(attempt.machine)
        except LaunchUnclear:
            attempt.given_up = True
            raise

    async def _find_to_end(self, attempt: _Try) -> Machine | None:
        """Find what a launch started in order to end it, for which books that cannot be written are good enough."""
        try:
            return await self._find(attempt)
        except LeaseLost:
            raise
        except LocalError:
            known = await self._books.latest(attempt.machine.id)
            if known is None or known.server_id is None:
                raise
            return known


def _is_as_good(machine: Machine, intent: Machine) -> bool:
    """Whether a machine that nobody has heard of yet can stand for the one that is asked for.

    One of a single run is not passed on: its lease and its budget were that run's.
    """
    return (
        machine.purpose in (Purpose.DEV, Purpose.POOL)
        and (machine.purpose, machine.server_type) == (intent.purpose, intent.server_type)
        and (machine.workflow_version_id, machine.duration) == (intent.workflow_version_id, intent.duration)
    )


def _of_its_kind(report: MachineReport, before: MachineReport | None) -> MachineReport:
    """Return a report with the kind that an earlier list has told of the machine: that never changes (fault 13)."""
    if before is None:
        return report
    return replace(
        report,
        server_type=before.server_type or report.server_type,
        duration=before.duration or report.duration,
        workflow_version_id=before.workflow_version_id or report.workflow_version_id,
    )
