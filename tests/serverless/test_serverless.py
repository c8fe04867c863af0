"""Requests to a serverless deployment: submitted once, verified files, and what they cost."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.adapters.results import DiskResults
from runcomfy.application.doctor import examine_deployment
from runcomfy.application.serverless_run import ServerlessRuns
from runcomfy.domain import exceptions as errors
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.domain.secret import Secret
from runcomfy.domain.serverless import CODES, RequestReport, RequestState
from runcomfy.domain.settings import Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.serverless_requests import content, left, order, run

# --- what it does when all is well -----------------------------------------------------------------------------


async def test_a_request_brings_picture_and_mesh_verified(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path
) -> None:
    heard: list[RequestReport] = []
    done = await runs.run(order(), job_id=JobId("j-1"), heard=heard.append)
    assert set(done.outputs) == {"flux", "mesh"}
    assert Path(done.outputs["flux"].path) == tmp_path / "out" / "j-1" / "flux.png"
    assert content(done.outputs["mesh"].path)[:4] == b"glTF"
    (ran,) = deployment.run_log
    assert ran.graph["42"]["inputs"]["value"] == 7
    assert ran.graph["41"]["inputs"]["value"] == "a bronze statue"
    assert heard[0].state is RequestState.IN_QUEUE
    assert heard[0].queue_position == 0
    assert RequestState.IN_PROGRESS in {report.state for report in heard}
    manifest = json.loads(content(tmp_path / "out" / "j-1" / "manifest.json"))
    assert manifest["request_id"] == done.request.request_id
    assert {entry["name"] for entry in manifest["outputs"]} == {"flux", "mesh"}


async def test_results_wait_hardly_for_their_price(
    runs: ServerlessRuns, deployment: ServerlessEmulator, clock: LoopClock
) -> None:
    deployment.next_call("GET deployment", reply="never", times=None)
    done = await run(runs)
    assert (set(done.outputs), done.cost) == ({"flux", "mesh"}, None)
    assert done.result.finished_at is not None
    assert (clock.now() - done.result.finished_at).total_seconds() < 20


@pytest.mark.parametrize("times", ["naive", "offset", "zulu"])
async def test_times_are_read_however_they_are_written(
    runs: ServerlessRuns, deployment: ServerlessEmulator, times: str
) -> None:
    deployment.times = times
    done = await run(runs)
    (ran,) = deployment.run_log
    assert (done.result.created_at, done.result.finished_at) == (ran.created_at, ran.finished_at)


async def test_the_first_version_of_the_api_does_as_well(
    deployment: ServerlessEmulator, settings: Settings, clock: LoopClock
) -> None:
    deployment.tells_urls = False
    chosen = replace(settings, serverless=replace(settings.serverless, api_version="v1"))
    async with RunComfyServerless(chosen.serverless, chosen.cloud, clock=clock) as api:
        await run(ServerlessRuns(api, DiskResults(chosen.files), chosen, clock))
    assert len(deployment.run_log) == 1


async def test_a_second_request_waits_behind_the_first_and_finds_the_instance_awake(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    positions: set[int | None] = set()

    def heard(report: RequestReport) -> None:
        positions.add(report.queue_position)

    await asyncio.gather(*(runs.run(order(n), job_id=JobId(f"j-{n}"), heard=heard) for n in (1, 2)))
    assert positions >= {1, 0, None}
    assert len(deployment.instances) == 1


@pytest.mark.threat("S3")
@pytest.mark.threat("S13")
async def test_the_token_goes_to_the_api_and_never_to_where_results_lie(
    runs: ServerlessRuns, deployment: ServerlessEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        await run(runs)
    assert {call.token for call in deployment.calls} == {1}
    assert len(deployment.file_calls) == 2
    for _, headers in deployment.file_calls:
        assert "authorization" not in {name.lower() for name in headers}
    assert deployment.token not in caplog.text
    assert "a bronze statue" not in caplog.text


# --- a submit is sent once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", ["lost", "reset", "never", "truncated", "html", "empty"])
async def test_a_submit_whose_answer_is_lost_is_not_repeated_and_told_as_unclear(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path, reply: str
) -> None:
    deployment.next_call("POST inference", reply=reply)
    with pytest.raises(errors.RequestUnclear, match="may run, and be billed, once") as caught:
        await run(runs)
    assert len(deployment.requests) == 1
    assert caught.value.details["cause"]
    assert "before another run" in caught.value.hint
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_a_servers_error_to_a_submit_leaves_it_open_whether_it_runs(
    runs: ServerlessRuns, deployment: ServerlessEmulator, status: int
) -> None:
    deployment.next_call("POST inference", status=status, works=True)
    with pytest.raises(errors.RequestUnclear):
        await run(runs)
    assert len(deployment.requests) == 1


async def test_a_submit_that_was_rate_limited_is_sent_again_when_it_may(
    runs: ServerlessRuns, deployment: ServerlessEmulator, clock: LoopClock
) -> None:
    before = clock.now()
    deployment.next_call("POST inference", status=429, headers={"Retry-After": "17"}, times=2)
    await run(runs)
    (ran,) = deployment.requests.values()
    assert ran.created_at - before >= timedelta(seconds=34)


async def test_a_retry_after_of_days_is_not_obeyed_to_the_letter(
    runs: ServerlessRuns, deployment: ServerlessEmulator, clock: LoopClock
) -> None:
    before = clock.now()
    deployment.next_call("POST inference", status=429, headers={"Retry-After": "864000"})
    await run(runs)
    (ran,) = deployment.requests.values()
    assert ran.created_at - before < timedelta(minutes=2)


async def test_nobody_there_is_nobody_asked(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    await deployment.stop()
    with pytest.raises(errors.ProviderBusy, match="cannot be reached"):
        await run(runs)


@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (10001, errors.OutOfCredit),
        (10002, errors.DeploymentUnusable),
        (10003, errors.DeploymentUnusable),
        (10013, errors.DeploymentUnusable),
    ],
)
async def test_what_gates_a_deployment_is_told_with_what_to_do_whatever_the_status(
    runs: ServerlessRuns, deployment: ServerlessEmulator, code: int, kind: type[RunComfyError], status: int
) -> None:
    deployment.gate, deployment.gate_status = code, status
    with pytest.raises(kind, match=str(code)) as caught:
        await run(runs)
    assert caught.value.hint == CODES[code][2]
    assert not deployment.requests


async def test_a_wrong_token_is_not_tried_for_ever(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.token = "another"
    with pytest.raises(errors.AuthRejected):
        await run(runs)
    assert len(deployment.calls) == 1


async def test_the_second_token_is_used_when_the_first_is_refused(
    deployment: ServerlessEmulator, settings: Settings, clock: LoopClock
) -> None:
    tokens = (Secret("rotated-away"), *settings.cloud.tokens)
    async with RunComfyServerless(settings.serverless, replace(settings.cloud, tokens=tokens), clock=clock) as api:
        await run(ServerlessRuns(api, DiskResults(settings.files), settings, clock))
    assert len(deployment.run_log) == 1


async def test_of_two_refused_tokens_the_refusal_that_says_more_is_told(
    deployment: ServerlessEmulator, settings: Settings, clock: LoopClock
) -> None:
    deployment.next_call("POST inference", status=403, body={"error_code": 403003, "error_message": "Forbidden"})
    tokens = (*settings.cloud.tokens, Secret("rotated-away"))
    async with RunComfyServerless(settings.serverless, replace(settings.cloud, tokens=tokens), clock=clock) as api:
        with pytest.raises(errors.AccessDenied, match="403003"):
            await api.submit({})
        await api.submit({})  # the first token is asked again: the second is not valid at all
    assert len(deployment.calls) == 3


async def test_an_unknown_deployment_is_said_to_be_that(
    deployment: ServerlessEmulator, settings: Settings, clock: LoopClock
) -> None:
    other = replace(settings.serverless, deployment_id="../../users/me")
    async with RunComfyServerless(other, settings.cloud, clock=clock) as api:
        with pytest.raises(errors.DeploymentUnusable, match="knows no deployment"):
            await api.submit({})
        with pytest.raises(errors.DeploymentUnusable, match="knows no deployment"):
            await api.deployment()


async def test_a_node_that_the_deployment_does_not_have_is_named(
    api: RunComfyServerless, deployment: ServerlessEmulator
) -> None:
    with pytest.raises(errors.ValueInvalid, match="there is no node 99"):
        await api.submit({"99": {"inputs": {"value": 1}}})


async def test_a_request_larger_than_the_gateway_takes_is_not_sent(
    api: RunComfyServerless, deployment: ServerlessEmulator
) -> None:
    with pytest.raises(errors.InputFileInvalid, match="RunComfy takes"):
        await api.submit({"16": {"inputs": {"image": "data:image/png;base64," + "A" * 11_000_000}}})
    assert not deployment.calls


# --- money -----------------------------------------------------------------------------------------------------


async def test_the_estimate_brackets_the_bill_and_stands_in_the_manifest(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path
) -> None:
    done = await run(runs)
    await asyncio.sleep(120)
    assert done.cost is not None
    assert done.cost.usd_per_hour == Decimal("2.50")
    assert done.cost.low_usd < done.cost.usd < done.cost.high_usd
    assert done.cost.low_usd < deployment.total_usd <= done.cost.high_usd * Decimal("1.02")
    manifest = json.loads(content(tmp_path / "out" / "j-1" / "manifest.json"))
    assert manifest["cost_estimate"]["estimate"] is True
    assert Decimal(manifest["cost_estimate"]["usd"]) == done.cost.usd


async def test_without_a_price_there_is_no_estimate_rather_than_a_made_up_one(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.hardware = "NEW_400"
    assert (await run(runs)).cost is None


async def test_a_price_of_ones_own_counts_where_runcomfy_says_nothing(
    deployment: ServerlessEmulator, api: RunComfyServerless, settings: Settings, clock: LoopClock
) -> None:
    deployment.deployment_told = False
    own = replace(settings, serverless=replace(settings.serverless, usd_per_hour=Decimal(36)))
    done = await run(ServerlessRuns(api, DiskResults(own.files), own, clock))
    assert done.cost is not None
    (ran,) = deployment.run_log
    assert ran.finished_at is not None
    assert done.cost.usd == pytest.approx(Decimal(str((ran.finished_at - ran.created_at).total_seconds())) / 100)


async def test_nothing_is_asked_about_costs_where_they_are_not_tracked(
    deployment: ServerlessEmulator, api: RunComfyServerless, settings: Settings, clock: LoopClock
) -> None:
    off = replace(settings, serverless=replace(settings.serverless, cost_tracking=False))
    done = await run(ServerlessRuns(api, DiskResults(off.files), off, clock))
    assert done.cost is None
    assert "deployment" not in {call.path for call in deployment.calls}


# --- what the doctor says of a deployment ----------------------------------------------------------------------


async def test_the_doctor_tells_what_is_known_of_a_deployment_and_wakes_nothing(
    api: RunComfyServerless, deployment: ServerlessEmulator
) -> None:
    found = await examine_deployment(api)
    assert found.ok
    assert "is enabled, on " in found.detail
    said = {"is_enabled": True, "hardware": ["AMPERE_24"], "keep_warm_duration_in_seconds": 60, "min_instances": 1}
    deployment.next_call("GET deployment", status=200, body=said)
    found = await examine_deployment(api)
    assert found.detail == "it is enabled, on AMPERE_24, kept warm for 60 s; 1 instance(s) bill all the time"
    deployment.next_call("GET deployment", status=200, body={**said, "is_enabled": False})
    found = await examine_deployment(api)
    assert not found.ok
    assert isinstance(found.error, errors.DeploymentUnusable)
    deployment.deployment_told = False
    found = await examine_deployment(api)
    assert "nothing about it that can be read" in found.detail
    assert deployment.instances == []
