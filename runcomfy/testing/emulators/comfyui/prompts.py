"""Routes of prompts: submit, queue, interrupt, history, free."""

from __future__ import annotations

import uuid
from typing import Any

from aiohttp import web

from runcomfy.testing.emulators.comfyui.keys import fault_of_this_call, process_of, submitted
from runcomfy.testing.emulators.comfyui.process import ServerProcess, SubmitRecord
from runcomfy.testing.emulators.comfyui.validation import Validator, problem

SECRET_KEYS = ("auth_token_comfy_org", "api_key_comfy_org")

routes = web.RouteTableDef()


def is_canonical_uuid(text: object) -> bool:
    """Lower case, hyphenated, nothing around it."""
    try:
        return isinstance(text, str) and str(uuid.UUID(text)) == text
    except ValueError:
        return False


@routes.get("/prompt")
async def get_prompt(request: web.Request) -> web.Response:
    """How much is left."""
    return web.json_response(process_of(request).queue_info())


@routes.post("/prompt")
async def post_prompt(request: web.Request) -> web.Response:
    """Check a graph and queue it."""
    process = process_of(request)
    body: Any = await request.json()
    if "number" in body:
        number: float = float(body["number"])
    else:
        front = "front" in body and bool(body["front"])
        number = -process.counter if front else process.counter
        process.counter += 1
    if "prompt" not in body:
        error = problem("no_prompt", "No prompt provided", "No prompt provided")
        return web.json_response({"error": error, "node_errors": {}}, status=400)
    prompt_id = _prompt_id(process, body)
    if prompt_id is None:
        error = problem(
            "invalid_prompt_id",
            "prompt_id must be a valid UUID",
            "prompt_id must be a UUID string in canonical lowercase hyphenated form; omit it to let the server"
            " generate one",
        )
        return web.json_response({"error": error, "node_errors": {}}, status=400)
    graph = body["prompt"]
    targets = body.get("partial_execution_targets") if process.capabilities.partial_targets else None
    validator = Validator(graph, process.nodes, process.folders, process.capabilities)
    verdict = validator.validate(targets)
    extra = body.get("extra_data", {})
    if "client_id" in body:
        extra["client_id"] = body["client_id"]
    if verdict.error is not None:
        return web.json_response({"error": verdict.error, "node_errors": verdict.node_errors}, status=400)
    secrets = _prepare_extra(process, request, extra)
    process.queue.put((number, prompt_id, graph, extra, verdict.outputs, secrets))
    process.submits.append(SubmitRecord(prompt_id, process.now(), process.boot, graph))
    submitted.set(process.submits[-1])
    if fault_of_this_call().twice:
        process.queue.put((process.counter, prompt_id, graph, extra, verdict.outputs, secrets))
        process.counter += 1
    return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})


def _prompt_id(process: ServerProcess, body: dict[str, Any]) -> str | None:
    """The client's id or a new one; None if the client's is refused."""
    can = process.capabilities
    wanted = body.get("prompt_id")
    if not can.modern_progress or (wanted is None and (can.strict_prompt_id or "prompt_id" not in body)):
        return str(uuid.uuid4())
    if can.strict_prompt_id:
        return wanted if is_canonical_uuid(wanted) else None
    return str(wanted)


def _prepare_extra(process: ServerProcess, request: web.Request, extra: dict[str, Any]) -> dict[str, Any]:
    can = process.capabilities
    secrets: dict[str, Any] = {}
    if can.modern_progress:
        secrets = {key: extra.pop(key) for key in SECRET_KEYS if key in extra}
    if can.strict_prompt_id and "Comfy-Usage-Source" in request.headers:
        extra["comfy_usage_source"] = request.headers["Comfy-Usage-Source"]
    if can.create_time:
        extra["create_time"] = process.stamp()
    return secrets


@routes.get("/queue")
async def get_queue(request: web.Request) -> web.Response:
    """What runs and what waits, whole graphs included, the latter in heap order."""
    queue = process_of(request).queue
    return web.json_response(
        {
            "queue_running": [list(item[:5]) for item in queue.running.values()],
            "queue_pending": [list(item[:5]) for item in queue.waiting],
        }
    )


@routes.post("/queue")
async def post_queue(request: web.Request) -> web.Response:
    """Remove waiting prompts."""
    queue = process_of(request).queue
    body = await request.json()
    if body.get("clear"):
        queue.wipe()
    if "delete" in body:
        for wanted in body["delete"]:
            queue.delete_id(wanted)
    return web.Response()


@routes.post("/interrupt")
async def post_interrupt(request: web.Request) -> web.Response:
    """Interrupt the running prompt, or only a certain one where the version knows how."""
    process = process_of(request)
    try:
        body: Any = await request.json()
    except ValueError:
        body = {}
    wanted = body.get("prompt_id") if process.capabilities.targeted_interrupt else None
    if not wanted or any(item[1] == wanted for item in process.queue.running.values()):
        process.interrupt()
    return web.Response()


@routes.post("/free")
async def post_free(request: web.Request) -> web.Response:
    """Ask the worker to drop models or the node cache once it is idle."""
    queue = process_of(request).queue
    body = await request.json()
    for flag in ("unload_models", "free_memory"):
        if body.get(flag):
            queue.set_flag(flag, value=True)
    return web.Response()


@routes.get("/history")
async def get_history(request: web.Request) -> web.Response:
    """Finished prompts, oldest first."""
    process = process_of(request)
    most = request.query.get("max_items")
    offset = request.query.get("offset") if process.capabilities.history_offset else None
    return web.json_response(
        process.queue.entries(
            max_items=None if most is None else int(most), offset=-1 if offset is None else int(offset)
        )
    )


@routes.get("/history/{prompt_id}")
async def get_history_entry(request: web.Request) -> web.Response:
    """One finished prompt, or nothing."""
    return web.json_response(process_of(request).queue.entries(request.match_info["prompt_id"]))


@routes.post("/history")
async def post_history(request: web.Request) -> web.Response:
    """Forget finished prompts."""
    history = process_of(request).queue.history
    body = await request.json()
    if body.get("clear"):
        history.clear()
    if "delete" in body:
        for prompt_id in body["delete"]:
            history.pop(prompt_id, None)
    return web.Response()
