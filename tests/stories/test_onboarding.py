"""
The guide's path, through the real commands, on the real clock: a folder, a job file, a database that tells.

ComfyUI is emulated, in this process; everything else is started as users start it, in a folder of its own. The same
stories are told over the project's SQLite file and over PostgreSQL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

pytestmark = [
    pytest.mark.processes,
    pytest.mark.looptime(False),
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send"),
]

PATIENCE = 100.0
"""Seconds after which something that should have happened did not; a busy machine is slow."""

KNIGHT = "T2I_20250809123001_1_knight.yaml"
JOB_FILE = """\
job_type: T2I
workflow_id: wf_realistic_portrait
priority: 20
inputs:
  prompt: "Ultra-realistic portrait of a medieval knight in rain, cinematic lighting"
  seed: 123456
  steps: 30
outputs:
  file_path: "jobs/finished/image/T2I_20250809123001_1_knight.png"
metadata:
  creator: "cli"
  version: "1.0"
"""
GLOBAL_CONFIG = """\
default_priority: 50
retry_limit: 2            # global default; can be overridden per job (DB column)
poll_interval_ms: 1000

paths:
  jobs_processing: "jobs/processing"
  jobs_finished: "jobs/finished"
  database: "database/comfyui_agent.db"

comfyui:
  api_base_url: "{url}"
  timeout_seconds: 300
"""
WORKFLOWS = """\
wf_realistic_portrait:
  template_path: "workflows/wf_realistic_portrait.json"
  required_inputs: ["prompt", "seed", "steps"]
wf_fails:
  template_path: "workflows/wf_fails.json"
  required_inputs: []
wf_slow:
  template_path: "workflows/wf_slow.json"
  required_inputs: ["seconds"]
  inputs: {seconds: 1.seconds_per_step}
