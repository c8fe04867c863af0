"""
The endpoints that CONJURE's own programs call, with the bodies, envelopes and statuses they know.

    200     {"success", "message", "data"}; `X-Job-Id` names the job of a generation
    422     a body or a value that does not fit, a file that is not there or is not what it must be
    429     too many generations were asked for at once
    501     needs a part of CONJURE that is not in this process
    502     the work failed; CONJURE reads the sentence in `detail`
    503     the mode cannot be used as this computer is set up, or the service is shutting down
    504     Blender did not do its part in time

CONJURE's own server answers 500 to everything but a body that does not fit; its programs look at whether it is 200, so
that what kind of trouble it is can be said here. 500 is left for defects.

No request holds up another: while a generation runs, everything else answers. A client that gives up loses nothing:
the job goes on, its files get their places, and `/workflow/progress` and `/jobs` find it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse

from launcher.backend import Backend, backend_of
from launcher.conjure.bodies import (
    IMPORTED_ABOVE,
    APIResponse,
    Asked,
    ConversationRequest,
    FluxDepthRequest,
    FluxRequest,
    InstructionRequest,
    MeshImportRequest,
    PartPackerRequest,
    Problem,
    StateSetRequest,
    StateUpdateRequest,
)
from launcher.conjure.desk import Desk, digest_of
from launcher.conjure.engine import WATCHED, Shared
from launcher.conjure.errors import AgentMissing, ServiceUnavailable
from launcher.conjure.services import MODES
from launcher.conjure.state_file import as_json
from launcher.errors import error_body, status_of
from launcher.guarding.guard import Principal
from launcher.schemas import GUARDED
from launcher.views import without_paths
from runcomfy.domain.exceptions import (
    InputFileInvalid,
    InputFileMissing,
    Interrupted,
    RunComfyError,
    TooManyRequests,
    ValueInvalid,
    foreign_text,
)

router = APIRouter(tags=["conjure"])

JOB_HEADER: Final = "X-Job-Id"
DEFECT: Final = 500
FAILED: Final = 502


def _fails(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in (*GUARDED, 404, 409, 502, 504, 507, *statuses)}


async def desk_of(request: Request, backend: Annotated[Backend, Depends(backend_of)]) -> Desk:
    """Return the desk of the app that got the request."""
    desk: Desk | None = getattr(request.app.state, "conjure", None)
    if desk is None:
        desk = request.app.state.conjure = Desk(backend)
    return desk


async def sender_of(request: Request, backend: Annotated[Backend, Depends(backend_of)]) -> Principal:
    """Return who sent the request."""
    return backend.guard.principal_of(request)


At = Annotated[Desk, Depends(desk_of)]


@asynccontextmanager
async def at_desk(web: FastAPI, backend: Backend) -> AsyncIterator[None]:
    """For the block, see to what earlier generations left undone, whether CONJURE asks for anything or not."""
    desk = web.state.conjure = Desk(backend)
    await desk.begin()
    try:
        yield
    finally:
        await desk.close()


Who = Annotated[Principal, Depends(sender_of)]


def refusal(error: RunComfyError, doing: str, job_id: str = "") -> JSONResponse:
    """Return the answer that tells an error in CONJURE's way."""
    body = error_body(error)
    body["detail"] = f"{doing}: {body['detail']}"
    job_id = job_id or str(error.details.get("job_id", ""))
    if isinstance(error, AgentMissing):
        status = 501
    elif isinstance(error, (ServiceUnavailable, Interrupted)):
        status = 503
    elif isinstance(error, TooManyRequests):
        wait = max(1, math.ceil(float(error.details.get("retry_after_s", 1))))
        return JSONResponse(body, 429, headers={"Retry-After": str(wait)})
    else:
        status = FAILED if (known := status_of(error)) == DEFECT else known
    return JSONResponse(body, status, headers={JOB_HEADER: job_id} if job_id else None)


