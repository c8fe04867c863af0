"""ComfyUI on a rented machine that lies: the client's calls, the socket's frames, histories and lists of nodes."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Final

import workflows
from benchmarks.fuzzing import recorded, running
from benchmarks.fuzzing.http import SEPARATOR, Script, ScriptedSession, script
from benchmarks.fuzzing.recorded import PROMPT
from benchmarks.fuzzing.scratch import scratch
from benchmarks.fuzzing.target import MACHINE, Seeds, Target, demand, only_ours, plain
from runcomfy.adapters.comfyui import wire
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.comfyui.exchange import Address
from runcomfy.adapters.comfyui.socket import Socket
from runcomfy.adapters.comfyui.submit import rejection
from runcomfy.adapters.files import safe_name
from runcomfy.application.seat import Seat
from runcomfy.application.watcher import _Watch
from runcomfy.domain.binding import bind, fit_seeds
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import FileRef, JobRequest, OutputKind, PromptId
from runcomfy.domain.preflight import files_to_check, preflight, require_runnable
from runcomfy.domain.progress import NodeLabel, Progress, QueueView
from runcomfy.domain.progress_fold import Ending, Polled, Tick, WatchEvent, fold, progress_of, watching
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import ComfySettings
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow
from runcomfy.domain.workflow_io import DeclaredOutput, find_outputs, match_declared
from runcomfy.ports.comfyui import Fetched, ServerInfo, Submitted
from runcomfy.testing.clock import LoopClock

OURS: Final = PromptId(PROMPT)
COMFY: Final = ComfySettings(
    max_retries=1,
    request_timeout=timedelta(seconds=5),
    unreachable_timeout=timedelta(seconds=10),
    download_timeout=timedelta(seconds=60),
    max_output_bytes=65_536,
    max_frame_bytes=65_536,
)
GRAPH: Final = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}, "_meta": {"title": "the input"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "out"}},
}
LABELS: Final = {number: NodeLabel(str(node["class_type"]), str(node["class_type"])) for number, node in GRAPH.items()}


# --- the client ---------------------------------------------------------------------------------------------


def _info(info: ServerInfo) -> None:
    plain(info.version, "a version", limit=60)
    demand(info.max_upload_bytes is None or info.max_upload_bytes > 0, "an upload limit of nothing")
    for value in info.details.values():
        demand(not isinstance(value, float) or math.isfinite(value), "a number that is none")
        if isinstance(value, str):
            plain(value, "a fact about the server", limit=256)


def _queue(view: QueueView) -> None:
    demand(all(isinstance(one, str) for one in (*view.running, *view.pending)), "an id that is no text")


def _submitted(found: Submitted) -> None:
    plain(found.prompt_id, "a prompt's id", limit=200)
    demand(found.prompt_id, "a prompt without an id")


async def _upload(client: ComfyUIWorkflowClient) -> str:
    path = scratch() / "a picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n1234")
    name = await client.upload(str(path))
    demand(name, "an upload without a name")
    return name


async def _fetch(client: ComfyUIWorkflowClient) -> None:
    target = scratch() / "fetched"
    target.unlink(missing_ok=True)
    whole = False
    try:
        found: Fetched = await client.fetch(FileRef("a.png", "sub", "output"), str(target))
        whole = True
        demand(0 < found.size_bytes == target.stat().st_size <= COMFY.max_output_bytes, "another size than was fetched")
    finally:
        demand(whole or not target.exists(), "a part of a file was left")
        target.unlink(missing_ok=True)


Ask = Callable[[ComfyUIWorkflowClient], Awaitable[Any]]


def _anything(value: Any) -> None:
    """Every result will do."""


_CALLS: Final[Mapping[str, tuple[Ask, Callable[[Any], None]]]] = {
    "probe": (lambda client: client.probe(), _info),
    "node_info": (
        lambda client: client.node_info(["LoadImage", "ImageInvert", "SaveImage"]),
        lambda found: _check(found, GRAPH),
    ),
    "class_names": (lambda client: client.class_names(), _anything),
    "queue": (lambda client: client.queue(), _queue),
    "history": (lambda client: client.history(OURS), _anything),
    "submit": (lambda client: client.submit(GRAPH, prompt_id=OURS), _submitted),
    "upload": (_upload, _anything),
    "cancel": (
        lambda client: client.cancel(OURS, alone=True),
        lambda told: demand(isinstance(told, bool), "no answer"),
    ),
    "withdraw": (lambda client: client.withdraw(OURS), lambda told: demand(isinstance(told, bool), "no answer")),
    "fetch": (_fetch, _anything),
}


async def _ask(told: Script) -> None:
    name = told.ask if told.ask in _CALLS else sorted(_CALLS)[sum(map(ord, told.ask)) % len(_CALLS)]
    ask, judge = _CALLS[name]
    http: Any = ScriptedSession(told.answers, "nowhere")
    client = ComfyUIWorkflowClient(SecretUrl(MACHINE), COMFY, clock=LoopClock(), http=http)
    try:
        with only_ours():
            judge(await ask(client))
    finally:
        await client.close()


def comfyui(data: bytes) -> None:
    """Every call of the client."""
    running.run(_ask(Script.read(data)))


def _comfyui_seeds() -> Iterator[tuple[str, bytes]]:
    kind = "Content-Type: application/json"
    for call, method, path in (
        ("queue", "GET", "/queue"),
        ("history", "GET", "/history/"),
        ("submit", "POST", "/prompt"),
        ("upload", "POST", "/upload/image"),
        ("probe", "GET", "/system_stats"),
        ("node_info", "GET", "/object_info/"),
        ("cancel", "POST", "/api/jobs/"),
    ):
        for name, status, body in recorded.answers(method, path, most=12):
            yield f"{call}-{name}", script(call, (status, kind, body))
    idle = b'{"queue_running":[],"queue_pending":[]}'
    waiting = recorded.as_json({"queue_running": [[0, PROMPT, {}, {}, []]], "queue_pending": [[1, PROMPT, {}, {}, []]]})
    stats = b'{"system":{"comfyui_version":"0.3.75"},"devices":[{"name":"cuda:0 L4","vram_total":24,"vram_free":1.5}]}'
    for call in _CALLS:
        yield f"{call}-broken", script(call, (0, "", b""), (500, "", b"x"), (200, kind, idle))
        yield f"{call}-page", script(call, (200, "Content-Type: text/html", b"<html>"))
        yield f"{call}-moved", script(call, (302, "Location: http://169.254.169.254/", b""))
        yield (
            f"{call}-asked",
            script(
                call,
                (200, kind, stats),
                (200, kind, b'{"max_upload_size": 1e8}'),
                (200, kind, b'{"cancelled": true}'),
                (200, kind, waiting),
                (200, kind, idle),
            ),
        )
    yield "submit-lost", script("submit", (0, "", b""), (200, kind, idle), (200, kind, b"{}"), (200, kind, waiting))
    yield (
        "submit-in-part",
        script(
            "submit",
            (
                200,
                kind,
                recorded.as_json(
                    {
                        "prompt_id": PROMPT,
                        "number": 1,
                        "node_errors": {
                            "3": {
                                "errors": [
                                    {
                                        "type": "x",
                                        "message": "m",
                                        "details": "d",
                                        "extra_info": {"input_name": "images"},
                                    }
                                ],
                                "class_type": "SaveImage",
                            }
                        },
                    }
                ),
            ),
            (200, kind, stats),
        ),
    )
    stored = b'{"name":"a.png","subfolder":"","type":"input"}'
    yield "upload-stored", script("upload", (200, kind, stored), (200, "Content-Length: 12", b""))
    yield (
        "upload-ranged",
        script("upload", (200, kind, stored), (405, "", b""), (206, "Content-Range: bytes 0-0/12", b"\x89")),
    )
    yield (
        "upload-of-endless-length",
        script(
            "upload", (200, kind, stored), (405, "", b""), (206, "Content-Range: bytes 0-0/" + "9" * 4_400, b"\x89")
        ),
    )
    yield (
        "fetch",
        script(
            "fetch",
            (200, "Content-Type: image/png|ETag: a|Content-Length: 9", b"\x89PNG12345"),
            (200, "ETag: a|Content-Length: 9", b""),
        ),
    )
    yield (
        "fetch-in-parts",
        script(
            "fetch",
            (200, "ETag: a|Content-Length: 9", b"\x89PNG"),
            (206, "ETag: a|Content-Range: bytes 4-8/9", b"12345"),
            (200, "ETag: a|Content-Length: 9", b""),
        ),
    )
    yield (
        "fetch-past-the-end",
        script("fetch", (200, "Content-Length: 9", b"\x89PNG"), (416, "Content-Range: bytes */4", b"")),
    )
    yield "fetch-too-large", script("fetch", (200, "", b"a" * 70_000))
    yield "deep", script("history", (200, kind, b'{"a":' * 990 + b"1" + b"}" * 990))


# --- frames -------------------------------------------------------------------------------------------------


def _shown(progress: Progress, before: float) -> float:
    demand(math.isfinite(progress.percent) and before <= progress.percent <= 100, f"{progress.percent} %")
    plain(progress.message, "what is told of a run", limit=2_000)
    plain(progress.node_title, "a node's title", limit=1_000)
    for number in (progress.value, progress.maximum):
        demand(number is None or math.isfinite(number), "a number that is none")
    demand(progress.nodes_done <= max(progress.nodes_total, len(progress.done)), "more nodes than there are")
    return progress.percent


async def _hear(frames: list[bytes]) -> None:
    socket = Socket(Address(MACHINE), COMFY)
    state = watching(PROMPT, LABELS, now=0.0)
    percent = 0.0
    async with _listening(socket) as heard:
        for now, raw in enumerate(frames):
            if len(raw) > COMFY.max_frame_bytes:
                continue
            frame = wire.read_frame(raw)
            if frame is None:
                continue
            socket._dispatch(frame)
            events: list[WatchEvent] = [*heard._events, Tick()]
            heard._events.clear()
            for event in events:
                state = fold(state, event, float(now))
                percent = _shown(progress_of(state), percent)
    demand(len(state.evidence.outputs) <= 2_000 and len(state.run.shares) <= 50_000, "endless outputs or nodes")


class _listening:  # noqa: N801 - read as a verb
    """A subscription of a socket that is never opened."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    async def __aenter__(self) -> Any:
        from runcomfy.adapters.comfyui.socket import Subscription

        subscription = Subscription()
        self._socket._register(PROMPT, subscription)
        return subscription

    async def __aexit__(self, *_: object) -> None:
        return None


