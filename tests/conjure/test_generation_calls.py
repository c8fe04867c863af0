"""Generations by plain calls, in real time: beside an event loop, at Ctrl+C, after a fork, at a program's end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.conjure.engine import close_engines
from launcher.conjure.runs import KEPT_RUNS
from launcher.generation_services import (
    CloudGenerationService,
    LocalComfyUIService,
    LocalGenerationService,
    get_generation_service,
)
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served

ROOT = Path(__file__).resolve().parents[2]
FLUX = Path("data/generated_images/flux/flux.png")
RENDER = Path("data/generated_images/gestureCamera/render.png")


# -- the plain calls, in real time -----------------------------------------------------------------------------


@pytest.fixture
def own(project: Path) -> Iterator[InThread[ComfyUIEmulator]]:
    with served(lambda: ComfyUIEmulator(speed=50)) as running:
        yield running


@pytest.fixture
def engine(own: InThread[ComfyUIEmulator], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Services made without an engine share one, which is closed at the end."""
    monkeypatch.setenv("COMFYUI_AGENT_API_BASE_URL", own.emulator.url)
    yield
    close_engines()


@pytest.mark.usefixtures("engine")
def test_plain_calls_need_no_event_loop(own: InThread[ComfyUIEmulator]) -> None:
    service = get_generation_service("local_comfyui")
    assert service.is_available() is True
    picture = service.generate_flux_depth_image(str(RENDER), "a fox", seed=7, randomize_seed=False)
    mesh = get_generation_service("local_comfyui").generate_3d_model(picture["image_path"], seed=7)
    assert (picture["success"], mesh["success"], mesh["reused"]) == (True, True, True)
    assert own.call(lambda emulator: len(emulator.run_log)) == 1


@pytest.mark.looptime(False)  # a thread works while the loop's own beats are counted
@pytest.mark.usefixtures("engine")
async def test_plain_calls_work_inside_a_running_event_loop_and_from_its_threads(
    own: InThread[ComfyUIEmulator],
) -> None:
    service = get_generation_service("local_comfyui")
    assert service.generate_flux_depth_image(str(RENDER), "a fox", seed=7)["success"] is True
    beats = 0
    work = asyncio.create_task(asyncio.to_thread(service.generate_flux_depth_image, str(RENDER), "a fox", seed=8))
    while not work.done():
        await asyncio.sleep(0.01)
        beats += 1
    assert (await work)["success"] is True
    assert beats > 1
    assert isinstance(service, LocalComfyUIService)
    assert (await service.a_generate_flux_depth_image(str(RENDER), "a fox", seed=9))["success"] is True
    assert own.call(lambda emulator: len(emulator.run_log)) == 3


@pytest.mark.usefixtures("engine")
def test_an_engine_that_is_closed_ends_what_runs(own: InThread[ComfyUIEmulator]) -> None:
    own.call(lambda emulator: emulator.stall_node("3"))
    service, caught = get_generation_service("local"), []

    def call() -> None:
        try:
            service.generate_flux_depth_image(str(RENDER), "a fox", seed=7)
        except RunComfyError as error:
            caught.append(error.code)

    caller = threading.Thread(target=call)
    caller.start()
    deadline = time.monotonic() + 30
    while not own.call(lambda emulator: list(emulator.run_log)) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    close_engines()
    caller.join(timeout=30)
    assert caught == ["interrupted"]
    own.call(lambda emulator: emulator.release_node("3"))
    while own.call(lambda e: e.run_log[0].outcome) == "lost" and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert own.call(lambda emulator: emulator.run_log[0].outcome) == "interrupted"


def asked_to_stop(emulator: ComfyUIEmulator) -> bool:
    return any("interrupt" in request.path or "cancel" in request.path for request in emulator.requests)


