"""
Ending machines so that none is ever forgotten (I4).

The wish is written down if the disk lets us, the call is made in any case and repeated for ever, and a machine counts
as gone only when its own status and two full lists say so. The bill is closed provisionally at the provider's yes, and
opened again if the machine is seen alive afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from runcomfy.application.books import Books
from runcomfy.application.faultpoints import faultpoint
from runcomfy.domain.durations import show_span
from runcomfy.domain.evidence import LISTS_THAT_AGREE, AfterLook, after_look, entry_of
from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    LaunchAmbiguous,
    LeaseLost,
    ProviderError,
    RunComfyError,
    StopUnconfirmed,
    WrongUrl,
)
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, MachineReport, Phase, Purpose, ServerId
from runcomfy.ports.provider import Provider

log = logging.getLogger("runcomfy.machines")

HOPELESS: Final = (AuthRejected, AccessDenied, WrongUrl)
"""Refusals that asking again does not mend: a person has to."""
HOPELESS_AFTER: Final = timedelta(minutes=1)
"""How long a stop is repeated against a cloud that rejects the credentials. The machine's own stop time and the next
`reap` stand behind it."""
RESTOP_EVERY: Final = timedelta(seconds=30)
"""How often a stop is repeated while the provider says that it is at it."""
SAY_AGAIN: Final = timedelta(hours=1)
"""After how long it is said again that the same still goes wrong. Alarms have their own time."""
FIRST_LOOK: Final = timedelta(seconds=5)
"""How long a stop waits for the provider's word on whether the machine has begun to bill."""

SLOW_STOP: Final = timedelta(seconds=5)
"""After how long without an answer it is said that a stop is delayed: the machine bills until it is accepted. A stop
that RunComfy turns away for its rate limit is sent again after some seconds, inside the call."""


@dataclass(frozen=True, slots=True)
class Look:
    """Where the provider says a machine is. `phase` None: it could not be found out."""

    phase: Phase | None
    report: MachineReport | None = None
    listed: Sequence[MachineReport] = ()
    """Of a machine that is gone: the last full list."""


class Said:
    """What went wrong and was said: a kind of error is said when it comes first, and then once an hour."""

    def __init__(self) -> None:
        self._again_at: dict[str, float] = {}

    def due(self, kind: str) -> bool:
        """Return whether this is to be said now; True counts as said."""
        now = asyncio.get_running_loop().time()
        if now < self._again_at.get(kind, now):
            return False
        self._again_at[kind] = now + SAY_AGAIN.total_seconds()
        return True


@dataclass(slots=True)
class _Effort:
    """How one stop stands."""

    machine: Machine
    asked: float
    """When it began, by the loop's time."""
    next_call: float
    next_alarm: float
    delay: timedelta
    first: bool
    """Whether nobody had asked for a stop before it."""
    known: bool
    """Whether the provider has ever known the machine; one that it does not show yet is not gone."""
    accepted: float | None = None
    """Since when, by the loop's time, the provider's yes stands; None while there is none."""
    seen_at: datetime | None = None
    """When the machine was last seen to run."""
    tried_at: datetime | None = None
    """When the last stop was asked for of which it was not heard whether it worked."""
    left_at: datetime | None = None
    """When the first stop left, or the first that got no answer at all; it may have waited for its turn until then."""
    left_unheard: bool = False
    """Whether that one got no answer: it is likelier to have worked than one that was answered with an error."""
    unheard_since: datetime | None = None
    """When the first stop left that got no answer at all, since the machine was last seen to run."""
    complained: bool = False
    """Whether it was seen to run after the provider's yes, which was told."""
    confirmed: bool = False
    """Whether it was seen on its way out when it was last seen."""


def server_id_of(machine: Machine) -> ServerId:
    """Return the provider's id of a machine that has one; asking for less is a defect of the caller."""
    if machine.server_id is None:
        raise RunComfyError(f"machine {machine.id} was never answered and has no id at the provider")
    return machine.server_id


