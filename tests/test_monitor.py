"""What is dropped into the folder gets into the database: once, whole, and whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio

import workflows
from runcomfy.adapters.job_files import YamlJobFiles
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.application.monitor import Check, Monitor, ScanReport
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import (
    FolderWatched,
    InputFileMissing,
    JobFileInvalid,
    LocalError,
    StoreUnavailable,
)
from runcomfy.domain.queued import Ending, EventKind, Ingested, NewJob, Outcome, QueuedJob, QueueStatus, WorkerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings
from runcomfy.ports.job_files import FoundFile
from runcomfy.testing.clock import START, LoopClock

NAME = "T2I_20250809123001_1_knight.yaml"
WORKER = WorkerId("worker")
LEASE = timedelta(seconds=60)


def job_text(name: str = "knight", *, prompt: str = "a knight in rain", priority: int = 20, more: str = "") -> str:
    return (
        f'job_type: T2I\nworkflow_id: wf_realistic_portrait\npriority: {priority}\ninputs:\n  prompt: "{prompt}"\n'
        f'  seed: 123456\n  steps: 30\n{more}outputs:\n  file_path: "jobs/finished/image/{name}.png"\n'
    )


class Counting(YamlJobFiles):
    """The folder's files, and which of them were opened."""

    opened: ClassVar[list[str]] = []

    def read(self, found: FoundFile) -> bytes | JobFileInvalid | None:
        self.opened.append(found.name)
        return super().read(found)


class Project:
    """A project folder, its database, and a monitor that writes down what it tells."""

    def __init__(self, root: Path, store: SqlJobs, clock: LoopClock) -> None:
        self.root, self.store, self.clock = root, store, clock
        self.settings = settings_of(root)
        self.said: list[str] = []
        self.reports: list[ScanReport] = []

    def monitor(self, *, check: Check | None = None, store: Any = None, **changes: Any) -> Monitor:
        settings = replace(self.settings, **changes)
        files = self.files(settings)
        return Monitor(
            store or self.store,
            files,
            settings,
            check=check,
            tell=self.said.append,
            clock=self.clock,
            on_scan=self.reports.append,
        )

    def files(self, settings: QueueSettings) -> Counting:
        registry = WorkflowRegistry(
            root=str(self.root), workflows_file=settings.workflows_file, shipped=workflows.names
        )
        return Counting(settings, registry=registry)

    def path(self, name: str = NAME, folder: str = "image") -> Path:
        return self.root / "jobs" / "processing" / folder / name

    def drop(self, text: str | None = None, name: str = NAME, folder: str = "image") -> Path:
        path = self.path(name, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job_text(name.removesuffix(".yaml")) if text is None else text, encoding="utf-8")
        return path

    async def job(self, name: str = NAME) -> QueuedJob:
        found = await self.store.job(name)
        assert found is not None
        return found

    async def claim(self) -> QueuedJob:
        (job,) = await self.store.claim(WORKER, count=1, lease=LEASE)
        return job

    async def end(self, outcome: Outcome) -> None:
        job = await self.claim()
        await self.store.finish(job.id, job.token, Ending(outcome, error={"code": "x", "message": "x"}))


def settings_of(root: Path) -> QueueSettings:
    return QueueSettings(
        root=str(root),
        jobs_processing=str(root / "jobs" / "processing"),
        jobs_finished=str(root / "jobs" / "finished"),
        database=Secret(str(root / "queue.sqlite3")),
    )


@pytest_asyncio.fixture
async def project(tmp_path: Path, clock: LoopClock) -> AsyncIterator[Project]:
    root = tmp_path / "project"
    root.mkdir()
    wake = timedelta(seconds=1)  # under virtual time nothing else passes between two looks
    database = store_from(settings_of(root).database, clock=clock, durable=False, wake_interval=wake)
    async with SqlJobs(database) as store:
        yield Project(root, store, clock)


