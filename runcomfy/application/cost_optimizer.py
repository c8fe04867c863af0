"""
What programs ask about money: reports, budgets, forecasts, estimates, advice, and whether the books are right.

Nothing is decided here. When machines start and stop is the plan's (`scaling`), what may be spent at all is the
budgets' (`budget`), kept where launches are written down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from runcomfy.application.books import Books
from runcomfy.application.costs import By, Report, Row, grouped
from runcomfy.application.costs_check import Checked, Finding, balance_finding, examine
from runcomfy.application.estimating import JobEstimate, estimate, past_of
from runcomfy.application.ledger import MachineBill, read_bills, with_works
from runcomfy.domain.balance import Balance, BalanceCheck, compare
from runcomfy.domain.budget import Budget, BudgetState, Period, Window
from runcomfy.domain.decision import Decision
from runcomfy.domain.estimate import Basis, History
from runcomfy.domain.exceptions import LocalError, ValueInvalid
from runcomfy.domain.forecast import WEEK, WEEKS, Forecast, forecast, spent_between
from runcomfy.domain.machine import ServerId
from runcomfy.domain.money import MICRODOLLAR, show_usd
from runcomfy.ports.balances import Balances
from runcomfy.ports.provider import Provider

_HISTORY: Final = timedelta(days=60)
"""How far back run times are looked at for estimates and advice."""
_MOST_WORKS: Final = 20_000
_IDLE_SHARE: Final = Decimal("0.5")
"""From which part of the money on idle time is worth a word."""
_WORTH_SAYING: Final = Decimal("0.5")
"""Advice about less money than this, in USD, is not given."""
_CHEAPER: Final = 0.9
"""A type must save a tenth per run before it is advised."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that would save money, or a risk of spending more than wanted."""

    what: str
    why: str
    usd: Decimal | None = None
    """How much it is about, where that can be told."""

    def as_dict(self) -> dict[str, Any]:
        """Return the advice as it appears in `--json`."""
        return {"what": self.what, "why": self.why, "usd": None if self.usd is None else format(self.usd, "f")}


