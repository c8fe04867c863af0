"""
A command that is killed at any point and started again has lost nothing, doubled nothing, and lets nothing bill (I20).

Real processes, sockets and databases; the sweep of every point is `make killpoints`, here are the most telling ones.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.killpoints import sweep
from runcomfy.testing.forked import Commands
from runcomfy.testing.killpoints import READS, SCENES, VISITS, KillPoint, Stage, points_of, staged, tell

pytestmark = [
    pytest.mark.processes,
    pytest.mark.looptime(False),
    pytest.mark.skipif(sys.platform == "win32", reason="there is neither fork nor kill -9 on Windows"),
]

TELLING = (
    KillPoint("dev start", "provider.launch_machine.during"),
    KillPoint("execute", "jobs.finish.publish.after"),
    KillPoint("serve", "store.record.before"),
    KillPoint("serve", "provider.stop_machine.during"),
)
"""An unheard answer of a launch, names given and not committed, an answer not written down, an unheard stop."""


def test_points_are_what_lies_round_calls_that_leave_something_behind() -> None:
    passed = Counter(
        {"store.record.before": 5, "store.machines.before": 3, "launch.intended": 1, "provider.stop_machine.after": 1}
    )
    found = [str(point) for point in points_of("run", passed)]
    assert found == [
        "run: store.record.before",
        "run: store.record.before (2)",
        "run: launch.intended",
        "run: provider.stop_machine.after",
        "run: provider.stop_machine.during",
    ]
    assert VISITS == 2
    assert "store.machines" in READS


async def test_killed_at_the_most_telling_points_and_started_again(tmp_path: Path) -> None:
    async with Commands() as commands, asyncio.TaskGroup() as group:
        stories = [group.create_task(_told(commands, tmp_path / str(n), at)) for n, at in enumerate(TELLING)]
    assert [complaint for story in stories for complaint in story.result()] == []


async def _told(commands: Commands, folder: Path, at: KillPoint) -> list[str]:
    async with staged(commands, folder, "") as stage:
        told = await tell(SCENES[at.scene], stage, at)
    missed = [] if told.reached else ["was not reached"]
    return [f"{at}: {complaint}" for complaint in [*missed, *told.complaints]]


async def test_the_oracles_see_what_is_wrong(tmp_path: Path) -> None:
    """A machine that nobody knows of, and a job that was not done, are complained of."""
    async with Commands() as commands, staged(commands, tmp_path / "story", "") as stage:
        await stage.put(1)
        stage.cloud.next_machine(boot_time=0.0)
        said = await _with_a_machine_of_nobody(stage)
    assert any("1 machines are alive, not 0" in complaint for complaint in said)
    assert any("is pending" in complaint for complaint in said)
    assert any("0 prompts ran for 1 jobs" in complaint for complaint in said)


async def _with_a_machine_of_nobody(stage: Stage) -> list[str]:
    stage.cloud._launch("medium", 600, "version")
    return [*await stage.complaints(), *await stage.queue_complaints(1), *await stage.result_complaints()]


@pytest.mark.campaign
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
async def test_killed_at_every_point_of_a_dev_servers_start(database: str) -> None:
    """One scene of the sweep, whole, over both databases; `make killpoints` has them all."""
    [swept] = await sweep([database], "dev start: *")
    assert swept.told
    assert [(str(told.at), told.complaints) for told in swept.told if told.complaints] == []
