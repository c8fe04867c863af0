"""The jobs API: the queue and the history once more, as jobs with one status each."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from aiohttp import web

from runcomfy.testing.emulators.comfyui.keys import process_of
from runcomfy.testing.emulators.comfyui.process import ServerProcess
from runcomfy.testing.emulators.comfyui.queue import QueueItem
from runcomfy.testing.emulators.comfyui.versions import Capabilities

routes = web.RouteTableDef()

Job = dict[str, Any]

THREE_D = {".obj", ".fbx", ".gltf", ".glb", ".usdz"}
PREVIEWABLE = {"images", "video", "audio", "files"}
END_EVENTS = ("execution_success", "execution_error", "execution_interrupted")


class BadQuery(web.HTTPBadRequest):
    """A 400 with the jobs API's own body."""

    def __init__(self, text: str) -> None:
        super().__init__(text=json.dumps({"error": text}), content_type="application/json")


def _is_3d(name: object) -> bool:
    return isinstance(name, str) and PurePosixPath(name.lower()).suffix in THREE_D


def _normal(item: Any) -> Any:
    """An entry of a ui list as this API shows it: 3D paths become objects."""
    if _is_3d(item):
        return {"filename": item, "type": "output", "subfolder": "", "mediaType": "3d"}
    return item


def normal_outputs(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """A history's outputs, with 3D paths as objects and without nulls."""
    return {
        node_id: {
            key: [_normal(item) for item in items if item is not None]
            if isinstance(items, list) and key != "animated"
            else items
            for key, items in ui.items()
        }
        for node_id, ui in outputs.items()
    }


def _entries(outputs: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for node_id, ui in outputs.items():
        for key, items in ui.items():
            if key != "animated" and isinstance(items, list):
                for item in items:
                    yield node_id, key, _normal(item)


def _previewable(key: str, item: Mapping[str, Any], can: Capabilities) -> bool:
    three_d = can.jobs_count_3d and (key == "3d" or _is_3d(item.get("filename")))
    return key in PREVIEWABLE or three_d


def summary(outputs: Mapping[str, Any], can: Capabilities) -> Job:
    """Counts and the one output to show."""
    count, previewable = 0, 0
    best: Job | None = None
    for node_id, key, item in _entries(outputs):
        if not isinstance(item, dict):
            continue
        count += 1
        if not _previewable(key, item, can):
            continue
        previewable += 1
        if best is None or (best.get("type") != "output" and item.get("type") == "output"):
            best = {**item, "nodeId": node_id, "mediaType": item.get("mediaType", key)}
    if best is None and can.previewable_count:
        texts = (entry for entry in _entries(outputs) if entry[1] == "text" and isinstance(entry[2], str))
        for node_id, _, text in texts:
            best = {"content": text, "nodeId": node_id, "mediaType": "text"}
            break
    job: Job = {"outputs_count": count}
    if can.previewable_count:
        job["previewable_outputs_count"] = previewable
    if best is not None:
        job["preview_output"] = best
    return job


def _common(item: Iterable[Any], status: str) -> Job:
    number, prompt_id, _, extra, _ = item
    job: Job = {"id": prompt_id, "status": status, "priority": number}
    if extra.get("create_time") is not None:
        job["create_time"] = extra["create_time"]
    return job


def _workflow(job: Job, extra: Mapping[str, Any]) -> Job:
    # An explicit null here raises, and takes the whole list down: so does the real one.
    workflow_id = extra.get("extra_pnginfo", {}).get("workflow", {}).get("id")
    if workflow_id is not None:
        job["workflow_id"] = workflow_id
    return job


def waiting_job(item: QueueItem, status: str, can: Capabilities) -> Job:
    """A pending or running prompt as a job."""
    return _workflow(_common(item[:5], status) | summary({}, can), item[3])


def finished_job(entry: Mapping[str, Any], can: Capabilities, *, whole: bool) -> Job:
    """A history entry as a job; `whole` adds outputs, messages and the workflow."""
    events = dict(entry["status"]["messages"])
    status = "completed" if entry["status"]["status_str"] == "success" else "failed"
    if "execution_interrupted" in events and can.jobs_know_cancelled:
        status = "cancelled"
    job = _common(entry["prompt"], status)
    if "execution_start" in events:
        job["execution_start_time"] = events["execution_start"]["timestamp"]
    for event in END_EVENTS:
        if event in events:
            job["execution_end_time"] = events[event]["timestamp"]
    if "execution_error" in events:
        job["execution_error"] = events["execution_error"]
    job |= summary(entry["outputs"], can)
    _workflow(job, entry["prompt"][3])
    if whole:
        job["outputs"] = normal_outputs(entry["outputs"]) if can.jobs_count_3d else entry["outputs"]
        job["execution_status"] = entry["status"]
        job["workflow"] = {"prompt": entry["prompt"][2], "extra_data": entry["prompt"][3]}
    return job


def _all_jobs(process: ServerProcess) -> list[Job]:
    queue, can = process.queue, process.capabilities
    jobs = [waiting_job(item, "in_progress", can) for item in queue.running.values()]
    jobs += [waiting_job(item, "pending", can) for item in queue.waiting]
    jobs += [finished_job(entry, can, whole=False) for entry in queue.history.values()]
    return jobs


def _one_of(request: web.Request, name: str, allowed: tuple[str, ...]) -> str:
    value = request.query.get(name, allowed[0])
    if value not in allowed:
        raise BadQuery(f"{name} must be {' or '.join(repr(one) for one in allowed_order(name, allowed))}")
    return value


def allowed_order(name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The order in which the real server's text names the choices."""
    return tuple(sorted(allowed)) if name == "sort_order" else allowed


def _integer(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise BadQuery(f"{name} must be an integer") from None


def _duration(job: Job) -> float:
    if "execution_end_time" not in job or "execution_start_time" not in job:
        return 0
    return float(job["execution_end_time"] - job["execution_start_time"])


@routes.get("/api/jobs")
async def list_jobs(request: web.Request) -> web.Response:
    """Jobs, newest first unless told otherwise."""
    process = process_of(request)
    known: tuple[str, ...] = ("pending", "in_progress", "completed", "failed")
    if process.capabilities.jobs_know_cancelled:
        known += ("cancelled",)
    wanted = [part.strip().lower() for part in request.query.get("status", "").split(",") if part.strip()]
    bad = [status for status in wanted if status not in known]
    if bad:
        raise BadQuery(f"Invalid status value(s): {', '.join(bad)}. Valid values: {', '.join(known)}")
    sort_by = _one_of(request, "sort_by", ("created_at", "execution_duration"))
    order = _one_of(request, "sort_order", ("desc", "asc"))
    limit = _integer(request, "limit")
    if limit is not None and limit <= 0:
        raise BadQuery("limit must be a positive integer")
    offset = max(_integer(request, "offset") or 0, 0)
    workflow_id = request.query.get("workflow_id")
    jobs = [
        job
        for job in _all_jobs(process)
        if (not wanted or job["status"] in wanted) and (not workflow_id or job.get("workflow_id") == workflow_id)
    ]

    def created(job: Job) -> tuple[float, float]:
        return job.get("create_time", 0), job["priority"]

    jobs.sort(key=created if sort_by == "created_at" else _duration, reverse=order == "desc")
    page = jobs[offset:] if limit is None else jobs[offset : offset + limit]
    pagination = {
        "offset": offset,
        "limit": limit,
        "total": len(jobs),
        "has_more": offset + len(page) < len(jobs),
    }
    return web.json_response({"jobs": page, "pagination": pagination})


@routes.get("/api/jobs/{job_id}")
async def get_job(request: web.Request) -> web.Response:
    """One job; the finished one if the same id runs again."""
    process, job_id = process_of(request), request.match_info["job_id"]
    queue, can = process.queue, process.capabilities
    if job_id in queue.history:
        return web.json_response(finished_job(queue.history[job_id], can, whole=True))
    for status, items in (("in_progress", queue.running.values()), ("pending", queue.waiting)):
        for item in items:
            if item[1] == job_id:
                return web.json_response(waiting_job(item, status, can))
    return web.json_response({"error": "Job not found"}, status=404)


def _cancel(process: ServerProcess, job_id: str) -> bool:
    if any(item[1] == job_id for item in process.queue.running.values()):
        process.interrupt()
        return True
    return process.queue.delete_id(job_id)


@routes.post("/api/jobs/cancel")
async def cancel_jobs(request: web.Request) -> web.Response:
    """Cancel many; all ids are checked before any is touched."""
    try:
        body: Any = await request.json()
    except ValueError:
        return web.json_response({"error": "Request body must be valid JSON"}, status=400)
    job_ids = body.get("job_ids")
    if not isinstance(job_ids, list):
        return web.json_response({"error": "job_ids must be a list"}, status=400)
    bad = [str(job_id) for job_id in job_ids if not _is_uuid(job_id)]
    if bad:
        return web.json_response({"error": "job_ids contains invalid id(s)", "invalid_ids": bad}, status=400)
    process = process_of(request)
    dispatched = [_cancel(process, job_id) for job_id in job_ids]
    return web.json_response({"cancelled": any(dispatched)})


def _is_uuid(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(uuid.UUID(value))
    except ValueError:
        return False


@routes.post("/api/jobs/{job_id}/cancel")
async def cancel_job(request: web.Request) -> web.Response:
    """Cancel one; `true` means that it was dispatched, not that it worked."""
    return web.json_response({"cancelled": _cancel(process_of(request), request.match_info["job_id"])})