def frames(data: bytes) -> None:
    """What a socket says, in text and binary, up to what a person is told."""
    running.run(_hear(data.split(SEPARATOR)))


def _frames_seeds() -> Seeds:
    for name, told in recorded.talks(most=24):
        yield name, SEPARATOR.join(frame for frame in told if SEPARATOR not in frame)[:12_000]
    metadata = recorded.as_json(
        {"image_type": "image/png", "prompt_id": PROMPT, "node_id": "3", "display_node_id": "3"}
    )
    pictured = (4).to_bytes(4, "big") + len(metadata).to_bytes(4, "big") + metadata + b"\x89PNG"
    yield "previews", SEPARATOR.join((pictured, (1).to_bytes(8, "big")[4:] + (2).to_bytes(4, "big") + b"\x89PNG"))
    yield "a-text", (3).to_bytes(4, "big") + (1).to_bytes(4, "big") + b"3" + b"half done\x1b[2J"
    moves = {
        "type": "progress_state",
        "data": {
            "prompt_id": PROMPT,
            "nodes": {"2": {"value": 3, "max": 4, "state": "running", "node_id": "2", "display_node_id": "2"}},
        },
    }
    yield "progress", recorded.as_json(moves)
    escape = {"type": "executing", "data": {"prompt_id": PROMPT, "node": "\x1b]0;owned\x07"}}
    yield "a-node-that-writes-to-the-terminal", recorded.as_json(escape)


