"""CONJURE's endpoints over HTTP: their envelopes, what they write, and that none holds up another."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.conjure.desk import Desk
from runcomfy.domain.queued import QueueStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

FLUX = Path("data/generated_images/flux/flux.png")
MESH = Path("data/generated_models/partpacker_results/partpacker_result_0.glb")
RENDER = Path("data/generated_images/gestureCamera/render.png")
STATE = Path("data/input/state.json")
PROMPT = Path("data/generated_text/userPrompt.txt")
DEPTH = {"control_image_path": str(RENDER), "prompt": "a bronze statue", "seed": 7, "randomize_seed": False}


def write_state(root: Path, **state: Any) -> None:
    (root / STATE).parent.mkdir(parents=True, exist_ok=True)
    (root / STATE).write_text(json.dumps(state), encoding="utf-8")


def state_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / STATE).read_text(encoding="utf-8"))
    return found


def content(path: Path) -> bytes:
    return path.read_bytes()


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").resize((128, 128)).convert("RGBA").save(path)


@pytest.fixture
def project(conjure_project: Path) -> Path:
    return conjure_project


@pytest.fixture
def comfyui(own_comfyui: ComfyUIEmulator) -> ComfyUIEmulator:
    return own_comfyui


async def test_the_pipeline_of_three_calls_is_one_run(api: Any, comfyui: ComfyUIEmulator) -> None:
    render = content(RENDER)
    status, picture, headers = await api.send("POST", "/flux/depth", DEPTH | {"guidance_scale": 10})
    assert (status, picture["success"]) == (200, True)
    assert picture["data"]["image_path"] == str(FLUX)
    assert picture["data"]["seed_used"] == 7
    assert picture["data"]["generation_mode"] == "local_comfyui"
    assert headers["X-Job-Id"] == picture["data"]["job_id"]
    mesh = await api.post("/partpacker/generate_3d", {"image_path": picture["data"]["image_path"], "seed": 7})
    assert mesh["data"]["model_path"] == str(MESH)
    imported = await api.post("/blender/import_mesh", {"mesh_path": mesh["data"]["model_path"]})
    assert imported["data"] == {"mesh_path": str(MESH), "min_volume_threshold": 0.001}
    assert len(comfyui.run_log) == 1
    state = state_of(Path())
    assert state["command"] == "import_and_process_mesh"
    assert state["mesh_path"] == str(MESH)
    assert state["app_status"] == "running"
    assert content(RENDER) == render
    assert content(PROMPT) == b"a bronze statue\n"
    job = await api.app.job_store()
    (row,) = await job.jobs(status=QueueStatus.DONE)
    assert row.uid == picture["data"]["job_id"]


async def test_what_nobody_knows_is_named_in_the_answer(api: Any) -> None:
    more = {"negative_prompt": "green", "self": 1, "mode": "cloud", "desk": {"a": []}, "asked": float("nan")}
    data = (await api.post("/flux/depth", DEPTH | more))["data"]
    named = {each["name"]: each["reason"] for each in data["not_applied"]}
    assert named == dict.fromkeys(more, "no such parameter is known")
    mesh = (await api.post("/partpacker/generate_3d", {"image_path": str(FLUX), "target_num_faces": 9_000}))["data"]
    assert [each["name"] for each in mesh["not_applied"]] == ["target_num_faces"]


def there(path: Path) -> bool:
    return path.exists()


async def when(condition: Any, what: str) -> None:
    for _ in range(10_000):
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        await asyncio.sleep(0.25)
    pytest.fail(f"did not happen: {what}")


async def test_everything_else_answers_while_a_generation_runs(api: Any, comfyui: ComfyUIEmulator) -> None:
    running = asyncio.create_task(api.post("/flux/depth", DEPTH))

    async def runs() -> bool:
        active = (await api.get("/workflow/progress"))["data"]["active_workflows"]
        return bool(active) and active[0]["overall_progress"] > 5

    await when(runs, "the prompt runs")
    assert not running.done()
    assert (await api.get("/health"))["status"] == "healthy"
    assert (await api.get("/state"))["data"]["generation_mode"] == "local_comfyui"
    active = (await api.get("/workflow/progress"))["data"]
    assert active["total_count"] == 1
    (summary,) = active["active_workflows"]
    assert summary["status"] == "running"
    one = (await api.get(f"/workflow/progress/{summary['prompt_id']}"))["data"]
    assert one["workflow_name"] == "generate_flux_mesh"
    assert {"stages", "overall_progress", "current_stage", "error_message"} <= set(one)
    assert not running.done()
    picture = await running
    done = (await api.get(f"/workflow/progress/{picture['data']['job_id']}"))["data"]
    assert (done["status"], done["overall_progress"]) == ("completed", 100.0)
    again = (await api.get(f"/workflow/progress/{picture['data']['prompt_id']}"))["data"]
    assert again["status"] == "completed"
    status, found, _ = await api.send("GET", "/workflow/progress/nobody")
    assert (status, found["detail"]) == (404, "Workflow not found")


async def test_a_client_that_gives_up_loses_nothing(api: Any, comfyui: ComfyUIEmulator) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await api.post("/flux/depth", DEPTH)
    assert not there(FLUX)
    active = (await api.get("/workflow/progress"))["data"]["active_workflows"]
    job_id = active[0]["job_id"]
    joined = await api.post("/flux/depth", DEPTH)  # the same request once more
    assert joined["data"]["job_id"] == job_id
    assert content(FLUX)[:4] == b"\x89PNG"
    assert len(comfyui.run_log) == 1


async def test_results_get_their_places_though_nobody_waits(api: Any, comfyui: ComfyUIEmulator) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.5):
            await api.post("/flux/depth", DEPTH)
    await when(FLUX.exists, "the picture is at its place")
    assert len(comfyui.run_log) == 1


async def test_nobody_waits_for_a_comfyui_that_is_not_there(project: Path, serve: Any) -> None:
    async with serve(where="server", api_base_url="http://127.0.0.1:9") as client:
        status, found, _ = await client.send("POST", "/flux/depth", DEPTH)
        assert status == 502
        assert found["error"]["code"] == "comfyui-unreachable"
        assert "no ComfyUI answers at 127.0.0.1:9" in found["detail"]
        assert (await client.get("/workflow/progress"))["data"]["total_count"] == 0


async def test_a_new_process_does_what_the_last_one_left_undone(
    project: Path, comfyui: ComfyUIEmulator, serve: Any
) -> None:
    where: dict[str, Any] = {"where": "server", "api_base_url": comfyui.url}
    async with serve(works=False, **where) as first:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await first.post("/flux/depth", DEPTH)
    assert not there(FLUX)
    async with serve(**where) as second:
        await when(FLUX.exists, "the picture is at its place")
        mesh = await second.post("/partpacker/generate_3d", {"image_path": str(FLUX), "seed": 7})
    assert mesh["data"]["reused"] is True
    assert len(comfyui.run_log) == 1
    assert list((project.parent / "state" / "conjure" / "pending").iterdir()) == []


async def test_old_results_do_not_replace_what_came_after_them(
    project: Path, comfyui: ComfyUIEmulator, serve: Any
) -> None:
    where: dict[str, Any] = {"where": "server", "api_base_url": comfyui.url}
    async with serve(works=False, **where) as first:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await first.post("/flux/depth", DEPTH)
    draw(project / FLUX)
    later = 4_000_000_000
    os.utime(project / FLUX, (later, later))
    newer = content(FLUX)
    async with serve(**where):
        pending = project.parent / "state" / "conjure" / "pending"
        await when(lambda: not list(pending.iterdir()), "nothing is left to do")
    assert content(FLUX) == newer


async def test_a_service_that_shuts_down_tells_who_waits_and_keeps_the_job(
    project: Path, comfyui: ComfyUIEmulator, serve: Any
) -> None:
    async with serve(works=False, where="server", api_base_url=comfyui.url) as client:
        waiting = asyncio.create_task(client.send("POST", "/flux/depth", DEPTH))
        store = await client.app.job_store()

        async def queued() -> bool:
            return bool(await store.jobs(status=QueueStatus.PENDING))

        await when(queued, "the job is in the queue")
        client.web.state.backend.closing.set()
        status, found, headers = await waiting
        (row,) = await store.jobs(status=QueueStatus.PENDING)
    assert status == 503
    assert "shutting down" in found["detail"]
    assert headers["X-Job-Id"] == row.uid


async def test_a_job_that_fails_is_told_with_its_reason(api: Any, project: Path, comfyui: ComfyUIEmulator) -> None:
    status, found, _ = await api.send("POST", "/flux/depth", DEPTH | {"control_image_path": "data/nothing.png"})
    assert status == 422
    assert "there is no file" in found["detail"]
    status, found, _ = await api.send("POST", "/flux/depth", DEPTH | {"num_inference_steps": 0})
    assert status == 422
    assert "num_inference_steps" in found["detail"]
    status, found, _ = await api.send("POST", "/flux/depth", {"prompt": "x"})
    assert status == 422
    assert found["detail"][0]["loc"] == ["body", "control_image_path"]
    (project / "broken.png").write_text("this is no picture", encoding="utf-8")
    status, found, _ = await api.send("POST", "/flux/depth", DEPTH | {"control_image_path": "broken.png"})
    assert status == 422
    assert "is not a picture" in found["detail"]
    assert comfyui.run_log == []


@pytest.mark.parametrize("written", ["standard", "turbo", "nonsense", 7, ["cloud"], {"cloud": 1}])
async def test_the_add_ons_own_modes_do_not_break_the_api(api: Any, project: Path, written: Any) -> None:
    assert (await api.get("/mode"))["generation_mode"] == "local_comfyui"
    write_state(project, generation_mode=written)
    found = await api.get("/mode")
    assert found["generation_mode"] == "local_comfyui"
    assert str(written) in found["note"]
    picture = await api.post("/flux/depth", DEPTH)
    assert picture["data"]["generation_mode"] == "local_comfyui"


@pytest.mark.parametrize("state", [{}, {"generation_mode": None}])
async def test_without_a_mode_conjures_default_holds_whatever_held_before(
    api: Any, project: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(project, generation_mode="cloud")
    assert (await api.get("/mode"))["generation_mode"] == "cloud"
    write_state(project, **state)
    assert (await api.get("/mode"))["generation_mode"] == "local"
    monkeypatch.setenv("CONJURE_GENERATION_MODE", "serverless")
    assert (await api.get("/mode"))["generation_mode"] == "serverless"


async def test_mode_says_what_can_be_used_and_why_not(api: Any, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = await api.get("/mode")
    assert found["local_available"] is True
    assert found["cloud_available"] is False
    assert found["serverless_available"] is False
    assert found["cloud_legacy_available"] is False
    assert set(found["services"]) == set(found["available_modes"])
    assert {"local", "cloud", "serverless", "cloud_legacy", "huggingface"} <= set(found["services"])
    for service in found["services"].values():
        assert {"name", "description", "available", "requirements"} <= set(service)
        assert service["available"] or service["why_not"]
    assert "RUNCOMFY_API_TOKEN" in found["services"]["cloud"]["why_not"]
    write_state(project)
    assert (await api.get("/mode"))["note"] is None
    fresh = Desk(api.web.state.backend)
    assert (await fresh.mode()).name == "local"
    monkeypatch.setenv("CONJURE_GENERATION_MODE", "cloud")
    assert (await fresh.mode()).name == "cloud"


async def test_whatever_others_wrote_into_the_state_is_told(api: Any, project: Path) -> None:
    deep = "[" * 400 + "]" * 400
    text = f'{{"half": "\\ud800", "none": NaN, "far": 1e999, "deep": {deep}}}'
    (project / STATE).write_text(text, encoding="utf-8")
    state = (await api.get("/state"))["data"]
    assert state == {"half": "\ud800", "none": None, "far": None, "deep": json.loads(deep)}
    await api.post("/state/set/own", {"value": 1})
    assert (await api.get("/state"))["data"] == state | {"own": 1}


async def test_the_state_can_be_read_and_changed(api: Any, project: Path) -> None:
    assert (await api.post("/state/update", {"updates": {"command": "fuse_mesh", "flux_seed": 3}}))["data"] is None
    assert (await api.post("/state/set/selection_request", {"value": 2}))["success"] is True
    state = (await api.get("/state"))["data"]
    assert state == {
        "generation_mode": "local_comfyui",
        "app_status": "running",
        "command": "fuse_mesh",
        "flux_seed": 3,
        "selection_request": 2,
    }
    status, _, _ = await api.send("POST", "/state/update", {"updates": {"__proto__": 1}})
    assert status == 422
    (project / STATE).write_text('{"half', encoding="utf-8")
    status, found, _ = await api.send("GET", "/state")
    assert status == 503
    assert "holds no JSON object" in found["detail"]
    assert content(project / STATE) == b'{"half'
    assert (await api.get("/mode"))["generation_mode"] == "local_comfyui"


async def test_both_unified_calls_have_blender_import_the_mesh(
    api: Any, project: Path, comfyui: ComfyUIEmulator
) -> None:
    status, found, _ = await api.send("POST", "/serverless/flux_mesh_unified")
    assert status == 503
    assert "serverless" in found["detail"]
    assert "command" not in state_of(project)
    made = await api.post("/local_comfyui/flux_mesh_unified")
    assert made["data"]["flux_image_path"] == str(FLUX)
    assert made["data"]["mesh_model_path"] == str(MESH)
    assert made["data"]["prompt_id"] == comfyui.run_log[0].prompt_id
    told = {"command": "import_and_process_mesh", "mesh_path": str(MESH), "min_volume_threshold": 0.001}
    assert told.items() <= state_of(project).items()
    (project / PROMPT).write_text("  \n", encoding="utf-8")
    status, found, _ = await api.send("POST", "/local_comfyui/flux_mesh_unified")
    assert status == 422
    assert "there is no prompt" in found["detail"]


async def test_a_mesh_must_be_there_and_be_one(api: Any, project: Path) -> None:
    status, found, _ = await api.send("POST", "/blender/import_mesh", {"mesh_path": "data/none.glb"})
    assert status == 422
    assert "not found" in found["detail"]
    (project / "text.glb").write_text("this is no mesh at all", encoding="utf-8")
    status, found, _ = await api.send("POST", "/blender/import_mesh", {"mesh_path": "text.glb"})
    assert status == 422
    assert "no binary glTF" in found["detail"]
    assert "command" not in state_of(project)


async def test_an_old_render_does_not_count_as_a_new_one(api: Any, project: Path) -> None:
    status, found, _ = await api.send("POST", "/blender/render_gesture_camera")
    assert status == 504
    assert "no new picture" in found["detail"]

    async def blender() -> None:
        await when(lambda: state_of(project).get("command") == "render_gesture_camera", "Blender is told")
        await asyncio.to_thread(draw, project / RENDER)

    write_state(project, command=None)
    answer, _ = await asyncio.gather(api.post("/blender/render_gesture_camera"), blender())
    assert answer["data"] == {"render_path": str(RENDER)}


@pytest.fixture
def agents_forgotten() -> Iterator[None]:
    """Modules that a test puts into CONJURE's launcher folder are not there for the next one."""
    yield
    for name in ("instruction_manager", "backend_agent", "state_manager", "session_cleaner"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("agents_forgotten")
async def test_conjures_agents_do_what_is_theirs_or_say_that_they_are_not_here(
    api: Any, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction = {"tool_name": "spawn_primitive", "parameters": {"primitive_type": "Cube"}}
    status, found, _ = await api.send("POST", "/execute_instruction", {"instruction": instruction})
    assert status == 501
    assert "comfyctl conjure install" in found["error"]["hint"]
    status, _, _ = await api.send("POST", "/process_conversation", {"conversation_history": "hello"})
    assert status == 501
    folder = project / "launcher"
    folder.mkdir()
    manager = "class InstructionManager:\n    obeyed = []\n    def __init__(self, state): pass\n"
    manager += "    def execute_instruction(self, it): self.obeyed.append(it)\n"
    agent = "class BackendAgent:\n    def __init__(self, instruction_manager): pass\n"
    agent += "    def get_response(self, conversation_history): return {'tool_name': conversation_history}\n"
    (folder / "instruction_manager.py").write_text(manager, encoding="utf-8")
    (folder / "backend_agent.py").write_text(agent, encoding="utf-8")
    (folder / "state_manager.py").write_text("class StateManager:\n    pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    done = await api.post("/execute_instruction", {"instruction": instruction})
    assert done["data"] == {"instruction": instruction}
    again = await api.post("/execute_instruction", {"instruction": instruction})
    assert again["data"]["duplicate_blocked"] is True
    import instruction_manager  # type: ignore[import-not-found]

    assert instruction_manager.InstructionManager.obeyed == [instruction]
    said = await api.post("/process_conversation", {"conversation_history": "hello", "include_image": False})
    assert said["data"] == {"instruction": {"tool_name": "hello"}}
    (folder / "session_cleaner.py").write_text("", encoding="utf-8")  # the newer revision has it
    other = {"tool_name": "fuse_mesh", "parameters": {}}
    listened = await api.post("/execute_instruction", {"instruction": other})
    assert listened["data"]["demo_mode"] is True
    assert instruction_manager.InstructionManager.obeyed == [instruction]


async def test_shutting_down_is_answered_first_and_conjures_launcher_is_told(api: Any, project: Path) -> None:
    answer = await api.post("/shutdown")
    assert answer["status"] == "success"
    await when(lambda: api.shut == [True], "the service is shut down")
    assert state_of(project)["app_status"] == "shutting_down"


async def test_a_foreign_page_gets_nothing(api: Any) -> None:
    async with api.http.post(f"{api.base}/shutdown", headers={"Origin": "https://evil.example"}) as answer:
        assert answer.status == 403
    async with api.http.get(f"{api.base}/state", headers={"Host": "evil.example"}) as answer:
        assert answer.status == 403
    assert api.shut == []


async def test_in_cloud_mode_the_queue_rents_and_ends_the_machine(
    project: Path, cloud: RunComfyEmulator, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    write_state(project, generation_mode="cloud")
    async with serve(where="cloud") as api:
        assert (await api.get("/mode"))["cloud_available"] is True
        picture = await api.post("/flux/depth", DEPTH)
        mesh = await api.post("/partpacker/generate_3d", {"image_path": str(FLUX)})
        store = await api.app.job_store()
        (row,) = await store.jobs(status=QueueStatus.DONE)
        made = await api.post("/serverless/flux_mesh_unified")
    assert picture["data"]["cost"] > 0
    assert (mesh["data"]["job_id"], mesh["data"]["cost"]) == (row.uid, 0.0)
    assert row.job_type == "CONJURE"
    assert made["data"]["generation_mode"] == "cloud"
    assert state_of(project)["command"] == "import_and_process_mesh"
    assert len(cloud.launched) == 1


async def test_one_client_cannot_begin_without_end(api: Any, comfyui: ComfyUIEmulator) -> None:
    asked = {"prompt": "x", "num_inference_steps": 0}  # refused, but asked
    seen = [(await api.send("POST", "/flux/generate", asked))[0] for _ in range(121)]
    assert set(seen[:100]) == {422}
    assert seen[120] == 429
    assert (await api.get("/health"))["status"] == "healthy"
    assert comfyui.run_log == []