class Ending:
    """Stops machines of one account on behalf of one owner, and looks until they are gone."""

    def __init__(self, provider: Provider, books: Books) -> None:
        self._provider = provider
        self._books = books
        self._clock = books.clock
        self._cloud = books.settings.cloud
        self._said: dict[MachineId, Said] = {}
        """Of machines that are being ended."""

    async def stop(self, machine: Machine, *, reason: str) -> Machine:
        """Stop the machine and look until it is gone. Does not give up, except as told below.

        Returns with state STOPPED; or STOPPING, if the provider accepted the stop (so that it bills no longer by its
        own word) but has not let go of it for longer than the alarm time. If somebody else took the machine over, it
        is returned as it is: it is theirs to end.

        Raises StopUnconfirmed if the provider refuses the credentials for longer than a minute, LaunchAmbiguous if
        the launch was answered with an id that means nothing and several machines may be what it started.
        """
        server_id_of(machine)
        first = machine.stop_asked_at is None
        log.info("machine_stop", extra={"fields": {**self._books.facts(machine), "reason": reason}})
        try:
            machine = await self._books.record_softly(
                machine, MachineEvent.STOP_ASKED, note=reason, changes={"stop_reason": reason}
            )
            faultpoint("stop.asked")
            machine = await self._first_look(machine)
            return await self._until_gone(self._effort(machine, first=first), reason)
        except LeaseLost:
            self._books.tell(f"machine {machine.server_id} is looked after by another process now; left to it")
            return await self._books.latest(machine.id) or machine

    def _effort(self, machine: Machine, *, first: bool) -> _Effort:
        now, cloud = asyncio.get_running_loop().time(), self._cloud
        return _Effort(
            machine=machine,
            asked=now,
            next_call=now,
            next_alarm=now + cloud.stop_alarm_after.total_seconds(),
            delay=min(timedelta(seconds=1), cloud.poll_interval),
            first=first,
            known=machine.ready_at is not None or machine.stop_accepted_at is not None,
        )

    async def _until_gone(self, effort: _Effort, reason: str) -> Machine:
        loop, cloud = asyncio.get_running_loop(), self._cloud
        while True:
            if loop.time() >= effort.next_call:
                await self._wish_again(effort, reason)
                await self._call(effort)
            must_be_visible = self._books.must_be_visible(effort.machine)  # when it is asked: the answer may take long
            look = await self.look(effort.machine)
            if look.phase not in (None, Phase.GONE):
                effort.known = True
                if look.phase is not Phase.STOPPING:
                    effort.seen_at = self._clock.now()
            if look.report is not None:
                effort.machine = await self._note_ready(effort.machine, look.report)
            judged = after_look(look.phase, known=effort.known, must_be_visible=must_be_visible)
            if judged is AfterLook.MISTAKEN and await self._was_another(effort, look.listed):
                continue
            if judged in (AfterLook.CLOSE, AfterLook.MISTAKEN):
                await self._doubt_last_yes(effort)
                ended = self._ended_at(effort.machine, effort)
                return await self._close(effort.machine, note=reason, gone_at=ended)
            # A word that nobody knows may say that it is on its way out; of one that ran on before, it says nothing.
            ran_on = look.phase is Phase.UNKNOWN and effort.complained
            if look.phase is Phase.STOPPING:  # once its time is up, that need not be because of a stop
                effort.confirmed = effort.confirmed or not self._time_is_up(effort.machine)
            elif look.phase is not None:
                effort.confirmed = False
            if (judged is AfterLook.RUNS or ran_on) and look.phase is not None:
                await self._reopen(effort, look.phase)
            on_its_way = effort.accepted is not None and look.phase in (Phase.STOPPING, Phase.UNKNOWN)
            if on_its_way and loop.time() - (effort.accepted or 0.0) >= cloud.stop_alarm_after.total_seconds():
                if self._is_news(effort.machine, "still listed"):
                    self._books.tell(f"RunComfy accepted the stop of {effort.machine.server_id} but still lists it")
                await self._doubt_last_yes(effort)  # whoever goes on does not know what was seen here
                return effort.machine
            if loop.time() >= effort.next_alarm and not on_its_way:
                self._alarm(effort)
            await asyncio.sleep(effort.delay.total_seconds())
            effort.delay = min(effort.delay * 1.5, max(cloud.poll_interval, timedelta(seconds=1)) * 6)

    def _time_is_up(self, machine: Machine) -> bool:
        planned = _most_planned(machine)
        return planned is not None and planned <= self._clock.now()

    def _is_news(self, machine: Machine, kind: str) -> bool:
        return self._said.setdefault(machine.id, Said()).due(kind)

    async def _wish_again(self, effort: _Effort, reason: str) -> None:
        """Write the wish down if that was refused, before each call: by now the machine may be somebody else's (I7)."""
        if effort.machine.id in self._books.unwritten:
            effort.machine = await self._books.record_softly(
                effort.machine, MachineEvent.STOP_ASKED, note=reason, changes={"stop_reason": reason}
            )

    async def _call(self, effort: _Effort) -> None:
        """Ask for the stop once; raises StopUnconfirmed if asking is hopeless."""
        loop = asyncio.get_running_loop()
        accepted = False
        try:
            accepted = await self._ask_to_stop(effort)
        except HOPELESS as error:
            if loop.time() - effort.asked >= HOPELESS_AFTER.total_seconds():
                server_id = effort.machine.server_id
                fate = "it may still bill"
                if effort.machine.stop_accepted_at is not None:
                    fate = "RunComfy had accepted its stop, but whether it is gone cannot be seen"
                raise StopUnconfirmed(
                    f"machine {server_id} could not be stopped: {error.message}; {fate}",
                    hint=f"mend that ({error.hint or error.code}), then `comfyctl machines reap`; "
                    "or stop it on RunComfy's page",
                    details={"server_id": server_id, "cause": error.code},
                ) from error
        if accepted:
            effort.known, effort.accepted = True, loop.time() if effort.accepted is None else effort.accepted
        effort.next_call = loop.time() + (RESTOP_EVERY if accepted else effort.delay).total_seconds()

    async def _ask_to_stop(self, effort: _Effort) -> bool:
        """Call stop once; keep the provider's yes, which is until when it bills. Without it, it may have worked."""
        machine, tries, denied = effort.machine, list[datetime](), list[datetime]()
        server_id = server_id_of(machine)
        slow = asyncio.get_running_loop().call_later(SLOW_STOP.total_seconds(), self._say_slow, machine)
        try:
            accepted = await self._provider.stop_machine(
                server_id,
                leaving=lambda: tries.append(self._clock.now()),
                denied=lambda: denied.append(tries.pop()),
            )
        except ProviderError as error:
            if self._is_news(machine, error.code):
                self._books.tell(f"stopping {server_id} failed for now ({error.code}); trying again until it works")
            log.warning("machine_stop_failed", extra={"fields": {**self._books.facts(machine), "error": error.code}})
            if isinstance(error, HOPELESS):
                raise
            if tries or denied:
                effort.tried_at = (tries or denied)[0]
            if tries:
                since, seen = effort.unheard_since, effort.seen_at
                effort.unheard_since = tries[0] if since is None or (seen is not None and seen > since) else since
            return False
        else:
            if not accepted and tries:
                denied.append(tries.pop())  # no such machine: if a stop has ended it, it was one before
        finally:
            slow.cancel()
            if not effort.left_unheard and (tries or (denied and effort.left_at is None)):
                effort.left_at, effort.left_unheard = (tries or denied)[0], bool(tries)
        faultpoint("stop.answered")
        if accepted and machine.stop_accepted_at is None:
            machine = await self._books.change_softly(machine, note="stop accepted", stop_accepted_at=self._clock.now())
            effort.machine = machine
            faultpoint("stop.accepted")
            await self._books.post(machine, note="ready until the stop was accepted")
            faultpoint("stop.posted")
        return accepted

    def _say_slow(self, machine: Machine) -> None:
        log.warning("machine_stop_delayed", extra={"fields": self._books.facts(machine)})
        if self._is_news(machine, "slow"):
            self._books.tell(
                f"the stop of {machine.server_id} is delayed: RunComfy has not accepted it after "
                f"{show_span(SLOW_STOP)}; it bills until then, and is asked again"
            )

    async def look(self, machine: Machine) -> Look:
        """Return where the provider says the machine is; GONE only if its status and two full lists agree."""
        server_id = server_id_of(machine)
        listed: Sequence[MachineReport] = ()
        try:
            report = await self._provider.get_machine_status(server_id, urgent=True)
            if report is not None and report.phase is not Phase.GONE:
                return Look(report.phase, report)
            for number in range(LISTS_THAT_AGREE):
                if number:
                    await asyncio.sleep(self.between_reads())
                listed = await self._provider.list_machines(urgent=True)
                if (entry := entry_of(server_id, listed)) is not None:
                    return Look(entry.phase, entry)
        except ProviderError as error:
            log.warning("machine_look_failed", extra={"fields": {**self._books.facts(machine), "error": error.code}})
            return Look(None)
        return Look(Phase.GONE, listed=listed)

    def between_reads(self) -> float:
        """How long to wait between two lists that are to agree, in seconds."""
        return min(1.0, self._cloud.poll_interval.total_seconds())

    async def gone_unasked(self, machine: Machine, *, note: str) -> Machine | None:
        """Close the books of a machine that is not there any more; None if it still is."""
        if machine.server_id is None or (await self.look(machine)).phase is not Phase.GONE:
            return None
        return await self.gone(machine, note=note)

    async def stops_unasked(self, machine: Machine) -> Machine:
        """Close the bill, provisionally, of a machine that the provider says it is stopping, unasked or at its time.

        Raises LeaseLost. It is still to be seen gone; seen running again, its bill is opened again.
        """
        if machine.stop_accepted_at is not None or machine.ready_at is None:
            return machine
        now, planned = self._clock.now(), machine.planned_stop_at
        ended = max(planned if planned is not None and planned <= now else now, machine.ready_at)
        machine = await self._books.change_softly(
            machine, note="the provider is stopping it, we did not ask", stop_accepted_at=ended
        )
        await self._books.post(machine, note="ready until the provider stopped it")
        return machine

    async def gone(self, machine: Machine, *, note: str) -> Machine:
        """Close the books of a machine that is gone, which nobody here was stopping."""
        return await self._close(machine, note=note, gone_at=self._ended_at(machine))

    def _ended_at(self, machine: Machine, effort: _Effort | None = None) -> datetime:
        """Return when a machine ended that is gone, of whose stop the provider's yes did not reach us: reckoned.

        A stop that worked did so when it was sent (of somebody else's, that is when it was wished for); a machine that
        is gone after its planned stop may have run until then, also if that was moved by a call that was not answered
        (not if it was answered with an error). Between stops that were not answered and that time it is the middle, so
        that this is wrong by half of that at most. One that was seen to run after its time ended with the stop that was
        not answered since, or by itself: in the middle between then and now.
        """
        now, asked = self._clock.now(), machine.stop_asked_at
        if effort is not None and effort.first and effort.left_at is not None:
            asked = effort.left_at
        if machine.stop_accepted_at is not None:
            return now
        planned = machine.planned_stop_at if machine.id in self._books.not_longer else _most_planned(machine)
        if planned is not None and now < planned:
            planned = machine.planned_stop_at  # it was not moved, or the machine would be there
        ended = planned if planned is not None and now >= planned else asked
        seen_at, tried_at, unheard = (
            (effort.seen_at, effort.tried_at, effort.unheard_since) if effort is not None else (None, None, None)
        )
        if ended is None:
            ended = now
        elif seen_at is not None and seen_at > ended:
            ended = tried_at if tried_at is not None and tried_at > seen_at else seen_at + (now - seen_at) / 2
        elif ended == planned and unheard is not None and unheard < ended and (seen_at is None or seen_at < unheard):
            ended = unheard + (ended - unheard) / 2
        return min(now, max(ended, machine.ready_at or ended))

    async def _close(self, machine: Machine, *, note: str, gone_at: datetime) -> Machine:
        self._said.pop(machine.id, None)
        # The ledger first: it knows what it has, so that a crash in between costs no entry.
        await self._books.post(replace(machine, gone_at=gone_at), note="ready until gone")
        changes: dict[str, Any] = {"gone_at": gone_at}
        if machine.stop_accepted_at is not None:  # on a full disk it was known to nobody but us
            changes["stop_accepted_at"] = machine.stop_accepted_at
        machine = await self._books.record_softly(machine, MachineEvent.GONE, note=note, changes=changes)
        log.info("machine_stopped", extra={"fields": self._books.facts(machine)})
        return machine

    async def _first_look(self, machine: Machine) -> Machine:
        """Ask once, and not for long, where the bill depends on it.

        A machine that became Ready a moment ago is billed from then on. One whose time is up may be on its way out:
        it bills until then, and not until a stop that comes after it is accepted.
        """
        planned = machine.planned_stop_at
        time_is_up = planned is not None and planned <= self._clock.now() and machine.stop_accepted_at is None
        if machine.ready_at is not None and planned is not None and not time_is_up:
            return machine
        report: MachineReport | None = None
        with suppress(ProviderError, TimeoutError):
            async with asyncio.timeout(FIRST_LOOK.total_seconds()):
                report = await self._provider.get_machine_status(server_id_of(machine), urgent=True)
        if report is None:
            return machine
        machine = await self._note_ready(machine, report)
        return await self.stops_unasked(machine) if time_is_up and report.phase is Phase.STOPPING else machine

    async def _note_ready(self, machine: Machine, report: MachineReport) -> Machine:
        """Write down since when the machine bills, if its becoming ready was not seen, or not told."""
        ready_at = billed_since(report, machine, now=self._clock.now())
        if ready_at is None or ready_at == machine.ready_at:
            return machine
        machine = await self._books.change_softly(
            machine,
            note=f"ready, seen while it is being stopped; {report.status}",
            ready_at=ready_at,
            planned_stop_at=report.stopping_at,
        )
        await self._books.post(machine, note="ready until the stop was accepted")
        return machine

    async def _reopen(self, effort: _Effort, phase: Phase) -> None:
        """The stop was accepted and the machine runs: it bills again, and is asked to stop again."""
        machine = effort.machine
        effort.accepted = None
        if machine.stop_accepted_at is None:
            return
        if not effort.complained:
            effort.complained = True
            self._books.tell(f"RunComfy accepted the stop of {machine.server_id}, but it still runs; asking again")
        log.error("machine_runs_after_stop", extra={"fields": self._books.facts(machine)})
        effort.machine = await self._books.change_softly(
            machine, note=f"seen {phase} after its stop was accepted", stop_accepted_at=None
        )
        effort.next_call = min(effort.next_call, asyncio.get_running_loop().time() + effort.delay.total_seconds())

    async def _doubt_last_yes(self, effort: _Effort) -> None:
        """Take the last yes for a stop that was not answered, if an earlier one was false and nothing bears it out.

        A machine that does not obey and then cannot be looked at may have run until its time was up.
        """
        machine = effort.machine
        if not effort.complained or effort.confirmed or machine.stop_accepted_at is None:
            return
        effort.tried_at = machine.stop_accepted_at
        effort.machine = await self._books.change_softly(
            machine, note="gone unseen after a yes like those that were false", stop_accepted_at=None
        )

    def _alarm(self, effort: _Effort) -> None:
        now = asyncio.get_running_loop().time()
        effort.next_alarm = now + self._cloud.stop_alarm_after.total_seconds()
        self._books.tell(
            f"ALARM: machine {effort.machine.server_id} still runs {now - effort.asked:.0f} s after its stop was "
            "asked for; still trying. You can also stop it on RunComfy's page."
        )
        log.error("machine_outlives_stop", extra={"fields": self._books.facts(effort.machine)})

    async def _was_another(self, effort: _Effort, listed: Sequence[MachineReport]) -> bool:
        """Whether the launch was answered with an id that means nothing, and what it started was found now (I3)."""
        if (right := await self.mistaken(effort.machine, listed)) is None:
            return False
        effort.machine = await self._books.change_softly(
            effort.machine, note="the launch was answered with an id that means nothing", server_id=right.server_id
        )
        effort.known, effort.next_call = True, asyncio.get_running_loop().time()
        return True

    async def mistaken(self, machine: Machine, listed: Sequence[MachineReport]) -> MachineReport | None:
        """Return the machine that a launch started whose answer named an id that never became visible.

        Raises LaunchAmbiguous if several may be it; the books of the launch are closed then.
        """
        if machine.purpose is Purpose.TAKEN or machine.ready_at is not None or machine.stop_accepted_at is not None:
            return None  # that id has meant something
        exact, near = await self._books.fitting(machine, listed)
        if not exact and not near:
            return None
        if len(exact) == 1:
            self._books.tell(
                f"the launch was answered with {machine.server_id}, which never appeared; "
                f"{exact[0].server_id} is what it started"
            )
            return exact[0]
        ids = [report.server_id for report in [*exact, *near]]
        await self.gone(machine, note=f"never visible; may be {', '.join(ids)}")
        raise ambiguous(ids)