async def settle(monitor: Monitor) -> ScanReport:
    """Let the monitor see what is there, and see it again once it has settled."""
    first = await monitor.scan()
    await asyncio.sleep(0.3)
    return first.then(await monitor.scan())


class Watching:
    """A monitor that runs while the block does."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._stop = monitor, asyncio.Event()

    async def __aenter__(self) -> None:
        self._task = asyncio.ensure_future(self._monitor.run(self._stop))
        await asyncio.sleep(0.01)

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await self._task


# --- new files ------------------------------------------------------------------------------------------------


async def test_a_file_is_in_the_database_within_a_second_wherever_between_two_looks_it_was_dropped(
    project: Project,
) -> None:
    async with Watching(project.monitor()):
        for number in range(8):
            await asyncio.sleep(1 + number * 0.07)
            name = f"T2I_{number}.yaml"
            project.drop(name=name)
            await asyncio.sleep(0.9)
            assert (await project.job(name)).status is QueueStatus.PENDING
    job = await project.job("T2I_0.yaml")
    assert (job.job_type, job.workflow_id, job.priority) == ("T2I", "wf_realistic_portrait", 20)
    assert job.request is not None
    assert job.request.inputs == {"prompt": "a knight in rain", "seed": 123456, "steps": 30}
    assert job.source_path == str(project.path("T2I_0.yaml"))
    assert project.said[0] == "T2I_0.yaml: in the queue"


async def test_a_file_that_is_still_being_written_is_left(project: Project) -> None:
    text = job_text()
    async with Watching(project.monitor()):
        for end in range(0, len(text), 20):
            project.drop(text[:end])
            await asyncio.sleep(0.2)
        assert await project.store.job(NAME) is None
        assert project.said == []
        project.drop(text)
        await asyncio.sleep(1)
        assert (await project.job()).status is QueueStatus.PENDING


async def test_a_writer_that_pauses_in_the_middle_is_given_two_seconds(project: Project) -> None:
    text = job_text()
    async with Watching(project.monitor()):
        project.drop(text[:60])
        await asyncio.sleep(1.8)
        assert project.said == []
        project.drop(text)
        await asyncio.sleep(1)
        assert (await project.job()).status is QueueStatus.PENDING
    assert project.said == [f"{NAME}: in the queue"]


async def test_many_files_are_numbered_in_the_order_of_their_names(project: Project) -> None:
    names = [f"T2I_{number:03}.yaml" for number in range(200)]
    for name in reversed(names):
        project.drop(name=name)
    report = await project.monitor().once()
    assert len(report.taken) == 200
    assert [job.config_name for job in await project.store.jobs()] == names


async def test_what_is_known_is_not_read_into_the_database_again_by_a_new_monitor(project: Project) -> None:
    for number in range(5):
        project.drop(name=f"{number}.yaml")
    assert len((await project.monitor().once()).taken) == 5
    before = await project.store.events()
    report = await project.monitor().once()
    assert (report.files, report.taken, report.refused) == (5, (), ())
    assert await project.store.events() == before


# --- changed files --------------------------------------------------------------------------------------------


async def test_a_touched_file_changes_nothing(project: Project) -> None:
    path = project.drop()
    monitor = project.monitor()
    await settle(monitor)
    await project.end(Outcome.FAILED)
    os.utime(path)
    path.write_text(path.read_text())
    assert (await settle(monitor)).taken == ()
    assert (await project.job()).status is QueueStatus.FAILED
    await monitor.close()


async def test_a_changed_file_of_a_waiting_job_is_what_runs(project: Project) -> None:
    project.drop()
    monitor = project.monitor()
    await settle(monitor)
    project.drop(job_text(prompt="a dragon", priority=5))
    (taken,) = (await settle(monitor)).taken
    assert taken.what is Ingested.UPDATED
    job = await project.job()
    assert job.request is not None
    assert (job.request.inputs["prompt"], job.priority) == ("a dragon", 5)
    await monitor.close()


async def test_of_a_changed_file_of_a_done_job_only_the_priority_counts(project: Project) -> None:
    project.drop()
    monitor = project.monitor()
    await settle(monitor)
    await project.end(Outcome.DONE)
    project.drop(job_text(prompt="a dragon", priority=5))
    (taken,) = (await settle(monitor)).taken
    assert taken.what is Ingested.PRIORITY
    job = await project.job()
    assert (job.status, job.priority) == (QueueStatus.DONE, 5)
    await monitor.close()


async def test_a_changed_file_of_a_failed_job_runs_again(project: Project) -> None:
    project.drop()
    monitor = project.monitor()
    await settle(monitor)
    await project.end(Outcome.FAILED)
    project.drop(job_text(prompt="a dragon"))
    (taken,) = (await settle(monitor)).taken
    assert taken.what is Ingested.AGAIN
    assert (await project.job()).status is QueueStatus.PENDING
    await monitor.close()


async def test_a_file_changed_while_its_job_runs_is_taken_up_when_that_has_ended_with_one_warning(
    project: Project,
) -> None:
    project.drop()
    async with Watching(project.monitor()):
        await asyncio.sleep(1)
        running = await project.claim()
        project.drop(job_text(prompt="a dragon"))
        await asyncio.sleep(20)
        held = f"warning: {NAME} was changed while it runs; the new content is taken up when it has ended"
        assert project.said[1:] == [held]
        assert (await project.job()).status is QueueStatus.PROCESSING
        await project.store.finish(running.id, running.token, Ending(Outcome.DONE))
        await asyncio.sleep(1)
        job = await project.job()
        assert job.status is QueueStatus.PENDING
        assert job.request is not None
        assert job.request.inputs["prompt"] == "a dragon"
    assert project.said[2:] == [f"{NAME}: changed; it waits to run again"]


async def test_a_cancelled_job_is_started_again_by_retry_only(project: Project) -> None:
    project.drop()
    async with Watching(project.monitor()):
        await asyncio.sleep(1)
        await project.store.cancel(NAME)
        project.drop(job_text(prompt="a dragon"))
        await asyncio.sleep(20)
        assert (await project.job()).cancelled
        assert project.said[1:] == [f"warning: {NAME} was cancelled; only `e3 retry {NAME}` starts it again"]
        await project.store.retry(NAME)
        await asyncio.sleep(1)
        job = await project.job()
        assert job.status is QueueStatus.PENDING
        assert job.request is not None
        assert job.request.inputs["prompt"] == "a dragon"


async def test_a_deleted_file_changes_nothing(project: Project) -> None:
    path = project.drop()
    monitor = project.monitor()
    await settle(monitor)
    before = await project.job()
    path.unlink()
    assert (await settle(monitor)).taken == ()
    assert await project.job() == before
    project.drop()
    assert (await settle(monitor)).taken == ()  # it came back with the same content
    await monitor.close()


async def test_a_file_moved_to_another_folder_stays_the_same_job(project: Project) -> None:
    path = project.drop()
    monitor = project.monitor()
    await settle(monitor)
    other = project.path(folder="video")
    path.rename(other)
    assert (await settle(monitor)).taken == ()
    other.write_text(job_text(prompt="a dragon"))
    (taken,) = (await settle(monitor)).taken
    assert taken.what is Ingested.UPDATED
    assert len(await project.store.jobs()) == 1
    await monitor.close()


@pytest.mark.parametrize("prompt", ["a knight in rain", "a dragon"])
async def test_a_second_file_of_the_same_name_is_told_once_and_not_taken(project: Project, prompt: str) -> None:
    project.drop()
    project.drop(job_text(prompt=prompt), folder="video")
    async with Watching(project.monitor()):
        await asyncio.sleep(5)
    job = await project.job()
    assert job.source_path == str(project.path())
    (warning,) = [words for words in project.said if "not taken" in words]
    assert str(project.path()) in warning
    assert "another name" in warning


async def test_of_two_files_of_one_name_the_other_counts_when_the_first_is_gone(project: Project) -> None:
    project.drop()
    project.drop(job_text(prompt="a dragon"), folder="video")
    async with Watching(project.monitor()):
        await asyncio.sleep(3)
        project.path().unlink()
        await asyncio.sleep(3)
        job = await project.job()
    assert job.request is not None
    assert job.request.inputs["prompt"] == "a dragon"
    assert project.said[2:] == [f"{NAME}: changed while it waited; it waits with the new content"]


# --- files that cannot be used --------------------------------------------------------------------------------


async def test_a_broken_file_is_told_once_with_line_and_field_and_taken_when_it_is_mended(project: Project) -> None:
    broken = job_text().replace("seed: 123456", "seed: .nan")
    async with Watching(project.monitor()):
        path = project.drop(broken)
        await asyncio.sleep(30)
        (told,) = project.said
        assert f"{NAME}, line 6, inputs.seed: .nan is not a finite number" in told
        assert path.read_text() == broken
        path.write_text(broken)  # the same content again
        await asyncio.sleep(5)
        assert len(project.said) == 1
        path.write_text(broken.replace("steps: 30", "steps: .inf"))
        await asyncio.sleep(5)
        assert "line 7, inputs.steps" in project.said[1]
        project.drop()
        await asyncio.sleep(1)
        assert (await project.job()).status is QueueStatus.PENDING
    events = [event for event in await project.store.events() if event.kind is EventKind.FILE_REFUSED]
    assert [event.data["details"]["line"] for event in events] == [6, 6]
    assert events[0].data["file"] == str(path)
    assert [refused.path for report in project.reports for refused in report.refused] == [str(path)] * 2


async def test_a_file_that_is_old_and_broken_is_told_at_the_first_look(project: Project) -> None:
    path = project.drop("hello")
    long_ago = START.timestamp() - 3_600
    os.utime(path, (long_ago, long_ago))
    report = await project.monitor().once()
    assert len(report.refused) == 1
    assert "expected names with values" in project.said[0]


async def test_a_broken_file_does_not_keep_the_others_from_being_taken(project: Project) -> None:
    for number in range(10):
        name = f"{number}.yaml"
        project.drop("\x00" if number % 2 else job_text(name), name=name)
    report = await project.monitor().once()
    assert [taken.job.config_name for taken in report.taken] == [f"{n}.yaml" for n in range(0, 10, 2)]
    assert len(report.refused) == 5


async def test_a_file_whose_workflow_is_added_later_is_taken_then(project: Project) -> None:
    listed = project.root / "config" / "workflows.yaml"
    listed.parent.mkdir()
    listed.write_text("wf_other: {template_path: wf_realistic_portrait.json}\n")
    project.drop(job_text().replace("wf_realistic_portrait", "wf_mine"))
    async with Watching(project.monitor(workflows_file=str(listed))):
        await asyncio.sleep(3)
        assert "line 2, workflow_id: there is no workflow 'wf_mine'" in project.said[0]
        listed.write_text("wf_mine: {template_path: wf_realistic_portrait.json}\n")
        await asyncio.sleep(1)
        assert (await project.job()).workflow_id == "wf_mine"


async def test_while_the_list_of_workflows_is_broken_the_files_wait(project: Project) -> None:
    listed = project.root / "workflows.yaml"
    listed.write_text("wf: [")
    project.drop()
    async with Watching(project.monitor(workflows_file=str(listed))):
        await asyncio.sleep(30)
        (told,) = project.said
        assert told.startswith("job files wait: ")
        assert "workflows.yaml, line 1" in told
        listed.write_text("{}")
        await asyncio.sleep(1)
        assert (await project.job()).status is QueueStatus.PENDING


async def test_inputs_are_checked_against_the_graph_before_anything_is_queued(project: Project) -> None:
    async def prepared(job: NewJob) -> None:
        await app.orchestrator().prepare(job.request)

    async with App() as app:
        monitor = project.monitor(check=prepared)
        project.drop(job_text(more="  stepps: 3\n"), name="unknown.yaml")
        project.drop(job_text(more="  cfg: 1000\n"), name="range.yaml")
        project.drop(job_text().replace('  prompt: "a knight in rain"\n', ""), name="missing.yaml")
        project.drop(job_text(more="  image: '@none.png'\n"), name="file.yaml")
        project.drop(name="good.yaml")
        report = await monitor.once()
    assert [taken.job.config_name for taken in report.taken] == ["good.yaml"]
    told = {Path(refused.path).name: refused.error.message for refused in report.refused}
    assert "unknown.yaml, line 8, inputs.stepps: " in told["unknown.yaml"]
    assert "range.yaml, line 8, inputs.cfg: " in told["range.yaml"]
    assert "missing.yaml, line 4, inputs: " in told["missing.yaml"]
    assert "file.yaml, line 8, inputs.image: " in told["file.yaml"]


async def test_an_input_file_that_comes_after_its_job_file_is_waited_for(project: Project) -> None:
    async def check(job: NewJob) -> None:
        if not (project.root / "in.png").exists():
            raise InputFileMissing("the input file in.png does not exist")

    project.drop()
    async with Watching(project.monitor(check=check)):
        await asyncio.sleep(5)
        assert len(project.said) == 1
        (project.root / "in.png").write_text("x")
        await asyncio.sleep(12)
        assert (await project.job()).status is QueueStatus.PENDING


async def test_two_job_files_may_want_one_name_for_their_results(project: Project) -> None:
    project.drop(job_text("same"), name="a.yaml")
    project.drop(job_text("same"), name="b.yaml")
    report = await project.monitor().once()
    assert [taken.job.config_name for taken in report.taken] == ["a.yaml", "b.yaml"]
    assert not report.refused


async def test_a_link_out_of_the_folder_is_told_once(project: Project) -> None:
    monitor = project.monitor()
    await monitor.scan()
    outside = project.root / "outside.yaml"
    outside.write_text(job_text())
    try:
        project.path("link.yaml").symlink_to(outside)
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    for _ in range(3):
        await settle(monitor)
    (told,) = project.said
    assert "link.yaml: it is a link" in told
    assert await project.store.jobs() == []
    await monitor.close()


async def test_a_defect_in_reading_one_file_is_told_and_stops_nobody(project: Project) -> None:
    async def check(job: NewJob) -> None:
        if job.config_name == "a.yaml":
            raise ZeroDivisionError

    project.drop(name="a.yaml")
    project.drop(name="b.yaml")
    report = await project.monitor(check=check).once()
    assert [taken.job.config_name for taken in report.taken] == ["b.yaml"]
    assert "ZeroDivisionError" in report.refused[0].error.message


# --- trouble --------------------------------------------------------------------------------------------------


class Failing:
    """A store of which some calls fail, in order."""

    def __init__(self, store: SqlJobs, errors: list[LocalError | None]) -> None:
        self._store, self._errors = store, errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def ingest(self, job: NewJob, *, default_priority: int = 50) -> tuple[Ingested, QueuedJob]:
        if self._errors and (error := self._errors.pop(0)) is not None:
            raise error
        return await self._store.ingest(job, default_priority=default_priority)


@pytest.mark.fault(55)
async def test_while_the_database_is_locked_nothing_is_lost_and_it_is_said_once(project: Project) -> None:
    for number in range(3):
        project.drop(name=f"{number}.yaml")
    errors: list[LocalError | None] = [None, *(StoreUnavailable("the database is locked") for _ in range(5))]
    async with Watching(project.monitor(store=Failing(project.store, errors))):
        await asyncio.sleep(60)
    assert {job.config_name for job in await project.store.jobs()} == {"0.yaml", "1.yaml", "2.yaml"}
    assert [words for words in project.said if "locked" in words] == ["the database is locked; trying again"]
    assert "the monitor goes on" in project.said


@pytest.mark.fault(63)
async def test_a_second_monitor_of_the_folder_is_refused_until_the_first_ends(project: Project) -> None:
    async with Watching(project.monitor()):
        await asyncio.sleep(1)  # else either may be the first
        with pytest.raises(FolderWatched):
            await project.monitor().run(asyncio.Event())
        with pytest.raises(FolderWatched):
            await project.monitor().once()
    await project.monitor().once()


async def test_folders_that_are_removed_are_made_again_and_watched(project: Project) -> None:
    async with Watching(project.monitor()):
        await asyncio.sleep(1)
        shutil.rmtree(project.root / "jobs")
        await asyncio.sleep(1)
        project.drop()
        await asyncio.sleep(1)
        assert (await project.job()).status is QueueStatus.PENDING


@pytest.mark.fault(54)
async def test_a_folder_that_cannot_be_made_is_said_and_tried_again(project: Project) -> None:
    blocked = project.root / "jobs"
    blocked.write_text("in the way")
    async with Watching(project.monitor()):
        await asyncio.sleep(10)
        (told,) = project.said
        assert "could not make the folder" in told
        blocked.unlink()
        await asyncio.sleep(6)
        project.drop()
        await asyncio.sleep(1)
        assert (await project.job()).status is QueueStatus.PENDING


async def test_a_stopped_monitor_leaves_at_once(project: Project) -> None:
    stop = asyncio.Event()
    running = asyncio.ensure_future(project.monitor(poll_interval=timedelta(hours=1)).run(stop))
    await asyncio.sleep(2)
    before = asyncio.get_running_loop().time()
    stop.set()
    await running
    assert asyncio.get_running_loop().time() - before < 0.1


# --- one file by its name -------------------------------------------------------------------------------------


async def test_a_single_file_is_added_at_once_wherever_it_lies(project: Project) -> None:
    path = project.root / "mine.yaml"
    path.write_text(job_text("mine"))
    monitor = project.monitor()
    assert [(what, job.config_name) for what, job in [await monitor.add(str(path))]] == [(Ingested.NEW, "mine.yaml")]
    assert (await monitor.add(str(path)))[0] is Ingested.SAME
    path.write_text(job_text("mine", prompt="a dragon"))
    assert (await monitor.add(str(path)))[0] is Ingested.UPDATED


async def test_adding_says_what_is_wrong_with_the_file(project: Project) -> None:
    path = project.drop(job_text().replace("priority: 20", "priority: high"))
    with pytest.raises(JobFileInvalid) as caught:
        await project.monitor().add(str(path))
    assert "line 3, priority" in caught.value.message
    with pytest.raises(InputFileMissing):
        await project.monitor().add(str(project.root / "none.yaml"))


async def test_a_file_added_from_the_folder_is_the_one_the_monitor_sees(project: Project) -> None:
    path = project.drop()
    await project.monitor().add(str(path))
    assert (await project.monitor().once()).taken == ()
    moved = project.path(folder="audio")
    moved.parent.mkdir(exist_ok=True)
    path.rename(moved)
    moved.write_text(job_text(prompt="a dragon"))
    assert (await project.monitor().add(str(moved)))[0] is Ingested.UPDATED


# --- size -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(66)
async def test_looking_at_many_known_files_reads_none_of_them(project: Project) -> None:
    for number in range(300):
        project.drop(name=f"{number:04}.yaml")
    monitor = project.monitor()
    await settle(monitor)
    assert len(await project.store.jobs()) == 300
    Counting.opened.clear()
    for _ in range(5):
        assert (await monitor.scan()).files == 300
        await asyncio.sleep(0.5)
    assert Counting.opened == []
    project.drop(job_text("0007", prompt="a dragon"), name="0007.yaml")
    await settle(monitor)
    assert Counting.opened == ["0007.yaml"]
    await monitor.close()
