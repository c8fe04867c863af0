"""Generations as CONJURE asks for them: on an emulated cloud and an emulated ComfyUI, with the graphs that ship."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from launcher.conjure.engine import DirectEngine
from launcher.conjure.errors import CalledFromEngine
from launcher.generation_services import (
    CloudGenerationService,
    LocalComfyUIService,
    LocalGenerationService,
    get_generation_service,
)
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import RunComfyError, ValueInvalid
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.faults import PromptFault
from runcomfy.testing.emulators.comfyui.nodes.meshes import glb, relief
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

FLUX = Path("data/generated_images/flux/flux.png")
MESH = Path("data/generated_models/partpacker_results/partpacker_result_0.glb")
RENDER = Path("data/generated_images/gestureCamera/render.png")
PROMPT = Path("data/generated_text/userPrompt.txt")


def content(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path | str, data: bytes) -> None:
    Path(path).write_bytes(data)


def prompts_of(cloud: RunComfyEmulator) -> list[Any]:
    servers = [machine.comfyui or machine.comfyui_was for machine in cloud.machines.values()]
    return [record for server in servers if isinstance(server, ComfyUIEmulator) for record in server.run_log]


@pytest_asyncio.fixture
async def cloud_engine(
    cloud: RunComfyEmulator, clock: LoopClock, project: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DirectEngine]:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    async with App(clock=clock, overrides={"RUNCOMFY_STATE_DIR": str(project.parent / "cloud")}) as app:
        yield DirectEngine(app)


@pytest_asyncio.fixture
async def local(project: Path, comfyui: ComfyUIEmulator, clock: LoopClock) -> AsyncIterator[DirectEngine]:
    async with App(clock=clock, queue={"api_base_url": comfyui.url}) as app:
        yield DirectEngine(app)


async def test_a_picture_and_then_its_mesh_are_one_run_of_the_workflow(
    cloud_engine: DirectEngine, cloud: RunComfyEmulator, project: Path
) -> None:
    render = content(RENDER)
    service = CloudGenerationService(cloud_engine)

    picture = await service.a_generate_flux_depth_image(str(RENDER), "a bronze statue", 7)
    mesh = await service.a_generate_3d_model(picture["image_path"], picture["seed_used"])

    assert picture["success"] is True
    assert mesh["success"] is True
    assert (picture["image_path"], picture["seed_used"]) == (str(FLUX), 7)
    assert (mesh["model_path"], mesh["seed_used"]) == (str(MESH), 7)
    assert isinstance(picture["cost"], float)
    assert picture["cost"] > 0
    assert mesh["cost"] == 0.0
    assert len(prompts_of(cloud)) == 1
    assert content(MESH)[:4] == b"glTF"
    with Image.open(FLUX) as made:
        assert made.mode == "RGBA"
    assert content(RENDER) == render
    assert content(PROMPT) == b"a bronze statue\n"


async def test_the_same_is_asked_of_a_rented_machine_and_of_the_users_own(
    cloud_engine: DirectEngine, cloud: RunComfyEmulator, local: DirectEngine, comfyui: ComfyUIEmulator
) -> None:
    asked: dict[str, Any] = {"seed": 2**40, "num_inference_steps": 28, "guidance_scale": 10.0, "width": 1024}
    calls = []
    for service in (CloudGenerationService(cloud_engine), LocalGenerationService(local)):
        picture = await service.a_generate_flux_depth_image(str(RENDER), "a bronze statue", **asked)
        bytes_of_it = content(Path(picture["image_path"]))
        words = await service.a_generate_flux_image("a fox", 5, randomize_seed=False)
        mesh = await service.a_generate_3d_model(str(RENDER), 9, num_steps=20)
        calls.append((bytes_of_it, content(Path(mesh["model_path"])), picture["seed_used"], words["seed_used"]))
    ours, rented = [[record.graph for record in log] for log in (comfyui.run_log, prompts_of(cloud))]
    assert ours == rented
    assert len(ours) == 3
    assert calls[0] == calls[1]
    assert ours[0]["3"]["inputs"]["noise_seed"] == 2**40
    assert ours[0]["32"]["inputs"]["seed"] == 2**40 % 2**31
    assert (ours[0]["3"]["inputs"]["steps"], ours[0]["34"]["inputs"]["guidance"]) == (28, 10.0)
    assert ours[0]["6"]["inputs"]["width"] == 1024
    assert ours[2]["32"]["inputs"]["steps"] == 20
    assert "3" not in ours[2]


async def test_a_seed_that_is_given_counts_where_conjure_lets_it(
    cloud_engine: DirectEngine, local: DirectEngine, project: Path
) -> None:
    cloud, own = CloudGenerationService(cloud_engine), LocalGenerationService(local)
    assert (await cloud.a_generate_flux_image("a fox", 5))["seed_used"] == 5
    assert (await cloud.a_generate_flux_image("a fox", 5, randomize_seed=True))["seed_used"] != 5
    assert (await cloud.a_generate_flux_image("a fox"))["seed_used"] > 0
    assert (await own.a_generate_flux_image("a fox", 5))["seed_used"] != 5
    assert (await own.a_generate_flux_image("a fox", 5, randomize_seed=False))["seed_used"] == 5


async def test_local_results_have_places_by_their_seeds(local: DirectEngine, project: Path) -> None:
    service = get_generation_service("local", local)
    words = service.a_generate_flux_image("a fox", 5, randomize_seed=False)  # type: ignore[attr-defined]
    assert (await words)["image_path"] == str(Path("data/generated_images/flux_results/flux_result_5.png"))
    assert isinstance(service, LocalGenerationService)
    picture = await service.a_generate_flux_depth_image(str(RENDER), "a fox", 5)
    assert picture["image_path"] == str(FLUX)
    mesh = await service.a_generate_3d_model(str(FLUX), 5)
    assert mesh["model_path"] == str(Path("data/generated_models/partpacker_results/partpacker_result_5.glb"))
    assert not_there(MESH)


def not_there(path: Path) -> bool:
    return not path.exists()


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"seed": 7},
        {"num_steps": 50, "cfg_scale": 7, "grid_res": 384, "seed": 0, "simplify_mesh": False},
        {"num_steps": 50, "cfg_scale": 7.0, "grid_res": 384, "seed": 7, "target_num_faces": 100_000},
    ],
)
async def test_a_mesh_that_fits_is_never_made_twice(
    local: DirectEngine, comfyui: ComfyUIEmulator, asked: Mapping[str, Any]
) -> None:
    service = LocalComfyUIService(local)
    await service.a_generate_flux_depth_image(str(RENDER), "a fox", 7)
    mesh = await service.a_generate_3d_model(str(FLUX), **asked)
    assert mesh["reused"] is True
    assert mesh["cost"] == 0.0
    assert mesh["job_id"]
    assert len(comfyui.run_log) == 1


@pytest.mark.parametrize(
    "asked", [{"seed": 8}, {"num_steps": 30}, {"grid_res": 128}, {"simplify_mesh": True, "target_num_faces": 2_000}]
)
async def test_another_mesh_of_a_known_picture_costs_no_second_picture(
    local: DirectEngine, comfyui: ComfyUIEmulator, asked: Mapping[str, Any]
) -> None:
    service = LocalComfyUIService(local)
    await service.a_generate_flux_depth_image(str(RENDER), "a fox", 7)
    mesh = await service.a_generate_3d_model(str(FLUX), **asked)
    assert mesh["reused"] is False
    assert len(comfyui.run_log) == 2
    assert sorted(comfyui.run_log[1].graph, key=int) == ["16", "30", "32", "33", "36", "37"]
    again = await service.a_generate_3d_model(str(FLUX), **asked)
    assert again["reused"] is True
    assert len(comfyui.run_log) == 2


async def test_a_kept_mesh_is_found_by_another_process_unless_it_is_damaged(
    local: DirectEngine, comfyui: ComfyUIEmulator, clock: LoopClock, project: Path
) -> None:
    await LocalComfyUIService(local).a_generate_flux_depth_image(str(RENDER), "a fox", 7)
    put("elsewhere.png", content(FLUX))
    async with App(clock=clock, queue={"api_base_url": comfyui.url}) as other:
        service = LocalComfyUIService(DirectEngine(other))
        assert (await service.a_generate_3d_model("elsewhere.png"))["reused"] is True
        (kept,) = (project.parent / "state" / "conjure" / "meshes").glob("*.glb")
        kept.write_bytes(content(kept)[:-4])
        assert (await service.a_generate_3d_model("elsewhere.png"))["reused"] is False
    assert content(MESH)[:4] == b"glTF"
    assert len(comfyui.run_log) == 2


async def test_callers_of_the_same_at_once_share_one_run(local: DirectEngine, comfyui: ComfyUIEmulator) -> None:
    service, other = LocalComfyUIService(local), LocalComfyUIService(local)
    first, second = await asyncio.gather(
        service.a_generate_flux_depth_image(str(RENDER), "a fox", 7),
        other.a_generate_flux_depth_image(str(RENDER), "a fox", 7),
    )
    assert first == second
    models = await asyncio.gather(*(service.a_generate_3d_model(str(RENDER), 3) for _ in range(3)))
    assert len({model["job_id"] for model in models}) == 1
    assert len(comfyui.run_log) == 2


async def test_one_of_two_callers_may_leave(local: DirectEngine, comfyui: ComfyUIEmulator) -> None:
    service = LocalComfyUIService(local)
    stays, leaves = (
        asyncio.create_task(service.a_generate_flux_depth_image(str(RENDER), "a fox", 7)) for _ in range(2)
    )
    await asyncio.sleep(2)
    leaves.cancel()
    assert (await stays)["success"] is True
    both = asyncio.create_task(service.a_generate_flux_depth_image(str(RENDER), "a fox", 8))
    await asyncio.sleep(2)
    both.cancel()
    await asyncio.wait({both})
    await asyncio.sleep(5)
    assert [record.outcome for record in comfyui.run_log] == ["success", "interrupted"]


async def test_a_random_seed_is_one_number_for_picture_and_mesh_and_is_told(
    local: DirectEngine, comfyui: ComfyUIEmulator
) -> None:
    service = LocalComfyUIService(local)
    seeds = set()
    for _ in range(2):
        picture = await service.a_generate_flux_depth_image(str(RENDER), "a fox", 7, randomize_seed=True)
        graph = comfyui.run_log[-1].graph
        assert graph["3"]["inputs"]["noise_seed"] == graph["32"]["inputs"]["seed"] == picture["seed_used"]
        seeds.add(picture["seed_used"])
        assert (await service.a_generate_3d_model(str(FLUX), picture["seed_used"]))["reused"] is True
    assert len(seeds - {7}) == 2


async def test_what_has_no_effect_is_named_with_the_reason(local: DirectEngine) -> None:
    service = LocalComfyUIService(local)
    made = await service.a_generate_flux_image("a fox", 5, guidance_scale=3.5, num_steps=50, mood="happy")
    assert {left["name"]: left["reason"] for left in made["not_applied"]} == {
        "num_steps": "the workflow flux_image has no place for it",
        "mood": "no such parameter is known",
    }
    model = await service.a_generate_3d_model(str(RENDER), 5, target_num_faces=5_000, simplify_mesh=False)
    assert [left["name"] for left in model["not_applied"]] == ["target_num_faces"]


@pytest.mark.parametrize(
    "asked", [{"num_inference_steps": 0}, {"width": 1.5}, {"width": "1024"}, {"num_inference_steps": True}]
)
async def test_values_no_node_would_take_are_refused_before_anything_is_sent(
    local: DirectEngine, comfyui: ComfyUIEmulator, asked: Mapping[str, Any]
) -> None:
    with pytest.raises(ValueInvalid):
        await LocalGenerationService(local).a_generate_flux_depth_image(str(RENDER), "a fox", 7, **asked)
    assert comfyui.count("POST", "/prompt") == 0


async def test_missing_pictures_are_told_as_conjure_expects(local: DirectEngine) -> None:
    for raised in (FileNotFoundError, RunComfyError):
        with pytest.raises(raised, match="there is no file"):
            await LocalGenerationService(local).a_generate_3d_model("data/nothing.png")
    found = await LocalComfyUIService(local).a_generate_3d_model("data/nothing.png")
    assert found["success"] is False
    assert "there is no file" in found["error"]


async def test_a_failed_job_raises_and_leaves_the_files_of_the_last_one(
    local: DirectEngine, comfyui: ComfyUIEmulator
) -> None:
    service = LocalGenerationService(local)
    await service.a_generate_flux_depth_image(str(RENDER), "a fox", 7)
    before = content(FLUX)
    comfyui.faults.add_prompt(PromptFault(no_outputs=True))
    with pytest.raises(RunComfyError) as caught:
        await service.a_generate_flux_depth_image(str(RENDER), "a fox", 8)
    assert caught.value.code == "output-missing"
    assert content(FLUX) == before


@pytest.mark.looptime(False)  # a thread waits for what the story does
async def test_a_render_that_is_being_written_is_waited_for(local: DirectEngine, comfyui: ComfyUIEmulator) -> None:
    whole = content(RENDER)
    put(RENDER, whole[: len(whole) // 2])
    work = asyncio.create_task(LocalGenerationService(local).a_generate_flux_depth_image(str(RENDER), "a fox", 7))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(RENDER.write_bytes, whole)
    assert (await work)["success"] is True
    assert content(RENDER) == whole


async def test_both_at_once_are_one_run_on_the_accounts_machines(
    cloud_engine: DirectEngine, cloud: RunComfyEmulator
) -> None:
    service = get_generation_service("cloud_legacy", cloud_engine)
    assert isinstance(service, CloudGenerationService)
    made = await service.a_generate_flux_mesh_unified(seed=3)
    assert {"success", "request_id", "flux_image_path", "mesh_model_path", "seed_used"} <= set(made)
    assert (made["steps_flux"], made["steps_partpacker"], made["generation_mode"]) == (20, 50, "cloud_legacy")
    assert content(MESH)[:4] == b"glTF"
    (record,) = prompts_of(cloud)
    assert record.graph["34"]["inputs"]["clip_l"] == "a bronze statue"
    put(PROMPT, b"")
    failed = await service.a_generate_flux_mesh_unified()
    assert failed["success"] is False
    assert "there is no prompt" in failed["error"]


async def test_no_machine_is_left_when_the_cloud_fails(cloud_engine: DirectEngine, cloud: RunComfyEmulator) -> None:
    cloud.next_call("POST servers", status=402, times=20)
    with pytest.raises(RunComfyError):
        await CloudGenerationService(cloud_engine).a_generate_flux_depth_image(str(RENDER), "a fox", 7)
    assert cloud.billing == []
    assert not_there(FLUX)


async def test_whether_the_cloud_can_be_used_is_known_without_asking(
    cloud_engine: DirectEngine, local: DirectEngine, cloud: RunComfyEmulator
) -> None:
    assert CloudGenerationService(cloud_engine).availability() == (True, "")
    assert cloud.calls == []


async def test_a_synchronous_call_that_would_wait_for_itself_says_so(local: DirectEngine) -> None:
    with pytest.raises(CalledFromEngine, match="on the event loop that would have to do the work"):
        LocalGenerationService(local).generate_flux_image("a fox")


@pytest.mark.parametrize("mode", ["standard", "turbo", "", "LOCAL", None, 3])
def test_a_mode_that_is_none_is_a_value_error(mode: Any) -> None:
    for raised in (ValueError, RunComfyError):
        with pytest.raises(raised, match="there is no generation mode"):
            get_generation_service(mode)


# -- Hugging Face ----------------------------------------------------------------------------------------------


class StandIn:
    """Spaces that answer as the real ones do, with files of this computer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, str, dict[str, str], dict[str, Any]]] = []

    def predict(self, space: str, api_name: str, files: Mapping[str, str], values: Mapping[str, Any]) -> Any:
        self.calls.append((space, api_name, dict(files), dict(values)))
        if "PartPacker" in space:
            mesh = self.folder / "made.glb"
            mesh.write_bytes(glb(relief(Image.radial_gradient("L").convert("RGBA"), longest=8, noise=b"x" * 64)))
            return str(mesh)
        if values["prompt"] == "broken":
            raise ConnectionError("the Space sleeps")
        picture = self.folder / "made.webp"
        Image.radial_gradient("L").convert("RGBA").save(picture, "WEBP")
        return ({"path": str(picture)}, 11) if values["randomize_seed"] else (str(picture), values["seed"])


