"""`comfyctl costs replay` over a shipped trace, and `comfyctl costs tune` over books with a past."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.bootstrap import App
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.signal import Signal, SignalKind
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.past import Past

SAMPLE = str(Path(__file__).parent / "data" / "traces" / "azure_code_2023_day.csv")
Say = Callable[..., tuple[int, str, str]]
Command = Callable[..., Any]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `comfyctl costs replay`; returns exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = call(comfyctl, ["costs", "replay", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_the_plan_stands_beside_every_other_policy_without_an_account(say: Say) -> None:
    code, out, err = say(SAMPLE)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == (
        ["policy", "per", "1,000", "jobs", "wait", "p50", "p95", "cold", "starts", "J", "J", "/", "bound"]
    )
    named = [line.split()[0] for line in lines[1:7]]
    assert named == ["plan", "scale-to-zero", "fixed-5-min", "break-even", "knative", "keda"]
    assert all(float(line.split()[-1]) >= 1 for line in lines[1:7])
    assert lines[-1].startswith("221 jobs; an hour of waiting is worth $8.75. Knowing all jobs ahead, J is at least $")


def test_json_has_the_bracket_and_a_row_for_each_policy(say: Say) -> None:
    code, out, err = say(SAMPLE, "--json", "--policy", "plan", "--policy", "keda", "--wait-price", "person waiting")
    assert code == 0, err
    told = json.loads(out)
    assert list(told["policies"]) == ["plan", "keda"]
    assert told["jobs"] == 221
    assert told["wait_usd_per_hour"] == 35.0
    assert told["bound_usd"] <= told["best_schedule_found_usd"] <= told["zero_wait_optimum_usd"]
    plan = told["policies"]["plan"]
    assert plan["ratio_to_bound"] == pytest.approx(plan["j_usd"] / told["bound_usd"], abs=0.01)
    assert plan["j_usd"] == pytest.approx(plan["usd"] + 35.0 * plan["waited_s"] / 3600, abs=0.01)


def test_signals_and_a_bridge_change_what_the_plan_does(say: Say) -> None:
    def cost(*options: str) -> float:
        code, out, err = say(SAMPLE, "--json", "--policy", "plan", *options)
        assert code == 0, err
        found: float = json.loads(out)["policies"]["plan"]["j_usd"]
        return found

    alone = cost()
    assert cost("--presence") < 0.6 * alone
    assert cost("--presence", "--presence-recall", "0.3") > cost("--presence")
    assert cost("--bridge") < 0.9 * alone
    assert cost("--usd-per-hour", "3.50") > 1.5 * alone
    assert cost("--boot", "20s") < alone


def test_streams_are_drawn_by_a_seed(say: Say) -> None:
    def jobs(*options: str) -> tuple[int, float]:
        code, out, err = say(SAMPLE, "--json", "--policy", "scale-to-zero", *options)
        assert code == 0, err
        told = json.loads(out)
        return told["jobs"], told["bound_usd"]

    assert jobs("--stream", "heavy", "--seed", "1") == jobs("--stream", "heavy", "--seed", "1")
    assert len({jobs("--stream", "heavy", "--seed", str(seed)) for seed in range(6)}) > 1
    assert jobs("--stream", "heavy")[0] < jobs()[0]


def test_what_is_wrong_with_a_trace_is_said_with_what_to_do(say: Say, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,user\n0,a\n5,b\n", encoding="utf-8")
    code, out, err = say(str(trace))
    assert (code, out) == (2, "")
    assert "no column service_s" in err
    assert "--service-s SECONDS" in err
    assert say(str(trace), "--service-s", "30")[0] == 0
    trace.write_bytes(b"\xff\xfe\x00\x01")
    code, _, err = say(str(trace))
    assert code == 2
    assert "[input-file-invalid]" in err
    assert say(str(tmp_path / "missing.csv"))[0] == 2
    assert say(SAMPLE, "--policy", "magic")[0] == 2
    assert say(SAMPLE, "--wait-price", "cheap")[0] == 2


def test_rows_that_never_ran_are_counted(say: Say, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("\ufeffarrival_s,service_s\n0,10\n5,0\n7,20\n", encoding="utf-8")
    code, out, err = say(str(trace), "--policy", "plan")
    assert code == 0
    assert "1 rows without a run time were left out" in err
    assert "\n2 jobs;" in out


# -- one's own days ---------------------------------------------------------------------------------------------


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


async def write_lonely_jobs(count: int, *, signals: bool = False) -> None:
    """Write a past: a job every three hours of the last days, each on a machine of its own."""
    async with App() as app:
        machines, _ = await app.cloud()
        past = Past(machines.books)
        for number in range(count):
            ready = datetime.now(UTC) - timedelta(hours=3 * (number + 0.5))
            machine = await past.machine(ready, timedelta(minutes=2))
            await past.job(machine, 5, 60, user="ann")
            if signals:
                opened = ready - timedelta(minutes=5)
                await machines.store.signal(
                    Signal(SignalKind.OPENED, "conjure", opened, until=ready + timedelta(minutes=15))
                )
                await machines.store.signal(Signal(SignalKind.LEFT, "conjure", ready + timedelta(minutes=2)))


cloud_without_servers = pytest.mark.cloud(comfyui=False, now=None, boot_time=0, delete_takes=0, rate_limit=False)


@cloud_without_servers
async def test_tune_says_where_there_is_no_past(comfy: Command) -> None:
    code, out, err = await comfy("costs", "tune")
    assert code == 0, err
    assert "no job ran in the last 7 days" in err
    code, out, _ = await comfy("costs", "tune", "--json")
    assert json.loads(out) == {"days": 7, "left_out": 0, "jobs": 0, "recommended": []}


@cloud_without_servers
async def test_tune_recommends_what_would_have_been_better(comfy: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    await comfy("costs", "tune")
    await write_lonely_jobs(30)
    monkeypatch.setenv("RUNCOMFY_KEEP_ALIVE", "2h")
    code, out, err = await comfy("costs", "tune", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["jobs"] == 30
    keep = next(one for one in told["recommended"] if one["setting"] == "keep_alive")
    assert keep["now"] == "7200s"
    assert keep["saves_share"] > 0.03
    assert told["tried"][f"keep_alive {keep['better']}"]["j_usd"] < told["policies"]["plan"]["j_usd"]
    code, out, err = await comfy("costs", "tune")
    assert code == 0, err
    assert f"--keep-alive {keep['better']} instead of 7200s" in out


@cloud_without_servers
async def test_tune_keeps_what_is_good_and_looks_back_only_so_far(
    comfy: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    await comfy("costs", "tune")
    await write_lonely_jobs(30)
    monkeypatch.setenv("RUNCOMFY_KEEP_ALIVE", "60s")
    code, out, err = await comfy("costs", "tune", "--days", "2")
    assert code == 0, err
    assert "\n16 jobs;" in out
    assert "no other setting would have been more than 3 % better: keep yours" in out


@cloud_without_servers
async def test_a_latency_target_that_no_price_keeps_is_told(comfy: Command) -> None:
    await comfy("costs", "tune")
    await write_lonely_jobs(6)
    code, out, err = await comfy("costs", "tune", "--latency-target", "20s")
    assert code == 0, err
    assert "No price of waiting would have kept 20 s for 95 of 100 jobs" in out


@cloud_without_servers
async def test_signals_that_clients_told_are_replayed(comfy: Command) -> None:
    await comfy("costs", "tune")
    await write_lonely_jobs(12, signals=True)
    code, out, err = await comfy("costs", "tune", "--latency-target", "60s", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["wait_price"]["met"]
    assert told["policies"]["plan"]["wait_p95_s"] <= 60
    assert told["policies"]["break-even"]["wait_p95_s"] > 100
