"""
What clients of the HTTP API are shown: pure functions from the queue's values to JSON.

Nothing that is only this computer's business gets out: files go by their names, never by their paths; machines by
their ids, never by their addresses. Everything a route, the event stream or the page says of a job is made here, so
that all of them say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from launcher.api_words import api_words
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.job import JobId, JobRequest, OutputKind
from runcomfy.domain.queued import Attempt, JobEvent, Pause, QueuedJob, QueueStatus

if TYPE_CHECKING:
    from runcomfy.application.job_queue import JobStory
    from runcomfy.application.live import LiveJob
    from runcomfy.domain.progress import Progress
    from runcomfy.domain.time_left import TimeLeft

Json = dict[str, Any]

EVENTS_SHOWN: Final = 200
"""Of a job's log; the whole of it is read over `/jobs/ID/events`."""
TEXT_SHOWN: Final = 20_000
"""Characters of a message, a hint or a prompt; longer ones are cut."""
UNKNOWN_TYPE: Final = "application/octet-stream"

MEDIA_TYPES: Final[Mapping[str, str]] = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".obj": "model/obj",
    ".stl": "model/stl",
    ".ply": "model/ply",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mov": "video/quicktime",
    ".mkv": "video/x-matroska",
    ".ogv": "video/ogg",
    ".m4a": "audio/mp4",
    ".mka": "audio/x-matroska",
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
    ".flac": "audio/flac",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".txt": "text/plain; charset=utf-8",
}
"""By the ending that our own inspection gave a file. What is not here is a download and nothing else."""

PICTURES: Final = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"})

_KIND_OF: Final = {
    "image": OutputKind.IMAGE,
    "model": OutputKind.MESH,
    "video": OutputKind.VIDEO,
    "audio": OutputKind.AUDIO,
    "text": OutputKind.TEXT,
}

_OURS: Final = "jobs|uploads|machines|costs|presence|workflows|queue|session|events|metrics|mode|state|flux|dev"
_PATH: Final = re.compile(
    rf"(?<![\w:/.])/(?!(?:{_OURS})\b)(?:[^\s/'\"():,;]+/)+([^\s/'\"():,;]*)|\b[A-Za-z]:\\(?:[^\\'\"\r\n]+\\)*([^\s\\'\"]*)"
)


def without_paths(text: str) -> str:
    """Return a text for people with every absolute path of this computer cut to the file's name."""
    return _PATH.sub(lambda found: f"…/{found[1] or found[2] or ''}", text)


def file_name(path: str) -> str:
    """Return the last part of a path of this computer or of another kind of computer."""
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name


def media_type(name: str) -> str:
    """Return the media type of a file by the ending that our own inspection gave it."""
    return MEDIA_TYPES.get(PurePosixPath(name.lower()).suffix, UNKNOWN_TYPE)


def kind_of(name: str) -> OutputKind:
    """Return what a file is by its ending."""
    return _KIND_OF.get(media_type(name).partition("/")[0], OutputKind.FILE)


def iso(at: datetime | None) -> str | None:
    """Return a time as programs read it: ISO 8601, UTC."""
    return None if at is None else at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def usd(amount: Decimal | None) -> str | None:
    """Return money as text, exactly."""
    return None if amount is None else format(amount, "f")


# -- a job -------------------------------------------------------------------------------------------------


def job_view(
    job: QueuedJob,
    live: LiveJob | None = None,
    time_left: TimeLeft | None = None,
    *,
    cost_usd: Decimal | None = None,
) -> Json:
    """Return a job as `GET /jobs` shows it.

    `live` is its run, where it runs in this process; `cost_usd` what it has cost so far. Of a job that is done its
    result says what it cost.
    """
    base = f"/jobs/{quote(job.uid, safe='')}"
    running = job.status is QueueStatus.PROCESSING
    result = job.result
    return {
        "id": job.uid,
        "number": job.id,
        "name": job.config_name,
        "workflow": workflow_name(job),
        "job_type": job.job_type,
        "status": str(job.status),
        "reason": job.reason or None,
        "prompt": prompt_of(job.request),
        "priority": job.priority,
        "user": job.user,
        "project": job.project,
        "created_at": iso(job.created_at),
        "started_at": iso(job.start_time),
        "ended_at": iso(job.end_time),
        "duration_s": job.duration,
        "attempts": job.run_count,
        "progress": progress_view(job, live) if running else None,
        "time_left": time_left_view(time_left, begun=running) if not job.ended and time_left is not None else None,
        "cost_usd": _cost(job, cost_usd),
        "seeds": {str(name): seed for name, seed in _mapping(result.get("seeds")).items()},
        "machine": machine_of(job, live),
        "error": error_of(job),
        "inputs": [_input_view(base, n, entry) for n, entry in enumerate(input_files(job.request))],
        "outputs": [_output_view(base, n, entry) for n, entry in enumerate(outputs_of(job))],
        "urls": {"self": base, "events": f"{base}/events", "log": f"{base}/log", "manifest": f"{base}/manifest"},
    }


