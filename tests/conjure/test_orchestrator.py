"""CONJURE's orchestrator and ComfyUI client on the emulated cloud: one run, its files at their places, true costs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import workflows
from runcomfy.bootstrap import App
from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient, ExecutionStatus
from runcomfy.conjure.orchestrator import ConjureOrchestrator
from runcomfy.conjure.progress_tracker import FluxMeshProgressTracker
from runcomfy.conjure.workflow_client import ConjureWorkflowClient
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.runcomfy_orchestrator import FluxMeshJob, JobStatus, RunComfyOrchestrator
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import settings_for

PROMPT = "a helmet of polished steel"
FLUX = Path("data/generated_images/flux/flux.png")
MESH = Path("data/generated_models/partpacker_results/partpacker_result_0.glb")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CONJURE's project folder, with what the user has put there; the working directory."""
    root = tmp_path / "CONJURE"
    render = root / "data/generated_images/gestureCamera/render.png"
    render.parent.mkdir(parents=True)
    Image.linear_gradient("L").resize((96, 64)).convert("RGBA").save(render)
    prompt = root / "data/generated_text/userPrompt.txt"
    prompt.parent.mkdir(parents=True)
    prompt.write_text(f"  {PROMPT}\n", encoding="utf-8")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def settings(cloud_settings: CloudSettings, tmp_path: Path) -> Settings:
    return settings_for(cloud_settings, tmp_path / "state")


@pytest.fixture
def tracker(clock: LoopClock) -> FluxMeshProgressTracker:
    return FluxMeshProgressTracker(clock=clock)


@pytest.fixture
def make(settings: Settings, clock: LoopClock, tracker: FluxMeshProgressTracker) -> Callable[..., ConjureOrchestrator]:
    def orchestrator(**options: Any) -> ConjureOrchestrator:
        return ConjureOrchestrator(
            settings=settings,
            clock=clock,
            tracker=tracker,
            office=lambda given: App(given or settings, clock=clock, launches=False),
            **options,
        )

    return orchestrator


def users_files(project: Path) -> dict[str, bytes]:
    return {
        name: (project / "data" / name).read_bytes()
        for name in ("generated_images/gestureCamera/render.png", "generated_text/userPrompt.txt")
    }


