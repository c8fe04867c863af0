"""What a run writes down, and what the next one makes of it: no prompt runs twice, no late result counts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from runcomfy.application.journal import EarlierPrompt, Publish
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import LeaseLost, ServerUnreachable, StoreUnavailable
from runcomfy.domain.job import JobId, JobRequest, JobResult, JobStatus, Output, PromptId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, PromptFault

CALLS = ("submitting", "accepted", "attached", "gone", "commit")
JOB = JobId("job-1")


@dataclass
class Row:
    """One job as a database would have it; `token` is the fence."""

    token: int = 0
    prompt_id: PromptId | None = None
    place: str = ""
    phase: str = ""
    lost: int = 0
    committed: list[tuple[Output, ...]] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)


class RowJournal:
    """Keeps `Journal` in memory. `stop_at` names the call, and the side of its effect, at which this worker stops."""

    def __init__(self, row: Row, *, stop_at: str = "", fails_at: str = "", draining: bool = False) -> None:
        row.token += 1
        self.row, self.token = row, row.token
        self.stop_at, self.fails_at, self.draining = stop_at, fails_at, draining
        self.stopped, self.go_on = asyncio.Event(), asyncio.Event()
        self.asked: list[BaseException] = []
        self._new_id()
        if row.prompt_id is not None:
            self._prompt_id = row.prompt_id

    def _new_id(self) -> None:
        self._prompt_id = PromptId(str(uuid4()))
        self._random: random.Random | None = None

    def random_int(self, low: int, high: int) -> int:
        self._random = self._random or random.Random(self._prompt_id)
        return self._random.randint(low, high)

    @property
    def earlier(self) -> EarlierPrompt | None:
        row = self.row
        if not row.phase or row.prompt_id is None:
            return None
        return EarlierPrompt(
            row.prompt_id, row.place, accepted=row.phase == "submitted", unwanted=row.phase == "ending"
        )

    @property
    def prompt_id(self) -> PromptId:
        return self._prompt_id

    async def submitting(self, prompt_id: PromptId, *, place: str) -> None:
        await self._before("submitting")
        self.row.prompt_id, self.row.place, self.row.phase = prompt_id, place, "submitting"
        await self._after("submitting")

    async def accepted(self, prompt_id: PromptId) -> None:
        await self._before("accepted")
        self.row.prompt_id, self.row.phase = prompt_id, "submitted"
        await self._after("accepted")

    async def attached(self) -> None:
        await self._before("attached")
        self.row.phase = "submitted"
        await self._after("attached")

    async def gone(self, *, lost: bool) -> None:
        await self._before("gone")
        self.row.lost += lost
        if lost or self.row.phase == "ending":
            self._new_id()
        self.row.phase = ""
        await self._after("gone")

    def leaves_prompt(self, error: BaseException) -> bool:
        self.asked.append(error)
        return self.draining

    async def commit(self, publish: Publish, outputs: tuple[Output, ...], facts: Mapping[str, Any]) -> None:
        await self._before("commit")
        await asyncio.to_thread(publish)
        await self._after("commit")
        if self.fails_at == "record":
            raise StoreUnavailable("the database is away")
        self.row.committed.append(outputs)
        self.row.facts = facts
        self.row.phase = ""

    async def _before(self, call: str) -> None:
        await self._stop(f"{call}:before")
        if self.token != self.row.token or self.fails_at == call:
            raise LeaseLost(f"somebody else holds the job ({call})")
        self.row.story.append(f"{self.token} {call}")

    async def _after(self, call: str) -> None:
        await self._stop(f"{call}:after")

    async def _stop(self, point: str) -> None:
        if self.stop_at == point:
            self.stopped.set()
            await self.go_on.wait()
            if point == "commit:after":
                raise LeaseLost("woke up too late: the database forgot the transaction")


def picture(seconds: float = 0.05, prefix: str = "out") -> dict[str, Any]:
    return {
        "1": {
            "class_type": "EmulatorDelay",
            "inputs": {"seconds": seconds, "steps": max(1, int(seconds)), "previews": False, "seed": 1},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


@dataclass
class Worker:
    """One process that runs jobs: a client of its own, and the runs it is busy with."""

    app: App
    url: str
    tasks: list[asyncio.Task[JobResult]] = field(default_factory=list)

    async def run(
        self, journal: RowJournal, graph: Mapping[str, Any], *, asked: Mapping[str, Any] | None = None, **options: Any
    ) -> JobResult:
        request = JobRequest(graph, job_id=JOB, server_url=self.url, **(asked or {}))
        return await self.app.orchestrator().run(request, journal=journal, **options)

    async def until_stopped(
        self, journal: RowJournal, graph: Mapping[str, Any], *, asked: Mapping[str, Any] | None = None
    ) -> asyncio.Task[JobResult]:
        """Start a run and return when it has stopped where its journal stops."""
        task = asyncio.create_task(self.run(journal, graph, asked=asked))
        self.tasks.append(task)
        stopped = asyncio.create_task(journal.stopped.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        assert stopped.done(), task.result()
        return task


@pytest_asyncio.fixture
async def workers(comfyui: ComfyUIEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "outputs"))
    made: list[Worker] = []

    def start() -> Worker:
        made.append(Worker(App(clock=LoopClock()), comfyui.url))
        return made[-1]

    yield start
    for worker in made:
        for task in worker.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await worker.app.close()


def results(tmp_path: Path) -> list[str]:
    folder = tmp_path / "outputs" / JOB
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def ends_of_prompts(comfyui: ComfyUIEmulator) -> int:
    """How often anybody asked the server to end a prompt."""
    ids = {run.prompt_id for run in comfyui.run_log}
    asked = sum(
        request.path.endswith("/cancel") and any(i in request.path for i in ids) for request in comfyui.requests
    )
    return asked + comfyui.count("POST", "/interrupt")


def content(path: str) -> bytes:
    return Path(path).read_bytes()


async def test_each_step_is_written_before_the_next_is_taken(
    workers: Any, comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    """Invariant I13: the id is durable before the prompt leaves."""
    row, sent = Row(), []

    class Watching(RowJournal):
        async def _before(self, call: str) -> None:
            await super()._before(call)
            sent.append((call, comfyui.count("POST", "/prompt"), results(tmp_path) != []))

        async def _after(self, call: str) -> None:
            sent.append((f"{call}!", comfyui.count("POST", "/prompt"), "manifest.json" in results(tmp_path)))

    result = await workers().run(Watching(row), picture())

    assert result.status is JobStatus.DONE, result.error
    assert [(call, posts) for call, posts, _ in sent] == [
        ("submitting", 0), ("submitting!", 0), ("accepted", 1), ("accepted!", 1), ("commit", 1), ("commit!", 1),
    ]  # fmt: skip
    assert sent[-1][2]  # named inside the commit
    assert row.committed == [result.outputs]
    assert row.place.startswith("server:localhost:")
    assert row.facts["prompt_id"] == result.prompt_id == comfyui.run_log[0].prompt_id
    assert row.facts["seeds"] == dict(result.seeds) == {"1.seed": comfyui.run_log[0].graph["1"]["inputs"]["seed"]}
    assert row.facts["where"] == "server"
    assert row.facts["notes"] == []
    assert row.facts["timings"]["execute"] >= 0.05


@pytest.mark.fault(34)
@pytest.mark.fault(64)
@pytest.mark.parametrize("seconds", [0.05, 40.0], ids=["quick", "slow"])
@pytest.mark.parametrize(
    "point",
    [
        "submitting:before", "submitting:after", "accepted:before", "accepted:after", "commit:before", "commit:after",
    ],
)  # fmt: skip
async def test_a_worker_that_stops_anywhere_costs_no_second_run_and_comes_too_late_when_it_wakes(
    workers: Any, comfyui: ComfyUIEmulator, tmp_path: Path, point: str, seconds: float
) -> None:
    """Invariants I11, I12, I20: one execution, one result, and the sleeper changes nothing any more."""
    row = Row()
    first = RowJournal(row, stop_at=point)
    sleeper = await workers().until_stopped(first, picture(seconds))
    await asyncio.sleep(0.02)

    result = await workers().run(RowJournal(row), picture(seconds))

    assert result.status is JobStatus.DONE, result.error
    assert [run.outcome for run in comfyui.run_log] == ["success"]
    assert row.lost == 0
    assert row.committed == [result.outputs]
    before = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.png")}
    assert Path(result.outputs[0].path) in before

    await asyncio.sleep(60)
    first.go_on.set()
    late = await sleeper
    assert late.error is not None
    assert late.error["code"] == "lease-lost"
    assert late.outputs == ()
    assert len(row.committed) == 1
    after = {path: path.read_bytes() for path in (tmp_path / "outputs").rglob("*.png")}
    assert before.items() <= after.items()
    assert all("discarded" in path.name for path in after.keys() - before.keys())
    assert ends_of_prompts(comfyui) == 0
    assert comfyui.count("POST", "/prompt") == 1


async def test_the_worker_that_goes_on_tells_the_seeds_that_the_prompt_has(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(1))
    result = await workers().run(RowJournal(row), picture(1))
    assert result.seeds == {"1.seed": comfyui.run_log[0].graph["1"]["inputs"]["seed"]}
    assert result.prompt_id == comfyui.run_log[0].prompt_id
    assert "2 attached" in row.story


async def test_going_on_with_a_prompt_that_has_ended_asks_once_and_waits_for_nothing(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(0.05))
    await asyncio.sleep(1)
    worker, loop = workers(), asyncio.get_running_loop()
    began, asked = loop.time(), len(comfyui.requests)
    result = await worker.run(RowJournal(row), picture(0.05))
    assert result.status is JobStatus.DONE
    assert loop.time() - began < 0.05
    paths = [request.path for request in comfyui.requests[asked:]]
    assert sum(path.startswith("/history") for path in paths) == 1
    assert "/prompt" not in paths
    assert "/object_info/SaveImage" not in paths  # nothing is checked again


@pytest.mark.parametrize("seconds", [0.05, 2.0, 60.0])
async def test_going_on_with_a_running_prompt_notices_its_end_soon_although_its_socket_is_another_s(
    workers: Any, comfyui: ComfyUIEmulator, seconds: float
) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(seconds))
    loop = asyncio.get_running_loop()
    result = await workers().run(RowJournal(row), picture(seconds))
    assert result.status is JobStatus.DONE
    ended = comfyui.run_log[0].ended
    assert ended is not None
    assert result.timings["execute"] <= max(seconds * 1.3, 0.2)
    assert loop.time() < 120


async def test_a_single_run_does_not_wait_for_a_poll_period(workers: Any, comfyui: ComfyUIEmulator) -> None:
    result = await workers().run(RowJournal(Row()), picture(0.05))
    assert result.timings["execute"] < 0.2
    assert result.timings["total"] < 0.5


@pytest.mark.fault(38)
async def test_a_prompt_that_the_restarted_server_forgot_is_lost_and_runs_again_under_a_new_id(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(30))
    await asyncio.sleep(1)
    await comfyui.restart()
    result = await workers().run(RowJournal(row), picture(30))
    assert result.status is JobStatus.DONE, result.error
    assert [run.outcome for run in comfyui.run_log] == ["lost", "success"]
    assert row.lost == 1
    assert comfyui.run_log[0].prompt_id != comfyui.run_log[1].prompt_id
    again = comfyui.run_log[1].graph["1"]["inputs"]["seed"]
    assert result.seeds == {"1.seed": again}
    # Whoever attaches to the second one after a crash draws what it really has.
    assert again == random.Random(comfyui.run_log[1].prompt_id).randint(0, 2**32 - 1)


async def test_a_prompt_that_was_never_sent_is_sent_under_its_id(workers: Any, comfyui: ComfyUIEmulator) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="submitting:after"), picture())
    result = await workers().run(RowJournal(row), picture())
    assert result.status is JobStatus.DONE
    assert row.story == ["1 submitting", "2 gone", "2 submitting", "2 accepted", "2 commit"]
    assert [run.prompt_id for run in comfyui.run_log] == [row.prompt_id]
    assert row.lost == 0


@pytest.mark.fault(37)
async def test_a_prompt_that_vanished_is_lost_only_when_it_was_missed_twice(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    comfyui.faults.add_prompt(PromptFault(vanish="start"))
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture())
    asked = comfyui.count("GET", "/queue")
    result = await workers().run(RowJournal(row), picture())
    assert result.status is JobStatus.DONE
    assert row.lost == 1
    assert comfyui.count("GET", "/queue") >= asked + 2
    assert result.timings["attach"] >= 1


async def test_a_prompt_nobody_wants_any_more_is_seen_ended_before_a_new_one_starts(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    """Invariants I12 and I17: cancelled, then retried by the user."""
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(3600))
    row.phase = "ending"
    result = await workers().run(RowJournal(row), picture(0.05, "anew"))
    assert result.status is JobStatus.DONE, result.error
    old, new = comfyui.run_log
    assert (old.outcome, new.outcome) == ("interrupted", "success")
    assert old.ended is not None
    assert old.ended <= new.started
    assert old.prompt_id != new.prompt_id
    assert row.lost == 0


async def test_an_ending_prompt_that_was_never_sent_needs_no_end(workers: Any, comfyui: ComfyUIEmulator) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="submitting:after"), picture())
    row.phase = "ending"
    result = await workers().run(RowJournal(row), picture())
    assert result.status is JobStatus.DONE
    assert len(comfyui.run_log) == 1


async def test_a_prompt_at_another_place_is_given_up_for_lost(workers: Any, comfyui: ComfyUIEmulator) -> None:
    row = Row(prompt_id=PromptId(str(uuid4())), place="machine:elsewhere", phase="submitted")
    result = await workers().run(RowJournal(row), picture())
    assert result.status is JobStatus.DONE
    assert row.lost == 1
    assert row.story[0] == "1 gone"


async def test_a_server_that_does_not_answer_decides_nothing(workers: Any, comfyui: ComfyUIEmulator) -> None:
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(600))
    kept = (row.prompt_id, row.phase)
    await comfyui.kill()
    result = await workers().run(RowJournal(row), picture(600))
    assert isinstance(result.exception, ServerUnreachable)
    assert (row.prompt_id, row.phase, row.lost) == (*kept, 0)
    await comfyui.start(port=comfyui.port)


async def test_a_prompt_that_failed_meanwhile_fails_the_run_as_if_it_had_been_watched(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    graph = {
        "1": {
            "class_type": "ProbeFail",
            "inputs": {"message": "it burst", "kind": "RuntimeError", "after_steps": 1},
            "_meta": {"title": "The culprit"},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "never"}},
    }
    row = Row()
    await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), graph)
    await asyncio.sleep(2)
    result = await workers().run(RowJournal(row), graph)
    assert result.error is not None
    assert result.error["code"] == "node-failed"
    assert "The culprit" in result.error["message"]
    assert len(comfyui.run_log) == 1


@pytest.mark.parametrize("call", CALLS)
async def test_a_lost_lease_ends_the_run_publishes_nothing_and_leaves_the_prompt_alone(
    workers: Any, comfyui: ComfyUIEmulator, tmp_path: Path, call: str
) -> None:
    """Invariant I11."""
    row = Row()
    if call in ("attached", "gone"):
        await workers().until_stopped(RowJournal(row, stop_at="accepted:after"), picture(20))
        if call == "gone":
            await asyncio.sleep(1)
            await comfyui.restart()
    runs = len(comfyui.run_log)

    result = await workers().run(RowJournal(row, fails_at=call), picture(20))

    assert (result.status, result.exit_code) == (JobStatus.FAILED, 9)
    assert result.error is not None
    assert result.error["code"] == "lease-lost"
    assert row.committed == []
    assert ends_of_prompts(comfyui) == 0
    await asyncio.sleep(30)
    assert all(run.outcome == "success" for run in comfyui.run_log[runs:])
    kept = [name for name in results(tmp_path) if not name.startswith(".partial-")]
    assert kept == (["discarded-1.png"] if call == "commit" else [])
    if call == "commit":
        assert result.error["details"]["kept"] == [str(tmp_path / "outputs" / JOB / "discarded-1.png")]


@pytest.mark.fault(61)
async def test_a_drained_run_leaves_its_prompt_to_the_next_worker(workers: Any, comfyui: ComfyUIEmulator) -> None:
    row, cancel = Row(), asyncio.Event()
    journal = RowJournal(row, draining=True)
    running = asyncio.create_task(workers().run(journal, picture(100), cancel=cancel))
    await asyncio.sleep(10)
    cancel.set()
    assert (await running).status is JobStatus.CANCELLED
    assert isinstance(journal.asked[0], asyncio.CancelledError)
    result = await workers().run(RowJournal(row), picture(100))
    assert result.status is JobStatus.DONE
    assert [run.outcome for run in comfyui.run_log] == ["success"]


async def test_a_cancelled_run_takes_its_prompt_back(workers: Any, comfyui: ComfyUIEmulator) -> None:
    cancel = asyncio.Event()
    running = asyncio.create_task(workers().run(RowJournal(Row()), picture(100), cancel=cancel))
    await asyncio.sleep(10)
    cancel.set()
    assert (await running).status is JobStatus.CANCELLED
    await asyncio.sleep(100)
    assert [run.outcome for run in comfyui.run_log] == ["interrupted"]


async def test_a_cancellation_that_comes_while_the_result_is_being_committed_is_too_late(
    workers: Any, comfyui: ComfyUIEmulator
) -> None:
    """What the journal has recorded as done lies there, whatever is pressed meanwhile."""
    row, cancel = Row(), asyncio.Event()
    journal = RowJournal(row, stop_at="commit:before")
    task = asyncio.create_task(workers().run(journal, picture(), cancel=cancel))
    await journal.stopped.wait()
    cancel.set()
    await asyncio.sleep(1)
    journal.go_on.set()
    result = await task
    assert result.status is JobStatus.DONE
    assert row.committed == [result.outputs]
    assert content(result.outputs[0].path)


async def test_names_are_taken_back_when_the_record_cannot_be_kept(
    workers: Any, comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    """Invariant I15, seen from the other side: what is not done is not there as a result."""
    row = Row()
    result = await workers().run(RowJournal(row, fails_at="record"), picture())
    assert result.error is not None
    assert result.error["code"] == "store-unavailable"
    assert results(tmp_path) == []
    again = await workers().run(RowJournal(row), picture())
    assert again.status is JobStatus.DONE
    assert len(comfyui.run_log) == 1


async def test_a_job_that_is_done_again_keeps_the_results_of_its_first_run(workers: Any, tmp_path: Path) -> None:
    row, worker = Row(), workers()
    await worker.run(RowJournal(row), picture())
    first = content(row.committed[0][0].path)
    row.prompt_id = None
    result = await worker.run(RowJournal(row), picture(0.06))
    assert result.status is JobStatus.DONE, result.error
    assert results(tmp_path) == ["2-1.png", "earlier-1", "manifest.json"]
    folder = tmp_path / "outputs" / JOB / "earlier-1"
    assert content(str(folder / "2-1.png")) == first
    assert content(str(folder / "manifest.json"))
    assert any("earlier-1" in note for note in row.facts["notes"])


# --- a path of the user's choice --------------------------------------------------------------------------


def knight(tmp_path: Path, **more: Any) -> dict[str, Any]:
    finished = tmp_path / "jobs" / "finished"
    return {"out_file": str(finished / "image" / "knight.png"), "out_root": str(finished), **more}


def delivered(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "jobs" / "finished"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("point", ["accepted:after", "commit:before", "commit:after"])
async def test_a_job_file_s_result_lies_where_it_was_asked_for_whenever_a_worker_stops(
    workers: Any, comfyui: ComfyUIEmulator, tmp_path: Path, point: str
) -> None:
    row, asked = Row(), knight(tmp_path)
    first = RowJournal(row, stop_at=point)
    sleeper = await workers().until_stopped(first, picture(), asked=asked)
    result = await workers().run(RowJournal(row), picture(), asked=asked)
    assert result.status is JobStatus.DONE, result.error
    assert [output.path for output in result.outputs] == [asked["out_file"]]
    assert result.folder == str(tmp_path / "jobs" / "finished" / "image")
    assert len(comfyui.run_log) == 1
    await asyncio.sleep(60)
    first.go_on.set()
    assert (await sleeper).error is not None
    files = delivered(tmp_path)
    assert files.pop("image/knight.png") == content(result.outputs[0].path)
    assert all("discarded" in name for name in files)
    assert not list((tmp_path / "jobs").rglob(".work-*"))


async def test_a_second_run_replaces_the_first_one_s_result_and_leaves_somebody_else_s(
    workers: Any, tmp_path: Path
) -> None:
    row, worker = Row(), workers()
    for seconds in (0.05, 0.06):
        before = {output.path: output.sha256 for outputs in row.committed for output in outputs}
        row.prompt_id = None
        result = await worker.run(RowJournal(row), picture(seconds), asked=knight(tmp_path, earlier_outputs=before))
        assert result.status is JobStatus.DONE, result.error
        assert list(delivered(tmp_path)) == ["image/knight.png"]
    row.prompt_id = None
    await worker.run(RowJournal(row), picture(0.07), asked=knight(tmp_path))
    assert list(delivered(tmp_path)) == ["image/knight.png", "image/knight_1.png"]
    assert row.facts["notes"] == ["knight.png was there already, from elsewhere; the result is knight_1.png"]


@pytest.mark.threat("S1")
async def test_a_path_that_leads_elsewhere_is_refused_before_anything_runs(
    workers: Any, comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    """Threat S1."""
    for path in ("/etc/knight.png", f"{tmp_path}/jobs/finished/../../knight.png", f"{tmp_path}/jobs/finished/CON.png"):
        result = await workers().run(RowJournal(Row()), picture(), asked=knight(tmp_path, out_file=path))
        assert result.error is not None
        assert result.error["code"] == "value-invalid"
    assert comfyui.requests == []
