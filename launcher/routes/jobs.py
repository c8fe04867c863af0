"""`/jobs`: put jobs in, look at them, change their fate, fetch what came of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import PlainTextResponse, Response

from launcher import views
from launcher.backend import Backend, backend_of
from launcher.errors import Conflict, NotFound
from launcher.files import SAFE_HEADERS, Wanted, send_file, send_thumbnail
from launcher.intake import MAKE_JOB, Intake
from launcher.plain_json import PlainJson
from launcher.schemas import Again, DryRun, Job, JobChange, JobDetail, JobList, answers, problems
from launcher.teller import teller_of
from runcomfy.adapters.files import open_regular
from runcomfy.adapters.media_sniff import sniff
from runcomfy.adapters.media_source import Source
from runcomfy.application.job_queue import EVENTS_AT_ONCE, JobQueue, JobStory
from runcomfy.domain.queued import QueuedJob, QueueStatus

router = APIRouter(prefix="/jobs", tags=["jobs"])

Serves = Annotated[Backend, Depends(backend_of)]
JobKey = Annotated[str, Path(min_length=1, max_length=200, description="The job's id, or its number.")]
Nth = Annotated[int, Path(ge=0, le=100_000)]
PAGE_MOST: Final = 500
BIGGEST: Final = 2**63 - 1
MANIFEST: Final = "manifest.json"
MANIFEST_MOST: Final = 8 * 1024**2
NO_STORE: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def _file(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"*/*": {}}, "description": "The file."}, **problems(*statuses)}


# -- putting in --------------------------------------------------------------------------------------------


@router.post(
    "",
    status_code=201,
    response_model=None,
    openapi_extra=MAKE_JOB,
    responses={
        **answers(201, Job, 404, 409, 411, 502, 507, description="Accepted, and on the disk."),
        200: {"model": Job | DryRun, "description": "The first answer once more, or what a dry run found."},
    },
)
async def make_job(request: Request, backend: Serves) -> PlainJson:
    """Put a job in. JSON, or multipart with the files beside it; all of it is read before the answer."""
    taken = await Intake(backend).take(request)
    if taken.estimate is not None:
        return PlainJson({"valid": True, "estimate": taken.estimate.value})
    if taken.job is None:
        raise Conflict("the job was not taken")
    shown = await teller_of(backend.app).job(taken.job)
    headers = {"Location": shown["urls"]["self"]}
    if taken.replayed:
        headers["Idempotency-Replayed"] = "true"
    return PlainJson(shown, 200 if taken.replayed else 201, headers=headers)


@router.post("/{job_id}/again", status_code=201, response_model=None, responses=answers(201, Job, 404, 409, 507))
async def again(request: Request, backend: Serves, job_id: JobKey, order: Again | None = None) -> PlainJson:
    """Put the same job in once more, with another seed (random unless one is given) and the same inputs."""
    job = await Intake(backend).again(request, await backend.queue.job(job_id), order.seed if order else None)
    shown = await teller_of(backend.app).job(job)
    return PlainJson(shown, 201, headers={"Location": shown["urls"]["self"]})


# -- looking -----------------------------------------------------------------------------------------------


@router.get("", response_model=None, responses=answers(200, JobList))
async def list_jobs(
    backend: Serves,
    status: Annotated[Literal["pending", "processing", "done", "failed"] | None, Query()] = None,
    workflow: Annotated[str | None, Query(max_length=200)] = None,
    user: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MOST)] = 50,
    before: Annotated[int | None, Query(ge=0, le=BIGGEST, description="A job's number.")] = None,
    order: Annotated[
        Literal["newest", "queue"],
        Query(description="queue: those that wait, the next one first; one page, whatever else is asked for."),
    ] = "newest",
) -> PlainJson:
    """List jobs, the newest first."""
    if order == "queue":
        found = await backend.queue.store.jobs(status=QueueStatus.PENDING, limit=limit)
    else:
        found = await backend.queue.store.newest(
            before=before,
            status=QueueStatus(status) if status is not None else None,
            workflow_id=workflow,
            user=user,
            limit=limit + 1,
        )
    page = found[:limit]
    counts = await backend.queue.counts()
    return PlainJson(
        {
            "jobs": await teller_of(backend.app).jobs(page),
            "counts": {str(one): counts.get(one, 0) for one in QueueStatus},
            "next": page[-1].id if len(found) > limit else None,
        },
        headers=NO_STORE,
    )


@router.get("/{job_id}", response_model=None, responses=answers(200, JobDetail, 404))
async def show_job(backend: Serves, job_id: JobKey) -> PlainJson:
    """Show everything that is known of a job."""
    return PlainJson(await teller_of(backend.app).detail(await _story(backend.queue, job_id)), headers=NO_STORE)


async def _story(queue: JobQueue, key: str) -> JobStory:
    """Return a job with its tries and its log, in one read if it can be: pages ask often. Raises JobNotFound."""
    found = await queue.store.story(key, limit=EVENTS_AT_ONCE)
    if found is None or len(found[2]) >= EVENTS_AT_ONCE:
        return await queue.show(key)
    return JobStory(*found)


@router.get(
    "/{job_id}/log",
    response_class=Response,  # else errors are said to be text, too
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problems(404)},
)
async def show_log(backend: Serves, job_id: JobKey) -> PlainTextResponse:
    """Tell the job's story as text."""
    return PlainTextResponse(views.log_text(await backend.queue.show(job_id)), headers=SAFE_HEADERS | NO_STORE)


