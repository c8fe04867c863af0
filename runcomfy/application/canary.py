"""
The canary: does the provider end a machine at its time, by itself?

Everything that protects a bill when all of ours is dead rests on that, and it is not documented in so many words. So
it is tried, on the user's order: the cheapest machine for the shortest time, left alone past its time, and looked at.
If it still runs then it is ended by us. `comfyctl doctor` shows the result from then on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from runcomfy.application.finish import finish
from runcomfy.application.machines import Machines
from runcomfy.domain.canary import Outcome, Plan
from runcomfy.domain.exceptions import MachineLost, ProviderError, ValueInvalid
from runcomfy.domain.machine import Machine, MachineReport, Phase, Purpose
from runcomfy.domain.money import cost_of

log = logging.getLogger("runcomfy.canary")

RARELY: Final = 30.0
"""Seconds between two looks while its time is not up."""


class Canary:
    """Tries it. Costs money: `plan` says how much at most, before."""

    def __init__(self, machines: Machines, *, tell: Callable[[str], None]) -> None:
        self._machines, self._tell = machines, tell

    def plan(self) -> Plan:
        """Return what would be done: the cheapest type that may be rented. Raises ValueInvalid if there is none."""
        cap = self._machines.settings.cloud.max_usd_per_hour
        rates = [r for r in self._machines.settings.rates.rates.values() if cap is None or r.usd_per_hour <= cap]
        tested = [rate for rate in rates if rate.tested] or rates
        if not tested:
            raise ValueInvalid("no machine type is cheap enough", hint="raise RUNCOMFY_MAX_USD_PER_HOUR")
        return Plan(min(tested, key=lambda rate: (rate.usd_per_hour, rate.server_type)))

    async def run(self, plan: Plan) -> Outcome:
        """Launch, wait past its time, look, and end what still runs.

        Raises BudgetExceeded (nothing was sent), ProviderError, BootTimeout, MachineLost (it ended before its time);
        whatever was launched is ended then.
        """
        machines = self._machines
        intent = machines.books.intent(
            purpose=Purpose.RUN,
            server_type=plan.rate.server_type,
            duration=plan.lease,
            reason="canary: does the provider end it by itself?",
        )
        try:
            async with machines.launch_lock():
                machine = await machines.launch(intent)
            self._tell(f"machine {machine.server_id} starts; it is ready in some minutes, and free until then")
            machine, report = await machines.wait_ready(machine)
            due = report.stopping_at or machine.planned_stop_at
            if due is None:
                raise ProviderError("RunComfy does not say when it will end the machine", hint="try again later")
            # The guard ends what outlives its lease; here that is what is to be seen.
            until = due + plan.patience
            machine = await machines.books.change(machine, note="left alone past its time", kept_until=until)
            self._tell(f"ready; it is to end at {due:%H:%M:%S} UTC, and is left alone until {until:%H:%M:%S}")
            ended, lag = await self._watch(machine, due, plan)
        finally:
            last = await finish(machines.settle(intent, reason="the canary is over"))
        now = machines.clock.now()
        return Outcome(
            at=now,
            server_type=plan.rate.server_type,
            lease=plan.lease,
            ended_by_itself=ended,
            lag=lag,
            looked_every=machines.settings.cloud.poll_interval,
            cost_usd=cost_of(last, now=now) if last is not None else Decimal(0),
        )

    async def _watch(self, machine: Machine, due: datetime, plan: Plan) -> tuple[bool, timedelta]:
        """Look until the machine ends, or until the patience is over; return whether it did, and when after its time.

        Counted by the loop: the clock may be set meanwhile.
        """
        machines, loop = self._machines, asyncio.get_running_loop()
        every = machines.settings.cloud.poll_interval.total_seconds()
        due_at = loop.time() + (due - machines.clock.now()).total_seconds()
        while True:
            late = timedelta(seconds=loop.time() - due_at)
            if await self._has_ended(machine):
                if late < -machines.settings.cloud.poll_interval:
                    raise MachineLost(
                        f"the machine ended {-late.total_seconds():.0f} s before its time: nothing is proven",
                        hint="somebody may have stopped it; run the canary again",
                    )
                return True, max(late, timedelta(0))
            if late >= plan.patience:
                return False, late
            left = -late.total_seconds()
            await asyncio.sleep(min(RARELY, left) if left > every else every)

    async def _has_ended(self, machine: Machine) -> bool:
        """Whether the provider says that the machine is ending or gone. What cannot be asked now is asked again."""
        report: MachineReport | None
        if machine.server_id is None:
            return False
        try:
            report = await self._machines.provider.get_machine_status(machine.server_id)
        except ProviderError as error:
            log.warning("canary_look_failed", extra={"fields": {"error": error.code}})
            return False
        if report is not None and report.phase is Phase.STOPPING:
            await self._machines.stops_unasked(machine)
            return True
        if report is not None and report.phase is not Phase.GONE:
            return False
        return await self._machines.gone_unasked(machine, note="the provider ended it by itself") is not None
