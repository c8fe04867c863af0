"""CONJURE's orchestrator where things are odd: machines that do not go, files that never get whole, many jobs."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
from pathlib import Path

import pytest

import workflows
from runcomfy.bootstrap import App
from runcomfy.conjure import files, orchestrator
from runcomfy.conjure.orchestrator import ConjureOrchestrator
from runcomfy.conjure.progress_tracker import FluxMeshProgressTracker
from runcomfy.conjure.workflow_client import KEPT_LABELS, ConjureWorkflowClient
from runcomfy.domain.exceptions import DownloadFailed, InputFileInvalid
from runcomfy.domain.settings import CloudSettings
from runcomfy.runcomfy_orchestrator import JobStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import settings_for


@pytest.fixture
def conjure(project: Path, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> ConjureOrchestrator:
    settings = settings_for(cloud_settings, tmp_path / "state")
    return ConjureOrchestrator(
        settings=settings,
        clock=clock,
        tracker=FluxMeshProgressTracker(clock=clock),
        office=lambda given: App(given or settings, clock=clock, launches=False),
    )


async def test_whole_results_of_a_machine_that_was_not_seen_gone_are_there_with_what_is_wrong(
    conjure: ConjureOrchestrator, cloud: RunComfyEmulator
) -> None:
    refusal = cloud.next_call("DELETE servers/*", status=403, body={"message": "no"}, times=None, works=False)
    job = await conjure.execute_flux_mesh_generation()
    assert job.status is JobStatus.COMPLETED
    assert job.result_files is not None
    assert set(job.result_files) == {"Generated Image", "Generated Mesh"}
    [server_id] = cloud.billing
    assert job.error_message is not None
    assert server_id in job.error_message
    cloud.forget_call(refusal)
    assert await conjure.runcomfy_client.stop_machine(server_id)


async def test_a_dev_server_is_ended_for_idling_only_after_its_time_and_where_there_is_one(
    conjure: ConjureOrchestrator, cloud: RunComfyEmulator
) -> None:
    conjure.auto_shutdown = True
    assert await conjure.shutdown_idle_machines() == []
    machine = await conjure.get_or_create_machine()
    await asyncio.sleep(conjure.idle_timeout / 2)
    assert await conjure.shutdown_idle_machines() == []
    assert cloud.billing == [machine.server_id]
    await asyncio.sleep(conjure.idle_timeout / 2 + 1)
    assert await conjure.shutdown_idle_machines() == [machine.server_id]
    assert conjure.machine_pool == {}


async def test_a_dev_server_on_which_a_job_runs_is_not_idle(
    conjure: ConjureOrchestrator, cloud: RunComfyEmulator
) -> None:
    machine = await conjure.get_or_create_machine()
    job = await conjure.create_job()
    running = asyncio.create_task(conjure.execute_job(job))
    await asyncio.sleep(2)
    assert job.status is JobStatus.RUNNING
    conjure.auto_shutdown, conjure.idle_timeout = True, 0
    assert await conjure.shutdown_idle_machines() == []
    assert (await running).status is JobStatus.COMPLETED
    assert await conjure.shutdown_idle_machines() == [machine.server_id]
    assert cloud.billing == []


async def test_a_picture_that_never_gets_whole_is_named_as_the_user_knows_it(
    conjure: ConjureOrchestrator, project: Path, cloud: RunComfyEmulator
) -> None:
    render = project / files.RENDER
    render.write_bytes(render.read_bytes()[:200])
    job = await conjure.execute_flux_mesh_generation()
    assert job.status is JobStatus.FAILED
    assert job.error_message is not None
    assert str(files.RENDER) in job.error_message
    assert "being written" not in job.error_message, "nobody writes it any more"
    assert "comfyctl-" not in job.error_message, "the copy is ours"
    assert cloud.launched == []
    with pytest.raises(InputFileInvalid, match="render"):
        await files.copy_picture(render, project / "copy.png", max_pixels=10**6)


def test_a_result_that_has_changed_replaces_nothing(project: Path) -> None:
    picture, mesh = project / "made.png", project / "made.glb"
    picture.write_bytes(b"a picture")
    mesh.write_bytes(b"a mesh")
    places = {project / "flux.png": picture, project / "mesh.glb": mesh}
    for place in places:
        place.write_bytes(b"old")
    results = {
        place: files.Verified(str(made), made.stat().st_size, hashlib.sha256(made.read_bytes()).hexdigest())
        for place, made in places.items()
    }
    mesh.write_bytes(b"A mesh")  # as long as before
    with pytest.raises(DownloadFailed, match="is not what was verified"):
        files.publish(results)
    assert [place.read_bytes() for place in places] == [b"old", b"old"]
    assert not list(project.glob(".tmp-*"))
    results[project / "mesh.glb"] = files.Verified(str(mesh), 6, hashlib.sha256(b"A mesh").hexdigest())
    files.publish(results)
    assert [place.read_bytes() for place in places] == [b"a picture", b"A mesh"]


async def test_of_many_jobs_the_oldest_that_ended_is_forgotten_and_never_one_that_has_not(
    conjure: ConjureOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator, "FORGET_AFTER", 3)
    first, second, third, fourth = [await conjure.create_job() for _ in range(4)]
    assert conjure.get_all_jobs() == [first, second, third, fourth]
    second.status = third.status = JobStatus.COMPLETED
    fifth = await conjure.create_job()
    assert conjure.get_all_jobs() == [first, fourth, fifth]


def test_without_a_prompt_of_the_users_the_workflow_keeps_its_own(conjure: ConjureOrchestrator, project: Path) -> None:
    graph = conjure.load_workflow()
    assert conjure.prepare_workflow_inputs(graph) != graph
    (project / files.USER_PROMPT).write_text(" \n", encoding="utf-8")
    assert conjure.prepare_workflow_inputs(graph) == graph


# -- the ComfyUI client's workflows ------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["3", "32", "34"])
def test_a_workflow_that_lacks_a_node_is_prepared_as_far_as_it_goes(
    without: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    graph = json.loads(workflows.load("generate_flux_mesh")[0])
    del graph[without]
    before = copy.deepcopy(graph)
    prepared = ConjureWorkflowClient().prepare_flux_mesh_workflow(graph, "", "a statue")
    changed = {node for node in prepared if prepared[node] != before[node]}
    assert changed == {"3", "32", "34"} - {without}
    assert graph == before
    assert caplog.records == []


def test_a_prompts_node_of_another_kind_gets_only_the_text_that_it_has() -> None:
    graph = {"34": {"class_type": "Other", "inputs": {"t5xxl": "old", "text": "mine"}}, "3": {"inputs": {"seed": 1}}}
    prepared = ConjureWorkflowClient().prepare_flux_mesh_workflow(graph, "", "a statue")
    assert prepared["34"]["inputs"] == {"t5xxl": "a statue", "text": "mine"}
    assert prepared["3"] == {"inputs": {"seed": 1}}
    strange = {"34": {"class_type": "Other", "inputs": "none"}}
    assert ConjureWorkflowClient().prepare_flux_mesh_workflow(strange, "", "a statue") == strange


def test_a_picture_given_as_text_is_not_in_the_workflow_and_the_log_says_what_becomes_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    prepared = ConjureWorkflowClient().prepare_flux_mesh_workflow(
        {"16": {"inputs": {"image": "x.png"}}}, "aGVsbG8=", ""
    )
    assert prepared == {"16": {"inputs": {"image": "x.png"}}}
    assert [record.message for record in caplog.records] == ["picture_not_in_workflow"]


def test_how_nodes_are_called_is_remembered_of_the_newest_prompts_alone() -> None:
    client = ConjureWorkflowClient()
    for number in range(KEPT_LABELS + 2):
        client._remember(f"p{number}", {"1": {"class_type": "A"}, "note": "no node"})
    assert len(client._labels) == KEPT_LABELS
    assert "p1" not in client._labels
    assert set(client._labels["p2"]) == {"1"}
