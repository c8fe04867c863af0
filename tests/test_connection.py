"""`runcomfy.connect()`: jobs from programs, async and sync, watched and taken back."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runcomfy
from runcomfy import Progress, RunComfyError
from runcomfy.connection import RUN_OPTIONS, Connection
from runcomfy.domain.exceptions import Interrupted, JobTimeout, NodeFailed, PreflightFailed
from runcomfy.domain.progress import Step
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served

CANVAS = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}}


def graph(class_type: str, /, **inputs: Any) -> dict[str, Any]:
    return {
        "1": CANVAS,
        "2": {"class_type": class_type, "inputs": {"image": ["1", 0], **inputs}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "made"}},
    }


SLOW = graph("EmulatorDelay", seconds=100.0, steps=100, previews=True, seed=1)
BROKEN = graph("EmulatorFail", message="on purpose", kind="error", steps=4, at_step=2)


@pytest.fixture
async def server() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as running:
        yield running


@pytest.fixture
async def comfy(server: ComfyUIEmulator, tmp_path: Path) -> AsyncIterator[Connection]:
    async with runcomfy.connect(server_url=server.url, RUNCOMFY_OUTPUT_DIR=str(tmp_path / "out")) as connection:
        yield connection


async def test_a_job_brings_verified_files(comfy: Connection, picture: Path, tmp_path: Path) -> None:
    result = await comfy.run("image_invert", image=picture, out_dir=tmp_path / "mine", convert="webp")
    (output,) = result.outputs
    assert (result.status, result.exit_code, result.error) == ("done", 0, None)
    with Image.open(output.path) as inverted:
        assert inverted.format == "WEBP"
    assert Path(output.path).is_relative_to(tmp_path / "mine")


async def test_a_graph_may_be_given_as_it_is_with_values_of_python(comfy: Connection) -> None:
    save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}
    result = await comfy.run({"1": CANVAS, "3": save}, sets={"1.width": 40, "EmptyImage.height": 30})
    with Image.open(result.outputs[0].path) as made:
        assert made.size == (40, 30)


async def test_a_failed_job_raises_its_error_or_returns_it(comfy: Connection) -> None:
    with pytest.raises(NodeFailed, match="on purpose"):
        await comfy.run(BROKEN)
    result = await comfy.run(BROKEN, check=False)
    assert (result.status, result.exit_code) == ("failed", 5)
    assert result.error is not None
    assert result.error["code"] == "node-failed"
    with pytest.raises(PreflightFailed):
        await comfy.run(graph("NoSuchNode"))


@pytest.mark.parametrize("timeout", ["2s", 2, 2.0, timedelta(seconds=2)])
async def test_a_timeout_may_be_written_in_any_way(timeout: Any, comfy: Connection) -> None:
    with pytest.raises(JobTimeout):
        await comfy.run(SLOW, timeout=timeout)


async def test_progress_is_called_back_and_never_goes_back(comfy: Connection) -> None:
    seen: list[Progress] = []
    await comfy.run(SLOW, on_progress=seen.append)
    percents = [p.percent for p in seen if p.step is Step.RUNNING]
    assert percents == sorted(percents)
    assert len(set(percents)) > 50
    assert {p.node_title for p in seen} >= {"EmptyImage", "EmulatorDelay", "SaveImage"}
    assert any(p.value == 50 and p.maximum == 100 for p in seen)
    assert any(p.preview for p in seen)
    assert seen[-1].step is Step.FINISHED


async def test_progress_can_be_iterated_over(comfy: Connection) -> None:
    job = comfy.start(SLOW)
    seen = [progress async for progress in job]
    result = await job
    assert result.status == "done"
    assert seen[-1].step is Step.FINISHED
    assert {p.step for p in seen} >= {Step.CHECKING, Step.RUNNING, Step.FETCHING}


async def test_somebody_who_reads_slowly_gets_the_newest_news(comfy: Connection) -> None:
    job = comfy.start(graph("EmulatorDelay", seconds=1000.0, steps=1000, previews=False, seed=1))
    result = await job
    seen = [progress async for progress in job]
    assert result.status == "done"
    assert len(seen) <= 256
    assert seen[-1].step is Step.FINISHED


async def test_a_cancelled_job_interrupts_its_prompt(comfy: Connection, server: ComfyUIEmulator) -> None:
    job = comfy.start(SLOW)
    async for progress in job:
        if progress.percent > 40:
            job.cancel()
    with pytest.raises(Interrupted):
        await job
    await asyncio.sleep(2)  # its node looks up at the next step
    assert server.run_log[-1].outcome == "interrupted"


async def test_an_awaiting_task_that_is_cancelled_takes_its_job_along(
    comfy: Connection, server: ComfyUIEmulator
) -> None:
    task = asyncio.create_task(comfy.run(SLOW))
    await asyncio.sleep(20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(2)
    assert server.run_log[-1].outcome == "interrupted"


async def test_a_job_that_nobody_awaits_is_ended_with_the_block(server: ComfyUIEmulator, tmp_path: Path) -> None:
    async with runcomfy.connect(server_url=server.url, RUNCOMFY_OUTPUT_DIR=str(tmp_path / "out")) as comfy:
        job = comfy.start(SLOW)
        await asyncio.sleep(20)
        comfy.start(SLOW, sets={"2.seed": 2})  # handed over just now
    with pytest.raises(Interrupted):
        await job
    await asyncio.sleep(2)
    assert [record.outcome for record in server.run_log] == ["interrupted"]


async def test_whoever_waits_only_for_the_end_of_a_job_hears_nothing_of_how_it_ended(comfy: Connection) -> None:
    broken = comfy.start(BROKEN)
    await broken.ended()
    with pytest.raises(NodeFailed):
        await broken
    slow = comfy.start(SLOW)
    awaiting = asyncio.ensure_future(slow)
    await asyncio.sleep(5)
    awaiting.cancel()
    await slow.ended()
    with pytest.raises(asyncio.CancelledError):
        await slow


async def test_jobs_run_side_by_side(comfy: Connection) -> None:
    results = await asyncio.gather(*(comfy.run(SLOW, sets={"2.seed": n, "2.seconds": 1}) for n in range(5)))
    assert len({result.outputs[0].path for result in results}) == 5


async def test_a_mistyped_option_is_refused(comfy: Connection) -> None:
    with pytest.raises(TypeError, match="promt"):
        comfy.start("image_invert", promt="x")


async def test_a_setting_that_is_none_is_refused(server: ComfyUIEmulator) -> None:
    with pytest.raises(RunComfyError):
        async with runcomfy.connect(server_url=server.url, RUNCOMFY_POLL_INTERVAL="often"):
            pytest.fail("it opened")


# -- the sync form -------------------------------------------------------------------------------------------


@pytest.fixture
def served_comfyui() -> Iterator[InThread[ComfyUIEmulator]]:
    with served(lambda: ComfyUIEmulator(speed=100)) as running:
        yield running


def test_the_sync_form_needs_no_loop(served_comfyui: InThread[ComfyUIEmulator], picture: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with runcomfy.connect(server_url=served_comfyui.emulator.url, RUNCOMFY_OUTPUT_DIR=str(tmp_path)) as comfy:
        result = comfy.run("image_invert", image=picture, on_progress=seen.append)
        with pytest.raises(NodeFailed):
            comfy.run(BROKEN)
    assert result.status == "done"
    assert seen[-1].step is Step.FINISHED


def test_a_job_of_another_thread_is_ended_with_the_block(
    served_comfyui: InThread[ComfyUIEmulator], tmp_path: Path
) -> None:
    begun = threading.Event()
    ends: list[Interrupted] = []

    def working() -> None:
        try:
            comfy.run(graph("EmulatorDelay", seconds=6_000.0, steps=6_000, previews=False, seed=1), on_progress=heard)
        except Interrupted as error:
            ends.append(error)

    def heard(progress: Progress) -> None:
        if progress.step is Step.RUNNING:
            begun.set()

    with runcomfy.connect(server_url=served_comfyui.emulator.url, RUNCOMFY_OUTPUT_DIR=str(tmp_path)) as comfy:
        thread = threading.Thread(target=working, daemon=True)
        thread.start()
        assert begun.wait(60)
    thread.join(60)
    assert len(ends) == 1


async def test_the_sync_form_works_in_a_running_loop(
    served_comfyui: InThread[ComfyUIEmulator], picture: Path, tmp_path: Path
) -> None:
    with runcomfy.connect(server_url=served_comfyui.emulator.url, RUNCOMFY_OUTPUT_DIR=str(tmp_path)) as comfy:
        assert comfy.run("image_invert", image=picture).status == "done"


def test_settings_that_are_wrong_are_raised_where_the_block_begins() -> None:
    with pytest.raises(RunComfyError), runcomfy.connect(RUNCOMFY_POLL_INTERVAL="often"):
        pytest.fail("it opened")


def test_a_machine_of_its_own_is_gone_afterwards(picture: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with served(lambda: RunComfyEmulator(boot_time=0.2, delete_takes=0.1, rate_limit=False)) as cloud:
        settings: dict[str, Any] = {
            **cloud.emulator.environment(),
            "RUNCOMFY_POLL_INTERVAL": "0.1",
            "RUNCOMFY_MAX_RETRIES": "1",
            "RUNCOMFY_OUTPUT_DIR": str(tmp_path),
        }
        cloud.call(lambda c: c.next_call("DELETE servers/*", status=503, times=5))
        with runcomfy.connect(tell=told.append, **settings) as comfy:
            result = comfy.run("image_invert", image=picture)
        assert cloud.call(lambda c: list(c.alive)) == []
    assert result.cost_usd > 0
    assert any("trying again" in sentence for sentence in told)


def test_start_takes_what_run_takes() -> None:
    options = set(inspect.signature(Connection.run).parameters) - {"self", "workflow", "on_progress", "check"}
    assert options == set(RUN_OPTIONS)
