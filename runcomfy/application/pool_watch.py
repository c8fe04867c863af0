"""
What the provider says of the pool's machines, read from one list for all of them.

    Starting           it boots; longer than the boot limit, and it is replaced (fault 14)
    Ready              it bills; usable only when its ComfyUI answers, too (fault 15)
    Ready -> Starting  its leases are void, and it must become usable again (fault 16)
    not in the list    asked for by its id; gone when that and a second list agree (faults 9-11, 22, 68)
    an unknown word    alive, and billed (fault 13)

A list that could not be read whole changes nothing. What a list says is written down only where it is news.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Final

from runcomfy.application.books import dearer
from runcomfy.application.ending import HOPELESS, ready_since, times_are_news
from runcomfy.application.health import wait_until_usable
from runcomfy.application.machines import EXACT_ENOUGH
from runcomfy.application.pool_members import Member, Members
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    LaunchAmbiguous,
    LeaseLost,
    LocalError,
    MachineFailed,
    MachineLost,
    ProviderError,
    RunComfyError,
    foreign_text,
)
from runcomfy.domain.machine import MachineEvent, MachineReport, MachineState, Phase, ServerId
from runcomfy.domain.secret import SecretUrl
from runcomfy.ports.comfyui import ComfyUI

log = logging.getLogger("runcomfy.pool")

ASKED_PER_ROUND: Final = 8
"""Machines that are asked for by their id in one round: a list that is empty by mistake must not cost hundreds."""
LIST_AGAIN_MOST: Final = 30.0
"""Seconds between two lists, at most, while the provider cannot be asked."""
PROBE_EVERY: Final = 70.0
"""Seconds after which the ComfyUI of a machine that has nothing to do is asked whether it still answers."""
PROBES_AT_ONCE: Final = 8
PROBE_WITHIN: Final = timedelta(seconds=10)
REST_AFTER: Final = 60.0
"""Seconds without a job after which the connections to a machine are let go."""
MISSING: Final = "it is not in RunComfy's list"
PROOF_AFTER_A_JOB: Final = timedelta(seconds=15)
"""How long a server that a job has just given up on, after minutes of silence, may stay silent."""


class Watch:
    """Reads the list, round after round."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._machines, self._health = members.machines, members.health
        self._cloud, self._pool = members.settings.cloud, members.settings.pool
        self._complained = ""
        self._failures = 0
        """Lists in a row that could not be read."""
        self.listed_at = float("-inf")
        """By the loop's time: when the last list that could be read was asked for."""

    async def run(self) -> None:
        """Read the list for ever."""
        while True:
            await self.round()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._members.look_now.wait()

    def _pause(self) -> float:
        """Return the seconds to the next round: a machine that starts bills as soon as it is Ready."""
        boots = any(not member.usable and not member.ended and member.machine.server_id for member in self._members)
        every = self._pool.status_every.total_seconds()
        if boots:
            every = min(self._cloud.poll_interval.total_seconds(), every)
        if self._failures:
            return max(every, min(every * 2.0 ** min(self._failures - 1, 8), LIST_AGAIN_MOST))
        return every

    async def round(self) -> None:
        """Read the list once, and do what follows from it."""
        self._members.look_now.clear()
        watched = [m for m in self._members if m.machine.server_id is not None and not m.ended]
        if not watched and not self._health.is_refused:
            return
        began = _now()
        listed = await self._list()
        if listed is not None:
            missing = []
            for member in watched:
                report = listed.get(member.machine.server_id or ServerId(""))
                if report is not None and report.phase is not Phase.GONE:
                    await self._seen(member, report, began)
                elif not member.ended:
                    missing.append(member)
            if missing:
                await self._missing(missing)
        await self._health.learn()
        self._look_after_the_idle()

    async def _list(self) -> Mapping[ServerId, MachineReport] | None:
        """Return what the account lists; None if it cannot be read now."""
        began = _now()
        try:
            reports = await self._machines.provider.list_machines()
        except (ProviderError, LocalError) as error:
            self._failures += 1
            if isinstance(error, HOPELESS):
                self._health.refused(error)
            if self._complained != error.code:
                self._complained = error.code
                self._members.books.tell(f"the machines cannot be looked at now: {error.message}")
            log.warning("pool_list_failed", extra={"fields": {"error": error.code}})
            return None
        self._failures = 0
        if self._complained:
            self._complained = ""
            self._members.books.tell("the machines can be looked at again")
        self._health.answered()
        self.listed_at = began
        return {report.server_id: report for report in reports}

    # -- what is in the list -------------------------------------------------------------------------------

    async def _seen(self, member: Member, report: MachineReport, began: float) -> None:
        member.seen = True
        if member.ended:
            return
        wrong = await self._wrong_type(member, report)
        if not self._is_ours(member):
            return
        match report.phase:
            case Phase.READY:
                await self._ready(member, report, began)
            case Phase.STARTING:
                await self._starting(member, report, began)
            case Phase.FAILED:
                await self._failed(member, report)
            case Phase.STOPPING:
                await self._stopping(member, report)
            case _:
                await self._unknown(member, report, began)
        if wrong is not None and not member.ended:
            asked, why = wrong  # only now: it is billed since it is Ready, and that is written down
            self._members.decided("replace", member.machine.id, why)
            self._members.start_failed(asked, why)
            self._members.end(member, f"ill: {why}")
            return
        if member.pooled.suspect.startswith(MISSING):
            self._members.suspect(member, "")

    def _is_ours(self, member: Member) -> bool:
        """Whether nobody else has taken the machine over, as far as what was written down since tells."""
        return self._members.get(member.machine.id) is member

    async def _wrong_type(self, member: Member, report: MachineReport) -> tuple[str, str] | None:
        """Book the type that the provider says it has; return the one asked for, and why that is too dear to keep."""
        if report.server_type in ("", member.machine.server_type):
            return None
        async with member.writing:
            asked = member.machine
            try:
                member.pooled.machine = await self._machines.books.note_type(asked, report)
            except LeaseLost:
                self._members.taken(member)
                return None
        failed = dearer(asked, member.machine)
        return (asked.server_type, failed.message) if failed is not None else None

    async def _ready(self, member: Member, report: MachineReport, began: float) -> None:
        news = member.machine.state is not MachineState.READY or member.billed_since is None
        if (news or times_are_news(report, member.machine)) and not await self._note_ready(member, report):
            return
        await self._note_time(member, report, began)
        if not self._is_ours(member):
            return
        if not member.ended:
            await self._moved(member, report)
        if member.ended or member.usable or member.machine.state is not MachineState.READY:
            return
        if report.url is None:
            self._limit(member)
        elif member.gate is None or member.gate.done():
            member.url = report.url
            member.gate = self._members.spawn(self._gate(member, report.url), name=f"gate {member.machine.id}")

    async def _moved(self, member: Member, report: MachineReport) -> None:
        """Rely on nothing of a machine that came back at another address: it was started anew (fault 71)."""
        if member.url is None or report.url is None or member.url.reveal() == report.url.reveal():
            return
        again, member.url = member.usable, report.url
        if again:  # it was never seen to be anything but Ready
            member.health = member.health.flipped(_now(), self._health.rules)
            member.pooled.flapped = True
            self._members.void(member, "it has another address")
            member.down_since = _now()
        self._members.let_go(member)
        if again:
            await self._members.write(member, "another address: it was started anew", event=MachineEvent.SILENT)
            if illness := member.health.illness(_now(), self._health.rules):
                self._members.ill(member, illness, dead=True)

    async def _note_ready(self, member: Member, report: MachineReport) -> bool:
        """Write down that it is Ready; False if that cannot be: it is tried with the next list."""
        before = member.machine.ready_at
        async with member.writing:
            try:
                machine = await self._machines.ready(member.machine, report, starting=member.starting_at)
            except LeaseLost:
                self._members.taken(member)
                return False
            except RunComfyError as error:
                log.warning("ready_not_recorded", extra={"fields": {"machine": member.machine.id, "error": error.code}})
                return False
            member.pooled.machine = machine
        now, clock = _now(), self._members.clock
        ready_at = machine.ready_at or clock.now()
        if member.billed_since is None or machine.ready_at != before:
            # By the loop: clocks jump, and the provider's may differ from ours.
            member.billed_since = now - max(0.0, (clock.now() - ready_at).total_seconds())
            member.confirmed_s = machine.duration.total_seconds()
        member.down_since = now
        self._members.changed(member)
        return True

    async def _note_time(self, member: Member, report: MachineReport, began: float) -> None:
        """Read how long it runs; what was asked for since this list was asked for is not in it."""
        if report.stopping_at is None or report.ready_at is None:
            return
        if member.asked is not None and began < member.asked_at:
            return
        got = report.stopping_at - report.ready_at
        if member.asked is None and abs(got.total_seconds() - member.confirmed_s) < 1.0:
            return
        asked, member.asked = member.asked, None
        member.confirmed_s = got.total_seconds()
        async with member.writing:
            try:
                member.pooled.machine = await self._machines.confirmed(member.machine, report) or member.machine
            except LeaseLost:
                self._members.taken(member)
                return
        if asked is not None and abs(got - asked) > EXACT_ENOUGH:
            fields: dict[str, object] = {
                "machine": member.machine.id,
                "wanted": asked.total_seconds(),
                "got": got.total_seconds(),
            }
            log.warning("lease_not_moved", extra={"fields": fields})
            self._say_not_moved(member, got, asked)

    def _say_not_moved(self, member: Member, got: timedelta, asked: timedelta) -> None:
        """Tell once per machine that the provider does not let it run longer: long jobs will be cut off."""
        if member.told_not_moved or got > asked:
            return
        member.told_not_moved = True
        self._machines.tell(
            f"RunComfy did not prolong machine {member.machine.server_id}: it still stops {got.total_seconds():.0f} s "
            "after it was ready, and cuts off what runs there then; jobs longer than RUNCOMFY_RUN_LEASE "
            f"({self._cloud.run_lease.total_seconds():.0f} s) need a longer one"
        )

    async def _starting(self, member: Member, report: MachineReport, began: float) -> None:
        if member.machine.state is not MachineState.READY:
            member.starting_at = began
            self._limit(member)
            return
        now = _now()
        member.health = member.health.flipped(now, self._health.rules)
        member.pooled.flapped = True
        self._members.void(member, f"RunComfy says {report.status}")
        member.down_since = now
        if member.gate is not None:
            member.gate.cancel()
        note = f"not Ready any more (RunComfy says {report.status}), {len(member.health.flips)} times of late"
        await self._members.write(member, note, event=MachineEvent.SILENT)
        if illness := member.health.illness(now, self._health.rules):
            self._members.ill(member, illness, dead=True)  # nothing runs there that could be relied on

    async def _unknown(self, member: Member, report: MachineReport, began: float) -> None:
        """A word that nobody knows: alive, and billed as soon as it has a ready time (fault 13)."""
        untold = member.billed_since is None or times_are_news(report, member.machine)
        if untold and report.ready_at is not None:
            await self._bills(member, report, f"it bills, though RunComfy says {report.status!r} and not Ready")
        if member.billed_since is not None:
            await self._note_time(member, report, began)
        self._limit(member)

    async def _bills(self, member: Member, report: MachineReport, note: str) -> None:
        """Write down since when a machine bills that nobody has seen Ready."""
        now = self._members.clock.now()
        ready_at = ready_since(report, member.machine, now=now)
        member.billed_since = _now() - max(0.0, (now - ready_at).total_seconds())
        member.confirmed_s = member.machine.duration.total_seconds()
        member.down_since = _now()
        await self._members.write(member, note, ready_at=ready_at, planned_stop_at=report.stopping_at)

    async def _failed(self, member: Member, report: MachineReport) -> None:
        self._members.ill(member, f"RunComfy says {foreign_text(report.status, 40)!r} of it", dead=True)

    async def _stopping(self, member: Member, report: MachineReport) -> None:
        """Somebody, or the end of its time, stops it: nothing there can be relied on any more."""
        if member.machine.ready_at is None and report.ready_at is not None:
            await self._bills(member, report, f"it was ready unseen, RunComfy says {report.status} now")
        if member.machine.stop_accepted_at is None and member.machine.ready_at is not None:
            async with member.writing:
                try:
                    member.pooled.machine = await self._machines.stops_unasked(member.machine)
                except LeaseLost:
                    self._members.taken(member)
                    return
        elif member.pooled.draining:
            return  # said already; it is waited for until it is gone
        if not member.pooled.draining:
            member.pooled.draining = "RunComfy is stopping it, we did not ask"
        self._members.void(member, member.pooled.draining)

    def _limit(self, member: Member) -> None:
        """Replace a machine that does not become usable in time."""
        if member.usable or (member.gate is not None and not member.gate.done()):
            return  # whether its ComfyUI comes has a limit of its own
        waited = _now() - member.down_since
        if member.billed_since is None:
            if waited > self._cloud.boot_timeout.total_seconds():
                self._members.ill(member, f"it was not Ready after {waited:.0f} s", dead=True)
        elif waited > self._cloud.comfyui_timeout.total_seconds():
            self._members.ill(member, f"it bills and has not been usable for {waited:.0f} s", dead=True)

    # -- what is not in the list ---------------------------------------------------------------------------

    async def _missing(self, missing: Sequence[Member]) -> None:
        """Find out what is gone: not in the list, not known by its id, and not in a second list."""
        now = _now()
        grace = max(self._cloud.not_found_grace, self._cloud.visibility_window).total_seconds()
        doubted = []
        for member in missing:
            started = now - member.pooled.launched_at
            if member.seen:
                self._members.suspect(member, MISSING)
                doubted.append(member)
            elif started > grace and (member.gate is None or member.gate.done()):
                member.gate = self._members.spawn(self._find(member), name=f"find {member.machine.id}")
            elif started > self._cloud.not_found_grace.total_seconds():
                doubted.append(member)  # it may bill before it is listed
        doubted.sort(key=lambda member: -len(member.pooled.leases))
        unknown = [member for member in doubted[:ASKED_PER_ROUND] if await self._is_unknown(member) and member.seen]
        if not unknown:
            return
        if (listed := await self._list()) is None:
            return
        for member in unknown:
            report = listed.get(member.machine.server_id or ServerId(""))
            if report is not None and report.phase is not Phase.GONE:
                await self._seen(member, report, self.listed_at)
            else:
                self._members.vanished(member, "not listed any more, and unknown by its id")

    async def _is_unknown(self, member: Member) -> bool:
        """Ask for a machine by its id; True if the provider knows none, or says that it is gone."""
        if member.machine.server_id is None:
            return False
        began = _now()
        try:
            report = await self._machines.provider.get_machine_status(member.machine.server_id)
        except (ProviderError, LocalError) as error:
            log.warning("pool_look_failed", extra={"fields": {"machine": member.machine.id, "error": error.code}})
            return False
        if report is None or report.phase is Phase.GONE:
            return True
        await self._seen(member, report, began)
        return False

    async def _find(self, member: Member) -> None:
        """Look for a machine that never became visible: the launch may have been answered with a wrong id (I3)."""
        try:
            async with member.writing:
                member.pooled.machine = await self._machines.found_again(member.machine)
        except LeaseLost:
            self._members.taken(member)
        except (MachineLost, LaunchAmbiguous) as error:
            self._members.ill(member, error.message, dead=True)

    # -- whether it can be used ----------------------------------------------------------------------------

    async def _gate(self, member: Member, url: SecretUrl) -> None:
        """Let jobs go to a machine that is Ready when its ComfyUI answers; replace it if that never comes."""
        since = _now()
        client = member.client or self._members.comfyui(url)
        member.client = client
        try:
            info = await wait_until_usable(client, within=self._cloud.comfyui_timeout)
        except RunComfyError as error:
            self._members.ill(member, error.message, dead=True)
            return
        if member.ended or member.machine.state is not MachineState.READY:
            return
        self._members.usable(member, client)
        note = f"usable: ComfyUI {info.version or 'of unknown version'} answered after {_now() - since:.0f} s"
        await self._members.write(member, note)
        self._members.end_if_unused(member)

    def doubt(self, member: Member, why: str, *, within: timedelta | None = None) -> None:
        """Find out whether a machine's ComfyUI still answers, and send nothing new there meanwhile."""
        if member.ended or member.client is None or (member.proof is not None and not member.proof.done()):
            return
        self._members.suspect(member, why)
        self._members.look_now.set()  # it may be gone altogether
        within = within or self._members.settings.comfy.unreachable_timeout
        member.proof = self._members.spawn(
            self._prove(member, member.client, within), name=f"proof {member.machine.id}"
        )

    async def _prove(self, member: Member, client: ComfyUI, within: timedelta) -> None:
        began, epoch = _now(), member.pooled.epoch
        try:
            await wait_until_usable(client, within=within)
        except MachineFailed as error:
            if member.ended or member.pooled.epoch != epoch:
                return
            if self.listed_at < began:
                return  # the provider does not answer either: it may be our own network. It stays suspect.
            member.health = member.health.died(error.message)
            self._members.ill(member, error.message, dead=True)
        except RunComfyError as error:
            if not member.ended and not isinstance(error, AnswerUnreadable):
                self._members.ill(member, error.message, dead=True)
        else:
            if member.pooled.epoch == epoch:
                self._members.suspect(member, "")

    def _look_after_the_idle(self) -> None:
        """Ask machines without work whether they still answer, a few at a time, and let go of their connections."""
        now, asked = _now(), 0
        for member in self._members:
            pooled = member.pooled
            self._members.end_if_unused(member)
            if member.ended or pooled.leases or member.client is None or not member.usable:
                continue
            if pooled.suspect and not pooled.suspect.startswith(MISSING):
                self.doubt(member, pooled.suspect)
                continue
            if pooled.idle_since is not None and now - pooled.idle_since > REST_AFTER:
                self._members.rest(member)
            if asked < PROBES_AT_ONCE and now - member.probed_at >= PROBE_EVERY:
                member.probed_at, asked = now, asked + 1
                self._members.spawn(self._probe(member), name=f"probe {member.machine.id}")

    async def _probe(self, member: Member) -> None:
        client, epoch = member.client, member.pooled.epoch
        if client is None:
            return
        why = ""
        try:
            async with asyncio.timeout(PROBE_WITHIN.total_seconds()):
                await client.probe()  # an open socket vouches for it; else it is asked
        except TimeoutError:
            why = f"no answer within {PROBE_WITHIN.total_seconds():.0f} s"
        except RunComfyError as error:
            why = error.message
        if why and member.client is client and member.pooled.epoch == epoch:
            self.doubt(member, f"its ComfyUI does not answer: {why}")


def _now() -> float:
    return asyncio.get_running_loop().time()
