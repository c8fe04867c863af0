"""
Our books against the provider's list, again and again while a service runs: adopt, end, report (I2, I4, I7).

What is decided about a machine is the reaper's business; this loop decides when: at its start, every
`pool.reconcile_every`, at once when somebody asks (after a launch whose answer was lost), and first of all when the
computer has slept or the clock was set, since everything that was known is old then. It says what it did, and a thing
that stays as it is only once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from runcomfy.application.finish import finish
from runcomfy.application.machines import Machines
from runcomfy.application.reaper import Reaped, Reaper
from runcomfy.application.slept import Drift
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.machine import Machine
from runcomfy.domain.money import cost_of, show_usd

log = logging.getLogger("runcomfy.reconciler")

RESOLVED_WITHIN: Final = 5.0
"""Seconds that the start of a service waits at most until it is known what unanswered launches have started."""
LOOK_EVERY: Final = 5.0
"""Seconds between two looks at the clocks: so late at most it is noticed that the computer has slept."""


class Reconciler:
    """One process's reconciling of one account. `once` may be called by itself; `run` is the loop."""

    def __init__(self, machines: Machines, *, spare: Callable[[Machine], bool] | None = None) -> None:
        """`spare`: machines of dead owners that the caller is about to take over itself."""
        self._machines = machines
        self._spare = spare
        self._reaper = Reaper(machines)
        self._wake = asyncio.Event()
        self._said: set[str] = set()
        self._rounds: set[asyncio.Task[None]] = set()
        self.last: Reaped | None = None
        """What the last round that came through has done."""

    def hurry(self) -> None:
        """Reconcile at once."""
        self._wake.set()

    async def once(self) -> Reaped:
        """Repair what differs, and say what was done.

        Raises ProviderError, LocalError: nothing is decided on half of the facts.
        """
        return await self._reconcile(asyncio.Event())

    async def resolve(self) -> None:
        """Find out what launches of dead processes have started, for who takes such machines over; end nothing.

        What cannot be found out now is asked again by every round.
        """
        try:
            async with asyncio.timeout(RESOLVED_WITHIN):  # a living process may hold the launch lock
                await self._reaper.resolve_launches()
        except (RunComfyError, TimeoutError) as error:
            log.warning("launches_not_resolved", extra={"fields": {"error": repr(error)}})

    async def _reconcile(self, ends: asyncio.Event) -> Reaped:
        done = await self._reaper.reap(wait=False, spare=self._spare, on_ending=ends.set)
        self.last = done
        self._say(done)
        return done

    async def run(self) -> None:
        """Reconcile for ever; cancelled, it ends when what it has begun to stop is stopped."""
        try:
            await self.watch()
        finally:
            await finish(self.close())

    async def close(self, after: Coroutine[Any, Any, None] | None = None, *, at_least_once: bool = False) -> None:
        """See what was begun to be stopped to its end, which takes as long as the provider needs; `after` comes first.

        `at_least_once`: a service that had nothing to do may end before its first round came through; it is made up
        for then, so that what an earlier one left behind does not wait for the next. Raises what `after` raises.
        """
        try:
            if after is not None:
                await after
        finally:
            if at_least_once and self.last is None:
                await self._softly(asyncio.Event())
            if self._rounds:
                await asyncio.wait(set(self._rounds))

    async def watch(self) -> None:
        """Reconcile until cancelled, and no longer: `close` waits for what was begun to be stopped."""
        try:
            await self._watch()
        finally:
            for task in self._rounds:
                task.cancel()

    async def _watch(self) -> None:
        drift = Drift(self._machines.clock)
        loop = asyncio.get_running_loop()
        every = self._machines.settings.pool.reconcile_every.total_seconds()
        due = loop.time()
        while True:
            slept = drift.jumped()
            if slept:
                self._machines.tell(f"the clock moved by {slept:.0f} s beside us; looking at every machine again")
                log.warning("clock_moved", extra={"fields": {"seconds": round(slept)}})
            if slept or self._wake.is_set() or loop.time() >= due:
                self._wake.clear()
                await self._round(every)
                due = loop.time() + every
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, min(LOOK_EVERY, due - loop.time()))):
                    await self._wake.wait()

    async def _round(self, patience: float) -> None:
        """Reconcile once. A machine that cannot be stopped for hours holds up no other: the next round passes it over,
        since it is ours by then, and this one goes on until it is gone.
        """
        ends = asyncio.Event()
        task = asyncio.create_task(self._softly(ends), name="reconcile")
        self._rounds.add(task)
        task.add_done_callback(self._rounds.discard)
        begun = asyncio.create_task(ends.wait())
        try:
            await asyncio.wait({task, begun}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()
        await asyncio.wait({task}, timeout=patience)
        if task.done():
            task.result()

    async def _softly(self, ends: asyncio.Event) -> None:
        try:
            await self._reconcile(ends)
        except RunComfyError as error:
            self._once(f"failed {error.code}", f"the machines could not be looked through now ({error.message})")
            log.warning("reconcile_failed", extra={"fields": {"error": error.code}})
        else:
            self._said = {said for said in self._said if not said.startswith("failed ")}

    def _say(self, done: Reaped) -> None:
        tell, facts = self._machines.tell, self._machines.books.facts
        for machine in done.ended:
            log.info("reconciled_ended", extra={"fields": facts(machine)})
            cost = show_usd(cost_of(machine, now=self._machines.clock.now()))
            tell(f"{machine.server_type} machine {machine.server_id} is {machine.state}; it cost {cost}")
        for machine in done.closed:
            log.info("reconciled_closed", extra={"fields": facts(machine)})
            tell(f"{machine.server_id or 'a launch that was never answered'}: closed, nothing runs")
        for machine in done.unresolved:
            self._once(
                f"unresolved {machine.id}",
                f"the launch of {machine.requested_at:%H:%M:%S} UTC: not known yet whether it started a machine",
            )
        for report in done.foreign:
            self._once(
                f"foreign {report.server_id}",
                f"{report.server_id} ({report.server_type}, {report.status}) is not ours and left alone",
            )
        for machine, error in done.failed:
            self._once(f"error {machine.id} {error.code}", f"{error.message}; {error.hint}")

    def _once(self, key: str, sentence: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._machines.tell(sentence)