def there(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


async def test_one_run_gives_the_picture_and_the_mesh_and_touches_nothing_of_the_users(
    make: Callable[..., ConjureOrchestrator],
    cloud: RunComfyEmulator,
    project: Path,
    tracker: FluxMeshProgressTracker,
) -> None:
    before = users_files(project)
    orchestrator = make()

    job = await orchestrator.execute_flux_mesh_generation("a test")

    assert job.status is JobStatus.COMPLETED, job.error_message
    assert (job.prompt, job.error_message) == (PROMPT, None)
    assert (job.generated_image_url, job.generated_mesh_url) == (str(FLUX), str(MESH))
    assert job.result_files == {"Generated Image": str(FLUX), "Generated Mesh": str(MESH)}
    assert there(FLUX).startswith(b"\x89PNG")
    assert there(MESH).startswith(b"glTF")
    assert users_files(project) == before
    assert len(cloud.launched) == 1
    assert cloud.billing == []
    assert job.actual_machine_cost == pytest.approx(float(cloud.books[cloud.launched[0]].usd), abs=0.001)
    assert job.created_at is not None
    assert job.started_at is not None
    assert job.completed_at is not None
    assert job.created_at <= job.started_at < job.completed_at
    assert job.prompt_id is not None
    summary = tracker.get_workflow_summary(job.prompt_id)
    assert summary is not None
    assert (summary["status"], summary["overall_progress"]) == ("completed", 100.0)
    costs = await orchestrator.get_cost_summary()
    assert costs["total_actual_cost"] == pytest.approx(job.actual_machine_cost, abs=0.0001)
    assert (costs["total_jobs"], costs["active_jobs"], costs["active_machines"]) == (1, 0, 0)


async def test_what_is_written_into_its_clients_counts_for_the_jobs_too(
    make: Callable[..., ConjureOrchestrator], cloud: RunComfyEmulator, settings: Settings
) -> None:
    elsewhere, true = "http://127.0.0.1:9", settings.cloud.base_url
    orchestrator = make()
    orchestrator.runcomfy_client.base_url = elsewhere
    orchestrator.runcomfy_client.max_retries = 0
    assert (await orchestrator.execute_flux_mesh_generation()).status is JobStatus.FAILED
    assert cloud.launched == []
    orchestrator.runcomfy_client.base_url = true + "/"
    orchestrator.comfyui_client.execution_timeout = 0.001
    late = await orchestrator.execute_flux_mesh_generation()
    assert late.status is JobStatus.FAILED, late
    assert cloud.billing == []


@pytest.mark.parametrize("attribute", ["prefer_dev_server", "machine_reuse"])
async def test_the_dev_server_is_left_alone_where_that_is_told(
    make: Callable[..., ConjureOrchestrator], cloud: RunComfyEmulator, attribute: str
) -> None:
    orchestrator = make()
    machine = await orchestrator.get_or_create_machine()
    setattr(orchestrator, attribute, False)
    job = await orchestrator.execute_flux_mesh_generation()
    assert job.status is JobStatus.COMPLETED, job.error_message
    assert len(cloud.launched) == 2
    assert cloud.billing == [machine.server_id]
    assert await orchestrator.runcomfy_client.stop_machine(machine.server_id)


async def test_the_dev_server_is_used_where_there_is_one(
    make: Callable[..., ConjureOrchestrator], cloud: RunComfyEmulator
) -> None:
    orchestrator = make()
    machine = await orchestrator.get_or_create_machine()
    assert orchestrator.machine_pool == {machine.server_id: machine}
    job = await orchestrator.execute_flux_mesh_generation()
    assert job.status is JobStatus.COMPLETED, job.error_message
    assert cloud.launched == [machine.server_id]
    assert (await orchestrator.get_cost_summary())["active_machines"] == 1
    assert await orchestrator.shutdown_idle_machines() == []  # it is not idle, and nobody asked for that
    orchestrator.auto_shutdown = True
    await asyncio.sleep(orchestrator.idle_timeout + 1)
    assert await orchestrator.shutdown_idle_machines() == [machine.server_id]
    assert cloud.billing == []


async def test_a_workflow_of_their_own_gets_the_prompt_and_the_picture(
    make: Callable[..., ConjureOrchestrator], project: Path
) -> None:
    graph = json.loads(workflows.load("generate_flux_mesh")[0])
    graph["3"]["inputs"]["steps"] = 7
    (project / "mine.json").write_text(json.dumps(graph), encoding="utf-8")
    job = await make(workflow_path="mine.json").execute_flux_mesh_generation()
    assert job.status is JobStatus.COMPLETED, job.error_message
    assert job.result_files == {"Generated Image": str(FLUX), "Generated Mesh": str(MESH)}


@pytest.mark.parametrize("missing", ["generated_images/gestureCamera/render.png", "generated_text/userPrompt.txt"])
async def test_without_picture_or_prompt_nothing_is_rented(
    make: Callable[..., ConjureOrchestrator], cloud: RunComfyEmulator, project: Path, missing: str
) -> None:
    (project / "data" / missing).unlink()
    job = await make().execute_flux_mesh_generation()
    assert job.status is JobStatus.FAILED
    assert job.error_message
    assert cloud.launched == []
    assert there(FLUX) == b""


async def test_a_job_that_is_cancelled_says_so_and_leaves_nothing(
    make: Callable[..., ConjureOrchestrator], cloud: RunComfyEmulator
) -> None:
    orchestrator = make()
    job = await orchestrator.create_job()
    running = asyncio.create_task(orchestrator.execute_job(job))
    await asyncio.sleep(100)
    assert orchestrator.get_active_jobs() == [job]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert job.status is JobStatus.CANCELLED
    assert cloud.billing == []


async def test_the_picture_may_be_written_while_it_is_read(
    make: Callable[..., ConjureOrchestrator], project: Path
) -> None:
    """The add-on writes its render every 3 s, in place: half a picture is no picture."""
    render = project / "data/generated_images/gestureCamera/render.png"
    whole = render.read_bytes()
    render.write_bytes(whole[: len(whole) // 2])
    orchestrator = make()
    job = await orchestrator.create_job()
    running = asyncio.create_task(orchestrator.execute_job(job))
    await asyncio.sleep(0.35)
    render.write_bytes(whole)
    assert (await running).status is JobStatus.COMPLETED, job.error_message


# -- what needs nothing live -------------------------------------------------------------------------------


def test_the_workflow_is_loaded_and_prepared(project: Path) -> None:
    orchestrator = RunComfyOrchestrator()
    graph = orchestrator.load_workflow()
    assert len(graph) == 18
    assert graph["16"]["inputs"]["image"] == "render.png"
    assert graph["24"]["inputs"]["filename_prefix"] == "flux"
    assert graph["33"]["inputs"]["filename_prefix"] == "partpacker_results/partpacker_result_0"
    prepared = orchestrator.prepare_workflow_inputs(graph)
    assert prepared["34"]["inputs"]["clip_l"] == prepared["34"]["inputs"]["t5xxl"] == PROMPT
    assert graph["34"]["inputs"]["clip_l"] != PROMPT
    assert orchestrator.prepare_workflow_inputs(graph, use_conjure_data=False) == graph
    with pytest.raises(FileNotFoundError):
        RunComfyOrchestrator("elsewhere/nothing.json").load_workflow()
    with pytest.raises(FileNotFoundError):
        RunComfyOrchestrator(workflow_path=project / "nothing.json").load_workflow()
    (project / "broken.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="not a workflow"):
        RunComfyOrchestrator(workflow_path="broken.json").load_workflow()


def test_estimates_go_by_the_rate_table_and_an_unknown_type_by_one_dollar() -> None:
    orchestrator = RunComfyOrchestrator()
    medium = orchestrator.cost_per_hour["medium"]
    assert orchestrator.estimate_cost("medium", 3600) == medium
    assert orchestrator.estimate_cost("medium") == pytest.approx(medium / 12, abs=0.0001)
    assert orchestrator.estimate_cost("quantum", 3600) == 1.0
    assert {"medium", "large", "extra-large", "2x-large"} <= set(orchestrator.cost_per_hour)


async def test_jobs_are_made_found_shown_and_forgotten() -> None:
    orchestrator = RunComfyOrchestrator()
    job = await orchestrator.create_job("named")
    assert isinstance(job, FluxMeshJob)
    assert (job.status, job.prompt) == (JobStatus.PENDING, PROMPT)
    assert orchestrator.get_job_status(job.job_id) is job
    assert orchestrator.get_all_jobs() == orchestrator.get_active_jobs() == [job]
    shown = json.loads(json.dumps(job.to_dict()))
    assert set(shown) == {
        "job_id", "status", "prompt", "input_image_path", "created_at", "started_at", "completed_at",
        "generated_image_url", "generated_mesh_url", "result_files", "error_message", "machine_cost_estimate",
        "actual_machine_cost", "progress_summary",
    }  # fmt: skip
    assert (shown["status"], shown["progress_summary"]) == ("pending", None)
    costs = await orchestrator.get_cost_summary()
    assert set(costs) == {
        "total_jobs", "active_jobs", "total_estimated_cost", "total_actual_cost", "active_machines",
        "cost_per_hour_rates",
    }  # fmt: skip
    assert (costs["total_jobs"], costs["total_estimated_cost"]) == (1, job.machine_cost_estimate)
    assert await orchestrator.cleanup_job(job.job_id)
    assert not await orchestrator.cleanup_job(job.job_id)
    assert orchestrator.get_job_status(job.job_id) is None


def is_orchestrator(thing: object) -> bool:
    return isinstance(thing, RunComfyOrchestrator)


def test_both_forms_are_of_the_public_name(settings: Settings, clock: LoopClock) -> None:
    app = App(settings, clock=clock)
    assert is_orchestrator(RunComfyOrchestrator())
    wired = RunComfyOrchestrator(
        settings=settings,
        clock=clock,
        results=app.orchestrator()._results,
        placer=app._placer(),
        load_workflow=app.workflow_files(),
        random_int=lambda low, high: low,
    )
    assert is_orchestrator(wired)
    assert hasattr(wired, "run")


# -- the ComfyUI client ------------------------------------------------------------------------------------


@pytest.fixture
def graph() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(workflows.load("generate_flux_mesh")[0])
    return found


@pytest.fixture
def client(settings: Settings, clock: LoopClock, tracker: FluxMeshProgressTracker) -> ConjureWorkflowClient:
    return ConjureWorkflowClient(settings=settings, clock=clock, tracker=tracker)


def test_preparing_keeps_every_node_and_draws_new_seeds(graph: dict[str, Any]) -> None:
    client = ComfyUIWorkflowClient()
    prepared = client.prepare_flux_mesh_workflow(graph, "", "")
    again = client.prepare_flux_mesh_workflow(graph, "", "another prompt")
    assert set(prepared) == set(graph)
    assert prepared["3"]["inputs"]["noise_seed"] != again["3"]["inputs"]["noise_seed"]
    assert 0 <= prepared["32"]["inputs"]["seed"] < 2**31
    assert prepared["34"] == graph["34"]
    assert again["34"]["inputs"]["clip_l"] == "another prompt"
    assert str(ComfyUIWorkflowClient("models").output_dir) == "models"
    assert client.execution_timeout == 3600


@pytest.mark.parametrize("use_websocket", [True, False])
async def test_a_workflow_is_executed_and_its_results_fetched(
    client: ConjureWorkflowClient, graph: dict[str, Any], use_websocket: bool, tracker: FluxMeshProgressTracker
) -> None:
    async with ComfyUIEmulator() as server:
        done = await client.execute_workflow(server.url, graph, use_websocket=use_websocket)
        assert done.status == ExecutionStatus.COMPLETED.value, done.error_message
        assert done.outputs is not None
        assert {"24", "33"} <= set(done.outputs)
        assert done.client_id is not None
        assert done.client_id.startswith("conjure_")
        history = await client.get_execution_history(server.url, done.prompt_id)
        assert history is not None
        assert history["status"]["status_str"] == "success"
        assert history["outputs"].keys() == done.outputs.keys()
        assert await client.get_execution_history(server.url, "nobody-sent-it") is None
        files = await client.download_results(server.url, done)
    assert files == {"Generated Image": str(FLUX), "Generated Mesh": str(MESH)}
    assert there(FLUX).startswith(b"\x89PNG")
    assert there(MESH).startswith(b"glTF")
    summary = tracker.get_workflow_summary(done.prompt_id)
    assert summary is not None
    assert (summary["status"], summary["workflow_name"]) == ("completed", "generate_flux_mesh")


async def test_a_result_that_is_gone_does_not_keep_the_other_from_its_place(
    client: ConjureWorkflowClient, graph: dict[str, Any]
) -> None:
    async with ComfyUIEmulator() as server:
        done = await client.execute_workflow(server.url, graph)
        assert done.outputs is not None
        done.outputs["24"] = {"images": [{"filename": "gone.png", "subfolder": "", "type": "output"}]}
        assert await client.download_results(server.url, done) == {"Generated Mesh": str(MESH)}


async def test_a_machine_without_an_address_and_a_wait_that_is_given_up_are_failures(
    client: ConjureWorkflowClient, graph: dict[str, Any], tracker: FluxMeshProgressTracker
) -> None:
    nowhere: Any = None
    assert (await client.execute_workflow(nowhere, graph)).status == ExecutionStatus.FAILED.value
    with pytest.raises(RuntimeError):
        await client.submit_workflow(nowhere, graph)
    async with ComfyUIEmulator() as server:
        server.stall_node("3")
        call = asyncio.create_task(client.execute_workflow(server.url, graph))
        for _ in range(600):
            if tracker.summaries() and tracker.summaries()[0]["current_stage"]:
                break
            await asyncio.sleep(1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert [each["status"] for each in tracker.summaries()] == ["failed"]


async def test_what_goes_wrong_is_in_the_execution_and_old_results_stay(
    client: ConjureWorkflowClient, graph: dict[str, Any], project: Path
) -> None:
    (project / FLUX).parent.mkdir(parents=True)
    (project / FLUX).write_bytes(b"the old one")
    async with ComfyUIEmulator() as server:
        refused = await client.execute_workflow(server.url, {"1": {"class_type": "NoSuchNode", "inputs": {}}})
        assert (refused.status, bool(refused.error_message)) == (ExecutionStatus.FAILED.value, True)
        with pytest.raises(RuntimeError):
            await client.submit_workflow(server.url, {"1": {"class_type": "NoSuchNode", "inputs": {}}})
        lost = {"24": {"images": [{"filename": "gone.png", "subfolder": "", "type": "output"}]}, "33": {"3d": "?"}}
        assert await client.download_results(server.url, lost) == {}
        with pytest.raises(FileNotFoundError):
            await client.upload_image(server.url, "no-such-picture.png")
        (project / "data/generated_images/gestureCamera/render.png").unlink()
        without = await client.execute_workflow(server.url, graph)
        assert without.status == ExecutionStatus.FAILED.value
    nobody = await client.wait_for_completion_polling("http://127.0.0.1:9", "p")
    assert nobody.status == ExecutionStatus.FAILED.value
    assert there(FLUX) == b"the old one"


@pytest.mark.parametrize("broken", [None, [1], "text", {"16": []}, {"16": {"class_type": "LoadImage", "inputs": None}}])
async def test_what_is_no_workflow_is_a_failure_and_nothing_is_raised(
    client: ConjureWorkflowClient, broken: Any
) -> None:
    done = await client.execute_workflow("http://127.0.0.1:9", broken)
    assert done.status == ExecutionStatus.FAILED.value
    assert "workflow" in str(done.error_message)


@pytest.mark.parametrize("nothing", [None, [], "text", {}])
async def test_where_there_are_no_results_none_are_fetched(client: ConjureWorkflowClient, nothing: Any) -> None:
    assert await client.download_results("http://127.0.0.1:9", nothing) == {}


async def test_what_callers_write_into_the_attributes_counts_from_the_next_call_on(
    client: ConjureWorkflowClient, graph: dict[str, Any]
) -> None:
    loop = asyncio.get_running_loop()
    async with ComfyUIEmulator() as server:
        server.stall_node("3")
        client.execution_timeout = 40
        client.poll_interval = 0.5
        began = loop.time()
        late = await client.execute_workflow(server.url, graph)
    assert (late.status, late.error_message) == (ExecutionStatus.FAILED.value, "not done after 40 s")
    assert 40 <= loop.time() - began < 120
    client.poll_interval = -1
    refused = await client.execute_workflow("http://127.0.0.1:9", graph)
    assert "poll_interval" in str(refused.error_message)


async def test_sending_and_waiting_may_be_two_calls(client: ConjureWorkflowClient, graph: dict[str, Any]) -> None:
    async with ComfyUIEmulator() as server:
        graph["16"]["inputs"]["image"] = await client.upload_image(
            server.url, "data/generated_images/gestureCamera/render.png"
        )
        prompt_id, client_id = await client.submit_workflow(server.url, graph)
        done = await client.wait_for_completion_websocket(server.url, prompt_id, client_id)
        assert (done.status, done.client_id) == (ExecutionStatus.COMPLETED.value, client_id)
        again = await client.wait_for_completion_polling(server.url, prompt_id)
        assert again.outputs == done.outputs