# --- how a prompt ended -------------------------------------------------------------------------------------

_DECLARED: Final = (DeclaredOutput("picture", "3", OutputKind.IMAGE, "out.png", required=False),)


async def _judge(answer: Any) -> None:
    try:
        entry = wire.read_history(answer, PROMPT)
    except wire.Unreadable:
        return
    watch = _Watch(_Nobody(), COMFY, LoopClock(), OURS, LABELS, None, None, Seat())  # type: ignore[arg-type]
    watch._fold(Polled(QueueView((), ()), entry))
    watch._fold(Polled(QueueView((), ()), entry))
    demand(isinstance(watch.state.ending, Ending), "two readings decide nothing")
    with only_ours():
        ended = watch.conclude()
        found = find_outputs(ended.outputs)
        demand(len(found) <= 10_000, "endless results")
        for matched in match_declared(found, _DECLARED):
            file = matched.found.file
            if file is not None:
                name = safe_name(file.filename)
                demand(PurePosixPath(name).name == name and name not in (".", "..") and "\\" not in name, repr(name))
                plain(name, "a result's name", limit=255)


class _Nobody:
    masked_url = "http://***"


def history(data: bytes) -> None:
    """A history's entry, up to the results or the error that a person sees."""
    try:
        answer = wire.read_json(data, lenient=True)
        running.run(_judge(answer))
    except wire.Unreadable:
        return


def _history_seeds() -> Seeds:
    for name, code, body in recorded.answers("GET", "/history", most=60):
        if code == 200:
            yield name, body
    outputs = {
        "3": {
            "images": [
                {"filename": "../../x", "subfolder": "..", "type": "output"},
                {"filename": "C:\\con.png", "subfolder": "", "type": "temp"},
            ],
            "text": ["hi"],
            "result": ["/output/3d/a.glb"],
        }
    }
    status = {
        "status_str": "error",
        "completed": False,
        "messages": [
            ["execution_start", {"timestamp": 1e300}],
            [
                "execution_error",
                {
                    "node_id": "2",
                    "node_type": "X",
                    "exception_type": "torch.OutOfMemoryError",
                    "exception_message": "CUDA out of memory\x1b[31m",
                    "traceback": ["a\nb\x1b"],
                },
            ],
        ],
    }
    yield "error", recorded.as_json({PROMPT: {"outputs": outputs, "status": status}})
    done = {
        "status_str": "success",
        "completed": True,
        "messages": [
            ["execution_start", {"timestamp": 1763900000000}],
            ["execution_cached", {"nodes": ["1"]}],
            ["execution_success", {"timestamp": 1763900009000}],
        ],
    }
    yield "success", recorded.as_json({PROMPT: {"outputs": outputs, "status": done}})