def detail_view(
    story: JobStory,
    live: LiveJob | None = None,
    time_left: TimeLeft | None = None,
    *,
    cost_usd: Decimal | None = None,
) -> Json:
    """Return everything that is known of a job."""
    job = story.job
    return job_view(job, live, time_left, cost_usd=cost_usd) | {
        "request": request_view(job),
        "runs": [attempt_view(attempt) for attempt in story.attempts],
        "timeline": timeline_of(job, live),
        "events": [event_view(event) for event in story.events[-EVENTS_SHOWN:]],
    }


def workflow_name(job: QueuedJob) -> str:
    """Return what a job's workflow is called; a file by its name alone."""
    return file_name(job.workflow_id) or job.workflow_id


def prompt_of(request: JobRequest | None) -> str | None:
    """Return the prompt somebody wrote, wherever the request has it."""
    if request is None:
        return None
    said = request.prompt if request.prompt is not None else request.inputs.get("prompt")
    return said[:TEXT_SHOWN] if isinstance(said, str) else None


def _cost(job: QueuedJob, so_far: Decimal | None) -> str | None:
    if job.status is QueueStatus.DONE:
        said = job.result.get("cost_usd")
        return said if isinstance(said, str) else None
    return usd(so_far)


def machine_of(job: QueuedJob, live: LiveJob | None) -> Json | None:
    """Return where a job runs or ran: the machine's type and, while it is there, its id in our books."""
    machine_id = job.place.partition(":")[2] if job.place is not None and job.place.startswith("machine:") else None
    said = (live.server_type if live is not None else "") or job.result.get("server_type")
    if not said and machine_id is None:
        return None
    return {"server_type": said if isinstance(said, str) and said else None, "id": machine_id}


def error_of(job: QueuedJob) -> Json | None:
    """Return why a job failed, or why its last run did if it waits for another; None if there is nothing to say."""
    if job.status is QueueStatus.DONE or not (job.error_trace or job.status is QueueStatus.FAILED):
        return None
    lines = (job.error_trace or "").strip().splitlines()
    code, parted, message = lines[0].partition(": ") if lines else ("", "", "")
    if not parted or " " in code:
        code, message = job.reason, lines[0] if lines else ""
    hint = next((line.removeprefix("hint: ") for line in lines[1:] if line.startswith("hint: ")), "")
    return {
        "code": foreign_text(code or job.reason or "failed", 80),
        "message": foreign_text(api_words(without_paths(message or job.reason or "it failed")), 1_000),
        "hint": foreign_text(api_words(without_paths(hint)), 1_000),
    }


def outputs_of(job: QueuedJob) -> Sequence[Mapping[str, Any]]:
    """Return what a job's result says of its files; empty unless it is done."""
    outputs = job.result.get("outputs")
    if job.status is not QueueStatus.DONE or not isinstance(outputs, list):
        return ()
    return [output for output in outputs if isinstance(output, Mapping) and isinstance(output.get("path"), str)]


def _output_view(base: str, n: int, output: Mapping[str, Any]) -> Json:
    name = file_name(output["path"])
    url = f"{base}/outputs/{n}"
    kind = output.get("kind")
    return {
        "n": n,
        "name": str(output.get("name") or "") or name,
        "kind": kind if kind in list(OutputKind) else str(kind_of(name)),
        "file": name,
        "media_type": media_type(name),
        "size_bytes": output.get("size_bytes"),
        "sha256": output.get("sha256"),
        "url": url,
        "thumbnail": f"{url}/thumbnail" if media_type(name) in PICTURES else None,
    }


def input_files(request: JobRequest | None) -> list[tuple[str, str]]:
    """Return the files a request brings, each with the name of the input it is for: (input, path)."""
    if request is None:
        return []
    found = [("image", request.image)] if request.image else []
    for values in (request.inputs, request.sets):
        for name, value in values.items():
            if isinstance(value, str) and value.startswith("@") and not value.startswith("@@") and len(value) > 1:
                found.append((str(name), value[1:]))
    return found


def _input_view(base: str, n: int, entry: tuple[str, str]) -> Json:
    name, path = entry
    shown = file_name(path)
    url = f"{base}/inputs/{n}"
    return {
        "n": n,
        "name": name,
        "kind": str(kind_of(shown)),
        "file": shown,
        "url": url,
        "thumbnail": f"{url}/thumbnail" if media_type(shown) in PICTURES else None,
    }


def request_view(job: QueuedJob) -> Json:
    """Return what was asked for, with files by their names."""
    request = job.request
    if request is None:
        return {"workflow": workflow_name(job), "prompt": None, "seed": None, "sets": {}, "inputs": {}}
    return {
        "workflow": workflow_name(job) if isinstance(request.workflow, str) else dict(request.workflow),
        "prompt": prompt_of(request),
        "seed": request.seed,
        "sets": _values_view(request.sets),
        "inputs": _values_view(request.inputs),
    }


def _values_view(values: Mapping[str, Any]) -> Json:
    return {
        str(name): f"@{file_name(value[1:])}" if isinstance(value, str) and value.startswith("@") else value
        for name, value in values.items()
    }


