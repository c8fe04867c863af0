"""Programs that end in the middle of a call under CONJURE's names leave nothing behind that bills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.emulators.serverless import ServerlessEmulator
from runcomfy.testing.in_thread import served

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, json, os, sys, threading, time, urllib.request
from runcomfy.runcomfy_orchestrator import RunComfyOrchestrator
from runcomfy.runcomfy_client import RunComfyAPIClient
from runcomfy.serverless_client import ServerlessRunComfyClient

async def generate():
    job = await RunComfyOrchestrator().execute_flux_mesh_generation()
    print(job.status.value, job.error_message, flush=True)

async def rent():
    await RunComfyAPIClient().get_or_create_ready_machine()

async def abandoned():
    asyncio.create_task(generate())  # and then its loop stands still
    while not os.path.exists("go"):
        await asyncio.sleep(0.05)

def begun():
    address = f"{os.environ['RUNCOMFY_API_BASE_URL']}/prod/api/users/{os.environ['RUNCOMFY_USER_ID']}/servers"
    token = {"Authorization": f"Bearer {os.environ['RUNCOMFY_API_TOKEN']}"}
    return json.load(urllib.request.urlopen(urllib.request.Request(address, headers=token)))

def wait():
    while not begun():
        time.sleep(0.05)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "CONJURE"
    render = root / "data/generated_images/gestureCamera/render.png"
    render.parent.mkdir(parents=True)
    Image.linear_gradient("L").resize((96, 64)).convert("RGBA").save(render)
    prompt = root / "data/generated_text/userPrompt.txt"
    prompt.parent.mkdir(parents=True)
    prompt.write_text("a helmet of polished steel", encoding="utf-8")
    return root


def environment(cloud: Any) -> dict[str, str]:
    return {**os.environ, **cloud.emulator.environment(), "PYTHONPATH": str(ROOT), "RUNCOMFY_POLL_INTERVAL": "0.1"}


def run(end: str, cloud: Any, project: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + end],
        check=False,
        env=environment(cloud),
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("call", ["generate", pytest.param("rent", marks=pytest.mark.campaign)])
def test_what_a_daemon_thread_has_rented_is_ended_with_the_program(project: Path, call: str) -> None:
    end = f"threading.Thread(target=lambda: asyncio.run({call}()), daemon=True).start(); wait()"
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, project)
        assert done.returncode == 0, done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.campaign
def test_a_thread_that_python_waits_for_can_work_to_its_end(project: Path) -> None:
    end = "threading.Thread(target=lambda: asyncio.run(generate())).start(); wait()"
    with served(lambda: RunComfyEmulator(boot_time=0.5, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, project)
        assert (done.returncode, done.stdout.strip()) == (0, "completed None"), done.stderr
        assert (project / "data/generated_images/flux/flux.png").is_file()
        assert cloud.call(lambda c: list(c.alive)) == []


def test_what_a_loop_left_standing_had_begun_is_ended(project: Path) -> None:
    end = """
loop = asyncio.new_event_loop()
threading.Thread(target=lambda: (wait(), open("go", "w").close())).start()
loop.run_until_complete(abandoned())
"""
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, project)
        assert done.returncode == 0, done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_while_python_waits_for_a_thread_ends_its_machine(project: Path) -> None:
    end = (
        "threading.Thread(target=lambda: asyncio.run(generate())).start(); wait();"
        " threading.Timer(0.5, lambda: print('waits', flush=True)).start()"
    )
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM + end],
            env=environment(cloud),
            cwd=project,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline().strip() == "waits"
                process.send_signal(signal.SIGINT)
                process.wait(120)
            finally:
                process.kill()
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []


def test_a_serverless_request_of_a_daemon_thread_is_cancelled(project: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (10, 20, 30)).save(project / "render.png")
    folder = tmp_path / "cloud"
    end = """
async def client():
    service = ServerlessRunComfyClient()
    asked = await service.submit_request("a cat", "render.png", 5)
    print("begun", flush=True)
    await service.wait_for_completion(asked.request_id)

threading.Thread(target=lambda: asyncio.run(client()), daemon=True).start()
while not os.path.exists("go"):
    time.sleep(0.05)
"""
    with served(lambda: ServerlessEmulator(cold_start=0.05, comfyui_speed=10_000, folder=folder)) as cloud:
        cloud.call(lambda c: c.next_request(never_ends=True))
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM + end],
            env=environment(cloud),
            cwd=project,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline().strip() == "begun"
                (project / "go").touch()
                assert process.wait(120) == 0
            finally:
                process.kill()
        (request,) = cloud.call(lambda c: list(c.requests.values()))
        assert request.state == "canceled"