# --- lists of nodes -----------------------------------------------------------------------------------------


@cache
def _shipped() -> tuple[tuple[Workflow, Sidecar], ...]:
    found = []
    for name in workflows.names():
        text, toml = workflows.load(name)
        found.append((Workflow.parse(text, name=name), Sidecar.parse(toml or "", name=name)))
    return tuple(found)


def _check(info: Mapping[str, Any], graph: Mapping[str, Any] | None = None) -> None:
    problems = preflight(graph or GRAPH, info, uploads=[("1", "image")], class_names=list(info)[:200])
    demand(len(problems) < 100_000, "endless problems")
    for problem in problems[:100]:
        plain(problem.message, "a problem", limit=2_000)
        plain(problem.hint, "its hint", limit=2_000)
    files_to_check(graph or GRAPH, info)
    with only_ours():
        require_runnable(problems)


def object_info(data: bytes) -> None:
    """What the server says of its nodes, against the workflows that ship."""
    try:
        info = wire.read_json(data, lenient=True)
    except wire.Unreadable:
        return
    if not isinstance(info, dict):
        return
    _check(info)
    for workflow, sidecar in _shipped():
        with only_ours():
            bound = bind(
                workflow, sidecar, JobRequest(workflow.name, image="a.png", prompt="p"), random_int=lambda a, b: a
            )
            fit_seeds(bound, info)
            _check(info, bound.graph)


def _object_info_seeds() -> Seeds:
    for name, status, body in recorded.answers("GET", "/object_info", most=40):
        if status == 200:
            yield name, body
    classes = sorted({node["class_type"] for workflow, _ in _shipped() for node in workflow.graph.values()})
    for name in classes:
        entry = {
            "input": {
                "required": {
                    "image": ["IMAGE", {}],
                    "seed": ["INT", {"default": 0, "min": 0, "max": 9, "step": 1}],
                    "steps": [["a", "b"], {"image_upload": True}],
                    "text": ["STRING", {"multiline": True}],
                },
                "optional": {"model": ["COMBO", {"options": ["x.safetensors"]}]},
            },
            "output": ["IMAGE"],
            "output_node": True,
            "name": name,
        }
        yield f"made-{name[:30]}".replace("/", "_"), recorded.as_json({name: entry})


# --- refusals -----------------------------------------------------------------------------------------------


def refusal(data: bytes) -> None:
    """What a 400 to a prompt says."""
    try:
        said = wire.read_json(data, lenient=True)
    except wire.Unreadable:
        return
    if isinstance(said, dict):
        error: RunComfyError = rejection(GRAPH, said, 400)
        with only_ours():
            raise error


def _refusal_seeds() -> Seeds:
    for name, status, body in recorded.answers("POST", "/prompt", most=60):
        if status == 400:
            yield name, body


TARGETS: Final = (
    Target(
        "comfyui",
        comfyui,
        _comfyui_seeds,
        share=110,
        words=(
            "prompt_id",
            "queue_running",
            "queue_pending",
            "node_errors",
            "extra_info",
            "comfyui_version",
            "max_upload_size",
            "cancelled",
            "subfolder",
            "Content-Range: bytes 0-0/",
            "Content-Length: ",
            "ETag: ",
            "submit",
            "history",
        ),
    ),
    Target(
        "frames",
        frames,
        _frames_seeds,
        share=200,
        words=(
            "execution_cached",
            "execution_error",
            "progress_state",
            "execution_success",
            "execution_interrupted",
            "executed",
            "executing",
            "display_node_id",
            "exception_type",
            "ExecutionBlocked",
            "image_type",
            "\n%%\n",
        ),
        max_bytes=8192,
    ),
    Target(
        "history",
        history,
        _history_seeds,
        share=130,
        words=(
            "status_str",
            "messages",
            "outputs",
            "images",
            "filename",
            "subfolder",
            "timestamp",
            "execution_error",
            "traceback",
            PROMPT,
        ),
    ),
    Target(
        "object_info",
        object_info,
        _object_info_seeds,
        share=10,
        words=(
            "required",
            "optional",
            "COMBO",
            "options",
            "image_upload",
            "output_node",
            "COMFY_DYNAMICCOMBO_V3",
            "COMFY_AUTOGROW_V3",
            "min",
            "max",
            "control_after_generate",
        ),
    ),
    Target("refusal", refusal, _refusal_seeds, share=80, words=("node_errors", "errors", "extra_info", "input_name")),
)