@router.get(
    "/{job_id}/manifest",
    response_model=None,
    responses={
        200: {"content": {"application/json": {"schema": {"type": "object"}}}, "description": "The manifest."},
        **problems(404),
    },
)
async def show_manifest(backend: Serves, job_id: JobKey) -> PlainJson:
    """Show what a job that is done was made of and made; files by their names."""
    job = await backend.queue.job(job_id)
    outputs = views.outputs_of(job)
    if not outputs:
        raise NotFound("there is no manifest: the job has no results", hint="it is written when a job is done")
    said = await asyncio.to_thread(_read_manifest, str(outputs[0]["path"]), job.uid)
    return PlainJson(views.manifest_view(job, said), headers=SAFE_HEADERS | NO_STORE)


def _read_manifest(beside: str, uid: str) -> Mapping[str, Any]:
    """Return the manifest of a job that lies beside a result.

    Empty if there is none, or another thing's: results may be at a path of the user's own.
    """
    try:
        with open_regular(FilePath(beside).parent / MANIFEST) as file:
            said = json.loads(file.read(MANIFEST_MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) and said.get("job_id") == uid else {}


@router.get("/{job_id}/preview", response_model=None, responses=_file(404))
async def show_preview(
    backend: Serves, job_id: JobKey, n: Annotated[int | None, Query(ge=0, le=BIGGEST)] = None
) -> Response:
    """Show the newest preview picture of a job that runs here. `n` only tells one picture from the next."""
    del n
    job = await backend.queue.job(job_id)
    live = backend.app.live.job(job.uid)
    picture = live.preview if live is not None else None
    kind = _picture_type(picture)
    if picture is None or kind is None:
        raise NotFound("there is no preview picture", hint="there is one while a sampler runs")
    return Response(picture, media_type=kind, headers=SAFE_HEADERS | NO_STORE)


def _picture_type(picture: bytes | None) -> str | None:
    if picture is None:
        return None
    starts = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
    return next((kind for magic, kind in starts.items() if picture.startswith(magic)), None)


# -- files -------------------------------------------------------------------------------------------------


@router.get(
    "/{job_id}/outputs/{n}",
    response_model=None,
    responses={
        206: {"content": {"*/*": {}}, "description": "A range of the file."},
        304: {"description": "Not changed."},
        **_file(404, 410, 416),
    },
)
async def send_output(
    request: Request, backend: Serves, job_id: JobKey, n: Nth, download: Annotated[bool, Query()] = False
) -> Response:
    """Send a result: whole, a range of it, or nothing if the client has it already."""
    wanted = _output(await backend.queue.job(job_id), n)
    return await send_file(request, wanted, patience=backend.guard.http.stalled, download=download)


@router.get("/{job_id}/outputs/{n}/thumbnail", response_model=None, responses=_file(404, 410, 507))
async def send_output_thumbnail(backend: Serves, job_id: JobKey, n: Nth) -> Response:
    """Send a small picture of a result that is a picture."""
    return await send_thumbnail(backend.app.settings.files.state_dir, _output(await backend.queue.job(job_id), n))


def _output(job: QueuedJob, n: int) -> Wanted:
    outputs = views.outputs_of(job)
    if n >= len(outputs):
        words = f"it has {len(outputs)}" if outputs else f"it is {job.status}"
        raise NotFound(f"the job has no result {n}: {words}")
    output = outputs[n]
    name = views.file_name(output["path"])
    return Wanted(output["path"], name, views.media_type(name), output.get("size_bytes"), output.get("sha256") or None)


@router.get(
    "/{job_id}/inputs/{n}",
    response_model=None,
    responses={
        206: {"content": {"*/*": {}}, "description": "A range of the file."},
        304: {"description": "Not changed."},
        **_file(404, 410, 416),
    },
)
async def send_input(
    request: Request, backend: Serves, job_id: JobKey, n: Nth, download: Annotated[bool, Query()] = False
) -> Response:
    """Send a file that the job was given."""
    wanted = await asyncio.to_thread(_input, await backend.queue.job(job_id), n)
    return await send_file(request, wanted, patience=backend.guard.http.stalled, download=download)


@router.get("/{job_id}/inputs/{n}/thumbnail", response_model=None, responses=_file(404, 410, 507))
async def send_input_thumbnail(backend: Serves, job_id: JobKey, n: Nth) -> Response:
    """Send a small picture of an input that is a picture."""
    wanted = await asyncio.to_thread(_input, await backend.queue.job(job_id), n)
    return await send_thumbnail(backend.app.settings.files.state_dir, wanted)


def _input(job: QueuedJob, n: int) -> Wanted:
    """Return an input; what it is, its content says. Blocks. Raises NotFound."""
    files = views.input_files(job.request)
    if n >= len(files):
        raise NotFound(f"the job has no input file {n}: it has {len(files)}")
    _, path = files[n]
    try:
        with open_regular(path) as file:
            found = sniff(Source(file)).extension
    except OSError:
        found = ""  # told when it is opened to be sent
    return Wanted(path, views.file_name(path), views.media_type(f"input{found}"))


# -- changing their fate -----------------------------------------------------------------------------------


@router.delete("/{job_id}", response_model=None, responses=answers(200, Job, 404))
async def cancel_job(request: Request, backend: Serves, job_id: JobKey) -> PlainJson:
    """Cancel a job for good; one that has ended stays as it is."""
    return await _shown(backend, await backend.queue.cancel(job_id, by=_by(request, backend)))


@router.patch("/{job_id}", response_model=None, responses=answers(200, Job, 404))
async def change_job(request: Request, backend: Serves, job_id: JobKey, change: JobChange) -> PlainJson:
    """Move a job in the queue: a priority from 1 (next) to 999 (last), or before all others."""
    by = _by(request, backend)
    if change.first:
        return await _shown(backend, await backend.queue.god_mode(job_id, by=by))
    if change.priority is None:
        return await _shown(backend, await backend.queue.job(job_id))
    return await _shown(backend, await backend.queue.set_priority(job_id, change.priority, by=by))


@router.post("/{job_id}/retry", response_model=None, responses=answers(200, Job, 404, 409))
async def retry_job(request: Request, backend: Serves, job_id: JobKey) -> PlainJson:
    """Let a job that has ended run again from the start."""
    return await _shown(backend, await backend.queue.retry(job_id, by=_by(request, backend)))


async def _shown(backend: Backend, job: QueuedJob) -> PlainJson:
    return PlainJson(await teller_of(backend.app).job(job), headers=NO_STORE)


def _by(request: Request, backend: Backend) -> str:
    return f"http {backend.guard.principal_of(request).kind}"
