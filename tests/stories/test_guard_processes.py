"""
`kill -9` of whoever rented, with a cloud that ignores leases: the guard, a process of its own, ends the machine.

Real processes on the real clock. Each story has an emulated cloud of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from PIL import Image

from runcomfy.adapters.guard_process import start_guard
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import settings_for

pytestmark = [
    pytest.mark.processes,
    pytest.mark.looptime(False),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9 on Windows"),
]

PATIENCE = 100.0
"""Seconds after which something that should have happened did not; a busy machine is slow."""
LEASE = 6.0
PERIOD = 3.0
SLOW = 15.0
"""Seconds by which a busy computer may be late."""


@dataclass
class Story:
    """One emulated cloud and the folder of those who use it."""

    cloud: RunComfyEmulator
    folder: Path
    started: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    async def comfyctl(self, *arguments: str, fault: str = "") -> asyncio.subprocess.Process:
        """Start a command."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
        environment |= self.cloud.environment() | {
            "FAULT": fault,
            "RUNCOMFY_GUARD": "true",
            "RUNCOMFY_GUARD_PERIOD": str(PERIOD),
            "RUNCOMFY_RUN_LEASE": str(LEASE),
            "RUNCOMFY_STATE_DIR": str(self.state),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "RUNCOMFY_POLL_INTERVAL": "0.2",
            "RUNCOMFY_VISIBILITY_WINDOW": "2",
            "RUNCOMFY_REQUESTS_PER_SECOND": "50",
            "RUNCOMFY_BURST": "50",
            "NO_COLOR": "1",
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "runcomfy.cli.main",
            *arguments,
            cwd=self.folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.started.append(process)
        return process

    async def a_long_run(self) -> asyncio.subprocess.Process:
        """Start a run that takes longer than the story."""
        picture = self.folder / "in.png"
        Image.new("RGB", (32, 32), (200, 30, 60)).save(picture)
        graph = self.folder / "long.json"
        graph.write_text(
            '{"1": {"class_type": "ProbeSteps", "inputs": {"steps": 9000, "seconds_per_step": 0.05, "preview": false, '
            '"seed": 1}}, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "l"}}}'
        )
        return await self.comfyctl("run", str(graph), "--out", str(self.folder / "out"))

    def guards(self) -> list[psutil.Process]:
        """The guards that look after this story's state folder."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cmdline()[-1:] == ["guard"] and process.environ().get("RUNCOMFY_STATE_DIR") == str(
                    self.state
                ):
                    found.append(process)
        return found

    def log(self) -> str:
        """What the detached guard has said."""
        path = self.state / "logs" / "guard.log"
        return path.read_text() if path.exists() else ""


@asynccontextmanager
async def a_story(folder: Path) -> AsyncIterator[Story]:
    await asyncio.to_thread(folder.mkdir)
    async with RunComfyEmulator(boot_time=0.3, delete_takes=0.2, rate_limit=False, folder=folder / "machines") as cloud:
        story = Story(cloud, folder)
        try:
            yield story
        finally:
            for process in story.started:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            for guard in story.guards():  # started by this story, known by its folder
                with suppress(psutil.Error):
                    guard.kill()


async def until(happened: Callable[[], bool], what: str, story: Story) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while not await asyncio.to_thread(happened):  # noqa: ASYNC110 - other processes set no event of ours
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail(f"did not happen: {what}; the guard said: {story.log()}")


@pytest.mark.fault(23)
@pytest.mark.threat("S3")
async def test_a_dev_server_whose_starter_was_killed_is_ended_by_the_guard_it_had_started(tmp_path: Path) -> None:
    async with a_story(tmp_path / "story") as story:
        cloud = story.cloud
        cloud.next_machine(ignores_stop_time=True)
        start = await story.comfyctl(
            "dev", "start", "--no-interactive", "--duration", str(LEASE), fault="launch.ready:1:kill"
        )
        await start.wait()
        assert start.returncode == -signal.SIGKILL
        assert cloud.billing == cloud.launched
        [guard] = story.guards()
        assert cloud.token not in " ".join(guard.cmdline())
        await until(lambda: not cloud.alive, "the machine is ended", story)
        assert float(cloud.books[cloud.launched[0]].seconds) <= LEASE + PERIOD + SLOW
        await until(lambda: not story.guards(), "the guard leaves with the last machine", story)
        assert "it outlived its lease" in story.log()
        assert cloud.token not in story.log()


@pytest.mark.fault(23)
async def test_a_killed_runs_machine_is_ended_and_a_living_ones_is_not(tmp_path: Path) -> None:
    async with a_story(tmp_path / "story") as story:
        cloud = story.cloud
        for _ in range(2):
            cloud.next_machine(ignores_stop_time=True)
        living = await story.a_long_run()
        await until(lambda: len(cloud.billing) == 1, "the living run's machine is ready", story)
        [kept] = cloud.billing
        killed = await story.a_long_run()
        await until(lambda: len(cloud.billing) == 2, "the other run's machine is ready", story)
        guard = await story.comfyctl("guard", "--period", str(PERIOD))
        killed.kill()
        await until(lambda: cloud.billing == [kept], "the killed run's machine is ended", story)
        await asyncio.sleep(LEASE)
        assert cloud.billing == [kept]
        assert living.returncode is None
        assert guard.returncode is None
        living.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(living.wait(), timeout=PATIENCE) == 130
        assert await asyncio.wait_for(guard.wait(), timeout=PATIENCE) == 0
        assert cloud.alive == []


async def test_one_guard_is_enough(tmp_path: Path) -> None:
    async with a_story(tmp_path / "story") as story:
        cloud = story.cloud
        start = await story.comfyctl("dev", "start", "--no-interactive", "--duration", "600")
        assert await asyncio.wait_for(start.wait(), timeout=PATIENCE) == 0
        again = await story.comfyctl("dev", "start", "--no-interactive", "--duration", "600")
        assert await asyncio.wait_for(again.wait(), timeout=PATIENCE) == 0
        assert len(story.guards()) == 1
        second = await story.comfyctl("guard")
        out, _ = await asyncio.wait_for(second.communicate(), timeout=PATIENCE)
        assert second.returncode == 0
        assert "another guard looks after this account" in out.decode()
        stop = await story.comfyctl("dev", "shutdown")
        assert await asyncio.wait_for(stop.wait(), timeout=PATIENCE) == 0
        assert cloud.alive == []
        await until(lambda: not story.guards(), "the guard leaves", story)


def test_guards_that_were_killed_leave_nothing_in_the_process_table_of_who_started_them(tmp_path: Path) -> None:
    """A service lives for months, and starts another guard whenever one is gone."""
    settings = settings_for(CloudSettings(user_id="nobody", tokens=(Secret("none"),)), tmp_path / "state")
    (tmp_path / "state").mkdir()
    pids = []
    try:
        for _ in range(3):
            pid = start_guard(settings, "nobody")
            assert pid is not None
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                pass  # it is over in a moment, and nobody else takes note of its end
        assert [pid for pid in pids[:-1] if psutil.pid_exists(pid)] == []
    finally:
        for pid in pids:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