# -- while it runs -----------------------------------------------------------------------------------------


def progress_view(job: QueuedJob, live: LiveJob | None) -> Json:
    """Return how far a job is: as it is seen in this process, else as its worker wrote it down now and then."""
    if live is not None:
        return live_progress(job.uid, live)
    return {
        "percent": round(job.progress, 2),
        "step": None,
        "message": foreign_text(without_paths(job.message)),
        "node_id": None,
        "node_title": None,
        "value": None,
        "maximum": None,
        "nodes_done": 0,
        "nodes_total": 0,
        "queue_position": None,
        "elapsed_s": None,
        "preview": None,
    }


def live_progress(uid: JobId, live: LiveJob) -> Json:
    """Return the newest snapshot of a job that runs in this process."""
    progress: Progress = live.progress
    number = live.preview_number
    return {
        "percent": round(progress.percent, 2),
        "step": str(progress.step),
        "message": foreign_text(without_paths(progress.message)),
        "node_id": progress.node_id,
        "node_title": foreign_text(progress.node_title) or None,
        "value": progress.value,
        "maximum": progress.maximum,
        "nodes_done": progress.nodes_done,
        "nodes_total": progress.nodes_total,
        "queue_position": progress.queue_position,
        "elapsed_s": round(progress.elapsed.total_seconds(), 3),
        "preview": f"/jobs/{quote(uid, safe='')}/preview?n={number}" if number else None,
    }


def time_left_view(left: TimeLeft, *, begun: bool) -> Json:
    """Return how long a job will still take, in seconds: from now if it has begun, else from when it does."""
    return {
        "counts_from": "now" if begun else "start",
        "low_s": round(left.low_s, 1),
        "expected_s": round(left.expected_s, 1),
        "high_s": round(left.high_s, 1),
        "sure": left.sure,
        "runs": left.runs,
    }


def timeline_of(job: QueuedJob, live: LiveJob | None) -> list[Json]:
    """Return the nodes in the order in which they were computed: of the run under way, else of the result."""
    if live is not None:
        nodes: Sequence[Any] = live.timeline.as_list()
    else:
        said = job.result.get("nodes")
        nodes = said if isinstance(said, list) else []
    names = ("node_id", "title", "class_type", "started_s", "seconds", "cached")
    return [{name: node.get(name) for name in names} for node in nodes if isinstance(node, Mapping)]


# -- the log -----------------------------------------------------------------------------------------------


def attempt_view(attempt: Attempt) -> Json:
    """Return one try of a job."""
    return {
        "token": attempt.token,
        "run": attempt.run,
        "started_at": iso(attempt.started_at),
        "ended_at": iso(attempt.ended_at),
        "outcome": str(attempt.outcome) if attempt.outcome is not None else None,
        "error_code": attempt.error_code or None,
    }


def event_view(event: JobEvent) -> Json:
    """Return one line of the log."""
    return {
        "number": event.number,
        "at": iso(event.at),
        "kind": str(event.kind),
        "data": {str(name): _shown(value) for name, value in event.data.items() if name not in _KEPT_BACK},
    }


_KEPT_BACK: Final = frozenset({"place", "worker_id", "by", "path", "source_path", "url"})
"""Of an event: where servers are, and which processes and people of this computer had to do with it."""


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)[:TEXT_SHOWN]
    if isinstance(value, Mapping):
        return {str(name): _shown(item) for name, item in value.items() if name not in _KEPT_BACK}
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return value


def manifest_view(job: QueuedJob, said: Mapping[str, Any]) -> Json:
    """Return a job's manifest, as it lies beside the results or, without one, as the queue knows it; no paths."""
    facts = dict(said) if said else {"job_id": job.uid, **job.result}
    facts.pop("outputs", None)
    files = [_output_view(f"/jobs/{quote(job.uid, safe='')}", n, entry) for n, entry in enumerate(outputs_of(job))]
    return {str(name): _shown(value) for name, value in facts.items() if name not in _KEPT_BACK} | {"outputs": files}


def log_text(story: JobStory) -> str:
    """Return the story of a job as lines of text: every event, and what the last error says in full."""
    lines = [f"job {story.job.id} {story.job.uid} ({workflow_name(story.job)})"]
    for event in story.events:
        shown = event_view(event)
        facts = " ".join(f"{name}={foreign_text(value, 300)}" for name, value in shown["data"].items())
        lines.append(f"{shown['at']} {shown['kind']} {facts}".rstrip())
    if story.job.error_trace:
        lines += ["", *(foreign_text(without_paths(line), 500) for line in story.job.error_trace.splitlines()[:400])]
    return "\n".join(lines) + "\n"


def pause_view(pause: Pause) -> Json:
    """Return what is paused, and why."""
    return {
        "scope": pause.scope.partition(":")[0],
        "reason": pause.reason,
        "message": foreign_text(without_paths(pause.message), 500),
        "since": iso(pause.since),
        "until": iso(pause.until),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
