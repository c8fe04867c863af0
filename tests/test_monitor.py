"""What is dropped into the folder gets into the database: once, whole, and as often as it changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.domain.exceptions import InputFileMissing, JobFileInvalid
from runcomfy.domain.queued import Ending, Ingested, Outcome, QueueStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.job_folders import NAME, Counting, Project, Watching, a_project, job_text, settle


@pytest_asyncio.fixture
async def project(tmp_path: Path, clock: LoopClock) -> AsyncIterator[Project]:
    async with a_project(tmp_path, clock) as project:
        yield project


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
