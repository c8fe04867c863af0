"""Programs that end in the middle of a job over `connect()` leave nothing behind that bills."""

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
from runcomfy.testing.in_thread import served

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import asyncio, json, os, signal, sys, threading, time, urllib.request
from runcomfy import connect

JOB = {"workflow": "generate_flux_mesh", "image": "render.png", "prompt": "a helmet", "seed": 7}

async def awaiting():
    async with connect() as comfy:
        print((await comfy.run(**JOB)).status, flush=True)

def waiting():
    with connect() as comfy:
        print(comfy.run(**JOB).status, flush=True)

def rented():
    address = f"{os.environ['RUNCOMFY_API_BASE_URL']}/prod/api/users/{os.environ['RUNCOMFY_USER_ID']}/servers"
    token = {"Authorization": f"Bearer {os.environ['RUNCOMFY_API_TOKEN']}"}
    return len(json.load(urllib.request.urlopen(urllib.request.Request(address, headers=token))))

def until(number):
    while rented() < number:
        time.sleep(0.05)
"""


def run(end: str, cloud: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    Image.linear_gradient("L").resize((96, 64)).save(folder / "render.png")
    environment = {**os.environ, **cloud.emulator.environment(), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + end],
        check=False,
        env={**environment, "RUNCOMFY_POLL_INTERVAL": "0.1", "COMFYUI_POLL_INTERVAL": "0.1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_jobs_of_daemon_threads_have_rented_is_ended_with_the_program(tmp_path: Path) -> None:
    end = """
threading.Thread(target=lambda: asyncio.run(awaiting()), daemon=True).start()
threading.Thread(target=waiting, daemon=True).start()
until(2)
"""
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, tmp_path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 2
        assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.campaign
@pytest.mark.parametrize("presses", [0, 1])
def test_what_a_loop_left_standing_had_begun_is_ended(tmp_path: Path, presses: int) -> None:
    """The stop that RunComfy refuses at first is tried on, also when Ctrl+C is pressed meanwhile; not a second time."""
    if presses and sys.platform == "win32":
        pytest.skip("signals of POSIX")
    end = f"""
PRESSES = {presses}

async def abandoned():
    comfy = await connect().__aenter__()
    job = comfy.start(**JOB)
    await asyncio.to_thread(until, 1)
    return comfy, job

loop = asyncio.new_event_loop()
kept = loop.run_until_complete(abandoned())

def press():
    for _ in range(PRESSES):
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=press, daemon=True).start()
"""
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        if presses:
            cloud.call(lambda c: c.next_call("DELETE servers/*", status=500, works=False, times=4))
        done = run(end, cloud, tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.campaign
def test_a_thread_whose_loop_stands_still_between_two_steps_works_to_its_end(tmp_path: Path) -> None:
    end = """
def by_steps():
    loop = asyncio.new_event_loop()

    async def begun():
        comfy = await connect().__aenter__()
        job = comfy.start(**JOB)
        await asyncio.to_thread(until, 1)
        return comfy, job

    async def awaited(comfy, job):
        print((await job).status, flush=True)
        await comfy.close()

    parts = loop.run_until_complete(begun())
    time.sleep(2)
    loop.run_until_complete(awaited(*parts))

threading.Thread(target=by_steps).start()
until(1)
"""
    with served(lambda: RunComfyEmulator(boot_time=0.5, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
        assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.campaign
@pytest.mark.parametrize("target", ["waiting", "lambda: asyncio.run(awaiting())"])
def test_a_thread_that_python_waits_for_can_work_to_its_end(tmp_path: Path, target: str) -> None:
    with served(lambda: RunComfyEmulator(boot_time=0.5, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(f"threading.Thread(target={target}).start(); until(1)", cloud, tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_the_moment_in_which_a_job_is_handed_over_lets_nothing_begin(tmp_path: Path) -> None:
    end = """
with connect() as comfy:
    comfy._loop.call_soon_threadsafe(time.sleep, 2)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        comfy.run(**JOB)
    except KeyboardInterrupt:
        print("cut", flush=True)
    time.sleep(2)
"""
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, tmp_path)
        assert (done.returncode, done.stdout.strip()) == (0, "cut"), done.stderr
        assert cloud.call(lambda c: list(c.launched)) == []


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_whose_handler_ends_the_program_ends_the_job_first(tmp_path: Path) -> None:
    end = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
threading.Thread(target=lambda: (until(1), os.kill(os.getpid(), {int(signal.SIGTERM)})), daemon=True).start()
waiting()
"""
    with served(lambda: RunComfyEmulator(boot_time=3600, delete_takes=0.1, rate_limit=False)) as cloud:
        done = run(end, cloud, tmp_path)
        assert done.returncode == 7, done.stderr
        assert len(cloud.call(lambda c: list(c.launched))) == 1
        assert cloud.call(lambda c: list(c.alive)) == []
