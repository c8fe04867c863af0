"""
Machines and money for clients, asked for rarely: however many look, the provider is asked once in five seconds.

What cannot be looked at is said (`listed` false, and why), and never keeps the rest from being shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from launcher.errors import NotFound
from launcher.views import Json, iso, usd, without_paths
from runcomfy.application.books import Books
from runcomfy.application.by_order import stop_whosever
from runcomfy.application.cost_optimizer import CostOptimizer
from runcomfy.application.costs import Slot
from runcomfy.application.machine_rows import MachineRow, machine_rows
from runcomfy.application.spending import BudgetNow, Spending, spending
from runcomfy.domain.exceptions import ConfigurationError, LocalError, ProviderError, foreign_text
from runcomfy.domain.machine import MachineReport, MachineState

if TYPE_CHECKING:
    from runcomfy.bootstrap import App

FRESH_S: Final = 5.0
"""How long an answer of the provider, or a sum of all bills, is good enough for everybody, at least."""
SHARE_MOST: Final = 0.05
"""Of the time that sums of all bills may take: those of a hundred thousand jobs are made less often."""
STOP_WAIT_S: Final = 20.0
"""How long a client waits for a stopped machine to be seen gone; it is stopped all the same."""
ALL: Final = "all"
"""The scope of a budget that counts everything."""


class Kept:
    """An answer that is asked for once in a while, and more seldom where it takes long; who comes meanwhile waits."""

    def __init__(self, ask: Callable[[], Awaitable[Any]], *, fresh_s: float, share: float = 1.0) -> None:
        """An answer is good for `fresh_s` seconds, and for so long that asking takes `share` of the time at most."""
        self._ask, self._fresh_s, self._share = ask, fresh_s, share
        self._until, self._value = float("-inf"), None
        self._asking = asyncio.Lock()

    async def get(self) -> Any:
        """Return the answer, asked for anew if the last one is too old. Raises what asking raises."""
        async with self._asking:
            loop = asyncio.get_running_loop()
            if (began := loop.time()) >= self._until:
                self._value = await self._ask()
                self._until = (now := loop.time()) + max(self._fresh_s, (now - began) / self._share)
            return self._value

    def forget(self) -> None:
        """Let the next who comes ask."""
        self._until = float("-inf")


class Glances:
    """One process's looks at machines and money."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._list = Kept(self._listed, fresh_s=FRESH_S)
        self._money = Kept(self._spending, fresh_s=FRESH_S, share=SHARE_MOST)
        self._office: CostOptimizer | None = None
        self._stopping: set[asyncio.Task[Any]] = set()

    # -- machines ------------------------------------------------------------------------------------------

    async def _listed(self) -> tuple[Sequence[MachineReport], str]:
        cloud, _ = await self._app.cloud()
        try:
            return await cloud.provider.list_machines(), ""
        except ProviderError as error:
            return (), error.message

    async def machines(self) -> Json:
        """Return the machines, as `GET /machines` does. Raises nothing that a client could help."""
        try:
            rows, why = await self.rows()
        except (ConfigurationError, LocalError) as error:
            return {"machines": [], "listed": False, "why": without_paths(error.message)}
        return {"machines": [machine_view(row) for row in rows], "listed": not why, "why": why or None}

    async def rows(self) -> tuple[list[MachineRow], str]:
        """Return every machine, and why the provider's list is missing. Raises ConfigurationError, LocalError."""
        cloud, _ = await self._app.cloud()
        listed, why = await self._list.get()
        return await machine_rows(cloud, listed), without_paths(why)

    async def stop(self, machine_id: str) -> Json:
        """Stop a machine, by our id or the provider's; return it as it is then.

        Raises NotFound, ProviderError, ConfigurationError, LocalError.
        """
        cloud, _ = await self._app.cloud()
        row = await self._row(machine_id)
        server_id = row.report.server_id if row.report else row.machine.server_id if row.machine else None
        if server_id is None:
            raise NotFound(
                "the machine has no id at the provider yet: its launch was not answered",
                hint="look again in a moment; it is ended as soon as it is known",
            )
        task = asyncio.ensure_future(stop_whosever(cloud, server_id, note="stop asked for by the user, over HTTP"))
        self._stopping.add(task)
        task.add_done_callback(self._stopped)
        await asyncio.wait({task}, timeout=STOP_WAIT_S)
        self._list.forget()
        if task.done():
            machine = task.result()
            return machine_view(
                MachineRow(machine, None, row.busy, machine.reason, ends=True, ours=True, now=cloud.clock.now())
            )
        return machine_view(await self._row(machine_id))

    def _stopped(self, task: asyncio.Task[Any]) -> None:
        self._stopping.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited was told; who did not sees the machine still there

    async def _row(self, machine_id: str) -> MachineRow:
        for _ in range(2):
            for row in (await self.rows())[0]:
                ids = {row.machine.id, row.machine.server_id} if row.machine else set()
                if machine_id in ids | ({row.report.server_id} if row.report else set()):
                    return row
            self._list.forget()  # it may be newer than the list
        raise NotFound(
            f"the account has no machine {foreign_text(machine_id, 60)}", hint="GET /machines lists what it has"
        )

    # -- money ---------------------------------------------------------------------------------------------

    async def office(self) -> CostOptimizer:
        """Return what answers questions about money; without credentials, from the books alone. Raises LocalError."""
        try:
            return await self._app.costs()
        except ConfigurationError:
            if self._office is None:
                self._office = await self._books_alone()
            return self._office

    async def _books_alone(self) -> CostOptimizer:
        from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient

        app = self._app
        api = RunComfyAPIClient(app.settings.cloud, clock=app.clock)
        owner = app.processes.me(now=app.clock.now())
        store = await app.books()
        return CostOptimizer(
            Books(store, app.clock, app.settings, owner, provider=api.name, account=api.account, tell=app.tell)
        )

    async def _spending(self) -> Spending:
        app = self._app
        return await spending(await self.office(), now=app.clock.now(), silence=app.settings.pool.silence)

    async def money(self) -> Json:
        """Return the money, as `GET /costs/now` does. Raises LocalError."""
        return money_view(await self._money.get())

    async def estimate(self, workflow: str, *, server_type: str | None, count: int) -> Mapping[str, Any]:
        """Return what so many runs will take and cost, from own history. Raises ValueInvalid, LocalError."""
        one = await (await self.office()).estimate(workflow, count=count, server_type=server_type)
        return one.as_dict()


