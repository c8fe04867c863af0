"""What commands say to people: in a terminal and in a pipe, of jobs in every state and of machines that come and go."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.cli import agent_voice, machines_show, progress_display, queue_display, queue_work
from runcomfy.cli.runner import Interrupts
from runcomfy.cli.words import ended_well, show_time, still_billing
from runcomfy.domain.exceptions import JobNotFound
from runcomfy.domain.machine import MachineState
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import FLEET_SCOPE, QUEUE_SCOPE, Pause, Phase, QueuedJob, QueueStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.jobs_words import a_job
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Programs

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)


@pytest.fixture
async def job(clock: LoopClock) -> QueuedJob:
    async with SqlJobs(store_from(":memory:", clock=clock, durable=False)) as jobs:
        [row] = await jobs.add([a_job(config_name="cat.yaml", user="ann")])
    return row


# -- jobs ------------------------------------------------------------------------------------------------------


def later(**span: float) -> datetime:
    return NOW + timedelta(**span)


async def test_what_a_job_does_is_said_in_a_few_words(job: QueuedJob) -> None:
    def said(**changes: Any) -> str:
        return queue_display.what_happens(replace(job, **changes), now=NOW)

    runs, failed, done = QueueStatus.PROCESSING, QueueStatus.FAILED, QueueStatus.DONE
    assert said() == "waits"
    assert said(status=runs) == "just taken"
    assert said(status=runs, progress=41.6, message="Sampler") == "42% Sampler"
    gone: dict[str, Any] = {"phase": Phase.SUBMITTED, "place": "machine:m-1", "others_from": later(seconds=29)}
    assert said(**gone) == "its worker of machine:m-1 is gone, free for others in 30s"
    assert said(**gone | {"place": "server:x:1"}) == "its worker is gone, free for others in 30s"
    assert said(not_before=later(seconds=9), run_count=1, error_trace="boom\nmore") == "next try in 10s, after boom"
    assert said(status=failed, error_trace="\n", reason="job-timeout") == "job-timeout"
    assert said(status=done, duration=None) == "no files, 0s"
    outputs = {"outputs": [{"path": "/o/a.png"}, {"path": "/o/b.png"}, {"else": 1}]}
    assert said(status=done, result=outputs, duration=3.25) == "a.png and 1 more, 3.2 s"


async def test_everything_of_a_job_that_failed_stands_there_with_its_error(job: QueuedJob) -> None:
    failed = replace(job, status=QueueStatus.FAILED, error_trace="node-failed: boom\nhint: look", retry_limit=2)
    lines = queue_display.details(failed, [], now=NOW)
    assert lines[-3:] == ["", "node-failed: boom", "hint: look"]
    assert any(line.startswith("runs") and "of at most 2" in line for line in lines)
    assert any(line.startswith("for") and line.endswith("ann") for line in lines)
    assert not any(line.endswith(" -") for line in lines)


@pytest.mark.parametrize(
    ("scope", "until", "said"),
    [
        (FLEET_SCOPE, None, "no machine is launched for what waits: why"),
        (FLEET_SCOPE, later(hours=1), "no machine is launched for what waits (until "),
        (QUEUE_SCOPE, None, "paused: the queue, until `comfyctl queue resume`: why"),
        (QUEUE_SCOPE, later(minutes=5), "paused: the queue, tried again in 5m 0s: why"),
        ("host:here", later(minutes=-5), "paused: the executors of here, tried again by the next executor: why"),
    ],
)
def test_what_is_paused_and_what_ends_that(scope: str, until: datetime | None, said: str) -> None:
    pause = Pause(scope=scope, reason="r", message="why", since=NOW, until=until, by="me")
    assert queue_display.pause_line(pause, now=NOW).startswith(said)


def progress(step: Step, **fields: Any) -> Progress:
    return Progress(step, **fields)


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (progress(Step.QUEUED, queue_position=2), "waiting in the server's queue, 2 ahead"),
        (progress(Step.QUEUED, queue_position=0), "next in the server's queue"),
        (progress(Step.RUNNING, node_title="Sampler", value=3.0, maximum=20.0), "Sampler 3/20"),
        (progress(Step.RUNNING), "running"),
        (progress(Step.BOOTING, message="a machine boots"), "a machine boots"),
        (progress(Step.FETCHING), str(Step.FETCHING)),
    ],
)
def test_progress_in_a_few_words(snapshot: Progress, said: str) -> None:
    assert progress_display.describe(snapshot) == said


def test_a_pipe_gets_a_line_for_each_step_and_not_for_each_message(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display.Display() as show:
        for value in range(5):
            show(progress(Step.RUNNING, node_title="Sampler", value=float(value), maximum=5.0, percent=value * 20.0))
        show(progress(Step.FETCHING, message="fetching"))
        show.tell("a sentence")
    with progress_display.Display(silent=True) as silent:
        silent(progress(Step.RUNNING))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("]")[-1].split()[0] for line in lines] == ["running", "fetching", "a"]


def test_a_terminal_gets_one_live_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_display.Display() as show:
        show(progress(Step.PLACING, message="placing"))
        show(progress(Step.RUNNING, node_title="Sampler", percent=40.0))
        show.tell("a sentence")
    assert "a sentence" in capsys.readouterr().err


async def test_the_voice_of_executors_in_a_terminal_and_in_a_pipe(
    job: QueuedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent_voice, "PROGRESS_EVERY", 0.0)
    with agent_voice.Voice(as_json=False, now=lambda: NOW) as say:
        say.begun(replace(job, run_count=1))
        assert say.running == ["cat.yaml"]
        say.progress(job, progress(Step.RUNNING, node_title="Sampler", percent=40.0))
        say.over(job)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("cat.yaml: taken up (JOB, image_invert, priority 50, run 2, for ann)")
    assert second.endswith("cat.yaml: 40% Sampler")
    with agent_voice.Voice(as_json=True, now=lambda: NOW) as say:
        say("a sentence", job="x")
    assert json.loads(capsys.readouterr().out) == {"at": NOW.isoformat(), "message": "a sentence", "job": "x"}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with agent_voice.Voice(as_json=False, now=lambda: NOW) as say:
        say.begun(job)
        say.progress(job, progress(Step.RUNNING, node_title="Sampler", percent=40.0))
    assert "taken up" in capsys.readouterr().out


# -- machines --------------------------------------------------------------------------------------------------


async def test_what_may_still_bill_is_said_with_what_ends_it(programs: Programs) -> None:
    assert still_billing([]) == ["left at once; nothing that this command rented still runs"]
    assert ended_well([]) == ["cancelled; nothing that this command rented still runs"]
    async with programs.start() as program:
        machine, _, _ = await program.dev.start(server_type="medium", duration=timedelta(hours=1))
        asked = replace(machine, state=MachineState.REQUESTED)
        for words in (still_billing, ended_well):
            opening, first, second, closing = words([machine, asked])
            assert opening.endswith("This may still run and bill:")
            assert f"stop it with `comfyctl machines stop {machine.server_id}`" in first
            assert second == "  a medium machine whose launch was not answered yet"
            assert "reap" in closing
        await program.dev.shutdown()
    assert show_time(None) == "-"
    assert Decimal(0) <= machine.usd_per_hour


async def watched(program: Any, cloud: RunComfyEmulator, *, as_json: bool) -> None:
    """Look at the list while a machine comes, the cloud fails for a while, and the machine goes."""
    interrupts = Interrupts(None)
    looking = asyncio.create_task(machines_show._watch(interrupts, program.machines, has_books=True, as_json=as_json))
    await asyncio.sleep(10)
    await program.dev.start(server_type="medium", duration=timedelta(hours=1))
    await asyncio.sleep(30)
    cloud.next_call("GET servers", status=500, times=None, lasts=60, works=False)
    await asyncio.sleep(120)
    await program.dev.shutdown()
    await asyncio.sleep(60)
    interrupts.event.set()
    await looking


async def test_a_watched_list_in_a_pipe_has_a_line_for_each_change(
    programs: Programs, cloud: RunComfyEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    async with programs.start() as program:
        await watched(program, cloud, as_json=True)
        shown = capsys.readouterr()
        rows = [json.loads(line) for line in shown.out.splitlines()]
        assert rows[-1]["state"] == "gone"
        assert [row["state"] for row in rows if row.get("type")].count("ready") <= 6
        assert len({row["machine_id"] for row in rows}) == 1
        assert shown.err.count("cannot be read now") == 1
        await watched(program, cloud, as_json=False)
        assert capsys.readouterr().out.splitlines()[-1].endswith("gone")


async def test_a_watched_list_in_a_terminal_is_one_table(
    programs: Programs, cloud: RunComfyEmulator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    async with programs.start() as program:
        await watched(program, cloud, as_json=False)
    assert "1 of ours" in capsys.readouterr().out


# -- the queue, while it is looked at ----------------------------------------------------------------------------


@pytest.fixture
async def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of an empty queue, as commands find it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state" / "runcomfy.sqlite3"
    async with SqlJobs(store_from(path, clock=LoopClock(), durable=False)):
        return path


async def jobs_come_and_end(where: Path, clock: LoopClock, looking: Interrupts) -> None:
    """Put jobs in, cancel one, pause the queue, cancel the other; then the user presses Ctrl+C."""
    await asyncio.sleep(2)
    async with SqlJobs(store_from(where, clock=clock, durable=False)) as jobs:
        first, second = await jobs.add([a_job(config_name="cat.yaml"), a_job(config_name="dog.yaml")])
        await asyncio.sleep(5)
        await jobs.cancel(second.id, by="ann")
        await jobs.pause(scope=QUEUE_SCOPE, reason="by-hand", message="lunch")
        await asyncio.sleep(5)
        await jobs.cancel(first.id, by="ann")
        await asyncio.sleep(5)
    looking.event.set()


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
async def test_a_watched_queue_tells_what_changes_until_ctrl_c(
    where: Path, clock: LoopClock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    looking = Interrupts(None)
    story = asyncio.create_task(jobs_come_and_end(where, clock, looking))
    assert await queue_work.list_jobs(looking, None, None, {}, as_json=False, watch=True) == 0
    await story
    shown = capsys.readouterr().out
    assert "cat.yaml" in shown
    assert "cancelled" in shown
    assert "paused: the queue, until `comfyctl queue resume`: lunch" in shown.replace("\n", " ")


async def test_a_watched_queue_in_json_has_a_line_for_each_change(
    where: Path, clock: LoopClock, capsys: pytest.CaptureFixture[str]
) -> None:
    looking = Interrupts(None)
    story = asyncio.create_task(jobs_come_and_end(where, clock, looking))
    await queue_work.list_jobs(looking, None, None, {}, as_json=True, watch=True)
    await story
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["status"] for row in rows if row["config_name"] == "dog.yaml"] == ["pending", "failed"]


async def test_one_job_is_watched_to_its_end_and_events_are_followed(
    where: Path, clock: LoopClock, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(JobNotFound, match="no job"):
        await queue_work.show_job(Interrupts(None), "cat.yaml", {}, as_json=False, watch=True)
    looking, following = Interrupts(None), Interrupts(None)
    story = asyncio.create_task(jobs_come_and_end(where, clock, following))
    events = asyncio.create_task(queue_work.print_events(following, None, 10, {}, as_json=False, follow=True))
    await asyncio.sleep(4)
    assert await queue_work.show_job(looking, "cat.yaml", {}, as_json=False, watch=True) == 0
    await asyncio.gather(story, events)
    shown = capsys.readouterr()
    assert "pending: waits" in shown.err
    assert "cancelled" in shown.out
    assert shown.out.count("dog.yaml") >= 2
