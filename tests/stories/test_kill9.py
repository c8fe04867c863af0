"""
`kill -9` at every step of a run and of a dev server's start, with real processes on the real clock (I20).

Each story has an emulated cloud of its own, a stranger's machine on it, and a living run beside the one that is killed.
Afterwards `comfyctl machines reap` in a new process ends exactly what the dead one left; the cloud's own books tell.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

pytestmark = [
    pytest.mark.processes,
    pytest.mark.looptime(False),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9 on Windows"),
]

PATIENCE = 100.0
"""Seconds after which something that should have happened did not; a busy machine is slow."""
STORIES = 4
"""How many stories of all the deaths happen at the same time."""


@dataclass
class Story:
    """One emulated cloud and the folder of those who use it."""

    cloud: RunComfyEmulator
    folder: Path

    async def comfyctl(self, *arguments: str, fault: str = "") -> asyncio.subprocess.Process:
        """Start a command."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
        environment |= self.cloud.environment() | {
            "FAULT": fault,
            "RUNCOMFY_STATE_DIR": str(self.folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "RUNCOMFY_POLL_INTERVAL": "0.2",
            "RUNCOMFY_VISIBILITY_WINDOW": "2",
            "RUNCOMFY_REQUESTS_PER_SECOND": "50",
            "RUNCOMFY_BURST": "50",
            "NO_COLOR": "1",
        }
        return await asyncio.create_subprocess_exec(
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

    async def run(self, workflow: str, *, fault: str = "") -> asyncio.subprocess.Process:
        """Start a run on a machine of its own."""
        image = self.folder / "in.png"
        if not image.exists():
            Image.new("RGB", (32, 32), (200, 30, 60)).save(image)
        options = ["--image", str(image)] if workflow == "image_invert" else []
        return await self.comfyctl("run", workflow, *options, "--out", str(self.folder / "out"), fault=fault)

    async def living_run(self) -> tuple[asyncio.subprocess.Process, str]:
        """Start a run that takes long, and return it with its machine once it is at work there."""
        graph = {
            "1": {
                "class_type": "ProbeSteps",
                "inputs": {"steps": 2400, "seconds_per_step": 0.05, "preview": False, "seed": 1},
            },
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "long"}},
        }
        path = self.folder / "long.json"
        path.write_text(json.dumps(graph))
        process = await self.run(str(path))
        await until(lambda: bool(self.cloud.billing), process, "the living run's machine is ready")
        return process, self.cloud.billing[0]

    def open_rows(self) -> list[tuple[str, str]]:
        """The machines that are open in our books: the provider's id and the state."""
        query = "SELECT server_id, state FROM machines WHERE state NOT IN ('stopped', 'never')"
        with closing(sqlite3.connect(self.folder / "state" / "runcomfy.sqlite3")) as database:
            return list(database.execute(query))


async def until(happened: Callable[[], bool], process: asyncio.subprocess.Process, what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            while not happened():
                assert process.returncode is None, f"{what}: {await _heard(process)}"
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"did not happen: {what}")


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def _heard(process: asyncio.subprocess.Process) -> str:
    _, err = await process.communicate()
    return err.decode()


@asynccontextmanager
async def a_story(folder: Path) -> AsyncIterator[Story]:
    await asyncio.to_thread(folder.mkdir)
    async with RunComfyEmulator(boot_time=0.3, delete_takes=0.2, rate_limit=False, folder=folder / "machines") as cloud:
        yield Story(cloud, folder)


# -- the ways to die ---------------------------------------------------------------------------------------

Killing = Callable[[Story, Sequence[str]], Any]


def at_point(point: str) -> Killing:
    """The process kills itself at a fault point."""

    async def kill(story: Story, command: Sequence[str]) -> None:
        process = await _start(story, command, fault=f"{point}:1:kill")
        code, _, err = await ended(process)
        assert code == -signal.SIGKILL, f"{point} was not reached: {err}"

    return kill


async def while_the_launch_is_under_way(story: Story, command: Sequence[str]) -> None:
    """Killed from outside when the cloud has started the machine and has not answered."""
    launched = len(story.cloud.launched)
    story.cloud.next_call("POST servers", delay=PATIENCE)
    process = await _start(story, command)
    await until(lambda: len(story.cloud.launched) > launched, process, "a machine is launched")
    process.kill()
    await process.wait()


async def while_the_machine_starts(story: Story, command: Sequence[str]) -> None:
    """Killed from outside while it waits."""
    story.cloud.next_machine(boot_time=1.5)
    calls = story.cloud.calls
    before = len(calls)
    process = await _start(story, command)
    await until(
        lambda: any(c.method == "GET" and c.path == f"servers/{story.cloud.launched[-1]}" for c in calls[before:]),
        process,
        "it asks for its machine's status",
    )
    process.kill()
    await process.wait()


async def while_the_stop_is_under_way(story: Story, command: Sequence[str]) -> None:
    """Killed from outside when the cloud has taken the stop and has not answered."""
    story.cloud.next_call("DELETE *", delay=PATIENCE)
    before = len(story.cloud.calls)
    process = await _start(story, command)
    await until(lambda: any(c.method == "DELETE" for c in story.cloud.calls[before:]), process, "a stop is asked for")
    process.kill()
    await process.wait()


async def _start(story: Story, command: Sequence[str], *, fault: str = "") -> asyncio.subprocess.Process:
    if command[0] == "run":
        return await story.run(command[1], fault=fault)
    return await story.comfyctl(*command, fault=fault)