class CostOptimizer:
    """The money of one account."""

    def __init__(self, books: Books, provider: Provider | None = None, balances: Balances | None = None) -> None:
        """Without `provider` nothing can be checked; without `balances` readings of the balance are not kept."""
        self._books = books
        self._store = books.store
        self._clock = books.clock
        self._settings = books.settings
        self._provider = provider
        self._balances = balances

    # -- what was spent ------------------------------------------------------------------------------------

    async def report(self, since: datetime, until: datetime | None = None, by: By | str = By.DAY) -> Report:
        """Return what was spent in [`since`, `until`), machines that run with what they cost so far, and forecasts.

        Times are aware; days are those of UTC. Raises ValueInvalid, LocalError.
        """
        by = _by(by)
        now = self._clock.now()
        end = now if until is None else until
        if since.tzinfo is None or end.tzinfo is None:
            raise ValueInvalid("a report's times need a time zone", hint="use aware datetimes, for example in UTC")
        if since >= end:
            raise ValueInvalid(
                f"a report from {since:%Y-%m-%d %H:%M} until {end:%Y-%m-%d %H:%M} covers no time",
                hint="let `until` be later than `since`",
            )
        bills = await self._bills(min(since, _looked_back(now)), now=now)
        silence = self._settings.pool.silence
        # In a thread: tens of thousands of jobs take seconds, and this may be a program that renews leases.
        rows, total = await asyncio.to_thread(grouped, bills, since=since, until=end, by=by, silence=silence)
        return Report(since, end, by, rows, total, self._forecasts(bills, now=now))

    async def forecast(self) -> tuple[Forecast, Forecast]:
        """Return what the day and the month (UTC) will have cost at their end. Raises LocalError."""
        now = self._clock.now()
        return self._forecasts(await self._bills(_looked_back(now), now=now, works=False), now=now)

    def _forecasts(self, bills: Sequence[MachineBill], *, now: datetime) -> tuple[Forecast, Forecast]:
        pieces = [piece for bill in bills for piece in bill.pieces]
        machines = [bill.machine for bill in bills]
        windows = [(period, Budget(period).window(now)) for period in (Period.DAY, Period.MONTH)]
        day, month = (forecast(str(period), window, pieces, machines, now=now) for period, window in windows)
        return day, month

    async def bills(self, *, since: datetime | None = None, works: bool = True) -> list[MachineBill]:
        """Return the bill of every machine that was open at `since` or later (None: of all). Raises LocalError.

        `works`: with the jobs that were there, which `with_works` can add later, for some.
        """
        return await self._bills(since, now=self._clock.now(), works=works)

    async def with_works(self, bills: Sequence[MachineBill]) -> list[MachineBill]:
        """Return bills with the jobs that were at their machines. Raises LocalError."""
        return await with_works(self._store, bills)

    async def standing(self, budgets: Sequence[Budget]) -> Sequence[BudgetState]:
        """Return how these budgets would stand now, whether they are set or not. Raises LocalError."""
        return await self._store.budgets(budgets, now=self._clock.now())

    async def _bills(self, since: datetime | None, *, now: datetime, works: bool = True) -> list[MachineBill]:
        account = self._books.provider, self._books.account
        return await read_bills(self._store, provider=account[0], account=account[1], now=now, since=since, works=works)

    async def decisions(self, *, since: datetime | None = None, limit: int = 200) -> Sequence[Decision]:
        """Return what the plan has decided and why, the newest so many, oldest first. Raises LocalError."""
        return await self._store.decisions(since=since, limit=limit)

    # -- budgets -------------------------------------------------------------------------------------------

    async def budgets(self) -> Sequence[BudgetState]:
        """Return how every budget stands now; one for every user (`*`) once for each that was seen in its window.

        Budgets per run are shown for no run in particular: what one has used is known to the run itself. Raises
        LocalError.
        """
        now = self._clock.now()
        wanted: list[Budget] = []
        for budget in self._settings.budgets:
            if "*" in (budget.user, budget.project):
                wanted.extend(await self._seen(budget, budget.window(now)))
            elif budget.period is not Period.RUN:
                wanted.append(budget)
        states = list(await self._store.budgets(wanted, now=now))
        each_run = [budget for budget in self._settings.budgets if budget.period is Period.RUN]
        return [*states, *(BudgetState(budget, Window(None, None), Decimal(0)) for budget in each_run)]

    async def _seen(self, budget: Budget, window: Window) -> list[Budget]:
        """Return a budget for everybody, made out to each who had a job in its window."""
        works = await self._store.works(since=window.start)
        named = {(one.period, one.user, one.project) for one in self._settings.budgets}
        made: list[tuple[str | None, str | None]]
        if budget.user == "*":
            made = [(name, budget.project) for name in sorted({work.user for work in works} - {""})]
        else:
            made = [(budget.user, name) for name in sorted({work.project for work in works} - {""})]
        return [
            Budget(budget.period, budget.hard, budget.soft, project=project, user=user)
            for user, project in made
            if (budget.period, user, project) not in named
        ]

    # -- what it will cost ---------------------------------------------------------------------------------

    async def estimate(
        self, workflow: str, *, count: int = 1, server_type: str | None = None, machines: int = 1
    ) -> JobEstimate:
        """Return what so many runs of a workflow will take and cost; `workflow` by the name it has in reports.

        Raises ValueInvalid (no price of the type is known, a count below 1), LocalError.
        """
        if count < 1 or machines < 1:
            raise ValueInvalid("an estimate is of at least one run on one machine", hint="give --count 1 or more")
        wanted = server_type or self._settings.cloud.server_type
        rate = self._settings.rates.find(wanted)
        if rate is None:
            known = ", ".join(self._settings.rates.rates)
            raise ValueInvalid(
                f"no price is known for the machine type {wanted[:40]!r}",
                hint=f"use one of {known}; or add it with its price to the file that RUNCOMFY_RATES_FILE names",
            )
        now = self._clock.now()
        bills = await self._bills(now - _HISTORY, now=now)
        boots = await self._store.boot_times(provider=self._books.provider, server_type=wanted)
        past = past_of(bills, boots, wanted)
        history = await self._history(now)
        return estimate(history, past, workflow, wanted, rate.usd_per_hour, count=count, machines=machines)

    async def _history(self, now: datetime) -> History:
        return History(await self._store.works(since=now - _HISTORY, limit=_MOST_WORKS))

    # -- advice --------------------------------------------------------------------------------------------

    async def advice(self) -> list[Advice]:
        """Return what the last seven days say: money on idle time, dearer types than need be, budgets in danger.

        Raises LocalError.
        """
        now = self._clock.now()
        report = await self.report(now - WEEK, now)
        found = [*self._about_idle(report.total), *await self._about_types(now), *self._about_budgets(report.forecasts)]
        return sorted(found, key=lambda advice: -(advice.usd or Decimal(0)))

    def _about_idle(self, total: Row) -> list[Advice]:
        if total.idle_usd < _WORTH_SAYING or total.idle_usd <= total.usd * _IDLE_SHARE:
            return []
        part = (
            f"{total.idle_usd / total.usd:.0%} of what was spent in 7 days ({show_usd(total.idle_usd)}) was idle time"
        )
        if total.nobody_usd > total.idle_usd / 2:
            what = "end machines earlier when nobody uses them: `comfyctl costs --by machine` shows which"
            return [
                Advice(what, f"{part}, {show_usd(total.nobody_usd)} of it long after the last job", total.nobody_usd)
            ]
        what = "wait a little longer for results (`--wait-price batch`), or send jobs together"
        return [Advice(what, part, total.idle_usd)]

    async def _about_types(self, now: datetime) -> list[Advice]:
        """Compare what a run costs on the types that were used for it."""
        works = await self._store.works(since=now - _HISTORY, limit=_MOST_WORKS)
        history = History(works)
        used: dict[str, dict[str, int]] = {}
        for work in works:
            if work.outcome == "done":
                used.setdefault(work.workflow, {}).setdefault(work.server_type, 0)
                used[work.workflow][work.server_type] += work.began_at >= now - WEEK
        found = []
        for workflow, types in sorted(used.items()):
            costs = {name: cost for name in types if (cost := self._run_cost(history, workflow, name)) is not None}
            if len(costs) < 2:
                continue
            best = min(costs, key=lambda name: (costs[name], name))
            for name, cost in costs.items():
                saved = Decimal(repr((cost - costs[best]) * types[name])).quantize(MICRODOLLAR)
                if costs[best] < cost * _CHEAPER and saved >= _WORTH_SAYING:
                    why = f"a run of {workflow} computes for ${costs[best]:.4f} there and for ${cost:.4f} on {name}"
                    found.append(Advice(f"run {workflow} on {best}", why, saved))
        return found

    def _run_cost(self, history: History, workflow: str, server_type: str) -> float | None:
        rate, found = self._settings.rates.find(server_type), history.predict(workflow, server_type)
        if rate is None or found is None or found.basis is not Basis.SAME or found.runs < 3:
            return None
        return float(rate.usd_per_hour) * found.mean_s / 3600

    def _about_budgets(self, forecasts: Sequence[Forecast]) -> list[Advice]:
        found = []
        whole = [budget for budget in self._settings.budgets if budget.user is None and budget.project is None]
        for one in forecasts:
            caps = [budget.hard for budget in whole if str(budget.period) == one.name and budget.hard is not None]
            if caps and one.expected > min(caps):
                why = f"the {one.name} is heading for {show_usd(one.expected)}, its budget is {show_usd(min(caps))}"
                what = f"jobs will wait from then on: raise the budget per {one.name}, or spread the work"
                found.append(Advice(what, why, one.expected - min(caps)))
        if not any(budget.hard is not None for budget in whole):
            found.append(Advice("set a hard budget (RUNCOMFY_BUDGET_DAY)", "nothing limits what can be spent"))
        return found

    # -- is it right? --------------------------------------------------------------------------------------

    async def check(self, *, since: datetime | None = None) -> Checked:
        """Compare our books since then (by itself 30 days) with the provider's list, and with its balance.

        The balance is a courtesy: without an answer it is left out. Raises ProviderError (no list), LocalError.
        """
        provider = self._provider
        if provider is None:
            raise ValueInvalid("there is no provider to compare with", hint="give one: CostOptimizer(books, provider)")
        reports = await provider.list_machines()
        now = self._clock.now()
        begun = now - timedelta(days=30) if since is None else since
        bills = await self._bills(begun, now=now)
        rows = await self._books.rows(open_only=False)
        known = {ServerId(row.server_id) for row in rows if row.server_id is not None}
        findings: list[Finding] = list(examine(bills, reports, known=known, now=now))
        balance = await self._balance(bills, since=begun)
        if balance is not None:
            findings.append(balance_finding(balance))
        return Checked(len(bills), tuple(findings), balance)

    async def balance(self) -> Balance | None:
        """Return the account's money as the provider tells it, or None; the reading is kept for later checks."""
        told = await self._provider.balance() if self._provider is not None else None
        if told is not None and self._balances is not None:
            try:
                await self._balances.add(self._books.account, told)
            except LocalError as error:
                self._books.tell(f"the balance could not be kept for later: {error.message}")
        return told

    async def _balance(self, bills: Sequence[MachineBill], *, since: datetime) -> BalanceCheck | None:
        """Compare the first reading since then with one made now; None without two of them."""
        kept = await self._balances.readings(self._books.account) if self._balances is not None else []
        told = await self.balance()
        earlier = [one for one in kept if told is not None and since <= one.at < told.at]
        if told is None or not earlier:
            return None
        pieces = [piece for bill in bills for piece in bill.pieces]
        running = sum((bill.machine.usd_per_hour for bill in bills if bill.machine.bills), Decimal(0))
        return compare([earlier[0], told], spent_between(pieces, earlier[0].at, told.at), usd_per_hour=running)


def _looked_back(now: datetime) -> datetime:
    """Return from when on history is needed: for forecasts, and for what the month has cost so far."""
    return now - (WEEKS + 1) * WEEK


def _by(by: By | str) -> By:
    try:
        return By(by)
    except ValueError:
        raise ValueInvalid(f"{str(by)[:40]!r} is nothing to group by", hint=f"use one of {', '.join(By)}") from None
