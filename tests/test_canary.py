"""The canary tries whether the provider ends a machine at its time, and says what it found."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import runcomfy.domain.canary
from runcomfy.adapters.canary_file import keep_outcome, last_outcome
from runcomfy.application.canary import Canary
from runcomfy.application.doctor import lease_finding
from runcomfy.application.guard import Guard
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.exceptions import MachineLost, ValueInvalid
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies

pytestmark = pytest.mark.cloud(comfyui=False)


async def test_a_provider_that_keeps_its_word_is_told_with_its_lag(
    cloud: RunComfyEmulator, program: Program, tmp_path: Path
) -> None:
    canary = Canary(program.machines, tell=program.said.append)
    plan = canary.plan()
    assert plan.rate.server_type == "medium"
    outcome = await canary.run(plan)
    assert outcome.ended_by_itself
    assert outcome.lag <= timedelta(seconds=6)
    assert outcome.cost_usd == cloud.total_usd <= plan.most_usd
    assert await discrepancies(cloud, program) == []
    keep_outcome(str(tmp_path), "account", outcome)
    assert last_outcome(str(tmp_path), "account") == outcome
    assert lease_finding(outcome).ok
    assert last_outcome(str(tmp_path), "another") is None
    assert lease_finding(None).skipped


@pytest.mark.fault(23)
async def test_a_provider_that_ignores_the_lease_is_told_and_the_machine_is_ended_by_us(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    canary = Canary(program.machines, tell=program.said.append)
    plan = canary.plan()
    outcome = await canary.run(plan)
    assert not outcome.ended_by_itself
    assert outcome.lag >= plan.patience
    assert cloud.alive == []
    assert outcome.cost_usd == cloud.total_usd
    assert cloud.total_usd <= plan.most_usd + Decimal("0.01")
    assert not lease_finding(outcome).ok


async def test_the_guard_lets_the_canary_see_what_happens(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    async with programs.start() as other:
        guard = asyncio.create_task(Guard(other.machines, other.dev, period=timedelta(seconds=30)).run())
        canary = Canary(program.machines, tell=program.said.append)
        outcome = await canary.run(canary.plan())
        guard.cancel()
        await asyncio.wait({guard})
    assert not outcome.ended_by_itself
    assert not any("guard" in said for said in other.said)


async def test_a_canary_that_is_broken_off_leaves_no_machine(cloud: RunComfyEmulator, program: Program) -> None:
    canary = Canary(program.machines, tell=program.said.append)
    task = asyncio.create_task(canary.run(canary.plan()))
    await asyncio.sleep(300)
    assert cloud.billing
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert cloud.alive == []


async def test_a_machine_that_somebody_stops_proves_nothing(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_machine(vanishes_after=100)
    canary = Canary(program.machines, tell=program.said.append)
    with pytest.raises(MachineLost, match="nothing is proven"):
        await canary.run(canary.plan())
    assert await discrepancies(cloud, program) == []


async def test_where_no_type_is_cheap_enough_nothing_is_planned_or_rented(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start(max_usd_per_hour=Decimal("0.01")) as poor:
        with pytest.raises(ValueInvalid, match="no machine type is cheap enough") as caught:
            Canary(poor.machines, tell=poor.said.append).plan()
    assert "RUNCOMFY_MAX_USD_PER_HOUR" in str(caught.value.hint)
    assert cloud.launched == []


class TestTheCommand:
    """With a lease of a second, and a cloud in real time."""

    pytestmark = [
        pytest.mark.looptime(False),
        pytest.mark.cloud(comfyui=False, now=None, boot_time=0, delete_takes=0, rate_limit=False),
    ]

    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch, cloud: RunComfyEmulator) -> None:
        short = (timedelta(seconds=1), timedelta(seconds=6))
        monkeypatch.setattr(runcomfy.domain.canary.Plan.__init__, "__defaults__", short)
        fast = {"RUNCOMFY_POLL_INTERVAL": "0.1", "RUNCOMFY_REQUESTS_PER_SECOND": "100", "RUNCOMFY_BURST": "100"}
        for name, value in {**cloud.environment(), **fast}.items():
            monkeypatch.setenv(name, value)

    async def test_it_says_the_cost_first_and_does_nothing_unless_agreed(
        self, cloud: RunComfyEmulator, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert await asyncio.to_thread(call, comfyctl, ["doctor", "--canary"]) == 0
        err = capsys.readouterr().err
        assert "for 1s, does not stop it, and waits up to 6s more" in err
        assert "nothing was launched" in err
        assert cloud.launched == []

    async def test_with_yes_it_tries_and_doctor_shows_it_later(
        self, cloud: RunComfyEmulator, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = await asyncio.to_thread(call, comfyctl, ["doctor", "--canary", "--yes", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert json.loads(out)["ended_by_itself"] is True
        assert len(cloud.launched) == 1
        await asyncio.to_thread(call, comfyctl, ["doctor"])
        assert "ok   leases: RunComfy ended a medium machine by itself" in capsys.readouterr().out

    async def test_a_provider_that_breaks_its_word_is_an_error(
        self, cloud: RunComfyEmulator, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cloud.next_machine(ignores_stop_time=True)
        code = await asyncio.to_thread(call, comfyctl, ["doctor", "--canary", "--yes"])
        out, err = capsys.readouterr()
        assert code == 4
        assert "did NOT end" in out
        assert "are not ended by themselves" in err
        assert cloud.alive == []

    @pytest.mark.parametrize("arguments", [["--yes"], ["--canary", "--server", "http://localhost:1"]])
    async def test_options_that_do_not_go_together_are_refused(self, arguments: list[Any]) -> None:
        assert await asyncio.to_thread(call, comfyctl, ["doctor", *arguments]) == 2
