"""What commands of the queue say of jobs whose worker is gone, of runs that are left, and to programs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.job_queue import EXECUTOR
from runcomfy.application.planner import PLANNER
from runcomfy.bootstrap import App
from runcomfy.cli import agent_status, agent_work, queue_work, run_queued
from runcomfy.cli.agent_voice import Voice
from runcomfy.cli.runner import Interrupts
from runcomfy.domain.exceptions import Interrupted, JobBusy, JobTimeout, ValueInvalid
from runcomfy.domain.job import JobRequest, JobStatus
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.progress import Step
from runcomfy.domain.queued import QUEUE_SCOPE, QueueStatus, Reason, WorkerId
from runcomfy.domain.time_left import TimeLeft
from runcomfy.testing.contracts.jobs_words import LEASE, a_job, an_owner
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)
Shown = pytest.CaptureFixture[str]


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty queue where commands find it, as another process has it open."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state" / "runcomfy.sqlite3"
    async with SqlJobs(store_from(path, clock=SystemClock(), durable=False)) as jobs:
        yield jobs


# -- who works -------------------------------------------------------------------------------------------------


async def status(capsys: Shown) -> list[str]:
    assert await agent_status.show_status(Interrupts(None), {}, as_json=False) == 0
    return capsys.readouterr().out.splitlines()


async def test_jobs_whose_worker_is_gone_are_named_with_when_they_go_back(store: SqlJobs, capsys: Shown) -> None:
    await store.add([a_job(config_name="cat.yaml"), a_job(config_name="dog.yaml"), a_job(config_name="owl.yaml")])
    now = datetime.now(UTC)
    there = an_owner(
        "bob-the-worker", host="elsewhere", command=f"comfyctl {EXECUTOR}", started_at=now, heartbeat_at=now
    )
    await store.register_owner(there)
    await store.claim(WorkerId("alice"), count=1, lease=timedelta(hours=1))
    await store.claim(WorkerId("carol"), count=1, lease=timedelta(microseconds=1))
    await store.claim(WorkerId(there.id), count=1, lease=LEASE)
    said = await status(capsys)
    cat, dog = (next(line for line in said if line.startswith(name)) for name in ("cat.yaml: ", "dog.yaml: "))
    assert "its worker is gone; it goes back into the queue in " in cat
    assert cat.endswith(" at the latest, if an executor runs then")
    assert dog == "dog.yaml: its worker is gone; it goes back into the queue as soon as an executor runs"
    assert not any(line.startswith("owl.yaml") for line in said)
    assert any("elsewhere" in line and "owl.yaml: just taken" in line for line in said)
    assert not any("takes back the jobs" in line for line in said)
    await store.take_role(PLANNER, OwnerId(there.id), lease=LEASE)
    assert "worker bob-the- takes back the jobs of those that are gone" in await status(capsys)


# -- programs that work ------------------------------------------------------------------------------------------


async def test_a_program_that_leaves_at_once_says_what_runs_and_does_not_say_that_nothing_does(
    store: SqlJobs,
) -> None:
    [job] = await store.add([a_job(config_name="cat.yaml")])
    async with App() as app:
        with Voice(as_json=True, now=lambda: NOW) as voice:
            assert agent_work.last_words(app, voice) == ["left at once; nothing that this command rented still runs"]
            voice.begun(job)
            assert agent_work.last_words(app, voice) == [
                "left at once while cat.yaml ran; the next start finds what became of it and goes on"
            ]


@pytest.mark.parametrize("pressed", [True, False])
async def test_working_off_a_paused_queue_fails_unless_it_was_the_user_who_ended_it(
    store: SqlJobs, comfyui: ComfyUIEmulator, capsys: Shown, pressed: bool
) -> None:
    await store.add([a_job(config_name="cat.yaml")])
    await store.pause(scope=QUEUE_SCOPE, reason="by-hand", message="lunch")
    interrupts = Interrupts(None)
    if pressed:
        interrupts.event.set()
    work = agent_work.work(interrupts, agent_work.Task(monitor=False, execute=True, server=comfyui.url, once=True), {})
    if pressed:
        assert await work == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith("stopped; the next start goes on where this one ended")
    else:
        with pytest.raises(JobBusy, match="1 job is left undone, paused: lunch"):
            await work


async def test_when_one_part_of_a_program_fails_the_others_end_in_good_order_and_its_error_is_raised() -> None:
    stop, ended = asyncio.Event(), []

    async def fails() -> None:
        await asyncio.sleep(3)
        raise ValueInvalid("something")

    async def works() -> None:
        await stop.wait()
        await asyncio.sleep(2)
        ended.append("works")

    with pytest.raises(ValueInvalid, match="something"):
        await agent_work.together([works(), fails()], stop)
    assert ended == ["works"]


async def test_a_program_that_is_cancelled_waits_until_every_part_has_tidied_up() -> None:
    tidied = []

    async def works(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(5)
            tidied.append(name)

    program = asyncio.create_task(agent_work.together([works("one"), works("two")], asyncio.Event()))
    await asyncio.sleep(1)
    program.cancel()
    with pytest.raises(asyncio.CancelledError):
        await program
    assert sorted(tidied) == ["one", "two"]


# -- run --queue -------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"priority": None, "key": "order-17"}


async def run(interrupts: Interrupts, picture: Path, *, as_json: bool = False) -> int:
    request = JobRequest("image_invert", image=str(picture))
    return await run_queued.run_queued(interrupts, request, OPTIONS, {}, as_json=as_json)


async def left(picture: Path, *, as_json: bool = False) -> int:
    """Run in the queue until the job is there, then press Ctrl+C."""
    interrupts = Interrupts(None)
    running = asyncio.create_task(run(interrupts, picture, as_json=as_json))
    await asyncio.sleep(3)
    interrupts.event.set()
    return await running


async def test_a_run_that_is_left_is_an_object_for_programs_and_two_sentences_for_people(
    store: SqlJobs, picture: Path, capsys: Shown
) -> None:
    assert await left(picture, as_json=True) == Interrupted.exit_code
    shown = capsys.readouterr()
    facts = json.loads(shown.out)
    [job] = await store.jobs()
    assert (facts["job_id"], facts["status"], facts["config_name"]) == (job.uid, "pending", job.config_name)
    assert facts["error"]["code"] == Interrupted.code
    assert run_queued.NOBODY not in shown.err
    assert await left(picture) == Interrupted.exit_code
    shown = capsys.readouterr()
    assert run_queued.NOBODY in shown.err
    assert shown.err.splitlines()[-2:] == run_queued.left_behind(job)
    assert f"[{Interrupted.code}]" not in shown.err


async def test_of_a_job_that_was_cancelled_before_nobody_is_missed_and_the_way_back_is_told(
    store: SqlJobs, picture: Path, capsys: Shown
) -> None:
    await left(picture)
    [job] = await store.jobs()
    await store.cancel(job.id, by="ann")
    capsys.readouterr()
    assert await run(Interrupts(None), picture) == Interrupted.exit_code
    shown = capsys.readouterr()
    assert run_queued.NOBODY not in shown.err
    assert "the job was cancelled" in shown.err
    assert f"`comfyctl queue retry {job.config_name}` runs it again" in shown.err


async def test_what_came_of_a_queued_job_is_told_as_a_run_tells_it(store: SqlJobs) -> None:
    [job] = await store.add([a_job(config_name="cat.yaml")])

    def end(**changes: Any) -> JobStatus:
        return run_queued.result_of(replace(job, status=QueueStatus.FAILED, **changes)).status

    assert end(reason=Reason.CANCELLED) is JobStatus.CANCELLED
    assert end(reason=JobTimeout.code) is JobStatus.TIMEOUT
    assert end(reason="node-failed") is JobStatus.FAILED
    assert run_queued.result_of(replace(job, status=QueueStatus.DONE)).status is JobStatus.DONE
    result = run_queued.result_of(replace(job, status=QueueStatus.FAILED, reason="job-timeout"))
    assert result.exit_code == JobTimeout.exit_code


async def test_progress_of_a_running_job_tells_how_long_it_still_takes_where_that_is_known(store: SqlJobs) -> None:
    [job] = await store.add([a_job()])
    job = replace(job, status=QueueStatus.PROCESSING, progress=40.0, message="Sampler")
    left = TimeLeft(100.0, 120.0, 140.0, sure=True, runs=20)
    assert run_queued.progress_of(job, left).message == f"Sampler, {left.words}"
    assert run_queued.progress_of(job).message == "Sampler"
    assert run_queued.progress_of(job).step is Step.RUNNING


# -- looking at jobs ---------------------------------------------------------------------------------------------


async def test_a_job_that_is_no_longer_watched_is_shown_as_it_is_then(store: SqlJobs, capsys: Shown) -> None:
    await store.add([a_job(config_name="cat.yaml")])
    looking = Interrupts(None)
    watching = asyncio.create_task(queue_work.show_job(looking, "cat.yaml", {}, as_json=True, watch=True))
    await asyncio.sleep(5)
    assert not watching.done()
    looking.event.set()
    assert await watching == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["status"] == "pending"
    assert shown.err == ""


async def test_events_are_followed_until_ctrl_c(store: SqlJobs, capsys: Shown) -> None:
    looking = Interrupts(None)
    following = asyncio.create_task(queue_work.print_events(looking, None, 10, {}, as_json=True, follow=True))
    await asyncio.sleep(2)
    [job] = await store.add([a_job(config_name="cat.yaml")])
    await asyncio.sleep(5)
    looking.event.set()
    assert await following == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["job_id"] for row in rows] == [job.id]
