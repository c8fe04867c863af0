"""How generations end that do not just succeed: with a machine that may still run, without the caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image

from launcher.conjure.engine import DirectEngine
from launcher.generation_services import CloudGenerationService, LocalGenerationService
from runcomfy.bootstrap import App
from runcomfy.conjure.progress_tracker import progress_tracker
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

FLUX = Path("data/generated_images/flux/flux.png")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "CONJURE"
    root.mkdir()
    Image.radial_gradient("L").resize((128, 128)).convert("RGBA").save(root / "render.png")
    monkeypatch.chdir(root)


@pytest_asyncio.fixture
async def engine(
    cloud: RunComfyEmulator, clock: LoopClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DirectEngine]:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    async with App(clock=clock, overrides={"RUNCOMFY_STATE_DIR": str(tmp_path / "state")}) as app:
        yield DirectEngine(app)
        cloud.behave()


async def until(happened: Callable[[], bool]) -> None:
    for _ in range(1_000):
        if happened():
            return
        await asyncio.sleep(1)
    raise AssertionError("it never happened")


def works(cloud: RunComfyEmulator) -> bool:
    """Whether a machine works at a prompt."""
    return any(isinstance(m.comfyui, ComfyUIEmulator) and m.comfyui.run_log for m in cloud.machines.values())


def running() -> set[str]:
    return {each["prompt_id"] for each in progress_tracker.summaries() if each["status"] == "running"}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.fault(26)
async def test_results_that_are_whole_are_given_also_when_their_machine_may_still_run(
    cloud: RunComfyEmulator, engine: DirectEngine
) -> None:
    call = asyncio.create_task(
        CloudGenerationService(engine).a_generate_flux_depth_image("render.png", "a bronze statue", 7)
    )
    await until(lambda: works(cloud))
    cloud.revoke(1)
    answer = await call
    assert answer["success"] is True
    assert is_png(FLUX)
    assert "may still bill" in answer["warning"]
    shown = progress_tracker.get_workflow_summary(answer["job_id"])
    assert shown is not None
    assert (shown["status"], shown["prompt_id"]) == ("completed", answer["prompt_id"])
    assert progress_tracker.get_workflow_summary(answer["prompt_id"]) == shown


async def test_a_generation_that_nobody_waits_for_any_more_is_not_shown_as_running(clock: LoopClock) -> None:
    async with ComfyUIEmulator() as comfyui, App(clock=clock, queue={"api_base_url": comfyui.url}) as app:
        comfyui.stall_node("3")
        service = LocalGenerationService(DirectEngine(app))
        call = asyncio.create_task(service.a_generate_flux_depth_image("render.png", "a bronze statue", 7))
        await until(lambda: bool(comfyui.run_log))
        before = running()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(before - running()) == 1
