"""`comfyctl costs`: the report in words, JSON and CSV; estimates, the check, budgets, decisions, the picture."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runcomfy
from runcomfy.bootstrap import App
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.decision import Decision
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.moment import moment
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.past import Past

pytestmark = pytest.mark.cloud(comfyui=False, now=None, boot_time=0, delete_takes=0, rate_limit=False)

Command = Callable[..., Any]


@pytest.fixture
def comfy(cloud: RunComfyEmulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in a thread of its own, as a process of its own would, and returns (code, stdout, stderr)."""
    for name, value in {**cloud.environment(), "RUNCOMFY_DURABLE": "false"}.items():
        monkeypatch.setenv(name, value)

    async def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(call, comfyctl, list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run


async def write(past: Callable[[Past, datetime], Awaitable[None]]) -> None:
    """Write a past into the books that the command line will read."""
    async with App() as app:
        machines, _ = await app.cloud()
        await past(Past(machines.books), datetime.now(UTC))


async def two_machines(past: Past, now: datetime) -> None:
    """Two machines yesterday: $0.99 with ann's two jobs of 10 and 20 min, $3.50 with one of bob's of 30 min."""
    noon = now.replace(hour=12, minute=0, second=0, microsecond=0) - timedelta(days=1)
    medium = await past.machine(noon, timedelta(hours=1))
    await past.job(medium, 0, 600, user="ann")
    await past.job(medium, 900, 1200, user="ann")
    large = await past.machine(noon + timedelta(hours=1), timedelta(hours=2), server_type="large")
    await past.job(large, 0, 1800, user="bob", workflow="video")


async def test_an_empty_account_has_spent_nothing(comfy: Command) -> None:
    code, out, err = await comfy("costs")
    assert code == 0, err
    assert "\nnothing\n" in out
    assert "too little history" in out


async def test_the_report_is_a_table_with_its_sum_and_forecasts(comfy: Command) -> None:
    await comfy("costs")
    await write(two_machines)
    code, out, err = await comfy("costs", "--by", "user")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("spent from ")
    assert lines[1].split() == ["user", "spent", "busy", "idle", "jobs", "per", "job"]
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["bob", "$1.17"], ["ann", "$0.7431"], ["(nobody)", "$2.58"], ["total", "$4.49"],
    ]  # fmt: skip
    assert "$2.58 of the idle money is no job's: from 10m after a machine's last job on" in out
    assert out.count("forecast of the ") == 2
    code, out, _ = await comfy("costs", "--by", "machine")
    assert "srv-" in out
    assert "large" in out
    assert "advice: end machines earlier when nobody uses them" in out


async def test_json_and_csv_have_all_digits_and_the_same_sums(comfy: Command) -> None:
    await comfy("costs")
    await write(two_machines)
    sums = {}
    for by in ("day", "machine", "job", "workflow", "user", "project"):
        code, out, err = await comfy("costs", "--by", by, "--json")
        assert code == 0, err
        report = json.loads(out)
        sums[by] = sum(Decimal(row["spent_usd"]) for row in report["rows"])
        assert sums[by] == Decimal(report["total"]["spent_usd"]) == Decimal("4.49")
        assert {one["of"] for one in report["forecasts"]} == {"day", "month"}
        code, out, _ = await comfy("costs", "--by", by, "--csv")
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["spent_usd"] for row in rows] == [row["spent_usd"] for row in report["rows"]]
    assert set(sums.values()) == {Decimal("4.49")}
    code, _, err = await comfy("costs", "--json", "--csv")
    assert code == 2
    assert "exclude each other" in err


