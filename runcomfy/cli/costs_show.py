"""What the commands of `comfyctl costs` do: ask `CostOptimizer` once, and print."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from runcomfy.application.cost_optimizer import CostOptimizer
from runcomfy.application.costs import By, Report, Row, days_between
from runcomfy.application.job_queue import workflow_id_of
from runcomfy.cli.app import open_app
from runcomfy.cli.output import show_json, table, tell
from runcomfy.cli.runner import Interrupts
from runcomfy.domain.budget import BudgetState
from runcomfy.domain.durations import show_duration
from runcomfy.domain.estimate import Basis
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.job import JobRequest
from runcomfy.domain.moment import moment
from runcomfy.domain.money import show_signed_usd, show_usd

if TYPE_CHECKING:
    from runcomfy.adapters.spend_plot import Bar
    from runcomfy.application.costs_check import Checked
    from runcomfy.application.estimating import JobEstimate
    from runcomfy.bootstrap import App
    from runcomfy.domain.decision import Decision
    from runcomfy.domain.forecast import Forecast

GAP: Final = 4
"""Exit code of a check that found one: the provider and our books do not agree."""
_NOBODY: Final = "(nobody)"
_UNNAMED: Final = "(none)"


@asynccontextmanager
async def _money(interrupts: Interrupts, *, quiet: bool = False) -> AsyncIterator[tuple[CostOptimizer, App]]:
    async with open_app(interrupts, require_cloud=True, launches=False, quiet=quiet) as app:
        yield await app.costs(), app


# -- the report ------------------------------------------------------------------------------------------------


async def _report(money: CostOptimizer, app: App, since: str, until: str | None, by: str) -> Report:
    now = app.clock.now()
    begin = moment(since, now=now, whole_days=True)  # by whatever: tables of the same days show the same total
    return await money.report(begin, moment(until, now=now) if until else now, by)


async def show_report(
    interrupts: Interrupts, since: str, until: str | None, by: str, *, as_json: bool, as_csv: bool
) -> int:
    """Print a report."""
    async with _money(interrupts, quiet=as_json or as_csv) as (money, app):
        report = await _report(money, app, since, until, by)
        advice = [] if as_csv else await money.advice()
    if as_json:
        show_json({**report.as_dict(), "advice": [one.as_dict() for one in advice]})
    elif as_csv:
        rows = [row.as_dict() for row in report.rows]
        writer = csv.DictWriter(sys.stdout, fieldnames=list(report.total.as_dict()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_report(report, silence=app.settings.pool.silence)
        for one in advice:
            click.echo(f"advice: {foreign_text(one.what)}: {foreign_text(one.why)}")
    return 0


def _print_report(report: Report, *, silence: timedelta) -> None:
    click.echo(f"spent from {_minute(report.since)} to {_minute(report.until)} UTC, by {report.by}")
    if not report.rows:
        click.echo("nothing")
    else:
        headers = (
            str(report.by),
            *(["about"] if _has_about(report.by) else []),
            "spent",
            "busy",
            "idle",
            "jobs",
            "per job",
        )
        lines = [_line(row, report.by, _label(row, report.by)) for row in report.rows]
        click.echo(table((*headers, ""), [*lines, _line(report.total, report.by, "total")]))
        if report.total.nobody_usd:
            click.echo(
                f"{show_usd(report.total.nobody_usd)} of the idle money is no job's: from {show_duration(silence)} "
                "after a machine's last job on, and of machines without jobs"
            )
    for forecast in report.forecasts:
        click.echo(_forecast_line(forecast))


def _has_about(by: By) -> bool:
    return by in (By.MACHINE, By.JOB)


def _label(row: Row, by: By) -> str:
    if row.key is None:
        return _NOBODY
    return row.key or (_UNNAMED if by is not By.JOB else row.key)


def _line(row: Row, by: By, label: str) -> Sequence[str]:
    each = row.usd_per_job
    return (
        label,
        *([row.about] if _has_about(by) else []),
        show_usd(row.usd),
        show_usd(row.busy_usd),
        show_usd(row.idle_usd),
        str(row.jobs),
        "-" if each is None else show_usd(each),
        "so far" if row.so_far else "",
    )


def _forecast_line(one: Forecast) -> str:
    ends = f"the {one.name} (ends {_minute(one.end)} UTC)"
    if one.high == one.low:
        return f"forecast of {ends}: {show_usd(one.expected)}; from {one.method}"
    return (
        f"forecast of {ends}: {show_usd(one.expected)}, {show_usd(one.low)} to {show_usd(one.high)}; from {one.method}"
    )


def _minute(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M}"


# -- estimates -------------------------------------------------------------------------------------------------


async def show_estimates(
    interrupts: Interrupts,
    workflows: Sequence[str],
    count: int,
    server_type: str | None,
    machines: int,
    *,
    as_json: bool,
) -> int:
    """Print an estimate for each workflow."""
    async with _money(interrupts, quiet=as_json) as (money, app):
        found = []
        for workflow in workflows:
            name = workflow_id_of(JobRequest(workflow))
            one = await money.estimate(name, count=count, server_type=server_type, machines=machines)
            if one.run is None or one.run.basis is Basis.OTHERS:
                app.workflow_files()(workflow)  # it may be misspelt: refused as `comfyctl run` does
            found.append(one)
    if as_json:
        show_json([one.as_dict() for one in found])
        return 0
    for one in found:
        _print_estimate(one)
    return 0


def _print_estimate(one: JobEstimate) -> None:
    runs = "1 run" if one.count == 1 else f"{one.count} runs"
    where = f"{one.server_type} (${one.usd_per_hour}/h)" + (f", {one.machines} machines" if one.machines > 1 else "")
    if one.run is None or one.usd is None or one.seconds is None or one.busy is None:
        click.echo(f"{one.workflow}: {runs} on {where}: unknown")
    else:
        each = f", {show_usd(one.usd_each)} each" if one.count > 1 and one.usd_each is not None else ""
        click.echo(
            f"{one.workflow}: {runs} on {where}: {show_usd(one.usd.expected)} "
            f"({show_usd(one.usd.low)} to {show_usd(one.usd.high)}){each}"
        )
        click.echo(
            f"  done after {_time(one.seconds.expected)} ({_time(one.seconds.low)} with warm machines, to "
            f"{_time(one.seconds.high)}); computing {_time(one.busy.expected)}, one run {_time(one.run.p50_s)} "
            f"({_time(one.run.p10_s)} to {_time(one.run.p90_s)})"
        )
    for note in one.notes:
        click.echo(f"  {note}")


def _time(seconds: float) -> str:
    """Return a time as exactly as it is worth knowing."""
    rounded = round(seconds, 1) if seconds < 10 else round(seconds)
    return show_duration(timedelta(seconds=rounded))


# -- the check -------------------------------------------------------------------------------------------------


async def show_check(interrupts: Interrupts, since: str, *, as_json: bool) -> int:
    """Print what does not fit; exit code 4 if money is at stake."""
    async with _money(interrupts, quiet=as_json) as (money, app):
        checked = await money.check(since=moment(since, now=app.clock.now()))
    if as_json:
        show_json(
            {
                "machines": checked.machines,
                "agrees": not checked.gaps,
                "findings": [finding.as_dict() for finding in checked.findings],
            }
        )
    else:
        _print_check(checked)
    return GAP if checked.gaps else 0


def _print_check(checked: Checked) -> None:
    rows = [
        (
            "GAP" if finding.gap else "note",
            str(finding.kind),
            finding.what,
            "-" if finding.usd is None else show_signed_usd(finding.usd),
            finding.words,
        )
        for finding in sorted(checked.findings, key=lambda finding: not finding.gap)
    ]
    if rows:
        click.echo(table(("", "what", "machine", "about", "why"), rows))
    machines = "1 machine" if checked.machines == 1 else f"{checked.machines} machines"
    if not checked.gaps:
        click.echo(f"books and provider agree on {machines}")
    else:
        gaps = "1 gap" if len(checked.gaps) == 1 else f"{len(checked.gaps)} gaps"
        click.echo(f"{gaps} in the books of {machines}")


# -- budgets and decisions -------------------------------------------------------------------------------------


async def show_budgets(interrupts: Interrupts, *, as_json: bool) -> int:
    """Print how every budget stands."""
    async with _money(interrupts, quiet=as_json) as (money, _):
        states = await money.budgets()
    if as_json:
        show_json([_budget_dict(state) for state in states])
    elif not states:
        click.echo("no budget is set, or none that anybody's work counts against: nothing limits what can be spent")
    else:
        headers = ("budget", "committed", "alert at", "cap", "left", "resets (UTC)")
        click.echo(table(headers, [_budget_line(state) for state in states]))
    return 0


def _budget_line(state: BudgetState) -> Sequence[str]:
    budget, per_run = state.budget, state.window.start is None
    left = budget.hard if per_run else state.left
    return (
        budget.name,
        "-" if per_run else show_usd(state.committed),
        "-" if budget.alerts_at is None else show_usd(budget.alerts_at),
        "-" if budget.hard is None else show_usd(budget.hard),
        "-" if left is None else show_usd(left),
        "with every command" if per_run else "-" if state.window.end is None else _minute(state.window.end),
    )


def _budget_dict(state: BudgetState) -> dict[str, Any]:
    budget, window = state.budget, state.window
    amounts = {
        "committed_usd": None if window.start is None else state.committed,
        "alert_usd": budget.alerts_at,
        "cap_usd": budget.hard,
        "left_usd": state.left,
    }
    return {
        "budget": budget.name,
        "period": str(budget.period),
        "user": budget.user,
        "project": budget.project,
        **{name: None if amount is None else format(amount, "f") for name, amount in amounts.items()},
        "resets_at": None if window.end is None else window.end.isoformat(),
    }


async def show_decisions(interrupts: Interrupts, since: str | None, limit: int, *, as_json: bool) -> int:
    """Print what the plan decided."""
    async with _money(interrupts, quiet=as_json) as (money, app):
        begin = moment(since, now=app.clock.now()) if since else None
        found = await money.decisions(since=begin, limit=limit)
    if as_json:
        show_json([_decision_dict(one) for one in found])
    elif not found:
        click.echo("the plan has decided nothing")
    else:
        rows = [
            (
                f"{one.at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
                one.action,
                one.what,
                "-" if one.expected_usd is None else show_signed_usd(one.expected_usd),
                one.why,
            )
            for one in found
        ]
        click.echo(table(("at (UTC)", "decision", "what", "expected", "why"), rows))
    return 0


def _decision_dict(one: Decision) -> dict[str, Any]:
    return {
        "at": one.at.isoformat(),
        "action": one.action,
        "what": one.what,
        "why": one.why,
        "expected_usd": None if one.expected_usd is None else format(one.expected_usd, "f"),
        "by": one.by,
    }


# -- the picture -----------------------------------------------------------------------------------------------


async def draw_report(interrupts: Interrupts, file: str, since: str, until: str | None, by: str) -> int:
    """Draw a report into a file."""
    from runcomfy.adapters.spend_plot import check_name, draw

    path = Path(file)
    check_name(path)
    async with _money(interrupts) as (money, app):
        report = await _report(money, app, since, until, by)
    bars = _day_bars(report) if report.by is By.DAY else _bars(report)
    total = report.total
    title = (
        f"Spent {report.since.astimezone(UTC):%Y-%m-%d} to {report.until.astimezone(UTC):%Y-%m-%d}: "
        f"{show_usd(total.usd)}, {show_usd(total.busy_usd)} of it computing"
    )
    what = "day (UTC)" if report.by is By.DAY else str(report.by)
    await asyncio.to_thread(draw, bars, path, title=title, what=what, days=report.by is By.DAY)
    tell(f"{path}: {len(bars)} bars, {show_usd(total.usd)} in all")
    return 0


def _bar(label: str, rows: Sequence[Row]) -> Bar:
    from runcomfy.adapters.spend_plot import Bar

    busy, idle, nobody = (
        sum((getattr(row, name) for row in rows), Decimal(0)) for name in ("busy_usd", "idle_usd", "nobody_usd")
    )
    return Bar(label, busy, idle - nobody, nobody)


def _day_bars(report: Report) -> list[Bar]:
    """Return a bar for every day, also those without money."""
    by_day = {row.key: row for row in report.rows}
    days = [report.since, *days_between(report.since, report.until)]
    found = []
    for day in days:
        at = day.astimezone(UTC)
        row = by_day.get(at.date().isoformat())
        found.append(_bar(f"{at:%b} {at.day}", [row] if row is not None else []))
    return found


def _bars(report: Report) -> list[Bar]:
    """Return a bar for each row, the dearest first; those that would not fit are put together."""
    from runcomfy.adapters.spend_plot import MOST_BARS

    shown, rest = report.rows[:MOST_BARS], report.rows[MOST_BARS:]
    bars = [_bar(foreign_text(_label(row, report.by), 24), [row]) for row in shown]
    return [*bars, _bar(f"{len(rest)} others", rest)] if rest else bars