def _most_planned(machine: Machine) -> datetime | None:
    """Return until when a machine may have run by itself: its planned stop, or what was asked for and is over by now.

    What was asked for and not confirmed is nothing to rely on, yet it may be billed.
    """
    if machine.ready_at is None or machine.asked_duration is None or machine.planned_stop_at is None:
        return machine.planned_stop_at
    return max(machine.planned_stop_at, machine.ready_at + machine.asked_duration)


def ambiguous(ids: Sequence[ServerId]) -> LaunchAmbiguous:
    """Return the error for a launch of which it cannot be told which machine it started, if any."""
    return LaunchAmbiguous(
        f"{len(ids)} new machine{'s' if len(ids) > 1 else ''} may be what an unanswered launch started: "
        f"{', '.join(ids)}; none was touched",
        hint="look at `comfyctl machines ls`; end yours with `comfyctl machines stop ID`, or on RunComfy's page",
        details={"server_ids": list(ids)},
    )


def billed_since(report: MachineReport, machine: Machine, *, now: datetime) -> datetime | None:
    """Return since when a machine bills by the provider's word on it, whatever it calls its state; None: not yet."""
    if report.ready_at is None and report.phase is not Phase.READY and machine.ready_at is None:
        return None
    return ready_since(report, machine, now=now)


