"""
The machines of one account, on behalf of one owner: rent one, wait until it is ready, prolong it, end it.

How a machine is rented so that there is exactly one is in `launching`, how it is ended so that none is forgotten in
`ending`; this module waits for what was launched, and is the one door to all three.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from statistics import median
from typing import Any, Final
from uuid import uuid4

from runcomfy.application.books import Books, dearer
from runcomfy.application.ending import HOPELESS, Ending, Look, ready_since, server_id_of, times_are_news
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.launching import Launching
from runcomfy.application.monitors import looks_only
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    BootTimeout,
    MachineFailed,
    MachineLost,
    MachineNotFound,
    ProviderError,
)
from runcomfy.domain.lease import Use
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

EXACT_ENOUGH: Final = timedelta(seconds=5)
"""How far a stop time that was read back may lie from the one asked for: durations are whole seconds."""


PromptPlaces = Callable[[], Awaitable[Collection[str] | None]]
"""Returns the keys of the places where the prompts of queued jobs that have not ended may still run; None: it cannot be
found out now."""


async def no_prompts() -> Collection[str]:
    """There is no queue."""
    return ()


@dataclass(frozen=True, slots=True)
class Boot:
    """How a machine's start stands."""

    status: str
    elapsed: timedelta
    expected: timedelta | None


