"""What the jobs of this process are doing, looked at while they run, and what of it is kept with their results."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.config import load_settings
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.live import LiveJob
from runcomfy.bootstrap import App
from runcomfy.cli.agent_voice import Narrated, Voice
from runcomfy.domain.job import JobId, JobRequest, JobStatus
from runcomfy.domain.past_runs import past_of
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import QueueStatus
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import settings_for
from runcomfy.testing.workers import Workers, queue_settings_for


class InLoop(App):
    """The product's wiring; leases are renewed in the event loop, whose time is the story's."""

    def _heart(self, *_: Any) -> Pulse | None:
        return None


def graph(seconds: float = 4, *, previews: bool = False, colour: int = 1) -> dict[str, Any]:
    """Draw, wait, save; the first node is cached when the same colour is drawn again."""
    wait = {"image": ["1", 0], "seconds": seconds, "steps": 4, "previews": previews, "seed": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour}},
        "2": {"class_type": "EmulatorDelay", "inputs": wait, "_meta": {"title": "Take your time"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "live"}},
    }


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = load_settings(overrides={})
    files = replace(settings.files, durable=False, state_dir=str(tmp_path / "state"), output_dir=str(tmp_path / "out"))
    return replace(settings, files=files)


@pytest_asyncio.fixture
async def app(settings: Settings, comfyui: ComfyUIEmulator, clock: LoopClock, tmp_path: Path) -> AsyncIterator[App]:
    async with InLoop(settings, clock=clock) as app:
        app._queue_settings = queue_settings_for(comfyui.url, tmp_path)
        yield app


def request(comfyui: ComfyUIEmulator, workflow: dict[str, Any], **more: Any) -> JobRequest:
    return JobRequest(workflow, server_url=comfyui.url, **more)


async def test_a_running_job_shows_its_step_node_picture_and_timeline(
    app: App, comfyui: ComfyUIEmulator, clock: LoopClock
) -> None:
    heard: list[LiveJob] = []
    app.live.subscribe(heard.append)
    began = clock.now()
    runs = app.live.observing(app.orchestrator())
    task = asyncio.create_task(runs.run(request(comfyui, graph(8, previews=True), job_id=JobId("job-1"))))
    await asyncio.sleep(5)

    live = app.live.job(JobId("job-1"))
    assert live is not None
    assert list(app.live.jobs()) == ["job-1"]
    assert (live.workflow_id, live.since, live.server_type, live.over) == ("inline", began, "", False)
    assert (live.progress.step, live.progress.node_title) == (Step.RUNNING, "Take your time")
    assert live.preview is not None
    assert live.preview.startswith(b"\xff\xd8")
    assert live.preview_number == 2
    assert live.progress.preview is None  # one picture is kept, not one with each snapshot
    assert [(node.node_id, node.class_type) for node in live.timeline.nodes] == [
        ("1", "EmptyImage"), ("2", "EmulatorDelay"),
    ]  # fmt: skip
    assert live.timeline.running == {"2"}

    done = await task
    assert done.status is JobStatus.DONE
    assert app.live.job(JobId("job-1")) is None
    assert app.live.jobs() == {}
    assert [job.over for job in heard] == [False] * (len(heard) - 1) + [True]
    assert [job.timeline.at_s for job in heard] == sorted(job.timeline.at_s for job in heard)
    assert heard[-1].timeline.nodes == done.nodes


async def test_a_job_without_an_id_gets_one_and_its_own_listener_hears_everything(
    app: App, comfyui: ComfyUIEmulator
) -> None:
    told: list[Progress] = []
    runs = app.live.observing(app.orchestrator())
    task = asyncio.create_task(runs.run(request(comfyui, graph(previews=True)), on_progress=told.append))
    await asyncio.sleep(2)
    [uid] = app.live.jobs()
    assert (await task).job_id == uid
    assert sum(progress.preview is not None for progress in told) == 4
    assert told[-1].step is Step.FINISHED


async def test_the_timeline_stands_in_the_result_and_in_the_manifest(app: App, comfyui: ComfyUIEmulator) -> None:
    first = await app.orchestrator().run(request(comfyui, graph(4)))
    again = await app.orchestrator().run(request(comfyui, graph(6)))

    assert [(node.node_id, node.cached) for node in first.nodes] == [("1", False), ("2", False), ("3", False)]
    assert [(node.node_id, node.cached) for node in again.nodes] == [("1", True), ("2", False), ("3", False)]
    seconds = {node.node_id: node.seconds for node in again.nodes}
    assert seconds["1"] == 0
    assert seconds["2"] == pytest.approx(6, abs=0.2)
    assert again.folder is not None
    manifest = json.loads(await asyncio.to_thread((Path(again.folder) / "manifest.json").read_text, encoding="utf-8"))
    assert manifest["nodes"] == [node.as_dict() for node in again.nodes]
    assert manifest["server_type"] == again.server_type == ""


async def test_jobs_of_the_queue_are_seen_and_their_rows_keep_the_timeline(
    app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[LiveJob] = []
    app.live.subscribe(heard.append)
    voice = Voice(as_json=True)
    store = await app.job_store()
    executor = await app.executor(observed=lambda runs: Narrated(runs, store, voice))
    stop = asyncio.Event()
    working = asyncio.create_task(executor.run(stop, asyncio.Event()))
    queue = await app.job_queue()

    job = await queue.enqueue(JobRequest(graph()))
    done = await queue.wait(job)

    assert done.status is QueueStatus.DONE
    assert done.result["server_type"] == ""
    assert [node["node_id"] for node in done.result["nodes"]] == ["1", "2", "3"]
    assert {live.uid for live in heard} == {job.uid}
    assert heard[-1].timeline.as_list() == done.result["nodes"]
    assert "taken up" in capsys.readouterr().out
    stop.set()
    await working


async def test_a_subscriber_that_fails_is_told_of_once_and_disturbs_nobody(
    app: App, comfyui: ComfyUIEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[LiveJob] = []

    def broken(_: LiveJob) -> None:
        raise RuntimeError("the page is gone")

    app.live.subscribe(broken)
    leave = app.live.subscribe(heard.append)
    runs = app.live.observing(app.orchestrator())
    with caplog.at_level(logging.ERROR, "runcomfy.live"):
        assert (await runs.run(request(comfyui, graph()))).status is JobStatus.DONE
    assert [record.getMessage() for record in caplog.records] == ["live_subscriber_failed"]
    assert len(heard) > 5

    leave()
    leave()
    count = len(heard)
    await runs.run(request(comfyui, graph(2)))
    assert len(heard) == count


async def test_who_leaves_while_being_told_is_not_told_again(app: App, comfyui: ComfyUIEmulator) -> None:
    heard: list[LiveJob] = []

    def once(job: LiveJob) -> None:
        heard.append(job)
        leave()

    leave = app.live.subscribe(once)
    await app.live.observing(app.orchestrator()).run(request(comfyui, graph()))
    assert len(heard) == 1


async def test_a_cancelled_and_a_failing_job_are_over_too(app: App, comfyui: ComfyUIEmulator) -> None:
    overs: list[JobId] = []
    app.live.subscribe(lambda job: overs.append(job.uid) if job.over else None)
    runs = app.live.observing(app.orchestrator())
    cancel = asyncio.Event()
    task = asyncio.create_task(runs.run(request(comfyui, graph(60), job_id=JobId("long")), cancel=cancel))
    await asyncio.sleep(5)
    cancel.set()
    cancelled = await task
    assert cancelled.status is JobStatus.CANCELLED
    assert [node.node_id for node in cancelled.nodes] == ["1", "2"]
    bad = await runs.run(request(comfyui, {"1": {"class_type": "NoSuchNode", "inputs": {}}}, job_id=JobId("bad")))
    assert (bad.status, bad.nodes) == (JobStatus.FAILED, ())
    assert overs == ["long", "bad"]
    assert app.live.jobs() == {}


async def test_a_run_that_is_replaced_by_a_newer_one_of_the_same_job_says_no_more(app: App) -> None:
    """A claim was lost and won again by the same process: the older run still ends while the newer one goes on."""
    heard: list[LiveJob] = []
    app.live.subscribe(heard.append)
    old = app.live.begin(JobId("twice"), "mesh")
    new = app.live.begin(JobId("twice"), "mesh")
    old.progress(Progress(Step.FETCHING))
    old.over()
    new.progress(Progress(Step.RUNNING, 40))
    live = app.live.job(JobId("twice"))
    assert live is not None
    assert (live.progress.step, live.over) == (Step.RUNNING, False)
    assert [job.progress.step for job in heard] == [Step.PLACING, Step.PLACING, Step.RUNNING]
    new.over()
    assert app.live.jobs() == {}


async def test_a_worker_that_goes_on_with_anothers_prompt_makes_no_times_up(
    settings: Settings, comfyui: ComfyUIEmulator, clock: LoopClock, tmp_path: Path
) -> None:
    workers = Workers(settings, queue_settings_for(comfyui.url, tmp_path), clock)
    async with workers.start() as first:
        job = await first.queue.enqueue(JobRequest(graph(30)))
        await asyncio.sleep(12)
        await first.kill(workers.processes)
    async with workers.start() as second:
        done = await second.queue.wait(job, timeout=timedelta(minutes=2))
    assert done.status is QueueStatus.DONE
    # The server tells the socket that sent the prompt, and nobody else: nothing of its nodes could be heard.
    assert done.result["nodes"] == []
    assert past_of("inline", clock.now(), done.result) is None


@pytest.mark.cloud(boot_time=180)
async def test_on_a_rented_machine_the_type_is_shown_and_kept_and_the_steps_before_it_are_timed(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> None:
    settings = settings_for(cloud_settings, tmp_path / "state")
    async with InLoop(replace(settings, pool=replace(settings.pool, guard=False)), clock=clock) as app:
        runs = app.live.observing(app.orchestrator())
        asked = JobRequest(graph(30), server_type="large", job_id=JobId("rented"), out_dir=str(tmp_path / "out"))
        task = asyncio.create_task(runs.run(asked))
        await asyncio.sleep(60)
        boots = app.live.job(JobId("rented"))
        assert boots is not None
        assert (boots.progress.step, boots.server_type) == (Step.BOOTING, "")
        await asyncio.sleep(150)
        computes = app.live.job(JobId("rented"))
        assert computes is not None
        assert (computes.progress.step, computes.server_type) == (Step.RUNNING, "large")
        done = await task
    assert (done.status, done.server_type) == (JobStatus.DONE, "large")
    began = {step.step: step.started_s for step in computes.timeline.steps}
    assert began[Step.RUNNING] - began[Step.BOOTING] > 150
    assert all(node.started_s >= began[Step.RUNNING] for node in done.nodes)
    assert not cloud.billing
