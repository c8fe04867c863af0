"""Job files that cannot be used, and a monitor in trouble: told once, and taken up when it is mended."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.monitor import LOOKED_AT_AGAIN
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import FolderWatched, InputFileMissing, JobFileInvalid, LocalError, StoreUnavailable
from runcomfy.domain.queued import EventKind, Ingested, NewJob, QueuedJob, QueueStatus
from runcomfy.ports.job_files import FoundFile
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.job_folders import NAME, Counting, Project, Watching, a_project, job_text, settle


@pytest_asyncio.fixture
async def project(tmp_path: Path, clock: LoopClock) -> AsyncIterator[Project]:
    async with a_project(tmp_path, clock) as project:
        yield project


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


# --- files that change while they are read, and systems without locks -----------------------------------------


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Path], None]]:
    """What others do to a file just before it is read, the last first; the very first for ever."""
    deeds: list[Callable[[Path], None]] = []
    reads = Counting.read

    def read(self: Counting, found: FoundFile) -> bytes | JobFileInvalid | None:
        if deeds:
            (deeds.pop() if len(deeds) > 1 else deeds[0])(Path(found.path))
        return reads(self, found)

    monkeypatch.setattr(Counting, "read", read)
    return deeds


def goes_on(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("# more\n")


def nothing(_: Path) -> None:
    pass


def makes_it_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


async def test_a_file_that_is_added_while_it_is_written_is_taken_once_it_is_whole(
    project: Project, meanwhile: list[Callable[[Path], None]]
) -> None:
    path = project.drop()
    meanwhile.extend([nothing, goes_on, goes_on, goes_on])
    what, job = await project.monitor().add(str(path))
    assert (what, job.config_name) == (Ingested.NEW, NAME)


async def test_a_file_that_is_written_for_ever_is_not_added(
    project: Project, meanwhile: list[Callable[[Path], None]]
) -> None:
    path = project.drop()
    meanwhile.append(goes_on)
    with pytest.raises(JobFileInvalid, match="is still being written"):
        await project.monitor().add(str(path))
    assert await project.store.job(NAME) is None


async def test_what_cannot_be_read_any_more_is_said_to_who_adds_it_and_to_who_watches(
    project: Project, meanwhile: list[Callable[[Path], None]]
) -> None:
    path = project.drop()
    meanwhile.append(makes_it_a_folder)
    with pytest.raises(JobFileInvalid, match="cannot be read"):
        await project.monitor().add(str(path))
    path.rmdir()
    project.drop()
    long_ago = START.timestamp() - 3_600
    os.utime(path, (long_ago, long_ago))
    async with Watching(project.monitor()):
        await asyncio.sleep(5)
    (said,) = project.said
    assert "cannot be read" in said


async def test_a_file_that_changes_while_it_is_read_is_taken_when_it_has_settled(
    project: Project, meanwhile: list[Callable[[Path], None]]
) -> None:
    project.drop()
    meanwhile.extend([nothing, goes_on])
    Counting.opened.clear()
    async with Watching(project.monitor()):
        await asyncio.sleep(10)
    assert Counting.opened == [NAME, NAME]
    assert (await project.job()).status is QueueStatus.PENDING
    assert project.said == [f"{NAME}: in the queue"]


async def test_of_many_broken_files_each_is_told_once(project: Project) -> None:
    """Refused files are looked at again, some at each look, for what they lack may have come."""
    for number in range(LOOKED_AT_AGAIN + 5):
        project.drop("hello", name=f"{number}.yaml")
    async with Watching(project.monitor()):
        await asyncio.sleep(120)
    assert len(project.said) == LOOKED_AT_AGAIN + 5


@pytest.mark.skipif(sys.platform == "win32", reason="looks at POSIX locks")
async def test_on_a_file_system_without_locks_it_is_said_once_that_one_monitor_is_to_watch(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    project.drop()
    async with Watching(project.monitor()):
        await asyncio.sleep(10)
    said, taken = project.said
    assert "make sure that only one monitor watches it" in said
    assert taken == f"{NAME}: in the queue"
    assert (await project.job()).status is QueueStatus.PENDING