async def test_times_are_taken_as_people_write_them(comfy: Command) -> None:
    await comfy("costs")
    await write(two_machines)
    code, out, _ = await comfy("costs", "--since", "2020-01-01", "--until", "2020-02-01T12:00", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == []
    code, _, err = await comfy("costs", "--since", "yesterday-ish")
    assert code == 2
    assert "is no time" in err
    assert "7d, 12h" in err
    code, _, err = await comfy("costs", "--since", "1h", "--until", "2h")
    assert code == 2
    assert "covers no time" in err


def test_a_moment_is_so_long_ago_a_day_or_a_time() -> None:
    now = datetime(2026, 5, 20, 15, 30, tzinfo=UTC)
    assert moment("90m", now=now) == now - timedelta(minutes=90)
    assert moment("7d", now=now, whole_days=True) == datetime(2026, 5, 13, tzinfo=UTC)
    assert moment("2026-05-01", now=now) == datetime(2026, 5, 1, tzinfo=UTC)
    assert moment("2026-05-01T12:00+02:00", now=now) == datetime(2026, 5, 1, 10, tzinfo=UTC)
    assert moment("2h", now=now, whole_days=True) == now - timedelta(hours=2)
    assert moment("1970-01-01", now=now) == datetime(1970, 1, 1, tzinfo=UTC)
    for text in ("", "x", "2026-13-01", "-5d", "0001-01-01", "0001-01-01T00:00+14:00", "9999-12-31T23:59-05:00"):
        with pytest.raises(ValueInvalid):
            moment(text, now=now)


async def test_an_estimate_says_what_it_rests_on(comfy: Command) -> None:
    code, out, err = await comfy("costs", "estimate", "image_invert", "--count", "20")
    assert code == 0, err
    assert "image_invert: 20 runs on medium ($0.99/h): unknown" in out
    assert "no run of anything is known yet" in out

    async def history(past: Past, now: datetime) -> None:
        machine = await past.machine(now - timedelta(days=1), timedelta(hours=1))
        await past.job(machine, 10, 60, workflow="image_invert", cold=True)
        for number in range(12):
            await past.job(machine, 100 + 40 * number, 30, workflow="image_invert")

    await write(history)
    code, out, err = await comfy("costs", "estimate", "image_invert", "--count", "20")
    assert code == 0, err
    assert "image_invert: 20 runs on medium ($0.99/h): $0.1766 (" in out  # 10 s, 60 s, 19 x 30 s, 2 s
    assert "one run 30s" in out
    assert "12 runs of it on this type" in out
    names = ("image_invert", "generate_flux_mesh")
    code, out, err = await comfy("costs", "estimate", *names, "--server-type", "large", "--json")
    assert code == 0, err
    known, new = json.loads(out)
    assert (known["basis"], new["basis"]) == ("unscaled", "others")
    assert Decimal(new["usd"]["high"]) >= Decimal(new["usd"]["expected"]) > 0
    assert known["runs"] == 12
    code, _, err = await comfy("costs", "estimate", "image_inverrt")
    assert code == 2
    assert "did you mean image_invert" in err
    code, _, err = await comfy("costs", "estimate", "image_invert", "--server-type", "warp")
    assert code == 2
    assert "no price is known" in err


async def test_the_check_ends_with_four_if_there_is_a_gap(comfy: Command, cloud: RunComfyEmulator) -> None:
    code, out, err = await comfy("costs", "check")
    assert code == 0, err
    assert out == "books and provider agree on 0 machines\n"

    async def unposted(past: Past, now: datetime) -> None:
        await past.machine(now - timedelta(days=1), timedelta(hours=1), posts=False)

    await write(unposted)
    cloud.foreign("large")
    code, out, err = await comfy("costs", "check")
    assert code == 4, err
    assert "GAP" in out
    assert "billed for 3600 s by its times, 0 s are in the ledger" in out
    assert "is not in our books: not counted, left alone" in out
    assert "1 gap in the books of 1 machine" in out
    code, out, _ = await comfy("costs", "check", "--json")
    assert code == 4
    checked = json.loads(out)
    assert checked["agrees"] is False
    assert {"ledger", "not-ours"} <= {finding["kind"] for finding in checked["findings"]}
    cloud.next_call("GET servers", status=401)
    code, _, err = await comfy("costs", "check")
    assert code == 4
    assert "[provider-auth-rejected]" in err


async def test_budgets_are_shown(comfy: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = await comfy("costs", "budgets")
    assert code == 0, err
    assert "nothing limits what can be spent" in out
    monkeypatch.setenv("RUNCOMFY_BUDGET_MONTH", "20")
    monkeypatch.setenv("RUNCOMFY_BUDGET_RUN", "2")

    async def spent(past: Past, now: datetime) -> None:
        await past.machine(max(now - timedelta(hours=1), now.replace(hour=0, minute=0)), timedelta(seconds=100))

    await write(spent)
    code, out, err = await comfy("costs", "budgets")
    assert code == 0, err
    month = next(line for line in out.splitlines() if line.startswith("month "))
    assert month.split()[1:5] == ["$0.0275", "$16.00", "$20.00", "$19.97"]
    assert "with every command" in out
    code, out, _ = await comfy("costs", "budgets", "--json")
    states = {state["budget"]: state for state in json.loads(out)}
    assert (states["month"]["left_usd"], states["month"]["cap_usd"]) == ("19.972500", "20")
    assert states["run"]["committed_usd"] is None


async def test_decisions_are_shown_with_their_reasons(comfy: Command) -> None:
    code, out, err = await comfy("costs", "decisions")
    assert (code, out) == (0, "the plan has decided nothing\n"), err
    now = datetime.now(UTC)

    async def decided(past: Past, now: datetime) -> None:
        await past.books.store.decide(
            [
                Decision(now - timedelta(days=3), "launch", "medium", "3 jobs wait", Decimal("0.35"), "owner"),
                Decision(now - timedelta(hours=1), "stop", "machine-1", "idle for 4 min", Decimal("-0.12"), "owner"),
            ]
        )

    await write(decided)
    code, out, err = await comfy("costs", "decisions")
    assert code == 0, err
    assert "3 jobs wait" in out
    assert "-$0.1200" in out
    code, out, _ = await comfy("costs", "decisions", "--since", "1d", "--json")
    (one,) = json.loads(out)
    assert (one["action"], one["expected_usd"], one["why"]) == ("stop", "-0.12", "idle for 4 min")
    assert datetime.fromisoformat(one["at"]) < now


@pytest.mark.parametrize("by", ["day", "user"])
async def test_the_picture_shows_busy_against_idle(comfy: Command, tmp_path: Path, by: str) -> None:
    await comfy("costs")
    await write(two_machines)
    png, svg = tmp_path / "spent.png", tmp_path / "spent.svg"
    code, _, err = await comfy("costs", "plot", str(png), "--since", "7d", "--by", by)
    assert code == 0, err
    assert "$4.49 in all" in err
    with Image.open(png) as picture:
        assert picture.size[0] == 1350
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x1F, 0x5F, 0xA8), (0xF0, 0xA3, 0x3A), (0xC9, 0xCE, 0xD6), (255, 255, 255)} <= colours
    code, _, err = await comfy("costs", "plot", str(svg), "--since", "7d", "--by", by)
    assert code == 0, err
    texts = {" ".join(node.itertext()).strip() for node in ET.parse(svg).iter() if node.tag.endswith("}text")}  # noqa: S314
    assert {"computing", "loading, waiting, kept warm", "USD"} <= texts
    assert ("day (UTC)" in texts) == (by == "day")
    assert ({"ann", "bob", "(nobody)"} <= texts) == (by == "user")


