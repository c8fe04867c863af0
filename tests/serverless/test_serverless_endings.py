"""Requests that a serverless deployment has taken: trouble on the way, how they end, who leaves, broken files."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.adapters.results import DiskResults
from runcomfy.application.serverless_run import ServerlessRuns
from runcomfy.domain import exceptions as errors
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.domain.serverless import CODES, RequestId, Submitted
from runcomfy.domain.settings import Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.serverless_requests import content, left, order, run

# --- looking goes on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 502, "times": 12},
        {"status": 504, "body": "<html>gateway</html>", "times": 12},
        {"reply": "lost", "times": 12},
        {"reply": "truncated", "times": 12},
        {"status": 429, "times": 6},
        {"body": {"request_id": "somebody-elses", "status": "completed"}, "times": 12},
        {"body": {"status": "resting"}, "times": 6},
        {"body": [], "times": 12},
        {"status": 200, "body": {"error_code": 500001, "error_message": "oops"}, "times": 12},
    ],
    ids=lambda fault: str(next(iter(fault.values())))[:12],
)
async def test_trouble_while_looking_ends_nothing(
    runs: ServerlessRuns, deployment: ServerlessEmulator, fault: dict[str, Any]
) -> None:
    deployment.next_call("GET requests/*/status", skip=2, **fault)
    done = await run(runs)
    assert set(done.outputs) == {"flux", "mesh"}
    assert len(deployment.requests) == 1


async def test_results_that_cannot_be_read_at_first_are_read_later(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.next_call("GET requests/*/result", status=503, times=9)
    assert set((await run(runs)).outputs) == {"flux", "mesh"}


async def test_a_status_that_never_changes_does_not_hide_the_result(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.next_request(stuck=True)
    assert set((await run(runs)).outputs) == {"flux", "mesh"}


async def test_a_request_that_is_not_visible_yet_is_waited_for(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.next_request(hidden=45.0)
    assert set((await run(runs)).outputs) == {"flux", "mesh"}


async def test_a_request_that_stays_unknown_is_given_up(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.next_request(hidden=100_000.0)
    with pytest.raises(errors.RequestNotFound):
        await run(runs)


async def test_silence_of_minutes_ends_the_wait_and_names_the_request(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.next_request(never_ends=True)
    deployment.next_call("GET requests/*", status=502, times=None)
    with pytest.raises(errors.ProviderBusy) as caught:
        await run(runs)
    (request,) = deployment.requests.values()
    assert caught.value.details["request_id"] == request.request_id
    assert request.cancel_wanted.is_set()


async def test_addresses_that_lead_elsewhere_are_not_followed(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    def elsewhere(answer: dict[str, Any]) -> dict[str, Any]:
        return {name: "http://127.0.0.1:1/steal/token" if name.endswith("_url") else v for name, v in answer.items()}

    deployment.next_call("POST inference", change=elsewhere)
    assert set((await run(runs)).outputs) == {"flux", "mesh"}


# --- how requests end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(set(CODES) - {401001, 403003, 404001, 422001, 500001, 200001}))
async def test_every_code_of_a_failed_request_is_explained(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path, code: int
) -> None:
    deployment.next_request(fails=code, words="the words of RunComfy")
    kind, _, hint = CODES[code]
    with pytest.raises(kind, match="the words of RunComfy") as caught:
        await run(runs)
    assert type(caught.value) is kind
    assert caught.value.hint == hint
    assert caught.value.details["runcomfy_code"] == code
    assert caught.value.details["request_id"] in deployment.requests
    assert left(tmp_path / "out") == []


async def test_a_code_that_nobody_knows_keeps_its_words(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.next_request(fails=10999, words="new trouble\x1b[31m")
    with pytest.raises(errors.RequestFailed, match=r"10999\): new trouble\[31m$"):
        await run(runs)


async def test_a_workflow_that_fails_is_told_in_comfyuis_words(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.workflow["10"]["inputs"]["unet_name"] = "no-such-model.safetensors"
    with pytest.raises(errors.PromptRejected, match="10008"):
        await run(runs)


async def test_a_picture_that_cannot_be_fetched_is_said(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    wanted = order()
    broken = {**wanted.overrides, "16": {"inputs": {"image": "render.png"}}}
    with pytest.raises(errors.InputFileInvalid, match="10009"):
        await runs.run(replace(wanted, overrides=broken), job_id=JobId("j-1"))


async def test_a_success_without_new_files_is_none(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.next_request(without_urls=True)
    with pytest.raises(errors.OutputMissing, match="cache"):
        await run(runs)


async def test_a_success_without_the_mesh_is_none_and_nothing_is_fetched(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path
) -> None:
    deployment.next_request(only=("24",))
    with pytest.raises(errors.OutputMissing, match="node 33"):
        await run(runs)
    assert not deployment.file_calls
    assert left(tmp_path / "out") == []


async def test_an_instance_that_crashes_is_billed_until_then(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.next_request(crashes=True)
    with pytest.raises(errors.RequestFailed, match="10012"):
        await run(runs)
    assert not deployment.billing
    assert deployment.total_usd > 0


# --- whoever leaves cancels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("british", [False, True])
@pytest.mark.parametrize("after", [10, 245])
async def test_a_caller_that_leaves_ends_its_request(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path, after: float, british: bool
) -> None:
    deployment.british = british
    deployment.next_request(never_ends=True)
    task = asyncio.create_task(run(runs))
    await asyncio.sleep(after)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(2)
    assert not deployment.going_on
    assert left(tmp_path / "out") == []


async def test_a_caller_that_leaves_while_it_submits_ends_what_that_brought(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.next_call("POST inference", delay=5)
    task = asyncio.create_task(run(runs))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(deployment.requests) == 1
    assert not deployment.going_on


async def test_a_caller_that_leaves_while_its_submit_is_refused_has_nothing_to_end(
    runs: ServerlessRuns, deployment: ServerlessEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    deployment.next_call("POST inference", delay=5, status=403, body={"error": "no"}, times=None)
    task = asyncio.create_task(run(runs))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "serverless_submit_left" in caplog.text
    assert not [call for call in deployment.calls if call.path.endswith("/cancel")]


async def test_a_cancellation_that_is_not_answered_holds_nobody_up_for_long(
    runs: ServerlessRuns, deployment: ServerlessEmulator, clock: LoopClock
) -> None:
    deployment.next_request(never_ends=True)
    deployment.next_call("POST requests/*/cancel", reply="never", times=None)
    task = asyncio.create_task(run(runs))
    await asyncio.sleep(10)
    task.cancel()
    left_at = clock.now()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.now() - left_at <= timedelta(seconds=31)


async def test_the_limit_of_time_ends_the_request(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.next_request(never_ends=True)
    with pytest.raises(errors.JobTimeout, match="in_progress") as caught:
        await run(runs, timeout=timedelta(minutes=6))
    await asyncio.sleep(2)
    assert not deployment.going_on
    assert caught.value.details["status"] == "in_progress"


async def test_a_request_that_somebody_else_cancels_is_told_as_cancelled(
    runs: ServerlessRuns, api: RunComfyServerless, deployment: ServerlessEmulator
) -> None:
    task = asyncio.create_task(run(runs))
    await asyncio.sleep(10)
    (request_id,) = deployment.requests
    assert await api.cancel(Submitted(RequestId(request_id))) is True
    with pytest.raises(errors.PromptInterrupted):
        await task
    assert await api.cancel(Submitted(RequestId(request_id))) is False


@pytest.mark.parametrize("answer", [{"status": 404}, {"status": 502}, {"body": []}], ids=["unknown", "away", "odd"])
async def test_a_cancelled_request_is_over_though_its_result_cannot_be_had(
    runs: ServerlessRuns, api: RunComfyServerless, deployment: ServerlessEmulator, answer: dict[str, Any]
) -> None:
    deployment.next_call("GET requests/*/result", times=None, **answer)
    task = asyncio.create_task(run(runs))
    await asyncio.sleep(10)
    (request_id,) = deployment.requests
    assert await api.cancel(Submitted(RequestId(request_id))) is True
    with pytest.raises(errors.PromptInterrupted):
        await asyncio.wait_for(task, 60)


async def test_a_result_that_stays_unknown_is_given_up(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.next_call("GET requests/*/result", status=404, times=None)
    with pytest.raises(errors.RequestNotFound):
        await asyncio.wait_for(run(runs), 900)


async def test_a_result_that_says_no_more_than_the_status_is_asked_for_again(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    def bare(answer: dict[str, Any]) -> dict[str, Any]:
        return {"request_id": answer["request_id"], "status": "completed"}

    deployment.next_call("GET requests/*/result", change=bare, times=3)
    assert set((await run(runs)).outputs) == {"flux", "mesh"}


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost", "502", "truncated", "reset"])
async def test_a_download_that_breaks_is_repeated(
    runs: ServerlessRuns, deployment: ServerlessEmulator, fault: str
) -> None:
    deployment.file_faults = [fault, fault]
    done = await run(runs)
    assert content(done.outputs["mesh"].path)[:4] == b"glTF"
    assert len(deployment.file_calls) == 4


async def test_a_page_in_the_place_of_a_file_is_fetched_once_more(
    runs: ServerlessRuns, deployment: ServerlessEmulator
) -> None:
    deployment.file_faults = ["html"]
    assert set((await run(runs)).outputs) == {"flux", "mesh"}


@pytest.mark.parametrize("how", ["html", "cut"])
async def test_a_result_that_is_broken_is_no_result(
    runs: ServerlessRuns, deployment: ServerlessEmulator, tmp_path: Path, how: str
) -> None:
    deployment.next_request(corrupt=how)
    with pytest.raises(errors.OutputCorrupt):
        await run(runs)
    assert [Path(name).stem for name in left(tmp_path / "out")] == ["rejected-1", "rejected-2"]


async def test_an_empty_result_is_no_result(runs: ServerlessRuns, deployment: ServerlessEmulator) -> None:
    deployment.next_request(corrupt="empty")
    with pytest.raises(errors.DownloadFailed, match="empty"):
        await run(runs)


@pytest.mark.parametrize(("fault", "kind"), [("404", errors.OutputMissing), ("redirect", errors.DownloadFailed)])
async def test_a_result_that_is_gone_or_elsewhere_is_told_at_once(
    runs: ServerlessRuns, deployment: ServerlessEmulator, fault: str, kind: type[RunComfyError]
) -> None:
    deployment.file_faults = [fault]
    with pytest.raises(kind):
        await run(runs)
    assert len(deployment.file_calls) == 1
    assert not [call for call in deployment.calls if "elsewhere" in call.path]


async def test_a_result_that_never_comes_is_given_up_in_time(
    deployment: ServerlessEmulator, settings: Settings, clock: LoopClock, tmp_path: Path
) -> None:
    deployment.file_faults = ["never"] * 10
    hurried = replace(settings.comfy, download_timeout=timedelta(seconds=40))
    async with RunComfyServerless(settings.serverless, settings.cloud, clock=clock, files=hurried) as api:
        with pytest.raises(errors.DownloadFailed, match="it took longer than 40 s"):
            await run(ServerlessRuns(api, DiskResults(settings.files), settings, clock))
    assert left(tmp_path / "out") == []


async def test_a_result_beyond_the_limit_is_not_kept(
    deployment: ServerlessEmulator, settings: Settings, clock: LoopClock, tmp_path: Path
) -> None:
    small = replace(settings.comfy, max_output_bytes=100)
    async with RunComfyServerless(settings.serverless, settings.cloud, clock=clock, files=small) as api:
        with pytest.raises(errors.DownloadFailed, match="larger than the 100 bytes"):
            await run(ServerlessRuns(api, DiskResults(settings.files), settings, clock))
    assert left(tmp_path / "out") == []