class Machines:
    """Rents, watches and ends machines of one account on behalf of one owner."""

    def __init__(
        self, provider: Provider, processes: Processes, books: Books, *, prompt_places: PromptPlaces = no_prompts
    ) -> None:
        self.provider = provider
        self.processes = processes
        self.prompt_places = prompt_places
        self.books = books
        self.store = books.store
        self.clock = books.clock
        self.settings = books.settings
        self._ending = Ending(provider, books)
        self._launching = Launching(provider, processes, books, self._ending)

    def tell(self, sentence: str) -> None:
        """Say something to the user."""
        self.books.tell(sentence)

    # -- launching and ending ------------------------------------------------------------------------------

    def launch_lock(self) -> AbstractAsyncContextManager[None]:
        """Be the only one of the account who launches; waits for a living process, replaces a dead one."""
        return self._launching.lock()

    async def close(self) -> None:
        """Let go of what is still tried in the background. Machines are left as they are."""
        await self._launching.close()

    async def launch(self, intent: Machine, *, sending: Callable[[], None] = lambda: None) -> Machine:
        """Rent the machine of `intent`, exactly one; see `Launching.launch`. Hold `launch_lock`."""
        return await self._launching.launch(intent, sending=sending)

    def has_given_up(self, machine: Machine) -> bool:
        """Whether an unanswered launch is of this process, and nobody in it works on that any more."""
        ours = machine.owner_id == self.books.owner.id and machine.state is MachineState.REQUESTED
        return ours and not self._launching.is_under_way(machine.id)

    async def find_launched(self, machine: Machine, *, wait: bool = True) -> Machine | None:
        """Look for what an unanswered launch started; see `Launching.find_launched`. Hold `launch_lock`."""
        return await self._launching.find_launched(machine, wait=wait)

    async def settle(self, intent: Machine, *, reason: str) -> Machine | None:
        """End whatever came of this intent; return the machine if there was one. Harmless when repeated."""
        return await self._launching.settle(intent, reason=reason)

    async def stop(self, machine: Machine, *, reason: str) -> Machine:
        """Stop the machine and look until it is gone; see `Ending.stop`."""
        return await self._ending.stop(machine, reason=reason)

    async def look(self, machine: Machine) -> Look:
        """Return where the provider says a machine is; GONE only if its status and two full lists agree."""
        return await self._ending.look(machine)

    async def gone_unasked(self, machine: Machine, *, note: str) -> Machine | None:
        """Close the books of a machine that is not there any more; None if it still is."""
        return await self._ending.gone_unasked(machine, note=note)

    async def stops_unasked(self, machine: Machine) -> Machine:
        """Close the bill of a machine that the provider is stopping without our asking; see `Ending.stops_unasked`."""
        return await self._ending.stops_unasked(machine)

    async def seen_gone(self, machine: Machine, *, note: str) -> Machine:
        """Close the books of a machine that its status and two full lists say is gone: the caller has seen them."""
        return await self._ending.gone(machine, note=note)

    async def living_uses(self, machine: Machine, *, monitors: bool = False) -> list[Use]:
        """Return the jobs on a machine whose processes live; with `monitors` those that only look at it, too."""
        uses = [use for use in await self.store.uses([machine.id]) if monitors or not looks_only(use)]
        users = await self.store.owners({use.owner_id for use in uses})
        now = self.clock.now()
        return [u for u in uses if u.owner_id in users and self.processes.lives(users[u.owner_id], now=now)]

    # -- waiting -------------------------------------------------------------------------------------------

    async def expected_boot(self, server_type: str) -> timedelta | None:
        """Return how long a start of this type usually takes (median of our own), or None without history."""
        times = await self.store.boot_times(provider=self.provider.name, server_type=server_type)
        return timedelta(seconds=median(t.total_seconds() for t in times)) if times else None

    async def wait_ready(
        self, machine: Machine, *, on_boot: Callable[[Boot], None] | None = None
    ) -> tuple[Machine, MachineReport]:
        """Wait until the provider says Ready with an address; return the machine and that word.

        A provider that cannot be asked meanwhile is asked again until the boot limit.

        Raises BootTimeout, MachineFailed (the provider says so), MachineLost (it went away). The caller ends it.
        """
        cloud = self.settings.cloud
        expected = await self.expected_boot(machine.server_type)
        loop = asyncio.get_running_loop()
        started = loop.time()
        seen = machine.ready_at is not None
        starting: float | None = None
        while True:
            asked_at = loop.time()
            report, word = await self._ask(server_id_of(machine))
            elapsed = timedelta(seconds=loop.time() - started)
            seen = seen or report is not None
            asked = machine
            if report is not None:
                machine = await self.books.note_type(machine, report)
            if report is not None and report.phase is Phase.READY:
                # It bills from now on, with an address or without.
                machine = await self.ready(machine, report, starting=starting)
            elif report is not None and report.phase is Phase.STARTING:
                starting = asked_at
            elif report is not None and report.phase is Phase.UNKNOWN:
                machine = await self._note_times(machine, report)
            if (failed := dearer(asked, machine)) is not None:
                raise failed
            if report is not None:
                if report.phase is Phase.READY and report.usable:
                    return machine, report
                _raise_if_over(report)
            elif word is None and (seen or elapsed > max(cloud.not_found_grace, cloud.visibility_window)):
                machine = await self.found_again(machine)
            if elapsed > cloud.boot_timeout:
                raise BootTimeout(
                    f"machine {machine.server_id} was not ready after {elapsed.total_seconds():.0f} s",
                    hint="try another --server-type, or raise RUNCOMFY_MACHINE_TIMEOUT",
                    details={"server_id": machine.server_id, "status": report.status if report else word},
                )
            if on_boot is not None:
                on_boot(Boot(report.status if report else word or "not visible yet", elapsed, expected))
            await asyncio.sleep(cloud.poll_interval.total_seconds())

    async def _ask(self, server_id: ServerId) -> tuple[MachineReport | None, str | None]:
        """Return the provider's word; or None, and why it could not be asked (None: it knows no such machine)."""
        try:
            return await self.provider.get_machine_status(server_id), None
        except ProviderError as error:
            if isinstance(error, HOPELESS) or not (error.retryable or isinstance(error, AnswerUnreadable)):
                raise
            log.warning("machine_status_failed", extra={"fields": {"error": error.code, "server_id": server_id}})
            return None, f"RunComfy cannot be asked now ({error.code})"

    async def found_again(self, machine: Machine) -> Machine:
        """Return the machine if a list still has it, or what its launch really started; else raise MachineLost."""
        look = await self._ending.look(machine)
        if look.phase is not Phase.GONE:
            return machine
        right = await self._ending.mistaken(machine, look.listed)
        if right is None:
            raise MachineLost(
                f"machine {machine.server_id} went away while it was starting",
                hint="try again; somebody may have stopped it on RunComfy's page",
                details={"server_id": machine.server_id},
            )
        return await self.books.change(
            machine, note="the launch was answered with an id that means nothing", server_id=right.server_id
        )

    async def ready(self, machine: Machine, report: MachineReport, *, starting: float | None = None) -> Machine:
        """Write down that the provider says Ready; from its ready time on the machine bills, as the type it says.

        `starting`: time of the loop at which it was last seen to start.
        """
        machine = await self.books.note_type(machine, report)
        now = self.clock.now()
        since = timedelta(seconds=asyncio.get_running_loop().time() - starting) if starting is not None else None
        not_before = now - since if since is not None else None
        ready_at = ready_since(report, machine, now=now, not_before=not_before)
        planned = report.stopping_at or machine.planned_stop_at
        if machine.state is MachineState.READY and machine.ready_at == ready_at:
            if machine.planned_stop_at != planned:
                return await self.books.change(machine, note="planned stop", planned_stop_at=planned)
            return machine
        # What there was before the launch is not asked for any more, and of many machines a lot to read each time.
        changes: dict[str, Any] = {"ready_at": ready_at, "planned_stop_at": planned, "before_ids": ()}
        machine = await self.books.record(machine, MachineEvent.ANSWERED, note=report.status, changes=changes)
        faultpoint("launch.ready")
        return machine

    async def _note_times(self, machine: Machine, report: MachineReport) -> Machine:
        """Write down since when a machine in a state nobody knows bills (fault 13): this look may be our last."""
        if report.ready_at is None or (machine.ready_at is not None and not times_are_news(report, machine)):
            return machine
        return await self.books.change_softly(
            machine,
            note=f"it bills, though RunComfy says {report.status!r} and not Ready",
            ready_at=ready_since(report, machine, now=self.clock.now()),
            planned_stop_at=report.stopping_at,
        )

    async def extend(self, machine: Machine, *, total: timedelta) -> Machine:
        """Set the machine's running time, counted from ready, and read back that the provider moved its stop.

        The wish is written down first, within the budgets; they count it until the provider's word is read.

        Raises BudgetExceeded: nothing was asked for, the machine stops at its old time. Raises ProviderError if what
        is read back is not what was asked for, or cannot be read; the books then have what the provider says, or the
        old time: a machine is never assumed to run longer than was confirmed. Raises LeaseLost: it is somebody else's.
        """
        server_id = server_id_of(machine)
        machine = await self.ask_longer(machine, total=total)
        report = await self.provider.get_machine_status(server_id)
        confirmed = await self.confirmed(machine, report) if report is not None else None
        if confirmed is None:
            raise ProviderError(
                f"whether {server_id} runs longer now cannot be read back",
                hint="look at `comfyctl machines ls`; the machine may stop at its old time",
            )
        machine, got = confirmed, confirmed.duration
        if abs(got - total) > EXACT_ENOUGH:
            raise ProviderError(
                f"the stop time of {server_id} did not move as asked",
                hint="look at `comfyctl machines ls`; the machine may stop earlier or later than wanted",
                details={"wanted_seconds": total.total_seconds(), "got_seconds": got.total_seconds()},
            )
        return machine

    async def ask_longer(self, machine: Machine, *, total: timedelta) -> Machine:
        """Ask for a running time, counted from ready; what was granted is still to be read (`confirmed`).

        Raises BudgetExceeded: nothing was asked for. Raises ProviderError (it may have been granted all the same),
        LeaseLost, LocalError.
        """
        machine = await self.books.ask_duration(machine, total=total)
        faultpoint("extend.asked")
        self.books.not_longer.discard(machine.id)
        try:
            await self.provider.change_duration(server_id_of(machine), total=total)
        except ProviderError as error:
            if error.details.get("status") is not None:  # an answer; without one it may well have worked
                self.books.not_longer.add(machine.id)
            raise
        faultpoint("extend.answered")
        return machine

    async def confirmed(self, machine: Machine, report: MachineReport) -> Machine | None:
        """Write down what running time the provider says a machine has; None if it does not say.

        What cannot be written is kept in memory: it may run that long. Raises LeaseLost.
        """
        if report.stopping_at is None or report.ready_at is None:
            return None
        got = report.stopping_at - report.ready_at
        kept = {"kept_until": report.stopping_at} if machine.kept_until is not None else {}
        asked = f"asked to be {machine.asked_duration.total_seconds():.0f} s, " if machine.asked_duration else ""
        machine = await self.books.change_softly(
            machine,
            note=f"running time {asked}is {got.total_seconds():.0f} s",
            duration=got,
            planned_stop_at=report.stopping_at,
            asked_duration=None,
            **kept,
        )
        faultpoint("extend.recorded")
        return machine

    async def adopt(self, report: MachineReport, *, purpose: Purpose, reason: str) -> Machine:
        """Put a machine that the account runs, and that we did not launch, into our books as ours.

        Raises MachineNotFound if its id cannot be used.
        """
        if not report.addressable:
            raise MachineNotFound(
                f"RunComfy lists {report.server_id} under an id that cannot be used",
                hint="look at it, and end it, on RunComfy's page",
            )
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
        return await self.ready(machine, report) if report.phase is Phase.READY else machine


def _raise_if_over(report: MachineReport) -> None:
    """Raise if a machine that is to start will not."""
    if report.phase is Phase.FAILED:
        raise MachineFailed(
            f"RunComfy says {report.status!r} of machine {report.server_id}",
            hint="try again, or another --server-type",
            details={"server_id": report.server_id},
        )
    if report.phase in (Phase.GONE, Phase.STOPPING):
        raise MachineLost(
            f"machine {report.server_id} went away while it was starting (RunComfy says {report.status!r})",
            hint="try again; somebody may have stopped it on RunComfy's page",
            details={"server_id": report.server_id},
        )
