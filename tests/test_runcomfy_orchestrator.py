"""Jobs from request to verified files, cold and warm, on the emulated cloud and its emulated ComfyUI servers."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.adapters.log import register_secret
from runcomfy.application.faultpoints import listening
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.job import JobRequest, JobResult, JobStatus, OutputKind
from runcomfy.domain.progress import Progress, Step
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

pytestmark = pytest.mark.cloud(boot_time=180)


def delay(seconds: float, *, steps: int = 10, then: str = "SaveImage") -> dict[str, Any]:
    """A graph that takes its time and then saves a picture."""
    return {
        "1": {
            "class_type": "EmulatorDelay",
            "inputs": {"seconds": seconds, "steps": steps, "previews": False, "seed": 1},
        },
        "2": {"class_type": then, "inputs": {"images": ["1", 0], "filename_prefix": "late"}},
    }


def failing(kind: str, message: str = "") -> dict[str, Any]:
    inputs = {"kind": kind, "message": message, "steps": 4, "at_step": 2}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "EmulatorFail", "inputs": {"image": ["1", 0], **inputs}, "_meta": {"title": "the culprit"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "never"}},
    }


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest_asyncio.fixture
async def app(
    cloud: RunComfyEmulator, clock: LoopClock, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[App]:
    for name, value in cloud.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUNCOMFY_OUTPUT_DIR", str(tmp_path / "outputs"))
    async with App(clock=clock, tell=said.append) as app:
        yield app


def comfyui_of(cloud: RunComfyEmulator, number: int = -1) -> ComfyUIEmulator:
    server = list(cloud.machines.values())[number].comfyui
    assert isinstance(server, ComfyUIEmulator)
    return server


def leftovers(result_folder: Path) -> list[str]:
    return sorted(p.name for p in result_folder.rglob("*") if p.is_file()) if result_folder.exists() else []


async def when(condition: Callable[[], bool], what: str) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.5)
    pytest.fail(f"did not happen: {what}")


# -- the cold path -----------------------------------------------------------------------------------------


async def test_a_picture_and_a_prompt_become_a_picture_and_a_mesh_and_nothing_bills(
    app: App, cloud: RunComfyEmulator, picture: str
) -> None:
    seen: list[Progress] = []
    request = JobRequest("generate_flux_mesh", image=picture, prompt="a bronze statue", seed=2**40)

    result = await app.orchestrator().run(request, on_progress=seen.append)

    assert result.status is JobStatus.DONE, result.error
    assert {(o.name, o.kind) for o in result.outputs} == {("flux", OutputKind.IMAGE), ("mesh", OutputKind.MESH)}
    assert result.seeds == {"3.noise_seed": 2**40, "32.seed": 2**40 % 2**31}
    assert len(cloud.launched) == 1
    assert cloud.billing == []
    bill = cloud.books[cloud.launched[0]]
    assert abs(result.cost_usd - bill.usd) <= Decimal("0.001")  # to the second or so (I9)
    assert result.cost_usd > 0
    assert abs(sum(line.amount_usd for line in result.bill) - result.cost_usd) == 0
    percents = [p.percent for p in seen if p.step in (Step.QUEUED, Step.RUNNING, Step.FETCHING, Step.FINISHED)]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert any(p.node_title == "Xlabs Sampler" and p.maximum == 20 for p in seen)
    assert seen[-1].elapsed >= timedelta(seconds=180)
    assert [p.elapsed for p in seen] == sorted(p.elapsed for p in seen)
    assert {"boot", "execute", "stop", "total"} <= set(result.timings)
    assert result.timings["boot"] >= 180


async def test_the_manifest_says_what_made_the_files(app: App, picture: str) -> None:
    result = await app.orchestrator().run(JobRequest("image_invert", image=picture))

    assert result.folder is not None
    manifest = json.loads((Path(result.folder) / "manifest.json").read_text())
    assert manifest["job_id"] == result.job_id
    assert manifest["prompt_id"] == result.prompt_id
    assert len(manifest["workflow"]["sha256"]) == 64
    assert manifest["where"] == "own machine"
    assert Decimal(manifest["cost_usd"]) == result.cost_usd > 0
    assert manifest["outputs"][0]["sha256"] == result.outputs[0].sha256
    assert any(entry["source"] == "--image" for entry in manifest["inputs"])


async def test_two_pictures_give_two_meshes_and_one_seed_gives_the_same_bytes_again(
    app: App, cloud: RunComfyEmulator, picture: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    Image.radial_gradient("L").convert("RGB").save(other)

    async def mesh(image: str) -> str:
        result = await app.orchestrator().run(JobRequest("generate_flux_mesh", image=image, prompt="p", seed=7))
        return next(o.sha256 for o in result.outputs if o.kind is OutputKind.MESH)

    first, again, different = await mesh(picture), await mesh(picture), await mesh(str(other))
    assert first == again != different
    assert len(cloud.launched) == 3


async def test_a_random_seed_is_drawn_and_told(app: App, picture: str) -> None:
    async def seeds() -> dict[str, int]:
        prepared = await app.orchestrator().prepare(JobRequest("generate_flux_mesh", image=picture, prompt="p"))
        return dict(prepared.bound.seeds)

    first, second = await seeds(), await seeds()
    assert set(first) == {"3.noise_seed", "32.seed"}
    assert first != second
    assert first["32.seed"] < 2**31


async def test_a_workflow_that_cannot_run_there_ends_the_machine(app: App, cloud: RunComfyEmulator) -> None:
    graph = {
        "1": {"class_type": "NoSuchNode", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    result = await app.orchestrator().run(JobRequest(graph))
    assert (result.status, result.exit_code) == (JobStatus.FAILED, 2)
    assert result.error is not None
    assert result.error["code"] == "preflight-failed"
    assert cloud.billing == []
    assert cloud.alive == []


async def test_a_node_that_raises_is_named_and_the_machine_is_gone(app: App, cloud: RunComfyEmulator) -> None:
    result = await app.orchestrator().run(JobRequest(failing("error", "it burst")))
    assert (result.status, result.exit_code) == (JobStatus.FAILED, 5)
    assert result.error is not None
    assert "the culprit" in result.error["message"]
    assert "it burst" in result.error["message"]
    assert cloud.alive == []
    assert leftovers(Path(app.settings.files.output_dir)) == []


async def test_an_error_that_echoes_the_machines_address_does_not_show_it(
    app: App, cloud: RunComfyEmulator, said: list[str]
) -> None:
    register_secret("https://0f6b1c1e-comfyui.runcomfy.com")  # as if the emulated machine had that address
    graph = failing("error", "cannot reach https://0f6b1c1e-comfyui.runcomfy.com/prompt")
    result = await app.orchestrator().run(JobRequest(graph))
    assert result.error is not None
    assert "the culprit" in result.error["message"]
    assert "0f6b1c1e" not in json.dumps(result.as_dict())
    assert "0f6b1c1e" not in str(result.exception)


@pytest.mark.fault(41)
async def test_a_gpu_without_memory_has_a_word_of_its_own(app: App, cloud: RunComfyEmulator) -> None:
    result = await app.orchestrator().run(JobRequest(failing("oom")))
    assert result.error is not None
    assert result.error["code"] == "gpu-out-of-memory"
    assert cloud.alive == []


async def test_a_job_that_takes_too_long_is_interrupted_and_its_machine_ended(
    app: App, cloud: RunComfyEmulator
) -> None:
    result = await app.orchestrator().run(JobRequest(delay(3600), timeout=timedelta(minutes=2)))
    assert (result.status, result.exit_code) == (JobStatus.TIMEOUT, 6)
    assert cloud.alive == []
    assert 120 <= result.timings["execute"] < 140


async def test_results_that_come_too_slowly_are_not_said_to_have_been_computed_too_slowly(
    app: App, cloud: RunComfyEmulator
) -> None:
    job = asyncio.create_task(app.orchestrator().run(JobRequest(delay(30), timeout=timedelta(minutes=2))))
    await when(lambda: bool(cloud.billing), "the machine is ready")
    comfyui = cloud.machines[cloud.launched[0]].comfyui
    assert isinstance(comfyui, ComfyUIEmulator)
    comfyui.faults.add("GET", "/view", Fault(rate=1), times=99)
    result = await job
    assert result.error is not None
    assert "was computed, but its results were not here after 120 s" in result.error["message"]
    assert "fetching the results counts, too" in result.error["hint"]
    assert cloud.alive == []


async def test_cancelling_interrupts_the_prompt_and_ends_the_machine(app: App, cloud: RunComfyEmulator) -> None:
    cancel = asyncio.Event()
    job = asyncio.create_task(app.orchestrator().run(JobRequest(delay(3600)), cancel=cancel))
    await when(lambda: bool(cloud.billing), "the machine is ready")
    await asyncio.sleep(60)
    cancel.set()
    result = await job
    assert (result.status, result.exit_code) == (JobStatus.CANCELLED, 130)
    assert cloud.alive == []
    assert result.cost_usd > 0


@pytest.mark.parametrize("moment", [0.5, 5, 90, 181, 184])
async def test_cancelling_at_any_moment_leaves_nothing(app: App, cloud: RunComfyEmulator, moment: float) -> None:
    job = asyncio.create_task(app.orchestrator().run(JobRequest(delay(3600))))
    await asyncio.sleep(moment)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert cloud.alive == []


async def cancelled_while_ending(
    app: App, graph: dict[str, Any], *, then: Callable[[], None] = lambda: None
) -> JobResult:
    """Run a job and cancel it when its machine is about to be ended."""
    cancel = asyncio.Event()

    def press(progress: Progress) -> None:
        if progress.step is Step.STOPPING:
            cancel.set()
            then()

    result = await app.orchestrator().run(JobRequest(graph), cancel=cancel, on_progress=press)
    assert cancel.is_set()
    return result


@pytest.mark.fault(61)
async def test_cancelling_while_the_machine_is_being_ended_comes_too_late(app: App, cloud: RunComfyEmulator) -> None:
    """The results were committed; a person who is told that the job was cancelled runs, and pays, it again."""
    result = await cancelled_while_ending(app, delay(10))
    assert (result.status, result.error, result.exit_code) == (JobStatus.DONE, None, 0)
    assert result.outputs[0].path.endswith(".png")
    assert cloud.alive == []


@pytest.mark.parametrize("graph", [delay(10), failing("error")], ids=["done", "failed"])
async def test_cancelling_while_the_machine_cannot_be_ended_does_not_hide_that(
    app: App, cloud: RunComfyEmulator, graph: dict[str, Any]
) -> None:
    """What may still bill is the last thing that somebody must hear, whenever Ctrl+C was pressed."""
    result = await cancelled_while_ending(app, graph, then=lambda: cloud.revoke(1))
    assert result.error is not None
    assert (result.error["code"], result.exit_code) == ("machine-stop-unconfirmed", 4)
    assert "may still bill" in result.error["message"]
    assert result.status is (JobStatus.DONE if result.outputs else JobStatus.FAILED)
    [held] = app.held()
    cloud.behave()
    machines, _ = await app.cloud()
    await machines.stop(held, reason="the test is over")


async def test_cancelling_while_a_defect_breaks_the_ending_does_not_hide_that(
    app: App, cloud: RunComfyEmulator
) -> None:
    visits = []

    def broken(point: str) -> None:
        if point == "stop.asked":
            visits.append(point)
            if len(visits) == 1:
                raise ZeroDivisionError

    with listening(broken):
        result = await cancelled_while_ending(app, delay(10))
    assert result.error is not None
    assert (result.status, result.exit_code) == (JobStatus.FAILED, 1)
    assert "ZeroDivisionError" in result.error["message"]
    [held] = app.held()
    assert cloud.alive == [held.server_id]
    machines, _ = await app.cloud()
    await machines.stop(held, reason="the test is over")


@pytest.mark.fault(22)
async def test_a_machine_that_goes_away_during_the_job_is_told(app: App, cloud: RunComfyEmulator) -> None:
    cloud.next_machine(vanishes_after=timedelta(minutes=10))
    result = await app.orchestrator().run(JobRequest(delay(3600, steps=1)))
    assert result.exit_code == 4
    assert result.error is not None
    assert result.error["code"] == "machine-lost"
    assert cloud.alive == []


@pytest.mark.fault(15)
async def test_a_machine_whose_comfyui_never_answers_is_ended_and_its_cost_told(
    app: App, cloud: RunComfyEmulator
) -> None:
    cloud.next_machine(comfyui="502")
    result = await app.orchestrator().run(JobRequest(delay(1)))
    assert result.error is not None
    assert result.error["code"] == "machine-failed"
    assert cloud.alive == []
    [bill] = cloud.books.values()
    assert bill.usd > 0
    assert abs(result.cost_usd - bill.usd) <= bill.usd / 100


@pytest.mark.fault(14)
async def test_a_machine_that_never_starts_is_a_timeout_by_status_and_by_code(
    app: App, cloud: RunComfyEmulator
) -> None:
    cloud.next_machine(stuck=True)
    result = await app.orchestrator().run(JobRequest(delay(1)))
    assert (result.status, result.exit_code) == (JobStatus.TIMEOUT, 6)
    assert cloud.alive == []


async def test_a_long_job_keeps_its_machine_by_renewing_the_lease(app: App, cloud: RunComfyEmulator) -> None:
    result = await app.orchestrator().run(JobRequest(delay(3000, steps=100)))
    assert result.status is JobStatus.DONE, result.error
    durations = [c for c in cloud.calls if "update-estimated-duration" in c.path]
    assert len(durations) >= 5  # ten minutes ahead, renewed at half, over fifty minutes
    assert cloud.alive == []


@pytest.mark.fault(42)
async def test_a_success_without_results_is_no_success(app: App, cloud: RunComfyEmulator) -> None:
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "ProbeNoUi", "inputs": {"image": ["1", 0]}},
    }
    result = await app.orchestrator().run(JobRequest(graph))
    assert result.exit_code == 7, result.error
    assert cloud.alive == []


# -- the warm path -----------------------------------------------------------------------------------------


async def start_dev_server(app: App) -> None:
    _, dev = await app.cloud()
    await dev.start(server_type="large", duration=timedelta(hours=2))


async def test_jobs_share_the_dev_server_and_pay_only_their_time(
    app: App, cloud: RunComfyEmulator, picture: str
) -> None:
    await start_dev_server(app)
    results = [await app.orchestrator().run(JobRequest("image_invert", image=picture)) for _ in range(3)]
    assert [r.status for r in results] == [JobStatus.DONE] * 3
    assert len(cloud.launched) == 1
    assert cloud.billing == cloud.launched
    assert all(r.cost_usd < Decimal("0.02") for r in results)
    _, dev = await app.cloud()
    await dev.shutdown()
    assert cloud.alive == []


async def test_a_cancelled_job_leaves_the_dev_server_to_others(app: App, cloud: RunComfyEmulator, picture: str) -> None:
    await start_dev_server(app)
    cancel = asyncio.Event()
    job = asyncio.create_task(app.orchestrator().run(JobRequest(delay(3600)), cancel=cancel))
    await when(lambda: bool(comfyui_of(cloud).run_log), "the prompt runs")
    cancel.set()
    assert (await job).status is JobStatus.CANCELLED
    await when(lambda: comfyui_of(cloud).run_log[-1].outcome == "interrupted", "the node notices the interrupt")
    assert cloud.billing == cloud.launched
    assert (await app.orchestrator().run(JobRequest("image_invert", image=picture))).status is JobStatus.DONE
    _, dev = await app.cloud()
    await dev.shutdown()


async def test_a_dead_dev_server_is_not_used(app: App, cloud: RunComfyEmulator, picture: str, said: list[str]) -> None:
    await start_dev_server(app)
    await comfyui_of(cloud).kill()
    result = await app.orchestrator().run(JobRequest("image_invert", image=picture))
    assert result.status is JobStatus.DONE, result.error
    assert len(cloud.launched) == 2
    assert cloud.billing == cloud.launched[:1]
    assert any("not used" in sentence for sentence in said)
    _, dev = await app.cloud()
    await dev.shutdown()
    assert cloud.alive == []


async def test_reuse_can_be_switched_off(
    cloud: RunComfyEmulator, app: App, clock: LoopClock, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start_dev_server(app)
    monkeypatch.setenv("CONJURE_MACHINE_REUSE", "false")
    async with App(clock=clock) as other:
        assert (await other.orchestrator().run(JobRequest("image_invert", image=picture))).status is JobStatus.DONE
    assert len(cloud.launched) == 2
    _, dev = await app.cloud()
    await dev.shutdown()


# -- a given server ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as server:
        yield server


async def on_server(app: App, server: ComfyUIEmulator, request: JobRequest) -> JobResult:
    from dataclasses import replace

    return await app.orchestrator().run(replace(request, server_url=server.url))


async def test_a_given_server_costs_nothing_and_launches_nothing(
    app: App, cloud: RunComfyEmulator, server: ComfyUIEmulator, picture: str
) -> None:
    result = await on_server(app, server, JobRequest("image_invert", image=picture))
    assert result.status is JobStatus.DONE, result.error
    assert result.cost_usd == 0
    assert cloud.calls == []


async def test_results_can_be_converted(app: App, server: ComfyUIEmulator, picture: str) -> None:
    result = await on_server(app, server, JobRequest("image_invert", image=picture, convert="webp"))
    path = Path(result.outputs[0].path)
    assert path.suffix == ".webp"
    with Image.open(str(path)) as converted:
        assert converted.format == "WEBP"


async def test_a_file_is_uploaded_and_set_under_the_name_the_server_gave(
    app: App, server: ComfyUIEmulator, picture: str, tmp_path: Path
) -> None:
    strange = tmp_path / "bild größe – ü.png"
    shutil.move(picture, strange)
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "up"}},
    }
    result = await on_server(app, server, JobRequest(graph, sets={"1.image": f"@{strange}"}))
    assert result.status is JobStatus.DONE, result.error
    with Image.open(result.outputs[0].path) as got, Image.open(strange) as sent:
        assert got.convert("RGB").tobytes() == sent.tobytes()


async def test_hundreds_of_jobs_at_once_all_end(app: App, server: ComfyUIEmulator) -> None:
    def graph(colour: int) -> dict[str, Any]:
        return {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": colour}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "many"}},
        }

    results = await asyncio.gather(*(on_server(app, server, JobRequest(graph(n))) for n in range(100)))
    assert {r.status for r in results} == {JobStatus.DONE}
    assert len({r.outputs[0].path for r in results}) == 100


async def test_what_pictures_cannot_be_made_into_is_refused_before_anything_is_rented(
    app: App, cloud: RunComfyEmulator
) -> None:
    with pytest.raises(ValueInvalid, match="cannot be converted to 'gif'"):
        await app.orchestrator().prepare(JobRequest(delay(1), convert="gif"))
    result = await app.orchestrator().run(JobRequest(delay(1), convert="gif"))
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error["code"] == ValueInvalid.code
    assert cloud.launched == []