@pytest.mark.usefixtures("engine")
def test_ctrl_c_ends_the_job_before_it_is_passed_on(own: InThread[ComfyUIEmulator]) -> None:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        pytest.skip("only the main thread can be interrupted")
    own.call(lambda emulator: emulator.stall_node("3"))

    def press() -> None:
        while not own.call(lambda emulator: list(emulator.run_log)):
            threading.Event().wait(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        until = time.monotonic() + 20
        while not own.call(asked_to_stop) and time.monotonic() < until:
            threading.Event().wait(0.02)
        own.call(lambda emulator: emulator.release_node("3"))

    finger = threading.Thread(target=press)
    finger.start()
    with pytest.raises(KeyboardInterrupt):
        get_generation_service("local").generate_flux_depth_image(str(RENDER), "a fox", seed=7)
    finger.join(timeout=30)
    deadline = time.monotonic() + 30
    while own.call(lambda e: e.run_log[0].outcome) == "lost" and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert own.call(lambda emulator: emulator.run_log[0].outcome) == "interrupted"


def test_without_a_comfyui_local_mode_says_so(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_AGENT_API_BASE_URL", "http://127.0.0.1:9")
    service = LocalGenerationService()
    able, why = service.availability()
    assert able is False
    assert "no ComfyUI answers" in why
    assert service.is_available() is False
    cloud_able, cloud_why = CloudGenerationService().availability()
    assert cloud_able is False
    assert "RUNCOMFY_USER_ID" in cloud_why


# -- whole programs --------------------------------------------------------------------------------------------


LEAVES_EARLY = """
import threading, time, urllib.request, json, os
from launcher.generation_services import get_generation_service
service = get_generation_service("cloud")
call = lambda: service.generate_flux_depth_image("data/generated_images/gestureCamera/render.png", "a fox", seed=7)
threading.Thread(target=call, daemon=True).start()
address = f"{os.environ['RUNCOMFY_API_BASE_URL']}/prod/api/users/{os.environ['RUNCOMFY_USER_ID']}/servers"
request = urllib.request.Request(address, headers={"Authorization": f"Bearer {os.environ['RUNCOMFY_API_TOKEN']}"})
while not json.load(urllib.request.urlopen(request)):
    time.sleep(0.05)
"""


def test_a_program_that_ends_in_the_middle_ends_its_machine(project: Path) -> None:
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        env = {**os.environ, **cloud.emulator.environment(), "PYTHONPATH": str(ROOT), "RUNCOMFY_POLL_INTERVAL": "0.1"}
        done = subprocess.run(
            [sys.executable, "-c", LEAVES_EARLY],
            check=False,
            env=env,
            cwd=project,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []


FORKS = """
import multiprocessing, sys
from pathlib import Path
from launcher.generation_services import get_generation_service
service = get_generation_service("local_comfyui")
picture = Path("data/generated_images/gestureCamera/render.png")

def call(told):
    told.put(service.generate_flux_depth_image(picture, "a fox", seed=7)["seed_used"])

seeds = multiprocessing.get_context("fork")
told = seeds.Queue()
call(told)
child = seeds.Process(target=call, args=(told,))
child.start()
print(told.get(timeout=60), told.get(timeout=60))
child.join(60)
sys.exit(child.exitcode if child.exitcode is not None else 9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked processes here")
def test_a_forked_process_has_an_engine_of_its_own(project: Path) -> None:
    with served(lambda: ComfyUIEmulator(speed=100)) as own:
        env = {**os.environ, "COMFYUI_AGENT_API_BASE_URL": own.emulator.url, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FORKS],
            check=False,
            env=env,
            cwd=project,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout.strip()) == (0, "7 7"), done.stderr


def test_results_of_runs_fill_neither_the_project_nor_the_disk(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with served(lambda: ComfyUIEmulator(speed=100)) as own:
        monkeypatch.setenv("COMFYUI_AGENT_API_BASE_URL", own.emulator.url)
        monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(state))
        monkeypatch.delenv("RUNCOMFY_OUTPUT_DIR", raising=False)
        service = get_generation_service("local_comfyui")
        try:
            first = service.generate_flux_depth_image(str(RENDER), "a fox", seed=1)
            runs = state / "conjure" / "runs"
            for number in range(KEPT_RUNS):
                (runs / f"later-{number}").mkdir()
            assert (runs / first["job_id"] / "mesh.glb").is_file()
            os.utime(runs / first["job_id"], (1, 1))
            assert service.generate_3d_model(str(FLUX), seed=1)["reused"] is True
            assert not (runs / first["job_id"]).exists()
            assert len(list(runs.iterdir())) == KEPT_RUNS
            assert sorted(each.name for each in project.iterdir()) == ["data"]
            monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "mine"))
            second = get_generation_service("local_comfyui").generate_flux_image("a fox", seed=2)
            assert (tmp_path / "mine" / second["job_id"] / "manifest.json").is_file()
        finally:
            close_engines()