async def test_a_picture_of_nothing_is_drawn_and_names_are_checked_first(
    comfy: Command, tmp_path: Path, cloud: RunComfyEmulator
) -> None:
    code, _, err = await comfy("costs", "plot", str(tmp_path / "spent.pdf"))
    assert code == 2
    assert "let it end in .png or .svg" in err
    assert cloud.calls == []
    assert (await comfy("costs", "plot", str(tmp_path / "none.png")))[0] == 0
    assert (await comfy("costs", "plot", str(tmp_path / "none.svg"), "--by", "job"))[0] == 0
    code, _, err = await comfy("costs", "plot", str(tmp_path / "no" / "folder.png"))
    assert code == 9


async def test_without_matplotlib_the_extra_is_named(
    comfy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = await comfy("costs", "plot", str(tmp_path / "spent.png"))
    assert code == 3
    assert "[extra-missing]" in err
    assert 'pip install "runcomfy-orchestrator[plot]"' in err
    assert not (tmp_path / "spent.png").exists()


async def test_help_lists_every_command_without_importing_them(comfy: Command) -> None:
    code, out, _ = await comfy("costs", "--help")
    assert code == 0
    for name in ("estimate", "check", "budgets", "plot", "decisions", "replay", "tune"):
        assert f"  {name} " in out


# -- from programs ---------------------------------------------------------------------------------------------


async def test_programs_ask_over_their_connection(comfy: Command) -> None:
    await comfy("costs")
    await write(two_machines)
    async with runcomfy.connect() as connection:
        money = await connection.costs()
        report = await money.report(datetime.now(UTC) - timedelta(days=7), by="user")
    assert {row.key: row.jobs for row in report.rows} == {"ann": 2, "bob": 1, None: 0}


async def test_programs_without_a_loop_ask_too(comfy: Command) -> None:
    await comfy("costs")
    await write(two_machines)

    def ask() -> None:
        with runcomfy.connect(budget_day=20) as connection:
            costs = connection.costs
            since = datetime.now(UTC) - timedelta(days=7)
            report = costs.report(since, by="user")
            assert sum(row.usd for row in report.rows) == report.total.usd == Decimal("4.490000")
            day, month = costs.forecast()
            assert day.expected <= month.expected
            [budget] = costs.budgets()
            assert budget.budget.hard == Decimal(20)
            estimate = costs.estimate("video", count=2, server_type="large")
            assert estimate.usd is not None
            assert estimate.usd.expected > 0
            assert costs.decisions(limit=5) == []
            assert all(advice.what for advice in costs.advice())
            assert costs.check(since=since).machines == 2

    await asyncio.to_thread(ask)