def ready_since(
    report: MachineReport, machine: Machine, *, now: datetime, not_before: datetime | None = None
) -> datetime:
    """Return since when a machine that is Ready bills: as the books have it, once they have it from the provider.

    A word may come before its times (fault 13: `READY` of a machine that still starts). It is taken to bill from then
    on, and its planned stop is not known, until both are told: paid ahead from a time too early, it would be paid for
    longer than a lease (I5). `not_before`: see `believable`.
    """
    if machine.ready_at is None:
        return believable(report.ready_at, machine, now=now, not_before=not_before)
    if times_are_news(report, machine) and report.ready_at is not None:
        return report.ready_at if machine.requested_at <= report.ready_at <= now else machine.ready_at
    return machine.ready_at


def times_are_news(report: MachineReport, machine: Machine) -> bool:
    """Whether the provider tells the times of a machine whose planned stop it has never told."""
    return machine.planned_stop_at is None and report.ready_at is not None and report.stopping_at is not None


def believable(
    ready_at: datetime | None, machine: Machine, *, now: datetime, not_before: datetime | None = None
) -> datetime:
    """Return a ready time that lies between the launch and now: the provider's clock may differ from ours (fault 70).

    `not_before`: when it was last seen not to be ready, by our own clock. It counts where the time that is told proves
    that the clocks differ; else a machine that was seen to start may have been ready before and turned back (fault 16).
    """
    if ready_at is not None and machine.requested_at <= ready_at <= now:
        return ready_at
    return min(max(ready_at or now, machine.requested_at, not_before or machine.requested_at), now)