async def test_local_mode_is_hugging_face_where_that_is_chosen(
    local: DirectEngine, comfyui: ComfyUIEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONJURE_LOCAL_BACKEND", "huggingface")
    spaces = StandIn(tmp_path)
    service = LocalGenerationService(local, spaces=spaces)
    picture = await service.a_generate_flux_depth_image(str(RENDER), "a fox", 7, randomize_seed=False)
    assert (picture["success"], picture["image_path"], picture["seed_used"]) == (True, str(FLUX), 7)
    with Image.open(FLUX) as made:
        assert (made.format, made.mode) == ("PNG", "RGB")
    words = await service.a_generate_flux_image("a fox", guidance_scale=3.5)
    assert words["image_path"] == str(Path("data/generated_images/flux_results/flux_result_11.png"))
    assert [left["name"] for left in words["not_applied"]] == ["guidance_scale"]
    mesh = await service.a_generate_3d_model(str(FLUX), 7)
    assert mesh["model_path"] == str(Path("data/generated_models/partpacker_results/partpacker_result_7.glb"))
    assert [call[:2] for call in spaces.calls] == [
        ("black-forest-labs/FLUX.1-Depth-dev", "/infer"),
        ("black-forest-labs/FLUX.1-dev", "/infer"),
        ("nvidia/PartPacker", "/process_3d"),
    ]
    with pytest.raises(RunComfyError, match="the Space sleeps"):
        await service.a_generate_flux_image("broken")
    assert comfyui.run_log == []
    able, why = LocalGenerationService(local).availability()
    assert able is False
    assert "HUGGINGFACE_HUB_ACCESS_TOKEN" in why
    with pytest.raises(RunComfyError, match="cannot be used"):
        await LocalGenerationService(local).a_generate_flux_image("a fox")