async def generated(desk: Desk, work: Callable[[], Awaitable[dict[str, Any]]], watched: list[Shared]) -> dict[str, Any]:
    """Wait for a generation, or until the service ends; the job goes on then.

    Raises Interrupted (the service ends), GenerationFailed, RunComfyError.
    """

    async def run() -> dict[str, Any]:
        WATCHED.set(watched)
        return await work()

    task = asyncio.create_task(run(), name="conjure-request")
    closing = asyncio.create_task(desk.backend.closing.wait())
    try:
        await asyncio.wait({task, closing}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() or task.cancelled():
            raise Interrupted(
                "the service is shutting down",
                hint="the job goes on when it is started again; GET /jobs finds it",
                details={"job_id": job_of(watched)},
            )
        return task.result()
    finally:
        closing.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def job_of(watched: list[Shared]) -> str:
    """Return the id of the job that a request waited for; empty if there was none."""
    return watched[-1].job_id if watched else ""


async def _image(
    desk: Desk, who: Principal, response: Response, call: str, doing: str, words: str, *keys: str, asked: Asked
) -> APIResponse | JSONResponse:
    """Generate something in the mode that holds, and tell `keys` of the result."""
    watched: list[Shared] = []
    wanted = asked.parameters()
    try:
        await desk.begin()
        await desk.name_files(who, *(wanted[key] for key in ("control_image_path", "image_path") if key in wanted))
        await desk.admit()
        mode = await desk.mode()
        found = await generated(desk, lambda: desk.generate(mode.name, call, **wanted), watched)
    except RunComfyError as error:
        return refusal(error, doing, job_of(watched))
    if not found.get("success"):
        return _unsuccessful(found, doing, job_of(watched))
    data = {key: found[key] for key in keys} | {"generation_mode": mode.name}
    more = ("job_id", "prompt_id", "cost", "not_applied", "reused", "warning")
    data |= {key: found[key] for key in more if key in found}
    data["not_applied"] = [*found.get("not_applied", ()), *asked.unknown()]
    if mode.note:
        data["mode_note"] = without_paths(mode.note)
    _name_job(response, found, watched)
    return APIResponse(success=True, message=f"{words} using {mode.name.upper()} mode", data=data)


def _unsuccessful(found: Mapping[str, Any], doing: str, job_id: str = "") -> JSONResponse:
    said = without_paths(foreign_text(found.get("error") or "it did not succeed", 1_000))
    facts = {"code": str(found.get("error_code") or "workflow-failed"), "message": said, "hint": "", "details": {}}
    job_id = job_id or str(found.get("request_id") or found.get("job_id") or "")
    bad = {kind.code for kind in (ValueInvalid, InputFileMissing, InputFileInvalid)}
    status = 422 if facts["code"] in bad else FAILED
    headers = {JOB_HEADER: job_id} if job_id else None
    return JSONResponse({"detail": f"{doing}: {said}", "error": facts}, status, headers=headers)


def _name_job(response: Response, found: Mapping[str, Any], watched: list[Shared]) -> None:
    job_id = str(found.get("job_id") or job_of(watched))
    if job_id:
        response.headers[JOB_HEADER] = job_id


# -- this service ------------------------------------------------------------------------------------------


@router.get("/health", responses=_fails())
async def health(desk: At) -> dict[str, str]:
    """Say that this answers."""
    await desk.begin()
    return {"status": "healthy", "service": "CONJURE API Server"}


@router.post("/shutdown", responses=_fails())
async def shutdown(desk: At, after: BackgroundTasks) -> dict[str, str]:
    """End the service in good order, after this answer; and tell CONJURE's launcher, if it runs, to end itself."""

    def tell(state: dict[str, Any]) -> None:
        if state.get("app_status") == "running":
            state["app_status"] = "shutting_down"

    try:
        if desk.state.path.is_file():
            await asyncio.to_thread(desk.state.change, tell)
    except RunComfyError as error:
        after.add_task(desk.backend.shut_down)
        return {"status": "success", "message": f"shutting down; the state file was left as it is: {error.message}"}
    after.add_task(desk.backend.shut_down)
    return {"status": "success", "message": "CONJURE system shutdown initiated"}


DESCRIBED: Final[Mapping[str, tuple[str, str, str]]] = {
    "local": ("Own ComfyUI", "FLUX and PartPacker on a ComfyUI of your own", "a ComfyUI that answers"),
    "huggingface": (
        "Hugging Face Spaces",
        "FLUX.1-dev, FLUX.1-Depth-dev, PartPacker",
        "HUGGINGFACE_HUB_ACCESS_TOKEN and the extra `huggingface`",
    ),
    "cloud": ("RunComfy machines", "FLUX and PartPacker on machines rented by the second", "a RunComfy account"),
    "serverless": ("RunComfy serverless", "FLUX and PartPacker on a deployment", "RUNCOMFY_DEPLOYMENT_ID and a token"),
    "cloud_legacy": ("RunComfy machines", "the same as cloud", "a RunComfy account"),
    "local_comfyui": ("Own ComfyUI, in one run", "picture and mesh at once", "a ComfyUI that answers"),
}


@router.get("/mode", responses=_fails())
async def mode(desk: At) -> dict[str, Any]:
    """Say which generation mode holds, and for each whether it can be used, and why not."""
    holds = await desk.mode()
    looks = await asyncio.gather(*(desk.available(name) for name in MODES))
    found = dict(zip(MODES, looks, strict=True))
    services = {
        name: {
            "name": DESCRIBED[name][0],
            "description": DESCRIBED[name][1],
            "available": able,
            "requirements": DESCRIBED[name][2],
            "why_not": why or None,
        }
        for name, (able, why) in found.items()
    }
    return {
        "generation_mode": holds.name,
        "note": without_paths(holds.note) or None,
        "available_modes": list(MODES),
        **{f"{name}_available": able for name, (able, _) in found.items()},
        "services": services,
    }


# -- generating --------------------------------------------------------------------------------------------


@router.post("/flux/generate", response_model=APIResponse, responses=_fails())
async def flux_generate(asked: FluxRequest, desk: At, who: Who, response: Response) -> APIResponse | JSONResponse:
    """Make a picture from words."""
    return await _image(
        desk,
        who,
        response,
        "generate_flux_image",
        "Error generating FLUX image",
        "FLUX image generated successfully",
        "image_path",
        "seed_used",
        asked=asked,
    )


@router.post("/flux/depth", response_model=APIResponse, responses=_fails())
async def flux_depth(asked: FluxDepthRequest, desk: At, who: Who, response: Response) -> APIResponse | JSONResponse:
    """Make a picture from words over the depth of another; its mesh is made in the same run, and kept."""
    return await _image(
        desk,
        who,
        response,
        "generate_flux_depth_image",
        "Error generating FLUX Depth image",
        "FLUX Depth image generated successfully",
        "image_path",
        "seed_used",
        asked=asked,
    )


@router.post("/partpacker/generate_3d", response_model=APIResponse, responses=_fails())
async def partpacker(asked: PartPackerRequest, desk: At, who: Who, response: Response) -> APIResponse | JSONResponse:
    """Return the mesh of a picture; one that was made with the picture costs nothing more."""
    return await _image(
        desk,
        who,
        response,
        "generate_3d_model",
        "Error generating 3D model",
        "3D model generated successfully",
        "model_path",
        "seed_used",
        asked=asked,
    )


async def _unified(
    desk: Desk, response: Response, mode_name: str, call: str, doing: str, mesh_key: str
) -> dict[str, Any] | JSONResponse:
    watched: list[Shared] = []
    try:
        await desk.begin()
        await desk.admit()
        able, why = await desk.available(mode_name)
        if not able:
            raise ServiceUnavailable(f"the mode {mode_name} is not available: {why}")
        found = await generated(desk, lambda: desk.generate(mode_name, call), watched)
        if not found.get("success"):
            return _unsuccessful(found, doing, job_of(watched))
        mesh = found.get(mesh_key)
        if isinstance(mesh, str) and await asyncio.to_thread(desk.places.at(mesh).is_file):
            await desk.import_mesh(mesh, IMPORTED_ABOVE)
    except RunComfyError as error:
        return refusal(error, doing, job_of(watched))
    _name_job(response, found, watched)
    return found


@router.post("/serverless/flux_mesh_unified", response_model=APIResponse, responses=_fails())
async def serverless_unified(desk: At, response: Response) -> APIResponse | JSONResponse:
    """Make picture and mesh in one run from the user's prompt and render, and have Blender import the mesh.

    CONJURE calls this in its mode `cloud_legacy`, too: then, and in mode `cloud`, it runs on the account's machines.
    """
    doing = "Error in serverless generation"
    holds = await desk.mode()
    name = holds.name if holds.name in ("cloud", "cloud_legacy") else "serverless"
    found = await _unified(desk, response, name, "generate_flux_mesh_unified", doing, "mesh_model_path")
    if isinstance(found, JSONResponse):
        return found
    return APIResponse(success=True, message="Serverless unified generation completed successfully", data=found)


@router.post("/local_comfyui/flux_mesh_unified", response_model=APIResponse, responses=_fails())
async def local_comfyui_unified(desk: At, response: Response) -> APIResponse | JSONResponse:
    """Make picture and mesh in one run on the user's own ComfyUI, and have Blender import the mesh."""
    doing = "Error in local ComfyUI generation"
    found = await _unified(desk, response, "local_comfyui", "generate_flux_mesh", doing, "mesh_model")
    if isinstance(found, JSONResponse):
        return found
    data = {
        "flux_image_path": found.get("flux_image"),
        "mesh_model_path": found.get("mesh_model"),
        "prompt_id": found.get("prompt_id"),
        "job_id": found.get("job_id"),
        "seed_used": found.get("seed_used"),
    }
    return APIResponse(success=True, message="Local ComfyUI unified generation completed successfully", data=data)


# -- progress ----------------------------------------------------------------------------------------------


@router.get("/workflow/progress", responses=_fails())
async def all_progress(desk: At) -> dict[str, Any]:
    """Tell of everything that runs or waits how far it is."""
    await desk.begin()
    active = await desk.all_progress()
    return {"success": True, "data": {"active_workflows": active, "total_count": len(active)}}


@router.get("/workflow/progress/{prompt_id}", response_model=None, responses=_fails(404))
async def progress(desk: At, prompt_id: Annotated[str, Path(min_length=1, max_length=200)]) -> Any:
    """Tell how far a workflow is, by the id of its prompt or of its job."""
    await desk.begin()
    summary = await desk.progress(prompt_id)
    if summary is None:
        facts = {"code": "job-not-found", "message": "Workflow not found", "hint": "", "details": {}}
        return JSONResponse({"detail": "Workflow not found", "error": facts}, 404)
    return {"success": True, "data": summary}


# -- Blender -----------------------------------------------------------------------------------------------


@router.post("/blender/render_gesture_camera", response_model=APIResponse, responses=_fails())
async def render_gesture_camera(desk: At) -> APIResponse | JSONResponse:
    """Have Blender render what the camera sees; answers when the new picture is there."""
    try:
        path = await desk.render()
    except RunComfyError as error:
        return refusal(error, "Error rendering GestureCamera")
    return APIResponse(success=True, message="GestureCamera render completed", data={"render_path": path})


@router.post("/blender/import_mesh", response_model=APIResponse, responses=_fails())
async def import_mesh(asked: MeshImportRequest, desk: At, who: Who) -> APIResponse | JSONResponse:
    """Have Blender import a mesh."""
    try:
        await desk.name_files(who, asked.mesh_path)
        told = await desk.import_mesh(asked.mesh_path, asked.min_volume_threshold)
    except RunComfyError as error:
        return refusal(error, "Error importing mesh")
    return APIResponse(success=True, message="Mesh import command sent to Blender", data=told)


# -- the state file ----------------------------------------------------------------------------------------


@router.get("/state", response_model=APIResponse, responses=_fails())
async def get_state(desk: At) -> Response:
    """Return the whole state."""
    try:
        text = await asyncio.to_thread(lambda: as_json(desk.state.read()))
    except RunComfyError as error:
        return refusal(error, "Error getting state")
    return Response(f'{{"success": true, "message": "State retrieved", "data": {text}}}', media_type="application/json")


@router.post("/state/update", response_model=APIResponse, responses=_fails())
async def update_state(asked: StateUpdateRequest, desk: At) -> APIResponse | JSONResponse:
    """Lay values over the state."""
    try:
        await asyncio.to_thread(desk.state.update, asked.updates)
    except RunComfyError as error:
        return refusal(error, "Error updating state")
    return APIResponse(success=True, message="State updated successfully")


@router.post("/state/set/{key}", response_model=APIResponse, responses=_fails())
async def set_state(
    key: Annotated[str, Path(min_length=1, max_length=200)], asked: StateSetRequest, desk: At
) -> APIResponse | JSONResponse:
    """Set one key of the state."""
    try:
        await asyncio.to_thread(desk.state.update, {key: asked.value})
    except RunComfyError as error:
        return refusal(error, "Error setting state")
    return APIResponse(success=True, message=f"State key '{foreign_text(key, 200)}' set successfully")


# -- CONJURE's agents --------------------------------------------------------------------------------------


@router.post("/process_conversation", response_model=APIResponse, responses=_fails(501))
async def process_conversation(asked: ConversationRequest, desk: At) -> APIResponse | JSONResponse:
    """Have CONJURE's agent answer what was said; it must be part of this process."""
    doing = "Error processing conversation"
    try:
        found = await desk.converse(asked.conversation_history, asked.include_image)
    except RunComfyError as error:
        return refusal(error, doing)
    except Exception as error:  # noqa: BLE001 - CONJURE's own code may raise anything
        return refusal(RunComfyError(f"{type(error).__name__}: {foreign_text(error)}"), doing)
    data = {"instruction": found} if found else None
    return APIResponse(success=True, message="Conversation processed successfully", data=data)


@router.post("/execute_instruction", response_model=APIResponse, responses=_fails(501))
async def execute_instruction(asked: InstructionRequest, desk: At) -> APIResponse | JSONResponse:
    """Have CONJURE's InstructionManager obey; in its newer revision the launcher does what is to be done by itself."""
    instruction, doing = asked.instruction, "Error executing instruction"
    tool = foreign_text(instruction.get("tool_name", "unknown"), 200)
    digest = digest_of(instruction)
    if desk.repeated(instruction, digest):
        data = {"instruction": instruction, "tool_name": tool, "duplicate_blocked": True}
        return APIResponse(success=True, message=f"Heavy operation {tool} already processed recently", data=data)
    if desk.agents_only_listen():
        data = {"instruction": instruction, "tool_name": tool, "demo_mode": True}
        return APIResponse(success=True, message=f"Tool '{tool}' is left to CONJURE's launcher", data=data)
    try:
        await desk.execute(instruction)
    except RunComfyError as error:
        desk.forget(digest)
        return refusal(error, doing)
    except Exception as error:  # noqa: BLE001 - CONJURE's own code may raise anything
        desk.forget(digest)
        return refusal(RunComfyError(f"{type(error).__name__}: {foreign_text(error)}"), doing)
    return APIResponse(success=True, message="Instruction executed successfully", data={"instruction": instruction})
