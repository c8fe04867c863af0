"""The database between real processes: started at once, killed at any moment, on a disk that is full."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.machine import Machine, MachineState
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import NOW, ready


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "runcomfy.sqlite3"


def a_store(path: Path) -> SqlStore:
    return SqlStore(path, clock=LoopClock())


async def filled(path: Path) -> Machine:
    """Leave a database with one ready machine behind."""
    async with a_store(path) as store:
        return await ready(store)


CHILD: Final = """
import asyncio, os, sys
from datetime import UTC, datetime
from pathlib import Path
import runcomfy.testing.contracts.store as words
from runcomfy.adapters.stores.sql import SqlStore

class Wall:
    def now(self):
        return datetime.now(UTC)

async def main():
    store = SqlStore(Path(sys.argv[1]), clock=Wall())
    print("ready", flush=True)
    sys.stdin.readline()
    await store.open()
    {body}
    await store.close()

asyncio.run(main())
"""


def a_process(path: Path, body: str) -> subprocess.Popen[str]:
    """Start a process that waits, before it opens the store, for a line from us."""
    script = CHILD.format(body=body)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        assert heard(process) == "ready", process.communicate()[1]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


@pytest.mark.processes
@pytest.mark.fault(63)
async def test_four_processes_that_start_at_once_share_one_new_database(path: Path) -> None:
    body = "await words.ready(store, account='shared')"
    processes = [a_process(path, body) for _ in range(4)]
    let_go(processes)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    async with a_store(path) as store:
        assert len(await store.machines(provider="runcomfy", account="shared")) == 4
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM upgrades").fetchone() == (1,)


@pytest.mark.processes
async def test_four_processes_that_write_about_one_machine_lose_nothing(path: Path) -> None:
    machine = await filled(path)
    body = "\n    ".join(
        [
            "for number in range(25):",
            f"    await store.change('{machine.id}', at=words.NOW, by=str(os.getpid()), note=str(number))",
            "    await store.reserve_request('a', now=words.NOW, per_second=1, burst=5, reserve=2, urgent=False)",
        ]
    )
    processes = [a_process(path, body) for _ in range(4)]
    let_go(processes)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    async with a_store(path) as store:
        story = await store.story(machine.id)
        assert [step.number for step in story] == list(range(1, 104))
        for process in processes:
            mine = [step.note for step in story if step.by == str(process.pid)]
            assert mine == [str(number) for number in range(25)]
        wait = await store.reserve_request("a", now=NOW, per_second=1, burst=5, reserve=2, urgent=False)
        assert wait == timedelta(seconds=100 + 1 - 3)


@pytest.mark.processes
async def test_an_intent_outlives_the_process_that_is_killed_right_after(path: Path) -> None:
    body = "\n    ".join(
        [
            "await store.add_machine(words.a_machine(account='mine', reason='a job'), at=words.NOW, note='intent')",
            "print('written', flush=True)",
            "sys.stdin.readline()",
        ]
    )
    process = a_process(path, body)
    let_go([process])
    assert heard(process) == "written"
    process.kill()
    process.communicate(timeout=120)
    async with a_store(path) as store:
        [machine] = await store.machines(provider="runcomfy", account="mine")
        assert (machine.state, machine.reason) == (MachineState.REQUESTED, "a job")
        assert [step.note for step in await store.story(machine.id)] == ["intent"]


@pytest.mark.processes
async def test_a_process_that_is_killed_while_it_writes_leaves_whole_rows(path: Path) -> None:
    body = "\n    ".join(
        [
            "for number in range(100000):",
            "    await words.ready(store, account='mine')",
            "    print(number, flush=True)",
        ]
    )
    process = a_process(path, body)
    let_go([process])
    while heard(process) != "20":
        pass
    process.kill()
    process.communicate(timeout=120)
    async with a_store(path) as store:
        machines = await store.machines(provider="runcomfy", account="mine")
        assert len(machines) >= 21
        for machine in machines:
            assert (await store.story(machine.id))[-1].state == machine.state


@pytest.mark.processes
async def test_a_database_that_is_up_to_date_needs_no_migration_library(path: Path) -> None:
    await filled(path)
    process = a_process(path, "print('alembic' in sys.modules, flush=True)")
    let_go([process])
    assert heard(process) == "False"
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.processes
@pytest.mark.fault(54)
@pytest.mark.skipif(sys.platform != "linux", reason="only there one process can limit another one's files")
async def test_a_disk_that_is_full_from_the_start_leaves_no_half_made_database(path: Path) -> None:
    process = a_process(path, "")
    if sys.platform == "linux":
        resource = pytest.importorskip("resource")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    let_go([process])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "DiskFull" in errors
    assert (await filled(path)).state is MachineState.READY
