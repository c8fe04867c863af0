"""What jobs cost, told from books that real runs on the emulated cloud have written, beside the cloud's own bill."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.balance_file import BalanceFile
from runcomfy.application.spending import AT_ONCE, spending
from runcomfy.bootstrap import App
from runcomfy.cost_optimizer import By, CostOptimizer, Report
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import ProviderBusy, ValueInvalid
from runcomfy.domain.forecast import Method
from runcomfy.domain.job import JobId, JobRequest, JobStatus
from runcomfy.domain.machine import MachineId, MachineState
from runcomfy.domain.money import LedgerEntry, meter
from runcomfy.domain.shares import Billed, share
from runcomfy.domain.work import Work
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.past import Past

pytestmark = pytest.mark.cloud(boot_time=180)
CENT = Decimal("0.01")


def delay(seconds: float) -> dict[str, Any]:
    """A graph that computes so long."""
    inputs = {"seconds": seconds, "steps": 10, "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "late"}},
    }


@pytest_asyncio.fixture
async def app(
    cloud: RunComfyEmulator, clock: LoopClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[App]:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "outputs"))
    async with App(clock=clock) as app:
        yield app


@pytest_asyncio.fixture
async def money(app: App, tmp_path: Path) -> CostOptimizer:
    machines, _ = await app.cloud()
    return CostOptimizer(machines.books, machines.provider, BalanceFile(tmp_path / "state", durable=False))


async def run(app: App, seconds: float, *, user: str = "", project: str = "", server_type: str | None = None) -> JobId:
    request = JobRequest(delay(seconds), user=user, project=project, server_type=server_type)
    result = await app.orchestrator().run(request)
    assert result.status is JobStatus.DONE, result.error
    return result.job_id


async def every_report(money: CostOptimizer, since: datetime) -> dict[By, Report]:
    return {by: await money.report(since, by=by) for by in By}


# --- reports --------------------------------------------------------------------------------------------------


async def test_reports_by_anything_add_up_to_the_providers_bill(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    began = clock.now()
    first = await run(app, 60, user="ann", project="film")
    second = await run(app, 20, user="bob", project="film", server_type="large")
    reports = await every_report(money, began)
    bills = {server_id: bill.usd for server_id, bill in cloud.books.items()}
    for report in reports.values():
        assert abs(report.total.usd - cloud.total_usd) < CENT / 100
        assert sum(row.usd for row in report.rows) == report.total.usd
        assert report.total.usd == reports[By.DAY].total.usd
        assert report.total.jobs == 2
    by_machine = {row.key: row for row in reports[By.MACHINE].rows}
    assert by_machine.keys() == bills.keys()
    for server_id, usd in bills.items():
        assert abs(by_machine[server_id].usd - usd) < CENT / 100
    assert [row.key for row in reports[By.PROJECT].rows] == ["film"]
    assert {row.key: row.jobs for row in reports[By.USER].rows} == {"ann": 1, "bob": 1}
    by_job = {row.key: row for row in reports[By.JOB].rows}
    assert by_job.keys() == {first, second}
    # 60 s of a medium machine; loading, fetching and ending come on top as idle money.
    assert abs(by_job[first].busy_usd - meter(began, began + timedelta(seconds=60), Decimal("0.99"))) < CENT / 2
    assert all(row.idle_usd > 0 and row.nobody_usd == 0 for row in by_job.values())
    assert by_job[first].usd_per_job == by_job[first].usd


async def test_a_machine_that_runs_counts_with_what_it_has_cost_so_far(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    began = clock.now()
    _, dev = await app.cloud()
    await dev.start(server_type="medium", duration=timedelta(hours=1))
    await run(app, 100, user="ann")
    report = await money.report(began, by=By.USER)
    assert abs(report.total.usd - cloud.total_usd) < CENT / 100
    (row,) = report.rows
    assert (row.key, row.jobs, row.so_far) == ("ann", 1, True)
    await asyncio.sleep(3_000)  # kept long after its last job: nobody's beyond ten minutes
    later = await money.report(began, by=By.USER)
    assert abs(later.total.usd - cloud.total_usd) < CENT / 100
    assert [row.key for row in later.rows] == ["ann", None]
    nobody = later.rows[1]
    assert abs(nobody.usd - meter(began, began + timedelta(seconds=2_400), Decimal("0.99"))) < CENT / 2
    assert nobody.usd == nobody.nobody_usd == later.total.nobody_usd
    await dev.shutdown()
    ended = await money.report(began, by=By.USER)
    assert not ended.total.so_far
    assert abs(ended.total.usd - cloud.total_usd) < CENT / 100


@pytest.mark.parametrize("runs", [False, True])
def test_what_a_dead_process_never_ended_is_not_busy_once_the_machine_is_gone(runs: bool) -> None:
    at = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)
    bill = [Billed(at, at + timedelta(minutes=10), Decimal(1), so_far=runs)]
    row = Work(MachineId("m"), JobId("j"), 1, "w", "medium", at, computing_at=at + timedelta(seconds=10))
    [part] = share(row.machine_id, bill, [row], silence=timedelta(minutes=5))
    assert part.usd == 1
    assert part.busy == (timedelta(seconds=590) if runs else timedelta(0))
    assert row.busy(None) == timedelta(0)
    lost = replace(row, ended_at=at + timedelta(seconds=20), outcome="lost")
    assert sum((p.busy for p in share(row.machine_id, bill, [lost], silence=timedelta(minutes=5))), timedelta()) == (
        timedelta(seconds=10)
    )
    begins, ends = at + timedelta(minutes=5), at + timedelta(minutes=6)
    again = replace(row, attempt=2, began_at=begins, computing_at=None, ended_at=ends)
    [part, *_] = share(row.machine_id, bill, [row, again], silence=timedelta(minutes=5))
    assert part.busy == timedelta(0)


async def test_a_report_covers_what_lies_between_its_times(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    began = clock.now()
    await run(app, 300)
    whole = await money.report(began)
    middle = began + timedelta(seconds=300)
    parts = [await money.report(began, middle), await money.report(middle, clock.now())]
    assert all(part.total.usd > 0 for part in parts)
    assert abs(sum(part.total.usd for part in parts) - whole.total.usd) < CENT / 1000
    assert (await money.report(clock.now(), clock.now() + timedelta(days=1))).rows == ()
    assert cloud.total_usd > 0


@pytest.mark.cloud(boot_time=180, now=LoopClock(datetime.fromisoformat("2026-11-20T23:50:00+00:00")).now)
async def test_days_are_cut_at_midnight_utc(cloud: RunComfyEmulator, tmp_path: Path, monkeypatch: Any) -> None:
    clock = LoopClock(datetime.fromisoformat("2026-11-20T23:50:00+00:00"))
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "outputs"))
    async with App(clock=clock) as app:
        machines, _ = await app.cloud()
        money = CostOptimizer(machines.books, machines.provider)
        job = await run(app, 900)
        report = await money.report(clock.now() - timedelta(days=2))
        assert [row.key for row in report.rows] == ["2026-11-20", "2026-11-21"]
        assert [row.jobs for row in report.rows] == [1, 1]
        assert report.total.jobs == 1
        assert abs(report.total.usd - cloud.total_usd) < CENT / 100
        (of_the_job,) = (await money.report(clock.now() - timedelta(days=2), by="job")).rows
        assert (of_the_job.key, of_the_job.usd) == (job, report.total.usd)


async def test_a_report_of_no_time_or_by_nonsense_is_refused(money: CostOptimizer, clock: LoopClock) -> None:
    with pytest.raises(ValueInvalid, match="covers no time"):
        await money.report(clock.now())
    with pytest.raises(ValueInvalid, match="nothing to group by"):
        await money.report(clock.now() - timedelta(days=1), by="colour")
    with pytest.raises(ValueInvalid, match="time zone"):
        await money.report(datetime(2026, 1, 1))  # noqa: DTZ001


async def test_an_empty_account_has_spent_nothing(money: CostOptimizer, clock: LoopClock) -> None:
    report = await money.report(clock.now() - timedelta(days=7))
    assert report.rows == ()
    assert report.total.usd == 0
    assert report.total.usd_per_job is None
    assert [(one.expected, one.method) for one in report.forecasts] == [(Decimal(0), Method.COMMITTED)] * 2


# --- budgets, forecasts, advice -------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def past(app: App) -> Past:
    machines, _ = await app.cloud()
    return Past(machines.books)


async def test_forecasts_come_from_the_same_hours_of_past_weeks(
    money: CostOptimizer, past: Past, clock: LoopClock
) -> None:
    now = clock.now()  # Friday, 10:00 UTC
    for weeks, hours in ((1, 2), (2, 4)):
        await past.machine(now - timedelta(weeks=weeks) + timedelta(hours=3), timedelta(hours=hours))
    await past.machine(now - timedelta(weeks=3), timedelta(minutes=1))
    await past.machine(now - timedelta(hours=1), timedelta(minutes=30))
    day, month = await money.forecast()
    assert (day.method, day.samples) == (Method.WEEKS, 3)
    rate = Decimal("0.99")
    assert day.spent == rate / 2
    assert (day.low, day.high) == (rate / 2 + meter(now, now + timedelta(minutes=1), rate), rate / 2 + rate * 4)
    assert day.low < day.expected < day.high
    assert abs(day.expected - (rate / 2 + (rate * 6 + rate / 60) / 3)) < CENT / 1000
    assert month.spent == rate * Decimal("6.5")  # one machine ran in October
    assert (month.method, month.samples) == (Method.WEEKS, 2)  # ten days are left: two and three weeks before
    assert month.spent < month.low < month.expected < month.high


async def test_the_money_at_a_glance_is_the_same_however_few_machines_are_read_at_a_time(
    money: CostOptimizer, past: Past, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.now()
    for number in range(2 * AT_ONCE + 1):
        machine = await past.machine(now - timedelta(minutes=170 - 3 * number), timedelta(minutes=40))
        for second in range(0, 600, 120):
            await past.job(machine, second, 90)
    silence = timedelta(seconds=0)
    glance = await spending(money, now=now, silence=silence)
    monkeypatch.setattr("runcomfy.application.spending.AT_ONCE", 1_000)
    assert await spending(money, now=now, silence=silence) == glance
    report = await money.report(now.replace(hour=0))
    assert glance.today.usd == report.total.usd == sum(slot.usd for slot in glance.hours)
    assert glance.today.jobs == 5 * (2 * AT_ONCE + 1)
    assert glance.today.busy + glance.today.idle == (2 * AT_ONCE + 1) * timedelta(minutes=40)


async def test_young_history_forecasts_by_its_average_and_says_so(
    money: CostOptimizer, past: Past, clock: LoopClock
) -> None:
    now = clock.now()
    await past.machine(now - timedelta(hours=4), timedelta(hours=2))
    day, _ = await money.forecast()
    assert (day.method, day.samples) == (Method.AVERAGE, 4)
    assert day.spent == Decimal("1.98")
    assert abs(day.expected - (Decimal("1.98") + Decimal("0.99") / 2 * 14)) < CENT  # half of the 14 hours to midnight
    assert abs(day.high - (Decimal("1.98") + Decimal("0.99") * 14)) < CENT


async def test_what_is_committed_is_in_every_forecast(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    _, dev = await app.cloud()
    await dev.start(server_type="medium", duration=timedelta(hours=1))
    day, _ = await money.forecast()
    assert day.method is Method.COMMITTED
    assert abs(day.low - Decimal("0.99")) < CENT  # a dev server of an hour, just started
    assert day.low == day.expected == day.high
    await dev.shutdown()
    day, _ = await money.forecast()
    assert day.committed == 0
    assert abs(day.expected - cloud.total_usd) < CENT


async def test_budgets_are_shown_with_what_is_committed_and_left(app: App, clock: LoopClock, past: Past) -> None:
    machines, _ = await app.cloud()
    machine = await past.machine(clock.now() - timedelta(hours=2), timedelta(hours=1))
    await past.job(machine, 0, 600, user="ann", project="film")
    await past.job(machine, 700, 200, user="bob")
    machines.books.settings = replace(
        app.settings,
        budgets=(
            Budget(Period.RUN, Decimal(1)),
            Budget(Period.DAY, Decimal(5), Decimal(3)),
            Budget(Period.MONTH, user="*", hard=Decimal(2)),
            Budget(Period.MONTH, user="bob", hard=Decimal(9)),
            Budget(Period.MONTH, project="*", hard=Decimal(4)),
        ),
    )
    states = {state.budget.name: state for state in await CostOptimizer(machines.books).budgets()}
    assert states["day"].committed == Decimal("0.99")
    assert states["day"].left == Decimal("4.01")
    assert states["day"].window.end == datetime.fromisoformat("2026-11-21T00:00:00+00:00")
    assert states["month of user ann"].committed == Decimal("0.99") * 600 / 800
    assert states["month of user bob"].committed == Decimal("0.99") * 200 / 800
    assert states["month of user bob"].budget.hard == 9
    assert states["run"].window.end is None
    assert states["month of project film"].committed == states["month of user ann"].committed
    assert len(states) == 5


async def test_advice_says_where_money_goes_and_what_is_cheaper(app: App, past: Past, clock: LoopClock) -> None:
    machines, _ = await app.cloud()
    now = clock.now()
    for number, (server_type, seconds) in enumerate((("medium", 600), ("large", 300))):
        machine = await past.machine(now - timedelta(days=2 + number), timedelta(hours=5), server_type=server_type)
        for second in range(0, 4 * 600, 600):
            await past.job(machine, second, seconds)
    machines.books.settings = replace(app.settings, budgets=(Budget(Period.MONTH, Decimal(14)),))
    found = {advice.what.split(":")[0]: advice for advice in await CostOptimizer(machines.books).advice()}
    assert "end machines earlier when nobody uses them" in found
    budget = found["jobs will wait from then on"]
    assert "its budget is $14.00" in budget.why
    assert not any("set a hard budget" in what for what in found)
    machines.books.settings = app.settings
    assert any("set a hard budget" in one.what for one in await CostOptimizer(machines.books).advice())


async def test_advice_names_a_type_on_which_a_run_costs_less(app: App, past: Past, clock: LoopClock) -> None:
    machines, _ = await app.cloud()
    for server_type, seconds in (("medium", 3_000), ("2x-large", 900)):
        machine = await past.machine(clock.now() - timedelta(days=1), timedelta(hours=4), server_type=server_type)
        for second in range(0, 4 * 3_000, 3_000):
            await past.job(machine, second, seconds)
        work = await past.job(machine, 4 * 3_000, 60, workflow="broken")
        await machines.store.put_work(replace(work, outcome="failed"))  # what does not work is not cheaper anywhere
    found = [one for one in await CostOptimizer(machines.books).advice() if one.what == "run portrait on medium"]
    (advice,) = found
    assert advice.why == "a run of portrait computes for $0.8250 there and for $1.2475 on 2x-large"
    assert advice.usd == Decimal("1.69")


async def test_advice_for_machines_that_idle_between_jobs_is_to_send_jobs_together(
    app: App, past: Past, clock: LoopClock
) -> None:
    machines, _ = await app.cloud()
    machine = await past.machine(clock.now() - timedelta(days=1), timedelta(hours=4))
    for second in range(0, 4 * 3_600, 300):
        await past.job(machine, second, 60)
    [advice] = [one for one in await CostOptimizer(machines.books).advice() if "idle time" in one.why]
    assert "send jobs together" in advice.what
    assert advice.usd is not None
    assert abs(advice.usd - Decimal("3.96") * 240 / 300) < CENT  # computes 60 s of each 300 s


# --- estimates ------------------------------------------------------------------------------------------------


async def test_an_estimate_without_any_history_is_unknown(money: CostOptimizer) -> None:
    found = await money.estimate("portrait", count=10)
    assert found.run is None
    assert found.usd is None
    assert found.as_dict()["known"] is False
    assert "no run of anything is known yet" in found.notes[0]


async def test_an_estimate_holds_against_what_the_run_then_costs(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator
) -> None:
    for _ in range(3):
        await run(app, 60)
    spent = cloud.total_usd
    found = await money.estimate("inline")
    assert found.run is not None
    assert found.run.runs == 3
    assert found.usd is not None
    assert found.boot is not None
    assert 175 <= found.boot.expected <= 195
    await run(app, 60)
    cost = cloud.total_usd - spent
    assert found.usd.low < cost < found.usd.high
    assert abs(found.usd.expected - cost) < cost / 10
    assert found.as_dict()["usd"]["expected"] == format(found.usd.expected, "f")


async def test_many_runs_cost_less_each_than_one_and_more_in_all(
    money: CostOptimizer, past: Past, clock: LoopClock
) -> None:
    for hours in (20, 10):
        machine = await past.machine(clock.now() - timedelta(hours=hours), timedelta(hours=1))
        await past.job(machine, 20, 90, cold=True)
        for number in range(8):
            await past.job(machine, 120 + 40 * number, 30 + number % 2)
    one, many = await money.estimate("portrait"), await money.estimate("portrait", count=100)
    four = await money.estimate("portrait", count=100, machines=4)
    assert one.usd is not None
    assert many.usd is not None
    assert four.usd is not None
    assert one.usd.low < one.usd.expected < one.usd.high
    # 20 s until the first prompt, 90 s with loading, 99 x 30.5 s, 2 s for the last result
    assert abs(many.usd.expected - Decimal("0.99") * Decimal(20 + 90 + 99 * 30.5 + 2) / 3600) < CENT / 10
    assert many.usd.expected > 20 * one.usd.expected
    assert many.usd_each is not None
    assert many.usd_each < one.usd.expected / 3
    assert four.usd.expected > many.usd.expected
    assert many.seconds is not None
    assert four.seconds is not None
    assert four.seconds.expected < many.seconds.expected / 3
    with pytest.raises(ValueInvalid, match="no price is known"):
        await money.estimate("portrait", server_type="warp")
    with pytest.raises(ValueInvalid, match="at least one run"):
        await money.estimate("portrait", count=0)


# --- the check ------------------------------------------------------------------------------------------------


async def test_books_that_are_right_have_no_gap(app: App, money: CostOptimizer, cloud: RunComfyEmulator) -> None:
    _, dev = await app.cloud()
    await dev.start(server_type="medium", duration=timedelta(hours=1))
    await run(app, 30)
    assert (await money.check()).gaps == ()
    await dev.shutdown()
    checked = await money.check()
    assert (checked.machines, checked.findings) == (1, ())
    assert cloud.alive == []


async def test_launches_that_started_nothing_and_machines_that_still_start_are_no_gap(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator
) -> None:
    cloud.next_call("POST servers", status=500, works=False)
    _, dev = await app.cloud()
    starting = asyncio.create_task(dev.start(server_type="medium", duration=timedelta(hours=1)))
    await asyncio.sleep(200)
    assert (len(cloud.alive), len(cloud.billing)) == (1, 0)
    checked = await money.check()
    assert (checked.machines, checked.findings) == (2, ())
    await starting
    await dev.shutdown()


async def test_without_a_provider_there_is_nothing_to_check_against(app: App) -> None:
    machines, _ = await app.cloud()
    with pytest.raises(ValueInvalid, match="there is no provider to compare with"):
        await CostOptimizer(machines.books).check()


async def test_a_machine_that_came_back_is_a_gap_and_a_strangers_is_a_note(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    await run(app, 30)
    await asyncio.sleep(60)
    (ours,) = cloud.machines.values()
    stranger = cloud.foreign("large")
    assert [(finding.kind, finding.gap) for finding in (await money.check()).findings] == [("not-ours", False)]
    again = cloud.foreign("medium")
    cloud.machines.pop(again.server_id)
    cloud.machines[ours.server_id] = again
    again.server_id = ours.server_id
    found = {finding.what: finding for finding in (await money.check()).findings}
    assert found[ours.server_id].kind == "gone-but-listed"
    assert found[ours.server_id].gap
    assert not found[stranger.server_id].gap
    assert [one.gap for one in (await money.check(since=clock.now())).findings if one.what == ours.server_id] == [True]


async def test_a_machine_that_the_provider_no_longer_lists_is_a_gap(
    app: App, money: CostOptimizer, cloud: RunComfyEmulator
) -> None:
    _, dev = await app.cloud()
    await dev.start(server_type="medium", duration=timedelta(hours=1))
    (machine,) = cloud.machines.values()
    machine.traits.vanishes_after = 0
    cloud._gone(machine)
    (finding,) = (await money.check()).findings
    assert (finding.kind, finding.gap, finding.what) == ("missing", True, machine.server_id)
    await dev.shutdown()


@pytest.mark.fault(70)
async def test_times_that_differ_are_a_gap(app: App, money: CostOptimizer, cloud: RunComfyEmulator) -> None:
    machines, dev = await app.cloud()
    await dev.start(server_type="medium", duration=timedelta(hours=1))
    (row,) = await machines.books.rows()
    (machine,) = cloud.machines.values()
    assert machine.ready_at is not None
    assert row.ready_at is not None
    machine.estimated_duration += 1_800  # somebody else prolonged it
    machine.ready_at -= timedelta(minutes=5)
    found = {str(finding.kind): finding for finding in (await money.check()).findings}
    assert found.keys() == {"ready-time", "stop-time"}
    assert found["ready-time"].usd == meter(row.ready_at, row.ready_at + timedelta(minutes=5), row.usd_per_hour)
    assert found["stop-time"].usd is not None
    assert all(finding.gap for finding in found.values())
    machine.ready_at += timedelta(minutes=5)
    await dev.shutdown()


async def test_a_ledger_that_does_not_cover_the_bill_is_a_gap(
    app: App, money: CostOptimizer, past: Past, clock: LoopClock
) -> None:
    machines, _ = await app.cloud()
    at = clock.now() - timedelta(hours=10)
    right = await past.machine(at, timedelta(hours=1))
    short = await past.machine(at, timedelta(seconds=50), posts=False)
    missing = await past.machine(at, timedelta(hours=2), posts=False)
    twice = await past.machine(at, timedelta(hours=1))
    dear = await past.machine(at, timedelta(hours=1), posts=False)
    later, until = at + timedelta(minutes=10), at + timedelta(minutes=40)
    entry = LedgerEntry(twice.id, later, until, twice.usd_per_hour, Decimal("0.495"), at)
    wrong = replace(entry, machine_id=dear.id, started_at=at, ended_at=at + timedelta(hours=1), amount_usd=Decimal(7))
    await machines.store.post([entry, wrong])
    found = {finding.what: finding for finding in (await money.check()).gaps}
    assert found.keys() == {short.server_id, missing.server_id, twice.server_id, dear.server_id}
    assert short.server_id is not None
    assert found[short.server_id].words.startswith("the last 50 s of its bill are not in the ledger; `comfyctl mach")
    assert right.state is MachineState.STOPPED
    assert missing.server_id is not None
    assert twice.server_id is not None
    assert dear.server_id is not None
    assert found[missing.server_id].words == "billed for 7200 s by its times, 0 s are in the ledger"
    assert found[missing.server_id].usd == Decimal("1.98")
    assert "1800 s are in the ledger twice" in found[twice.server_id].words
    assert (found[dear.server_id].kind, found[dear.server_id].usd) == ("price", Decimal("6.01"))


async def test_a_list_that_cannot_be_read_is_no_check(money: CostOptimizer, cloud: RunComfyEmulator) -> None:
    cloud.next_call("GET servers", status=500, times=10)
    with pytest.raises(ProviderBusy):
        await money.check()


async def test_the_balance_says_what_went_elsewhere(app: App, money: CostOptimizer, cloud: RunComfyEmulator) -> None:
    assert (await money.check()).balance is None  # the first reading has nothing to be compared with
    await asyncio.sleep(100)
    await run(app, 60)
    agreed = (await money.check()).balance
    assert agreed is not None
    assert agreed.agrees
    assert abs(agreed.fell - cloud.total_usd) < CENT
    cloud.spent_elsewhere_usd = Decimal("3.50")
    await asyncio.sleep(100)
    checked = await money.check()
    assert checked.gaps == ()
    (note,) = checked.findings
    assert (note.kind, note.usd) == ("balance", checked.balance.elsewhere if checked.balance else None)
    assert "$3.50 went to other products" in note.words
    cloud.next_call("GET balance", status=503)
    await asyncio.sleep(100)
    assert (await money.check()).findings == ()  # it is a courtesy