"""
FAILS: dict[str, Any] = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {
        "class_type": "EmulatorFail",
        "inputs": {"image": ["1", 0], "message": "on purpose", "kind": "error", "steps": 4, "at_step": 2},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "fails"}},
}
SLOW: dict[str, Any] = {
    "1": {
        "class_type": "ProbeSteps",
        "inputs": {"steps": 10, "seconds_per_step": 0.1, "preview": False, "seed": 1},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "slow"}},
}

# The guide's statements, as it has them.
PENDING = "SELECT id, config_name, priority FROM jobs WHERE status='pending' ORDER BY priority, id;"
PROCESSING = "SELECT id, config_name, worker_id, lease_expires_at FROM jobs WHERE status='processing';"
FINISHED = "SELECT id, config_name, duration FROM jobs WHERE status='done' ORDER BY end_time DESC LIMIT 20;"
FAILURES = """SELECT id, config_name, retries_attempted, run_count, error_trace
FROM jobs
WHERE status='failed'
ORDER BY end_time DESC;"""
EXCEEDED = """SELECT id, config_name, retries_attempted, COALESCE(retry_limit, 2) AS limit_used
FROM jobs
WHERE status='failed' AND retries_attempted >= COALESCE(retry_limit, 2);"""
ORPHANS = """UPDATE jobs
SET status='pending', worker_id=NULL, lease_expires_at=NULL
WHERE status='processing' AND lease_expires_at < CURRENT_TIMESTAMP;"""


@dataclass
class Project:
    """A user's folder, and the programs started in it."""

    folder: Path
    dsn: str | None
    """Of the PostgreSQL it works with; None: its own file."""
    comfyui: ComfyUIEmulator
    started: list[asyncio.subprocess.Process] = field(default_factory=list)

    def environment(self, **more: str) -> dict[str, str]:
        """What the programs get, and nothing of the tests' own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
        kept |= {
            "RUNCOMFY_STATE_DIR": str(self.folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "COMFYUI_AGENT_BACKOFF_FIRST_SECONDS": "0.05",
            "COMFYUI_AGENT_STABLE_MS": "50",
            "NO_COLOR": "1",
        }
        if self.dsn is not None:
            kept["COMFYUI_AGENT_DATABASE"] = self.dsn
        return kept | more

    async def start(self, *words: str, **environment: str) -> asyncio.subprocess.Process:
        """Start `python -m …`."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *words,
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    async def say(self, *words: str) -> tuple[int, str]:
        """Run a command to its end; returns its exit code and everything it printed."""
        process = await self.start(*words)
        out = await heard(process)
        assert "Traceback" not in out, out
        return process.returncode or 0, out

    async def e3(self, *words: str) -> str:
        """Run `e3`, which must work."""
        code, out = await self.say("comfyui_agent", *words)
        assert code == 0, out
        return out

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        """Have the database answer, as a user with SQL asks it."""
        if self.dsn is None:
            with closing(sqlite3.connect(self.folder / "database" / "comfyui_agent.db")) as database, database:
                return list(database.execute(statement))
        import psycopg

        with psycopg.connect(self.dsn, autocommit=True) as server:
            answer = server.execute(statement.encode())
            return list(answer.fetchall()) if answer.description is not None else []

    def status(self, name: str) -> str | None:
        """What the database says of a job."""
        if self.dsn is None and not (self.folder / "database" / "comfyui_agent.db").exists():
            return None
        try:
            found = self.ask(f"SELECT status FROM jobs WHERE config_name='{name}'")  # noqa: S608 - a name of ours
        except sqlite3.OperationalError:
            return None  # the file is being made
        return str(found[0][0]) if found else None

    def drop(self, name: str, text: str, kind: str = "image") -> None:
        """Drop a job file."""
        (self.folder / "jobs" / "processing" / kind / name).write_text(text, encoding="utf-8")

    async def until(self, happened: Callable[[], object], what: str) -> None:
        """Wait for something, as long as every program lives."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not happened():  # noqa: ASYNC110 - what is waited for happens in another process
                    await asyncio.sleep(0.02)
        except TimeoutError:
            told = [await killed(process) for process in self.started if process.returncode is None]
            pytest.fail(f"did not happen: {what}\n" + "\n---\n".join(told))


async def heard(process: asyncio.subprocess.Process) -> str:
    async with asyncio.timeout(PATIENCE):
        out, _ = await process.communicate()
    return out.decode()


async def killed(process: asyncio.subprocess.Process) -> str:
    process.kill()
    return await heard(process)


async def ended(process: asyncio.subprocess.Process) -> str:
    """Send SIGTERM; the program must end with 0. Returns what it said."""
    process.send_signal(signal.SIGTERM)
    out = await heard(process)
    assert process.returncode == 0, out
    assert "Traceback" not in out, out
    return out


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.campaign)])
def dsn(request: pytest.FixtureRequest) -> str | None:
    """Which database the story is told over."""
    return str(request.getfixturevalue("postgres_dsn")) if request.param == "postgres" else None


@pytest_asyncio.fixture
async def comfyui() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator(speed=20) as server:
        yield server


@pytest_asyncio.fixture
async def bare(tmp_path: Path, dsn: str | None, comfyui: ComfyUIEmulator) -> AsyncIterator[Project]:
    """An empty folder."""
    folder = tmp_path / "E3"
    folder.mkdir()
    project = Project(folder, dsn, comfyui)
    yield project
    for process in project.started:
        if process.returncode is None:
            await killed(process)


@pytest.fixture
def project(bare: Project) -> Project:
    """The guide's folders, made by hand, with its two configuration files and three workflows."""
    for place in ("processing", "finished"):
        for kind in ("image", "video", "audio", "speech", "3d"):
            (bare.folder / "jobs" / place / kind).mkdir(parents=True)
    for name in ("comfyui_agent/config", "comfyui_agent/utils", "database", "workflows"):
        (bare.folder / name).mkdir(parents=True)
    config = bare.folder / "comfyui_agent" / "config"
    (config / "global_config.yaml").write_text(GLOBAL_CONFIG.format(url=bare.comfyui.url), encoding="utf-8")
    (config / "workflows.yaml").write_text(WORKFLOWS, encoding="utf-8")
    (bare.folder / "workflows" / "wf_fails.json").write_text(json.dumps(FAILS), encoding="utf-8")
    (bare.folder / "workflows" / "wf_slow.json").write_text(json.dumps(SLOW), encoding="utf-8")
    return bare


def job(workflow: str, name: str, **more: object) -> str:
    facts = {
        "job_type": "T2I",
        "workflow_id": workflow,
        "inputs": {},
        "outputs": {"file_path": f"jobs/finished/image/{name}.png"},
        **more,
    }
    return json.dumps(facts)  # which is YAML, too


# -- the stories ---------------------------------------------------------------------------------------------


