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
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from runcomfy.application.machines import Machines
from runcomfy.application.reaper import Reaped, Reaper
from runcomfy.application.slept import Drift
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.machine import Machine
from runcomfy.domain.money import cost_of, show_usd

log = logging.getLogger("runcomfy.reconciler")

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
        self.last: Reaped | None = None
        """What the last round that came through has done."""

    def hurry(self) -> None:
        """Reconcile at once."""
        self._wake.set()

    async def once(self) -> Reaped:
        """Repair what differs, and say what was done.

        Raises ProviderError, LocalError: nothing is decided on half of the facts.
        """
        done = await self._reaper.reap(wait=False, spare=self._spare)
        self.last = done
        self._say(done)
        return done

    async def run(self) -> None:
        """Reconcile for ever; cancelled, it ends when what it has begun to stop is stopped."""
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
                await self._softly()
                due = loop.time() + every
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, min(LOOK_EVERY, due - loop.time()))):
                    await self._wake.wait()

    async def _softly(self) -> None:
        try:
            await self.once()
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
