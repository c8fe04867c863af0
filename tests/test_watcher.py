"""A prompt is watched to its true end, whatever happens to socket, server and prompt. Time is virtual."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from runcomfy.application.watcher import Ended, Watcher
from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.exceptions import (
    GpuOutOfMemory,
    NodeFailed,
    NodeStuck,
    NotComfyUI,
    OutputMissing,
    PromptInterrupted,
    PromptRemoved,
    RunComfyError,
    ServerRestarted,
    ServerUnreachable,
    WorkerDead,
)
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import NodeLabel, Progress, Step
from runcomfy.domain.settings import ComfySettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault, PromptFault, SocketFault

SETTINGS = ComfySettings()
POLL = SETTINGS.poll_interval.total_seconds()


@dataclass
class Job:
    """One prompt on its way, in a task of its own."""

    prompt_id: PromptId
    task: asyncio.Task[Ended] | None = None
    told: list[Progress] = field(default_factory=list)
    submitted: asyncio.Event = field(default_factory=asyncio.Event)

    async def end(self) -> Ended:
        assert self.task is not None
        return await self.task


class Jobs:
    """Runs graphs through one client."""

    def __init__(self, url: str, settings: ComfySettings) -> None:
        self.client = ComfyUIWorkflowClient(url, settings, clock=LoopClock())
        self.settings = settings
        self.all: list[Job] = []

    def start(self, graph: Mapping[str, Any]) -> Job:
        job = Job(PromptId(str(uuid.uuid4())))
        job.task = asyncio.create_task(self._run(job, graph))
        self.all.append(job)
        return job

    async def _run(self, job: Job, graph: Mapping[str, Any]) -> Ended:
        labels = {
            node: NodeLabel(entry.get("_meta", {}).get("title", ""), entry["class_type"])
            for node, entry in graph.items()
        }
        async with self.client.listen(job.prompt_id) as events:
            await self.client.submit(graph, prompt_id=job.prompt_id)
            job.submitted.set()
            watcher = Watcher(self.client, self.settings, clock=LoopClock())
            return await watcher.watch(job.prompt_id, labels, events=events, on_progress=job.told.append)

    async def started(self, graph: Mapping[str, Any]) -> Job:
        """Start a graph and wait until the server runs it."""
        job = self.start(graph)
        await job.submitted.wait()
        for _ in range(200):
            if job.prompt_id in (await self.client.queue()).running:
                return job
            await asyncio.sleep(0.05)
        pytest.fail("the prompt never ran")

    async def close(self) -> None:
        for job in self.all:
            assert job.task is not None
            job.task.cancel()
        await asyncio.gather(*(job.task for job in self.all if job.task is not None), return_exceptions=True)
        await self.client.close()


@pytest_asyncio.fixture
async def jobs(comfyui: ComfyUIEmulator) -> AsyncIterator[Jobs]:
    made = Jobs(comfyui.url, SETTINGS)
    yield made
    await made.close()


def steps(count: int = 10, seconds: float = 1.0, *, preview: bool = False) -> dict[str, Any]:
    """A sampler-like node behind a picture, and one that saves."""
    return {
        "1": {
            "class_type": "ProbeSteps",
            "inputs": {"steps": count, "seconds_per_step": seconds, "preview": preview, "seed": 1},
            "_meta": {"title": "The sampler"},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}},
    }


def silent(seconds: float) -> dict[str, Any]:
    return {
        "1": {"class_type": "ProbeBlock", "inputs": {"seconds": seconds, "seed": 1}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}},
    }


def failing(message: str = "it burst") -> dict[str, Any]:
    return {
        "1": {
            "class_type": "ProbeFail",
            "inputs": {"message": message, "kind": "RuntimeError", "after_steps": 1},
            "_meta": {"title": "The culprit"},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}},
    }


async def took(action: Any) -> tuple[float, Any]:
    """How long something took on the loop's clock, and what came of it: a value or an error of ours."""
    began = asyncio.get_running_loop().time()
    try:
        result = await action
    except RunComfyError as error:
        result = error
    return asyncio.get_running_loop().time() - began, result


# --- the usual ----------------------------------------------------------------------------------------------