async def test_the_guide_from_an_empty_folder_to_the_finished_picture(project: Project) -> None:
    agent = await project.start("comfyui_agent.run")
    project.drop(KNIGHT, JOB_FILE)
    await project.until(lambda: project.status(KNIGHT), "the job is in the database")
    await project.until(lambda: project.status(KNIGHT) == "done", "the job is done")

    with Image.open(project.folder / "jobs" / "finished" / "image" / "T2I_20250809123001_1_knight.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    assert project.ask(
        "SELECT job_type, workflow_id, priority, retries_attempted, run_count, retry_limit FROM jobs"
    ) == [("T2I", "wf_realistic_portrait", 20, 0, 1, None)]
    assert project.ask(PENDING) == project.ask(PROCESSING) == project.ask(FAILURES) == project.ask(EXCEEDED) == []
    project.ask(ORPHANS)
    assert project.status(KNIGHT) == "done"
    ((number, name, duration),) = project.ask(FINISHED)
    assert (number, name) == (1, KNIGHT)
    assert duration > 0
    assert json.loads(str(project.ask("SELECT metadata FROM jobs")[0][0]).replace("'", '"')) == {
        "creator": "cli",
        "version": "1.0",
    }

    shown = await project.e3("queue", "ls")
    assert KNIGHT in shown
    assert "0 pending, 0 processing, 1 done, 0 failed" in shown
    assert "1 executor works on the queue" in shown
    status = json.loads(await project.e3("status", "--json"))
    assert [worker["pid"] for worker in status["workers"]] == [agent.pid]
    assert status["planner"] == status["workers"][0]["worker_id"]
    assert f"process {agent.pid} watches " in status["monitor"]
    assert f"process {agent.pid} watches " in await project.e3("status")

    said = await ended(agent)
    assert f"{KNIGHT}: in the queue" in said
    assert f"{KNIGHT}: taken up (T2I, wf_realistic_portrait, priority 20)" in said
    assert f"{KNIGHT}: done in" in said
    assert "T2I_20250809123001_1_knight.png" in said
    assert "nobody works on the queue" in await project.e3("queue", "ls")
    assert len(project.comfyui.run_log) == 1


async def test_init_makes_a_project_in_which_the_same_works(bare: Project) -> None:
    await bare.e3("init")
    config = bare.folder / "comfyui_agent" / "config" / "global_config.yaml"
    assert config.is_file()
    address = {"COMFYUI_AGENT_API_BASE_URL": bare.comfyui.url}
    bare.drop(KNIGHT, JOB_FILE)
    agent = await bare.start("comfyui_agent.run", "--once", **address)
    said = await heard(agent)
    assert agent.returncode == 0, said
    assert bare.status(KNIGHT) == "done"
    assert (bare.folder / "jobs" / "finished" / "image" / "T2I_20250809123001_1_knight.png").is_file()
    text = config.read_text(encoding="utf-8")
    config.write_text(text + "# mine\n", encoding="utf-8")
    await bare.say("comfyui_agent", "init")
    assert config.read_text(encoding="utf-8").endswith("# mine\n"), "what is there is left alone"


async def test_two_programs_obey_priorities_age_and_sql(project: Project) -> None:
    monitor = await project.start("comfyui_agent.monitor")
    names = [f"T2I_2025_{number}_{letter}.yaml" for number, letter in enumerate("abcd", 1)]
    for name in names:
        project.drop(name, job("wf_slow", Path(name).stem, inputs={"seconds": 0.01}))
        await project.until(lambda name=name: project.status(name), f"{name} is in the database")  # type: ignore[misc]
    await project.e3("queue", "god-mode", names[3])
    project.ask(f"UPDATE jobs SET priority=2 WHERE config_name='{names[2]}'")  # noqa: S608 - a name of ours
    assert [row[1] for row in project.ask(PENDING)] == [names[3], names[2], names[0], names[1]]

    executor = await project.start("comfyui_agent.execute")
    await project.until(lambda: len(project.ask(FINISHED)) == 4, "all four are done")
    told = await project.e3("queue", "events", "--json")
    claimed = [event["job_id"] for event in map(json.loads, told.splitlines()) if event["kind"] == "claimed"]
    assert claimed == [4, 3, 1, 2]
    assert "4 done" in await ended(monitor) or project.status(names[0]) == "done"
    await ended(executor)


