"""Machines, money, presence, workflows and the queue over HTTP, against an emulated account and without any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

from runcomfy.adapters.config import load_settings
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.machine import Purpose
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.web import Web, serving_web
from runcomfy.testing.worker_stories import picture


@asynccontextmanager
async def with_account(folder: Path, clock: LoopClock, account: CloudSettings) -> AsyncIterator[Web]:
    """Serve the API of an account; nobody works."""
    settings = load_settings(overrides={})
    async with serving_web(folder, clock, settings=replace(settings, cloud=account)) as web:
        yield web


async def test_without_credentials_everything_else_is_shown(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        machines = await api.get("/machines")
        assert machines.status == 200
        assert machines.json["machines"] == []
        assert machines.json["listed"] is False
        assert "RUNCOMFY" in machines.json["why"] or "credentials" in machines.json["why"]
        money = await api.get("/costs/now")
        assert money.status == 200, money
        assert money.json["today"] == {"usd": "0", "busy_s": 0.0, "idle_s": 0.0, "jobs": 0}
        assert len(money.json["hours"]) == 48
        assert len(money.json["days"]) == 31
        report = await api.get("/costs?by=hour")
        assert (report.status, report.json["by"], report.json["rows"]) == (200, "hour", [])
        for far in ("until=9999-12-31", "since=0001-01-01", "since=9999-12-30&until=9999-12-31"):
            assert (await api.get(f"/costs?{far}")).status == 422, "and not lost at an end of the calendar"
        stopped = await api.post("/machines/nothing/stop", {"confirm": True})
        assert stopped.status == 503
        assert stopped.json["error"]["code"] == "credentials-missing"


async def test_budgets_are_shown_and_measured_but_no_names_are(tmp_path: Path, clock: LoopClock) -> None:
    budgets = (Budget(Period.DAY, hard=Decimal(20)), Budget(Period.MONTH, hard=Decimal(90), user="ann"))
    settings = replace(load_settings(overrides={}), budgets=budgets)
    async with serving_web(tmp_path, clock, settings=settings) as api:
        shown = (await api.get("/costs/now")).json["budgets"]
        assert [(one["name"], one["scope"], one["left"]) for one in shown] == [
            ("day", "all", "20"),
            ("month", "user ann", "90"),
        ]
        measured = (await api.get("/metrics")).body.decode()
    assert 'comfyctl_budget_usd{budget="day",what="hard"} 20.0' in measured
    assert 'comfyctl_budget_usd{budget="day",what="left"} 20.0' in measured
    assert "ann" not in measured.split('"')
    assert 'budget="month"' not in measured


async def test_a_machine_is_listed_with_what_it_costs_and_stopped_when_that_is_meant(
    tmp_path: Path, clock: LoopClock, cloud: RunComfyEmulator, cloud_settings: CloudSettings
) -> None:
    async with with_account(tmp_path, clock, cloud_settings) as api:
        machines, _ = await api.app.cloud()
        async with machines.launch_lock():
            intent = machines.books.intent(
                purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test"
            )
            machine = await machines.launch(intent)
        machine, _ = await machines.wait_ready(machine)
        await asyncio.sleep(60)
        shown = (await api.get("/machines")).json
        assert shown["listed"] is True
        (row,) = shown["machines"]
        assert (row["id"], row["server_type"], row["whose"]) == (machine.id, "medium", "ours")
        assert row["jobs"] == []
        assert row["busy"] is False
        assert cloud.url not in str(shown)
        unmeant = await api.post(f"/machines/{row['id']}/stop", {})
        assert unmeant.status == 409
        assert (await api.post(f"/machines/{row['id']}/stop")).status == 409
        assert cloud.billing
        stopped = await api.post(f"/machines/{row['id']}/stop", {"confirm": True})
        assert stopped.status == 200, stopped
        await asyncio.sleep(120)
        assert not cloud.billing
        assert (await api.post("/machines/nothing/stop", {"confirm": True})).status == 404
        money = (await api.get("/costs/now")).json
        assert Decimal(money["today"]["usd"]) > 0
        assert money["today"]["idle_s"] > 0
        assert sum(Decimal(hour["usd"]) for hour in money["hours"]) == Decimal(money["today"]["usd"])
        report = (await api.get("/costs?by=type")).json
        assert [one["key"] for one in report["rows"]] == ["medium"]
        assert report["total"]["spent_usd"] == (await api.get("/costs?by=hour")).json["total"]["spent_usd"]


async def test_the_provider_is_asked_once_however_many_look(
    tmp_path: Path, clock: LoopClock, cloud: RunComfyEmulator, cloud_settings: CloudSettings
) -> None:
    async with with_account(tmp_path, clock, cloud_settings) as api:
        await api.get("/machines")
        before = len(cloud.calls)
        await asyncio.sleep(6)
        answers = await asyncio.gather(*(api.get("/machines") for _ in range(30)))
        assert {answer.status for answer in answers} == {200}
        assert len(cloud.calls) - before == 1


async def test_what_cannot_be_asked_for_is_said(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        for path in (
            "/costs?since=yesterday",
            "/costs?by=moon",
            "/costs?by=hour&since=90d",
            "/costs?since=1d&until=2d",
        ):
            assert (await api.get(path)).status == 422, path
        assert (await api.get("/costs/estimate?workflow=no_such_thing")).status == 404
        assert (await api.post("/costs/estimate", {"workflow": "image_invert", "count": 0})).status == 422
        found = await api.post("/costs/estimate", {"workflow": "image_invert", "count": 3})
        assert (found.status, found.json["count"], found.json["known"]) == (200, 3, False)


async def test_presence_is_said_heard_and_taken_back(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        said = await api.post("/presence", {"event": "opened", "source": "page", "seconds": 600})
        assert (said.status, said.json["signal"]["kind"]) == (200, "opened")
        await api.post("/presence", {"event": "batch", "source": "script", "jobs": 20, "seconds": 400})
        heard = (await api.get("/presence")).json["signals"]
        assert {(one["source"], one["kind"]) for one in heard} >= {("page", "opened")}
        await api.post("/presence", {"event": "left", "source": "page"})
        heard = (await api.get("/presence")).json["signals"]
        assert "page" not in {one["source"] for one in heard}
        for wrong in ({"event": "gone"}, {"event": "batch"}, {"event": "opened", "seconds": -1}, {}):
            assert (await api.post("/presence", wrong)).status == 422, wrong


async def test_workflows_say_what_they_take_and_deliver(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        found = {one["name"]: one for one in (await api.get("/workflows")).json["workflows"]}
        invert = found["image_invert"]
        assert [(one["name"], one["kind"], one["required"]) for one in invert["inputs"]] == [("image", "image", True)]
        assert [one["kind"] for one in invert["outputs"]] == ["image"]
        assert "generate_flux_mesh" in found
        portrait = found["wf_realistic_portrait"]
        assert any(one["default"] is not None for one in portrait["inputs"])


async def test_the_queue_is_paused_and_goes_on(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        await api.post("/jobs", {"workflow": picture()})
        paused = await api.post("/queue/pause", {"message": "lunch"})
        assert paused.json["paused"][0]["message"] == "lunch"
        assert (await api.get("/queue")).json["counts"]["pending"] == 1
        assert (await api.post("/queue/resume")).json["paused"] == []