# -- what it looks like ------------------------------------------------------------------------------------


def machine_view(row: MachineRow) -> Json:
    """Return a machine as clients see it: no address, no token."""
    machine, report = row.machine, row.report
    whose = {True: "ours", False: "not ours", None: "unknown"}[row.ours]
    state = row.shown.partition(" ")[0].rstrip(":") if machine is not None else row.shown
    if machine is not None and machine.state is not MachineState.READY:
        state = str(machine.state)
    return {
        "id": machine.id if machine else None,
        "server_id": (machine.server_id if machine else None) or (report.server_id if report else None),
        "server_type": machine.server_type if machine else (report.server_type if report else None) or "?",
        "state": foreign_text(state, 40),
        "whose": whose,
        "purpose": str(machine.purpose) if machine else "",
        "usd_per_hour": usd(machine.usd_per_hour) if machine else None,
        "spent_usd": usd(row.spent),
        "ready_at": iso(machine.ready_at) if machine else None,
        "stops_at": iso(row.stops_at),
        "jobs": [{"id": job, "workflow": workflow} for job, workflow in row.jobs.items()],
        "busy": row.busy.computes and not row.ends,
        "why": foreign_text(without_paths(row.why), 300),
    }


def money_view(now: Spending) -> Json:
    """Return the money as clients see it."""
    return {
        "today": _spent(now.today),
        "month": _spent(now.month),
        "committed_usd": usd(now.committed),
        "budgets": [_budget(one) for one in now.budgets],
        "hours": [_slot(one) for one in now.hours],
        "days": [_slot(one) for one in now.days],
        "forecast_month_usd": usd(now.month_forecast.expected),
    }


def _spent(slot: Slot) -> Json:
    return {"usd": usd(slot.usd), "busy_s": _seconds(slot.busy), "idle_s": _seconds(slot.idle), "jobs": slot.jobs}


def _slot(slot: Slot) -> Json:
    return {
        "at": iso(slot.start),
        "usd": usd(slot.usd),
        "busy_s": _seconds(slot.busy),
        "idle_s": _seconds(slot.idle),
    }


def _budget(one: BudgetNow) -> Json:
    budget, window = one.state.budget, one.state.window
    per_run = window.start is None
    scope = f"user {budget.user}" if budget.user else f"project {budget.project}" if budget.project else ALL
    left: Decimal | None = budget.hard if per_run else one.state.left
    return {
        "name": str(budget.period),
        "scope": scope,
        "hard": usd(budget.hard),
        "soft": usd(budget.alerts_at),
        "spent": usd(one.spent),
        "committed": None if per_run else usd(one.state.committed),
        "left": usd(left),
        "ends_at": iso(window.end),
    }


def _seconds(span: timedelta) -> float:
    return round(span.total_seconds(), 1)