async def test_a_failing_job_has_three_runs_and_three_more_by_retry(project: Project) -> None:
    agent = await project.start("comfyui_agent.run")
    project.drop("T2I_1_1_fails.yaml", job("wf_fails", "fails"))
    await project.until(lambda: project.status("T2I_1_1_fails.yaml") == "failed", "it has failed")
    ((number, name, retries, runs, trace),) = project.ask(FAILURES)
    assert (number, name, retries, runs) == (1, "T2I_1_1_fails.yaml", 2, 3)
    assert "on purpose" in trace
    assert project.ask(EXCEEDED) == [(1, "T2I_1_1_fails.yaml", 2, 2)]
    assert not list((project.folder / "jobs" / "finished" / "image").iterdir())

    await project.e3("retry", "T2I_1_1_fails.yaml")
    await project.until(
        lambda: project.ask("SELECT status, run_count, retries_attempted FROM jobs") == [("failed", 6, 2)],
        "it has failed three times more",
    )
    shown = await project.e3("queue", "show", "T2I_1_1_fails.yaml")
    assert shown.count("attempt ") == 6
    assert "tried again in" in await ended(agent)


@pytest.mark.fault(61)
async def test_stopped_in_the_middle_the_next_start_goes_on_with_the_same_prompt(project: Project) -> None:
    agent = await project.start("comfyui_agent.run", COMFYUI_AGENT_DRAIN_SECONDS="0")
    project.drop("T2I_1_1_slow.yaml", job("wf_slow", "slow", inputs={"seconds": 10.0}))
    await project.until(lambda: project.comfyui.run_log, "ComfyUI runs it")
    await project.until(
        lambda: project.ask("SELECT phase FROM jobs") == [("submitted",)], "the database knows of the prompt"
    )
    said = await ended(agent)
    assert "put back into the queue; its prompt runs on" in said
    assert project.status("T2I_1_1_slow.yaml") == "pending"

    said = await heard(await project.start("comfyui_agent.execute", "--once"))
    assert project.status("T2I_1_1_slow.yaml") == "done", said
    assert project.ask("SELECT run_count, retries_attempted FROM jobs") == [(1, 0)]
    assert len(project.comfyui.run_log) == 1
    assert (project.folder / "jobs" / "finished" / "image" / "slow.png").is_file()


@pytest.mark.fault(61)
async def test_the_second_signal_leaves_at_once_and_nothing_is_lost(project: Project) -> None:
    agent = await project.start("comfyui_agent.run")
    project.drop("T2I_1_1_slow.yaml", job("wf_slow", "slow", inputs={"seconds": 10.0}))
    await project.until(lambda: project.comfyui.run_log, "ComfyUI runs it")
    agent.send_signal(signal.SIGTERM)
    assert agent.stdout is not None
    told = ""
    async with asyncio.timeout(PATIENCE):
        while "run on for up to" not in told:
            told += (await agent.stdout.readline()).decode()
    agent.send_signal(signal.SIGTERM)
    told += await heard(agent)
    assert agent.returncode == 130, told
    assert "left at once while T2I_1_1_slow.yaml ran" in told

    said = await heard(await project.start("comfyui_agent.execute", "--once"))
    assert project.status("T2I_1_1_slow.yaml") == "done", said
    assert project.ask("SELECT run_count, retries_attempted FROM jobs") == [(1, 0)]
    assert len(project.comfyui.run_log) == 1


@pytest.mark.fault(63)
async def test_a_second_monitor_is_told_who_has_the_folder(project: Project) -> None:
    first = await project.start("comfyui_agent.monitor")
    await project.until((project.folder / "jobs" / "processing" / ".monitor.lock").exists, "the first one watches")
    project.drop(KNIGHT, JOB_FILE)
    await project.until(lambda: project.status(KNIGHT), "the first one works")
    for program in ("comfyui_agent.monitor", "comfyui_agent.run"):
        code, out = await project.say(program)
        assert code == 9, out
        assert f"watched already, by process {first.pid}" in out
        assert "comfyctl agent execute" in out
    assert project.status(KNIGHT) == "pending", "the second program ran nothing"
    await ended(first)


async def test_a_comfyui_that_is_not_there_is_waited_for(project: Project) -> None:
    await project.comfyui.kill()
    agent = await project.start("comfyui_agent.run")
    project.drop(KNIGHT, JOB_FILE)

    def paused() -> bool:
        return project.status(KNIGHT) is not None and bool(project.ask("SELECT scope FROM queue_pauses"))

    await project.until(paused, "the executors pause")
    shown = await project.e3("queue", "ls")
    assert "paused: the executors of" in shown
    assert "tried again" in shown
    await project.comfyui.restart()
    await project.e3("queue", "resume")
    await project.until(lambda: project.status(KNIGHT) == "done", "the job is done")
    assert project.ask("SELECT run_count, retries_attempted FROM jobs") == [(1, 0)]
    assert "paused: " in await ended(agent)