async def test_a_person_can_follow_a_prompt(jobs: Jobs) -> None:
    job = jobs.start(steps(10, preview=True))
    ended = await job.end()
    assert ended.outputs["2"]["images"][0]["filename"].startswith("story")
    assert ended.started_at is not None
    percents = [progress.percent for progress in job.told]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert {5, 25, 50} <= {round(p) for p in percents}, "half of the nodes, and tenths of that half"
    assert "The sampler 5/10" in [progress.message for progress in job.told]
    assert any(progress.preview for progress in job.told)
    assert job.told[-1].elapsed >= timedelta(seconds=10)


async def test_those_who_wait_know_their_place(jobs: Jobs) -> None:
    first = await jobs.started(steps(20))
    others = [jobs.start(steps(1)) for _ in range(3)]
    ended = await asyncio.gather(first.end(), *(job.end() for job in others))
    assert len(ended) == 4
    places = {p.queue_position for job in others for p in job.told if p.step is Step.QUEUED}
    assert {0, 1, 2} <= places


@pytest.mark.fault(43)
async def test_a_cached_run_ends_at_once_with_its_outputs(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    first = await jobs.start(steps(2)).end()
    time, second = await took(jobs.start(steps(2)).end())
    assert time < 1
    assert second.outputs == first.outputs
    assert second.cached == {"1", "2"}


@pytest.mark.fault(43)
async def test_outputs_come_from_the_history_when_nothing_was_executed(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    comfyui.faults.add_socket(SocketFault(silent_after=1), times=99)
    first = await jobs.start(steps(2, 0.1)).end()
    assert first.outputs["2"]["images"]


@pytest.mark.fault(42)
async def test_success_without_outputs_is_reported_as_it_is(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    comfyui.faults.add_prompt(PromptFault(no_outputs=True))
    ended = await jobs.start(steps(1)).end()
    assert ended.outputs == {}


async def test_the_history_may_be_late(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    comfyui.hold_history(0.4)
    time, ended = await took(jobs.start(steps(1)).end())
    assert ended.outputs
    assert time < 2


async def test_a_thousand_prompts_are_watched_over_one_socket(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    running = await jobs.started(steps(10))
    many = [jobs.start(steps(1, 0.01)) for _ in range(1000)]
    ended = await asyncio.gather(*(job.end() for job in many))
    await running.end()
    assert all(one.outputs for one in ended)
    assert comfyui.count("GET", "/ws") == 1
    waited = sum(1 for request in comfyui.requests if request.path == "/queue")
    assert waited < 1000, "those who wait share their readings of the queue"


# --- failures -----------------------------------------------------------------------------------------------


async def test_a_failing_node_is_named(jobs: Jobs) -> None:
    with pytest.raises(NodeFailed) as caught:
        await jobs.start(failing("it \x1b[31mburst\n")).end()
    error = caught.value
    assert '"The culprit" (#1, ProbeFail)' in error.message
    assert "it [31mburst" in error.message
    assert error.details["node_id"] == "1"
    assert error.details["node_title"] == "The culprit"
    assert error.details["exception_type"] == "RuntimeError"
    assert 0 < len(error.details["traceback"]) <= 30
    assert all(line.isprintable() and len(line) <= 256 for line in error.details["traceback"])
    assert not isinstance(error, GpuOutOfMemory)


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 20.00 GiB",
        "Allocation on device 0 would exceed allowed memory. (out of memory)",
        "CUDA error: an illegal memory access was encountered",
        "HIP out of memory. Tried to allocate 2 GiB",
        "CUDA driver error: unknown error",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    ],
)
async def test_a_gpu_that_fails_is_told_from_a_node_that_does(jobs: Jobs, message: str) -> None:
    with pytest.raises(GpuOutOfMemory) as caught:
        await jobs.start(failing(message)).end()
    assert "larger machine" in caught.value.hint


@pytest.mark.parametrize("message", ["out of ideas", "no memory of that", "CUDA is not available in this list"])
async def test_other_failures_are_not_blamed_on_the_gpu(jobs: Jobs, message: str) -> None:
    with pytest.raises(NodeFailed) as caught:
        await jobs.start(failing(message)).end()
    assert not isinstance(caught.value, GpuOutOfMemory)


async def test_an_interrupt_by_somebody_is_told(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    job = await jobs.started(steps(100))
    assert await jobs.client.cancel(job.prompt_id, alone=False)
    with pytest.raises(PromptInterrupted, match="The sampler"):
        await job.end()


@pytest.mark.fault(40)
async def test_an_ignored_interrupt_ends_as_a_stuck_node_does(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    comfyui.faults.ignore_interrupts = True
    comfyui.stall_node("1", at=0.5)
    job = await jobs.started(steps(10))
    await asyncio.sleep(20)
    assert await jobs.client.cancel(job.prompt_id, alone=True)
    time, error = await took(job.end())
    assert isinstance(error, NodeStuck)
    assert time < SETTINGS.stall_timeout.total_seconds()


@pytest.mark.fault(39)
@pytest.mark.parametrize("at", [0.0, 0.97])
async def test_a_node_that_stands_still_is_named(comfyui: ComfyUIEmulator, jobs: Jobs, at: float) -> None:
    comfyui.stall_node("1", at=at)
    time, error = await took(jobs.start(steps(100, 0.1)).end())
    assert isinstance(error, NodeStuck)
    assert "The sampler" in error.message
    assert error.details["node_id"] == "1"
    assert time == pytest.approx(SETTINGS.stall_timeout.total_seconds() + at * 10, abs=POLL + 2)


async def test_a_slow_silent_node_is_waited_for(jobs: Jobs) -> None:
    ended = await jobs.start(silent(590)).end()
    assert ended.outputs


# --- prompts that disappear ---------------------------------------------------------------------------------


@pytest.mark.fault(37)
@pytest.mark.parametrize("when", ["start", "end"])
async def test_a_prompt_that_vanishes_is_reported_after_proof(comfyui: ComfyUIEmulator, jobs: Jobs, when: str) -> None:
    comfyui.faults.add_prompt(PromptFault(vanish=when))
    time, error = await took(jobs.start(steps(3)).end())
    assert isinstance(error, PromptRemoved)
    assert time < 3 * POLL + 4


async def test_a_prompt_deleted_from_the_queue_is_reported(jobs: Jobs) -> None:
    await jobs.started(steps(60))
    waiting = jobs.start(steps(1))
    await waiting.submitted.wait()
    assert await jobs.client.cancel(waiting.prompt_id, alone=False)
    with pytest.raises(PromptRemoved):
        await waiting.end()


@pytest.mark.fault(38)
@pytest.mark.parametrize("down", [0, 8, 60])
async def test_a_restart_is_told_from_a_removal(comfyui: ComfyUIEmulator, jobs: Jobs, down: float) -> None:
    running = await jobs.started(steps(60))
    waiting = jobs.start(steps(1))
    await waiting.submitted.wait()
    await comfyui.kill()
    await asyncio.sleep(down)
    await comfyui.restart()
    for job in (running, waiting):
        time, error = await took(job.end())
        assert isinstance(error, ServerRestarted)
        assert time < 20


@pytest.mark.fault(38)
async def test_a_restart_is_noticed_without_a_socket_too(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    comfyui.faults.add_socket(SocketFault(refuse=403), times=999)
    job = await jobs.started(steps(60))
    await comfyui.kill()
    await asyncio.sleep(10)
    await comfyui.restart()
    with pytest.raises(ServerRestarted):
        await job.end()


async def test_a_server_that_stays_away_is_given_up(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    job = await jobs.started(steps(60))
    await comfyui.kill()
    time, error = await took(job.end())
    assert isinstance(error, ServerUnreachable)
    assert time == pytest.approx(SETTINGS.unreachable_timeout.total_seconds(), abs=10)


async def test_a_page_in_place_of_the_server_is_said_once_it_stays(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    comfyui.faults.add_socket(SocketFault(refuse=502), times=999)
    job = await jobs.started(steps(300))
    page = Fault(work=False, body=b"<!doctype html>Sorry", content_type="text/html")
    comfyui.faults.add("GET", "/queue", page, times=4)
    await asyncio.sleep(60)
    assert job.task is not None
    assert not job.task.done(), "a proxy's page that goes away again is no reason to stop"
    comfyui.faults.add("GET", "/queue", page, times=9999)
    time, error = await took(job.end())
    assert isinstance(error, NotComfyUI)
    assert time == pytest.approx(SETTINGS.unreachable_timeout.total_seconds(), abs=10)


@pytest.mark.parametrize("entry", ['{"outputs": ["x"], "status": {"status_str": "success"}}', "[1, 2]"])
async def test_an_end_that_cannot_be_read_is_looked_at_twice_and_told(
    comfyui: ComfyUIEmulator, jobs: Jobs, entry: str
) -> None:
    job = await jobs.started(steps(5))
    body = f'{{"{job.prompt_id}": {entry}}}'.encode()
    comfyui.faults.add("GET", "/history/*", Fault(work=False, body=body, content_type="application/json"), times=2)
    time, error = await took(job.end())
    assert isinstance(error, OutputMissing)
    assert "the prompt has ended, but its results cannot be told" in error.message
    assert time <= 15


async def test_an_end_that_can_be_read_at_the_second_look_is_an_end(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    job = await jobs.started(steps(5))
    body = f'{{"{job.prompt_id}": 5}}'.encode()
    comfyui.faults.add("GET", "/history/*", Fault(work=False, body=body, content_type="application/json"), times=1)
    assert (await job.end()).outputs


async def test_a_hanging_server_is_waited_for(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    job = await jobs.started(steps(30))
    comfyui.hang()
    await asyncio.sleep(50)
    comfyui.resume()
    ended = await job.end()
    assert ended.outputs


async def test_a_dead_worker_is_told(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    await jobs.start(steps(1)).end()
    comfyui.kill_worker()
    time, error = await took(jobs.start(steps(1)).end())
    assert isinstance(error, WorkerDead)
    assert time == pytest.approx(SETTINGS.worker_dead_after.total_seconds(), abs=2 * POLL)


# --- sockets ------------------------------------------------------------------------------------------------


@pytest.mark.fault(44)
@pytest.mark.parametrize("status", [403, 404, 500])
async def test_without_a_socket_a_poll_period_is_all_that_is_lost(
    comfyui: ComfyUIEmulator, jobs: Jobs, status: int
) -> None:
    comfyui.faults.add_socket(SocketFault(refuse=status), times=999)
    time, ended = await took(jobs.start(steps(7)).end())
    assert ended.outputs["2"]["images"]
    assert time <= 7 + POLL + 0.5


@pytest.mark.fault(45)
@pytest.mark.parametrize("frames", [1, 4, 8])
async def test_a_half_open_socket_costs_a_poll_period(comfyui: ComfyUIEmulator, jobs: Jobs, frames: int) -> None:
    comfyui.faults.add_socket(SocketFault(silent_after=frames), times=999)
    time, ended = await took(jobs.start(steps(7)).end())
    assert ended.outputs["2"]["images"]
    assert time <= 7 + POLL + 0.5


@pytest.mark.fault(46)
@pytest.mark.parametrize("frames", [2, 5, 9])
async def test_a_socket_that_breaks_again_and_again_changes_nothing(
    comfyui: ComfyUIEmulator, jobs: Jobs, frames: int
) -> None:
    comfyui.faults.add_socket(SocketFault(abort_after=frames), times=999)
    job = jobs.start(steps(7))
    time, ended = await took(job.end())
    assert ended.outputs["2"]["images"]
    assert time <= 7 + POLL + 0.5
    percents = [progress.percent for progress in job.told]
    assert percents == sorted(percents)


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    "fault",
    [
        SocketFault(duplicate=True),
        SocketFault(reorder=True),
        SocketFault(foreign=True),
        SocketFault(flood=50),
        SocketFault(duplicate=True, foreign=True, flood=5),
    ],
)
async def test_frames_in_any_disorder_end_right(comfyui: ComfyUIEmulator, jobs: Jobs, fault: SocketFault) -> None:
    comfyui.faults.add_socket(fault, times=999)
    job = jobs.start(steps(7))
    time, ended = await took(job.end())
    assert ended.outputs["2"]["images"]
    assert time <= 7 + POLL + 0.5
    percents = [progress.percent for progress in job.told]
    assert percents == sorted(percents)
    with pytest.raises(NodeFailed, match="it burst"):
        await jobs.start(failing()).end()


@pytest.mark.fault(47)
async def test_a_frame_of_100_mb_is_survived(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    job = await jobs.started(steps(10))
    comfyui.inject(None, b"\0" * 100_000_000)
    ended = await job.end()
    assert ended.outputs["2"]["images"]


@pytest.mark.fault(48)
@pytest.mark.threat("S10")
async def test_senseless_frames_change_nothing(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    job = await jobs.started(steps(10))
    ours = job.prompt_id
    for raw in (
        b"{",
        b"\xff\xff",
        b"[" * 10_000_000,
        json.dumps(
            {"type": "progress", "data": {"prompt_id": ours, "node": "1", "value": float("nan"), "max": 1}}
        ).encode(),
        json.dumps(
            {"type": "progress", "data": {"prompt_id": ours, "node": "1", "value": 1e300, "max": 1e-300}}
        ).encode(),
        json.dumps({"type": "executing", "data": {"prompt_id": ours, "node": None}}).encode(),
        json.dumps({"type": "execution_success", "data": {"prompt_id": ours}}).encode(),
        json.dumps(
            {"type": "execution_error", "data": {"prompt_id": ours, "exception_type": "ExecutionBlocked"}}
        ).encode(),
    ):
        comfyui.inject(None, raw, text=True)
    ended = await job.end()
    assert ended.outputs["2"]["images"]
    assert jobs.client.dropped == 4


async def test_a_socket_the_server_forgot_is_opened_anew(comfyui: ComfyUIEmulator, jobs: Jobs) -> None:
    """The double-socket trap: an older socket under our id closes late, and ours falls silent though it is open."""
    await jobs.start(steps(1)).end()
    [mine] = comfyui.process.hub.open
    async with aiohttp.ClientSession() as http:
        older = await http.ws_connect(f"{comfyui.url}/ws?clientId={mine.sid}")
        await older.receive()
        await older.close()
    time, ended = await took(jobs.start(steps(20)).end())
    assert ended.outputs
    assert comfyui.count("GET", "/ws") == 3
    time, _ = await took(jobs.start(steps(3, 0.9)).end())
    assert time < 4, "the new socket is heard again"


# --- our own side -------------------------------------------------------------------------------------------


async def test_an_error_of_the_listener_is_not_swallowed(jobs: Jobs) -> None:
    prompt_id = PromptId(str(uuid.uuid4()))

    def broken(_: Progress) -> None:
        raise ZeroDivisionError

    async with jobs.client.listen(prompt_id) as events:
        await jobs.client.submit(steps(5), prompt_id=prompt_id)
        with pytest.raises(ZeroDivisionError):
            await Watcher(jobs.client, SETTINGS, clock=LoopClock()).watch(
                prompt_id, {}, events=events, on_progress=broken
            )


async def test_a_cancelled_watch_leaves_no_task_behind(jobs: Jobs) -> None:
    job = await jobs.started(steps(60))
    assert job.task is not None
    before = asyncio.all_tasks()
    job.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job.task
    left = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not left
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("hear")]


async def test_shorter_patience_is_kept(comfyui: ComfyUIEmulator) -> None:
    hasty = replace(
        SETTINGS,
        poll_interval=timedelta(seconds=1),
        stall_timeout=timedelta(seconds=30),
        unreachable_timeout=timedelta(seconds=10),
    )
    jobs = Jobs(comfyui.url, hasty)
    comfyui.stall_node("1")
    time, error = await took(jobs.start(steps(10)).end())
    assert isinstance(error, NodeStuck)
    assert time == pytest.approx(30, abs=3)
    await comfyui.kill()
    await comfyui.restart()
    job = await jobs.started(silent(100))
    await comfyui.kill()
    time, error = await took(job.end())
    assert isinstance(error, ServerUnreachable)
    assert time == pytest.approx(10, abs=3)
    await jobs.close()