RUN = ("run", "image_invert")
START = ("dev", "start", "--no-interactive")

DEATHS_OF_A_RUN: dict[str, Killing] = {
    "before the launch is sent": at_point("launch.intended"),
    "while the launch is under way": while_the_launch_is_under_way,
    "after the launch was answered": at_point("launch.answered"),
    "after the answer was written": at_point("launch.recorded"),
    "while the machine starts": while_the_machine_starts,
    "when it is ready": at_point("job.check"),
    "before the upload": at_point("job.upload"),
    "before the submit": at_point("job.submit"),
    "while it watches": at_point("job.execute"),
    "before the download": at_point("job.fetch"),
    "before the results are committed": at_point("job.commit"),
    "when everything is done": at_point("job.leave"),
    "before the stop is sent": at_point("stop.asked"),
    "while the stop is under way": while_the_stop_is_under_way,
    "after the stop was answered": at_point("stop.answered"),
}
DEATHS_OF_A_START: dict[str, Killing] = {
    "before the launch is sent": at_point("launch.intended"),
    "while the launch is under way": while_the_launch_is_under_way,
    "after the launch was answered": at_point("launch.answered"),
    "while the machine starts": while_the_machine_starts,
    "when it is ready": at_point("dev.ready"),
}


TELLING = {
    RUN: {"while the launch is under way", "while it watches"},
    START: {"when it is ready"},
}
"""Where a machine is unknown to the books, at work, and kept; all other points are those of `test_killpoints`."""


@pytest.mark.parametrize(
    ("steps", "stories"),
    [pytest.param(TELLING, 2, id="telling"), pytest.param(None, STORIES, id="all", marks=pytest.mark.campaign)],
)
async def test_whatever_the_killed_leave_is_ended_and_nothing_else(
    tmp_path: Path, steps: Mapping[Sequence[str], set[str]] | None, stories: int
) -> None:
    deaths = [
        (f"{' '.join(command[:2])}, {step}", kill, command)
        for command, kills in ((RUN, DEATHS_OF_A_RUN), (START, DEATHS_OF_A_START))
        for step, kill in kills.items()
        if steps is None or step in steps[command]
    ]
    assert steps is None or len(deaths) == sum(map(len, steps.values()))
    async with asyncio.TaskGroup() as group:
        for number in range(stories):
            group.create_task(_killed_and_reaped(tmp_path / f"story-{number}", deaths[number::stories]))


async def _killed_and_reaped(folder: Path, deaths: Sequence[tuple[str, Killing, Sequence[str]]]) -> None:
    """One cloud, one living run, a stranger's machine; and one process after the other that is killed."""
    async with a_story(folder) as story:
        stranger = story.cloud.foreign("medium")
        living, machine = await story.living_run()
        try:
            for step, kill, command in deaths:
                try:
                    await kill(story, command)
                    await _reaped(story, keeps=machine, leaves=stranger.server_id)
                except BaseException as error:
                    error.add_note(f"killed: {step}")
                    raise
            assert living.returncode is None
        finally:
            if living.returncode is None:
                living.send_signal(signal.SIGINT)
            code, _, err = await ended(living)
        assert code == 130, err  # Ctrl+C, in good order
        assert story.cloud.alive == []
        assert stranger.bills
        assert story.open_rows() == []


async def _reaped(story: Story, *, keeps: str, leaves: str) -> None:
    cloud = story.cloud
    before = {call.path for call in cloud.calls if call.method == "DELETE"}
    left = set(cloud.alive) - {keeps}
    code, out, err = await ended(await story.comfyctl("machines", "reap", "--json"))
    assert code == 0, err
    done = json.loads(out)
    assert left <= set(done["ended"]) <= set(cloud.launched) - {keeps}
    assert [kept["server_id"] for kept in done["kept"]] == [keeps]
    assert done["foreign"] == [leaves]
    assert (done["unresolved"], done["failed"]) == ([], [])
    assert cloud.alive == cloud.billing == [keeps]
    assert cloud.machines[leaves].bills
    assert [row[0] for row in story.open_rows()] == [keeps]
    asked = {call.path for call in cloud.calls if call.method == "DELETE"} - before
    assert asked <= {f"servers/{server_id}" for server_id in done["ended"]}
    cloud.behave()


@pytest.mark.parametrize("point", ["dev.published", "dev.up"])
async def test_a_start_that_is_killed_at_its_end_is_ended_or_kept_and_never_doubled(tmp_path: Path, point: str) -> None:
    async with a_story(tmp_path / "story") as story:
        await at_point(point)(story, START)
        code, _, err = await ended(await story.comfyctl(*START))
        assert code == 0, err
        assert len(story.cloud.launched) == 1
        code, _, err = await ended(await story.comfyctl("dev", "shutdown"))
        assert code == 0, err
        assert story.cloud.alive == []
        assert story.open_rows() == []


async def test_a_closed_terminal_ends_a_run_in_good_order(tmp_path: Path) -> None:
    async with a_story(tmp_path / "story") as story:
        living, _ = await story.living_run()
        assert living.stderr is not None
        living.stderr._transport.close()  # type: ignore[attr-defined] # nobody reads what it says any more
        living.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE):
            await living.wait()
        assert story.cloud.alive == []
        assert story.open_rows() == []
